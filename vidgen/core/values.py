"""Values of a request as people give them: numbers, pairs, pictures, read one by one and judged."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from fractions import Fraction
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from vidgen.core.errors import InputError, nearest

if TYPE_CHECKING:
    import numpy as np

    Picture: TypeAlias = str | os.PathLike[str] | np.ndarray[Any, Any]

Fit = Literal["crop", "pad"]
"""Treatment of a picture of another aspect: cut what sticks out, or keep all in a frame."""
_TILES = re.compile(r"auto|none|[1-9]\d?x[1-9]\d?")
_ORIENTATION = 0x0112
"""EXIF's tag of it; 1 is upright."""
_CACHES = ("none", "first-block", "magnitude", "forecast")


def plain(value: Any) -> Any:
    """A number as Python's own, whatever library it is of; all else as it is."""
    if isinstance(value, bool | Fraction) or type(value) in (int, float):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    is_flag = type(value).__name__ in ("bool", "bool_") and hasattr(value, "item")
    return bool(value) if is_flag else value


def check_flag(name: str, value: Any) -> None:
    """Refuse what is neither true nor false; any text would count as true."""
    if not isinstance(value, bool | None):
        raise InputError(f"{name} is {value!r}; give True or False")


def check_text(name: str, text: Any, limit: int) -> None:
    """Refuse what is no text, too long, or holds what no file can be written with."""
    if not isinstance(text, str | None):
        raise InputError(f"{name} must be text, not {text!r}")
    if text and len(text) > limit:
        raise InputError(f"{name} has {len(text)} characters; shorten it to {limit}")
    broken = next((c for c in text or "" if "\ud800" <= c <= "\udfff"), None)
    if broken is not None:
        raise InputError(f"{name} holds {broken!r}, half of a character; leave it out")


def check_picture(name: str, value: Any, *, array: bool = True) -> None:
    """Refuse what is neither a file's path nor, where that is taken, an array of pixels."""
    if value is None or isinstance(value, str | os.PathLike) or (array and _is_array(value)):
        return
    what = type(value).__name__
    if not array:
        raise InputError(f"{name} is of type {what}; give a file's path")
    raise InputError(f"{name} is of type {what}; give a file's path, a picture of Pillow, or uint8 "
                     "[H, W, 3]")


def plain_picture(value: Any) -> Any:
    """A Pillow image as uint8 [H, W, 3]; all else as it is.

    Raises:
        InputError: one whose colours or orientation would have to be interpreted.
    """
    if not (type(value).__module__.startswith("PIL.") and hasattr(value, "getexif")):
        return value
    if value.mode not in ("RGB", "L", "1"):
        raise InputError(f"a picture of Pillow has the mode {value.mode}; give picture.convert"
                         "('RGB'), laid over a colour before where it is transparent, or its file")
    if value.getexif().get(_ORIENTATION, 1) != 1:
        raise InputError("a picture of Pillow lies on its side by its EXIF data; give "
                         "PIL.ImageOps.exif_transpose(picture), or its file")
    import numpy as np

    return np.asarray(value.convert("RGB"))


def check_sampler(value: Any) -> None:
    """Refuse what is neither a name nor a scheduler's object."""
    is_scheduler = hasattr(value, "set_timesteps") and hasattr(value, "step")
    if not (value is None or isinstance(value, str) or is_scheduler):
        raise InputError(f"sampler is {value!r}; give a name, or one of diffusers' flow schedulers")


def _is_array(value: Any) -> bool:
    return type(value).__module__ == "numpy" and type(value).__name__ == "ndarray"


def check_whole(name: str, value: Any, low: int, high: int) -> None:
    """Refuse what is no whole number of a span, ends included; None is none."""
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if value is not None and not (is_whole and low <= value <= high):
        raise InputError(f"{name} is {value!r}; give a whole number from {low} to {high}")


def check_number(name: str, value: Any, low: float, high: float, above: bool = False) -> None:
    """Refuse what is no number of a span, with `above` without its lower end; None is none."""
    is_number = isinstance(value, int | float | Fraction) and not isinstance(value, bool)
    if value is None or (is_number and low <= value <= high and not (above and value == low)):
        return
    shown = str(value) if isinstance(value, Fraction) else repr(value)
    span = f"above {low}, {high} at most" if above else f"from {low} to {high}"
    raise InputError(f"{name} is {shown}; give a number {span}")


def check_tiles(value: Any) -> None:
    """Refuse what is neither a word for tiles nor their rows and columns."""
    if not _TILES.fullmatch(str(value)):
        raise InputError(f"tiles is {value!r}; give auto, none, or rows and columns from 1 to 99, "
                         "such as 2x3")


def check_cache(value: Any) -> None:
    """Refuse an unknown step cache, or a threshold that it can't have."""
    method, colon, threshold = str(value).partition(":")
    if method not in _CACHES:
        raise InputError(f"cache is {value!r}; {nearest(method, _CACHES)}")
    if colon:
        try:
            number = float(threshold)
        except ValueError:
            number = math.nan
        if method == "none" or not 0 <= number <= 100:
            raise InputError(f"cache is {value!r}; behind the colon comes a threshold from 0 to "
                             "100, such as forecast:0.1")


def parse_readings(value: Any) -> dict[str, str] | None:
    """Parse "bicylce=bicycle,taxi=car": what words are read as, in lower case; None is "auto".

    Raises:
        InputError: neither auto, none nor such pairs.
    """
    if value in ("auto", "none"):
        return None if value == "auto" else {}
    pairs = [[side.strip().lower() for side in pair.split("=")] for pair in str(value).split(",")]
    if not all(len(pair) == 2 and all(pair) and " " not in pair[0] for pair in pairs):
        raise InputError(f"readings is {value!r}; give auto, none, or words and what they are read "
                         "as, such as bicylce=bicycle,taxi=car")
    return dict(pairs)


