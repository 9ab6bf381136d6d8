"""One name for each tensor, three spellings: ours, diffusers' and the original Wan checkpoints'.

Each table row is a module or parameter path in all three, `{i}` standing for a number; what follows
the path (`.weight`, `.lora_A.weight`) is kept. None: the tensor is unknown there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Literal, NamedTuple

from vidgen.models.vae import VAEConfig

Spelling = Literal["vidgen", "diffusers", "wan"]


class Names(NamedTuple):
    """One path in the three spellings."""

    vidgen: str
    diffusers: str | None
    wan: str | None


def rename(key: str, table: tuple[Names, ...], source: Spelling, target: Spelling) -> str | None:
    """Spell a key of `source` as `target` does; None if it isn't in the table or has no match."""
    for pattern, template in _rules(table, source, target):
        match = pattern.fullmatch(key)
        if match:
            return None if template is None else template.format(*match.groups())
    return None


def renamed(
    keys: Iterable[str], table: tuple[Names, ...], source: Spelling, target: Spelling
) -> dict[str, str]:
    """Map each key to its new spelling; keys without one are left out."""
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


DIT_KEYS: tuple[Names, ...] = (
    Names("patch_embed", "patch_embedding", "patch_embedding"),
    Names("time_embed.up", "condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    Names("time_embed.down", "condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    Names("time_embed.proj", "condition_embedder.time_proj", "time_projection.1"),
    Names("text_embed.up", "condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    Names("text_embed.down", "condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    Names(
        "image_embed.positions",
        "condition_embedder.image_embedder.pos_embed",
        "img_emb.emb_pos",
    ),
    Names("image_embed.norm_in", "condition_embedder.image_embedder.norm1", "img_emb.proj.0"),
    Names(
        "image_embed.ffn.up",
        "condition_embedder.image_embedder.ff.net.0.proj",
        "img_emb.proj.1",
    ),
    Names("image_embed.ffn.down", "condition_embedder.image_embedder.ff.net.2", "img_emb.proj.3"),
    Names("image_embed.norm_out", "condition_embedder.image_embedder.norm2", "img_emb.proj.4"),
    Names("blocks.{i}.modulation", "blocks.{i}.scale_shift_table", "blocks.{i}.modulation"),
    Names("blocks.{i}.self_attn.q", "blocks.{i}.attn1.to_q", "blocks.{i}.self_attn.q"),
    Names("blocks.{i}.self_attn.k", "blocks.{i}.attn1.to_k", "blocks.{i}.self_attn.k"),
    Names("blocks.{i}.self_attn.v", "blocks.{i}.attn1.to_v", "blocks.{i}.self_attn.v"),
    Names("blocks.{i}.self_attn.out", "blocks.{i}.attn1.to_out.0", "blocks.{i}.self_attn.o"),
    Names("blocks.{i}.self_attn.norm_q", "blocks.{i}.attn1.norm_q", "blocks.{i}.self_attn.norm_q"),
    Names("blocks.{i}.self_attn.norm_k", "blocks.{i}.attn1.norm_k", "blocks.{i}.self_attn.norm_k"),
    Names("blocks.{i}.cross_attn.q", "blocks.{i}.attn2.to_q", "blocks.{i}.cross_attn.q"),
    Names("blocks.{i}.cross_attn.k", "blocks.{i}.attn2.to_k", "blocks.{i}.cross_attn.k"),
    Names("blocks.{i}.cross_attn.v", "blocks.{i}.attn2.to_v", "blocks.{i}.cross_attn.v"),
    Names("blocks.{i}.cross_attn.out", "blocks.{i}.attn2.to_out.0", "blocks.{i}.cross_attn.o"),
    Names(
        "blocks.{i}.cross_attn.norm_q",
        "blocks.{i}.attn2.norm_q",
        "blocks.{i}.cross_attn.norm_q",
    ),
    Names(
        "blocks.{i}.cross_attn.norm_k",
        "blocks.{i}.attn2.norm_k",
        "blocks.{i}.cross_attn.norm_k",
    ),
    Names(
        "blocks.{i}.cross_attn.k_image",
        "blocks.{i}.attn2.add_k_proj",
        "blocks.{i}.cross_attn.k_img",
    ),
    Names(
        "blocks.{i}.cross_attn.v_image",
        "blocks.{i}.attn2.add_v_proj",
        "blocks.{i}.cross_attn.v_img",
    ),
    Names(
        "blocks.{i}.cross_attn.norm_k_image",
        "blocks.{i}.attn2.norm_added_k",
        "blocks.{i}.cross_attn.norm_k_img",
    ),
    Names("blocks.{i}.norm_cross", "blocks.{i}.norm2", "blocks.{i}.norm3"),
    Names("blocks.{i}.ffn.up", "blocks.{i}.ffn.net.0.proj", "blocks.{i}.ffn.0"),
    Names("blocks.{i}.ffn.down", "blocks.{i}.ffn.net.2", "blocks.{i}.ffn.2"),
    Names("head.modulation", "scale_shift_table", "head.modulation"),
    Names("head.proj", "proj_out", "head.head"),
)
"""`SpacetimeDiT`; its audio parts have no counterpart."""

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
    """The table of `CausalVAE(config)`.

    With stage shortcuts (Wan 2.2) blocks are counted within their stage. Without (Wan 2.1), Wan
    counts the blocks and resamplers of all stages in one list, and diffusers does in the encoder.
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


def _under(path: Names, parts: tuple[Names, ...]) -> list[Names]:
    return [
        Names(*(f"{above}.{below}" for above, below in zip(path, part, strict=True)))
        for part in parts
    ]
