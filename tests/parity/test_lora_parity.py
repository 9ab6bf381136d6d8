"""LoRA against PEFT and diffusers: their files in our DiT, our files in theirs, fp32."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from diffusers.loaders.lora_conversion_utils import (
    _convert_musubi_wan_lora_to_diffusers as from_kohya,
)
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_wan_lora_to_diffusers as from_wan,
)
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from tests.lora_models import linear_paths, write_kohya
from tests.parity.test_dit_parity import make_inputs, make_pair, relative_error
from vidgen.models.dit import SpacetimeDiT
from vidgen.models.dit_types import DiTConfig
from vidgen.models.lora import Adapter, LowRank, attached
from vidgen.models.presets import DIT_PRESETS
from vidgen.weights.lora import read_lora, write_lora

TINY = DIT_PRESETS["tiny"]
I2V = replace(TINY, in_channels=12, image_dim=20)
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj"]
BLOCKS = [*ATTENTION, "ffn.net.0.proj", "ffn.net.2"]
EMBEDDERS = ["time_proj", "linear_1", "linear_2", "proj_out", "image_embedder.ff.net.2"]
Pair = tuple[SpacetimeDiT, WanTransformer3DModel]


def make_config(targets: list[str] = BLOCKS, **options) -> LoraConfig:
    settings = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, "target_modules": targets}
    return LoraConfig(**settings | options)


def velocity(model: torch.nn.Module, seed: int = 3) -> torch.Tensor:
    torch.manual_seed(seed)
    theirs = isinstance(model, WanTransformer3DModel)
    config = I2V if "image_embed" in str(model) else TINY
    inputs = make_inputs(config)
    image = torch.randn(2, 5, config.image_dim) if config.image_dim else None
    with torch.no_grad():
        if theirs:
            return model(*inputs, image).sample
        return model(*inputs, image_context=image)


def with_adapters(ours: SpacetimeDiT, *adapters: tuple[Adapter, float]) -> torch.Tensor:
    with attached(ours, adapters):
        changed = velocity(ours)
    assert relative_error(velocity(ours), changed) > 0.05
    return changed


def make_adapter(ours: SpacetimeDiT, *, only: str = "", bias: bool = True) -> Adapter:
    """Random factors for all layers whose path holds `only`, and differences of their biases."""
    torch.manual_seed(7)
    low_rank, deltas = {}, {}
    for index, path in enumerate(p for p in linear_paths(ours) if only in p):
        weight, r = ours.get_submodule(path).weight, 3 + index % 2
        down = 0.3 * torch.randn(r, *weight.shape[1:])
        low_rank[path] = LowRank(down, 0.3 * torch.randn(weight.shape[0], r), 0.7)
        if bias:
            deltas[f"{path}.bias"] = 0.3 * torch.randn(weight.shape[0])
    return Adapter("ours", low_rank, deltas)


@pytest.mark.parametrize(
    ("model", "config"),
    [
        (TINY, make_config()),
        (TINY, make_config(use_rslora=True)),
        (TINY, make_config(rank_pattern={"to_k": 2}, alpha_pattern={"blocks.1.attn1.to_q": 1})),
        (TINY, make_config(["to_q", "linear_1"], lora_bias=True)),
        (I2V, make_config([*BLOCKS, *EMBEDDERS, "patch_embedding"])),
    ],
    ids=["plain", "rslora", "patterns", "bias", "every layer"],
)
def test_a_peft_folder_equals_pefts_merged_model(model: DiTConfig, config, tmp_path: Path):
    ours, theirs = make_pair(model)
    plain = velocity(theirs)
    wrapped = get_peft_model(theirs, config)
    wrapped.save_pretrained(tmp_path)
    merged = velocity(wrapped.merge_and_unload())
    adapter = read_lora(tmp_path, model)
    assert relative_error(plain, merged) > 0.05
    assert relative_error(with_adapters(ours, (adapter, 1.0)), merged) < 1e-5


@pytest.mark.parametrize("weights", [(0.6, 1.3), (1.0, -0.8)])
def test_two_adapters_at_once_equal_pefts(weights, tmp_path: Path):
    ours, theirs = make_pair(TINY)
    wrapped = get_peft_model(theirs, make_config(), "first")
    wrapped.add_adapter("second", make_config(["to_q", "ffn.net.2"], r=2, lora_alpha=3))
    wrapped.save_pretrained(tmp_path)
    wrapped.base_model.set_adapter(["first", "second"])
    for name, weight in zip(("first", "second"), weights, strict=True):
        for layer in wrapped.modules():
            if name in getattr(layer, "scaling", {}):
                layer.scaling[name] *= weight
    merged = velocity(wrapped.merge_and_unload())
    adapters = [read_lora(tmp_path / name, TINY) for name in ("first", "second")]
    assert relative_error(with_adapters(ours, *zip(adapters, weights, strict=True)), merged) < 1e-5


def test_diffusers_own_file_with_its_config_in_the_header(tmp_path: Path):
    ours, theirs = make_pair(TINY)
    config = make_config(alpha_pattern={"to_v": 1})
    theirs.add_adapter(config)
    WanPipeline.save_lora_weights(
        tmp_path, get_peft_model_state_dict(theirs, adapter_name="default"),
        transformer_lora_adapter_metadata=config.to_dict(),
    )  # fmt: skip
    adapter = read_lora(tmp_path / "pytorch_lora_weights.safetensors", TINY)
    assert {part.scale for part in adapter.low_rank.values()} == {1.5, 0.25}
    assert relative_error(with_adapters(ours, (adapter, 1.0)), velocity(theirs)) < 1e-5


@pytest.mark.parametrize("model", [TINY, I2V], ids=["t2v", "i2v"])
def test_diffusers_loads_what_we_write(model: DiTConfig, tmp_path: Path):
    ours, theirs = make_pair(model)
    adapter = make_adapter(ours)
    write_lora(adapter, tmp_path / "l.safetensors", "diffusers")
    theirs.load_lora_adapter(load_file(tmp_path / "l.safetensors"), prefix="transformer")
    assert relative_error(velocity(theirs), with_adapters(ours, (adapter, 1.0))) < 1e-5


@pytest.mark.parametrize("weight", [1.0, -0.4])
@pytest.mark.parametrize(
    ("dialect", "only", "bias"),
    [("diffusers", "", True), ("wan", "", True), ("wan", "blocks", False)],
)
def test_a_pipeline_loads_every_dialect(dialect, only, bias, weight, tmp_path: Path):
    """Through diffusers' own converters."""
    ours, theirs = make_pair(TINY)
    adapter = make_adapter(ours, only=only, bias=bias)
    if dialect == "wan":  # diffusers' converter has no name for the patch embedding
        kept = {path: part for path, part in adapter.low_rank.items() if path != "patch_embed"}
        deltas = {n: d for n, d in adapter.deltas.items() if n != "patch_embed.bias"}
        adapter = Adapter("ours", kept, deltas)
    write_lora(adapter, tmp_path / "l.safetensors", dialect)
    pipeline = WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=theirs,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip
    pipeline.load_lora_weights(tmp_path, weight_name="l.safetensors", adapter_name="a")
    pipeline.set_adapters(["a"], [weight])
    ours_with = with_adapters(ours, (adapter, weight))
    assert relative_error(velocity(theirs), ours_with) < 1e-5
    again = with_adapters(ours, (read_lora(tmp_path / "l.safetensors", TINY), weight))
    assert relative_error(again, ours_with) < 1e-5


