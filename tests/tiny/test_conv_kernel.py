"""Our float32 convolution: any taps, strides and channels, short sums, the same on any threads."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vidgen.ops import conv, native

CASES = [  # channels in and out, taps, stride, padding
    (96, 48, (3, 3, 3), (1, 1, 1), (0, 1, 1)),
    (20, 64, (3, 3, 3), (1, 1, 1), (0, 1, 1)),
    (100, 7, (3, 3, 3), (1, 1, 1), (0, 1, 1)),
    (384, 20, (3, 1, 1), (2, 1, 1), (0, 0, 0)),
    (400, 17, (1, 1, 1), (1, 1, 1), (0, 0, 0)),
    (300, 128, (3, 3), (2, 2), (0, 0)),
    (70, 66, (2, 2), (1, 1), (1, 1)),
    (3, 40, (3, 5, 2), (1, 1, 1), (0, 3, 2)),
    (16, 8, (3, 3, 5), (1, 1, 1), (0, 0, 0)),  # more taps than the kernel takes
    (16, 8, (3, 3, 3), (1, 1, 1), (1, 1, 1)),  # padded in time, which it doesn't do
]


def error(made: Tensor, exact: Tensor) -> float:
    return float((made - exact).norm() / exact.norm())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("inward", "outward", "taps", "stride", "padding"), CASES)
@torch.no_grad()
def test_any_shape_is_convolved_as_in_float64(inward, outward, taps, stride, padding, bias):
    torch.manual_seed(0)
    x = torch.randn(2, inward, *(5, 9, 7)[3 - len(taps) :])
    weight = torch.randn(outward, inward, *taps)
    offset = torch.randn(outward) if bias else None
    convolve = F.conv3d if len(taps) == 3 else F.conv2d
    exact = convolve(x.double(), weight.double(), None if offset is None else offset.double(),
                     stride, padding)  # fmt: skip
    layout = torch.channels_last_3d if len(taps) == 3 else torch.channels_last
    made = conv.infer(x, weight, offset, stride, padding)
    assert made.shape == exact.shape
    assert made.is_contiguous(memory_format=layout)
    assert error(made, exact) < 1e-6


@torch.no_grad()
def test_results_depend_neither_on_threads_nor_on_what_else_is_in_the_batch():
    torch.manual_seed(0)
    x, weight = torch.randn(2, 40, 4, 40, 40), torch.randn(70, 40, 3, 3, 3)
    options = (None, (1, 1, 1), (0, 1, 1))
    threads = torch.get_num_threads()
    whole = conv.infer(x, weight, *options)
    try:
        torch.set_num_threads(threads + 1)
        assert torch.equal(conv.infer(x, weight, *options), whole)
    finally:
        torch.set_num_threads(threads)
    if native.kernels(x) is not None:
        assert torch.equal(conv.infer(x[1:], weight, *options), whole[1:])


@torch.no_grad()
def test_without_the_kernel_sums_are_as_short(monkeypatch):
    torch.manual_seed(0)
    x, weight = torch.randn(1, 256, 3, 12, 12), torch.randn(32, 256, 3, 3, 3)
    options = (None, (1, 1, 1), (0, 1, 1))
    exact = F.conv3d(x.double(), weight.double(), None, *options[1:])
    ours = conv.infer(x, weight, *options)
    monkeypatch.setattr(native, "kernels", lambda *_: None)
    theirs = conv.infer(x, weight, *options)
    assert error(ours, exact) <= 1.2 * error(theirs, exact)
    cuts_short = "AVX512" in torch.backends.cpu.get_cpu_capability()  # oneDNN's own sums
    assert error(theirs, exact) < (5e-7 if cuts_short else 2e-6)


@torch.no_grad()
def test_numbers_that_are_none_stay_to_be_seen():
    x, weight = torch.randn(1, 32, 3, 8, 8), torch.randn(16, 32, 3, 3, 3)
    x[0, 5, 1, 4, 4] = float("nan")
    made = conv.infer(x, weight, None, (1, 1, 1), (0, 1, 1))
    assert made[0, :, 0, 3:6, 3:6].isnan().all()
    assert int(made.isnan().sum()) == 16 * 9
