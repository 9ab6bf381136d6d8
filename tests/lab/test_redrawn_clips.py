"""Training clips that a model draws anew: what of a cache they change, and what they don't."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.models import add_low_expert, build_tiny_model
from train.toybox.redrawing import Redrawer
from train.toybox.tasks.model_made import Redrawn, Settled
from train.toybox.tasks.toybox_data import CacheConfig, CachedClips, ToyboxCache, load_vae
from vidgen.core.errors import InputError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def redrawer(tiny_model: Path) -> Redrawer:
    return Redrawer(str(tiny_model))


@pytest.fixture(scope="module")
def plain(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> CacheConfig:
    return CacheConfig(str(tmp_path_factory.mktemp("plain")), str(tiny_model / "vae"), 1,
                       shard_size=3, height=32, width=32, num_frames=17)  # fmt: skip


def made(config: CacheConfig, redrawer: Redrawer | None) -> CachedClips:
    cache = ToyboxCache(config)
    cache.make(0, load_vae(config.vae, CPU), CPU, redrawer)
    return cache.load()


def anew(plain: CacheConfig, tiny_model: Path, folder: Path, *strengths: float) -> CacheConfig:
    return replace(plain, folder=str(folder), redrawn=Redrawn(str(tiny_model), strengths))


def test_clips_are_redrawn_and_stills_stay(
    plain: CacheConfig, tiny_model: Path, redrawer: Redrawer, tmp_path: Path
) -> None:
    before = made(plain, None)
    some = made(anew(plain, tiny_model, tmp_path / "some", 0.5), redrawer)
    assert some.clips.shape == before.clips.shape
    assert not torch.equal(some.clips, before.clips)
    assert torch.equal(some.stills.latents, before.stills.latents)
    assert torch.equal(some.cover, before.cover)
    again = made(anew(plain, tiny_model, tmp_path / "again", 0.5), redrawer)
    assert torch.equal(some.clips, again.clips)


@pytest.mark.parametrize(("way", "levels"), [("latents", (0.1, 1.0)), ("guess", (0.1, 0.9))])
def test_less_noise_leaves_more_of_a_clip(
    redrawer: Redrawer, way: str, levels: tuple[float, float]
) -> None:
    torch.manual_seed(0)
    latents = torch.randn(2, redrawer.engine.vae_config.latent_channels, 3, 4, 4)
    draw = getattr(redrawer, way)
    little, much = (
        (draw(latents, ["a cat", "a dog"], [1, 2], level) - latents).square().mean()
        for level in levels
    )
    assert 0 < little < much


def test_a_clip_redrawn_does_not_depend_on_those_next_to_it(redrawer: Redrawer) -> None:
    torch.manual_seed(1)
    latents = torch.randn(2, redrawer.engine.vae_config.latent_channels, 2, 4, 4)
    both = redrawer.latents(latents, ["a cat", "a dog"], [1, 2], 0.5)
    alone = redrawer.latents(latents[1:], ["a dog"], [2], 0.5)
    assert torch.allclose(both[1:], alone, atol=1e-4)


def test_clips_at_the_rate_of_the_low_expert_are_drawn_at_it(tmp_path: Path) -> None:
    model = add_low_expert(build_tiny_model(tmp_path / "finer"), temporal_upsampling=2)
    redrawer = Redrawer(str(model))
    latents = torch.randn(2, redrawer.engine.vae_config.latent_channels, 5, 4, 4)
    prompts, seeds = ["a cat", "a dog"], [1, 2]
    finer, own = (redrawer.latents(latents, prompts, seeds, 0.4, factor) for factor in (2, 1))
    assert finer.shape == own.shape == latents.shape
    assert not torch.allclose(finer, own, atol=1e-3)
    little = redrawer.latents(latents, prompts, seeds, 0.1, 2)
    assert 0 < (little - latents).square().mean() < (finer - latents).square().mean()
    with pytest.raises(InputError, match=r"strength is 1\.0, from where .* own frame rate alone"):
        redrawer.latents(latents, prompts, seeds, 1.0, 2)
    with pytest.raises(InputError, match="clips of 3 times the model's frame rate"):
        redrawer.latents(latents, prompts, seeds, 0.4, 3)


def test_a_cache_says_who_drew_it(
    plain: CacheConfig, tiny_model: Path, tmp_path: Path
) -> None:
    ToyboxCache(anew(plain, tiny_model, tmp_path, 0.5))
    with pytest.raises(InputError, match=r"made otherwise .*redrawn"):
        ToyboxCache(anew(plain, tiny_model, tmp_path, 0.5, 0.7))
    with pytest.raises(InputError, match=r"made otherwise .*redrawn"):
        ToyboxCache(replace(plain, folder=str(tmp_path)))


@pytest.mark.parametrize("strengths", [(), (0.0,), (0.5, 1.2), (-0.1,)])
def test_shares_of_no_step_are_refused(strengths: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match=r"strengths are .*above 0, up to 1"):
        Redrawn("toybox", strengths)


def test_a_cache_keeps_what_a_model_settles_of_clips_at_its_own_rate(
    plain: CacheConfig, tiny_model: Path, redrawer: Redrawer, tmp_path: Path
) -> None:
    finer = replace(plain, folder=str(tmp_path / "plain"), num_frames=33, fps=24)
    how = Settled(str(tiny_model), 0.3)
    both = made(replace(finer, folder=str(tmp_path / "both"), settled=how), redrawer)
    alone, seldom = made(finer, None), made(plain, None)
    assert alone.settled is None
    assert torch.equal(both.clips, alone.clips)
    assert both.settled is not None
    assert both.settled.shape == seldom.clips.shape
    near, far = ((both.settled - clips).square().mean() for clips in (seldom.clips, 0))
    assert 0 < near < far  # of the same clips at half the rate, through little noise
    assert torch.equal(both.to(CPU).settled, both.settled)
    known = (both.settled[:, :, 0] - seldom.clips[:, :, 0]).abs().amax((1, 2, 3)) < 1e-2
    assert known.tolist() == [False, True, False], "every other one behind its first frame"
    with pytest.raises(InputError, match=r"made otherwise .*settled"):
        ToyboxCache(replace(finer, folder=str(tmp_path / "both")))


@pytest.mark.parametrize("level", [0.0, 1.0, 1.5])
def test_clips_are_settled_between_picture_and_noise(level: float) -> None:
    with pytest.raises(InputError, match=rf"level is {level}; .*between 0 and 1"):
        Settled("toybox", level)


def test_a_guess_may_know_first_frames(redrawer: Redrawer) -> None:
    torch.manual_seed(2)
    latents = torch.randn(2, redrawer.engine.vae_config.latent_channels, 3, 4, 4)
    blind, told = (redrawer.guess(latents, ["a cat", "a dog"], [1, 2], 0.9, knows_first=known)
                   for known in (False, True))
    assert not torch.equal(blind[:, :, 1:], told[:, :, 1:])
    assert torch.equal(told[:, :, :1], latents[:, :, :1])


def test_stills_alone_are_not_redrawn(plain: CacheConfig) -> None:
    with pytest.raises(InputError, match="stills_only"):
        replace(plain, stills_only=True, redrawn=Redrawn("toybox", (0.5,)))
    with pytest.raises(InputError, match="settled is of clips"):
        replace(plain, stills_only=True, settled=Settled("toybox", 0.8))


def test_one_model_makes_all_of_a_cache_that_is_made_by_one(plain: CacheConfig) -> None:
    both = replace(plain, redrawn=Redrawn("mine", (0.5,)), settled=Settled("mine", 0.8))
    assert both.drawn_by == "mine"
    with pytest.raises(InputError, match=r"redrawn is by mine, settled by toybox; .*the same"):
        replace(both, settled=Settled("toybox", 0.8))


def test_a_clip_without_its_middle_still_is_refused(plain: CacheConfig) -> None:
    with pytest.raises(InputError, match=r"num_frames is 9.* give 17 or more"):
        replace(plain, num_frames=9)
