"""Settings of the service: its folders, addresses and limits."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from vidgen.core.errors import InputError, OptionError

LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class Limits:
    """Limits of one request, of one key and of the whole service.

    Attributes:
        upload_bytes: of a whole request.
        pixels: width times height of a clip.
        frames: of a clip.
        seconds: of a clip, by its frames and their rate.
        steps: of its denoising.
        shots: of a film.
        input_pixels: of a picture or clip that comes in.
        input_seconds: of a clip or sound that comes in.
        pending: unfinished jobs of one key.
        queued: unfinished jobs of all.
        per_minute: jobs that one key may begin in a minute.
        at_once: requests of one key under way at a time, streams of events among them.
        deaths: how often a job may take the process with it that works on it.
    """

    upload_bytes: int = 64 << 20
    pixels: int = 1920 * 1088
    frames: int = 1000
    seconds: float = 600.0
    steps: int = 200
    shots: int = 200
    input_pixels: int = 4096 * 4096
    input_seconds: float = 600.0
    pending: int = 100
    queued: int = 1000
    per_minute: int = 120
    at_once: int = 100
    deaths: int = 3


def at_most(
    what: str, value: float, limit: float, remedy: str = "ask for less", option: str = ""
) -> None:
    """Raise OptionError if a value, perhaps that of an option, is above a limit."""
    if value > limit:
        raise OptionError(f"{value:,.9g} {what} are asked for; this service takes {limit:,.9g}: "
                          f"{remedy}", option)


@dataclass(frozen=True)
class Settings:
    """One service.

    Attributes:
        data: its folder; nobody else's may work in it.
        model: name, folder or hub id.
        host: address to listen at.
        port: 0 takes any that is free.
        loras: folder of the adapters that requests may name; None: none.
        fetch: whether inputs may be given as http and https addresses.
        keep_s: how long finished work is kept.
        quota_bytes: that finished work may take; above it the oldest goes.
        key_quota_bytes: that of one key; None: no less than all.
        reserve_bytes: free space below which nothing new is taken.
        drain_s: how long the running job may take to finish when the service is told to stop;
            then it is put by and goes on when the service starts again.
        limits: see there.

    Raises:
        InputError: a value out of its range.
    """

    data: Path
    model: str = "toybox"
    host: str = "127.0.0.1"
    port: int = 8000
    loras: Path | None = None
    fetch: bool = False
    keep_s: float = 7 * 86_400.0
    quota_bytes: int = 20 << 30
    key_quota_bytes: int | None = None
    reserve_bytes: int = 200 << 20
    drain_s: float = 20.0
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65_535:
            raise InputError(f"port is {self.port}; give one from 1 to 65535, or 0 for any")
        for name in ("keep_s", "quota_bytes", "key_quota_bytes", "drain_s"):
            value = getattr(self, name)
            if value is not None and (value < 0 or (name != "drain_s" and value == 0)):
                raise InputError(f"{name} is {value}; give a number above 0")
        if self.loras is not None and not self.loras.is_dir():
            raise InputError(f"loras {self.loras} is no folder; give the one that adapters lie in")

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the service."""
        return self.host in LOOPBACK

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
