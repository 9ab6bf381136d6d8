"""Registry of the measures: meaning, unit, better direction."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from vidgen.evaluation.metrics.appearance import DISTANCES
from vidgen.evaluation.metrics.vbench import DIMENSIONS

Better = Literal["more", "less", "neither"]
PROXY = "proxy_"


@dataclass(frozen=True)
class Measure:
    """Description of a measure."""

    better: Better  # direction; "neither" gets no verdict
    unit: str
    about: str  # meaning, one line
    possible: tuple[float, float] = (-math.inf, math.inf)  # range of a clip's values
    yes_no: bool = False  # whether a clip's value is 0 or 1


_SHARE, _PERCENT, _SIZE = (0.0, 1.0), (0.0, 100.0), (0.0, math.inf)

def _vbench(name: str, about: str) -> Measure:
    better: Better = "neither" if name == "dynamic_degree" else "more"
    return Measure(better, "", about, _SHARE, name == "dynamic_degree")


MEASURES: dict[str, Measure] = {
    **{name: _vbench(name, about) for name, (_, _, about) in DIMENSIONS.items()},
    **{PROXY + name: _vbench(name, f"stand-in: {about}")
       for name, (_, _, about) in DIMENSIONS.items()},
    "steadiness": Measure(
        "more", "", "mean of the normalised consistencies and smoothness; 0 where nothing moves"),
    "motion_speed": Measure(
        "neither", "sides/s", "what moves fastest, in short sides a second", _SIZE),
    "warp_error": Measure(
        "less", "x1e-4", "mean squared error of what the flow carries along", _SIZE),
    "flicker": Measure(
        "less", "levels", "second difference in time of pixels that don't move", _SIZE),
    "track_jerk": Measure(
        "less", "%", "third difference of tracked points, of the short side", _SIZE),
    **{f"identity_drift_{d}": Measure(
        "less", "%", f"the picture's colours change over {d} frames", _PERCENT)
       for d in DISTANCES},
    "sharpness_drift": Measure(
        "less", "octaves", "sharpness of the last fifth against the first", _SIZE),
    "color_drift": Measure("less", "%", "colours change while the picture stays", _SIZE),
    "frozen_share": Measure("less", "%", "frames that repeat the one before", _PERCENT),
    "pops": Measure("less", "%", "most that appears or vanishes at once, over the usual", _SIZE),
    "seam": Measure("less", "levels", "largest jump between frames, over the usual", _SIZE),
    "first_step": Measure("less", "x", "first step between frames by the usual step", _SIZE),
    "first_frame_error": Measure(
        "less", "levels", "first frame against the image given", (0.0, 255.0)),
}  # fmt: skip
