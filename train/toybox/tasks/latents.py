"""Cached latents: numbered safetensors shards under a manifest that says what made them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from vidgen.core.errors import InputError
from vidgen.core.runtime import atomic_path, atomic_write, given_rank, write_error


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


def require_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write what shapes a folder's latents, or make sure that it was the same before.

    Raises:
        InputError: latents there were made otherwise, which tells in what; or their manifest is
            damaged.
        OutputError: the folder can't be made.
    """
    path = folder / "manifest.json"
    if not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(folder, error) from None
        atomic_write(path, json.dumps(manifest, indent=1).encode())
        return
    try:
        found = json.loads(path.read_text("utf-8"))
        if not isinstance(found, dict):
            raise TypeError("it is no object")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path}, which says what made the latents there, is damaged ({error}); "
                         "name another folder or delete this one") from None
    told = _differing(found, manifest, sorted({**manifest, **found}))
    if told:
        raise InputError(f"the latents in {folder} were made otherwise ({told}); "
                         "name another folder or delete this one")


def _differing(there: Mapping[str, Any], here: Mapping[str, Any], names: Iterable[str]) -> str:
    return "; ".join(f"{name} is {there.get(name)!r} there, {here.get(name)!r} here"
                     for name in names if there.get(name) != here.get(name))
