"""Conditions: what they write, what the model sees, and what sampling must leave untouched."""

import math
from dataclasses import replace

import pytest
import torch

from vidgen.core.errors import InputError
from vidgen.core.protocols import KeyTokens
from vidgen.core.shapes import LatentShape, Strides
from vidgen.diffusion import condition, samplers
from vidgen.diffusion.condition import draw_conditions, latent_mask, with_given
from vidgen.diffusion.flow import add_noise, draw_noise, make_sigmas
from vidgen.diffusion.guidance import guidance_share
from vidgen.diffusion.state import denoise_inputs, new_sound, new_state

STRIDES = Strides(t=4, hw=16)
MIX = {"text": 0.60, "first": 0.15, "last": 0.05, "both": 0.05, "frames": 0.05, "prefix": 0.10,
       "mask": 0.05}
SHAPE = LatentShape(channels=3, num_frames=5, height=4, width=6, batch=2)
SIGMA = torch.tensor([0.7, 0.4])


def draw(seed, **sizes):
    shape = replace(SHAPE, **sizes)
    return draw_noise([seed + i for i in range(shape.batch)], shape)


NOISE, CLIP, STILL = draw(0), draw(10), draw(20, num_frames=1)


def velocity(latents, sigma):
    """A stand-in network that mixes neighbours in space and time."""
    mixed = latents + latents.roll(1, 2) / 2 + latents.roll(1, 4) / 3
    return torch.tanh(mixed) * (1 + sigma.view(-1, 1, 1, 1, 1))


def sample(state, sampler="unipc", sigmas=None):
    def denoise(latents, sigma):
        seen, _ = denoise_inputs(state, sigma, latents)
        return velocity(seen, sigma)

    sigmas = make_sigmas(4, 3.0) if sigmas is None else sigmas
    return samplers.sample(sampler, denoise, state.latents, sigmas, project=state.impose)


def test_without_conditions_the_model_sees_latents_and_sigma_as_they_are():
    state = new_state(NOISE)
    latents, sigma = denoise_inputs(state, SIGMA)
    assert latents is NOISE
    assert sigma is SIGMA
    alone = samplers.sample("unipc", velocity, NOISE, make_sigmas(4, 3.0))
    assert torch.equal(sample(state), alone)


def test_first_frame_is_seen_clean_at_sigma_zero_and_comes_out_exactly():
    state = condition.prefix(new_state(NOISE), STILL)
    latents, sigma = denoise_inputs(state, SIGMA)
    assert torch.equal(latents[:, :, :1], STILL)
    assert torch.equal(latents[:, :, 1:], NOISE[:, :, 1:])
    assert torch.equal(sigma, SIGMA[:, None] * torch.tensor([0.0, 1, 1, 1, 1]))
    clip = sample(state)
    assert torch.equal(clip[:, :, :1], STILL)
    unconditional = sample(new_state(NOISE))
    assert (clip[:, :, 1] != unconditional[:, :, 1]).any()


def test_one_still_serves_a_whole_batch():
    state = condition.prefix(new_state(NOISE), STILL[:1])
    latents, _ = denoise_inputs(state, SIGMA)
    assert torch.equal(latents[:, :, 0], STILL[[0, 0], :, 0])


def test_prefix_is_kept_and_must_leave_something_to_generate():
    state = condition.prefix(new_state(NOISE), CLIP[:, :, :3])
    assert torch.equal(sample(state)[:, :, :3], CLIP[:, :, :3])
    assert denoise_inputs(state, SIGMA)[1].count_nonzero(1).tolist() == [2, 2]
    with pytest.raises(InputError, match="5 latent frames leaves nothing"):
        condition.prefix(new_state(NOISE), CLIP)


def test_what_is_known_may_be_shown_through_noise():
    level, other = torch.tensor([0.25, 0.5]), draw(30)
    state = condition.noise_known(
        condition.prefix(new_state(NOISE), CLIP[:, :, :2]), level, other
    )
    latents, sigma = denoise_inputs(state, SIGMA)
    assert torch.equal(latents[:, :, :2], add_noise(CLIP, other, level)[:, :, :2])
    assert torch.equal(latents[:, :, 2:], NOISE[:, :, 2:])
    assert sigma.tolist() == [
        [known, known, made, made, made]
        for known, made in zip(level.tolist(), SIGMA.tolist(), strict=True)
    ]
    assert torch.equal(state.to(torch.device("cpu")).known_sigma, level)
    region = torch.zeros(1, 1, 5, 4, 6)
    region[..., 2:] = 1
    parts = condition.noise_known(condition.mask(new_state(NOISE), CLIP, region), level, other)
    _, sigma = denoise_inputs(parts, SIGMA, patch=2)
    assert torch.equal(sigma[..., 0], level.view(2, 1, 1).expand(2, 5, 2))
    assert torch.equal(sigma[..., 1:], SIGMA.view(2, 1, 1, 1).expand(2, 5, 2, 2))


