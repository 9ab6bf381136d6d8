"""A film's edit: everything decided before its shots are joined.

It needs only the shots' lengths, so errors are found before anything is rendered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidgen import __version__
from vidgen.core.config import dump
from vidgen.core.errors import InputError, located, nearest
from vidgen.core.runtime import sha256_file
from vidgen.core.store import address_of
from vidgen.media.join import Chapter
from vidgen.media.subtitles import Cue
from vidgen.media.types import PictureSettings
from vidgen.media.write import CONTAINERS
from vidgen.story.captions import Burner, as_frames, captions_of, titles_of
from vidgen.story.film import FilmPlan
from vidgen.story.mixdown import Narrated, check_sounds, file_facts, narrate
from vidgen.story.timeline import Measured, Timeline, lay_out

if TYPE_CHECKING:
    from vidgen.story.sounds import DescribedSound

EDIT_VERSION = 1
"""Version of the rules by which films are put together; another one makes every film again."""
Describe = Callable[[Timeline], "tuple[list[DescribedSound], Timeline]"]


# One frame thread and no look-back at other encoders: the bits then follow from the frames alone.
_X265 = {"crf": "18", "preset": "medium",
         "x265-params": "frame-threads=1:open-gop=0:info=0:log-level=error"}
CODECS = {
    "h264": (CONTAINERS[".mp4"].picture, (".mp4", ".mov", ".mkv")),
    "h265": (PictureSettings("libx265", "yuv420p", _X265), (".mp4", ".mov", ".mkv")),
    "vp9": (CONTAINERS[".webm"].picture, (".webm", ".mp4", ".mkv")),
    "prores": (PictureSettings("prores_ks", "yuv422p10le", {"profile": "hq"}), (".mov", ".mkv")),
    "ffv1": (CONTAINERS[".mkv"].picture, (".mkv",)),
}
"""Settings of each codec, and the suffixes of files that hold it."""


def picture_settings(name: str | None, output: str | Path) -> PictureSettings:
    """Return the picture settings of a codec; without a name, those of the output's suffix.

    Raises:
        InputError: an unknown codec, or a kind of file that can't hold it.
    """
    suffix = Path(output).suffix.lower()
    if name is None:
        return CONTAINERS[suffix].picture
    if name not in CODECS:
        raise InputError(f"codec {name!r} is unknown; {nearest(name, CODECS)}")
    picture, suffixes = CODECS[name]
    if suffix not in suffixes:
        raise InputError(f"output {output} can't hold codec {name!r}; give a name that ends in "
                         f"{', '.join(suffixes)}, or another codec")
    return picture


@dataclass(frozen=True)
class Edit:
    """A film with nothing left to decide."""

    film: FilmPlan
    output: Path
    timeline: Timeline
    picture: PictureSettings
    narrated: Narrated | None  # its speech, or None
    cues: tuple[Cue, ...]  # captions and speech as texts, in order
    tracked: tuple[Cue, ...]  # cues in the file's track of texts
    burner: Burner  # burns texts into the picture
    # sounds in words, made before the film is put together
    described: tuple[DescribedSound, ...] = ()

    @property
    def chapters(self) -> list[Chapter]:
        """Chapters: one for each run of a scene's shots, and for each shot without a scene."""
        made, scene = list[Chapter](), None
        for placed in self.timeline.shots:
            name = placed.shot.scene
            begin, end = (self.timeline.seconds(frame) for frame in (placed.start, placed.end))
            if made and name is not None and name == scene:
                made[-1] = replace(made[-1], end_s=end)
                continue
            title = placed.shot.id if name is None else (
                self.film.script.scenes[name].title or name)
            if made:
                made[-1] = replace(made[-1], end_s=begin)
            made.append(Chapter(title, begin, end))
            scene = name
        return made if len(made) > 1 else []

    def key(self, addresses: Sequence[str]) -> str:
        """Return the film's address, given those of its shots in order."""
        script, font = self.film.script, self.burner.font
        return address_of({
            "version": EDIT_VERSION, "vidgen": __version__, "suffix": self.output.suffix.lower(),
            "fps": str(self.film.fps), "size": self.film.size, "script": dump(script),
            "shots": list(addresses), "sounds": file_facts(self.timeline),
            "font": None if font is None else sha256_file(font),
            "voices": self.narrated.facts["voice"] if self.narrated else None})

    def facts(self) -> dict[str, Any]:
        """Return the length and the shots with their places, as JSON data."""
        timeline = self.timeline
        return {
            "num_frames": timeline.num_frames, "fps": str(timeline.fps),
            "duration_s": timeline.seconds(timeline.num_frames),
            "ideal_s": float(timeline.ideal_s),
            "shots": [{"id": each.shot.id, "start_s": timeline.seconds(each.start),
                       "end_s": timeline.seconds(each.end), "transition": each.transition.type,
                       "overlap_s": timeline.seconds(each.overlap)} for each in timeline.shots]}


def make_edit(
    film: FilmPlan, shots: Sequence[Measured], output: str | Path,
    describe: Describe | None = None,
) -> Edit:
    """Decide how shots, planned or rendered, in order, become a film.

    Without `describe`, which returns the sounds to be made of words, none are made.

    Raises:
        InputError: transitions, captions or texts that don't fit, a codec, font or sound that can't
            be used.
    """
    script, finish, target = film.script, film.script.project.finish, Path(output)
    with located(f"{script.path}: project.finish.codec"):
        picture = picture_settings(finish.codec, target)
    timeline = lay_out(script, shots, film.fps)
    described: list[DescribedSound] = []
    check_sounds(timeline)  # those that stand in words aren't made yet
    if describe is not None:
        described, timeline = describe(timeline)
    captions = captions_of(timeline)
    narrated = narrate(timeline)
    spoken = narrated.cues if narrated else []
    burnt = titles_of(timeline)
    tracked = {"track": [*captions, *spoken], "burn": spoken, "sidecar": []}[finish.captions]
    if finish.captions == "burn":
        burnt += as_frames(captions, timeline)
    font = None if finish.font is None else script.file(finish.font)
    with located(f"{script.path}: texts"):
        burner = Burner(burnt, film.size, font)
    burner.check_room(timeline)
    return Edit(film, target, timeline, picture, narrated, _ordered([*captions, *spoken]),
                _ordered(tracked), burner, tuple(described))


def _ordered(cues: Sequence[Cue]) -> tuple[Cue, ...]:
    return tuple(sorted(cues, key=lambda cue: (cue.start_s, cue.end_s)))
