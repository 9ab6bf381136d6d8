import warnings

import pytest
import torch

from vidgen.core.errors import InputError
from vidgen.ops import attention as module
from vidgen.ops import native
from vidgen.ops.attention import attention, require_backend
from vidgen.ops.rope import normed_heads, rope_table, sound_rope_table


def make_qkv(dtype: torch.dtype = torch.float32, Lq: int = 5, Lk: int = 7):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, Lq, 8), (2, 3, Lk, 8), (2, 3, Lk, 8))
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


def make_bias(Lq: int = 5, Lk: int = 7) -> torch.Tensor:
    bias = torch.randn(2, 1, Lq, Lk, generator=torch.Generator().manual_seed(1))
    bias[:, :, :, 2] = -torch.inf
    return bias


@pytest.mark.parametrize("backend", ["auto", "sdpa"])
@pytest.mark.parametrize("bias", [None, make_bias(), make_bias()[:1, :, :1]])
def test_back_ends_agree_with_the_reference_and_so_do_their_gradients(backend, bias):
    expected_inputs, inputs = make_qkv(), make_qkv()
    expected = attention(*expected_inputs, bias=bias, backend="reference")
    out = attention(*inputs, bias=bias, backend=backend)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)
    weight = torch.randn(expected.shape)
    (expected * weight).sum().backward()
    (out * weight).sum().backward()
    for mine, theirs in zip(inputs, expected_inputs, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_blocks_of_queries_change_nothing(monkeypatch):
    q, k, v = make_qkv(Lq=11)
    for bias in (None, make_bias(11), make_bias(11)[:, :, :1]):
        whole = attention(q, k, v, bias=bias, backend="blocked")
        monkeypatch.setattr(module, "_MAX_SCORES", 7 * 4)
        torch.testing.assert_close(attention(q, k, v, bias=bias, backend="blocked"), whole)
        monkeypatch.undo()


@pytest.mark.parametrize("backend", ["sdpa", "blocked"])
def test_bfloat16_stays_within_its_rounding(backend):
    exact = attention(*make_qkv(torch.float64), backend="sdpa")
    out = attention(*make_qkv(torch.bfloat16), backend=backend)
    assert out.dtype == torch.bfloat16
    assert ((out - exact).norm() / exact.norm()).item() < 1e-2


def test_an_unusable_back_end_is_replaced_with_one_warning_or_refused():
    reason = module._unusable("xformers", torch.device("cpu"), torch.float32)
    if reason is None:
        pytest.skip("xformers runs here")
    module._warn_once.cache_clear()
    inputs = make_qkv()
    with pytest.warns(UserWarning, match="xformers.*replaced"):
        out = attention(*inputs, backend="xformers")
    torch.testing.assert_close(out, attention(*inputs))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention(*inputs, backend="xformers")
    with pytest.raises(InputError, match="xformers"):
        require_backend("xformers", inputs[0].device, inputs[0].dtype)
    require_backend("sdpa", inputs[0].device, inputs[0].dtype)
    with pytest.raises(InputError, match="unknown; choose one of"):
        attention(*inputs, backend="flash9")


def rotate_plainly(x, weight, positions, num_heads, eps):
    """The same by complex exponentials, autograd doing the rest: time axis alone, h = w = 0."""
    d = x.shape[-1] // num_heads
    normed = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight
    pairs = torch.view_as_complex(normed.unflatten(-1, (num_heads, d // 2, 2)))
    num_time = d // 2 - 2 * (d // 6)
    speeds = 1e4 ** (-torch.arange(num_time, dtype=x.dtype) / num_time)
    angles = torch.cat([speeds, torch.zeros(d // 2 - num_time, dtype=x.dtype)]) * positions[:, None]
    turned = pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.view_as_real(turned).flatten(-2).transpose(1, 2)


@pytest.mark.parametrize("turned", [True, False])
def test_normed_heads_and_their_gradient_equal_autograds(turned):
    torch.manual_seed(0)
    positions = torch.tensor([-1.5, 0.0, 0.25, 7.0], dtype=torch.float64) * turned
    x, weight = torch.randn(2, 4, 24), 1 + 0.1 * torch.randn(24)
    mine = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    plain = [x.double().requires_grad_(), weight.double().requires_grad_()]
    table = rope_table(positions[None], 1, 1, 12) if turned else None
    out = normed_heads(*mine, table, 2, 1e-6)
    expected = rotate_plainly(*plain, positions, 2, 1e-6)
    torch.testing.assert_close(out.double(), expected, atol=1e-6, rtol=1e-5)
    towards = torch.randn(out.shape)
    (out * towards).sum().backward()
    (expected * towards).sum().backward()
    for a, b in zip(mine, plain, strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, atol=1e-5, rtol=1e-5)


def test_scores_depend_on_distance_alone_even_at_fractions():
    x = torch.randn(1, 2, 12)
    weight = torch.ones(12)

    def score(first: float, second: float) -> torch.Tensor:
        table = rope_table(torch.tensor([[first, second]]), 1, 1, 12)
        q, k = normed_heads(x, weight, table, 1, 1e-6)[0, 0]
        return q @ k

    torch.testing.assert_close(score(0.25, 3.0), score(10.25, 13.0), atol=1e-5, rtol=1e-5)
    assert abs(score(0.25, 3.0) - score(0.25, 3.5)) > 1e-3


def test_sound_tokens_distinguish_their_neighbours():
    at = torch.arange(4.0)
    table = sound_rope_table(at / 20, at, 64)[0]  # twenty to a latent frame
    coarse = rope_table(at[None] / 20, 1, 1, 64)[0]
    turned = (table[1:] / table[:-1]).angle().abs()
    assert float((coarse[1:] / coarse[:-1]).angle().abs().max()) < 0.06
    torch.testing.assert_close(turned.amax(1), torch.ones(3))
    torch.testing.assert_close(table[:, :12], coarse[:, :12])  # on the picture's clock, too


def far_qkv(dtype: torch.dtype, Lq: int, Lk: int, d: int = 64, scale: float = 3.0):
    """Scores of deviation `scale`, keys and values as views of [B, L, H, d]."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, Lq, 3, d), (2, Lk, 3, d), (2, Lk, 3, d))
    q, k, v = (torch.randn(s, generator=generator).transpose(1, 2) for s in shapes)
    return [x.to(dtype) for x in (scale * q, k, v)]


def error_of(backend: str, q, k, v, bias=None) -> float:
    exact = attention(*(x.double() for x in (q, k, v)), bias=bias, backend="sdpa")
    out = attention(q, k, v, bias=bias, backend=backend)
    return ((out - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize(("Lq", "Lk"), [(1, 1), (5, 7), (96, 256), (101, 259), (200, 530)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("backend", ["native", "blocked"])
@torch.no_grad()
def test_fast_back_ends_keep_to_the_error_of_sdpa(backend, dtype, Lq, Lk):
    if backend == "native" and dtype not in native.known_dtypes():
        pytest.skip(f"no kernels here: {native.why_not()}")
    q, k, v = far_qkv(dtype, Lq, Lk, d=128 if Lk > 256 else 64)
    bias = torch.zeros(2, 1, 1, Lk)
    bias[0, ..., Lk // 2 :] = 2.5
    bias[1, ..., : Lk // 2] = -torch.inf
    for given in (None, bias):
        floor = 1e-5 if dtype == torch.float32 else 1e-4
        limit = 1.5 * error_of("sdpa", q, k, v, given) + floor
        assert error_of(backend, q, k, v, given) < limit


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@torch.no_grad()
def test_native_kernels_hide_nothing_that_is_no_number(dtype):
    if dtype not in native.known_dtypes():
        pytest.skip(f"no kernels here: {native.why_not()}")
    q, k, v = far_qkv(dtype, 20, 40)
    q[0, 0, 3, 0] = torch.nan
    wrong = attention(q, k, v, backend="native").isnan()
    assert wrong[0, 0, 3].all()
    assert wrong.sum() == wrong.shape[-1]


@torch.no_grad()
def test_native_kernels_do_not_depend_on_the_number_of_threads():
    q, k, v = far_qkv(torch.float32, 300, 300)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(attention(q, k, v))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)
