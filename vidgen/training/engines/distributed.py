"""Rank and communication of this process in a run.

torchrun or the deepspeed launcher starts one process per device and sets its rank in environment
variables; without those the run is a single process. `join_ranks` is called first in a run.
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
"""Limit for a rank that hangs, after which the other ranks fail. Connections of a dead rank break
at once; where NCCL waits nevertheless, the launcher ends the other ranks."""
GRACE_S, REASON_S = 5.0, 30.0
"""Seconds to wait for the reason of a failed rank: after a broken connection, and after a
`LostRankError`, when the other rank may still be cleaning up."""


class LostRankError(DeviceError):
    """Another rank failed; `join_ranks` replaces this error by one with the reason."""


@dataclass(frozen=True)
class Place:
    """The rank of a process, and its communication with the others."""

    rank: int = 0  # from 0 to `size` - 1
    size: int = 1  # number of ranks
    sequence: int = 1  # number of ranks that share each sample's tokens
    # the ranks that share this one's samples, for `SpacetimeDiT(..., ranks=...)`
    ranks: Ranks | None = field(default=None, compare=False)

    @property
    def main(self) -> bool:
        """True for the rank that writes files and reports progress."""
        return self.rank == 0

    @property
    def data_size(self) -> int:
        """Number of groups of ranks with samples of their own."""
        return self.size // self.sequence

    @property
    def data_rank(self) -> int:
        """Index of this rank's group, from 0 to `data_size` - 1."""
        return self.rank // self.sequence

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, by rank."""
        if self.size == 1:
            return [value]
        values = [value] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_main(self, text: str = "") -> str:
        """Return the main rank's text on all ranks."""
        return self.gather(text)[0]

    def mean(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the mean over the ranks of each scalar; all ranks give the same names."""
        sums = torch.stack([value.detach().double().cpu() for value in values.values()])
        if self.size > 1:
            dist.all_reduce(sums)
        return dict(zip(values, (sums / self.size).tolist(), strict=True))

    def any(self, *flags: bool) -> list[bool]:
        """Return for each flag whether it is true on any rank."""
        if self.size == 1:
            return list(flags)
        highest = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        return [bool(flag) for flag in highest]

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.any(False)


_places = [Place()]
_joined = itertools.count()


def current_place() -> Place:
    """Return this process's place in the run it has joined; a single rank outside of one."""
    return _places[-1]


@contextmanager
def join_ranks(run: RunConfig) -> Iterator[Place]:
    """Join the process group that a launcher started, and leave it after the block.

    Raises:
        InputError: the settings don't fit the number of ranks or GPUs.
        DeviceError: another rank failed; names the rank and its reason.
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
    """Return the number of ranks that share each sample; InputError if it can't divide `size`."""
    sequence = run.engine.sequence
    if size % sequence:
        raise InputError(
            f"engine.sequence is {sequence} on {size} rank{'s' * (size > 1)}; it must divide the "
            "number of ranks: change that by torchrun --nproc-per-node (in a plan by --ranks) or "
            "set engine.sequence")
    return sequence


def own_device(name: str) -> torch.device:
    """Return this rank's device of the kind `name`: on several GPUs, that of its local rank."""
    device = choose_device(name)
    if device.type == "cuda" and given_rank() is not None:
        if device != torch.device("cuda"):  # a GPU by its index
            raise InputError(f"all ranks would use device {name!r}; give auto, cuda or cpu")
        device = choose_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(device)
    return device


@contextmanager
def _reported(store: dist.Store, rank: int, size: int) -> Iterator[None]:
    """Store an error for the other ranks; replace a lost connection by another rank's error."""
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
    """Return the stored text of the rank that failed, or name the ranks that don't respond."""
    silent = [0]  # rank 0 holds the store, so an unreachable store means that rank 0 ended
    with suppress(dist.DistError):
        store.set(f"lost/{rank}", "")
        try:
            store.wait([_FAILURE], timedelta(seconds=wait_s))
            return store.get(_FAILURE).decode()
        except dist.DistStoreError:  # no rank stored a reason in that time
            silent = [other for other in range(size) if not store.check([f"lost/{other}"])]
    if not silent:
        return f"the {size} ranks lost their connections, though all of them still run"
    return (f"rank {' or '.join(map(str, silent))} of {size} doesn't respond: it may have been "
            "killed for lack of memory, or its machine can't be reached")