def parse_fps(value: Any) -> Fraction:
    """A frame rate, exact: a number, or text such as "24000/1001".

    Raises:
        InputError: neither.
    """
    try:
        value = plain(value)
        if isinstance(value, bool):
            raise ValueError
        if isinstance(value, float) or (isinstance(value, str) and "." in value):
            # 23.976 and 29.97 mean the broadcast rates n * 1000 / 1001.
            number = float(value)
            broadcast = Fraction(round(number) * 1000, 1001)
            exact = Fraction(number).limit_denominator(1001)
            return broadcast if abs(number - broadcast) < 1e-3 else exact
        return Fraction(value)
    except (ValueError, TypeError, OverflowError, ZeroDivisionError):
        raise InputError(f"fps is {value!r}; give a number or one such as 24000/1001") from None


def parse_size(value: Any) -> tuple[int, int]:
    """(width, height) of such a pair, or of text such as "832x480".

    Raises:
        InputError: neither.
    """
    if isinstance(value, str):
        match = re.fullmatch(r"(\d{1,9})[xX×](\d{1,9})", value.strip())
        if match:
            return int(match[1]), int(match[2])
    elif isinstance(value, Iterable):
        sides = tuple(map(plain, value))
        if len(sides) == 2:
            return sides
    raise InputError(f"size is {value!r}; give width and height in pixels, such as 128x96")


def parse_interval(value: Any) -> tuple[float, float]:
    """Two levels of noise, the lower first.

    Raises:
        InputError: not that.
    """
    ends = tuple(map(plain, value)) if isinstance(value, Iterable) else (value,)
    is_pair = len(ends) == 2 and all(isinstance(end, int | float) for end in ends)
    if not (is_pair and 0 <= ends[0] < ends[1] <= 1):
        raise InputError(f"guidance_interval is {value!r}; give two rising numbers from 0 to 1")
    return float(ends[0]), float(ends[1])


def parse_frames(value: Any) -> tuple[tuple[float, Picture], ...]:
    """Pictures with the seconds at which they are to be seen.

    Raises:
        InputError: other than such pairs.
    """
    for pair in _listed("frame", value, "pairs (seconds, picture)"):
        if not (isinstance(pair, tuple | list) and len(pair) == 2):
            raise InputError(f"frame holds {_shown(pair)}; give pairs (seconds, picture)")
        check_picture("frame", plain_picture(pair[1]))
    return tuple((plain(seconds), plain_picture(picture)) for seconds, picture in value)


def parse_said(value: Any) -> tuple[tuple[float | None, str], ...]:
    """Texts to speak, each with its time or without, or one alone.

    Raises:
        InputError: other than that.
    """
    pairs = []
    what = "texts or pairs (seconds, text)"
    for each in (value,) if isinstance(value, str) else _listed("say", value, what):
        if isinstance(each, str):
            pairs.append((None, each))
        elif isinstance(each, tuple | list) and len(each) == 2:
            pairs.append((plain(each[0]), each[1]))
        else:
            raise InputError(f"say holds {each!r}; give {what}")
    return tuple(pairs)


def parse_settings(value: Any) -> dict[str, int | float | bool]:
    """Settings of a model by name: a mapping, or texts KEY=VALUE; None leaves one out.

    Raises:
        InputError: other than that, or a value that is neither a number nor true or false.
    """
    pairs = list(value.items()) if isinstance(value, Mapping) else []
    if not isinstance(value, Mapping):
        for text in (value,) if isinstance(value, str) else _listed("settings", value, "KEY=VALUE"):
            key, equals, given = text.partition("=") if isinstance(text, str) else ("", "", "")
            if not (key and equals and given):
                raise InputError(f"settings holds {_shown(text)}; give KEY=VALUE, a number, true "
                                 "or false")
            pairs.append((key.replace("-", "_"), given))
    settings = {}
    for name, given in pairs:
        if not isinstance(name, str):
            raise InputError(f"settings names {_shown(name)}; give a setting's name as text")
        number = plain(_number(given) if isinstance(given, str) else given)
        if not isinstance(number, int | float | None):
            raise InputError(f"{name} is {_shown(given)}; give a number, true or false")
        if number is not None:
            settings[name] = number
    return settings


def _number(text: str) -> Any:
    """A number, true or false in words; other text as it is."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def parse_pictures(value: Any) -> tuple[Picture, ...]:
    """Several pictures, or one alone.

    Raises:
        InputError: other than paths and arrays.
    """
    value = plain_picture(value)
    one = isinstance(value, str | os.PathLike) or _is_array(value)
    listed = (value,) if one else _listed("reference", value, "pictures")
    pictures = tuple(map(plain_picture, listed))
    for picture in pictures:
        check_picture("reference", picture)
    return pictures


def parse_loras(value: Any) -> tuple[str, ...]:
    """Several adapters, or one alone.

    Raises:
        InputError: other than texts and paths.
    """
    one = isinstance(value, str | os.PathLike)
    loras = (value,) if one else tuple(_listed("lora", value, "PATH or PATH:WEIGHT"))
    for each in loras:
        if not isinstance(each, str | os.PathLike):
            raise InputError(f"lora holds {each!r}; give PATH or PATH:WEIGHT")
    return loras


def _listed(name: str, value: Any, what: str) -> Iterable[Any]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise InputError(f"{name} is {_shown(value)}; give a list of {what}")
    return value


def _shown(value: Any) -> str:
    """A value in a message; of pixels only what they are."""
    text = repr(value)
    return text if len(text) <= 80 else f"of type {type(value).__name__}"
