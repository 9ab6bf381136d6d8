"""How well sound goes with the picture: bounces seen against onsets heard.

Nothing but pixels and samples is looked at, so renders, generated clips and a codec's output are
all measured alike; `measure_ruler` tells how far the ruler itself can be trusted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from eval.toybox.judge import Judge
from eval.toybox.metrics.bounces import bounce_times
from train.toybox.world.captions import CLASSES
from train.toybox.world.cues import SAMPLE_RATE, sound_cues
from train.toybox.world.render import render
from train.toybox.world.scenes import Draws, Scene, SceneMix, compose_scene
from train.toybox.world.sound import synthesize
from train.toybox.world.truth import events
from vidgen.core.errors import InputError
from vidgen.evaluation.statistics import CONFIDENCE
from vidgen.media.onsets import Times, find_onsets, pair_times

EARLY_S, LATE_S = 0.045, 0.125
"""Sound may come so much before or after its picture unnoticed (ITU-R BT.1359-1, sec. 2)."""
EDGE_S = 0.25  # at a clip's ends a landing can't be seen surely; what is heard there may stay alone
_SHUFFLES = 8


@dataclass(frozen=True)
class SyncScore:
    """How a set of clips' sounds go with their pictures.

    Attributes:
        median_s: median of |dt| over the pairs, dt = heard - seen; NaN without pairs.
        bias_s: median of dt.
        f1: of the pairs among all that is seen and heard; `floor_f1` with the clips shuffled.
        floor_median_s: `median_s` with the clips shuffled.
        pairs: how many bounces and onsets found each other.
        seen: bounces.
        heard: onsets.
    """

    median_s: float
    bias_s: float
    f1: float
    pairs: int
    seen: int
    heard: int
    floor_f1: float
    floor_median_s: float


def match_times(
    seen: Times, heard: Times, early_s: float = EARLY_S, late_s: float = LATE_S
) -> list[tuple[int, int]]:
    """`pair_times` of bounces and onsets, within the ITU's window."""
    return pair_times(seen, heard, early_s, late_s)


def score_sync(
    seen: Sequence[Times], heard: Sequence[Times], duration_s: float
) -> SyncScore:
    """Score clips by their bounces and onsets; see `bounce_times` and `find_onsets`.

    Args:
        seen: of each clip the times of its bounces, rising, in seconds.
        heard: of each clip the times of its onsets.
        duration_s: of a clip, from its first to its last frame.

    Raises:
        InputError: not as many pictures as sounds, or none.
    """
    if len(seen) != len(heard) or not seen:
        raise InputError(f"{len(seen)} pictures and {len(heard)} sounds can't be paired")
    score = _count(seen, heard, duration_s)
    count = len(seen)
    shuffled = [
        _count(seen, [heard[(i + shift) % count] for i in range(count)], duration_s)
        for shift in range(1, min(count, _SHUFFLES + 1))
    ]
    floor = _Count.sum(shuffled)
    return SyncScore(
        _median(np.abs(score.offsets)), _median(score.offsets), score.f1, len(score.offsets),
        score.seen, score.heard, floor.f1, _median(np.abs(floor.offsets)),
    )


@dataclass(frozen=True)
class _Count:
    offsets: Times
    seen: int
    heard: int

    @property
    def f1(self) -> float:
        total = self.seen + self.heard
        return 2 * len(self.offsets) / total if total else math.nan

    @classmethod
    def sum(cls, parts: Sequence[_Count]) -> _Count:
        offsets = np.concatenate([part.offsets for part in parts] or [np.zeros(0)])
        return cls(offsets, sum(part.seen for part in parts), sum(part.heard for part in parts))


