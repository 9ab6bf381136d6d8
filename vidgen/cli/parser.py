"""argparse with the manners of this program: one-line errors, the nearest option named."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import NoReturn

from vidgen.core.errors import InputError, nearest
from vidgen.core.request import CALLED

_CALLED = {f"--{theirs.replace('_', '-')}": f"--{ours.replace('_', '-')}"
           for theirs, ours in CALLED.items()}
_LACKING = re.compile(r"argument (?:-\w/)?(--[\w-]+): expected one argument")


class Parser(argparse.ArgumentParser):
    """A parser that raises `InputError` where argparse would print usage and leave."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Refuse a command line."""
        if lacking := _LACKING.fullmatch(message):
            message += f"; give text that begins with - as {lacking[1]}=TEXT"
        raise InputError(f"{message}; see {self.prog} --help")

    def parse(self, args: Sequence[str]) -> argparse.Namespace:
        """Read all of a command line.

        Raises:
            InputError: what can't be understood, with the nearest known option.
        """
        parsed, rest = self.parse_known_args(args)
        if rest:
            word = rest[0].partition("=")[0]
            if word.startswith("-"):
                hint = nearest(word, self.options(), _CALLED)
                raise InputError(f"unknown option {word}; {hint}")
            raise InputError(f"too many arguments: {word!r}; put text with spaces in quotes")
        return parsed

    def options(self) -> list[str]:
        """All long options."""
        flags = (flag for action in self._actions for flag in action.option_strings)
        return [flag for flag in flags if flag.startswith("--")]
