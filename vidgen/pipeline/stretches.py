"""Which latent frames each rank decodes, so that all are done at the same time."""

from __future__ import annotations

from itertools import pairwise

BUFFER_BYTES = 512_000_000
"""Decoded frames that a rank may hold until rank 0 takes them."""


def next_stretches(
    begin: int, end: int, num_ranks: int, look_back: int, frame_bytes: int
) -> list[tuple[int, int]]:
    """The next latent frames of each rank, one stretch behind the other.

    A rank decodes as many frames before its stretch as the decoder looks back, or as there are;
    the clip's first needs none, so it can be longer.

    Args:
        begin: the first latent frame to decode.
        end: behind the last one.
        num_ranks: how many decode.
        look_back: latent frames before a frame that it depends on.
        frame_bytes: of what a latent frame becomes.

    Returns:
        [first, last) of each rank, from `begin` on without a gap, to `end` if that can be held.
    """
    most = max(BUFFER_BYTES // frame_bytes, look_back, 1)
    for cost in range(1, most + look_back + 1):
        places = [begin]
        for _ in range(num_ranks):
            here = places[-1]
            places.append(here + max(0, min(cost - min(here, look_back), most, end - here)))
        if places[-1] == end:
            break
    return list(pairwise(places))
