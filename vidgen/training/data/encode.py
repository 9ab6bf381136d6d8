"""Items through a model's own VAE, image encoder and text encoder.

Axes: B batch, C latent channels, F latent frames, K stills, h w latent rows and columns, T H W
frames, rows and columns, S text or image tokens, D width.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vidgen.core.errors import InputError
from vidgen.core.runtime import best_dtype
from vidgen.diffusion.temporal_upsampling import LatentRate
from vidgen.media.read import fit, load_image
from vidgen.media.types import Frames
from vidgen.media.video_reader import TimedFrame, VideoReader
from vidgen.models.image import ImageEncoder, prepare_image
from vidgen.models.text import TextEncoder
from vidgen.models.tokenizer import PromptTokenizer
from vidgen.models.vae import CausalVAE, VAEConfig
from vidgen.pipeline.experts import upsampling_of
from vidgen.pipeline.inputs import pixels_of
from vidgen.pipeline.loader import DTYPES, ModelLoader
from vidgen.training.data.config import Bucket
from vidgen.training.data.probe import is_still
from vidgen.training.data.select import Item
from vidgen.weights.component import Role
from vidgen.weights.folder import ModelFolder, hash_files

_KEPT = 4  # frames that the next item may begin before


@dataclass(frozen=True)
class Extras:
    """What a model's conditions need beside a clip's latents."""

    stills: bool = False  # middle and last frame, each encoded alone: known frames go in place
    first: bool = False  # the clip with grey behind its first frame: known frames go beside it
    both: bool = False  # the clip with grey between first and last frame
    grey: bool = False  # a clip of grey, for control blocks
    num_images: int = 0  # pictures of which the model reads image features
    rate: int = 1  # latent frames for each that the model draws clips with below its boundary

    @classmethod
    def of(cls, folder: ModelFolder) -> Extras:
        """By how the model learned conditions."""
        kind, tasks = folder.conditioning, folder.tasks
        beside = kind in ("channels", "control")
        images = 0
        if "image_encoder" in folder.components:
            dit = folder.components["transformer"].config
            images = 1 if dit.image_positions is None else 2
        return cls(stills=kind == "tokens" and bool({"last-image", "frames"} & set(tasks)),
                   first=beside, both=beside and "last-image" in tasks, grey=kind == "control",
                   num_images=images, rate=upsampling_of(folder))

    def as_data(self) -> dict[str, Any]:
        """What a cache's manifest says; of temporal upsampling nothing where there is none."""
        data = asdict(self)
        rate = data.pop("rate")
        return data if rate == 1 else data | {"oversampling": rate}

    def num_values(self, bucket: Bucket, vae: VAEConfig) -> int:
        """How many numbers an item's latents have, about."""
        frames = 1 + (bucket.num_frames - 1) // vae.strides.t
        count = frames * (1 + self.first + self.both) + 2 * self.stills
        if self.rate > 1 and frames > 1:
            count += LatentRate(self.rate).num_upsampled(frames)
        rows, columns = bucket.height // vae.strides.hw, bucket.width // vae.strides.hw
        return count * vae.latent_channels * rows * columns


