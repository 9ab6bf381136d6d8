import json
import resource
import subprocess
import sys
import time
from fractions import Fraction

import av
import numpy as np
import PIL
import pytest
import torch

from vidgen.core.errors import InputError, OutputError
from vidgen.media.checks import check_file
from vidgen.media.clip import Clip
from vidgen.media.encode import Spool
from vidgen.media.probe import probe, read_recipe
from vidgen.media.stills import still_encoder
from vidgen.media.types import ClipInfo
from vidgen.media.write import SEGMENT, check_format, write_clip

RECIPE = {
    "prompt": 'a "cat" ☃\né', "seed": 7, "list": [1, 2.5, None, True],
    "created": "2026-01-02T03:04:05Z", "id": "urn:uuid:0",
}


def moving_bars(num_frames, width=64, height=48):
    """Smooth pictures uint8 [T, H, W, 3] that chroma at half size can carry."""
    t, y, x = np.meshgrid(np.arange(num_frames), np.arange(height), np.arange(width), indexing="ij")
    red = 127 + 120 * np.sin(x / 9 + t / 5)
    green = 127 + 120 * np.sin(y / 8 - t / 7)
    blue = 127 + 120 * np.sin((x + y) / 11 + t / 3)
    return np.stack([red, green, blue], axis=-1).round().astype(np.uint8)


def psnr(a, b):
    return 10 * np.log10(255**2 / max(1e-9, np.mean((a.astype(float) - b) ** 2)))


def write(path, frames, *, split=7, fps=Fraction(12), **info):
    size = (frames.shape[2], frames.shape[1])
    chunks = (frames[i : i + split] for i in range(0, len(frames), split))
    return write_clip(path, chunks, ClipInfo(fps, size, len(frames), **info))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("suffix", "floor"),
    [(".mp4", 35), (".mov", 35), (".webm", 35), (".mkv", 200), (".gif", 25), (".webp", 30),
     (".apng", 200)],
)
def test_each_format_keeps_frames_rate_and_recipe(tmp_path, suffix, floor):
    frames = moving_bars(20)
    path = write(tmp_path / f"clip{suffix}", frames, recipe=RECIPE)
    clip = Clip.from_file(path)
    assert (clip.num_frames, clip.size) == (20, (64, 48))
    assert abs(clip.fps - 12) < (0.05 if suffix in (".gif", ".webp", ".apng") else 1e-9)
    assert psnr(clip.frames, frames) >= floor or np.array_equal(clip.frames, frames)
    encoder = clip.recipe.pop("encoder", None)
    assert encoder["codec"] == {".mp4": "libx264", ".mov": "libx264", ".webm": "libvpx-vp9",
                                ".mkv": "ffv1", ".apng": "png"}.get(suffix, suffix[1:])
    assert clip.recipe == RECIPE
    assert clip.sound is None
    assert names(tmp_path) == [f"clip{suffix}"]


@pytest.mark.parametrize(("name", "floor"), [("x.png", 200), ("x.jpg", 38), ("x.JPEG", 38)])
def test_one_frame_becomes_a_picture_with_its_recipe(tmp_path, name, floor):
    frames = moving_bars(1)
    clip = Clip.from_file(write(tmp_path / name, frames, recipe=RECIPE))
    assert psnr(clip.frames, frames) >= floor or np.array_equal(clip.frames, frames)
    encoder = clip.recipe.pop("encoder")
    assert encoder["options"] == ({} if name == "x.png" else {"quality": 95, "subsampling": 0})
    assert encoder["pillow"] == PIL.__version__
    assert clip.recipe == RECIPE


def test_a_name_with_a_slash_becomes_a_folder_of_pngs(tmp_path):
    frames = moving_bars(3)
    write(f"{tmp_path}/shots/", frames, recipe=RECIPE)
    folder = tmp_path / "shots"
    assert names(folder) == ["00000.png", "00001.png", "00002.png", "recipe.json"]
    assert np.array_equal(Clip.from_file(folder / "00002.png").frames[0], frames[2])
    assert read_recipe(folder) == RECIPE | {"encoder": still_encoder("/")}
    with pytest.raises(OutputError, match="exists"):
        write(f"{tmp_path}/shots/", frames)


