"""Tiny text-to-audio models: the real classes of diffusers and transformers, random weights."""

from __future__ import annotations

import json
from typing import Any

import diffusers
import torch
import transformers

from tests.tiny.diffusers_parts import WIDTH, flow, t5, train_tokenizer

SPECIAL = {"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>",
           "pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<image>"}


def stable_audio() -> Any:
    """Stable Audio, of 1.02 s at most."""
    from diffusers.pipelines.stable_audio import StableAudioProjectionModel

    return diffusers.StableAudioPipeline(
        vae=diffusers.AutoencoderOobleck(
            encoder_hidden_size=8, downsampling_ratios=[2, 4, 8], channel_multiples=[1, 2, 4],
            decoder_channels=8, decoder_input_channels=4, audio_channels=2, sampling_rate=16_000,
        ),
        text_encoder=t5(),
        projection_model=StableAudioProjectionModel(
            text_encoder_dim=WIDTH, conditioning_dim=WIDTH, min_value=0, max_value=8
        ),
        tokenizer=train_tokenizer(),
        transformer=diffusers.StableAudioDiTModel(
            sample_size=256, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8,
            num_attention_heads=2, num_key_value_attention_heads=2, cross_attention_dim=WIDTH,
            time_proj_dim=8, global_states_input_dim=2 * WIDTH, cross_attention_input_dim=WIDTH,
        ),
        scheduler=diffusers.EDMDPMSolverMultistepScheduler(
            solver_order=2, prediction_type="v_prediction", sigma_data=1.0,
            sigma_schedule="exponential",
        ),
    )


def stable_audio_3() -> Any:
    """Stable Audio 3, distilled to 8 steps."""
    from diffusers.pipelines.stable_audio_3 import StableAudio3DurationEmbedder

    module = transformers.T5GemmaModuleConfig(
        vocab_size=400, hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    )
    config = transformers.T5GemmaConfig(
        encoder=module, is_encoder_decoder=False, vocab_size=400,
    )
    vae = diffusers.AutoencoderSAME(
        patch_size=16, encoder_channels=8, encoder_c_mults=(2,), encoder_strides=(4,),
        encoder_transformer_depths=(1,), latent_dim=4, dim_heads=8, sampling_rate=16_000,
    )
    for parameter in vae.parameters():  # fresh ones let nothing of the latents through
        parameter.data += 0.1 * torch.randn_like(parameter)
    return diffusers.StableAudio3Pipeline(
        vae=vae,
        text_encoder=transformers.T5GemmaEncoderModel(config),
        tokenizer=train_tokenizer(),
        duration_embedder=StableAudio3DurationEmbedder(output_dim=WIDTH, fourier_dim=8),
        transformer=diffusers.StableAudio3DiTModel(
            io_channels=4, embed_dim=16, depth=1, num_heads=2, cond_token_dim=WIDTH,
            global_cond_dim=WIDTH, local_add_cond_dim=5, timestep_features_dim=8, ff_mult=1.0,
            num_memory_tokens=2,
        ),
        scheduler=flow(stochastic_sampling=True),
    )


def roberta_tokenizer() -> Any:
    trained = json.loads(train_tokenizer().backend_tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in trained["merges"]]
    return transformers.RobertaTokenizer(
        vocab=trained["vocab"], merges=merges, model_max_length=64, **SPECIAL
    )


def t5_tokenizer() -> Any:
    pieces = ["<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz"]
    vocab = [(piece, -float(place)) for place, piece in enumerate(pieces)]
    return transformers.T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=64)


def audioldm2() -> Any:
    """AudioLDM 2: a spectrogram of 8 bands, and a vocoder of one channel."""
    from diffusers.pipelines.audioldm2 import (
        AudioLDM2ProjectionModel,
        AudioLDM2UNet2DConditionModel,
    )

    text = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 1,
            "num_attention_heads": 2, "vocab_size": 400, "max_position_embeddings": 80,
            "pad_token_id": 0, "bos_token_id": 3, "eos_token_id": 1, "projection_dim": WIDTH}
    audio = {"spec_size": 64, "window_size": 4, "num_mel_bins": 64, "hidden_size": 16,
             "depths": [1, 1], "num_attention_heads": [1, 1], "num_hidden_layers": 2,
             "patch_embeds_hidden_size": 8, "projection_dim": WIDTH, "num_classes": 4}
    clap = transformers.ClapModel(transformers.ClapConfig(
        text_config=text, audio_config=audio, projection_dim=WIDTH,
    ))
    return diffusers.AudioLDM2Pipeline(
        vae=diffusers.AutoencoderKL(
            block_out_channels=(8, 8), in_channels=1, out_channels=1, norm_num_groups=4,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
        ),
        text_encoder=clap,
        text_encoder_2=t5(),
        projection_model=AudioLDM2ProjectionModel(WIDTH, WIDTH, 16),
        language_model=transformers.GPT2LMHeadModel(transformers.GPT2Config(
            n_embd=16, n_head=2, n_layer=1, n_positions=128, vocab_size=10, max_new_tokens=8,
        )),
        tokenizer=roberta_tokenizer(),
        tokenizer_2=t5_tokenizer(),
        feature_extractor=transformers.ClapFeatureExtractor(feature_size=8),
        unet=AudioLDM2UNet2DConditionModel(
            block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, sample_size=32,
            in_channels=4, out_channels=4, cross_attention_dim=(WIDTH, 16), attention_head_dim=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        ),
        scheduler=diffusers.DDIMScheduler(
            beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", clip_sample=False
        ),
        vocoder=transformers.SpeechT5HifiGan(transformers.SpeechT5HifiGanConfig(
            model_in_dim=8, sampling_rate=16_000, upsample_initial_channel=16,
            upsample_rates=[8, 8], upsample_kernel_sizes=[16, 16],
            resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1]], normalize_before=False,
            initializer_range=0.3,
        )),
    )


BUILDERS = {
    "stable-audio": stable_audio, "stable-audio-3": stable_audio_3, "audioldm2": audioldm2,
}
