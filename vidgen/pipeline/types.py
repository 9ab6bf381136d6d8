"""Plans, estimates, progress and other values that the pipeline's modules exchange."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from vidgen.core.request import Request
    from vidgen.core.shapes import LatentShape, Tiles
    from vidgen.core.values import Fit
    from vidgen.diffusion.cache import CacheChoice
    from vidgen.diffusion.guidance import Guidance
    from vidgen.diffusion.temporal_upsampling import LatentRate
    from vidgen.media.clip import Clip
    from vidgen.media.types import Frames
    from vidgen.models.lora import Adapter
    from vidgen.ops.quantized import Quantization
    from vidgen.pipeline.journal.journal import Journal
    from vidgen.weights.component import ExpertRole, Role
    from vidgen.weights.folder import DiffusersFolder, FewStepConfig, ModelFolder

Offload = Literal["none", "stage", "block"]
"""Share of a model in memory at once: all, the running stage's networks, or two blocks."""

Contexts = Sequence[tuple["Tensor", "Tensor"]]
"""(context [1, S, D], lengths [1]) of the prompt and, under guidance, of the negative prompt."""

Stage = Literal["prompt", "prepare", "sample", "sound"]


class Report(Protocol):
    """Function that reports a clip's progress; its arguments are those of `Progress`."""

    def __call__(
        self, stage: Stage, done: int, total: int, candidate: int = 1, num_candidates: int = 1
    ) -> None:
        """Report progress, also where a stage begins."""


class Opened(Protocol):
    """An opened model, run by vidgen's networks or by a diffusers pipeline."""

    device: torch.device
    dtype: str  # of its weights: "fp32", "bf16" or "fp16"

    @property
    def folder(self) -> ModelFolder | DiffusersFolder:
        """The model's files."""

    @property
    def offload(self) -> str:
        """Share of the model in memory at once; see `Offload`."""


class AnyEngine(Opened, Protocol):
    """A model ready to generate; see `vidgen.pipeline.engine.Engine`."""

    def generate(
        self, prompt: str | Request, *, count: int = 1,
        on_event: Callable[[Progress], None] | None = None,
        on_estimate: Callable[[Estimate], None] | None = None,
        on_preview: OnPreview | None = None, journal: Journal | Sequence[Journal] | None = None,
        **options: Any,
    ) -> Clip | list[Clip]:
        """Generate a clip, or a list of clips if `count` is over 1."""

    def close(self) -> None:
        """Free the memory and other devices; the engine can't be used afterwards."""


@dataclass(frozen=True)
class Progress:
    """Progress for `on_event`: `done` of `total` units in a stage of clip `clip` of `num_clips`.

    A stage's first event is its start: `done` is then 0, or what an earlier run did. Each further
    candidate in stage "sample" adds its steps to `total`.
    """

    stage: Stage
    done: int
    total: int
    clip: int = 1
    num_clips: int = 1
    candidate: int = 1
    num_candidates: int = 1  # at most


def reporter(
    on_event: Callable[[Progress], None] | None, clip: int, num_clips: int
) -> Report:
    """Return a function that reports the progress of one clip to `on_event`, if any."""
    def report(
        stage: Stage, done: int, total: int, candidate: int = 1, num_candidates: int = 1
    ) -> None:
        if on_event is not None:
            on_event(Progress(stage, done, total, clip, num_clips, candidate, num_candidates))

    return report


@dataclass(frozen=True)
class Preview:
    """Small frames of a clip that is being generated."""

    frames: Frames  # uint8 [F, H', W', 3], one for each latent frame
    fps: Fraction  # frame rate of the preview
    clip: int  # number of the clip, from 1
    step: int  # number of the sampler's step, from 1


OnPreview = Callable[[Preview], None]


