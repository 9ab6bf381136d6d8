"""A request's conditions, written into the latent state: the one place where tasks differ.

Axes: B batch, C latent channels, F latent frames, h w latent rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vidgen.core.request import Request
from vidgen.core.shapes import Strides
from vidgen.diffusion import condition
from vidgen.diffusion.condition import LatentState
from vidgen.pipeline.inputs import Inputs, read_mask, video_frames
from vidgen.pipeline.plan import Plan


@dataclass(frozen=True)
class Encoder:
    """What conditions need of a model.

    Attributes:
        encode: pictures uint8 [H, W, 3] of a clip to its normalised latents [1, C, F, h, w].
        strides: the VAE's.
        patch: latents a side of one token.
    """

    encode: Callable[[Sequence[Any]], Tensor]
    strides: Strides
    patch: int


def write_conditions(
    state: LatentState,
    plan: Plan,
    request: Request,
    inputs: Inputs,
    model: Encoder,
    start_sigma: float,
) -> LatentState:
    """Write every condition of a request into a state that knows nothing yet.

    Args:
        state: fresh noise.
        plan: the settled request.
        request: whose conditions are meant.
        inputs: its pictures, read.
        model: encodes them.
        start_sigma: noise level at which sampling begins.

    Raises:
        InputError: a moment that the clip doesn't have, or a beginning that leaves nothing to make.
    """
    if request.video is not None or request.mask is not None:
        state = _edit(state, plan, request, inputs, model, start_sigma)
    if request.prefix is not None:
        state = condition.prefix(state, _beginning(plan, request, inputs, model))
    stills = {
        option: [model.encode([picture]) for picture in pictures]
        for option, pictures in inputs.images.items()
    }
    repainted = request.mask is not None and request.video is None  # the image is the whole clip
    for still in () if repainted else stills.get("image", ()):
        state = condition.first_frame(state, still)
    for (seconds, _), still in zip(request.frame, stills.get("frame", ()), strict=True):
        state = condition.keyframe(state, still, round(seconds * plan.fps), model.strides)
    for still in stills.get("last_image", ()):
        state = condition.keyframe(state, still, plan.kept_frames - 1, model.strides)
    for index, still in enumerate(stills.get("reference", ())):
        state = condition.reference(state, still, index)
    return state


def _edit(
    state: LatentState, plan: Plan, request: Request, inputs: Inputs, model: Encoder,
    start_sigma: float,
) -> LatentState:
    """A whole clip at a strength, or kept where the mask is black; a picture is a still clip."""
    if request.video is not None:
        assert inputs.video_fps is not None
        pictures = list(video_frames(request.video, plan.num_frames, plan.fps, inputs.video_fps))
    else:
        pictures = inputs.images["image"] * plan.num_frames
    latents = model.encode(pictures)
    if request.strength is not None:
        state = condition.video_at_strength(state, latents, start_sigma)
    if request.mask is not None:
        pixels = read_mask(request.mask, plan.num_frames, plan.width, plan.height, plan.fit)
        wanted = condition.latent_mask(pixels, model.strides, patch=model.patch)
        state = condition.mask(state, latents, wanted.to(state.latents.device))
    return state


def _beginning(plan: Plan, request: Request, inputs: Inputs, model: Encoder) -> Tensor:
    """Latents of the clip to go on from; frames that don't fill a last latent frame are cut."""
    assert request.prefix is not None
    assert inputs.prefix_fps is not None
    shown = round(inputs.prefix_frames * plan.fps / inputs.prefix_fps)
    count = min(1 + (max(shown, 1) - 1) // model.strides.t * model.strides.t, plan.num_frames)
    pictures = list(video_frames(request.prefix, count, plan.fps, inputs.prefix_fps))
    return torch.as_tensor(model.encode(pictures))
