import io
import subprocess
import zlib
from fractions import Fraction

import av
import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from vidgen.core.errors import InputError
from vidgen.media.clip import Clip
from vidgen.media.grid import contact_sheet
from vidgen.media.probe import probe, read_recipe
from vidgen.media.read import fit, load_image
from vidgen.media.sound import read_sound
from vidgen.media.types import ClipInfo
from vidgen.media.video_reader import VideoReader
from vidgen.media.write import write_clip
from vidgen.pipeline.inputs import video_frames


def gradient(height=32, width=48):
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 5, y * 7, (x + y) * 3], axis=-1).astype(np.uint8)


def clip_at(path, num_frames=6, size=(64, 48)):
    frames = np.zeros((num_frames, size[1], size[0], 3), np.uint8)
    frames[:, : size[1] // 2] = (200, 60, 30)
    write_clip(path, iter([frames]), ClipInfo(Fraction(12), size, num_frames))
    return frames


def film(path, frames, aspect=None, times=None):
    """Frames [T, H, W, 3] as a file, with pixels of an aspect or shown at tenths of a second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.codec_context.time_base = "yuv420p", Fraction(1, 10)
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        for time, frame in zip(times or range(len(frames)), frames, strict=True):
            shown = av.VideoFrame.from_ndarray(frame, "rgb24")
            shown.pts, shown.time_base = time, Fraction(1, 10)
            container.mux(stream.encode(shown))
        container.mux(stream.encode())


def test_ordinary_pictures_are_read_as_they_are(tmp_path):
    pixels = gradient()
    Image.fromarray(pixels).save(tmp_path / "a.png")
    read, notes = load_image(tmp_path / "a.png")
    assert np.array_equal(read, pixels)
    assert notes == []
    assert load_image(pixels)[0] is pixels


def test_exif_rotation_is_honoured(tmp_path):
    pixels = gradient()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned 90 degrees clockwise
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    read, notes = load_image(tmp_path / "a.png")
    assert np.array_equal(read, np.rot90(pixels, -1))
    assert "EXIF" in notes[0]


def test_transparency_lies_over_white(tmp_path):
    pixels = np.dstack([gradient(), np.full((32, 48), 255, np.uint8)])
    pixels[:, :10, 3] = 0
    Image.fromarray(pixels).save(tmp_path / "a.png")
    read, notes = load_image(tmp_path / "a.png")
    assert (read[:, :10] == 255).all()
    assert np.array_equal(read[:, 10:], pixels[:, 10:, :3])
    assert "white" in notes[0]


def test_a_transparent_palette_lies_over_white(tmp_path):
    image = Image.fromarray(np.repeat(np.arange(48, dtype=np.uint8)[None], 32, 0), "P")
    image.putpalette([value for i in range(256) for value in (i, 0, 255 - i)])
    image.save(tmp_path / "a.png", transparency=0)
    read, notes = load_image(tmp_path / "a.png")
    assert (read[:, 0] == 255).all()
    assert tuple(read[0, 5]) == (5, 0, 250)
    assert "white" in notes[0]


@pytest.mark.parametrize("suffix", ["png", "tif", "jpg", "webp", "bmp"])
def test_a_side_of_160_pixels_is_no_depth_of_16_bits(tmp_path, suffix):
    Image.new("RGB", (160, 116)).save(tmp_path / f"a.{suffix}")
    assert load_image(tmp_path / f"a.{suffix}")[1] == []


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bit_greys_keep_their_range(tmp_path, suffix):
    values = np.linspace(0, 65535, 32 * 48).reshape(32, 48).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    read, notes = load_image(tmp_path / f"a.{suffix}")
    assert np.array_equal(read[..., 0], np.round(values * (255 / 65535)).astype(np.uint8))
    assert "16 bits" in notes[0]


def test_large_numbers_are_read_by_their_size_or_refused(tmp_path):
    levels = np.linspace(0, 255, 32 * 32).reshape(32, 32)
    for name, factor, deep in (("small.tif", 1, False), ("large.tif", 257, True)):
        Image.fromarray((levels * factor).astype(np.int32)).save(tmp_path / name)
        pixels, notes = load_image(tmp_path / name)
        assert abs(pixels[..., 0] - levels).max() < 1.01
        assert bool(notes) == deep
    for name, values in (("float.tif", levels.astype(np.float32) / 255),
                         ("huge.tif", (levels * 1000).astype(np.int32))):  # fmt: skip
        Image.fromarray(values).save(tmp_path / name)
        with pytest.raises(InputError, match="so white is unknown; save it with 8 or 16"):
            load_image(tmp_path / name)


def test_pixels_that_are_not_square_become_square(tmp_path):
    path = tmp_path / "wide.mkv"
    film(path, np.full((3, 32, 48, 3), 128, np.uint8), aspect=Fraction(2))
    with VideoReader(path) as reader:
        assert (reader.size, reader.is_plain) == ((96, 32), False)
        assert next(iter(reader)).shape == (32, 96, 3)
    with VideoReader(path, square=False) as reader:
        assert (reader.size, reader.pixel_aspect) == ((48, 32), 2)


def test_frames_at_uneven_times_are_taken_when_they_are_shown(tmp_path):
    path, levels = tmp_path / "uneven.mkv", (10, 60, 110, 160, 210, 250)
    frames = np.stack([np.full((32, 48, 3), level, np.uint8) for level in levels])
    film(path, frames, times=(0, 1, 2, 12, 13, 14))
    with VideoReader(path) as reader:
        assert reader.places is not None
        assert (reader.length(), reader.is_plain) == (reader.places[-1] + 1, False)
    shown = [int(frame.mean()) for frame in video_frames(str(path), 15, Fraction(10))]
    assert shown[:3] == pytest.approx(levels[:3], abs=4)
    assert shown[3:11] == pytest.approx([levels[2]] * 8, abs=4), "held until the next one is due"
    assert shown[-1] == pytest.approx(levels[5], abs=4)
    film(path, frames, times=range(6))
    with VideoReader(path) as reader:
        assert (reader.places, reader.length(), reader.is_plain) == (None, 6, True)


def test_a_cover_is_no_film(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "cover.png")
    path = tmp_path / "song.mp3"
    subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-f", "lavfi", "-i", "sine=d=1", "-i",
         tmp_path / "cover.png", "-map", "0", "-map", "1", "-disposition:v", "attached_pic", path],
        check=True,
    )
    with pytest.raises(InputError, match="it has no picture"):
        VideoReader(path)


def test_sixteen_bit_colour_is_read_with_a_word(tmp_path):
    deep = np.repeat(gradient().astype(np.uint16) * 257, 1, 0)
    frame = av.VideoFrame.from_ndarray(deep, format="rgb48le").reformat(format="rgb48be")
    encoder = av.CodecContext.create("png", "w")
    encoder.width, encoder.height, encoder.pix_fmt = 48, 32, "rgb48be"
    encoder.time_base = Fraction(1, 25)
    data = b"".join(bytes(p) for p in encoder.encode(frame) + encoder.encode(None))
    (tmp_path / "a.png").write_bytes(data)
    read, notes = load_image(tmp_path / "a.png")
    assert np.abs(read.astype(int) - gradient()).max() <= 1
    assert "16 bits" in notes[0]


def test_cmyk_and_greys_become_rgb(tmp_path):
    Image.new("CMYK", (32, 32), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    read, notes = load_image(tmp_path / "a.jpg")
    assert np.abs(read.astype(int) - (255, 0, 0)).max() < 4
    assert "CMYK" in notes[0]
    Image.new("L", (32, 32), 90).save(tmp_path / "b.png")
    assert (load_image(tmp_path / "b.png")[0] == 90).all()


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue", "lime")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    read, notes = load_image(tmp_path / "a.gif")
    assert (read == (255, 0, 0)).all()
    assert "first of 3 frames" in notes[0]


def bomb(width, height):
    """A PNG whose header promises more than its few bytes hold."""
    buffer = io.BytesIO()
    Image.new("L", (16, 16)).save(buffer, "PNG")
    data = bytearray(buffer.getvalue())
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


def png_bytes(size=(64, 64)):
    buffer = io.BytesIO()
    Image.effect_noise(size, 90).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.png", None, "does not exist"),
        ("text.png", b"this is no picture", "not a picture in a known format"),
        ("empty.png", b"", "not a picture in a known format"),
        ("half.png", png_bytes()[:1500], "is damaged: .*; save it again"),
        ("one.png", bomb(1, 1), "is 1x1; each side must have at least 16 pixels"),
        ("huge.png", bomb(20000, 20000), "more than 64000000 pixels; scale it down"),
        ("large.png", bomb(9000, 9000), "is 9000x9000; scale it to 64000000"),
    ],
)
def test_unusable_pictures_are_refused_before_decoding(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_image(tmp_path / name)


def test_a_folder_and_a_wrong_array_are_refused(tmp_path):
    with pytest.raises(InputError, match="is a folder; give a file"):
        load_image(tmp_path)
    with pytest.raises(InputError, match=r"picture is float64 \[4, 4\]"):
        load_image(np.zeros((4, 4)))


@pytest.mark.parametrize("mode", ["crop", "pad"])
def test_fitting_never_stretches(mode):
    y, x = np.mgrid[0:200, 0:400]
    circle = (((x - 200) ** 2 + (y - 100) ** 2 < 60**2) * 255).astype(np.uint8)
    fitted = fit(np.dstack([circle] * 3), 96, 96, mode)[..., 0] > 127
    rows, columns = np.flatnonzero(fitted.any(1)), np.flatnonzero(fitted.any(0))
    assert fitted.shape == (96, 96)
    assert abs(np.ptp(rows) - np.ptp(columns)) <= 1
    wanted = 120 * (96 / 200 if mode == "crop" else 96 / 400)
    assert abs(np.ptp(rows) + 1 - wanted) <= 2


def test_fitting_leaves_a_picture_of_the_right_size_alone():
    pixels = gradient()
    assert fit(pixels, 32, 48) is pixels


def test_a_reader_gives_the_same_frames_each_time(tmp_path):
    frames = clip_at(tmp_path / "a.mkv")
    with VideoReader(tmp_path / "a.mkv") as reader:
        assert (reader.fps, reader.size) == (12, (64, 48))
        for _ in range(2):
            assert np.array_equal(np.stack(list(reader)), frames)


def test_a_turned_phone_video_stands_upright(tmp_path):
    clip_at(tmp_path / "a.mp4")
    upright = Clip.from_file(tmp_path / "a.mp4").frames
    ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
    for degrees in (90, 180, 270):
        turned = tmp_path / f"{degrees}.mp4"
        subprocess.run(
            [ffmpeg, "-v", "error", "-display_rotation", str(degrees), "-i", tmp_path / "a.mp4",
             "-c", "copy", turned],
            check=True,
        )
        expected = np.rot90(upright, degrees // 90, axes=(1, 2))
        clip = Clip.from_file(turned)
        assert clip.size == (expected.shape[2], expected.shape[1])
        assert np.array_equal(clip.frames, expected)


def test_untagged_small_video_is_read_as_bt601(tmp_path):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=12, width=64, height=48, pix_fmt="yuv444p")
        planes = np.stack([np.full((48, 64), value, np.uint8) for value in (81, 90, 240)])
        frame = av.VideoFrame.from_ndarray(planes, format="yuv444p")
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    # (81, 90, 240) is pure red by ITU-R BT.601-7, table 3, in limited range.
    assert np.abs(Clip.from_file(path).frames.astype(int) - (255, 0, 0)).max() <= 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.mp4", None, "does not exist"),
        ("text.mp4", b"not a video" * 50, "can't be read"),
        ("text.txt", b"not a video\n" * 50, "can't be read"),
        ("empty.mp4", b"", "can't be read"),
        ("half.gif", b"GIF89a", "not a picture in a known format"),
    ],
)
def test_what_is_no_video_is_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        VideoReader(tmp_path / name)


def test_a_truncated_video_is_refused(tmp_path):
    clip_at(tmp_path / "a.mp4")
    data = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "b.mp4").write_bytes(data[: len(data) // 3])
    with pytest.raises(InputError, match=r"b\.mp4"):
        Clip.from_file(tmp_path / "b.mp4")


def test_sound_alone_is_no_video_and_pictures_have_no_sound(tmp_path):
    with av.open(str(tmp_path / "a.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.full((1, 800), 16384, np.int16), "s16", "mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    samples, rate = read_sound(tmp_path / "a.wav")
    assert (samples.shape, rate) == ((800, 1), 8000)
    assert np.allclose(samples, 0.5, atol=1e-4)
    with pytest.raises(InputError, match="no picture"):
        VideoReader(tmp_path / "a.wav")
    clip_at(tmp_path / "b.mp4")
    assert read_sound(tmp_path / "b.mp4") is None


def test_probe_tells_streams_and_leaves_the_recipe_out(tmp_path):
    frames = np.zeros((6, 48, 64, 3), np.uint8)
    info = ClipInfo(Fraction(12), (64, 48), 6, recipe={"prompt": "x"})
    for suffix in (".mp4", ".mkv"):
        facts = probe(write_clip(tmp_path / f"a{suffix}", iter([frames]), info))
        assert abs(facts["duration_s"] - 0.5) < 0.01
        assert facts["streams"][0]["fps"] == "12"
        assert "prompt" not in str(facts["metadata"])
    write_clip(tmp_path / "a.gif", iter([frames]), info)
    assert probe(tmp_path / "a.gif")["streams"][0]["width"] == 64


def test_a_file_without_recipe_has_none_and_a_damaged_one_is_refused(tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    assert read_recipe(tmp_path / "a.png") is None
    Image.new("RGB", (16, 16)).save(tmp_path / "a.gif", comment=b"made by hand")
    assert read_recipe(tmp_path / "a.gif") is None
    with pytest.raises(InputError, match="does not exist"):
        read_recipe(tmp_path / "none.png")


def test_a_contact_sheet_shows_every_picture_with_its_label(tmp_path):
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    frames = [np.full((40, 60, 3), colour, np.uint8) for colour in colours]
    path = contact_sheet(frames, tmp_path / "s.png", columns=2, labels=["a", "b" * 99, "c"])
    sheet = np.array(Image.open(path))
    for colour in colours:
        assert (sheet == colour).all(-1).sum() == 40 * 60
    assert (sheet < 60).all(-1).sum() > 20


def test_a_label_continues_over_empty_ones_in_its_row(tmp_path):
    grey = [np.full((40, 60, 3), 200, np.uint8)] * 4
    written = {}
    for behind in ("", "x"):
        labels = ["a long label " * 9, behind, "", ""]
        path = contact_sheet(grey, tmp_path / "s.png", columns=2, labels=labels)
        written[behind] = np.flatnonzero((np.array(Image.open(path))[:60] < 60).all(-1).any(0))
    assert 110 < written[""].max() < 128
    assert len(written[""]) > 1.5 * len(written["x"])
    assert not (np.array(Image.open(path))[62:] < 60).all(-1).any()
