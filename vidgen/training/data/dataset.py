"""What fine-tuning draws its batches from: items of the cache, or encoded as they are drawn.

Axes: B batch, C latent channels, F latent frames, K stills, h w latent rows and columns, S text or
image tokens, D width.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vidgen.core.errors import InputError
from vidgen.core.protocols import OnEvent
from vidgen.training.data.cache import open_cache
from vidgen.training.data.config import NO_CACHE, Bucket, DataConfig, Geometry
from vidgen.training.data.encode import Cursor, ItemEncoder, still_frames
from vidgen.training.data.schedule import Schedule, drawn
from vidgen.training.data.select import Item, picks
from vidgen.training.data.store import Store
from vidgen.training.data.survey import Survey, survey
from vidgen.weights.folder import ModelFolder
from vidgen.weights.layouts import open_model

__all__ = ["Bucket", "Dataset", "Item", "open_dataset"]

Split = Literal["train", "validation"]


class Source(Protocol):
    """Where an item's tensors come from."""

    def item(self, item: Item) -> Mapping[str, Tensor]:
        """What `ItemEncoder.item` gives."""

    def text(self, caption: str) -> Tensor:
        """Context [S, D] of a caption, float32."""

    def grey(self, bucket: Bucket) -> Tensor | None:
        """Latents [C, F, h, w] of grey, where the model needs them."""

    def close(self) -> None:
        """Let everything go."""


@dataclass(frozen=True)
class _Cached:
    store: Store
    needs_grey: bool

    def item(self, item: Item) -> Mapping[str, Tensor]:
        return self.store.load(self.store.path("latents", item.key))

    def text(self, caption: str) -> Tensor:
        return self.store.load(self.store.text_path(caption))["context"]

    def grey(self, bucket: Bucket) -> Tensor | None:
        return self.store.grey(bucket) if self.needs_grey else None

    def close(self) -> None:
        """Nothing is held."""


class _Encoded:
    """Items encoded when they are drawn; contexts, which are small, are kept."""

    def __init__(self, config: DataConfig, known: Survey, encoder: ItemEncoder) -> None:
        self._config, self._known, self._encoder = config, known, encoder
        self.text = lru_cache(maxsize=4096)(encoder.text)
        self._grey = lru_cache(maxsize=16)(encoder.grey)

    def item(self, item: Item) -> Mapping[str, Tensor]:
        cursor = Cursor(item.path)
        try:
            facts = self._known.facts[item.sha256]
            shown = picks(item, facts, self._config, self._known.selection.geometry)
            return self._encoder.item(item, shown, cursor)
        finally:
            cursor.close()

    def grey(self, bucket: Bucket) -> Tensor | None:
        return self._grey(bucket) if self._encoder.extras.grey else None

    def close(self) -> None:
        self._encoder.close()


def open_dataset(
    config: DataConfig,
    model: str | Path | ModelFolder,
    split: Split = "train",
    *,
    batch_size: int = 1,
    accumulate: int = 1,
    with_context: bool = True,
    device: torch.device | str = "cpu",
    on_event: OnEvent | None = None,
) -> Dataset:
    """Open what a model is to learn from, or what it is validated on.

    Args:
        config: the data.
        model: the model, or how to open it.
        split: "validation" is what `held_out` or `validation` keep aside.
        batch_size: items of a micro-batch on each rank.
        accumulate: micro-batches of a step.
        with_context: whether batches hold the captions' contexts.
        device: where items are encoded without a cache; batches lie on the CPU.
        on_event: told of progress while files are looked at.

    Raises:
        InputError: data that can't be used, a cache that doesn't match, or nothing in the split.
        ModelError: no such model.
    """
    folder = model if isinstance(model, ModelFolder) else open_model(str(model))
    if not isinstance(folder, ModelFolder):
        raise InputError(f"model {model} runs through diffusers, which can't be fine-tuned here; "
                         "give one of the toybox or Wan family")
    tell: OnEvent = on_event or (lambda _: None)
    geometry = Geometry.of(config, folder)
    source, items, notes = _open_source(config, geometry, folder, torch.device(device), tell)
    parts = _split(config, items)
    if not parts[split]:
        raise InputError(_why_empty(config, split, len(items), notes))

    def dataset(part: Split, held_out: Dataset | None) -> Dataset:
        own = config
        if part == "validation":
            own = replace(config, caption_dropout=0.0, image_share=None, drop_last=False)
        return Dataset(own, geometry, parts[part], source, held_out, notes,
                       batch_size=batch_size, accumulate=accumulate, with_context=with_context)

    held_out = dataset("validation", None) if parts["validation"] else None
    if split == "validation":
        assert held_out is not None
        return held_out
    return dataset("train", held_out)


