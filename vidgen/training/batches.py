"""Batches of a step in order, on a GPU made beside the steps before."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from vidgen.training.config import Phase, RunConfig
from vidgen.training.engines.distributed import Place
from vidgen.training.task import Task

WORKERS = 14
"""Most processes that make a small network's batches: one batch takes as long as several steps."""

_Key = tuple[int, int]


class _ByKey(Dataset[Any]):
    """Micro-batches by (step, micro)."""

    def __init__(self, make: Callable[[int, int], Any]) -> None:
        self.make = make

    def __getitem__(self, key: _Key) -> Any:
        return self.make(*key)


class Batches:
    """This rank's micro-batches; if `ahead`, the next ones are made beside the step.

    That is for GPUs: on a CPU making and computing would compete for the same cores. What a task
    makes on the CPU is made in processes, all else in one thread.
    """

    def __init__(self, task: Task, run: RunConfig, place: Place, *, ahead: bool) -> None:
        self.task, self.run, self.place = task, run, place
        forks = ahead and getattr(task, "makes_on_cpu", False)
        self.pool = ThreadPoolExecutor(1, "vidgen-batches") if ahead and not forks else None
        self.loader = _ByKey(self._make) if forks else None
        self.coming: dict[_Key, Future[Any]] = {}
        self.stream: tuple[Iterator[_Key], Iterator[Any]] | None = None

    def get(self, step: int, micro: int) -> Any:
        """The batch of this rank's micro-step `micro` (from 0) of a step."""
        if self.loader is not None:
            return self._loaded(self.loader, step, micro)
        if self.pool is None:
            return self._make(step, micro)
        future = self.coming.pop((step, micro), None)
        future = future or self.pool.submit(self._make, step, micro)
        batch = future.result()
        following = next(islice(self._from(step, micro), 1, None), None)
        if following is not None:
            self.coming[following] = self.pool.submit(self._make, *following)
        return batch

    def _loaded(self, batches: _ByKey, step: int, micro: int) -> Any:
        """The next one of the processes, which begin anew where another one is asked for."""
        if self.stream is None or next(self.stream[0], None) != (step, micro):
            keys = self._from(step, micro)
            next(keys)
            spare = (os.cpu_count() or 1) - 2
            loader = DataLoader(
                batches, batch_size=None, sampler=self._from(step, micro),
                num_workers=max(1, min(WORKERS, spare)), multiprocessing_context="fork",
                generator=torch.Generator(),  # else it would draw from the run's own
            )
            self.stream = keys, iter(loader)
        return next(self.stream[1])

    def _from(self, step: int, micro: int) -> Iterator[_Key]:
        """Micro-steps from one on, to the end of the run."""
        while step < self.run.num_steps:
            for later in range(micro, self.run.phase_at(step)[1].accumulate):
                yield step, later
            step, micro = step + 1, 0

    def _make(self, step: int, micro: int) -> Any:
        phase: Phase = self.run.phase_at(step)[1]
        return self.task.batch(phase, step, micro * self.place.data_size + self.place.data_rank)
