"""What a run tells of itself between two lines of its curve."""

from __future__ import annotations

import resource
import sys
import time

import torch


class Window:
    """Means between two log lines."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self.sums: dict[str, float] = {}
        self.count, self.samples, self.since = 0, 0, time.monotonic()

    def add(self, values: dict[str, float], samples: int) -> None:
        """Take in a step's numbers, and how many samples it saw."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.count += 1
        self.samples += samples

    def means(self) -> dict[str, float]:
        """The means since the last call, with samples and seconds; begins anew."""
        elapsed = time.monotonic() - self.since
        result = {name: value / self.count for name, value in self.sums.items()}
        result["samples_per_s"] = self.samples / elapsed
        result["seconds_per_step"] = elapsed / self.count
        self._clear()
        return result


def memory_mb(device: torch.device) -> float:
    """The most memory that this process has taken so far, on its device, in MB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
