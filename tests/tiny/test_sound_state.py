"""Picture and sound in one state, and in the one tensor that samplers see."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from vidgen.core.errors import InputError
from vidgen.diffusion import condition
from vidgen.diffusion.flow import make_sigmas, shuffled
from vidgen.diffusion.samplers import SAMPLERS, sample
from vidgen.diffusion.state import new_sound, new_state


def make_state(**known):
    torch.manual_seed(0)
    state = new_state(torch.randn(2, 4, 3, 4, 4))
    sound = new_sound(torch.randn(2, 5, 7))
    if "sound" in known:
        sound = sound.begun_by(torch.randn(2, 5, known["sound"]))
    if "picture" in known:
        state = condition.prefix(state, torch.randn(2, 4, known["picture"], 4, 4))
    return replace(state, sound=sound)


def test_packed_and_unpacked():
    state = make_state()
    begun = state.begin()
    assert begun.shape == (2, 4 * 3 * 16 + 5 * 7)
    picture, sound = state.unpack(begun)
    assert torch.equal(picture, state.latents)
    assert torch.equal(sound, state.sound.latents)
    assert torch.equal(state.pack(picture, sound), begun)


def test_without_sound_nothing_is_packed():
    state = replace(make_state(), sound=None)
    assert torch.equal(state.begin(), state.latents)
    assert state.unpack(state.latents) == (state.latents, None)
    assert torch.equal(state.generated, state.denoise_mask)


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_a_sampler_goes_to_the_same_ends_as_with_each_alone(sampler):
    """On a field that pulls each to a place of its own, known parts stay exactly where they are."""
    state = make_state(sound=3, picture=1)
    sigmas = make_sigmas(6, 3.0)
    aims = torch.ones_like(state.latents), -torch.ones_like(state.sound.latents)

    def towards(aim):
        return lambda latents, sigma: (latents - aim) / sigma.view(-1, *[1] * (latents.ndim - 1))

    def both(latents, sigma):
        parts = zip(state.unpack(latents), aims, strict=True)
        return state.pack(*(towards(aim)(part, sigma) for part, aim in parts))

    def drawing(fresh):
        return {"fresh": fresh} if sampler == "ancestral" else {}

    made = sample(
        sampler,
        both, state.begin(), sigmas, project=state.project, **drawing(state.fresh)
    )
    picture, sound = state.unpack(made)
    alone = sample(
        sampler,
        towards(aims[0]), state.impose(state.latents), sigmas, project=state.impose,
        **drawing(partial(shuffled, state.latents)),
    )
    heard = sample(
        sampler,
        towards(aims[1]), state.sound.impose(state.sound.latents), sigmas,
        project=state.sound.impose, **drawing(partial(shuffled, state.sound.latents)),
    )
    torch.testing.assert_close(picture, alone)
    torch.testing.assert_close(sound, heard)
    assert torch.equal(picture[:, :, :1], state.clean[:, :, :1])
    assert torch.equal(sound[:, :, :3], state.sound.clean[:, :, :3])


def test_masks_count_for_all_channels_and_known_sound_carries_no_noise():
    state = make_state(sound=3)
    picture, sound = state.unpack(state.generated)
    assert picture.all()
    assert not sound[:, :, :3].any()
    assert sound[:, :, 3:].all()
    levels = state.sound.levels(torch.tensor([0.5, 0.25]))
    assert levels.shape == (2, 7)
    assert levels[:, :3].eq(0).all()
    assert levels[1, 3:].eq(0.25).all()
    whole = make_state().sound.levels(torch.tensor([0.5, 0.25]))
    assert whole.shape == (2,)


def test_more_known_sound_than_there_is_is_refused():
    with pytest.raises(InputError, match="9 latents are known of a clip or sound that has 7"):
        make_state().sound.begun_by(torch.randn(2, 5, 9))
