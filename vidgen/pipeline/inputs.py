"""A request's pictures and clips: read, hashed for the recipe, and written as conditions.

Tasks differ only in the conditions that they write into the latent state. A model takes them in one
of three ways (`ModelFolder.conditioning`): known latents in place and stills as extra tokens
("tokens"), a second clip stacked on the channels ("channels"), or a second clip that control blocks
read ("control"). Video to video by `strength` needs none of them.

Axes: B batch, C latent channels, F latent frames, h w latent rows and columns, T H W frames, pixel
rows and columns.
"""

from __future__ import annotations

import base64
import hashlib
import io
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from vidgen.core.errors import InputError
from vidgen.core.request import Request
from vidgen.core.runtime import sha256_file
from vidgen.core.shapes import num_frames_for_seconds, size_for_aspect
from vidgen.diffusion import condition
from vidgen.diffusion.flow import draw_noise
from vidgen.diffusion.state import LatentState, UpsampledKnown
from vidgen.media.read import existing_file, fit, is_clip, load_image
from vidgen.pipeline.codec import as_video

if TYPE_CHECKING:
    from fractions import Fraction

    from vidgen.core.shapes import Strides
    from vidgen.core.values import Fit, Picture
    from vidgen.media.ending import Ending
    from vidgen.media.types import Frames
    from vidgen.pipeline.types import Plan

log = logging.getLogger(__name__)

EMBED_LIMIT = 2_000_000
"""Largest input in bytes that the recipe embeds; larger ones are recorded by path."""


@dataclass
class Inputs:
    """Pictures and clips of a request, read once."""

    images: dict[str, list[Frames]] = field(default_factory=dict)  # by option; uint8 [H, W, 3] each
    video_size: tuple[int, int] | None = None  # (width, height) of video, beginning or control
    video_seconds: float | None = None
    ending: Ending | None = None  # of the clip to continue
    # for the recipe: option, SHA-256, and content or path
    records: list[dict[str, Any]] = field(default_factory=list)

    @property
    def picture_size(self) -> tuple[int, int] | None:
        """(width, height) of the input whose aspect ratio applies if no size is given."""
        if self.video_size is not None:
            return self.video_size
        for option in ("image", "last_image", "frame"):
            for picture in self.images.get(option, ()):
                return picture.shape[1], picture.shape[0]
        return None

    def size(
        self, request: Request, own: tuple[int, int] | None, multiple: int
    ) -> tuple[int, int] | None:
        """Return a clip's (width, height): the requested one, or an input's aspect ratio.

        The latter has the area of the model's `own` size, in multiples of `multiple`.
        """
        if request.size is not None or own is None or self.picture_size is None:
            return request.size or own
        aspect = self.picture_size[0] / self.picture_size[1]
        height, width = size_for_aspect(aspect, own[0] * own[1], multiple)
        return width, height

    def length(self, request: Request, fps: Fraction, strides: Strides) -> tuple[int, int] | None:
        """Return the frames to generate and to keep; None if neither request nor input has any."""
        seconds = request.seconds
        if seconds is None and request.frames is not None:
            return request.frames, request.frames
        seconds = self.video_seconds if seconds is None else seconds
        if seconds is None:
            return None
        return num_frames_for_seconds(float(seconds), float(fps), strides)


def read_inputs(request: Request) -> Inputs:
    """Read all inputs; raise InputError for a missing or damaged file, or one of a wrong type."""
    from vidgen.media.ending import read_ending
    from vidgen.media.speech import speech_files

    inputs = Inputs()
    named = [("image", request.image), ("last_image", request.last_image)]
    named += [("frame", picture) for _, picture in request.frame]
    named += [("reference", picture) for picture in request.reference]
    for option, picture in named:
        if picture is not None:
            inputs.images.setdefault(option, []).append(_pixels(option, picture))
    if request.video is not None:
        inputs.video_size, inputs.video_seconds = _size_and_length(request.video)
    if request.prefix is not None:
        inputs.ending = read_ending(request.prefix)
        inputs.video_size = inputs.video_size or inputs.ending.size
    if request.control is not None:
        size, seconds = _size_and_length(request.control)
        inputs.video_size = inputs.video_size or size
        inputs.video_seconds = inputs.video_seconds or seconds
    if request.latents is not None:
        if not isinstance(request.latents, Tensor):
            raise InputError(f"latents are a {type(request.latents).__name__}; give a torch "
                             "tensor [1, C, F, h, w]")
        if not request.latents.isfinite().all():
            raise InputError("latents have NaN or infinite values; give finite ones")
    given: list[tuple[str, Any]] = [*named, *(
        (option, getattr(request, option)) for option in ("video", "prefix", "control", "mask"))]
    if request.audio_file is not None:
        given.append(("audio", existing_file(request.audio_file, "audio")))
    given += [("say", existing_file(file, "say")) for file in speech_files(request.say)]
    given.append(("latents", request.latents))
    inputs.records = [record_input(*each) for each in given if each[1] is not None]
    return inputs


