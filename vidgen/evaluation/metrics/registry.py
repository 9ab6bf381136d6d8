"""Which measures there are, what they mean and which way is better."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vidgen.evaluation.metrics.appearance import DISTANCES
from vidgen.evaluation.metrics.vbench import RANGES

Better = Literal["more", "less", "neither"]
PROXY = "proxy_"


@dataclass(frozen=True)
class Measure:
    """One measure.

    Attributes:
        better: which way; of "neither" no verdict is given.
        unit: of its values.
        about: what it says, for people.
    """

    better: Better
    unit: str
    about: str


_VBENCH = {
    "subject_consistency": "the subject stays what it is",
    "background_consistency": "the background stays what it is",
    "temporal_flickering": "neighbouring frames are alike, in clips that pass the static filter",
    "motion_smoothness": "odd frames follow from even ones",
    "dynamic_degree": "whether there is large motion",
    "i2v_subject": "the subject of the image is kept",
    "i2v_background": "the look of the image is kept",
    "camera_motion": "the camera does what the prompt says",
}
assert _VBENCH.keys() == RANGES.keys()

MEASURES: dict[str, Measure] = {
    **{n: Measure("neither" if n == "dynamic_degree" else "more", "", about)
       for n, about in _VBENCH.items()},
    **{PROXY + n: Measure("neither" if n == "dynamic_degree" else "more", "", f"stand-in: {about}")
       for n, about in _VBENCH.items()},
    "steadiness": Measure(
        "more", "", "mean of the normalised consistencies and smoothness; 0 where nothing moves"),
    "motion_speed": Measure("neither", "sides/s", "what moves fastest, in short sides a second"),
    "warp_error": Measure("less", "x1e-4", "mean squared error of what the flow carries along"),
    "flicker": Measure("less", "levels", "second difference in time of pixels that don't move"),
    "track_jerk": Measure("less", "%", "third difference of tracked points, of the short side"),
    **{f"identity_drift_{d}": Measure("less", "%", f"the picture's colours change over {d} frames")
       for d in DISTANCES},
    "sharpness_drift": Measure("less", "octaves", "sharpness of the last fifth against the first"),
    "color_drift": Measure("less", "%", "colours change while the picture stays"),
    "frozen_share": Measure("less", "%", "frames that repeat the one before"),
    "pops": Measure("less", "%", "most that appears or vanishes at once, over the usual"),
    "seam": Measure("less", "levels", "largest jump between frames, over the usual"),
    "first_step": Measure("less", "x", "first step between frames by the usual step"),
    "first_frame_error": Measure("less", "levels", "first frame against the image given"),
}  # fmt: skip
