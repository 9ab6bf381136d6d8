"""Names of our parameters in other people's checkpoints.

A rule is (pattern, replacement) for `re.sub`; the rules of a tuple are applied in order to a whole
name of ours. Only this direction is written down: the other one is the inverse of the resulting
one-to-one map.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from vidgen.models.vae import VAEConfig

Rules = tuple[tuple[str, str], ...]

VAE_TO_DIFFUSERS: Rules = (
    (r"^encoder\.to_moments\.", "quant_conv."),
    (r"^decoder\.from_latents\.", "post_quant_conv."),
    (r"\.mid\.block1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attention\.", ".mid_block.attentions.0."),
    (r"^encoder\.stages\.(\d+)\.blocks\.", r"encoder.down_blocks.\1.resnets."),
    (r"^encoder\.stages\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsampler."),
    (r"^decoder\.stages\.(\d+)\.blocks\.", r"decoder.up_blocks.\1.resnets."),
    (r"^decoder\.stages\.(\d+)\.upsample\.", r"decoder.up_blocks.\1.upsampler."),
    (r"sampler\.conv\.", "sampler.resample.1."),
    (r"\.shortcut\.", ".conv_shortcut."),
    (r"(norm1|norm2|norm_out|attentions\.0\.norm)\.weight$", r"\1.gamma"),
)
"""`CausalVAE` -> `AutoencoderKLWan` with is_residual=True; see `vae_to_diffusers` for the other."""


def vae_to_diffusers(config: VAEConfig) -> Rules:
    """Rules from `CausalVAE(config)` to `AutoencoderKLWan`.

    Without stage shortcuts the encoder of diffusers counts blocks and downsamplers of all stages
    in one list, and the decoder's upsampler stands in a list of one.
    """
    if config.stage_shortcuts:
        return VAE_TO_DIFFUSERS
    flat = []
    for stage in range(config.num_stages):
        start = stage * (config.num_blocks + 1)
        flat += [
            (rf"^encoder\.down_blocks\.{stage}\.resnets\.{n}\.", f"encoder.DOWN.{start + n}.")
            for n in range(config.num_blocks)
        ]
        end = start + config.num_blocks
        flat.append((rf"^encoder\.down_blocks\.{stage}\.downsampler\.", f"encoder.DOWN.{end}."))
    return (
        *VAE_TO_DIFFUSERS,
        *flat,
        (r"^encoder\.DOWN\.", "encoder.down_blocks."),
        (r"^(decoder\.up_blocks\.\d+)\.upsampler\.", r"\1.upsamplers.0."),
    )


def rename(name: str, rules: Rules) -> str:
    """`name` after all rules."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def name_map(names: Iterable[str], rules: Rules) -> dict[str, str]:
    """Our names -> theirs.

    Raises:
        ValueError: if two of our names meet in one of theirs.
    """
    pairs = {name: rename(name, rules) for name in names}
    if len(set(pairs.values())) != len(pairs):
        raise ValueError("the rules give two parameters one name")
    return pairs


DIT_TO_DIFFUSERS: Rules = (
    (r"^patch_embed\.", "patch_embedding."),
    (r"^time_embed\.up\.", "condition_embedder.time_embedder.linear_1."),
    (r"^time_embed\.down\.", "condition_embedder.time_embedder.linear_2."),
    (r"^time_embed\.proj\.", "condition_embedder.time_proj."),
    (r"^text_embed\.up\.", "condition_embedder.text_embedder.linear_1."),
    (r"^text_embed\.down\.", "condition_embedder.text_embedder.linear_2."),
    (r"^image_embed\.positions$", "condition_embedder.image_embedder.pos_embed"),
    (r"^image_embed\.norm_in\.", "condition_embedder.image_embedder.norm1."),
    (r"^image_embed\.ffn\.up\.", "condition_embedder.image_embedder.ff.net.0.proj."),
    (r"^image_embed\.ffn\.down\.", "condition_embedder.image_embedder.ff.net.2."),
    (r"^image_embed\.norm_out\.", "condition_embedder.image_embedder.norm2."),
    (r"^(blocks\.\d+\.)modulation$", r"\1scale_shift_table"),
    (r"^(blocks\.\d+\.)norm_cross\.", r"\1norm2."),
    (r"^(blocks\.\d+\.)ffn\.up\.", r"\1ffn.net.0.proj."),
    (r"^(blocks\.\d+\.)ffn\.down\.", r"\1ffn.net.2."),
    (r"\.([qkv])_image\.", r".add_\1_proj."),
    (r"\.norm_k_image\.", ".norm_added_k."),
    (r"_attn\.([qkv])\.", r"_attn.to_\1."),
    (r"_attn\.out\.", "_attn.to_out.0."),
    (r"\.self_attn\.", ".attn1."),
    (r"\.cross_attn\.", ".attn2."),
    (r"^head\.modulation$", "scale_shift_table"),
    (r"^head\.proj\.", "proj_out."),
)
"""`SpacetimeDiT` -> `WanTransformer3DModel`; the audio parts have no counterpart."""

DIT_TO_WAN: Rules = (
    (r"^patch_embed\.", "patch_embedding."),
    (r"^time_embed\.proj\.", "time_projection.1."),
    (r"^(time|text)_embed\.up\.", r"\1_embedding.0."),
    (r"^(time|text)_embed\.down\.", r"\1_embedding.2."),
    (r"^image_embed\.positions$", "img_emb.emb_pos"),
    (r"^image_embed\.norm_in\.", "img_emb.proj.0."),
    (r"^image_embed\.ffn\.up\.", "img_emb.proj.1."),
    (r"^image_embed\.ffn\.down\.", "img_emb.proj.3."),
    (r"^image_embed\.norm_out\.", "img_emb.proj.4."),
    (r"\.norm_cross\.", ".norm3."),
    (r"\.ffn\.up\.", ".ffn.0."),
    (r"\.ffn\.down\.", ".ffn.2."),
    (r"_attn\.out\.", "_attn.o."),
    (r"_image\.", "_img."),
    (r"^head\.proj\.", "head.head."),
)
"""`SpacetimeDiT` -> the original checkpoints of Wan 2.1 and 2.2."""


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
