"""Tensors in a job's files: a sampler between two steps, and the finished windows of a long clip.

Axes: B batch, C latent channels, n latent frames, h w latent rows and columns, k sound latents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidgen.core.protocols import SamplerState
from vidgen.pipeline.job import read_arrays

if TYPE_CHECKING:
    from torch import Tensor

_HISTORY, _CACHE = "history.", "cache."


def as_array(tensor: Tensor) -> Any:
    """A tensor for numpy, which has no bfloat16; float32 holds that exactly."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.itemsize < 4 else tensor).numpy()


def state_tensors(state: SamplerState) -> dict[str, Tensor]:
    """A sampler's state as tensors by name."""
    tensors = {f"{_HISTORY}{index}": each for index, each in enumerate(state.history)}
    tensors |= {f"{_CACHE}{name}": each for name, each in state.cache.items()}
    return tensors | {"latents": state.latents}


def state_of(step: int, tensors: Mapping[str, Tensor]) -> SamplerState:
    """The state at a step, of which `state_tensors` made these."""
    cache = {name.removeprefix(_CACHE): each for name, each in tensors.items()
             if name.startswith(_CACHE)}
    count = sum(name.startswith(_HISTORY) for name in tensors)
    history = tuple(tensors[f"{_HISTORY}{index}"] for index in range(count))
    return SamplerState(step, tensors["latents"], history, cache)


def read_windows(paths: Sequence[Path]) -> dict[str, Tensor]:
    """A job's finished windows, joined: `latents` [B, C, n, h, w] and `heard` [B, C, k], if any.

    Raises:
        InputError: one is damaged.
    """
    import torch

    found = [read_arrays(path, "latents")[0] for path in paths]
    names = found[0] if found else ()
    return {
        name: torch.cat([torch.from_numpy(each[name]) for each in found], dim=2) for name in names
    }
