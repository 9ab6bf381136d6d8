"""The noise levels that a plan's clip passes, and where they part into two frame rates."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vidgen.core.errors import InputError
from vidgen.diffusion.samplers import SAMPLERS, scheduler_sigmas
from vidgen.diffusion.schedule import make_sigmas
from vidgen.pipeline.experts import boundary_of
from vidgen.pipeline.settings import own_value

if TYPE_CHECKING:
    from vidgen.core.request import Request
    from vidgen.pipeline.types import Plan
    from vidgen.weights.folder import ModelFolder

AT_ONE_RATE = ("control", "follow_audio", "roll")
"""Options of clips that keep one frame rate: what is read beside them has no finer one."""


def sigmas_of(plan: Plan, scheduler: Any = None) -> Tensor:
    """A plan's noise levels [num_steps + 1], those of diffusers' scheduler of the same name."""
    if scheduler is not None:
        return scheduler_sigmas(scheduler, plan.num_steps, strength=plan.strength)
    if plan.student is not None:
        return torch.tensor(plan.student.sigmas)
    lowest = 1e-3
    if plan.sampler == "euler":
        lowest = plan.shift * lowest / (1 + (plan.shift - 1) * lowest)
    return make_sigmas(
        plan.num_steps, plan.shift, strength=plan.strength, sigma_min=lowest,
        reach_min=plan.sampler == "euler",
    )


def split_at(sigmas: Tensor, boundary: float | None) -> int:
    """How many of a run's steps begin at or above the boundary; all where there is none."""
    levels = sigmas.tolist()[:-1]
    return len(levels) if boundary is None else sum(level >= boundary for level in levels)


def split_of(plan: Plan, sigmas: Tensor, folder: ModelFolder) -> int:
    """How many steps of a plan over these levels are drawn at the rate that is shown."""
    return split_at(sigmas, boundary_of(folder, plan, has_audio=False))


def settles(plan: Plan, sigmas: Tensor, folder: ModelFolder) -> bool:
    """Whether any step of a plan is taken at the rate that is shown: not of a clip begun below."""
    return plan.oversampling == 1 or split_of(plan, sigmas, folder) > 0


def upsampling_of(folder: ModelFolder) -> int:
    """Return how many latent frames a model draws below its boundary for each one above it."""
    return int(own_value("oversampling", folder))


def with_oversampling(plan: Plan, request: Request, folder: ModelFolder) -> Plan:
    """The plan at the frame rate that the model draws at below its boundary.

    Raises:
        InputError: a rate that the model doesn't draw at, or that this clip can't have.
    """
    own, asked = upsampling_of(folder), request.settings.get("oversampling")
    if asked not in (None, 1, own):
        draws = ("each latent frame once; leave it out" if own == 1 else
                 f"at most {own} latent frames for one, give 1 or {own}")
        raise InputError(f"oversampling is {asked}; {folder.name} draws {draws}")
    if asked == 1 or own == 1:
        return plan
    why = _hindrance(plan, request, folder)
    if why is None:
        folder.components["vae"].config.steady_stages(own)
        return replace(plan, oversampling=own)
    if asked is not None:
        raise InputError(f"oversampling is {asked}, but this clip {why}; leave it out")
    return plan


def _hindrance(plan: Plan, request: Request, folder: ModelFolder) -> str | None:
    """Why a clip has one frame rate from noise to picture; None where it may have two."""
    given = [option for option in AT_ONE_RATE if request.has(option)]
    if given:
        return f"has {given[0]}, which is read at the rate that frames are shown at"
    if plan.sampler not in SAMPLERS:
        return f"is sampled by {plan.sampler}, which brings its own noise levels"
    if plan.num_frames == 1:
        return "has a single frame"
    sigmas = sigmas_of(plan)
    split = split_of(plan, sigmas, folder)
    begins = request.strength is not None
    if split == len(sigmas) - 1 > 0 or (split == 0 and not begins):
        return f"has no step on one side of the level {folder.defaults.boundary}"
    return None