@dataclass(frozen=True)
class Loras:
    """A request's adapters with their weights, by transformer, and their records for the recipe."""

    adapters: Mapping[Role, Sequence[tuple[Adapter, float]]]
    records: Sequence[Mapping[str, Any]] = ()

    @property
    def tokens(self) -> dict[str, Tensor]:
        """Embeddings of learned tokens, regardless of their adapters' weights."""
        each = (adapter.tokens for own in self.adapters.values() for adapter, _ in own)
        return {token: row for tokens in each for token, row in tokens.items()}

    def plus(self, deltas: Mapping[ExpertRole, Adapter]) -> Loras:
        """Return these adapters with the weight deltas of a distilled model added."""
        adapters = dict(self.adapters)
        for role, delta in deltas.items():
            adapters[role] = [(delta, 1.0), *adapters.get(role, ())]
        return replace(self, adapters=adapters)


NO_LORAS = Loras({})

_STAGES = {"prompt": "text", "prepare": "prepare", "sample": "denoise", "sound": "sound",
           "write": "decode"}
"""An estimate's stage for each stage of progress, in order."""
_LITTLE = 0.02
"""Share of the work after which its time counts instead of the estimate."""


@dataclass(frozen=True)
class Plan:
    """All choices that define one clip, defaults included."""

    prompt: str
    negative: str
    seed: int
    width: int
    height: int
    num_frames: int  # to generate, 1 mod the temporal stride
    kept_frames: int  # frames of the clip, the first ones of those generated
    fps: Fraction
    num_steps: int  # of a run from pure noise; `strength` runs its share of them
    shift: float
    sampler: str  # name of a sampler, or of a scheduler's class
    guidance: Guidance
    strength: float
    control_scale: float
    fit: Fit
    latents: LatentShape
    word_normalisation: tuple[tuple[str, str], ...] = ()  # (word, replacement) pairs
    cache: CacheChoice | None = None
    tiles: Tiles | None = None  # of the VAE; None: no tiling
    refine_steps: int = 0  # of a given first frame's latents
    encode_passes: int = 1  # see `encode_pixels`
    sound_steps: int = 0  # steps of the model's own sound; 0: as many as the clip's
    sound_candidates: int = 1  # sounds to generate; the best one is kept
    sound_delay_s: float = 0.0  # delay of the sound after the picture
    few_step: FewStepConfig | None = None  # distilled model in use, if any
    temporal_upsampling: int = 1  # factor of temporal upsampling below the model's boundary
    candidates: int = 1  # most candidates of the clip, or of each window
    regional_prompts: float = 0.0  # strength of `vidgen.diffusion.regional_prompts`

    @property
    def rate(self) -> LatentRate:
        """Ratio of its finished latents to its latent frames."""
        from vidgen.diffusion.temporal_upsampling import LatentRate

        return LatentRate(self.temporal_upsampling)


@dataclass(frozen=True)
class Setup:
    """Device, dtype and memory options under which a model runs; `tiles` None: no tiling."""

    device: torch.device
    dtype: str
    offload: Offload = "none"
    quantize: Quantization | None = None
    tiles: Tiles | None = None

    @property
    def words(self) -> str:
        """Command line options that select this setup."""
        words = [f"--dtype {self.dtype}", f"--offload {self.offload}"]
        words += [f"--quantize {self.quantize}"] if self.quantize else []
        return " ".join(words + ([f"--tiles {self.tiles}"] if self.tiles else []))


@dataclass(frozen=True)
class StageEstimate:
    """Seconds of one stage of a generation, for all clips, and its peak memory in bytes."""

    name: str
    seconds: float
    bytes: int


