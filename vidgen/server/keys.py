"""API keys, stored as hashes, and rate limits of each owner's requests.

A key has 256 random bits, so one round of SHA-256 is as safe as a slow hash.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vidgen.core.errors import InputError
from vidgen.core.runtime import atomic_write

PREFIX = "vg-"
LOCAL = "local"
"""Owner of all jobs of a service without keys."""
_NAME = re.compile(r"[\w-]{1,64}")


class Keys:
    """API keys in a file, which may change while the service runs."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def are_used(self) -> bool:
        """Whether keys were ever created: revoking the last one must not admit everyone."""
        return self.path.exists()

    def all(self) -> list[dict[str, Any]]:
        """Return each key's name, hash and creation time; InputError if the file is damaged."""
        try:
            known = json.loads(self.path.read_text("utf-8"))["keys"]
            return [{name: key[name] for name in ("name", "sha256", "created")} for key in known]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.path} is damaged ({error}); restore it, or remove it and "
                             "create new keys with --new-key") from None

    def draw(self, name: str) -> str:
        """Create a key with a name and return it; only its hash is stored.

        Raises:
            InputError: the name exists already, or isn't allowed.
        """
        if not _NAME.fullmatch(name) or name == LOCAL:
            raise InputError(f"{name!r} isn't a valid key name; give up to 64 letters, digits, _ "
                             f"and -, but not {LOCAL}")
        known = self.all()
        if any(key["name"] == name for key in known):
            raise InputError(f"key {name!r} exists already; choose another name, or revoke it")
        key = PREFIX + secrets.token_urlsafe(32)
        self._write([*known, {"name": name, "sha256": _hash(key), "created": int(time.time())}])
        return key

    def revoke(self, name: str) -> None:
        """Remove a key; InputError if the key doesn't exist."""
        known = self.all()
        left = [key for key in known if key["name"] != name]
        if len(left) == len(known):
            raise InputError(f"key {name!r} doesn't exist; known keys: "
                             f"{', '.join(key['name'] for key in known) or 'none'}")
        self._write(left)

    def owner(self, key: str) -> str | None:
        """Return the name of a key; None if it is invalid."""
        digest, found = _hash(key), None
        for known in self.all():  # compares all, so that timing reveals nothing
            if hmac.compare_digest(known["sha256"], digest):
                found = known["name"]
        return found

    def _write(self, keys: list[dict[str, Any]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(self.path, json.dumps({"keys": keys}, indent=1).encode())
        self.path.chmod(0o600)


class Pace:
    """Rate limit of each owner: a token bucket that holds up to `per_minute` requests."""

    def __init__(self, per_minute: int, now: Callable[[], float] = time.monotonic) -> None:
        self._per_minute, self._now = per_minute, now
        self._lock = threading.Lock()
        self._left: dict[str, tuple[float, float]] = {}

    def take(self, owner: str) -> float:
        """Count a request; return the seconds to wait if it is too early, 0 if it may pass."""
        with self._lock:
            now = self._now()
            left, since = self._left.get(owner, (float(self._per_minute), now))
            left = min(self._per_minute, left + (now - since) * self._per_minute / 60)
            if left < 1:
                self._left[owner] = left, now
                return (1 - left) * 60 / self._per_minute
            self._left[owner] = left - 1, now
            return 0.0


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
