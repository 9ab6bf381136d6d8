"""Summaries of a folder of clips, and comparisons of two folders.

Intervals are over prompts, not clips; verdicts say if a difference isn't significant.

Axes: K features of a set, D values of a feature.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vidgen.evaluation.metrics.vbench import (
    MEASURES,
    PROXY,
    Measure,
    normalise,
    temporal_subtotal,
)
from vidgen.evaluation.statistics import CONFIDENCE, mean_interval, paired_interval, rate_interval

Rows = Mapping[str, Mapping[str, Any]]
Features = Sequence[Sequence[float]]
FEWEST_PAIRS = 6
"""Fewest pairs of clips, or prompts if several clips share one, for a verdict."""
HEADLINE = "steadiness"


def figures(clips: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return a summary of the scores of a folder's clips.

    Returns:
        `figures`: {measure: value, low, high, total, normalised if VBench has a range};
        `temporal_subtotal` and `proxy_temporal_subtotal`, None if one of their five
        dimensions is missing.
    """
    found: dict[str, dict[str, Any]] = {}
    for measure, kind in MEASURES.items():
        known = [row for row in clips if row["figures"].get(measure) is not None]
        if not known:
            continue
        values = [row["figures"][measure] for row in known]
        weights = _weights(kind, known)
        value, prompts = fmean(values, weights), prompts_of(known)
        if kind.yes_no:
            low, high = rate_interval([bool(each) for each in values], prompts)
        else:
            low, high = mean_interval(values, groups=prompts, weights=weights)
            if math.isfinite(low):
                least, most = kind.possible  # values are rounded
                low, high = max(low, min(least, value)), min(high, max(most, value))
        found[measure] = {
            "value": value, "low": low if math.isfinite(low) else None,
            "high": high if math.isfinite(high) else None, "total": len(values)}
        if kind.scale:
            found[measure]["normalised"] = normalise(measure, value)
    scores = {name: entry["value"] for name, entry in found.items()}
    return {
        "figures": found,
        "temporal_subtotal": temporal_subtotal(scores),
        PROXY + "temporal_subtotal": temporal_subtotal(scores, PROXY),
    }


def _weights(kind: Measure, clips: Sequence[Mapping[str, Any]]) -> list[int] | None:
    return [clip["num_frames"] - 1 for clip in clips] if kind.by_frames else None


