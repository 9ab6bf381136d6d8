"""Parse and check the values of a request: numbers, pairs, pictures.

Functions raise InputError, with the value and the remedy, for anything invalid.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from fractions import Fraction
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from vidgen.core.errors import InputError, OptionError, nearest, quoted

if TYPE_CHECKING:
    import numpy as np
    from pydantic import ValidationInfo

File: TypeAlias = str | os.PathLike[str]
Picture: TypeAlias = "File | np.ndarray[Any, Any]"
Fit = Literal["crop", "pad"]
"""Treatment of a picture of another aspect ratio: crop it, or pad it with borders."""
Attention = Literal["auto", "reference", "native", "blocked", "sdpa", "xformers"]
"""Back ends of attention; see `vidgen.ops.attention`."""
_SURROGATE = re.compile("[\ud800-\udfff]")
_TILES = re.compile(r"auto|none|[1-9]\d?x[1-9]\d?")
_ORIENTATION = 0x0112
"""EXIF tag of the orientation; 1 is upright."""
MIN_SIDE, MAX_SIDE = 16, 8192
"""Limits of a clip's width and height, in pixels."""
MAX_PROMPT = 20_000
"""Characters of a prompt, or of one spoken text."""
_CACHES = ("none", "first-block", "magnitude", "forecast")


def plain(value: Any) -> Any:
    """Convert a number of another library, such as NumPy, to Python's; return others unchanged."""
    if isinstance(value, bool | Fraction) or type(value) in (int, float):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    is_flag = type(value).__name__ in ("bool", "bool_") and hasattr(value, "item")
    return bool(value) if is_flag else value


def check_text(name: str, text: Any, limit: int) -> None:
    """Raise OptionError unless `text` is None or text of at most `limit` characters, in UTF-8."""
    if not isinstance(text, str | None):
        raise OptionError(f"{name} must be text, not {quoted(text)}", name)
    if text and len(text) > limit:
        raise OptionError(f"{name} has {len(text)} characters; shorten it to {limit}", name)
    if text and _SURROGATE.search(text):
        raise OptionError(broken_text(name, text), name)


def broken_text(name: str, text: str) -> str:
    """Return the message for a text that can't be encoded as UTF-8."""
    found = _SURROGATE.search(text)
    assert found is not None
    return f"{name} contains {found[0]!r}, half of a character; remove it"


def parse_picture(value: Any, info: ValidationInfo) -> Picture | None:
    """Return a file's path or pixels; a Pillow image becomes uint8 [H, W, 3]."""
    return None if value is None else _picture(str(info.field_name), value)


def parse_file(value: Any, info: ValidationInfo) -> File | None:
    """Return a file's path; raise InputError for other types."""
    check_file(str(info.field_name), value)
    return value  # type: ignore[no-any-return]


def parse_audio(value: Any) -> File | None:
    """Return "none", "generate" or a file's path; raise InputError for other types."""
    check_file("audio", value, "none, generate or the path of a file")
    return value  # type: ignore[no-any-return]


def check_file(name: str, value: Any, wanted: str = "the path of a file") -> None:
    """Raise InputError unless `value` is a path or None."""
    if not isinstance(value, str | os.PathLike | None):
        raise InputError(f"{name} is of type {type(value).__name__}; give {wanted}")


def _picture(name: str, value: Any) -> Picture:
    pixels: Picture = _pixels(value)
    if isinstance(pixels, str | os.PathLike) or _is_array(pixels):
        return pixels
    raise InputError(f"{name} is of type {type(value).__name__}; give the path of a file, a Pillow "
                     "image, or a uint8 array [H, W, 3]")


def _pixels(value: Any) -> Any:
    """Convert a Pillow image to uint8 [H, W, 3]; return anything else unchanged.

    Raises:
        InputError: an image with transparency, another mode, or an EXIF rotation.
    """
    if not (type(value).__module__.startswith("PIL.") and hasattr(value, "getexif")):
        return value
    if value.mode not in ("RGB", "L", "1"):
        raise InputError(f"a Pillow image has the mode {value.mode}; give image.convert('RGB'), "
                         "pasted onto a background first if it is transparent, or its file")
    if value.getexif().get(_ORIENTATION, 1) != 1:
        raise InputError("a Pillow image is rotated by its EXIF data; give "
                         "PIL.ImageOps.exif_transpose(image), or its file")
    import numpy as np

    return np.asarray(value.convert("RGB"))


