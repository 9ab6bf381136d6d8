"""Several things of a prompt, told apart by the verifier while a clip is drawn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from eval.toybox.generation import generate_batch
from tests.models import add_verifier, build_tiny_model, own_defaults
from tests.stopping import stop_after
from vidgen.core.errors import Cancelled, InputError
from vidgen.core.protocols import Denoise
from vidgen.core.request import Request
from vidgen.diffusion.regional_prompts import NO_LABEL
from vidgen.diffusion.state import new_state
from vidgen.pipeline.best_of_n import VERIFIER
from vidgen.pipeline.denoise import regional_prompts, sigmas_of
from vidgen.pipeline.engine import Engine, load
from vidgen.pipeline.inputs import Inputs
from vidgen.pipeline.journal import journal
from vidgen.pipeline.journal.journal import Journal
from vidgen.pipeline.plan import make_plan
from vidgen.pipeline.recorded import own_options
from vidgen.pipeline.replay import request_from_recipe
from vidgen.pipeline.setups import preflight

TWO, ONE = "a red car chases the cat", "a red car bounces"
OPTIONS: dict[str, Any] = {
    "seed": 3, "frames": 9, "steps": 4, "settings": {"regional_prompts": 1.0}}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = add_verifier(build_tiny_model(tmp_path_factory.mktemp("models") / "sure"))
    engine = load(str(folder), device="cpu", dtype="fp32")
    assert isinstance(engine, Engine)
    with seeing_two(engine):
        yield engine


@contextmanager
def seeing_two(engine: Engine) -> Iterator[list[Tensor]]:
    """The verifier sees two things, left and right, of which none is clearly a cat or a car.

    Gives all that it looks at: guesses, and clips that are done.
    """
    guesses = list[Tensor]()

    def where(latents: Tensor) -> Tensor:
        guesses.append(latents)
        shares = torch.zeros(len(latents), 3, *latents.shape[2:])
        width = latents.shape[4]
        shares[:, 2] = 1
        shares[:, :, :, :, 0] = torch.tensor([0.4, 0.5, 0.1]).view(1, 3, 1, 1)
        shares[:, :, :, :, width - 1] = torch.tensor([0.5, 0.4, 0.1]).view(1, 3, 1, 1)
        return shares

    with engine.loader.use(VERIFIER) as verifier:
        before, verifier.where = verifier.where, where  # type: ignore[method-assign]
        shows = verifier.shown

        def shown(latents: Tensor) -> Tensor:
            guesses.append(latents)
            return shows(latents)

        verifier.shown = shown  # type: ignore[method-assign]
        try:
            yield guesses
        finally:
            verifier.where, verifier.shown = before, shows  # type: ignore[method-assign]


def latents_of(engine: Engine, prompt: str, **options: Any) -> Tensor:
    clip = engine.generate(prompt, **OPTIONS | options)
    assert not isinstance(clip, list)
    assert clip.latents is not None
    return clip.latents


def test_only_what_names_several_things_is_bound(engine: Engine) -> None:
    bound, free = latents_of(engine, TWO), latents_of(engine, TWO, settings={"regional_prompts": 0})
    assert not torch.equal(bound, free)
    assert torch.equal(latents_of(engine, ONE),
                       latents_of(engine, ONE, settings={"regional_prompts": 0}))
    assert torch.equal(free, latents_of(engine, TWO, settings={}))  # models that don't say
    half = latents_of(engine, TWO, settings={"regional_prompts": 0.5})
    assert 0 < float((half - free).norm()) < float((bound - free).norm())


def test_each_thing_is_described_by_what_it_does_and_by_how_it_looks(engine: Engine) -> None:
    config = engine.folder.components[VERIFIER].config
    texts = list[list[str]]()

    def encode(some: Sequence[str]) -> tuple[Tensor, Tensor]:
        texts.append(list(some))
        return torch.zeros(len(some), 1, 8), torch.ones(len(some))

    told = regional_prompts(config, [TWO, ONE], 1.0, encode)
    assert told is not None
    assert told.labels.tolist() == [[1, 0], [1, NO_LABEL]]
    assert texts == [
        ["a red car chases a red car", ONE], ["the cat chases the cat", ONE],
        ["a red car and a red car", "a red car and a red car"], ["the cat and the cat", ONE],
    ]
    assert regional_prompts(config, [ONE, "snow"], 1.0, encode) is None


def test_how_things_look_is_described_where_it_is_settled(engine: Engine) -> None:
    asked = list[str]()

    def told(name: str) -> Denoise:
        def denoise(latents: Tensor, _sigma: Tensor) -> Tensor:
            asked.append(name)
            return torch.zeros_like(latents)

        return denoise

    latents = torch.zeros(1, engine.vae_config.latent_channels, 3, 8, 8)
    plan = engine.plan(Request.of(TWO, OPTIONS), Inputs())
    bound = engine.regional_prompts(plan, new_state(latents), [TWO])
    assert bound is not None
    alone = [told(name) for name in ("car does", "cat does", "car looks", "cat looks")]
    with bound.applied(engine.loader, new_state(latents), told("all"), alone) as denoise:
        for level in (0.9, 0.8, 0.7, 0.5):
            denoise(latents, torch.tensor([level]))
    does, looks = ["all", "car does", "cat does"], ["all", "car looks", "cat looks"]
    assert asked == ["all", *does, *looks, *does]


def test_a_clip_that_something_is_known_of_is_left_to_it(engine: Engine) -> None:
    picture = np.full((64, 64, 3), 90, np.uint8)
    for known in ({"image": picture}, {"frame": [(0.5, picture)]}):
        free = latents_of(engine, TWO, **known, settings={"regional_prompts": 0})
        assert torch.equal(latents_of(engine, TWO, **known), free)


def test_later_windows_read_no_texts_for_it(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their first frames are known, so they are not bound."""
    read, encode = list[str](), engine.encode_texts

    def encoded(texts: Sequence[str], *more: Any, **learned: Any) -> tuple[Tensor, Tensor]:
        read.extend(texts)
        return encode(texts, *more, **learned)

    monkeypatch.setattr(engine, "encode_texts", encoded)
    counts = list[int]()
    for frames in (9, 33):
        read.clear()
        latents_of(engine, TWO, frames=frames)
        counts.append(len(read))
    assert counts[0] == counts[1] > 4