def _open_source(
    config: DataConfig, geometry: Geometry, folder: ModelFolder, device: torch.device,
    tell: OnEvent,
) -> tuple[Source, list[Item], list[str]]:
    if config.cache != NO_CACHE:
        store, items, notes = open_cache(config, geometry, folder)
        return _Cached(store, folder.conditioning == "control"), items, notes
    known = survey(config, folder, tell)
    chosen = known.selection
    notes = [*chosen.notes, *(f"{f.file.name} is left out: {f.dropped}"
                              for f in chosen.fates if f.dropped is not None)]
    return _Encoded(config, known, ItemEncoder(folder, device)), chosen.items, notes


def _split(config: DataConfig, items: Sequence[Item]) -> dict[Split, list[Item]]:
    """Items to learn from, as often as their folder says, and to validate on, once each."""
    parts: dict[Split, list[Item]] = {"train": [], "validation": []}
    for item in items:
        if item.folder < 0 or int(item.group, 16) / 2**256 < config.held_out:
            parts["validation"].append(item)
        else:
            parts["train"] += [item] * config.folders[item.folder].repeats
    return parts


def _why_empty(
    config: DataConfig, split: Split, num_items: int, notes: Sequence[str]
) -> str:
    if split == "validation":
        return ("no file is kept for validation; set data.held_out to a larger share, or "
                "data.validation to a folder")
    if num_items and config.validation is None:
        return (f"all {num_items} items are held out for validation, as data.held_out is "
                f"{config.held_out:g}; give a smaller share")
    told = "; ".join(notes[:5])
    return f"nothing is left to learn from in {', '.join(f.path for f in config.folders)}: {told}"


