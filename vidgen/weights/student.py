"""A model's few-step student: a low-rank delta beside its weights, in a folder `student`.

The delta has guidance folded in (Meng et al. 2023) and knows one grid of noise levels, which
`config.json` names; `model.safetensors` is a LoRA of our own dialect.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vidgen.core.runtime import atomic_write
from vidgen.weights.folder import config_of
from vidgen.weights.lora import read_lora, write_lora

if TYPE_CHECKING:
    from vidgen.models.dit import DiTConfig
    from vidgen.models.lora import Adapter

STUDENT = "student"
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class StudentConfig:
    """How a student is sampled: by Euler steps without guidance.

    Args:
        sigmas: the noise levels it was taught on, from 1 down to 0.
        guidance_scale: of its teacher, which it has folded in.
        hears: whether it was taught the sound that is made along, too.

    Raises:
        ValueError: levels that don't fall from 1 to 0.
    """

    sigmas: tuple[float, ...]
    guidance_scale: float
    hears: bool = False

    def __post_init__(self) -> None:
        falls = all(low < high for high, low in zip(self.sigmas, self.sigmas[1:], strict=False))
        if len(self.sigmas) < 2 or not falls or self.sigmas[0] != 1 or self.sigmas[-1] != 0:
            raise ValueError(f"sigmas are {list(self.sigmas)}; they must fall from 1 to 0")

    @property
    def num_steps(self) -> int:
        """Steps of a clip."""
        return len(self.sigmas) - 1


def open_student(model: Path) -> StudentConfig | None:
    """How the student in a model's folder is sampled; None where there is none.

    Raises:
        ModelError: its config is damaged.
    """
    folder = model / STUDENT
    if not (folder / "config.json").is_file():
        return None
    config: StudentConfig = config_of(StudentConfig, folder)
    return config


def read_student(model: Path, config: DiTConfig) -> Adapter:
    """The delta in a model's folder.

    Args:
        model: the model's folder.
        config: of its transformer.

    Raises:
        ModelError: missing, damaged, or of another transformer.
    """
    return read_lora(model / STUDENT / WEIGHTS, config)


def write_student(adapter: Adapter, config: StudentConfig, model: Path) -> None:
    """Write a delta and how it is sampled into a model's folder, but not `model.json`.

    Raises:
        OutputError: it can't be written.
    """
    folder = model / STUDENT
    folder.mkdir(parents=True, exist_ok=True)
    write_lora(adapter, folder / WEIGHTS, "vidgen")
    (folder / WEIGHTS).chmod(0o644)
    atomic_write(folder / "config.json", (json.dumps(asdict(config), indent=1) + "\n").encode())
