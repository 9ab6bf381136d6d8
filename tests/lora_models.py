"""Tiny transformers with random weights, and adapters that change all of their layers."""

from dataclasses import replace

import torch
from torch import nn

from train.toybox.initial import init_dit
from vidgen.models.dit import SpacetimeDiT
from vidgen.models.dit_blocks import PatchEmbedding
from vidgen.models.dit_types import AudioConfig, DiTConfig
from vidgen.models.lora import Adapter, LowRank
from vidgen.models.presets import DIT_PRESETS

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
