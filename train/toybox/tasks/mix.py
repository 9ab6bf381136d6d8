"""Shares of the conditions in training, as the embedded model's configs give them."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from vidgen.core.errors import InputError
from vidgen.core.shapes import Strides
from vidgen.diffusion.condition import KINDS, Given, draw_conditions


@dataclass(frozen=True)
class ConditionMix:
    """Frequencies of the conditions in training; the weights needn't sum to 1.

    Attributes:
        text: nothing but the caption; the others are `KINDS`, too.
        reference: probability that a sample gets its reference stills, whatever else was drawn.
    """

    text: float = 0.60
    first: float = 0.15
    last: float = 0.05
    both: float = 0.05
    frames: float = 0.05
    prefix: float = 0.10
    mask: float = 0.05
    reference: float = 0.5

    def __post_init__(self) -> None:
        for name in (*KINDS, "reference"):
            weight = getattr(self, name)
            if not 0 <= weight < float("inf"):
                raise InputError(f"condition {name!r} must have a weight from 0, not {weight}")
        if self.reference > 1:
            raise InputError(f"the share of references must lie in 0..1, not {self.reference}")

    def draw(
        self, size: tuple[int, int, int, int], generator: torch.Generator, strides: Strides, *,
        frame_index: Tensor | None = None, patch: int = 1,
    ) -> Given:
        """Draw a condition for each sample; see `draw_conditions`."""
        return draw_conditions(size, generator, asdict(self), strides, patch=patch,
                               reference=self.reference, frame_index=frame_index)
