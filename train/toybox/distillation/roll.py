"""A student that rolls clips out: causal in time, taught on trajectories as any student is.

Of each clip one turn is denoised, that behind what was given of it, in view of this through the
noise and the cache that the roll-out itself has: teacher forcing of few-step turns, the first stage
of CausVid (Yin et al. 2025, sec. 4.3). The teacher knew what was given, too; were it a clip that it
made as a whole, its answer at much noise would tell of any clip but the one that began so. Then
whole clips are rolled out and matched with the teacher's.

Axes: B clips, C latent channels, F latent frames, n those before a turn, h w latent rows and
columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from train.toybox.distillation.config import DistilRun
from train.toybox.distillation.data import StepBatch, shard_for, take_steps
from train.toybox.distillation.delta import Delta
from train.toybox.distillation.match import MatchBatch, MatchTask
from train.toybox.distillation.student import AnswersTask
from train.toybox.distillation.teacher import Trajectories
from train.toybox.phases import Phase
from vidgen.core.errors import InputError
from vidgen.core.protocols import Denoise
from vidgen.diffusion import condition
from vidgen.diffusion.flow import squared_error
from vidgen.diffusion.state import LatentState, new_state
from vidgen.models.dit import SpacetimeDiT
from vidgen.models.lora import attached
from vidgen.pipeline.long.rolling import Rollout
from vidgen.training.task import generator_of
from vidgen.weights.folder import RollConfig

HISTORY = 1000
"""Which noise of a turn, behind those of its steps, it is remembered through."""


@dataclass(frozen=True)
class TurnBatch:
    """One turn of each clip, and what came before it.

    Attributes:
        before: [B, C, n, h, w], finished frames, n of 0 at a clip's start.
        noise: [B, C, n, h, w] that they are seen through.
        step: a step of the turn.
    """

    before: Tensor
    noise: Tensor
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
        """The same turn of clips from one shard, at all levels of the student."""
        draw = generator_of(self.config.run.seed, step, micro)
        given, turns = self._rollable(step, micro)
        any_of = turns[turns >= 0]
        turn = int(any_of[torch.randint(len(any_of), (), generator=draw)])
        rows = (turns == turn).nonzero().flatten()
        rows = rows[torch.randint(len(rows), (phase.batch_size,), generator=draw)]
        count = len(self.sigmas) - 1
        at = (torch.arange(phase.batch_size) + torch.randint(count, (), generator=draw)) % count
        return self._turn(given, rows, at, turn, draw)

    def _rollable(self, step: int, micro: int) -> tuple[Trajectories, Tensor]:
        """The trajectories of a shard, and what turns can be learned of them, -1 for none."""
        shards = self.config.trajectories.shards
        first = shard_for(shards, step, micro, self.config.run.seed)
        for index in range(first, first + shards):
            given = self.shards.load(1 + (index - 1) % shards)
            turns = next_turn(given.state, self.roll)
            if (turns >= 0).any():
                return given, turns
        raise InputError(f"{self.config.trajectories.folder} holds no clip that goes on after "
                         f"whole turns of {self.roll.turn_frames} latent frames, or begins; make "
                         "more shards, with conditions.prefix_step of a turn")

    def _turn(
        self, given: Trajectories, rows: Tensor, at: Tensor, turn: int, draw: torch.Generator
    ) -> TurnBatch:
        """Steps number `at` [B] of the turn number `turn` of trajectories `rows` [B]."""
        step, first = take_steps(given, self.sigmas, rows, at), turn * self.roll.turn_frames
        own = slice(first, first + self.roll.turn_frames)
        before, target = given.end[rows, :, :first], step.target[:, :, own]
        noise = torch.randn(before.shape, generator=draw).to(before)
        step = replace(step, state=step.state.stretch(own), target=target)
        return TurnBatch(before, noise, step)

    def errors(self, batch: TurnBatch) -> Tensor:
        """Of one turn each, [B]."""
        step = batch.step
        rollout = rollout_of(self.config, self.context(step.ids, step.mask))
        with rolling(self.dit, self.delta, self.roll):
            if batch.before.shape[2]:
                rollout.remember(self.dit, batch.before, batch.noise)
            made = rollout.velocity(self.dit, step.state, step.state.latents, step.sigma)
        return squared_error(made, step.target, step.state.denoise_mask)

    def step_errors(self) -> dict[str, float]:
        """Of each turn of the clips kept aside, over all levels."""
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
        """Of first turns, made from the teacher's noise; later ones draw some of their own."""
        given = self.held_out
        rollout = rollout_of(self.config, self.context(given.ids, given.mask))
        with rolling(self.dit, self.delta, self.roll):
            first = given.state.stretch(slice(self.roll.turn_frames))
            made = rollout.turn(self.dit, first, self.sigmas)
        return float((made - given.end[:, :, : self.roll.turn_frames]).square().mean())


@dataclass(frozen=True)
class RollMatchBatch(MatchBatch):
    """Clips to roll out and to compare, or what is rolled out far behind their beginnings.

    `ahead` [B, C, n, h, w] is noise of the frames behind those of `state`, whole turns of it: the
    frames that are compared are the last ones, as many as `state` has, and the first turn of these
    is given.
    """

    ahead: Tensor


