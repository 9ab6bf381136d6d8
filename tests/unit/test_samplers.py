"""Samplers on velocity fields with known solutions, guidance, schedules and noise."""

import math
from dataclasses import replace

import pytest
import torch

from vidgen.core.errors import Cancelled, InputError
from vidgen.core.shapes import LatentShape
from vidgen.diffusion.flow import (
    add_noise,
    denoised_of,
    draw_noise,
    draw_sigmas,
    make_sigmas,
    shifted,
    shuffled,
    to_timestep,
    velocity_loss,
    velocity_of,
)
from vidgen.diffusion.guidance import Guidance, guide, guided
from vidgen.diffusion.samplers import SAMPLERS, sample

MEAN, DEVIATION = 0.8, 0.5
SHAPE = LatentShape(channels=2, num_frames=3, height=2, width=4)
GOLDEN_NOISE = [0.07280806452035904, -0.5143795013427734, 0.3432003855705261, -1.6236599683761597]


def gaussian_velocity(latents, sigma):
    """The exact velocity when clean data are normal(MEAN, DEVIATION^2).

    The posterior mean of the clean value given the noisy one is linear in it.
    """
    sigma = sigma.view(-1, 1, 1, 1, 1)
    variance = ((1 - sigma) * DEVIATION) ** 2 + sigma**2
    gain = (1 - sigma) * DEVIATION**2 / variance
    denoised = MEAN + gain * (latents - (1 - sigma) * MEAN)
    return (latents - denoised) / sigma


def smooth_error(sampler, num_steps):
    """Distance from the closed form: noise n flows to MEAN + DEVIATION * n."""
    noise = draw_noise(3, SHAPE).double()
    start = 0.9  # where every derivative of the field is moderate
    noisy = (1 - start) * MEAN + math.hypot((1 - start) * DEVIATION, start) * noise
    levels = start * (1 - torch.arange(num_steps + 1, dtype=torch.float64) / num_steps)
    solved = sample(sampler, gaussian_velocity, noisy, levels)
    return float((solved - (MEAN + DEVIATION * noise)).abs().max())


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("unipc", 2)])
def test_error_falls_with_the_order_of_the_sampler(name, order):
    coarse, fine = (smooth_error(name, steps) for steps in (20, 40))
    assert math.log2(coarse / fine) > order - 0.25
    assert fine < {1: 5e-2, 2: 2e-3}[order]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_model_that_knows_the_clip_hits_it_exactly_in_any_number_of_steps(sampler):
    clean, noise = draw_noise(1, SHAPE), draw_noise(2, SHAPE)

    def denoise(latents, sigma):
        return (latents - clean) / sigma.view(-1, 1, 1, 1, 1)

    for num_steps in (1, 2, 5):
        torch.testing.assert_close(sample(sampler, denoise, noise, make_sigmas(num_steps)), clean)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_resuming_after_any_step_equals_running_straight(sampler):
    noise, sigmas = draw_noise(5, SHAPE), make_sigmas(7, 3.0)
    infos = []
    straight = sample(sampler, gaussian_velocity, noise, sigmas, on_step=infos.append)
    assert [info.step for info in infos] == list(range(1, 8))
    assert torch.equal(infos[-1].state.latents, straight)
    for info in infos:
        later = []
        again = sample(
            sampler,
            gaussian_velocity, noise, sigmas, resume=info.state, on_step=later.append
        )
        assert torch.equal(again, straight)
        assert len(later) == 7 - info.step


def test_ancestral_steps_draw_from_the_distribution_and_not_along_a_path():
    noise = draw_noise(6, replace(SHAPE, num_frames=1, height=50, width=64))
    clean = sample("ancestral", gaussian_velocity, noise, make_sigmas(600, 3.0))
    assert float(clean.mean()) == pytest.approx(MEAN, abs=0.03)
    assert float(clean.std()) == pytest.approx(DEVIATION, abs=0.03)
    by_path = sample("euler", gaussian_velocity, noise, make_sigmas(600, 3.0))
    pairs = [torch.stack([noise.flatten(), made.flatten()]) for made in (by_path, clean)]
    along, apart = (float(torch.corrcoef(pair)[0, 1]) for pair in pairs)
    assert along > 0.99
    assert abs(apart) < 0.1


