import pytest
import torch
from torch import nn

from vidgen.models.dit import SpacetimeDiT
from vidgen.models.dit_blocks import FeedForward
from vidgen.models.lora import Adapter, LowRank, attached
from vidgen.models.presets import DIT_PRESETS
from vidgen.ops import linear
from vidgen.ops.linear import PackedLinear, pack, packs, plain


@pytest.fixture
def packing():
    if not packs(torch.float32):
        pytest.skip("this PyTorch packs no weights")


@pytest.mark.usefixtures("packing")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_packed_layers_give_the_same_and_keep_their_weights(dtype):
    if not packs(dtype):
        pytest.skip(f"oneDNN packs no {dtype} on this processor")
    torch.manual_seed(0)
    ffn, x = FeedForward(32, 64).to(dtype), torch.randn(2, 70, 32).to(dtype)
    expected, weight = ffn(x), ffn.up.weight.clone()
    assert pack(ffn) == 2
    assert pack(ffn) == 0  # they are packed already
    assert type(ffn.up) is PackedLinear
    limit = 1e-6 if dtype == torch.float32 else 5e-3
    assert ((ffn(x) - expected).norm() / expected.norm()) < limit
    assert torch.equal(plain(ffn.up, "weight"), weight)
    assert next(ffn.parameters()).dtype == dtype


@pytest.mark.usefixtures("packing")
@torch.no_grad()
def test_stretches_of_tokens_change_nothing(monkeypatch):
    torch.manual_seed(0)
    ffn, x = FeedForward(32, 64), torch.randn(2, 70, 32)
    pack(ffn)
    whole = ffn(x)
    monkeypatch.setattr(linear, "_HIDDEN_BYTES", 2 * 64 * 4 * 16)  # 16 tokens of 2 samples
    torch.testing.assert_close(ffn(x), whole, atol=1e-6, rtol=1e-6)


@pytest.mark.usefixtures("packing")
@torch.no_grad()
def test_adapters_attach_to_packed_layers():
    torch.manual_seed(0)
    ffn, x = FeedForward(32, 64), torch.randn(1, 5, 32)
    adapter = Adapter(
        "a", {"up": LowRank(torch.randn(2, 32), torch.randn(64, 2))},
        {"down.weight": torch.randn(32, 64), "up.bias": torch.randn(64)},
    )
    with attached(ffn, [(adapter, 0.5)]):
        expected = ffn(x)
    plainly = ffn(x)
    pack(ffn)
    with attached(ffn, [(adapter, 0.5)]):
        torch.testing.assert_close(ffn(x), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ffn(x), plainly, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_this_processor_cannot_pack_stays_plain(dtype):
    assert pack(nn.Linear(32, 32, dtype=dtype)) == int(packs(dtype))
    assert not packs(torch.float16)


def test_what_cannot_be_packed_stays_plain(monkeypatch):
    monkeypatch.setattr(linear, "packs", lambda dtype: dtype == torch.bfloat16)
    layers = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16, device="meta"))
    assert pack(layers) == 0


@pytest.mark.usefixtures("packing")
def test_a_last_layer_stays_plain_for_its_rounding():
    model = SpacetimeDiT(DIT_PRESETS["tiny"])
    assert pack(model) > 10
    assert type(model.blocks[0].ffn.up) is PackedLinear
    assert not model.head.proj.weight.is_mkldnn

