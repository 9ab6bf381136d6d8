"""Where this process stands among the ranks of a run, and what they say to each other.

torchrun or the deepspeed launcher starts one process a device and tells it its place by environment
variables; without them there is one process. `join_ranks` comes before anything of a run is made.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from vidgen.core.errors import DeviceError, InputError, VidgenError
from vidgen.core.runtime import choose_device, given_rank
from vidgen.ops.parallel import Ranks
from vidgen.pipeline.parallel.ipc import is_loss, torchrun_place
from vidgen.training.config import RunConfig
from vidgen.training.engines.lifeline import Lifeline

TIMEOUT = timedelta(minutes=30)
"""After which a rank that lives but answers no more ends the others; dead ones do so at once."""
REASON_S = 30.0
"""How long a rank waits for the reason of one that it has lost: that one may be clearing up."""


class LostRankError(DeviceError):
    """Another rank can't go on; its reason is on the way."""


@dataclass(frozen=True)
class Place:
    """A process among the ranks.

    Args:
        rank: of this process.
        size: number of ranks.
        sequence: ranks that hold one sample together.
        ranks: those that share this one's samples, for `SpacetimeDiT(..., ranks=...)`, or None.
    """

    rank: int = 0
    size: int = 1
    sequence: int = 1
    ranks: Ranks | None = field(default=None, compare=False)

    @property
    def main(self) -> bool:
        """Whether this is the rank that writes and speaks for all."""
        return self.rank == 0

    @property
    def data_size(self) -> int:
        """How many micro-batches are made at once."""
        return self.size // self.sequence

    @property
    def data_rank(self) -> int:
        """Which of them is this rank's."""
        return self.rank // self.sequence

    def mean(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """The ranks' mean of named scalars, the same on all; the names must be, too."""
        if self.size == 1:
            return {name: float(value) for name, value in values.items()}
        both = torch.stack([value.detach().double().cpu() for value in values.values()])
        dist.all_reduce(both)
        return dict(zip(values, (both / self.size).tolist(), strict=True))

    def any(self, *flags: bool) -> list[bool]:
        """For each flag whether it is up on any rank, the same on all."""
        if self.size == 1:
            return list(flags)
        both = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(both, dist.ReduceOp.MAX)
        return [bool(flag) for flag in both]

    def said(self, what: str = "") -> str:
        """What the main rank says, heard by all."""
        if self.size == 1:
            return what
        box = [what]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def told(self, what: list[str]) -> list[str]:
        """What all ranks have to tell, in their order; heard by all."""
        if self.size == 1:
            return what
        boxes: list[list[str]] = [[] for _ in range(self.size)]
        dist.all_gather_object(boxes, what)
        return [item for box in boxes for item in box]

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.any(False)


_ALONE = Place()
_places: list[Place] = []
_joined = itertools.count()


def current_place() -> Place:
    """This process's place in the run that it has joined; alone where it has joined none."""
    return _places[-1] if _places else _ALONE


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
        yield _ALONE
        return
    device = own_device(run.device)
    store: dist.Store = dist.HashStore() if given is None else torchrun_place()[0]
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT,
        store=dist.PrefixStore(f"run-{next(_joined)}", store), rank=rank, world_size=size,
    )
    lifeline = None if given is None else Lifeline(rank, size)
    _places.append(Place(rank, size, sequence, _sharers(rank, size, sequence, device)))
    try:
        with _told_to(lifeline):
            yield _places[-1]
    finally:
        _places.pop()
        if lifeline is not None:
            lifeline.close()
        dist.destroy_process_group()


def check_sharing(run: RunConfig, size: int) -> int:
    """How many ranks hold a sample together, of `size` in all.

    Raises:
        InputError: it doesn't divide their number.
    """
    sequence = run.engine.sequence
    if size % sequence:
        raise InputError(
            f"engine.sequence is {sequence} on {size} rank{'s' * (size > 1)}; it must divide their "
            "number: start another number by torchrun --nproc-per-node, plan for another one by "
            "--ranks, or set engine.sequence"
        )
    return sequence


def own_device(name: str) -> torch.device:
    """The device called `name` for this rank: of several GPUs the one of its local rank.

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


def _sharers(rank: int, size: int, sequence: int, device: torch.device) -> Ranks | None:
    if sequence == 1:
        return None
    groups = [dist.new_group(range(i, i + sequence)) for i in range(0, size, sequence)]
    return Ranks(groups[rank // sequence], device)


@contextmanager
def _told_to(lifeline: Lifeline | None) -> Iterator[None]:
    """An error inside ends the other ranks, too; the loss of another one is told by its reason."""
    try:
        yield
    except BaseException as error:
        if lifeline is None:
            raise
        if is_loss(error) or isinstance(error, LostRankError):
            reason = lifeline.reason(wait_s=REASON_S)
            if reason is not None:
                raise DeviceError(reason) from error
        text = str(error) if isinstance(error, VidgenError) else f"{type(error).__name__}: {error}"
        lifeline.fail(text)
        raise
