"""A model's few-step adapter (student): a low-rank delta of its weights, in a folder of its own.

It has guidance distilled into it (Meng et al. 2023) for the noise levels in `config.json`.
`model.safetensors` is a LoRA of our own dialect, and so is the optional `model_2.safetensors` for
the model's low-noise expert.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vidgen.weights.component import ExpertRole
from vidgen.weights.configs import config_of
from vidgen.weights.folder import StudentConfig
from vidgen.weights.lora import read_lora

if TYPE_CHECKING:
    from vidgen.models.dit_types import DiTConfig
    from vidgen.models.lora import Adapter

STUDENT = "student"
WEIGHTS: dict[ExpertRole, str] = {
    "transformer": "model.safetensors", "transformer_2": "model_2.safetensors",
}
"""Files of the deltas, by transformer."""


def open_student(model: Path) -> StudentConfig | None:
    """Return the config of a model's student, if it has one; raise ModelError if damaged."""
    folder = model / STUDENT
    return config_of(StudentConfig, folder) if (folder / "config.json").is_file() else None


def student_parts(model: Path) -> tuple[ExpertRole, ...]:
    """Return the transformers for which a model's student has deltas."""
    return tuple(part for part, file in WEIGHTS.items() if (model / STUDENT / file).is_file())


def read_student(model: Path, config: DiTConfig, part: ExpertRole = "transformer") -> Adapter:
    """Read a student's delta of a transformer with this config, in a model's folder.

    Raises:
        ModelError: missing, damaged, or of another transformer.
    """
    return read_lora(model / STUDENT / WEIGHTS[part], config)
