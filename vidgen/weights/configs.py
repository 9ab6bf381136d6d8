"""Read architectures from `config.json` in three layouts, or infer them from tensor shapes."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from vidgen.core.config import build
from vidgen.core.errors import InputError, ModelError
from vidgen.models.dit_types import DiTConfig
from vidgen.models.image import IMAGE_NAMES, ImageConfig
from vidgen.models.presets import VAE_PRESETS
from vidgen.models.text import TextConfig
from vidgen.models.vae import VAEConfig

TRANSFORMER_CLASSES = ("WanTransformer3DModel", "WanVACETransformer3DModel")
_DIT_NAMES = {
    "num_heads": "num_attention_heads", "head_dim": "attention_head_dim",
    "in_channels": "in_channels", "out_channels": "out_channels", "text_dim": "text_dim",
    "freq_dim": "freq_dim", "ffn_dim": "ffn_dim", "num_layers": "num_layers", "eps": "eps",
    "image_dim": "image_dim", "image_positions": "pos_embed_seq_len",
}
_WAN_DIT_NAMES = {
    "num_heads": "num_heads", "in_channels": "in_dim", "out_channels": "out_dim",
    "freq_dim": "freq_dim", "ffn_dim": "ffn_dim", "num_layers": "num_layers", "eps": "eps",
    "text_len": "text_len", "control_channels": "vace_in_dim",
}
_VAE_NAMES = {
    "latent_channels": "z_dim", "encoder_dim": "base_dim", "decoder_dim": "decoder_base_dim",
    "channel_mults": "dim_mult", "num_blocks": "num_res_blocks",
    "temporal_downsample": "temperal_downsample", "stage_shortcuts": "is_residual",
    "latents_mean": "latents_mean", "latents_std": "latents_std",
}
_TEXT_NAMES = {
    "vocab_size": "vocab_size", "hidden_dim": "d_model", "head_dim": "d_kv", "ffn_dim": "d_ff",
    "num_layers": "num_layers", "num_heads": "num_heads",
    "num_buckets": "relative_attention_num_buckets",
    "max_distance": "relative_attention_max_distance", "eps": "layer_norm_epsilon",
}
Shapes = Mapping[str, tuple[int, ...]]
HEAD_DIM = 128
"""Head width of all published Wan transformers."""
CLIP_HEADS = 16
"""Attention heads of Wan's CLIP vision tower, ViT-H/14."""


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file; raise ModelError if it can't be read."""
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ModelError(f"{path} can't be read: {error}; copy it again") from error


def read_config(folder: Path) -> dict[str, Any]:
    """Read `config.json` of a component folder; see `read_json`."""
    return read_json(folder / "config.json")


def config_of(config_type: type[Any], folder: Path) -> Any:
    """Build a component's config from its `config.json`; see `config_from`."""
    return config_from(config_type, read_config(folder), str(folder / "config.json"))


def config_from(config_type: type[Any], settings: Mapping[str, Any], where: str) -> Any:
    """Build a component's config; raise ModelError for unknown keys and impossible values."""
    unknown = sorted(settings.keys() - {each.name for each in fields(config_type)})
    if unknown:
        raise ModelError(
            f"{where} has unknown settings {', '.join(unknown)}; was it written by a newer vidgen?"
        )
    try:
        return build(config_type, dict(settings), where)
    except ValueError as error:  # values that don't go together
        raise ModelError(f"{where} is not a valid config: {error}; copy it again") from error


