"""Exponential moving average of weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """fp32 running mean of every parameter: shadow = decay * shadow + (1 - decay) * weight.

    The decay warms up as (1 + step) / (10 + step), so early averages forget the random start. It is
    elementwise, so where a rank holds a share of each weight it averages its share.

    Args:
        live: what this process holds of each parameter.
        decay: of the mean, once warmed up.
    """

    def __init__(self, live: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self._live = dict(live)
        self.shadow = {name: p.detach().clone().float() for name, p in self._live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimiser step `step` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        live = [p.detach() for p in self._live.values()]
        torch._foreach_lerp_(list(self.shadow.values()), live, 1 - decay)

    @torch.no_grad()
    def restart(self) -> None:
        """Begin again from the live weights, where they were changed by hand."""
        for name, p in self._live.items():
            self.shadow[name].copy_(p)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Within the block the modules hold the averaged weights."""
        backup = {name: p.detach().clone() for name, p in self._live.items()}
        with torch.no_grad():
            for name, p in self._live.items():
                p.copy_(self.shadow[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, p in self._live.items():
                    p.copy_(backup[name])


def named_parameters(modules: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Trainable parameters of all modules, as `module.parameter` names."""
    return {
        f"{key}.{name}": p
        for key, module in modules.items()
        for name, p in module.named_parameters()
        if p.requires_grad
    }
