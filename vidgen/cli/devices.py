"""How many devices a command line is to use."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vidgen.core.runtime import given_rank

if TYPE_CHECKING:
    from vidgen.pipeline.journal import Journal


def choose_devices(args: Namespace, journals: Sequence[Journal]) -> dict[str, Any]:
    """Devices as asked for, as torchrun started them, or as unfinished clips began with.

    On a CPU each gets its share of the threads, unless OMP_NUM_THREADS says how many.
    """
    given = given_rank()
    if not given and all(journal.finished for journal in journals):
        return {"devices": 1, "shard": False}
    began = next((j.recipe["devices"] for j in journals if (j.recipe or {}).get("devices")), {})
    count, shard = args.devices, args.shard
    if count is None:
        count = given[1] if given else began.get("count", 1)
    if shard is None:
        shard = began.get("shard", False)
    if count > 1:
        import torch

        if not (torch.cuda.is_available() or "OMP_NUM_THREADS" in os.environ):
            torch.set_num_threads(max(1, torch.get_num_threads() // count))
    return {"devices": count, "shard": shard}
