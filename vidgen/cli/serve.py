"""`vidgen serve`: the engine as an HTTP API with its page, until it is stopped."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vidgen.cli.report import Report
from vidgen.core.errors import InputError

if TYPE_CHECKING:
    from vidgen.server.settings import Settings

DESCRIPTION = (
    "Serve clips and films over HTTP, in the shape that OpenAI's video clients speak. Jobs are "
    "kept on disk: a service that was stopped or killed goes on with them. Ctrl-C lets the running "
    "job finish, or puts it by."
)
_MB, _GB, _HOUR_S = 1 << 20, 1 << 30, 3600.0
_AMOUNTS = ("keep_hours", "quota_gb", "key_quota_gb", "reserve_mb", "upload_mb", "per_minute",
            "at_once", "pending", "drain_seconds")
_MOST = 1e9


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the verb's options."""
    add = parser.add_argument
    add("--host", default="127.0.0.1", metavar="ADDRESS",
        help="to listen at; default %(default)s, which this machine alone reaches; any other needs "
        "a key")
    add("--port", type=int, default=8000, metavar="N", help="default %(default)s; 0 takes any")
    add("--model", default="toybox", metavar="NAME|FOLDER|HUB_ID", help="default %(default)s")
    add("--data", metavar="DIR",
        help="folder for jobs and clips; default vidgen in $XDG_DATA_HOME or ~/.local/share")
    add("--loras", metavar="DIR", help="folder of adapters that requests may name")
    add("--fetch", action="store_true",
        help="take inputs from http and https addresses outside the own network, too")
    add("--keep-hours", type=float, default=168.0, metavar="H",
        help="how long finished clips are kept; default %(default)s")
    add("--quota-gb", type=float, default=20.0, metavar="GB",
        help="that they may take together; the oldest go first; default %(default)s")
    add("--key-quota-gb", type=float, metavar="GB",
        help="that the clips of one key may take; default no less than all")
    add("--reserve-mb", type=float, default=200.0, metavar="MB",
        help="free space on the disk below which nothing new is taken; default %(default)s")
    add("--upload-mb", type=float, default=64.0, metavar="MB",
        help="the largest request; default %(default)s")
    add("--per-minute", type=int, default=120, metavar="N",
        help="requests of one key that may begin jobs; default %(default)s")
    add("--at-once", type=int, default=100, metavar="N",
        help="requests of one key under way at a time, streams of events among them; default "
        "%(default)s")
    add("--pending", type=int, default=100, metavar="N",
        help="unfinished jobs of one key; default %(default)s")
    add("--drain-seconds", type=float, default=20.0, metavar="S",
        help="that a running job has to finish when the service stops; default %(default)s")
    add("--new-key", metavar="NAME", help="draw a key, print it once and leave")
    add("--revoke-key", metavar="NAME", help="make a key worthless and leave")
    add("--audit", action="store_true", help="print the audit log as JSON lines and leave")


def run(args: Namespace, report: Report) -> int:
    """Serve, or manage keys and print the log."""
    if args.new_key or args.revoke_key or args.audit:
        return _look_after(args, report)
    _require_packages()
    from vidgen.server.app import serve

    def on_ready(url: str) -> None:
        report({"event": "ready", "url": url})
        report({"event": "note", "text": f"serving {args.model} at {url}; Ctrl-C stops"})

    serve(_settings(args), on_ready)
    report.result({"stopped": True}, "stopped; jobs that wait go on at the next start")
    return 0


def _settings(args: Namespace) -> Settings:
    from vidgen.server.settings import Limits, Settings, default_data

    for name in _AMOUNTS:
        value = getattr(args, name)
        may_be_0 = name in ("reserve_mb", "drain_seconds")
        if value is not None and not (0 < value <= _MOST or (may_be_0 and value == 0)):
            least = "from 0" if may_be_0 else "above 0"
            raise InputError(f"{name.replace('_', '-')} is {value:g}; give a number {least} and up "
                             f"to {_MOST:g}")
    limits = replace(Limits(), upload_bytes=int(args.upload_mb * _MB), pending=args.pending,
                     per_minute=args.per_minute, at_once=args.at_once)
    return Settings(
        data=(Path(args.data) if args.data else default_data()).resolve(), model=args.model,
        host=args.host, port=args.port, loras=Path(args.loras) if args.loras else None,
        fetch=args.fetch, keep_s=args.keep_hours * _HOUR_S,
        quota_bytes=int(args.quota_gb * _GB),
        key_quota_bytes=None if args.key_quota_gb is None else int(args.key_quota_gb * _GB),
        reserve_bytes=int(args.reserve_mb * _MB),
        drain_s=args.drain_seconds, limits=limits,
    )


def _look_after(args: Namespace, report: Report) -> int:
    """Manage keys and print the audit log, without a running service."""
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


def _require_packages() -> None:
    """Say what to install where the service's packages are missing.

    Raises:
        InputError: they are.
    """
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise InputError(f"{error.name} is missing; pip install 'vidgen[serve]'") from error
