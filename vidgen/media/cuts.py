"""Where one shot ends and another begins, told while looks at the frames stream past.

A cut is a change that stands out from those around it and that does not come back, as a flash
does. Dissolves and fades don't stand out; they are not found.

Axes: y x of cells.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from statistics import median

import numpy as np

from vidgen.media.cells import Array
from vidgen.media.trackers import likeness

STEP, SLIGHT = 10.0, 2.5
"""Mean change of the cells in levels that a cut has: where the pictures are somewhat alike, and
where they have nothing to do with each other."""
STANDS_OUT, STANDS_OUT_UNLIKE = 4.0, 2.0
"""Times the median change around it, for the same two cases. A steady camera move has 1."""
UNLIKE = 0.4
"""Correlation of the cells below which two pictures have nothing to do with each other."""
AROUND = 4
"""Looks before and behind that a change is compared with."""


@dataclass(frozen=True)
class _Seen:
    index: int
    color: Array
    change: float
    alike: float


class Cuts:
    """Finds cuts.

    Attributes:
        found: (last frame seen of the one shot, first of the next), in order.
    """

    def __init__(self) -> None:
        self.found: list[tuple[int, int]] = []
        self._seen: deque[_Seen] = deque(maxlen=2 * AROUND + 1)

    def feed(self, index: int, color: Array) -> None:
        """Go on with a frame's cells [y, x, 3], 0 to 255; frames may be left out between."""
        change, alike = 0.0, 1.0
        if self._seen:
            last = self._seen[-1].color
            change = float(np.abs(color - last).mean())
            alike = likeness(last.transpose(2, 0, 1), color.transpose(2, 0, 1))
        self._seen.append(_Seen(index, color, change, alike))
        if len(self._seen) > AROUND:
            self._judge(len(self._seen) - 1 - AROUND)

    def finish(self) -> None:
        """Judge the last changes, too."""
        for position in range(max(0, len(self._seen) - AROUND), len(self._seen)):
            self._judge(position)

    def _judge(self, position: int) -> None:
        seen = list(self._seen)
        here = seen[position]
        is_alike = here.alike >= UNLIKE
        if position == 0 or here.change < (STEP if is_alike else SLIGHT):
            return
        times = STANDS_OUT if is_alike else STANDS_OUT_UNLIKE
        around = [each.change for each in seen[max(1, position - AROUND) :] if each is not here]
        if around and here.change < times * max(median(around), 0.25):
            return
        back = [(seen[position - 1], later) for later in seen[position + 1 : position + AROUND]]
        back += [(earlier, here) for earlier in seen[max(0, position - AROUND) : position - 1]]
        if any(float(np.abs(a.color - b.color).mean()) < here.change / 3 for a, b in back):
            return  # into a flash, or out of it
        self.found.append((seen[position - 1].index, here.index))
