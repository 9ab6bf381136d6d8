"""Gradients of our kernels against autograd's own in float64."""

import pytest
import torch

from train.toybox.initial import init_dit
from vidgen.ops import linear, native, norm, rope
from vidgen.ops.attention import attention
from vidgen.ops.norm import TokenVectors

DTYPES = [torch.float32, torch.bfloat16]
B, L, D = 3, 40, 64


@pytest.fixture(autouse=True)
def needs_kernels(request):
    case = getattr(request.node, "callspec", None)
    given = case.params.values() if case else ()
    needed = {torch.float32, *(value for value in given if isinstance(value, torch.dtype))}
    if missing := needed - native.known_dtypes():
        pytest.skip(f"no kernels for {missing}: {native.why_not() or 'the CPU lacks AVX512-BF16'}")


@pytest.fixture
def plainly(monkeypatch):
    """Call something as on a machine without kernels."""

    def call(work):
        with monkeypatch.context() as patch:
            patch.setattr(native, "kernels", lambda *_: None)
            return work()

    return call


def error(mine: torch.Tensor, exact: torch.Tensor) -> float:
    return ((mine.double() - exact.double()).norm() / exact.double().norm()).item()


def gradients(work, towards, *inputs):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = work(*leaves)
    out.backward(towards.to(out.dtype))
    return [out, *(leaf.grad for leaf in leaves)]


