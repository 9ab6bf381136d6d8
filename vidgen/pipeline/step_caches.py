"""A request's step cache, and the magnitudes of a model's blocks.

`settle_cache` chooses the plan's cache, `make_caches` creates the caches of one run of a sampler,
and `carrying` adds their memory to the states of that run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidgen.core.errors import InputError, ModelError
from vidgen.core.protocols import OnStep, StepInfo
from vidgen.core.request import Request
from vidgen.core.runtime import atomic_write, cache_folder
from vidgen.core.store import read_cache
from vidgen.diffusion.cache import (
    MAX_SKIPS,
    ORDER,
    RETAINED,
    FirstBlock,
    Forecast,
    Magnitude,
    Magnitudes,
    Memory,
    StepCaches,
)
from vidgen.diffusion.guidance import Guidance
from vidgen.pipeline.types import CacheChoice

if TYPE_CHECKING:
    from torch import Tensor

    from vidgen.weights.folder import ModelFolder

FILE = "magnitudes.json"
"""File name of magnitudes, in a model's folder or in the user's cache by the model's hash."""
THRESHOLDS = {"first-block": 0.1, "magnitude": 0.05, "forecast": 0.2}
"""Defaults, with a PSNR of 32 dB or more to the clip without a cache; see docs/howto/speed.md."""

TENSORS_HELD = {"none": 0, "first-block": 2, "magnitude": 1, "forecast": 1 + ORDER}
"""Number of tensors of the tokens' size that each method keeps for each branch of guidance."""


def settle_cache(request: Request, folder: ModelFolder) -> CacheChoice | None:
    """Return the requested step cache; None if every step is computed.

    Raises:
        InputError: the method needs the model's magnitudes, which weren't measured.
    """
    method, _, threshold = request.cache.partition(":")
    if method == "none":
        return None
    choice = CacheChoice(method, float(threshold or THRESHOLDS[method]))
    if method != "magnitude":
        return choice
    known = read_magnitudes(folder)
    if known is None:
        raise InputError(f"the magnitudes of {folder.name} were never measured; run `vidgen models "
                         f"--measure {folder.given or folder.path}`, or give --cache forecast")
    return replace(choice, magnitudes=known)


def make_caches(
    choice: CacheChoice | None, sigmas: Tensor, guidance: Guidance
) -> StepCaches | None:
    """Return the caches of one run of a sampler over `sigmas` [num_steps + 1]."""
    if choice is None:
        return None
    count = len(sigmas) - 1
    retained = float(sigmas[min(round(RETAINED * count), count)])
    return StepCaches(partial(_memory, choice), retained, MAX_SKIPS, guidance.boundary or None,
                      guidance.branches_at)


def _memory(choice: CacheChoice, branch: str) -> Memory:
    if choice.method == "first-block":
        return FirstBlock(choice.threshold)
    if choice.method == "forecast":
        return Forecast(choice.threshold)
    assert choice.magnitudes is not None
    return Magnitude(choice.threshold, partial(choice.magnitudes.ratio, branch))


def carrying(remember: Callable[[], Mapping[str, Tensor]], on_step: OnStep) -> OnStep:
    """Wrap `on_step` so that each step's state includes the caches' memory."""
    def with_memory(info: StepInfo) -> None:
        on_step(replace(info, state=replace(info.state, cache=remember())))

    return with_memory


def read_magnitudes(folder: ModelFolder) -> Magnitudes | None:
    """Return a model's magnitudes from its folder or the user's cache; None if it has none.

    Raises:
        ModelError: the file in the folder is damaged.
    """
    path = folder.path / FILE
    if path.is_file():
        try:
            return _parse(json.loads(path.read_text("utf-8")))
        except (OSError, ValueError, LookupError, TypeError, AttributeError,
                RecursionError) as error:
            raise ModelError(f"{path} is damaged ({error}); copy it again") from None
    try:
        return _parse(read_cache(Path(FILE).stem)[folder.content_hash])
    except (ValueError, KeyError, TypeError, AttributeError):
        return None  # missing or damaged: it is measured again


def write_magnitudes(found: Magnitudes, folder: ModelFolder, into: Path | None = None) -> Path:
    """Save a model's magnitudes in the user's cache, or in the folder `into`; return the path."""
    path, data = (into or cache_folder()) / FILE, asdict(found)
    if into is None:
        data = {**read_cache(Path(FILE).stem), folder.content_hash: data}
        path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(data).encode())
    return path


def _parse(data: Mapping[str, Any]) -> Magnitudes:
    sigmas = tuple(float(sigma) for sigma in data["sigmas"])
    logs = {str(name): tuple(map(float, each)) for name, each in data["logs"].items()}
    if len(sigmas) < 2 or any(len(each) != len(sigmas) for each in logs.values()):
        raise ValueError("its lists differ in length")
    return Magnitudes(sigmas, logs)
