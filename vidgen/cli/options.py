"""Options that several verbs share, and the parser of all command lines."""

from __future__ import annotations

import argparse
import os
import re
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NoReturn, get_args, get_origin

from vidgen.core.errors import InputError, nearest
from vidgen.core.request import CALLED, OUTPUT, Loading, Options, Request, Saving

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from vidgen.pipeline.journal.journal import Journal

_CALLED = {f"--{theirs.replace('_', '-')}": f"--{ours.replace('_', '-')}"
           for theirs, ours in CALLED.items()}
_LACKING = re.compile(r"argument (?:-\w/)?(--[\w-]+): expected one argument")


class Parser(argparse.ArgumentParser):
    """A parser that raises `InputError` where argparse would print usage and leave.

    Attributes:
        words: the command line; some verbs declare options by its words.
    """

    def __init__(self, prog: str, description: str, words: Sequence[str] = ()) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)
        self.words = words
        self.has_advanced = False
        self._groups: dict[str, argparse._ArgumentGroup] = {}

    def group(self, title: str) -> argparse._ArgumentGroup:
        """Return the group of options under a heading of help."""
        if title not in self._groups:
            self._groups[title] = self.add_argument_group(title)
        return self._groups[title]

    def advanced(self, text: str) -> str:
        """Return the help of an option that --help-all lists and --help doesn't."""
        self.has_advanced = True
        if "--help-all" in self.words:
            return text
        self.epilog = f"{self.prog} --help-all lists all options."
        return argparse.SUPPRESS

    def error(self, message: str) -> NoReturn:
        """Raise InputError with argparse's message."""
        if lacking := _LACKING.fullmatch(message):
            message += f"; give text that begins with - as {lacking[1]}=TEXT"
        raise InputError(f"{message}; see {self.prog} --help")

    def parse(self, args: Sequence[str]) -> argparse.Namespace:
        """Parse a whole command line.

        Raises:
            InputError: an unknown option, with the nearest known one; too many words.
        """
        parsed, rest = self.parse_known_args(args)
        if rest:
            word = rest[0].partition("=")[0]
            if word.startswith("-"):
                raise InputError(f"unknown option {word}; {self._hint(word)}")
            raise InputError(f"too many arguments: {word!r}; put text with spaces in quotes")
        return parsed

    def _hint(self, word: str) -> str:
        from vidgen.pipeline.settings import SETTINGS

        name = word.removeprefix("--").replace("-", "_")
        if name in SETTINGS and "--set" in self.options():
            return f"it is a setting of a model: --set {name}=VALUE"
        return nearest(word, self.options(), _CALLED)

    def options(self) -> list[str]:
        """Return all long options."""
        flags = (flag for action in self._actions for flag in action.option_strings)
        return [flag for flag in flags if flag.startswith("--")]


FIELDS = Request.model_fields | Loading.model_fields | Saving.model_fields
"""Options of a request, of loading a model and of saving clips, by name."""


def add_request_options(
    parser: Parser, names: Iterable[str], *, are_optional: bool = False,
    fields: Mapping[str, FieldInfo] = FIELDS,
) -> None:
    """Declare fields of `FIELDS`, or of other `Options`, under the headings of help.

    With `are_optional` an option that is not given is None instead of its default.
    """
    for name in names:
        field = fields[name]
        extra = field.json_schema_extra
        assert isinstance(extra, dict)
        flag = "--set" if name == "settings" else f"--{name.replace('_', '-')}"
        kwargs = _kwargs(name, field, extra["metavar"])
        has_default = isinstance(field.default, str | int) and field.default not in (False, 0)
        default = f"; default {field.default}" if has_default and not are_optional else ""
        text = f"{field.description}{default}".replace("%", "%%")
        kwargs["help"] = text if extra["basic"] else parser.advanced(text)
        if name == "prompt" and not are_optional:
            flag = name
        else:
            kwargs |= {"dest": name, "default": None if are_optional else field.default}
        if kwargs.get("action") == "append":
            kwargs["default"] = []
        parser.group(str(extra["group"])).add_argument(flag, **kwargs)


