"""Settings of the service: its folders, addresses and limits."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from pydantic import ConfigDict, field_validator

from vidgen.core.errors import InputError, OptionError
from vidgen.core.request import Options, option

LOOPBACK = ("127.0.0.1", "::1", "localhost")
SERVICE, KEEPING, LIMITS = "Service", "Keeping", "Limits"
"""Headings of the command's help."""
DATABASE, KEYS, UPLOADS = "jobs.sqlite3", "keys.json", "uploads"
"""Files of the queue and of hashed keys in the data folder; folder of uploads without a job."""
_MOST = 1e9


@dataclass(frozen=True)
class Limits:
    """Fixed limits of clips, films, inputs and jobs.

    `queued` is of unfinished jobs of all keys; a job fails after it crashed `deaths` processes.
    """

    pixels: int = 1920 * 1088
    frames: int = 1000
    seconds: float = 600.0
    steps: int = 200
    shots: int = 200
    input_pixels: int = 4096 * 4096
    input_seconds: float = 600.0
    queued: int = 1000
    deaths: int = 3


def at_most(
    what: str, value: float, limit: float, remedy: str = "request less", option: str = ""
) -> None:
    """Raise OptionError if a value, of `option` if given, is above a limit."""
    if value > limit:
        raise OptionError(f"{value:,.9g} {what} requested, this service allows {limit:,.9g}; "
                          f"{remedy}", option)


class Settings(Options):
    """Settings of one service. Each field's description is the help of its option."""

    model_config = ConfigDict(strict=False)

    data: Path
    """Folder of jobs and clips, for one service at a time."""
    limits: Limits = Limits()
    host: str = option(
        "127.0.0.1", SERVICE, "address to listen on; any but this machine's own needs a key",
        "ADDRESS", basic=True)
    port: int = option(8000, SERVICE, "port to listen on; 0 picks a free one", "N",
                       basic=True, ge=0, le=65_535)
    model: str = option("toybox", SERVICE, "model to serve", "NAME|FOLDER|HUB_ID",
                        basic=True, max_length=4096)
    loras: Path | None = option(
        None, SERVICE, "folder of LoRA files that requests may name", "DIR", basic=True)
    fetch: bool = option(
        False, SERVICE, "also accept inputs by http and https URLs outside the own network",
        basic=True)
    drain_seconds: float = option(
        20, SERVICE, "time for a running job to finish when the service stops; then it is saved, "
        "and continues when the service starts again", "S", basic=True, ge=0, le=_MOST)
    keep_hours: float = option(
        168, KEEPING, "hours to keep finished clips", "H", basic=True, gt=0, le=_MOST)
    quota_gb: float = option(
        20, KEEPING, "disk space of all finished clips; the oldest are removed first", "GB",
        basic=True, gt=0, le=_MOST)
    key_quota_gb: float | None = option(
        None, KEEPING, "disk space of one key's finished clips; default: no limit of its own", "GB",
        basic=True, gt=0, le=_MOST)
    reserve_mb: float = option(
        200, KEEPING, "free disk space below which new jobs are refused", "MB", basic=True,
        ge=0, le=_MOST)
    upload_mb: float = option(64, LIMITS, "largest size of a request", "MB", basic=True,
                             gt=0, le=_MOST)
    per_minute: int = option(
        120, LIMITS, "requests of one key per minute that may start jobs", "N", basic=True,
        ge=1, le=10**9)
    at_once: int = option(
        100, LIMITS, "active requests of one key, including streams of events", "N",
        basic=True, ge=1, le=10**9)
    pending: int = option(
        100, LIMITS, "most unfinished jobs of one key", "N", basic=True, ge=1, le=10**9)

    @field_validator("loras")
    @classmethod
    def _is_folder(cls, loras: Path | None) -> Path | None:
        if loras is not None and not loras.is_dir():
            raise InputError(f"loras {loras} isn't a folder; give the folder of LoRA files")
        return loras

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the service."""
        return self.host in LOOPBACK

    @property
    def upload_bytes(self) -> int:
        """Largest size of a request in bytes."""
        return int(self.upload_mb * (1 << 20))

    def job_folder(self, job_id: str) -> Path:
        """Return the folder of one job."""
        return self.data / ("films" if job_id.startswith("film_") else "videos") / job_id


def default_data() -> Path:
    """Return the default folder: `$XDG_DATA_HOME/vidgen` or `~/.local/share/vidgen`."""
    root = os.environ.get("XDG_DATA_HOME")
    return (Path(root) if root else Path.home() / ".local" / "share") / "vidgen"
