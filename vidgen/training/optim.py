"""Optimisers, learning rates and averages of weights for the training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from vidgen.training.config import OptimConfig

_muon = partial(torch.optim.Muon, adjust_lr_fn="match_rms_adamw")


def build_optimizers(
    modules: Mapping[str, nn.Module], config: OptimConfig,
    use_muon: Callable[[str, nn.Parameter], bool] = lambda _name, _parameter: False,
    make_muon: Callable[..., torch.optim.Optimizer] = _muon,
) -> list[torch.optim.Optimizer]:
    """Return AdamW for all trainable parameters, or Muon for the matrices `use_muon` selects.

    Vectors (biases, gains, modulation tables) have no weight decay. Muon, used if `muon_lr` is
    set, has updates scaled to AdamW's (Liu et al. 2025, eq. 4).
    """
    muon, matrices, vectors = (list[nn.Parameter]() for _ in range(3))
    for name, parameter in named_parameters(modules).items():
        # Gains [C, 1, 1, 1] and modulation tables [1, 6, D] count as vectors.
        shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3's `shape` is [0]
        is_matrix = len(shape) > 1 and min(shape[0], shape[1:].numel()) > 1
        if is_matrix and config.muon_lr and use_muon(name, parameter):
            muon.append(parameter)
        else:
            (matrices if is_matrix else vectors).append(parameter)
    groups = [{"params": matrices, "weight_decay": config.weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)]
    if muon and config.muon_lr:
        optimizers.append(make_muon(muon, lr=config.muon_lr, weight_decay=config.weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def set_lr(optimizers: list[torch.optim.Optimizer], scale: float) -> None:
    """Set every group's rate to `scale` times its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * scale


class EMA:
    """Hold float32 running means of weights: shadow = decay * shadow + (1 - decay) * weight.

    The decay warms up as (1 + step) / (10 + step), so that early averages forget the random start.
    `live` has the parameters, or this rank's shards of them.
    """

    def __init__(self, live: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self._live = dict(live)
        self.shadow = {name: p.detach().clone().float() for name, p in self._live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the means with the weights after optimiser step `step` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        live = [p.detach() for p in self._live.values()]
        torch._foreach_lerp_(list(self.shadow.values()), live, 1 - decay)

    @torch.no_grad()
    def restart(self) -> None:
        """Set the means to the live weights, after a task has changed those itself."""
        for name, p in self._live.items():
            self.shadow[name].copy_(p)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Put the means into the live weights inside the block."""
        backup = {name: p.detach().clone() for name, p in self._live.items()}
        self._fill(self.shadow)
        try:
            yield
        finally:
            self._fill(backup)

    @torch.no_grad()
    def _fill(self, values: Mapping[str, Tensor]) -> None:
        for name, p in self._live.items():
            p.copy_(values[name])


def named_parameters(modules: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Return the trainable parameters of all modules, named `module.parameter`."""
    return {f"{key}.{name}": p for key, module in modules.items()
            for name, p in module.named_parameters() if p.requires_grad}
