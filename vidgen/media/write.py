"""Writing of clips: streamed through an encoder thread, atomic, with the recipe embedded."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from queue import Full, Queue
from typing import TYPE_CHECKING, Any, cast

import av
import numpy as np

from vidgen.core.errors import InputError, nearest
from vidgen.core.runtime import atomic_path, check_output, write_error
from vidgen.media.encode import Spool, checked, configure, encode_picture
from vidgen.media.manifest import seal, signer_info
from vidgen.media.mastering import SoundTrack
from vidgen.media.provenance import marks_of, stamped, tags
from vidgen.media.stills import RECIPE_KEY, STILL_SUFFIXES, still_encoder, write_stills
from vidgen.media.types import ClipInfo, Frames, PictureSettings, SegmentStore

if TYPE_CHECKING:
    from av.container import OutputContainer
    from av.packet import Packet
    from av.video.stream import VideoStream
    from torch import Tensor

    from vidgen.media.checks import ClipChecker
    from vidgen.media.subtitles import TextTrack

log = logging.getLogger(__name__)

SEGMENT = 64
"""Frames of a segment; 16 latent frames at a temporal stride of 4."""


@dataclass(frozen=True)
class Container:
    """A film format: libav's muxer with options, video settings and sound encoder."""

    muxer: str
    picture: PictureSettings
    sound: str
    options: Mapping[str, str]


# x264's macroblock tree is not deterministic at some sizes (96x160, not 128x128).
_X264 = PictureSettings("libx264", "yuv420p", {"crf": "16", "preset": "medium", "mbtree": "0"})
# A timescale of milliseconds would cut samples at a track's end; this one has whole frames.
_MP4 = {"movflags": "+faststart+use_metadata_tags", "fflags": "+bitexact",
        "movie_timescale": "240000"}
_MKV = {"fflags": "+bitexact"}
_VP9 = PictureSettings("libvpx-vp9", "yuv420p", {
    "crf": "20", "b": "0", "deadline": "good", "cpu-used": "4", "row-mt": "1"})
_FFV1 = PictureSettings("ffv1", "bgr0", {"level": "3", "g": "1", "slicecrc": "1"})
CONTAINERS = {
    ".mp4": Container("mp4", _X264, "aac", _MP4),
    ".mov": Container("mov", _X264, "aac", _MP4),
    ".webm": Container("webm", _VP9, "libopus", _MKV),
    ".mkv": Container("matroska", _FFV1, "libopus", _MKV),
}

GIF_FPS = 50
"""Highest rate of a GIF: delays count in 1/100 s, and viewers replace one below 2 by 10."""
PIXELS_PER_BYTE = 4
"""Pixels per written byte, about, by H.264 in the worst case."""


def recipe_text(recipe: dict[str, Any]) -> str:
    """Return a recipe as ASCII JSON, which every container's metadata can hold."""
    return json.dumps(recipe, allow_nan=False)


def check_format(
    path: str | Path, num_frames: int | None = None, fps: Fraction | float | None = None
) -> str:
    """Return the suffix of an output, "/" for a folder of pictures.

    Raises:
        InputError: the suffix is unknown, or can't hold so many frames or such a frame rate.
    """
    suffix = "/" if str(path).endswith("/") else Path(path).suffix.lower()
    known = [*CONTAINERS, *STILL_SUFFIXES]
    if suffix not in known:
        hint = nearest(suffix, known) if suffix else f"give one of {', '.join(known)}"
        raise InputError(f"output {path} has the unknown suffix {suffix!r}; {hint}")
    if suffix in (".png", ".jpg", ".jpeg") and num_frames not in (None, 1):
        raise InputError(
            f"output {path} holds one picture, but the clip has {num_frames} frames; "
            "use .mp4, .apng, a folder (name/), or --frames 1"
        )
    if suffix == ".gif" and num_frames != 1 and (fps or 0) > GIF_FPS:
        raise InputError(
            f"output {path} is limited to {GIF_FPS} fps, since viewers slow down a faster GIF, but "
            f"the clip has {float(fps or 0):g}; use .webp, .apng or .mp4, or "
            f"--fps {GIF_FPS}"
        )
    return suffix


