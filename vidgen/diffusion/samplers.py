"""Samplers: pure functions from noise to clean latents, independent of the model.

A sampler calls `on_step` after every step, and resumes from any `SamplerState` that it reported,
bit-equal to an uninterrupted run.

Axes: B batch, C latent channels, F latent frames, h w latent rows and columns.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from vidgen.core.errors import InputError
from vidgen.core.protocols import Denoise, OnStep, SamplerState, StepInfo
from vidgen.diffusion.flow import add_noise, denoised_of, half_log_snr, shuffled, steps_for_strength

Project = Callable[[Tensor], Tensor]
Fresh = Callable[[int], Tensor]
"""Returns standard normal noise like the latents for a step, by its number."""
Step = Callable[[list[float], int, Tensor, Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]]

UNIPC_SIGMA_MAX = 1 - 1e-6
"""UniPC works in log-SNR, which is infinite at sigma = 1; diffusers stops short by the same."""
SAMPLERS = ("euler", "unipc", "ancestral")


def sample(
    name: str, denoise: Denoise, noisy: Tensor, sigmas: Tensor, *, fresh: Fresh | None = None,
    on_step: OnStep | None = None, project: Project | None = None,
    resume: SamplerState | None = None,
) -> Tensor:
    """Integrate dx/dsigma = velocity from noise to clean latents.

    * euler: Karras et al. 2022, Alg. 1 without churn.
    * unipc: UniPC-2, data prediction, B2(h) (Zhao et al. 2023, Alg. 2, Table 5). Each model call
      first corrects its own point, then predicts the next one: second order at the cost of Euler.
      Equal to diffusers' `UniPCMultistepScheduler` with flow sigmas and flow prediction.
    * ancestral: steps that replace a share of the noise with fresh noise (Ho et al. 2020, Alg. 2),
      of first order, as DDIM with eta = 1 (Song et al. 2021, eq. 16) and SDE-DPM-Solver++(1) (Lu et
      al. 2022, appendix). Fresh noise covers part of the model's errors, which later steps correct.

    Return clean latents [B, C, F, h, w], float32.

    Args:
        name: one of `SAMPLERS`.
        noisy: starting latents [B, C, F, h, w], at sigmas[0].
        sigmas: [num_steps + 1], strictly falling, last value 0.
        fresh: the noise of ancestral's steps; None: `shuffled` from `noisy`, then pure noise.
        project: writes known values into latents, after each step.
        resume: last state of an earlier run with the same arguments.
    """
    step: Step = _unipc_step if name == "unipc" else _euler_step
    if name == "unipc":
        sigmas = sigmas.clamp(max=UNIPC_SIGMA_MAX)
    elif name == "ancestral":
        step = partial(_ancestral_step, fresh or partial(shuffled, noisy.float()))
    levels: list[float] = sigmas.tolist()
    assert levels[-1] == 0, f"the last sigma must be 0, not {levels[-1]}"
    assert all(a > b for a, b in pairwise(levels)), f"sigmas must fall strictly, not {levels}"
    return _integrate(step, denoise, noisy, levels, on_step, project, resume)


def whole_timesteps(name: str) -> bool:
    """Return whether a sampler gives models integer timesteps, as diffusers' scheduler does."""
    return name in ("unipc", "UniPCMultistepScheduler")


def _integrate(
    step: Step, denoise: Denoise, noisy: Tensor, levels: list[float], on_step: OnStep | None,
    project: Project | None, resume: SamplerState | None,
) -> Tensor:
    """Call the model and `step` from level to level; `step` returns (latents, *its history)."""
    state = resume or SamplerState(0, noisy.float())
    num_steps = len(levels) - 1
    latents, history = state.latents, state.history
    for i in range(state.step, num_steps):
        sigma = torch.full((latents.shape[0],), levels[i], device=latents.device)
        velocity = denoise(latents, sigma).float()
        before = latents
        latents, *rest = step(levels, i, before, velocity, history)
        history = tuple(rest)
        latents = project(latents) if project else latents
        if on_step:
            denoised = denoised_of(before, velocity, levels[i])
            denoised = project(denoised) if project else denoised
            state = SamplerState(i + 1, latents, history)
            on_step(StepInfo(num_steps, levels[i], levels[i + 1], denoised, state))
    return latents