def test_things_that_are_not_distinguished_are_not_planned(engine: Engine) -> None:
    picture = np.full((64, 64, 3), 90, np.uint8)
    for known in ({"image": picture}, {"reference": [picture]}, {"frame": [(0.5, picture)]}):
        assert engine.plan(Request.of(TWO, OPTIONS | known), Inputs()).regional_prompts == 0
    assert engine.plan(Request.of(TWO, OPTIONS), Inputs()).regional_prompts == 1.0


def test_it_goes_with_guidance_off_with_step_caches_and_in_windows(engine: Engine) -> None:
    for options in ({"guidance": 1.0}, {"cache": "forecast:0.9", "steps": 8}, {"frames": 33}):
        bound = latents_of(engine, TWO, **options)
        assert torch.equal(bound, latents_of(engine, TWO, **options))
        free = latents_of(engine, TWO, **options, settings={"regional_prompts": 0})
        assert not torch.equal(bound, free)


def test_clips_of_a_batch_are_bound_as_they_are_alone(engine: Engine) -> None:
    texts = [TWO, ONE, "the cat meets a car", "a thing"]
    plan = engine.plan(Request.of(TWO, OPTIONS), Inputs())
    batch = generate_batch(engine, plan, texts, [3, 4, 5, 6])
    for row, text in enumerate(texts):
        alone = generate_batch(engine, plan, [text], [3 + row])
        assert torch.allclose(batch[row], alone[0], atol=1e-4)
    free = generate_batch(engine, replace(plan, regional_prompts=0.0), texts, [3, 4, 5, 6])
    changed = [not torch.allclose(batch[row], free[row], atol=1e-4) for row in range(4)]
    assert changed == [True, False, True, False]


