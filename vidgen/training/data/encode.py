"""Encode items with a model's own VAE, image encoder and text encoder.

Axes: B batch, C latent channels, F latent frames, K stills, h w latent rows and columns, T H W
frames, rows and columns, S text or image tokens, D width.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from vidgen.core.errors import InputError
from vidgen.core.runtime import best_dtype
from vidgen.diffusion.temporal_upsampling import LatentRate
from vidgen.media.read import fit, load_image
from vidgen.media.types import Frames
from vidgen.media.video_reader import TimedFrame, VideoReader
from vidgen.models.image import prepare_image
from vidgen.models.text import TextEncoder
from vidgen.models.tokenizer import PromptTokenizer
from vidgen.models.vae import VAEConfig
from vidgen.pipeline.denoise import upsampling_of
from vidgen.pipeline.inputs import pixels_of
from vidgen.pipeline.loader import DTYPES, ModelLoader
from vidgen.training.data.config import Bucket
from vidgen.training.data.files import Item
from vidgen.training.data.probe import is_still
from vidgen.weights.component import Role
from vidgen.weights.folder import ModelFolder, hash_files

_KEPT = 4  # decoded frames kept, for an item that begins before the last one's end

GetFrame: TypeAlias = Callable[[int], Frames]


@dataclass(frozen=True)
class Extras:
    """Hold the additional latents and features that a model's conditions need."""

    stills: bool = False  # middle and last frame, each encoded alone, which replace latent frames
    first: bool = False  # the clip with grey after its first frame, for extra channels
    both: bool = False  # the clip with grey between first and last frame, likewise
    grey: bool = False  # a clip of grey, for control blocks
    num_images: int = 0  # pictures whose features the model reads
    rate: int = 1  # temporal upsampling of latents below the model's boundary

    @classmethod
    def of(cls, folder: ModelFolder) -> Extras:
        """Return what the conditions of a model need."""
        kind, tasks = folder.conditioning, folder.tasks
        stacked = kind in ("channels", "control")
        images = 0
        if "image_encoder" in folder.components:
            dit = folder.components["transformer"].config
            images = 1 if dit.image_positions is None else 2
        return cls(stills=kind == "tokens" and bool({"last-image", "frames"} & set(tasks)),
                   first=stacked, both=stacked and "last-image" in tasks, grey=kind == "control",
                   num_images=images, rate=upsampling_of(folder))

    def num_values(self, bucket: Bucket, vae: VAEConfig) -> int:
        """Return about how many numbers the latents of an item have."""
        frames = 1 + (bucket.num_frames - 1) // vae.strides.t
        count = frames * (1 + self.first + self.both) + 2 * self.stills
        if self.rate > 1 and frames > 1:
            count += LatentRate(self.rate).num_upsampled(frames)
        rows, columns = bucket.height // vae.strides.hw, bucket.width // vae.strides.hw
        return count * vae.latent_channels * rows * columns


