"""Tensors of items and captions on disk: nothing is encoded twice, and another model's is refused.

`latents/`, `texts/` and `grey/` hold safetensors files under names that follow from all that shapes
them, so a run that was killed goes on behind what is there; `manifest.json` says what that was.
`index.json`, which is written last, says which items there are, of which files.

Axes: C latent channels, F latent frames, h w latent rows and columns, S text tokens, D width.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vidgen.core.config import build, dump
from vidgen.core.errors import InputError
from vidgen.core.protocols import OnEvent
from vidgen.core.runtime import atomic_path, atomic_write, best_dtype, check_output, write_error
from vidgen.models.tokenizer import clean_prompt
from vidgen.pipeline.loader import DTYPES
from vidgen.pipeline.workers.scheduler import results_of
from vidgen.training.data.config import Bucket, DataConfig, Geometry
from vidgen.training.data.encode import Cursor, Extras, ItemEncoder, component_hash
from vidgen.training.data.files import MediaFile, scan
from vidgen.training.data.select import Item, Selection, picks
from vidgen.training.data.survey import counted, open_own
from vidgen.weights.folder import ModelFolder

FORMAT_VERSION = 1
_PER_JOB = 64
"""Items of a file that are encoded in one go; a film of hours is shared among the workers."""
_FREE = ("cache", "image_share", "held_out", "drop_last", "caption_dropout", "seed")
"""Fields of the config that change nothing about the items."""


@dataclass(frozen=True)
class LatentCache:
    """The tensors of a cache, by what shaped them."""

    folder: Path  # of the cache
    manifest: Mapping[str, Any]  # what shapes its tensors
    pixels: str  # identifies VAE, image encoder, rate and rule
    texts: str  # identifies the text encoder as it computes here
    dtype: str  # in which tensors are kept: "fp16", "bf16" or "fp32"
    has_grey: bool  # whether the model needs latents of grey

    @classmethod
    def of(
        cls, config: DataConfig, geometry: Geometry, folder: ModelFolder, text_dtype: str | None
    ) -> LatentCache:
        """Of a config and a model whose text encoder computes in `text_dtype`."""
        extras = Extras.of(folder)
        pixels = {
            "format": FORMAT_VERSION, "vae": component_hash(folder, "vae"),
            "image_encoder": component_hash(folder, "image_encoder"),
            "extras": extras.as_data(), "fps": str(geometry.fps),
            "fps_rule": config.fps_rule, "store_dtype": config.store_dtype,
        }
        texts = {"text_encoder": component_hash(folder, "text_encoder"), "text_dtype": text_dtype}
        shapes = {
            "sizes": ["{}x{}".format(*size) for size in geometry.sizes],
            "frames": list(geometry.frames), "crop": config.crop,
            "crop_seed": config.seed if config.crop == "random" else None,
        }
        by_pixels, by_text = (hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
                              for facts in (pixels, texts))
        return cls(Path(config.cache), {**pixels, **texts, **shapes}, by_pixels, by_text,
                   config.store_dtype, extras.grey)

    def path(self, kind: str, of: str) -> Path:
        """Where the tensors of an item's key, a bucket's label or a caption lie."""
        by = self.texts if kind == "texts" else self.pixels
        of = clean_prompt(of) if kind == "texts" else of
        name = hashlib.sha256(f"{by} {kind} {of}".encode()).hexdigest()
        return self.folder / kind / name[:2] / f"{name}.safetensors"

    def save(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors atomically.

        Raises:
            OutputError: the disk is full, or can't be written.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        narrow = {k: v.to(DTYPES[self.dtype]).contiguous() for k, v in tensors.items()}
        with atomic_path(path) as temporary:
            try:
                save_file(narrow, temporary)
            except SafetensorError as error:  # a full disk comes as text alone
                found = re.search(r"os error (\d+)", str(error))
                number = int(found[1]) if found else errno.EIO
                raise OSError(number, os.strerror(number)) from error

    def _load(self, kind: str, of: str) -> dict[str, Tensor]:
        path = self.path(kind, of)
        try:
            return {name: value.float() for name, value in load_file(path).items()}
        except FileNotFoundError:
            raise InputError(f"{path} is missing from the cache; run vidgen data cache again, "
                             "which adds what is missing") from None
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path} is damaged: {error}; delete it and run vidgen data cache "
                             "again") from None

    def item(self, item: Item) -> Mapping[str, Tensor]:
        """What `ItemEncoder.item` gave, in float32.

        Raises:
            InputError: missing or damaged.
        """
        return self._load("latents", item.key)

    def text(self, caption: str) -> Tensor:
        """Context [S, D] of a caption; raises as `item` does."""
        return self._load("texts", caption)["context"]

    def grey(self, bucket: Bucket) -> Tensor | None:
        """Latents [C, F, h, w] of grey, for a bucket's clips; raises as `item` does."""
        return self._load("grey", bucket.label)["grey"] if self.has_grey else None

    def close(self) -> None:
        """Nothing is held."""


