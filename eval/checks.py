"""How surely the output checks find planted faults, and how often they cry wolf.

    python -m eval.checks -o checks.json [--clips 200] [--decoded]

Renders Toybox clips (33 frames of 128x128), which must be clean, and plants every fault in a part
of them, at growing strength. With --decoded the faulty clips go through H.264 first. Four
minutes for 200 clips on one core.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from train.toybox.world.captions import canonical_prompt
from train.toybox.world.render import render
from train.toybox.world.scenes import SEED_RANGES, sample_scenes
from vidgen.core.errors import exit_code
from vidgen.core.runtime import atomic_write, check_output, fingerprint
from vidgen.media.checks import ClipChecker, Finding
from vidgen.media.clip import Clip
from vidgen.media.types import ClipInfo
from vidgen.media.write import write_clip
from vidgen.pipeline.codec import to_frames

FPS = Fraction(12)
Plant = Callable[[Any, float], Any]


def brighten(frames: Any, levels: Any) -> Any:
    """Frames [T, H, W, 3] plus some levels each."""
    shift = np.asarray(levels, dtype=np.float32).reshape(-1, 1, 1, 1)
    return np.clip(frames + shift, 0, 255).round().astype(np.uint8)


def flash(frames: Any, strength: float) -> Any:
    """Every second frame is mixed with white: 6 flashes a second."""
    share = np.where(np.arange(len(frames)) % 2, strength, 0).reshape(-1, 1, 1, 1)
    return (frames * (1 - share) + 255 * share).round().astype(np.uint8)


def spike(frames: Any, strength: float) -> Any:
    """One frame in the middle is brighter, or darker where the clip is bright, by `strength`."""
    middle, way = len(frames) // 2, 1 if frames.mean() < 128 else -1
    levels = np.where(np.arange(len(frames)) == middle, way * strength * 255, 0)
    return brighten(frames, levels)


def black(frames: Any, strength: float) -> Any:
    """Four frames in the middle are darkened by a share of `strength`."""
    out = frames.copy()
    out[14:18] = (out[14:18] * (1 - strength)).round()
    return out


def white(frames: Any, strength: float) -> Any:
    """The second half is blown out by a share of `strength`."""
    out = frames.copy()
    half = out[len(out) // 2 :]
    out[len(out) // 2 :] = (half * (1 - strength) + 255 * strength).round()
    return out


def noise(frames: Any, strength: float) -> Any:
    """The last frames are mixed with white noise."""
    out = frames.copy()
    tail = out[-6:]
    garbage = np.random.default_rng(0).integers(0, 256, tail.shape)
    out[-6:] = (tail * (1 - strength) + garbage * strength).round()
    return out


def blank(frames: Any, strength: float) -> Any:
    """The last frames lose a share of their contrast; at 1 they are grey, as NaN may decode."""
    out = frames.copy()
    out[-6:] = (out[-6:] * (1 - strength) + 128 * strength).round()
    return out


def frozen(frames: Any, strength: float) -> Any:
    """A frame in the middle repeats `strength` times, and time goes on."""
    out = frames.copy()
    out[12 : 13 + int(strength)] = out[12]
    return out


def drift(frames: Any, strength: float) -> Any:
    """Brightness moves by `strength` of the range, towards the side that has room."""
    way = 1 if frames.mean() < 128 else -1
    return brighten(frames, np.linspace(0, way * strength * 255, len(frames)))


def fade_color(frames: Any, strength: float) -> Any:
    """Colours fade to grey by a share of `strength`."""
    share = np.linspace(0, strength, len(frames)).reshape(-1, 1, 1, 1)
    grey = frames.mean(axis=-1, keepdims=True)
    return (frames * (1 - share) + grey * share).round().astype(np.uint8)


def first_frame(frames: Any, strength: float) -> Any:
    """The first frame is brighter or darker by `strength` than the picture given."""
    out = frames.copy()
    out[:1] = spike(out[:1], strength)
    return out


#: kind -> how it is planted, and at which strengths: below the limit, just above, plainly
PLANTS: dict[str, tuple[Plant, tuple[float, ...]]] = {
    "flash": (flash, (0.02, 0.2, 0.5, 0.8)),
    "spike": (spike, (0.015, 0.04, 0.1, 0.2)),
    "black": (black, (0.5, 0.9, 0.95, 1.0)),
    "white": (white, (0.5, 0.9, 0.98, 1.0)),
    "noise": (noise, (0.1, 0.4, 0.7, 1.0)),
    "blank": (blank, (0.5, 0.9, 0.99, 1.0)),
    "frozen": (frozen, (2, 3, 6, 12)),
    "drift": (drift, (0.03, 0.06, 0.1, 0.15, 0.2)),
    "drift of saturation": (fade_color, (0.1, 0.4, 0.7, 1.0)),
    "first-frame": (first_frame, (0.05, 0.12, 0.2)),
}


def check(frames: Any, first: Any = None, split: int = 5) -> list[Finding]:
    """Findings of frames [T, H, W, 3] that come in chunks."""
    info = ClipInfo(FPS, (frames.shape[2], frames.shape[1]), len(frames))
    checker = ClipChecker(info, first)
    for start in range(0, len(frames), split):
        checker.feed(frames[start : start + split])
    return checker.finish()


def rendered(count: int, num_frames: int = 33, side: int = 128) -> Iterator[tuple[str, Any]]:
    """(prompt, frames [T, H, W, 3]) of Toybox clips that no model was trained on."""
    for scene in sample_scenes(SEED_RANGES["dev"][0] + 7_000_000, count):
        video = render([scene], num_frames, side, side).video
        yield canonical_prompt(scene), to_frames(video[0]).numpy()


def encoded(frames: Any) -> Any:
    """Frames after H.264, as a file holds them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "clip.mp4")
        write_clip(path, [frames], ClipInfo(FPS, frames.shape[2:0:-1], len(frames)))
        return Clip.from_file(path).frames


