"""The ruler for sound and picture: onsets, landings, pairs, scores, and its own errors."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from eval.toybox.judge import embedded_judge
from eval.toybox.metrics.bounces import bounce_times, landings
from eval.toybox.metrics.sync import (
    EARLY_S,
    LATE_S,
    bouncing_scenes,
    match_times,
    measure_ruler,
    score_sync,
)
from tests.programs import load_program
from train.toybox.world.cues import SAMPLE_RATE, sound_cues
from train.toybox.world.scenes import SEED_RANGES, Actor, Scene
from train.toybox.world.sound import synthesize
from vidgen.core.errors import InputError
from vidgen.media.onsets import find_onsets

DEV = SEED_RANGES["dev"][0]


def tone_at(times: list[float], rate: int = SAMPLE_RATE, seconds: float = 2.0) -> torch.Tensor:
    sound = 0.003 * np.random.default_rng(0).standard_normal(round(seconds * rate))
    for at in times:
        start = round(at * rate)
        t = np.arange(len(sound) - start) / rate
        sound[start:] += 0.4 * np.sin(2 * np.pi * 900 * t) * np.exp(-t / 0.08)
    return torch.from_numpy(sound).float()


@pytest.mark.parametrize("rate", [16_000, 48_000])
def test_onsets_are_found_between_frames(rate: int) -> None:
    times = [0.2013, 0.6002, 1.1037, 1.7551]
    (found,) = find_onsets(tone_at(times, rate), rate)
    assert len(found) == len(times)
    assert np.abs(found - times).max() < 0.002


def test_silence_and_steady_sound_have_no_onsets() -> None:
    steady = torch.sin(torch.arange(32_000) * 0.3) * 0.3
    found = find_onsets(torch.stack([torch.zeros(32_000), steady]), SAMPLE_RATE)
    assert len(found[0]) == 0
    assert [t for t in found[1] if t > 0.03] == []


def test_a_quiet_onset_next_to_a_loud_one_needs_a_lower_share() -> None:
    sound = tone_at([0.5]) + 0.2 * tone_at([1.2])
    counts = [len(find_onsets(sound, SAMPLE_RATE, share)[0]) for share in (0.9, 0.1)]
    assert counts == [1, 2]


def test_onsets_of_the_world_are_those_of_its_cues() -> None:
    scenes = bouncing_scenes(DEV + 77, 12)
    errors = []
    for scene, found in zip(scenes, find_onsets(synthesize(scenes), SAMPLE_RATE), strict=True):
        for at in {cue.seconds for cue in sound_cues(scene) if cue.kind == "impact"}:
            errors.append(np.abs(found - at).min() if len(found) else 1.0)
    assert np.median(errors) < 0.001
    assert np.quantile(errors, 0.95) < 0.004


def test_what_is_no_sound_is_refused() -> None:
    with pytest.raises(InputError, match="onsets need"):
        find_onsets(torch.zeros(1, 2, 100), SAMPLE_RATE)


LANDINGS = (0.531, 1.404, 2.217)


def falling_course(fps: float = 12.0) -> np.ndarray:
    """Heights of a sprite in free fall between `LANDINGS`, [33]."""
    frames, edges = np.arange(33) / fps, np.array([-0.3, *LANDINGS, 3.1])
    k = np.searchsorted(edges, frames, side="right") - 1
    part = (frames - edges[k]) / (edges[k + 1] - edges[k])
    return 0.9 - 1.2 * part * (1 - part) * (edges[k + 1] - edges[k]) ** 2


def test_landings_are_found_between_frames() -> None:
    height = falling_course()
    assert landings(height, 12.0) == pytest.approx(LANDINGS, abs=0.004)
    noisy = height + 0.01 * np.random.default_rng(1).standard_normal(33)
    assert landings(noisy, 12.0) == pytest.approx(LANDINGS, abs=0.025)
    assert len(landings(np.linspace(0.2, 0.8, 33), 12.0)) == 0


@pytest.mark.long
@pytest.mark.parametrize("frame", range(2, 31))
def test_a_frame_that_is_off_makes_no_landing_and_hides_none(frame: int) -> None:
    height = falling_course()
    for off in (-0.25, 0.25):
        found = landings(np.where(np.arange(33) == frame, height + off, height), 12.0)
        assert found == pytest.approx(LANDINGS, abs=0.09)


def test_pairs_are_one_to_one_as_many_and_as_close_as_can_be() -> None:
    seen, heard = np.array([1.0, 1.1, 2.0]), np.array([0.97, 1.06, 1.12, 2.5])
    assert match_times(seen, heard) == [(0, 0), (1, 2)]
    assert match_times(seen, np.zeros(0)) == []
    crowded = np.array([1.05, 1.11])  # each alone would take the first
    assert match_times(np.array([1.0, 1.04]), crowded) == [(0, 0), (1, 1)]


def test_the_window_is_the_itus() -> None:
    seen = np.array([1.0])
    assert match_times(seen, seen - EARLY_S + 1e-6)
    assert match_times(seen, seen + LATE_S - 1e-6)
    assert not match_times(seen, seen - EARLY_S - 1e-3)
    assert not match_times(seen, seen + LATE_S + 1e-3)


def test_a_delay_is_reported_as_bias_and_shuffling_as_the_floor() -> None:
    draws = np.random.default_rng(3)
    seen = [np.sort(draws.uniform(0.3, 2.3, 3)) for _ in range(40)]
    score = score_sync(seen, [times + 0.02 for times in seen], 2.667)
    assert score.f1 == 1
    assert score.bias_s == pytest.approx(0.02)
    assert score.median_s == pytest.approx(0.02)
    assert score.pairs == score.seen == score.heard == 120
    assert score.floor_f1 < 0.4
    late = score_sync(seen, [times + 0.2 for times in seen], 2.667)
    assert late.f1 < 0.4
    with pytest.raises(InputError, match="paired"):
        score_sync(seen, seen[:3], 2.667)


@pytest.mark.long
def test_the_ruler_is_finer_than_what_it_measures() -> None:
    score = measure_ruler(embedded_judge().load(), DEV + 500, 8)
    assert score.seen_median_s <= 0.010
    assert score.seen_recall > 0.8
    assert score.heard_median_s <= 0.002
    assert score.sync.median_s <= 0.010
    assert abs(score.sync.bias_s) <= 0.005
    assert score.sync.f1 > 0.85
    assert score.sync.floor_f1 < 0.5


@pytest.mark.long
def test_nothing_that_bounces_gives_no_bounces() -> None:
    from train.toybox.world.render import render

    scene = Scene(1, (Actor("cat", "moves left"),), "room")
    (found,) = bounce_times(embedded_judge().load(), render([scene]).video, 12.0)
    assert len(found) == 0


@pytest.mark.long
def test_the_program_writes_its_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from train.toybox.model_files import save_module
    from vidgen.models.audio import AudioVAE
    from vidgen.models.presets import AUDIO_VAE_PRESETS

    program = load_program("eval/toybox/sync.py")
    torch.manual_seed(0)
    tiny = AUDIO_VAE_PRESETS["tiny"]
    save_module(AudioVAE(tiny).state_dict(), tiny, tmp_path / "sound_vae", torch.float32)
    out = tmp_path / "sync.json"
    words = ["sync.py", "-o", str(out), "--clips", "2", "--sound-vae", str(tmp_path / "sound_vae")]
    monkeypatch.setattr(sys, "argv", words)
    assert program.main() == 0
    scores = json.loads(out.read_text())["scores"]
    assert scores["seen_median_s"] < 0.02
    assert scores["sync"]["f1"] < 0.9  # an untrained VAE leaves no onsets
    monkeypatch.setattr(sys, "argv", ["sync.py", "-o", str(out), "--clips", "1"])
    assert program.main() == 2
    assert "--clips 1" in capsys.readouterr().err
