"""What a plan counts of the networks' work and memory, against torch's own count of them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.live import Live
from vidgen.models import audio_spectra
from vidgen.models.audio import AudioVAE
from vidgen.models.dit import SpacetimeDiT
from vidgen.models.dit_types import DiTConfig
from vidgen.models.onset_detector import OnsetDetector, OnsetDetectorConfig
from vidgen.models.presets import AUDIO_VAE_PRESETS, DIT_PRESETS, VAE_PRESETS
from vidgen.models.vae import CausalVAE
from vidgen.models.verifier import Verifier, VerifierConfig
from vidgen.ops import native
from vidgen.pipeline.budget.workload import (
    decoder_layers,
    encoder_layers,
    onset_detector_ops,
    sound_bytes,
    sound_ops,
    transformer_bytes,
    transformer_ops,
    vae_bytes,
    verifier_ops,
)


def test_products_are_counted_as_torch_counts_them():
    config = DIT_PRESETS["tiny"]
    dit = SpacetimeDiT(config).eval()
    dit.set_attention_backend("matmul")
    latents, context = torch.randn(1, 4, 5, 8, 8), torch.randn(1, 7, config.text_dim)
    with torch.no_grad(), Live() as live:
        dit(latents, torch.tensor([500.0]), context, context_lengths=[6])
    ops = transformer_ops(config, 5, 16, 6)
    share = config.head_dim / (config.head_dim + 64)  # attention counts its softmax, too
    counted = sum(op.amount * (share if op.kind == "attention" else 1)
                  for op in ops if op.kind in ("gemm", "attention"))
    assert counted == pytest.approx(live.flops, rel=0.02)


@pytest.mark.parametrize("name", ["tiny", "toybox"])
@pytest.mark.parametrize("layers", [encoder_layers, decoder_layers])
def test_layers_are_those_of_the_vae(name, layers):
    config = VAE_PRESETS[name]
    vae = CausalVAE(config)
    side = vae.decoder if layers is decoder_layers else vae.encoder
    convolutions = [
        m.weight for m in side.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Conv3d)
    ]
    real = [w for w in convolutions if w[0, 0].numel() > 1]
    counted = [layer for layer in layers(config, 4, 4) if layer.taps != (1, 1)]
    assert len(counted) == len(real)
    # the upsampling's four phases have 16 taps in place of 9
    weights = sum(layer.inputs * layer.outputs * math.prod(layer.taps) for layer in counted)
    folded = sum(7 * layer.inputs * layer.outputs // 4 for layer in counted
                 if layer.taps == (1, 4))
    assert weights - folded == sum(w.numel() for w in real)


@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize("rate", [1, 2])
def test_the_vae_holds_what_is_predicted(decode, rate):
    config = replace(VAE_PRESETS["toybox"], decoder_dim=16, encoder_dim=16)
    vae, strides = CausalVAE(config).eval(), config.strides
    latents = torch.randn(1, config.latent_channels, 4, 12, 12)
    video = torch.randn(1, 3, 1 + 3 * strides.t, 12 * strides.hw, 12 * strides.hw)
    with torch.no_grad(), Live() as live:
        for part in (vae.stream_decode(latents, oversampling=rate) if decode
                     else vae.stream_encode([video[:, :, : 1 + 12 // rate]], oversampling=rate)):
            del part
    fused = torch.float32 in native.known_dtypes()
    predicted = vae_bytes(config, 12, 12, 4, decode=decode, fused=fused, oversampling=rate)
    assert predicted == pytest.approx(live.peak, rel=0.3)


@pytest.mark.parametrize("layers", [encoder_layers, decoder_layers])
@pytest.mark.parametrize("rate", [1, 2, 4])
def test_layers_make_as_many_frames_as_the_vae_does(layers, rate):
    config = VAE_PRESETS["toybox"]
    each = [layer.frames for layer in layers(config, 4, 4, rate)]
    pixels, latents = (each[-1], each[0]) if layers is decoder_layers else (each[0], each[-1])
    assert (pixels, latents) == (config.strides.t // rate, 1)


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


@pytest.mark.parametrize("tints", [(), (("red",), ("blue",))])
def test_a_verifier_is_counted_as_torch_counts_it(tints):
    config = VerifierConfig((("cat",), ("car",)), tints, latent_channels=16, dim=96)
    with FlopCounterMode(display=False) as counter:
        Verifier(config).eval().shown(torch.randn(1, 16, 5, 12, 16))
    flops = sum(op.amount for op in verifier_ops(config, 5, 12 * 16) if op.kind == "conv")
    assert flops == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_an_onset_detector_is_counted_as_torch_counts_it():
    config = OnsetDetectorConfig()
    with FlopCounterMode(display=False) as counter:
        OnsetDetector(config).eval().expected(torch.randn(1, 16, 5, 12, 16))
    flops = sum(op.amount for op in onset_detector_ops(config, 5, 12 * 16) if op.kind == "conv")
    assert flops == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_sound_is_counted_as_torch_counts_it():
    config = AUDIO_VAE_PRESETS["toybox"]
    vae = AudioVAE(config).eval()
    latents = torch.randn(1, config.latent_channels, 200)
    audio_spectra._noise_frames.cache_clear()  # the table is part of what is held
    with torch.no_grad(), Live() as live:
        vae.decode(latents)
    flops = sum(op.amount for op in sound_ops(config, 200) if op.kind == "gemm")
    assert flops == pytest.approx(live.flops, rel=0.02)
    assert sound_bytes(config, 200, 4) == pytest.approx(live.peak, rel=0.3)
