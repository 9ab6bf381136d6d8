"""Batches for fine-tuning, of items from a cache or encoded when they are drawn.

The items of a batch are a pure function of seed, step and rank, so that a run can resume at any
step without other state. A batch has items of one bucket; an epoch has batches of all buckets.

Axes: B batch, C latent channels, F latent frames, K stills, h w latent rows and columns, S text or
image tokens, D width.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vidgen.core.errors import InputError
from vidgen.core.protocols import OnEvent
from vidgen.training.config import NO_CACHE, Bucket, DataConfig, Geometry
from vidgen.training.data.cache import (
    ItemEncoder,
    LatentCache,
    open_cache,
    open_frames,
    still_frames,
)
from vidgen.training.data.files import Item
from vidgen.training.data.survey import Selection, open_trainable, picks, survey
from vidgen.training.task import drawn, seed_of
from vidgen.weights.folder import ModelFolder


@lru_cache(maxsize=64)
def order_of(count: int, key: str) -> list[int]:
    """Return a permutation of the numbers below `count`, seeded by `key`."""
    return sorted(range(count), key=lambda number: seed_of(key, number))


class Draw(NamedTuple):
    """Hold the items of one step."""

    bucket: Bucket  # of all items
    slots: tuple[int, ...]  # indices within the bucket, for the global batch


class Schedule:
    """The order of a run's batches, from the number of items by bucket.

    In each epoch a bucket's last batch is filled with the bucket's first items. `image_share` is
    the share of steps with pictures; None: in proportion to their number.
    """

    def __init__(
        self, counts: Mapping[Bucket, int], *, seed: int = 0, image_share: float | None = None
    ) -> None:
        self.counts, self.seed = {b: counts[b] for b in sorted(counts) if counts[b]}, seed
        self._pools, self._main = {"all": self.counts}, "all"
        self._share = Fraction(image_share or 0).limit_denominator(1000)
        if image_share is None:
            return
        clips = {b: n for b, n in self.counts.items() if b.num_frames > 1}
        pictures = {b: n for b, n in self.counts.items() if b.num_frames == 1}
        for needed, pool, kind in ((self._share > 0, pictures, "pictures"),
                                   (self._share < 1, clips, "clips")):
            if needed and not pool:
                raise InputError(f"data.image_share is {image_share}, but the data have no {kind}; "
                                 "add some, or leave image_share out")
        self._pools = {"clips": clips, "pictures": pictures}
        self._main = "clips" if self._share < 1 else "pictures"

    def draw(self, step: int, global_batch: int) -> Draw:
        """Return the items of a step (from 0) with `global_batch` items over all ranks."""
        pool, index = self._main, step
        if pool != "all":
            pictures = math.floor(step * self._share)  # before this step
            is_picture = math.floor((step + 1) * self._share) > pictures
            pool, index = ("pictures", pictures) if is_picture else ("clips", step - pictures)
        batches = self._batches(pool, global_batch)
        epoch, position = divmod(index, len(batches))
        key = f"{self.seed} {pool} {epoch}"
        bucket, number = batches[order_of(len(batches), key)[position]]
        size = self.counts[bucket]
        order = order_of(size, f"{key} {bucket.label}")
        numbers = range(number * global_batch, (number + 1) * global_batch)
        return Draw(bucket, tuple(order[n % size] for n in numbers))

    def steps_per_epoch(self, global_batch: int) -> int:
        """Return the steps of an epoch of all items, or with `image_share` of all clips."""
        wanted = len(self._batches(self._main, global_batch))
        if self._main == "pictures":
            return math.ceil(wanted / self._share)
        return math.floor((wanted - 1) / (1 - self._share)) + 1

    def remainders(self, global_batch: int) -> dict[Bucket, int]:
        """Return the number of items that an epoch repeats to fill each bucket's last batch."""
        return {b: -n % global_batch for b, n in self.counts.items() if n % global_batch}

    def _batches(self, pool: str, global_batch: int) -> list[tuple[Bucket, int]]:
        """Return the batches of an epoch: bucket, and number within the bucket."""
        return [(bucket, number) for bucket, count in self._pools[pool].items()
                for number in range(math.ceil(count / global_batch))]


class _Encoded:
    """Encode items when they are drawn; keep contexts, which are small, in memory."""

    def __init__(self, known: Selection, encoder: ItemEncoder) -> None:
        self._geometry, self._encoder = known.geometry, encoder
        self._facts = {file.facts.sha256: file.facts for file in known.files}
        self.text, self.close = lru_cache(maxsize=4096)(encoder.text), encoder.close
        self._grey = lru_cache(maxsize=16)(encoder.grey)

    def item(self, item: Item) -> Mapping[str, Tensor]:
        shown = picks(item, self._facts[item.sha256], self._geometry)
        with open_frames(item.path) as frame_at:
            return self._encoder.item(item, shown, frame_at)

    def grey(self, bucket: Bucket) -> Tensor | None:
        return self._grey(bucket) if self._encoder.extras.grey else None


