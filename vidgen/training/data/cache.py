"""Encode items with a model's own networks, and cache them and their captions on disk.

A cache's `latents/`, `texts/` and `grey/` have safetensors files, named by a hash of everything
that affects their content, so that a killed run continues after them. `index.json`, written last,
has the items, their files, and the settings and hashes of the networks; a cache of another model is
refused.

Axes: C latent channels, F latent frames, h w latent rows and columns, H W pixel rows and columns, S
text or image tokens, D width.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vidgen.core.config import build, dump
from vidgen.core.errors import InputError
from vidgen.core.protocols import OnEvent
from vidgen.core.runtime import atomic_path, atomic_write, best_dtype, check_output, write_error
from vidgen.diffusion.temporal_upsampling import LatentRate
from vidgen.media.read import fit, load_image
from vidgen.media.types import Frames
from vidgen.media.video_reader import TimedFrame, VideoReader
from vidgen.models.image import encode_image
from vidgen.models.text import TextEncoder
from vidgen.models.tokenizer import PromptTokenizer, clean_prompt
from vidgen.models.vae import VAEConfig
from vidgen.pipeline.denoise import upsampling_of
from vidgen.pipeline.inputs import pixels_of
from vidgen.pipeline.loader import DTYPES, ModelLoader
from vidgen.pipeline.workers.scheduler import results_of
from vidgen.training.config import Bucket, DataConfig, Geometry
from vidgen.training.data.files import Item, MediaFile, scan
from vidgen.training.data.probe import is_still
from vidgen.training.data.survey import Selection, open_trainable, picks, track
from vidgen.weights.component import Role
from vidgen.weights.folder import ModelFolder, hash_files
from vidgen.weights.tensors import held
from vidgen.weights.write import write_safetensors

FORMAT_VERSION = 1
_FOLDERS = ("latents", "texts", "grey")
_FREE = ("cache", "area", "aspects", "image_share", "held_out", "caption_dropout", "seed")
"""Fields of the config that don't affect the items."""
_KEPT = 4  # decoded frames kept, for an item that begins before the last one's end

GetFrame: TypeAlias = Callable[[int], Frames]


@dataclass(frozen=True)
class Extras:
    """Hold the additional latents and features that a model's conditions need."""

    stills: bool = False  # middle and last frame, each encoded alone, which replace latent frames
    first: bool = False  # the clip with grey after its first frame, for extra channels
    both: bool = False  # the clip with grey between first and last frame, likewise
    grey: bool = False  # a clip of grey, for control blocks
    num_images: int = 0  # pictures whose features the model reads
    rate: int = 1  # temporal upsampling of latents below the model's boundary

    @classmethod
    def of(cls, folder: ModelFolder) -> Extras:
        """Return what the conditions of a model need."""
        kind, tasks = folder.conditioning, folder.tasks
        stacked = kind in ("channels", "control")
        images = 0
        if "image_encoder" in folder.components:
            dit = folder.components["transformer"].config
            images = 1 if dit.image_positions is None else 2
        return cls(stills=kind == "tokens" and bool({"last-image", "frames"} & set(tasks)),
                   first=stacked, both=stacked and "last-image" in tasks, grey=kind == "control",
                   num_images=images, rate=upsampling_of(folder))

    def num_values(self, bucket: Bucket, vae: VAEConfig) -> int:
        """Return about how many numbers the latents of an item have."""
        frames = 1 + (bucket.num_frames - 1) // vae.strides.t
        count = frames * (1 + self.first + self.both) + 2 * self.stills
        if self.rate > 1 and frames > 1:
            count += LatentRate(self.rate).num_upsampled(frames)
        rows, columns = bucket.height // vae.strides.hw, bucket.width // vae.strides.hw
        return count * vae.latent_channels * rows * columns


