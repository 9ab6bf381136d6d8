"""What a run tells of itself between two lines of its curve."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping

import torch


class Window:
    """Means between two log lines.

    A checkpoint keeps sums and count, so that a curve goes on as if nothing had happened; speed is
    that of this process alone.

    Args:
        sums: of each number, of the steps so far.
        count: how many those are.
    """

    def __init__(self, sums: Mapping[str, float] | None = None, count: int = 0) -> None:
        self.sums, self.count = dict(sums or {}), count
        self._steps, self._samples, self._since = 0, 0, time.monotonic()

    def add(self, values: Mapping[str, float], samples: int) -> None:
        """Take in a step's numbers, and how many samples it saw."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.count += 1
        self._steps += 1
        self._samples += samples

    def means(self) -> dict[str, float]:
        """The means so far, with samples and seconds."""
        elapsed = time.monotonic() - self._since
        result = {name: value / self.count for name, value in self.sums.items()}
        result["samples_per_s"] = self._samples / elapsed
        result["seconds_per_step"] = elapsed / max(self._steps, 1)
        return result


def memory_mb(device: torch.device) -> float:
    """The most memory that this process has taken so far, on its device, in MB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
