"""What a few-step student learns from: the teacher's guided trajectories, made once and kept.

The teacher takes the student's own steps, so the points at which it was asked are those that the
student will come to. It runs once for each; the student can see its answers as often as it likes.

Axes: B clips, P points, C latent channels, F latent frames, h w latent rows and columns, S text
tokens.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from train.toybox.distillation.config import LOW, DistilRun, TrajectoryConfig
from train.toybox.distillation.teacher import Teacher, Trajectories
from train.toybox.phases import Phase, PhasedRun
from train.toybox.tasks.dit_config import DiTData
from train.toybox.tasks.dit_data import Batch, ClipDraws
from train.toybox.tasks.latents import LatentShards
from train.toybox.tasks.toybox_data import CacheConfig
from vidgen.core.errors import InputError
from vidgen.core.protocols import KeyTokens
from vidgen.core.runtime import sha256_file
from vidgen.diffusion.state import LatentState
from vidgen.models.dit_types import DiTConfig
from vidgen.training.data.survey import open_trainable
from vidgen.training.engines.distributed import own_device
from vidgen.training.task import generator_of
from vidgen.weights.folder import FEW_STEP, ModelFolder
from vidgen.weights.load import read_tensors
from vidgen.weights.lora import read_few_step

HELD_OUT = 0
"""The shard of clips kept aside, under text alone; those to learn from follow."""


def open_shards(config: DistilRun) -> TrajectoryShards:
    """The trajectories of a run.

    Raises:
        InputError: the teacher's first transformer knows no low noise, it has no expert there, or
            no student with a part for it; the folder holds others.
    """
    folder = open_trainable(config.teacher)
    has_low = config.delta.has_other
    if has_low and LOW not in folder.components:
        raise InputError(f"{config.delta.asked}, but {folder.name!r} has one transformer; leave it "
                         "out")
    if LOW in folder.components and folder.family != "toybox":
        raise InputError(f"{folder.name} has two transformers, each for some noise levels alone; "
                         "the student is a delta of one that knows all of them")
    if config.delta.above and folder.few_step and folder.few_step.boundary is None:
        raise InputError(f"delta.above is true, but the student of {folder.name!r} has no part for "
                         "its expert; leave it out")
    device = own_device(config.run.device)
    return TrajectoryShards(config.trajectories, config.caches, folder, device, has_low=has_low)


class TrajectoryShards:
    """Trajectories of a teacher on disk.

    Args:
        config: what they are.
        caches: clips that lend them captions and conditions.
        folder: the teacher.
        device: where batches go.
        has_low: see `Teacher`.

    Raises:
        InputError: the folder holds trajectories of another kind; the model has no student to make
            them, or one of other steps.
    """

    def __init__(
        self, config: TrajectoryConfig, caches: tuple[CacheConfig, ...], folder: ModelFolder,
        device: torch.device, *, has_low: bool = False,
    ) -> None:
        self.config, self.caches, self.folder, self.device = config, caches, folder, device
        self.has_low = has_low
        if config.by_student or has_low:
            _check_steps(config, folder)
        kept = {name: value for name, value in asdict(config).items()
                if name not in ("folder", "shards")}
        roles = ("transformer", "text_encoder", *[FEW_STEP] * config.by_student, *[LOW] * has_low)
        weights = [folder.path / role / "model.safetensors" for role in roles]
        self.shards = LatentShards(config.folder, kept | {
            "guidance_interval": [*config.guidance_interval],
            "teacher": [sha256_file(path) for path in weights],
            "clips": [[each.first_scene, each.shards * each.shard_size, each.num_frames,
                       each.height, each.width] for each in caches],
        })

    def teacher(self, dtype: torch.dtype) -> Teacher:
        """Who makes them, computing in `dtype`."""
        student = None
        if self.config.by_student:
            config = self.folder.components["transformer"].config
            assert isinstance(config, DiTConfig)
            student = read_few_step(self.folder.path, config)
        return Teacher(self.folder, self.device, dtype, student, has_low=self.has_low)

    def missing(self) -> list[int]:
        """Shards that this process has still to make, the one kept aside among them."""
        return self.shards.missing(self.config.shards + 1)

    def make(self, index: int, teacher: Teacher) -> None:
        """Have the teacher make shard `index`."""
        config = self.config
        if index == HELD_OUT:
            begun = _begun(self._draws.held_aside(config.num_frames, 1.0))
        else:
            begun = self.draw(self._phase, index, 0)
        made = teacher.follow(*begun, config)
        state = made.state
        tensors = {"noise": state.latents, "points": made.points.half(),
                   "velocities": made.velocities.half(), "end": made.end.half(),
                   "clean": state.clean.half(), "denoise_mask": state.denoise_mask,
                   "ids": made.ids, "mask": made.mask}
        if state.keys is not None:
            assert state.keys.valid is not None, "drawn conditions say which stills are there"
            tensors |= {"keys": state.keys.latents.half(), "positions": state.keys.positions,
                        "valid": state.keys.valid}
        self.shards.write(index, {name: value.cpu() for name, value in tensors.items()})

    def draw(self, phase: Phase, step: int, micro: int) -> tuple[LatentState, Tensor, Tensor]:
        """Where trajectories of clips begin: noise under conditions, and captions' ids and mask.

        Arguments as in `Task.batch`.
        """
        return _begun(self._draws.batch(phase, step, micro))

    def load(self, index: int) -> Trajectories:
        """The trajectories of shard `index`.

        Raises:
            InputError: it wasn't made yet.
        """
        path = self.shards.path(index)
        if not path.exists():
            raise InputError(f"{path} is missing; make it first (train/toybox/trajectories.py)")
        return unpack(read_tensors(path), self.device)

    @property
    def _phase(self) -> Phase:
        return Phase(self.config.shards + 1, self.config.num_frames, self.config.shard_size)

    @cached_property
    def _draws(self) -> ClipDraws:
        """Draws captions, conditions and noise as the transformer's own training does."""
        run = PhasedRun(self.config.folder, phases=(self._phase,), seed=self.config.seed)
        data = DiTData(
            run=run, caches=self.caches, tokenizer=str(self.folder.tokenizer), shifts=(1.0,),
            caption_dropout=0.0, validation_clips=self.config.held_out,
            conditions=self.config.conditions, still_share=self.config.still_share,
            window_share=self.config.window_share,
        )
        dit = self.folder.components["transformer"].config
        assert isinstance(dit, DiTConfig)
        return ClipDraws(data, self.device, dit.patch_size)


