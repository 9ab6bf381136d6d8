"""How the size of what a transformer's blocks add to its tokens depends on the noise level."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass

from vidgen.diffusion.guidance import PROMPT


@dataclass(frozen=True)
class Magnitudes:
    """How the size of what a model's blocks add depends on the noise level.

    Attributes:
        sigmas: falling.
        logs: for each branch of guidance the logarithm of the size at each sigma, up to a constant;
            other branches are taken to be like the prompt's.
    """

    sigmas: tuple[float, ...]
    logs: Mapping[str, tuple[float, ...]]

    def ratio(self, branch: str, sigma: float, sigma_next: float) -> float:
        """Size at `sigma_next` over that at `sigma`, interpolated between measured levels."""
        return math.exp(self._log(branch, sigma_next) - self._log(branch, sigma))

    def _log(self, branch: str, sigma: float) -> float:
        rising = self.sigmas[::-1]
        logs = self.logs.get(branch, self.logs[PROMPT])[::-1]
        sigma = min(max(sigma, rising[0]), rising[-1])
        i = max(bisect_left(rising, sigma), 1)
        share = (sigma - rising[i - 1]) / (rising[i] - rising[i - 1])
        return logs[i - 1] + share * (logs[i] - logs[i - 1])
