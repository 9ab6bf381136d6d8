"""Rollers at tiny size: what they learn from, their training, their clips."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.lab.distilling import make_trajectories, released, with_run
from train.toybox.distillation.config import DistilRun
from train.toybox.distillation.data import open_shards
from train.toybox.distillation.roll import RollMatchTask, RollTask, next_turn
from train.toybox.phases import train
from vidgen.core.config import build, dump
from vidgen.core.errors import InputError
from vidgen.diffusion import condition
from vidgen.diffusion.samplers import UNIPC_SIGMA_MAX
from vidgen.diffusion.state import new_state
from vidgen.models.lora import attached
from vidgen.models.presets import DIT_PRESETS
from vidgen.models.text import encode_tokens
from vidgen.pipeline.denoise import velocity
from vidgen.training.checkpoint import latest_checkpoint, read_meta
from vidgen.weights.folder import RollConfig
from vidgen.weights.layouts import open_model
from vidgen.weights.student import read_student

TURNS = RollConfig(turn_frames=1, window_frames=2, history_noise=0.1)


@pytest.fixture(scope="module")
def turning(
    settings: dict[str, Any], model: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """A roller's YAML, the student's trajectories made that it learns from."""
    folder = tmp_path_factory.mktemp("turns")
    trajectories = settings["trajectories"] | {
        "folder": str(folder / "trajectories"), "shards": 4, "by_student": True, "still_share": 0.0,
        "conditions": {"text": 0.4, "first": 0.2, "prefix": 0.4, "mask": 0.0}, "window_share": 0.4,
    }
    changed = settings | {
        "teacher": str(model), "trajectories": trajectories, "roll": dump(TURNS),
        "delta": settings["delta"] | {"begin_as": "student"},
    }
    make_trajectories(build(DistilRun, changed, "run"))
    return changed


@pytest.mark.long
def test_a_roller_begins_as_the_student_and_learns_turns(
    turning: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    config = with_run(turning, tmp_path / "run", optim={"lr": 2e-3, "warmup_steps": 1})
    fresh = RollTask(config)
    student = read_student(model, DIT_PRESETS["tiny"]).low_rank
    for path, part in fresh.delta.adapter().low_rank.items():
        assert torch.equal(part.up.bfloat16(), student[path].up)
    before = fresh.validate(0, Path())
    assert {"velocity_turn_0", "velocity_turn_1", "velocity_turn_2"} <= before.keys()
    assert train(RollTask(config), config.run, record=dump(config)).finished
    after = read_meta(latest_checkpoint(tmp_path / "run"))["metrics"]
    assert after["velocity_mean"] < before["velocity_mean"]
    opened = open_model(str(released(tmp_path / "run", model, tmp_path / "tiny")))
    assert opened.roller.roll == TURNS
    assert opened.student.roll is None  # both lie beside each other


def test_a_turn_is_that_behind_what_the_teacher_was_given(turning: dict[str, Any]) -> None:
    config = build(DistilRun, turning, "run")
    task, seen = RollTask(config), set()
    for step in range(24):
        batch = task.batch(config.run.phases[0], step, 0)
        count = batch.before.shape[2]
        seen.add(count)
        assert batch.step.state.latents.shape[2] == TURNS.turn_frames
        assert batch.step.state.denoise_mask.all()
        shards = [task.shards.load(index) for index in range(1, 5)]
        known = [one.state.clean[row, :, :count] for one in shards
                 for row in range(len(one.ids))]
        assert all(any(torch.equal(each, one) for one in known) for each in batch.before)
    assert seen == {0, 1, 2}


@pytest.mark.long
def test_rolled_clips_are_matched_with_the_teachers(
    turning: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    config = with_run(turning, tmp_path / "run", phases=[
        {**turning["run"]["phases"][0], "steps": 4}])
    assert train(RollTask(config), config.run, record=dump(config)).finished
    trajectories = turning["trajectories"] | {
        "folder": str(tmp_path / "trajectories"), "shards": 1, "by_student": False,
        "conditions": {"text": 0.7, "first": 0.3, "prefix": 0.0, "mask": 0.0}, "window_share": 0.0,
    }
    matched = turning | {"match": {"start": str(tmp_path / "run"), "follower_lr": 5e-3,
                                   "far_turns": 3},
                         "trajectories": trajectories}
    config = with_run(matched, tmp_path / "matched", optim={"lr": 1e-4, "warmup_steps": 1})
    make_trajectories(config)
    task, phase = RollMatchTask(config), config.run.phases[0]
    batch = next(each for each in map(partial(task.batch, phase, micro=0), range(8))
                 if not each.state.denoise_mask.all())
    context = task.context(batch.ids, batch.mask)
    seen, made = task.made(batch.state, context, 1)
    assert seen is batch.state
    known = ~batch.state.denoise_mask.expand_as(made)
    assert torch.equal(made[known], batch.state.clean[known])
    later = replace(batch.state, latents=batch.state.latents.clone())
    later.latents[:, :, 2] += 1
    _, again = task.made(later, context, 1)
    assert torch.equal(again[:, :, :2], made[:, :, :2]), "no turn sees those behind it"
    assert not torch.equal(again[:, :, 2], made[:, :, 2])
    far = next(each for each in map(partial(task.batch, phase, micro=0), range(8))
               if each.ahead.shape[2] > 1)
    context = task.context(far.ids, far.mask)
    task.history_noise = 0.2
    state, made = task.play(far, context)
    assert (state.known_sigma == 0.2).all()
    assert not state.denoise_mask[:, :, 0].any()
    assert state.denoise_mask[:, :, 1:].all()
    assert not torch.equal(made[:, :, :1], state.clean[:, :, :1]), "it is seen through noise"
    assert made.shape == far.state.latents.shape
    assert made.requires_grad
    task.loss(far, 0)[0].backward()
    assert all(p.grad.abs().sum() > 0 for name, p in task.delta.named_parameters() if "up" in name)
    before = task.validate(0, Path())
    assert train(RollMatchTask(config), config.run, record=dump(config)).finished
    after = read_meta(latest_checkpoint(tmp_path / "matched"))["metrics"]
    assert after["following"] < before["following"]
    opened = open_model(str(released(tmp_path / "matched", model, tmp_path / "tiny")))
    assert opened.roller.roll == TURNS
    other = trajectories | {"folder": str(tmp_path / "other"), "conditions": {"prefix": 1.0}}
    config = with_run(matched | {"trajectories": other}, tmp_path / "refused")
    make_trajectories(config)
    with pytest.raises(InputError, match="know text or a first frame alone"):
        [RollMatchTask(config).batch(phase, step, 0) for step in range(8)]


def test_the_student_answers_as_its_own_clips_are_made(
    turning: dict[str, Any], model: Path
) -> None:
    config = build(DistilRun, turning, "run")
    shards = open_shards(config)
    teacher, given = shards.teacher(torch.float32), shards.load(1)
    adapter = read_student(model, DIT_PRESETS["tiny"])
    context = encode_tokens(teacher.text, given.ids, given.mask), given.mask.sum(1)
    sigma = torch.full((len(given.ids),), UNIPC_SIGMA_MAX)
    dit, _ = teacher.sides.high
    with torch.no_grad(), attached(dit, [(adapter, 1.0)]):
        made = velocity(dit, given.state, given.points[:, 0], sigma, context,
                        patch=dit.config.patch_size, whole=True)
    torch.testing.assert_close(made, given.velocities[:, 0], atol=5e-3, rtol=5e-3)


def test_which_turn_a_clip_goes_on_with() -> None:
    state = new_state(torch.randn(1, 4, 9, 4, 4))
    still = torch.randn(1, 4, 1, 4, 4)
    region = torch.ones(1, 1, 9, 4, 4)
    region[..., 2:] = 0
    roll = RollConfig(turn_frames=3, window_frames=6)
    assert next_turn(state, roll) == 0
    assert next_turn(condition.first_frame(state, still), roll) == 0
    for count, turn in ((2, -1), (3, 1), (4, -1), (6, 2), (7, -1)):
        begun = condition.prefix(state, still.expand(-1, -1, count, -1, -1))
        assert next_turn(begun, roll) == turn
        assert next_turn(begun, replace(roll, window_frames=3)) == (turn if count < 4 else -1)
    for other in (condition.mask(state, state.latents, region), condition.reference(state, still)):
        assert next_turn(other, roll) == -1


def begin(settings: dict[str, Any]) -> None:
    """What the program begins with."""
    RollTask(build(DistilRun, settings, "run"))


@pytest.mark.parametrize(("part", "changes", "message"), [
    ("trajectories", {"shift": 3.0}, "give 2 steps of unipc along its levels, 1, 0.8"),
    ("delta", {"rank": 2}, "by rank 2, the student that it is to begin as .* by rank 4"),
    ("trajectories", {"conditions": {"prefix_step": 0}}, "prefix_step is 0"),
])  # fmt: skip
def test_what_does_not_fit_the_student_is_refused(
    turning: dict[str, Any], part: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    other = turning | {part: turning[part] | changes}
    if part == "trajectories":
        other[part] = other[part] | {"folder": str(tmp_path)}
    with pytest.raises(InputError, match=message):
        begin(other)


def test_a_model_without_a_student_cannot_lend_it(settings: dict[str, Any], tmp_path: Path) -> None:
    trajectories = settings["trajectories"] | {"by_student": True, "folder": str(tmp_path)}
    for part, changed in (("trajectories", trajectories),
                          ("delta", settings["delta"] | {"begin_as": "student"})):
        with pytest.raises(InputError, match=f"{part}.*'tiny' has no student; release one first"):
            begin(settings | {"roll": dump(TURNS), part: changed})


def test_trajectories_that_no_turn_fits_are_refused(settings: dict[str, Any]) -> None:
    roll = {"turn_frames": 4, "window_frames": 4}
    config = build(DistilRun, settings | {"roll": roll}, "run")
    with pytest.raises(InputError, match="prefix_step of a turn"):
        RollTask(config).batch(config.run.phases[0], 0, 0)
