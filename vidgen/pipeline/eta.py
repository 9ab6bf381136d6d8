"""Progress of a generation as a fraction, and the time left, from an estimate.

The estimate weighs the stages. The time measured in this run corrects each stage's estimate; a
stage that has not begun is corrected as the stage measured last.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vidgen.pipeline.types import Estimate

_STAGES = {"prompt": ("text",), "prepare": ("prepare",), "sample": ("denoise",),
           "sound": ("sound",), "write": ("decode", "mux")}


class Clock:
    """Maps progress to the fraction done and the seconds left.

    Args:
        made: estimate of the generation of all `num_clips` clips, or a list with one of each clip.
        done: numbers of clips finished by an earlier run, from 1.
        one_by_one: each clip is written before the next is sampled, and `made` is of one clip or a
            list. Else all clips are sampled before the first is written, and `made` is of all.
        parallel: clips of a list are made in parallel; the time left is extrapolated from the
            fraction done.
        now: clock, in seconds.
    """

    def __init__(
        self, made: Estimate | Sequence[Estimate], num_clips: int = 1, *,
        done: Collection[int] = (), one_by_one: bool = False, parallel: bool = False,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        each = made if isinstance(made, Sequence) else [made] * num_clips
        self._now, self._start, self._parallel = now, now(), parallel
        self._measured = all(one.measured for one in each)
        clips = [n for n in range(1, len(each) + 1) if n not in done]
        self._common = not (one_by_one or parallel)  # all clips have one prompt
        order = [(stage, n) for n in clips for stage in _STAGES]
        if self._common:
            inner = [place for place in order if place[0] not in ("prompt", "write")]
            order = [("prompt", 1), *inner, *(("write", n) for n in clips)]
        self._shares = dict.fromkeys(order, 0.0)
        self._expected = {
            (stage, clip): sum(one.seconds for one in each[clip - 1].stages
                               if one.name in _STAGES[stage])
            / (len(each) if self._common and stage != "prompt" else 1)
            for stage, clip in order
        }
        self._last: tuple[tuple[str, int], int, float] | None = None
        self._work: dict[str, float] = defaultdict(float)  # expected seconds
        self._took: dict[str, float] = defaultdict(float)  # measured seconds
        self._slower: float | None = None  # measured by expected time of the stage measured last

    def __call__(self, stage: str, done: int, total: int, clip: int = 1) -> dict[str, Any]:
        """Return "fraction", 0 to 1, and "eta_s", None while nothing was measured.

        `stage` is "prompt", "prepare", "sample" or "sound" (without an estimate if another model
        makes the sound); any other name counts as writing. `clip` is numbered from 1.
        """
        name = stage if stage in _STAGES else "write"
        place = name, 1 if name == "prompt" and self._common else clip
        self._measure(place, done, self._expected.get(place, 0.0) / max(total, 1))
        is_over = True
        for each in self._shares:
            if not self._parallel or each[1] == clip:
                at = each == place
                self._shares[each] = min(done / max(total, 1), 1.0) if at else float(is_over)
                is_over &= not at
        whole = sum(self._expected.values())
        reached = sum(share * self._expected[each] for each, share in self._shares.items())
        fraction = min(reached / whole, 1.0) if whole else 1.0
        return {"fraction": round(fraction, 4), "eta_s": self._left(fraction)}

    def _measure(self, place: tuple[str, int], done: int, unit_s: float) -> None:
        """Count the time since the previous event if it has the same stage and clip."""
        now, last, stage = self._now(), self._last, place[0]
        self._last = place, done, now
        if last is not None and last[0] == place and done > last[1] and unit_s:
            self._work[stage] += (done - last[1]) * unit_s
            self._took[stage] += now - last[2]
            self._slower = self._took[stage] / self._work[stage]

    def _left(self, fraction: float) -> float | None:
        if self._parallel:
            took = self._now() - self._start
            return round(took * (1 - fraction) / fraction, 1) if fraction else None
        if self._slower is None and not self._measured:
            return None
        left = 0.0
        for (stage, clip), expected in self._expected.items():
            slower = self._took[stage] / self._work[stage] if self._work[stage] else self._slower
            left += expected * (1 if slower is None else slower) * (1 - self._shares[stage, clip])
        return round(left, 1)
