"""Whether a clip's sprite stays the same one: how like the judge's answers are, frames apart.

Axes: T frames, K sprites.
"""

from __future__ import annotations

import numpy as np

from eval.toybox.metrics.tracking import Sighting

DISTANCES = (1, 2, 4, 8, 16)
_KEPT = 0.01  # shares below which a clip's mean answer isn't written down


def identity_over_time(sighting: Sighting) -> dict[str, float]:
    """`identity_D` for each distance: mean overlap of the answers of frames D apart.

    The overlap of two answers is sum_k min(p_k, q_k), 1 less their total variation; pairs count of
    which both frames show a sprite. A distance without pairs is left out.
    """
    found = {}
    for distance in DISTANCES:
        both = sighting.seen[distance:] & sighting.seen[:-distance]
        if both.any():
            pairs = np.minimum(sighting.names[distance:], sighting.names[:-distance]).sum(1)
            found[f"identity_{distance}"] = float(pairs[both].mean())
    return found


def mean_answer(sighting: Sighting, sprites: tuple[str, ...]) -> dict[str, float]:
    """What the clip's frames show on average, as far as it matters; {} where nothing is seen."""
    if not sighting.seen.any():
        return {}
    mean = sighting.names[sighting.seen].mean(0)
    return {name: float(p) for name, p in zip(sprites, mean, strict=True) if p >= _KEPT}


def overlap(one: dict[str, float], other: dict[str, float]) -> float:
    """Overlap of two clips' mean answers."""
    return sum(min(share, other.get(name, 0.0)) for name, share in one.items())


def stranger_overlap(answers: list[dict[str, float]]) -> float:
    """Mean overlap of each clip with the next one: what chance gives.

    Args:
        answers: of at least two clips, as `mean_answer` gives them.
    """
    pairs = zip(answers, answers[1:] + answers[:1], strict=True)
    return float(np.mean([overlap(one, other) for one, other in pairs]))
