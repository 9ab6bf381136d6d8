"""Concatenation of film files by copying packets, without encoding a frame again.

Films by vidgen consist of closed groups of pictures from encoders of pinned settings, so files of
equal settings can be concatenated. Sound is encoded for the whole.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from secrets import token_hex
from shutil import rmtree
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

import av
import numpy as np

from vidgen.core.errors import InputError
from vidgen.core.runtime import check_output
from vidgen.media.clip import Clip
from vidgen.media.mastering import SoundTrack
from vidgen.media.probe import read_recipe
from vidgen.media.provenance import stamped
from vidgen.media.subtitles import TextTrack
from vidgen.media.types import ClipInfo, Frames, SegmentStore
from vidgen.media.video_reader import VideoReader
from vidgen.media.write import (
    CONTAINERS,
    check_format,
    film_container,
    film_path,
    mux,
    write_clip,
)

if TYPE_CHECKING:
    from av.packet import Packet
    from av.video.stream import VideoStream

log = logging.getLogger(__name__)

_MS = Fraction(1, 1000)


@dataclass(frozen=True)
class Stretch:
    """Frames `first` to `last` (exclusive) of a film file, bounded by key frames or its ends."""

    path: Path
    first: int
    last: int


@dataclass(frozen=True)
class Chapter:
    """A named part of a film, its start and end in seconds."""

    title: str
    start_s: float
    end_s: float


def write_sample(folder: Path, suffix: str, info: ClipInfo) -> Path:
    """Write one black frame with the settings of a clip's picture; return the file's path."""
    width, height = info.size
    one = replace(info, num_frames=1, sound=None, recipe=None)
    return write_clip(folder / f"sample{suffix}", [np.zeros((1, height, width, 3), np.uint8)], one)


def parting_places(path: Path, sample: Path) -> list[int] | str:
    """Return the frames at which a film file can be split: key frames and the end.

    If its packets can't be copied into a file like the sample, return the reason.
    """
    facts = []
    for file in (path, sample):
        try:
            with av.open(str(file)) as container:
                if not container.streams.video:
                    return f"{file} has no picture"
                stream = container.streams.video[0]
                facts.append(_facts(container.format.name, stream))
                if not stream.average_rate:
                    return f"{file} has a variable frame rate"
        except av.FFmpegError as error:
            return f"{file} can't be read: {error.strerror}"
    for name, value in facts[0].items():
        if value != facts[1][name]:
            if name == "parameters":
                return "the encoders' parameters differ"
            return f"the {name} differs: {value}, {facts[1][name]}"
    found = sorted((place, packet.is_keyframe) for place, packet in _packets(path))
    if [place for place, _ in found] != list(range(len(found))):
        return f"{path} has a variable frame rate"
    return [*(place for place, is_key in found if is_key), len(found)]


def _facts(container: str, stream: VideoStream) -> dict[str, Any]:
    """Return the properties of a picture stream that concatenated files must share."""
    context = stream.codec_context
    extra = context.extradata
    return {"container": container, "codec": context.name, "size": (context.width, context.height),
            "pixel format": context.pix_fmt, "rate": stream.average_rate,
            "parameters": None if extra is None else bytes(extra)}


def join_files(
    stretches: Sequence[Stretch], output: Path, recipe: dict[str, Any] | None,
    sound: SoundTrack | None = None, texts: TextTrack | None = None,
    chapters: Sequence[Chapter] = (),
) -> None:
    """Concatenate stretches of files into one, without the files' own sound.

    The output is written atomically. `parting_places` must give lists for all files with the same
    sample. Each of `chapters` begins at the end of the previous one.

    Raises:
        OutputError: the output can't be written or the disk is full.
    """
    tracks: list[SoundTrack | TextTrack] = [each for each in (sound, texts) if each is not None]
    recipe = None if recipe is None else stamped(recipe)
    with (film_path(output) as temporary,
          film_container(temporary, output.suffix.lower(), recipe) as container):
        if chapters:
            container.set_chapters([
                {"id": n, "start": round(1000 * each.start_s), "time_base": _MS,
                 "end": round(1000 * each.end_s), "metadata": {"title": each.title}}
                for n, each in enumerate(chapters, 1)
            ])
        with av.open(str(stretches[0].path)) as source:
            picture = container.add_stream_from_template(source.streams.video[0])
            picture.time_base = 1 / cast("Fraction", source.streams.video[0].average_rate)
        mux(container, picture, _moved(stretches, picture.time_base), tracks)


def _packets(path: Path) -> Iterator[tuple[int, Packet[VideoStream]]]:
    """Yield a film file's picture packets in decoding order, each with its frame's index."""
    with av.open(str(path)) as source:
        stream = source.streams.video[0]
        for packet in source.demux(stream):
            if packet.pts is not None:
                place = packet.pts * packet.time_base * cast("Fraction", stream.average_rate)
                yield round(place), packet


def _moved(stretches: Sequence[Stretch], unit: Fraction) -> Iterator[Packet[VideoStream]]:
    """Yield the packets of consecutive stretches, timed in units of one frame.

    One file is open at a time, since the system limits open files.
    """
    delay, number, start = 0, 0, 0  # frames by which packets are decoded ahead
    for path in {each.path for each in stretches}:
        delay = max(delay, *(n - place for n, (place, _) in enumerate(_packets(path))))
    for each in stretches:
        for place, packet in _packets(each.path):
            if each.first <= place < each.last:
                packet.pts, packet.dts = start + place - each.first, number - delay
                packet.time_base, packet.duration = unit, 1
                yield packet
                number += 1
        start = number


class ContinuedClip(Clip):
    """A clip that begins with a file's frames, whose packets are copied if the formats agree.

    Args:
        source, journal: as of `Clip`.
        added: as `source`, without the file's frames.
        head, head_frames: the file, and the number of its frames.
    """

    def __init__(
        self, source: Callable[..., Iterator[Frames]], added: Callable[..., Iterator[Frames]],
        head: Path, head_frames: int, info: ClipInfo, journal: SegmentStore | None = None,
    ) -> None:
        super().__init__(source, info, journal=journal)
        self.head, self.head_frames, self._added = head, head_frames, added

    def added(self) -> Clip:
        """Return the part after the file as a clip; its recipe counts the frames left out."""
        recipe = None if self.recipe is None else {**self.recipe, "head_frames": self.head_frames}
        begin = round(self.head_frames / self.info.fps * self.sound_rate)
        info = replace(self.info, num_frames=self.num_frames - self.head_frames, recipe=recipe,
                       sound=None if self.sound is None else self.sound[begin:])
        return Clip(self._added, info, journal=self.journal)

    def _write(
        self, name: str, overwrite: bool, on_frames: Callable[[int], None] | None,
        store: SegmentStore | None, marks: Mapping[str, str],
    ) -> Path:
        suffix = check_format(name, self.num_frames, self.info.fps)
        reason = self._why_not_copied(suffix, marks)
        if reason is not None:
            log.warning("%s: its frames are encoded again: %s", self.head, reason)
            return super()._write(name, overwrite, on_frames, store, marks)
        check_output(name, overwrite=overwrite, num_bytes=self.head.stat().st_size)
        checker, target, done = self._checker(), Path(name), store.num_frames if store else 0
        with VideoReader(self.head) as reader:
            for frame in reader:
                checker.feed(frame[None])
        info = replace(self._with_marks(marks), sound=None,
                       num_frames=self.num_frames - self.head_frames)
        # named as by `atomic_path`, so that the same sweep removes it after a kill
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
            stretches = [Stretch(self.head, 0, self.head_frames),
                         Stretch(part, 0, info.num_frames)]
            join_files(stretches, target, read_recipe(part), sound)
        finally:
            rmtree(folder, ignore_errors=True)
        return target

    def _why_not_copied(self, suffix: str, marks: Mapping[str, str]) -> str | None:
        if self._gets_label(marks):
            return "a label is burnt into the opening"
        if suffix not in CONTAINERS:
            return f"{'a folder' if suffix == '/' else suffix} can't hold copied packets"
        with TemporaryDirectory() as folder:
            try:
                sample = write_sample(Path(folder), suffix, self.info)
            except InputError as error:
                return str(error)
            places = parting_places(self.head, sample)
            return places if isinstance(places, str) else None