def test_what_is_known_may_be_hidden_by_the_noise_that_all_else_has():
    state = condition.prefix(new_state(NOISE), STILL)
    assert state.has_given.tolist() == [True, True]
    hidden = replace(state, hides_known=True).to(torch.device("cpu"))
    begun = draw(31)
    latents, sigma = denoise_inputs(hidden, SIGMA, begun)
    assert torch.equal(latents[:, :, :1], add_noise(STILL, NOISE[:, :, :1], SIGMA))
    assert torch.equal(latents[:, :, 1:], begun[:, :, 1:])
    assert torch.equal(sigma, SIGMA)
    region = torch.zeros(1, 1, 5, 4, 6)
    region[..., 2:] = 1
    assert not condition.mask(new_state(NOISE), CLIP, region).has_given.any()
    assert not condition.noise_known(state, SIGMA, NOISE).has_given.any()
    assert not new_state(NOISE).has_given.any()
    assert not condition.reference(new_state(NOISE), STILL).has_given.any()
    ends = condition.keyframe(new_state(NOISE), STILL, 16, STRIDES)
    assert ends.has_given.all()
    later = condition.noise_known(condition.prefix(ends, STILL), SIGMA, NOISE)
    assert not later.has_given.any()


def test_mask_keeps_the_clip_outside_and_gives_each_token_its_sigma():
    region = torch.zeros(1, 1, 5, 4, 6)
    region[..., 2:] = 1
    state = condition.mask(new_state(NOISE), CLIP, region)
    latents, sigma = denoise_inputs(state, SIGMA)
    assert torch.equal(latents[..., :2], CLIP[..., :2])
    assert torch.equal(latents[..., 2:], NOISE[..., 2:])
    assert torch.equal(sigma, SIGMA.view(2, 1, 1, 1) * region[:, 0])
    _, tokens = denoise_inputs(state, SIGMA, patch=2)
    assert torch.equal(tokens, SIGMA.view(2, 1, 1, 1) * region[:, 0, :, ::2, ::2])
    clip = sample(state, "euler")
    assert torch.equal(clip[..., :2], CLIP[..., :2])


def test_mask_and_first_frame_add_up():
    region = torch.zeros(1, 1, 5, 4, 6)
    region[..., 2:] = 1
    state = condition.mask(condition.prefix(new_state(NOISE), STILL), CLIP, region)
    clip = sample(state)
    assert torch.equal(clip[:, :, :1, :, 2:], STILL[..., 2:])
    assert torch.equal(clip[..., :2], CLIP[..., :2])
    assert int(state.denoise_mask[0].sum()) == 4 * 4 * 4


def test_strength_zero_gives_the_clip_back_and_one_equals_text_to_video_bit_for_bit():
    def at_strength(strength):
        sigmas = make_sigmas(4, 3.0, strength=strength)
        state = condition.video_at_strength(new_state(NOISE), CLIP, float(sigmas[0]))
        return sample(state, sigmas=sigmas)

    assert torch.equal(at_strength(0.0), CLIP)
    assert torch.equal(at_strength(1.0), sample(new_state(NOISE)))
    distances = [float((at_strength(s) - CLIP).norm()) for s in (0.25, 0.5, 0.75, 1.0)]
    assert distances == sorted(distances)


def test_a_still_at_frame_zero_stands_in_place():
    state = condition.keyframe(new_state(NOISE), STILL, 0, STRIDES)
    assert state.keys is None
    assert torch.equal(sample(state)[:, :, :1], STILL)


def test_stills_join_at_their_own_times():
    state = condition.keyframe(new_state(NOISE), STILL, 6, STRIDES)
    state = condition.keyframe(state, CLIP[:1, :, :1], 16, STRIDES)
    state = condition.reference(condition.reference(state, STILL), STILL, 1)
    assert state.keys.num_keys == 4
    assert state.keys.valid is None
    expected = [(6 + 1.5) / 4, (16 + 1.5) / 4, -4.0, -6.0]
    assert state.keys.positions.tolist() == [expected, expected]
    assert torch.equal(state.keys.latents[:, :, :1], STILL)
    assert torch.equal(state.keys.latents[1, :, 1], CLIP[0, :, 0])
    assert not state.any_known


def test_references_can_be_taken_away_from_the_stills_of_a_clip():
    assert condition.without_references(None) is None
    alone = condition.reference(new_state(NOISE), STILL)
    assert condition.without_references(alone.keys) is None
    timed = condition.keyframe(new_state(NOISE), STILL, 6, STRIDES)
    both = condition.without_references(condition.reference(timed, CLIP[:, :, :1]).keys)
    assert torch.equal(both.latents, timed.keys.latents)
    assert torch.equal(both.positions, timed.keys.positions)
    assert both.valid is None


