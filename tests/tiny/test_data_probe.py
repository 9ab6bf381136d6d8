"""What is found out about a file by decoding it, on real files of every odd kind."""

from __future__ import annotations

import json
import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from tests.clips import film, flat, moving
from vidgen.core.config import build, dump
from vidgen.media.types import ClipInfo
from vidgen.media.write import write_clip
from vidgen.training.data.files import MediaFile
from vidgen.training.data.probe import FileFacts, probe_file
from vidgen.training.data.survey import find_similar, probe_files


def test_an_ordinary_film_is_counted_exactly(tmp_path):
    facts = probe_file(film(tmp_path / "a.mp4", moving(31), Fraction(24000, 1001)))
    assert facts.problem is None
    assert (facts.num_frames, facts.fps, facts.size) == (31, Fraction(24000, 1001), (64, 48))
    assert not facts.is_variable
    assert facts.duration_s == pytest.approx(31 * 1001 / 24000, abs=1e-9)
    assert facts.cuts == facts.flaws == ()
    assert (facts.codec, facts.pix_fmt) == ("h264", "yuv420p")
    assert build(FileFacts, dump(facts)) == facts, "records give back what was found"


@pytest.mark.parametrize("suffix", [".mkv", ".webm"])
def test_rounded_times_are_no_variable_rate(tmp_path, suffix):
    codec = {"codec": "libvpx-vp9"} if suffix == ".webm" else {}
    facts = probe_file(film(tmp_path / f"a{suffix}", moving(25), 24, **codec))
    assert (facts.num_frames, facts.is_variable, facts.fps) == (25, False, 24)


def test_a_variable_rate_is_reported_with_every_time(tmp_path):
    times = [0, 100, 130, 400, 440, 480, 1000, 1010]
    facts = probe_file(film(tmp_path / "a.mkv", moving(8), times_ms=times))
    assert facts.is_variable
    assert [round(t * 1000 * facts.tick_s) for t in facts.times[:-1].tolist()] == times
    assert facts.fps == pytest.approx(8 / facts.duration_s)


def test_a_cut_is_found_where_it_is_and_a_flash_is_none(tmp_path):
    cut = probe_file(film(tmp_path / "cut.mp4", moving(14) + moving(10, 7)))
    assert cut.cuts == ((13, 14),)
    pictures = moving(24)
    pictures[11] = pictures[12] = np.full_like(pictures[0], 250)
    assert probe_file(film(tmp_path / "flash.mp4", pictures)).cuts == ()


def test_cuts_at_either_end_and_close_together_are_found(tmp_path):
    pictures = moving(3) + moving(12, 7) + moving(12, 8)[:6] + moving(9, 9)[:2]
    facts = probe_file(film(tmp_path / "a.mp4", pictures))
    assert facts.cuts == ((2, 3), (14, 15), (20, 21))


def test_black_blank_and_frozen_stretches_are_found(tmp_path):
    pictures = [*flat(5, 0), *moving(10), *flat(4, 120), *moving(10, 2), *[moving(1, 3)[0]] * 20]
    facts = probe_file(film(tmp_path / "a.mp4", pictures))
    found = {(flaw.kind, flaw.first, flaw.last) for flaw in facts.flaws}
    assert {("black", 0, 4), ("blank", 15, 18), ("frozen", 29, 48)} <= found
    assert facts.num_repeats >= 15


def test_what_moves_ever_so_slowly_is_not_frozen(tmp_path):
    pictures = [np.full((48, 64, 3), 60 + i, np.uint8) for i in range(60)]
    for picture in pictures:
        picture[10:30, 20:40] += 60
    facts = probe_file(film(tmp_path / "a.mp4", pictures, 30))
    assert [flaw for flaw in facts.flaws if flaw.kind == "frozen"] == []


