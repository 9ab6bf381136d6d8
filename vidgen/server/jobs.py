"""The queue: every job from its acceptance to its removal, on disk before it is acknowledged.

A job is `queued` until a process works on it, then `in_progress`, then `completed` or `failed`.
Each change is one transaction of SQLite in WAL mode with full syncs, together with its line in the
audit log, so a kill at any moment leaves the state before or after it. When the service starts, a
job `in_progress` is `queued` again and continues from its journal. A result counts only for the
attempt that it belongs to, so a job can't be finished twice.

This module is independent of models and processes.
"""

from __future__ import annotations

import json
import math
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vidgen.core.errors import InputError, OptionError, OutputError
from vidgen.server.types import ApiError, Call, Kind, QueuedJob, new_id

SCHEMA_VERSION = 2
RETRY_WINDOW_S = 3600.0
"""Time in seconds during which a client's retry is recognised."""
_DELETED = "deleted"

_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE,
    kind TEXT NOT NULL, owner TEXT NOT NULL, status TEXT NOT NULL,
    created_at REAL NOT NULL, started_at REAL, completed_at REAL, expires_at REAL,
    request TEXT NOT NULL, spec TEXT NOT NULL, result TEXT NOT NULL DEFAULT '{}',
    error_code TEXT, error_message TEXT,
    attempt INTEGER NOT NULL DEFAULT 0, deaths INTEGER NOT NULL DEFAULT 0,
    expected_s REAL NOT NULL DEFAULT 0, num_bytes INTEGER NOT NULL DEFAULT 0,
    idempotency_key TEXT, fingerprint TEXT NOT NULL, is_retry INTEGER NOT NULL DEFAULT 0
);
CREATE UNIQUE INDEX IF NOT EXISTS job_keys ON jobs (owner, idempotency_key)
    WHERE idempotency_key IS NOT NULL;
