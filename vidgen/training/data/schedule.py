"""Which items make up which batch: a pure function of seed, step and place.

An epoch goes through every bucket; a batch is of one bucket. Order is by permutations that are
computed at a point (a Feistel network whose walk stays within the range, Black & Rogaway 2002), so
a run goes on at any step, on any number of ranks, without knowing what came before.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate

from vidgen.core.errors import InputError
from vidgen.training.data.config import Bucket

_ROUNDS = 4


def permuted(index: int, count: int, key: str) -> int:
    """Where a permutation of `count` things, drawn by a key, puts number `index`."""
    half = ((count - 1).bit_length() + 1) // 2 or 1
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(_ROUNDS):
            left, right = right, left ^ (_hash(f"{key} {turn} {right}") & mask)
        index = left << half | right
        if index < count:
            return index


def drawn(key: str) -> float:
    """A number in [0, 1) that a key stands for."""
    return _hash(key) / 2**64


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


@dataclass(frozen=True)
class Draw:
    """One step's items."""

    bucket: Bucket  # of all of them
    slots: tuple[int, ...]  # numbers within the bucket, of the whole global batch
    key: str  # by which further things of this step are drawn


class Schedule:
    """The order of a run's batches, from each bucket's items, repeats counted.

    `drop_last` leaves out what doesn't fill a bucket's last batch; else items from that bucket's
    beginning fill it. `image_share` of the steps are of pictures; None: as many as there are.

    Raises:
        InputError: a share of pictures, or of clips, where there are none.
    """

    def __init__(
        self, counts: Mapping[Bucket, int], *, seed: int = 0, drop_last: bool = False,
        image_share: float | None = None,
    ) -> None:
        self.counts = {bucket: counts[bucket] for bucket in sorted(counts) if counts[bucket]}
        self.seed, self.drop_last = seed, drop_last
        clips = {b: n for b, n in self.counts.items() if b.num_frames > 1}
        pictures = {b: n for b, n in self.counts.items() if b.num_frames == 1}
        if image_share is None:
            self._pools, self._share = {"all": self.counts}, Fraction(0)
            self._main = "all"
            return
        self._share = Fraction(image_share).limit_denominator(1000)
        for wanted, pool, what in ((self._share > 0, pictures, "picture"),
                                   (self._share < 1, clips, "clip")):
            if wanted and not pool:
                raise InputError(f"data.image_share is {image_share}, but there is no {what}; add "
                                 "some, or leave image_share out")
        self._pools = {"clips": clips, "pictures": pictures}
        self._main = "clips" if clips and self._share < 1 else "pictures"

    def draw(self, step: int, global_batch: int) -> Draw:
        """The items of a step (from 0) in which all ranks and micro-batches learn so many."""
        pool, index = self._main, step
        if pool != "all":
            pictures = math.floor(step * self._share)  # before this step
            is_picture = math.floor((step + 1) * self._share) > pictures
            pool, index = ("pictures", pictures) if is_picture else ("clips", step - pictures)
        batches = self._batches(pool, global_batch)
        total = sum(batches.values())
        epoch, position = divmod(index, total)
        key = f"{self.seed} 0 {pool} {epoch}"
        place = permuted(position, total, f"{key} order")
        ends = list(accumulate(batches.values()))
        which = bisect_right(ends, place)
        bucket, first = list(batches)[which], (place - ends[which] + list(batches.values())[which])
        size = self._pools[pool][bucket]
        numbers = range(first * global_batch, (first + 1) * global_batch)
        slots = tuple(permuted(n % size, size, f"{key} {bucket.label}") for n in numbers)
        return Draw(bucket, slots, f"{self.seed} 0 {step}")

    def steps_per_epoch(self, global_batch: int) -> int:
        """Steps until every item (every clip, with a share of pictures) was learned once."""
        wanted = sum(self._batches(self._main, global_batch).values())
        if self._main == "all":
            return wanted
        if self._main == "pictures":
            return math.ceil(wanted / self._share)
        return math.floor((wanted - 1) / (1 - self._share)) + 1

    def remainders(self, global_batch: int) -> dict[Bucket, int]:
        """Items of each bucket that an epoch leaves out, or learns twice to fill the last batch."""
        sign = 1 if self.drop_last else -1
        return {b: sign * n % global_batch for b, n in self.counts.items() if n % global_batch}

    def _batches(self, pool: str, global_batch: int) -> dict[Bucket, int]:
        rounded = math.floor if self.drop_last else math.ceil
        batches = {b: rounded(n / global_batch) for b, n in self._pools[pool].items()}
        if not any(batches.values()):
            largest = max(self._pools[pool].values(), default=0)
            raise InputError(
                f"no bucket fills a batch of {global_batch}: the largest has {largest} items; set "
                "drop_last: false, or take a smaller batch or fewer buckets")
        return batches