@pytest.mark.parametrize("told", ["0", "-1", '"1/0"', '""', "[]", "null", "Infinity", "NaN"])
def test_a_folder_whose_recipe_tells_no_rate_has_25_frames_a_second(tmp_path, told):
    write(f"{tmp_path}/shots/", moving_bars(3), recipe=RECIPE)
    (tmp_path / "shots" / "recipe.json").write_text(f'{{"plan": {{"fps": {told}}}}}')
    assert Clip.from_file(tmp_path / "shots").fps == 25
    assert check_file(tmp_path / "shots") is not None
    (tmp_path / "shots" / "recipe.json").write_text('{"plan": {"fps": "25/2"}}')
    assert Clip.from_file(tmp_path / "shots").fps == Fraction(25, 2)


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".mkv", ".png", ".jpg", ".webp", ".gif"])
def test_a_recipe_of_three_megabytes_survives(tmp_path, suffix):
    recipe = {"notes": ["A" * 3_000_000], "prompt": "é"}
    frames = moving_bars(1)
    found = read_recipe(write(tmp_path / f"x{suffix}", frames, recipe=recipe))
    assert {key: found[key] for key in recipe} == recipe


@pytest.mark.parametrize("fps", [Fraction(24000, 1001), Fraction(25, 2), Fraction(30), Fraction(1)])
@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".mkv"])
def test_frame_rates_and_times_are_exact(tmp_path, suffix, fps):
    path = write(tmp_path / f"x{suffix}", moving_bars(10), fps=fps)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        times = [frame.pts * stream.time_base for frame in container.decode(stream)]
        assert abs(stream.average_rate - fps) < Fraction(1, 100)
    grid = 0 if suffix == ".mp4" else Fraction(1, 1000)  # Matroska counts milliseconds
    assert all(abs(time - n / fps) <= grid for n, time in enumerate(times))


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".mkv"])
@pytest.mark.parametrize(("width", "height"), [(64, 48), (96, 160), (128, 128)])
def test_bytes_are_equal_in_each_run_however_the_frames_arrive(tmp_path, suffix, width, height):
    frames = moving_bars(SEGMENT + 20, width, height)
    contents = {
        write(tmp_path / f"{split}{suffix}", frames, split=split, stride_t=4).read_bytes()
        for split in (1, 13, 50, 1000)
    }
    assert len(contents) == 1


def test_segments_are_closed_and_depend_on_their_own_frames_alone(tmp_path):
    frames = moving_bars(3 * SEGMENT)
    changed = frames.copy()
    changed[SEGMENT - 3 : 2 * SEGMENT - 3] = 255 - changed[SEGMENT - 3 : 2 * SEGMENT - 3]

    def packets(name, pictures):
        with av.open(str(write(tmp_path / name, pictures, stride_t=4))) as container:
            return [
                (round(p.pts * p.time_base * 12), p.is_keyframe, bytes(p))
                for p in container.demux(video=0)
                if p.size
            ]

    one, other = packets("a.mp4", frames), packets("b.mp4", changed)
    keys = {pts for pts, is_key, _ in one if is_key}
    second, third = SEGMENT - 3, 2 * SEGMENT - 3
    assert {0, second, third, 3 * SEGMENT - 3} <= keys

    def part(packets, start, end):
        return [packet for packet in packets if start <= packet[0] < end]

    assert part(one, 0, second) == part(other, 0, second)
    assert part(one, second, third) != part(other, second, third)
    assert part(one, third, len(frames)) == part(other, third, len(frames))


def test_colours_are_tagged_and_meant_as_bt709(tmp_path):
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (200, 40, 120)]
    frames = np.stack([np.full((48, 64, 3), colour, np.uint8) for colour in colours])
    path = write(tmp_path / "x.mp4", frames)
    assert np.abs(Clip.from_file(path).frames.astype(int) - frames).max() <= 4
    with av.open(str(path)) as container:
        picture = next(container.decode(video=0))
        context = container.streams.video[0].codec_context
        tags = (context.color_primaries, context.color_trc, context.colorspace, context.color_range)
        assert tags == (1, 1, 1, 1)
        luma = float(picture.to_ndarray()[:48].mean())
    assert abs(luma - (16 + 219 * 0.2126)) < 2  # ITU-R BT.709-6, 3.2: red's share of luma


