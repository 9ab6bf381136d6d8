"""The laboratory's Muon: which weights it takes, and what its updates are."""

from __future__ import annotations

import torch
from torch import nn

from train.toybox.muon import Muon, orthogonalized
from vidgen.training.config import OptimConfig
from vidgen.training.optim import build_optimizers


def test_vectors_are_spared_muon_and_weight_decay() -> None:
    net = nn.ParameterDict({
        "kernel": torch.zeros(4, 3, 1, 3, 3), "gain": torch.zeros(4, 1, 1, 1),
        "table": torch.zeros(1, 6, 8), "matrix": torch.zeros(4, 8), "bias": torch.zeros(4),
    })
    config = OptimConfig(muon_lr=1e-3, weight_decay=0.1)
    adamw, muon = build_optimizers({"net": net}, config, use_muon=lambda *_: True, make_muon=Muon)
    assert {tuple(p.shape) for p in muon.param_groups[0]["params"]} == {(4, 3, 1, 3, 3), (4, 8)}
    assert len(adamw.param_groups[1]["params"]) == 3
    assert adamw.param_groups[1]["weight_decay"] == 0


def test_orthogonalized_brings_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((3, 16, 40), (2, 40, 16)):
        values = torch.linalg.svdvals(orthogonalized(torch.randn(shape)))
        assert values.min() > 0.6
        assert values.max() < 1.3


def test_matrices_learn_as_by_torchs_own() -> None:
    torch.manual_seed(0)
    config = OptimConfig(lr=1e-2, muon_lr=1e-2, weight_decay=0.1)
    first = nn.Linear(16, 8)
    second = nn.Linear(16, 8)
    second.load_state_dict(first.state_dict())
    for net, options in ((first, {}), (second, {"make_muon": Muon})):
        optimizers = build_optimizers({"net": net}, config, lambda *_: True, **options)
        for step in range(3):
            x = torch.randn(4, 16, generator=torch.Generator().manual_seed(step))
            net(x).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    torch.testing.assert_close(first.weight, second.weight, rtol=0.02, atol=2e-3)