def require_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write what shapes a folder's latents, or make sure that it was the same before.

    Raises:
        InputError: latents there were made otherwise, which tells in what; or their manifest is
            damaged.
        OutputError: the folder can't be made.
    """
    path = folder / "manifest.json"
    if not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(folder, error) from None
        atomic_write(path, json.dumps(manifest, indent=1).encode())
        return
    try:
        found = json.loads(path.read_text("utf-8"))
        if not isinstance(found, dict):
            raise TypeError("it is no object")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path}, which says what made the latents there, is damaged ({error}); "
                         "name another folder or delete this one") from None
    told = _differing(found, manifest, sorted({**manifest, **found}))
    if told:
        raise InputError(f"the latents in {folder} were made otherwise ({told}); "
                         "name another folder or delete this one")


def _differing(there: Mapping[str, Any], here: Mapping[str, Any], names: Iterable[str]) -> str:
    return "; ".join(f"{name} is {there.get(name)!r} there, {here.get(name)!r} here"
                     for name in names if there.get(name) != here.get(name))


@dataclass(frozen=True)
class _Job:
    """Items of one file, in the order in which they begin, with the frames that each shows."""

    cache: LatentCache
    model: str
    device: str
    items: list[tuple[Item, list[int]]]


def make_cache(
    config: DataConfig, folder: ModelFolder, model: str, known: Selection, on_event: OnEvent, *,
    workers: int = 1, device: str = "cpu",
) -> dict[str, Any]:
    """Encode all items and captions that aren't in the cache yet, which is made where it is none.

    `model` opens the folder in another process; several, `workers`, encode at once, spread over the
    GPUs of a `device` "cuda" where there are some.

    Return `folder`, numbers of `items`, `encoded`, `captions` and `texts_encoded`, `bytes`, and
    `failed`: {name: why}.

    Raises:
        InputError: the folder holds a cache of something else.
        OutputError: no room, or not to be written; what is done stays.
    """
    items = known.items
    cache = LatentCache.of(config, known.geometry, folder, best_dtype(torch.device(device)))
    if not items:
        raise InputError("no item is left of the data; vidgen data check says why")
    _require_place(cache.folder)
    jobs = dict[tuple[str, int], _Job]()
    for fate in known.fates:
        missing = [i for i in fate.items if not cache.path("latents", i.key).exists()]
        for number, item in enumerate(missing):
            assert fate.facts is not None
            place = item.path.as_posix(), number // _PER_JOB
            job = jobs.setdefault(place, _Job(cache, model, device, []))
            job.items.append((item, picks(item, fate.facts, config, known.geometry)))
    todo = [item for job in jobs.values() for item, _ in job.items]
    extras, vae = Extras.of(folder), folder.components["vae"].config
    room = sum(extras.num_values(item.bucket, vae) for item in todo)
    check_output(cache.folder / "index.json" if cache.folder.is_dir() else cache.folder,
                 overwrite=True, num_bytes=room * DTYPES[config.store_dtype].itemsize)
    require_manifest(cache.folder, cache.manifest)
    captions = {"", *(text for item in items for text in item.captions)}
    texts = sorted(text for text in captions if not cache.path("texts", text).exists())
    # in this process, as a text encoder may take all the memory there is
    with closing(ItemEncoder(folder, torch.device(device))) as encoder:
        for caption in counted(on_event, "texts", texts, len(texts)):
            cache.save(cache.path("texts", caption), {"context": encoder.text(caption)})
    failed = dict[str, str]()
    try:
        results = results_of(_encode_file, jobs, workers, on_event)
        for (name, _), problem in counted(on_event, "encode", results, len(todo),
                                          lambda each: len(jobs[each[0]].items)):
            if problem is not None:
                failed[name] = problem
    finally:  # where this process did the work
        while _encoders:
            _encoders.popitem()[1].close()
    kept = [item for item in items if item.path.as_posix() not in failed]
    dropped = [[fate.file.name, fate.dropped] for fate in known.fates if fate.dropped]
    index = {
        "settings": _settings(config), "files": [_stamp(fate.file) for fate in known.fates],
        "items": [dump(item) for item in kept], "dropped": [*dropped, *failed.items()],
    }
    atomic_write(cache.folder / "index.json", (json.dumps(index) + "\n").encode())
    return {
        "folder": str(cache.folder), "items": len(kept),
        "encoded": sum(item.path.as_posix() not in failed for item in todo),
        "captions": len({text for item in kept for text in item.captions}),
        "texts_encoded": len(texts), "failed": failed,
        "bytes": sum(path.stat().st_size for path in cache.folder.rglob("*.safetensors")),
    }


def _require_place(place: Path) -> None:
    """Make the folder around a cache, and refuse one in which something else lies."""
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


_encoders: dict[tuple[str, str], ItemEncoder] = {}  # by model and device, opened once a process


def _encode_file(job: _Job) -> str | None:
    """Encode a file's items; return what is wrong with it, if it can't be read any more."""
    if (job.model, job.device) not in _encoders:
        _encoders[job.model, job.device] = ItemEncoder(
            open_own(job.model), torch.device(job.device))
    encoder = _encoders[job.model, job.device]
    try:
        with closing(Cursor(job.items[0][0].path)) as cursor:
            for item, shown in job.items:
                grey = job.cache.path("grey", item.bucket.label)
                if job.cache.has_grey and not grey.exists():
                    job.cache.save(grey, {"grey": encoder.grey(item.bucket)})
                made = encoder.item(item, shown, cursor)
                job.cache.save(job.cache.path("latents", item.key), made)
    except InputError as error:
        return str(error)
    return None


def _settings(config: DataConfig) -> dict[str, Any]:
    """What a config says about items; where its folders lie and their repeats aren't in it."""
    told = {name: value for name, value in dump(config).items() if name not in _FREE}
    return {**told, "folders": len(config.folders), "validation": config.validation is not None}


