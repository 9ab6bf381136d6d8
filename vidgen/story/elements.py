"""The elements of a script: camera, prompts, sounds, captions, scenes, settings.

The published JSON Schema describes each key by the text of its annotation.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from vidgen.core import values
from vidgen.core.config import ONE
from vidgen.core.errors import InputError, nearest
from vidgen.core.request import Saving
from vidgen.core.values import MAX_PROMPT, check_number

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
    """The camera's motion, which the model gets in words."""

    SHORT: ClassVar[str] = "move"

    move: Annotated[str, "one of the moves that scripts know"]
    strength: Annotated[float, "0 to 1; up to a third is slow, from two thirds on quick"] = 0.5

    def __post_init__(self) -> None:
        if self.move not in CAMERA_MOVES:
            raise InputError(f"camera move {self.move!r} is unknown; "
                             f"{nearest(self.move, CAMERA_MOVES)}")
        check_number("strength", self.strength, 0, 1)

    @property
    def words(self) -> str:
        """A sentence for the prompt."""
        is_moving = self.move not in ("static", "handheld")
        pace = " slowly" if self.strength <= 1 / 3 else " quickly" if self.strength >= 2 / 3 else ""
        return f"the camera {CAMERA_MOVES[self.move]}{pace if is_moving else ''}"


@dataclass(frozen=True, slots=True)
class TimedPrompt:
    """A prompt from a time on."""

    SHORT: ClassVar[str] = "prompt"

    prompt: Annotated[
        str, "the picture in words; `{name}` stands for a character's or place's description"]
    at: Annotated[float, "seconds from the shot's start"] = 0.0

    def __post_init__(self) -> None:
        check_text("prompt", self.prompt)
        check_number("at", self.at, 0, 3600)


@dataclass(frozen=True, slots=True)
class ShotFrame:
    """The first or last frame of another shot, as a picture."""

    shot: Annotated[str, "its id"]
    frame: Annotated[Literal["first", "last"], "which one"] = "last"


@dataclass(frozen=True, slots=True)
class Sound:
    """The sound of a shot."""

    SHORT: ClassVar[str] = "effects"

    effects: Annotated[str | None, "description of noises, for a model that makes sound"] = None
    file: Annotated[Path | None, "a sound or video file instead"] = None
    gain_db: Annotated[float, "louder above 0"] = 0.0
    loop: Annotated[bool, "whether a file that is shorter than the shot starts again"] = False

    def __post_init__(self) -> None:
        _one_of("sound", effects=self.effects, file=self.file)
        check_number("gain_db", self.gain_db, -60, 20)


@dataclass(frozen=True, slots=True)
class Narration:
    """A spoken text."""

    SHORT: ClassVar[str] = "text"

    text: Annotated[str, "the words; `@FILE` is speech in a file"]
    at: Annotated[
        float | None, "seconds from the shot's start; default after the previous narration"] = None
    voice: Annotated[str | None, "a voice of espeak-ng, such as en-gb"] = None
    speaker: Annotated[str | None, "the character who speaks; default a narrator"] = None

    def __post_init__(self) -> None:
        check_text("narration", self.text)
        check_number("at", self.at, 0, 3600)


@dataclass(frozen=True, slots=True)
class Music:
    """Music from here on, until the next one begins."""

    SHORT: ClassVar[str] = "file"

    file: Annotated[Path | None, "a sound or video file; `none` ends the music"] = None
    prompt: Annotated[str | None, "description instead, for a model that makes sound"] = None
    gain_db: Annotated[float, "louder above 0"] = 0.0
    loop: Annotated[bool, "whether a file that is too short starts again"] = True

    def __post_init__(self) -> None:
        _one_of("music", file=self.file, prompt=self.prompt)
        check_number("gain_db", self.gain_db, -60, 20)


@dataclass(frozen=True, slots=True)
class Caption:
    """Text in the picture or below it."""

    SHORT: ClassVar[str] = "text"

    text: Annotated[str, "the words"]
    at: Annotated[float, "seconds from the shot's start"] = 0.0
    duration: Annotated[float | None, "seconds; default to the shot's end"] = None

    def __post_init__(self) -> None:
        check_text("caption", self.text)
        check_number("at", self.at, 0, 3600)
        check_number("duration", self.duration, 0, 3600, above=True, unit="seconds")


@dataclass(frozen=True, slots=True)
class Transition:
    """The way from the previous shot to this one."""

    SHORT: ClassVar[str] = "type"

    type: Annotated[
        Literal["cut", "dissolve", "fade-black", "fade-white", "wipe-left", "wipe-right",
                "slide-left", "slide-right"], "kind of transition"] = "cut"
    duration: Annotated[float, "seconds; a cut has none"] = 0.5

    def __post_init__(self) -> None:
        check_number("duration", self.duration, 0, 60)


