"""What a generation will take, as plain values: how it runs, its stages, and their sums."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from vidgen.core.runtime import size_text
from vidgen.pipeline.loader import Offload

if TYPE_CHECKING:
    from vidgen.core.shapes import Tiles
    from vidgen.weights.quantize import Quantization

LONG_S = 600.0
"""Runs that take longer are told of before they begin."""


@dataclass(frozen=True)
class Setup:
    """Where and how a model runs; `tiles` of the VAE's pictures, None for the whole."""

    device: torch.device
    dtype: str
    offload: Offload = "none"
    quantize: Quantization | None = None
    tiles: Tiles | None = None

    @property
    def words(self) -> str:
        """The command line's options that give it."""
        words = [f"--dtype {self.dtype}", f"--offload {self.offload}"]
        words += [f"--quantize {self.quantize}"] if self.quantize else []
        return " ".join(words + ([f"--tiles {self.tiles}"] if self.tiles else []))


@dataclass(frozen=True)
class Stage:
    """A stage of a generation: its time, of all clips, and what it holds at its fullest."""

    name: str
    seconds: float
    bytes: int


@dataclass(frozen=True)
class Estimate:
    """What a generation will take.

    Attributes:
        stages: "load", "text", "prepare", "denoise", "sound" if the model makes any, "decode",
            "mux", in order. Decoding and muxing overlap: "mux" is the time that it adds.
        setup: that it holds for.
        encoder_s: what encoding the video takes in all, most of it beside decoding.
        kept_frames: that are written, of all clips.
        disk_bytes: at most, of all clips as .mp4 and of their journals.
        measured: False where this machine was never calibrated: then the seconds are only weights.
        notes: what is not counted.
        choice: what was chosen to make it fit, in words; empty where nothing had to be.
    """

    stages: tuple[Stage, ...]
    setup: Setup
    encoder_s: float
    kept_frames: int
    disk_bytes: int
    measured: bool
    notes: tuple[str, ...] = ()
    choice: str = ""

    @property
    def total_s(self) -> float:
        """Seconds of all stages."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def peak_bytes(self) -> int:
        """Bytes above what the program has after its imports, at the fullest moment."""
        return max(stage.bytes for stage in self.stages)

    def as_data(self) -> dict[str, Any]:
        """JSON data."""
        return {
            "stages": [vars(stage) for stage in self.stages], "total_s": self.total_s,
            "encoder_s": self.encoder_s, "peak_bytes": self.peak_bytes,
            "disk_bytes": self.disk_bytes, "measured": self.measured,
            "dtype": self.setup.dtype, "offload": self.setup.offload,
            "quantize": self.setup.quantize, "device": str(self.setup.device),
            "tiles": None if self.setup.tiles is None else str(self.setup.tiles),
            "threads": torch.get_num_threads(),
            "notes": list(self.notes), "choice": self.choice,
        }


def long_text(made: Sequence[Estimate], *, beside: bool = False) -> str | None:
    """What a run takes in time, frames and room on the disk, in a line; None for a short one.

    Args:
        made: what its clips take.
        beside: whether several are made at a time, so that all is over sooner.
    """
    seconds = sum(each.total_s for each in made)
    if seconds <= LONG_S:
        return None
    frames, disk = (sum(getattr(each, name) for each in made)
                    for name in ("kept_frames", "disk_bytes"))
    guess = "" if all(each.measured for each in made) else (
        ", by an ordinary core's rates: `vidgen plan` measures this machine's")
    work = " of work, shared by the workers," if beside else ""
    return (f"this takes about {duration_text(seconds)}{work} for {frames} frames, and up to "
            f"{size_text(disk)} on the disk{guess}")


def duration_text(seconds: float) -> str:
    """A time for people, from minutes on."""
    for unit, length in (("days", 86400), ("hours", 3600)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds / 60:.0f} minutes"
