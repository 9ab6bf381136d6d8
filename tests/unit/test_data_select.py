"""Which stretch of a file becomes an item, and why others don't; from facts alone."""

from __future__ import annotations

import base64
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vidgen.core.config import build
from vidgen.core.errors import InputError
from vidgen.training.config import Bucket, DataConfig, FolderConfig, Geometry
from vidgen.training.data.files import MediaFile
from vidgen.training.data.probe import SIGNATURE, FileFacts, Flawed, packed
from vidgen.training.data.survey import picks, select
from vidgen.weights.layouts import open_model

GEOMETRY = Geometry(((64, 48), (48, 64), (48, 48)), (9, 17), Fraction(12), 16, 4)
CONFIG = DataConfig(folders=(FolderConfig("data"),))


def facts(num_frames=24, fps=12, seed=0, lengths=None, **settings):
    pixels = np.random.default_rng(seed).integers(0, 255, SIGNATURE, dtype=np.uint8)
    given = lengths or [1000 // fps if 1000 % fps == 0 else 1] * num_frames
    tick = Fraction(1, 1000) if lengths or 1000 % fps == 0 else Fraction(1, fps)
    return FileFacts(**{
        "num_frames": len(given), "lengths": packed(given), "tick_s": tick, "fps": Fraction(fps),
        "size": (64, 48), "signature": base64.b64encode(pixels.tobytes()).decode(), **settings,
    })


def chosen(*all_facts, config=CONFIG, geometry=GEOMETRY, captions=("a car",), hashes=None):
    hashes = hashes or [f"{i:064x}" for i in range(len(all_facts))]
    files = [MediaFile(0, f"{i}.mp4", Path(f"data/{i}.mp4"), captions=tuple(captions),
                       facts=replace(each, sha256=sha256))
             for i, (each, sha256) in enumerate(zip(all_facts, hashes, strict=True))]
    select(config, geometry, files)
    return files


def test_a_stretch_takes_the_longest_length_that_fits():
    short, middle, long = chosen(facts(8), facts(16, seed=1), facts(17, seed=2))
    assert short.dropped == ("its longest stretch has 8 frames at 12 fps, but the shortest "
                             "bucket has 9; set frames to 5 to use it")
    assert [fate.items[0].bucket.num_frames for fate in (middle, long)] == [9, 17]
    assert [fate.items[0].start for fate in (middle, long)] == [3, 0], "its middle is taken"


def test_windows_lie_side_by_side_and_as_many_as_asked_for():
    everything = replace(CONFIG, windows="all")
    (fate,) = chosen(facts(60), config=everything)
    assert [item.start for item in fate.items] == [4, 21, 38]
    for count, starts in ((1, [21]), (2, [4, 38]), (5, [4, 21, 38])):
        (fate,) = chosen(facts(60), config=replace(CONFIG, windows=count))
        assert [item.start for item in fate.items] == starts
        told = [f"{count} of 3 possible items are used (windows: {count})"] if count < 3 else []
        assert fate.notes == told


def test_flaws_and_cuts_are_kept_out_unless_the_config_lets_them_in():
    flawed = facts(60, cuts=((29, 30),), flaws=(Flawed("black", 0, 9), Flawed("frozen", 50, 59)))
    (fate,) = chosen(flawed, config=replace(CONFIG, windows="all"))
    spans = [(item.start, item.start + item.bucket.num_frames) for item in fate.items]
    assert spans == [(11, 28), (31, 48)]
    assert fate.notes == [
        "it has cuts at 2.50 s", "it has stretches that are black (1), frozen (1)"]
    (fate,) = chosen(flawed, config=replace(CONFIG, windows="all", avoid=()))
    assert len(fate.items) == 3
    damaged = facts(20, flaws=(Flawed("damaged", 10, 10),))
    (fate,) = chosen(damaged, config=replace(CONFIG, avoid=()))
    assert fate.items[0].bucket.num_frames == 9, "what is damaged never gets in"
    (fate,) = chosen(facts(20, cuts=((7, 8), (14, 15))))
    assert fate.dropped.startswith("its longest stretch without cut, black,")


@pytest.mark.parametrize(("fps", "repeats", "left"), [(24, 0, 8), (6, 4, 0), (12, 0, 0)])
def test_rates_are_changed_by_the_nearest_frame(fps, repeats, left):
    told = facts(40, fps)
    (fate,) = chosen(told, geometry=replace(GEOMETRY, frames=(9,)))
    shown = picks(fate.items[0], told, GEOMETRY)
    start = fate.items[0].start
    assert [index - start for index in shown] == {
        24: [0, 2, 4, 6, 8, 10, 12, 14, 16], 12: [*range(9)], 6: [0, 0, 1, 1, 2, 2, 3, 3, 4],
    }[fps]
    assert sum("repeats" in note for note in fate.notes) == bool(repeats)
    assert ("24 to 12 fps: every second frame dropped" in fate.notes) == bool(left)


@st.composite
def films(draw):
    lengths = draw(st.lists(st.integers(1, 400), min_size=2, max_size=120))
    places = draw(st.lists(st.integers(0, len(lengths) - 2), max_size=4, unique=True))
    black = draw(st.integers(0, len(lengths) - 1))
    flaws = (Flawed("black", black, min(black + 3, len(lengths) - 1)),)
    return facts(lengths=lengths, cuts=tuple((p, p + 1) for p in sorted(places)), flaws=flaws)


@given(films(), st.sampled_from([Fraction(5), Fraction(12), Fraction(24000, 1001)]))
@settings(max_examples=200, deadline=None)
def test_no_item_ever_holds_a_cut_or_a_flaw_and_times_are_kept(told, fps):
    config = replace(CONFIG, windows="all")
    geometry = replace(GEOMETRY, fps=fps, frames=(5, 9))
    (fate,) = chosen(told, config=config, geometry=geometry)
    assert bool(fate.items) == (fate.dropped is None)
    times, before = told.times, -1
    for item in fate.items:
        shown = picks(item, told, geometry)
        assert len(shown) == item.bucket.num_frames
        assert shown == sorted(shown)
        assert shown[0] == item.start
        assert not any(shown[0] <= last < shown[-1] for last, _ in told.cuts)
        assert not any(flaw.first <= index <= flaw.last for index in shown for flaw in told.flaws)
        assert item.start >= before - 1, "windows share what is shown for long, no more"
        before = shown[-1]
        inside = times[item.start : item.end]
        for number, index in enumerate(shown):
            moment = times[item.start] + number / (fps * told.tick_s)
            assert abs(times[index] - moment) == min(abs(time - moment) for time in inside.tolist())


def test_pictures_go_into_the_bucket_of_their_aspect_or_are_dropped_with_the_reason():
    wide, high, square = (facts(24, seed=i, size=size) for i, size in
                          enumerate([(1600, 1000), (60, 80), (50, 50)]))
    panorama, small = facts(24, seed=4, size=(900, 300)), facts(24, seed=5, size=(30, 24))
    fates = chosen(wide, high, square, panorama, small)
    assert [(i.bucket.width, i.bucket.height) for f in fates for i in f.items] == [
        (64, 48), (48, 64), (48, 48)]
    assert fates[0].notes[0] == "17% of each frame is cropped for 64x48"
    assert fates[3].dropped == ("56% of each frame would be cropped, 900x300 for a bucket of "
                                "64x48; max_crop is 0.35")
    assert fates[4].dropped == ("it would be enlarged 2.13 times, 30x24 for a bucket of 64x48; "
                                "max_enlarge is 1.25")


def test_what_cannot_be_learned_from_says_why():
    gone, hdr, wide = (facts(seed=1, problem="is text"), facts(seed=2, colour={"transfer": "pq"}),
                       facts(seed=3, pixel_aspect=Fraction(4, 3)))
    fates = chosen(gone, hdr, wide)
    assert fates[0].dropped == "is text"
    assert fates[1].dropped.startswith("it is HDR (pq)")
    assert fates[2].dropped.startswith("its pixels are not square (4/3)")
    (silent,) = chosen(facts(), captions=())
    assert silent.dropped.startswith("it has no caption")
    alone = replace(CONFIG, no_caption="empty", prefix="sks")
    (empty,) = chosen(facts(), captions=(), config=alone)
    assert empty.items[0].captions == ("sks",)


def test_duplicates_are_dropped_as_the_config_says():
    same = ["a" * 64, "a" * 64]
    first, again = chosen(facts(), facts(), hashes=same)
    assert first.items
    assert again.dropped == "it has the same bytes as 0.mp4"
    kept = chosen(facts(), facts(), hashes=same, config=replace(CONFIG, duplicates="keep"))[1]
    assert kept.items
    assert kept.notes == ["it has the same bytes as 0.mp4"]
    alike = chosen(facts(), facts())
    assert alike[1].items
    assert alike[1].notes == ["it looks like 0.mp4"]
    assert alike[0].items[0].group == alike[1].items[0].group
    assert chosen(facts(), facts(), config=replace(CONFIG, duplicates="drop"))[1].dropped


def test_pictures_are_items_of_one_frame():
    picture = facts(1, kind="picture")
    (fate,) = chosen(picture)
    assert fate.items[0].bucket == Bucket(64, 48, 1)
    (black,) = chosen(facts(1, kind="picture", flaws=(Flawed("black", 0, 0),)))
    assert black.dropped == "the picture is black"
    (clip,) = chosen(facts(24), geometry=replace(GEOMETRY, frames=(1,)))
    assert clip.dropped == "it is a clip, but all buckets are for pictures (1 frame)"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"folders": []}, "folders is empty"), ({"held_out": 2}, "held_out is 2"),
        ({"fps": 0}, "fps is 0"), ({"windows": 0}, "windows is 0; give a whole number"),
        ({"sizes": "64x48", "area": 9}, "give one"), ({"foldrs": "x"}, "unknown key 'foldrs'"),
        ({"avoid": ["cuts"]}, "did you mean 'cut'"), ({"max_enlarge": 0.5}, "of at least 1"),
        ({"max_enlarge": float("nan")}, "of at least 1"),
        ({"held_out": 0.1, "validation": "x"}, "give one"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        build(DataConfig, {"folders": "data", **settings})


def test_short_forms_of_folders():
    config = build(DataConfig, {"folders": ["a", {"path": "b", "repeats": 3}]})
    assert config.folders == (FolderConfig("a"), FolderConfig("b", 3))


def test_shapes_are_the_models_own_or_checked_against_it(tiny_model):
    folder = open_model(str(tiny_model))
    own = Geometry.of(CONFIG, folder)
    assert (own.sizes, own.frames, own.fps, own.multiple) == (((32, 32),), (9,), 12, 16)
    made = Geometry.of(replace(CONFIG, area=64 * 48, aspects=("4:3", "3:4", "2")), folder)
    assert made.sizes == ((64, 48), (48, 64), (80, 32))
    with pytest.raises(InputError, match="the nearest are 9 and 13"):
        Geometry.of(replace(CONFIG, frames=(9, 11)), folder)
    with pytest.raises(InputError, match="a width of 60 pixels"):
        Geometry.of(replace(CONFIG, sizes=("60x48",)), folder)
    for aspect in ("wide", "0:1", "-1:1", "30:1", "nan"):
        with pytest.raises(InputError, match="ratios of width to height"):
            Geometry.of(replace(CONFIG, area=999, aspects=(aspect,)), folder)
