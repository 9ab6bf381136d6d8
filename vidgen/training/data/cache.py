"""Making a cache of items and captions, and opening it: nothing is encoded twice.

What is there is known by its name (`store`), so a run that was killed goes on behind it.
`index.json`, which is written last, says which items there are, of which files.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vidgen.core.config import build, dump
from vidgen.core.errors import InputError
from vidgen.core.protocols import OnEvent
from vidgen.core.runtime import atomic_write, best_dtype, check_output, write_error
from vidgen.diffusion.temporal_upsampling import LatentRate
from vidgen.pipeline.loader import DTYPES
from vidgen.pipeline.workers.scheduler import results_of
from vidgen.training.data.config import DataConfig, Geometry
from vidgen.training.data.encode import Cursor, Extras, ItemEncoder
from vidgen.training.data.files import MediaFile, Scan, scan
from vidgen.training.data.select import Item, picks
from vidgen.training.data.store import Identity, Store, require_manifest
from vidgen.training.data.survey import Survey
from vidgen.weights.folder import ModelFolder
from vidgen.weights.layouts import open_model

_PER_JOB = 64
"""Items of a file that are encoded in one go; a film of hours is shared among the workers."""
_FREE = ("cache", "image_share", "held_out", "drop_last", "caption_dropout", "seed")
"""Fields of the config that change nothing about the items."""


@dataclass(frozen=True)
class _Job:
    """Items of one file, in the order in which they begin, with the frames that each shows."""

    store: Store
    model: str
    device: str
    items: tuple[tuple[Item, tuple[int, ...]], ...]


def make_cache(
    config: DataConfig, folder: ModelFolder, model: str, known: Survey, on_event: OnEvent, *,
    workers: int = 1, device: str = "cpu",
) -> dict[str, Any]:
    """Encode all items and captions that aren't in the cache yet.

    Args:
        config: `cache` names the folder to be made or completed.
        folder: the model.
        model: how to open it in another process.
        known: its data.
        on_event: told of progress.
        workers: processes that encode beside each other, spread over the GPUs where there are some.
        device: "cpu" or "cuda".

    Returns:
        `folder`, numbers of `items`, `encoded`, `captions` and `texts_encoded`, `bytes`, and
        `failed`: {name: why}.

    Raises:
        InputError: the folder holds a cache of something else.
        OutputError: no room, or not to be written; what is done stays.
    """
    geometry = known.selection.geometry
    identity = Identity.of(config, geometry, folder, best_dtype(torch.device(device)))
    store, items = identity.store, known.selection.items
    if not items:
        raise InputError("no item is left of the data; vidgen data check says why")
    _require_place(store.folder)
    jobs = _jobs(config, model, known, store, device)
    todo = [item for job in jobs.values() for item, _ in job.items]
    check_output(store.folder / "index.json" if store.folder.is_dir() else store.folder,
                 overwrite=True, num_bytes=_room(todo, folder, config))
    require_manifest(store.folder, identity.manifest)
    texts_done = _cache_texts(folder, store, items, on_event, device)
    done, failed = 0, dict[str, str]()
    on_event({"event": "progress", "stage": "encode", "done": 0, "total": len(todo)})
    try:
        for (name, part), problem in results_of(_encode_file, jobs, workers, on_event):
            done += len(jobs[name, part].items)
            if problem is not None:
                failed[name] = problem
            on_event({"event": "progress", "stage": "encode", "done": done, "total": len(todo)})
    finally:  # where this process did the work
        while _encoders:
            _encoders.popitem()[1].close()
    kept = [item for item in items if item.path.as_posix() not in failed]
    dropped = [[fate.file.name, fate.dropped] for fate in known.selection.fates if fate.dropped]
    _write_index(config, store, known.found, kept, [*dropped, *failed.items()])
    encoded = sum(item.path.as_posix() not in failed for item in todo)
    return {
        "folder": str(store.folder), "items": len(kept), "encoded": encoded,
        "captions": len({text for item in kept for text in item.captions}),
        "texts_encoded": texts_done, "bytes": _size(store.folder), "failed": failed,
    }


def _require_place(place: Path) -> None:
    """Make the folder around a cache, and refuse one in which something else lies.

    Raises:
        InputError: it is a file, or a folder of something else.
        OutputError: the folder around it can't be made.
    """
    if place.exists() and not place.is_dir():
        raise InputError(f"{place} is a file; name another folder for the cache")
    if place.is_dir() and not (place / "manifest.json").exists() and any(
            not path.name.startswith(".") for path in place.iterdir()):
        raise InputError(f"{place} holds other files and no cache; name an empty folder, or a new "
                         "one")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(place.parent, error) from None


def _jobs(
    config: DataConfig, model: str, known: Survey, store: Store, device: str
) -> dict[tuple[str, int], _Job]:
    """What is left to encode, by file, and by part of a file that gives many items."""
    by_file: dict[tuple[str, int], list[tuple[Item, tuple[int, ...]]]] = {}
    seen: Counter[str] = Counter()
    for item in known.selection.items:
        if not store.path("latents", item.key).exists():
            shown = picks(item, known.facts[item.sha256], config, known.selection.geometry)
            name = item.path.as_posix()
            by_file.setdefault((name, seen[name] // _PER_JOB), []).append((item, tuple(shown)))
            seen[name] += 1
    return {name: _Job(store, model, device, tuple(own)) for name, own in by_file.items()}


_encoders: dict[tuple[str, str], ItemEncoder] = {}


def encoder_of(model: str, device: str) -> ItemEncoder:
    """The networks of a model on a device, opened once a process."""
    if (model, device) not in _encoders:
        folder = open_model(model)
        assert isinstance(folder, ModelFolder)
        _encoders[model, device] = ItemEncoder(folder, torch.device(device))
    return _encoders[model, device]


def _encode_file(job: _Job) -> str | None:
    """Encode a file's items; what is wrong with it, if it can't be read any more."""
    try:
        _encode_items(job, encoder_of(job.model, job.device))
    except InputError as error:
        return str(error)
    return None


def _encode_items(job: _Job, encoder: ItemEncoder) -> None:
    cursor = Cursor(job.items[0][0].path)
    try:
        for item, shown in job.items:
            grey = job.store.path("grey", item.bucket.label)
            if encoder.extras.grey and not grey.exists():
                job.store.save(grey, {"grey": encoder.grey(item.bucket)})
            made = encoder.item(item, shown, cursor)
            job.store.save(job.store.path("latents", item.key), made)
    finally:
        cursor.close()


def _cache_texts(
    folder: ModelFolder, store: Store, items: Sequence[Item], on_event: OnEvent, device: str
) -> int:
    """Encode captions in this process, as a text encoder may take all the memory there is."""
    captions = {"", *(text for item in items for text in item.captions)}
    todo = sorted(text for text in captions if not store.text_path(text).exists())
    encoder = ItemEncoder(folder, torch.device(device))
    try:
        for done, caption in enumerate(todo):
            on_event({"event": "progress", "stage": "texts", "done": done, "total": len(todo)})
            store.save(store.text_path(caption), {"context": encoder.text(caption)})
    finally:
        encoder.close()
    on_event({"event": "progress", "stage": "texts", "done": len(todo), "total": len(todo)})
    return len(todo)


def _room(items: Iterable[Item], folder: ModelFolder, config: DataConfig) -> int:
    """Bytes that items will take, about."""
    vae, extras, total = folder.components["vae"].config, Extras.of(folder), 0
    for item in items:
        bucket = item.bucket
        frames = 1 + (bucket.num_frames - 1) // vae.strides.t
        plane = vae.latent_channels * (bucket.height // vae.strides.hw) * (
            bucket.width // vae.strides.hw)
        total += plane * (frames * (1 + extras.first + extras.both) + 2 * extras.stills)
        if extras.oversampling > 1 and frames > 1:
            total += plane * LatentRate(extras.oversampling).num_upsampled(frames)
    return total * DTYPES[config.store_dtype].itemsize


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def _write_index(
    config: DataConfig, store: Store, found: Scan, items: Sequence[Item],
    dropped: Sequence[Sequence[str]],
) -> None:
    """Say which items there are, of which files, by which settings, and what gave none."""
    index = {
        "settings": _settings(config), "files": [_stamp(file) for file in found.files],
        "items": [dump(item) for item in items], "dropped": list(dropped),
    }
    atomic_write(store.folder / "index.json", (json.dumps(index) + "\n").encode())


def _settings(config: DataConfig) -> dict[str, Any]:
    """What a config says about items; where its folders lie and their repeats aren't in it."""
    told = {name: value for name, value in dump(config).items() if name not in _FREE}
    return {**told, "folders": len(config.folders), "validation": config.validation is not None}