def test_each_candidate_is_bound(engine: Engine) -> None:
    """None shows both for certain, so the second is as likely to be kept."""
    asked = Request.of(TWO, OPTIONS | {"settings": {"regional_prompts": 1.0, "candidates": 2}})
    plan = engine.plan(asked, Inputs())
    with seeing_two(engine) as guesses:
        generate_batch(engine, plan, [TWO], [3])
    legible = sum(sigma < 0.85 for sigma in _sigmas(plan))
    assert len(guesses) == 2 * (legible + 1)  # and each is looked at when it is done


def _sigmas(plan: Any) -> list[float]:
    levels: list[float] = sigmas_of(plan).tolist()[:-1]
    return levels


@pytest.mark.parametrize("count", [1, 2, 3])
def test_stopped_anywhere_it_continues_bound(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setattr(journal, "PATIENCE", 0)
    whole = latents_of(engine, TWO)
    with pytest.raises(Cancelled):
        engine.generate(TWO, **OPTIONS, journal=Journal(tmp_path / "x.mp4"),
                        on_event=stop_after(count))
    again = latents_of(engine, TWO, journal=Journal(tmp_path / "x.mp4", resume=True))
    assert torch.equal(again, whole)


def test_the_recipe_tells_and_replays_as_it_was(engine: Engine, tmp_path: Path) -> None:
    with own_defaults(engine, settings={"regional_prompts": 0.75}):
        clip = engine.generate(TWO, **OPTIONS | {"settings": {}})
        asked = engine.generate(TWO, **OPTIONS)
        assert not isinstance(clip, list)
        assert not isinstance(asked, list)
        again = engine.generate(request_from_recipe(clip.recipe, tmp_path))
    assert clip.recipe["plan"]["regional_prompts"] == 0.75
    assert torch.equal(again.latents, clip.latents)
    assert own_options(asked.recipe)["settings"]["regional_prompts"] == 1.0
    assert "regional_prompts" not in own_options(clip.recipe)["settings"]
    old = asked.recipe
    del old["plan"]["regional_prompts"]  # as recipes were before there was any
    assert request_from_recipe(old, tmp_path).settings["regional_prompts"] == 0


def test_what_it_takes_is_foreseen(engine: Engine) -> None:
    def seconds(prompt: str, **options: Any) -> float:
        request = Request.of(prompt, OPTIONS | options)
        plan = engine.plan(request, Inputs())
        stages = preflight(engine.loader, plan, request, engine.loading).stages
        return next(stage.seconds for stage in stages if stage.name == "denoise")

    free, one, two = seconds(TWO, settings={"regional_prompts": 0}), seconds(ONE), seconds(TWO)
    assert one == pytest.approx(free, rel=0.1), "but for the length of the prompts"
    plan = engine.plan(Request.of(TWO, OPTIONS), Inputs())
    passes = [2 if plan.guidance.scale_at(s) != 1 else 1 for s in _sigmas(plan)]
    more = 2 * sum(s < 0.85 for s in _sigmas(plan))
    assert two / free == pytest.approx((sum(passes) + more) / sum(passes), rel=0.02)


def test_clips_that_cannot_be_bound(engine: Engine, tiny_model: Path) -> None:
    plain = load(str(tiny_model), device="cpu", dtype="fp32")
    with pytest.raises(InputError, match=r"regional_prompts is 1\.0, but tiny has no verifier"):
        plain.generate(TWO, **OPTIONS)
    for changed, devices, why in (
        ({"video": "clip.mp4", "strength": 0.5}, 1, "starts from another"),
        ({}, 2, "one device per clip"),
    ):
        request = Request.of(TWO, OPTIONS | changed)
        with pytest.raises(InputError, match=rf"regional_prompts is 1\.0, but .*{why}"):
            make_plan(request, engine.folder, devices=devices)
        free = make_plan(request.replace(settings={}), engine.folder, devices=devices)
        assert free.regional_prompts == 0
    with pytest.raises(InputError, match="regional_prompts is 2; give a number from 0 to 1"):
        engine.generate(TWO, **OPTIONS | {"settings": {"regional_prompts": 2}})