def _kwargs(name: str, field: FieldInfo, metavar: Any) -> dict[str, Any]:
    hint = field.annotation
    kinds = (hint,) if get_origin(hint) is Literal else get_args(hint) or (hint,)
    kind = next(each for each in kinds if each is not type(None))
    if get_origin(kind) is Literal:
        return {"choices": (*(["auto"] if name == "offload" else []), *get_args(kind))}
    if kind is bool:
        return {"action": "store_true"}
    if name == "guidance_interval":
        return {"type": float, "nargs": 2, "metavar": tuple(metavar.split())}
    if isinstance(field.default, tuple | dict):
        return {"type": _PARSERS.get(name), "action": "append", "metavar": metavar}
    return {"type": kind if kind in (int, float) else None, "metavar": metavar}


def _timed_picture(text: str) -> tuple[float, str]:
    seconds, _, picture = text.partition("=")
    try:
        time_s = float(seconds)
    except ValueError:
        picture = ""
    if not picture:
        raise argparse.ArgumentTypeError(f"{text!r} is no SECONDS=IMAGE, such as 1.5=car.png")
    return time_s, picture


def _timed_text(text: str) -> tuple[float | None, str]:
    """Parse [SECONDS=]TEXT; without a number before the =, all of it is text."""
    before, equals, after = text.partition("=")
    try:
        return (float(before), after) if equals else (None, text)
    except ValueError:
        return None, text


_PARSERS: dict[str, Callable[[str], Any]] = {"frame": _timed_picture, "say": _timed_text}


def given_options(args: argparse.Namespace, of: type[Options] = Request) -> dict[str, Any]:
    """Return the given options of a command line that are fields of a class."""
    return {name: value for name, value in vars(args).items()
            if name in of.model_fields and value not in (None, [])}


def add_workers(parser: ArgumentParser, what: str, *, threads: bool = True) -> None:
    """Declare the options of workers, which make `what`; with `threads` also their threads."""
    add = parser.add_argument
    add("--workers", type=int, metavar="N",
        help=f"{what} in parallel, each in a process of its own; default 1")
    add("--ray", metavar="ADDRESS",
        help="use workers of a Ray cluster: auto, host:port, ray://host:port, or local; --workers "
        "of them, by default one per GPU, else one per machine")
    if threads:
        add("--threads", type=int, metavar="N",
            help="threads per worker; default its share of the cores")


def add_resume(parser: Parser) -> None:
    """Declare the options for outputs that exist or are unfinished."""
    add = parser.group(OUTPUT).add_argument
    add("--overwrite", action="store_true",
        help="replace an existing output; restart an unfinished one")
    add("--resume", action="store_true",
        help="continue an earlier run of the same command; finished clips stay")


def choose_devices(loading: Loading, journals: Sequence[Journal]) -> Loading:
    """Return the loading with the given devices, or with those of unfinished clips.

    If all clips are finished, one device is enough.
    """
    if journals and all(journal.finished for journal in journals):
        return loading.replace(devices=1, shard=False)
    kept = ((journal.recipe or {}).get("devices") for journal in journals)
    earlier: dict[str, Any] = next(filter(None, kept), {})
    count, shard = loading.devices, loading.shard
    return loading.replace(
        devices=earlier.get("count", 1) if count is None else count,
        shard=earlier.get("shard", False) if shard is None else shard)


def share_threads(count: int | None, threads: int) -> None:
    """On a CPU give each of `count` devices its share, unless OMP_NUM_THREADS is set."""
    import torch

    share = max(1, threads // max(1, count or 1))
    is_settled = torch.cuda.is_available() or "OMP_NUM_THREADS" in os.environ
    if not is_settled and share != torch.get_num_threads():
        torch.set_num_threads(share)
