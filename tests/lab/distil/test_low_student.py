"""A student's part for the expert at low noise, at tiny size: taught alone, behind the other's."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.lab.distilling import make_trajectories, released, with_run
from tests.models import add_low_expert
from train.toybox.distillation.config import DistilRun
from train.toybox.distillation.data import open_shards
from train.toybox.distillation.match import MatchTask
from train.toybox.distillation.student import DistilTask
from train.toybox.phases import train
from vidgen.core.config import build, dump
from vidgen.core.errors import InputError
from vidgen.core.request import Request
from vidgen.diffusion.samplers import UNIPC_SIGMA_MAX, sample
from vidgen.models.lora import attached
from vidgen.pipeline.denoise import velocity
from vidgen.pipeline.engine import Engine, load
from vidgen.pipeline.inputs import Inputs
from vidgen.training.checkpoint import latest_checkpoint, load_averages, read_meta
from vidgen.weights.folder import FEW_STEP, FEW_STEP_WEIGHTS, few_step_parts
from vidgen.weights.lora import read_few_step

BOUNDARY = 0.9  # its two steps begin at 1 and at 0.83
PROMPT = "a red car bounces across the desert"


@pytest.fixture(scope="module")
def low(
    settings: dict[str, Any], model: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """The YAML of a run that teaches the expert's part, its trajectories made."""
    folder = tmp_path_factory.mktemp("low")
    teacher = add_low_expert(Path(shutil.copytree(model, folder / "tiny")), BOUNDARY)
    changed = settings | {
        "teacher": str(teacher),
        "trajectories": settings["trajectories"] | {"folder": str(folder / "trajectories")},
        "delta": settings["delta"] | {"part": "transformer_2"},
        "run": settings["run"] | {"folder": str(folder / "run")},
    }
    make_trajectories(build(DistilRun, changed, "run"))
    return changed


@pytest.fixture(scope="module")
def low_run(low: dict[str, Any]) -> DistilRun:
    """Such a run that has come to its end."""
    config = build(DistilRun, low, "run")
    assert train(DistilTask(config), config.run, record=dump(config)).finished
    return config


@pytest.mark.long
def test_the_expert_answers_below_the_boundary(low: dict[str, Any]) -> None:
    config = build(DistilRun, low, "run")
    shards = open_shards(config)
    given, teacher = shards.load(1), shards.teacher(torch.float32)
    answer = teacher.answers(given.state, given.ids, given.mask, config.trajectories)
    sigmas = config.trajectories.sigmas
    for at, side in enumerate((teacher.sides.high, teacher.sides.low)):
        assert side is not None
        sigma = torch.full((len(given.ids),), min(float(sigmas[at]), UNIPC_SIGMA_MAX))
        assert teacher.sides.at(sigma) is side
        made = answer(given.points[:, at], sigma)
        torch.testing.assert_close(made, given.velocities[:, at], atol=5e-3, rtol=5e-3)
    with pytest.raises(AssertionError, match=r"both sides of 0\.9"):
        teacher.sides.at(torch.tensor([0.95, 0.5]))


@pytest.mark.long
def test_it_learns_only_the_steps_below_the_boundary(low_run: DistilRun) -> None:
    fresh = DistilTask(low_run).validate(0, Path())
    assert fresh.keys() == {"velocity_0.83", "velocity_mean", "end"}
    taught = read_meta(latest_checkpoint(Path(low_run.run.folder)))["metrics"]
    assert taught["velocity_mean"] < 0.9 * fresh["velocity_mean"]
    task, phase = DistilTask(low_run), low_run.run.phases[0]
    assert {float(s) for s in task.batch(phase, 0, 0).sigma} == {float(task.sigmas[1])}


