"""Quantised weights are widened as the programs that write them do."""

from __future__ import annotations

import comfy_kitchen
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given
from hypothesis import strategies as st

from vidgen.ops.dequantize import GGUF_TYPES, fits, gguf, mxfp8, nvfp4, scaled, unrotate, untiled

HALVES = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2),
          "Q5_K": (0, 2), "Q6_K": (208,)}
"""Places of the float16 numbers of a block; 0 in all others."""


@pytest.mark.parametrize("kind", GGUF_TYPES)
def test_blocks_are_widened_as_by_ggml(kind):
    """Random bits are valid blocks, if only their float16 numbers are finite."""
    whole = GGMLQuantizationType[kind]
    numbers, num_bytes = GGML_QUANT_SIZES[whole]
    assert (numbers, num_bytes) == GGUF_TYPES[kind][:2]
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (6 * 3, num_bytes), dtype=np.uint8)
    for place in HALVES.get(kind, (0,)):
        halves = (rng.standard_normal(len(blocks)) / 100).astype(np.float16)
        blocks[:, place : place + 2] = halves.view(np.uint8).reshape(-1, 2)
    theirs = dequantize(blocks.reshape(6, -1), whole)
    ours = gguf(torch.from_numpy(blocks), kind, (6, 3 * numbers), torch.float32)
    assert torch.equal(ours, torch.from_numpy(theirs))


@pytest.mark.parametrize("shape", [(96, 256), (200, 160), (1, 32)])
def test_microscaled_numbers_are_widened_as_by_comfy_kitchen(shape):
    torch.manual_seed(0)
    weight = torch.randn(shape)
    values, scale = comfy_kitchen.quantize_mxfp8(weight)
    theirs = comfy_kitchen.dequantize_mxfp8(values, scale, torch.float32)
    assert torch.equal(mxfp8(values, scale, torch.float32), theirs)
    plain = untiled(scale.view(torch.uint8), shape[0], shape[1] // 32)
    if plain.numel() != scale.numel():  # else nothing tells the two layouts from each other
        assert torch.equal(mxfp8(values, plain, torch.float32), theirs)


@pytest.mark.parametrize("shape", [(96, 256), (200, 160)])
def test_four_bits_are_widened_as_by_comfy_kitchen(shape):
    torch.manual_seed(0)
    weight = torch.randn(shape)
    whole = weight.abs().max() / (448 * 6)
    values, scale = comfy_kitchen.quantize_nvfp4(weight, whole)
    theirs = comfy_kitchen.dequantize_nvfp4(values, whole, scale, torch.float32)
    assert torch.equal(nvfp4(values, scale, whole, torch.float32), theirs)


@pytest.mark.parametrize("group", [4, 64, 256])
def test_a_rotation_of_the_inputs_is_undone(group):
    from comfy_kitchen.backends.eager.quantization import (
        dequantize_int8_convrot_weight,
        quantize_int8_convrot_weight,
    )

    torch.manual_seed(0)
    values, scale = quantize_int8_convrot_weight(torch.randn(24, 512), group)
    theirs = dequantize_int8_convrot_weight(values, scale, group)
    ours = unrotate(scaled(values, scale, torch.float32), group)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("columns", [3, 8, 12])
def test_groups_that_no_rotation_has_are_refused(columns):
    with pytest.raises(ValueError, match="groups"):
        unrotate(torch.ones(2, columns), columns)


@given(st.sampled_from([(), (1,), (4,), (4, 1), (4, 2, 1), (4, 4, 1)]))
def test_scales_are_of_a_matrix_a_row_or_a_block(shape):
    values = torch.arange(32, dtype=torch.int8).reshape(4, 8)
    scale = torch.arange(1, 1 + torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
    made = scaled(values, scale, torch.float64)
    blocks = scale.numel() // 4 or 1
    each = scale.reshape(-1, 1).repeat_interleave(32 // scale.numel(), dim=1).reshape(4, 8)
    assert torch.equal(made, values.double() * each), blocks


@pytest.mark.parametrize("shape", [(3,), (3, 1), (4, 3, 1), (2, 2), (8,)])
def test_scales_of_another_matrix_are_refused(shape):
    assert not fits(torch.Size((4, 8)), torch.Size(shape))
    with pytest.raises(ValueError, match="a scale of shape"):
        scaled(torch.ones(4, 8), torch.ones(shape), torch.float32)


def test_products_are_rounded_once():
    values, scale = torch.tensor([[127, 3]], dtype=torch.int8), torch.tensor([[0.1]])
    assert torch.equal(scaled(values, scale, torch.float32), values * scale)
    assert torch.equal(scaled(values, scale, torch.bfloat16), (values * scale).bfloat16())