def measure(clips: int, every: int, decode: bool) -> dict[str, Any]:
    """Count what is found in clean clips, and in those of every so many with a fault in them."""
    alarms: list[dict[str, Any]] = []
    counts: dict[str, dict[str, list[int]]] = {
        kind: {f"{s:g}": [0, 0] for s in strengths} for kind, (_, strengths) in PLANTS.items()
    }
    seconds = num_frames = 0.0
    for index, (text, frames) in enumerate(rendered(clips)):
        clean = encoded(frames) if decode else frames
        start = time.perf_counter()
        found = check(clean, frames[0])
        seconds, num_frames = seconds + time.perf_counter() - start, num_frames + len(frames)
        stands = not np.any(np.diff(frames.astype(np.int16), axis=0))
        alarms += [
            {"clip": index, "prompt": text, "kind": f.kind, "text": f.text}
            for f in found if not (f.kind == "still" and stands)
        ]
        if index % every == 0:
            for kind, (plant, strengths) in PLANTS.items():
                for strength in strengths:
                    faulty = plant(frames, strength)
                    faulty = encoded(faulty) if decode else faulty
                    kinds = {f.kind for f in check(faulty, frames[0])}
                    hit = kind.split()[0] in kinds
                    tally = counts[kind][f"{strength:g}"]
                    tally[0], tally[1] = tally[0] + hit, tally[1] + 1
        if sys.stderr.isatty():
            print(f"\r{index + 1}/{clips}", end="", file=sys.stderr)
    return {
        "clips": clips, "decoded": decode, "false_alarms": alarms,
        "found_of": counts, "microseconds_per_frame": round(seconds / num_frames * 1e6),
        "machine": fingerprint(),
    }


def main() -> None:
    """Measure, write the results, show a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("-o", "--output", required=True, metavar="JSON")
    parser.add_argument("--clips", type=int, default=200, metavar="N")
    parser.add_argument("--every", type=int, default=5, metavar="N", help="faults in each Nth clip")
    parser.add_argument("--decoded", action="store_true", help="check what H.264 leaves of them")
    parser.add_argument("--overwrite", action="store_true")
    args = parser.parse_args()
    check_output(args.output, overwrite=args.overwrite)
    result = measure(args.clips, args.every, args.decoded)
    atomic_write(args.output, (json.dumps(result, indent=1) + "\n").encode())
    print(f"{len(result['false_alarms'])} false alarms in {args.clips} clean clips; "
          f"{result['microseconds_per_frame']} us a frame")
    for kind, tallies in result["found_of"].items():
        rates = "  ".join(f"{s}: {hit}/{of}" for s, (hit, of) in tallies.items())
        print(f"{kind:20s} {rates}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