def component_hash(folder: ModelFolder, role: Role) -> str | None:
    """Return a hash of a network's files and config, and for the text encoder of its tokenizer."""
    component = folder.components.get(role)
    if component is None:
        return None
    files = list(component.tensors.files)
    if role == "text_encoder":
        files += sorted(folder.tokenizer.glob("*.json"))
    parts = [*sorted(hash_files(files).values()), repr(component.config)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@contextmanager
def open_frames(path: Path) -> Iterator[GetFrame]:
    """Yield a function that returns a file's frame by its number, uint8 [H, W, 3].

    Numbers must rise, as each frame is decoded once; steps back of up to 3 frames are allowed. The
    function raises InputError where the file has too few frames.
    """
    if is_still(path):
        picture = load_image(path)[0]
        yield lambda _: picture
        return
    recent: deque[tuple[int, TimedFrame]] = deque(maxlen=_KEPT)
    frames: Iterator[tuple[int, TimedFrame]] = iter(())

    def frame_at(index: int) -> Frames:
        nonlocal frames
        if not recent or index < recent[0][0]:
            recent.clear()
            frames = enumerate(reader.timed())
        while not recent or recent[-1][0] < index:
            following = next(frames, None)
            if following is None:
                raise InputError(f"{path} ends before frame {index}; it may have changed: run "
                                 "vidgen data check again")
            recent.append(following)
        return reader.picture(next(frame for number, frame in recent if number == index))

    with VideoReader(path, square=False) as reader:
        yield frame_at


class ItemEncoder:
    """The networks of a model that encode data, each loaded at its first use.

    The VAE and image encoder compute in float32, the text encoder in the device's fastest dtype.
    """

    def __init__(self, folder: ModelFolder, device: torch.device) -> None:
        self.folder, self.device, self.extras = folder, device, Extras.of(folder)
        self._pixels = ModelLoader(folder, device, torch.float32)
        self._texts = ModelLoader(folder, device, DTYPES[best_dtype(device)])
        limit = folder.components["transformer"].config.text_len
        self._tokenizer = PromptTokenizer(folder.tokenizer, limit)

    def close(self) -> None:
        """Release the networks."""
        self._pixels.close()
        self._texts.close()

    @torch.no_grad()
    def item(self, item: Item, picks: Sequence[int], frame_at: GetFrame) -> dict[str, Tensor]:
        """Encode an item, whose frames are the numbers `picks` of its file's.

        Return `clip` [C, F, h, w], the posterior's mean, normalised. For a clip also the kinds in
        `extras`: `finer` [C, n, h, w] at a higher latent rate, `stills` [C, 2, h, w], `first` and
        `both` [C, F, h, w], `image` and `image_last` [S, D]. All are float32 on the CPU.

        Raises:
            InputError: the file ends before the item.
        """
        bucket, count = item.bucket, item.bucket.num_frames
        kept: dict[int, Frames] = {}

        def shown() -> Iterator[Frames]:
            for position, index in enumerate(picks):
                fitted = fit(frame_at(index), bucket.height, bucket.width, "crop")
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
            with self._pixels.use("image_encoder") as encoder:
                pixels = prepare_image(torch.from_numpy(picture), encoder.config)
                made[name] = encoder(pixels.to(self.device))[0].float().cpu()
        return made

    def grey(self, bucket: Bucket) -> Tensor:
        """Return latents [C, F, h, w] of a grey clip."""
        return self._encode([_grey(bucket)] * bucket.num_frames, bucket)

    @torch.no_grad()
    def _encode(self, frames: Iterable[Frames | Tensor], bucket: Bucket, rate: int = 1) -> Tensor:
        """Return latents [C, F, h, w] of frames, uint8 [H, W, 3] or [1, 3, 1, H, W] in [-1, 1]."""
        def chunks() -> Iterator[Tensor]:
            for frame in frames:
                if isinstance(frame, Tensor):
                    yield frame.to(self.device)
                else:
                    yield pixels_of([frame], bucket.width, bucket.height, "crop").to(self.device)

        with self._pixels.use("vae") as vae:
            latents = vae.at_rate(rate).stream_encode(chunks())
            return torch.cat([latent.float().cpu() for latent in latents], dim=2)[0]

    @torch.no_grad()
    def text(self, caption: str) -> Tensor:
        """Return the context [S, D] of a caption without padding, float32 on the CPU."""
        with self._texts.use("text_encoder") as network:
            context, lengths = TextEncoder(network, self._tokenizer).encode([caption])
            return context[0, : int(lengths[0])].float().cpu()


def _grey(bucket: Bucket) -> Tensor:
    return torch.zeros(1, 3, 1, bucket.height, bucket.width)


def still_frames(bucket: Bucket) -> tuple[int, int]:
    """Return the frames of a clip for `Extras.stills`: the middle and the last one."""
    return bucket.num_frames // 2, bucket.num_frames - 1