@pytest.mark.parametrize("shape", [(2, 16, 3, 12, 10), (2, 24, 70)])
def test_shuffled_noise_is_noise_of_its_own_in_each_latent_frame(shape):
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    mixed = [shuffled(noise, step) for step in range(3)]
    assert torch.equal(mixed[0], shuffled(noise, 0))
    assert torch.equal(mixed[0][:, :, :2], shuffled(noise[:, :, :2], 0))  # as a shorter clip's
    assert torch.equal(mixed[0][1:], shuffled(noise[1:], 0))
    flat = torch.stack([part.flatten() for part in (noise, *mixed)])
    apart = torch.corrcoef(flat) - torch.eye(4)
    assert apart.abs().max() < 4 / flat.shape[1] ** 0.5
    for one in mixed:
        torch.testing.assert_close(
            one[0, :, 0].abs().flatten().sort().values, noise[0, :, 0].abs().flatten().sort().values
        )


def test_steps_report_where_they_are_and_what_the_model_believes():
    infos = []
    sigmas = make_sigmas(4, 2.0)
    sample("euler", gaussian_velocity, draw_noise(5, SHAPE), sigmas, on_step=infos.append)
    assert [info.sigma for info in infos] == sigmas[:-1].tolist()
    assert [info.sigma_next for info in infos] == sigmas[1:].tolist()
    assert all(info.num_steps == 4 for info in infos)
    torch.testing.assert_close(infos[-1].denoised, infos[-1].state.latents)


def test_cancelling_stops_at_that_step():
    steps = []

    def stop(info):
        steps.append(info.step)
        if info.step == 2:
            raise Cancelled("stopped")

    with pytest.raises(Cancelled):
        sample("unipc", gaussian_velocity, draw_noise(5, SHAPE), make_sigmas(6), on_step=stop)
    assert steps == [1, 2]


def test_projection_holds_after_every_step():
    known = torch.zeros(SHAPE.dims, dtype=torch.bool)
    known[:, :, 0] = True
    infos = []
    latents = sample(
        "unipc",
        gaussian_velocity,
        draw_noise(5, SHAPE),
        make_sigmas(3),
        project=lambda latents: latents.masked_fill(known, 7.0),
        on_step=infos.append,
    )
    for tensor in (latents, *(x for i in infos for x in (i.state.latents, i.denoised))):
        assert (tensor[known] == 7).all()
        assert (tensor[~known] != 7).all()


def test_the_line_from_clip_to_noise():
    clean, noise = draw_noise(1, SHAPE), draw_noise(2, SHAPE)
    assert torch.equal(add_noise(clean, noise, 0.0), clean)
    assert torch.equal(add_noise(clean, noise, 1.0), noise)
    assert torch.equal(add_noise(clean, noise, torch.ones(1)), noise)
    sigma = torch.tensor([0.3])
    noisy = add_noise(clean, noise, sigma)
    torch.testing.assert_close(denoised_of(noisy, velocity_of(clean, noise), sigma), clean)
    assert to_timestep(torch.tensor([0.9999])).item() == pytest.approx(999.9)
    assert to_timestep(torch.tensor([0.9999]), whole=True).item() == 999


def test_loss_counts_generated_latents_only():
    clean, noise = torch.zeros(2, 1, 2, 1, 1), torch.zeros(2, 1, 2, 1, 1)
    velocity = torch.tensor([1.0, 3.0]).view(1, 1, 2, 1, 1).expand(2, -1, -1, -1, -1)
    mask = torch.tensor([[True, False], [True, True]]).view(2, 1, 2, 1, 1)
    assert velocity_loss(velocity, clean, noise, mask).tolist() == [1.0, 5.0]
    assert velocity_loss(velocity, clean, noise).tolist() == [5.0, 5.0]


def test_sigmas_fall_from_one_to_zero_and_shift_raises_them():
    plain, high = make_sigmas(10), make_sigmas(10, 5.0)
    assert plain.tolist() == pytest.approx([1 - i / 10 for i in range(11)])
    assert len(high) == 11
    assert (high[0], high[-1]) == (1, 0)
    assert (high[1:-1] > plain[1:-1]).all()
    assert float(shifted(torch.tensor(0.5), 3.0)) == pytest.approx(0.75)


def test_strength_takes_its_share_of_the_steps():
    half = make_sigmas(10, 3.0, strength=0.5)
    assert len(half) == 6
    assert float(half[0]) == pytest.approx(0.75)
    assert torch.equal(make_sigmas(10, 3.0, strength=1.0), make_sigmas(10, 3.0))
    noisy = draw_noise(0, SHAPE)
    assert torch.equal(sample("euler", gaussian_velocity, noisy, make_sigmas(9, strength=0)), noisy)
    assert len(make_sigmas(10, strength=0.01)) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_steps": 0}, "steps"),
        ({"num_steps": 4, "shift": 0.0}, "shift"),
        ({"num_steps": 4, "shift": float("nan")}, "shift"),
        ({"num_steps": 4, "strength": 1.5}, "strength"),
        ({"num_steps": 4, "strength": float("nan")}, "strength"),
    ],
)
def test_schedules_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        make_sigmas(**arguments)


