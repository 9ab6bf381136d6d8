"""Measure how much a model's steps change, for the step cache "magnitude"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vidgen.core.request import Request
from vidgen.diffusion.cache import Magnitudes, Probe, StepCaches
from vidgen.diffusion.samplers import sample_state
from vidgen.pipeline.denoise import denoising
from vidgen.pipeline.experts import sigmas_of
from vidgen.pipeline.types import NO_LORAS

if TYPE_CHECKING:
    from vidgen.pipeline.engine import Engine


def measure_magnitudes(engine: Engine) -> Magnitudes:
    """Measure a model's magnitudes in a clip of its defaults, from a grey picture if it needs one.

    One clip is enough: they hardly depend on its content (Ma et al. 2025, fig. 2).
    """
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
        with denoising(engine.loader, plan, state, contexts, NO_LORAS, level, caches) as denoise:
            sample_state(plan.sampler, denoise, state, sigmas)
    return magnitudes_of(caches)


def magnitudes_of(caches: StepCaches) -> Magnitudes:
    """Return the measurements of the probes of a whole run.

    Where guidance left a branch out, it changes as the one that ran.
    """
    probes = {b: m for b, m in caches.memories.items() if isinstance(m, Probe)}
    whole = max(probes.values(), key=lambda probe: len(probe.logs)).logs
    logs = {branch: _filled(probe.logs, whole) for branch, probe in probes.items()}
    rounded = {branch: tuple(round(log, 5) for log in each) for branch, each in logs.items()}
    return Magnitudes(tuple(round(sigma, 6) for sigma, _ in whole), rounded)


def _filled(
    logs: Sequence[tuple[float, float]], whole: Sequence[tuple[float, float]]
) -> list[float]:
    """Return logarithms at all levels of `whole`; missing ones change as those of `whole`."""
    begins = dict(whole)[logs[0][0]]
    own, made = {sigma: begins + log for sigma, log in logs}, list[float]()
    for index, (sigma, log) in enumerate(whole):
        ahead = made[-1] - whole[index - 1][1] if made else 0.0
        made.append(own.get(sigma, log + ahead))
    return made
