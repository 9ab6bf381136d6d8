"""Quantised weights in files are found and widened as the programs that write them widen them."""

from __future__ import annotations

import json
from pathlib import Path

import comfy_kitchen
import gguf
import numpy as np
import pytest
import torch
from comfy_kitchen.backends.eager import quantization as kitchen
from safetensors.torch import save_file
from torch import Tensor, nn

from vidgen.core.errors import ModelError
from vidgen.ops.quantized import QuantizedEmbedding, QuantizedLinear
from vidgen.weights.load import load_module
from vidgen.weights.packed import Packed
from vidgen.weights.store import open_tensors
from vidgen.weights.tensors import Tensors

N, K = 96, 256


def matrix() -> Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(0)) / 16


def facts(**values: object) -> Tensor:
    return torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)


def fp8(scale: Tensor) -> Tensor:
    blocks = matrix().reshape(*scale.shape[:2], -1) if scale.ndim == 3 else matrix()
    return (blocks / scale).clamp(-448, 448).to(torch.float8_e4m3fn).reshape(N, K)


def old_comfy() -> tuple[dict[str, Tensor], Tensor, dict[str, str]]:
    scale = matrix().abs().max() / 448
    numbers = fp8(scale)
    return ({"scaled_fp8": torch.empty(2, dtype=torch.float8_e4m3fn), "x.weight": numbers,
             "x.scale_weight": scale, "x.scale_input": torch.tensor(2.0)},
            comfy_kitchen.dequantize_per_tensor_fp8(numbers, scale, torch.float32), {})


def musubi_rows() -> tuple[dict[str, Tensor], Tensor, dict[str, str]]:
    scale = matrix().abs().amax(1, keepdim=True) / 448
    return {"x.weight": fp8(scale), "x.scale_weight": scale}, fp8(scale).float() * scale, {}


def musubi_blocks() -> tuple[dict[str, Tensor], Tensor, dict[str, str]]:
    scale = matrix().reshape(N, 4, -1).abs().amax(2, keepdim=True) / 448
    wide = (fp8(scale).float().reshape(N, 4, -1) * scale).reshape(N, K)
    return {"x.weight": fp8(scale), "x.scale_weight": scale}, wide, {}


def new_comfy(kind: torch.dtype = torch.float8_e4m3fn) -> tuple[
        dict[str, Tensor], Tensor, dict[str, str]]:
    scale = matrix().abs().max() / 448
    numbers = comfy_kitchen.quantize_per_tensor_fp8(matrix(), scale, kind)
    name = str(kind).removeprefix("torch.")
    return ({"x.weight": numbers, "x.weight_scale": scale, "x.input_scale": torch.tensor(1.0),
             "x.comfy_quant": facts(format=name, full_precision_matrix_mult=True)},
            comfy_kitchen.dequantize_per_tensor_fp8(numbers, scale, torch.float32), {})


def new_comfy_e5m2() -> tuple[dict[str, Tensor], Tensor, dict[str, str]]:
    return new_comfy(torch.float8_e5m2)


def comfy_header() -> tuple[dict[str, Tensor], Tensor, dict[str, str]]:
    tensors, wide, _ = new_comfy()
    del tensors["x.comfy_quant"]
    header = {"format_version": "1.0", "layers": {"x": {"format": "float8_e4m3fn"}}}
    return tensors, wide, {"_quantization_metadata": json.dumps(header)}


def mxfp8() -> tuple[dict[str, Tensor], Tensor, dict[str, str]]:
    numbers, scale = comfy_kitchen.quantize_mxfp8(matrix())
    return ({"x.weight": numbers, "x.weight_scale": scale, "x.comfy_quant": facts(format="mxfp8")},
            comfy_kitchen.dequantize_mxfp8(numbers, scale, torch.float32), {})


def nvfp4() -> tuple[dict[str, Tensor], Tensor, dict[str, str]]:
    whole = matrix().abs().max() / (448 * 6)
    numbers, scale = comfy_kitchen.quantize_nvfp4(matrix(), whole)
    return ({"x.weight": numbers, "x.weight_scale": scale, "x.weight_scale_2": whole,
             "x.comfy_quant": facts(format="nvfp4")},
            comfy_kitchen.dequantize_nvfp4(numbers, whole, scale, torch.float32), {})


