"""The YAML of a distillation run: who teaches, by which steps, and how its student learns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from train.toybox.phases import PhasedRun
from train.toybox.tasks.dit_config import PLAIN
from train.toybox.tasks.mix import ConditionMix
from train.toybox.tasks.toybox_data import CacheConfig
from vidgen.core.errors import InputError
from vidgen.diffusion.flow import make_sigmas
from vidgen.diffusion.guidance import Guidance
from vidgen.diffusion.samplers import SAMPLERS
from vidgen.weights.component import ExpertRole

LOW: ExpertRole = "transformer_2"
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
class DeltaConfig:
    """Which layers the student changes, and by how much at most.

    Args:
        rank: of each layer's change.
        targets: parts of layers' names, such as "self_attn.q" or "ffn".
        begin_as: "student" to begin as the model's own delta; None: nothing.
        part: which of the model's transformers it changes: the first one, at all noise levels, or
            its expert at low noise, below the boundary, the model's own student staying above it.
        above: whether the first one's is for levels above that boundary alone, the student's part
            for the expert staying below it.
    """

    rank: int
    targets: tuple[str, ...]
    begin_as: str | None = None
    part: ExpertRole = "transformer"
    above: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"delta.rank is {self.rank}; it must be at least 1")
        if not self.targets:
            raise InputError("delta.targets is empty; name parts of layers' names")
        if self.begin_as not in (None, "student"):
            raise InputError(f"delta.begin_as is {self.begin_as!r}; give student, or leave it "
                             "out")
        if self.above and self.part == LOW:
            raise InputError(f"delta.part is {LOW!r} and delta.above is true, but the expert "
                             "denoises below the boundary; leave one of them out")

    @property
    def has_other(self) -> bool:
        """Whether the student's other part stays beside it, on the other side of the boundary."""
        return self.above or self.part == LOW

    @property
    def asked(self) -> str:
        """What says so in the run's YAML, for messages."""
        return "delta.above is true" if self.above else f"delta.part is {self.part!r}"


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
        phased: whether a step's clips are compared no lower than where the next one begins: noise
            covers there what later steps make anew (Fan et al. 2025, "Phased DMD").
        follower_lr: peak rate of what follows the student; it has to be faster than the student.
    """

    start: str | None = None
    first_step: int = 0
    shift: float = 5.0
    between: tuple[float, float] = (0.02, 0.98)
    phased: bool = False
    follower_lr: float = 1e-3

    def __post_init__(self) -> None:
        low, high = self.between
        if not 0 <= low < high <= 1:
            raise InputError(f"match.between is {list(self.between)}; give two rising levels in "
                             "0..1")
        if self.first_step < 0:
            raise InputError(f"match.first_step is {self.first_step}; the first is 0")


@dataclass(frozen=True, kw_only=True)
class DistilRun:
    """The whole YAML file: who teaches, what of, and how the student learns.

    Args:
        teacher: the model, whose weights the student shares; a name or a folder.
        caches: clips that lend captions and conditions; see `train/toybox/cache.py`.
        trajectories: the teacher's, made by `train/toybox/trajectories.py`.
        match: how its own clips are compared with the teacher's; None: it repeats answers.
        delta: of the student. Rank 16 of all layers of the embedded model is 1.6 MB in bf16.
        run: its phases have the trajectories' frames, and `batch_size` steps of one shard each, or
            clips that are matched.

    Raises:
        InputError: a phase of other clips than the trajectories', or no step to match.
    """

    run: PhasedRun
    teacher: str
    caches: tuple[CacheConfig, ...]
    trajectories: TrajectoryConfig
    delta: DeltaConfig
    match: MatchConfig | None = None

    def __post_init__(self) -> None:
        if self.match is not None and self.trajectories.by_student:
            raise InputError("match and trajectories.by_student are both given; a student is "
                             "matched with the guided model, leave by_student out")
        if self.delta.has_other and self.trajectories.by_student:
            raise InputError(f"{self.delta.asked}; such a part has no student for its teacher, "
                             "leave trajectories.by_student out")
        if self.match is not None and self.match.start is None and self.delta.begin_as is None:
            raise InputError("match.start and delta.begin_as are both missing; matching goes on "
                             "from a student, give its run folder or the name of a model's own")
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
