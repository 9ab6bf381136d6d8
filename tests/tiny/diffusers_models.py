"""Tiny models of other families: the real classes of diffusers and transformers, random weights.

Each builder writes a folder as published ones are: `model_index.json` and a folder a component.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from tests.tiny.diffusers_parts import WIDTH, clip_text, flow, image_vae, t5, train_tokenizer
from vidgen.pipeline.diffusers_backend.engine import DiffusersEngine
from vidgen.weights.folder import DiffusersFolder
from vidgen.weights.layouts import open_model


def ltx_vae() -> Any:
    return diffusers.AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8, 8, 8, 8), layers_per_block=(1, 1, 1, 1, 1),
        decoder_block_out_channels=(8, 8, 8, 8), decoder_layers_per_block=(1, 1, 1, 1, 1),
    )


def ltx() -> Any:
    """LTX-Video, whose folder also serves its image-to-video pipeline."""
    return diffusers.LTXPipeline(
        scheduler=flow(use_dynamic_shifting=True),
        vae=ltx_vae(),
        text_encoder=t5(),
        tokenizer=train_tokenizer(),
        transformer=diffusers.LTXVideoTransformer3DModel(
            in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=8,
            cross_attention_dim=16, num_layers=1, caption_channels=WIDTH,
        ),
    )


def ltx2() -> Any:
    """LTX-2, which makes sound along with the picture."""
    from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder

    text = transformers.Gemma3TextConfig(
        vocab_size=400, hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, sliding_window=16,
        max_position_embeddings=2048,
    )
    vision = transformers.SiglipVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        image_size=14, patch_size=14,
    )
    config = transformers.Gemma3Config(
        text_config=text.to_dict(), vision_config=vision.to_dict(), mm_tokens_per_image=1,
        image_token_index=4,
    )
    return diffusers.LTX2Pipeline(
        scheduler=flow(use_dynamic_shifting=True, shift_terminal=0.1),
        vae=diffusers.AutoencoderKLLTX2Video(
            latent_channels=8, block_out_channels=(8, 8, 8, 8), layers_per_block=(1, 1, 1, 1, 1),
            decoder_block_out_channels=(8, 16, 32), decoder_layers_per_block=(1, 1, 1, 1),
            spatial_compression_ratio=32, temporal_compression_ratio=8,
        ),
        audio_vae=diffusers.AutoencoderKLLTX2Audio(
            base_channels=8, ch_mult=(1, 1, 1), num_res_blocks=1, latent_channels=2, mel_bins=16,
        ),
        text_encoder=transformers.Gemma3ForConditionalGeneration(config),
        tokenizer=train_tokenizer(length=1024),
        connectors=LTX2TextConnectors(
            caption_channels=WIDTH, text_proj_in_factor=3,
            video_connector_num_attention_heads=2, video_connector_attention_head_dim=8,
            video_connector_num_layers=1, video_connector_num_learnable_registers=None,
            audio_connector_num_attention_heads=2, audio_connector_attention_head_dim=8,
            audio_connector_num_layers=1, audio_connector_num_learnable_registers=None,
        ),
        transformer=diffusers.LTX2VideoTransformer3DModel(
            in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=8,
            cross_attention_dim=16, audio_in_channels=8, audio_out_channels=8,
            audio_num_attention_heads=2, audio_attention_head_dim=4, audio_cross_attention_dim=8,
            num_layers=1, caption_channels=WIDTH,
        ),
        vocoder=LTX2Vocoder(
            in_channels=32, hidden_channels=8, upsample_kernel_sizes=[16, 15],
            upsample_factors=[16, 15], resnet_kernel_sizes=[3], resnet_dilations=[[1]],
            output_sampling_rate=24_000,
        ),
    )


def hunyuan_vae() -> Any:
    """HunyuanVideo's VAE, which decodes in temporal tiles of its own accord."""
    return diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4,
        mid_block_add_attention=False,
    )


def hunyuan_transformer(channels: int, condition: str | None = None) -> Any:
    return diffusers.HunyuanVideoTransformer3DModel(
        in_channels=channels, out_channels=4, num_attention_heads=2, attention_head_dim=8,
        num_layers=1, num_single_layers=1, num_refiner_layers=1, text_embed_dim=WIDTH,
        pooled_projection_dim=WIDTH, rope_axes_dim=(2, 2, 4), guidance_embeds=condition is None,
        image_condition_type=condition,
    )


def llama_config() -> Any:
    return transformers.LlamaConfig(
        vocab_size=400, hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=2, pad_token_id=0, max_position_embeddings=2048,
    )