def test_clips_are_made_by_both_parts(low_run: DistilRun, model: Path, tmp_path: Path) -> None:
    folder = released(Path(low_run.run.folder), Path(low_run.teacher), tmp_path / "tiny", BOUNDARY)
    assert few_step_parts(folder) == ("transformer", "transformer_2")
    first = f"{FEW_STEP}/{FEW_STEP_WEIGHTS['transformer']}"
    assert (folder / first).read_bytes() == (model / first).read_bytes()
    engine = load(str(folder), device="cpu", dtype="fp32")
    assert isinstance(engine, Engine)
    assert engine.folder.few_step is not None
    assert engine.folder.few_step.boundary == BOUNDARY
    clip = engine.generate(PROMPT, seed=3, steps=2, audio="none")
    plan = engine.plan(Request(prompt=PROMPT, seed=3, steps=2), Inputs())
    (context,) = engine.encode_prompt(plan)
    state = engine.prepare(plan, Request(prompt=PROMPT, seed=3), Inputs())
    roles = ("transformer", "transformer_2")
    parts = {role: engine.folder.components[role] for role in roles}
    dits = {role: part.load(torch.float32, torch.device("cpu")) for role, part in parts.items()}
    deltas = {role: read_few_step(folder, part.config, role)
              for role, part in parts.items()}

    def by_hand(noisy: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        role = "transformer" if float(sigma[0]) > BOUNDARY else "transformer_2"
        with attached(dits[role], [(deltas[role], 1.0)]):
            return velocity(dits[role], state, noisy, sigma, context,
                            patch=dits[role].config.patch_size, whole=True)

    with torch.no_grad():
        made = sample("unipc", by_hand, state.begin(), torch.tensor(engine.folder.few_step.sigmas))
    torch.testing.assert_close(clip.latents, made, atol=1e-4, rtol=1e-4)


@pytest.mark.long
def test_its_clips_are_matched_below_the_boundary(
    low: dict[str, Any], low_run: DistilRun, tmp_path: Path
) -> None:
    match = {"start": low_run.run.folder, "follower_lr": 5e-3, "first_step": 1,
             "between": [0.1, 0.8]}
    settings = low["run"] | {"folder": str(tmp_path / "matched"),
                             "phases": [{**low["run"]["phases"][0], "steps": 2}]}
    config = build(DistilRun, low | {"match": match, "run": settings}, "run")
    task = MatchTask(config)
    assert train(task, config.run, record=dump(config)).finished
    start = load_averages(Path(low_run.run.folder), "student")
    learned = load_averages(tmp_path / "matched", "student")
    assert not all(torch.equal(value, start[name]) for name, value in learned.items())
    assert task.validate(0, Path()).keys() == {"gap", "following"}
    for changes in ({"first_step": 0}, {"between": [0.1, 0.95]}):
        refused = build(DistilRun, low | {"match": match | changes, "run": settings}, "run")
        with pytest.raises(InputError, match=r"takes over at step 1, below 0\.9"):
            MatchTask(refused)


def test_its_clips_are_matched_at_the_rate_that_they_are_drawn_at(
    low: dict[str, Any], low_run: DistilRun, tmp_path: Path
) -> None:
    folder = released(Path(low_run.run.folder), Path(low_run.teacher), tmp_path / "tiny", BOUNDARY,
                      upsampling=2)
    finer = low | {"teacher": str(folder), "delta": low["delta"] | {"begin_as": "student"}}
    match = {"follower_lr": 5e-3, "first_step": 1, "between": [0.1, 0.8]}
    trajectories = low["trajectories"] | {"folder": str(tmp_path / "trajectories"), "shards": 1}
    config = with_run(finer | {"match": match, "trajectories": trajectories}, tmp_path / "finer")
    make_trajectories(config)
    task = MatchTask(config)

    engine = load(str(folder), device="cpu", dtype="fp32")
    assert isinstance(engine, Engine)
    request = Request(prompt=PROMPT, seed=3, steps=2)
    plan = engine.plan(request, Inputs())
    assert plan.temporal_upsampling == 2
    state, contexts = engine.prepare(plan, request, Inputs()), engine.encode_prompt(plan)
    with torch.no_grad():
        drawn = engine.sample(plan, state, contexts)
        seen, made = task.made(state, contexts[0], 1)
    torch.testing.assert_close(made, drawn, atol=1e-4, rtol=1e-4)
    assert made.shape[2] == 2 * state.latents.shape[2] - 1
    assert seen.spacing == 0.5

    batch = task.batch(config.run.phases[0], 0, 0)
    seen, made = task.play(batch, task.context(batch.ids, batch.mask))
    assert made.requires_grad
    assert batch.noise.shape[1:] == made.shape == seen.latents.shape
    loss, told = task.loss(batch, 0)
    loss.backward()
    assert all(each.grad is not None for each in task.delta.parameters())
    assert told.keys() == {"gap", "following"} == task.validate(0, Path()).keys()


@pytest.mark.long
def test_the_other_part_is_taught_above_the_boundary(
    low: dict[str, Any], low_run: DistilRun, tmp_path: Path
) -> None:
    folder = released(Path(low_run.run.folder), Path(low_run.teacher), tmp_path / "tiny", BOUNDARY)
    above = low | {"teacher": str(folder), "delta": low["delta"] | {
        "part": "transformer", "above": True, "begin_as": "student"}}
    match = {"follower_lr": 5e-3, "shift": 1.0, "between": [0.92, 0.99], "phased": True}
    settings = low["run"] | {"folder": str(tmp_path / "above"),
                             "phases": [{**low["run"]["phases"][0], "steps": 2}]}
    config = build(DistilRun, above | {"run": settings}, "run")
    plain = DistilTask(config)
    assert plain.validate(0, Path()).keys() == {"velocity_1.00", "velocity_mean", "end"}
    assert set(plain.batch(config.run.phases[0], 0, 0).sigma.tolist()) == {1.0}
    config = build(DistilRun, above | {"match": match, "run": settings}, "run")
    task = MatchTask(config)
    assert {task.batch(config.run.phases[0], step, 0).last for step in range(8)} == {0}
    assert task.other is not None
    stays = {name: part.up.clone() for name, part in task.other[1].low_rank.items()}
    assert train(task, config.run, record=dump(config)).finished
    assert all(torch.equal(part.up, stays[name])
               for name, part in task.other[1].low_rank.items())
    assert task.validate(0, Path()).keys() == {"gap", "following"}
    again = released(tmp_path / "above", folder, tmp_path / "again" / "tiny", BOUNDARY)
    parts = [f"{FEW_STEP}/{file}" for file in (*FEW_STEP_WEIGHTS.values(), "config.json")]
    same = [(again / part).read_bytes() == (folder / part).read_bytes() for part in parts]
    assert same == [False, True, True]
    for changes in ({"first_step": 1}, {"between": [0.5, 0.99]}):
        refused = build(DistilRun, above | {"match": match | changes, "run": settings}, "run")
        with pytest.raises(InputError, match=r"at step 1, below 0\.9; give an earlier step"):
            MatchTask(refused)
    refused = build(DistilRun, above | {"teacher": low["teacher"]}, "run")
    with pytest.raises(InputError, match="the student of 'tiny' has no part for its expert"):
        open_shards(refused)
    with pytest.raises(InputError, match=r"'transformer_2' and delta\.above is true"):
        build(DistilRun, low | {"delta": low["delta"] | {"above": True}}, "run")


def test_clips_of_a_step_are_compared_where_its_noise_is_left(
    settings: dict[str, Any], run: DistilRun, tmp_path: Path
) -> None:
    match = {"start": run.run.folder, "shift": 1.0, "between": [0.1, 0.98]}
    for phased in (False, True):
        config = with_run(settings | {"match": match | {"phased": phased}}, tmp_path)
        task, phase = MatchTask(config), config.run.phases[0]
        lowest = {0: [1.0], 1: [1.0]}
        for step in range(40):
            batch = task.batch(phase, step, 0)
            lowest[batch.last].append(float(batch.sigma.min()))
        assert min(lowest[1]) < 0.4, "nothing follows the last step"
        assert (min(lowest[0]) >= float(task.sigmas[1])) == phased
    refused = with_run(settings | {"match": match | {"phased": True, "between": [0.1, 0.8]}},
                       tmp_path)
    with pytest.raises(InputError, match=r"clips of that step at 0\.83 and above; give a later"):
        MatchTask(refused)


def test_what_has_no_such_part_is_refused(
    low: dict[str, Any], settings: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    part = {"delta": low["delta"]}
    for teacher, message in ((str(model), "'transformer_2', but 'tiny' has one transformer"),
                             (settings["teacher"], "has one transformer")):
        with pytest.raises(InputError, match=message):
            open_shards(build(DistilRun, settings | part | {"teacher": teacher}, "run"))
    alone = add_low_expert(Path(shutil.copytree(settings["teacher"], tmp_path / "alone")), BOUNDARY)
    with pytest.raises(InputError, match="student alone: 'tiny' has no student; release one"):
        open_shards(build(DistilRun, low | {"teacher": str(alone)}, "run"))
    by_student = low["trajectories"] | {"by_student": True}
    with pytest.raises(InputError, match="such a part has no student for its teacher"):
        build(DistilRun, low | {"trajectories": by_student}, "run")
