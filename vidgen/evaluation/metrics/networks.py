"""VBench's feature networks, which users provide, with its preprocessing.

dino       folder of a transformers ViT (facebook/dino-vitb16)
clip       folder of a transformers CLIP (openai/clip-vit-base-patch32)
dreamsim   TorchScript: pictures [1, 3, 224, 224] in [0, 1] -> features [1, D]
raft       TorchScript: two pictures [1, 3, H, W], 0 to 255, sides divisible by 8 -> flow
           [1, 2, H, W] in pixels (x, y)
amt        TorchScript: two pictures [1, 3, H, W] in [0, 1], sides divisible by 16 -> the
           picture between them, the same shape
i3d        TorchScript: video [1, 3, 16, 224, 224] in [-1, 1] -> features [1, D]

Axes: H W rows and columns, D values of a feature.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vidgen.core.errors import ModelError
from vidgen.media.types import Frames

_SIDE, _I2V_SIDE = 224, 256
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Networks:
    """The given networks, loaded on the CPU in float32.

    Raises:
        ModelError: a network can't be loaded.
    """

    def __init__(self, paths: Mapping[str, Path]) -> None:
        self._loaded: dict[str, Any] = {}
        for name, path in paths.items():
            try:
                self._loaded[name] = _load(name, path)
            except Exception as error:  # damaged weights raise anything
                reason = str(error)[:200]
                raise ModelError(f"{name} can't be loaded from {path}: {reason}") from error

    def __contains__(self, name: str) -> bool:
        return name in self._loaded

    def dino(self, frame: Frames) -> NDArray[np.float32]:
        """Return the class token [D] of a frame [H, W, 3], short side 224, uncropped."""
        return self._class_token(normalised(resized(frame, _SIDE, "bilinear"), *_IMAGENET))

    def dino_i2v(self, frame: Frames, *, given: bool = False) -> NDArray[np.float32]:
        """Return the class token [D] as in VBench-I2V: short side 256, antialiased, crop of 224.

        A `given` frame [H, W, 3], the requested first one, is resized by Pillow in uint8.
        """
        picture = centre(smoothed(frame, _short_side(frame, _I2V_SIDE), given), _SIDE)
        return self._class_token(normalised(picture, *_IMAGENET))

    def clip(self, frame: Frames) -> NDArray[np.float32]:
        """Return the projected feature [D] of a frame [H, W, 3], its centre crop of 224."""
        picture = normalised(centre(resized(frame, _SIDE, "bicubic"), _SIDE), *_CLIP)
        return self._feature("clip", lambda net: net(pixel_values=picture).image_embeds)

    def dreamsim(self, frame: Frames, *, given: bool = False) -> NDArray[np.float32]:
        """Return the feature [D] of a frame [H, W, 3] at 224x224; `given` as in `dino_i2v`."""
        picture = smoothed(frame, (_SIDE, _SIDE), given) / 255
        return self._feature("dreamsim", lambda net: net(picture))

    def raft(self, one: Frames, other: Frames) -> NDArray[np.float32]:
        """Return the flow [H, W, 2] between frames, for a network that needs sides divisible by 8.

        The flow covers the frames padded by their edges, as in VBench.
        """
        found, _ = self._between("raft", one, other, 8, 1.0, channels=2)
        return np.ascontiguousarray(found[0].permute(1, 2, 0).numpy())

    def amt(self, one: Frames, other: Frames) -> Frames:
        """Return the frame [H, W, 3] between two; levels are truncated, as in VBench."""
        found, inside = self._between("amt", one, other, 16, 1 / 255, channels=3)
        levels = (found[0].permute(1, 2, 0)[inside] * 255).clamp(0, 255)
        return levels.to(torch.uint8).numpy()

    def i3d(self, frames: Sequence[Frames]) -> NDArray[np.float32]:
        """Return the feature [D] of frames [H, W, 3], at 224x224."""
        small = [
            F.interpolate(tensor(frame), (_SIDE, _SIDE), mode="bilinear", align_corners=False)
            for frame in frames]
        video = torch.stack(small, dim=2) / 127.5 - 1
        return self._feature("i3d", lambda net: net(video))

    def _between(
        self, name: str, one: Frames, other: Frames, divisor: int, scale: float, *, channels: int
    ) -> tuple[Tensor, tuple[slice, slice]]:
        """Run a network on two pictures, padded evenly by their edges to a divisor of the sides.

        Return its output for the padded pictures, and the place of the pictures themselves in it.
        """
        height, width = one.shape[:2]
        down, across = -height % divisor, -width % divisor
        top, left = down // 2, across // 2
        edges = (left, across - left, top, down - top)
        pair = [F.pad(tensor(f) * scale, edges, mode="replicate") for f in (one, other)]
        found = self._called(name, lambda net: net(*pair))
        wanted = (1, channels, *pair[0].shape[2:])
        if found.shape != wanted:
            raise ModelError(f"{name} gave {list(found.shape)}, not {list(wanted)}")
        return found, (slice(top, top + height), slice(left, left + width))

    def _class_token(self, picture: Tensor) -> NDArray[np.float32]:
        return self._feature("dino", lambda net: net(
            pixel_values=picture, interpolate_pos_encoding=True
        ).last_hidden_state[:, 0])  # fmt: skip

    def _feature(self, name: str, call: Callable[[Any], Tensor]) -> NDArray[np.float32]:
        return self._called(name, call)[0].flatten().numpy()

    @torch.inference_mode()
    def _called(self, name: str, call: Callable[[Any], Tensor]) -> Tensor:
        try:
            return call(self._loaded[name]).float().cpu()
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1][:200]
            raise ModelError(
                f"{name} failed; its interface is described in docs/reference/metrics.md: {reason}"
            ) from error


def _load(name: str, path: Path) -> Any:
    if path.is_file():
        return torch.jit.load(str(path), map_location="cpu").eval()
    if name == "dino":
        from transformers import ViTModel

        network = ViTModel.from_pretrained(path, local_files_only=True, add_pooling_layer=False)
        network.embeddings.interpolate_pos_encoding = partial(_positions, network.embeddings)
        return network.float().eval()
    from transformers import CLIPVisionModelWithProjection

    return CLIPVisionModelWithProjection.from_pretrained(path, local_files_only=True).float().eval()


def _positions(embeddings: Any, _tokens: Tensor, height: int, width: int) -> Tensor:
    """Return position embeddings [1, 1 + h w, D], interpolated as in DINO's own code.

    That code adds a tenth of a patch against rounding; transformers does not.
    """
    known: Tensor = embeddings.position_embeddings
    side = math.isqrt(known.shape[1] - 1)
    patch = embeddings.patch_embeddings.patch_size
    size = height // patch[0], width // patch[1]
    if size == (side, side) and height == width:
        return known
    grid = known[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    scale = [(count + 0.1) / side for count in size]
    stretched = F.interpolate(grid, scale_factor=scale, mode="bicubic")
    return torch.cat([known[:, :1], stretched.flatten(2).transpose(1, 2)], dim=1)


def tensor(frame: Frames) -> Tensor:
    """Return a frame [H, W, 3] as [1, 3, H, W], 0 to 255."""
    return torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)[None].float()


def resized(frame: Frames, side: int, mode: str) -> Tensor:
    """Return a frame [H, W, 3] as [1, 3, h, w] whose short side is `side`, without antialiasing."""
    return F.interpolate(tensor(frame), _short_side(frame, side), mode=mode, align_corners=False)


def smoothed(frame: Frames, size: tuple[int, int], given: bool) -> Tensor:
    """Return a frame [H, W, 3] as [1, 3, *size], bicubic and antialiased; if `given`, in uint8."""
    if given:
        from PIL import Image

        picture = Image.fromarray(frame).resize(size[::-1], Image.Resampling.BICUBIC)
        return tensor(np.array(picture))
    return F.interpolate(tensor(frame), size, mode="bicubic", align_corners=False, antialias=True)


def _short_side(frame: Frames, side: int) -> tuple[int, int]:
    height, width = frame.shape[:2]
    short = min(height, width)
    return int(side * height / short), int(side * width / short)


def centre(picture: Tensor, side: int) -> Tensor:
    """Return the central `side` x `side` crop of [1, 3, H, W]."""
    height, width = picture.shape[-2:]
    top, left = round((height - side) / 2), round((width - side) / 2)
    return picture[..., top : top + side, left : left + side]


def normalised(picture: Tensor, mean: tuple[float, ...], deviation: tuple[float, ...]) -> Tensor:
    """Return [1, 3, H, W], 0 to 255, scaled to [0, 1] and normalised by mean and deviation."""
    shape = (1, 3, 1, 1)
    return (picture / 255 - torch.tensor(mean).view(shape)) / torch.tensor(deviation).view(shape)
