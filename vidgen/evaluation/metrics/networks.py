"""VBench's feature networks at work, with its preprocessing; `network_files` tells their files.

Axes: T frames, H W rows and columns, D width of a feature.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vidgen.core.errors import ModelError
from vidgen.evaluation.metrics.network_files import FOLDERS
from vidgen.media.encode import Frames

_SIDE = 224
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Networks:
    """Those networks that are there, loaded on the CPU in float32.

    Raises:
        ModelError: one that can't be loaded.
    """

    def __init__(self, paths: Mapping[str, Path]) -> None:
        self._loaded: dict[str, Any] = {}
        for name, path in paths.items():
            try:
                self._loaded[name] = _load(name, path)
            except Exception as error:  # whatever damaged weights lead to
                reason = str(error)[:200]
                raise ModelError(f"{name} can't be loaded from {path}: {reason}") from error

    def __contains__(self, name: str) -> bool:
        return name in self._loaded

    def dino(self, frame: Frames) -> NDArray[np.float32]:
        """Class token [D] of a frame [H, W, 3]: short side 224, no crop, ImageNet's scale."""
        picture = normalised(resized(frame, _SIDE, "bilinear"), *_IMAGENET)
        return self._feature("dino", lambda net: net(
            pixel_values=picture, interpolate_pos_encoding=True
        ).last_hidden_state[:, 0])  # fmt: skip

    def clip(self, frame: Frames) -> NDArray[np.float32]:
        """Projected feature [D] of a frame [H, W, 3]: short side and centre crop of 224."""
        picture = normalised(centre(resized(frame, _SIDE, "bicubic"), _SIDE), *_CLIP)
        return self._feature("clip", lambda net: net(pixel_values=picture).image_embeds)

    def dreamsim(self, frame: Frames) -> NDArray[np.float32]:
        """Feature [D] of a frame [H, W, 3], brought to 224x224."""
        picture = F.interpolate(
            tensor(frame), (_SIDE, _SIDE), mode="bicubic", align_corners=False
        ) / 255  # fmt: skip
        return self._feature("dreamsim", lambda net: net(picture))

    def raft(self, one: Frames, other: Frames) -> NDArray[np.float32]:
        """Flow [H, W, 2] from one frame [H, W, 3] to another, at their size."""
        found = self._between("raft", one, other, 8, 1.0, channels=2)
        return np.ascontiguousarray(found[0].permute(1, 2, 0).numpy())

    def amt(self, one: Frames, other: Frames) -> Frames:
        """The frame [H, W, 3] between two; fractions are cut off, as there."""
        found = self._between("amt", one, other, 16, 1 / 255, channels=3)
        return (found[0] * 255).permute(1, 2, 0).clamp(0, 255).to(torch.uint8).numpy()

    def cotracker(self, frames: Frames) -> NDArray[np.float32]:
        """Tracks [T, 10, 10, 2] of a 10x10 grid on the first of frames [T, H, W, 3]."""
        video = torch.from_numpy(frames).permute(0, 3, 1, 2)[None].float()
        tracks = self._called("cotracker", lambda net: net(video))
        if tracks.shape != (1, len(frames), 100, 2):
            raise ModelError(f"cotracker gave {list(tracks.shape)}, not [1, {len(frames)}, 100, 2]")
        return tracks[0].reshape(-1, 10, 10, 2).numpy()

    def _between(
        self, name: str, one: Frames, other: Frames, divisor: int, scale: float, *, channels: int
    ) -> Tensor:
        """A network on two pictures, padded evenly by their edges to a divisor of the sides."""
        height, width = one.shape[:2]
        down, across = -height % divisor, -width % divisor
        top, left = down // 2, across // 2
        edges = (left, across - left, top, down - top)
        pair = [F.pad(tensor(f) * scale, edges, mode="replicate") for f in (one, other)]
        found = self._called(name, lambda net: net(*pair))
        wanted = (1, channels, *pair[0].shape[2:])
        if found.shape != wanted:
            raise ModelError(f"{name} gave {list(found.shape)}, not {list(wanted)}")
        return found[..., top : top + height, left : left + width]

    def _feature(self, name: str, call: Callable[[Any], Tensor]) -> NDArray[np.float32]:
        return self._called(name, call)[0].flatten().numpy()

    @torch.inference_mode()
    def _called(self, name: str, call: Callable[[Any], Tensor]) -> Tensor:
        try:
            return call(self._loaded[name]).float().cpu()
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1][:200]
            raise ModelError(
                f"{name} failed; its interface stands in docs/temporal.md: {reason}"
            ) from error


def _load(name: str, path: Path) -> Any:
    if name not in FOLDERS:
        return torch.jit.load(str(path), map_location="cpu").eval()
    if name == "dino":
        from transformers import ViTModel

        return ViTModel.from_pretrained(
            path, local_files_only=True, add_pooling_layer=False
        ).float().eval()  # fmt: skip
    from transformers import CLIPVisionModelWithProjection

    return CLIPVisionModelWithProjection.from_pretrained(path, local_files_only=True).float().eval()


def tensor(frame: Frames) -> Tensor:
    """A frame [H, W, 3] as [1, 3, H, W], 0 to 255."""
    return torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)[None].float()


def resized(frame: Frames, side: int, mode: str) -> Tensor:
    """A frame [H, W, 3] as [1, 3, h, w] whose short side is `side`, without smoothing."""
    height, width = frame.shape[:2]
    short = min(height, width)
    size = int(side * height / short), int(side * width / short)
    return F.interpolate(tensor(frame), size, mode=mode, align_corners=False)


def centre(picture: Tensor, side: int) -> Tensor:
    """The middle `side` x `side` of [1, 3, H, W]."""
    height, width = picture.shape[-2:]
    top, left = round((height - side) / 2), round((width - side) / 2)
    return picture[..., top : top + side, left : left + side]


def normalised(
    picture: Tensor, mean: tuple[float, ...], deviation: tuple[float, ...]
) -> Tensor:
    """[1, 3, H, W], 0 to 255, as the network learned it."""
    shape = (1, 3, 1, 1)
    return (picture / 255 - torch.tensor(mean).view(shape)) / torch.tensor(deviation).view(shape)
