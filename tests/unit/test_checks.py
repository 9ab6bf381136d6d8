"""Every check on plain pictures: found above its limit, silent below, and on what is meant."""

import json
import tracemalloc
from dataclasses import replace
from fractions import Fraction
from functools import cache

import numpy as np
import pytest

from tests import textures
from tests.programs import load_program
from vidgen.cli.outputs import set_aside
from vidgen.core.errors import InputError
from vidgen.media.cells import psnr, ssim
from vidgen.media.checks import (
    ClipChecker,
    as_data,
    check_file,
    check_length,
    check_sound,
    recorded,
    verdict,
)
from vidgen.media.types import ClipInfo
from vidgen.media.write import write_clip

FPS = Fraction(12)

@cache
def texture(height=72, width=96, seed=0):
    return textures.texture(height, width, seed, waves=12, steepest=0.3, contrast=35)


planted = load_program("eval/checks.py")


def clip(kind, count=30, size=(72, 96)):
    """A plain clip [T, H, W, 3]: a disc that crosses, a pan over a texture, or nothing moving."""
    height, width = size
    ground = texture(height, width + 2 * count)
    if kind == "pan":
        return np.stack([ground[:, 2 * t : 2 * t + width] for t in range(count)])
    frames = np.repeat(ground[None, :, :width], count, axis=0)
    if kind == "disc":
        y, x = np.mgrid[:height, :width]
        for t, frame in enumerate(frames):
            inside = np.hypot(y - height / 2, x - 12 - t * (width - 24) / count) < height / 6
            frame[inside] = (220, 40, 30)
    return frames


def findings(frames, first=None, fps=FPS, **info):
    checker = ClipChecker(ClipInfo(fps, frames.shape[2:0:-1], len(frames), **info), first)
    for start in range(0, len(frames), 7):
        checker.feed(frames[start : start + 7])
    return checker.finish()


def kinds(*args, **keywords):
    return {finding.kind for finding in findings(*args, **keywords)}


@pytest.mark.parametrize("kind", ["disc", "pan"])
def test_a_good_clip_is_clean(kind):
    frames = clip(kind)
    assert findings(frames, frames[0]) == []
    assert verdict([]) == "clean"


@pytest.mark.parametrize("ground", ["disc", "pan"])
@pytest.mark.parametrize(
    ("kind", "below", "above"),
    [("flash", 0.02, 0.7), ("spike", 0.02, 0.1), ("black", 0.5, 1.0), ("white", 0.5, 0.98),
     ("blank", 0.5, 1.0), ("noise", 0.05, 0.9), ("frozen", 3, 6), ("drift", 0.03, 0.12)],
)  # fmt: skip
def test_a_planted_fault_is_found_above_its_limit_and_not_below(ground, kind, below, above):
    plant, _ = planted.PLANTS[kind]
    assert kind not in kinds(plant(clip(ground), below))
    assert kind in kinds(plant(clip(ground), above))


def test_fading_colours_are_a_drift():
    frames = clip("disc")
    assert "drift" not in kinds(planted.fade_color(frames, 0.05))
    (found,) = findings(planted.fade_color(frames, 0.9))
    assert found.kind == "drift"
    assert "saturation -" in found.text


def test_contrast_that_falls_is_a_drift():
    frames = clip("still").astype(float)
    share = np.linspace(0, 0.6, len(frames)).reshape(-1, 1, 1, 1)
    (found,) = findings((frames * (1 - share) + 128 * share).round().astype(np.uint8))
    assert found.kind == "drift"
    assert "contrast -" in found.text