def hunyuan() -> Any:
    """HunyuanVideo, whose guidance is distilled into the model."""
    return diffusers.HunyuanVideoPipeline(
        text_encoder=transformers.LlamaModel(llama_config()),
        tokenizer=train_tokenizer(length=512),
        transformer=hunyuan_transformer(4),
        vae=hunyuan_vae(),
        scheduler=flow(7.0),
        text_encoder_2=clip_text(),
        tokenizer_2=train_tokenizer(length=77),
    )


def hunyuan_i2v() -> Any:
    """HunyuanVideo for a first frame, read by LLaVA."""
    from diffusers.pipelines.hunyuan_video import pipeline_hunyuan_video_image2video as source

    vision = transformers.CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1,
        image_size=48, patch_size=2, projection_dim=8,
    )
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=llama_config(), image_token_index=4, pad_token_id=0,
        image_seq_length=576,
    )
    template = source.DEFAULT_PROMPT_TEMPLATE["template"]
    return diffusers.HunyuanVideoImageToVideoPipeline(
        text_encoder=transformers.LlavaForConditionalGeneration(config),
        tokenizer=train_tokenizer((template,), length=512),
        transformer=hunyuan_transformer(4 * 2 + 1, "latent_concat"),
        vae=hunyuan_vae(),
        scheduler=flow(7.0),
        text_encoder_2=clip_text(),
        tokenizer_2=train_tokenizer(length=77),
        image_processor=transformers.CLIPImageProcessor(
            size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}
        ),
    )


def hunyuan15() -> Any:
    """HunyuanVideo 1.5, which takes its guidance from a component and tells no steps."""
    config = transformers.Qwen2_5_VLTextConfig(
        vocab_size=400, hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=2048,
        rope_scaling={"type": "default", "mrope_section": [1, 1, 2]},
    )
    tokenizer = train_tokenizer(length=2048)
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }} "
        "{{ message['content'] }}<|im_end|>{% endfor %}<|im_start|>"
    )
    return diffusers.HunyuanVideo15Pipeline(
        text_encoder=transformers.Qwen2_5_VLTextModel(config),
        tokenizer=tokenizer,
        transformer=diffusers.HunyuanVideo15Transformer3DModel(
            in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=8,
            num_layers=1, num_refiner_layers=1, text_embed_dim=WIDTH, text_embed_2_dim=WIDTH,
            image_embed_dim=8, rope_axes_dim=(2, 2, 4), target_size=64, task_type="t2v",
        ),
        vae=diffusers.AutoencoderKLHunyuanVideo15(
            latent_channels=4, block_out_channels=(8, 8, 8, 8, 8), layers_per_block=1,
        ),
        scheduler=flow(5.0),
        text_encoder_2=t5(),
        tokenizer_2=transformers.ByT5Tokenizer(),
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=6.0),
    )


def cogvideox_parts(channels: int) -> dict[str, Any]:
    """CogVideoX's components; its image-to-video transformer takes twice the channels."""
    return {
        "tokenizer": train_tokenizer(length=226),
        "text_encoder": t5(),
        "vae": diffusers.AutoencoderKLCogVideoX(
            latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1,
            norm_num_groups=4, sample_height=32, sample_width=32,
        ),
        "transformer": diffusers.CogVideoXTransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=channels, out_channels=4,
            time_embed_dim=4, text_embed_dim=WIDTH, num_layers=1, sample_width=4, sample_height=4,
            sample_frames=9, use_rotary_positional_embeddings=True,
        ),
        "scheduler": diffusers.CogVideoXDDIMScheduler(
            prediction_type="v_prediction", rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
        ),
    }


def cogvideox() -> Any:
    """CogVideoX, whose scheduler is no flow."""
    return diffusers.CogVideoXPipeline(**cogvideox_parts(4))


def cogvideox_i2v() -> Any:
    return diffusers.CogVideoXImageToVideoPipeline(**cogvideox_parts(8))


def mochi() -> Any:
    """Mochi at its true strides, 6 frames and 8 pixels, whose sigmas run the other way."""
    return diffusers.MochiPipeline(
        scheduler=flow(invert_sigmas=True),
        vae=diffusers.AutoencoderKLMochi(
            encoder_block_out_channels=(32, 32, 32, 32),
            decoder_block_out_channels=(32, 32, 32, 32), layers_per_block=(1, 1, 1, 1, 1),
        ),
        text_encoder=t5(),
        tokenizer=train_tokenizer(length=256),
        transformer=diffusers.MochiTransformer3DModel(
            num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16,
            in_channels=12, text_embed_dim=WIDTH, time_embed_dim=4,
        ),
    )


