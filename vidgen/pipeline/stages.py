"""What a generation will take, as plain values: how it runs, its stages, and their sums."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from vidgen.core.runtime import megabytes
from vidgen.pipeline.parts import Offload

if TYPE_CHECKING:
    from vidgen.core.shapes import Tiles
    from vidgen.weights.quantize import Quantization


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
        measured: False where this machine was never calibrated: then the seconds are only weights.
        notes: what is not counted.
        choice: what was chosen to make it fit, in words; empty where nothing had to be.
    """

    stages: tuple[Stage, ...]
    setup: Setup
    encoder_s: float
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
            "encoder_s": self.encoder_s, "peak_bytes": self.peak_bytes, "measured": self.measured,
            "dtype": self.setup.dtype, "offload": self.setup.offload,
            "quantize": self.setup.quantize, "device": str(self.setup.device),
            "tiles": None if self.setup.tiles is None else str(self.setup.tiles),
            "threads": torch.get_num_threads(),
            "notes": list(self.notes), "choice": self.choice,
        }


def size_text(num_bytes: int) -> str:
    """A size for people."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else megabytes(num_bytes)
