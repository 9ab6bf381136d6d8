"""Weights in int8: how much memory they save, how little they change, what is refused."""

from __future__ import annotations

import builtins
import importlib.util
from collections.abc import Callable

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
from vidgen.weights.load import load_module
from vidgen.weights.quantize import linears, quantize_layer, require_torchao

needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="torchao is not installed"
)
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

    def load(dtype: torch.dtype, kind: str | None = None) -> nn.Module:
        return load_module(make, tmp_path, dtype, "cpu", keep, quantize=kind)

    return load, run


def weight_bytes(module: nn.Module) -> int:
    """Memory of all weights; that of a quantised one is its integers and scales."""
    tensors = [t for value in module.parameters() for t in parts_of(value)]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def parts_of(value: Tensor) -> list[Tensor]:
    if type(value.data) is Tensor:
        return [value.data]
    return [getattr(value, name) for name in value.__tensor_flatten__()[0]]


def quantize(module: nn.Module) -> nn.Module:
    for layer in linears(module).values():
        quantize_layer(layer)
    return module


@needs_torchao
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_saves_its_share_and_stays_close(case, dtype):
    load, run = case
    plain, small = load(dtype), load(dtype, "int8")
    layers = linears(plain).values()
    # a byte a weight and, a row, a scale of four bytes and a zero point of one
    saved = sum((dtype.itemsize - 1) * x.weight.numel() - 5 * x.out_features for x in layers)
    assert weight_bytes(small) == weight_bytes(plain) - saved
    assert weight_bytes(small) < (0.5 if dtype == torch.float32 else 0.7) * weight_bytes(plain)
    reference = run(load(torch.float32)).float()

    def error(module: nn.Module) -> float:
        return float((run(module).float() - reference).norm() / reference.norm())

    assert 0 < error(small) < error(plain) + 0.03
    assert run(small).dtype == run(plain).dtype


@needs_torchao
@torch.no_grad()
def test_only_matrices_of_blocks_change(case):
    load, _ = case
    plain, small = load(torch.bfloat16), load(torch.bfloat16, "int8")
    changed = {n for n, v in small.named_parameters() if type(v.data) is not Tensor}
    assert changed == {f"{path}.weight" for path in linears(plain)}
    assert len(changed) > 10
    for name, value in small.named_parameters():
        if name not in changed:
            assert torch.equal(value, plain.get_parameter(name))
    assert all(".3" not in name and "embed" not in name and "head." not in name for name in changed)


@needs_torchao
@torch.no_grad()
def test_loading_and_quantising_later_give_the_same_bits(case):
    load, run = case
    later = quantize(load(torch.bfloat16))
    assert torch.equal(run(later), run(load(torch.bfloat16, "int8")))


@needs_torchao
@torch.no_grad()
def test_a_lora_works_on_int8_weights(tmp_path):
    torch.manual_seed(0)
    plain = SpacetimeDiT(DIT)
    init_dit(plain)
    for value in plain.parameters():
        value.data += 0.03 * torch.randn_like(value)
    save_module(plain.state_dict(), {}, tmp_path, torch.float32)
    small = load_module(lambda: SpacetimeDiT(DIT), tmp_path, torch.float32, "cpu", quantize="int8")
    part = LowRank(0.1 * torch.randn(4, 128), 0.1 * torch.randn(128, 4))
    adapter = Adapter("test", {"blocks.1.self_attn.q": part, "blocks.2.ffn.down": LowRank(
        0.1 * torch.randn(4, 384), 0.1 * torch.randn(128, 4))})
    changes = {}
    for name, module in (("plain", plain), ("small", small)):
        before = dit_output(module)
        with attached(module, [(adapter, 1.0)]):
            changes[name] = dit_output(module) - before
        assert torch.equal(dit_output(module), before)
    assert changes["plain"].norm() > 0.05
    assert (changes["small"] - changes["plain"]).norm() < 0.05 * changes["plain"].norm()


@needs_torchao
def test_float16_is_refused():
    layer = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(8, 8).half()])})
    with pytest.raises(InputError, match=r"overflow in fp16.*--dtype bf16"):
        quantize(layer)


@needs_torchao
def test_process_wide_settings_stay_as_they_are():
    import torch._inductor.config as inductor

    before = inductor.coordinate_descent_tuning, torch.get_float32_matmul_precision()
    quantize(nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(8, 8)])}))
    assert (inductor.coordinate_descent_tuning, torch.get_float32_matmul_precision()) == before


@pytest.mark.parametrize(
    ("error", "reason"),
    [(ModuleNotFoundError("No module named 'torchao'", name="torchao"), "which is not installed"),
     (ImportError("undefined symbol"), r"torchao \S+ with torch \S+ can't be imported")],
)
def test_a_torchao_that_does_not_work_is_named(monkeypatch, error, reason):
    real = builtins.__import__

    def fail(name: str, *rest: object) -> object:
        if name.startswith("torchao"):
            raise error
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", fail)
    monkeypatch.setattr("importlib.metadata.version", lambda _name: "0.0.0")
    with pytest.raises(InputError, match=rf"{reason}.*pip install 'vidgen\[quant\]'"):
        require_torchao(torch.bfloat16)


def test_another_kind_and_streaming_are_refused(tmp_path):
    save_module(SpacetimeDiT(DIT).state_dict(), {}, tmp_path, torch.float32)
    make = lambda: SpacetimeDiT(DIT)  # noqa: E731
    with pytest.raises(InputError, match="one of the two"):
        load_module(make, tmp_path, torch.float32, "cpu", quantize="int8", stream=True)
    with pytest.raises(InputError, match="quantize is 'int3'; give 'int8'"):
        load_module(make, tmp_path, torch.float32, "cpu", quantize="int3")