def check_sampler(value: Any) -> Any:
    """Return a sampler's name or a diffusers scheduler; raise InputError for anything else."""
    is_scheduler = hasattr(value, "set_timesteps") and hasattr(value, "step")
    if not (value is None or isinstance(value, str) or is_scheduler):
        raise InputError(f"sampler is {quoted(value)}; give a name, or one of diffusers' flow "
                         "schedulers")
    return value


def _is_array(value: Any) -> bool:
    return type(value).__module__ == "numpy" and type(value).__name__ == "ndarray"


def check_number(
    name: str, value: Any, low: float = 0, high: float = math.inf, *, above: bool = False,
    whole: bool = False, infinite: bool = False, unit: str = "a number",
) -> None:
    """Raise OptionError unless `value` is None or a number from `low` to `high`.

    Args:
        above: exclude `low` itself.
        infinite: accept infinity.
        whole: accept only whole numbers.
        unit: noun for the expected value in the message.
    """
    kinds = int if whole else (int, float, Fraction)
    is_number = isinstance(value, kinds) and not isinstance(value, bool)
    if value is None or (is_number and low <= value <= high
                         and (infinite or value != math.inf) and not (above and value == low)):
        return
    least, most = _number_text(low), _number_text(high)
    span = f"above {least}" if above else f"of at least {least}"
    if high < math.inf:
        span = f"{span}, {most} at most" if above else f"from {least} to {most}"
    given = quoted(value) if whole else _number_text(value)
    raise OptionError(f"{name} is {given}; give {'a whole number' if whole else unit} {span}", name)


def _number_text(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        return f"{value:g}"
    return str(value) if isinstance(value, Fraction) else quoted(value)


def check_flag(name: str, value: Any) -> None:
    """Raise OptionError unless `value` is True, False or None."""
    if not isinstance(value, bool | None):
        raise OptionError(f"{name} is {quoted(value)}; give True or False", name)


def check_tiles(value: str) -> str:
    """Return "auto", "none" or rows x columns such as "2x3"; raise InputError for others."""
    if not _TILES.fullmatch(value):
        raise InputError(f"tiles is {quoted(value)}; give auto, none, or rows and columns from 1 "
                         "to 99, such as 2x3")
    return value


def check_cache(value: str) -> str:
    """Return METHOD[:THRESHOLD] of a step cache; raise InputError for an unknown or invalid one."""
    method, colon, threshold = value.partition(":")
    if method not in _CACHES:
        raise InputError(f"cache is {quoted(value)}; {nearest(method, _CACHES)}")
    with suppress(ValueError):
        if not colon or (method != "none" and 0 <= float(threshold) <= 100):
            return value
    raise InputError(f"cache is {quoted(value)}; give a threshold from 0 to 100 after the colon, "
                     "such as forecast:0.1")


def check_readings(value: str) -> str:
    """Return the value; raise InputError if `parse_readings` can't parse it."""
    parse_readings(value)
    return value


def parse_readings(value: Any) -> dict[str, str] | None:
    """Parse replacements of words, "bicylce=bicycle,taxi=car"; return them in lower case.

    The result is None for "auto" and empty for "none".
    """
    if value in ("auto", "none"):
        return None if value == "auto" else {}
    pairs = [[side.strip().lower() for side in pair.split("=")] for pair in str(value).split(",")]
    if not all(len(pair) == 2 and all(pair) and " " not in pair[0] for pair in pairs):
        raise InputError(f"readings is {quoted(value)}; give auto, none, or words and their "
                         "replacements, such as bicylce=bicycle,taxi=car")
    return dict(pairs)


def parse_fps(value: Any) -> Fraction:
    """Return a number, or text such as "24000/1001", as an exact frame rate."""
    try:
        rate = plain(value)
        if isinstance(rate, bool):
            raise ValueError
        if isinstance(rate, str) and "/" not in rate:
            rate = float(rate)  # a fraction would write out 1e999999999
        if isinstance(rate, float) and not rate.is_integer():
            # 23.976 and 29.97 mean the broadcast rates n * 1000 / 1001.
            broadcast = Fraction(round(rate) * 1000, 1001)
            exact = Fraction(rate).limit_denominator(1001)
            return broadcast if abs(rate - broadcast) < 1e-3 else exact
        return Fraction(rate)
    except (ValueError, TypeError, OverflowError, ZeroDivisionError):
        raise InputError(f"fps is {quoted(value)}; give a number, or a fraction such as 24000/1001"
                         ) from None


def parse_size(value: Any) -> tuple[int, int]:
    """Return (width, height) in pixels, from a pair or text such as "832x480"."""
    sides: tuple[Any, ...] = ()
    if isinstance(value, str):
        match = re.fullmatch(r"(\d{1,9})[xX×](\d{1,9})", value.strip())
        sides = (int(match[1]), int(match[2])) if match else ()
    elif isinstance(value, Iterable):
        sides = tuple(map(plain, value))
    if len(sides) != 2:
        raise InputError(f"size is {quoted(value)}; give width and height in pixels, such as "
                         "128x96")
    for side in sides:
        check_number("size", side, MIN_SIDE, MAX_SIDE, whole=True)
    return sides


def parse_interval(value: Any) -> tuple[float, float]:
    """Return two noise levels in [0, 1], the lower one first."""
    ends = tuple(map(plain, value)) if isinstance(value, Iterable) else (value,)
    is_pair = len(ends) == 2 and all(isinstance(end, int | float) for end in ends)
    if not (is_pair and 0 <= ends[0] < ends[1] <= 1):
        raise InputError(f"guidance_interval is {quoted(value)}; give two numbers from 0 to 1, the "
                         "lower one first")
    return float(ends[0]), float(ends[1])


def parse_frames(value: Any) -> tuple[tuple[float, Picture], ...]:
    """Return pairs (seconds, picture)."""
    pairs = []
    for pair in _listed("frame", value, "pairs (seconds, picture)"):
        if not (isinstance(pair, tuple | list) and len(pair) == 2):
            raise InputError(f"frame contains {quoted(pair)}; give pairs (seconds, picture)")
        check_number("frame", seconds := plain(pair[0]), 0, 3600)
        pairs.append((seconds, _picture("frame", pair[1])))
    return tuple(pairs)


def parse_said(value: Any) -> tuple[tuple[float | None, str], ...]:
    """Return pairs (seconds or None, text) of texts to speak."""
    pairs: list[tuple[Any, Any]] = []
    what = "texts or pairs (seconds, text)"
    for each in (value,) if isinstance(value, str) else _listed("say", value, what):
        if isinstance(each, str):
            pairs.append((None, each))
        elif isinstance(each, tuple | list) and len(each) == 2:
            pairs.append((plain(each[0]), each[1]))
        else:
            raise InputError(f"say contains {quoted(each)}; give {what}")
    for seconds, text in pairs:
        check_number("say", seconds, 0, 3600)
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"say contains {quoted(text)}; give the text to speak")
        check_text("say", text, MAX_PROMPT)
    return tuple(pairs)