def _size_and_length(path: str | os.PathLike[str]) -> tuple[tuple[int, int], float]:
    """Return a clip's (width, height) and length in seconds."""
    from vidgen.media.video_reader import VideoReader

    with VideoReader(path) as reader:
        return reader.size, reader.length() / float(reader.fps)


def video_frames(path: str | os.PathLike[str], num_frames: int, fps: Fraction) -> Iterator[Frames]:
    """Yield the frames at times `n / fps` for n < num_frames; repeat the last one after the end."""
    from vidgen.media.video_reader import VideoReader

    with VideoReader(path) as reader:
        wanted, places, frames = 0, reader.places, iter(reader)
        before = next(frames)  # VideoReader refuses clips without frames
        for index, frame in enumerate(frames, 1):
            at = index if places is None else places[min(index, len(places) - 1)]
            while wanted < num_frames and round(wanted * reader.fps / fps) < at:
                yield before
                wanted += 1
            if wanted == num_frames:
                return
            before = frame
    for _ in range(wanted, num_frames):
        yield before


def pixels_of(
    pictures: Sequence[Frames], width: int, height: int, mode: Fit, border: int = 0
) -> Tensor:
    """Fit pictures uint8 [H, W, 3] to video [1, 3, T, height, width] in [-1, 1].

    The aspect ratio stays: `mode` crops or pads, with `border` as the padding's grey value.
    """
    return as_video(np.stack([fit(picture, height, width, mode, border) for picture in pictures]))


def read_mask(mask: Picture, plan: Plan) -> Tensor:
    """Read a mask from a picture or clip as [1, 1, T, H, W] in [0, 1], 1 where to generate.

    A clip is converted to the plan's frame rate; its last frame repeats for generated frames that
    aren't kept. One that is shorter than the plan's clip raises InputError.
    """
    from vidgen.media.video_reader import VideoReader

    if isinstance(mask, np.ndarray) or not is_clip(mask):
        frames = [_pixels("mask", mask)] * plan.num_frames
    else:
        with VideoReader(mask) as reader:
            shown = round(reader.length() * plan.fps / reader.fps)
        if shown < plan.kept_frames:
            raise InputError(f"mask {mask} has {shown} frames at {float(plan.fps):g} fps, the clip "
                             f"has {plan.kept_frames}; give a mask as long as the clip, or a "
                             "picture")
        frames = list(video_frames(mask, plan.num_frames, plan.fps))
    pixels = pixels_of(frames, plan.width, plan.height, plan.fit)
    return (pixels.mean(1, keepdim=True) + 1) / 2


