"""Clips with captions for fine-tuning at tiny sizes, and runs over them."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from tests.textures import texture
from vidgen.core.config import build
from vidgen.media.clip import Clip
from vidgen.media.types import ClipInfo
from vidgen.training.config import FinetuneConfig

NUM_CLIPS = 4


def build_clips(folder: Path, *, frames: int = 9, size: int = 32, count: int = NUM_CLIPS,
                fps: int = 12, caption: str = "a red car bounces across the desert") -> Path:
    """Textures that drift, each its own way, with captions beside them."""
    folder.mkdir(parents=True)
    for index in range(count):
        wide = texture(size, size + 2 * frames, seed=index)
        shown = np.stack([wide[:, 2 * t : 2 * t + size] for t in range(frames)])
        info = ClipInfo(Fraction(fps), (size, size), frames)
        Clip(lambda shown=shown: iter([shown]), info).save(folder / f"clip{index}.mkv")
        (folder / f"clip{index}.txt").write_text(caption)
    return folder


def make_config(model: Path | str, clips: Path, folder: Path, /, **changes: Any) -> FinetuneConfig:
    """What `settings_of` gives, read as a run's YAML is."""
    return build(FinetuneConfig, settings_of(model, clips, folder, **changes))


def settings_of(model: Path | str, clips: Path, folder: Path, /, **changes: Any) -> dict[str, Any]:
    """A short run in float32 on the CPU; `changes` are keys of the YAML, merged by mapping."""
    settings: dict[str, Any] = {
        "model": str(model),
        "data": {"folders": str(clips), "sizes": ["32x32"], "frames": [9]},
        "run": {
            "folder": str(folder), "steps": 4, "batch_size": 2, "device": "cpu", "dtype": "fp32",
            "log_every": 1, "validate_every": 4, "optim": {"lr": 1e-3, "warmup_steps": 1},
        },
        "lora": {"rank": 2},
        "validation": {"sigmas": [0.3, 0.95], "steps": 1, "guidance": 1},
        "output": {"name": "tiny", "ab_clips": 1},
    }
    for key, value in changes.items():
        mapped = isinstance(value, dict) and isinstance(settings.get(key), dict)
        settings[key] = {**settings[key], **value} if mapped else value
    return settings
