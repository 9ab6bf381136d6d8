"""Parse and check the values of a request: numbers, pairs, pictures.

Functions named `check_` raise OptionError, with the value and the remedy; so do `parse_size` and
`parse_settings`. The others raise ValueError or TypeError; `Request` adds value and remedy.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from vidgen.core.errors import InputError, OptionError, nearest, quoted

if TYPE_CHECKING:
    import numpy as np

File: TypeAlias = str | os.PathLike[str]
Picture: TypeAlias = "File | np.ndarray[Any, Any]"
Fit = Literal["crop", "pad"]
"""Treatment of a picture of another aspect ratio: crop it, or pad it with borders."""
Attention = Literal["auto", "reference", "native", "blocked", "sdpa", "xformers"]
"""Back ends of attention; see `vidgen.ops.attention`."""
_SURROGATE = re.compile("[\ud800-\udfff]")
_ORIENTATION = 0x0112
"""EXIF tag of the orientation; 1 is upright."""
MIN_SIDE, MAX_SIDE = 16, 8192
"""Limits of a clip's width and height, in pixels."""
MAX_PROMPT = 20_000
"""Characters of a prompt, or of one spoken text."""
_CACHES = ("none", "first-block", "magnitude", "forecast")


def plain(value: Any) -> Any:
    """Convert a number of another library, such as NumPy, to Python's; return others unchanged."""
    return value.item() if getattr(value, "shape", None) == () else value


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


def parse_file(value: Any) -> File:
    """Return a file's path."""
    if not isinstance(value, str | os.PathLike):
        raise TypeError
    return value


def parse_picture(value: Any) -> Picture:
    """Return a file's path or pixels; a Pillow image becomes uint8 [H, W, 3].

    Raises:
        InputError: a Pillow image with transparency, another mode, or an EXIF rotation.
    """
    if type(value).__module__ == "numpy" and type(value).__name__ == "ndarray":
        return value  # type: ignore[no-any-return]
    if not (type(value).__module__.startswith("PIL.") and hasattr(value, "getexif")):
        return parse_file(value)
    if value.mode not in ("RGB", "L", "1"):
        raise InputError(f"a Pillow image has the mode {value.mode}; give image.convert('RGB'), "
                         "pasted onto a background first if it is transparent, or its file")
    if value.getexif().get(_ORIENTATION, 1) != 1:
        raise InputError("a Pillow image is rotated by its EXIF data; give "
                         "PIL.ImageOps.exif_transpose(image), or its file")
    import numpy as np

    return np.asarray(value.convert("RGB"))


def parse_pictures(value: Any) -> tuple[Picture, ...]:
    """Return pictures as a tuple; a single one needs no list."""
    return tuple(map(parse_picture, _listed(value)))


def parse_frames(value: Any) -> tuple[tuple[float, Picture], ...]:
    """Return pairs (seconds, picture)."""
    return tuple((_seconds("frame", at), parse_picture(picture)) for at, picture in value)


def parse_speech(value: Any) -> tuple[tuple[float | None, str], ...]:
    """Return pairs (seconds or None, text) of texts to speak."""
    lines = []
    for each in (value,) if isinstance(value, str) else value:
        at, text = (None, each) if isinstance(each, str) else each
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"say contains {quoted(text)}; give the text to speak")
        check_text("say", text, MAX_PROMPT)
        lines.append((_seconds("say", at), text))
    return tuple(lines)


def parse_loras(value: Any) -> tuple[str, ...]:
    """Return adapters as texts PATH[:WEIGHT]; a single one needs no list."""
    return tuple(os.fspath(parse_file(each)) for each in _listed(value))


def parse_sampler(value: Any) -> Any:
    """Return a sampler's name or a diffusers scheduler."""
    is_scheduler = hasattr(value, "set_timesteps") and hasattr(value, "step")
    if not (value is None or isinstance(value, str) or is_scheduler):
        raise TypeError
    return value


def parse_tiles(value: str) -> str:
    """Return "auto", "none" or rows x columns such as "2x3"."""
    if not re.fullmatch(r"auto|none|[1-9]\d?x[1-9]\d?", value):
        raise ValueError
    return value


def parse_cache(value: str) -> str:
    """Return METHOD[:THRESHOLD] of a step cache; raise InputError for an unknown method."""
    method, colon, threshold = value.partition(":")
    if method not in _CACHES:
        raise InputError(f"cache is {quoted(value)}; {nearest(method, _CACHES)}")
    if colon and not (method != "none" and 0 <= float(threshold) <= 100):
        raise ValueError
    return value


def check_word_normalisation(value: str) -> str:
    """Return the value if `parse_word_normalisation` can parse it."""
    parse_word_normalisation(value)
    return value


def parse_word_normalisation(value: str) -> dict[str, str] | None:
    """Parse replacements of words, "bicylce=bicycle,taxi=car"; return them in lower case.

    The result is None for "auto" and empty for "none".
    """
    if value in ("auto", "none"):
        return None if value == "auto" else {}
    pairs = [[side.strip().lower() for side in pair.split("=")] for pair in value.split(",")]
    if not all(len(pair) == 2 and all(pair) and " " not in pair[0] for pair in pairs):
        raise ValueError
    return dict(pairs)


def parse_fps(value: Any) -> Fraction:
    """Return a number, or text such as "24000/1001", as an exact frame rate."""
    if isinstance(rate := plain(value), bool):
        raise TypeError
    if isinstance(rate, str) and "/" not in rate:
        rate = float(rate)  # a fraction would write out 1e999999999
    if isinstance(rate, float) and not rate.is_integer():
        # 23.976 and 29.97 mean the broadcast rates n * 1000 / 1001.
        broadcast = Fraction(round(rate) * 1000, 1001)
        exact = Fraction(rate).limit_denominator(1001)
        return broadcast if abs(rate - broadcast) < 1e-3 else exact
    return Fraction(rate)


def parse_size(value: Any) -> tuple[int, int]:
    """Return (width, height) in pixels, from a pair or text such as "832x480"."""
    pair = value
    if isinstance(value, str):
        match = re.fullmatch(r"(\d{1,9})[xX×](\d{1,9})", value.strip())
        pair = () if match is None else map(int, match.groups())
    try:
        width, height = map(plain, pair)
    except (TypeError, ValueError):
        raise InputError(f"size is {quoted(value)}; give width and height in pixels, such as "
                         "128x96") from None
    for side in (width, height):
        check_number("size", side, MIN_SIDE, MAX_SIDE, whole=True)
    return width, height


def parse_interval(value: Any) -> tuple[float, float]:
    """Return two noise levels in [0, 1], the lower one first."""
    low, high = map(float, value)
    if not 0 <= low < high <= 1:
        raise ValueError
    return low, high


def parse_settings(value: Any) -> dict[str, int | float | bool]:
    """Return a model's settings by name, from a mapping or texts KEY=VALUE; None omits one."""
    if not isinstance(value, Mapping):
        texts, value = (value,) if isinstance(value, str) else value, {}
        for text in texts:
            key, _, given = str(text).partition("=")
            if not (key and given):
                raise InputError(f"settings contains {quoted(text)}; give KEY=VALUE with a number, "
                                 "true or false")
            value[key.replace("-", "_")] = given
    settings = {}
    for name, given in value.items():
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


def _seconds(name: str, value: Any) -> Any:
    check_number(name, seconds := plain(value), 0, 3600)
    return seconds


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else (value,)