@dataclass(frozen=True, slots=True)
class Place:
    """The place of shots."""

    SHORT: ClassVar[str] = "description"

    description: Annotated[str, "text that replaces `{name}` in prompts"]
    reference: Annotated[
        tuple[Path, ...],
        "pictures, given to models that take references"] = field(default=(), metadata=ONE)

    def __post_init__(self) -> None:
        check_text("description", self.description)


@dataclass(frozen=True, slots=True)
class Character(Place):
    """Somebody or something that looks the same in several shots."""

    seed: Annotated[
        int | None, "of shots without their own in which it is the first character"] = None
    lora: Annotated[
        tuple[str, ...], "adapters that know it, each PATH[:WEIGHT], used where it appears"
    ] = field(default=(), metadata=ONE)
    voice: Annotated[str | None, "in which it speaks"] = None


@dataclass(frozen=True, slots=True)
class Scene:
    """Shots that belong together."""

    SHORT: ClassVar[str] = "title"

    title: Annotated[str | None, "for people, and for title cards"] = None
    place: Annotated[
        str | None, "id of a place, which `{place}` in its shots' prompts stands for"] = None
    style: Annotated[str | None, "added to its shots' prompts, before the film's"] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """Settings of a shot, or of all shots that have none of their own."""

    duration: Annotated[float | None, "seconds"] = None
    negative: Annotated[str | None, "words for what the picture must not show"] = None
    takes: Annotated[
        int | None, "number of versions, of seeds N, N+1, ...; the best is kept"] = None
    steps: Annotated[int | None, "denoising steps"] = None
    guidance: Annotated[float | None, "how strongly the prompt is followed"] = None
    sampler: Annotated[str | None, "name of a sampler"] = None
    shift: Annotated[float | None, "of the noise schedule"] = None
    camera: Annotated[Camera | None, "its motion"] = None
    transition: Annotated[Transition | None, "from the previous shot"] = None
    lora: Annotated[
        tuple[str, ...], "adapters, each PATH[:WEIGHT]"] = field(default=(), metadata=ONE)

    def __post_init__(self) -> None:
        check_number("takes", self.takes, 1, MAX_TAKES, whole=True)
        check_number("duration", self.duration, 0, 3600, above=True, unit="seconds")


@dataclass(frozen=True, slots=True)
class Finish:
    """Settings by which shots become one film."""

    codec: Annotated[
        str | None, "h264, h265, vp9, prores or ffv1; default that of the film's suffix"] = None
    captions: Annotated[
        Literal["track", "burn", "sidecar"],
        "as a track of the file, burnt into the picture, or only in files next to it"] = "track"
    titles: Annotated[bool, "whether the film's and the scenes' titles are burnt in"] = False
    font: Annotated[
        Path | None, "of burnt texts, a TrueType or OpenType file; default Pillow's own"] = None
    loudness: Annotated[float, "of the whole film, in LUFS"] = -16.0
    label: Annotated[
        Literal["none", "visible"],
        "visible: a label is burnt into the film's first 2 seconds"] = "none"
    aigc: Annotated[str | None, "producer in the file's AIGC field of GB 45438-2025"] = None
    ending: Annotated[
        Transition,
        "of the film: a cut, fade-black or fade-white"] = field(default_factory=Transition)

    def __post_init__(self) -> None:
        check_number("loudness", self.loudness, -40, -5)
        Saving(label=self.label, aigc=self.aigc)
        if self.ending.type not in ("cut", "fade-black", "fade-white"):
            raise InputError(f"ending is {self.ending.type!r}, which needs a shot after it; give "
                             "cut, fade-black or fade-white")


@dataclass(frozen=True, slots=True)
class Project:
    """Settings of the whole film."""

    title: Annotated[str | None, "of the film"] = None
    fps: Annotated[Fraction | None, "frames per second; default the model's"] = None
    size: Annotated[str | tuple[int, int] | None, "WIDTHxHEIGHT; default the model's"] = None
    seed: Annotated[int, "from which each shot's is drawn, by its id"] = 0
    style: Annotated[str | None, "added to every prompt"] = None
    model: Annotated[str, "name, folder or hub id"] = "toybox"
    dtype: Annotated[
        Literal["fp32", "bf16", "fp16"] | None,
        "fp32, bf16 or fp16; default the machine's best"] = None
    defaults: Annotated[
        Defaults,
        "settings of shots that have none of their own"] = field(default_factory=Defaults)
    finish: Annotated[
        Finish, "settings by which shots become one film"] = field(default_factory=Finish)


def check_text(name: str, text: str) -> None:
    """Raise InputError for a text that is empty, can't be written, or is longer than a prompt."""
    if not text.strip():
        raise InputError(f"the {name} is empty; give some words or leave it out")
    values.check_text(f"the {name}", text, MAX_PROMPT)


def _one_of(name: str, **given: object) -> None:
    if sum(value is not None for value in given.values()) != 1:
        raise InputError(f"{name} needs one of {' and '.join(given)}, and one alone")