def component_hash(folder: ModelFolder, role: Role) -> str | None:
    """Return a hash of a network's files and config, with its tokenizer or image processor."""
    component = folder.components.get(role)
    if component is None:
        return None
    files = list(component.tensors.files)
    if role == "text_encoder":
        files += sorted(folder.tokenizer.glob("*.json"))
    if role == "image_encoder" and folder.image_processor is not None:
        files.append(folder.image_processor / "preprocessor_config.json")
    parts = [*sorted(hash_files(files).values()), repr(component.config)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@contextmanager
def open_frames(path: Path) -> Iterator[GetFrame]:
    """Yield a function that returns a file's frame by its number, uint8 [H, W, 3].

    Numbers must rise, as each frame is decoded once; steps back of up to 3 frames are allowed. The
    function raises InputError where the file has too few frames.
    """
    if is_still(path):
        picture = load_image(path)[0]
        yield lambda _: picture
        return
    recent: deque[tuple[int, TimedFrame]] = deque(maxlen=_KEPT)
    frames: Iterator[tuple[int, TimedFrame]] = iter(())

    def frame_at(index: int) -> Frames:
        nonlocal frames
        if not recent or index < recent[0][0]:
            recent.clear()
            frames = enumerate(reader.timed())
        while not recent or recent[-1][0] < index:
            following = next(frames, None)
            if following is None:
                raise InputError(f"{path} ends before frame {index}; it may have changed: run "
                                 "vidgen data check again")
            recent.append(following)
        return reader.picture(next(frame for number, frame in recent if number == index))

    with VideoReader(path, square=False) as reader:
        yield frame_at


class ItemEncoder:
    """The networks of a model that encode data, each loaded at its first use.

    The VAE and image encoder compute in float32, the text encoder in the device's fastest dtype.
    """

    def __init__(self, folder: ModelFolder, device: torch.device) -> None:
        self.folder, self.device, self.extras = folder, device, Extras.of(folder)
        self._pixels = ModelLoader(folder, device, torch.float32)
        self._texts = ModelLoader(folder, device, DTYPES[best_dtype(device)])
        limit = folder.components["transformer"].config.text_len
        self._tokenizer = PromptTokenizer(folder.tokenizer, limit)

    def close(self) -> None:
        """Release the networks."""
        self._pixels.close()
        self._texts.close()

    @torch.no_grad()
    def item(self, item: Item, picks: Sequence[int], frame_at: GetFrame) -> dict[str, Tensor]:
        """Encode an item, whose frames are the numbers `picks` of its file's.

        Return `clip` [C, F, h, w], the posterior's mean, normalised. For a clip also the kinds in
        `extras`: `finer` [C, n, h, w] at a higher latent rate, `stills` [C, 2, h, w], `first` and
        `both` [C, F, h, w], `image` and `image_last` [S, D]. All are float32 on the CPU.

        Raises:
            InputError: the file ends before the item.
        """
        bucket, count = item.bucket, item.bucket.num_frames
        kept: dict[int, Frames] = {}

        def shown() -> Iterator[Frames]:
            for position, index in enumerate(picks):
                fitted = fit(frame_at(index), bucket.height, bucket.width, "crop")
                if position in (0, count // 2, count - 1):
                    kept[position] = fitted
                yield fitted

        rate = self.extras.rate
        frames: Iterable[Frames] = shown() if rate == 1 else list(shown())
        made = {"clip": self._encode(frames, bucket)}
        if count == 1:
            return made
        if rate > 1:
            made["finer"] = self._encode(frames, bucket, rate)
        grey = _grey(bucket)
        first, last = kept[0], kept[count - 1]
        if self.extras.stills:
            stills = [self._encode([kept[n]], bucket) for n in still_frames(bucket)]
            made["stills"] = torch.cat(stills, dim=1)
        if self.extras.first:
            made["first"] = self._encode([first, *[grey] * (count - 1)], bucket)
        if self.extras.both:
            made["both"] = self._encode([first, *[grey] * (count - 2), last], bucket)
        for name, picture in (("image", first), ("image_last", last))[: self.extras.num_images]:
            with self._pixels.use("image_encoder") as encoder:
                features = encode_image(encoder, picture, self.folder.image_processor, self.device)
                made[name] = features[0].float().cpu()
        return made

    def grey(self, bucket: Bucket) -> Tensor:
        """Return latents [C, F, h, w] of a grey clip."""
        return self._encode([_grey(bucket)] * bucket.num_frames, bucket)

    @torch.no_grad()
    def _encode(self, frames: Iterable[Frames | Tensor], bucket: Bucket, rate: int = 1) -> Tensor:
        """Return latents [C, F, h, w] of frames, uint8 [H, W, 3] or [1, 3, 1, H, W] in [-1, 1]."""
        def chunks() -> Iterator[Tensor]:
            for frame in frames:
                if isinstance(frame, Tensor):
                    yield frame.to(self.device)
                else:
                    yield pixels_of([frame], bucket.width, bucket.height, "crop").to(self.device)

        with self._pixels.use("vae") as vae:
            latents = vae.at_rate(rate).stream_encode(chunks())
            return torch.cat([latent.float().cpu() for latent in latents], dim=2)[0]

    @torch.no_grad()
    def text(self, caption: str) -> Tensor:
        """Return the context [S, D] of a caption without padding, float32 on the CPU."""
        with self._texts.use("text_encoder") as network:
            context, lengths = TextEncoder(network, self._tokenizer).encode([caption])
            return context[0, : int(lengths[0])].float().cpu()


def _grey(bucket: Bucket) -> Tensor:
    return torch.zeros(1, 3, 1, bucket.height, bucket.width)


def still_frames(bucket: Bucket) -> tuple[int, int]:
    """Return the frames of a clip for `Extras.stills`: the middle and the last one."""
    return bucket.num_frames // 2, bucket.num_frames - 1


@dataclass(frozen=True)
class LatentCache:
    """Hold the folder of a cache, and hashes of everything that affects its tensors."""

    folder: Path
    facts: Mapping[str, Any]  # everything that affects the items, by name
    pixels: str  # hash of VAE, image encoder and frame rate
    texts: str  # hash of text encoder and its dtype
    dtype: str  # of stored tensors: "fp16", "bf16" or "fp32"
    has_grey: bool  # whether the model needs latents of grey

    @classmethod
    def of(
        cls, config: DataConfig, geometry: Geometry, folder: ModelFolder, text_dtype: str
    ) -> LatentCache:
        """Return the cache of a config and a model with a text encoder in `text_dtype`."""
        extras = Extras.of(folder)
        pixels = {
            "format": FORMAT_VERSION, "vae": component_hash(folder, "vae"),
            "image_encoder": component_hash(folder, "image_encoder"), "extras": asdict(extras),
            "fps": str(geometry.fps), "store_dtype": config.store_dtype,
        }
        texts = {"text_encoder": component_hash(folder, "text_encoder"), "text_dtype": text_dtype}
        settings = {name: value for name, value in dump(config).items() if name not in _FREE}
        facts = {
            **settings, "folders": len(config.folders),
            "sizes": [f"{width}x{height}" for width, height in geometry.sizes],
            "validation": config.validation is not None, "frames": list(geometry.frames),
            **pixels, **texts,
        }
        by_pixels, by_text = (hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest()
                              for part in (pixels, texts))
        return cls(Path(config.cache), facts, by_pixels, by_text, config.store_dtype, extras.grey)

    def path(self, kind: str, of: str) -> Path:
        """Return the path for an item's key, a bucket's label (grey) or a caption (texts)."""
        by = self.texts if kind == "texts" else self.pixels
        of = clean_prompt(of) if kind == "texts" else of
        name = hashlib.sha256(f"{by} {kind} {of}".encode()).hexdigest()
        return self.folder / kind / name[:2] / f"{name}.safetensors"

    def save(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors atomically, in the cache's dtype."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            write_safetensors(temporary, {
                name: held(value, DTYPES[self.dtype]) for name, value in tensors.items()})

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
        """Return what `ItemEncoder.item` made, float32; raise InputError if it is damaged."""
        return self._load("latents", item.key)

    def text(self, caption: str) -> Tensor:
        """Return the context [S, D] of a caption."""
        return self._load("texts", caption)["context"]

    def grey(self, bucket: Bucket) -> Tensor | None:
        """Return latents [C, F, h, w] of a grey clip, if the model needs them."""
        return self._load("grey", bucket.label)["grey"] if self.has_grey else None

    def close(self) -> None:
        """Do nothing, as no file stays open."""


def make_cache(
    config: DataConfig, folder: ModelFolder, model: str, known: Selection, on_event: OnEvent, *,
    workers: int = 1, device: str = "cpu",
) -> dict[str, Any]:
    """Encode all items and captions that the cache lacks; make the cache if it doesn't exist.

    Args:
        model: name of the model, with which worker processes open `folder` again.
        workers: number of processes that encode, spread over the GPUs with the device "cuda".

    Returns:
        `folder`, the numbers `items`, `encoded`, `captions`, `texts_encoded` and `bytes`, and
        `failed`: {file name: reason}.

    Raises:
        InputError: no items, or the cache's folder holds other files.
        OutputError: the disk is full or can't be written; finished tensors stay.
    """
    items, geometry = known.items, known.geometry
    if not items:
        raise InputError("the data have no usable items; vidgen data check lists the reasons")
    cache = LatentCache.of(config, geometry, folder, best_dtype(torch.device(device)))
    _require_place(cache.folder)
    jobs: dict[str, list[tuple[Item, list[int]]]] = {}
    for file in known.files:
        missing = [(item, picks(item, file.facts, geometry)) for item in file.items
                   if not cache.path("latents", item.key).exists()]
        if missing:
            jobs[file.path.as_posix()] = missing
    extras, vae = Extras.of(folder), folder.components["vae"].config
    room = sum(extras.num_values(item.bucket, vae) for job in jobs.values() for item, _ in job)
    check_output(cache.folder / "index.json", overwrite=True,
                 num_bytes=room * DTYPES[config.store_dtype].itemsize)
    captions = {"", *(text for item in items for text in item.captions)}
    texts = sorted(text for text in captions if not cache.path("texts", text).exists())
    # in this process, as one text encoder may take most of the memory
    with closing(ItemEncoder(folder, torch.device(device))) as encoder:
        for caption in track(on_event, "texts", texts, len(texts)):
            cache.save(cache.path("texts", caption), {"context": encoder.text(caption)})
    results = results_of(partial(_encode_file, cache, model, device), jobs, workers, on_event)
    try:
        failed = {name: problem for name, problem in track(on_event, "encode", results, len(jobs))
                  if problem is not None}
    finally:  # without workers this process has an encoder
        _encoder.cache_clear()
    kept = [item for item in items if item.path.as_posix() not in failed]
    dropped = [(file.name, file.dropped) for file in known.files if file.dropped]
    index = _Index(dict(cache.facts), [_stamp(file) for file in known.files], kept,
                   [*dropped, *failed.items()])
    atomic_write(cache.folder / "index.json", (json.dumps(dump(index)) + "\n").encode())
    return {
        "folder": str(cache.folder), "items": len(kept), "failed": failed,
        "encoded": sum(len(job) for name, job in jobs.items() if name not in failed),
        "captions": len({text for item in kept for text in item.captions}),
        "texts_encoded": len(texts),
        "bytes": sum(path.stat().st_size for path in cache.folder.rglob("*.safetensors")),
    }


def _require_place(place: Path) -> None:
    """Make the folder of a cache; refuse one with other files."""
    if place.exists() and not place.is_dir():
        raise InputError(f"{place} is a file; choose another folder for the cache")
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(place, error) from None
    if any(path.name not in (*_FOLDERS, "index.json") and not path.name.startswith(".")
           for path in place.iterdir()):
        raise InputError(f"{place} holds other files than a cache; choose an empty or a new folder")


@lru_cache(maxsize=1)
def _encoder(model: str, device: str) -> ItemEncoder:
    return ItemEncoder(open_trainable(model), torch.device(device))


def _encode_file(
    cache: LatentCache, model: str, device: str, items: list[tuple[Item, list[int]]]
) -> str | None:
    """Encode a file's items, by their first frame; return the error if it can't be read."""
    encoder = _encoder(model, device)
    try:
        with open_frames(items[0][0].path) as frame_at:
            for item, shown in items:
                grey = cache.path("grey", item.bucket.label)
                if cache.has_grey and not grey.exists():
                    cache.save(grey, {"grey": encoder.grey(item.bucket)})
                made = encoder.item(item, shown, frame_at)
                cache.save(cache.path("latents", item.key), made)
    except InputError as error:
        return str(error)
    return None


_Stamp = tuple[int, str, int, int, list[str]]


def _stamp(file: MediaFile) -> _Stamp:
    return file.folder, file.name, file.num_bytes, file.mtime_ns, list(file.captions)


@dataclass(frozen=True)
class _Index:
    """Hold the content of `index.json`."""

    facts: dict[str, Any]
    files: list[_Stamp]
    items: list[Item]
    dropped: list[tuple[str, str]]


def open_cache(
    config: DataConfig, geometry: Geometry, folder: ModelFolder
) -> tuple[LatentCache, list[Item], list[str]]:
    """Return a finished cache, its items, and notes.

    Raises:
        InputError: no finished cache, or the config, model or files differ from those it was made
            with; names the differences.
    """
    place = Path(config.cache)
    again = "run vidgen data cache with the same settings, which adds what is missing"
    try:
        index = build(_Index, dict(json.loads((place / "index.json").read_text("utf-8"))), "index")
    except FileNotFoundError:
        raise InputError(f"{place} has no finished cache; {again}") from None
    except (OSError, ValueError, TypeError, RecursionError, InputError) as error:
        raise InputError(f"the cache {place} can't be read: {type(error).__name__}: {error}; "
                         f"{again}") from None
    cache = LatentCache.of(config, geometry, folder, str(index.facts.get("text_dtype")))
    differing = "; ".join(f"{name} was {index.facts.get(name)!r}, is {value!r}"
                          for name, value in cache.facts.items() if index.facts.get(name) != value)
    if differing:
        raise InputError(f"the cache {place} was made with other settings or another model "
                         f"({differing}); {again}")
    folders = [config.folders[item.folder].path if item.folder >= 0 else config.validation
               for item in index.items]
    items = [replace(item, path=Path(root or "", item.name))
             for item, root in zip(index.items, folders, strict=True)]
    notes = [f"{name} is left out: {why}" for name, why in index.dropped]
    if not all(Path(each.path).is_dir() for each in config.folders):
        return cache, items, [
            "the data's folders don't exist, so changes of their files go unnoticed", *notes]
    then, now = ({json.dumps(stamp) for stamp in stamps}
                 for stamps in (index.files, map(_stamp, scan(config)[0])))
    changed = sorted({json.loads(stamp)[1] for stamp in then ^ now})
    if changed:
        raise InputError(f"{len(changed)} files or their captions were changed, added or removed "
                         f"since the cache {place} was made ({', '.join(changed[:5])}); {again}")
    return cache, items, notes
