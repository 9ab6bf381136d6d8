"""Adapters on a module that keeps its weights."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests.lora_models import DIFFS, TINY, make_adapter, make_dit
from train.toybox.model_files import save_module
from vidgen.core.errors import ModelError
from vidgen.models.dit import SpacetimeDiT
from vidgen.models.lora import Adapter, attached
from vidgen.weights.load import load_module


def run(dit: SpacetimeDiT, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(2, dit.config.in_channels, 3, 4, 6, generator=generator).to(dtype)
    context = torch.randn(2, 9, dit.config.text_dim, generator=generator).to(dtype)
    return dit(latents, torch.tensor([800.0, 20.0]), context, context_lengths=[9, 4])


def merged(dit: SpacetimeDiT, adapters: list[tuple[Adapter, float]]) -> SpacetimeDiT:
    """A model with the deltas in its weights, as plainly as can be."""
    other = SpacetimeDiT(dit.config).eval().requires_grad_(requires_grad=False)
    other.load_state_dict(dit.state_dict())
    for adapter, weight in adapters:
        for path, part in adapter.low_rank.items():
            delta = part.scale * part.up @ part.down.flatten(1)
            base = other.get_submodule(path).weight
            base += weight * delta.view_as(base)
        for name, delta in adapter.deltas.items():
            other.get_parameter(name).add_(weight * delta)
    return other


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture(scope="module")
def dit() -> SpacetimeDiT:
    return make_dit()


@torch.no_grad()
def test_several_adapters_equal_merged_weights(dit):
    adapters = [
        (make_adapter(dit, diffs=DIFFS), 0.8),
        (make_adapter(dit, seed=2, rank=1, scale=3.0), -0.3),
        (make_adapter(dit, seed=3, diffs=DIFFS[:3]), 0.5),
    ]
    plain = run(dit)
    with attached(dit, adapters):
        together = run(dit)
    with attached(dit, adapters[:1]), attached(dit, adapters[1:]):
        nested = run(dit)
    expected = run(merged(dit, adapters))
    assert error(plain, expected) > 0.1
    assert error(together, expected) < 1e-5
    assert torch.equal(nested, together)
    assert torch.equal(run(dit), plain)


@torch.no_grad()
def test_bf16_is_as_good_as_merging(dit):
    half = make_dit(dtype=torch.bfloat16)
    adapters = [(make_adapter(dit, diffs=DIFFS), 0.7)]
    exact = run(merged(make_dit(dtype=torch.bfloat16).float(), adapters))
    with attached(half, adapters):
        ours = run(half, torch.bfloat16).float()
    folded = run(merged(make_dit(dtype=torch.bfloat16), adapters).bfloat16(), torch.bfloat16)
    assert error(ours, exact) < 1.2 * error(folded.float(), exact) < 0.1


@torch.no_grad()
def test_weights_stay_the_tensors_they_are(dit):
    adapter = make_adapter(dit, diffs=DIFFS)
    before = {name: (p, p.clone(), p._version) for name, p in dit.named_parameters()}
    attributes = {path: (type(m), set(vars(m))) for path, m in dit.named_modules()}

    def fail_inside():
        with attached(dit, [(adapter, 1.0)]):
            run(dit)
            assert dict(dit.named_parameters()).keys() == before.keys()
            with attached(dit, [(adapter, 1.0)]):
                run(dit)
                assert all(p is before[name][0] for name, p in dit.named_parameters())
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_inside()
    for name, parameter in dit.named_parameters():
        old, copy, version = before[name]
        assert parameter is old
        assert parameter._version == version
        assert torch.equal(parameter, copy)
    assert {path: (type(m), set(vars(m))) for path, m in dit.named_modules()} == attributes
    assert not dit._forward_pre_hooks


@torch.no_grad()
def test_weight_zero_changes_no_bit(dit):
    plain = run(dit)
    with attached(dit, [(make_adapter(dit, diffs=DIFFS), 0.0)]), attached(dit, []):
        assert torch.equal(run(dit), plain)


def test_gradients_reach_the_factors():
    dit, config = make_dit(), TINY
    adapter = make_adapter(dit)
    for part in adapter.low_rank.values():
        part.down.requires_grad_()
        part.up.requires_grad_()
    dit.gradient_checkpointing = True
    grads = []
    for _ in range(2):  # a second backward pass finds no freed graph
        with attached(dit, [(adapter, 1.0)]):
            run(dit).square().sum().backward()
        parts = adapter.low_rank.values()
        grads.append([g for part in parts for g in (part.down.grad, part.up.grad)])
        for part in parts:
            part.down.grad = part.up.grad = None
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    path = "blocks.1.ffn.up"
    part = adapter.low_rank[path]
    rest = Adapter("rest", {p: v for p, v in adapter.low_rank.items() if p != path})
    other = SpacetimeDiT(config)
    other.load_state_dict(merged(dit, [(rest, 1.0)]).state_dict())
    weight = other.get_submodule(path).weight
    weight.data += part.scale * (part.up @ part.down).detach()
    run(other).square().sum().backward()
    index = 2 * list(adapter.low_rank).index(path)
    expected = part.scale * weight.grad @ part.down.detach().T
    assert error(grads[1][index + 1], expected) < 1e-4


@torch.no_grad()
def test_compiled_blocks_take_adapters_and_drop_them():
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    dit, counter = make_dit(), CompileCounter()
    first = [(make_adapter(dit, diffs=DIFFS[:4]), 0.6)]
    second = [(make_adapter(dit, seed=2, diffs=DIFFS[:4]), -1.0)]
    plain, changed = run(dit), []
    for adapters in (first, second):
        with attached(dit, adapters):
            changed.append(run(dit))
    for block in dit.blocks:
        block.compile(backend=counter)
    frames = []
    for _ in range(2):
        assert error(run(dit), plain) < 1e-5
        for adapters, expected in zip((first, second), changed, strict=True):
            with attached(dit, adapters):
                assert error(run(dit), expected) < 1e-5
        frames.append(counter.frame_count)
    assert frames[0] == frames[1], "the second round is served from the first's cache"


@torch.no_grad()
def test_streamed_blocks_take_adapters(dit, tmp_path):
    adapters = [(make_adapter(dit, diffs=DIFFS), 0.7)]
    plain = run(dit)
    with attached(dit, adapters):
        expected = run(dit)
    save_module(dit.state_dict(), {}, tmp_path, torch.float32)
    streamed = load_module(lambda: SpacetimeDiT(TINY), tmp_path, torch.float32, "cpu", stream=True)
    with attached(streamed, adapters):
        assert torch.equal(run(streamed), expected)
    assert torch.equal(run(streamed), plain)


def test_an_adapter_of_another_model_is_refused(dit):
    wide = make_dit(replace(TINY, num_heads=4, num_layers=3))
    with (
        pytest.raises(ModelError, match=r"'a1' doesn't fit .*48x16 for 24x16.* and \d+ more"),
        attached(dit, [(make_adapter(wide), 1.0)]),
    ):
        pass


class NewTensors(TorchDispatchMode):
    """Sizes of all tensors that operations make, but for views of those given."""

    def __init__(self, known):
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if out.untyped_storage().data_ptr() not in self.known:
            self.sizes.append(out.numel())
        return out


@torch.no_grad()
def test_low_rank_parts_copy_no_weight(dit):
    adapter = make_adapter(dit, rank=2)
    layer, part = dit.blocks[0].ffn.up, adapter.low_rank["blocks.0.ffn.up"]
    x = torch.randn(5, layer.in_features)
    known = [x, *dit.parameters()]
    known += [factor for part in adapter.low_rank.values() for factor in (part.down, part.up)]
    with NewTensors(known) as new, attached(dit, [(adapter, 1.0)]):
        out = layer(x)
    assert max(new.sizes) == out.numel() < layer.weight.numel() / 4
    expected = F.linear(x, layer.weight + part.scale * part.up @ part.down, layer.bias)
    assert error(out, expected) < 1e-5
