"""Tiny transformers with random weights, and adapters that change all of their layers."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from train.toybox.initial import init_dit
from vidgen.models.dit import SpacetimeDiT
from vidgen.models.dit_blocks import PatchEmbedding
from vidgen.models.dit_types import AudioConfig, DiTConfig
from vidgen.models.lora import Adapter, LowRank
from vidgen.models.presets import DIT_PRESETS
from vidgen.weights.lora import spelled

TINY = DIT_PRESETS["tiny"]
I2V = replace(TINY, image_dim=20, image_positions=10)
WHOLE = replace(I2V, control_layers=(0,), control_channels=6)
SOUND = replace(TINY, audio=AudioConfig(channels=3, ffn_dim=16, tokens_per_s=5.0))
DIFFS = ("blocks.0.norm_cross.weight", "blocks.0.norm_cross.bias", "blocks.1.modulation",
         "blocks.1.cross_attn.norm_k.weight", "head.modulation", "blocks.0.ffn.up.weight",
         "time_embed.up.bias", "patch_embed.bias")  # fmt: skip


def make_dit(config: DiTConfig = TINY, dtype: torch.dtype = torch.float32) -> SpacetimeDiT:
    torch.manual_seed(0)
    dit = SpacetimeDiT(config)
    init_dit(dit)
    for parameter in dit.parameters():  # fresh gates are zero: a model that does nothing
        parameter.data += 0.1 * torch.randn_like(parameter)
    return dit.eval().requires_grad_(requires_grad=False).to(dtype)


def linear_paths(module: nn.Module) -> tuple[str, ...]:
    """Paths of all layers that can have a delta of low rank."""
    return tuple(path for path, layer in module.named_modules()
                 if isinstance(layer, (nn.Linear, PatchEmbedding)))


def make_adapter(
    dit: SpacetimeDiT, *, seed: int = 1, rank: int = 3, scale: float = 0.5, diffs: tuple = ()
) -> Adapter:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return 0.3 * torch.randn(shape, generator=generator)

    low_rank = {}
    for path in linear_paths(dit):
        weight = dit.get_submodule(path).weight
        down, up = draw(rank, *weight.shape[1:]), draw(weight.shape[0], rank)
        low_rank[path] = LowRank(down, up, scale)
    parameters = dict(dit.named_parameters())
    return Adapter(f"a{seed}", low_rank, {name: draw(*parameters[name].shape) for name in diffs})


def write_kohya(adapter: Adapter, path: Path) -> None:
    """As kohya's trainers write: flat names of Wan's layers, and the rank times the scale."""
    tensors = {}
    for name, tensor in spelled(adapter, "wan").items():
        layer, _, what = name.removeprefix("diffusion_model.").partition(".lora_")
        if not what:
            layer, _, what = layer.rpartition(".")
        what = {"A.weight": "lora_down.weight", "B.weight": "lora_up.weight"}.get(what, what)
        flat = f"lora_unet_{layer.replace('.', '_')}"
        tensors[f"{flat}.{what}"] = tensor
        if what == "lora_down.weight":
            tensors[f"{flat}.alpha"] = torch.tensor(float(len(tensor)))
    save_file(tensors, path)


def write_peft(adapter: Adapter, folder: Path) -> None:
    """As PEFT writes: a folder with a config, whose alpha here is the rank."""
    folder.mkdir(parents=True)
    tensors = {name.replace("transformer.", "base_model.model.", 1): tensor
               for name, tensor in spelled(adapter, "diffusers").items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    rank = next(len(tensor) for name, tensor in tensors.items() if "lora_A" in name)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank}
    (folder / "adapter_config.json").write_text(json.dumps(config))
