"""Few steps of one pass each: a low-rank delta that answers as a teacher under guidance does.

Guidance is folded in (Meng et al. 2023, sec. 3.1), on one fixed grid of few noise levels: that of
the best plain way to take so few steps, which the student goes at half its price. What it still
lacks then is the matter of `match`.

Axes: B clips, S text tokens.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from vidgen.core.errors import InputError
from vidgen.core.protocols import Denoise
from vidgen.diffusion.condition import LatentState
from vidgen.diffusion.flow import squared_error
from vidgen.diffusion.samplers import sample_state
from vidgen.models.dit import DiTConfig, SpacetimeDiT
from vidgen.models.lora import Adapter, LowRank
from vidgen.models.text import UMT5Encoder, encode_tokens
from vidgen.training.config import Phase, RunConfig
from vidgen.training.distil.data import (
    HELD_OUT,
    LOW,
    Sides,
    StepBatch,
    Trajectories,
    TrajectoryConfig,
    TrajectoryShards,
    answering,
    boundary_of,
    draw_steps,
    load_dit,
    shard_for,
    take_steps,
)
from vidgen.training.embedded.toybox_data import CacheConfig
from vidgen.training.engines.distributed import own_device
from vidgen.training.finetune.lora import target_paths
from vidgen.training.finetune.model import open_trainable
from vidgen.training.optim import build_optimizers
from vidgen.weights.component import ExpertRole
from vidgen.weights.folder import ModelFolder
from vidgen.weights.student import (
    STUDENTS,
    WEIGHTS,
    RollConfig,
    read_student,
    student_parts,
)


@dataclass(frozen=True)
class DeltaConfig:
    """Which layers the student changes, and by how much at most.

    Args:
        rank: of each layer's change.
        targets: parts of layers' names, such as "self_attn.q" or "ffn".
        begin_as: which of the model's own deltas it begins as, one of `STUDENTS`; None: nothing.
        part: which of the model's transformers it changes: the first one, at all noise levels, or
            its expert at low noise, below the boundary, the model's own student staying above it.
    """

    rank: int
    targets: tuple[str, ...]
    begin_as: str | None = None
    part: ExpertRole = "transformer"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"delta.rank is {self.rank}; it must be at least 1")
        if not self.targets:
            raise InputError("delta.targets is empty; name parts of layers' names")
        if self.begin_as not in (None, *STUDENTS):
            raise InputError(f"delta.begin_as is {self.begin_as!r}; it is one of "
                             + ", ".join(STUDENTS))


@dataclass(frozen=True)
class MatchConfig:
    """How a student's own clips are compared with the teacher's; see `match`.

    Args:
        start: run folder of a student, which this one goes on from; None: it begins as
            `delta.begin_as` says.
        first_step: the first of the student's steps, from 0, that is taught so; earlier ones stay
            much as they were.
        shift: of the noise levels at which clips are compared, and followed.
        between: the lowest and the highest of them.
        follower_lr: peak rate of what follows the student; it has to be faster than the student.
        far_turns: of rollers, the turns at most that a clip is rolled out for, before those behind
            them are compared.
    """

    start: str | None = None
    first_step: int = 0
    shift: float = 5.0
    between: tuple[float, float] = (0.02, 0.98)
    follower_lr: float = 1e-3
    far_turns: int = 0

    def __post_init__(self) -> None:
        low, high = self.between
        if not 0 <= low < high <= 1:
            raise InputError(f"match.between is {list(self.between)}; give two rising levels in "
                             "0..1")
        if self.first_step < 0:
            raise InputError(f"match.first_step is {self.first_step}; the first is 0")
        if self.far_turns < 0:
            raise InputError(f"match.far_turns is {self.far_turns}; give 0 or more")


@dataclass(frozen=True, kw_only=True)
class DistilRun:
    """The whole YAML file: who teaches, what of, and how the student learns.

    Args:
        teacher: the model, whose weights the student shares; a name or a folder.
        caches: clips that lend captions and conditions; see `train/cache.py`.
        trajectories: the teacher's, made by `train/trajectories.py`.
        roll: how the student rolls clips out, turn by turn; None: it makes them as a whole.
        match: how its own clips are compared with the teacher's; None: it repeats answers.
        delta: of the student. Rank 16 of all layers of the embedded model is 1.6 MB in bf16.
        run: its phases have the trajectories' frames, and `batch_size` steps of one shard each, or
            clips that are matched.

    Raises:
        InputError: a phase of other clips than the trajectories', no step to match, or turns of a
            student that makes none.
    """

    run: RunConfig
    teacher: str
    caches: tuple[CacheConfig, ...]
    trajectories: TrajectoryConfig
    delta: DeltaConfig
    roll: RollConfig | None = None
    match: MatchConfig | None = None

    def __post_init__(self) -> None:
        if self.match is not None and self.trajectories.by_student:
            raise InputError("match and trajectories.by_student are both given; a student is "
                             "matched with the guided model, leave by_student out")
        if self.delta.part == LOW and (self.roll is not None or self.trajectories.by_student):
            raise InputError(f"delta.part is {LOW!r}, which neither rolls clips out nor has a "
                             "student for its teacher; leave roll and trajectories.by_student out")
        if self.match is not None and self.match.start is None and self.delta.begin_as is None:
            raise InputError("match.start and delta.begin_as are both missing; matching goes on "
                             "from a student, give its run folder or the name of a model's own")
        if self.match is not None and self.match.far_turns and self.roll is None:
            raise InputError(f"match.far_turns is {self.match.far_turns}, but only a roller makes "
                             "turns; give roll, or leave it out")
        if self.match is not None and self.match.first_step >= self.trajectories.num_steps:
            raise InputError(f"match.first_step is {self.match.first_step}; the student's "
                             f"{self.trajectories.num_steps} steps end with number "
                             f"{self.trajectories.num_steps - 1}")
        for phase in self.run.phases:
            if phase.num_frames != self.trajectories.num_frames:
                raise InputError(
                    f"a phase has clips of {phase.num_frames} frames, the trajectories "
                    f"{self.trajectories.num_frames}; give both the same"
                )


def open_shards(config: DistilRun) -> TrajectoryShards:
    """The trajectories of a run.

    Raises:
        InputError: the teacher's first transformer knows no low noise, it has no expert there, or
            the folder holds others.
    """
    folder = open_trainable(config.teacher)
    has_low = config.delta.part == LOW
    if has_low and LOW not in folder.components:
        raise InputError(f"delta.part is {LOW!r}, but {folder.name!r} has one transformer; leave "
                         "it out")
    if "transformer_2" in folder.components and folder.family != "toybox":
        raise InputError(f"{folder.name} has two transformers, each for some noise levels alone; "
                         "the student is a delta of one that knows all of them")
    device = own_device(config.run.device)
    return TrajectoryShards(
        config.trajectories, config.caches, folder, device, has_low=has_low
    )


class Delta(nn.Module):
    """The student's change of some layers, of low rank and nothing at first (Hu et al. 2021).

    Args:
        dit: whose layers they are.
        config: which layers, and the rank. First factors come from torch's global generator.

    Raises:
        InputError: a part of a name that no linear layer has; names the nearest.
    """

    def __init__(self, dit: SpacetimeDiT, config: DeltaConfig) -> None:
        super().__init__()
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        for path in target_paths(dit, config.targets):
            weight = dit.get_submodule(path).weight
            assert isinstance(weight, Tensor)
            bound = 1 / math.sqrt(weight.shape[1])
            first = torch.empty(config.rank, weight.shape[1]).uniform_(-bound, bound)
            self.down[_key(path)] = nn.Parameter(first.to(weight.device))
            self.up[_key(path)] = nn.Parameter(weight.new_zeros(weight.shape[0], config.rank))

    def begin_as(self, adapter: Adapter) -> None:
        """Take over the factors of another delta.

        Raises:
            InputError: it has other layers, or another rank.
        """
        factors = {_key(path): part for path, part in adapter.low_rank.items()}
        own = {key: len(down) for key, down in self.down.items()}
        other = {key: len(part.down) for key, part in factors.items()}
        if own != other:
            raise InputError(f"delta changes {_told(own)}, the student that it is to begin as "
                             f"{_told(other)}; give it the same rank and targets")
        with torch.no_grad():
            for key, part in factors.items():
                self.down[key].copy_(part.down.flatten(1))
                self.up[key].copy_(part.up * part.scale)

    def adapter(self) -> Adapter:
        """What `attached` takes; gradients reach the factors."""
        return adapter_of(dict(self.named_parameters()))


def _told(ranks: Mapping[str, int]) -> str:
    each = ", ".join(map(str, sorted(set(ranks.values()))))
    return f"{len(ranks)} layers by rank {each}"


def adapter_of(factors: Mapping[str, Tensor]) -> Adapter:
    """The adapter of a `Delta`'s parameters by name."""
    keys = [name.removeprefix("down.") for name in factors if name.startswith("down.")]
    return Adapter("student", {
        key.replace("/", "."): LowRank(factors[f"down.{key}"], factors[f"up.{key}"])
        for key in keys
    })


