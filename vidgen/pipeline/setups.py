"""Choose the first setup of a generation that fits the memory; refuse if none does."""

from __future__ import annotations

import sys
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from typing import TYPE_CHECKING, get_args

import torch

from vidgen.core.errors import InputError, ModelError
from vidgen.core.runtime import attention_by, available_memory, best_dtype, size_text
from vidgen.core.shapes import LatentShape, Tiles, latent_shape
from vidgen.models.vae_tiles import grids
from vidgen.pipeline.loader import DTYPES, ModelLoader, other_setups, remedy
from vidgen.pipeline.memory import estimate
from vidgen.pipeline.types import Estimate, Offload, Plan, Setup

if TYPE_CHECKING:
    from vidgen.core.request import Loading, Request
    from vidgen.weights.folder import ModelFolder

SPARE = 0.25
"""Share of the free memory reserved for activations when a model is loaded."""
Made = Callable[[Setup], Estimate]


def first_setup(folder: ModelFolder, device: torch.device, loading: Loading) -> Setup:
    """Choose the setup in which to open a model, by its weights and the free memory alone.

    If no setup fits, return the one that needs the least memory.
    """
    have = available_memory(device)
    for setup in chain(*_allowed(loading, device, loading.dtype or best_dtype(device), None)):
        weights = ModelLoader(folder, device, DTYPES[setup.dtype], setup.offload).needed_bytes(
            quantize=loading.quantize or "none")
        if have is None or weights <= (1 - SPARE) * have:
            break
    return setup


def preflight(
    loader: ModelLoader, plan: Plan, request: Request, loading: Loading, count: int = 1
) -> Estimate:
    """Choose the options that `loading` leaves open for a loaded model; estimate `count` clips.

    Raises:
        ModelError: nothing fits the memory; the message lists settings that do.
    """
    have = available_memory(loader.device)
    if have is not None:
        have += loader.elsewhere_bytes
        have += sum(loader.needed_bytes(role, offload="stage") for role in loader.resident)
    return choose(loader.folder, plan, request, loading, loader.device, have, count=count)


def choose(
    folder: ModelFolder, plan: Plan, request: Request, loading: Loading, device: torch.device,
    have: int | None, *, dtype: str | None = None, count: int = 1,
) -> Estimate:
    """Choose the fastest setup that fits, among those that `loading` leaves open.

    Offloading is tried before tiles, which take longer, and tiles before another dtype, which
    changes results. `have` is the device's free memory in bytes; None if unknown, then everything
    fits. `dtype` overrides the device's best dtype.

    Raises:
        ModelError: nothing fits the memory; the message lists settings that do.
    """
    have, first = sys.maxsize if have is None else have, None
    dtype = dtype or loading.dtype or best_dtype(device)
    tiles = _given_tiles(loading.tiles, plan.latents)
    made = partial(estimate, folder, plan, request, count=count)
    with attention_by(loading.attention):
        for setups in _allowed(loading, device, dtype, tiles):
            for found in _estimates(setups, plan, have, made, cut=loading.tiles == "auto"):
                if found.peak_bytes <= have:
                    if first is None:
                        return found
                    return replace(found, choice=f"chose {found.setup.words}: {first.setup.words} "
                                   f"needs {size_text(first.peak_bytes)}, {size_text(have)} are "
                                   "free")
                first = first or found
        assert first is not None
        fits = list[str]()
        for other in other_setups(first.setup):
            small = (each for each in _estimates([other], plan, have, made, cut=True)
                     if each.peak_bytes <= have)
            fits += [f"{each.setup.words} ({size_text(each.peak_bytes)})"
                     for each in islice(small, 1)]
        fits += _smaller_clips(first.setup, folder, plan, request, have)
    stage = max(first.stages, key=lambda stage: stage.bytes)
    raise ModelError(f"a clip of {plan.num_frames} frames of {plan.width}x{plan.height} needs "
                     f"{size_text(stage.bytes)} on {device} in stage {stage.name!r} "
                     f"({first.setup.words}), {size_text(have)} are free; {remedy(fits)}")


def _allowed(
    loading: Loading, device: torch.device, dtype: str, tiles: Tiles | None
) -> Iterator[list[Setup]]:
    """Yield the setups of each dtype that `loading` leaves open; those of `dtype` first."""
    every: tuple[Offload, ...] = get_args(Offload)
    offloads = (loading.offload,) if loading.offload else every
    for name in [dtype] if loading.dtype or dtype != "fp32" else ["fp32", "bf16"]:
        yield [Setup(device, name, offload, loading.quantize, tiles) for offload in offloads]


def _given_tiles(given: str, latents: LatentShape) -> Tiles | None:
    """Return the tiles of "RxC"; None for "none", "auto" and a single tile."""
    if given in ("auto", "none"):
        return None
    rows, columns = map(int, given.split("x"))
    if rows > latents.height or columns > latents.width:
        raise InputError(f"tiles is {given}, but the clip has {latents.height}x{latents.width} "
                         "latents; give at most one tile per latent, or auto")
    return Tiles(rows, columns) if rows * columns > 1 else None


def _estimates(
    setups: Sequence[Setup], plan: Plan, have: int, made: Made, *, cut: bool
) -> Iterator[Estimate]:
    """Yield the setups' estimates; with `cut`, also those with the largest tiles that fit."""
    def fits(setup: Setup) -> bool:
        return made(setup).peak_bytes <= have

    yield from map(made, setups)
    choices = [*grids(plan.latents.height, plan.latents.width)]
    for setup in setups if cut and choices else ():
        tiled = [replace(setup, tiles=tiles) for tiles in choices]
        if setup.tiles is None and fits(tiled[-1]):
            yield made(tiled[bisect_left(tiled, True, key=fits)])


def _smaller_clips(
    setup: Setup, folder: ModelFolder, plan: Plan, request: Request, have: int
) -> Iterator[str]:
    """Yield options of the longest clip of this size and the largest of this length that fit."""
    vae, dit = folder.components["vae"].config, folder.components["transformer"].config
    t, side = vae.strides.t, vae.strides.hw * dit.patch_size

    def is_too_large(frames: int, width: int, height: int) -> bool:
        latents = latent_shape(frames, height, width, vae.strides, vae.latent_channels,
                               patch=dit.patch_size)
        smaller = replace(plan, num_frames=frames, width=width, height=height, latents=latents,
                          kept_frames=min(plan.kept_frames, frames))
        return estimate(folder, smaller, request, setup).peak_bytes > have

    def scaled(n: int) -> tuple[int, int]:
        return n * side, max(1, round(plan.height * n / plan.width)) * side

    counts, widths = range(1, plan.latents.num_frames), range(1, plan.width // side)
    count = bisect_left(counts, True, key=lambda n: is_too_large(
        1 + (n - 1) * t, plan.width, plan.height))
    if count:
        yield f"--frames {1 + (count - 1) * t}"
    count = bisect_left(widths, True, key=lambda n: is_too_large(plan.num_frames, *scaled(n)))
    if count:
        yield "--size {}x{}".format(*scaled(count))
