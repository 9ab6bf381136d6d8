"""Names of tensors in three spellings: vidgen's, diffusers' and the original Wan checkpoints'.

Each table row gives a module or parameter path in all three, with `{i}` for a number; the rest of a
name (`.weight`, `.lora_A.weight`) is kept. None means that the spelling has no name for the tensor.
Names that match no row are unknown.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from operator import itemgetter
from typing import Literal, NamedTuple

import torch

from vidgen.models.vae import VAEConfig
from vidgen.weights.tensors import Lazy, Tensors, derived

Spelling = Literal["vidgen", "diffusers", "wan"]


class Names(NamedTuple):
    """One module or parameter path in the three spellings."""

    vidgen: str
    diffusers: str | None
    wan: str | None


def rename(key: str, table: tuple[Names, ...], source: Spelling, target: Spelling) -> str | None:
    """Translate a tensor's name from one spelling to another; None if it has no name there."""
    for pattern, template in _rules(table, source, target):
        match = pattern.fullmatch(key)
        if match:
            return None if template is None else template.format(*match.groups())
    return None


def renamed(
    keys: Iterable[str], table: tuple[Names, ...], source: Spelling, target: Spelling
) -> dict[str, str]:
    """Map each name to its name in `target`, without those that have none."""
    pairs = ((key, rename(key, table, source, target)) for key in keys)
    return {key: name for key, name in pairs if name is not None}


@lru_cache(maxsize=32)
def _rules(
    table: tuple[Names, ...], source: Spelling, target: Spelling
) -> tuple[tuple[re.Pattern[str], str | None], ...]:
    rules = []
    for names in table:
        path, other = getattr(names, source), getattr(names, target)
        if path is not None:
            pattern = re.escape(path).replace(r"\{i\}", r"(\d+)") + r"(|\..+)"
            template = None if other is None else other.replace("{i}", "{}") + "{}"
            rules.append((re.compile(pattern), template))
    return tuple(rules)


_DIT_BLOCK: tuple[Names, ...] = (
    Names("modulation", "scale_shift_table", "modulation"),
    Names("self_attn.q", "attn1.to_q", "self_attn.q"),
    Names("self_attn.k", "attn1.to_k", "self_attn.k"),
    Names("self_attn.v", "attn1.to_v", "self_attn.v"),
    Names("self_attn.out", "attn1.to_out.0", "self_attn.o"),
    Names("self_attn.norm_q", "attn1.norm_q", "self_attn.norm_q"),
    Names("self_attn.norm_k", "attn1.norm_k", "self_attn.norm_k"),
    Names("cross_attn.q", "attn2.to_q", "cross_attn.q"),
    Names("cross_attn.k", "attn2.to_k", "cross_attn.k"),
    Names("cross_attn.v", "attn2.to_v", "cross_attn.v"),
    Names("cross_attn.out", "attn2.to_out.0", "cross_attn.o"),
    Names("cross_attn.norm_q", "attn2.norm_q", "cross_attn.norm_q"),
    Names("cross_attn.norm_k", "attn2.norm_k", "cross_attn.norm_k"),
    Names("cross_attn.k_image", "attn2.add_k_proj", "cross_attn.k_img"),
    Names("cross_attn.v_image", "attn2.add_v_proj", "cross_attn.v_img"),
    Names("cross_attn.norm_k_image", "attn2.norm_added_k", "cross_attn.norm_k_img"),
    Names("norm_cross", "norm2", "norm3"),
    Names("ffn.up", "ffn.net.0.proj", "ffn.0"),
    Names("ffn.down", "ffn.net.2", "ffn.2"),
    Names("audio_ffn", None, None),
)
_CONTROL_BLOCK: tuple[Names, ...] = (
    *_DIT_BLOCK,
    Names("proj_in", "proj_in", "before_proj"),
    Names("proj_out", "proj_out", "after_proj"),
)
_IMAGE_EMBED: tuple[Names, ...] = (
    Names("positions", "pos_embed", "emb_pos"),
    Names("norm_in", "norm1", "proj.0"),
    Names("ffn.up", "ff.net.0.proj", "proj.1"),
    Names("ffn.down", "ff.net.2", "proj.3"),
    Names("norm_out", "norm2", "proj.4"),
)