def by_name(folder: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return {clip's name: its scores} of a folder's results."""
    return {clip["name"]: clip for clip in folder["clips"]}


def prompts_of(clips: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the prompt of each clip, or its name if all share one prompt."""
    prompts = [clip["prompt"] for clip in clips]
    return prompts if len(set(prompts)) > 1 else [clip["name"] for clip in clips]


def compare(name: str, rows: Rows, other_name: str, others: Rows) -> dict[str, Any]:
    """Return the comparison of two folders, {clip's name: its scores}, paired by clip name.

    Measures that stillness flatters count only pairs of two moving clips. `steadiness`, the
    headline, is 0 for a clip that doesn't move, so a still clip never wins.

    Returns:
        `folders`, `pairs`, `unpaired`, `both_dynamic`, `unlike` (pairs of unequal size or rate);
        `measures` with `difference` (first less second), `low`, `high`, `pairs`, `prompts`,
        `verdict`; distances of all clips, paired or not, `fvd`, `kvd` with
        `fvd_segments` and `fvd_width`; the `verdict`.
    """
    shared = [clip for clip in rows if clip in others]
    moving = [c for c in shared if rows[c]["dynamic"] and others[c]["dynamic"]]
    measures = {}
    for measure, kind in MEASURES.items():
        clips = shared if kind.counts_still else moving
        known = [c for c in clips if None not in (
            rows[c]["figures"].get(measure), others[c]["figures"].get(measure))]  # fmt: skip
        if known:
            measures[measure] = _compared(
                measure, [rows[c] for c in known], [others[c] for c in known], (name, other_name))
    unlike = sum(
        any(rows[c].get(key) != others[c].get(key) for key in ("fps", "size")) for c in shared)
    features, other_features = (
        [row for clip in side.values() for row in clip["features"]] for side in (rows, others))
    return {
        "folders": [name, other_name], "pairs": len(shared),
        "unpaired": [len(rows) - len(shared), len(others) - len(shared)],
        "both_dynamic": len(moving), "unlike": unlike,
        "confidence": CONFIDENCE, "measures": measures,
        "fvd": frechet_distance(features, other_features),
        "kvd": kernel_distance(features, other_features),
        "fvd_segments": [len(features), len(other_features)],
        "fvd_width": max((len(row) for row in (*features, *other_features)), default=0),
        "verdict": _headline(measures.get(HEADLINE), len(shared), len(moving), unlike),
    }


def _compared(
    measure: str, rows: Sequence[Mapping[str, Any]], other_rows: Sequence[Mapping[str, Any]],
    names: tuple[str, str],
) -> dict[str, Any]:
    ones, others = ([row["figures"][measure] for row in side] for side in (rows, other_rows))
    prompts, kind, (name, other) = prompts_of(rows), MEASURES[measure], names
    mine, theirs = _weights(kind, rows), _weights(kind, other_rows)
    weights = None if mine is None or theirs is None else (mine, theirs)
    low, high = paired_interval(ones, others, groups=prompts, weights=weights)
    num_prompts = len(set(prompts))
    if num_prompts < FEWEST_PAIRS:
        unit = "pairs" if num_prompts == len(ones) else "prompts"
        verdict = f"too few {unit} ({num_prompts} of {FEWEST_PAIRS})"
    elif low <= 0 <= high:
        verdict = "no significant difference"
    elif kind.better == "neither":
        verdict = "different"
    else:
        verdict = f"{name if (low > 0) == (kind.better == 'more') else other} is better"
    return {"difference": fmean(ones, mine) - fmean(others, theirs), "low": low, "high": high,
            "pairs": len(ones), "prompts": num_prompts, "verdict": verdict}  # fmt: skip


def _headline(steadiness: Mapping[str, Any] | None, shared: int, moving: int, unlike: int) -> str:
    if not shared or steadiness is None:
        return "no pair of clips; only the two sets have distances"
    still = f"; {shared - moving} of {shared} pairs have a clip that doesn't move"
    verdict = str(steadiness["verdict"])
    if verdict.endswith("is better"):
        verdict = f"{verdict[: -len(' is better')]} is steadier"
    differ = f"; {unlike} of {shared} pairs differ in size or frame rate"
    return verdict + (still if moving < shared else "") + (differ if unlike else "")


def frechet_distance(ones: Features, others: Features) -> float | None:
    """Return the distance of two sets of features as of Gaussians (Dowson and Landau 1982).

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1^.5 C2 C1^.5)^.5). With features of I3D it is FVD
    (Unterthiner et al. 2018). None if a set [K, D] has fewer than two rows.
    """
    a, b = np.asarray(ones, dtype=np.float64), np.asarray(others, dtype=np.float64)
    if min(len(a), len(b)) < 2:
        return None
    between = float(np.square(a.mean(0) - b.mean(0)).sum())
    one, other = (rows - rows.mean(0) for rows in (a, b))
    one, other = one / np.sqrt(len(a) - 1), other / np.sqrt(len(b) - 1)
    # the trace of the root is the sum of the singular values of the product of both factors
    cross = float(np.linalg.svd(one @ other.T, compute_uv=False).sum())
    return max(0.0, between + float(np.square(one).sum() + np.square(other).sum()) - 2 * cross)


def kernel_distance(ones: Features, others: Features) -> float | None:
    """Return the unbiased squared maximum mean discrepancy under the kernel (x y / D + 1)^3.

    With features of I3D it is KVD (Binkowski et al. 2018, eq. 4; Unterthiner et al. 2018). It can
    be slightly below 0, and is None where a set [K, D] has fewer than two rows.
    """
    a, b = np.asarray(ones, dtype=np.float64), np.asarray(others, dtype=np.float64)
    if min(len(a), len(b)) < 2:
        return None
    within = sum(_mean_of_others(_kernel(rows, rows)) for rows in (a, b))
    return float(within - 2 * _kernel(a, b).mean())


def _kernel(ones: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray((ones @ others.T / ones.shape[1] + 1) ** 3)


def _mean_of_others(kernel: NDArray[np.float64]) -> float:
    count = len(kernel)
    return float((kernel.sum() - np.trace(kernel)) / (count * (count - 1)))
