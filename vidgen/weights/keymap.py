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
