"""Few steps of one pass each: a low-rank delta that answers as a teacher under guidance does.

Guidance is folded in (Meng et al. 2023, sec. 3.1), on one fixed grid of few noise levels: that of
the best plain way to take so few steps, which the student goes at half its price. What it still
lacks then is the matter of `match`.

Axes: B clips, S text tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from eval.toybox.generation import sample_state
from train.toybox.distillation.config import LOW, DistilRun
from train.toybox.distillation.data import (
    HELD_OUT,
    StepBatch,
    draw_steps,
    open_shards,
    shard_for,
    take_steps,
)
from train.toybox.distillation.delta import Delta, delta_of
from train.toybox.distillation.teacher import (
    Side,
    Sides,
    Trajectories,
    answering,
    boundary_of,
    load_dit,
)
from train.toybox.phases import Phase
from vidgen.core.protocols import Denoise
from vidgen.diffusion.flow import squared_error
from vidgen.diffusion.state import LatentState
from vidgen.models.text import UMT5Encoder, encode_tokens
from vidgen.training.optim import build_optimizers
from vidgen.weights.component import ExpertRole
from vidgen.weights.lora import read_few_step

BatchT = TypeVar("BatchT")


class DeltaTask(ABC, Generic[BatchT]):
    """A delta that learns from a teacher; subclasses say how."""

    def __init__(self, config: DistilRun) -> None:
        self.config = config
        self.shards = open_shards(config)
        self.device = self.shards.device
        torch.manual_seed(config.run.seed)
        folder, part = self.shards.folder, config.delta.part
        text = folder.components["text_encoder"].load(torch.float32, self.device)
        assert isinstance(text, UMT5Encoder)
        dit = load_dit(folder, part, torch.float32, self.device)
        self.dit, self.text, self.delta = dit, text, Delta(dit, config.delta)
        if config.delta.begin_as is not None:
            self.delta.begin_as(delta_of(folder, dit.config, part))
        self.modules: dict[str, nn.Module] = {"student": self.delta}
        self.sigmas = config.trajectories.sigmas
        self.other: Side | None = None
        self.boundary, self.own = 0.0, range(len(self.sigmas) - 1)
        if config.delta.has_other:
            role: ExpertRole = "transformer" if part == LOW else LOW
            other = load_dit(folder, role, torch.float32, self.device)
            self.other = other, read_few_step(folder.path, other.config, role)
            self.boundary = boundary_of(folder)
            above = int((self.sigmas >= self.boundary).sum())
            self.own = self.own[above:] if part == LOW else self.own[:above]

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """AdamW over the delta's factors."""
        return build_optimizers(self.modules, self.config.run.optim)

    @abstractmethod
    def batch(self, phase: Phase, step: int, micro: int) -> BatchT:
        """What a step learns from."""

    @abstractmethod
    def loss(self, batch: BatchT, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Task`."""

    @torch.no_grad()
    def validate(self, step: int, folder: Path) -> dict[str, float]:
        """The scores of the averaged delta on clips kept aside."""
        del step, folder
        bf16 = self.config.run.dtype == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            return self.scores()

    @abstractmethod
    def scores(self) -> dict[str, float]:
        """By name, of the trajectories kept aside."""

    @cached_property
    def held_out(self) -> Trajectories:
        """The trajectories that validation follows."""
        return self.shards.load(HELD_OUT)

    def context(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B, S, D] and lengths [B] of captions; the text encoder stays as it is."""
        with torch.no_grad():
            return encode_tokens(self.text, ids, mask), mask.sum(1)

    def with_delta(
        self, delta: Delta, state: LatentState, context: tuple[Tensor, Tensor]
    ) -> Denoise:
        """The teacher's network with a delta, under a state's conditions and without guidance.

        Where the delta isn't meant for, the other part of the model's own student answers.
        """
        own: Side = self.dit, delta.adapter()
        if self.other is None:
            sides = Sides(own)
        elif self.config.delta.part == LOW:
            sides = Sides(self.other, own, self.boundary)
        else:
            sides = Sides(own, self.other, self.boundary)
        return answering(sides, state, context, self.config.trajectories.sampler)


class AnswersTask(DeltaTask[BatchT]):
    """A delta that learns the teacher's answers along its trajectories, by plain regression."""

    def loss(self, batch: BatchT, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared error of the guided velocity, where it is to be generated."""
        del step
        error = self.errors(batch).mean()
        return error, {"velocity": error.detach()}

    @abstractmethod
    def errors(self, batch: BatchT) -> Tensor:
        """Mean squared error of each clip's velocity where it is to be generated, [B]."""

    def scores(self) -> dict[str, float]:
        """Each step's error, and where all of them end.

        `velocity_mean` is that of single steps at the teacher's points; `end` the squared error
        of clean latents after the student's own steps from noise.
        """
        return self.step_errors() | {"end": self.end_error()}

    @abstractmethod
    def step_errors(self) -> dict[str, float]:
        """Errors of single steps on the clips kept aside, and `velocity_mean` of all."""

    @abstractmethod
    def end_error(self) -> float:
        """Squared error of those clips' clean latents after the student's own steps from noise."""


class DistilTask(AnswersTask[StepBatch]):
    """The student's steps on the teacher's trajectories."""

    def batch(self, phase: Phase, step: int, micro: int) -> StepBatch:
        """Steps at all levels of the delta, of the trajectories of one shard."""
        seed, shards = self.config.run.seed, self.config.trajectories.shards
        return draw_steps(
            self.shards.load(shard_for(shards, step, micro, seed)), self.sigmas, phase.batch_size,
            seed, step, micro, own=self.own,
        )

    def errors(self, batch: StepBatch) -> Tensor:
        """Of one step each, [B]."""
        student = self.with_delta(self.delta, batch.state, self.context(batch.ids, batch.mask))
        made = student(batch.state.begin(), batch.sigma)
        return squared_error(made, batch.target, batch.state.denoise_mask)

    def step_errors(self) -> dict[str, float]:
        """Of each level of the delta."""
        given, steps = self.held_out, self.own
        rows = torch.arange(len(given.points))
        scores: dict[str, float] = {}
        for at in steps:
            batch = take_steps(given, self.sigmas, rows, torch.full_like(rows, at))
            error = float(self.errors(batch).mean())
            scores[f"velocity_{float(self.sigmas[at]):.2f}"] = error
            scores["velocity_mean"] = scores.get("velocity_mean", 0.0) + error / len(steps)
        return scores

    def end_error(self) -> float:
        """Of whole clips."""
        given = self.held_out
        student = self.with_delta(self.delta, given.state, self.context(given.ids, given.mask))
        made = sample_state(self.config.trajectories.sampler, student, given.state, self.sigmas)
        return float((made - given.end).square().mean())
