"""The programs that train the sound VAE and the sound judge, at tiny size."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from eval.toybox.judge import NOTHING
from eval.toybox.metrics.fidelity import measure_fidelity
from eval.toybox.metrics.sync import bouncing_scenes
from eval.toybox.sound_judge import Heard, SoundJudge, SoundJudgeConfig, SoundJudgeFolder
from eval.toybox.suite.listening import grade_sound, hollow_sound, judge_sounds
from tests.programs import load_program
from train.toybox.mel import log_mel, mel_bank, spectrogram
from train.toybox.model_files import save_module
from train.toybox.phases import train
from train.toybox.sound_vae import SOUND_VAE, load_sound_vae
from train.toybox.tasks.sound_data import damage_sound, hollow_out, label_sounds
from train.toybox.tasks.sound_parts import attacks, controls_distance, take_apart
from train.toybox.world.cues import SAMPLE_RATE, sound_cues
from train.toybox.world.scenes import Actor, Scene, sample_scenes
from train.toybox.world.sound import synthesize
from vidgen.core.config import build, dump
from vidgen.core.errors import InputError, ModelError
from vidgen.models.audio import AudioVAE
from vidgen.models.audio_spectra import Controls, to_sound
from vidgen.models.presets import AUDIO_VAE_PRESETS
from vidgen.training.checkpoint import latest_checkpoint

TINY_JUDGE = SoundJudgeConfig(bands=32, dims=(4, 8, 16), hidden_dim=16)


@pytest.fixture(scope="module")
def sound() -> ModuleType:
    return load_program("train/toybox/sound.py")


def run_settings(folder: Path, steps: int = 4) -> dict:
    return {
        "preset": "tiny", "window_tokens": 8, "validation_clips": 2,
        "loss": {"windows": [64, 256, 512]},
        "run": {
            "folder": str(folder), "device": "cpu", "validate_every": 100, "log_every": 1,
            "checkpoint_minutes": 0, "optim": {"lr": 2e-3, "muon_lr": 2e-3, "warmup_steps": 1},
            "phases": [{"steps": steps, "num_frames": 9, "batch_size": 4}],
        },
    }  # fmt: skip


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(latest_checkpoint(folder) / "state.safetensors")


@pytest.mark.long
def test_a_resumed_run_ends_with_the_same_bits(sound: ModuleType, tmp_path: Path) -> None:
    straight = build(sound.SoundRun, run_settings(tmp_path / "straight"), "run")
    result = train(sound.SoundTask(straight), straight.run)
    assert result.finished
    assert {"onset_ms", "onset_p95_ms", "onset_recall", "mel"} == result.metrics.keys()
    assert list((tmp_path / "straight").glob("sheet-*.png"))
    cut = build(sound.SoundRun, run_settings(tmp_path / "cut"), "run")
    train(sound.SoundTask(cut), replace(cut.run, minutes=1e-6))
    assert latest_checkpoint(tmp_path / "cut").name == "step-00000001"
    train(sound.SoundTask(cut), cut.run, resume=True)
    one, two = state_of(tmp_path / "straight"), state_of(tmp_path / "cut")
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


def test_a_tone_is_taken_for_its_nearest_oscillators_and_noise_for_noise() -> None:
    vae = AudioVAE(AUDIO_VAE_PRESETS["tiny"])
    tone = 0.3 * torch.sin(torch.arange(16_000) * 2 * torch.pi * 1010 / SAMPLE_RATE)[None]
    noise = 0.1 * torch.randn(1, 16_000, generator=torch.Generator().manual_seed(0))
    inside = slice(20, -20)

    of_tone = take_apart(vae.config, *vae.spectra(tone))
    playing = (of_tone.tone[0, inside] > 0.1).any(0).nonzero().flatten().tolist()
    assert playing == [16]  # bins of 62.5 Hz
    assert float(of_tone.noise[0, inside, 10:22].max()) < 1e-3
    heard = to_sound(vae.config, of_tone)[:, : tone.shape[1]]
    assert float(heard[:, 2000:-2000].std()) == pytest.approx(float(tone.std()), rel=0.05)

    of_noise = take_apart(vae.config, *vae.spectra(noise))
    assert float(of_noise.tone.mean()) < 0.2 * float(of_noise.noise.mean())
    power = vae.config.compression
    mean = (of_noise.noise[:, inside] ** power).mean((1, 2), keepdim=True)
    level = (mean ** (1 / power)).expand_as(of_noise.noise)
    steady = to_sound(vae.config, Controls(torch.zeros_like(level), torch.zeros_like(level), level))
    assert 0.6 < float(steady.std() / noise.std()) < 1.1  # what was taken for tones is missing
    assert controls_distance(vae.config, of_noise, of_noise) == (0, 0)


def test_gains_sharpen_what_windows_blur_and_leave_the_rest() -> None:
    vae, begins = AudioVAE(AUDIO_VAE_PRESETS["tiny"]), 8000
    draw = torch.Generator().manual_seed(0)
    sound = 0.2 * torch.randn(1, 16_000, generator=draw)
    sound[:, :begins] *= 0.01
    parts = take_apart(vae.config, *vae.spectra(sound))
    plain = to_sound(vae.config, parts)
    gains = attacks(vae.config, sound, plain)
    assert gains.shape == (1, parts.tone.shape[1], vae.config.gains_per_frame)
    points = gains.flatten()
    at = begins // 16
    assert float(points[at - 9 : at - 4].max()) < -1  # what the window smears ahead
    away = torch.cat([points[20 : at - 30], points[at + 30 : -40]])
    assert float((away == 0).float().mean()) > 0.9
    sharp = to_sound(vae.config, parts._replace(attack=gains[:, :, None].expand(-1, -1, 2, -1)))
    smeared, left = (float(x[:, begins - 128 : begins - 32].std()) for x in (plain, sharp))
    assert left < 0.7 * smeared


@pytest.mark.long
def test_the_loss_falls_and_silence_is_finite(sound: ModuleType, tmp_path: Path) -> None:
    config = build(sound.SoundRun, run_settings(tmp_path, steps=30), "run")
    task = sound.SoundTask(config)
    (phase,) = config.run.phases
    batch = task.batch(phase, 0, 0)
    assert batch.shape == (4, 8 * 512)
    assert torch.equal(batch, task.batch(phase, 0, 0))
    assert not torch.equal(batch, task.batch(phase, 1, 0))
    optimizers, losses = task.optimizers(), []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = 5e-3
    for step in range(30):
        loss, named = task.loss(batch, step)
        assert {"stft", "mel", "parts", "advance", "attack", "kl"} == named.keys()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    silent, _ = task.loss(torch.zeros(2, 4096), 0)
    silent.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in task.vae.parameters())


def test_distances_are_zero_for_the_same_and_grow_with_a_shift(sound: ModuleType) -> None:
    heard = synthesize(sample_scenes(8, 2), 9)
    assert float(sound.stft_distance(heard, heard, 256)) == 0
    assert float(sound.mel_distance(heard, heard)) == 0
    near, far = (
        float(sound.stft_distance(heard.roll(shift, 1), heard, 256)) for shift in (16, 400)
    )
    assert 0 < near < far


def test_blurred_attacks_have_less_flux_and_ripples_have_more(sound: ModuleType) -> None:
    heard = synthesize(bouncing_scenes(9, 2), 33)
    assert float(sound.flux_distance(heard, heard)) == 0
    blurred = F.avg_pool1d(heard[:, None].abs(), 257, 1, 128)[:, 0] * torch.sign(heard)
    ripples = 1 + 0.5 * torch.sin(torch.arange(heard.shape[1]) * 2 * torch.pi * 20 / SAMPLE_RATE)
    assert float(sound.flux_distance(blurred, heard)) > 0.1
    assert float(sound.flux_distance(heard * ripples, heard)) > 0.01
    assert float(sound.flux_distance(0.9 * heard, heard)) < 0.01
    silent = torch.zeros(1, 4096, requires_grad=True)
    sound.flux_distance(silent, silent.detach()).backward()
    assert silent.grad is not None
    assert silent.grad.isfinite().all()


def test_a_share_of_the_clips_bounces(
    sound: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = run_settings(tmp_path) | {"bouncing": 0.5, "loss": {"onset": 1.0, "windows": [64]}}
    task = sound.SoundTask(build(sound.SoundRun, settings, "run"))
    (phase,) = task.config.run.phases
    plain = sound.SoundTask(build(sound.SoundRun, run_settings(tmp_path), "run"))
    mixed, before = (each.batch(phase, 0, 0) for each in (task, plain))
    assert mixed.shape == before.shape
    assert not torch.equal(mixed, before)
    shown: list[Scene] = []

    def heard(scenes: list[Scene], num_frames: int) -> torch.Tensor:
        shown.extend(scenes)
        return synthesize(scenes, num_frames)

    monkeypatch.setattr(sound, "synthesize", heard)
    task.batch(phase, 0, 0)
    assert len(shown) == 2
    assert [actor.motion for actor in shown[0].actors] == ["bounces"]
    assert shown[1] == sample_scenes(shown[0].seed + 1, 1, split="any")[0]
    assert "onset" in task.loss(mixed, 0)[1]
    with pytest.raises(InputError, match="bouncing is"):
        build(sound.SoundRun, settings | {"bouncing": 1.5}, "run")


def test_a_window_longer_than_its_clip_is_refused(sound: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="window_tokens 40"):
        build(sound.SoundRun, run_settings(tmp_path) | {"window_tokens": 40}, "run")
    with pytest.raises(InputError, match="preset 'large'"):
        build(sound.SoundRun, run_settings(tmp_path) | {"preset": "large"}, "run")


@pytest.mark.long
def test_a_run_is_released_with_its_statistics(
    sound: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = build(sound.SoundRun, run_settings(tmp_path / "run", steps=2), "run")
    train(sound.SoundTask(config), config.run, record=dump(config))
    release = load_program("train/toybox/release.py")
    monkeypatch.setattr(release, "NUM_STATISTICS_CLIPS", 8)
    release.release_sound(tmp_path / "run", tmp_path / "model")
    vae = load_sound_vae(tmp_path / "model" / SOUND_VAE)
    latents = vae.encode(synthesize(sample_scenes(12345, 8)))
    assert latents.mean((0, 2)).abs().max() < 1.5
    assert latents.std((0, 2)).max() < 3

    first = tmp_path / "model" / SOUND_VAE
    again = run_settings(tmp_path / "again", steps=2) | {"part": "decoder", "init": str(first)}
    config = build(sound.SoundRun, again, "run")
    train(sound.SoundTask(config), config.run, record=dump(config))
    release.release_sound(tmp_path / "again", tmp_path / "better")
    better = load_sound_vae(tmp_path / "better" / SOUND_VAE)
    assert better.config == vae.config
    heard = synthesize(sample_scenes(12345, 1))
    assert torch.equal(better.encode(heard), vae.encode(heard))
    assert not torch.equal(better.decode_raw(latents[:1]), vae.decode_raw(latents[:1]))
    with pytest.raises(InputError, match="part: decoder needs init"):
        build(sound.SoundRun, again | {"init": None}, "run")


def test_clips_come_with_sound_once_the_transformer_was_taught_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = load_program("train/toybox/release.py")
    settings = {"sound": {"share": 1.0}, "anchor_share": 0.5}
    monkeypatch.setattr(release, "_run_settings", lambda _: settings)
    assert "sound" not in release.tasks_of(tmp_path, "dit", tmp_path)  # nothing decodes it
    (tmp_path / SOUND_VAE).mkdir()
    taught = release.tasks_of(tmp_path, "dit", tmp_path)
    assert {"sound", "anchor"} <= set(taught)
    (tmp_path / "model.json").write_text(json.dumps({"tasks": taught}))
    assert release.tasks_of(tmp_path, "tokenizer", None) == taught
    assert set(taught) - set(release.tasks_of(tmp_path, "sound", tmp_path)) == {"sound"}
    settings["part"] = "decoder"
    assert release.tasks_of(tmp_path, "sound", tmp_path) == taught
    settings.clear()
    left_out = set(taught) - set(release.tasks_of(tmp_path, "dit", tmp_path))
    assert left_out == {"sound", "anchor"}


def test_windows_look_through_noise_once_the_transformer_was_taught_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = load_program("train/toybox/release.py")
    settings = {"history_noise": 0.6}
    monkeypatch.setattr(release, "_run_settings", lambda _: settings)
    level = release.history_noise_of(tmp_path, "dit", tmp_path)
    assert level == release.HISTORY_NOISE > 0
    assert release.history_noise_of(tmp_path, "vae", tmp_path) == 0
    (tmp_path / "model.json").write_text(json.dumps({"defaults": {"history_noise": 0.1}}))
    assert release.history_noise_of(tmp_path, "vae", tmp_path) == 0.1
    settings.clear()
    assert release.history_noise_of(tmp_path, "dit", tmp_path) == 0


@pytest.mark.long
def test_fidelity_tells_a_delay_from_a_loss() -> None:
    scenes = sample_scenes(700, 8)
    original = synthesize(scenes)
    cues = [[cue.seconds for cue in sound_cues(scene)] for scene in scenes]
    same = measure_fidelity(original, original, cues)
    assert same.onset_recall == 1
    assert same.mel == 0
    assert same.onset_median_s < 0.003
    delay = round(0.02 * SAMPLE_RATE)
    late = measure_fidelity(original, original.roll(delay, 1), cues)
    assert late.onset_median_s == pytest.approx(0.02, abs=0.003)
    assert late.mel > 0
    lost = measure_fidelity(original, 1e-4 * torch.randn(original.shape), cues)
    assert lost.onset_recall < 0.5
    assert same.cues == lost.cues > 5


def test_mel_bands_weigh_every_frequency_and_keep_levels() -> None:
    bank = mel_bank(80, 1024, 16_000)
    assert torch.allclose(bank.sum(1), torch.ones(80))
    assert (bank[:, 2:500].sum(0) > 0).all()
    tone = torch.sin(torch.arange(16_000) * 2 * torch.pi * 1000 / 16_000)[None]
    assert float(spectrogram(tone, 1024, 256)[0, 64, 20]) == pytest.approx(1, abs=0.01)
    mel = log_mel(tone, 16_000)[0, :, 20]
    centre = (bank[mel.argmax()] * torch.arange(513)).sum() * 16_000 / 1024
    assert abs(float(centre) - 1000) < 40


def test_labels_damage_and_nothing() -> None:
    scenes = [
        Scene(1, (Actor("cat"),), "ocean"),
        Scene(2, (Actor("cat", "moves left"), Actor("dog", "moves left")), "room",
              relation="chases"),
    ]  # fmt: skip
    batch = label_sounds(scenes, synthesize(scenes, 9), TINY_JUDGE)
    voices = TINY_JUDGE.voices
    assert batch.voices[0, voices.index("cat")] == 1
    assert batch.voices[1, voices.index("dog")] == 0.5
    assert [TINY_JUDGE.ambiences[i] for i in batch.ambiences] == ["waves", "room tone"]
    generator = torch.Generator().manual_seed(0)
    damaged = [damage_sound(batch.sound, generator) for _ in range(6)]
    assert all(sound.isfinite().all() and sound.abs().max() <= 1 for sound in damaged)
    assert not torch.equal(damaged[0], damaged[1])
    kept = batch.sound[0].clone()
    hollow_out(batch, [1], TINY_JUDGE, generator)
    assert batch.voices[1, -1] == 1 == batch.voices[1].sum()
    assert batch.ambiences[1] == len(TINY_JUDGE.ambiences)
    assert torch.equal(batch.sound[0], kept)


def test_verdicts_are_shares_and_graded_in_any_order() -> None:
    torch.manual_seed(0)
    judge = SoundJudge(TINY_JUDGE).eval()
    for count in (100, 12_000, 44_000):
        first, _ = judge.verdicts(torch.randn(2, count) * 0.1)
        assert sum(first.voices.values()) == pytest.approx(1, abs=1e-4)
        assert list(first.ambiences)[-1] == NOTHING
    with pytest.raises(InputError, match="hears sound"):
        judge.verdicts(torch.zeros(100))
    heard = Heard({"dog": 0.5, "cat": 0.4, NOTHING: 0.1}, {"waves": 0.9, NOTHING: 0.1})
    pair = (Actor("cat", "moves left"), Actor("dog", "moves left"))
    scene = Scene(2, pair, "beach", relation="chases")
    assert grade_sound(heard, scene) == {"voice": True, "ambience": True}
    assert grade_sound(heard, Scene(1, (Actor("cat"),), "city")) == {
        "voice": False, "ambience": False,
    }
    generator = torch.Generator().manual_seed(1)
    assert hollow_sound(5, 1000, generator).isfinite().all()


def test_the_sound_judge_learns_and_is_kept(tmp_path: Path) -> None:
    program = load_program("train/toybox/sound_judge.py")
    settings = {
        "model": dump(TINY_JUDGE), "validation_clips": 4, "clip_frames": [9],
        "run": {
            "folder": str(tmp_path / "run"), "device": "cpu", "validate_every": 100,
            "phases": [{"steps": 3, "num_frames": 9, "batch_size": 4}],
        },
    }  # fmt: skip
    config = build(program.SoundJudgeRun, settings, "run")
    task = program.SoundJudgeTask(config)
    (phase,) = config.run.phases
    one, two = task.batch(phase, 1, 0), task.batch(phase, 1, 0)
    assert torch.equal(one.sound, two.sound)
    result = train(task, config.run)
    assert result.metrics.keys() <= {"voice", "two_voices", "ambience", "nothing"}
    folder = SoundJudgeFolder(tmp_path / "run" / "sound_judge")
    judge = folder.load()
    assert len(folder.sha256) == 64
    scores = judge_sounds(judge, 99, 4, 9)
    assert scores["ambience"].total == 4 == scores["nothing"].total
    save_module(judge.state_dict(), replace(TINY_JUDGE, world_version=99), tmp_path / "old",
                torch.float32)  # fmt: skip
    with pytest.raises(ModelError, match="world 99"):
        SoundJudgeFolder(tmp_path / "old").load()


@pytest.mark.parametrize(
    ("tasks", "encoders", "sound"),
    [(("text",), "aa", 1.0), (("text", "sound"), "aa", 0.75), (("text", "sound"), "ab", 1.0)],
)
def test_a_mix_takes_sound_from_releases_that_make_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tasks: tuple[str, ...], encoders: str,
    sound: float,
) -> None:
    release, out = load_program("train/toybox/release.py"), tmp_path / "out"
    (out / SOUND_VAE).mkdir(parents=True)
    hashes = dict(zip((tmp_path / SOUND_VAE, out / SOUND_VAE), encoders, strict=True))
    monkeypatch.setattr(release, "open_model", lambda _: SimpleNamespace(tasks=tasks))
    monkeypatch.setattr(release, "encoder_hash", lambda folder, _: hashes[folder])
    (tmp_path / "transformer").mkdir()
    names = ("blocks.0.ffn.up.weight", "blocks.0.audio_ffn.up.weight")
    path = tmp_path / "transformer" / "model.safetensors"
    save_file({name: torch.zeros(2, 2) for name in names}, path)
    mine = {name: torch.ones(2, 2) for name in names}
    picture, heard = release.mixed(mine, "transformer", {tmp_path: 0.25}, out).values()
    torch.testing.assert_close(picture, torch.full((2, 2), 0.75))
    torch.testing.assert_close(heard, torch.full((2, 2), sound))
