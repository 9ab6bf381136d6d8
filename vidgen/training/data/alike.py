"""Files that look the same: encoded again, at another size, rate or quality, or copied.

Compared are 8 moments of each file as pictures of 12x12 cells. A part of a longer file, or a
mirrored or much recoloured copy, isn't found.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from vidgen.training.data.probe import FileFacts

ALIKE, WORST = 4.0, 14.0
"""Levels by which two files' cells may differ: root mean square, and the worst but for 1%. H.264 at
crf 35 has 2 and 5 at 320x240; another take of the same scene differs by more somewhere."""
LENGTHS, ASPECTS = 0.03, 0.03
"""Shares by which lengths and aspects of such files may differ."""
_BLOCK, _AGAINST = 256, 4096

Cells = np.ndarray[tuple[int, int], np.dtype[np.uint8]]
Flags = np.ndarray[tuple[int, int], np.dtype[np.bool_]]


def find_alike(facts: Mapping[str, FileFacts]) -> dict[str, str]:
    """{SHA-256: the first, in the order of the hashes, of those that look the same}, two or more.

    Files are compared with those of about the same length alone, so that it takes a second for ten
    thousand files of all lengths.
    """
    order = sorted(facts, key=lambda sha: (facts[sha].duration_s, sha))
    lengths = np.array([facts[sha].duration_s for sha in order])
    aspects = np.array([facts[sha].size[0] / facts[sha].size[1] for sha in order])
    shown = [facts[sha].small_pictures().reshape(-1) for sha in order]
    parent = list(range(len(order)))

    def root(index: int) -> int:
        while parent[index] != index:
            index = parent[index]
        return index

    for start in range(0, len(order), _BLOCK):
        stop = min(start + _BLOCK, len(order))
        limit = lengths[stop - 1] * (1 + LENGTHS) + 1e-6
        last = int(np.searchsorted(lengths, limit, side="right"))
        for begin in range(start, last, _AGAINST):
            others = shown[begin : min(begin + _AGAINST, last)]
            near = _near(np.stack(shown[start:stop]), np.stack(others))
            for one, other in zip(*np.nonzero(near), strict=True):
                a, b = start + int(one), begin + int(other)
                fits = lengths[b] <= lengths[a] * (1 + LENGTHS) + 1e-6
                if a < b and fits and abs(aspects[a] / aspects[b] - 1) <= ASPECTS:
                    parent[root(b)] = root(a)
    groups: dict[int, list[str]] = {}
    for index, sha256 in enumerate(order):
        groups.setdefault(root(index), []).append(sha256)
    return {sha: min(group) for group in groups.values() if len(group) > 1 for sha in group}


def _near(some: Cells, others: Cells) -> Flags:
    """Whether each of `some` [n, d] looks like each of `others` [m, d]: [n, m]."""
    a, b = some.astype(np.float32), others.astype(np.float32)
    squares = (a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * (a @ b.T)
    near: Flags = squares <= a.shape[1] * ALIKE**2 + 64  # what float32 leaves of sums of squares
    for i, j in zip(*np.nonzero(near), strict=True):
        near[i, j] = np.quantile(np.abs(a[i] - b[j]), 0.99) <= WORST
    return near
