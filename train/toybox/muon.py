"""Muon for matrices and convolutions, on processors without bf16, too.

torch's own takes matrices alone, and computes in bf16 everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from vidgen.core.runtime import best_dtype


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
