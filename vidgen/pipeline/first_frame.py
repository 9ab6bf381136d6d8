"""A first frame drawn by a text-to-image model: text -> picture -> clip in one call."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vidgen.core.errors import ModelError
from vidgen.core.request import Request
from vidgen.core.shapes import size_for_aspect
from vidgen.media.clip import Clip
from vidgen.media.read import fit
from vidgen.media.types import Frames
from vidgen.pipeline.foreign.engine import ForeignEngine
from vidgen.pipeline.foreign.plan import Abilities
from vidgen.pipeline.inputs import Inputs, read_inputs
from vidgen.pipeline.parts import DTYPES
from vidgen.pipeline.plan import draw_seed
from vidgen.pipeline.video import Progress
from vidgen.weights.folder import ForeignFolder
from vidgen.weights.layouts import open_model

log = logging.getLogger(__name__)

_WANTED = "a first frame is drawn by one such as SDXL, SD3 or FLUX, as diffusers saves it"


def draw_first_frame(
    folder: str | Path,
    prompt: str,
    negative: str | None,
    seed: int,
    width: int,
    height: int,
    *,
    steps: int | None = None,
    guidance: float | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str = "fp32",
    on_event: Callable[[Progress], None] | None = None,
) -> tuple[Frames, dict[str, Any]]:
    """Draw a picture with a text-to-image model, which leaves the memory afterwards.

    It is drawn at the model's own area, where such models are at their best, in the wanted aspect,
    and then brought to the wanted size.

    Args:
        folder: of the model, as diffusers saves it, or its id on the hub: SDXL, SD3, FLUX, ...
        prompt: what is to be seen.
        negative: what is not to be seen; left out with a warning by a model that reads none.
        seed: of the noise.
        width: of the picture, in pixels.
        height: of the picture.
        steps: denoising steps; None: the model's own number.
        guidance: guidance scale; None: the model's own.
        device: where it computes.
        dtype: of its weights, as torch's or by name.
        on_event: told of progress; raising `Cancelled` stops between two steps.

    Returns:
        (uint8 [height, width, 3], what shaped it, for the recipe).

    Raises:
        ModelError: no such folder, or no text-to-image model.
        InputError: what the model itself refuses.
    """
    opened = open_model(str(folder))
    if not isinstance(opened, ForeignFolder):
        raise ModelError(f"{folder} is no text-to-image model; {_WANTED}")
    import diffusers  # seconds, which a wrong name needn't cost

    names = {value: name for name, value in DTYPES.items()}
    engine = ForeignEngine(
        opened, torch.device(device), dtype if isinstance(dtype, str) else names[dtype],
        loader=diffusers.AutoPipelineForText2Image,
    )
    able = Abilities(engine.pipe.own)
    if not able.is_image:
        raise ModelError(f"{folder} is a {opened.class_name}, which makes clips; {_WANTED}")
    if negative and "negative" not in able.options:
        log.warning("%s reads no negative prompt; the first frame is drawn without", able.name)
        negative = None
    own = able.default_size() or (width, height)
    size = size_for_aspect(width / height, math.prod(own), able.multiple)
    request = Request(
        prompt=prompt, negative=negative or None, seed=seed, frames=1, size=size[::-1],
        steps=steps, guidance=guidance,
    )
    clip = engine.generate(request, on_event=on_event)
    assert isinstance(clip, Clip)
    assert clip.recipe is not None
    place = Path(folder).resolve() if Path(folder).is_dir() else folder
    record = {"option": "first_frame_model", "path": str(place)}
    record |= {name: clip.recipe[name] for name in ("model", "plan", "dtype")}
    return fit(clip.frames[0], height, width), record


def with_first_frame(
    request: Request, size: tuple[int, int], device: torch.device, dtype: str
) -> tuple[Request, Inputs]:
    """A request whose first frame its model has drawn, under a seed, and its inputs.

    Args:
        request: with a `first_frame_model`.
        size: (width, height) of the frame.
        device: where it is drawn.
        dtype: of the model's weights.
    """
    assert request.first_frame_model is not None
    seed = draw_seed() if request.seed is None else request.seed
    picture, record = draw_first_frame(
        request.first_frame_model, request.prompt, request.negative, seed, *size,
        device=device, dtype=dtype,
    )
    request = replace(request, image=picture, first_frame_model=None, seed=seed)
    inputs = read_inputs(request)
    inputs.records.append(record)
    return request, inputs
