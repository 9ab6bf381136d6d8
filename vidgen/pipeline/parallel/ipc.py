"""Groups of ranks that compute together, and the division of work among them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from vidgen.core.errors import InputError
from vidgen.core.runtime import environment
from vidgen.diffusion.guidance import BRANCHES
from vidgen.diffusion.state import moved
from vidgen.ops.parallel import Ranks
from vidgen.pipeline.denoise import denoisers

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from vidgen.core.protocols import Denoise
    from vidgen.diffusion.cache import StepCaches
    from vidgen.diffusion.state import LatentState
    from vidgen.pipeline.loader import ModelLoader
    from vidgen.pipeline.types import Contexts, Loras, Plan

TIMEOUT = timedelta(minutes=30)
"""Time after which a rank that runs without an answer counts as failed."""
_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"


@dataclass(frozen=True)
class Division:
    """Layout of ranks: `guidance` groups, one per prompt, of `sequence` ranks each."""

    guidance: int
    sequence: int

    def branch(self, rank: int) -> int:
        """Return a rank's group: 0 computes under the prompt, 1 under the negative prompt."""
        return rank // self.sequence

    def branches(self, rank: int) -> tuple[str, ...]:
        """Return the names of the branches that a rank's group computes."""
        return BRANCHES if self.guidance == 1 else (BRANCHES[self.branch(rank)],)

    def contexts(self, contexts: Contexts, rank: int) -> Contexts:
        """Return the contexts of a rank's group."""
        return contexts if self.guidance == 1 else [contexts[self.branch(rank)]]

    def turns(self, wanted: Sequence[int], rank: int, *, shard: bool) -> list[int]:
        """Return the indices, among a rank's own contexts, of the wanted ones that it computes.

        With sharded weights it always computes, since all ranks need each other's weights.
        """
        if self.guidance == 1:
            return [*wanted]
        return [0] if shard or self.branch(rank) in wanted else []


def divide(devices: int, num_heads: int, *, guided: bool) -> Division:
    """Divide devices by guidance, whose halves communicate once a step, then by tokens.

    More ranks for one sequence than the model has heads raise InputError.
    """
    guidance = 2 if guided and devices % 2 == 0 else 1
    sequence = devices // guidance
    if sequence > num_heads:
        limit = f"{num_heads} devices" + (f", {2 * num_heads} with guidance" if guided else "")
        raise InputError(f"{devices} devices can't share a model of {num_heads} attention heads; "
                         f"give at most {limit}")
    return Division(guidance, sequence)


def stretches(begin: int, end: int, num_ranks: int, look_back: int) -> list[tuple[int, int]]:
    """Divide the latent frames `begin` to `end` among ranks so that all finish at the same time.

    Return [first, last) of each rank, empty for ranks that would make it no faster. Each rank also
    decodes the `look_back` frames before its stretch that the decoder depends on; the first rank
    has none, so its stretch is the longest.
    """
    places = [begin]
    for cost in range(1, end + 1):
        places = [begin]
        for _ in range(num_ranks):
            last = places[-1]
            places.append(last + max(0, min(cost - min(last, look_back), end - last)))
        if places[-1] == end:
            break
    return list(pairwise(places))


@dataclass(frozen=True)
class Share:
    """Hold everything that a rank needs to denoise, except the latents of each call."""

    plan: Plan
    state: LatentState
    contexts: Contexts  # of the prompt and, with guidance, the negative prompt
    loras: Loras
    level: float  # the sigma at which sampling begins
    division: Division
    threads: int  # of rank 0
    caches: StepCaches | None = None  # without memory
    remembered: Mapping[str, Tensor] = field(default_factory=dict)  # memory of all ranks' caches


class Channel:
    """Connection of this process to the ranks of one machine; all create it at the same time."""

    def __init__(self, store: dist.Store, rank: int, size: int, device: torch.device) -> None:
        self.rank, self.size, self.device = rank, size, device
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        with environment(**dict.fromkeys(_INTERFACES, _LOOPBACK)):
            dist.init_process_group(backend, store=dist.PrefixStore("group", store), rank=rank,
                                    world_size=size, timeout=TIMEOUT)
            self.whole, self._half = Ranks(), None
            if size > 2 and size % 2 == 0:
                half = size // 2
                groups = [dist.new_group(range(first, first + half)) for first in (0, half)]
                self._half = Ranks(groups[rank // half])

    def ranks(self, division: Division) -> Ranks | None:
        """Return the ranks that share a sequence with this one, or None."""
        if division.sequence == 1:
            return None
        return self.whole if division.guidance == 1 else self._half

    @cached_property
    def mesh(self) -> DeviceMesh:
        """All ranks in a row, to shard weights over; created by all at the same time."""
        from torch.distributed.device_mesh import init_device_mesh

        return init_device_mesh(self.device.type, (self.size,))


def is_loss(error: BaseException) -> bool:
    """Return whether an error means that another rank can't be reached."""
    is_gloo = isinstance(error, RuntimeError) and "gloo" in str(error).lower()
    return is_gloo or isinstance(error, dist.DistError)


@contextmanager
def shared_denoisers(
    loader: ModelLoader, share: Share, channel: Channel, *, shard: bool
) -> Iterator[list[Denoise]]:
    """Yield the model under each context of this rank's group.

    The caches restore their part of the shared memory and follow rank 0's decisions. With sharded
    weights all ranks run the same blocks at every step, so all of them must agree.
    """
    division, caches, rank = share.division, share.caches, channel.rank
    if caches is not None:
        branches_at = caches.branches_at
        assert branches_at is not None

        def agree(sigma: float, near: bool) -> bool:
            by_all = shard or len(branches_at(sigma)) == division.guidance
            ranks = channel.whole if by_all else channel.ranks(division)
            if ranks is None:
                return near
            answer = torch.tensor([near], dtype=torch.uint8)
            dist.broadcast(answer, src=0, group=ranks.group)
            return bool(answer)

        caches.agree = agree
        caches.memories.clear()
        caches.restore(moved(share.remembered, channel.device), division.branches(rank))
    with denoisers(loader, share.plan, share.state, division.contexts(share.contexts, rank),
                   share.loras, share.level, channel.ranks(division), caches,
                   branches=division.branches(rank)) as made:
        yield made
