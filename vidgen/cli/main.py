"""`vidgen VERB ...`: find the verb's file, read its options, turn errors into exit codes.

A verb is a module of this package with `DESCRIPTION`, `add_arguments(parser)` and `run(args,
report)`. Nothing but the verb that is called is imported, so that help appears at once.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from io import TextIOWrapper
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

from vidgen import __version__
from vidgen.cli.report import Report, print_line
from vidgen.core.errors import InputError, VidgenError, nearest
from vidgen.core.runtime import given_rank

if TYPE_CHECKING:
    from argparse import Namespace

    from vidgen.cli.options import Parser

VERBS = {
    "generate": "make a clip from a prompt, with pictures or a clip as conditions",
    "plan": "estimate the time and memory that generate takes with the same options",
    "extend": "continue a clip; its own frames stay unchanged",
    "script": "make a film from its script, shot by shot",
    "inspect": "show a media file's streams and the recipe that made it",
    "replay": "make a clip again from its recipe, or with one change",
    "sweep": "make a clip under several settings, side by side on a sheet and in a video",
    "check": "find flashes, freezes, drift and other faults of a clip",
    "jobs": "list unfinished clips, and remove them",
    "models": "list the models that are ready to use",
    "data": "check and cache videos and pictures for fine-tuning",
    "eval": "score a model on a suite",
    "train": "fine-tune a model on your own clips: LoRA or all weights",
    "convert": "write a model folder in another layout",
    "serve": "serve clips and films over HTTP, from a durable queue",
}
LONG = ("generate", "extend", "script", "replay", "sweep", "data", "eval", "train", "serve")
INTERRUPTED = 130
_PATHS = (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR,
          errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.EROFS)
"""System errors that concern a path of the command line."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code: 0, 1, 2 or 130."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    with as_exit_code(arguments) as codes:
        if not arguments or arguments[0] in ("-h", "--help", "help"):
            print_line(overview(), sys.stdout, "stdout")
            codes.append(0 if arguments else 2)
        elif arguments[0] in ("-V", "--version"):
            print_line(f"vidgen {__version__}", sys.stdout, "stdout")
        else:
            module, args = _parsed(*arguments)
            with Report(as_json=args.json, events=args.events) as report:
                codes.append(module.run(args, report))
    return codes[-1]


@contextmanager
def as_exit_code(arguments: Sequence[str]) -> Iterator[list[int]]:
    """Prepare the process for a command line, and turn the error that ends it into an exit code.

    Yields:
        List of exit codes, to which the work's is appended, or that of its error; first 0.

    Args:
        arguments: the command line; with `--json` an error is also printed as JSON.
    """
    _mend_streams()
    _wait_briefly()
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING,
                        handlers=[Printed()])
    logging.addLevelName(logging.WARNING, "warning")
    warnings.showwarning = _show_warning
    signal.signal(signal.SIGTERM, _interrupt)
    codes = [0]
    try:
        yield codes
    except VidgenError as error:
        codes.append(_failed(arguments, str(error), error.exit_code))
    except KeyboardInterrupt:
        codes.append(_failed(arguments, "interrupted", INTERRUPTED,
                             "Stopped. No incomplete files were left."))
    except BrokenPipeError:  # the reader, such as head, has closed the pipe
        _drop_stdout()
        codes.append(1)
    except OSError as error:
        if error.errno not in _PATHS:
            raise
        reason = f"{error.filename}: {error.strerror}; give another path"
        codes.append(_failed(arguments, reason, InputError.exit_code))
    except SystemExit as error:  # argparse's --help
        codes.append(int(error.code or 0))


def overview() -> str:
    """Return the text of `vidgen --help`."""
    lines = ["usage: vidgen VERB ... (vidgen VERB --help lists its options)", ""]
    lines += [f"  {verb:<10} {summary}" for verb, summary in VERBS.items()]
    return "\n".join([*lines, "", "  --version  print the version"])


def verb_parser(verb: str, words: Sequence[str] = ()) -> tuple[ModuleType, Parser]:
    """Return a verb's module and its parser, with the options that the command line calls for."""
    module = import_module(f"vidgen.cli.{verb}")
    return module, parser_of(module, f"vidgen {verb}", words, is_long=verb in LONG)


def parser_of(module: Any, prog: str, words: Sequence[str] = (), *, is_long: bool = True) -> Parser:
    """Return the parser of a module with options like a verb's; long ones take `--events`."""
    from vidgen.cli.options import Parser

    parser = Parser(prog, module.DESCRIPTION, words)
    module.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    if is_long:
        text = "write progress as JSON lines; - is stdout"
        parser.add_argument("--events", metavar="FILE",
                            help=parser.advanced(text) if parser.has_advanced else text)
    if parser.has_advanced:
        parser.add_argument("--help-all", action="help", help="list all options and exit")
    return parser


def _mend_streams() -> None:
    """Discard output to a closed stream, and escape characters that a stream can't encode."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:  # no file may become stderr
        pass
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
        elif isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _wait_briefly() -> None:
    """Let torch's threads wait for each other for a quarter of a millisecond before they sleep.

    By default they spin for some 4 ms, about a time slice of the system's scheduler, which slows
    every process of a busy machine. OpenMP reads the variable when a verb imports torch.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "20000")


def _parsed(verb: str, *words: str) -> tuple[ModuleType, Namespace]:
    """Return a verb's module and its options; `events` is None where the verb writes none."""
    if verb not in VERBS:
        raise InputError(f"unknown verb {verb!r}; {nearest(verb, VERBS)}")
    module, parser = verb_parser(verb, words)
    args = parser.parse(words)
    args.words, args.events = words, getattr(args, "events", None)
    if verb in ("generate", "extend", "sweep") and given_rank() is not None:
        raise InputError(f"vidgen {verb} starts its processes itself; use --devices N instead of "
                         "torchrun")
    if args.events not in (None, "-") and args.events == getattr(args, "output", None):
        raise InputError(f"output and events are both {args.events}; give one of them another "
                         "name")
    if verb == "train" and (given_rank() or (0,))[0]:
        args.events = None  # only the main rank writes them
    return module, args


def _failed(arguments: Sequence[str], reason: str, code: int, line: str | None = None) -> int:
    """Print the error, or `line`; with --json rank 0 also prints it as one object."""
    print(line or f"error: {reason}", file=sys.stderr)
    try:
        if "--json" in arguments and not (given_rank() or (0,))[0]:
            print(json.dumps({"error": reason, "exit_code": code}))
        print(end="", flush=True)
    except OSError:  # stdout can't be written, which may be the error itself
        _drop_stdout()
    return code


def _drop_stdout() -> None:
    """Discard the buffer of stdout, which Python would fail to write at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Printed(logging.Handler):
    """Log handler for the current `sys.stderr`, which progress bars replace to keep lines whole."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record as one line."""
        print(self.format(record), file=sys.stderr)


def _show_warning(
    message: Warning | str, category: type[Warning], *_: object, **__: object
) -> None:
    if issubclass(category, UserWarning):
        print(f"warning: {message}", file=sys.stderr)


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt
