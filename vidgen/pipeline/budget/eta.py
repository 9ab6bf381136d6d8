"""How much of a generation lies behind and how long the rest will take, told from an estimate.

The estimate gives the weights of the stages; each stage's time is corrected by what it was measured
to take in this run, a stage not yet begun by the one measured last.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vidgen.pipeline.budget.stages import Estimate

_STAGES = {
    "prompt": ("text",), "prepare": ("prepare",), "sample": ("denoise",), "sound": ("sound",),
}
_WRITING = ("decode", "mux")


class ManyClock:
    """As `Clock` does, of clips that are made beside each other.

    Args:
        made: what each was estimated to take.
        now: a clock in seconds.
    """

    def __init__(
        self, made: Sequence[Estimate], *, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._made, self._now, self._start = made, now, now()
        self._seconds = [sum(s.seconds for s in one.stages if s.name != "load") for one in made]
        self._whole, self._behind = sum(self._seconds) or 1.0, 0.0
        self._clocks: dict[int, Clock] = {}  # and shares, of clips that are at work
        self._shares: dict[int, float] = {}

    def __call__(self, stage: str, done: int, total: int, clip: int = 1) -> dict[str, Any]:
        """See `Clock`; the time left follows from the share that the time since the start took."""
        if clip not in self._clocks:
            self._clocks[clip] = Clock(self._made[clip - 1], one_by_one=True, now=self._now)
        share = self._clocks[clip](stage, done, total)["fraction"]
        self._behind += self._seconds[clip - 1] * (share - self._shares.pop(clip, 0.0))
        if share < 1:
            self._shares[clip] = share
        else:
            del self._clocks[clip]
        fraction = min(1.0, self._behind / self._whole)
        took = self._now() - self._start
        left = round(took * (1 - fraction) / fraction, 1) if fraction else None
        return {"fraction": round(fraction, 4), "eta_s": left}


class Clock:
    """Told of progress, it tells the share that is done and the seconds that are left.

    Args:
        made: what the clips were estimated to take; loading is left out.
        num_clips: how many there are.
        done: numbers of clips that an earlier run finished, from 1.
        one_by_one: False: all clips are sampled before the first is written, as one generation does
            it, and `made` is of all of them. True: each is written at once, and `made` is of one,
            or a list of every one's.
        now: a clock in seconds.
    """

    def __init__(
        self, made: Estimate | Sequence[Estimate], num_clips: int = 1, *,
        done: Collection[int] = (), one_by_one: bool = False,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        each = made if isinstance(made, Sequence) else [made] * num_clips
        self._now, self._num_clips = now, num_clips
        self._measured = all(one.measured for one in each)
        took = [{stage.name: stage.seconds for stage in one.stages} for one in each]
        clips = [n for n in range(1, num_clips + 1) if n not in done]
        share = 1 if one_by_one else num_clips

        def seconds(stage: str, clip: int) -> float:
            one = sum(took[clip - 1].get(name, 0.0) for name in _STAGES.get(stage, _WRITING))
            return one if stage == "prompt" else one / share

        stages: tuple[str, ...]
        if one_by_one:
            stages = ("prompt", "prepare", "sample", "sound", "write")
            order = [(s, n) for n in clips for s in stages]
        else:
            stages = ("prepare", "sample", "sound")
            order = [("prompt", 1), *((s, n) for n in clips for s in stages)]
            order += [("write", n) for n in clips]
        self._one_by_one = one_by_one
        self._expected = {place: seconds(*place) for place in order}
        self._last: tuple[tuple[str, int], int, float] | None = None
        self._work: dict[str, float] = defaultdict(float)  # seconds expected, and those it took
        self._took: dict[str, float] = defaultdict(float)
        self._slower: float | None = None  # than expected, in the stage measured last

    def __call__(self, stage: str, done: int, total: int, clip: int = 1) -> dict[str, Any]:
        """What an event is to say besides.

        Args:
            stage: "prompt", "prepare", "sample", "sound", of which nothing is known beforehand
                where another model makes it, or anything else for the writing of clips.
            done: of `total` in this stage.
            total: how much there is to do in it.
            clip: which one it is about, from 1.

        Returns:
            "fraction", 0 to 1, and "eta_s", None as long as nothing is known of this machine.
        """
        name = stage if stage in _STAGES else "write"
        common = name == "prompt" and not self._one_by_one
        place = name, 1 if common else min(clip, self._num_clips)
        share = min(done / max(total, 1), 1.0)
        self._measure(place, done, self._expected.get(place, 0.0) / max(total, 1))
        places = list(self._expected)
        index = places.index(place) if place in places else len(places)
        behind = sum(self._expected[each] for each in places[:index])
        behind += share * self._expected.get(place, 0.0)
        whole = sum(self._expected.values())
        return {
            "fraction": round(min(behind / whole, 1.0), 4) if whole else 1.0,
            "eta_s": self._left(places[index:], share),
        }

    def _measure(self, place: tuple[str, int], done: int, unit_s: float) -> None:
        """Count the time since the event before, where both are of one stage of one clip."""
        now, last = self._now(), self._last
        self._last = place, done, now
        if last is None or last[0] != place or done <= last[1] or not unit_s:
            return
        stage = place[0]
        self._work[stage] += (done - last[1]) * unit_s
        self._took[stage] += now - last[2]
        self._slower = self._took[stage] / self._work[stage]

    def _left(self, places: list[tuple[str, int]], share: float) -> float | None:
        if self._slower is None and not self._measured:
            return None
        left = 0.0
        for number, place in enumerate(places):
            stage = place[0]
            known = self._took[stage] / self._work[stage] if self._work[stage] else self._slower
            slower = 1.0 if known is None else known
            left += self._expected[place] * slower * (1 if number else 1 - share)
        return round(left, 1)
