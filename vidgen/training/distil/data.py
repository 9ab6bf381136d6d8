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

from vidgen.core.errors import InputError
from vidgen.core.protocols import Denoise, KeyTokens
from vidgen.core.runtime import sha256_file
from vidgen.diffusion.condition import LatentState, as_negative
from vidgen.diffusion.condition_mix import ConditionMix
from vidgen.diffusion.guidance import Guidance, guided
from vidgen.diffusion.samplers import SAMPLERS, sample_state, whole_timesteps
from vidgen.diffusion.schedule import make_sigmas
from vidgen.models.dit import DiTConfig, SpacetimeDiT
from vidgen.models.lora import Adapter, attached
from vidgen.models.text import UMT5Encoder, encode_tokens
from vidgen.models.tokenizer import PromptTokenizer
from vidgen.pipeline.networks import velocity
from vidgen.training.config import Phase, RunConfig
from vidgen.training.draws import generator_of
from vidgen.training.embedded.dit_config import PLAIN, DiTData
from vidgen.training.embedded.dit_data import Batch, ClipDraws
from vidgen.training.embedded.latents import LatentShards
from vidgen.training.embedded.toybox_data import CacheConfig
from vidgen.weights.component import ExpertRole
from vidgen.weights.folder import ModelFolder
from vidgen.weights.load import read_tensors
from vidgen.weights.student import STUDENT, read_student

LOW: ExpertRole = "transformer_2"
HELD_OUT = 0
"""The shard of clips kept aside, under text alone; those to learn from follow."""
SIGMA_MIN = 1e-3  # what the pipeline's UniPC aims at


@dataclass(frozen=True, kw_only=True)
class TrajectoryConfig:
    """The way from noise to clips that the teacher shows and the student goes.

    Args:
        folder: where the shards lie.
        shards: of `shard_size` trajectories to learn from, each of one geometry.
        shard_size: trajectories a shard.
        held_out: trajectories that validation follows, of clips that none is learned from.
        num_frames: pixel frames of each clip.
        sampler: of both, one of `SAMPLERS`.
        num_steps: of both; one of the teacher's is two passes, one of the student's one.
        shift: of their noise levels.
        guidance_scale: that the student has folded in (Meng et al. 2023, sec. 3.1).
        image_guidance_scale: the same of clips of which frames are given; see `Guidance`.
        guidance_interval: levels at which it guides.
        by_student: whether the model's own student takes the steps, one pass each as it was
            taught, instead of the guided model: for what starts from that student.
        conditions: of the clips, but for `still_share` of batches, which have last frames,
            keyframes, references.
        still_share: that share.
        window_share: share of batches from the inside of clips, all under a prefix.
        seed: of what is drawn.

    Raises:
        InputError: nothing to make, or an unknown sampler.
    """

    folder: str
    shards: int
    shard_size: int = 8
    held_out: int = 16
    num_frames: int = 33
    sampler: str = "unipc"
    num_steps: int = 4
    shift: float = 7.0
    guidance_scale: float = 4.0
    image_guidance_scale: float | None = None
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    by_student: bool = False
    conditions: ConditionMix = PLAIN
    still_share: float = 0.25
    window_share: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("shards", "shard_size", "held_out", "num_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"trajectories.{name} is {getattr(self, name)}; "
                                 "it must be at least 1")
        if self.sampler not in SAMPLERS:
            raise InputError(f"trajectories.sampler is {self.sampler!r}; it is one of "
                             + ", ".join(SAMPLERS))

    @property
    def guidance(self) -> Guidance:
        """The teacher's."""
        return Guidance(self.guidance_scale, self.guidance_interval,
                        known_scale=self.image_guidance_scale)

    @property
    def sigmas(self) -> Tensor:
        """Their noise levels, [num_steps + 1]."""
        return make_sigmas(self.num_steps, self.shift, sigma_min=SIGMA_MIN)


@dataclass(frozen=True)
class Trajectories:
    """Guided trajectories, on one device.

    Attributes:
        state: the conditions of each clip; its latents are the starting noise.
        points: [B, P, C, F, h, w], the latents that the teacher was asked at, level by level.
        velocities: [B, P, C, F, h, w], its guided answers.
        end: [B, C, F, h, w], where they led.
        ids: of the captions' tokens, [B, S].
        mask: [B, S], 1 where there is a token.
    """

    state: LatentState
    points: Tensor
    velocities: Tensor
    end: Tensor
    ids: Tensor
    mask: Tensor


Side = tuple[SpacetimeDiT, Adapter | None]
"""A network with its adapter, or without one."""


@dataclass(frozen=True)
class Sides:
    """Who answers: one network at all noise levels, or another one below `boundary`."""

    high: Side
    low: Side | None = None
    boundary: float = 0.0

    def at(self, sigma: Tensor) -> Side:
        """Who answers at levels [B], which lie on one side."""
        below = sigma < self.boundary
        if self.low is None or not below.any():
            return self.high
        assert below.all(), f"{sigma.tolist()} lie on both sides of {self.boundary}"
        return self.low


