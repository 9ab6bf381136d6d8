"""Files joined by copying packets: no frame of a file is ever encoded a second time.

Our films are rows of closed groups of pictures, each from an encoder of pinned settings, so files
of the same settings can follow each other in one. Sound is encoded for the whole.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import islice
from pathlib import Path
from secrets import token_hex
from shutil import rmtree
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

import av
import numpy as np

from vidgen.core.errors import InputError
from vidgen.core.runtime import atomic_path, check_output, write_error
from vidgen.media.clip import Clip
from vidgen.media.manifest import seal
from vidgen.media.mastering import SoundTrack
from vidgen.media.probe import read_recipe
from vidgen.media.provenance import marks_of, stamped, tags
from vidgen.media.stills import RECIPE_KEY
from vidgen.media.subtitles import TextTrack
from vidgen.media.types import ClipInfo, Frames, SegmentStore
from vidgen.media.video_reader import VideoReader
from vidgen.media.write import CONTAINERS, check_format, mux, recipe_text, write_clip

if TYPE_CHECKING:
    from av.container import InputContainer, OutputContainer
    from av.packet import Packet
    from av.video.stream import VideoStream

log = logging.getLogger(__name__)

_MS = Fraction(1, 1000)
_OWN_TAGS = {"major_brand", "minor_version", "compatible_brands", "encoder", "duration"}


@dataclass(frozen=True)
class Stretch:
    """Frames of a file from `first` up to `last`, both at key frames or the file's ends."""

    path: Path
    first: int
    last: int


@dataclass(frozen=True)
class Chapter:
    """A named part of a film, its start and end in seconds."""

    title: str
    start_s: float
    end_s: float


def parting_places(path: str | os.PathLike[str]) -> list[int]:
    """Return the frames at which a film file's packets can be parted: key frames and the end.

    Raises:
        InputError: it can't be read, or its frames lie at uneven times.
    """
    reason = why_not_joined([path])
    if reason is not None:
        raise InputError(f"its packets can't be parted: {reason}")
    with av.open(os.fspath(path)) as source:
        stream = source.streams.video[0]
        rate = cast("Fraction", stream.average_rate)
        found = [(_place(each, rate), each.is_keyframe) for each in _packets(stream)]
    return [*sorted(place for place, is_key in found if is_key), len(found)]


def why_not_joined(paths: Sequence[str | os.PathLike[str]]) -> str | None:
    """Return the reason why files can't be joined by copying packets, or None."""
    pictures = []
    for path in paths:
        try:
            with av.open(os.fspath(path)) as container:
                if not container.streams.video:
                    return f"{path} has no picture"
                stream = container.streams.video[0]
                pictures.append(_picture_of(container.format.name, stream))
                rate = stream.average_rate
                places = sorted(_place(each, rate) for each in _packets(stream)) if rate else None
                if places is None or places != list(range(len(places))):
                    return f"{path} has frames at uneven times"
        except av.FFmpegError as error:
            return f"{path} can't be read: {error.strerror}"
    for name in pictures[0] if pictures else ():
        values = [picture[name] for picture in pictures]
        if any(value != values[0] for value in values):
            if name == "parameters":
                return "the encoders' parameters differ"
            return f"the {name} differs: {', '.join(map(str, values))}"
    return None


def _picture_of(container: str, stream: VideoStream) -> dict[str, Any]:
    """Return what two files' pictures must share for one to follow the other."""
    context = stream.codec_context
    extra = context.extradata
    return {"container": container, "codec": context.name, "size": (context.width, context.height),
            "pixel format": context.pix_fmt, "rate": stream.average_rate,
            "parameters": None if extra is None else bytes(extra)}


def _packets(stream: VideoStream) -> Iterator[Packet[VideoStream]]:
    source = cast("InputContainer", stream.container)
    return (packet for packet in source.demux(stream) if packet.pts is not None)


def _place(packet: Packet[VideoStream], rate: Fraction) -> int:
    assert packet.pts is not None
    return round(packet.pts * packet.time_base * rate)


def join_files(
    paths: Sequence[str | os.PathLike[str] | Stretch], output: str | os.PathLike[str],
    sound: SoundTrack | None = None, recipe: dict[str, Any] | None = None,
    texts: TextTrack | None = None, chapters: Sequence[Chapter] = (),
) -> Path:
    """Write files one after the other into one, which appears, or is replaced, when it is whole.

    `paths` are files for which `why_not_joined` is None, or stretches of such; their own sound is
    left out. Without a `recipe` the last one's metadata stays. Each of `chapters` begins where the
    one before ends.

    Raises:
        OutputError: it can't be written or the disk is full.
    """
    target = Path(output)
    kind = CONTAINERS[target.suffix.lower()]
    tracks: list[SoundTrack | TextTrack] = [each for each in (sound, texts) if each is not None]
    last = paths[-1].path if isinstance(paths[-1], Stretch) else paths[-1]
    with atomic_path(target) as temporary:
        try:
            options = dict(kind.options)
            own = None if recipe is None else stamped(recipe)
            with av.open(str(temporary), "w", format=kind.muxer, options=options) as container:
                container.metadata.update(_tags(last, own))
                if chapters:
                    container.set_chapters([
                        {"id": n, "start": round(1000 * each.start_s), "time_base": _MS,
                         "end": round(1000 * each.end_s), "metadata": {"title": each.title}}
                        for n, each in enumerate(chapters, 1)
                    ])
                _copy(paths, container, tracks)
            recipe = read_recipe(last) if own is None else own
            if recipe is not None:
                seal(temporary, target.suffix.lower(), stamped(recipe))
        except av.FFmpegError as error:
            raise write_error(target, OSError(error.errno, error.strerror), temporary) from error
    return target


