"""`vidgen serve`: the engine as an HTTP API with its page, until it is stopped."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from vidgen.cli.options import Parser, add_request_options, given_options
from vidgen.cli.report import Report
from vidgen.core.errors import InputError

if TYPE_CHECKING:
    from vidgen.server.settings import Settings

DESCRIPTION = (
    "Serve clips and films over HTTP, in the shape that OpenAI's video clients speak. Jobs are "
    "kept on disk: a service that was stopped or killed goes on with them. Ctrl-C lets the running "
    "job finish, or puts it by."
)


def add_arguments(parser: Parser) -> None:
    """Declare the verb's options."""
    from vidgen.server.settings import Settings

    fields = {name: field for name, field in Settings.model_fields.items()
              if name not in ("data", "limits")}
    add_request_options(parser, fields, fields=fields)
    add = parser.add_argument
    add("--data", metavar="DIR",
        help="folder for jobs and clips; default vidgen in $XDG_DATA_HOME or ~/.local/share")
    add("--new-key", metavar="NAME", help="draw a key, print it once and leave")
    add("--revoke-key", metavar="NAME", help="make a key worthless and leave")
    add("--audit", action="store_true", help="print the audit log as JSON lines and leave")


def run(args: Namespace, report: Report) -> int:
    """Serve, or manage keys and print the log."""
    if args.new_key or args.revoke_key or args.audit:
        return _look_after(args, report)
    try:
        from vidgen.server.app import serve
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name} is missing; pip install 'vidgen[serve]'") from error

    def on_ready(url: str) -> None:
        report({"event": "ready", "url": url})
        report({"event": "note", "text": f"serving {args.model} at {url}; Ctrl-C stops"})

    serve(_settings(args), on_ready)
    report.result({"stopped": True}, "stopped; jobs that wait go on at the next start")
    return 0


def _settings(args: Namespace) -> Settings:
    from vidgen.server.settings import Settings, default_data

    given = given_options(args, Settings)
    return Settings(**given | {"data": Path(given.get("data", default_data())).resolve()})


def _look_after(args: Namespace, report: Report) -> int:
    import json

    from vidgen.server.keys import Keys

    settings = _settings(args)
    if args.audit:
        from vidgen.server.jobs import Jobs

        if not settings.database.is_file():
            raise InputError(f"no service ever worked in {settings.data}; name its folder with "
                             "--data")
        lines = list(reversed(Jobs(settings.database).audit()))
        report.result(lines, "\n".join(map(json.dumps, lines)))
    elif args.new_key:
        key = Keys(settings.keys).draw(args.new_key)
        report({"event": "note", "text": "it is shown this once"})
        report.result({"name": args.new_key, "key": key}, key)
    else:
        Keys(settings.keys).revoke(args.revoke_key)
        report.result({"revoked": args.revoke_key}, f"{args.revoke_key} is worth nothing now")
    return 0
