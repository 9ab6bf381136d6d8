"""Architectures read from the shapes of tensors, for checkpoints that come without a config."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from vidgen.core.config import build
from vidgen.core.errors import ModelError
from vidgen.models.dit_types import DiTConfig
from vidgen.models.image import ImageConfig
from vidgen.models.presets import VAE_PRESETS
from vidgen.models.text import TextConfig
from vidgen.models.vae import VAEConfig

Shapes = Mapping[str, tuple[int, ...]]
HEAD_DIM = 128
"""Of all published Wan transformers."""
CLIP_HEADS = 16
"""Of the published CLIP's vision tower, ViT-H/14."""


def infer_dit(shapes: Shapes, **known: Any) -> DiTConfig:
    """The architecture of a transformer.

    Args:
        shapes: by our names of its tensors.
        known: fields that a config file gives; heads and the layers of a control can't be seen, and
            are taken as the published models have them.

    Raises:
        ModelError: tensors that no transformer of ours has.
    """
    with _reading("transformer"):
        width, channels, _, patch, _ = shapes["patch_embed.weight"]
        layers = _count(shapes, r"blocks\.(\d+)\.")
        controls = _count(shapes, r"control_blocks\.(\d+)\.")
        control = shapes.get("control_embed.weight")
        image, positions = shapes.get("image_embed.norm_in.weight"), "image_embed.positions"
        fields: dict[str, Any] = {
            "in_channels": channels, "patch_size": patch, "num_layers": layers,
            "out_channels": shapes["head.proj.weight"][0] // patch**2,
            "num_heads": width // HEAD_DIM, "head_dim": HEAD_DIM,
            "ffn_dim": shapes["blocks.0.ffn.up.weight"][0],
            "text_dim": shapes["text_embed.up.weight"][1],
            "freq_dim": shapes["time_embed.up.weight"][1],
            "image_dim": None if image is None else image[0],
            "image_positions": shapes[positions][1] if positions in shapes else None,
            "control_channels": None if control is None else control[1],
            "control_layers": tuple(range(0, layers, layers // controls)) if controls else (),
        }
        fields |= known
        if "num_heads" in known and "head_dim" not in known:
            fields["head_dim"] = width // fields["num_heads"]
        if fields["num_heads"] * fields["head_dim"] != width:
            raise ModelError(
                f"a transformer {width} wide has no heads of {HEAD_DIM}; its config.json, which "
                "says how many it has, is missing: copy it again"
            )
        return build(DiTConfig, fields, "the transformer's config.json")


def infer_text(shapes: Shapes) -> TextConfig:
    """The architecture of a UMT5 encoder, from the shapes by our names."""
    with _reading("text encoder"):
        attention = "encoder.block.0.layer.0.SelfAttention"
        buckets, heads = shapes[f"{attention}.relative_attention_bias.weight"]
        vocab, width = shapes["shared.weight"]
        return TextConfig(
            vocab_size=vocab, hidden_dim=width, num_heads=heads, num_buckets=buckets,
            head_dim=shapes[f"{attention}.q.weight"][0] // heads,
            ffn_dim=shapes["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"][0],
            num_layers=_count(shapes, r"encoder\.block\.(\d+)\."),
        )


def infer_image(shapes: Shapes) -> ImageConfig:
    """The architecture of CLIP's vision tower, from the shapes by our names."""
    with _reading("image encoder"):
        width, _, patch, _ = shapes["embeddings.patch_embedding.weight"]
        tokens = shapes["embeddings.position_embedding.weight"][0]
        return ImageConfig(
            image_size=patch * math.isqrt(tokens - 1), patch_size=patch, hidden_dim=width,
            ffn_dim=shapes["encoder.layers.0.mlp.fc1.weight"][0], num_heads=CLIP_HEADS,
            num_layers=_count(shapes, r"encoder\.layers\.(\d+)\."),
        )


def infer_vae(shapes: Shapes) -> VAEConfig:
    """The architecture of a VAE, from the shapes by Wan's own names.

    The statistics of its latents are in no file; they are those of the published VAE with as many
    channels, and none for other numbers.
    """
    with _reading("VAE"):
        stages = _vae_stages(shapes)
        width, inputs = shapes["encoder.conv1.weight"][:2]
        channels = shapes["conv2.weight"][0]
        mults = tuple(out // width for _, out, _ in stages)
        config = VAEConfig(
            latent_channels=channels, encoder_dim=width, channel_mults=mults,
            decoder_dim=shapes["decoder.conv1.weight"][0] // mults[-1],
            num_blocks=stages[0][0], patch_size=math.isqrt(inputs // 3),
            temporal_downsample=tuple(timed for _, _, timed in stages[:-1]),
            stage_shortcuts=_is_nested(shapes),
        )
        published = VAE_PRESETS["wan22" if config.stage_shortcuts else "wan21"]
        if channels != published.latent_channels:
            return config
        return replace(
            config, latents_mean=published.latents_mean, latents_std=published.latents_std
        )


def _is_nested(shapes: Shapes) -> bool:
    """Whether the encoder's layers are counted within their stage, as Wan 2.2 has it."""
    return any(re.match(r"encoder\.downsamples\.\d+\.downsamples\.", key) for key in shapes)


def _vae_stages(shapes: Shapes) -> list[tuple[int, int, bool]]:
    """Blocks, width and whether frames are halved, for each stage of the encoder."""
    layers = r"encoder\.downsamples\.(\d+)" + (
        r"\.downsamples\.(\d+)" if _is_nested(shapes) else r"()"
    )
    parts: dict[tuple[int, int], dict[str, tuple[int, ...]]] = {}
    for key, shape in shapes.items():
        if match := re.match(layers + r"\.(.+)", key):
            place = int(match[1]), int(match[2] or 0)
            parts.setdefault(place, {})[match[3]] = shape
    stages, blocks, width = [], 0, 0
    for place in sorted(parts):
        tensors = parts[place]
        if "residual.2.weight" in tensors:
            blocks, width = blocks + 1, tensors["residual.2.weight"][0]
        else:
            stages.append((blocks, width, "time_conv.weight" in tensors))
            blocks = 0
    return [*stages, (blocks, width, False)]


def _count(keys: Iterable[str], pattern: str) -> int:
    """How many modules a list of them has: one more than the highest index."""
    found = [int(match[1]) for key in keys if (match := re.match(pattern, key))]
    return max(found, default=-1) + 1


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """Tell what tensors that are missing, or of other shapes, are of."""
    try:
        yield
    except KeyError as error:
        raise ModelError(
            f"the {what} lacks the tensor {error}, so its architecture can't be told; "
            "copy its files again"
        ) from None
    except (TypeError, ValueError, ZeroDivisionError, IndexError) as error:
        raise ModelError(f"the {what}'s tensors fit no architecture of ours: {error}") from error
