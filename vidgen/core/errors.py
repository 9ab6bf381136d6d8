"""Errors for users, whose messages give the value, the limit and the remedy.

The command line prints the message after `error: ` and exits with `exit_code`; a library user
catches `VidgenError`. Bugs of vidgen itself are assertion errors instead.
"""

import reprlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from types import MappingProxyType
from typing import Literal

_NOTHING: Mapping[str, str] = MappingProxyType({})
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 120


class VidgenError(Exception):
    """Base of all errors that vidgen raises on purpose."""

    exit_code = 1


class InputError(VidgenError):
    """Invalid request, file, option or config."""

    exit_code = 2


Fault = Literal["unknown", "missing", "invalid"]


class OptionError(InputError):
    """Invalid option of a request; `option` is its name, empty for a conflict of several."""

    def __init__(self, text: str, option: str = "", kind: Fault = "invalid") -> None:
        super().__init__(text)
        self.option, self.kind = option, kind


class ModelError(VidgenError):
    """Model folder that is missing, incomplete, damaged or not as its config describes."""

    exit_code = 2


class OutputError(VidgenError):
    """Output that can't be written: no permission, no space, or an existing file."""

    exit_code = 2


class DeviceError(VidgenError):
    """Failure of another device that works on the same clip."""


class Cancelled(VidgenError):
    """Work stopped by Ctrl-C or by a callback."""

    exit_code = 130


@contextmanager
def located(where: str) -> Iterator[None]:
    """Prefix InputError and ModelError raised inside with a place, such as a file and its line."""
    try:
        yield
    except (InputError, ModelError) as error:
        raise type(error)(f"{where}: {error}") from error


def quoted(value: object) -> str:
    """Return the repr of a value for a message, shortened to about 120 characters."""
    return _SHORT.repr(value).replace("\n", " ")  # of an array


def kind_of(value: object) -> str:
    """Describe a value read from a file, for a message: "a list of 3", "int 5"."""
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return "a mapping"
    return "nothing" if value is None else f"{type(value).__name__} {quoted(value)}"


def nearest(word: str, choices: Iterable[str], called: Mapping[str, str] = _NOTHING) -> str:
    """Return advice for an unknown word: "did you mean 'x'?", or "known: x, y, z".

    Args:
        choices: known words.
        called: synonyms of some choices, as a mapping from synonym to choice.
    """
    known = sorted(choices)
    close = [called[word]] if called.get(word) in known else (
        get_close_matches(word, known, n=1, cutoff=0.5))
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known) or 'none'}"


def exit_code(work: Callable[[], None]) -> int:
    """Run a program's work; print a VidgenError to stderr; return the exit code, 0 for success."""
    try:
        work()
    except VidgenError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0
