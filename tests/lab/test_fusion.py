"""Functions between matrix products, compiled for all shapes, give what they give plainly."""

from __future__ import annotations

import pytest
import torch

from train.toybox import fusing as module
from train.toybox.fusing import fusing, is_fusing
from vidgen.models.dit import SpacetimeDiT
from vidgen.models.presets import DIT_PRESETS
from vidgen.ops import native, norm


@pytest.fixture
def dit(monkeypatch: pytest.MonkeyPatch) -> SpacetimeDiT:
    """A transformer on a machine without kernels of ours."""
    monkeypatch.setattr(native, "kernels", lambda *_: None)
    torch.manual_seed(0)
    dit = SpacetimeDiT(DIT_PRESETS["tiny"])
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return dit


def step(dit: SpacetimeDiT, size: tuple[int, int], times: str) -> list[torch.Tensor]:
    """The velocity of a batch, and all gradients of its square."""
    torch.manual_seed(1)
    batch, frames = size
    latents = torch.randn(batch, 4, frames, 4, 6)
    shape = {"one": (batch,), "by frame": (batch, frames), "by token": (batch, frames, 2, 3)}[times]
    context = torch.randn(batch, 5, 16)
    made = dit(latents, 1000 * torch.rand(shape), context, context_lengths=[3] * batch)
    made.square().sum().backward()
    gradients = [parameter.grad for parameter in dit.parameters()]
    dit.zero_grad()
    return [made.detach(), *gradients]


@pytest.mark.long
def test_fused_steps_of_any_shape_are_plain_ones(
    dit: SpacetimeDiT, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, compiled, real = [], [], torch.compile

    def counting(call):
        def counted(*args: object) -> object:
            calls.append(is_fusing())
            return call(*args)

        return counted

    def count(function):
        compiled.append(function.__name__)
        return real(function)

    monkeypatch.setattr(norm, "by_runs", counting(norm.by_runs))
    monkeypatch.setattr(module, "_fused_by_runs", counting(module._fused_by_runs))
    module._compiled.cache_clear()
    monkeypatch.setattr(torch, "compile", count)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for size, times in (((2, 3), "by frame"), ((3, 1), "one"), ((2, 2), "by token"),
                        ((5, 4), "by frame"), ((4, 1), "one")):
        plain = step(dit, size, times)
        with fusing():
            fused = step(dit, size, times)
        for mine, right in zip(fused, plain, strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-4)
    assert not is_fusing()
    assert {True, False} == set(calls)
    assert len(set(compiled)) == len(compiled), "a function is handed to the compiler once"
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 10, "not one for each shape"


def test_it_is_off_again_behind_the_block() -> None:
    with fusing():
        assert is_fusing()
        with fusing(on=False):
            assert not is_fusing()
        assert is_fusing()
    assert not is_fusing()