class RollMatchTask(MatchTask):
    """The roller's own clips, rolled out, against its teacher's: each turn in view of its own.

    What teacher forcing doesn't teach, to go on from one's own faults (Huang et al. 2025, "Self
    Forcing"), wherever in a clip (Cui et al. 2025, "Self-Forcing++"): the teacher sees a window of
    it, that goes on from a turn of the roller's as windows of long clips do. Gradients flow through
    one step of each turn, not through what is remembered of it.

    Raises:
        InputError: conditions that turns don't have.
    """

    def __init__(self, config: DistilRun) -> None:
        super().__init__(config)
        assert config.roll is not None
        self.roll: RollConfig = config.roll
        self.history_noise = self.shards.folder.defaults.history_noise

    def batch(self, phase: Phase, step: int, micro: int) -> RollMatchBatch:
        """See `MatchTask`; of clips under text or a first frame. All ranks roll out as far."""
        batch, seed = super().batch(phase, step, micro), self.config.run.seed
        known = next_turn(batch.state, self.roll) * self.roll.turn_frames
        if ((known < 0) | (known > 1)).any():
            raise InputError("clips that are rolled out from their beginning know text or a first "
                             "frame alone; set trajectories.conditions to {text: .., first: .., "
                             "prefix: 0, mask: 0}, still_share and window_share to 0")
        turns = int(torch.randint(self.match.far_turns + 1, (),
                                  generator=generator_of(seed, step, 0, 2)))
        draw, shape = generator_of(seed, step, micro, 3), list(batch.state.latents.shape)
        shape[2] = turns * self.roll.turn_frames
        return RollMatchBatch(
            **vars(batch), ahead=torch.randn(shape, generator=draw).to(self.device)
        )

    def play(
        self, batch: MatchBatch, context: tuple[Tensor, Tensor]
    ) -> tuple[LatentState, Tensor]:
        """See `MatchTask`."""
        assert isinstance(batch, RollMatchBatch)
        if not batch.ahead.shape[2]:
            return super().play(batch, context)
        whole, turn = joined(batch.state, new_state(batch.ahead)), self.roll.turn_frames
        first = batch.ahead.shape[2]  # of the frames that are compared
        rollout, every = rollout_of(self.config, context), len(self.sigmas) - 2
        with rolling(self.dit, self.delta, self.roll):
            with torch.no_grad():
                begun = roll_out(rollout, self.dit, whole.stretch(slice(first + turn)),
                                 partial(self.steps_to, every))
            given = begun[:, :, first:]
            made = roll_out(rollout, self.dit, whole.stretch(slice(first + turn, None)),
                            partial(self.steps_to, batch.last))
        window = condition.prefix(new_state(whole.latents[:, :, first:]), given)
        seen = torch.full((len(given),), self.history_noise, device=self.device)
        return (condition.noise_known(window, seen, window.latents),
                torch.cat([given, made], dim=2))

    def made(
        self, state: LatentState, context: tuple[Tensor, Tensor], last: int
    ) -> tuple[LatentState, Tensor]:
        """See `MatchTask`; all turns end with their step number `last`."""
        with rolling(self.dit, self.delta, self.roll):
            rollout = rollout_of(self.config, context)
            return state, roll_out(rollout, self.dit, state, partial(self.steps_to, last))


def rollout_of(config: DistilRun, context: tuple[Tensor, Tensor]) -> Rollout:
    """The roll-out of a roller's run, of clips with these features [B, S, D] and lengths [B]."""
    assert config.roll is not None
    return Rollout(context, config.roll, config.trajectories.sampler)


@contextmanager
def rolling(dit: SpacetimeDiT, delta: Delta, roll: RollConfig) -> Iterator[None]:
    """A network that is a roller inside the `with` block."""
    with attached(dit, [(delta.adapter(), 1.0)]), dit.causal(roll.turn_frames):
        yield


def roll_out(
    rollout: Rollout, dit: SpacetimeDiT, state: LatentState,
    make: Callable[[Denoise, LatentState], Tensor],
) -> Tensor:
    """A whole clip [B, C, F, h, w], each turn of which `make`s from its velocity and its state."""
    made, turn_frames = list[Tensor](), rollout.config.turn_frames
    for first in range(0, state.latents.shape[2], turn_frames):
        turn = state.stretch(slice(first, first + turn_frames))
        made.append(make(partial(rollout.velocity, dit, turn), turn))
        with torch.no_grad():
            rollout.remember(dit, made[-1].detach(), turn.fresh(HISTORY))
    return torch.cat(made, dim=2)


def joined(state: LatentState, later: LatentState) -> LatentState:
    """A state of more latent frames: those of two states, without stills and sound."""
    return LatentState(
        torch.cat([state.latents, later.latents], dim=2),
        torch.cat([state.clean, later.clean], dim=2),
        torch.cat([state.denoise_mask, later.denoise_mask], dim=2),
    )


def next_turn(state: LatentState, roll: RollConfig) -> Tensor:
    """The number of the turn that each clip of a state goes on with, [B] int64; -1 for none.

    Under text or a first frame this is turn 0; a later one where whole turns are given, no more
    than one sees, and nothing else is.
    """
    frames = state.denoise_mask.flatten(3)  # [B, 1, F, h w]
    known = (~frames).all(3)[:, 0].long().cumprod(1).sum(1)
    untouched = frames.all(3)[:, 0].sum(1)
    fits = known + untouched == frames.shape[2]
    if state.keys is not None:
        valid = torch.ones_like(state.keys.positions, dtype=torch.bool)
        fits &= ~(valid if state.keys.valid is None else state.keys.valid).any(1)
    whole = (known % roll.turn_frames == 0) & (known <= roll.window_frames)
    room = known + roll.turn_frames <= frames.shape[2]
    return torch.where(fits & room & (whole | (known == 1)), known // roll.turn_frames, -1)