@pytest.mark.parametrize(
    ("fps", "period", "is_found"), [(12, 2, True), (30, 8, True), (30, 12, False), (60, 6, True)]
)
def test_more_than_three_flashes_a_second_are_reported_at_any_rate(fps, period, is_found):
    frames = clip("pan", 2 * fps)
    bright = (np.arange(len(frames)) % period < period // 2).reshape(-1, 1, 1, 1)
    frames = np.where(bright, 255 - (255 - frames) // 4, frames).astype(np.uint8)
    found = {f.kind: f for f in findings(frames, fps=Fraction(fps))}
    assert ("flash" in found) == is_found
    if is_found:
        assert found["flash"].severity == "fault"
        assert found["flash"].value == pytest.approx(fps / period, abs=0.6)


def test_flashes_in_a_small_part_or_between_bright_shades_are_none():
    frames = clip("still", 24)
    corner = frames.copy()
    corner[::2, :30, :30] = 255
    assert "flash" not in kinds(corner)
    bright = np.full_like(frames, 236)
    bright[::2] = 255  # both above 0.8 of relative luminance
    assert "flash" not in kinds(bright)


def test_red_flashes_at_the_same_luminance_are_reported():
    frames = np.full((24, 72, 96, 3), (0, 95, 0), dtype=np.uint8)
    frames[::2] = (170, 0, 0)
    assert kinds(frames) >= {"red-flash"}
    assert "flash" not in kinds(frames)


def test_a_cut_is_nothing_to_tell_of():
    other = texture(72, 96, seed=5)
    frames = clip("disc", 40)
    frames[20:] = np.where(frames[20:] == frames[0], other, frames[20:])
    assert findings(frames) == []


def test_a_slide_show_is_neither_frozen_nor_flashing():
    frames = np.stack([texture(seed=t // 12) for t in range(48)])
    assert findings(frames) == []


def test_a_clip_that_is_meant_to_be_still_is_no_fault():
    (found,) = findings(clip("still"), clip("still")[0])
    assert (found.kind, found.severity) == ("still", "warning")
    assert findings(clip("still", 6)) == []


def test_coming_to_rest_leaving_and_entering_are_no_freeze():
    height, width = 72, 96
    ground, (y, x) = texture(height, width), np.mgrid[:height, :width]

    def at(position):
        frame = ground.copy()
        frame[np.hypot(y - 36, x - position) < 12] = 255
        return frame

    leaves = np.stack([at(6 * t) for t in range(36)])
    assert findings(leaves) == []
    assert findings(leaves[::-1].copy()) == []
    slows = 10 + 60 * (1 - np.exp(-np.arange(36) / 4))
    blurred = [at(p) * (1 - p % 1) + at(p + 1) * (p % 1) for p in slows]
    assert findings(np.stack(blurred).round().astype(np.uint8)) == []
    stops = np.stack([at(10 + 2 * min(t, 18)) for t in range(36)])
    (found,) = findings(stops)
    assert found.kind == "frozen"
    assert found.time_s == pytest.approx((19 / 12, 3), abs=1e-3)


def test_a_fade_may_be_meant_but_not_in_the_middle():
    frames = clip("pan")
    frames[:4] = 0
    (start,) = findings(frames)
    assert (start.kind, start.severity, start.time_s) == ("black", "warning", (0, 0.333))
    middle = clip("pan")
    middle[10:14] = 0
    assert {f.severity for f in findings(middle) if f.kind == "black"} == {"fault"}
    (whole,) = findings(np.zeros((30, 48, 48, 3), np.uint8))
    assert (whole.kind, whole.severity) == ("black", "fault")


def test_a_clip_may_begin_with_the_black_picture_it_was_given():
    black = np.zeros((30, 48, 48, 3), np.uint8)
    assert kinds(black, black[0]) == {"still"}


def test_the_first_frame_is_held_against_the_picture_given():
    frames = clip("disc")
    bigger = np.kron(frames[0], np.ones((2, 2, 1), np.uint8))
    assert findings(frames, bigger) == []
    rough = np.clip(frames[0] + np.random.default_rng(0).normal(0, 6, frames[0].shape), 0, 255)
    assert findings(frames, rough.astype(np.uint8)) == []  # 32 dB, as a small VAE leaves
    (found,) = findings(frames, texture(seed=3))
    assert (found.kind, found.severity) == ("first-frame", "fault")
    assert found.value < found.limit
    assert psnr(frames[0], frames[0]) == 100
    assert ssim(frames[0], frames[0]) == pytest.approx(1, abs=1e-4)
    assert ssim(frames[0], 255 - frames[0]) < 0


def test_chunks_of_any_size_give_the_same_findings():
    frames = planted.drift(planted.spike(clip("pan"), 0.2), 0.2)
    checker = ClipChecker(ClipInfo(FPS, (96, 72), len(frames)))
    for frame in frames:
        checker.feed(frame[None])
    assert checker.findings == findings(frames)
    assert recorded(json.loads(json.dumps(checker.report()))) == checker.findings


@pytest.mark.parametrize("stop", [1, 13, 15, 20, 28, 29])
def test_checks_that_are_stopped_continue_from_what_they_had_seen(stop):
    """A fault that begins on one side of the stop and ends on the other is one fault still."""
    frames = planted.frozen(planted.drift(planted.spike(clip("pan"), 0.2), 0.2), 8)
    frames[24:] = planted.flash(frames[24:], 0.8)
    info = ClipInfo(FPS, (96, 72), len(frames))
    before, after = ClipChecker(info, frames[0]), ClipChecker(info, 255 - frames[0])
    assert before.take_looks() == {}
    kept = []
    for part in (frames[: stop // 2], frames[stop // 2 : stop]):
        before.feed(part)
        kept.append(before.take_looks())
    before.feed(frames[stop : stop + 2])  # what was kept doesn't change any more
    for looks in filter(None, kept):
        after.restore(looks)
    after.feed(frames[stop:])
    assert after.findings == findings(frames, frames[0])
    assert len(after.findings) >= 3


def test_what_was_seen_is_refused_if_it_is_damaged():
    checker = ClipChecker(ClipInfo(FPS, (96, 72), 0))
    checker.take_looks()
    checker.feed(clip("pan")[:3])
    looks = checker.take_looks()
    for damaged in ({"luma": looks["luma"]}, looks | {"color": looks["color"][:2]},
                    looks | {"figures": looks["figures"][:, :2]}):
        with pytest.raises(InputError, match="is damaged"):
            ClipChecker(ClipInfo(FPS, (96, 72), 0)).restore(damaged)


def test_lengths_rates_and_counts():
    assert check_length(33, FPS, 33) == []
    assert check_length(33, Fraction("12.1"), 33, FPS) == []
    assert [f.kind for f in check_length(31, Fraction(24), 33, FPS)] == ["length", "fps"]
    frames = clip("pan")
    info = ClipInfo(FPS, (96, 72), 40)
    checker = ClipChecker(info)
    checker.feed(frames)
    assert [f.kind for f in checker.finish()] == ["length"]


def tone(seconds=2.5, level=0.5, rate=16_000):
    t = np.arange(round(seconds * rate))[:, None] / rate
    return (level * np.sin(2 * np.pi * 440 * t)).astype(np.float32)


def test_sound_is_held_against_the_picture():
    assert check_sound(tone(), 16_000, 2.5) == []
    assert check_sound(tone(2.45), 16_000, 2.5) == []
    assert [f.kind for f in check_sound(tone(2.3), 16_000, 2.5)] == ["sound-length"]
    assert [f.kind for f in check_sound(tone(level=0.0005), 16_000, 2.5)] == ["silence"]
    assert check_sound(tone(level=0.01), 16_000, 2.5) == []
    assert check_sound(np.clip(tone(level=0.99), -1, 1), 16_000, 2.5) == []
    (hard,) = check_sound(np.clip(tone(level=3), -1, 1), 16_000, 2.5)
    assert (hard.kind, hard.severity) == ("clipping", "fault")
    bad = tone()
    bad[500] = np.nan
    assert [f.kind for f in check_sound(bad, 16_000, 2.5)] == ["sound-garbage"]
    silent = ClipInfo(FPS, (96, 72), 30, np.zeros((40_000, 2), np.float32), 16_000)
    checker = ClipChecker(silent)
    checker.feed(clip("pan"))
    assert as_data(checker.finish())["verdict"] == "fault"


def test_memory_does_not_grow_with_the_length():
    frames = planted.flash(clip("pan", 30, (32, 32)), 0.8)
    checker = ClipChecker(ClipInfo(FPS, (32, 32), 0))
    held = []
    tracemalloc.start()
    try:
        for _ in range(12):
            checker.feed(frames)
            held.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert held[-1] - held[3] < 40_000  # numpy keeps some small buffers; 240 frames' cells: 1.2 MB


def test_a_hopeless_clip_has_few_findings():
    rng = np.random.default_rng(0)
    frames = clip("pan", 400, (32, 32))
    frames[rng.choice(400, 60, replace=False)] = 0
    found = findings(frames)
    assert 1 <= len([f for f in found if f.kind == "black"]) <= 10
    assert len(found) < 40


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".gif"])
def test_a_file_is_checked_against_its_recipe(tmp_path, suffix):
    frames = clip("disc")
    recipe = {"plan": {"kept_frames": 30, "fps": "12", "fit": "crop"}}
    info = ClipInfo(FPS, (96, 72), 30, recipe=recipe)
    path = write_clip(tmp_path / f"good{suffix}", [frames], info)
    assert check_file(path, frames[0]) == []
    recipe["plan"] |= {"kept_frames": 36, "fps": "24"}
    path = write_clip(tmp_path / f"short{suffix}", [frames], replace(info, recipe=recipe))
    assert {f.kind for f in check_file(path, texture(seed=3))} == {"length", "fps", "first-frame"}


@pytest.mark.parametrize("plan", [None, [], {"fps": "fast", "kept_frames": "many"}, {"fps": 0}])
def test_a_recipe_of_others_is_no_measure(tmp_path, plan):
    frames = clip("disc")
    info = ClipInfo(FPS, (96, 72), 30, recipe={"plan": plan})
    assert check_file(write_clip(tmp_path / "clip.gif", [frames], info)) == []


@pytest.mark.parametrize("size", [(1, 40), (40, 1), (3, 2), (16, 16)])
def test_pictures_of_any_size_are_checked(size):
    frames = np.repeat(texture()[None, : size[0], : size[1]], 20, axis=0)
    assert kinds(frames, frames[0]) <= {"still"}


def test_a_faulty_output_is_set_aside(tmp_path):
    (tmp_path / "car.mp4").write_bytes(b"new")
    (tmp_path / "car.faulty.mp4").write_bytes(b"old")
    assert set_aside(tmp_path / "car.mp4") == tmp_path / "car.faulty.mp4"
    assert [p.name for p in tmp_path.iterdir()] == ["car.faulty.mp4"]
    for name in ("car", "car.faulty"):
        (tmp_path / name).mkdir()
    assert set_aside(f"{tmp_path}/car/").is_dir()


@pytest.mark.parametrize("kind", ["flash", "spike", "frozen", "drift"])
def test_a_fault_is_found_after_h264(tmp_path, kind):
    plant, strengths = planted.PLANTS[kind]
    frames = plant(clip("disc", 33), strengths[-1])
    path = write_clip(tmp_path / "clip.mp4", [frames], ClipInfo(FPS, (96, 72), 33))
    assert kind in {f.kind for f in check_file(path)}