def rotated() -> tuple[dict[str, Tensor], Tensor, dict[str, str]]:
    numbers, scale = kitchen.quantize_int8_convrot_weight(matrix(), 256)
    return ({"x.weight": numbers, "x.weight_scale": scale, "x.comfy_quant": facts(
                format="int8_tensorwise", convrot=True, convrot_groupsize=256)},
            kitchen.dequantize_int8_convrot_weight(numbers, scale, 256), {})


def lightx2v() -> tuple[dict[str, Tensor], Tensor, dict[str, str]]:
    """Rows of int8; torchao widens the same numbers and scales."""
    from torchao.quantization import Int8Tensor, PerRow

    made = Int8Tensor.from_hp(matrix(), granularity=PerRow())
    numbers, scale = made.qdata, made.scale.float().reshape(N, 1)
    return ({"x.weight": numbers, "x.weight_scale": scale}, made.dequantize(torch.float32), {})


FORMS = (old_comfy, musubi_rows, musubi_blocks, new_comfy, new_comfy_e5m2, comfy_header, mxfp8,
         nvfp4, rotated, lightx2v)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_weights_are_widened_as_by_their_writers(tmp_path, form):
    tensors, wide, header = form()
    save_file(tensors | {"x.bias": torch.ones(N)}, tmp_path / "m.safetensors", header)
    stored = open_tensors([tmp_path / "m.safetensors"])
    assert stored.keys() == {"x.weight", "x.bias"}
    weight = stored["x.weight"]
    assert isinstance(weight, Packed)
    assert weight.likeness.shape == (N, K)
    torch.testing.assert_close(weight.get(), wide, rtol=1e-6, atol=1e-7)
    held = [name for name in ("x.weight", "x.weight_scale", "x.scale_weight", "x.weight_scale_2")
            if name in tensors]
    assert weight.num_bytes == sum(tensors[name].nbytes for name in held)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_hold_them_as_stored(tmp_path, form, dtype):
    tensors, wide, header = form()
    save_file(tensors | {"x.bias": torch.ones(N)}, tmp_path / "model.safetensors", header)
    module = load_module(lambda: nn.ModuleDict({"x": nn.Linear(K, N)}), tmp_path, dtype, "cpu")
    layer = module["x"]
    assert isinstance(layer, QuantizedLinear)
    x = torch.randn(5, K).to(dtype)
    expected = nn.functional.linear(x, wide.to(dtype), torch.ones(N, dtype=dtype))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(layer(x), expected, rtol=tolerance, atol=tolerance)
    held = sum(value.nbytes for value in layer.state_dict().values()) - layer.bias.nbytes
    assert held <= sum(value.nbytes for value in tensors.values())


@pytest.mark.parametrize("kind", ["Q8_0", "Q6_K"])
def test_an_embedding_widens_the_rows_that_are_looked_up(tmp_path, kind):
    wide = write_gguf(tmp_path / "m.gguf", kind)
    stored = Tensors({"x.weight": open_tensors([tmp_path / "m.gguf"])["x.weight"]})
    module = load_module(lambda: nn.ModuleDict({"x": nn.Embedding(N, K)}), stored, torch.bfloat16,
                         "cpu")
    assert isinstance(module["x"], QuantizedEmbedding)
    ids = torch.tensor([[3, 95], [0, 3]])
    assert torch.equal(module["x"](ids), wide.bfloat16()[ids])