def parse_settings(value: Any) -> dict[str, int | float | bool]:
    """Return a model's settings by name, from a mapping or texts KEY=VALUE; None omits one."""
    pairs = list(value.items()) if isinstance(value, Mapping) else []
    if value is None:
        raise InputError("settings is None; leave it out, or give a value")
    if not isinstance(value, Mapping):
        for text in (value,) if isinstance(value, str) else _listed("settings", value, "KEY=VALUE"):
            key, equals, given = text.partition("=") if isinstance(text, str) else ("", "", "")
            if not (key and equals and given):
                raise InputError(f"settings contains {quoted(text)}; give KEY=VALUE with a number, "
                                 "true or false")
            pairs.append((key.replace("-", "_"), given))
    settings = {}
    for name, given in pairs:
        if not isinstance(name, str):
            raise InputError(f"settings has the name {quoted(name)}; give it as text")
        number = plain(_number(given) if isinstance(given, str) else given)
        if not isinstance(number, int | float | None):
            raise InputError(f"{name} is {quoted(given)}; give a number, true or false")
        if number is not None:
            settings[name] = number
    return settings


def _number(text: str) -> Any:
    """Parse a whole number, a number, true or false; return other text unchanged."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def parse_pictures(value: Any) -> tuple[Picture, ...]:
    """Return pictures as a tuple; a single one needs no list."""
    value = _pixels(value)
    is_one = isinstance(value, str | os.PathLike) or _is_array(value)
    listed = (value,) if is_one else _listed("reference", value, "pictures")
    return tuple(_picture("reference", each) for each in listed)


def parse_loras(value: Any) -> tuple[str, ...]:
    """Return adapters as texts PATH[:WEIGHT]; a single one needs no list."""
    is_one = isinstance(value, str | os.PathLike)
    loras = (value,) if is_one else tuple(_listed("lora", value, "PATH or PATH:WEIGHT"))
    for each in loras:
        if not isinstance(each, str | os.PathLike):
            raise InputError(f"lora contains {quoted(each)}; give PATH or PATH:WEIGHT")
    return tuple(map(os.fspath, loras))


def _listed(name: str, value: Any, what: str) -> Iterable[Any]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise InputError(f"{name} is {quoted(value)}; give a list of {what}")
    return value