def _check_steps(config: TrajectoryConfig, folder: ModelFolder) -> None:
    student = folder.few_step
    if student is None:
        what = "trajectories.by_student" if config.by_student else "one part of the student alone"
        raise InputError(f"{what}: {folder.name!r} has no student; release one first, or leave it "
                         "out")
    sigmas = tuple(config.sigmas.tolist())
    if (student.sampler, student.sigmas) != (config.sampler, sigmas):
        raise InputError(
            f"trajectories are {config.num_steps} steps of {config.sampler} at shift "
            f"{config.shift:g}, which aren't those of the student of {folder.name!r}; give "
            f"{student.num_steps} steps of {student.sampler} along its levels, "
            + ", ".join(f"{sigma:g}" for sigma in student.sigmas)
        )


def _begun(batch: Batch) -> tuple[LatentState, Tensor, Tensor]:
    return replace(batch.state, latents=batch.noise), batch.ids, batch.mask


def unpack(tensors: dict[str, Tensor], device: torch.device) -> Trajectories:
    """A shard's tensors as trajectories."""
    here = {name: value.to(device) for name, value in tensors.items()}
    keys = None
    if "keys" in here:
        keys = KeyTokens(here["keys"].float(), here["positions"], here["valid"])
    points, velocities, end = (here[name].float() for name in ("points", "velocities", "end"))
    state = LatentState(here["noise"], here["clean"].float(), here["denoise_mask"], keys)
    return Trajectories(state, points, velocities, end, here["ids"], here["mask"])


@dataclass(frozen=True)
class StepBatch:
    """What single steps of the student are to be.

    Attributes:
        state: the conditions; its latents are the points that the steps start from.
        sigma: [B], their noise levels.
        target: the guided velocity there, [B, C, F, h, w].
        ids: of the captions' tokens, [B, S].
        mask: [B, S].
    """

    state: LatentState
    sigma: Tensor
    target: Tensor
    ids: Tensor
    mask: Tensor


def draw_steps(
    given: Trajectories, sigmas: Tensor, count: int, *seed: int, own: range
) -> StepBatch:
    """Steps of a batch, spread evenly over those that are taught.

    Args:
        given: trajectories, at least one.
        sigmas: [P + 1], the student's levels.
        count: steps to draw.
        seed: what the draw depends on.
        own: numbers of the steps that are taught.
    """
    draw = generator_of(*seed)
    size = len(given.points)
    first = int(torch.randint(len(own), (), generator=draw))
    at = own.start + (torch.arange(count) + first) % len(own)
    rows = torch.cat([torch.randperm(size, generator=draw) for _ in range(-(-count // size))])
    return take_steps(given, sigmas, rows[:count], at)


def take_steps(given: Trajectories, sigmas: Tensor, rows: Tensor, at: Tensor) -> StepBatch:
    """The steps number `at` [B] of the trajectories `rows` [B]."""
    device = given.points.device
    rows, at = rows.to(device), at.to(device)
    state = replace(given.state.rows(rows), latents=given.points[rows, at])
    return StepBatch(state, sigmas.to(device)[at], given.velocities[rows, at], given.ids[rows],
                     given.mask[rows])


def shard_for(shards: int, step: int, micro: int, seed: int) -> int:
    """The shard that a micro-batch of a step learns from.

    All of them come, then all again in another order; those of one step, which may be of several
    ranks, walk through orders of their own.
    """
    turn, place = divmod(step, shards)
    draw = generator_of(seed, turn, micro)
    return 1 + int(torch.randperm(shards, generator=draw)[place])
