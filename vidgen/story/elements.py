"""The parts of a script, as a person writes them.

Docstrings describe the keys; the published JSON Schema is made of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import ClassVar, Literal

from vidgen.core import values
from vidgen.core.config import ONE, called
from vidgen.core.errors import InputError, nearest
from vidgen.core.values import MAX_PROMPT

CAMERA_MOVES = {
    "static": "stays still", "pan-left": "pans left", "pan-right": "pans right",
    "tilt-up": "pans up", "tilt-down": "pans down", "zoom-in": "zooms in", "zoom-out": "zooms out",
    "dolly-in": "moves closer", "dolly-out": "moves back", "truck-left": "moves to the left",
    "truck-right": "moves to the right", "orbit-left": "orbits to the left",
    "orbit-right": "orbits to the right", "handheld": "is handheld",
}
"""Moves, and their words in a prompt."""
MAX_TAKES = 100


@dataclass(frozen=True, slots=True)
class Camera:
    """The camera's motion, which the model gets in words.

    Attributes:
        move: one of the moves that scripts know.
        strength: 0 to 1; up to a third is slow, from two thirds on quick.
    """

    SHORT: ClassVar[str] = "move"

    move: str
    strength: float = 0.5

    def __post_init__(self) -> None:
        if self.move not in CAMERA_MOVES:
            raise InputError(f"camera move {self.move!r} is unknown; "
                             f"{nearest(self.move, CAMERA_MOVES)}")
        check_within("strength", self.strength, 0, 1)

    @property
    def words(self) -> str:
        """A sentence for the prompt."""
        is_moving = self.move not in ("static", "handheld")
        pace = " slowly" if self.strength <= 1 / 3 else " quickly" if self.strength >= 2 / 3 else ""
        return f"the camera {CAMERA_MOVES[self.move]}{pace if is_moving else ''}"


@dataclass(frozen=True, slots=True)
class TimedPrompt:
    """A prompt from a time on.

    Attributes:
        prompt: the picture in words; `{name}` stands for a character's or place's description.
        at: seconds from the shot's start.
    """

    SHORT: ClassVar[str] = "prompt"

    prompt: str
    at: float = 0.0

    def __post_init__(self) -> None:
        check_text("prompt", self.prompt)
        check_within("at", self.at, 0, 3600)


@dataclass(frozen=True, slots=True)
class ShotFrame:
    """The first or last frame of another shot, as a picture.

    Attributes:
        shot: its id.
        frame: which one.
    """

    shot: str
    frame: Literal["first", "last"] = "last"


@dataclass(frozen=True, slots=True)
class Sound:
    """The sound of a shot.

    Attributes:
        effects: description of noises, for a model that makes sound.
        file: a sound or video file instead.
        gain_db: louder above 0.
        loop: whether a file that is shorter than the shot starts again.
    """

    SHORT: ClassVar[str] = "effects"

    effects: str | None = None
    file: Path | None = None
    gain_db: float = 0.0
    loop: bool = False

    def __post_init__(self) -> None:
        _one_of("sound", effects=self.effects, file=self.file)
        check_within("gain_db", self.gain_db, -60, 20)


@dataclass(frozen=True, slots=True)
class Narration:
    """A spoken text.

    Attributes:
        text: the words; `@FILE` is speech in a file.
        at: seconds from the shot's start; default after the previous narration.
        voice: one of espeak-ng's, or the file of a Kokoro voice.
        speaker: the character who speaks; default a narrator.
    """

    SHORT: ClassVar[str] = "text"

    text: str
    at: float | None = None
    voice: str | None = None
    speaker: str | None = None

    def __post_init__(self) -> None:
        check_text("narration", self.text)
        check_within("at", self.at, 0, 3600)


@dataclass(frozen=True, slots=True)
class Music:
    """Music from here on, until the next one begins.

    Attributes:
        file: a sound or video file; `none` ends the music.
        prompt: description instead, for a model that makes sound.
        gain_db: louder above 0.
        loop: whether a file that is too short starts again.
    """

    SHORT: ClassVar[str] = "file"

    file: Path | None = None
    prompt: str | None = None
    gain_db: float = 0.0
    loop: bool = True

    def __post_init__(self) -> None:
        _one_of("music", file=self.file, prompt=self.prompt)
        check_within("gain_db", self.gain_db, -60, 20)


@dataclass(frozen=True, slots=True)
class Caption:
    """Text in the picture or below it.

    Attributes:
        text: the words.
        at: seconds from the shot's start.
        duration: seconds; default to the shot's end.
    """

    SHORT: ClassVar[str] = "text"

    text: str
    at: float = 0.0
    duration: float | None = field(default=None, metadata=called("seconds"))

    def __post_init__(self) -> None:
        check_text("caption", self.text)
        check_within("at", self.at, 0, 3600)
        check_above_zero("duration", self.duration, 3600)


@dataclass(frozen=True, slots=True)
class Transition:
    """The way from the previous shot to this one.

    Attributes:
        type: of transition.
        duration: seconds; a cut has none.
    """

    SHORT: ClassVar[str] = "type"

    type: Literal["cut", "dissolve", "fade-black", "fade-white", "wipe-left", "wipe-right",
                  "slide-left", "slide-right"] = "cut"
    duration: float = field(default=0.5, metadata=called("seconds"))

    def __post_init__(self) -> None:
        check_within("duration", self.duration, 0, 60)


@dataclass(frozen=True, slots=True)
class Character:
    """Somebody or something that looks the same in several shots.

    Attributes:
        description: text that replaces `{name}` in prompts.
        reference: pictures, given to models that take references.
        seed: of shots without their own in which it is the first character.
        lora: adapters that know it, each PATH[:WEIGHT], used in shots in which it appears.
        voice: in which it speaks.
    """

    SHORT: ClassVar[str] = "description"

    description: str
    reference: tuple[Path, ...] = field(default=(), metadata=ONE)
    seed: int | None = None
    lora: tuple[str, ...] = field(default=(), metadata=ONE)
    voice: str | None = None

    def __post_init__(self) -> None:
        check_text("description", self.description)


@dataclass(frozen=True, slots=True)
class Place:
    """The place of shots.

    Attributes:
        description: text that replaces `{name}` in prompts.
        reference: pictures, given to models that take references.
    """

    SHORT: ClassVar[str] = "description"

    description: str
    reference: tuple[Path, ...] = field(default=(), metadata=ONE)

    def __post_init__(self) -> None:
        check_text("description", self.description)


@dataclass(frozen=True, slots=True)
class Scene:
    """Shots that belong together.

    Attributes:
        title: for people, and for title cards.
        place: id of a place, which `{place}` in its shots' prompts stands for.
        style: added to its shots' prompts, before the film's.
        match_colour: whether its shots are matched in colour.
    """

    SHORT: ClassVar[str] = "title"

    title: str | None = None
    place: str | None = None
    style: str | None = None
    match_colour: bool = True


@dataclass(frozen=True, slots=True)
class Defaults:
    """Settings of shots that have none of their own.

    Attributes:
        duration: seconds.
        negative: words for what pictures must not show.
        takes: number of versions of each shot.
        steps: denoising steps.
        guidance: how strongly the prompt is followed.
        sampler: name of a sampler.
        shift: of the noise schedule.
        camera: its motion.
        transition: from each shot to the next.
        lora: adapters.
    """

    duration: float | None = field(default=None, metadata=called("seconds"))
    negative: str | None = None
    takes: int | None = None
    steps: int | None = None
    guidance: float | None = None
    sampler: str | None = None
    shift: float | None = None
    camera: Camera | None = None
    transition: Transition | None = None
    lora: tuple[str, ...] = field(default=(), metadata=ONE)

    def __post_init__(self) -> None:
        check_takes(self.takes)
        check_above_zero("duration", self.duration, 3600)


@dataclass(frozen=True, slots=True)
class Finish:
    """Settings by which shots become one film.

    Attributes:
        codec: h264, h265, vp9, prores or ffv1; default that of the film's suffix.
        fit: for shots of another aspect: cut what sticks out, or keep all in a frame.
        rate: for shots of another rate: repeat and drop frames, or follow the flow.
        match_colour: whether shots of a scene are matched in colour.
        captions: as a track of the file, burnt into the picture, or only in files next to it.
        titles: whether the film's and the scenes' titles are burnt in.
        font: of burnt texts, a TrueType or OpenType file; default Pillow's own.
        loudness: of the whole film, in LUFS.
        ending: of the film: a cut, fade-black or fade-white.
    """

    codec: str | None = None
    fit: Literal["crop", "pad"] = "crop"
    rate: Literal["repeat", "flow"] = "repeat"
    match_colour: bool = True
    captions: Literal["track", "burn", "beside"] = "track"
    titles: bool = False
    font: Path | None = None
    loudness: float = -16.0
    ending: Transition = field(default_factory=Transition)

    def __post_init__(self) -> None:
        check_within("loudness", self.loudness, -40, -5)
        if self.ending.type not in ("cut", "fade-black", "fade-white"):
            raise InputError(f"ending is {self.ending.type!r}, which needs a shot behind it; give "
                             "cut, fade-black or fade-white")


@dataclass(frozen=True, slots=True)
class Draft:
    """Origin of a drafted script.

    Attributes:
        idea: as a person wrote it.
        model: the language model that drafted it.
        sha256: of the model's files.
    """

    idea: str
    model: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Project:
    """Settings of the whole film.

    Attributes:
        title: of the film.
        fps: frames per second; default the model's.
        size: WIDTHxHEIGHT; default the model's.
        seed: from which each shot's is drawn, by its id.
        style: added to every prompt.
        model: name, folder or hub id.
        dtype: fp32, bf16 or fp16; default the machine's best.
        defaults: settings of shots that have none of their own.
        finish: settings by which shots become one film.
        drafted_from: origin of a script that a language model drafted.
    """

    title: str | None = None
    fps: Fraction | None = None
    size: str | tuple[int, int] | None = None
    seed: int = 0
    style: str | None = None
    model: str = "toybox"
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    defaults: Defaults = field(default_factory=Defaults)
    finish: Finish = field(default_factory=Finish)
    drafted_from: Draft | None = None


def check_text(name: str, text: str) -> None:
    """Raise InputError for a text that is empty, can't be written, or is longer than a prompt."""
    if not text.strip():
        raise InputError(f"the {name} is empty; give some words or leave it out")
    values.check_text(f"the {name}", text, MAX_PROMPT)


def _one_of(name: str, **given: object) -> None:
    if sum(value is not None for value in given.values()) != 1:
        raise InputError(f"{name} needs one of {' and '.join(given)}, and one alone")


def check_within(name: str, value: float | None, low: float, high: float) -> None:
    """Raise InputError for a number out of its range."""
    if value is not None and not low <= value <= high:
        raise InputError(f"{name} is {value:g}; give a number from {low} to {high}")


def check_takes(takes: int | None) -> None:
    """Raise InputError for a number of takes out of its range."""
    if takes is not None and not 1 <= takes <= MAX_TAKES:
        raise InputError(f"takes is {takes}; give a whole number from 1 to {MAX_TAKES}")


def check_above_zero(name: str, value: float | None, high: float) -> None:
    """Raise InputError for seconds that are 0, negative, or too many."""
    if value is not None and not 0 < value <= high:
        raise InputError(f"{name} is {value:g}; give seconds above 0, {high} at most")
