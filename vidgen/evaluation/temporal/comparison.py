"""Folders of clips side by side: paired intervals, and a verdict that owns up to doubt.

Clips of one prompt are alike; so intervals are taken over prompts, not over clips.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from vidgen.evaluation.metrics.distances import frechet_distance, kernel_distance
from vidgen.evaluation.metrics.registry import MEASURES, PROXY
from vidgen.evaluation.statistics import CONFIDENCE, paired_interval
from vidgen.evaluation.temporal.summary import prompts_of, weights_of

Rows = Mapping[str, Mapping[str, Any]]
FEWEST_PAIRS = 6
"""Of clips, or of prompts where several clips are of one."""
HEADLINE = "steadiness"
#: Whose values a still clip is allowed to bring into a comparison.
_UNGATED = (HEADLINE, "temporal_flickering", PROXY + "temporal_flickering", "motion_speed",
            "dynamic_degree", PROXY + "dynamic_degree", "camera_motion", PROXY + "camera_motion")


def compare(name: str, rows: Rows, other_name: str, others: Rows) -> dict[str, Any]:
    """Compare two folders clip by clip.

    Of a measure that stillness flatters, only pairs count of which both clips move. `steadiness`,
    by which the headline is given, is 0 for a clip that doesn't move; so a still clip never wins.

    Args:
        name: of the one folder.
        rows: {clip's name: its scores} of it.
        other_name: of the other.
        others: likewise; clips of the same name are pairs.

    Returns:
        `folders`, `pairs`, `unpaired` (clips of either without one of their name in the other),
        `both_dynamic`, `unlike` (pairs of two sizes or rates), `measures` with `difference` (first
        less second), `low`, `high`, `pairs`, `prompts`, `verdict` each; of all clips, paired or
        not, `motion_distance`, `fvd` and `kvd` with `fvd_segments` and `fvd_width`, the values of a
        segment's feature; and the `verdict`.
    """
    shared = [clip for clip in rows if clip in others]
    moving = [c for c in shared if rows[c]["dynamic"] and others[c]["dynamic"]]
    measures = {}
    for measure in MEASURES:
        clips = shared if measure in _UNGATED else moving
        known = [c for c in clips if None not in (
            rows[c]["figures"].get(measure), others[c]["figures"].get(measure))]  # fmt: skip
        if known:
            measures[measure] = _compared(
                measure, [rows[c] for c in known], [others[c] for c in known], (name, other_name)
            )
    unlike = sum(
        any(rows[c].get(key) != others[c].get(key) for key in ("fps", "size")) for c in shared
    )
    features, other_features = _listed("features", rows), _listed("features", others)
    return {
        "folders": [name, other_name],
        "pairs": len(shared),
        "unpaired": [len(rows) - len(shared), len(others) - len(shared)],
        "both_dynamic": len(moving),
        "unlike": unlike,
        "confidence": CONFIDENCE,
        "measures": measures,
        "motion_distance": frechet_distance(
            _listed("histograms", rows), _listed("histograms", others)
        ),
        "fvd": frechet_distance(features, other_features, least=2),
        "kvd": kernel_distance(features, other_features),
        "fvd_segments": [len(features), len(other_features)],
        "fvd_width": max((len(row) for row in (*features, *other_features)), default=0),
        "verdict": _headline(measures.get(HEADLINE), len(shared), len(moving), unlike),
    }


def _listed(kind: str, rows: Rows) -> list[list[float]]:
    """All of a folder's clips' histograms or features, [K, D]."""
    return [row for clip in rows.values() for row in clip[kind]]


def _compared(
    measure: str, rows: Sequence[Mapping[str, Any]], other_rows: Sequence[Mapping[str, Any]],
    names: tuple[str, str],
) -> dict[str, Any]:
    ones, others = ([row["figures"][measure] for row in side] for side in (rows, other_rows))
    prompts, better, (name, other) = prompts_of(rows), MEASURES[measure].better, names
    mine, theirs = (weights_of(measure, side) for side in (rows, other_rows))
    weights = None if mine is None or theirs is None else (mine, theirs)
    low, high = paired_interval(ones, others, groups=prompts, weights=weights)
    apart = len(set(prompts))
    if apart < FEWEST_PAIRS:
        what = "pairs" if apart == len(ones) else "prompts"
        verdict = f"too few {what} ({apart} of {FEWEST_PAIRS})"
    elif low <= 0 <= high:
        verdict = "no significant difference"
    elif better == "neither":
        verdict = "different"
    else:
        verdict = f"{name if (low > 0) == (better == 'more') else other} is better"
    return {"difference": fmean(ones, mine) - fmean(others, theirs), "low": low, "high": high,
            "pairs": len(ones), "prompts": apart, "verdict": verdict}  # fmt: skip


def _headline(
    steadiness: Mapping[str, Any] | None, shared: int, moving: int, unlike: int
) -> str:
    if not shared or steadiness is None:
        return "no pair of clips; only the two sets have distances"
    still = f"; {shared - moving} of {shared} pairs have a clip that doesn't move"
    verdict = str(steadiness["verdict"])
    if verdict.endswith("is better"):
        verdict = f"{verdict[: -len(' is better')]} is steadier"
    differ = f"; {unlike} of {shared} pairs differ in size or frame rate"
    return verdict + (still if moving < shared else "") + (differ if unlike else "")
