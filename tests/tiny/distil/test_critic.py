"""The critic at tiny size: what it says of clips, and where it draws a student."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distilling import with_run
from tests.tiny.distil.test_matching import CRITIC, matching
from vidgen.core.errors import InputError
from vidgen.diffusion import condition
from vidgen.diffusion.condition import new_state
from vidgen.training.distil import DistilRun
from vidgen.training.distil_critic import CriticConfig, rms, surprise
from vidgen.training.distil_match import MatchTask
from vidgen.training.loop import train


@pytest.fixture
def task(settings: dict[str, Any], run: DistilRun, tmp_path: Path) -> MatchTask:
    """One whose critic has an opinion."""
    task = MatchTask(matching(settings, run, tmp_path, critic=CRITIC))
    assert task.critic is not None
    torch.manual_seed(0)
    torch.nn.init.normal_(task.critic.down.weight)
    return task


def seen_by(task: MatchTask, latents: torch.Tensor, batch: Any) -> None:
    """Show clips of a batch to the follower."""
    context = task.context(batch.ids, batch.mask)
    task.with_delta(task.follower, batch.state, context)(latents, batch.sigma[0])


def test_it_is_undecided_at_first_and_ignores_what_was_given(
    settings: dict[str, Any], run: DistilRun, tmp_path: Path
) -> None:
    task = MatchTask(matching(settings, run, tmp_path, critic=CRITIC))
    batch, critic = task.batch(task.config.run.phases[0], 0, 0), task.critic
    assert critic is not None
    assert float(task.loss(batch, 0)[1]["critic"]) == pytest.approx(math.log(2))
    state = condition.prefix(new_state(torch.zeros(1, 4, 3, 4, 4)), torch.ones(1, 4, 2, 4, 4))
    own = torch.randn(1, 4, critic.up.in_features)  # the 4 tokens of the last of 3 frames
    scores = []
    with torch.no_grad():
        critic.down.weight.normal_()
        for _ in range(2):
            given, stills = torch.randn(1, 8, own.shape[2]), torch.randn(1, 5, own.shape[2])
            critic.tokens = torch.cat([given, own, stills], dim=1)
            scores.append(critic.score(state.denoise_mask))
    assert torch.equal(*scores)
    assert surprise(scores[0], scores[0] + 9) < 1e-3
    assert surprise(scores[0] + 9, scores[0]) > 8


def test_the_way_it_shows_makes_clips_look_truer(task: MatchTask) -> None:
    critic, batch = task.critic, task.batch(task.config.run.phases[0], 0, 0)
    assert critic is not None
    mask = batch.state.denoise_mask
    clips = batch.state.latents.clone().requires_grad_()
    seen_by(task, clips, batch)
    way = critic.way_to_truth(clips, mask)
    assert torch.allclose(rms(way, mask), torch.ones(()), atol=1e-4)
    with torch.no_grad():
        scores = []
        for step in (0.0, 0.05):
            seen_by(task, clips + step * way, batch)
            scores.append(critic.score(mask))
    assert (scores[1] > scores[0]).all()
    assert all(p.grad is None for p in task.follower.parameters()), "only clips are asked for"


def test_the_student_listens_by_its_share_and_the_follower_learns_of_true_clips(
    task: MatchTask,
) -> None:
    batch, config = task.batch(task.config.run.phases[0], 0, 0), task.match.critic
    assert config is not None

    def gradients(share: float, step: int, weight: float) -> tuple[dict[str, torch.Tensor], ...]:
        task.match = replace(task.match, critic=replace(config, share=share, weight=weight))
        for module in task.modules.values():
            module.zero_grad()
        loss, numbers = task.loss(batch, step)
        loss.backward()
        assert numbers.keys() == {"gap", "following", "critic"}
        return tuple({name: p.grad.clone() for name, p in module.named_parameters()}
                     for module in (task.delta, task.follower, task.critic))

    deaf, untaught, _ = gradients(0.0, 9, 0.0)
    early, taught, own = gradients(0.5, 0, 0.5)
    heard, same, _ = gradients(0.5, 9, 0.5)
    assert all(torch.equal(deaf[name], early[name]) for name in deaf), "it comes to listen slowly"
    assert not any(torch.equal(deaf[name], heard[name]) for name in deaf if "up" in name)
    assert all(torch.equal(taught[name], same[name]) for name in taught)
    assert any(not torch.equal(untaught[name], taught[name]) for name in taught)
    assert all(value.abs().sum() > 0 for value in own.values())
    assert CriticConfig(0.5, 0, warmup_steps=4).share_at(2) == 0.25
    assert CriticConfig(0.5, 0, warmup_steps=0).share_at(9) == 0.5


def test_it_learns_to_tell_clips_apart(
    settings: dict[str, Any], run: DistilRun, tmp_path: Path
) -> None:
    deaf = {"share": 0.0, "block": 1, "lr": 1e-2, "weight": 1.0}
    config = matching(settings, run, tmp_path, 30, critic=deaf)
    assert config.match is not None
    config = replace(config, match=replace(config.match, between=(0.02, 0.3)))
    task = MatchTask(config)
    assert train(task, config.run).finished
    batch = task.batch(config.run.phases[0], 99, 0)
    with torch.no_grad():
        assert task.loss(batch, 99)[1]["critic"] < 0.5


@pytest.mark.parametrize(("critic", "message"), [
    ({"share": -1.0, "block": 0}, "match.critic.share is -1.0; give 0 or more"),
    ({"share": 1.0, "block": 7}, "match.critic.block is 7; the last one is 1"),
])  # fmt: skip
def test_a_critic_that_cannot_be_is_refused(
    settings: dict[str, Any], run: DistilRun, tmp_path: Path, critic: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        MatchTask(matching(settings, run, tmp_path, critic=critic))


def test_a_rollers_critic_has_no_true_clips_far_behind(
    settings: dict[str, Any], run: DistilRun, tmp_path: Path
) -> None:
    roll = {"turn_frames": 1, "window_frames": 2}
    match = {"start": run.run.folder, "critic": CRITIC, "far_turns": 2}
    with pytest.raises(InputError, match="far_turns 2 are both given"):
        with_run(settings | {"roll": roll, "match": match}, tmp_path)


@pytest.mark.parametrize(("name", "message"), [
    ("roller", "'roller', but .* has no roller; release one first"),
    ("teacher", "delta.begin_as is 'teacher'; it is one of student, roller"),
])  # fmt: skip
def test_a_run_begins_as_what_the_model_has(
    settings: dict[str, Any], model: Path, tmp_path: Path, name: str, message: str
) -> None:
    changed = settings | {"teacher": str(model), "match": {"follower_lr": 5e-3}}
    begun = MatchTask(with_run(changed | {"delta": settings["delta"] | {"begin_as": "student"}},
                               tmp_path))
    for (key, own), other in zip(begun.delta.state_dict().items(),
                                 begun.follower.state_dict().values(), strict=True):
        assert torch.equal(own, other), key
    assert any(value.abs().sum() > 0 for value in begun.delta.up.values())
    with pytest.raises(InputError, match=message):
        MatchTask(with_run(changed | {"delta": settings["delta"] | {"begin_as": name}}, tmp_path))
