"""From the scores of clips to the figures of a folder, and to VBench's layout."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from vidgen.evaluation.metrics.registry import MEASURES, PROXY
from vidgen.evaluation.metrics.vbench import DIMENSIONS, WEIGHTS, normalise, temporal_subtotal
from vidgen.evaluation.statistics import mean_interval, rate_interval

#: Averaged over all frames instead of over clips, as there.
_BY_FRAMES = ("subject_consistency", "background_consistency")


def figures(clips: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Summarise the scores of a folder's clips.

    Returns:
        `figures`: {measure: value, low, high, total, normalised where VBench has a range};
        `temporal_subtotal` and `proxy_temporal_subtotal`, None where one of their five dimensions
        is missing.
    """
    found: dict[str, dict[str, Any]] = {}
    for measure in MEASURES:
        known = [row for row in clips if row["figures"].get(measure) is not None]
        if not known:
            continue
        values = [row["figures"][measure] for row in known]
        dimension, weights = measure.removeprefix(PROXY), weights_of(measure, known)
        value = fmean(values, weights)
        low, high = _interval(measure, values, value, prompts_of(known), weights)
        found[measure] = {
            "value": value, "low": low if math.isfinite(low) else None,
            "high": high if math.isfinite(high) else None, "total": len(values),
        }  # fmt: skip
        if dimension in DIMENSIONS:
            found[measure]["normalised"] = normalise(dimension, value)
    scores = {name: entry["value"] for name, entry in found.items()}
    return {
        "figures": found,
        "temporal_subtotal": temporal_subtotal(scores),
        PROXY + "temporal_subtotal": temporal_subtotal(
            {name: scores.get(PROXY + name) for name in WEIGHTS}
        ),
    }


def _interval(
    measure: str, values: Sequence[float], value: float, prompts: Sequence[str],
    weights: Sequence[int] | None,
) -> tuple[float, float]:
    """Return the 95% interval of a folder's value, within what is possible."""
    kind = MEASURES[measure]
    if kind.yes_no:
        return rate_interval([bool(each) for each in values], prompts)
    low, high = mean_interval(values, groups=prompts, weights=weights)
    if not math.isfinite(low):
        return low, high
    least, most = kind.possible
    return max(low, min(least, value)), min(high, max(most, value))  # values are rounded


def weights_of(measure: str, clips: Sequence[Mapping[str, Any]]) -> list[int] | None:
    """Return the weight of each clip in a folder's value; None: all equal."""
    if measure.removeprefix(PROXY) not in _BY_FRAMES:
        return None
    return [clip["num_frames"] - 1 for clip in clips]


def by_name(folder: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return {clip's name: its scores} of a folder's results."""
    return {clip["name"]: clip for clip in folder["clips"]}


def prompts_of(clips: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the prompt of each clip; where all share one, the clip's name."""
    prompts = [clip["prompt"] for clip in clips]
    return prompts if len(set(prompts)) > 1 else [clip["name"] for clip in clips]


def dimensions(clips: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return VBench's layout, {dimension: [average, [{video_path, video_results}, ...]]}."""
    averages = figures(clips)["figures"]
    found = {}
    for measure in (name for name in averages if name.removeprefix(PROXY) in DIMENSIONS):
        results = [
            {"video_path": clip["path"], "video_results": clip["figures"][measure]}
            for clip in clips if clip["figures"].get(measure) is not None
        ]  # fmt: skip
        found[measure] = [averages[measure]["value"], results]
    return found