def require_sound(path: str | Path, suffix: str) -> None:
    """Raise InputError for an output whose suffix can't hold sound."""
    if suffix not in CONTAINERS:
        raise InputError(f"output {path} can't hold sound; give one of {', '.join(CONTAINERS)}, or "
                         "leave the sound out")


def write_clip(
    path: str | Path, chunks: Iterable[Frames | Tensor], info: ClipInfo, *, overwrite: bool = False,
    on_frames: Callable[[int], None] | None = None, store: SegmentStore | None = None,
    checker: ClipChecker | None = None,
) -> Path:
    """Write a clip atomically to a file or a folder of PNGs; return its path.

    Args:
        path: the suffix selects the format: .mp4 and .mov H.264 with AAC, .webm VP9 with Opus, .mkv
            lossless FFV1 with Opus, .gif, .webp, .apng, .png and .jpg for one frame.
        chunks: uint8 [t, H, W, 3] each, of any t.
        info: the clip's rate, size, sound and recipe.
        overwrite: whether to replace an existing file.
        on_frames: called with the number of frames passed to the encoder so far, by an earlier
            run included, at the start and after each chunk.
        store: encoded segments of an earlier run, after which `chunks` begin; receives further
            ones. Unused by formats without segments.
        checker: receives every frame; its report goes into the recipe.

    Raises:
        InputError: unknown suffix, or too many frames for it.
        OutputError: the file exists, can't be written, or the disk is full.
    """
    suffix = check_format(path, info.num_frames, info.fps)
    pixels = info.size[0] * info.size[1] * info.num_frames
    check_output(path, overwrite=overwrite, num_bytes=pixels // PIXELS_PER_BYTE)
    if info.recipe is not None:  # generated clips are marked
        info = replace(info, recipe=stamped(info.recipe))
        signer_info()  # refuse an unusable signer before the work
    if suffix in CONTAINERS:
        encode = partial(_write_container, Path(path), suffix, info, store, checker)
    else:
        if info.sound is not None:
            log.warning("%s can't hold sound; the clip's sound is left out", path)
        encode = partial(_write_stills, Path(path), suffix, info, checker)
    _encode_in_thread(encode, _counted(chunks, info, on_frames, store.num_frames if store else 0))
    return Path(path)


def _counted(
    chunks: Iterable[Frames | Tensor], info: ClipInfo, on_frames: Callable[[int], None] | None,
    count: int,
) -> Iterator[Frames]:
    """Yield chunks as contiguous arrays, and assert that they match the clip's description."""
    if on_frames:
        on_frames(count)
    for chunk in chunks:
        frames = np.ascontiguousarray(chunk if isinstance(chunk, np.ndarray) else chunk.cpu())
        width, height = info.size
        assert frames.dtype == np.uint8
        assert frames.shape[1:] == (height, width, 3), f"{frames.shape} is no {info.size} chunk"
        yield frames
        count += len(frames)
        if on_frames:
            on_frames(count)
    assert count == info.num_frames, f"{count} frames came where {info.num_frames} were promised"


class _Abandoned(Exception):
    """Signal that the source of frames failed, so nothing is written."""


def _encode_in_thread(encode: Callable[[Iterator[Frames]], None], chunks: Iterator[Frames]) -> None:
    """Run `encode` in a thread, with at most one chunk waiting for it."""
    slot: Queue[Frames | _Abandoned | None] = Queue(maxsize=1)

    def arriving() -> Iterator[Frames]:
        while (item := slot.get()) is not None:
            if isinstance(item, _Abandoned):
                raise item
            yield item

    def hand_over(item: Frames | _Abandoned | None) -> None:
        while not encoding.done():
            try:
                return slot.put(item, timeout=0.2)
            except Full:
                continue

    with ThreadPoolExecutor(1, thread_name_prefix="vidgen-encoder") as pool:
        encoding = pool.submit(encode, arriving())
        try:
            for chunk in chunks:
                hand_over(chunk)
                if encoding.done() and encoding.exception():
                    break
            hand_over(None)
        except BaseException:
            hand_over(_Abandoned())
            raise
    encoding.result()


def _completed(
    info: ClipInfo, encoder: dict[str, Any], checker: ClipChecker | None
) -> dict[str, Any] | None:
    """Return the completed recipe; call this after the last frame."""
    found = checker.report() if checker else {}
    return None if info.recipe is None else {**info.recipe, "encoder": encoder, **found}


def _write_stills(
    path: Path, suffix: str, info: ClipInfo, checker: ClipChecker | None, chunks: Iterator[Frames],
) -> None:
    encoder = still_encoder(suffix, info.quality)

    def recipe() -> str | None:
        completed = _completed(info, encoder, checker)
        return None if completed is None else recipe_text(completed)

    frames = checked(chunks, checker)
    write_stills(path, suffix, info, frames, recipe, encoder["options"])


def _write_container(
    path: Path, suffix: str, info: ClipInfo, store: SegmentStore | None,
    checker: ClipChecker | None, chunks: Iterator[Frames],
) -> None:
    kind = CONTAINERS[suffix]
    wanted = info.picture or kind.picture
    picture = wanted.fitting(info.size)
    if picture != wanted:
        log.warning("%s: the odd size is stored in 4:4:4, which few players support", path)
    first_segment = SEGMENT - (info.stride_t - 1)
    with film_path(path) as temporary, closing(Spool(path.parent)) as spool:
        for packet in encode_picture(checked(chunks, checker), picture, info.size, info.fps,
                                     first_segment=first_segment, segment=SEGMENT, store=store,
                                     checker=checker):
            spool.add(packet)
        encoder = {**asdict(picture), "segment": SEGMENT}
        sound = None
        if info.sound is not None and len(info.sound):
            sound = SoundTrack(info, kind.sound)
            encoder["sound"] = sound.facts()
        recipe = _completed(info, encoder, checker)
        with film_container(temporary, suffix, recipe) as container:
            # the stream's own encoder gives only the header; packets come from the segments
            stream = cast("VideoStream", container.add_stream(picture.codec, rate=info.fps))
            configure(stream.codec_context, picture, info.size, info.fps)
            stream.time_base = 1 / info.fps
            mux(container, stream, spool.packets(1 / info.fps), [sound] if sound else [])


@contextmanager
def film_path(path: Path) -> Iterator[Path]:
    """Yield a film's temporary path; convert libav's errors to OutputError."""
    with atomic_path(path) as temporary:
        try:
            yield temporary
        except av.FFmpegError as error:
            raise write_error(path, OSError(error.errno, error.strerror), temporary) from error


@contextmanager
def film_container(
    temporary: Path, suffix: str, recipe: dict[str, Any] | None
) -> Iterator[OutputContainer]:
    """Open a film's container for writing, with marks and recipe; sign it at the end."""
    kind = CONTAINERS[suffix]
    options = dict(kind.options)
    with av.open(str(temporary), "w", format=kind.muxer, options=options) as container:
        if recipe is not None:
            container.metadata.update(tags(marks_of(recipe)))
            container.metadata[RECIPE_KEY] = recipe_text(recipe)
        yield container
    if recipe is not None:
        seal(temporary, suffix, recipe)


def mux(
    container: OutputContainer, stream: VideoStream, packets: Iterable[Packet[VideoStream]],
    tracks: Sequence[SoundTrack | TextTrack],
) -> None:
    """Write timed packets to a container's stream, and its other tracks as the picture advances."""
    for track in tracks:
        track.begin(container)
    for packet in packets:
        packet.stream = stream
        for track in tracks:
            track.advance(float((packet.dts or 0) * packet.time_base))
        container.mux(packet)
    for track in tracks:
        track.finish()