def test_references_are_taken_away_from_each_row_of_a_batch():
    keys = KeyTokens(
        CLIP[:, :, :2], torch.tensor([[1.5, -4.0], [-4.0, 2.5]]), torch.tensor([[True] * 2] * 2)
    )
    left = condition.without_references(keys)
    assert left.num_keys == 2
    assert left.valid.tolist() == [[True, False], [False, True]]


def test_guidance_grows_with_the_distance_from_what_is_given_in_place():
    def share(state, reach=2):
        return guidance_share(state, reach)[0, 0, :, 0, 0].tolist()

    state = new_state(NOISE)
    first = condition.prefix(state, STILL)
    assert guidance_share(first, 0) is None
    assert share(first) == [0, 0.5, 1, 1, 1]
    assert share(condition.reference(first, STILL)) == [0, 0.5, 1, 1, 1]
    assert share(condition.prefix(state, CLIP[:, :, :2]), 4) == [0, 0, 0.25, 0.5, 0.75]
    assert share(condition.keyframe(state, STILL, 16, STRIDES)) == [1] * 5
    assert share(condition.keyframe(first, STILL, 16, STRIDES)) == [0, 0.5, 1, 1, 1]
    heard = replace(first, sound=new_sound(torch.randn(2, 7, 10)))
    packed = guidance_share(heard, 2)
    assert packed.shape == heard.begin().shape
    picture, sound = heard.unpack(packed)
    assert picture[1, 2, :, 3, 5].tolist() == [0, 0.5, 1, 1, 1]
    assert bool((sound == 1).all())


@pytest.mark.parametrize("frame", [-1, 17, 100])
def test_still_outside_of_the_clip_is_refused(frame):
    with pytest.raises(InputError, match=f"frame {frame} is not in the clip.* 0 to 16"):
        condition.keyframe(new_state(NOISE), STILL, frame, STRIDES)


def test_latent_frames_lie_at_the_centre_of_the_frames_they_stand_for():
    for i in range(1, 5):
        covered = range(4 * (i - 1) + 1, 4 * i + 1)
        positions = [condition.keyframe_position(n, STRIDES) for n in covered]
        assert sum(positions) / 4 == pytest.approx(i)
    assert condition.keyframe_position(0, STRIDES) == 0


def test_pixel_mask_touches_every_latent_that_it_meets():
    pixels = torch.zeros(1, 1, 17, 64, 96)
    pixels[0, 0, 0, 17, 95] = 1
    pixels[0, 0, 7, 0, 0] = 1
    latents = latent_mask(pixels, STRIDES)
    assert latents.shape == (1, 1, 5, 4, 6)
    assert latents.nonzero()[:, 2:].tolist() == [[0, 1, 5], [2, 0, 0]]
    tokens = latent_mask(pixels, STRIDES, patch=2)
    assert tokens[0, 0, 0].nonzero().tolist() == [[0, 4], [0, 5], [1, 4], [1, 5]]
    assert latent_mask(pixels[:, :, :1], STRIDES).shape == (1, 1, 1, 4, 6)


def conditions_of(state):
    """Which condition each sample got, read off the state alone."""
    names = []
    for row in range(len(state.clean)):
        known = ~state.denoise_mask[row, 0]
        frames = known.flatten(1).all(1)
        valid = state.keys.valid[row] if state.keys else torch.zeros(0, dtype=torch.bool)
        shown = state.keys.positions[row][valid].tolist() if state.keys else []
        shown = [position for position in shown if position >= 0]
        last = condition.keyframe_position(16, STRIDES)
        if known.any() and not frames.any():
            names.append("mask")
        elif frames.sum() > 1:
            names.append("prefix")
        elif frames.any():
            names.append("both" if last in shown else "first")
        elif shown:
            names.append("last" if shown == [last] else "frames")
        else:
            names.append("text")
    return names


def make_stills(batch):
    frame_index = torch.tensor([16, 6, -1]).repeat(batch, 1)
    latents = frame_index.view(batch, 1, 3, 1, 1).expand(-1, 3, -1, 4, 6).float()
    return latents, frame_index


def training_conditions(latents, generator, mix, stills=(None, None), reference=0.5, patch=1):
    batch, _, frames, height, width = latents.shape
    given = draw_conditions((batch, frames, height, width), generator, mix, STRIDES,
                            reference=reference, frame_index=stills[1], patch=patch)
    return with_given(latents, given, stills[0], STRIDES)