def _key(path: str) -> str:
    """A layer's path as a parameter's name, which can't hold dots."""
    return path.replace(".", "/")


def _delta_of(folder: ModelFolder, name: str, config: DiTConfig, part: ExpertRole) -> Adapter:
    if part not in student_parts(folder.path, name):
        raise InputError(f"delta.begin_as is {name!r}, but {folder.name!r} has no "
                         f"{name}/{WEIGHTS[part]}; release one first, or leave it out")
    return read_student(folder.path, config, name, part)


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
            own = _delta_of(folder, config.delta.begin_as, dit.config, part)
            self.delta.begin_as(own)
        self.modules: dict[str, nn.Module] = {"student": self.delta}
        self.sigmas = config.trajectories.sigmas
        self.boundary, self.above = 1.0, None
        if part == LOW:
            first = load_dit(folder, "transformer", torch.float32, self.device)
            self.above = first, read_student(folder.path, first.config)
            self.boundary = boundary_of(folder)
        self.first_own = int((self.sigmas[:-1] > self.boundary).sum())

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

        Above what the delta is for the model's own student answers.
        """
        own, above = (self.dit, delta.adapter()), self.above
        sides = Sides(own) if above is None else Sides(above, own, self.boundary)
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
            seed, step, micro, own=self.first_own,
        )

    def errors(self, batch: StepBatch) -> Tensor:
        """Of one step each, [B]."""
        student = self.with_delta(self.delta, batch.state, self.context(batch.ids, batch.mask))
        made = student(batch.state.begin(), batch.sigma)
        return squared_error(made, batch.target, batch.state.denoise_mask)

    def step_errors(self) -> dict[str, float]:
        """Of each level of the delta."""
        given, steps = self.held_out, range(self.first_own, len(self.sigmas) - 1)
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
