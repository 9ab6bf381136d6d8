"""A model's few-step students: low-rank deltas of its weights, each in a folder of its own.

`student` makes whole clips; `roller` is causal in time and makes a clip turn by turn, without end.
A delta has guidance folded in (Meng et al. 2023) and knows one grid of noise levels, which
`config.json` names; `model.safetensors` is a LoRA of our own dialect, and so is
`model_2.safetensors`, where there is one, for the model's expert at low noise.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidgen.weights.component import ExpertRole
from vidgen.weights.configs import config_of
from vidgen.weights.folder import StudentConfig
from vidgen.weights.lora import read_lora

if TYPE_CHECKING:
    from vidgen.models.dit_types import DiTConfig
    from vidgen.models.lora import Adapter

STUDENT = "student"
ROLLER = "roller"
STUDENTS = (STUDENT, ROLLER)
WEIGHTS: dict[ExpertRole, str] = {
    "transformer": "model.safetensors", "transformer_2": "model_2.safetensors",
}
"""Files of the deltas, by the model's transformer."""


def open_students(model: Path) -> dict[str, Any]:
    """Return each student's config in a model's folder by name, or None where it has none.

    Raises:
        ModelError: a config is damaged.
    """
    folders = {name: model / name for name in STUDENTS}
    return {
        name: config_of(StudentConfig, folder) if (folder / "config.json").is_file() else None
        for name, folder in folders.items()
    }


def student_parts(model: Path, name: str = STUDENT) -> tuple[ExpertRole, ...]:
    """Return the transformers of a model that a student in its folder changes."""
    return tuple(part for part, file in WEIGHTS.items() if (model / name / file).is_file())


def read_student(
    model: Path, config: DiTConfig, name: str = STUDENT, part: ExpertRole = "transformer"
) -> Adapter:
    """Read a student's delta in a model's folder.

    Args:
        model: the model's folder.
        config: of its transformer.
        name: of the student.
        part: the transformer.

    Raises:
        ModelError: missing, damaged, or of another transformer.
    """
    return read_lora(model / name / WEIGHTS[part], config)
