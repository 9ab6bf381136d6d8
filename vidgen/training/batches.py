"""Batches of a step in order, on a GPU made beside the step before."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from vidgen.training.config import Phase, RunConfig
from vidgen.training.engines.distributed import Place
from vidgen.training.task import Task


class Batches:
    """This rank's micro-batches; if `ahead`, the next one is made in a thread beside the step.

    That is for GPUs: on a CPU making and computing would compete for the same cores.
    """

    def __init__(self, task: Task, run: RunConfig, place: Place, *, ahead: bool) -> None:
        self.task, self.run, self.place = task, run, place
        self.pool = ThreadPoolExecutor(1, "vidgen-batches") if ahead else None
        self.coming: dict[tuple[int, int], Future[Any]] = {}

    def get(self, phase: Phase, step: int, micro: int) -> Any:
        """The batch of this rank's micro-step `micro` (from 0) of a step."""
        if self.pool is None:
            return self._make(phase, step, micro)
        future = self.coming.pop((step, micro), None)
        future = future or self.pool.submit(self._make, phase, step, micro)
        batch = future.result()
        step, micro = (step, micro + 1) if micro + 1 < phase.accumulate else (step + 1, 0)
        if step < self.run.num_steps:
            phase = self.run.phase_at(step)[1]
            self.coming[step, micro] = self.pool.submit(self._make, phase, step, micro)
        return batch

    def _make(self, phase: Phase, step: int, micro: int) -> Any:
        return self.task.batch(phase, step, micro * self.place.data_size + self.place.data_rank)
