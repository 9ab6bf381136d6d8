"""Optimisers, the learning-rate schedule and the averages of weights of the one training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vidgen.core.runtime import best_dtype
from vidgen.training.config import OptimConfig


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made nearly orthogonal (Jordan et al. 2024).

    Convolutions count as matrices [out, in * taps]. The update's root mean square is brought to
    AdamW's, 0.2 (Liu et al. 2025, eq. 4), so that both share a learning rate. `params` have two or
    more axes; `momentum` is of the Nesterov average, `weight_decay` is decoupled.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; matrices of one shape go together."""
        assert closure is None
        for group in self.param_groups:
            shapes: dict[tuple[int, int], list[tuple[nn.Parameter, Tensor]]] = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(state["momentum"], group["momentum"]).flatten(1)
                shapes.setdefault(tuple(update.shape), []).append((parameter, update))
            for (rows, columns), members in shapes.items():
                scale = 0.2 * max(rows, columns) ** 0.5
                whitened = orthogonalized(torch.stack([update for _, update in members]))
                for (parameter, _), update in zip(members, whitened, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.sub_(update.view(parameter.shape), alpha=group["lr"] * scale)


def orthogonalized(matrices: Tensor) -> Tensor:
    """Bring singular values to about 0.7 to 1.2 by five steps of a quintic Newton-Schulz iteration.

    Source: Jordan et al. 2024. `matrices` are [N, rows, columns]; so is the result, in float32, but
    computed in bfloat16 where the device is fast in it.
    """
    wide = matrices.shape[1] <= matrices.shape[2]
    dtype = torch.bfloat16 if best_dtype(matrices.device) == "bf16" else torch.float32
    x: Tensor = (matrices if wide else matrices.mT).to(dtype)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return (x if wide else x.mT).float()


def build_optimizers(
    modules: Mapping[str, nn.Module], config: OptimConfig,
    use_muon: Callable[[str, nn.Parameter], bool] = lambda _name, _parameter: False,
) -> list[torch.optim.Optimizer]:
    """AdamW for all, or Muon for the matrices that `use_muon` names.

    Weight decay is kept off vectors (biases, gains, modulation tables), as is usual.
    """
    muon, matrices, vectors = (list[nn.Parameter]() for _ in range(3))
    for name, parameter in named_parameters(modules).items():
        # Gains [C, 1, 1, 1] and modulation tables [1, 6, D] are vectors in spite of their axes.
        shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3's own is that of a share
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
        optimizers.append(Muon(muon, lr=config.muon_lr, weight_decay=config.weight_decay))
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
    """fp32 running mean of every parameter: shadow = decay * shadow + (1 - decay) * weight.

    The decay warms up as (1 + step) / (10 + step), so early averages forget the random start. It is
    elementwise, so where a rank holds a share of each weight, `live`, it averages its share.
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
    """Trainable parameters of all modules, as `module.parameter` names."""
    return {f"{key}.{name}": p for key, module in modules.items()
            for name, p in module.named_parameters() if p.requires_grad}