def _tags(last: str | os.PathLike[str], recipe: dict[str, Any] | None) -> dict[str, str]:
    if recipe is not None:
        return {**tags(marks_of(recipe)), RECIPE_KEY: recipe_text(recipe)}
    with av.open(os.fspath(last)) as source:
        return {k: v for k, v in source.metadata.items() if k.lower() not in _OWN_TAGS}


def _copy(
    paths: Sequence[str | os.PathLike[str] | Stretch], container: OutputContainer,
    tracks: Sequence[SoundTrack | TextTrack],
) -> None:
    """Copy the packets, with one file open at a time: there may be more than the system allows."""
    stretches = [p if isinstance(p, Stretch) else Stretch(Path(p), 0, 1 << 62) for p in paths]
    delay, picture = 0, None
    for path in {each.path: None for each in stretches}:
        with av.open(os.fspath(path)) as source:
            stream = source.streams.video[0]
            assert stream.average_rate is not None
            places = (_place(packet, stream.average_rate) for packet in _packets(stream))
            delay = max(delay, *(n - place for n, place in enumerate(places)))  # to decode ahead
            if picture is None:
                picture = container.add_stream_from_template(stream)
                picture.time_base = 1 / stream.average_rate
    assert picture is not None
    mux(container, picture, _moved(stretches, delay), tracks)


def _moved(stretches: Sequence[Stretch], delay: int) -> Iterator[Packet[VideoStream]]:
    """Yield the packets of stretches, each after the one before, decoded `delay` frames ahead."""
    start = 0
    for each in stretches:
        with av.open(os.fspath(each.path)) as source:
            stream, count = source.streams.video[0], 0
            rate = cast("Fraction", stream.average_rate)
            for packet in source.demux(stream):
                if packet.dts is None or not each.first <= _place(packet, rate) < each.last:
                    continue
                packet.pts = start + _place(packet, rate) - each.first
                packet.dts = start + count - delay
                packet.time_base, packet.duration = 1 / rate, 1
                yield packet
                count += 1
            start += count


class ContinuedClip(Clip):
    """A clip that begins with a file's frames; where formats agree its packets are copied.

    Args:
        added: makes a new iterator of the chunks that follow, uint8 [t, H, W, 3] each, from the
            given one of their frames on.
        journal: the clip's own, by which saving to its output resumes.
    """

    def __init__(
        self, head: Path, head_frames: int, added: Callable[[int], Iterator[Frames]],
        info: ClipInfo, journal: SegmentStore | None = None,
    ) -> None:
        def source(start: int = 0) -> Iterator[Frames]:
            if start < head_frames:
                with VideoReader(head) as reader:
                    yield from (frame[None] for frame in islice(reader, start, None))
            yield from added(max(0, start - head_frames))

        super().__init__(source, info, journal=journal)
        self.head, self.head_frames, self._added = head, head_frames, added

    def added(self) -> Clip:
        """Return the part after the file as a clip; its recipe has the frames left out."""
        recipe = None if self.recipe is None else {**self.recipe, "head_frames": self.head_frames}
        begin = round(self.head_frames / self.info.fps * self.sound_rate)
        info = replace(self.info, num_frames=self.num_frames - self.head_frames, recipe=recipe,
                       sound=None if self.sound is None else self.sound[begin:])

        return Clip(lambda start=0: self._added(start), info, journal=self.journal)

    def _write(
        self, name: str, overwrite: bool, on_frames: Callable[[int], None] | None,
        store: SegmentStore | None, marks: Mapping[str, str],
    ) -> Path:
        suffix = check_format(name, self.num_frames, self.info.fps)
        reason = self._why_not_copied(suffix, marks)
        if reason is not None:
            log.warning("%s: its frames are encoded once more, since %s", self.head, reason)
            return super()._write(name, overwrite, on_frames, store, marks)
        check_output(name, overwrite=overwrite, num_bytes=self.head.stat().st_size)
        done = store.num_frames if store else 0
        checker = self._checker()
        with VideoReader(self.head) as reader:
            for frame in reader:
                checker.feed(frame[None])
        info = replace(self._with_marks(marks), sound=None,
                       num_frames=self.num_frames - self.head_frames)
        target = Path(name)
        # named like what `atomic_path` makes, so that what a kill leaves is swept like that
        folder = target.with_name(f".{target.name}.{token_hex(4)}.tmp")
        folder.mkdir()
        try:
            part = write_clip(
                folder / f"added{suffix}", self._added(done), info, store=store, checker=checker,
                on_frames=on_frames and (lambda made: on_frames(self.head_frames + made)),
            )
            self.findings = checker.findings
            sound = None
            if self.info.sound is not None:
                sound = SoundTrack(self.info, CONTAINERS[suffix].sound)
            return join_files([self.head, part], name, sound)
        finally:
            rmtree(folder, ignore_errors=True)

    def _why_not_copied(self, suffix: str, marks: Mapping[str, str]) -> str | None:
        """Compare the file with one frame, written as the new part would be."""
        if self._gets_label(marks):
            return "a label is burnt into the opening"
        if suffix not in CONTAINERS:
            return f"{'a folder' if suffix == '/' else suffix} holds no packets of films"
        width, height = self.info.size
        probe = replace(self.info, num_frames=1, sound=None, recipe=None)
        with TemporaryDirectory() as folder:
            sample = Path(folder, f"sample{suffix}")
            try:
                write_clip(sample, [np.zeros((1, height, width, 3), np.uint8)], probe)
            except InputError as error:
                return str(error)
            return why_not_joined([self.head, sample])
