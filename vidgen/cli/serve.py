"""`vidgen serve`: serve the engine as an HTTP API with a web page."""

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
    "Serve clips and films over HTTP, for OpenAI's video clients and others. Jobs are kept on "
    "disk; after a stop or a crash the next start continues them. Ctrl-C waits for the running "
    "job, or saves it."
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
    add("--new-key", metavar="NAME", help="create a key, print it once and exit")
    add("--revoke-key", metavar="NAME", help="revoke a key and exit")
    add("--audit", action="store_true", help="print the audit log as JSON lines and exit")


def run(args: Namespace, report: Report) -> int:
    """Serve, or manage keys and print the log."""
    if args.new_key or args.revoke_key or args.audit:
        return _manage(args, report)
    try:
        from vidgen.server.app import serve
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name} is missing; pip install 'vidgen[serve]'") from error

    def on_ready(url: str) -> None:
        report({"event": "ready", "url": url})
        report({"event": "note", "text": f"serving {args.model} at {url}; Ctrl-C stops"})

    serve(_settings(args), on_ready)
    report.result({"stopped": True}, "stopped; waiting jobs continue at the next start")
    return 0


def _settings(args: Namespace) -> Settings:
    from vidgen.server.settings import Settings, default_data

    given = given_options(args, Settings)
    return Settings(**given | {"data": Path(given.get("data", default_data())).resolve()})


def _manage(args: Namespace, report: Report) -> int:
    import json

    from vidgen.server.keys import Keys
    from vidgen.server.settings import DATABASE, KEYS

    settings = _settings(args)
    keys = Keys(settings.data / KEYS)
    if args.audit:
        from vidgen.server.jobs import Jobs

        if not (settings.data / DATABASE).is_file():
            raise InputError(f"{settings.data} has no data of a service; name its folder "
                             "with --data")
        lines = list(reversed(Jobs(settings.data / DATABASE).audit()))
        report.result(lines, "\n".join(map(json.dumps, lines)))
    elif args.new_key:
        key = keys.draw(args.new_key)
        report({"event": "note", "text": "the key is shown only once"})
        report.result({"name": args.new_key, "key": key}, key)
    else:
        keys.revoke(args.revoke_key)
        report.result({"revoked": args.revoke_key}, f"{args.revoke_key} is revoked")
    return 0
