"""Tiny checkpoints of every Wan variant, random weights, as published: both layouts, same weights.

`build_diffusers` lets diffusers and transformers write a pipeline of their own classes;
`build_original` writes the very same tensors as the Wan repositories do, under names spelled here
anew, so that nothing of ours is tested against itself. Channels are the true ones (16, 36, 48, 96),
widths and depths tiny; no clip needs more than 9 frames of 32x32.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    DiffusionPipeline,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

from vidgen.models.presets import VAE_PRESETS

VARIANTS = ("t2v", "i2v", "flf2v", "vace", "t2v-a14b", "i2v-a14b", "ti2v-5b")
CAPTIONS = [
    "A red car bounces across the desert at night.", "a cat moves left over the meadow",
    "two balloons rise; one falls & spins!", "über-naïve ﬁsh №7 in 2024 … 猫",
]
CLIP_TOKENS = 5
_DIT: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "num_layers": 2,
    "text_dim": 16, "freq_dim": 32, "in_channels": 16, "out_channels": 16,
}
_CLIP_DIT = {"in_channels": 36, "image_dim": 32, "added_kv_proj_dim": 24}
_EXTRA: dict[str, dict[str, Any]] = {
    "t2v": {}, "t2v-a14b": {},
    "i2v": _CLIP_DIT,
    "flf2v": _CLIP_DIT | {"pos_embed_seq_len": 2 * CLIP_TOKENS},
    "vace": {"vace_layers": [0, 1], "vace_in_channels": 96},
    "i2v-a14b": {"in_channels": 36},
    "ti2v-5b": {"in_channels": 48, "out_channels": 48},
}
_SHIFT = {"flf2v": 16.0, "ti2v-5b": 5.0}


def make_pipeline(variant: str, seed: int = 0) -> DiffusionPipeline:
    """A variant's pipeline of diffusers with random weights, float32, the same for a seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = make_tokenizer()
        parts: dict[str, Any] = {
            "tokenizer": tokenizer,
            "text_encoder": make_text_encoder(len(tokenizer)),
            "vae": make_vae(variant),
            "transformer": make_transformer(variant),
            "scheduler": UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True,
                flow_shift=_SHIFT.get(variant, 3.0),
            ),
        }
        if variant.endswith("a14b"):
            parts["transformer_2"] = make_transformer(variant)
            parts["boundary_ratio"] = 0.875 if variant == "t2v-a14b" else 0.9
        if variant in ("i2v", "flf2v"):
            parts["image_encoder"] = make_image_encoder()
            parts["image_processor"] = make_image_processor()
    if variant == "vace":
        return WanVACEPipeline(**parts)
    if variant in ("i2v", "flf2v", "i2v-a14b"):
        return WanImageToVideoPipeline(**parts)
    return WanPipeline(**parts, expand_timesteps=variant == "ti2v-5b")


def make_transformer(variant: str) -> nn.Module:
    """Diffusers' transformer of a variant, norms randomised as well."""
    make = WanVACETransformer3DModel if variant == "vace" else WanTransformer3DModel
    return _randomised(make(**(_DIT | _EXTRA[variant])), r"norm|pos_embed|proj_out\.bias")


def make_vae(variant: str) -> nn.Module:
    """Diffusers' VAE: that of Wan 2.2 for "ti2v-5b", of 2.1 for the rest, with their statistics."""
    config = VAE_PRESETS["wan22" if variant == "ti2v-5b" else "wan21"]
    settings: dict[str, Any] = {
        "base_dim": 4, "z_dim": config.latent_channels, "num_res_blocks": 1,
        "dim_mult": [1, 2, 2, 2],
        "latents_mean": list(config.latents_mean), "latents_std": list(config.latents_std),
    }
    if variant == "ti2v-5b":
        settings |= {
            "decoder_base_dim": 8, "is_residual": True, "in_channels": 12, "out_channels": 12,
            "patch_size": 2, "scale_factor_spatial": 16, "dim_mult": [1, 2, 4, 4],
        }
    vae = _randomised(AutoencoderKLWan(**settings), "gamma")
    vae.decoder.conv_out.weight.data *= 0.1  # diffusers clamps to [-1, 1]
    return vae


