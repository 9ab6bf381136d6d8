"""A component's `config.json` in the three layouts, and our dataclasses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vidgen.core.errors import ModelError
from vidgen.models.dit_types import DiTConfig
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


def dit_from_diffusers(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `DiTConfig` that a `config.json` of diffusers gives.

    Raises:
        ModelError: another transformer, or a setting that ours doesn't have.
    """
    name = settings.get("_class_name")
    if name not in TRANSFORMER_CLASSES:
        raise ModelError(
            f"the transformer is a {name}; vidgen has {' and '.join(TRANSFORMER_CLASSES)}"
        )
    for key, allowed in (("qk_norm", "rms_norm_across_heads"), ("cross_attn_norm", True)):
        if settings.get(key, allowed) != allowed:
            raise ModelError(f"the transformer has {key} {settings[key]!r}, not {allowed!r}")
    fields = {ours: settings[theirs] for ours, theirs in _DIT_NAMES.items() if theirs in settings}
    if fields.get("image_positions", 0) is None:
        del fields["image_positions"]  # older folders have the tensor but not the setting
    time, *patch = settings.get("patch_size", (1, 2, 2))
    if time != 1 or len(set(patch)) != 1:
        raise ModelError(f"the transformer has patches of {settings['patch_size']}, not [1, p, p]")
    fields["patch_size"] = patch[0]
    if "vace_layers" in settings:
        fields["control_layers"] = tuple(settings["vace_layers"])
        fields["control_channels"] = settings.get("vace_in_channels", 96)
    return fields


def dit_to_diffusers(config: DiTConfig) -> dict[str, Any]:
    """`config.json` of diffusers' `WanTransformer3DModel` or `WanVACETransformer3DModel`.

    Raises:
        ModelError: an attention pattern that diffusers doesn't have.
    """
    if config.pattern != "full":
        raise ModelError(f"diffusers' Wan has no attention pattern {config.pattern!r}, only 'full'")
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
    """The fields of `DiTConfig` that a `config.json` of the Wan repositories gives."""
    fields = {
        ours: settings[theirs] for ours, theirs in _WAN_DIT_NAMES.items() if theirs in settings
    }
    if "vace_layers" in settings:
        fields["control_layers"] = tuple(settings["vace_layers"])
    return fields


def dit_to_wan(config: DiTConfig, model_type: str) -> dict[str, Any]:
    """`config.json` of Wan's own `WanModel` or `VaceWanModel`.

    Args:
        config: ours.
        model_type: what Wan calls the variant: t2v, i2v, flf2v, vace, ti2v.

    Raises:
        ModelError: an attention pattern that Wan doesn't have.
    """
    if config.pattern != "full":
        raise ModelError(f"Wan has no attention pattern {config.pattern!r}, only 'full'")
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
    """The config behind a `config.json` of diffusers' `AutoencoderKLWan`.

    Raises:
        ModelError: another VAE, or a setting that ours doesn't have.
    """
    name = settings.get("_class_name")
    if name != "AutoencoderKLWan":
        raise ModelError(f"the VAE is a {name}; vidgen has AutoencoderKLWan")
    if settings.get("attn_scales"):
        raise ModelError(f"the VAE has attention at {settings['attn_scales']}; ours has none there")
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
    """`config.json` of diffusers' `AutoencoderKLWan`."""
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