CREATE INDEX IF NOT EXISTS job_status ON jobs (status, number);
CREATE INDEX IF NOT EXISTS job_fingerprints ON jobs (owner, fingerprint, number);
CREATE TABLE IF NOT EXISTS audit (
    number INTEGER PRIMARY KEY AUTOINCREMENT, time REAL NOT NULL, owner TEXT NOT NULL,
    action TEXT NOT NULL, job TEXT NOT NULL, detail TEXT NOT NULL
);
"""


class ServiceClock:
    """Monotonic Unix time in seconds, not before `not_before`, the last time of an earlier run."""

    def __init__(self, not_before: float = 0.0) -> None:
        self._start_s, self._began = max(time.time(), not_before), time.monotonic()

    def __call__(self) -> float:
        """Return the current time."""
        return self._start_s + time.monotonic() - self._began


class Jobs:
    """The queue in an SQLite file, created if it doesn't exist; safe to use from any thread.

    Raises:
        InputError: the file isn't a queue of this version, or SQLite is too old.
        OutputError: the file can't be written.
    """

    def __init__(self, path: Path) -> None:
        self._lock = threading.RLock()
        if sqlite3.sqlite_version_info < (3, 35):  # has no RETURNING
            raise InputError("the queue needs SQLite 3.35, this Python has "
                             f"{sqlite3.sqlite_version}; install a newer SQLite or Python")
        try:
            self._database = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._database.row_factory = sqlite3.Row
            for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=10000"):
                self._database.execute(f"PRAGMA {pragma}")
            version = self._database.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, SCHEMA_VERSION):
                raise InputError(f"{path} has format {version}, this vidgen reads "
                                 f"{SCHEMA_VERSION}; give another folder with --data")
            self._database.executescript(_SCHEMA)
            self._database.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
        except sqlite3.Error as error:
            raise InputError(f"{path} can't be used as a queue: {error}; move it away, or give "
                             "another folder with --data") from error
        last = self._one("SELECT MAX(MAX(created_at), MAX(IFNULL(completed_at, 0))) FROM jobs")[0]
        self.clock = ServiceClock(last or 0.0)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._database.close()

    def add(
        self, call: Call, kind: Kind, request: Mapping[str, Any], spec: Mapping[str, Any],
        fingerprint: str, *, job_id: str | None = None, expected_s: float = 0.0,
        most: float = math.inf, most_of_owner: float = math.inf,
    ) -> tuple[QueuedJob, bool]:
        """Queue a job unless it is a retry; return the new or existing job, and whether it is new.

        Args:
            call: the caller.
            kind, request, spec, expected_s: as in `QueuedJob`.
            fingerprint: hash of the request, equal for equal requests.
            job_id: identifier; None draws one.
            most, most_of_owner: limits of unfinished jobs, in all and of one key.

        Raises:
            ApiError: the idempotency key belongs to another request, or too many jobs are
                unfinished.
        """
        with self._transaction():
            if (known := self._known(call, fingerprint)) is not None:
                return QueuedJob(**known), False
            owners = [owner for (owner,) in self._all(
                "SELECT owner FROM jobs WHERE status IN ('queued', 'in_progress')")]
            for limit, count in ((most, len(owners)), (most_of_owner, owners.count(call.owner))):
                if count >= limit:
                    raise ApiError(429, "queue_full", f"{count} jobs are unfinished, at most "
                                   f"{limit} may be; wait for one, or cancel one",
                                   headers={"Retry-After": "10"})
            job_id = job_id or new_id(kind)
            row = self._one(
                "INSERT INTO jobs (id, kind, owner, status, created_at, request, spec, expected_s, "
                "idempotency_key, fingerprint, is_retry) VALUES (?, ?, ?, 'queued', ?, ?, ?, ?, ?, "
                "?, ?) RETURNING *", job_id, kind, call.owner, self.clock(), json.dumps(request),
                json.dumps(spec), expected_s, call.idempotency_key, fingerprint, call.is_retry)
            self._note(call.owner, "created", job_id, {"kind": kind, **request})
            return QueuedJob(**row), True

    def get(self, job_id: str, owner: str | None = None) -> QueuedJob | None:
        """Return a job by its id; None if it doesn't exist or belongs to another owner."""
        row = self._one("SELECT * FROM jobs WHERE id = ? AND status != ?", job_id, _DELETED)
        return None if row is None or owner not in (None, row["owner"]) else QueuedJob(**row)

    def page(
        self, kind: Kind, owner: str, *, after: str | None = None, limit: int = 20,
        newest_first: bool = True,
    ) -> tuple[list[QueuedJob], bool]:
        """Return a page of an owner's jobs in order, and whether more follow.

        Raises:
            InputError: `after` isn't the id of one of the jobs.
        """
        sign, order = ("<", "DESC") if newest_first else (">", "ASC")
        where = ""
        if after is not None:
            found = self._one("SELECT number FROM jobs WHERE id = ? AND owner = ? AND kind = ?",
                              after, owner, kind)
            if found is None:
                raise OptionError(f"after is {after!r}, not one of your {kind}s; give the last "
                                  "id of the previous page", "after")
            where = f"AND number {sign} {int(found[0])}"
        rows = self._all(
            f"SELECT * FROM jobs WHERE kind = ? AND owner = ? AND status != ? {where} "
            f"ORDER BY number {order} LIMIT ?", kind, owner, _DELETED, limit + 1)
        return [QueuedJob(**row) for row in rows[:limit]], len(rows) > limit

    def waiting(self) -> list[QueuedJob]:
        """Return the unfinished jobs, in the queue's order."""
        return [QueuedJob(**row) for row in self._all(
            "SELECT * FROM jobs WHERE status IN ('queued', 'in_progress') ORDER BY number")]

    def counts(self) -> dict[str, int]:
        """Return the number of jobs of each status."""
        rows = self._all("SELECT status, COUNT(*) FROM jobs GROUP BY status")
        return {status: count for status, count in rows if status != _DELETED}

    def claim(self) -> QueuedJob | None:
        """Start the job that waits longest and return it; None if none waits."""
        with self._transaction():
            row = self._one(
                "UPDATE jobs SET status = 'in_progress', attempt = attempt + 1, started_at = "
                "IFNULL(started_at, ?) WHERE id = (SELECT id FROM jobs WHERE status = 'queued' "
                "ORDER BY number LIMIT 1) RETURNING *", self.clock())
            if row is None:
                return None
            action = "resumed" if row["attempt"] > 1 else "started"
            self._note(row["owner"], action, row["id"], {})
            return QueuedJob(**row)

    def put_back(self, job: QueuedJob, *, died: bool = False) -> None:
        """Queue a claimed job again, at its old position; `died` counts a crash of its process."""
        with self._transaction():
            self._run("UPDATE jobs SET status = 'queued', deaths = deaths + ? WHERE id = ? AND "
                      "attempt = ? AND status = 'in_progress'", int(died), job.id, job.attempt)

    def recover(self) -> list[str]:
        """Queue interrupted jobs again; return ids of deleted jobs whose files still exist."""
        with self._transaction():
            self._run("UPDATE jobs SET status = 'queued' WHERE status = 'in_progress'")
            return [job_id for (job_id,) in self._run(
                "SELECT id FROM jobs WHERE status = ?", _DELETED)]

    def finish(
        self, job: QueuedJob, *, result: Mapping[str, Any], num_bytes: int, keep_s: float,
        error: tuple[str, str] | None = None,
    ) -> bool:
        """Finish a job, with (code, message) as `error` if it failed; keep it for `keep_s`.

        Return False if the job was finished, deleted or started again meanwhile.
        """
        now = self.clock()
        code, message = error or (None, None)
        with self._transaction():
            done = self._run(
                "UPDATE jobs SET status = ?, completed_at = ?, expires_at = ?, result = ?, "
                "error_code = ?, error_message = ?, num_bytes = ? WHERE id = ? AND attempt = ? "
                "AND status IN ('queued', 'in_progress')",
                "failed" if error else "completed", now, now + keep_s, json.dumps(result), code,
                message, num_bytes, job.id, job.attempt).rowcount == 1
            if done:
                detail = {"error": code} if code else {
                    "recipe_sha256": result.get("recipe_sha256"), "bytes": num_bytes}
                self._note(job.owner, "failed" if error else "completed", job.id, detail)
            return done

    def delete(self, job: QueuedJob, reason: str = "deleted") -> bool:
        """Mark a job as deleted; call `purge` once its files are removed."""
        with self._transaction():
            done = self._run("UPDATE jobs SET status = ?, idempotency_key = NULL WHERE id = ? AND "
                             "status != ?", _DELETED, job.id, _DELETED).rowcount == 1
            if done:
                self._note(job.owner, reason, job.id, {})
            return done

    def purge(self, job_id: str) -> None:
        """Remove a deleted job from the file."""
        with self._transaction():
            self._run("DELETE FROM jobs WHERE id = ? AND status = ?", job_id, _DELETED)

    def outdated(self, quota_bytes: int, key_quota_bytes: int | None = None) -> list[str]:
        """Return ids of finished jobs that have expired, or are the oldest above a quota."""
        rows = self._all("SELECT id, owner, expires_at, num_bytes FROM jobs WHERE status IN "
                         "('completed', 'failed') ORDER BY number DESC")
        most_of_key = quota_bytes if key_quota_bytes is None else key_quota_bytes
        kept, of_key, expired, now = 0, Counter[str](), [], self.clock()
        for job_id, owner, expires_at, num_bytes in rows:
            if (expires_at < now or kept + num_bytes > quota_bytes
                    or of_key[owner] + num_bytes > most_of_key):
                expired.append(job_id)
            else:
                kept += num_bytes
                of_key[owner] += num_bytes
        return expired

    def audit(self, owner: str | None = None, limit: int | None = None) -> list[dict[str, Any]]:
        """Return lines of the audit log, the newest first: time, owner, action, job, detail."""
        where, args = ("", ()) if owner is None else ("WHERE owner = ?", (owner,))
        rows = self._all(f"SELECT time, owner, action, job, detail FROM audit {where} "
                         "ORDER BY number DESC LIMIT ?", *args, limit or -1)
        return [{**dict(row), "detail": json.loads(row["detail"])} for row in rows]

    def _known(self, call: Call, fingerprint: str) -> sqlite3.Row | None:
        if call.idempotency_key is not None:
            row: sqlite3.Row | None = self._one(
                "SELECT * FROM jobs WHERE owner = ? AND idempotency_key = ?",
                call.owner, call.idempotency_key)
            if row is not None and row["fingerprint"] != fingerprint:
                raise ApiError(422, "idempotency_conflict", f"the idempotency key "
                               f"{call.idempotency_key!r} belongs to another request; use a new "
                               "key for each request")
            return row
        # A retry may follow its first try, or overtake it on the way here.
        row = self._one(
            "SELECT * FROM jobs WHERE owner = ? AND fingerprint = ? AND status != ? AND "
            "created_at > ? AND (? OR (is_retry AND created_at > ?)) ORDER BY number DESC LIMIT 1",
            call.owner, fingerprint, _DELETED, self.clock() - RETRY_WINDOW_S, call.is_retry,
            call.arrived_at or self.clock())
        return row

    def _note(self, owner: str, action: str, job_id: str, detail: Mapping[str, Any]) -> None:
        self._run("INSERT INTO audit (time, owner, action, job, detail) VALUES (?, ?, ?, ?, ?)",
                  self.clock(), owner, action, job_id, json.dumps(detail))

    def _all(self, text: str, *values: Any) -> list[sqlite3.Row]:
        with self._lock:
            return self._run(text, *values).fetchall()

    def _one(self, text: str, *values: Any) -> Any:
        return next(iter(self._all(text, *values)), None)

    def _run(self, text: str, *values: Any) -> sqlite3.Cursor:
        return self._database.execute(text, values)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Run a transaction; SQLite's errors, such as a full disk, are raised as OutputError."""
        with self._lock:
            try:
                self._run("BEGIN IMMEDIATE")
                yield
                self._run("COMMIT")
            except sqlite3.Error as error:
                what = "no space is left" if "full" in str(error) else str(error)
                raise OutputError(f"the queue can't be written: {what}; free space on its "
                                  "disk") from error
            finally:
                if self._database.in_transaction:
                    self._run("ROLLBACK")
