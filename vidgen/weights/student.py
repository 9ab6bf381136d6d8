"""A model's few-step students: low-rank deltas beside its weights, each in a folder of its own.

`student` makes whole clips; `roller` is causal in time and makes a clip turn by turn, without end.
A delta has guidance folded in (Meng et al. 2023) and knows one grid of noise levels, which
`config.json` names; `model.safetensors` is a LoRA of our own dialect, and so is
`model_2.safetensors`, where there is one, for the model's expert at low noise.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidgen.core.runtime import atomic_write
from vidgen.diffusion.samplers import SAMPLERS
from vidgen.weights.component import ExpertRole
from vidgen.weights.folder import config_of
from vidgen.weights.lora import read_lora
from vidgen.weights.lora_write import write_lora

if TYPE_CHECKING:
    from vidgen.models.dit_types import DiTConfig
    from vidgen.models.lora import Adapter

STUDENT = "student"
ROLLER = "roller"
STUDENTS = (STUDENT, ROLLER)
WEIGHTS: dict[ExpertRole, str] = {
    "transformer": "model.safetensors", "transformer_2": "model_2.safetensors",
}
"""Which of a model's transformers a file is a delta of."""
INT8_FROM = 1 << 10
"""Numbers of a factor that lies there in int8; smaller ones save nothing."""


@dataclass(frozen=True)
class RollConfig:
    """How a clip is rolled out: in turns of latent frames, each in view of those before it.

    Args:
        turn_frames: latent frames of a turn, which see each other.
        window_frames: latent frames before a turn that it sees, at most.
        history_noise: how much of what it sees of them is noise, so that the faults of a turn
            aren't taken for the picture; from 0 to below 1.

    Raises:
        ValueError: turns of no frame, a window shorter than a turn, or nothing but noise.
    """

    turn_frames: int = 3
    window_frames: int = 6
    history_noise: float = 0.3

    def __post_init__(self) -> None:
        if self.turn_frames < 1:
            raise ValueError(f"turn_frames is {self.turn_frames}; a turn has a frame at least")
        if self.window_frames < self.turn_frames:
            raise ValueError(f"window_frames is {self.window_frames}, less than the "
                             f"{self.turn_frames} of a turn")
        if not 0 <= self.history_noise < 1:
            raise ValueError(f"history_noise is {self.history_noise}; it lies in 0..1, below 1")


@dataclass(frozen=True)
class StudentConfig:
    """How a student is sampled: without guidance.

    Args:
        sampler: whose steps it was taught, one of `SAMPLERS`.
        sigmas: the noise levels it was taught on, from 1 down to 0.
        guidance_scale: of its teacher, which it has folded in.
        roll: how it makes a clip turn by turn, or None where it makes clips as a whole.
        boundary: below which the model's expert at low noise denoises, with its delta or, where
            there is none, as it is; None: nowhere.

    Raises:
        ValueError: an unknown sampler, or levels that don't fall from 1 to 0.
    """

    sampler: str
    sigmas: tuple[float, ...]
    guidance_scale: float
    roll: RollConfig | None = None
    boundary: float | None = None

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler is {self.sampler!r}; it is one of {', '.join(SAMPLERS)}")
        falls = all(low < high for high, low in zip(self.sigmas, self.sigmas[1:], strict=False))
        if len(self.sigmas) < 2 or not falls or self.sigmas[0] != 1 or self.sigmas[-1] != 0:
            raise ValueError(f"sigmas are {list(self.sigmas)}; they must fall from 1 to 0")

    @property
    def num_steps(self) -> int:
        """Steps of a clip."""
        return len(self.sigmas) - 1


def open_students(model: Path) -> dict[str, Any]:
    """By name how each student in a model's folder is sampled, or None where it has none.

    Raises:
        ModelError: a config is damaged.
    """
    folders = {name: model / name for name in STUDENTS}
    return {
        name: config_of(StudentConfig, folder) if (folder / "config.json").is_file() else None
        for name, folder in folders.items()
    }


def student_parts(model: Path, name: str = STUDENT) -> tuple[ExpertRole, ...]:
    """Which of a model's transformers a student in its folder changes."""
    return tuple(part for part, file in WEIGHTS.items() if (model / name / file).is_file())


def read_student(
    model: Path, config: DiTConfig, name: str = STUDENT, part: ExpertRole = "transformer"
) -> Adapter:
    """A student's delta in a model's folder.

    Args:
        model: the model's folder.
        config: of its transformer.
        name: which student.
        part: which transformer's delta.

    Raises:
        ModelError: missing, damaged, or of another transformer.
    """
    return read_lora(model / name / WEIGHTS[part], config)


def write_student(
    adapter: Adapter, config: StudentConfig, model: Path, part: ExpertRole = "transformer"
) -> None:
    """Write a delta, in int8, and how it is sampled into a model's folder, but not `model.json`.

    Raises:
        OutputError: it can't be written.
    """
    folder = model / (ROLLER if config.roll else STUDENT)
    folder.mkdir(parents=True, exist_ok=True)
    write_lora(adapter, folder / WEIGHTS[part], "vidgen", INT8_FROM)
    (folder / WEIGHTS[part]).chmod(0o644)
    atomic_write(folder / "config.json", (json.dumps(asdict(config), indent=1) + "\n").encode())
