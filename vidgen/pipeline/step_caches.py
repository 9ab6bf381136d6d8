"""A request's step cache: which, and how large a model's blocks make their additions.

`settle_cache` chooses, and the plan holds the choice, so that recipe and journal do; `make_caches`
makes it for one run of a sampler; `carrying` has the states of that run hold what is remembered.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vidgen.core.errors import InputError, ModelError
from vidgen.core.protocols import OnStep, StepInfo
from vidgen.core.request import Request
from vidgen.core.runtime import atomic_write, cache_folder
from vidgen.diffusion.cache import (
    MAX_SKIPS,
    ORDER,
    RETAINED,
    FirstBlock,
    Forecast,
    Magnitude,
    Magnitudes,
    Memory,
    Probe,
    StepCaches,
)
from vidgen.diffusion.guidance import Guidance
from vidgen.pipeline.experts import NO_LORAS

if TYPE_CHECKING:
    from torch import Tensor

    from vidgen.pipeline.video import Engine
    from vidgen.weights.folder import ModelFolder

FILE = "magnitudes.json"
"""In a model's folder, or, by the model's hash, in the user's cache."""
THRESHOLDS = {"first-block": 0.1, "magnitude": 0.05, "forecast": 0.2}
"""Where nobody says: 32 dB and more against the clip without a cache; see docs/speed.md."""

TENSORS_HELD = {"none": 0, "first-block": 2, "magnitude": 1, "forecast": 1 + ORDER}
"""As wide as the tokens, by method, for each branch of guidance."""


@dataclass(frozen=True)
class CacheChoice:
    """A step cache with nothing left to choose.

    Attributes:
        method: "first-block", "magnitude" or "forecast".
        threshold: 0 computes every step.
        magnitudes: of the model, for "magnitude".
    """

    method: str
    threshold: float
    magnitudes: Magnitudes | None = None


def settle_cache(request: Request, folder: ModelFolder) -> CacheChoice | None:
    """What `--cache` means for a model; None where all is computed.

    Raises:
        InputError: magnitudes that nobody has measured.
    """
    method, _, threshold = request.cache.partition(":")
    if method == "none":
        return None
    choice = CacheChoice(method, float(threshold or THRESHOLDS[method]))
    if method != "magnitude":
        return choice
    known = read_magnitudes(folder)
    if known is None:
        raise InputError(f"nobody has measured the magnitudes of {folder.name} yet; `vidgen models "
                         f"--measure {folder.given or folder.path}` does, or take --cache forecast")
    return replace(choice, magnitudes=known)


def make_caches(
    choice: CacheChoice | None, sigmas: Tensor, guidance: Guidance
) -> StepCaches | None:
    """The caches of one run of a sampler.

    Args:
        choice: of the plan.
        sigmas: [num_steps + 1], those of the run.
        guidance: of the plan.
    """
    if choice is None:
        return None
    count = len(sigmas) - 1
    retained = float(sigmas[min(round(RETAINED * count), count)])
    return StepCaches(
        partial(_memory, choice), retained, MAX_SKIPS, guidance.boundary or None,
        guidance.branches_at,
    )


def _memory(choice: CacheChoice, branch: str) -> Memory:
    if choice.method == "first-block":
        return FirstBlock(choice.threshold)
    if choice.method == "forecast":
        return Forecast(choice.threshold)
    assert choice.magnitudes is not None
    return Magnitude(choice.threshold, partial(choice.magnitudes.ratio, branch))


def carrying(remember: Callable[[], Mapping[str, Tensor]], on_step: OnStep) -> OnStep:
    """Have each step's state hold what caches remember."""
    def tell(info: StepInfo) -> None:
        on_step(replace(info, state=replace(info.state, cache=remember())))

    return tell


def measure_magnitudes(engine: Engine) -> Magnitudes:
    """Magnitudes of a model in a clip by its own defaults, from a grey picture where it needs one.

    One clip is enough: they hardly depend on what it shows (Ma et al. 2025, fig. 2).
    """
    from vidgen.diffusion.samplers import sample_state
    from vidgen.pipeline.levels import sigmas_of
    from vidgen.pipeline.networks import denoising

    options: dict[str, Any] = {"seed": 0}
    if "text" not in engine.folder.tasks:
        defaults = engine.folder.defaults
        options["image"] = np.full((defaults.height, defaults.width, 3), 128, np.uint8)
    request, inputs = engine.read(Request(prompt="a red car drives to the right", **options))
    plan = engine.plan(request, inputs)
    contexts, sigmas = engine.encode_prompt(plan), sigmas_of(plan)
    with torch.no_grad():
        state = engine.prepare(plan, request, inputs)
        caches = StepCaches(lambda _: Probe())
        level = float(sigmas[0])
        with denoising(engine.parts, plan, state, contexts, NO_LORAS, level, caches) as denoise:
            sample_state(plan.sampler, denoise, state, sigmas)
    return magnitudes_of(caches)


def magnitudes_of(caches: StepCaches) -> Magnitudes:
    """What the probes of a whole run have measured.

    A branch that guidance left out at some levels changes there as the one does that was there.
    """
    probes = {b: m for b, m in caches.memories.items() if isinstance(m, Probe)}
    whole = max(probes.values(), key=lambda probe: len(probe.logs)).logs
    logs = {branch: _filled(probe.logs, whole) for branch, probe in probes.items()}
    return Magnitudes(
        tuple(round(sigma, 6) for sigma, _ in whole),
        {branch: tuple(round(log, 5) for log in each) for branch, each in logs.items()},
    )


def _filled(
    logs: Sequence[tuple[float, float]], whole: Sequence[tuple[float, float]]
) -> list[float]:
    """Logarithms at all levels of `whole`, by its changes where there are none of one's own."""
    begins = dict(whole)[logs[0][0]]
    own, made = {sigma: begins + log for sigma, log in logs}, list[float]()
    for index, (sigma, log) in enumerate(whole):
        ahead = made[-1] - whole[index - 1][1] if made else 0.0
        made.append(own.get(sigma, log + ahead))
    return made


def read_magnitudes(folder: ModelFolder) -> Magnitudes | None:
    """A model's magnitudes: those in its folder, else those that this user has measured.

    Raises:
        ModelError: the file in the model's folder is damaged.
    """
    path = folder.path / FILE
    if path.is_file():
        try:
            return _parse(json.loads(path.read_text("utf-8")))
        except (OSError, ValueError, LookupError, TypeError, AttributeError,
                RecursionError) as error:
            raise ModelError(f"{path} is damaged ({error}); copy it again") from None
    try:
        return _parse(json.loads((cache_folder() / FILE).read_text("utf-8"))[folder.content_hash])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # never measured, or not readable: then it is measured again


def write_magnitudes(found: Magnitudes, folder: ModelFolder, into: Path | None = None) -> Path:
    """Keep a model's magnitudes in the user's cache, or in the folder `into`; the file's path."""
    if into is not None:
        atomic_write(into / FILE, json.dumps(asdict(found)).encode())
        return into / FILE
    path = cache_folder() / FILE
    try:
        known = dict(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        known = {}
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps({**known, folder.content_hash: asdict(found)}).encode())
    return path


def _parse(data: Mapping[str, Any]) -> Magnitudes:
    sigmas = tuple(float(sigma) for sigma in data["sigmas"])
    logs = {str(name): tuple(map(float, each)) for name, each in data["logs"].items()}
    if len(sigmas) < 2 or any(len(each) != len(sigmas) for each in logs.values()):
        raise ValueError("its lists differ in length")
    return Magnitudes(sigmas, logs)