_STAMP = 5  # values of a file in the index


def _stamp(file: MediaFile) -> list[Any]:
    return [file.folder, file.name, file.num_bytes, file.mtime_ns, list(file.captions)]


@dataclass(frozen=True)
class _Index:
    """What `index.json` and `manifest.json` say."""

    settings: dict[str, Any]
    items: list[Item]
    files: list[list[Any]]
    dropped: list[list[str]]
    text_dtype: str | None

    @classmethod
    def of(cls, index: dict[str, Any], manifest: dict[str, Any]) -> _Index:
        """Of what the files hold, which may be anything."""
        settings, items = dict(index["settings"]), [build(Item, item) for item in index["items"]]
        files = [[folder, name, *facts] for folder, name, *facts in index["files"]]
        dropped = [[name, why] for name, why in index["dropped"]]
        if any(len(row) != _STAMP for row in files):
            raise ValueError("index.json has a file without its facts")
        return cls(settings, items, files, dropped, manifest.get("text_dtype"))


def open_cache(
    config: DataConfig, geometry: Geometry, folder: ModelFolder
) -> tuple[Store, list[Item], list[str]]:
    """The store and items of a finished cache, and notes.

    Args:
        config: which has to be as it was when the cache was made, but for what is drawn.
        geometry: of config and model.
        folder: the model.

    Raises:
        InputError: there is none, or it doesn't match config, model or files; says in what.
    """
    place = Path(config.cache)
    again = "run vidgen data cache with the same settings, which adds what is missing"
    try:
        index = _Index.of(*(json.loads((place / name).read_text("utf-8"))
                            for name in ("index.json", "manifest.json")))
    except FileNotFoundError:
        raise InputError(f"{place} holds no finished cache; {again}") from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError,
            InputError) as error:
        raise InputError(f"the cache {place} can't be read: {type(error).__name__}: {error}; "
                         f"{again}") from None
    identity = Identity.of(config, geometry, folder, index.text_dtype)
    require_manifest(place, identity.manifest)
    differing = [
        f"{name} is {index.settings.get(name)!r} there, {value!r} here"
        for name, value in _settings(config).items() if index.settings.get(name) != value
    ]
    if differing:
        raise InputError(f"the cache {place} was made with other settings ({'; '.join(differing)});"
                         f" {again}")
    folders = [config.folders[item.folder].path if item.folder >= 0 else config.validation
               for item in index.items]
    items = [replace(item, path=Path(root or "", item.name))
             for item, root in zip(index.items, folders, strict=True)]
    notes = [f"{name} is left out: {why}" for name, why in index.dropped]
    if all(Path(each.path).is_dir() for each in config.folders):
        _require_same_files(place, index.files, scan(config).files, again)
    else:
        notes.insert(0, "the data's folders aren't here; the cache's word is taken")
    return identity.store, items, notes


def _require_same_files(
    place: Path, then: Sequence[Sequence[Any]], files: Sequence[MediaFile], again: str
) -> None:
    before = {(row[0], row[1]): row[2:] for row in then}
    now = {(row[0], row[1]): row[2:] for row in map(_stamp, files)}
    both = before.keys() & now.keys()
    changes = {
        "new": sorted(now.keys() - before.keys()), "gone": sorted(before.keys() - now.keys()),
        "changed": sorted(k for k in both if before[k][:2] != now[k][:2]),
        "described anew": sorted(
            k for k in both if before[k][:2] == now[k][:2] and before[k][2] != now[k][2]),
    }
    told = [f"{len(keys)} {what} ({', '.join(name for _, name in keys[:3])})"
            for what, keys in changes.items() if keys]
    if told:
        raise InputError(f"files were changed since the cache {place} was made: "
                         f"{'; '.join(told)}; {again}")
