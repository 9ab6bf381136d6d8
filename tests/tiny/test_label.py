"""The burnt-in label: tall enough, legible on anything, 2 seconds long, the same in any chunks."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from vidgen.media.clip import Clip
from vidgen.media.label import _capital, _font, labelled, letter_height
from vidgen.media.types import ClipInfo
from vidgen.media.video_reader import VideoReader
from vidgen.media.write import write_clip

SIZES = [(32, 32), (128, 96), (176, 96), (96, 176), (480, 832), (1280, 720), (33, 17)]
BACKGROUNDS = ["black", "white", "grey", "noise", "stripes"]


def background(kind, num_frames, size):
    shape = (num_frames, size[1], size[0], 3)
    if kind == "noise":
        return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    if kind == "stripes":
        columns = np.arange(size[0]) // 2 % 2 * 255
        return np.broadcast_to(columns[:, None], shape).astype(np.uint8)
    return np.full(shape, {"black": 0, "white": 255, "grey": 128}[kind], np.uint8)


def burn(frames, fps=12, split=3, start=0):
    chunks = (frames[i : i + split] for i in range(0, len(frames), split))
    size = (frames.shape[2], frames.shape[1])
    return np.concatenate(list(labelled(chunks, size, Fraction(fps), start=start)))


def luminance(frame):
    """Relative luminance [H, W] of sRGB (WCAG 2.2)."""
    values = frame.astype(np.float64) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


def ink_and_plate(size):
    """Where the text is full white, and where the bare plate is, measured on black and white."""
    black, white = (burn(background(kind, 1, size))[0] for kind in ("black", "white"))
    plate = (white != 255).any(-1)
    rows, columns = np.where(plate)
    inside = np.zeros_like(plate)
    inside[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = True
    ink = inside & (black.min(-1) > 240)
    return ink, inside & (black.max(-1) < 20)


@pytest.mark.parametrize("size", SIZES)
def test_letters_have_five_percent_of_the_short_side(size):
    ink, _ = ink_and_plate(size)
    rows = np.where(ink.any(1))[0]
    assert rows.max() - rows.min() + 1 >= 0.05 * min(size) or min(size) < 20
    capital = _capital(_font(letter_height(size)))
    assert 0.05 * min(size) <= capital <= max(0.09 * min(size), 9)


@pytest.mark.parametrize("kind", BACKGROUNDS)
@pytest.mark.parametrize("size", SIZES[:5])
def test_text_stands_out_from_its_plate_on_any_background(size, kind):
    ink, plate = ink_and_plate(size)
    frame = luminance(burn(background(kind, 1, size))[0])
    assert ink.sum() >= 5
    contrast = (frame[ink].min() + 0.05) / (frame[plate].max() + 0.05)
    assert contrast >= 7  # WCAG's strictest level


@pytest.mark.parametrize("kind", ["white", "noise"])
def test_the_label_survives_encoding(tmp_path, kind):
    size = (128, 96)
    frames = burn(background(kind, 9, size))
    info = ClipInfo(Fraction(12), size, 9)
    with VideoReader(write_clip(tmp_path / "x.mp4", [frames], info)) as reader:
        frame = luminance(list(reader)[4])
    ink, plate = ink_and_plate(size)
    assert (np.median(frame[ink]) + 0.05) / (np.median(frame[plate]) + 0.05) >= 4.5


@pytest.mark.parametrize("fps", [12, 24, Fraction(24000, 1001)])
def test_it_stays_two_seconds_and_no_frame_longer(fps):
    frames = background("grey", 60, (64, 48))
    changed = (burn(frames, fps) != frames).any((1, 2, 3))
    count = int(changed.sum())
    assert changed[:count].all()
    assert count / fps >= 2 > (count - 1) / fps


def test_chunks_and_a_resumed_start_make_no_difference():
    frames = background("noise", 40, (64, 48))
    before = frames.copy()
    whole = burn(frames, split=40)
    for split in (1, 7):
        assert np.array_equal(burn(frames, split=split), whole)
    for start in (5, 23, 24, 30):
        assert np.array_equal(burn(frames[start:], start=start), whole[start:])
    assert np.array_equal(frames, before)


def test_a_clips_source_is_labelled_from_any_frame_on():
    frames = background("noise", 30, (64, 48))

    def source(start=0):
        yield frames[start:]

    clip, marks = Clip(source, ClipInfo(Fraction(12), (64, 48), 30)), {"label": "visible"}
    assert np.array_equal(next(clip.marked(marks)[0]), burn(frames))
    assert np.array_equal(next(clip.marked(marks, 20)[0]), burn(frames)[20:])
    assert np.array_equal(next(clip.marked({})[0]), frames)


def test_only_the_corner_changes_and_a_still_is_labelled():
    frames = background("noise", 1, (128, 96))
    changed = (burn(frames)[0] != frames[0]).any(-1)
    assert changed.any()
    assert not changed[:48].any()
    assert changed.mean() < 0.15
