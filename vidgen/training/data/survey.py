"""Select items from the files of a data config: scan folders, decode files once, choose stretches.

Facts about each file are stored in the user's cache folder at once, so that a check that was killed
continues after them. The folders with the data are never written to.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from vidgen.core.config import build, dump
from vidgen.core.errors import ModelError
from vidgen.core.protocols import OnEvent
from vidgen.core.runtime import cache_folder
from vidgen.core.store import Store, address_of
from vidgen.models.tokenizer import PromptTokenizer
from vidgen.pipeline.workers.scheduler import results_of
from vidgen.training.data.config import DataConfig, Geometry
from vidgen.training.data.files import MediaFile, scan
from vidgen.training.data.probe import PROBE_VERSION, FileFacts, probe_file
from vidgen.training.data.select import Selection, select
from vidgen.weights.folder import ModelFolder
from vidgen.weights.layouts import open_model

T = TypeVar("T")
_SETTLED_S = 2.0  # a newer file may change again within the resolution of its time stamp


def probe_files(
    files: Sequence[MediaFile], on_event: OnEvent, *, workers: int = 1, folder: Path | None = None
) -> list[FileFacts]:
    """Return the facts about each file; unknown files are decoded in `workers` processes.

    Facts are stored in `folder` by a file's path, size and modification time.
    """
    store, places = Store(folder or cache_folder() / "data"), {file.path: file for file in files}
    address = {
        path: address_of([str(path.resolve()), file.num_bytes, file.mtime_ns, PROBE_VERSION])
        for path, file in places.items()}
    kept = {path: store.data(name) for path, name in address.items()}
    facts = {path: build(FileFacts, data) for path, data in kept.items() if data}
    fresh = {path: path for path in places if path not in facts}
    found = results_of(probe_file, fresh, workers, on_event)
    for path, each in track(on_event, "look", found, len(fresh)):
        facts[path] = each
        is_settled = time.time() - places[path].mtime_ns / 1e9 > _SETTLED_S
        if is_settled and each.sha256:  # an unreadable file may be readable later
            store.keep(address[path], dump(each))
    return [facts[file.path] for file in files]


def track(on_event: OnEvent, stage: str, things: Iterable[T], total: int) -> Iterator[T]:
    """Yield `things`, and report progress after each of `total`."""
    done = 0
    on_event({"event": "progress", "stage": stage, "done": done, "total": total})
    for done, each in enumerate(things, 1):
        yield each
        on_event({"event": "progress", "stage": stage, "done": done, "total": total})


def open_trainable(model: str) -> ModelFolder:
    """Open the folder of a model for fine-tuning.

    Raises:
        ModelError: no such model, or one of the diffusers backend.
    """
    folder = open_model(model)
    if not isinstance(folder, ModelFolder):
        raise ModelError(f"{folder.name} is a {folder.class_name}; vidgen fine-tunes toybox and "
                         "the Wan family")
    return folder


def survey(
    config: DataConfig, folder: ModelFolder, on_event: OnEvent, *, workers: int = 1
) -> Selection:
    """Check all files of a config, and select items for a model.

    Raises:
        InputError: a folder or table can't be read, or the model doesn't support a size.
    """
    geometry = Geometry.of(config, folder)
    files, notes = scan(config)
    fates = select(config, geometry, files, probe_files(files, on_event, workers=workers))
    limit = folder.components["transformer"].config.text_len
    tokenizer = PromptTokenizer(folder.tokenizer, limit)
    for fate in fates:
        for caption in fate.items[0].captions if fate.items else ():
            count = tokenizer.count(caption)
            if count > limit:
                fate.notes.append(
                    f"its caption has {count} tokens, but the model reads {limit}: the last "
                    f"{count - limit} are ignored")
            unknown = [word for word, _ in tokenizer.unknown_words(caption)]
            if unknown:
                fate.notes.append(f"the model doesn't know the words: {', '.join(unknown[:8])}")
    return Selection(geometry, fates, notes)