def open_dataset(
    config: DataConfig, model: str | Path | ModelFolder, *, batch_size: int = 1,
    accumulate: int = 1, with_context: bool = True, device: torch.device | str = "cpu",
    on_event: OnEvent | None = None,
) -> Dataset:
    """Open the training data of a config for a model, with the validation data as `held_out`.

    Args:
        model: a model's name, path or opened folder.
        batch_size, accumulate: items per micro-batch, micro-batches per step, on each rank.
        with_context: whether batches have the captions' contexts.
        device: encodes items without a cache. Batches are on the CPU.

    Raises:
        InputError: invalid data, a cache that doesn't match, or no items to train on.
        ModelError: no such model.
    """
    folder = model if isinstance(model, ModelFolder) else open_trainable(str(model))
    geometry = Geometry.of(config, folder)
    source: LatentCache | _Encoded
    if config.cache != NO_CACHE:
        source, items, notes = open_cache(config, geometry, folder)
    else:
        known = survey(config, folder, on_event or (lambda _: None))
        items, notes = known.items, [
            *known.notes, *(f"{file.name} is left out: {file.dropped}"
                            for file in known.files if file.dropped)]
        source = _Encoded(known, ItemEncoder(folder, torch.device(device)))
    learned, kept = list[Item](), list[Item]()
    for item in items:
        if item.folder < 0 or int(item.group, 16) / 2**256 < config.held_out:
            kept.append(item)
        else:
            learned += [item] * config.folders[item.folder].repeats
    if not learned and items and config.validation is None:
        raise InputError(f"all {len(items)} items are held out for validation, as data.held_out is "
                         f"{config.held_out:g}; give a smaller share")
    if not learned:
        folders = ", ".join(each.path for each in config.folders)
        raise InputError(f"no usable items in {folders}: {'; '.join(notes[:5])}")
    shape: dict[str, Any] = {
        "batch_size": batch_size, "accumulate": accumulate, "with_context": with_context}
    once = replace(config, caption_dropout=0.0, image_share=None)
    held_out = Dataset(once, geometry, kept, source, None, notes, **shape) if kept else None
    return Dataset(config, geometry, learned, source, held_out, notes, **shape)


class Dataset:
    """The batches of one split, made by `open_dataset`.

    Attributes:
        items: items in order, with repeats.
        held_out: the split for validation, or None.
        notes: messages such as left-out files.
    """

    def __init__(
        self, config: DataConfig, geometry: Geometry, items: Sequence[Item],
        source: LatentCache | _Encoded, held_out: Dataset | None, notes: Sequence[str], *,
        batch_size: int, accumulate: int, with_context: bool,
    ) -> None:
        self.config, self.items, self.held_out = config, list(items), held_out
        self.fps, self.notes, self.close = geometry.fps, list(notes), source.close
        self.buckets = dict(sorted(Counter(item.bucket for item in items).items()))
        self.batch_size, self.accumulate = batch_size, accumulate
        self._source, self._with_context = source, with_context
        self._slots: dict[Bucket, list[int]] = {bucket: [] for bucket in self.buckets}
        for index, item in enumerate(self.items):
            self._slots[item.bucket].append(index)
        self._schedule = Schedule(self.buckets, seed=config.seed, image_share=config.image_share)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that decides the order of items."""
        config = self.config
        facts = [[item.key, item.captions] for item in self.items]
        drawn_by = [config.seed, str(config.image_share), config.caption_dropout,
                    self.batch_size, self.accumulate, str(self.fps)]
        return hashlib.sha256(json.dumps([facts, drawn_by]).encode()).hexdigest()

    def _global_batch(self, world: int) -> int:
        return self.batch_size * self.accumulate * world

    def steps_per_epoch(self, world: int = 1) -> int:
        """Return the steps of an epoch on `world` ranks."""
        return self._schedule.steps_per_epoch(self._global_batch(world))

    def ends(self, world: int = 1) -> list[str]:
        """Return notes on the items that repeat to fill each bucket's last batch."""
        def repeating(bucket: Bucket, count: int) -> str:
            kind = "clip" if bucket.num_frames > 1 else "picture"
            return f"1 {kind} repeats" if count == 1 else f"{count} {kind}s repeat"

        return [f"bucket {bucket.label}: {repeating(bucket, n)} per epoch to fill the last batch"
                for bucket, n in self._schedule.remainders(self._global_batch(world)).items()]

    def batch(self, step: int, micro: int = 0, rank: int = 0, world: int = 1) -> dict[str, Any]:
        """Make micro-batch `micro` of a step for one of `world` ranks, all counted from 0.

        Returns:
            `latents` [B, C, F, h, w] float32; `context` [B, S, D], zero after `context_lengths`
            [B], and `context_mask` [B, S]; `captions`, "" where dropped; `files`; `indices` into
            `items`; `fps`; `bucket`. For clips also, where the model needs them: `finer`
            [B, C, n, h, w] at a higher latent rate; `stills` [B, C, K, h, w] with `still_index`
            [B, K]; `first` and `both` [B, C, F, h, w]; `grey` [1, C, F, h, w]; `image` and
            `image_last` [B, S, D].
        """
        draw = self._schedule.draw(step, self._global_batch(world))
        begin = (micro * world + rank) * self.batch_size
        indices, captions = list[int](), list[str]()
        for number in range(begin, begin + self.batch_size):
            index = self._slots[draw.bucket][draw.slots[number]]
            texts, key = self.items[index].captions, (self.config.seed, step, number)
            is_dropped = drawn(*key, "dropout") < self.config.caption_dropout
            chosen = int(drawn(*key, "caption") * len(texts))
            indices.append(index)
            captions.append("" if is_dropped else texts[chosen])
        return self.item_batch(indices, captions=captions)

    def item_batch(
        self, indices: Sequence[int], *, captions: Sequence[str] | None = None
    ) -> dict[str, Any]:
        """Make a batch as `batch` does of items of one bucket, by default with first captions."""
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