class _Silu(torch.nn.Module):
    def __init__(self, layer: norm.ChannelRMSNorm) -> None:
        super().__init__()
        self.norm = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm.silu(x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("Lq", "Lk", "d"), [(1, 1, 64), (5, 7, 64), (130, 193, 128), (576, 33, 64), (257, 400, 128)]
)
@pytest.mark.parametrize("masked", [False, True])
def test_attention_keeps_to_the_errors_of_sdpa(dtype, Lq, Lk, d, masked):
    torch.manual_seed(0)
    q = torch.randn(2, Lq, 3, d).transpose(1, 2)
    k, v = torch.randn(2, 3, Lk, d), torch.randn(2, 3, Lk, d)
    towards = torch.randn(2, 3, Lq, d)
    bias = None
    if masked:
        bias = torch.zeros(2, 1, 1, Lk)
        bias[0, ..., Lk // 2 + 1 :] = -torch.inf
        bias[1, ..., :1] = 0.7
    given = [x.to(dtype) for x in (q, k, v)]
    towards = towards.to(dtype)

    def of(backend, dtype):
        inputs = [x.to(dtype) for x in given]
        return gradients(lambda *x: attention(*x, bias=bias, backend=backend), towards, *inputs)

    exact = of("sdpa", torch.float64)
    floor = 1e-6 if dtype == torch.float32 else 3e-3
    for mine, theirs, right in zip(of("native", dtype), of("sdpa", dtype), exact, strict=True):
        assert mine.dtype == dtype
        if right.norm() > 1e-9:  # the slope of the softmax of one key is nothing
            assert error(mine, right) < 1.5 * error(theirs, right) + floor


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [5, 13, 24, 64])
def test_norm_and_silu_of_channels(dtype, channels, plainly):
    torch.manual_seed(0)
    x, towards = (
        torch.randn(2, channels, 3, 4, 4).contiguous(memory_format=torch.channels_last_3d)
        for _ in range(2)
    )
    layer = norm.ChannelRMSNorm(channels)
    gain = torch.rand(channels, 1, 1, 1) + 0.5

    def of(x, gain):
        return torch.func.functional_call(_Silu(layer), {"norm.weight": gain}, x)

    mine = gradients(of, towards, x.to(dtype), gain)
    theirs = plainly(lambda: gradients(of, towards, x.to(dtype), gain))
    exact = plainly(lambda: gradients(of, towards, x.to(dtype).double(), gain.double()))
    for ours, plain, right in zip(mine, theirs, exact, strict=True):
        assert error(ours, right) < 1.5 * error(plain, right) + 2e-7


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_training_attention_is_native_and_repeats_itself(dtype):
    q = torch.randn(2, 3, 300, 64, dtype=dtype, requires_grad=True)
    out = attention(q, q, q)
    assert "Native" in type(out.grad_fn).__name__
    runs = [gradients(lambda x: attention(x, x, x), torch.ones_like(out), q) for _ in range(2)]
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("shared", ["by sample", "by run", "by index"])
@pytest.mark.parametrize(("wide", "narrow"), [*zip(DTYPES, DTYPES, strict=True), DTYPES])
def test_sums_norms_and_gates(plainly, shared, wide, narrow):
    torch.manual_seed(0)
    index = torch.randint(7, (B, L), dtype=torch.int32) if shared == "by index" else None
    rows = {"by sample": (B, 1, D), "by run": (B, 5, D), "by index": (7, D)}[shared]
    x, update = torch.randn(B, L, D, dtype=wide), torch.randn(B, L, D, dtype=narrow)
    tables = [torch.randn(rows) for _ in range(3)]
    gain, offset = torch.randn(D), torch.randn(D)

    def work(x, update, gate, scale, shift, gain, offset):
        gates, scales, shifts = (TokenVectors(part, index) for part in (gate, scale, shift))
        x, cross = norm.add_gated_and_norm(x, update, gates, gain, offset, 1e-6, narrow)
        x, hidden = norm.add_and_modulated_norm(x, cross, shifts, scales, 1e-6, narrow)
        more = norm.modulated_norm(x, shifts, scales, 1e-6, narrow)
        return norm.add_gated(x, hidden + more, gates)

    inputs = (x, update, *tables, gain, offset)
    towards = torch.randn(B, L, D)
    assert "AddAndNorm" in type(work(*(i.requires_grad_() for i in inputs)).grad_fn).__name__
    mine = gradients(work, towards, *inputs)
    plain = plainly(lambda: gradients(work, towards, *inputs))
    limit = 1e-6 if narrow == torch.float32 else 1e-2
    for here, there in zip(mine, plain, strict=True):
        assert here.dtype == there.dtype
        assert error(here, there) < limit


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("turned", [True, False])
def test_heads(plainly, dtype, turned):
    torch.manual_seed(0)
    table = rope.rope_table(torch.arange(5.0)[None], 4, 2, 64) if turned else None
    x, weight = torch.randn(B, L, 128).to(dtype), torch.randn(128)
    towards = torch.randn(B, 2, L, 64)

    def work(x, weight):
        return rope.normed_heads(x, weight, table, 2, 1e-6)

    mine = gradients(work, towards, x, weight)
    plain = plainly(lambda: gradients(work, towards, x, weight))
    for here, there in zip(mine, plain, strict=True):
        assert error(here, there) < (1e-6 if dtype == torch.float32 else 3e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu(dtype):
    torch.manual_seed(0)
    x = torch.cat([4 * torch.randn(1000), torch.tensor([-1e4, -50.0, -8, 0, 8, 50, 1e4, 1])])
    x = x.to(dtype).view(-1, 16)
    layer = torch.nn.Identity()
    mine = gradients(lambda x: linear._gelu_linear(layer, x, "tanh"), torch.ones_like(x), x)
    exact = gradients(
        lambda x: torch.nn.functional.gelu(x, approximate="tanh"), torch.ones_like(x), x.double()
    )
    for here, there in zip(mine, exact, strict=True):
        assert error(here, there) < (1e-6 if dtype == torch.float32 else 3e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_of_a_block_needs_neither_compiler_nor_kernels(plainly, dtype):
    """One path with kernels and one without, and the same gradients of a whole tiny block."""
    from vidgen.models.dit import SpacetimeDiT
    from vidgen.models.dit_types import DiTConfig

    torch.manual_seed(0)
    config = DiTConfig(in_channels=4, out_channels=4, num_heads=2, head_dim=64, num_layers=2,
                       ffn_dim=64, text_dim=16)  # fmt: skip
    model = SpacetimeDiT(config)
    init_dit(model)
    latents, context = torch.randn(2, 4, 3, 8, 8), torch.randn(2, 5, 16)

    def step():
        model.zero_grad()
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = model(latents, torch.tensor([100.0, 700.0]), context, context_lengths=[5, 3])
        (out.float() - latents).square().mean().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    mine, plain = step(), plainly(step)
    assert mine.keys() == plain.keys()
    total = torch.cat([g.flatten() for g in plain.values()])
    limit = 1e-5 if dtype == torch.float32 else 0.03
    assert 0 < error(torch.cat([g.flatten() for g in mine.values()]), total) < limit
