"""Before a generation starts: what it will take, which setup fits, and a refusal where none does.

`preflight(engine, plan, request)` is one line before the first verb of a generation.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, NamedTuple, get_args

import torch

from vidgen.core.errors import ModelError
from vidgen.core.request import Request
from vidgen.core.runtime import available_memory, best_dtype, size_text
from vidgen.core.shapes import Tiles, VideoShape
from vidgen.models.vae_tiles import grids
from vidgen.pipeline.budget.estimate import estimate
from vidgen.pipeline.budget.job import Rates
from vidgen.pipeline.budget.stages import Estimate, Setup
from vidgen.pipeline.loader import Offload
from vidgen.pipeline.plan import make_plan
from vidgen.pipeline.types import Plan

if TYPE_CHECKING:
    from vidgen.pipeline.model import OpenedModel
    from vidgen.weights.folder import ModelFolder
    from vidgen.weights.quantize import Quantization


log = logging.getLogger(__name__)


class Asked(NamedTuple):
    """What an engine was told to run with; None is left to choose."""

    offload: Offload | None
    dtype: str | None


def preflight(engine: OpenedModel, plan: Plan, request: Request) -> Estimate:
    """What a generation of an engine will take; measures nothing, reads headers at most.

    Where the engine was left to choose, it takes the first setup that fits.

    Raises:
        ModelError: more than the memory holds; names what would fit.
    """
    have = available_memory(engine.device)
    if have is not None:
        have += engine.parts.elsewhere_bytes
        have += sum(engine.parts.needed_bytes(role, offload="stage")
                    for role in engine.parts.resident)
    asked = replace(request, offload=engine.asked.offload, dtype=engine.asked.dtype,
                    quantize=engine.quantize)
    made = choose(engine.folder, plan, asked, engine.device, have,
                  dtype=engine.asked.dtype or best_dtype(engine.device))
    engine.adopt(made.setup)
    return made


def first_setup(
    folder: ModelFolder, device: torch.device, asked: Asked, quantize: Quantization | None
) -> Setup:
    """The setup in which a model is opened, before the first request: that of its default clip.

    Where not even that fits, the most frugal one: a request may be smaller.
    """
    request = Request(prompt="-", offload=asked.offload, dtype=asked.dtype, quantize=quantize)
    dtype = asked.dtype or best_dtype(device)
    if asked.offload and asked.dtype:
        return Setup(device, dtype, asked.offload, quantize)
    plan = make_plan(request, folder)
    try:
        return choose(
            folder, plan, request, device, available_memory(device), dtype=dtype
        ).setup
    except ModelError:
        frugal: Offload = "stage" if quantize else "block"
        return Setup(device, dtype, asked.offload or frugal, quantize)


def choose(
    folder: ModelFolder, plan: Plan, request: Request, device: torch.device, have: int | None,
    *, dtype: str, rates: Rates | None = None, suffix: str = ".mp4",
) -> Estimate:
    """The fastest setup that fits, of those that the request leaves open.

    Offloading is tried before tiles, which take longer, and these before another dtype, which
    changes results; what the request names stays.

    Args:
        folder: the model.
        plan: of the clip.
        request: as it was given.
        device: where it is to run.
        have: bytes that are free there; None: unknown, so that everything fits.
        dtype: the device's best, or the request's own.
        rates: see `estimate`.
        suffix: of the output.

    Raises:
        ModelError: nothing fits; names what would.
    """
    first = None
    for made in _candidates(folder, plan, request, device, have, dtype, rates, suffix):
        if have is None or made.peak_bytes <= have:
            return replace(made, choice=_choice(made, first, have)) if first and have else made
        first = first or made
    assert first is not None
    assert have is not None
    require_fit(first, folder, plan, request, have)
    return first


def _candidates(
    folder: ModelFolder, plan: Plan, request: Request, device: torch.device, have: int | None,
    dtype: str, rates: Rates | None, suffix: str,
) -> Iterator[Estimate]:
    """What a request leaves open, in the order of `choose`; arguments as there."""
    asked: Offload | None = request.offload  # type: ignore[assignment]
    quantize: Quantization | None = request.quantize  # type: ignore[assignment]
    known = get_args(Offload)[:2] if quantize else get_args(Offload)  # blocks can't be quantised

    def made(setup: Setup) -> Estimate:
        return estimate(folder, plan, request, setup, rates=rates, suffix=suffix)

    for name in [dtype] if request.dtype or dtype != "fp32" else ["fp32", "bf16"]:
        setups = [Setup(device, name, offload, quantize, plan.tiles)
                  for offload in ([asked] if asked else known)]
        yield from map(made, setups)
        for setup in setups if request.tiles == "auto" else ():
            if have is not None and (found := _tiled(setup, plan, have, made)):
                yield found


def _tiled(
    setup: Setup, plan: Plan, have: int, made: Callable[[Setup], Estimate]
) -> Estimate | None:
    """A setup with the largest tiles that fit; None where none do, or where tiles were given."""
    choices = [*grids(plan.latents.height, plan.latents.width)]

    def fits(tiles: Tiles) -> bool:
        return made(replace(setup, tiles=tiles)).peak_bytes <= have

    if setup.tiles is not None or not choices or not fits(choices[-1]):
        return None
    return made(replace(setup, tiles=choices[bisect_left(choices, True, key=fits)]))


def _choice(made: Estimate, first: Estimate, have: int) -> str:
    return (f"{made.setup.words} was chosen: {first.setup.words} needs "
            f"{size_text(first.peak_bytes)}, {size_text(have)} are free")


def require_fit(
    made: Estimate, folder: ModelFolder, plan: Plan, request: Request, have: int
) -> None:
    """Refuse what `have` bytes can't hold.

    Raises:
        ModelError: what is needed, for which stage, what there is, and what would fit.
    """
    need = made.peak_bytes
    if need <= have:
        return
    stage = max(made.stages, key=lambda s: s.bytes).name
    fits = [*_other_setups(made.setup, folder, plan, request, have),
            *_smaller_clips(made.setup, folder, plan, request, have)]
    remedy = (f"what would fit: {', or '.join(fits)}" if fits else
              "nothing that is left to choose would fit: free memory or take a smaller model")
    raise ModelError(
        f"a clip of {plan.num_frames} frames of {plan.width}x{plan.height} needs "
        f"{size_text(need)} on {made.setup.device} while it is at {stage!r} ({made.setup.words}), "
        f"{size_text(have)} are free; {remedy}"
    )


def _other_setups(
    setup: Setup, folder: ModelFolder, plan: Plan, request: Request, have: int
) -> Iterator[str]:
    """Setups that fit, those that change results last."""
    dtypes = [setup.dtype] if setup.dtype != "fp32" else ["fp32", "bf16"]
    kinds: list[Quantization | None] = [None, "int8"]

    def made(setup: Setup) -> Estimate:
        return estimate(folder, plan, request, setup)

    for quantize, dtype, offload in product(kinds, dtypes, get_args(Offload)):
        if quantize and (offload == "block" or dtype == "fp16"):
            continue
        other = Setup(setup.device, dtype, offload, quantize, setup.tiles)
        found: Estimate | None = made(other)
        if found is not None and found.peak_bytes > have:
            found = _tiled(other, plan, have, made)
        if found is not None:
            yield f"{found.setup.words} ({size_text(found.peak_bytes)})"


def _smaller_clips(
    setup: Setup, folder: ModelFolder, plan: Plan, request: Request, have: int
) -> Iterator[str]:
    """The longest clip of this size, and the largest of this length, that fit."""
    vae, dit = folder.components["vae"].config, folder.components["transformer"].config

    def fits(frames: int, width: int, height: int) -> bool:
        shape = VideoShape(frames, height, width)
        latents = shape.latent(vae.strides, vae.latent_channels, patch=dit.patch_size)
        smaller = replace(plan, num_frames=frames, width=width, height=height, latents=latents,
                          kept_frames=min(plan.kept_frames, frames))
        return estimate(folder, smaller, request, setup).peak_bytes <= have

    t, side = vae.strides.t, vae.strides.hw * dit.patch_size
    count = _most(plan.latents.num_frames, lambda n: fits(1 + (n - 1) * t, plan.width, plan.height))
    if count:
        yield f"--frames {1 + (count - 1) * t}"

    def scaled(n: int) -> tuple[int, int]:
        width = n * side
        return width, max(1, round(plan.height * width / plan.width / side)) * side

    count = _most(plan.width // side, lambda n: fits(plan.num_frames, *scaled(n)))
    if count:
        yield "--size {}x{}".format(*scaled(count))


def _most(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest number below `limit` that fits, 0 if none does."""
    low, high = 0, limit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