class Teacher:
    """A released model under guidance, or as its student answers, many clips at a time.

    Args:
        folder: the model.
        device: where it computes.
        dtype: what it computes in; the latents stay float32.
        student: the delta to answer with, in one pass; None: the guided model answers.
        has_low: whether its expert at low noise answers there, or the first one throughout.
    """

    def __init__(
        self, folder: ModelFolder, device: torch.device, dtype: torch.dtype = torch.float32,
        student: Adapter | None = None, *, has_low: bool = False,
    ) -> None:
        text = folder.components["text_encoder"].load(dtype, device)
        assert isinstance(text, UMT5Encoder)
        self.text, self.device, self.student = text, device, student
        self.sides = Sides((load_dit(folder, "transformer", dtype, device), student))
        if has_low:
            low = load_dit(folder, LOW, dtype, device)
            self.sides = replace(self.sides, low=(low, None), boundary=boundary_of(folder))
        self.negative = PromptTokenizer(folder.tokenizer).encode([folder.defaults.negative_prompt])

    @torch.no_grad()
    def follow(
        self, state: LatentState, ids: Tensor, mask: Tensor, config: TrajectoryConfig
    ) -> Trajectories:
        """Trajectories of clips.

        Args:
            state: where they begin, and their conditions.
            ids: of the captions' tokens, [B, S].
            mask: [B, S].
            config: of the trajectories.
        """
        answer = self.answers(state, ids, mask, config)
        points: list[Tensor] = []
        velocities: list[Tensor] = []

        def denoise(latents: Tensor, sigma: Tensor) -> Tensor:
            points.append(latents)
            velocities.append(answer(latents, sigma))
            return velocities[-1]

        end = sample_state(config.sampler, denoise, state, config.sigmas)
        asked = torch.stack(points, dim=1), torch.stack(velocities, dim=1)
        return Trajectories(state, *asked, end, ids, mask)

    def answers(
        self, state: LatentState, ids: Tensor, mask: Tensor, config: TrajectoryConfig
    ) -> Denoise:
        """Its velocities, float32; arguments as in `follow`."""
        if self.student is not None:
            return self._plain(state, ids, mask, config.sampler)
        groups = []
        for given in (True, False):  # guidance treats them in different ways
            rows = state.has_given == given
            if rows.any():
                guidance = config.guidance.of_clip(has_given=given)
                answer = self._guided(state.rows(rows), ids[rows], mask[rows], guidance,
                                      config.sampler)
                groups.append((rows, answer))

        @torch.no_grad()
        def denoise(latents: Tensor, sigma: Tensor) -> Tensor:
            made = torch.empty_like(latents, dtype=torch.float32)
            for rows, answer in groups:
                made[rows] = answer(latents[rows], sigma[rows]).float()
            return made

        return denoise

    @torch.no_grad()
    def _guided(
        self, state: LatentState, ids: Tensor, mask: Tensor, guidance: Guidance, sampler: str
    ) -> Denoise:
        other_ids, other_mask = (
            part.to(self.device).expand(len(ids), -1) for part in self.negative
        )
        hidden = as_negative(state, hides_given=guidance.known_scale is not None)
        return guided(self._plain(state, ids, mask, sampler),
                      self._plain(hidden, other_ids, other_mask, sampler), guidance)

    @torch.no_grad()
    def _plain(self, state: LatentState, ids: Tensor, mask: Tensor, sampler: str) -> Denoise:
        context = encode_tokens(self.text, ids, mask), mask.sum(1)
        answer = answering(self.sides, state, context, sampler)

        @torch.no_grad()
        def denoise(latents: Tensor, sigma: Tensor) -> Tensor:
            return answer(latents, sigma).float()

        return denoise


def boundary_of(folder: ModelFolder) -> float:
    """The noise level below which a model's expert denoises."""
    boundary = folder.defaults.boundary
    assert boundary is not None, "a model with two transformers says where one follows the other"
    return boundary


def load_dit(
    folder: ModelFolder, role: ExpertRole, dtype: torch.dtype, device: torch.device
) -> SpacetimeDiT:
    """One of a model's transformers."""
    dit = folder.components[role].load(dtype, device)
    assert isinstance(dit, SpacetimeDiT)
    return dit


def answering(
    sides: Sides, state: LatentState, context: tuple[Tensor, Tensor], sampler: str
) -> Denoise:
    """Networks under a state's conditions and without guidance."""

    def denoise(latents: Tensor, sigma: Tensor) -> Tensor:
        dit, adapter = sides.at(sigma)
        with attached(dit, [] if adapter is None else [(adapter, 1.0)]):
            return velocity(dit, state, latents, sigma, context, patch=dit.config.patch_size,
                            whole=whole_timesteps(sampler))

    return denoise


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
        roles = ("transformer", "text_encoder", *[STUDENT] * config.by_student, *[LOW] * has_low)
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
            student = read_student(self.folder.path, config)
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
            raise InputError(f"{path} is missing; make it first (train/trajectories.py)")
        return unpack(read_tensors(path), self.device)

    @property
    def _phase(self) -> Phase:
        return Phase(self.config.shards + 1, self.config.num_frames, self.config.shard_size)

    @cached_property
    def _draws(self) -> ClipDraws:
        """Draws captions, conditions and noise as the transformer's own training does."""
        run = RunConfig(self.config.folder, (self._phase,), seed=self.config.seed)
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
    student = folder.student
    if student is None:
        what = "trajectories.by_student" if config.by_student else f"delta.part {LOW!r}"
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
    given: Trajectories, sigmas: Tensor, count: int, *seed: int, own: int = 0
) -> StepBatch:
    """Steps of a batch, spread evenly over the student's levels.

    Args:
        given: trajectories, at least one.
        sigmas: [P + 1], the student's levels.
        count: steps to draw.
        seed: what the draw depends on.
        own: the first of the steps that are drawn.
    """
    draw = generator_of(*seed)
    size, num_steps = len(given.points), len(sigmas) - 1 - own
    first = int(torch.randint(num_steps, (), generator=draw))
    at = own + (torch.arange(count) + first) % num_steps
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
