"""Write a request's conditions into the latent state; tasks differ in nothing else.

A model takes conditions in one of three ways (`ModelFolder.conditioning`): known latents in place
and stills as extra tokens ("tokens"), a second clip stacked on the channels ("channels"), or a
second clip that control blocks read ("control"). Video to video by `strength` needs none of them.

Axes: B batch, C latent channels, F latent frames, h w latent rows and columns, T H W frames, pixel
rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vidgen.core.request import Request
from vidgen.core.shapes import Strides
from vidgen.diffusion import condition
from vidgen.diffusion.noise import draw_noise
from vidgen.diffusion.state import LatentState, UpsampledKnown
from vidgen.pipeline.inputs import Inputs, pixels_of, read_mask, video_frames
from vidgen.pipeline.types import Plan

if TYPE_CHECKING:
    from vidgen.media.types import Frames


@dataclass(frozen=True)
class ConditionEncoder:
    """Encoders and sizes of a model that conditions need."""

    # video [1, 3, T, H, W] in [-1, 1] and the keyword `rate` to normalised latents [1, C, F, h, w]
    encode: Callable[..., Tensor]
    encode_first: Callable[[Tensor], Tensor]  # the same for the clip's first frame
    describe: Callable[[Sequence[Frames]], Tensor] | None  # to image features [1, S, D]
    conditioning: str  # see `ModelFolder.conditioning`
    strides: Strides  # the VAE's
    patch: int  # side of a token, in latents


def write_conditions(
    state: LatentState, plan: Plan, request: Request, inputs: Inputs, model: ConditionEncoder,
    start_sigma: float, *, settles: bool,
) -> LatentState:
    """Write every condition of a request into a state of fresh noise.

    Sampling begins at `start_sigma`; `settles` is True if any step has the clip's own frame rate.

    Raises:
        InputError: a time after the clip's end.
    """
    if request.strength is not None:
        clip, finer = _whole_clip(plan, request, inputs), plan.oversampling
        if settles:
            state = condition.video_at_strength(state, model.encode(clip), start_sigma)
        if finer > 1:
            state = replace(state, video_upsampled=model.encode(clip, rate=finer))
    ways = {"tokens": _in_place, "channels": _stacked, "control": _controlled}
    write = ways.get(model.conditioning)
    return state if write is None else write(state, plan, request, inputs, model)


def _in_place(
    state: LatentState, plan: Plan, request: Request, inputs: Inputs, model: ConditionEncoder
) -> LatentState:
    if request.mask is not None:
        state = condition.mask(state, *_kept(state, plan, request, inputs, model))
    for moment, picture in _stills(plan, request, inputs):
        encode = model.encode if moment else model.encode_first
        still = encode(_fitted(plan, [picture]))
        state = condition.keyframe(state, still, moment, model.strides)
    if request.mask is not None and plan.oversampling > 1:
        latents, wanted = _kept(state, plan, request, inputs, model, plan.oversampling)
        latents[:, :, :1], wanted[:, :, :1] = state.clean[:, :, :1], state.denoise_mask[:, :, :1]
        state = replace(state, known_upsampled=UpsampledKnown(latents, wanted))
    for index, picture in enumerate(inputs.images.get("reference", ())):
        state = condition.reference(state, model.encode(_fitted(plan, [picture])), index)
    return state


def _kept(
    state: LatentState, plan: Plan, request: Request, inputs: Inputs, model: ConditionEncoder,
    rate: int = 1,
) -> tuple[Tensor, Tensor]:
    """Return the latents to keep [1, C, F, h, w] and a mask of the others, [1, 1, F, h, w]."""
    strides = model.strides.at_rate(rate)
    wanted = condition.latent_mask(_wanted(plan, request), strides, patch=model.patch)
    latents = model.encode(_whole_clip(plan, request, inputs), rate=rate)
    return latents.to(state.latents), wanted.to(state.latents.device)


def _stacked(
    state: LatentState, plan: Plan, request: Request, inputs: Inputs, model: ConditionEncoder
) -> LatentState:
    pixels, wanted = _known_pixels(plan, request, inputs)
    known = wanted.amax((0, 1, 3, 4)) == 0
    latents = model.encode(pixels)
    shown = condition.known_frames(latents, known.to(latents.device), model.strides)
    state = replace(state, stacked=shown)
    if model.describe is None:
        return state
    pictures = [picture for _, picture in _stills(plan, request, inputs)]
    return replace(state, image_context=model.describe(pictures))


def _controlled(
    state: LatentState, plan: Plan, request: Request, inputs: Inputs, model: ConditionEncoder
) -> LatentState:
    pixels, wanted = _known_pixels(plan, request, inputs)
    references = [model.encode(pixels_of([picture], plan.width, plan.height, "pad", border=255))
                  for picture in inputs.images.get("reference", ())]
    noise = draw_noise(plan.seed, replace(plan.latents, num_frames=len(references)),
                       stream="references")
    kept, changed = model.encode(pixels * (1 - wanted)), model.encode(pixels * wanted)
    wanted = wanted.to(kept)
    return condition.control(state, kept, changed, wanted, references, model.strides, noise)


def _known_pixels(plan: Plan, request: Request, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return the known pixels [1, 3, T, H, W] and a mask [1, 1, T, H, W], 1 where unknown."""
    pixels = torch.zeros(1, 3, plan.num_frames, plan.height, plan.width)
    wanted = torch.ones_like(pixels[:, :1])
    if request.mask is not None:
        wanted = _wanted(plan, request)
        pixels = _whole_clip(plan, request, inputs) * (1 - wanted)
    if request.control is not None:
        pixels = _fitted(plan, video_frames(request.control, plan.num_frames, plan.fps))
    for moment, picture in _stills(plan, request, inputs):
        pixels[:, :, moment : moment + 1] = _fitted(plan, [picture])
        wanted[:, :, moment] = 0
    return pixels, wanted


def _stills(plan: Plan, request: Request, inputs: Inputs) -> list[tuple[int, Frames]]:
    """Return (frame number, still) pairs; with a mask the image is the whole clip instead."""
    stills = []
    if request.begins_with_image:
        stills += [(0, picture) for picture in inputs.images.get("image", ())]
    frames = inputs.images.get("frame", ())
    for (seconds, _), picture in zip(request.frame, frames, strict=True):
        moment = round(seconds * plan.fps)
        condition.require_frame(moment, plan.num_frames)
        stills.append((moment, picture))
    stills += [(plan.kept_frames - 1, picture) for picture in inputs.images.get("last_image", ())]
    return stills


def _whole_clip(plan: Plan, request: Request, inputs: Inputs) -> Tensor:
    """Return the clip to edit [1, 3, T, H, W]; a picture is repeated."""
    if request.video is None:
        return _fitted(plan, inputs.images["image"] * plan.num_frames)
    return _fitted(plan, video_frames(request.video, plan.num_frames, plan.fps))


def _wanted(plan: Plan, request: Request) -> Tensor:
    assert request.mask is not None
    return (read_mask(request.mask, plan) > 0.5).float()


def _fitted(plan: Plan, pictures: Iterable[Frames]) -> Tensor:
    return pixels_of(list(pictures), plan.width, plan.height, plan.fit)