def skyreels(kind: type[Any] = diffusers.SkyReelsV2Pipeline) -> Any:
    """SkyReels-V2, over Wan's VAE and UniPC."""
    return kind(
        tokenizer=train_tokenizer(length=512),
        text_encoder=transformers.UMT5EncoderModel(
            transformers.UMT5Config(
                vocab_size=400, d_model=WIDTH, d_kv=8, num_heads=2, d_ff=WIDTH, num_layers=1
            )
        ),
        transformer=diffusers.SkyReelsV2Transformer3DModel(
            num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
            text_dim=WIDTH, freq_dim=16, ffn_dim=WIDTH, num_layers=1,
        ),
        vae=diffusers.AutoencoderKLWan(
            base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
            latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
        ),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0
        ),
    )


def skyreels_df() -> Any:
    """SkyReels-V2 by diffusion forcing, whose folder also serves its image-to-video pipeline."""
    return skyreels(diffusers.SkyReelsV2DiffusionForcingPipeline)


def animatediff() -> Any:
    """AnimateDiff, an image model that learned to move: its VAE knows no time."""
    options: dict[str, Any] = {"block_out_channels": (8, 8), "layers_per_block": 1}
    return diffusers.AnimateDiffPipeline(
        vae=image_vae(4),
        text_encoder=clip_text(),
        tokenizer=train_tokenizer(length=77),
        unet=diffusers.UNet2DConditionModel(
            sample_size=8, norm_num_groups=2, cross_attention_dim=WIDTH, attention_head_dim=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **options,
        ),
        motion_adapter=diffusers.MotionAdapter(
            motion_layers_per_block=1, motion_norm_num_groups=2, motion_num_attention_heads=2,
            block_out_channels=(8, 8),
        ),
        scheduler=diffusers.DDIMScheduler(beta_schedule="linear", clip_sample=False),
    )


def sdxl() -> Any:
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(1, 2),
        use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=4, projection_class_embeddings_input_dim=WIDTH + 6 * 4,
        cross_attention_dim=2 * WIDTH,
    )
    return diffusers.StableDiffusionXLPipeline(
        vae=image_vae(4),
        text_encoder=clip_text(),
        text_encoder_2=clip_text(transformers.CLIPTextModelWithProjection),
        tokenizer=train_tokenizer(length=77),
        tokenizer_2=train_tokenizer(length=77),
        unet=unet,
        scheduler=diffusers.EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1),
    )


def sd3() -> Any:
    return diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=8, in_channels=4, num_layers=1, attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=2 * WIDTH, caption_projection_dim=16,
            pooled_projection_dim=2 * WIDTH, out_channels=4, pos_embed_max_size=16,
        ),
        scheduler=flow(3.0),
        vae=image_vae(4, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06),
        text_encoder=clip_text(transformers.CLIPTextModelWithProjection),
        tokenizer=train_tokenizer(length=77),
        text_encoder_2=clip_text(transformers.CLIPTextModelWithProjection),
        tokenizer_2=train_tokenizer(length=77),
        text_encoder_3=t5(2 * WIDTH),
        tokenizer_3=train_tokenizer(),
    )


def flux() -> Any:
    return diffusers.FluxPipeline(
        scheduler=flow(use_dynamic_shifting=True),
        vae=image_vae(4, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06),
        text_encoder=clip_text(),
        tokenizer=train_tokenizer(length=77),
        text_encoder_2=t5(),
        tokenizer_2=train_tokenizer(length=512),
        transformer=diffusers.FluxTransformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH,
            axes_dims_rope=(2, 2, 4), guidance_embeds=True,
        ),
    )


FAMILIES: dict[str, Callable[[], Any]] = {
    make.__name__: make
    for make in (
        ltx, ltx2, hunyuan, hunyuan_i2v, hunyuan15, cogvideox, cogvideox_i2v, mochi, skyreels,
        skyreels_df, animatediff, sdxl, sd3, flux,
    )
}
"""Builders by name; each gives a pipeline with random weights."""


def open_diffusers_model(path: Path, dtype: str = "fp32", offload: str = "none") -> DiffusersEngine:
    """An engine over a folder, on the CPU."""
    folder = open_model(str(path))
    assert isinstance(folder, DiffusersFolder)
    return DiffusersEngine(folder, torch.device("cpu"), dtype, offload)


def build_diffusers_model(family: str, folder: Path) -> Path:
    """Write one family's tiny model folder, the same weights each time."""
    torch.manual_seed(0)
    FAMILIES[family]().save_pretrained(folder)
    return folder
