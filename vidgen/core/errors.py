"""Errors that a user may meet: each says what was given, what is allowed and what to do.

The command line prints the message after `error: ` and leaves with `exit_code`; a library user
catches `VidgenError`. Broken invariants of our own are assertions, never these.
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
    """Something went wrong that the message explains; the base of all errors raised on purpose."""

    exit_code = 1


class InputError(VidgenError):
    """A request, file, option or config that can't be honoured as given."""

    exit_code = 2


Fault = Literal["unknown", "missing", "invalid"]


class OptionError(InputError):
    """An option of a request that can't be honoured.

    Args:
        option: the option's name; empty if the message is about no single one.
        kind: whether nobody knows the option, it is missing, or its value can't be taken.
    """

    def __init__(self, text: str, option: str = "", kind: Fault = "invalid") -> None:
        super().__init__(text)
        self.option, self.kind = option, kind


class ModelError(VidgenError):
    """A model folder that is missing, incomplete, damaged or not of the claimed shape."""

    exit_code = 2


class OutputError(VidgenError):
    """A place that can't be written: no permission, no space, a file in the way."""

    exit_code = 2


class DeviceError(VidgenError):
    """Another device that works on the clip failed, and this one can't go on without it."""


class Cancelled(VidgenError):
    """The work was stopped from outside, by Ctrl-C or by a callback."""

    exit_code = 130


@contextmanager
def located(where: str) -> Iterator[None]:
    """Name a place, such as a file and its line, in an InputError or ModelError raised inside."""
    try:
        yield
    except (InputError, ModelError) as error:
        raise type(error)(f"{where}: {error}") from error


def quoted(value: object) -> str:
    """A value as a message shows it: shortly, though it may be a whole file's worth of text."""
    return _SHORT.repr(value)


def kind_of(value: object) -> str:
    """Describe a value read from a file, for a message: `a list of 3`, `int 5`."""
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return "a mapping"
    return "nothing" if value is None else f"{type(value).__name__} {quoted(value)}"


def nearest(word: str, choices: Iterable[str], called: Mapping[str, str] = _NOTHING) -> str:
    """Return the words after "unknown 'word'; ": the closest choice, or all of them.

    Args:
        word: that nobody knows.
        choices: known ones.
        called: what others call some of the choices; one of these names means that choice.
    """
    known = sorted(choices)
    close = [called[word]] if called.get(word) in known else (
        get_close_matches(word, known, n=1, cutoff=0.5))
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known) or 'none'}"


def exit_code(work: Callable[[], None]) -> int:
    """Run a program's work; return 0, or the code of the error that it prints to stderr."""
    try:
        work()
    except VidgenError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0
