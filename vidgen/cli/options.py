"""Options that verbs share, read by an argparse with the manners of this program."""

from __future__ import annotations

import argparse
import os
import re
from argparse import ArgumentParser
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from vidgen.core.errors import InputError, nearest
from vidgen.core.request import CALLED
from vidgen.core.runtime import given_rank

if TYPE_CHECKING:
    from vidgen.pipeline.journal.journal import Journal

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
                raise InputError(f"unknown option {word}; {self._hint(word)}")
            raise InputError(f"too many arguments: {word!r}; put text with spaces in quotes")
        return parsed

    def _hint(self, word: str) -> str:
        """Return the words that name the option meant by an unknown one."""
        from vidgen.pipeline.settings import SETTINGS

        name = word.removeprefix("--").replace("-", "_")
        if name in SETTINGS and "--set" in self.options():
            return f"it is a setting of a model: --set {name}=VALUE"
        return nearest(word, self.options(), _CALLED)

    def options(self) -> list[str]:
        """Return all long options."""
        flags = (flag for action in self._actions for flag in action.option_strings)
        return [flag for flag in flags if flag.startswith("--")]


def add_devices(parser: ArgumentParser) -> None:
    """Declare the options that say how many devices make a clip together."""
    parser.add_argument("--devices", type=int, metavar="N",
        help="devices that share the work; default 1, under torchrun as many as it started")
    parser.add_argument("--shard", action="store_true", default=None,
        help="spread the transformer's weights over the devices")


def add_tiles(parser: ArgumentParser) -> None:
    """Declare the option that cuts pictures for the VAE."""
    parser.add_argument("--tiles", default="auto", metavar="auto|none|RxC",
        help="rows x columns that the VAE takes a picture in; auto, the default: where the whole "
        "doesn't fit the memory")


def add_settings(parser: ArgumentParser, what: str = "", dest: str = "settings") -> None:
    """Declare the option by which a model's own settings are given."""
    parser.add_argument("--set", dest=dest, action="append", default=[], metavar="KEY=VALUE",
        help=f"{what}what this model alone can do, by a number, true or false; vidgen models lists "
        "the settings of each with their defaults; may be repeated")


def add_workers(parser: ArgumentParser, what: str) -> None:
    """Declare the options of workers on `what`."""
    add = parser.add_argument
    add("--workers", type=int, metavar="N",
        help=f"{what} beside each other, each by a process of its own; default 1")
    add("--ray", metavar="ADDRESS",
        help="by workers of a Ray cluster: auto, host:port, ray://host:port, or local; as many as "
        "--workers, else one a GPU, else one a machine")
    add("--threads", type=int, metavar="N", help="that each worker computes on; default its share")


def choose_devices(
    count: int | None, shard: bool | None, journals: Sequence[Journal]
) -> dict[str, Any]:
    """Return the devices given, started by torchrun, or used by unfinished clips.

    Where all clips are finished there is nothing left that more than one could do.
    """
    given = given_rank()
    if journals and not given and all(journal.finished for journal in journals):
        return {"devices": 1, "shard": False}
    kept = ((journal.recipe or {}).get("devices") for journal in journals)
    began: dict[str, Any] = next(filter(None, kept), {})
    if count is None:
        count = given[1] if given else began.get("count", 1)
    if shard is None:
        shard = began.get("shard", False)
    return {"devices": count, "shard": shard}


def share_threads(count: int, threads: int) -> None:
    """On a CPU give each of `count` devices its share, unless OMP_NUM_THREADS says how many."""
    import torch

    share = max(1, threads // max(1, count))
    if not (torch.cuda.is_available() or "OMP_NUM_THREADS" in os.environ) and (
        share != torch.get_num_threads()
    ):
        torch.set_num_threads(share)