def _under(path: Names, parts: tuple[Names, ...]) -> list[Names]:
    """Prefix the rows of a module's parts with the module's path."""
    return [
        Names(f"{path.vidgen}.{part.vidgen}",
              part.diffusers and f"{path.diffusers}.{part.diffusers}",
              part.wan and f"{path.wan}.{part.wan}")
        for part in parts
    ]


DIT_KEYS: tuple[Names, ...] = (
    Names("patch_embed", "patch_embedding", "patch_embedding"),
    Names("time_embed.up", "condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    Names("time_embed.down", "condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    Names("time_embed.proj", "condition_embedder.time_proj", "time_projection.1"),
    Names("text_embed.up", "condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    Names("text_embed.down", "condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    *_under(
        Names("image_embed", "condition_embedder.image_embedder", "img_emb"), _IMAGE_EMBED
    ),
    *_under(Names("blocks.{i}", "blocks.{i}", "blocks.{i}"), _DIT_BLOCK),
    Names("control_embed", "vace_patch_embedding", "vace_patch_embedding"),
    *_under(Names("control_blocks.{i}", "vace_blocks.{i}", "vace_blocks.{i}"), _CONTROL_BLOCK),
    Names("head.modulation", "scale_shift_table", "head.modulation"),
    Names("head.proj", "proj_out", "head.head"),
    Names("audio_embed", None, None),
    Names("head.audio_proj", None, None),
)
"""Names of `SpacetimeDiT`; its audio parts exist only in vidgen."""

_TEXT_BLOCK: tuple[Names, ...] = (
    *(Names(f"layer.0.SelfAttention.{n}", f"layer.0.SelfAttention.{n}", f"attn.{n}")
      for n in "qkvo"),
    *(
        Names(path, path, wan)
        for path, wan in (
            ("layer.0.SelfAttention.relative_attention_bias", "pos_embedding.embedding"),
            ("layer.0.layer_norm", "norm1"),
            ("layer.1.DenseReluDense.wi_0", "ffn.gate.0"),
            ("layer.1.DenseReluDense.wi_1", "ffn.fc1"),
            ("layer.1.DenseReluDense.wo", "ffn.fc2"),
            ("layer.1.layer_norm", "norm2"),
        )
    ),
)  # fmt: skip

TEXT_KEYS: tuple[Names, ...] = (
    Names("shared", "shared", "token_embedding"),
    *_under(Names("encoder.block.{i}", "encoder.block.{i}", "blocks.{i}"), _TEXT_BLOCK),
    Names("encoder.final_layer_norm", "encoder.final_layer_norm", "norm"),
)
"""Names of `UMT5Encoder`."""

_IMAGE_LAYER: tuple[Names, ...] = tuple(
    Names(path, path, wan)
    for path, wan in (
        ("layer_norm1", "norm1"),
        ("self_attn.q_proj", "attn.to_q"),
        ("self_attn.k_proj", "attn.to_k"),
        ("self_attn.v_proj", "attn.to_v"),
        ("self_attn.out_proj", "attn.proj"),
        ("layer_norm2", "norm2"),
        ("mlp.fc1", "mlp.0"),
        ("mlp.fc2", "mlp.2"),
    )
)

IMAGE_KEYS: tuple[Names, ...] = (
    *(
        Names(path, path, wan)
        for path, wan in (
            ("embeddings.class_embedding", "visual.cls_embedding"),
            ("embeddings.patch_embedding", "visual.patch_embedding"),
            ("embeddings.position_embedding.weight", "visual.pos_embedding"),
            ("pre_layrnorm", "visual.pre_norm"),
            ("post_layernorm", "visual.post_norm"),
        )
    ),
    *_under(
        Names("encoder.layers.{i}", "encoder.layers.{i}", "visual.transformer.{i}"), _IMAGE_LAYER
    ),
)
"""Names of CLIP's vision tower; `split_clip` first splits Wan's fused `to_qkv` into these three."""


_FUSED = ".attn.to_qkv."
_SPLIT = (".attn.to_q.", ".attn.to_k.", ".attn.to_v.")
_CLASS, _POSITIONS = "visual.cls_embedding", "visual.pos_embedding"
"""Names in Wan's CLIP of tensors with more axes than in transformers'."""


def split_clip(stored: Tensors) -> Tensors:
    """Split the fused projections of Wan's CLIP, and reshape its embeddings as in transformers.

    Tensors that aren't Wan's CLIP are returned unchanged.
    """
    if _CLASS not in stored:
        return stored
    tensors = Tensors()
    for name, lazy in stored.items():
        if _FUSED in name:
            for index, part in enumerate(_SPLIT):
                tensors[name.replace(_FUSED, part)] = derived(
                    lambda value, index=index: value.chunk(3)[index], lazy)
        elif name in (_CLASS, _POSITIONS):
            tensors[name] = derived(torch.flatten if name == _CLASS else itemgetter(0), lazy)
        else:
            tensors[name] = lazy
    return tensors


def fuse_clip(tensors: Mapping[str, Lazy]) -> dict[str, Lazy]:
    """Fuse and reshape tensors as in Wan's CLIP; the inverse of `split_clip`."""
    made: dict[str, Lazy] = {}
    for name, lazy in tensors.items():
        if name == _CLASS:
            made[name] = derived(lambda value: value[None, None], lazy)
        elif name == _POSITIONS:
            made[name] = derived(lambda value: value[None], lazy)
        elif _SPLIT[0] in name:
            parts = (tensors[name.replace(_SPLIT[0], part)] for part in _SPLIT)
            made[name.replace(_SPLIT[0], _FUSED)] = derived(lambda *qkv: torch.cat(qkv), *parts)
        elif not any(part in name for part in _SPLIT):
            made[name] = lazy
    return made


_VAE_BLOCK: tuple[Names, ...] = (
    Names("norm1.weight", "norm1.gamma", "residual.0.gamma"),
    Names("conv1", "conv1", "residual.2"),
    Names("norm2.weight", "norm2.gamma", "residual.3.gamma"),
    Names("conv2", "conv2", "residual.6"),
    Names("shortcut", "conv_shortcut", "shortcut"),
)
_VAE_ATTENTION: tuple[Names, ...] = (
    Names("norm.weight", "norm.gamma", "norm.gamma"),
    Names("to_qkv", "to_qkv", "to_qkv"),
    Names("proj", "proj", "proj"),
)
_VAE_RESAMPLE: tuple[Names, ...] = (
    Names("conv", "resample.1", "resample.1"),
    Names("time_conv", "time_conv", "time_conv"),
)


@lru_cache(maxsize=8)
def vae_keys(config: VAEConfig) -> tuple[Names, ...]:
    """Return the names of `CausalVAE(config)`.

    With stage shortcuts (Wan 2.2) blocks are numbered within each stage. Without (Wan 2.1), Wan
    numbers the blocks and resamplers of all stages in one list, as diffusers does in the encoder.
    """
    rows = [
        Names("encoder.to_moments", "quant_conv", "conv1"),
        Names("decoder.from_latents", "post_quant_conv", "conv2"),
    ]
    for side, way in (("encoder", "down"), ("decoder", "up")):
        body = [
            Names("conv_in", "conv_in", "conv1"),
            *_under(Names("mid.block1", "mid_block.resnets.0", "middle.0"), _VAE_BLOCK),
            *_under(Names("mid.attention", "mid_block.attentions.0", "middle.1"), _VAE_ATTENTION),
            *_under(Names("mid.block2", "mid_block.resnets.1", "middle.2"), _VAE_BLOCK),
            Names("norm_out.weight", "norm_out.gamma", "head.0.gamma"),
            Names("conv_out", "conv_out", "head.2"),
        ]
        num_blocks = config.num_blocks + (way == "up")
        for stage in range(config.num_stages):
            for index in range(num_blocks + 1):
                resample = index == num_blocks
                flat = stage * (num_blocks + 1) + index
                ours = f"stages.{stage}." + (f"{way}sample" if resample else f"blocks.{index}")
                if config.stage_shortcuts:
                    part = f"{way}sampler" if resample else f"resnets.{index}"
                    theirs = f"{way}_blocks.{stage}.{part}"
                    wan = f"{way}samples.{stage}.{way}samples.{index}"
                else:
                    part = "upsamplers.0" if resample else f"resnets.{index}"
                    theirs = f"up_blocks.{stage}.{part}" if way == "up" else f"down_blocks.{flat}"
                    wan = f"{way}samples.{flat}"
                parts = _VAE_RESAMPLE if resample else _VAE_BLOCK
                body += _under(Names(ours, theirs, wan), parts)
        rows += _under(Names(side, side, side), tuple(body))
    return tuple(rows)