def component_hash(folder: ModelFolder, role: Role) -> str | None:
    """SHA-256 of a network's files and architecture, the tokenizer's with the text encoder's."""
    component = folder.components.get(role)
    if component is None:
        return None
    files = list(component.store.files)
    if role == "text_encoder":
        files += sorted(folder.tokenizer.glob("*.json"))
    parts = [*sorted(hash_files(files).values()), repr(component.config)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


class Cursor:
    """Frames of one file by rising numbers, decoded once; a step back of a few is allowed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._still = load_image(path)[0] if is_still(path) else None
        self._stack = ExitStack()
        self._recent: deque[tuple[int, TimedFrame]] = deque(maxlen=_KEPT)
        self._restart()

    def close(self) -> None:
        """Close the file."""
        self._stack.close()

    def _restart(self) -> None:
        self.close()
        self._recent.clear()
        if self._still is None:
            self._reader = self._stack.enter_context(VideoReader(self.path, square=False))
            self._frames = enumerate(self._reader.timed())

    def frame(self, index: int) -> Frames:
        """Frame number `index`, uint8 [H, W, 3].

        Raises:
            InputError: the file ends before.
        """
        if self._still is not None:
            return self._still
        if self._recent and index < self._recent[0][0]:
            self._restart()
        while not self._recent or self._recent[-1][0] < index:
            following = next(self._frames, None)
            if following is None:
                raise InputError(f"{self.path} ends before frame {index}; was it changed? check it "
                                 "again with vidgen data check")
            self._recent.append(following)
        found = next(frame for number, frame in self._recent if number == index)
        return self._reader.picture(found)


class ItemEncoder:
    """A model's networks that data go through; each is loaded when it is first needed.

    What pixels pass through computes in float32, the text encoder in what the device does best.
    """

    def __init__(self, folder: ModelFolder, device: torch.device) -> None:
        self.folder, self.device, self.extras = folder, device, Extras.of(folder)
        self._stack = ExitStack()
        self._pixel_loader = ModelLoader(folder, device, torch.float32, "stage")
        self._text_loader = ModelLoader(folder, device, DTYPES[best_dtype(device)], "stage")

    def close(self) -> None:
        """Let the networks go."""
        self._stack.close()

    @cached_property
    def _vae(self) -> CausalVAE:
        return self._stack.enter_context(self._pixel_loader.use("vae"))

    @cached_property
    def _image_encoder(self) -> ImageEncoder:
        return self._stack.enter_context(self._pixel_loader.use("image_encoder"))

    @cached_property
    def _text_encoder(self) -> TextEncoder:
        limit = self.folder.components["transformer"].config.text_len
        network = self._stack.enter_context(self._text_loader.use("text_encoder"))
        return TextEncoder(network, PromptTokenizer(self.folder.tokenizer, limit))

    @torch.no_grad()
    def item(self, item: Item, picks: Sequence[int], cursor: Cursor) -> dict[str, Tensor]:
        """All that is learned from of an item that shows the `picks` of its file's frames.

        It has `clip` [C, F, h, w], the posterior's mean, normalised; and, of a clip of several
        frames, what `extras` names: `finer` [C, n, h, w], the same at the finer rate, `stills`
        [C, 2, h, w], `first` and `both` like `clip`, `image` and `image_last` [S, D]. All float32
        on the CPU.

        Raises:
            InputError: the file ends before the item does.
        """
        bucket, count = item.bucket, item.bucket.num_frames
        kept: dict[int, Frames] = {}

        def shown() -> Iterator[Frames]:
            for position, index in enumerate(picks):
                picture = cursor.frame(index)
                fitted = fit(picture, bucket.height, bucket.width, "crop", centring=item.centring)
                if position in (0, count // 2, count - 1):
                    kept[position] = fitted
                yield fitted

        rate = self.extras.rate
        frames: Iterable[Frames] = shown() if rate == 1 else list(shown())
        made = {"clip": self._encode(frames, bucket)}
        if count == 1:
            return made
        if rate > 1:
            made["finer"] = self._encode(frames, bucket, rate)
        grey = _grey(bucket)
        first, last = kept[0], kept[count - 1]
        if self.extras.stills:
            stills = [self._encode([kept[n]], bucket) for n in still_frames(bucket)]
            made["stills"] = torch.cat(stills, dim=1)
        if self.extras.first:
            made["first"] = self._encode([first, *[grey] * (count - 1)], bucket)
        if self.extras.both:
            made["both"] = self._encode([first, *[grey] * (count - 2), last], bucket)
        for name, picture in (("image", first), ("image_last", last))[: self.extras.num_images]:
            pixels = prepare_image(torch.from_numpy(picture), self._image_encoder.config)
            made[name] = self._image_encoder(pixels.to(self.device))[0].float().cpu()
        return made

    def grey(self, bucket: Bucket) -> Tensor:
        """Latents [C, F, h, w] of a clip of grey."""
        return self._encode([_grey(bucket)] * bucket.num_frames, bucket)

    @torch.no_grad()
    def _encode(self, frames: Iterable[Frames | Tensor], bucket: Bucket, rate: int = 1) -> Tensor:
        """Frames uint8 [H, W, 3], or [1, 3, 1, H, W] in [-1, 1], as latents [C, F, h, w]."""
        vae = self._vae.at_rate(rate)

        def chunks() -> Iterator[Tensor]:
            for frame in frames:
                if isinstance(frame, Tensor):
                    yield frame.to(self.device)
                else:
                    yield pixels_of([frame], bucket.width, bucket.height, "crop").to(self.device)

        latents = vae.stream_encode(chunks())
        return torch.cat([latent.float().cpu() for latent in latents], dim=2)[0]

    @torch.no_grad()
    def text(self, caption: str) -> Tensor:
        """Context [S, D] of a caption, encoded as if alone, float32 on the CPU."""
        context, lengths = self._text_encoder.encode([caption])
        return context[0, : int(lengths[0])].float().cpu()


def _grey(bucket: Bucket) -> Tensor:
    return torch.zeros(1, 3, 1, bucket.height, bucket.width)


def still_frames(bucket: Bucket) -> tuple[int, int]:
    """Frames of a clip that are encoded alone, too: the middle and the last one."""
    return bucket.num_frames // 2, bucket.num_frames - 1