def test_a_silent_clip_gets_no_sound_track(tmp_path):
    path = write(tmp_path / "x.mp4", moving_bars(3))
    assert [stream["type"] for stream in probe(path)["streams"]] == ["video"]


def test_the_index_comes_first_so_that_browsers_start_at_once(tmp_path):
    data = write(tmp_path / "x.mp4", moving_bars(9), recipe=RECIPE).read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


def test_odd_sizes_keep_every_column(tmp_path, caplog):
    frames = moving_bars(5, width=63, height=47)
    clip = Clip.from_file(write(tmp_path / "x.mp4", frames))
    assert clip.size == (63, 47)
    assert psnr(clip.frames, frames) > 36
    assert "4:4:4" in caplog.text


def test_torch_chunks_are_taken_as_they_are(tmp_path):
    frames = moving_bars(9)
    chunks = [torch.from_numpy(frames[:1]), torch.from_numpy(frames[1:])]
    path = write_clip(tmp_path / "x.mkv", chunks, ClipInfo(Fraction(12), (64, 48), 9))
    assert np.array_equal(Clip.from_file(path).frames, frames)


@pytest.mark.parametrize(
    ("path", "num_frames", "message"),
    [
        ("x.mp5", None, "unknown suffix '.mp5'; did you mean '.mp4'"),
        ("x", None, "unknown suffix ''; give one of .mp4, .mov"),
        ("x.png", 9, "holds one picture, but the clip has 9 frames"),
        ("x.jpg", 2, "holds one picture"),
    ],
)
def test_outputs_that_no_writer_can_make_are_refused(path, num_frames, message):
    with pytest.raises(InputError, match=message):
        check_format(path, num_frames)


@pytest.mark.parametrize("suffix", [".mp4", ".gif", "/"])
def test_when_the_source_of_frames_fails_nothing_is_left(tmp_path, suffix):
    frames = moving_bars(10)

    def chunks():
        yield frames[:5]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_clip(f"{tmp_path}/x{suffix}", chunks(), ClipInfo(Fraction(12), (64, 48), 10))
    assert names(tmp_path) == []


def test_wrong_numbers_of_frames_never_become_a_file(tmp_path):
    chunks = iter([moving_bars(4)])
    with pytest.raises(AssertionError, match="4 frames came where 5 were promised"):
        write_clip(tmp_path / "x.mp4", chunks, ClipInfo(Fraction(12), (64, 48), 5))
    assert names(tmp_path) == []


def test_an_existing_file_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "x.mp4"
    write(path, moving_bars(4))
    before = path.read_bytes()
    with pytest.raises(OutputError, match="exists"):
        write(path, moving_bars(5))

    def chunks():
        yield moving_bars(4)
        raise ValueError("decoder broke")

    info = ClipInfo(Fraction(12), (64, 48), 9)
    with pytest.raises(ValueError, match="decoder broke"):
        write_clip(path, chunks(), info, overwrite=True)
    assert path.read_bytes() == before


def test_a_full_disk_stops_the_work_early_and_leaves_nothing(tmp_path):
    program = f"""
import resource, sys
import numpy as np
from fractions import Fraction
from vidgen.media.write import ClipInfo, write_clip
rng = np.random.default_rng(0)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, {resource.RLIM_INFINITY}))
made = 0
def chunks():
    global made
    for made in range(500):
        yield rng.integers(0, 256, (1, 256, 256, 3), dtype=np.uint8)
try:
    write_clip(sys.argv[1], chunks(), ClipInfo(Fraction(12), (256, 256), 500))
finally:
    print(made)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "x.mkv")],
        capture_output=True, text=True, check=False,
    )
    assert "OutputError: no space left" in done.stderr
    assert int(done.stdout) < 100
    assert names(tmp_path) == []


def test_decoding_and_encoding_run_side_by_side_with_one_chunk_between(tmp_path):
    ahead = []
    written = []

    def chunks():
        for index in range(6):
            ahead.append(index)
            yield moving_bars(8, width=256, height=256)

    info = ClipInfo(Fraction(12), (256, 256), 48)
    write_clip(tmp_path / "x.mp4", chunks(), info, on_frames=written.append)
    assert written == [0, 8, 16, 24, 32, 40, 48]


def test_memory_does_not_grow_with_the_number_of_frames(tmp_path):
    program = """
