"""Candidates of a clip, drawn until a verifier is content."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eval.toybox.generation import generate_batch
from tests.models import add_verifier, build_tiny_model, own_defaults
from tests.stopping import noting, stop_after
from vidgen.core.errors import Cancelled, InputError, ModelError
from vidgen.core.request import Request
from vidgen.diffusion.condition import prefix
from vidgen.diffusion.state import UpsampledKnown, new_state
from vidgen.models.verifier import Verifier, Want, score
from vidgen.pipeline.best_of_n import VERIFIER, candidate_state, verify_video, wanted
from vidgen.pipeline.engine import Engine, load
from vidgen.pipeline.inputs import Inputs
from vidgen.pipeline.journal import journal
from vidgen.pipeline.journal.job import TRIED, job_folder
from vidgen.pipeline.journal.journal import Journal
from vidgen.pipeline.recorded import own_options
from vidgen.pipeline.replay import request_from_recipe
from vidgen.pipeline.types import Progress
from vidgen.weights.convert import convert
from vidgen.weights.folder import ModelFolder
from vidgen.weights.layouts import open_model

PROMPT = "a red car bounces"
OPTIONS: dict[str, Any] = {"seed": 3, "frames": 9, "steps": 3}
NEVER, ALWAYS = 2.0, 0.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_verifier(build_tiny_model(tmp_path_factory.mktemp("models") / "sure"))


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    engine = load(str(folder), device="cpu", dtype="fp32")
    assert isinstance(engine, Engine)
    return engine


@contextmanager
def content_from(engine: Engine, enough: float) -> Iterator[Verifier]:
    """The engine's verifier, content from a score."""
    with engine.loader.use(VERIFIER) as verifier:
        before = verifier.config
        verifier.config = replace(before, enough=enough)
        try:
            yield verifier
        finally:
            verifier.config = before


def candidates(engine: Engine, count: int, prompt: str = PROMPT) -> list[Tensor]:
    """So many candidates of the clip, each made by itself."""
    request = Request.of(prompt, OPTIONS)
    plan = engine.plan(request, Inputs())
    state, contexts = engine.prepare(plan, request, Inputs()), engine.encode_prompt(plan)
    states = [candidate_state(state, number) for number in range(count)]
    return [engine.sample(plan, each, contexts) for each in states]


def best_of(verifier: Verifier, made: list[Tensor]) -> Tensor:
    wants = verifier.config.wants_in(PROMPT)
    return max(made, key=lambda latents: score(verifier.shown(latents)[0], wants))


def test_the_first_candidate_is_the_clip_as_it_is(engine: Engine) -> None:
    alone = engine.generate(PROMPT, **OPTIONS).latents
    with content_from(engine, ALWAYS):
        assert torch.equal(engine.generate(PROMPT, **OPTIONS,
                                           settings={"candidates": 5}).latents, alone)
    with content_from(engine, NEVER):
        nameless = engine.generate("a thing bounces", **OPTIONS, settings={"candidates": 5})
        other = engine.generate("a thing bounces", **OPTIONS)
    assert torch.equal(nameless.latents, other.latents)