def test_training_sigmas_follow_their_distribution():
    generator = torch.Generator().manual_seed(0)
    normal = draw_sigmas(4096, generator, mean=0.5, std=0.8)
    assert float(normal.logit().mean()) == pytest.approx(0.5, abs=0.01)
    assert float(normal.logit().std()) == pytest.approx(0.8, abs=0.01)
    uniform = draw_sigmas(4096, generator, mean=None)
    quantiles = torch.quantile(uniform, torch.tensor([0.1, 0.5, 0.9]))
    assert quantiles.tolist() == pytest.approx([0.1, 0.5, 0.9], abs=0.01)
    assert float(draw_sigmas(4096, generator, shift=3.0).median()) == pytest.approx(0.75, abs=0.01)
    small = draw_sigmas(4, generator, mean=None)
    assert sorted((small * 4).int().tolist()) == [0, 1, 2, 3]  # one in each stratum


def test_guidance_one_is_the_conditional_pass_bit_for_bit_and_costs_no_second():
    calls = []

    def unconditional(latents, sigma):
        calls.append(float(sigma[0]))
        return -gaussian_velocity(latents, sigma)

    noise, sigmas = draw_noise(5, SHAPE), make_sigmas(4)
    alone = sample("euler", gaussian_velocity, noise, sigmas)
    model = guided(gaussian_velocity, unconditional, Guidance(scale=1.0))
    assert torch.equal(sample("euler", model, noise, sigmas), alone)
    assert calls == []
    model = guided(gaussian_velocity, unconditional, Guidance(3.0, interval=(0.3, 0.8)))
    assert not torch.equal(sample("euler", model, noise, sigmas), alone)
    assert calls == [0.75, 0.5]


def test_each_clip_is_guided_as_its_own_level_asks():
    conditional, unconditional = (draw_noise([seed, seed + 1], replace(SHAPE, batch=2))
                                  for seed in (1, 3))
    model = guided(lambda *_: conditional, lambda *_: unconditional,
                   Guidance(3.0, interval=(0.3, 0.8)))
    made = model(conditional, torch.tensor([0.5, 0.2]))
    torch.testing.assert_close(made[0], guide(conditional, unconditional, 3.0)[0])
    torch.testing.assert_close(made[1], conditional[1])


def test_guidance_formula_and_rescale():
    conditional, unconditional = draw_noise(1, SHAPE), draw_noise(2, SHAPE)
    torch.testing.assert_close(guide(conditional, unconditional, 1.0), conditional)
    doubled = guide(conditional, unconditional, 2.0)
    torch.testing.assert_close(doubled, 2 * conditional - unconditional)
    tame = guide(conditional, unconditional, 2.0, rescale=1.0)
    torch.testing.assert_close(tame.std(), conditional.std())
    torch.testing.assert_close(tame / tame.std(), doubled / doubled.std())
    half = guide(conditional, unconditional, 2.0, rescale=0.5)
    torch.testing.assert_close(half, (tame + doubled) / 2)


def test_a_latent_gets_its_share_of_what_guidance_has_above_one():
    conditional, unconditional = draw_noise(1, SHAPE), draw_noise(2, SHAPE)
    share = torch.linspace(0, 1, SHAPE.num_frames).view(1, 1, -1, 1, 1)
    model = guided(lambda *_: conditional, lambda *_: unconditional, Guidance(3.0), share=share)
    made = model(conditional, torch.tensor([0.5]))
    for frame, part in enumerate(share.flatten().tolist()):
        wanted = guide(conditional, unconditional, 1 + 2 * part)[:, :, frame]
        torch.testing.assert_close(made[:, :, frame], wanted)