@dataclass(frozen=True)
class Estimate:
    """Expected time and memory of a generation."""

    # in order: "load", "text", "prepare", "denoise", "sound" if the model generates any, "decode"
    stages: tuple[StageEstimate, ...]
    setup: Setup
    kept_frames: int  # frames to write, of all clips
    measured: bool  # False: the machine wasn't measured, and seconds are only relative weights
    notes: tuple[str, ...] = ()  # remarks, such as work that isn't counted
    choice: str = ""  # options that were changed to fit the memory, in words

    @property
    def total_s(self) -> float:
        """Sum of all stages in seconds."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def peak_bytes(self) -> int:
        """Peak memory in bytes, in addition to that of the process after its imports."""
        return max(stage.bytes for stage in self.stages)

    def as_data(self) -> dict[str, Any]:
        """Return the estimate as JSON data."""
        import torch

        return {
            "stages": [vars(stage) for stage in self.stages], "total_s": self.total_s,
            "peak_bytes": self.peak_bytes, "kept_frames": self.kept_frames,
            "measured": self.measured, "dtype": self.setup.dtype,
            "offload": self.setup.offload, "quantize": self.setup.quantize,
            "device": str(self.setup.device),
            "tiles": None if self.setup.tiles is None else str(self.setup.tiles),
            "threads": torch.get_num_threads(), "notes": list(self.notes), "choice": self.choice,
        }


class Clock:
    """Maps progress to the fraction done, by an estimate, and the time left, by the time so far.

    Args:
        made: estimate of the generation of all `num_clips` clips, or a list with one of each clip.
        done: numbers of clips finished by an earlier run, from 1.
        now: clock, in seconds.
    """

    def __init__(
        self, made: Estimate | Sequence[Estimate], num_clips: int = 1, *,
        done: Collection[int] = (), now: Callable[[], float] = time.monotonic,
    ) -> None:
        each = made if isinstance(made, Sequence) else [made] * num_clips
        self._is_shared = not isinstance(made, Sequence)
        shared = num_clips if self._is_shared else 1
        self._measured = all(one.measured for one in each)
        self._expected = {
            clip: {name: sum(each.seconds for each in one.stages if each.name == stage) / shared
                   for name, stage in _STAGES.items()}
            for clip, one in enumerate(each, 1) if clip not in done
        }
        # of each clip, in expected seconds: all work done, and the part that an earlier run did
        self._reached = dict.fromkeys(self._expected, 0.0)
        self._given = dict.fromkeys(self._expected, 0.0)
        self._stage: dict[int, str] = {}
        self._now, self._start = now, now()

    def __call__(self, stage: str, done: int, total: int, clip: int = 1) -> dict[str, Any]:
        """Return "fraction", 0 to 1, and "eta_s", None while an unknown machine has done little.

        `stage` is "prompt", "prepare", "sample" or "sound" (without an estimate if another model
        makes the sound); any other name counts as writing. `clip` is numbered from 1. An earlier
        run did the units of a stage's first event, and the stages without events.
        """
        names, name = list(_STAGES), stage if stage in _STAGES else "write"
        if name == "prompt" and self._is_shared:  # encoded once for all clips
            self._stage = dict.fromkeys(self._expected, name) | self._stage
        if (expected := self._expected.get(clip)) is not None:
            inside = expected[name] * min(done / max(total, 1), 1.0)
            place = names.index(name)
            self._reached[clip] = sum(expected[each] for each in names[:place]) + inside
            if (last := self._stage.get(clip)) != name:
                skipped = names[names.index(last) + 1 if last else 0 : place]
                self._given[clip] += sum(expected[each] for each in skipped) + inside
                self._stage[clip] = name
        whole = sum(sum(each.values()) for each in self._expected.values())
        reached = sum(self._reached.values())
        worked, left = reached - sum(self._given.values()), max(whole - reached, 0.0)
        eta_s = round(left, 1) if self._measured else None
        if worked > _LITTLE * whole:
            eta_s = round(left * (self._now() - self._start) / worked, 1)
        return {"fraction": round(min(reached / whole, 1.0), 4) if whole else 1.0, "eta_s": eta_s}


def draw_seed() -> int:
    """Draw a random seed."""
    return secrets.randbelow(2**32)
