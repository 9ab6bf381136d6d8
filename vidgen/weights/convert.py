"""A model folder in another layout: ours to diffusers', tensor for tensor."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from vidgen.core.errors import ModelError
from vidgen.core.runtime import atomic_path
from vidgen.models.dit import DiTConfig
from vidgen.models.vae import VAEConfig
from vidgen.weights.folder import ModelFolder, config_of
from vidgen.weights.keymap import DIT_KEYS, Names, renamed, vae_keys
from vidgen.weights.load import read_tensors

DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"


def to_diffusers(source: ModelFolder, target: Path) -> list[str]:
    """Write a folder that diffusers' stock `WanPipeline.from_pretrained` loads.

    Args:
        source: a model of text-to-video with full attention.
        target: the folder to make; it must not exist.

    Returns:
        Names of the tensors left behind, those of modalities that diffusers' Wan doesn't have.

    Raises:
        ModelError: the target exists, or the model has what diffusers can't express.
    """
    if target.exists():
        raise ModelError(f"{target} exists; name a new folder")
    dit = config_of(DiTConfig, source.path / "transformer")
    vae = config_of(VAEConfig, source.path / "vae")
    if dit.pattern != "full":
        raise ModelError(f"diffusers' Wan has no attention pattern {dit.pattern!r}, only 'full'")
    with atomic_path(target) as folder:
        left = _write(source.path / "transformer", folder / "transformer", DIT_KEYS,
                      dit_to_diffusers(dit))
        left += _write(source.path / "vae", folder / "vae", vae_keys(vae), vae_to_diffusers(vae))
        for part in ("text_encoder", "tokenizer"):
            shutil.copytree(source.path / part, folder / part)
        _json(folder / "scheduler" / "scheduler_config.json", {
            "_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction",
            "use_flow_sigmas": True, "flow_shift": source.defaults.shift,
            "num_train_timesteps": 1000,
        })
        _json(folder / "model_index.json", {
            "_class_name": "WanPipeline",
            "scheduler": ["diffusers", "UniPCMultistepScheduler"],
            "text_encoder": ["transformers", "UMT5EncoderModel"],
            "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
            "transformer": ["diffusers", "WanTransformer3DModel"],
            "vae": ["diffusers", "AutoencoderKLWan"],
        })
    unexpected = [name for name in left if "audio" not in name]
    assert not unexpected, f"tensors without a name in diffusers: {unexpected}"
    return left


def dit_to_diffusers(config: DiTConfig) -> dict[str, Any]:
    """`config.json` of diffusers' `WanTransformer3DModel`."""
    return {
        "_class_name": "WanTransformer3DModel",
        "patch_size": [1, config.patch_size, config.patch_size],
        "num_attention_heads": config.num_heads, "attention_head_dim": config.head_dim,
        "in_channels": config.in_channels, "out_channels": config.out_channels,
        "text_dim": config.text_dim, "freq_dim": config.freq_dim, "ffn_dim": config.ffn_dim,
        "num_layers": config.num_layers, "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads", "eps": config.eps, "image_dim": config.image_dim,
        "added_kv_proj_dim": None if config.image_dim is None else config.hidden_dim,
        "rope_max_seq_len": 1024, "pos_embed_seq_len": config.image_positions,
    }


def vae_to_diffusers(config: VAEConfig) -> dict[str, Any]:
    """`config.json` of diffusers' `AutoencoderKLWan`."""
    channels = 3 * config.patch_size**2
    zeros, ones = (0.0,) * config.latent_channels, (1.0,) * config.latent_channels
    return {
        "_class_name": "AutoencoderKLWan",
        "base_dim": config.encoder_dim, "decoder_base_dim": config.decoder_dim,
        "z_dim": config.latent_channels, "dim_mult": list(config.channel_mults),
        "num_res_blocks": config.num_blocks, "attn_scales": [],
        "temperal_downsample": list(config.temporal_downsample), "dropout": 0.0,
        "latents_mean": list(config.latents_mean or zeros),
        "latents_std": list(config.latents_std or ones),
        "is_residual": config.stage_shortcuts, "in_channels": channels, "out_channels": channels,
        "patch_size": config.patch_size if config.patch_size > 1 else None,
        "scale_factor_temporal": config.strides.t, "scale_factor_spatial": config.strides.hw,
    }


def _write(
    source: Path, target: Path, table: tuple[Names, ...], config: dict[str, Any]
) -> list[str]:
    """Write a component under diffusers' names; returns the names it has no place for."""
    tensors = read_tensors(source / "model.safetensors")
    names = renamed(tensors, table, "vidgen", "diffusers")
    target.mkdir(parents=True)
    save_file({new: tensors[old] for old, new in names.items()}, target / DIFFUSERS_WEIGHTS)
    _json(target / "config.json", config)
    return sorted(tensors.keys() - names.keys())


def _json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
