"""The beginning of a longer clip: latents in a file's recipe, else its last frames, encoded.

Axes: C latent channels, F latent frames, h w latent rows and columns, H W pixel rows and columns.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vidgen.core.errors import InputError
from vidgen.core.request import Request
from vidgen.diffusion.oversampling import Pace
from vidgen.media.read import fit
from vidgen.pipeline.inputs import Inputs, pixels_of, video_frames
from vidgen.pipeline.long.tail import TAIL_FRAMES, Beginning, colours_of, tail_of

if TYPE_CHECKING:
    from vidgen.core.shapes import Tiles
    from vidgen.media.types import Frames
    from vidgen.pipeline.model import OpenedModel
    from vidgen.pipeline.types import Plan

log = logging.getLogger(__name__)


def read_beginning(engine: OpenedModel, plan: Plan, request: Request, inputs: Inputs) -> Beginning:
    """Return the beginning of a clip: latents of its recipe, else its last frames, encoded.

    Raises:
        InputError: the recipe's latents are damaged, or include frames that are given otherwise.
    """
    assert request.prefix is not None
    assert inputs.ending is not None
    begun = tail_of(inputs.ending, engine.folder, plan)
    if isinstance(begun, str):
        log.warning("%s %s; its last frames are encoded, which costs some sharpness",
                    request.prefix, begun)
        begun = _encode_end(engine, plan, request, inputs)
    elif begun.frames_ahead:
        _check_ahead(begun, plan, request)
    return _at_rate_of(engine, plan, begun)


def _check_ahead(begun: Beginning, plan: Plan, request: Request) -> None:
    """Refuse stills in frames that exist as latents only; warn if nothing else is new."""
    reached, ahead = begun.num_frames + begun.frames_ahead, begun.frames_ahead
    given = {f"frame {seconds}": round(seconds * plan.fps) for seconds, _ in request.frame}
    if request.last_image is not None:
        given["last_image"] = plan.kept_frames - 1
    for name, moment in given.items():
        if moment < reached:
            raise InputError(f"{name} falls on one of the {ahead} frames that the clip's latents "
                             "stand for beyond its end; give a later time, or more seconds")
    if plan.kept_frames <= reached:
        log.warning("%s: its latents stand for %d frames more than it shows; of these come the new "
                    "ones, and no prompt has a part in them", request.prefix, ahead)


def _at_rate_of(engine: OpenedModel, plan: Plan, begun: Beginning) -> Beginning:
    had, wanted = begun.pace.factor, plan.oversampling
    if had == wanted:
        return begun
    latents = at_rate(engine, begun.latents, had, wanted, plan.tiles, plan.encode_passes)
    return replace(begun, latents=latents, pace=Pace(wanted))


def _encode_end(engine: OpenedModel, plan: Plan, request: Request, inputs: Inputs) -> Beginning:
    t, total = engine.vae_config.strides.t, 0
    ending: deque[Frames] = deque(maxlen=1 + (TAIL_FRAMES - 1) * t)
    for frame in earlier_frames(plan, request, inputs):
        ending.append(frame[0])
        total += 1
    count = 1 + (len(ending) - 1) // t * t
    video = pixels_of(list(ending)[-count:], plan.width, plan.height, plan.fit)
    latents = engine.encode_video(
        video, plan.tiles, plan.encode_passes, plan.oversampling
    ).cpu()
    return Beginning(
        latents=latents, num_frames=total, frames_ahead=0,
        num_latents=1 + math.ceil((total - 1) / t), colours=colours_of(latents),
        hand_over="pixels", anchor=latents[:, :, :1], pace=Pace(plan.oversampling),
    )


def earlier_frames(plan: Plan, request: Request, inputs: Inputs) -> Iterator[Frames]:
    """Yield frames uint8 [1, H, W, 3] of the continued clip, at the plan's size and rate."""
    assert request.prefix is not None
    assert inputs.ending is not None
    count = inputs.ending.frames_at(plan.fps)
    for frame in video_frames(request.prefix, count, plan.fps, inputs.ending.fps):
        yield fit(frame, plan.height, plan.width, plan.fit)[None]


def at_rate(
    engine: OpenedModel, latents: Tensor, had: int, wanted: int, tiles: Tiles | None = None,
    passes: int = 1,
) -> Tensor:
    """Convert the frames at the end of latents [B, C, F, h, w] from oversampling `had` to `wanted`.

    They are decoded and encoded: no network predicts one from the other, and the clip itself keeps
    the generated latents. The first is a single frame; frames before it that don't fill a latent
    frame are left out.
    """
    t = engine.vae_config.strides.t
    decoded = engine.decode_video(latents, tiles=tiles, oversampling=had)
    shown = torch.cat([part.float().clamp(-1, 1).cpu() for part in decoded], dim=2)
    whole = 1 + (shown.shape[2] - 1) // t * t
    return engine.encode_video(shown[:, :, -whole:], tiles, passes, wanted).cpu()