@pytest.mark.parametrize("dialect", ["wan", "kohya"])
def test_the_image_layers_come_through_diffusers_converters(dialect, tmp_path: Path):
    ours, theirs = make_pair(I2V)
    adapter, path = make_adapter(ours, only="blocks", bias=dialect == "wan"), tmp_path / "l.st"
    write_lora(adapter, path, "wan") if dialect == "wan" else write_kohya(adapter, path)
    convert = from_wan if dialect == "wan" else from_kohya
    theirs.load_lora_adapter(convert(load_file(path)), prefix="transformer")
    assert relative_error(velocity(theirs), with_adapters(ours, (adapter, 1.0))) < 1e-5


def test_alphas_mean_what_diffusers_takes_them_for(tmp_path: Path):
    """A file with lora_down, lora_up and alpha under original names, read by both."""
    ours, theirs = make_pair(TINY)
    write_kohya(make_adapter(ours, only="blocks", bias=False), tmp_path / "k.safetensors")
    flat = load_file(tmp_path / "k.safetensors")
    tensors = {}
    for name, tensor in flat.items():
        layer, _, rest = name.removeprefix("lora_unet_").partition(".")
        for old, new in (("blocks_0_", "blocks.0."), ("blocks_1_", "blocks.1."),
                         ("attn_", "attn."), ("ffn_", "ffn.")):  # fmt: skip
            layer = layer.replace(old, new)
        tensors[f"diffusion_model.{layer}.{rest}"] = tensor
    save_file(tensors, tmp_path / "w.safetensors")
    adapter = read_lora(tmp_path / "w.safetensors", TINY)
    theirs.load_lora_adapter(from_wan(copy.copy(tensors)), prefix="transformer")
    assert relative_error(velocity(theirs), with_adapters(ours, (adapter, 1.0))) < 1e-5


def test_bf16_is_no_worse_than_diffusers(tmp_path: Path):
    ours, theirs = make_pair(TINY)
    adapter = make_adapter(ours, only="blocks", bias=False)
    exact = with_adapters(ours, (adapter, 1.0))
    write_lora(adapter, tmp_path / "l.safetensors", "diffusers")
    theirs.load_lora_adapter(load_file(tmp_path / "l.safetensors"), prefix="transformer")
    half, their_half = ours.bfloat16(), theirs.bfloat16()
    torch.manual_seed(3)
    latents, timestep, context = make_inputs(TINY)
    with torch.no_grad():
        expected = their_half(latents.bfloat16(), timestep, context.bfloat16()).sample
        with attached(half, [(adapter, 1.0)]):
            given = half(latents.bfloat16(), timestep, context.bfloat16())
    assert relative_error(given.float(), exact) < 1.2 * relative_error(expected.float(), exact)
