"""The VAE for sound: lengths, causality, streams that equal the whole, its folder."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from train.toybox.model_files import save_module
from train.toybox.sound_vae import SOUND_VAE, load_sound_vae
from train.toybox.world.cues import SAMPLE_RATE
from vidgen.core.errors import InputError, ModelError
from vidgen.models.audio import AudioVAE
from vidgen.models.audio_spectra import Controls, overlap_add, to_sound
from vidgen.models.presets import AUDIO_VAE_PRESETS, DIT_PRESETS
from vidgen.ops.conv import StreamCache
from vidgen.weights.convert import convert
from vidgen.weights.layouts import open_model

TINY = AUDIO_VAE_PRESETS["tiny"]
STATISTICS = {"latents_mean": (0.5, -1.0, 0.0, 2.0), "latents_std": (1.0, 2.0, 0.5, 3.0)}


@pytest.fixture(scope="module")
def vae() -> AudioVAE:
    torch.manual_seed(0)
    made = AudioVAE(replace(TINY, **STATISTICS)).eval().requires_grad_(requires_grad=False)
    for parameter in made.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape))
    return made


def noise(count: int, batch: int = 2) -> torch.Tensor:
    return 0.2 * torch.randn(batch, count, generator=torch.Generator().manual_seed(count))


def test_the_presets_fit_the_transformer_and_the_package() -> None:
    config, dit = AUDIO_VAE_PRESETS["toybox"], DIT_PRESETS["toybox"].audio
    assert (config.latent_channels, config.tokens_per_s) == (dit.channels, dit.tokens_per_s)
    assert config.sample_rate == SAMPLE_RATE
    with torch.device("meta"):
        size = 2 * sum(p.numel() for p in AudioVAE(config).parameters())
    assert size < 3_000_000  # bytes in bf16


@pytest.mark.parametrize("count", [1, 511, 512, 513, 1024, 5000])
def test_lengths_follow_from_the_samples(vae: AudioVAE, count: int) -> None:
    tokens = TINY.num_tokens(count)
    latents = vae.encode(noise(count))
    assert latents.shape == (2, 4, tokens)
    assert (tokens - 1) * TINY.samples_per_token < count <= tokens * TINY.samples_per_token
    assert vae.decode(latents).shape == (2, tokens * TINY.samples_per_token)
    assert vae.decode(latents, count).shape == (2, count)


@pytest.mark.parametrize("parts", [[5000], [1, 700, 3, 2000, 1800, 496], [512] * 9 + [392]])
def test_a_stream_equals_the_whole(vae: AudioVAE, parts: list[int]) -> None:
    sound = noise(5000)
    latents = vae.encode(sound)
    streamed = torch.cat([*vae.stream_encode(sound.split(parts, 1))], 2)
    torch.testing.assert_close(streamed, latents, atol=1e-5, rtol=0)
    whole = vae.decode(latents)
    for pieces in ([1] * 10, [3, 7], [10]):
        heard = torch.cat([*vae.stream_decode(latents.split(pieces, 2))], 1)
        torch.testing.assert_close(heard, whole, atol=1e-5, rtol=0)


def test_streams_continue_from_their_caches(vae: AudioVAE) -> None:
    latents, cache = vae.encode(noise(4000)), StreamCache()
    parts = [*vae.stream_decode([latents[:, :, :3]], cache)]
    parts += [*vae.stream_decode([latents[:, :, 3:]], cache)]
    torch.testing.assert_close(torch.cat(parts, 1), vae.decode(latents), atol=1e-5, rtol=0)
    assert cache.position == latents.shape[2]


def test_a_cache_does_not_grow(vae: AudioVAE) -> None:
    cache, sizes = StreamCache(), []
    for _ in range(6):
        list(vae.stream_decode([torch.randn(1, TINY.latent_channels, 3)], cache))
        sizes.append(sum(t.numel() for t in cache.tensors.values()))
    assert len(set(sizes[1:])) == 1


def test_latents_see_what_is_ahead_by_the_lookahead_alone(vae: AudioVAE) -> None:
    sound, other = noise(4096), noise(5000)[:, :4096].clone()
    cut = 4 * TINY.samples_per_token + TINY.lookahead
    other[:, :cut] = sound[:, :cut]
    one, two = vae.encode(sound), vae.encode(other)
    torch.testing.assert_close(one[:, :, :4], two[:, :, :4], atol=1e-6, rtol=0)
    assert (one[:, :, 4] - two[:, :, 4]).abs().max() > 1e-3


def test_sound_is_finished_by_the_latents_up_to_its_own(vae: AudioVAE) -> None:
    one = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    two = one.clone()
    two[:, :, 3] += 1
    end = 3 * TINY.samples_per_token
    first, second = vae.decode(one), vae.decode(two)
    torch.testing.assert_close(first[:, :end], second[:, :end], atol=1e-6, rtol=0)
    assert (first[:, end : end + TINY.samples_per_token] - second[:, end : end + 512]).any()


def test_frames_overlap_to_the_sound_they_were_cut_from() -> None:
    sound = noise(2048)
    window = torch.hann_window(TINY.window)
    padded = torch.nn.functional.pad(sound, (0, TINY.lookahead))
    frames = padded.unfold(1, TINY.window, TINY.hop) * window * window
    heard = overlap_add(TINY, frames)
    torch.testing.assert_close(heard[:, 64:], sound[:, 64:], atol=1e-5, rtol=0)
    assert (heard[:, :64].abs() <= sound[:, :64].abs() + 1e-6).all()  # rises, overshoots nowhere


def test_a_steady_advance_is_a_steady_tone(vae: AudioVAE) -> None:
    tone = torch.zeros(1, 250, TINY.num_bins)
    tone[:, :, 20] = 30.0
    advance = torch.full_like(tone, 0.4)
    sound = to_sound(vae.config, Controls(advance, tone, torch.zeros_like(tone)))[0, 1000:]
    spectrum = torch.fft.rfft(sound * torch.hann_window(len(sound)), 160_000).abs()
    hertz = (20 / TINY.window + 0.4 / (2 * torch.pi * TINY.hop)) * TINY.sample_rate
    assert int(spectrum.argmax()) / 10 == pytest.approx(float(hertz), abs=0.5)
    levels = sound[:12_800].unflatten(0, (-1, 1280)).std(1)
    assert float(levels.std() / levels.mean()) < 0.02


def test_the_encoder_sees_what_the_oscillators_need(vae: AudioVAE) -> None:
    hertz = 1313.0
    sound = 0.3 * torch.sin(torch.arange(8192) * 2 * torch.pi * hertz / TINY.sample_rate)[None]
    magnitudes, moved = vae.spectra(sound)
    tone = torch.zeros_like(magnitudes)
    best = int(magnitudes[0, 20].argmax())
    tone[..., best] = magnitudes[..., best]
    heard = to_sound(vae.config, Controls(moved.angle(), tone, torch.zeros_like(tone)))[0]
    spectrum = torch.fft.rfft(heard[1000:7000] * torch.hann_window(6000), 160_000).abs()
    assert int(spectrum.argmax()) / 10 == pytest.approx(hertz, abs=1)


def test_near_tones_have_a_pitch_over_the_longer_window_alone() -> None:
    time = torch.arange(16_000) / TINY.sample_rate
    pair = [0.2 * torch.sin(2 * torch.pi * hertz * time) for hertz in (1000.0, 1090.0)]
    at = round(1000.0 / TINY.sample_rate * TINY.window)

    def wavering(pitch_window: int) -> float:
        tones = AudioVAE(replace(TINY, pitch_window=pitch_window)).spectra(sum(pair)[None])[1]
        return float(tones[0, 20:200, at].angle().std())

    assert wavering(0) > 0.2
    assert wavering(512) < 0.05


def test_an_oscillator_reaches_little_farther_than_half_way_to_the_next(vae: AudioVAE) -> None:
    between = torch.pi * TINY.hop / TINY.window  # radians a frame
    advance = vae.controls(20 * torch.randn(2, TINY.latent_channels, 20)).advance
    assert float(advance.abs().max()) < 1.11 * between
    assert vae.config.reach > between


def test_noise_is_noise_and_always_the_same(vae: AudioVAE) -> None:
    noise = torch.ones(1, 250, TINY.num_bins)
    silent = torch.zeros_like(noise)
    one, two = (to_sound(vae.config, Controls(silent, silent, noise)) for _ in range(2))
    assert torch.equal(one, two)
    power = torch.stft(one, 256, 64, window=torch.hann_window(256), return_complex=True).abs()
    flat = power[0, 4:-4].mean(1)
    assert float(flat.std() / flat.mean()) < 0.2
    other = to_sound(vae.config, Controls(silent, silent, noise), first_noise=77)
    assert abs(float(torch.corrcoef(torch.cat([one, other]))[0, 1])) < 0.05


def test_latents_are_normalised_by_the_configs_statistics(vae: AudioVAE) -> None:
    raw = vae.encode_moments(noise(1000))[0]
    mean, std = (torch.tensor(v)[:, None] for v in STATISTICS.values())
    torch.testing.assert_close(vae.normalize(raw), (raw - mean) / std)
    torch.testing.assert_close(vae.denormalize(vae.normalize(raw)), raw)


def test_a_component_folder_keeps_it(vae: AudioVAE, tmp_path: Path) -> None:
    folder = tmp_path / "sound_vae"
    save_module(vae.state_dict(), vae.config, folder, torch.float32)
    again = load_sound_vae(folder)
    assert again.config == vae.config
    assert torch.equal(again.encode(noise(2000)), vae.encode(noise(2000)))
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"window": 100}))
    with pytest.raises(ModelError, match="window 100"):
        load_sound_vae(folder)


def test_it_works_in_bf16(vae: AudioVAE, tmp_path: Path) -> None:
    save_module(vae.state_dict(), vae.config, tmp_path / "sound_vae", torch.bfloat16)
    half = load_sound_vae(tmp_path / "sound_vae", torch.bfloat16)
    assert half.encode(noise(2000)).dtype == torch.bfloat16
    sound = half.decode(half.encode(noise(2000)), 2000)
    assert sound.dtype == torch.float32
    assert sound.isfinite().all()


def test_conversion_carries_it_along(vae: AudioVAE, tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    save_module(vae.state_dict(), vae.config, tmp_path / "model" / SOUND_VAE, torch.float32)
    for name, layout in (("model", "diffusers"), ("diffusers", "vidgen")):
        convert(open_model(str(tmp_path / name)), tmp_path / layout, layout)
        again = load_sound_vae(tmp_path / layout / SOUND_VAE)
        assert torch.equal(again.encode(noise(1000)), vae.encode(noise(1000)))
    assert "sound_vae/model.safetensors" in open_model(str(tmp_path / "vidgen")).files


def test_what_is_no_mono_sound_is_refused(vae: AudioVAE) -> None:
    with pytest.raises(InputError, match="mono"):
        vae.encode(torch.zeros(1, 2, 100))
    with pytest.raises(InputError, match="at least one"):
        vae.encode(torch.zeros(1, 0))


def test_bad_architectures_are_refused() -> None:
    with pytest.raises(ValueError, match="hop"):
        replace(TINY, hop=100)
    with pytest.raises(ValueError, match="pitch_window 300"):
        replace(TINY, pitch_window=300)
    with pytest.raises(ValueError, match="latents_mean"):
        replace(TINY, latents_mean=(0.0,))
    with pytest.raises(ValueError, match="kernel_size"):
        replace(TINY, kernel_size=0)


def test_it_learns_in_bf16_autocast() -> None:
    torch.manual_seed(1)
    vae = AudioVAE(TINY)
    with torch.autocast("cpu", torch.bfloat16):
        mean, _ = vae.encode_moments(noise(1024))
        vae.decode_raw(mean).square().mean().backward()
    missing = [name for name, p in vae.named_parameters() if p.grad is None]
    assert missing == []  # log-variances share the moments' weights