def test_a_turned_film_has_the_size_that_is_seen(tmp_path):
    plain = film(tmp_path / "plain.mp4", moving(9))
    with av.open(str(plain)) as source, av.open(str(tmp_path / "turned.mp4"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    content = bytearray((tmp_path / "turned.mp4").read_bytes())
    place = content.index(b"tkhd") + 4 + 40  # the matrix in the track's head (ISO 14496-12, 8.3.2)
    turned = [0, 1 << 16, 0, (1 << 32) - (1 << 16), 0, 0, 0, 0, 1 << 30]
    content[place : place + 36] = b"".join(value.to_bytes(4, "big") for value in turned)
    (tmp_path / "turned.mp4").write_bytes(content)
    facts = probe_file(tmp_path / "turned.mp4")
    assert (facts.size, facts.rotation % 180) == ((48, 64), 90)


def test_hdr_and_pixels_that_are_not_square_are_reported(tmp_path):
    hdr = film(tmp_path / "a.mkv", moving(9), pix_fmt="yuv420p10le", transfer=16, primaries=9)
    facts = probe_file(hdr)
    assert facts.is_hdr
    assert (facts.colour["transfer"], facts.colour["primaries"]) == ("pq", "bt2020")
    wide = probe_file(film(tmp_path / "b.mp4", moving(9), pixel_aspect=Fraction(4, 3)))
    assert wide.pixel_aspect == Fraction(4, 3)


def test_pictures_animations_and_a_film_of_one_frame(tmp_path):
    Image.fromarray(moving(1)[0]).save(tmp_path / "a.png")
    picture = probe_file(tmp_path / "a.png")
    assert (picture.kind, picture.size, picture.num_frames) == ("picture", (64, 48), 1)
    write_clip(tmp_path / "b.gif", [np.stack(moving(8))], ClipInfo(Fraction(10), (64, 48), 8))
    animation = probe_file(tmp_path / "b.gif")
    assert (animation.kind, animation.num_frames, animation.fps) == ("video", 8, 10)
    single = probe_file(film(tmp_path / "c.mp4", moving(1)))
    assert single.kind == "picture"
    assert "a video of one frame" in single.notes[0]


def test_eight_k_is_taken_at_flat_memory(tmp_path):
    large = np.full((4320, 7680, 3), 90, np.uint8)
    large[1000:3000, 2000:5000] = (200, 40, 40)
    Image.fromarray(large).save(tmp_path / "a.jpg")
    facts = probe_file(tmp_path / "a.jpg")
    assert (facts.problem, facts.size) == (None, (7680, 4320))
    shot = film(tmp_path / "c.avi", [large] * 2, codec="mjpeg", pix_fmt="yuvj420p")
    facts = probe_file(shot)
    assert (facts.problem, facts.size, facts.num_frames) == (None, (7680, 4320), 2)
    with (tmp_path / "b.png").open("wb") as file:  # 36 GB, if it were decoded
        from tests.tiny.test_media_read import bomb

        file.write(bomb(110_000, 110_000))
    assert "pixels" in probe_file(tmp_path / "b.png").problem


def sound_only(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=48_000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 48_000), np.float32), "fltp", "mono")
        frame.sample_rate = 48_000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("kind", ["empty", "zeros", "text", "sound", "head", "a folder"])
def test_what_is_no_film_is_a_problem_and_no_crash(tmp_path, kind):
    path = tmp_path / "a.mp4"
    if kind == "sound":
        sound_only(path)
    elif kind == "a folder":
        path.mkdir()
    else:
        content = {"empty": b"", "zeros": bytes(5000), "text": b"hello there\n" * 99,
                   "head": film(tmp_path / "b.mp4", moving(40)).read_bytes()[:900]}[kind]
        path.write_bytes(content)
    assert probe_file(path).problem


def test_a_film_that_was_cut_short_tells_so(tmp_path):
    whole = film(tmp_path / "a.ts", moving(60), 12)
    (tmp_path / "b.ts").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    part = probe_file(tmp_path / "b.ts")
    assert part.problem is None
    assert part.num_frames < 60
    damaged = bytearray(film(tmp_path / "c.mp4", moving(60)).read_bytes())
    middle = damaged.index(b"mdat") + 2000
    damaged[middle : middle + 600] = bytes(600)
    (tmp_path / "c.mp4").write_bytes(damaged)
    facts = probe_file(tmp_path / "c.mp4")
    told = facts.problem or [f for f in facts.flaws if f.kind == "damaged"] or facts.notes
    assert told, "damage in the middle isn't passed over"


def test_files_that_look_the_same_are_found(tmp_path):
    pictures = moving(36, size=(160, 120))
    films = {
        "first": film(tmp_path / "a.mp4", pictures[:24]),
        "again": film(tmp_path / "b.mp4", pictures[:24], crf=32),
        "small": film(tmp_path / "c.mkv", [p[::2, ::2] for p in pictures[:24]]),
        "other": film(tmp_path / "d.mp4", moving(24, 1, size=(160, 120))),
        "later": film(tmp_path / "e.mp4", pictures[12:]),
        "longer": film(tmp_path / "f.mp4", pictures),
    }
    groups = find_similar({name: probe_file(path) for name, path in films.items()})
    assert set(groups) == {"first", "again", "small"}
    assert set(groups.values()) == {"again"}, "the first of their names stands for all"


def media(path: Path) -> MediaFile:
    facts = path.stat()
    return MediaFile(0, path.name, path, facts.st_size, facts.st_mtime_ns)


def test_facts_that_are_known_are_not_found_again(tmp_path):
    kept = tmp_path / "kept"
    path = film(tmp_path / "a.mp4", moving(9))
    os.utime(path, (1e9, 1e9))
    totals: list[int] = []

    def look(*paths: Path) -> list[FileFacts]:
        files = [media(each) for each in paths]
        probe_files(files, tell, folder=kept)
        return [file.facts for file in files]

    def tell(event):
        if event["done"] == 0:
            assert event["stage"] == "look"
            totals.append(event["total"])

    facts = look(path)
    assert look(path) == facts
    assert totals == [1, 0]
    assert [build(FileFacts, json.loads(each.read_text())) for each in kept.iterdir()] == facts
    film(path, moving(12))
    changed = look(path)
    assert changed[0].sha256 != facts[0].sha256
    assert look(path) == changed
    assert totals == [1, 0, 1, 1], "it may change again within the grain of its time stamp"


def test_a_file_that_could_not_be_read_is_looked_at_again(tmp_path):
    path = film(tmp_path / "a.mp4", moving(9))
    os.utime(path, (1e9, 1e9))
    file, kept = media(path), tmp_path / "kept"
    path.rename(tmp_path / "b.mp4")
    probe_files([file], lambda _: None, folder=kept)
    assert not file.facts.sha256
    (tmp_path / "b.mp4").rename(path)
    probe_files([file], lambda _: None, folder=kept)
    assert file.facts.sha256
    assert not file.facts.problem