def test_training_draws_every_condition_at_its_share():
    batch = 4000
    latents = torch.zeros(batch, 3, 5, 4, 6)
    mix = MIX | {"text": 0.5, "prefix": 0.15}
    state = training_conditions(
        latents, torch.Generator().manual_seed(0), mix, make_stills(batch)
    )
    names = conditions_of(state)
    # a prefix of one frame is a first frame, a choice of just the last still is a last frame
    one_frame, last_alone = mix["prefix"] / 3, mix["frames"] * 3 / 8
    expected = {
        "text": mix["text"],
        "mask": mix["mask"],
        "both": mix["both"],
        "first": mix["first"] + one_frame,
        "prefix": mix["prefix"] - one_frame,
        "last": mix["last"] + last_alone,
        "frames": mix["frames"] - last_alone,
    }
    assert sum(expected.values()) == pytest.approx(1)
    for name, share in expected.items():
        spread = 4 * math.sqrt(share * (1 - share) / batch)
        assert names.count(name) / batch == pytest.approx(share, abs=spread), name
    referred = ((state.keys.positions < 0) & state.keys.valid).any(1).float().mean()
    assert float(referred) == pytest.approx(0.5, abs=0.04)


def test_training_keys_carry_the_still_of_their_position():
    state = training_conditions(
        torch.zeros(64, 3, 5, 4, 6),
        torch.Generator().manual_seed(1),
        MIX | {"text": 0, "last": 1, "frames": 1},
        make_stills(64),
        reference=1,
    )
    keys = state.keys
    positions = {16: 17.5 / 4, 6: 7.5 / 4, -1: -4.0}
    for row, column in keys.valid.nonzero().tolist():
        frame = int(keys.latents[row, 0, column, 0, 0])
        assert float(keys.positions[row, column]) == positions[frame]
    assert keys.valid.any(1).all()
    left = keys.valid.int().diff(dim=1)
    assert (left <= 0).all()  # used ones first


def test_training_masks_are_never_all_or_nothing_and_follow_patches():
    state = training_conditions(
        torch.zeros(500, 1, 2, 4, 8),
        torch.Generator().manual_seed(2),
        {"mask": 1},
        patch=2,
    )
    share = state.denoise_mask.float().mean((1, 2, 3, 4))
    assert ((share > 0) & (share < 1)).all()
    tokens = state.denoise_mask.unflatten(4, (4, 2)).unflatten(3, (2, 2))
    assert (tokens == tokens[..., :1, :, :1]).all()
    assert len({tuple(row.flatten().tolist()) for row in state.denoise_mask}) > 20


def test_single_frames_and_missing_stills_leave_their_share_to_the_rest():
    generator = torch.Generator().manual_seed(3)
    single = training_conditions(torch.zeros(200, 1, 1, 4, 6), generator, MIX)
    assert single.keys is None
    assert single.denoise_mask.flatten(1).any(1).all()
    bare = training_conditions(torch.zeros(200, 1, 5, 4, 6), generator, MIX)
    assert bare.keys is None
    assert {"first", "prefix", "mask", "text"} == set(conditions_of(bare))
    narrow = training_conditions(torch.zeros(200, 1, 5, 4, 1), generator, MIX)
    assert "mask" not in conditions_of(narrow)


def test_stills_after_the_end_of_a_cut_clip_are_left_out():
    state = training_conditions(
        torch.zeros(200, 1, 3, 4, 6),
        torch.Generator().manual_seed(3),
        {"frames": 1},
        make_stills(200),
        reference=0,
    )
    assert state.keys.valid.all()
    assert (state.keys.positions == 7.5 / 4).all()


def test_a_mix_with_nothing_possible_falls_back_to_text():
    single = torch.zeros(4, 1, 1, 4, 6)
    state = training_conditions(single, torch.Generator().manual_seed(0), {"first": 1})
    assert not state.any_known


def test_training_is_repeatable_and_feeds_the_same_function_as_sampling():
    clean, noise = draw(30, batch=8), draw(50, batch=8)
    sigma = torch.linspace(0.1, 0.9, 8)
    first, second = (
        training_conditions(
            clean, torch.Generator().manual_seed(4), MIX | {"text": 0}, make_stills(8),
        )
        for _ in range(2)
    )
    assert torch.equal(first.denoise_mask, second.denoise_mask)
    noisy = add_noise(clean, noise, sigma)
    latents, grid = denoise_inputs(first, sigma, noisy)
    mask = first.denoise_mask.expand_as(clean)
    assert torch.equal(latents[mask], noisy[mask])
    assert torch.equal(latents[~mask], clean[~mask])
    grid = grid if grid.ndim == 4 else grid[:, :, None, None]
    expected = sigma.view(-1, 1, 1, 1) * first.denoise_mask[:, 0]
    assert torch.equal(grid.expand_as(expected), expected)
