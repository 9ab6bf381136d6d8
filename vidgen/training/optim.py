"""Optimisers and the learning-rate schedule of the one training loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from vidgen.training.config import OptimConfig
from vidgen.training.ema import named_parameters


def lr_scale(config: OptimConfig, step: int) -> float:
    """Multiplier of the peak rate at `step`: linear warm-up, constant trunk, 1 - sqrt decay."""
    scale = min(1.0, (step + 1) / max(1, config.warmup_steps))
    if config.decay_from is not None and step >= config.decay_from:
        progress = (step - config.decay_from + 1) / max(1, config.decay_steps)
        scale *= max(0.0, 1.0 - min(1.0, progress) ** 0.5)
    return scale


def build_optimizers(
    modules: Mapping[str, nn.Module],
    config: OptimConfig,
    use_muon: Callable[[str, nn.Parameter], bool] = lambda _name, _parameter: False,
) -> list[torch.optim.Optimizer]:
    """AdamW for all, or Muon (Jordan et al. 2024) for the matrices that `use_muon` names.

    Weight decay is kept off vectors (biases, gains), as is usual.
    """
    muon, matrices, vectors = [], [], []
    for name, parameter in named_parameters(modules).items():
        if parameter.ndim == 2 and config.muon_lr and use_muon(name, parameter):
            muon.append(parameter)
        else:
            (matrices if parameter.ndim > 1 else vectors).append(parameter)
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
    ]
    if muon:
        optimizers.append(
            torch.optim.Muon(
                muon,
                lr=config.muon_lr,
                weight_decay=config.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def set_lr(optimizers: list[torch.optim.Optimizer], scale: float) -> None:
    """Set every group's rate to `scale` times its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * scale
