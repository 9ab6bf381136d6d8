"""Weights in 8 bits: memory saved, error, streaming, adapters, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from train.toybox.initial import init_dit
from train.toybox.model_files import save_module
from vidgen.core.errors import InputError
from vidgen.models.dit import SpacetimeDiT
from vidgen.models.dit_types import DiTConfig
from vidgen.models.lora import Adapter, LowRank, attached
from vidgen.models.text import TextConfig, UMT5Encoder
from vidgen.ops.linear import plain
from vidgen.ops.quantized import Quantization, QuantizedLinear, quantize
from vidgen.weights.load import load_module
from vidgen.weights.stream import block_of

KINDS = get_args(Quantization)
DIT = DiTConfig(in_channels=4, out_channels=4, num_heads=2, head_dim=64, num_layers=3, ffn_dim=384,
                text_dim=64)
TEXT = TextConfig(vocab_size=64, hidden_dim=128, head_dim=32, ffn_dim=256, num_layers=3,
                  num_heads=4)


def dit_output(dit: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 4, 3, 8, 8, generator=generator)
    context = torch.randn(1, 7, 64, generator=generator)
    return dit(latents, torch.tensor([400.0]), context)


def text_output(encoder: nn.Module) -> Tensor:
    return encoder(torch.arange(1, 30)[None])


CASES = {
    "dit": (lambda: SpacetimeDiT(DIT), dit_output, SpacetimeDiT.fp32_weights),
    "umt5": (lambda: UMT5Encoder(TEXT), text_output, ()),
}


@pytest.fixture(params=CASES)
def case(request, tmp_path) -> tuple[Callable[..., nn.Module], Callable[[nn.Module], Tensor]]:
    make, run, keep = CASES[request.param]
    torch.manual_seed(0)
    module = make()
    if request.param == "dit":
        init_dit(module)
        for value in module.parameters():
            value.data += 0.03 * torch.randn_like(value)
    save_module(module.state_dict(), {}, tmp_path, torch.float32)

    def load(dtype: torch.dtype, kind: str | None = None, **options: bool) -> nn.Module:
        return load_module(make, tmp_path, dtype, "cpu", keep, quantize=kind, **options)

    return load, run


def weight_bytes(module: nn.Module) -> int:
    return sum(value.nbytes for value in module.state_dict().values())


def linears(module: nn.Module) -> dict[str, nn.Linear]:
    return {name: part for name, part in module.named_modules()
            if isinstance(part, nn.Linear) and block_of(f"{name}.weight")}


@torch.no_grad()
def widened(module: nn.Module) -> nn.Module:
    """Replace quantised layers by ordinary ones with the same values."""
    for layer in module.modules():
        if isinstance(layer, QuantizedLinear):
            layer.weight = nn.Parameter(plain(layer, "weight"), requires_grad=False)
            layer.__class__ = nn.Linear
            layer._buffers.clear()
    return module


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eight_bits_save_their_share_and_stay_close(case, dtype, kind):
    load, run = case
    usual, small = load(dtype), load(dtype, kind)
    # a byte for each weight, and a scale of four bytes for each row
    saved = sum((dtype.itemsize - 1) * x.weight.numel() - 4 * x.out_features
                for x in linears(usual).values())
    assert weight_bytes(small) == weight_bytes(usual) - saved
    assert weight_bytes(small) < (0.5 if dtype == torch.float32 else 0.7) * weight_bytes(usual)
    reference = run(load(torch.float32)).float()

    def error(module: nn.Module) -> float:
        return float((run(module).float() - reference).norm() / reference.norm())

    assert 0 < error(small) < error(usual) + 0.06
    assert run(small).dtype == run(usual).dtype


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_quantised_layer_equals_an_ordinary_one_with_its_values(case, dtype, kind):
    load, run = case
    small = load(dtype, kind)
    expected = run(widened(load(dtype, kind)))
    assert expected.isfinite().all()
    assert torch.equal(run(small), expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_blocks_give_the_same_bits(case, dtype, kind):
    """With and without oneDNN's layout of weights, and in a second pass."""
    load, run = case
    for packed in (True, False):
        streamed = load(dtype, kind, stream=True, packed=packed)
        expected = run(load(dtype, kind, packed=packed))
        assert torch.equal(run(streamed), expected)
        assert torch.equal(run(streamed), expected)
        assert all(value.is_meta for name, value in streamed.named_parameters()
                   if block_of(name))
        streamed.block_stream.close()


@torch.no_grad()
def test_only_matrices_of_blocks_change(case):
    load, _ = case
    usual, small = load(torch.bfloat16), load(torch.bfloat16, "int8")
    changed = {name for name, value in small.named_parameters() if value.dtype == torch.int8}
    assert changed == {f"{path}.weight" for path in linears(usual)}
    assert len(changed) > 10
    for name, value in small.named_parameters():
        if name not in changed:
            assert torch.equal(value, usual.get_parameter(name))
    assert all(".3" not in name and "embed" not in name and "head." not in name for name in changed)


@torch.no_grad()
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_work_on_quantised_weights(tmp_path, kind, stream):
    """Low-rank and full deltas change the output as on an ordinary network of the same values."""
    torch.manual_seed(0)
    dit = SpacetimeDiT(DIT)
    init_dit(dit)
    for value in dit.parameters():
        value.data += 0.03 * torch.randn_like(value)
    save_module(dit.state_dict(), {}, tmp_path, torch.float32)

    def load(**options: bool) -> nn.Module:
        return load_module(lambda: SpacetimeDiT(DIT), tmp_path, torch.float32, "cpu",
                           SpacetimeDiT.fp32_weights, quantize=kind, **options)

    small, expected = load(stream=stream), widened(load())
    part = LowRank(0.1 * torch.randn(4, 128), 0.1 * torch.randn(128, 4))
    adapter = Adapter(
        "test", {"blocks.1.self_attn.q": part}, {
            "blocks.2.ffn.down.weight": 0.1 * torch.randn(128, 384),
            "blocks.0.ffn.up.bias": torch.randn(384)})
    before = dit_output(small)
    with attached(small, [(adapter, 1.0)]), attached(expected, [(adapter, 1.0)]):
        changed = dit_output(small)
        assert torch.equal(changed, dit_output(expected))
        assert (changed - before).norm() > 0.05
    assert torch.equal(dit_output(small), before)


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_numbers_have_the_least_error(kind):
    matrix = torch.randn(32, 64) * torch.logspace(-6, 6, 32)[:, None]
    matrix[3] = 0
    numbers, scale = quantize(matrix, kind)
    assert scale.shape == (32, 1)
    assert scale.dtype == torch.float32
    error = (numbers.float() * scale - matrix).abs() / matrix.abs().amax(1, keepdim=True)
    assert error[3].isnan().all()
    assert error.nan_to_num().max() < {"int8": 0.51 / 127, "fp8": 1 / 16}[kind]


def test_another_kind_is_refused(tmp_path):
    save_module(SpacetimeDiT(DIT).state_dict(), {}, tmp_path, torch.float32)
    with pytest.raises(InputError, match=r"quantize is 'int3'; .*int8"):
        load_module(lambda: SpacetimeDiT(DIT), tmp_path, torch.float32, "cpu", quantize="int3")
