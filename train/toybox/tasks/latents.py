"""Cached latents: numbered safetensors shards under a manifest that says what made them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from vidgen.core.errors import InputError
from vidgen.core.runtime import atomic_path, given_rank
from vidgen.training.data.cache import require_manifest


class LatentShards:
    """A folder of shards, each a mapping of tensors with one row a clip.

    Args:
        folder: where `manifest.json` and `shard-00000.safetensors`, ... lie.
        manifest: what shaped the latents (VAE hash, geometry, world version); a folder written
            under another manifest is refused, never mixed.

    Raises:
        InputError: the folder's manifest differs.
    """

    def __init__(self, folder: str | Path, manifest: dict[str, Any]) -> None:
        self.folder = Path(folder)
        require_manifest(self.folder, manifest)

    def path(self, index: int) -> Path:
        """File of shard `index`."""
        return self.folder / f"shard-{index:05d}.safetensors"

    def missing(self, count: int, dealt: int = 0) -> list[int]:
        """Which of the first `count` shards this process has still to make.

        Of the processes that torchrun started, each makes every so-manyth, counted on from the
        `dealt` ones of other folders, so that small folders don't all fall to the first process.
        """
        rank, size = given_rank() or (0, 1)
        own = range((rank - dealt) % size, count, size)
        return [index for index in own if not self.path(index).exists()]

    def write(self, index: int, tensors: dict[str, torch.Tensor]) -> None:
        """Write a shard atomically."""
        with atomic_path(self.path(index)) as temporary:
            save_file({name: t.contiguous() for name, t in tensors.items()}, temporary)

    def load(self, count: int) -> dict[str, torch.Tensor]:
        """The first `count` shards, joined along rows.

        Raises:
            InputError: fewer are there.
        """
        present = sum(self.path(index).exists() for index in range(count))
        if present < count:
            raise InputError(f"{self.folder} holds {present} of the {count} shards asked for; "
                             "make the rest first (train/toybox/cache.py)")
        shards = [load_file(self.path(index)) for index in range(count)]
        return {name: torch.cat([shard.pop(name) for shard in shards]) for name in list(shards[0])}
