"""Our samplers against diffusers' schedulers: the same model, noise and step counts."""

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from vidgen.core.errors import InputError
from vidgen.diffusion.flow import make_sigmas, shifted, to_timestep
from vidgen.diffusion.samplers import (
    UNIPC_SIGMA_MAX,
    sample,
    sample_with_scheduler,
    scheduler_sigmas,
)

NOISY = torch.randn(2, 4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
WEIGHT = torch.randn(4, 4, generator=torch.Generator().manual_seed(1)) / 2


def denoise(latents, sigma):
    """A nonlinear stand-in for a network, smooth in latents and sigma."""
    sigma = sigma.view(-1, 1, 1, 1, 1)
    mixed = torch.einsum("oc,bcfhw->bofhw", WEIGHT, latents)
    return torch.tanh(mixed) * (1.5 - sigma) + 0.7 * latents * sigma


def unipc(shift):
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )


def run_diffusers(scheduler, num_steps):
    """The loop that diffusers' pipelines write around a scheduler."""
    scheduler.set_timesteps(num_steps)
    latents = NOISY.clone()
    for i, timestep in enumerate(scheduler.timesteps):
        velocity = denoise(latents, scheduler.sigmas[i].expand(2))
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    return latents


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 10, 25, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 16.0])
def test_unipc_equals_diffusers(num_steps, shift):
    expected = run_diffusers(unipc(shift), num_steps)
    sigmas = make_sigmas(num_steps, shift, sigma_min=0.001)
    ours = sample("unipc", denoise, NOISY, sigmas)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("num_steps", [1, 2, 7, 30])
@pytest.mark.parametrize("shift", [1.0, 3.0, 8.0])
def test_euler_equals_diffusers(num_steps, shift):
    expected = run_diffusers(FlowMatchEulerDiscreteScheduler(shift=shift), num_steps)
    smallest = float(shifted(torch.tensor(0.001), shift))
    sigmas = make_sigmas(num_steps, shift, sigma_min=smallest, reach_min=True)
    ours = sample("euler", denoise, NOISY, sigmas)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("num_steps", [1, 2, 9, 30])
@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_ancestral_equals_diffusers(num_steps, shift):
    scheduler = DPMSolverMultistepScheduler(
        algorithm_type="sde-dpmsolver++", solver_order=1, prediction_type="flow_prediction",
        use_flow_sigmas=True, flow_shift=shift, final_sigmas_type="zero",
    )
    scheduler.set_timesteps(num_steps)
    noise = torch.randn(num_steps, *NOISY.shape, generator=torch.Generator().manual_seed(8))
    expected = NOISY.clone()
    for i, timestep in enumerate(scheduler.timesteps):
        velocity = denoise(expected, scheduler.sigmas[i].expand(2))
        expected = scheduler.step(
            velocity, timestep, expected, variance_noise=noise[i], return_dict=False
        )[0]
    ours = sample("ancestral", denoise, NOISY, scheduler.sigmas, fresh=lambda step: noise[step])
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shift", [2.0, 3.0, 5.0, 8.0, 12.0, 16.0])
def test_whole_timesteps_are_those_that_diffusers_shows_the_model(shift):
    for num_steps in (*range(1, 61), 100):
        scheduler = unipc(shift)
        scheduler.set_timesteps(num_steps)
        sigmas = make_sigmas(num_steps, shift, sigma_min=0.001).clamp(max=UNIPC_SIGMA_MAX)
        torch.testing.assert_close(sigmas, scheduler.sigmas, atol=1e-7, rtol=0)
        ours = to_timestep(sigmas[:-1], whole=True)
        assert ours.tolist() == scheduler.timesteps.tolist(), num_steps


@pytest.mark.parametrize(
    "make",
    [
        lambda: unipc(3.0),
        lambda: FlowMatchEulerDiscreteScheduler(shift=5.0),
        FlowMatchHeunDiscreteScheduler,
    ],
    ids=["unipc", "euler", "heun"],
)
def test_given_scheduler_runs_as_in_diffusers_and_resumes_anywhere(make):
    expected = run_diffusers(make(), 6)
    states = []
    straight = sample_with_scheduler(
        denoise, NOISY, make(), 6, on_step=lambda info: states.append(info.state)
    )
    assert torch.equal(straight, expected)
    for state in states:
        again = sample_with_scheduler(denoise, NOISY, make(), 6, resume=state)
        assert torch.equal(again, straight)


def test_given_scheduler_that_draws_noise_resumes_with_a_fresh_generator():
    def run(**options):
        return sample_with_scheduler(
            denoise,
            NOISY,
            FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True),
            5,
            generator=torch.Generator().manual_seed(8),
            **options,
        )

    states = []
    straight = run(on_step=lambda info: states.append(info.state))
    for state in states:
        assert torch.equal(run(resume=state), straight)


def test_given_scheduler_at_half_strength_starts_half_way():
    scheduler = unipc(3.0)
    assert torch.equal(scheduler_sigmas(scheduler, 8, strength=0.5), scheduler.sigmas[4:])
    sigmas = []
    sample_with_scheduler(
        denoise, NOISY, scheduler, 8, strength=0.5, on_step=lambda info: sigmas.append(info.sigma)
    )
    assert sigmas == scheduler.sigmas[4:-1].tolist()
    unchanged = sample_with_scheduler(denoise, NOISY, scheduler, 8, strength=0)
    assert torch.equal(unchanged, NOISY)


def test_scheduler_that_is_not_for_flow_is_refused():
    with pytest.raises(InputError, match="not a flow scheduler"):
        sample_with_scheduler(denoise, NOISY, UniPCMultistepScheduler(), 4)
    dynamic = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    with pytest.raises(InputError, match="fixed shift"):
        sample_with_scheduler(denoise, NOISY, dynamic, 4)