_Stamp = tuple[int, str, int, int, list[str]]


def _stamp(file: MediaFile) -> _Stamp:
    return file.folder, file.name, file.num_bytes, file.mtime_ns, list(file.captions)


@dataclass(frozen=True)
class _Index:
    """What `index.json` holds."""

    settings: dict[str, Any]
    files: list[_Stamp]
    items: list[Item]
    dropped: list[tuple[str, str]]


def open_cache(
    config: DataConfig, geometry: Geometry, folder: ModelFolder
) -> tuple[LatentCache, list[Item], list[str]]:
    """A finished cache, its items, and notes.

    The config has to be as it was when the cache was made, but for what is drawn.

    Raises:
        InputError: there is none, or it doesn't match config, model or files; says in what.
    """
    place = Path(config.cache)
    again = "run vidgen data cache with the same settings, which adds what is missing"
    try:
        told, manifest = (json.loads((place / name).read_text("utf-8"))
                          for name in ("index.json", "manifest.json"))
        index, text_dtype = build(_Index, dict(told), "index.json"), manifest.get("text_dtype")
    except FileNotFoundError:
        raise InputError(f"{place} holds no finished cache; {again}") from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError,
            InputError) as error:
        raise InputError(f"the cache {place} can't be read: {type(error).__name__}: {error}; "
                         f"{again}") from None
    cache = LatentCache.of(config, geometry, folder, text_dtype)
    require_manifest(place, cache.manifest)
    settings = _settings(config)
    differing = _differing(index.settings, settings, settings)
    if differing:
        raise InputError(f"the cache {place} was made with other settings ({differing}); {again}")
    folders = [config.folders[item.folder].path if item.folder >= 0 else config.validation
               for item in index.items]
    items = [replace(item, path=Path(root or "", item.name))
             for item, root in zip(index.items, folders, strict=True)]
    notes = [f"{name} is left out: {why}" for name, why in index.dropped]
    if all(Path(each.path).is_dir() for each in config.folders):
        _require_same_files(place, index.files, map(_stamp, scan(config).files), again)
    else:
        notes.insert(0, "the data's folders aren't here; the cache's word is taken")
    return cache, items, notes


def _require_same_files(
    place: Path, then: Iterable[_Stamp], files: Iterable[_Stamp], again: str
) -> None:
    before, now = ({stamp[:2]: stamp[2:] for stamp in stamps} for stamps in (then, files))
    both = sorted(before.keys() & now.keys())
    changes = {
        "new": sorted(now.keys() - before.keys()), "gone": sorted(before.keys() - now.keys()),
        "changed": [k for k in both if before[k][:2] != now[k][:2]],
        "described anew": [
            k for k in both if before[k][:2] == now[k][:2] and before[k][2] != now[k][2]],
    }
    told = [f"{len(keys)} {what} ({', '.join(name for _, name in keys[:3])})"
            for what, keys in changes.items() if keys]
    if told:
        raise InputError(f"files were changed since the cache {place} was made: "
                         f"{'; '.join(told)}; {again}")
