"""From a config to items: folders scanned, files decoded once, every file's fate settled.

What was found out about a file is kept by its content in a SQLite file in the user's cache folder,
file by file, so a check that was killed goes on after them. The folders with the data are never
written to.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from vidgen.core.config import build, dump
from vidgen.core.errors import InputError, OutputError
from vidgen.core.protocols import OnEvent
from vidgen.core.runtime import cache_folder, sha256_file
from vidgen.models.tokenizer import PromptTokenizer
from vidgen.pipeline.workers.scheduler import results_of
from vidgen.training.data.config import DataConfig, Geometry
from vidgen.training.data.files import MediaFile, scan
from vidgen.training.data.probe import PROBE_VERSION, FileFacts, probe_file
from vidgen.training.data.select import Selection, select
from vidgen.weights.folder import ModelFolder
from vidgen.weights.layouts import open_model

T = TypeVar("T")

_SETTLED_S = 2.0  # a file changed this recently may change again within its time stamp's grain
_TABLES = """
create table if not exists stamps (path text primary key, bytes int, mtime_ns int, sha256 text);
create table if not exists facts (sha256 text, version int, facts text,
                                  primary key (sha256, version));
"""


class Records:
    """Facts by content, and contents by path, size and time of change, in a SQLite file.

    Raises:
        OutputError: it can't be written, or is damaged; names it.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or cache_folder() / "data.sqlite"

    def hash_of(self, file: MediaFile) -> str | None:
        """SHA-256 of a file, where it is known and the file hasn't changed since."""
        rows = self._ask("select sha256 from stamps where path = ? and bytes = ? and mtime_ns = ?",
                         self._stamp(file))
        return rows[0][0] if rows else None

    def keep_hash(self, file: MediaFile, sha256: str) -> None:
        """Remember a file's content, unless it was changed just now."""
        if time.time() - file.mtime_ns / 1e9 > _SETTLED_S:
            self._ask("insert or replace into stamps values (?, ?, ?, ?)",
                      (*self._stamp(file), sha256))

    def facts_of(self, sha256: str) -> FileFacts | None:
        """What is known of a content."""
        rows = self._ask("select facts from facts where sha256 = ? and version = ?",
                         (sha256, PROBE_VERSION))
        return build(FileFacts, json.loads(rows[0][0])) if rows else None

    def keep_facts(self, sha256: str, facts: FileFacts) -> None:
        """Remember what was found."""
        self._ask("insert or replace into facts values (?, ?, ?)",
                  (sha256, PROBE_VERSION, json.dumps(dump(facts))))

    @staticmethod
    def _stamp(file: MediaFile) -> tuple[str, int, int]:
        path = str(file.path.resolve()).encode("utf-8", "surrogateescape")
        return path.decode("utf-8", "replace"), file.num_bytes, file.mtime_ns

    @cached_property
    def _connection(self) -> sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(self.path, timeout=60)
        connection.executescript(_TABLES)
        return connection

    def _ask(self, question: str, values: Sequence[Any]) -> list[Any]:
        """One transaction; it is on the disk when this returns."""
        try:
            with self._connection as connection:
                return connection.execute(question, values).fetchall()
        except (OSError, sqlite3.Error) as error:
            raise OutputError(
                f"{self.path}, where findings about files are kept, fails: {error}; make room, "
                "delete it if it is damaged, or set XDG_CACHE_HOME to another place") from None


def look_at(
    files: Sequence[MediaFile], on_event: OnEvent, *, workers: int = 1,
    records: Records | None = None,
) -> tuple[list[str], dict[str, FileFacts]]:
    """Read and decode what isn't known yet, in `workers` processes.

    Return SHA-256 of each file ("" of one that can't be read), and facts by SHA-256.
    """
    records = records or Records()
    by_path = {file.path: file for file in files}
    hashes = {path: records.hash_of(file) for path, file in by_path.items()}
    fresh = {path: path for path, known in hashes.items() if known is None}
    results = results_of(_hash, fresh, workers, on_event)
    for path, sha256 in counted(on_event, "read", results, len(fresh)):
        hashes[path] = sha256
        if sha256:
            records.keep_hash(by_path[path], sha256)
    facts: dict[str, FileFacts] = {}
    unknown: dict[str, Path] = {}
    for path, content in hashes.items():
        if content and content not in facts:
            known = records.facts_of(content)
            if known is not None:
                facts[content] = known
            else:
                unknown.setdefault(content, path)
    looked = results_of(probe_file, unknown, workers, on_event)
    for sha256, found in counted(on_event, "look", looked, len(unknown)):
        facts[sha256] = found
        records.keep_facts(sha256, found)
    return [hashes[file.path] or "" for file in files], facts


def counted(
    on_event: OnEvent, stage: str, things: Iterable[T], total: int,
    weight: Callable[[T], int] = lambda _: 1,
) -> Iterator[T]:
    """Yield things, and report progress as each was dealt with."""
    done = 0
    on_event({"event": "progress", "stage": stage, "done": done, "total": total})
    for each in things:
        yield each
        done += weight(each)
        on_event({"event": "progress", "stage": stage, "done": done, "total": total})


def _hash(path: Path) -> str:
    try:
        return sha256_file(path)
    except OSError:
        return ""


def open_own(model: str) -> ModelFolder:
    """Open a model's folder.

    Raises:
        InputError: one that runs through diffusers.
    """
    folder = open_model(model)
    if not isinstance(folder, ModelFolder):
        raise InputError(f"model {model} runs through diffusers, which can't be fine-tuned here; "
                         "give one of the toybox or Wan family")
    return folder


def survey(
    config: DataConfig, folder: ModelFolder, on_event: OnEvent, *, workers: int = 1
) -> Selection:
    """Look at all files of a config, for a model.

    Raises:
        InputError: folders or tables that can't be read, sizes that the model can't have.
    """
    geometry = Geometry.of(config, folder)
    found = scan(config)
    hashes, facts = look_at(found.files, on_event, workers=workers)
    selection = select(config, geometry, found, hashes, facts)
    limit = folder.components["transformer"].config.text_len
    tokenizer = PromptTokenizer(folder.tokenizer, limit)
    for fate in selection.fates:
        for caption in fate.items[0].captions if fate.items else ():
            count = tokenizer.count(caption)
            if count > limit:
                fate.notes.append(
                    f"its caption has {count} tokens, the model reads {limit}: the last "
                    f"{count - limit} are cut")
            unknown = [word for word, _ in tokenizer.unknown_words(caption)]
            if unknown:
                fate.notes.append(f"the model doesn't know: {', '.join(unknown[:8])}")
    return selection