def _euler_step(
    levels: list[float], i: int, latents: Tensor, velocity: Tensor, _: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    return (latents + (levels[i + 1] - levels[i]) * velocity,)


def _ancestral_step(
    fresh: Fresh, levels: list[float], i: int, latents: Tensor, velocity: Tensor,
    _: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    clean = denoised_of(latents, velocity, levels[i])
    if levels[i + 1] == 0:
        return (clean,)
    left = levels[i + 1] * (1 - levels[i]) / (levels[i] * (1 - levels[i + 1]))  # e^-h
    noise = left * (clean + velocity) + math.sqrt(1 - left**2) * fresh(i)
    return (add_noise(clean, noise, levels[i + 1]),)


def _unipc_step(
    levels: list[float], i: int, latents: Tensor, velocity: Tensor, history: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Correct the latents at level i, then predict those at level i + 1.

    `history` is (corrected latents, denoised, denoised of the step before) of the previous step. It
    is empty at the first step and has two entries at the second. The last step is of first order.
    """
    denoised = denoised_of(latents, velocity, levels[i])
    if history:
        latents = _unipc_correct(levels, i, denoised, *history)
    earlier = history[1] if history and i < len(levels) - 2 else None
    predicted = _unipc_predict(levels, i, latents, denoised, earlier)
    return (predicted, latents, denoised, *history[1:2])


def _unipc_predict(
    levels: list[float], i: int, latents: Tensor, denoised: Tensor, earlier: Tensor | None
) -> Tensor:
    """Take UniP's step from level i to i + 1 (Zhao et al. 2023, eq. 9 without its last term)."""
    if levels[i + 1] == 0:
        return denoised
    latents, scale, h = _exponential_step(levels[i], levels[i + 1], latents, denoised)
    if earlier is not None:
        ratio = (half_log_snr(levels[i - 1]) - half_log_snr(levels[i])) / h
        latents = latents - (0.5 * scale / ratio) * (earlier - denoised)
    return latents


def _unipc_correct(
    levels: list[float], i: int, denoised: Tensor, origin: Tensor, before: Tensor,
    earlier: Tensor | None = None,
) -> Tensor:
    """Take UniC's step from `origin` at level i - 1 to i, where `denoised` is known now.

    The weights solve R rho = b of Zhao et al. 2023, Theorem 3.1, in closed form for two points.
    """
    latents, scale, h = _exponential_step(levels[i - 1], levels[i], origin, before)
    if earlier is None:
        return latents - (0.5 * scale) * (denoised - before)
    ratio = (half_log_snr(levels[i - 2]) - half_log_snr(levels[i - 1])) / h
    phi_1 = math.expm1(-h)
    phi_2 = phi_1 / -h - 1
    phi_3 = phi_2 / -h - 0.5
    b_1, b_2 = phi_2 / phi_1, 2 * phi_3 / phi_1
    rho_earlier = (b_1 - b_2) / (1 - ratio)
    rho = b_1 - rho_earlier
    change = (rho_earlier / ratio) * (earlier - before) + rho * (denoised - before)
    return latents - scale * change


def _exponential_step(
    sigma: float, sigma_next: float, latents: Tensor, denoised: Tensor
) -> tuple[Tensor, float, float]:
    """Return the solution for constant `denoised` (Lu et al. 2022, eq. 9): (latents, scale, h).

    `h` is the step in half log-SNR and `scale` weighs the terms of higher order.
    """
    h = half_log_snr(sigma_next) - half_log_snr(sigma)
    scale = (1 - sigma_next) * math.expm1(-h)
    return (sigma_next / sigma) * latents - scale * denoised, scale, h


def scheduler_sigmas(scheduler: Any, num_steps: int, *, strength: float = 1.0) -> Tensor:
    """Return the noise levels [steps + 1] of `sample_with_scheduler`.

    Raises:
        InputError: a scheduler without flow matching, with inverted sigmas or dynamic shifting.
    """
    config = dict(getattr(scheduler, "config", {}))
    name = type(scheduler).__name__
    prediction = config.get("prediction_type", "flow_prediction")
    if prediction != "flow_prediction" or config.get("invert_sigmas"):
        raise InputError(f"{name} as configured is not a flow scheduler where sigma 1 is noise")
    if config.get("use_dynamic_shifting"):
        raise InputError(f"{name}: set use_dynamic_shifting=False and give it a fixed shift")
    steps = steps_for_strength(num_steps, strength)
    scheduler.set_timesteps(num_steps)
    sigmas: Tensor = torch.as_tensor(scheduler.sigmas).float().cpu()
    if len(sigmas) != len(scheduler.timesteps) + 1 or float(sigmas.max()) > 1 + 1e-6:
        raise InputError(f"{name}'s sigmas are not flow-matching noise levels in [0, 1]")
    return sigmas[round((len(sigmas) - 1) * (1 - steps / num_steps)) :]


def sample_with_scheduler(
    denoise: Denoise, noisy: Tensor, scheduler: Any, num_steps: int, *, strength: float = 1.0,
    generator: torch.Generator | None = None, on_step: OnStep | None = None,
    project: Project | None = None, resume: SamplerState | None = None,
) -> Tensor:
    """Sample with a diffusers flow scheduler, with its own shift and options.

    Schedulers have no common way to read their state, so the sampler's history is the starting
    latents and all velocities, and resuming replays them without the model. The scheduler's state
    is overwritten. Arguments are as in `sample` and `make_sigmas`, errors as in
    `scheduler_sigmas`; a `generator`, for schedulers that draw noise at each step, must be seeded
    again to resume.
    """
    levels = scheduler_sigmas(scheduler, num_steps, strength=strength).tolist()
    first = len(scheduler.timesteps) - (len(levels) - 1)
    scheduler.set_begin_index(first)
    draws = "generator" in inspect.signature(scheduler.step).parameters
    noise_source = {"generator": generator} if draws else {}

    def step(
        _: list[float], i: int, latents: Tensor, velocity: Tensor, history: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        timestep = scheduler.timesteps[first + i]
        made = scheduler.step(velocity, timestep, latents, return_dict=False, **noise_source)[0]
        return (made.float(), *history, velocity)

    start, *velocities = resume.history if resume else (noisy.float(),)
    latents = start
    for i, velocity in enumerate(velocities):
        latents = step(levels, i, latents, velocity, ())[0]
        latents = project(latents) if project else latents
    state = SamplerState(len(velocities), latents, (start, *velocities))
    return _integrate(step, denoise, noisy, levels, on_step, project, state)
