"""What a plan counts of the networks' work and memory, against torch's own count of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.live import Live
from vidgen.core.runtime import ATTENTION_VARIABLE
from vidgen.models import audio_spectra
from vidgen.models.audio import AudioVAE
from vidgen.models.dit import SpacetimeDiT
from vidgen.models.dit_types import DiTConfig
from vidgen.models.presets import AUDIO_VAE_PRESETS, DIT_PRESETS, VAE_PRESETS
from vidgen.models.vae import CausalVAE
from vidgen.ops import native
from vidgen.ops.conv import CausalConv3d
from vidgen.pipeline.memory import sound_bytes, transformer_bytes, vae_bytes
from vidgen.pipeline.timing import transformer_flops, vae_flops, vae_parts


def test_products_are_counted_as_torch_counts_them(monkeypatch):
    monkeypatch.setenv(ATTENTION_VARIABLE, "reference")
    config = DIT_PRESETS["tiny"]
    dit = SpacetimeDiT(config).eval()
    latents, context = torch.randn(1, 4, 5, 8, 8), torch.randn(1, 7, config.text_dim)
    with torch.no_grad(), Live() as live:
        dit(latents, torch.tensor([500.0]), context, context_lengths=[6])
    assert sum(transformer_flops(config, 5, 16, 6)) == pytest.approx(live.flops, rel=0.02)


@pytest.mark.parametrize("name", ["tiny", "toybox", "wan21", "wan22"])
@pytest.mark.parametrize("decode", [True, False])
def test_convolutions_are_those_of_the_vae(name, decode):
    config = VAE_PRESETS[name]
    with torch.device("meta"):
        vae = CausalVAE(config)
    side = vae.decoder if decode else vae.encoder
    cubes = [m for m in side.modules()
             if isinstance(m, CausalConv3d) and m.kernel_size == (3, 3, 3)]
    middle, parts = vae_parts(config, 4, 4, decode=decode)
    counted = [middle, *parts]
    assert sum(len(part.inputs) for part in counted) == len(cubes)
    assert sorted(n for part in counted for n in part.inputs) == sorted(
        conv.in_channels for conv in cubes)


@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize("name", ["tiny", "toybox", "wan21", "wan22"])
def test_the_vae_multiplies_about_as_counted(name, decode):
    config = VAE_PRESETS[name]
    strides = config.strides
    with torch.device("meta"):
        vae, latents = CausalVAE(config).eval(), torch.randn(1, config.latent_channels, 3, 4, 4)
        video = torch.randn(1, 3, 1 + 2 * strides.t, 4 * strides.hw, 4 * strides.hw)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        for _ in vae.stream_decode(latents) if decode else vae.stream_encode([video]):
            pass
    flops = vae_flops(config, 3, 4, 4, decode=decode).conv
    assert flops == pytest.approx(counter.get_total_flops(), rel=0.2)


@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize("rate", [1, 2])
def test_the_vae_holds_what_is_predicted(decode, rate):
    config = replace(VAE_PRESETS["toybox"], decoder_dim=16, encoder_dim=16)
    vae, strides = CausalVAE(config).eval(), config.strides
    finer, latents = vae.at_rate(rate), torch.randn(1, config.latent_channels, 4, 12, 12)
    video = torch.randn(1, 3, 1 + 3 * strides.t, 12 * strides.hw, 12 * strides.hw)
    with torch.no_grad(), Live() as live:
        for part in (finer.stream_decode(latents) if decode
                     else finer.stream_encode([video[:, :, : 1 + 12 // rate]])):
            del part
    fused = torch.float32 in native.known_dtypes()
    predicted = vae_bytes(config, 12, 12, 4, decode=decode, fused=fused, rate=rate)
    assert predicted == pytest.approx(live.peak, rel=0.3)


@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize("rate", [1, 2, 4])
def test_parts_make_as_many_frames_as_the_vae_does(decode, rate):
    config = VAE_PRESETS["toybox"]
    middle, parts = vae_parts(config, 4, 4, decode=decode, rate=rate)
    pixels, latents = (parts[-1], parts[0]) if decode else (parts[0], parts[-1])
    assert (pixels.frames, latents.frames) == (config.strides.t // rate, 1)
    assert middle.frames == 1


@pytest.mark.parametrize("ffn_dim", [128, 1024])
def test_the_transformer_holds_what_is_predicted(ffn_dim):
    config = DiTConfig(in_channels=4, out_channels=4, num_heads=4, head_dim=32, num_layers=2,
                       ffn_dim=ffn_dim, text_dim=16)
    dit = SpacetimeDiT(config).eval()
    latents, context = torch.randn(1, 4, 9, 32, 32), torch.randn(1, 7, 16)
    with torch.no_grad(), Live() as live:
        dit(latents, torch.tensor([500.0]), context)
    predicted = transformer_bytes(config, 9 * 256, 4, blocked=False)
    assert predicted == pytest.approx(live.peak, rel=0.25)


def test_the_sounds_decoder_holds_what_is_predicted():
    config = AUDIO_VAE_PRESETS["toybox"]
    vae = AudioVAE(config).eval()
    latents = torch.randn(1, config.latent_channels, 200)
    audio_spectra._noise_frames.cache_clear()  # the table is part of what is held
    with torch.no_grad(), Live() as live:
        vae.decode(latents)
    assert sound_bytes(config, 200, 4) == pytest.approx(live.peak, rel=0.3)