class Dataset:
    """Batches of one split; made by `open_dataset`.

    Attributes:
        items: in order, each as often as its folder is repeated.
        buckets: how many items each bucket has.
        fps: at which the clips are shown.
        held_out: the other split, for validation; None where nothing is kept aside.
        notes: what was left out or matters otherwise; to be told.
        fingerprint: SHA-256 of all that decides which items are drawn when.
    """

    def __init__(
        self, config: DataConfig, geometry: Geometry, items: Sequence[Item], source: Source,
        held_out: Dataset | None, notes: Sequence[str], *,
        batch_size: int, accumulate: int, with_context: bool,
    ) -> None:
        self.config, self.items, self.held_out = config, list(items), held_out
        self.fps, self.notes = geometry.fps, list(notes)
        self.buckets = dict(sorted(Counter(item.bucket for item in items).items()))
        self.batch_size, self.accumulate = batch_size, accumulate
        self._source, self._with_context = source, with_context
        self._slots: dict[Bucket, list[int]] = {bucket: [] for bucket in self.buckets}
        for index, item in enumerate(self.items):
            self._slots[item.bucket].append(index)
        self._schedule = Schedule(
            self.buckets, seed=config.seed, drop_last=config.drop_last,
            image_share=config.image_share,
        )
        self.steps_per_epoch()  # refuses a batch that no bucket fills

    @property
    def num_items(self) -> int:
        """Windows and pictures, repeats counted."""
        return len(self.items)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides which items are drawn when."""
        config = self.config
        facts = [[item.key, item.captions] for item in self.items]
        drawn_by = [config.seed, config.drop_last, str(config.image_share), config.caption_dropout,
                    self.batch_size, self.accumulate, str(self.fps), config.fps_rule]
        return hashlib.sha256(json.dumps([facts, drawn_by]).encode()).hexdigest()

    def _global_batch(self, world: int) -> int:
        return self.batch_size * self.accumulate * world

    def steps_per_epoch(self, world: int = 1) -> int:
        """Steps in which each item is learned once."""
        return self._schedule.steps_per_epoch(self._global_batch(world))

    def epoch(self, step: int, world: int = 1) -> tuple[int, int]:
        """(epoch, step in it) of a run's step, from 0."""
        return self._schedule.epoch(step, self._global_batch(world))

    def ends(self, world: int = 1) -> list[str]:
        """What becomes of items that don't fill a bucket's last batch, in words."""
        size = self._global_batch(world)
        told = [f"bucket {bucket.label}: {count} items of each epoch are left out (drop_last)"
                for bucket, count in self._schedule.left_out(size).items()]
        told += [f"bucket {bucket.label}: {count} items are learned twice in each epoch, to fill "
                 "its last batch" for bucket, count in self._schedule.filled_up(size).items()]
        return told

    def batch(
        self, step: int, micro: int = 0, rank: int = 0, world: int = 1, *, detour: int = 0
    ) -> dict[str, Any]:
        """A micro-batch; what it holds follows from the arguments, the config and the items.

        Args:
            step: of the run, from 0.
            micro: of the step.
            rank: of `world` that take part.
            world: ranks that take different items.
            detour: other items for every number, to step around a bad batch.

        Returns:
            `latents` [B, C, F, h, w] float32; `context` [B, S, D], zero behind `context_lengths`
            [B], and `context_mask` [B, S]; `captions`, "" where dropped; `files`; `indices` into
            `items`; `fps`; `bucket`; in clips alone `finer` [B, C, n, h, w], of models that draw
            at a finer rate, and what the model's conditions need: `stills` [B, C, K, h, w] with
            `still_index` [B, K]; `first` and `both` [B, C, F, h, w], `grey` [1, C, F, h, w];
            `image` and `image_last` [B, S, D].
        """
        draw = self._schedule.draw(step, self._global_batch(world), detour=detour)
        begin = (micro * world + rank) * self.batch_size
        numbers = range(begin, begin + self.batch_size)
        indices = [self._slots[draw.bucket][draw.slots[number]] for number in numbers]
        captions = [
            self._caption(self.items[index], f"{draw.key} {number}")
            for index, number in zip(indices, numbers, strict=True)
        ]
        return self.item_batch(indices, captions=captions)

    def _caption(self, item: Item, key: str) -> str:
        if drawn(f"{key} dropout") < self.config.caption_dropout:
            return ""
        return item.captions[int(drawn(f"{key} caption") * len(item.captions))]

    def item_batch(
        self, indices: Sequence[int], *, captions: Sequence[str] | None = None
    ) -> dict[str, Any]:
        """A batch, as `batch` gives it, of given items of one bucket; by default their first
        captions.
        """
        items = [self.items[index] for index in indices]
        buckets = {item.bucket for item in items}
        assert len(buckets) == 1, "a batch is of one bucket"
        bucket = buckets.pop()
        texts = [item.captions[0] for item in items] if captions is None else list(captions)
        found = [self._source.item(item) for item in items]
        made: dict[str, Any] = {name: torch.stack([each[name] for each in found])
                                for name in found[0]}
        made["latents"] = made.pop("clip")
        if "stills" in made:
            made["still_index"] = torch.tensor([still_frames(bucket)] * len(items))
        grey = self._source.grey(bucket)
        if grey is not None:
            made["grey"] = grey[None]
        if self._with_context:
            rows = [self._source.text(text) for text in texts]
            lengths = torch.tensor([len(row) for row in rows])
            made["context"] = pad_sequence(rows, batch_first=True)
            made["context_lengths"] = lengths
            made["context_mask"] = torch.arange(int(lengths.max())) < lengths[:, None]
        return made | {
            "captions": texts, "files": [item.name for item in items], "indices": list(indices),
            "fps": float(self.fps), "bucket": bucket,
        }

    def close(self) -> None:
        """Let networks go that encode."""
        self._source.close()
