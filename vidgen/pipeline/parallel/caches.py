"""Step caches of a clip that several devices denoise: rank 0 decides, each remembers its own part.

Ranks that share a sequence hold a part of its tokens each; of two groups one computes under the
prompt, one under the negative prompt. A rank remembers what it computed and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from torch import Tensor

    from vidgen.diffusion.cache import StepCaches
    from vidgen.pipeline.parallel.link import Division, Link


def tie(
    caches: StepCaches, link: Link, division: Division, remembered: Mapping[str, Tensor], *,
    shard: bool,
) -> None:
    """Have a rank's caches decide as rank 0's do, and remember its part of what was remembered.

    With sharded weights all ranks run the same blocks at every step, so all of them hear.
    """
    assert caches.branches_at is not None
    branches_at = caches.branches_at

    def agree(sigma: float, near: bool) -> bool:
        by_all = shard or len(branches_at(sigma)) == division.guidance
        return link.agreed(near, division, by_all=by_all)

    caches.agree = agree
    caches.memories.clear()
    caches.restore(remembered, division.branches(link.rank))


def collect(caches: StepCaches, link: Link, division: Division) -> dict[str, Tensor]:
    """What all ranks remember, on rank 0's CPU, others' own part there; all ranks call it."""
    own = {name: each.cpu() for name, each in caches.state().items()}
    if division.guidance == 1:
        return own
    first_of_negative = division.sequence
    if link.rank == first_of_negative:
        del own["skips"]
        _send(own)
    return own | _receive(first_of_negative) if link.rank == 0 else own


def _send(tensors: Mapping[str, Tensor]) -> None:
    facts = {name: (each.shape, each.dtype) for name, each in tensors.items()}
    dist.send_object_list([facts], dst=0, device=torch.device("cpu"))
    for each in tensors.values():
        dist.send(_as_bytes(each), dst=0)


def _receive(rank: int) -> dict[str, Tensor]:
    box: list[Any] = [None]
    dist.recv_object_list(box, src=rank, device=torch.device("cpu"))
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in box[0].items()}
    for each in tensors.values():
        dist.recv(_as_bytes(each), src=rank)
    return tensors


def _as_bytes(tensor: Tensor) -> Tensor:
    """A view of any dtype for a back end that doesn't know it."""
    return tensor.contiguous().view(-1).view(torch.uint8)
