"""A clip: frames generated or read on demand, with sound, frame rate and recipe."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from fractions import Fraction
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from vidgen.core.errors import InputError
from vidgen.core.request import Saving
from vidgen.media.read import load_image, pictures_in
from vidgen.media.types import ClipInfo, Frames, Samples, SegmentStore

if TYPE_CHECKING:
    from torch import Tensor

    from vidgen.media.checks import ClipChecker, Finding

_CHUNK = 8


class Clip:
    """A lazy clip: `save()` and `chunks()` stream it; only `frames` holds all pixels.

    Args:
        source: returns a new iterator of chunks uint8 [t, H, W, 3] at each call; with a `journal`
            it takes the index of the first frame.
        latents: [1, C, F, h, w] from which the clip was decoded, or None.
        journal: finished segments, from which saving to the journal's output resumes.
    """

    def __init__(
        self, source: Callable[..., Iterator[Frames]], info: ClipInfo,
        latents: Tensor | None = None, journal: SegmentStore | None = None,
    ) -> None:
        self._source, self.info, self.latents = source, info, latents
        self.journal = journal
        self.first_frame: Frames | None = None  # expected first frame, for the checks
        self.findings: list[Finding] | None = None  # of the checks, after `save`

    def __repr__(self) -> str:
        info, (width, height) = self.info, self.info.size
        return (f"<Clip of {info.num_frames} frames, {width}x{height} at {float(info.fps):g} fps"
                f"{'' if info.sound is None else ', with sound'}>")

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Clip:
        """Open a video file or a folder of PNGs; count its frames by decoding, read them on demand.

        A folder has the frame rate of its recipe, or 25.

        Raises:
            InputError: missing, no video, or damaged.
        """
        from vidgen.media.checks import recorded
        from vidgen.media.probe import read_recipe
        from vidgen.media.sound import read_sound
        from vidgen.media.video_reader import VideoReader

        if Path(path).is_dir():
            return cls._from_folder(Path(path))
        with VideoReader(path) as reader:
            fps, size, num_frames = reader.fps, reader.size, sum(1 for _ in reader)
        sound = read_sound(path)
        samples, rate = sound if sound else (None, 48_000)
        info = ClipInfo(fps, size, num_frames, samples, rate, read_recipe(path))

        def chunks() -> Iterator[Frames]:
            with VideoReader(path) as reader:
                frames = iter(reader)
                while part := list(islice(frames, _CHUNK)):
                    yield np.stack(part)

        clip = cls(chunks, info)
        clip.findings = recorded(info.recipe)
        return clip

    @classmethod
    def _from_folder(cls, folder: Path) -> Clip:
        from vidgen.media.checks import recorded
        from vidgen.media.probe import read_recipe, recipe_rate

        files, recipe = pictures_in(folder), read_recipe(folder)
        fps = recipe_rate(recipe) or Fraction(25)
        height, width, _ = load_image(files[0])[0].shape
        info = ClipInfo(fps, (width, height), len(files), recipe=recipe)
        clip = cls(lambda: (load_image(file)[0][None] for file in files), info)
        clip.findings = recorded(recipe)
        return clip

    @property
    def fps(self) -> Fraction:
        """Exact frame rate."""
        return self.info.fps

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.info.size

    @property
    def num_frames(self) -> int:
        """Number of frames."""
        return self.info.num_frames

    @property
    def sound(self) -> Samples | None:
        """Sound, float32 [N, channels] at `sound_rate`, or None."""
        return self.info.sound

    @property
    def sound_rate(self) -> int:
        """Samples of sound per second."""
        return self.info.sound_rate

    @property
    def captions(self) -> list[dict[str, Any]]:
        """Spoken sentences, each with `text`, `start_s` and `end_s`."""
        sound = (self.recipe or {}).get("sound")
        speech = sound.get("speech") if isinstance(sound, dict) else None
        return list(speech.get("sentences", ())) if isinstance(speech, dict) else []

    @property
    def recipe(self) -> dict[str, Any] | None:
        """JSON data that reproduces the clip, or None if unknown."""
        return self.info.recipe

    def chunks(self) -> Iterator[Frames]:
        """Yield the frames in chunks uint8 [t, H, W, 3] of any t."""
        return self._source()

    @cached_property
    def frames(self) -> Frames:
        """All frames, uint8 [T, H, W, 3]."""
        return np.concatenate([np.asarray(chunk) for chunk in self.chunks()])

    def save(
        self, path: str | os.PathLike[str], *, overwrite: bool = False,
        label: Literal["none", "visible"] = "none", aigc: str | None = None,
        on_frames: Callable[[int], None] | None = None,
    ) -> Path:
        """Write the clip to a file in the format of its suffix, as `write_clip` does.

        `findings` then lists possible faults.

        Args:
            label: "visible" burns a label into the first 2 seconds.
            aigc: producer in the AIGC field of GB 45438-2025.

        Raises:
            InputError: unknown suffix, too many frames for it, or marks other than its journal's.
            OutputError: the file exists, can't be written, or the disk is full.
        """
        name, store = os.fspath(path), self.journal
        marks: Mapping[str, str] = Saving(label=label, aigc=aigc).marks
        if store is None or store.output != Path(path):
            return self._write(name, overwrite, on_frames, None, marks)
        if marks and marks != store.marks:
            raise InputError(f"{marks} differs from the marks of the clip's journal, "
                             f"{dict(store.marks)}; give label and aigc to the journal")
        try:
            written = self._write(name, overwrite, on_frames, store, store.marks)
        except BaseException:
            store.pause()
            raise
        store.close()
        return written

    def _write(
        self, name: str, overwrite: bool, on_frames: Callable[[int], None] | None,
        store: SegmentStore | None, marks: Mapping[str, str],
    ) -> Path:
        from vidgen.media.write import write_clip

        checker = self._checker()
        chunks, info = self.marked(marks, store.num_frames if store else 0)
        written = write_clip(name, chunks, info, overwrite=overwrite, on_frames=on_frames,
                             store=store, checker=checker)
        self.findings = checker.findings
        return written

    def marked(
        self, marks: Mapping[str, str], start: int = 0
    ) -> tuple[Iterator[Frames], ClipInfo]:
        """Return the chunks from frame `start` on and the description, with marks applied."""
        from vidgen.media.label import labelled

        if "frames" in self.__dict__:
            chunks = iter([self.frames[start:]])
        else:
            chunks = self._source(start) if start else self._source()
        if self._gets_label(marks):
            chunks = labelled(chunks, self.size, self.fps, start=start)
        return chunks, self._with_marks(marks)

    def _with_marks(self, marks: Mapping[str, str]) -> ClipInfo:
        recipe = None if self.recipe is None else {**self.recipe, **marks}
        return replace(self.info, recipe=recipe)

    def _gets_label(self, marks: Mapping[str, str]) -> bool:
        """Return whether to burn in a label: not if the opening has one already or is left out."""
        recipe = self.recipe or {}
        is_opening = "head_frames" not in recipe
        return marks.get("label") == "visible" != recipe.get("label") and is_opening

    def _checker(self) -> ClipChecker:
        from vidgen.media.checks import ClipChecker

        return ClipChecker(self.info, self.first_frame)


