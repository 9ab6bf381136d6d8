"""What fine-tuning draws its batches from: items of the cache, or encoded as they are drawn.

Axes: B batch, C latent channels, F latent frames, K stills, h w latent rows and columns, S text or
image tokens, D width.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vidgen.core.errors import InputError
from vidgen.core.protocols import OnEvent
from vidgen.training.data.cache import LatentCache, open_cache
from vidgen.training.data.config import NO_CACHE, Bucket, DataConfig, Geometry
from vidgen.training.data.encode import Cursor, ItemEncoder, still_frames
from vidgen.training.data.schedule import Schedule, drawn
from vidgen.training.data.select import Item, Selection, picks
from vidgen.training.data.survey import open_own, survey
from vidgen.weights.folder import ModelFolder


class _Encoded:
    """Items encoded when they are drawn; contexts, which are small, are kept."""

    def __init__(self, config: DataConfig, known: Selection, encoder: ItemEncoder) -> None:
        self._config, self._geometry, self._encoder = config, known.geometry, encoder
        self._facts = {item.sha256: fate.facts for fate in known.fates if fate.facts is not None
                       for item in fate.items[:1]}
        self.text, self.close = lru_cache(maxsize=4096)(encoder.text), encoder.close
        self._grey = lru_cache(maxsize=16)(encoder.grey)

    def item(self, item: Item) -> Mapping[str, Tensor]:
        shown = picks(item, self._facts[item.sha256], self._config, self._geometry)
        with closing(Cursor(item.path)) as cursor:
            return self._encoder.item(item, shown, cursor)

    def grey(self, bucket: Bucket) -> Tensor | None:
        return self._grey(bucket) if self._encoder.extras.grey else None


def open_dataset(
    config: DataConfig, model: str | Path | ModelFolder, *, batch_size: int = 1,
    accumulate: int = 1, with_context: bool = True, device: torch.device | str = "cpu",
    on_event: OnEvent | None = None,
) -> Dataset:
    """Open what a model is to learn from, with what it is validated on as `held_out`.

    A step has `accumulate` micro-batches of `batch_size` items on each rank, with the captions'
    contexts if asked for. Batches lie on the CPU; items are encoded on `device` without a cache.

    Raises:
        InputError: data that can't be used, a cache that doesn't match, or nothing to learn.
        ModelError: no such model.
    """
    folder = model if isinstance(model, ModelFolder) else open_own(str(model))
    geometry = Geometry.of(config, folder)
    source: LatentCache | _Encoded
    if config.cache != NO_CACHE:
        source, items, notes = open_cache(config, geometry, folder)
    else:
        known = survey(config, folder, on_event or (lambda _: None))
        items, notes = known.items, [
            *known.notes, *(f"{fate.file.name} is left out: {fate.dropped}"
                                      for fate in known.fates if fate.dropped)]
        source = _Encoded(config, known, ItemEncoder(folder, torch.device(device)))
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
        raise InputError(f"nothing is left to learn from in {folders}: {'; '.join(notes[:5])}")
    shape: dict[str, Any] = {
        "batch_size": batch_size, "accumulate": accumulate, "with_context": with_context}
    once = replace(config, caption_dropout=0.0, image_share=None, drop_last=False)
    held_out = Dataset(once, geometry, kept, source, None, notes, **shape) if kept else None
    return Dataset(config, geometry, learned, source, held_out, notes, **shape)


class Dataset:
    """Batches of one split; made by `open_dataset`.

    Attributes:
        items: in order, each as often as its folder is repeated.
        held_out: the split for validation; None where nothing is kept aside.
        notes: what was left out or matters otherwise.
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
        self._schedule = Schedule(self.buckets, seed=config.seed, drop_last=config.drop_last,
                                  image_share=config.image_share)
        self.steps_per_epoch()  # refuses a batch that no bucket fills

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

    def ends(self, world: int = 1) -> list[str]:
        """What becomes of items that don't fill a bucket's last batch, in words."""
        fate = ("items of each epoch are left out (drop_last)" if self.config.drop_last else
                "items are learned twice in each epoch, to fill its last batch")
        remainders = self._schedule.remainders(self._global_batch(world))
        return [f"bucket {bucket.label}: {count} {fate}" for bucket, count in remainders.items()]

    def batch(self, step: int, micro: int = 0, rank: int = 0, world: int = 1) -> dict[str, Any]:
        """A micro-batch of a step, from 0, for a rank of the `world` that take different items.

        Returns:
            `latents` [B, C, F, h, w] float32; `context` [B, S, D], zero behind `context_lengths`
            [B], and `context_mask` [B, S]; `captions`, "" where dropped; `files`; `indices` into
            `items`; `fps`; `bucket`; in clips alone `finer` [B, C, n, h, w], of models that draw
            at a finer rate, and what the model's conditions need: `stills` [B, C, K, h, w] with
            `still_index` [B, K]; `first` and `both` [B, C, F, h, w], `grey` [1, C, F, h, w];
            `image` and `image_last` [B, S, D].
        """
        draw = self._schedule.draw(step, self._global_batch(world))
        begin = (micro * world + rank) * self.batch_size
        numbers = range(begin, begin + self.batch_size)
        indices = [self._slots[draw.bucket][draw.slots[number]] for number in numbers]
        captions = []
        for index, number in zip(indices, numbers, strict=True):
            texts = self.items[index].captions
            is_dropped = drawn(f"{draw.key} {number} dropout") < self.config.caption_dropout
            chosen = int(drawn(f"{draw.key} {number} caption") * len(texts))
            captions.append("" if is_dropped else texts[chosen])
        return self.item_batch(indices, captions=captions)

    def item_batch(
        self, indices: Sequence[int], *, captions: Sequence[str] | None = None
    ) -> dict[str, Any]:
        """A batch like `batch`'s of items of one bucket, by default with their first captions."""
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