def test_references_pull_by_what_they_change_where_guidance_applies():
    shown, negative, without = (
        draw_noise([seed, seed + 1], replace(SHAPE, batch=2)) for seed in (1, 3, 5)
    )
    asked = []

    def unshown(_latents, sigma):
        asked.append(sigma.tolist())
        return without

    levels = torch.tensor([0.5, 0.2])
    guidance = Guidance(3.0, interval=(0.3, 0.8), reference_scale=2.0)
    assert guidance.branches_at(0.5) == ("prompt", "negative", "unshown")
    assert guidance.branches_at(0.2) == ("prompt",)
    model = guided(lambda *_: shown, lambda *_: negative, guidance, denoise_unshown=unshown)
    made = model(shown, levels)
    wanted = guide(shown, negative, 3.0) + 2 * (shown - without)
    torch.testing.assert_close(made[0], wanted[0])
    torch.testing.assert_close(made[1], shown[1])
    assert torch.equal(model(shown, torch.tensor([0.2, 0.1])), shown)
    assert len(asked) == 1
    alone = replace(guidance, scale=1.0)
    assert alone.branches_at(0.5) == ("prompt", "unshown")
    model = guided(lambda *_: shown, lambda *_: pytest.fail("asked the negative"), alone,
                   denoise_unshown=unshown)
    torch.testing.assert_close(model(shown, torch.tensor([0.5, 0.6])), 3 * shown - 2 * without)


def test_clips_with_given_frames_are_guided_by_these_alone():
    guidance = Guidance(4.0, known_scale=3.0, reference_scale=2.0, reach=3)
    assert guidance.of_clip(has_given=True) == replace(guidance, scale=3.0, reference_scale=0.0)
    assert guidance.of_clip(has_given=False) == Guidance(4.0, reference_scale=2.0)
    plain = Guidance(4.0, reference_scale=2.0)
    assert plain.of_clip(has_given=True) == Guidance(4.0)
    with pytest.raises(InputError, match="guidance must be a number of at least 0, not -1"):
        Guidance(reference_scale=-1)


def test_rescale_ignores_known_latents():
    conditional, unconditional = draw_noise(1, SHAPE), draw_noise(2, SHAPE)
    mask = torch.ones(1, 1, *SHAPE.dims[2:], dtype=torch.bool)
    mask[:, :, 0] = False
    wild = conditional.clone()
    wild[:, :, 0] = 1e3
    expected = guide(conditional, unconditional, 2.0, rescale=1.0, denoise_mask=mask)
    ours = guide(wild, unconditional, 2.0, rescale=1.0, denoise_mask=mask)
    torch.testing.assert_close(ours[:, :, 1:], expected[:, :, 1:])
    torch.testing.assert_close(ours[:, :, 1:].std(), conditional[:, :, 1:].std())


@pytest.mark.parametrize(
    "arguments",
    [
        {"scale": float("nan")},
        {"scale": float("inf")},
        {"scale": -1.0},
        {"interval": (0.8, 0.2)},
        {"interval": (0.0, 2.0)},
        {"rescale": 1.5},
        {"rescale": float("nan")},
    ],
)
def test_guidance_that_makes_no_sense_is_refused(arguments):
    with pytest.raises(InputError):
        Guidance(**arguments)


def test_longer_clip_starts_with_the_shorter_ones_noise():
    longer = LatentShape(channels=2, num_frames=5, height=2, width=4)
    assert torch.equal(draw_noise(9, longer)[:, :, :3], draw_noise(9, SHAPE))
    assert torch.equal(draw_noise(9, longer)[:, :, 2:], draw_noise(9, SHAPE, first_frame=2))


def test_clip_of_a_batch_has_the_noise_it_has_alone():
    batch = LatentShape(channels=2, num_frames=3, height=2, width=4, batch=3)
    noise = draw_noise([9, 10, 11], batch)
    for i, seed in enumerate((9, 10, 11)):
        assert torch.equal(noise[i : i + 1], draw_noise(seed, SHAPE))


def test_noise_is_normal_and_streams_are_independent():
    shape = LatentShape(channels=8, num_frames=4, height=32, width=32)
    video, audio = draw_noise(0, shape), draw_noise(0, shape, stream="audio")
    assert float(video.mean()) == pytest.approx(0, abs=0.02)
    assert float(video.std()) == pytest.approx(1, abs=0.02)
    assert float((video.abs() < 1).float().mean()) == pytest.approx(0.6827, abs=0.01)
    correlation = torch.corrcoef(torch.stack([video.flatten(), audio.flatten()]))[0, 1]
    assert abs(float(correlation)) < 0.02


def test_noise_never_changes_between_versions():
    noise = draw_noise(7, SHAPE)
    assert noise[0, 0, 0, 0].tolist() == GOLDEN_NOISE
    assert draw_noise(-1, SHAPE).isfinite().all()
    assert draw_noise(2**80, SHAPE).isfinite().all()
