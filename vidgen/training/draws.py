"""Seeds for what a step draws, so that nothing of it has to be kept."""

from __future__ import annotations

import hashlib

import torch


def seed_of(*values: int) -> int:
    """63 bits that depend on all of the values and on nothing else."""
    digest = hashlib.sha256(repr(values).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator_of(*values: int) -> torch.Generator:
    """A CPU generator whose draws depend on all of the values and on nothing else."""
    return torch.Generator().manual_seed(seed_of(*values))
