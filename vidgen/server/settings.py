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
"""Headings of help."""
_MOST = 1e9


@dataclass(frozen=True)
class Limits:
    """Limits of clips, films and inputs that are the same for every service.

    `queued` counts unfinished jobs of all keys; a job may crash the process at work `deaths` times.
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
    what: str, value: float, limit: float, remedy: str = "ask for less", option: str = ""
) -> None:
    """Raise OptionError if a value, perhaps that of an option, is above a limit."""
    if value > limit:
        raise OptionError(f"{value:,.9g} {what} are asked for; this service takes {limit:,.9g}: "
                          f"{remedy}", option)


class Settings(Options):
    """One service. Each field's description is the help of its option of `vidgen serve`."""

    model_config = ConfigDict(strict=False)

    data: Path
    """The folder of jobs and clips; no other service may work in it."""
    limits: Limits = Limits()
    host: str = option(
        "127.0.0.1", SERVICE, "to listen at, which this machine alone reaches; any other needs a "
        "key", "ADDRESS", basic=True)
    port: int = option(8000, SERVICE, "0 takes any", "N", basic=True, ge=0, le=65_535)
    model: str = option("toybox", SERVICE, "the one that is served", "NAME|FOLDER|HUB_ID",
                        basic=True, max_length=4096)
    loras: Path | None = option(
        None, SERVICE, "folder of adapters that requests may name", "DIR", basic=True)
    fetch: bool = option(
        False, SERVICE, "take inputs from http and https addresses outside the own network, too",
        basic=True)
    drain_seconds: float = option(
        20, SERVICE, "that a running job has to finish when the service stops; then it is saved "
        "and continues when the service starts again", "S", basic=True, ge=0, le=_MOST)
    keep_hours: float = option(
        168, KEEPING, "that finished clips are kept", "H", basic=True, gt=0, le=_MOST)
    quota_gb: float = option(
        20, KEEPING, "that they may take together; the oldest go first", "GB", basic=True,
        gt=0, le=_MOST)
    key_quota_gb: float | None = option(
        None, KEEPING, "that the clips of one key may take; default no less than all", "GB",
        basic=True, gt=0, le=_MOST)
    reserve_mb: float = option(
        200, KEEPING, "free space on the disk below which nothing new is taken", "MB", basic=True,
        ge=0, le=_MOST)
    upload_mb: float = option(64, LIMITS, "the largest request", "MB", basic=True, gt=0, le=_MOST)
    per_minute: int = option(
        120, LIMITS, "requests of one key that may begin jobs", "N", basic=True, ge=1, le=10**9)
    at_once: int = option(
        100, LIMITS, "requests of one key under way at a time, streams of events among them", "N",
        basic=True, ge=1, le=10**9)
    pending: int = option(
        100, LIMITS, "unfinished jobs of one key", "N", basic=True, ge=1, le=10**9)

    @field_validator("loras")
    @classmethod
    def _is_folder(cls, loras: Path | None) -> Path | None:
        if loras is not None and not loras.is_dir():
            raise InputError(f"loras {loras} is no folder; give the one that adapters lie in")
        return loras

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the service."""
        return self.host in LOOPBACK

    @property
    def keep_s(self) -> float:
        """Seconds that finished work is kept."""
        return self.keep_hours * 3600

    @property
    def upload_bytes(self) -> int:
        """The largest request."""
        return int(self.upload_mb * (1 << 20))

    @property
    def database(self) -> Path:
        """The queue's file."""
        return self.data / "jobs.sqlite3"

    @property
    def keys(self) -> Path:
        """The file of hashed API keys."""
        return self.data / "keys.json"

    @property
    def uploads(self) -> Path:
        """Folder of files that came in, until their job is made."""
        return self.data / "uploads"

    def job_folder(self, job_id: str) -> Path:
        """Return the folder of one job."""
        return self.data / ("films" if job_id.startswith("film_") else "videos") / job_id


def default_data() -> Path:
    """Return the service's folder: `$XDG_DATA_HOME/vidgen` or `~/.local/share/vidgen`."""
    root = os.environ.get("XDG_DATA_HOME")
    return (Path(root) if root else Path.home() / ".local" / "share") / "vidgen"
