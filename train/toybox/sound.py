"""Train the embedded model's sound VAE on the sound of the Toybox world, made as it goes.

    python -m train.toybox.sound -c train/toybox/configs/sound.yaml
        [--set run.optim.lr=2e-4]... [--resume]

Windows are cut from clips at any sample, so that onsets lie anywhere in a latent. The losses look
at magnitudes, in windows from 4 to 128 ms (short ones keep onsets where they are, long ones keep
pitches), and at what the decoder says of tones and noise, against what the sound is made of.
`part: decoder` freezes the encoder, so that what a transformer learned of the latents stays true
while they come to sound better.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from eval.toybox.metrics.fidelity import measure_fidelity
from eval.toybox.metrics.sync import bouncing_scenes
from train.toybox.mel import log_mel, spectrogram
from train.toybox.muon import Muon
from train.toybox.phases import Phase, PhasedRun
from train.toybox.program import run_program
from train.toybox.sound_vae import load_sound_vae
from train.toybox.tasks.sound_parts import attacks, controls_distance, take_apart
from train.toybox.tasks.toybox_data import fresh_seed
from train.toybox.world.cues import SAMPLE_RATE, sound_cues
from train.toybox.world.scenes import SEED_RANGES, sample_scenes
from train.toybox.world.sound import synthesize
from vidgen.core.errors import InputError
from vidgen.core.runtime import choose_device
from vidgen.media.grid import contact_sheet
from vidgen.media.onsets import flux
from vidgen.media.types import Frames
from vidgen.models.audio import AudioVAE
from vidgen.models.audio_spectra import to_sound
from vidgen.models.presets import AUDIO_VAE_PRESETS
from vidgen.training.optim import build_optimizers

_FLOOR = 1e-4  # of magnitudes before their logarithm; a full-scale sine is about 1


@dataclass(frozen=True)
class SoundLoss:
    """Weights of the losses.

    Args:
        stft: spectral convergence and log-magnitude error (Yamamoto et al. 2020, eq. 6, 7), mean
            over `windows`.
        mel: absolute error of log mel magnitudes.
        parts: squared error of the magnitudes of tones and noise, compressed, against those that
            the sound is made of; see `take_apart`.
        advance: 1 - cos of the error of the tones' advance.
        attack: squared error of the gains' logs against those that attacks need; see `attacks`.
        onset: squared error of the spectral flux, as a share of its square: what blurs an attack
            takes from its peak, and ripples of a voice are then taken for impacts.
        windows: lengths of the spectra in samples, with hops of a quarter.
        kl: of the posterior against a standard normal.
    """

    stft: float = 0.25
    mel: float = 1.0
    parts: float = 10.0
    advance: float = 4.0
    attack: float = 2.0
    onset: float = 0.0
    windows: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048)
    kl: float = 1e-3


@dataclass(frozen=True)
class SoundRun:
    """The whole YAML file.

    Args:
        window_tokens: latents of a training window, cut from clips of a phase's `num_frames`.
        windows_per_clip: windows cut from each clip; a batch holds `batch_size` windows.
        bouncing: share of the clips in which one sprite bounces: impacts are rare otherwise.
        gain_db: range of the random gain.
        validation_clips: of held-out scenes.
        part: "decoder" keeps the encoder, and with it all latents, as it is.
        init: component folder of a released sound VAE to start from, and to take the config of.
    """

    run: PhasedRun
    preset: str = "toybox"
    part: Literal["all", "decoder"] = "all"
    init: str | None = None
    window_tokens: int = 64
    windows_per_clip: int = 2
    bouncing: float = 0.0
    gain_db: tuple[float, float] = (-9.0, 3.0)
    loss: SoundLoss = SoundLoss()
    validation_clips: int = 48

    def __post_init__(self) -> None:
        """Check the values against the preset, the phases and each other."""
        if self.part == "decoder" and not self.init:
            raise InputError("part: decoder needs init: the folder of the released sound VAE")
        if self.preset not in AUDIO_VAE_PRESETS:
            known = ", ".join(AUDIO_VAE_PRESETS)
            raise InputError(f"preset {self.preset!r} is unknown; there are {known}")
        if min(self.window_tokens, self.windows_per_clip, self.validation_clips) < 1:
            raise InputError(
                "window_tokens, windows_per_clip and validation_clips must be at least 1"
            )
        if not 0 <= self.bouncing <= 1:
            raise InputError(f"bouncing is {self.bouncing}; give a share from 0 to 1")
        for phase in self.run.phases:
            clip = round(phase.num_frames / 12 * SAMPLE_RATE)
            if clip < self.window_samples:
                raise InputError(
                    f"phase.num_frames {phase.num_frames} is {clip} samples, shorter than "
                    f"window_tokens {self.window_tokens} ({self.window_samples} samples); "
                    "lower window_tokens or raise num_frames"
                )

    @property
    def window_samples(self) -> int:
        """Samples of a training window."""
        return self.window_tokens * AUDIO_VAE_PRESETS[self.preset].samples_per_token


class SoundTask:
    """Reconstruction of the world's sound."""

    def __init__(self, config: SoundRun) -> None:
        self.config = config
        self.device = choose_device(config.run.device)
        torch.manual_seed(config.run.seed)
        if config.init:
            self.vae = load_sound_vae(Path(config.init), device=self.device)
            self.vae.requires_grad_(requires_grad=True)
        else:
            self.vae = AudioVAE(AUDIO_VAE_PRESETS[config.preset]).to(self.device)
        if config.part == "decoder":
            self.vae.encoder.requires_grad_(requires_grad=False)
        self.modules: dict[str, nn.Module] = {"vae": self.vae}

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """AdamW, or Muon for the matrices between the first and the last."""
        return build_optimizers(
            self.modules, self.config.run.optim,
            use_muon=lambda name, p: (
                p.dim() == 2 and not any(end in name for end in ("embed", "head", "latents"))
            ),
            make_muon=Muon,
        )

    def batch(self, phase: Phase, step: int, micro: int) -> Tensor:
        """Windows [B, N] of fresh scenes' sound, each with a gain of its own."""
        config, count = self.config, phase.batch_size
        base = fresh_seed(config.run.seed, step, micro)
        num_clips = -(-count // config.windows_per_clip)
        bouncing = round(config.bouncing * num_clips)
        scenes = [*bouncing_scenes(base, bouncing),
                  *sample_scenes(base + bouncing, num_clips - bouncing, split="any")]
        clips = synthesize(scenes, phase.num_frames)
        draw = torch.Generator().manual_seed(base)
        starts = torch.randint(
            clips.shape[1] - config.window_samples + 1, (count, 1), generator=draw
        )
        low, high = config.gain_db
        gains = 10 ** ((low + (high - low) * torch.rand((count, 1), generator=draw)) / 20)
        where = starts + torch.arange(config.window_samples)
        rows = torch.arange(count)[:, None] % num_clips
        return (clips[rows, where] * gains).to(self.device)

    def loss(self, batch: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Magnitudes at several resolutions, mel magnitudes, tones and noise, KL."""
        del step
        weights = self.config.loss
        mean, logvar = (part.float() for part in self.vae.encode_moments(batch))
        logvar = logvar.clamp(-20, 10)
        latents = mean + torch.randn_like(mean) * (0.5 * logvar).exp()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        controls = self.vae.controls(latents)
        start = int(torch.randint(4096, ()))  # noise is never the same, so nothing relies on it
        decoded = to_sound(self.vae.config, controls, first_noise=start)
        wanted = take_apart(self.vae.config, *self.vae.spectra(batch))
        parts, advance = controls_distance(self.vae.config, controls, wanted)
        attack = parts.new_zeros(())
        if controls.attack is not None:
            steady = to_sound(self.vae.config, wanted, first_noise=start)
            gains = attacks(self.vae.config, batch, steady)
            attack = (controls.attack - gains[:, :, None]).square().mean()
        stft = torch.stack([stft_distance(decoded, batch, w) for w in weights.windows]).mean()
        mel = mel_distance(decoded, batch)
        total = weights.stft * stft + weights.mel * mel + weights.kl * kl
        total = total + weights.parts * parts + weights.advance * advance
        total = total + weights.attack * attack
        terms = {"stft": stft, "mel": mel, "parts": parts, "advance": advance,
                 "attack": attack, "kl": kl}  # fmt: skip
        if weights.onset:
            terms["onset"] = flux_distance(decoded, batch)
            total = total + weights.onset * terms["onset"]
        return total, {name: value.detach() for name, value in terms.items()}

    def validate(self, step: int, folder: Path) -> dict[str, float]:
        """Fidelity on held-out scenes; a sheet of spectra, originals above what was decoded."""
        scenes = sample_scenes(
            SEED_RANGES["dev"][0] + (1 << 37), self.config.validation_clips, split="any"
        )
        original, parts = synthesize(scenes), []
        for clips in original.to(self.device).split(8):
            latents, _ = self.vae.encode_moments(clips)
            parts.append(self.vae.decode_raw(latents, clips.shape[1]).clamp(-1, 1).cpu())
        decoded = torch.cat(parts)
        found = measure_fidelity(
            original, decoded, [[cue.seconds for cue in sound_cues(scene)] for scene in scenes]
        )
        pictures = [picture(sound) for pair in (original[:6], decoded[:6]) for sound in pair]
        contact_sheet(pictures, folder / f"sheet-{step:07d}.png", columns=6)
        return {
            "onset_ms": 1000 * found.onset_median_s, "onset_p95_ms": 1000 * found.onset_p95_s,
            "onset_recall": found.onset_recall, "mel": found.mel,
        }


def stft_distance(decoded: Tensor, sound: Tensor, window: int) -> Tensor:
    """Spectral convergence and mean log-magnitude error of [B, N] against [B, N], a scalar."""
    ours, true = (spectrogram(x, window, window // 4) for x in (decoded, sound))
    gap = torch.linalg.vector_norm(ours - true, dim=(1, 2))
    size = torch.linalg.vector_norm(true, dim=(1, 2)).clamp(min=1e-3)
    logs = ((ours + _FLOOR).log() - (true + _FLOOR).log()).abs().mean()
    return (gap / size).mean() + logs


def mel_distance(decoded: Tensor, sound: Tensor) -> Tensor:
    """Mean absolute error of log mel magnitudes in long and short frames, a scalar."""
    errors = [
        (log_mel(decoded, SAMPLE_RATE, window=window, hop=window // 4, bands=bands)
         - log_mel(sound, SAMPLE_RATE, window=window, hop=window // 4, bands=bands)).abs().mean()
        for window, bands in ((1024, 80), (256, 32))
    ]  # fmt: skip
    return torch.stack(errors).mean()


def flux_distance(decoded: Tensor, sound: Tensor) -> Tensor:
    """Squared error of the spectral flux of [B, N] as a share of its square, a scalar."""
    ours, true = (flux(x, SAMPLE_RATE) for x in (decoded, sound))
    return (ours - true).square().sum() / true.square().sum().clamp(min=1e-6)


def picture(sound: Tensor) -> Frames:
    """The spectrum of a sound [N] over time as uint8 [H, W, 3], low at the bottom."""
    levels = spectrogram(sound[None], 512, 128)[0].flip(0)
    shades = ((levels + 1e-4).log10() / 4 + 1).clamp(0, 1)
    return (shades * 255).byte()[..., None].expand(-1, -1, 3).numpy()


if __name__ == "__main__":
    raise SystemExit(run_program(__doc__, SoundRun, SoundTask))
