"""Tensors in a job's files: a sampler between two steps, and the finished windows of a long clip.

Axes: B batch, C latent channels, n latent frames, h w latent rows and columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidgen.core.protocols import SamplerState
from vidgen.pipeline.journal.job import STATE, counted_paths, read_arrays, window_path

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_HISTORY, _CACHE = "history.", "cache."


@dataclass(frozen=True)
class Kept:
    """How far an earlier process came with the latents of a job.

    Attributes:
        num_windows: finished windows of a long clip.
        done: [1, C, n, h, w] float32 of them, on the CPU; or None.
        state: where the sampler goes on from behind them, or None.
        latents: [1, C, F, h, w] float32 of a finished sampler, or None.
    """

    num_windows: int
    done: Tensor | None
    state: SamplerState | None = None
    latents: Tensor | None = None

    @property
    def num_done(self) -> int:
        """Latent frames of `done`."""
        return 0 if self.done is None else self.done.shape[2]


def read_kept(folder: Path, device: torch.device | str) -> Kept:
    """What a job keeps of latents, `state` and `latents` on a device.

    Raises:
        InputError: a file is damaged.
    """
    import torch

    windows = counted_paths(folder, window_path)
    kept = Kept(len(windows), read_windows(windows))
    if (path := folder / STATE).is_file():
        arrays, facts = read_arrays(path, "latents")
        tensors = {name: torch.from_numpy(each).to(device) for name, each in arrays.items()}
        if facts.get("finished"):
            return replace(kept, latents=tensors["latents"])
        if facts["behind"] == kept.num_done:  # else of a window that was finished since
            return replace(kept, state=state_of(facts["step"], tensors))
    return kept


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


def read_windows(paths: Sequence[Path]) -> Tensor | None:
    """A job's finished windows, joined: latents [B, C, n, h, w], or None without any.

    Raises:
        InputError: one is damaged.
    """
    import torch

    found = [torch.from_numpy(read_arrays(path, "latents")[0]["latents"]) for path in paths]
    return torch.cat(found, dim=2) if found else None
