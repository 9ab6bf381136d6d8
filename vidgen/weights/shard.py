"""Blocks whose weights are spread over devices: FSDP2 (Zhao et al. 2023), for inference.

Each device holds a share of every block and gets the rest when the block runs. Each reads only its
own share from the files, so no device and no process ever holds the whole.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from vidgen.weights.stream import assign, blocks_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from vidgen.weights.load import Weights


def shard_blocks(
    module: nn.Module, weights: Weights, device: torch.device, mesh: DeviceMesh
) -> None:
    """Give a module's blocks their weights, each device its share.

    Args:
        module: with its blocks on the meta device and all else in place.
        weights: of the module.
        device: this process's.
        mesh: all devices, in a row; the module must run on all of them together.
    """
    resident = {p for p in module.parameters() if not p.is_meta}
    for path, names in blocks_of(weights.names).items():
        for name in names:
            assign(module, name, torch.empty(
                weights.shape(name), dtype=weights.dtype(name), device="meta"
            ))
        block = module.get_submodule(path)
        fully_shard(block, mesh=mesh)
        block.to_empty(device=device)
        shares = dict(block.named_parameters(prefix=path))
        for name in names:
            share = shares[name]
            assert isinstance(share, DTensor)
            own = share.to_local()
            parts = weights.get(name).chunk(mesh.size(), dim=0)  # mapped: only what is read comes
            if own.numel():
                own.copy_(parts[mesh.get_local_rank()])
        weights.store.release()
    fully_shard(module, mesh=mesh, ignored_params=resident)
