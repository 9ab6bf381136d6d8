"""The place of this process among the ranks of a run, and their communication.

torchrun or the deepspeed launcher starts one process a device and tells it its place by environment
variables; without them there is one process. `join_ranks` comes before anything of a run is made.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from vidgen.core.errors import DeviceError, InputError, VidgenError
from vidgen.core.runtime import choose_device, given_rank
from vidgen.ops.parallel import Ranks
from vidgen.pipeline.parallel.ipc import is_loss
from vidgen.training.config import RunConfig

T = TypeVar("T")
_FAILURE = "failure"  # key of a failed rank's reason in the store
TIMEOUT = timedelta(minutes=30)
"""After which a rank that lives but answers no more ends the others. A dead one's connections
break at once; where NCCL waits nevertheless, the launcher ends the others."""
GRACE_S, REASON_S = 5.0, 30.0
"""Waits for the reason of a rank whose connections broke, and of one that may be clearing up."""


class LostRankError(DeviceError):
    """Another rank can't go on; its reason is on the way."""


@dataclass(frozen=True)
class Place:
    """A process among the ranks."""

    rank: int = 0  # of this process
    size: int = 1  # number of ranks
    sequence: int = 1  # ranks that hold one sample together
    # those that share this one's samples, for `SpacetimeDiT(..., ranks=...)`, or None
    ranks: Ranks | None = field(default=None, compare=False)

    @property
    def main(self) -> bool:
        """Whether this is the rank that writes and speaks for all."""
        return self.rank == 0

    @property
    def data_size(self) -> int:
        """Number of micro-batches that are made at once."""
        return self.size // self.sequence

    @property
    def data_rank(self) -> int:
        """Number of this rank's among them."""
        return self.rank // self.sequence

    def told(self, what: T) -> list[T]:
        """Return the objects of all ranks, in their order."""
        if self.size == 1:
            return [what]
        boxes = [what] * self.size
        dist.all_gather_object(boxes, what)
        return boxes

    def said(self, what: str = "") -> str:
        """Return the main rank's text on all ranks."""
        return self.told(what)[0]

    def mean(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the ranks' mean of named scalars, the same on all; the names must be, too."""
        both = torch.stack([value.detach().double().cpu() for value in values.values()])
        if self.size > 1:
            dist.all_reduce(both)
        return dict(zip(values, (both / self.size).tolist(), strict=True))

    def any(self, *flags: bool) -> list[bool]:
        """Return for each flag whether it is up on any rank, the same on all."""
        if self.size == 1:
            return list(flags)
        both = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(both, dist.ReduceOp.MAX)
        return [bool(flag) for flag in both]

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.any(False)


_places = [Place()]
_joined = itertools.count()


def current_place() -> Place:
    """Return this process's place in the run that it has joined; alone where it has joined none."""
    return _places[-1]


@contextmanager
def join_ranks(run: RunConfig) -> Iterator[Place]:
    """Take this process's place among the ranks that a launcher started; give it back on leaving.

    Raises:
        InputError: settings that don't go with the number of ranks or GPUs.
        DeviceError: another rank failed; names it and its reason.
    """
    given = given_rank()
    rank, size = given or (0, 1)
    sequence = check_sharing(run, size)
    if given is None and run.engine.deepspeed is None:
        yield _places[-1]
        return
    device = own_device(run.device)
    store: dist.Store = dist.HashStore()
    if given is not None:
        store, *_ = next(iter(dist.rendezvous("env://", timeout=TIMEOUT)))
    store = dist.PrefixStore(f"run-{next(_joined)}", store)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                            timeout=TIMEOUT, store=store, rank=rank, world_size=size)
    ranks = None
    if sequence > 1:
        groups = [dist.new_group(range(i, i + sequence)) for i in range(0, size, sequence)]
        ranks = Ranks(groups[rank // sequence])
    _places.append(Place(rank, size, sequence, ranks))
    failed = True
    try:
        with _reported(store, rank, size):
            yield _places[-1]
        failed = False
    finally:
        _places.pop()
        if not (failed and size > 1 and device.type == "cuda"):  # NCCL would wait for the others
            dist.destroy_process_group()


def check_sharing(run: RunConfig, size: int) -> int:
    """Return how many ranks hold a sample together, of `size` in all.

    Raises:
        InputError: it doesn't divide their number.
    """
    sequence = run.engine.sequence
    if size % sequence:
        raise InputError(
            f"engine.sequence is {sequence} on {size} rank{'s' * (size > 1)}; it must divide their "
            "number: start another number by torchrun --nproc-per-node, plan for another one by "
            "--ranks, or set engine.sequence")
    return sequence


def own_device(name: str) -> torch.device:
    """Return the device called `name` for this rank: of several GPUs the one of its local rank.

    Raises:
        InputError: no such device, or one that would be every rank's.
    """
    device = choose_device(name)
    if device.type == "cuda" and given_rank() is not None:
        if device != torch.device("cuda"):  # one of them, by its number
            raise InputError(f"device {name!r} would be every rank's; give auto, cuda or cpu")
        device = choose_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(device)
    return device


@contextmanager
def _reported(store: dist.Store, rank: int, size: int) -> Iterator[None]:
    """Leave an error's text for the other ranks, and replace the loss of one by its reason."""
    try:
        yield
    except BaseException as error:
        if is_loss(error) or isinstance(error, LostRankError):
            wait_s = REASON_S if isinstance(error, LostRankError) else GRACE_S
            raise DeviceError(_find_reason(store, rank, size, wait_s)) from error
        text = str(error) if isinstance(error, VidgenError) else f"{type(error).__name__}: {error}"
        with suppress(dist.DistError):
            store.set(_FAILURE, f"rank {rank} of {size} failed: {text}")
        raise


def _find_reason(store: dist.Store, rank: int, size: int, wait_s: float) -> str:
    """Return what a rank that failed has left; of ranks that leave nothing, that they are gone."""
    silent = [0]  # the store is unreachable where it ended with rank 0
    with suppress(dist.DistError):
        store.set(f"lost/{rank}", "")
        try:
            store.wait([_FAILURE], timedelta(seconds=wait_s))
            return store.get(_FAILURE).decode()
        except dist.DistStoreError:  # in all that time nobody has left one
            silent = [other for other in range(size) if not store.check([f"lost/{other}"])]
    if not silent:
        return f"the {size} ranks lost each other, though all of them still run"
    return (f"rank {' or '.join(map(str, silent))} of {size} is gone: killed, maybe for lack of "
            "memory, or its machine can't be reached")