import resource, sys
import numpy as np
from fractions import Fraction
from vidgen.media.write import ClipInfo, write_clip
frame = np.tile(np.arange(640, dtype=np.uint16) % 256, (360, 1)).astype(np.uint8)
chunk = np.repeat(np.repeat(frame[None, :, :, None], 3, 3), 4, 0)
def peak(count, path):
    write_clip(path, (chunk for _ in range(count)), ClipInfo(Fraction(12), (640, 360), 4 * count))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(peak(32, sys.argv[1] + "/a.mp4"), peak(160, sys.argv[1] + "/b.mp4"))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True
    )
    short, long = map(float, done.stdout.split())
    assert long - short < 40


def test_lazy_clips_stream_and_hold_pixels_only_on_request(tmp_path):
    frames = moving_bars(9)
    started = []

    def source():
        started.append(time.monotonic())
        yield from (frames[:1], frames[1:5], frames[5:])

    clip = Clip(source, ClipInfo(Fraction(12), (64, 48), 9, recipe=RECIPE, stride_t=4))
    assert repr(clip) == "<Clip of 9 frames, 64x48 at 12 fps>"
    assert not started
    assert [len(chunk) for chunk in clip.chunks()] == [1, 4, 4]
    clip.save(tmp_path / "a.mkv")
    assert len(started) == 2
    assert np.array_equal(clip.frames, frames)
    clip.save(tmp_path / "b.mkv")
    assert len(started) == 3
    assert (tmp_path / "a.mkv").read_bytes() == (tmp_path / "b.mkv").read_bytes()
    again = Clip.from_file(tmp_path / "a.mkv")
    assert sum(len(chunk) for chunk in again.chunks()) == 9
    assert json.dumps(again.recipe | RECIPE) == json.dumps(again.recipe)


@pytest.mark.parametrize("more", [1, 2, 3])
def test_a_short_last_segment_keeps_the_rate(tmp_path, more):
    frames = moving_bars(SEGMENT + more)
    path = write(tmp_path / "clip.mp4", frames, fps=Fraction(24))
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == 24
        times = [packet.dts for packet in container.demux(stream) if packet.dts is not None]
    assert len(set(np.diff(times))) == 1
    assert (Clip.from_file(path).frames.shape) == frames.shape


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".gif", ".webp", ".apng", "/"])
def test_the_recipe_tells_what_the_checks_found_up_to_the_last_frame(tmp_path, suffix):
    frames = moving_bars(40)
    frames[-3:] = 0
    info = ClipInfo(Fraction(12), (64, 48), 40, recipe=RECIPE)
    clip = Clip(lambda: iter([frames[:30], frames[30:]]), info)
    path = clip.save(f"{tmp_path}/x{suffix}")
    (found,) = read_recipe(path)["checks"]["findings"]
    assert (found["kind"], found["time_s"]) == ("black", [round(37 / 12, 3), round(40 / 12, 3)])
    assert read_recipe(path)["checks"]["verdict"] == "warning"
    assert [finding.kind for finding in clip.findings] == ["black"]
    if suffix != "/":
        assert Clip.from_file(path).findings == clip.findings


def test_what_memory_does_not_hold_lies_in_a_file_without_a_name(tmp_path, monkeypatch):
    frames = moving_bars(70)
    whole = write(tmp_path / "whole.mkv", frames)
    monkeypatch.setattr(Spool, "IN_MEMORY", 1000)
    spooled = write(tmp_path / "spooled.mkv", frames)
    assert spooled.read_bytes() == whole.read_bytes()
    assert names(tmp_path) == ["spooled.mkv", "whole.mkv"]
