"""What a longer clip goes on from: latents in a file's recipe, else its last frames, encoded.

Axes: C latent channels, F latent frames, h w latent rows and columns, H W pixel rows and columns.
"""

from __future__ import annotations

import logging
import math
import os
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vidgen.core.errors import InputError
from vidgen.core.request import Request
from vidgen.diffusion.oversampling import Pace
from vidgen.media.probe import read_recipe
from vidgen.media.read import fit
from vidgen.pipeline.inputs import Inputs, pixels_of, video_frames
from vidgen.pipeline.long.retime import at_rate
from vidgen.pipeline.long.tail import TAIL_FRAMES, Beginning, colours_of, read_tail

if TYPE_CHECKING:
    from vidgen.media.encode import Frames
    from vidgen.pipeline.plan import Plan
    from vidgen.pipeline.video import Engine

log = logging.getLogger(__name__)


def read_beginning(engine: Engine, plan: Plan, request: Request, inputs: Inputs) -> Beginning:
    """What a request's clip goes on from: latents of its recipe, else its last frames, encoded.

    Raises:
        InputError: it leaves nothing to make, or conditions lie before its end.
    """
    path = Path(os.fspath(request.prefix))  # type: ignore[arg-type]
    begun = None
    if inputs.prefix_fps == plan.fps:
        begun = read_tail(read_recipe(path), engine.folder)
    grid = (plan.latents.channels, plan.latents.height, plan.latents.width)
    if begun is None or begun.num_frames != inputs.prefix_frames or (
        (begun.latents.shape[1], *begun.latents.shape[3:]) != grid
    ):
        log.warning("%s holds no latents of %s to go on from; its last frames are encoded, which "
                    "costs some sharpness", path, engine.folder.name)
        begun = _encode_end(engine, plan, request, inputs)
    begun = _at_rate_of(engine, plan, begun)
    if begun.num_frames >= plan.kept_frames:
        raise InputError(
            f"a beginning of {begun.num_frames} frames leaves nothing to generate in a clip of "
            f"{plan.kept_frames}; give more seconds"
        )
    if request.image is not None:
        raise InputError("image and prefix are both given; the clip begins with one of them")
    for seconds, _ in request.frame:
        if round(seconds * plan.fps) < begun.num_frames:
            raise InputError(f"frame {seconds} lies in the clip that goes on, which has "
                             f"{float(begun.num_frames / plan.fps):g} s; give a later one")
    return begun


def _at_rate_of(engine: Engine, plan: Plan, begun: Beginning) -> Beginning:
    """The beginning at the rate that a plan draws at."""
    had, wanted = begun.pace.factor, plan.oversampling
    if had == wanted:
        return begun
    latents = at_rate(engine, begun.latents, had, wanted, plan.tiles, plan.encode_passes)
    return replace(begun, latents=latents, pace=Pace(wanted))


def _encode_end(engine: Engine, plan: Plan, request: Request, inputs: Inputs) -> Beginning:
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
    """Frames uint8 [1, H, W, 3] of the clip that goes on, at the plan's size and rate."""
    assert request.prefix is not None
    assert inputs.prefix_fps is not None
    count = max(1, round(inputs.prefix_frames * plan.fps / inputs.prefix_fps))
    for frame in video_frames(request.prefix, count, plan.fps, inputs.prefix_fps):
        yield fit(frame, plan.height, plan.width, plan.fit)[None]
