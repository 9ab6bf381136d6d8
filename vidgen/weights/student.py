"""A model's few-step adapters (students): low-rank deltas of its weights, with a folder each.

`student` makes whole clips; `roller` is causal in time and makes endless clips turn by turn. Both
have guidance distilled into them (Meng et al. 2023) for the noise levels in `config.json`.
`model.safetensors` is a LoRA of our own dialect, and so is the optional `model_2.safetensors` for
the model's low-noise expert.
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
"""Files of the deltas, by transformer."""


def open_students(model: Path) -> dict[str, Any]:
    """Return the config of each name in `STUDENTS`, or None; raise ModelError for a damaged one."""
    folders = {name: model / name for name in STUDENTS}
    return {
        name: config_of(StudentConfig, folder) if (folder / "config.json").is_file() else None
        for name, folder in folders.items()
    }


def student_parts(model: Path, name: str = STUDENT) -> tuple[ExpertRole, ...]:
    """Return the transformers for which a model's student has deltas."""
    return tuple(part for part, file in WEIGHTS.items() if (model / name / file).is_file())


def read_student(
    model: Path, config: DiTConfig, name: str = STUDENT, part: ExpertRole = "transformer"
) -> Adapter:
    """Read a student's delta of a transformer with this config, in a model's folder.

    Raises:
        ModelError: missing, damaged, or of another transformer.
    """
    return read_lora(model / name / WEIGHTS[part], config)