def test_quantised_weights_are_not_spread_over_devices(tmp_path):
    save_file(musubi_rows()[0] | {"x.bias": torch.ones(N)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="leave --shard out"):
        load_module(lambda: nn.ModuleDict({"x": nn.Linear(K, N)}), tmp_path, torch.bfloat16, "cpu",
                    mesh=object())


def test_float8_without_scales_is_cast(tmp_path):
    numbers = matrix().to(torch.float8_e4m3fn)
    save_file({"x.weight": numbers, "x.bias": torch.ones(N)}, tmp_path / "model.safetensors")
    module = load_module(lambda: nn.ModuleDict({"x": nn.Linear(K, N)}), tmp_path, torch.bfloat16,
                         "cpu")
    assert torch.equal(module["x"].weight, numbers.bfloat16())


WRONG = {
    "unknown format": (lambda t: t | {"x.comfy_quant": facts(format="asym_w4a8_int8")},
                       r"x have the format 'asym_w4a8_int8'.*nvfp4"),
    "unknown property": (lambda t: t | {"x.comfy_quant": facts(format="float8_e4m3fn",
                                                               pre_quant_scale=True)},
                         "the property pre_quant_scale, which this version can't apply"),
    "rotated float8": (lambda t: t | {"x.comfy_quant": facts(format="float8_e4m3fn", convrot=True)},
                       "rotated float8_e4m3fn weights; .* int8_tensorwise only"),
    "another dtype": (lambda t: t | {"x.comfy_quant": facts(format="int8_tensorwise")},
                      "describes x as int8_tensorwise, but its weights are float8_e4m3fn"),
    "no scale": (lambda t: {k: v for k, v in t.items() if k != "x.weight_scale"},
                 r"x\.weight_scale is missing"),
    "another scale": (lambda t: t | {"x.weight_scale": torch.ones(7)},
                      r"a scale of shape \[7\] for \[96, 256\] numbers"),
    "no JSON": (lambda t: t | {"x.comfy_quant": torch.tensor([123, 255], dtype=torch.uint8)},
                r"x isn't JSON"),
    "a list": (lambda t: t | {"x.comfy_quant": torch.tensor(list(b"[1]"), dtype=torch.uint8)},
               r"x isn't JSON"),
}


@pytest.mark.parametrize("case", WRONG)
def test_forms_that_cannot_be_read_are_refused(tmp_path, case):
    change, message = WRONG[case]
    save_file(change(new_comfy()[0]), tmp_path / "m.safetensors")
    with pytest.raises(ModelError, match=message):
        open_tensors([tmp_path / "m.safetensors"])


KINDS = ["F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "Q5_0", "Q5_1",
         "Q4_0", "Q4_1", "IQ4_NL", "IQ4_XS"]
HALVES = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2),
          "Q5_K": (0, 2), "Q6_K": (208,)}


def write_gguf(path: Path, kind: str) -> Tensor:
    """Write a matrix and a bias; return the matrix as gguf widens it."""
    writer = gguf.GGUFWriter(path, "wan")
    whole = gguf.GGMLQuantizationType[kind]
    if kind in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"):
        data = gguf.quantize(matrix().numpy(), whole)
    else:  # gguf can't write these: random valid blocks
        rng = np.random.default_rng(0)
        size = gguf.GGML_QUANT_SIZES[whole]
        blocks = rng.integers(0, 256, (N * K // size[0], size[1]), dtype=np.uint8)
        for place in HALVES.get(kind, (0,)):
            halves = (rng.standard_normal(len(blocks)) / 100).astype(np.float16)
            blocks[:, place : place + 2] = halves.view(np.uint8).reshape(-1, 2)
        data = blocks.reshape(N, -1)
    writer.add_tensor("x.weight", data, raw_dtype=whole)
    writer.add_tensor("x.bias", np.ones(N, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return torch.from_numpy(gguf.dequantize(data, whole).reshape(N, K))


@pytest.mark.parametrize("kind", KINDS)
def test_gguf_is_read_as_gguf_reads_it(tmp_path, kind):
    wide = write_gguf(tmp_path / "m.gguf", kind)
    stored = open_tensors([tmp_path / "m.gguf"])
    assert list(stored) == ["x.weight", "x.bias"]
    assert stored["x.weight"].likeness.shape == (N, K)
    assert torch.equal(stored["x.weight"].get().float(), wide)
    assert torch.equal(stored["x.bias"].get(), torch.ones(N))
    module = load_module(lambda: nn.ModuleDict({"x": nn.Linear(K, N)}), stored, torch.float32,
                         "cpu")
    assert isinstance(module["x"], QuantizedLinear) == (kind not in ("F32", "F16", "BF16"))
    x = torch.randn(3, K)
    assert torch.equal(module["x"](x), nn.functional.linear(x, wide, torch.ones(N)))


def test_a_gguf_names_shapes_of_more_sides(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "wan")
    kernel = np.arange(64, dtype=np.float32).reshape(4, 2, 1, 2, 4)
    writer.add_array("comfy.gguf.orig_shape.patch.weight", list(kernel.shape))
    writer.add_tensor("patch.weight", kernel.reshape(4, 16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = open_tensors([tmp_path / "m.gguf"])["patch.weight"]
    assert torch.equal(read.get(), torch.from_numpy(kernel))


@pytest.mark.parametrize(("content", "message"), [
    (b"", "is empty"), (b"<!DOCTYPE html><html>", "is a web page instead of weights"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a Git LFS pointer"),
    ((2 << 30).to_bytes(8, "little") + b"{" + b" " * 100, r"header alone would have [\d.]+ GB"),
    (b"GGUF but no safetensors", "isn't a whole safetensors file"),
])
def test_files_that_are_something_else_are_named(tmp_path, content, message):
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=message):
        open_tensors([path])