@dataclass(frozen=True)
class Conditions:
    """Conditions of a request, and the encoders and sizes of the model that takes them."""

    plan: Plan
    request: Request
    inputs: Inputs
    # video [1, 3, T, H, W] in [-1, 1] and the keyword `rate` to normalised latents [1, C, F, h, w]
    encode: Callable[..., Tensor]
    encode_first: Callable[[Tensor], Tensor]  # the same for the clip's first frame
    describe: Callable[[Sequence[Frames]], Tensor] | None  # to image features [1, S, D]
    conditioning: str  # see `ModelFolder.conditioning`
    strides: Strides  # the VAE's
    patch: int  # side of a token, in latents

    def write(self, state: LatentState, start_sigma: float, *, settles: bool) -> LatentState:
        """Write every condition into a state of fresh noise; InputError: a time after the end.

        Sampling begins at `start_sigma`; `settles` is True if any step has the clip's own frame
        rate.
        """
        if self.request.strength is not None:
            clip, rate = self._whole_clip(), self.plan.temporal_upsampling
            if settles:
                state = condition.video_at_strength(state, self.encode(clip), start_sigma)
            if rate > 1:
                state = replace(state, video_upsampled=self.encode(clip, rate=rate))
        ways = {"tokens": self._in_place, "channels": self._stacked, "control": self._controlled}
        write = ways.get(self.conditioning)
        return state if write is None else write(state)

    def _in_place(self, state: LatentState) -> LatentState:
        if self.request.mask is not None:
            state = condition.mask(state, *self._kept(state))
        for moment, picture in self._stills():
            encode = self.encode if moment else self.encode_first
            still = encode(self._fitted([picture]))
            state = condition.keyframe(state, still, moment, self.strides)
        if self.request.mask is not None and self.plan.temporal_upsampling > 1:
            latents, wanted = self._kept(state, self.plan.temporal_upsampling)
            latents[:, :, :1] = state.clean[:, :, :1]
            wanted[:, :, :1] = state.denoise_mask[:, :, :1]
            state = replace(state, known_upsampled=UpsampledKnown(latents, wanted))
        for index, picture in enumerate(self.inputs.images.get("reference", ())):
            state = condition.reference(state, self.encode(self._fitted([picture])), index)
        return state

    def _kept(self, state: LatentState, rate: int = 1) -> tuple[Tensor, Tensor]:
        """Return the latents to keep [1, C, F, h, w] and a mask of the others, [1, 1, F, h, w]."""
        strides = self.strides.at_rate(rate)
        wanted = condition.latent_mask(self._wanted(), strides, patch=self.patch)
        latents = self.encode(self._whole_clip(), rate=rate)
        return latents.to(state.latents), wanted.to(state.latents.device)

    def _stacked(self, state: LatentState) -> LatentState:
        pixels, wanted = self._known_pixels()
        known = wanted.amax((0, 1, 3, 4)) == 0
        latents = self.encode(pixels)
        shown = condition.known_frames(latents, known.to(latents.device), self.strides)
        state = replace(state, stacked=shown)
        if self.describe is None:
            return state
        return replace(state, image_context=self.describe([still for _, still in self._stills()]))

    def _controlled(self, state: LatentState) -> LatentState:
        plan, (pixels, wanted) = self.plan, self._known_pixels()
        references = [
            self.encode(pixels_of([picture], plan.width, plan.height, "pad", border=255))
            for picture in self.inputs.images.get("reference", ())]
        noise = draw_noise(plan.seed, replace(plan.latents, num_frames=len(references)),
                           stream="references")
        kept, changed = self.encode(pixels * (1 - wanted)), self.encode(pixels * wanted)
        return condition.control(state, kept, changed, wanted.to(kept), references, self.strides,
                                 noise)

    def _known_pixels(self) -> tuple[Tensor, Tensor]:
        """Return the known pixels [1, 3, T, H, W] and a mask [1, 1, T, H, W], 1 where unknown."""
        plan, control = self.plan, self.request.control
        pixels = torch.zeros(1, 3, plan.num_frames, plan.height, plan.width)
        wanted = torch.ones_like(pixels[:, :1])
        if self.request.mask is not None:
            wanted = self._wanted()
            pixels = self._whole_clip() * (1 - wanted)
        if control is not None:
            pixels = self._fitted(video_frames(control, plan.num_frames, plan.fps))
        for moment, picture in self._stills():
            pixels[:, :, moment : moment + 1] = self._fitted([picture])
            wanted[:, :, moment] = 0
        return pixels, wanted

    def _stills(self) -> list[tuple[int, Frames]]:
        """Return (frame number, still) pairs; with a mask the image is the whole clip instead."""
        plan, request, images, stills = self.plan, self.request, self.inputs.images, []
        if request.begins_with_image:
            stills += [(0, picture) for picture in images.get("image", ())]
        for (seconds, _), picture in zip(request.frame, images.get("frame", ()), strict=True):
            moment = round(seconds * plan.fps)
            condition.require_frame(moment, plan.num_frames)
            stills.append((moment, picture))
        return stills + [(plan.kept_frames - 1, each) for each in images.get("last_image", ())]

    def _whole_clip(self) -> Tensor:
        """Return the clip to edit [1, 3, T, H, W]; a picture is repeated."""
        plan, video = self.plan, self.request.video
        if video is None:
            return self._fitted(self.inputs.images["image"] * plan.num_frames)
        return self._fitted(video_frames(video, plan.num_frames, plan.fps))

    def _wanted(self) -> Tensor:
        assert self.request.mask is not None
        return (read_mask(self.request.mask, self.plan) > 0.5).float()

    def _fitted(self, pictures: Iterable[Frames]) -> Tensor:
        return pixels_of(list(pictures), self.plan.width, self.plan.height, self.plan.fit)


def _pixels(option: str, picture: Picture) -> Frames:
    pixels, notes = load_image(picture)
    for note in notes:
        name = option if isinstance(picture, np.ndarray) else picture
        log.warning("%s: %s", name, note)
    return pixels


def noise_file(latents: Tensor) -> bytes:
    """Return noise as the bytes of a safetensors file; equal noise gives equal bytes."""
    content: bytes = save({"latents": latents.detach().cpu().contiguous()})
    return content


def record_input(option: str, picture: Picture | Tensor) -> dict[str, Any]:
    """Return the recipe's record of an input, by which replay restores or verifies it.

    `sha256` is of a file's bytes, of the pixels of a uint8 [H, W, 3] array, or of latents as a
    safetensors file. `content` is in base64, an array's as PNG, for up to `EMBED_LIMIT` bytes.
    `path` is the file's name, or its absolute path without `content`; `marks` are its marks of
    origin.
    """
    from vidgen.media.manifest import read_marks

    place: dict[str, Any] = {}
    if isinstance(picture, str | os.PathLike):
        path = Path(picture)
        is_small = path.stat().st_size <= EMBED_LIMIT
        place = {"path": path.name if is_small else str(path.resolve())}
        content, digest = path.read_bytes() if is_small else b"", sha256_file(path)
    elif isinstance(picture, Tensor):
        content = noise_file(picture)
        digest = hashlib.sha256(content).hexdigest()
    else:
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "PNG")
        content, place = file.getvalue(), {"shape": list(picture.shape)}
        digest = hashlib.sha256(picture.tobytes()).hexdigest()
    record = {"option": option, "sha256": digest, **place}
    if 0 < len(content) <= EMBED_LIMIT:
        record["content"] = base64.b64encode(content).decode()
    marks = read_marks(picture).facts() if isinstance(picture, str | os.PathLike) else {}
    return record | ({"marks": marks} if marks else {})
