"""Distribution matching at tiny size: a student's own clips against its teacher's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.lab.distilling import as_stored, released, with_run
from train.toybox.distillation.config import DistilRun
from train.toybox.distillation.delta import adapter_of
from train.toybox.distillation.match import MatchTask
from train.toybox.phases import train
from vidgen.core.config import dump
from vidgen.core.errors import InputError
from vidgen.models.presets import DIT_PRESETS
from vidgen.training.checkpoint import latest_checkpoint, load_averages, read_meta
from vidgen.weights.lora import read_few_step


def matching(
    settings: dict[str, Any], run: DistilRun, folder: Path, steps: int = 24, **changes: Any
) -> DistilRun:
    """A run that goes on from a student."""
    match = {"start": run.run.folder, "follower_lr": 5e-3}
    phases = [{**settings["run"]["phases"][0], "steps": steps}]
    optim = {**settings["run"]["optim"], "lr": 1e-4}
    return with_run(settings | {"match": match}, folder, phases=phases, optim=optim, **changes)


@pytest.mark.long
def test_a_student_is_matched_with_its_teacher(
    settings: dict[str, Any], run: DistilRun, model: Path, tmp_path: Path
) -> None:
    config = matching(settings, run, tmp_path / "matched")
    fresh = MatchTask(config)
    start = load_averages(Path(run.run.folder), "student")
    for delta in (fresh.delta, fresh.follower):
        assert all(torch.equal(value, start[name]) for name, value in delta.state_dict().items())
    before = fresh.validate(0, Path())
    assert before.keys() == {"gap", "following"}
    assert train(MatchTask(config), config.run, record=dump(config)).finished
    after = read_meta(latest_checkpoint(Path(config.run.folder)))["metrics"]
    assert after["following"] < before["following"], "it learns what the student's clips are like"
    folder = released(Path(config.run.folder), model, tmp_path / "tiny")
    learned = load_averages(Path(config.run.folder), "student")
    adapter = read_few_step(folder, DIT_PRESETS["tiny"])
    for path, part in adapter_of(learned).low_rank.items():
        assert torch.equal(adapter.low_rank[path].up, as_stored(part.up))
    assert not all(torch.equal(value, start[name]) for name, value in learned.items())


def test_the_students_gradient_is_where_the_two_networks_differ(
    settings: dict[str, Any], run: DistilRun, tmp_path: Path
) -> None:
    config = matching(settings, run, tmp_path)
    task, phase = MatchTask(config), config.run.phases[0]
    batches = [task.batch(phase, step, 0) for step in range(8)]
    assert {batch.last for batch in batches} == {0, 1}
    batch = next(each for each in batches if each.last == 1)
    twice = task.batch(phase, batches.index(batch), 1)
    assert twice.last == batch.last, "ranks teach the same step, so that none waits"
    assert not torch.equal(twice.noise, batch.noise)
    loss, numbers = task.loss(batch, 0)
    loss.backward()
    gap, following = (float(numbers[name]) for name in ("gap", "following"))
    assert float(loss.detach()) == pytest.approx(gap**2 + following)
    assert all(p.grad.abs().sum() > 0 for name, p in task.delta.named_parameters() if "up" in name)
    assert all(p.grad.abs().sum() > 0
               for name, p in task.follower.named_parameters() if "up" in name)
    task.config = replace(config, trajectories=replace(
        config.trajectories, guidance_scale=1.0, image_guidance_scale=None))
    for value in task.follower.up.values():
        value.data.zero_()
    assert float(task.loss(batch, 0)[1]["gap"]) < 1e-3, "without guidance and delta they are one"


@pytest.mark.long
def test_a_matched_run_resumes_with_the_same_bits(
    settings: dict[str, Any], run: DistilRun, tmp_path: Path
) -> None:
    straight, cut = (matching(settings, run, tmp_path / name, 2, checkpoint_minutes=minutes)
                     for name, minutes in (("straight", 9), ("cut", 0)))
    assert train(MatchTask(straight), straight.run).finished
    train(MatchTask(cut), replace(cut.run, minutes=1e-6))
    assert latest_checkpoint(tmp_path / "cut").name == "step-00000001"
    train(MatchTask(cut), cut.run, resume=True)
    one, two = (load_file(latest_checkpoint(tmp_path / name) / "state.safetensors")
                for name in ("straight", "cut"))
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


def test_a_run_begins_as_what_the_model_has(
    settings: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    changed = settings | {"teacher": str(model), "match": {"follower_lr": 5e-3}}
    begun = MatchTask(with_run(changed | {"delta": settings["delta"] | {"begin_as": "student"}},
                               tmp_path))
    for (key, own), other in zip(begun.delta.state_dict().items(),
                                 begun.follower.state_dict().values(), strict=True):
        assert torch.equal(own, other), key
    assert any(value.abs().sum() > 0 for value in begun.delta.up.values())
    with pytest.raises(InputError, match=r"delta\.begin_as is 'teacher'; give student, or leave"):
        with_run(changed | {"delta": settings["delta"] | {"begin_as": "teacher"}}, tmp_path)
    bare = changed | {"delta": settings["delta"] | {"begin_as": "student"},
                      "teacher": settings["teacher"]}
    with pytest.raises(InputError, match=r"'student', but .* has no student; release one first"):
        MatchTask(with_run(bare, tmp_path))
    with pytest.raises(InputError, match=r"match\.start and delta\.begin_as are both missing"):
        with_run(changed, tmp_path)
