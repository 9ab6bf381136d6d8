"""A student that rolls clips out: causal in time, taught on the same trajectories as any student.

Of each clip one turn is denoised in view of the teacher's finished frames before it, through the
noise and the cache that the roll-out itself has: teacher forcing of few-step turns, the first stage
of CausVid (Yin et al. 2025, sec. 4.3).

Axes: B clips, C latent channels, F latent frames, n those before a turn, h w latent rows and
columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vidgen.core.errors import InputError
from vidgen.diffusion.condition import LatentState, new_state
from vidgen.diffusion.flow import squared_error
from vidgen.models.lora import attached
from vidgen.pipeline.rolling import Rollout
from vidgen.training.config import Phase
from vidgen.training.distil import AnswersTask, DistilRun
from vidgen.training.distil_data import StepBatch, Trajectories, shard_for, take_steps
from vidgen.training.draws import generator_of
from vidgen.weights.student import RollConfig

FORGETS = 0.5
"""Share of later turns that don't see their clip's beginning."""


@dataclass(frozen=True)
class TurnBatch:
    """One turn of each clip, and what came before it.

    Attributes:
        before: [B, C, n, h, w], finished frames, n of 0 at a clip's start.
        noise: [B, C, n, h, w] that they are seen through.
        forgets: whether the turn sees the newest of them alone, as those far into a clip do.
        step: a step of the turn.
    """

    before: Tensor
    noise: Tensor
    forgets: bool
    step: StepBatch


class RollTask(AnswersTask[TurnBatch]):
    """The student's turns on the teacher's trajectories.

    Raises:
        InputError: trajectories of which none can be rolled out.
    """

    def __init__(self, config: DistilRun) -> None:
        super().__init__(config)
        assert config.roll is not None
        self.roll: RollConfig = config.roll
        self.num_turns = -(-self.held_out.state.clean.shape[2] // self.roll.turn_frames)

    def batch(self, phase: Phase, step: int, micro: int) -> TurnBatch:
        """A turn of clips from one shard, at all levels of the student."""
        draw = generator_of(self.config.run.seed, step, micro)
        turn, first_level = (int(torch.randint(high, (), generator=draw))
                             for high in (self.num_turns, len(self.sigmas) - 1))
        given, rows = self._rollable(step, micro)
        rows = rows[torch.randint(len(rows), (phase.batch_size,), generator=draw)]
        at = (torch.arange(phase.batch_size) + first_level) % (len(self.sigmas) - 1)
        forgets = turn > 1 and bool(torch.rand((), generator=draw) < FORGETS)
        return self._turn(given, rows, at, turn, draw, forgets=forgets)

    def _rollable(self, step: int, micro: int) -> tuple[Trajectories, Tensor]:
        """The trajectories of a shard, and the rows of it that can be rolled out."""
        shards = self.config.trajectories.shards
        first = shard_for(shards, step, micro, self.config.run.seed)
        for index in range(first, first + shards):
            given = self.shards.load(1 + (index - 1) % shards)
            rows = rollable(given.state).nonzero().flatten()
            if len(rows):
                return given, rows
        raise InputError(f"{self.config.trajectories.folder} holds no clip under text or a first "
                         "frame alone; make more shards")

    def _turn(
        self, given: Trajectories, rows: Tensor, at: Tensor, turn: int, draw: torch.Generator, *,
        forgets: bool = False,
    ) -> TurnBatch:
        """Steps number `at` [B] of the turn number `turn` of trajectories `rows` [B]."""
        step, first = take_steps(given, self.sigmas, rows, at), turn * self.roll.turn_frames
        own = slice(first, first + self.roll.turn_frames)
        before, target = given.end[rows, :, :first], step.target[:, :, own]
        noise = torch.randn(before.shape, generator=draw).to(before)
        step = replace(step, state=step.state.stretch(own), target=target)
        return TurnBatch(before, noise, forgets, step)

    def errors(self, batch: TurnBatch) -> Tensor:
        """Of one turn each, [B]."""
        step = batch.step
        rollout = self._rollout(step.ids, step.mask)
        with self._rolling():
            if batch.before.shape[2]:
                rollout.remember(self.dit, batch.before, batch.noise)
            if batch.forgets:
                rollout.cache.forget(batch.before.shape[2] - self.roll.turn_frames)
            made = rollout.velocity(self.dit, step.state, step.state.latents, step.sigma)
        return squared_error(made, step.target, step.state.denoise_mask)

    def _rollout(self, ids: Tensor, mask: Tensor) -> Rollout:
        return Rollout(self.context(ids, mask), self.roll)

    @contextmanager
    def _rolling(self) -> Iterator[None]:
        with (
            attached(self.dit, [(self.delta.adapter(), 1.0)]),
            self.dit.causal(self.roll.turn_frames),
        ):
            yield

    def step_errors(self) -> dict[str, float]:
        """Of each turn, over all levels."""
        given, count = self.held_out, len(self.sigmas) - 1
        rows, scores = torch.arange(len(given.ids)), {}
        for turn in range(self.num_turns):
            draw = torch.Generator().manual_seed(turn)
            errors = [
                self.errors(self._turn(given, rows, torch.full_like(rows, at), turn, draw))
                for at in range(count)
            ]
            scores[f"velocity_turn_{turn}"] = float(torch.stack(errors).mean())
        return scores | {"velocity_mean": sum(scores.values()) / len(scores)}

    def end_error(self) -> float:
        """Of whole clips, rolled out from the teacher's noise."""
        given, draw = self.held_out, torch.Generator().manual_seed(0)
        sampler, made = self.config.trajectories.sampler, list[Tensor]()
        rollout = self._rollout(given.ids, given.mask)
        with self._rolling():
            for turn in given.state.latents.split(self.roll.turn_frames, dim=2):
                seen_through = torch.randn(turn.shape, generator=draw).to(turn)
                made.append(rollout.turn(self.dit, new_state(turn), sampler, self.sigmas))
                rollout.remember(self.dit, made[-1], seen_through)
        return float((torch.cat(made, dim=2) - given.end).square().mean())


def rollable(state: LatentState) -> Tensor:
    """Which clips are made from text or a first frame alone, [B] bool."""
    first, later = (frames.flatten(1) for frames in state.denoise_mask.tensor_split([1], dim=2))
    alone = later.all(1) & (first.all(1) | ~first.any(1))
    if state.keys is not None:
        valid = torch.ones_like(state.keys.positions, dtype=torch.bool)
        alone &= ~(valid if state.keys.valid is None else state.keys.valid).any(1)
    return alone