def sync_intervals(
    seen: Sequence[Times], heard: Sequence[Times], duration_s: float, *,
    groups: Sequence[Hashable] | None = None, draws: int = 500, seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """95% intervals of `SyncScore`'s median_s, bias_s and f1, clips drawn anew (Efron 1979).

    Clips of one of `groups`, such as those of a prompt, are drawn together.
    """
    parts = _counts(seen, heard, duration_s)
    if groups is not None:
        kinds = dict.fromkeys(groups)
        parts = [_Count.sum([part for part, own in zip(parts, groups, strict=True) if own == kind])
                 for kind in kinds]  # fmt: skip
    rng, rows = np.random.default_rng(seed), []
    for _ in range(draws):
        drawn = _Count.sum([parts[i] for i in rng.integers(len(parts), size=len(parts))])
        rows.append((_median(np.abs(drawn.offsets)), _median(drawn.offsets), drawn.f1))
    edges = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
    low, high = np.nanquantile(np.array(rows), edges, axis=0) if parts else np.full((2, 3), np.nan)
    names = ("median_s", "bias_s", "f1")
    return {name: (float(a), float(b)) for name, a, b in zip(names, low, high, strict=True)}


def _count(seen: Sequence[Times], heard: Sequence[Times], duration_s: float) -> _Count:
    return _Count.sum(_counts(seen, heard, duration_s))


def _counts(
    seen: Sequence[Times], heard: Sequence[Times], duration_s: float
) -> list[_Count]:
    """Of each clip alone."""
    def inside(times: Times, paired: Sequence[int]) -> int:
        there = (times > EDGE_S) & (times < duration_s - EDGE_S)
        there[list(paired)] = True
        return int(there.sum())

    parts = []
    for bounces, onsets in zip(seen, heard, strict=True):
        pairs = match_times(bounces, onsets)
        i, j = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        parts.append(_Count(onsets[j] - bounces[i], inside(bounces, i), inside(onsets, j)))
    return parts


def _median(values: Times) -> float:
    return float(np.median(values)) if len(values) else math.nan


def bouncing_scenes(first_seed: int, count: int) -> list[Scene]:
    """Scenes of one bouncing actor each, every sprite and place as often as the others."""
    sprites, places = CLASSES["sprite"], CLASSES["place"]
    draws = Draws(first_seed, stream=61)
    starts = int(draws.uniform(0, len(sprites))), int(draws.uniform(0, len(places)))
    return [
        compose_scene(
            first_seed + i, sprites[(starts[0] + 7 * i) % len(sprites)], "bounces",
            places[(starts[1] + i) % len(places)], SceneMix(two_actors=0.0),
        )
        for i in range(count)
    ]  # fmt: skip


@dataclass(frozen=True)
class RulerScore:
    """How far the ruler can be trusted, on renders whose truth is known.

    Attributes:
        seen_median_s: median error of bounces seen.
        seen_p95_s: its 95th percentile.
        seen_recall: share of the true bounces, away from the clip's ends, that are seen.
        heard_median_s: likewise of onsets heard, against their cues.
        heard_p95_s: likewise.
        heard_recall: likewise.
        sync: the score of renders with their own sound: the ceiling of any model.
    """

    seen_median_s: float
    seen_p95_s: float
    seen_recall: float
    heard_median_s: float
    heard_p95_s: float
    heard_recall: float
    sync: SyncScore


def measure_ruler(
    judge: Judge, first_seed: int, count: int, through: Callable[[Tensor], Tensor] | None = None,
    redrawn: Callable[[Sequence[Scene], Tensor], Tensor] | None = None, batch: int = 4,
) -> RulerScore:
    """Measure the ruler on bouncing clips of the default length and size.

    Args:
        judge: whose FrameNet sees sprites.
        first_seed: of the scenes.
        count: of clips; 300 is the full measure.
        through: what sound [B, N] goes through before it is listened to: a codec.
        redrawn: what the pictures [B, 3, T, H, W] of some scenes go through before they are looked
            at: a model that draws them anew, and leaves what happens in them when it happens.
        batch: clips rendered at once.
    """
    scenes, fps, num_frames = bouncing_scenes(first_seed, count), 12.0, 33
    duration = (num_frames - 1) / fps
    seen: list[Times] = []
    heard: list[Times] = []
    for start in range(0, count, batch):
        part = scenes[start : start + batch]
        video = render(part, num_frames, fps=fps).video
        seen += bounce_times(judge, redrawn(part, video) if redrawn else video, fps)
        sound = synthesize(part, num_frames, fps=fps)
        heard += find_onsets(through(sound) if through else sound, SAMPLE_RATE)
    contacts = [
        np.array([e.seconds for e in events(s, num_frames, fps=fps) if e.kind == "contact"])
        for s in scenes
    ]
    cues = [np.array(sorted({c.seconds for c in sound_cues(s, num_frames, fps=fps)}))
            for s in scenes]  # fmt: skip
    errors = [_against(truth, found, duration) for truth, found in
              ((contacts, seen), (cues, heard))]  # fmt: skip
    return RulerScore(*errors[0], *errors[1], score_sync(seen, heard, duration))


def _against(
    truth: Sequence[Times], found: Sequence[Times], duration_s: float
) -> tuple[float, float, float]:
    """Median and 95th percentile of |error|, and recall, of what is found near the truth."""
    counted = _count(truth, found, duration_s)
    offsets, known = np.abs(counted.offsets), counted.seen
    return (
        _median(offsets), float(np.percentile(offsets, 95)) if len(offsets) else math.nan,
        len(offsets) / known if known else math.nan,
    )
