"""Values that the modules of this room pass to each other."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from vidgen.core.request import Request
    from vidgen.core.shapes import LatentShape, Tiles
    from vidgen.core.values import Fit
    from vidgen.diffusion.cache import Magnitudes
    from vidgen.diffusion.guidance import Guidance
    from vidgen.diffusion.temporal_upsampling import LatentRate
    from vidgen.media.clip import Clip
    from vidgen.media.types import Frames
    from vidgen.models.lora import Adapter
    from vidgen.pipeline.journal.journal import Journal
    from vidgen.weights.component import ExpertRole, Role
    from vidgen.weights.folder import DiffusersFolder, ModelFolder, StudentConfig
    from vidgen.weights.quantize import Quantization

Offload = Literal["none", "stage", "block"]
"""Share of a model in memory at once: all, the running stage's networks, or two blocks."""

Contexts = Sequence[tuple["Tensor", "Tensor"]]
"""(context [1, S, D], lengths [1]) of the prompt and, under guidance, of the negative prompt."""

Stage = Literal["prompt", "prepare", "sample", "sound"]
Report = Callable[[Stage, int, int], None]
"""Called with a stage, the number of units done, and their total."""


class Opened(Protocol):
    """An opened model, run by our networks or by diffusers' pipelines."""

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
        """Make a clip, or a list of them where `count` is over 1."""

    def close(self) -> None:
        """Free the memory and other devices; the engine can't be used afterwards."""


@dataclass(frozen=True)
class Progress:
    """Argument of `on_event`: `done` of `total` in a stage of clip `clip` of `num_clips`."""

    stage: Stage
    done: int
    total: int
    clip: int = 1
    num_clips: int = 1


@dataclass(frozen=True)
class Reporter:
    """Calls `on_event`, if any, with the progress of one clip."""

    on_event: Callable[[Progress], None] | None
    clip: int
    num_clips: int

    def __call__(self, stage: Stage, done: int, total: int) -> None:
        """Report progress in a stage."""
        if self.on_event is not None:
            self.on_event(Progress(stage, done, total, self.clip, self.num_clips))


@dataclass(frozen=True)
class Preview:
    """A forming clip."""

    frames: Frames  # uint8 [F, H', W', 3], one for each latent frame
    fps: Fraction  # of these frames
    clip: int  # its number, from 1
    step: int  # of the sampler, from 1


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
        """Return these adapters plus the deltas of a distilled model; both are summed."""
        adapters = dict(self.adapters)
        for role, delta in deltas.items():
            adapters[role] = [(delta, 1.0), *adapters.get(role, ())]
        return replace(self, adapters=adapters)


NO_LORAS = Loras({})


@dataclass(frozen=True)
class CacheChoice:
    """A settled step cache."""

    method: str  # "first-block", "magnitude" or "forecast"
    threshold: float  # 0 computes every step
    magnitudes: Magnitudes | None = None  # of the model, for "magnitude"


@dataclass(frozen=True)
class Plan:
    """One clip, with nothing left to choose."""

    prompt: str
    negative: str
    seed: int
    width: int
    height: int
    num_frames: int  # to generate, 1 mod the temporal stride
    kept_frames: int  # of the clip, the first of those generated
    fps: Fraction
    num_steps: int  # of a run from pure noise, of which `strength` takes its share
    shift: float
    sampler: str  # its name; a scheduler object's class
    guidance: Guidance
    strength: float
    control_scale: float
    fit: Fit
    latents: LatentShape
    readings: tuple[tuple[str, str], ...] = ()  # words and their replacements
    cache: CacheChoice | None = None
    tiles: Tiles | None = None  # of the VAE's pictures; None: the whole
    refine_steps: int = 0  # of a given first frame's latents
    encode_passes: int = 1  # see `encode_pixels`
    sound_steps: int = 0  # of the model's own sound; 0: as many as the picture's
    sound_candidates: int = 1  # sounds, of which the best is kept
    sound_delay_s: float = 0.0  # of the sound after the picture
    student: StudentConfig | None = None  # distilled model that denoises, if any
    oversampling: int = 1  # latent frames below the model's boundary for each above
    candidates: int = 1  # of the clip, or of each window, at most
    binding: float = 0.0  # of regional prompts, see `vidgen.diffusion.regional_prompts`

    @property
    def rate(self) -> LatentRate:
        """Rate of its finished latents against its own latent frames."""
        from vidgen.diffusion.temporal_upsampling import LatentRate

        return LatentRate(self.oversampling)


@dataclass(frozen=True)
class Setup:
    """Settings under which a model runs; `tiles` of the VAE's pictures, None for the whole."""

    device: torch.device
    dtype: str
    offload: Offload = "none"
    quantize: Quantization | None = None
    tiles: Tiles | None = None

    @property
    def words(self) -> str:
        """Options of the command line that give this setup."""
        words = [f"--dtype {self.dtype}", f"--offload {self.offload}"]
        words += [f"--quantize {self.quantize}"] if self.quantize else []
        return " ".join(words + ([f"--tiles {self.tiles}"] if self.tiles else []))


@dataclass(frozen=True)
class StageEstimate:
    """Time of a generation's stage for all clips, and its peak memory."""

    name: str
    seconds: float
    bytes: int


@dataclass(frozen=True)
class Estimate:
    """Expected time and memory of a generation."""

    # "load", "text", "prepare", "denoise", "sound" if the model makes any, "decode", "mux", in
    # order. Decoding and muxing overlap: "mux" is the time it adds.
    stages: tuple[StageEstimate, ...]
    setup: Setup
    encoder_s: float  # of video encoding, most of it while frames are decoded
    kept_frames: int  # frames written, of all clips
    disk_bytes: int  # upper bound, of all clips as .mp4 and of their journals
    measured: bool  # False: the machine is unknown, and seconds are only weights
    notes: tuple[str, ...] = ()  # work that isn't counted
    choice: str = ""  # settings changed to make it fit, in words

    @property
    def total_s(self) -> float:
        """Seconds of all stages."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def peak_bytes(self) -> int:
        """Peak bytes on top of the program's own after its imports."""
        return max(stage.bytes for stage in self.stages)

    def as_data(self) -> dict[str, Any]:
        """Return it as JSON data."""
        import torch

        return {
            "stages": [vars(stage) for stage in self.stages], "total_s": self.total_s,
            "encoder_s": self.encoder_s, "peak_bytes": self.peak_bytes,
            "disk_bytes": self.disk_bytes, "measured": self.measured, "dtype": self.setup.dtype,
            "offload": self.setup.offload, "quantize": self.setup.quantize,
            "device": str(self.setup.device),
            "tiles": None if self.setup.tiles is None else str(self.setup.tiles),
            "threads": torch.get_num_threads(), "notes": list(self.notes), "choice": self.choice,
        }


def draw_seed() -> int:
    """Draw a random seed."""
    return secrets.randbelow(2**32)