def test_of_all_that_do_not_satisfy_the_best_is_kept(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    made = candidates(engine, 4)
    assert all(not torch.equal(made[0], other) for other in made[1:])
    told: list[Progress] = []
    with content_from(engine, NEVER) as verifier:
        clip = engine.generate(PROMPT, **OPTIONS, settings={"candidates": 4}, on_event=told.append)
        best = best_of(verifier, made)
    assert torch.equal(clip.latents, best)
    assert "none of 4 candidates clearly shows car: kept" in caplog.text
    assert [(p.done, p.total, p.candidate, p.num_candidates)
            for p in told if p.stage == "sample"] == [
        (3 * number + step, 3 * number + 3, number + 1, 4)
        for number in range(4) for step in range(4)]


def test_drawing_ends_with_the_first_that_satisfies(engine: Engine) -> None:
    made = candidates(engine, 4)
    with content_from(engine, NEVER) as verifier:
        wants = verifier.config.wants_in(PROMPT)
        scores = [score(verifier.shown(latents)[0], wants) for latents in made]
    later = max(range(1, 4), key=scores.__getitem__)
    enough = min(scores[later], max(scores[:later]) + 1e-6)
    first = next(number for number, each in enumerate(scores) if each >= enough)
    steps: list[int] = []
    with content_from(engine, enough):
        clip = engine.generate(PROMPT, **OPTIONS,
                               settings={"candidates": 4}, on_event=noting(steps))
    assert torch.equal(clip.latents, made[first])
    assert len(steps) == 3 * (first + 1)


def test_clips_of_a_batch_have_the_candidates_that_they_have_alone(engine: Engine) -> None:
    texts = [PROMPT, "a cat moves left", "a thing moves"]
    plan = replace(engine.plan(Request.of(PROMPT, OPTIONS), Inputs()), candidates=3)
    with content_from(engine, NEVER):
        batch = generate_batch(engine, plan, texts, [3, 4, 5])
        for row, (text, seed) in enumerate(zip(texts, [3, 4, 5], strict=True)):
            alone = generate_batch(engine, plan, [text], [seed])
            assert torch.allclose(batch[row], alone[0], atol=1e-4)
        one = generate_batch(engine, replace(plan, candidates=1), texts, [3, 4, 5])
    assert torch.allclose(batch[2], one[2], atol=1e-4)


@pytest.mark.parametrize("patience", [0, 1e9])
@pytest.mark.parametrize(("frames", "count"), [
    (9, 2), (9, 3), (9, 4), (9, 5), (33, 3), (33, 5), (33, 7), (33, 9), (33, 11), (33, 12),
])
def test_stopped_anywhere_it_continues_with_the_candidates_left(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, patience: float,
    frames: int,
) -> None:
    """With patience the journal saves a state only when it is stopped, else after each step."""
    monkeypatch.setattr(journal, "PATIENCE", patience)
    options = OPTIONS | {"frames": frames, "settings": {"candidates": 2}}
    all_steps, steps = list[int](), list[int]()
    with content_from(engine, NEVER):
        whole = engine.generate(PROMPT, **options, on_event=noting(all_steps))
        with pytest.raises(Cancelled):
            engine.generate(PROMPT, **options, journal=Journal(tmp_path / "x.mp4"),
                            on_event=stop_after(count))
        again = engine.generate(PROMPT, **options, on_event=noting(steps),
                                journal=Journal(tmp_path / "x.mp4", resume=True))
    assert torch.equal(again.latents, whole.latents)
    assert len(steps) == len(all_steps) - count


def test_a_candidate_that_was_given_up_is_not_gone_on_with(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a kill comes behind it, before the next one's first step is saved."""
    monkeypatch.setattr(journal, "PATIENCE", 0)
    kept = Journal(tmp_path / "x.mp4")
    steps: list[int] = []
    with content_from(engine, NEVER):
        whole = engine.generate(PROMPT, **OPTIONS, settings={"candidates": 2})
        with pytest.raises(Cancelled):
            engine.generate(PROMPT, **OPTIONS,
                            settings={"candidates": 2}, journal=kept, on_event=stop_after(3))
        state = (job_folder(kept.output) / "state.safetensors").read_bytes()
        resumed = Journal(tmp_path / "x.mp4", resume=True)
        with pytest.raises(Cancelled):
            engine.generate(PROMPT, **OPTIONS, settings={"candidates": 2}, journal=resumed,
                            on_event=stop_after(1))
        assert (job_folder(kept.output) / TRIED).is_file()
        (job_folder(kept.output) / "state.safetensors").write_bytes(state)
        again = engine.generate(PROMPT, **OPTIONS,
                                settings={"candidates": 2}, on_event=noting(steps),
                                journal=Journal(tmp_path / "x.mp4", resume=True))
    assert steps == [4, 5, 6]
    assert torch.equal(again.latents, whole.latents)


def test_what_continues_has_to_show_what_its_beginning_shows() -> None:
    class Seeing:
        """Sees a cat, label 0, where the first latent is 1, a car where it is 2."""

        def __init__(self) -> None:
            from vidgen.models.verifier import VerifierConfig

            self.config = VerifierConfig((("cat",), ("car",)), (("red",),), latent_channels=2)

        def shown(self, latents: Tensor) -> Tensor:
            first = latents[:, 0, :, 0, 0]
            return torch.stack([first == 1, first == 2], dim=2).float()[..., None].expand(
                -1, -1, -1, 2)

    verifier: Any = Seeing()
    state = new_state(torch.zeros(2, 2, 3, 4, 4))
    prompts = ["a cat and a red car", "the desert"]
    cat, car = Want(0), Want(1)
    assert wanted(verifier, state, prompts) == [{cat, Want(1, 0)}, set()]
    begun = prefix(state, torch.tensor([1.0, 2.0]).view(2, 1, 1, 1, 1).expand(2, 2, 1, 4, 4))
    assert wanted(verifier, begun, prompts) == [{cat}, {car}]
    assert wanted(verifier, begun, ["a car", "a red car"]) == [set(), {car}]
    known = torch.zeros(2, 2, 5, 4, 4)
    known[:, :, -1] = 2.0
    finer = replace(begun, known_upsampled=UpsampledKnown(known, torch.zeros(2, 1, 5, 4, 4) > 0))
    assert wanted(verifier, finer, prompts) == [{car}, {car}]
    masked = replace(state, denoise_mask=torch.ones(2, 1, 3, 4, 4, dtype=torch.bool))
    masked.denoise_mask[..., :2] = False
    assert wanted(verifier, masked, prompts) == [{cat, Want(1, 0)}, set()]


def test_clips_that_can_have_no_other_candidate(engine: Engine, tiny_model: Path) -> None:
    plain = load(str(tiny_model), device="cpu", dtype="fp32")
    with pytest.raises(InputError, match=r"candidates is 2, but tiny has no verifier"):
        plain.generate(PROMPT, **OPTIONS, settings={"candidates": 2})
    clip = OPTIONS | {"video": "clip.mp4", "strength": 0.5}
    with pytest.raises(InputError, match=r"candidates is 2, but .*starts from another"):
        engine.plan(Request.of(PROMPT, clip | {"settings": {"candidates": 2}}), Inputs())
    assert engine.plan(Request.of(PROMPT, clip), Inputs()).candidates == 1
    assert plain.generate(PROMPT, **OPTIONS,
                          settings={"candidates": 1}).recipe["plan"]["candidates"] == 1
    with pytest.raises(InputError, match="candidates is 0; give a whole number from 1 to 64"):
        engine.generate(PROMPT, **OPTIONS, settings={"candidates": 0})


def test_a_model_may_draw_some_by_itself(engine: Engine, tmp_path: Path) -> None:
    with own_defaults(engine, settings={"candidates": 3}), content_from(engine, NEVER):
        clip = engine.generate(PROMPT, **OPTIONS)
        one = engine.generate(PROMPT, **OPTIONS, settings={"candidates": 1})
        again = engine.generate(request_from_recipe(clip.recipe, tmp_path))
    assert clip.recipe["plan"]["candidates"] == 3
    assert torch.equal(again.latents, clip.latents)
    assert own_options(one.recipe)["settings"]["candidates"] == 1
    assert "candidates" not in own_options(clip.recipe)["settings"]
    old = one.recipe
    del old["plan"]["candidates"]  # as recipes were before there were any
    assert request_from_recipe(old, tmp_path).settings["candidates"] == 1


def test_a_verifier_stays_as_it_is_in_every_layout(folder: Path, tmp_path: Path) -> None:
    source = open_model(str(folder))
    assert isinstance(source, ModelFolder)
    convert(source, tmp_path / "there", "diffusers")
    there = open_model(str(tmp_path / "there"))
    assert isinstance(there, ModelFolder)
    assert there.components[VERIFIER].config == source.components[VERIFIER].config
    one, other = (f.components[VERIFIER].load(torch.float32, "cpu") for f in (source, there))
    latents = torch.randn(1, 4, 2, 4, 4)
    assert torch.equal(one.eval().shown(latents), other.eval().shown(latents))


@pytest.mark.parametrize(("changed", "told"), [
    ({"dim": 9}, "doesn't match its config.json"),
    ({"labels": [["cat"], []]}, "is not a valid config: label 1 has no name"),
    ({"latent_channels": 5}, "the verifier reads latents of 5 channels, but the VAE's have 4"),
])
def test_a_verifier_of_another_model_is_reported(
    folder: Path, tmp_path: Path, changed: dict[str, Any], told: str
) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    config = json.loads((other / VERIFIER / "config.json").read_text())
    (other / VERIFIER / "config.json").write_text(json.dumps(config | changed))
    with pytest.raises(ModelError, match=told):
        load(str(other), device="cpu", dtype="fp32")


def test_a_finished_clip_is_scored_in_chunks_as_its_latents_are(engine):
    video = torch.rand(1, 3, 9, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with content_from(engine, ALWAYS) as verifier:
        shown = verifier.shown(engine.encode_video(video))[0]
        whole = score(shown, verifier.config.wants_in(PROMPT))
        verified = verify_video(engine.loader, video.split([2, 4, 3], dim=2), PROMPT)
        assert verified is not None
        assert (verified.names, verified.is_enough) == ("car", True)
        assert verified.score == pytest.approx(whole, abs=1e-5)
    with content_from(engine, NEVER):
        verified = verify_video(engine.loader, [video], PROMPT)
        assert verified is not None
        assert not verified.is_enough
    assert verify_video(engine.loader, [video], "an old lighthouse") is None