def make_text_encoder(vocab_size: int) -> nn.Module:
    """Transformers' UMT5 encoder."""
    config = UMT5Config(
        vocab_size=vocab_size, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return _randomised(UMT5EncoderModel(config), "layer_norm|relative_attention_bias")


def make_image_encoder() -> nn.Module:
    """Transformers' CLIP vision tower, with the 16 heads of the published one."""
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=16,
        image_size=28, patch_size=14, hidden_act="gelu",
    )
    return _randomised(CLIPVisionModel(config), "norm|bias")


def make_image_processor() -> CLIPImageProcessor:
    """The processor of `make_image_encoder`."""
    return CLIPImageProcessor(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    )


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A Unigram tokenizer of the make that UMT5's is."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained_tokenizer()), pad_token="<pad>",
        eos_token="</s>", unk_token="<unk>", model_max_length=512,
    )


@cache  # training isn't the same twice
def _trained_tokenizer() -> str:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace("  ", " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(CAPTIONS * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return tokenizer.to_str()


def build_diffusers(folder: Path, variant: str, **options: Any) -> Path:
    """A diffusers folder of a variant; options are `save_pretrained`'s (max_shard_size, ...)."""
    make_pipeline(variant).save_pretrained(folder, **options)
    return folder


def build_original(
    folder: Path, variant: str, *, num_shards: int = 1, with_config: bool = True
) -> Path:
    """The same weights as `build_diffusers`, laid out and named as the Wan repositories do.

    Args:
        folder: to make.
        variant: one of VARIANTS.
        num_shards: files of each transformer; 1: no index.
        with_config: write the transformers' config.json.
    """
    pipe = make_pipeline(variant)
    folder.mkdir(parents=True)
    experts = {"": pipe.transformer}
    if variant.endswith("a14b"):
        experts = {"high_noise_model": pipe.transformer, "low_noise_model": pipe.transformer_2}
    for name, module in experts.items():
        state = {original_dit_key(k): v for k, v in module.state_dict().items()}
        write_shards(folder / name, "diffusion_pytorch_model", state, num_shards)
        if with_config:
            (folder / name / "config.json").write_text(json.dumps(original_config(variant)))
    vae_name, vae_key = ("Wan2.1_VAE.pth", original_vae21_key)
    if variant == "ti2v-5b":
        vae_name, vae_key = ("Wan2.2_VAE.pth", original_vae22_key)
    _save_pth(pipe.vae, folder / vae_name, vae_key)
    _save_pth(
        pipe.text_encoder, folder / "models_t5_umt5-xxl-enc-bf16.pth", original_text_key,
        leave={"encoder.embed_tokens.weight"},
    )
    if variant in ("i2v", "flf2v"):
        torch.save(
            original_clip_state(pipe.image_encoder.state_dict()),
            folder / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
        )
    pipe.tokenizer.save_pretrained(folder / "google" / "umt5-xxl")
    return folder


def original_config(variant: str) -> dict[str, Any]:
    """The `config.json` beside the original weights."""
    dit = _DIT | _EXTRA[variant]
    config: dict[str, Any] = {
        "_class_name": "VaceWanModel" if variant == "vace" else "WanModel",
        "_diffusers_version": "0.33.0", "model_type": variant.removesuffix("-a14b").split("-5b")[0],
        "dim": 24, "eps": 1e-6, "ffn_dim": dit["ffn_dim"], "freq_dim": dit["freq_dim"],
        "in_dim": dit["in_channels"], "num_heads": dit["num_attention_heads"],
        "num_layers": dit["num_layers"], "out_dim": dit["out_channels"], "text_len": 512,
    }
    if variant == "vace":
        config |= {"vace_layers": dit["vace_layers"], "vace_in_dim": dit["vace_in_channels"]}
    return config


def write_shards(folder: Path, stem: str, state: Mapping[str, Tensor], num_shards: int) -> None:
    """Save tensors as one safetensors file, or as shards with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    if num_shards == 1:
        save_file(dict(state), folder / f"{stem}.safetensors")
        return
    weight_map = {}
    for index in range(num_shards):
        name = f"{stem}-{index + 1:05d}-of-{num_shards:05d}.safetensors"
        part = dict(list(state.items())[index::num_shards])
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    total = sum(value.nbytes for value in state.values())
    index_file = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index_file))


def original_dit_key(key: str) -> str:
    """A transformer's key as the Wan repositories spell it."""
    rules = (
        (r"^condition_embedder\.time_embedder\.linear_1", "time_embedding.0"),
        (r"^condition_embedder\.time_embedder\.linear_2", "time_embedding.2"),
        (r"^condition_embedder\.text_embedder\.linear_1", "text_embedding.0"),
        (r"^condition_embedder\.text_embedder\.linear_2", "text_embedding.2"),
        (r"^condition_embedder\.time_proj", "time_projection.1"),
        (r"^condition_embedder\.image_embedder\.pos_embed", "img_emb.emb_pos"),
        (r"^condition_embedder\.image_embedder\.norm1", "img_emb.proj.0"),
        (r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj", "img_emb.proj.1"),
        (r"^condition_embedder\.image_embedder\.ff\.net\.2", "img_emb.proj.3"),
        (r"^condition_embedder\.image_embedder\.norm2", "img_emb.proj.4"),
        (r"^scale_shift_table", "head.modulation"), (r"^proj_out", "head.head"),
        (r"(blocks\.\d+)\.proj_in", r"\1.before_proj"),
        (r"(blocks\.\d+)\.proj_out", r"\1.after_proj"),
        (r"(blocks\.\d+)\.scale_shift_table", r"\1.modulation"),
        (r"(blocks\.\d+)\.norm2", r"\1.norm3"),
        (r"\.ffn\.net\.0\.proj", ".ffn.0"), (r"\.ffn\.net\.2", ".ffn.2"),
        (r"\.attn1\.", ".self_attn."), (r"\.attn2\.", ".cross_attn."),
        (r"\.to_out\.0\.", ".o."), (r"\.to_([qkv])\.", r".\1."),
        (r"\.add_([kv])_proj\.", r".\1_img."), (r"\.norm_added_k\.", ".norm_k_img."),
    )
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


def original_vae21_key(key: str) -> str:
    """A key of Wan 2.1's VAE as published: one list of layers through all stages."""
    stage = r"^decoder\.up_blocks\.(\d+)\."
    key = re.sub(
        stage + r"resnets\.(\d+)",
        lambda m: f"decoder.upsamples.{3 * int(m[1]) + int(m[2])}", key,
    )  # fmt: skip
    key = re.sub(
        stage + r"upsamplers\.0", lambda m: f"decoder.upsamples.{3 * int(m[1]) + 2}", key
    )
    key = re.sub(r"^encoder\.down_blocks\.", "encoder.downsamples.", key)
    return _original_vae_key(key)


def original_vae22_key(key: str) -> str:
    """A key of Wan 2.2's VAE as published: layers counted within their stage."""
    for side, way, last in (("encoder", "down", 1), ("decoder", "up", 2)):
        stage = rf"^{side}\.{way}_blocks\.(\d+)\."
        key = re.sub(stage + r"resnets\.", rf"{side}.{way}samples.\1.{way}samples.", key)
        key = re.sub(stage + rf"{way}sampler", rf"{side}.{way}samples.\1.{way}samples.{last}", key)
    return _original_vae_key(key)


def _original_vae_key(key: str) -> str:
    rules = (
        (r"^quant_conv", "conv1"), (r"^post_quant_conv", "conv2"),
        (r"\.conv_in\.", ".conv1."), (r"\.norm_out\.", ".head.0."), (r"\.conv_out\.", ".head.2."),
        (r"\.mid_block\.resnets\.0\.", ".middle.0."), (r"\.mid_block\.resnets\.1\.", ".middle.2."),
        (r"\.mid_block\.attentions\.0\.", ".middle.1."),
        (r"\.(\d+)\.norm1\.", r".\1.residual.0."), (r"\.(\d+)\.conv1\.", r".\1.residual.2."),
        (r"\.(\d+)\.norm2\.", r".\1.residual.3."), (r"\.(\d+)\.conv2\.", r".\1.residual.6."),
        (r"\.conv_shortcut\.", ".shortcut."),
    )
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


def original_text_key(key: str) -> str:
    """A UMT5 encoder's key as the Wan repositories spell it."""
    key = key.replace("encoder.block.", "blocks.").replace("encoder.final_layer_norm", "norm")
    rules = (
        (r"^shared\.", "token_embedding."),
        (r"\.layer\.0\.SelfAttention\.relative_attention_bias\.", ".pos_embedding.embedding."),
        (r"\.layer\.0\.SelfAttention\.", ".attn."), (r"\.layer\.0\.layer_norm\.", ".norm1."),
        (r"\.layer\.1\.DenseReluDense\.wi_0\.", ".ffn.gate.0."),
        (r"\.layer\.1\.DenseReluDense\.wi_1\.", ".ffn.fc1."),
        (r"\.layer\.1\.DenseReluDense\.wo\.", ".ffn.fc2."),
        (r"\.layer\.1\.layer_norm\.", ".norm2."),
    )
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


def original_clip_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A vision tower within the published CLIP: fused projections, and a text tower beside it."""
    width = state["pre_layrnorm.weight"].shape[0]
    result = {
        "log_scale": torch.tensor(2.6592), "visual.head": torch.randn(width, 16),
        "visual.cls_embedding": state["embeddings.class_embedding"].reshape(1, 1, -1),
        "visual.pos_embedding": state["embeddings.position_embedding.weight"][None],
        "visual.patch_embedding.weight": state["embeddings.patch_embedding.weight"],
        "textual.token_embedding.weight": torch.randn(8, 4),
        "textual.blocks.0.attn.q.weight": torch.randn(4, 4),
        "textual.head.0.weight": torch.randn(4, 4),
    }
    names = {
        "layer_norm1": "norm1", "layer_norm2": "norm2", "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2",
        "self_attn.out_proj": "attn.proj",
    }
    layers = {int(match[1]) for key in state if (match := re.search(r"layers\.(\d+)\.", key))}
    for end in ("weight", "bias"):
        result[f"visual.pre_norm.{end}"] = state[f"pre_layrnorm.{end}"]
        result[f"visual.post_norm.{end}"] = state[f"post_layernorm.{end}"]
        for layer in sorted(layers):
            theirs, ours = f"encoder.layers.{layer}", f"visual.transformer.{layer}"
            fused = [state[f"{theirs}.self_attn.{p}_proj.{end}"] for p in "qkv"]
            result[f"{ours}.attn.to_qkv.{end}"] = torch.cat(fused)
            for old, new in names.items():
                result[f"{ours}.{new}.{end}"] = state[f"{theirs}.{old}.{end}"]
    return {key: value.clone() for key, value in result.items()}


def _save_pth(
    module: nn.Module, path: Path, rename: Callable[[str], str], leave: set[str] | None = None
) -> None:
    state = {k: v for k, v in module.state_dict().items() if k not in (leave or set())}
    torch.save({rename(key): value for key, value in state.items()}, path)


def _randomised(module: nn.Module, names: str) -> nn.Module:
    """Move the parameters whose names match away from their plain initial values."""
    for name, parameter in module.named_parameters():
        if re.search(names, name):
            parameter.data += 0.3 * torch.randn_like(parameter)
    return module.eval()