def dit_from_diffusers(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `DiTConfig` from diffusers' `config.json`.

    Raises:
        ModelError: another transformer class, or an unsupported setting.
    """
    name = settings.get("_class_name")
    if name not in TRANSFORMER_CLASSES:
        raise ModelError(
            f"the transformer is a {name}; vidgen supports {' and '.join(TRANSFORMER_CLASSES)}"
        )
    for key, allowed in (("qk_norm", "rms_norm_across_heads"), ("cross_attn_norm", True)):
        if settings.get(key, allowed) != allowed:
            raise ModelError(
                f"the transformer has {key} {settings[key]!r}; vidgen supports {allowed!r}"
            )
    fields = {ours: settings[theirs] for ours, theirs in _DIT_NAMES.items() if theirs in settings}
    if fields.get("image_positions", 0) is None:
        del fields["image_positions"]  # older folders have the tensor but not the setting
    time, *patch = settings.get("patch_size", (1, 2, 2))
    if time != 1 or len(set(patch)) != 1:
        raise ModelError(
            f"the transformer has patch_size {settings['patch_size']}; vidgen supports [1, p, p]"
        )
    fields["patch_size"] = patch[0]
    if "vace_layers" in settings:
        fields["control_layers"] = tuple(settings["vace_layers"])
        fields["control_channels"] = settings.get("vace_in_channels", 96)
    return fields


def dit_to_diffusers(config: DiTConfig) -> dict[str, Any]:
    """Return diffusers' `config.json` of a transformer."""
    settings = {
        "_class_name": TRANSFORMER_CLASSES[bool(config.control_layers)],
        "patch_size": [1, config.patch_size, config.patch_size],
        **{theirs: getattr(config, ours) for ours, theirs in _DIT_NAMES.items()},
        "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 1024,
        "added_kv_proj_dim": None if config.image_dim is None else config.hidden_dim,
    }
    if config.control_layers:
        settings["vace_layers"] = list(config.control_layers)
        settings["vace_in_channels"] = config.control_channels
    return settings


def dit_from_wan(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `DiTConfig` from Wan's own `config.json`."""
    fields = {
        ours: settings[theirs] for ours, theirs in _WAN_DIT_NAMES.items() if theirs in settings
    }
    if "vace_layers" in settings:
        fields["control_layers"] = tuple(settings["vace_layers"])
    return fields


def dit_to_wan(config: DiTConfig, model_type: str) -> dict[str, Any]:
    """Return Wan's own `config.json`; `model_type` is "t2v", "i2v", "flf2v", "vace" or "ti2v"."""
    settings = {
        "_class_name": "VaceWanModel" if config.control_layers else "WanModel",
        "model_type": model_type, "dim": config.hidden_dim,
        **{theirs: getattr(config, ours) for ours, theirs in _WAN_DIT_NAMES.items()},
    }
    if config.control_layers:
        settings["vace_layers"] = list(config.control_layers)
    else:
        del settings["vace_in_dim"]
    return settings


def vae_from_diffusers(settings: Mapping[str, Any]) -> VAEConfig:
    """Return the config from `config.json` of diffusers' `AutoencoderKLWan`.

    Raises:
        ModelError: another VAE class, or an unsupported setting.
    """
    name = settings.get("_class_name")
    if name != "AutoencoderKLWan":
        raise ModelError(f"the VAE is a {name}; vidgen supports AutoencoderKLWan")
    if settings.get("attn_scales"):
        raise ModelError(f"the VAE has attn_scales {settings['attn_scales']}; vidgen supports []")
    try:
        fields: dict[str, Any] = {
            ours: tuple(value) if isinstance(value, list) else value
            for ours, theirs in _VAE_NAMES.items()
            if (value := settings.get(theirs)) is not None
        }
        fields.setdefault("decoder_dim", fields["encoder_dim"])
        return VAEConfig(**fields, patch_size=settings.get("patch_size") or 1)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"the VAE's config.json can't be used: {error}") from None


def vae_to_diffusers(config: VAEConfig) -> dict[str, Any]:
    """Return `config.json` of diffusers' `AutoencoderKLWan`."""
    channels = 3 * config.patch_size**2
    zeros, ones = (0.0,) * config.latent_channels, (1.0,) * config.latent_channels
    settings = {theirs: getattr(config, ours) for ours, theirs in _VAE_NAMES.items()}
    settings |= {
        "latents_mean": config.latents_mean or zeros, "latents_std": config.latents_std or ones,
    }
    return {
        "_class_name": "AutoencoderKLWan",
        **{key: list(value) if isinstance(value, tuple) else value
           for key, value in settings.items()},
        "attn_scales": [], "dropout": 0.0, "in_channels": channels, "out_channels": channels,
        "patch_size": config.patch_size if config.patch_size > 1 else None,
        "scale_factor_temporal": config.strides.t, "scale_factor_spatial": config.strides.hw,
    }  # fmt: skip


def text_from_transformers(settings: Mapping[str, Any]) -> TextConfig:
    """Return the config from `config.json` of transformers' UMT5.

    Raises:
        ModelError: another architecture, or a missing setting.
    """
    model_type = settings.get("model_type")
    activation = settings.get("feed_forward_proj", "gated-gelu")
    if model_type != "umt5" or activation != "gated-gelu":
        raise ModelError(
            f"the text encoder is of type {model_type!r} with {activation!r} layers; "
            "only UMT5 with gated-gelu is supported"
        )
    values = _required(settings, _TEXT_NAMES, "text encoder")
    return build(TextConfig, values, "the text encoder's config.json")


def image_from_transformers(settings: Mapping[str, Any]) -> ImageConfig:
    """Return the config from `config.json` of transformers' `CLIPVisionModel`.

    Raises:
        ModelError: another architecture, or a missing setting.
    """
    model_type = settings.get("model_type")
    if model_type != "clip_vision_model" or settings.get("num_channels", 3) != 3:
        raise ModelError(
            f"the image encoder is of type {model_type!r} with "
            f"{settings.get('num_channels', 3)} channels; only 'clip_vision_model' with 3 is "
            "supported"
        )
    values = _required(settings, IMAGE_NAMES, "image encoder")
    try:
        return build(ImageConfig, values, "the image encoder's config.json")
    except InputError as error:
        raise ModelError(str(error)) from None


def _required(settings: Mapping[str, Any], names: Mapping[str, str], what: str) -> dict[str, Any]:
    try:
        return {ours: settings[theirs] for ours, theirs in names.items()}
    except KeyError as error:
        raise ModelError(f"the {what}'s config.json lacks the field {error}") from None


def encoder_to_transformers(config: TextConfig | ImageConfig) -> dict[str, Any]:
    """Return `config.json` of transformers' `UMT5EncoderModel` or `CLIPVisionModel`."""
    if isinstance(config, ImageConfig):
        names = {theirs: getattr(config, ours) for ours, theirs in IMAGE_NAMES.items()}
        return {"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model", **names,
                "num_channels": 3}
    return {
        "architectures": ["UMT5EncoderModel"], "model_type": "umt5",
        **{theirs: getattr(config, ours) for ours, theirs in _TEXT_NAMES.items()},
        "num_decoder_layers": config.num_layers, "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": True, "tie_word_embeddings": True,
        "pad_token_id": 0, "eos_token_id": 1,
    }


def infer_dit(shapes: Shapes, **known: Any) -> DiTConfig:
    """Infer the architecture of a transformer from its tensors' shapes, by vidgen's names.

    `known` fields, from a config file, take precedence. Shapes don't determine the numbers of heads
    and control layers; without a config file the published models' values are assumed.

    Raises:
        ModelError: the tensors match no supported transformer.
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
                f"a transformer of width {width} can't have heads of {HEAD_DIM}, and its "
                "config.json with the number of heads is missing; copy it again"
            )
        return build(DiTConfig, fields, "the transformer's config.json")


def infer_text(shapes: Shapes) -> TextConfig:
    """Infer the architecture of a UMT5 encoder from its tensors' shapes, by vidgen's names."""
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
    """Infer the architecture of CLIP's vision tower from tensor shapes, by vidgen's names."""
    with _reading("image encoder"):
        width, _, patch, _ = shapes["embeddings.patch_embedding.weight"]
        tokens = shapes["embeddings.position_embedding.weight"][0]
        return ImageConfig(
            image_size=patch * math.isqrt(tokens - 1), patch_size=patch, hidden_dim=width,
            ffn_dim=shapes["encoder.layers.0.mlp.fc1.weight"][0], num_heads=CLIP_HEADS,
            num_layers=_count(shapes, r"encoder\.layers\.(\d+)\."),
        )


def infer_vae(shapes: Shapes) -> VAEConfig:
    """Infer the architecture of a VAE from its tensors' shapes, by Wan's names.

    Wan's files don't contain the latents' mean and standard deviation; a VAE with as many latent
    channels as the published one gets that one's.
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
    """Return True if the encoder's layers are numbered within each stage, as in Wan 2.2."""
    return any(re.match(r"encoder\.downsamples\.\d+\.downsamples\.", key) for key in shapes)


def _vae_stages(shapes: Shapes) -> list[tuple[int, int, bool]]:
    """Return (num_blocks, width, halves_frames) of each stage of the encoder."""
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
    """Return the length of a module list: one more than its highest index."""
    found = [int(match[1]) for key in keys if (match := re.match(pattern, key))]
    return max(found, default=-1) + 1


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """Turn errors of missing or misshapen tensors into a ModelError that names the component."""
    try:
        yield
    except KeyError as error:
        raise ModelError(
            f"the {what} lacks the tensor {error}, so its architecture can't be inferred; "
            "copy its files again"
        ) from None
    except (TypeError, ValueError, ZeroDivisionError, IndexError) as error:
        raise ModelError(f"the {what}'s tensors match no supported model: {error}") from error
