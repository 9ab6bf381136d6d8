"""Checks of a clip while its frames are written, or of a file.

`ClipChecker` uses constant memory and well under a millisecond per frame. Every limit is defined
here with its reason; docs/reference/metrics.md repeats them for users.

Axes: t frames, H W rows and columns, N samples of sound.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from vidgen.core.errors import InputError
from vidgen.media.cells import Array, Look, Looker, psnr, ssim
from vidgen.media.ending import ENDING, LIMIT, ending_distance, ending_text
from vidgen.media.probe import read_recipe, recipe_rate
from vidgen.media.read import PICTURE_SUFFIXES, fit, load_image
from vidgen.media.sound import read_sound
from vidgen.media.trackers import Drifts, Flashes, Freezes, Runs, Span, Spikes
from vidgen.media.types import ClipInfo, Frames, Looks, Samples
from vidgen.media.video_reader import VideoReader, read_frames

if TYPE_CHECKING:
    from vidgen.core.values import Fit, Picture

FLASHES = 3.0
"""Flashes in any second; more can cause seizures (ITU-R BT.1702-3; WCAG 2.2, 2.3.1)."""
SPIKE, SPIKE_FAULT = 0.03, 0.1
"""Jump of half the picture and back, as a share of the range. Clean renders stay below
0.003, a decoder's own flicker below 0.005; from a tenth on it counts as a flash."""
FLAT = 0.98
"""Share of pixels that are black (below 10% of the range) or white (above 90%)."""
BLANK = 1.0
"""Standard deviation of pixels in levels, below which a frame is one colour, as NaNs decode."""
NOISE, NOISE_SPREAD = 0.6, 12.0
"""Least share of the variance between neighbouring pixels, and least deviation in levels, of noise.
Pictures stay below 0.3; white noise has 1."""
FROZEN_S, FROZEN_FRAMES = 0.4, 4
"""Shortest freeze within a movement; animation on twos repeats frames for less."""
STILL, STILL_S = 1.5, 1.0
"""A still clip: all cells' means stay within so many levels, for at least so many seconds."""
FADE_S = 1.0
"""Longest black or white start or end that may be an intended fade."""
PSNR, SSIM = 20.0, 0.6
"""Likeness of the first frame to the given picture: another picture has 7 to 15 dB, a small VAE's
round trip 25 to 35 dB and a similarity above 0.8."""
DRIFT, DRIFT_FAULT = 0.08, 0.15
"""Change of colour, saturation or contrast over a shot, as a share of the range; clean renders with
moving cameras stay below 0.05, and a step of 0.08 between two stills is clearly visible."""
LENGTH = 0.02
"""Relative difference of frame rates to allow: animations count in hundredths of a second."""
SOUND_S = 0.1
"""Largest difference in length of sound and picture; ITU-R BT.1359 accepts 0.09 s."""
SILENCE_DB = -60.0
"""Level of the loudest tenth of a second below which sound is silent: room noise is louder."""
CLIPPING, CLIPPING_FAULT = 0.001, 0.01
"""Share of samples at full scale, three or more in a row."""

_OTHER_SEED = "take another seed or --dtype fp32"
_FLASHES = (FLASHES, "{value:g} flashes in a second between {start:g} and {end:g} s can bring on "
            "seizures; don't show it, take another seed or lower --guidance")
_OF_SPANS: dict[str, tuple[float, str]] = {  # limits and texts of findings with a time
    "black": (FLAT, "the picture is black from {start:g} to {end:g} s; {advice}"),
    "white": (FLAT, "the picture is blown out to white from {start:g} to {end:g} s; {advice}"),
    "blank": (BLANK, "the picture is one colour, as values that are no numbers decode from "
              "{start:g} to {end:g} s; {advice}"),
    "noise": (NOISE, "the picture is noise from {start:g} to {end:g} s; {advice}"),
    "flash": _FLASHES, "red-flash": _FLASHES,
    "spike": (SPIKE, "the picture jumps by {value:.0%} of the range and back at {start:g} s; "
              "take another seed or more --steps"),
    "frozen": (FROZEN_S, "the picture stands still from {start:g} to {end:g} s in the middle of a "
               "movement; take another seed"),
}

Severity: TypeAlias = Literal["warning", "fault"]
Verdict: TypeAlias = Literal["clean", "warning", "fault"]


@dataclass(frozen=True)
class Finding:
    """A fault or possible fault of a clip.

    Attributes:
        kind: one word, such as "flash"; docs/reference/metrics.md lists them.
        severity: "fault" fails `--strict`; a "warning" may be intended.
        time_s: (start, end) in seconds; None for the whole clip.
        value: the measurement, in the unit of the limit.
        limit: bound that `value` violates.
        text: message, with the remedy.
    """

    kind: str
    severity: Severity
    time_s: tuple[float, float] | None
    value: float
    limit: float
    text: str


def verdict(findings: Iterable[Finding]) -> Verdict:
    """Return the worst severity of findings, or "clean" without any."""
    severities = {finding.severity for finding in findings}
    return "fault" if "fault" in severities else "warning" if severities else "clean"


def as_data(findings: Iterable[Finding]) -> dict[str, Any]:
    """Return findings as JSON data, for a recipe or a result."""
    kept = list(findings)
    return {"verdict": verdict(kept), "findings": [asdict(finding) for finding in kept]}


def recorded(recipe: Mapping[str, Any] | None) -> list[Finding] | None:
    """Return the findings in a recipe; None if it has no valid ones."""
    try:
        known = (recipe or {})["checks"]["findings"]
        found = [Finding(**{**each, "time_s": each["time_s"] and tuple(each["time_s"])})
                 for each in known]
        verdict(found)
    except (KeyError, TypeError):
        return None
    return found


class ClipChecker:
    """Checks of a clip, fed frame by frame, whose findings go into its recipe.

    Args:
        info: the clip's rate, size, sound and length; 0 frames if unknown.
        first_frame: expected first frame, uint8 [H, W, 3] of any size.
    """

    def __init__(self, info: ClipInfo, first_frame: Frames | None = None) -> None:
        self.info, self.num_frames = info, 0
        fps, (width, height) = float(info.fps), info.size
        self._fps = fps
        self._looker = Looker(height, width)
        self._given = None if first_frame is None else fit(first_frame, height, width, "crop")
        self._meant = set[str]()
        if self._given is not None:
            self._meant.update(_flaws(Looker(height, width).look(self._given)))
        self._flat = {kind: Runs(fps) for kind in ("black", "white", "blank", "noise")}
        self._flashes = Flashes(fps, red=False), Flashes(fps, red=True)
        self._spikes = Spikes(fps, SPIKE)
        self._freezes = Freezes(fps, max(FROZEN_FRAMES, round(FROZEN_S * fps)))
        self._drifts = Drifts(fps)
        self._likeness: tuple[float, float] | None = None
        self._began: Array | None = None  # the first frame's cells
        self._largest_change = 0.0  # of a cell since the first frame
        self._ended: Array | None = None  # the last frame's cells
        self._kept: list[Look] | None = None  # since the last `take_looks`

    @cached_property
    def findings(self) -> list[Finding]:
        """Findings of `finish`, computed once; read them after the last frame."""
        return self.finish()

    def report(self) -> dict[str, Any]:
        """Return the recipe's entries: findings and the last frame's cells."""
        found = {"checks": as_data(self.findings)}
        return found if self._ended is None else found | {ENDING: ending_text(self._ended)}

    def take_looks(self) -> Looks:
        """Return the reduced frames since the last call; the first call starts to record them."""
        looks, self._kept = self._kept or [], []
        if not looks or self._looker.before is None:
            return {}
        arrays: Looks = {
            "color": np.stack([look.color.transpose(2, 0, 1) for look in looks]),
            "luma": np.stack([look.luma for look in looks]),
            "moved": np.stack([look.luma if look.moved is None else look.moved for look in looks]),
            "figures": np.array([[look.spread, look.dark, look.bright, look.roughness]
                                 for look in looks]),
            "before": self._looker.before}
        return arrays if self._likeness is None else arrays | {"first": np.array(self._likeness)}

    def restore(self, looks: Looks) -> None:
        """Feed the reduced frames of `take_looks`; raise InputError if they are damaged."""
        try:
            rows = (looks[name] for name in ("color", "luma", "moved", "figures"))
            for color, luma, moved, figures in zip(*rows, strict=True):
                before = moved if self.num_frames else None
                self._see(Look(color.transpose(1, 2, 0), luma, before, *figures.tolist()))
            self._looker.before, self._given = looks["before"], None
            if "first" in looks:
                self._likeness = looks["first"][0].item(), looks["first"][1].item()
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise InputError(f"the saved state of the checks is damaged ({type(error).__name__}: "
                             f"{error}); start again with --overwrite") from None

    def feed(self, chunk: Frames) -> None:
        """Check frames, uint8 [t, H, W, 3]."""
        for frame in chunk:
            if self._given is not None:
                self._likeness = psnr(frame, self._given), ssim(frame, self._given)
                self._given = None
            self._see(self._looker.look(frame))

    def _see(self, look: Look) -> None:
        index, self.num_frames = self.num_frames, self.num_frames + 1
        if self._kept is not None:
            self._kept.append(look)
        flaws = _flaws(look)
        for kind, runs in self._flat.items():
            runs.feed(index, kind in flaws and kind not in self._meant, flaws.get(kind, 0.0))
        linear = np.power(look.color / 255, np.float32(2.4))
        for flashes in self._flashes:
            flashes.feed(index, linear)
        self._spikes.feed(index, look.luma)
        if not flaws:
            self._drifts.feed(index, look.color)
        self._began = look.luma if self._began is None else self._began
        change = float(np.abs(look.luma - self._began).max())
        self._largest_change = max(self._largest_change, change)
        self._ended = look.color
        if look.moved is not None:
            self._freezes.feed(index, look.moved)

    def finish(self) -> list[Finding]:
        """Return all findings; call this once, after the last frame."""
        for runs in self._flat.values():
            runs.finish()
        self._freezes.finish()
        self._drifts.finish()
        found = [*self._span_findings(), *self._picture_findings()]
        if self.info.num_frames:
            found += check_length(self.num_frames, self.info.fps, self.info.num_frames)
        if self.info.sound is not None:
            found += check_sound(self.info.sound, self.info.sound_rate, self.num_frames / self._fps)
        return found

    def check_ending(self, recipe: Mapping[str, Any]) -> list[Finding]:
        """Return a finding if the last frame differs from the one in a recipe."""
        off = 0.0 if self._ended is None else ending_distance(recipe, self._ended)
        if off <= LIMIT:
            return []
        last = self.num_frames - 1
        return [Finding(
            "ending", "warning", self._time(Span(last, last, 0)), round(off, 1), LIMIT,
            "the last frame differs from the one in the recipe, so the clip was edited; vidgen "
            "replay restores the original",
        )]

    def _time(self, span: Span) -> tuple[float, float]:
        return round(span.first / self._fps, 3), round((span.last + 1) / self._fps, 3)

    def _span_findings(self) -> Iterator[Finding]:
        trackers: dict[str, Runs | Flashes | Spikes | Freezes] = {
            **self._flat, "flash": self._flashes[0], "red-flash": self._flashes[1],
            "spike": self._spikes, "frozen": self._freezes,
        }
        for kind, tracker in trackers.items():
            limit, text = _OF_SPANS[kind]
            for span in tracker.spans.found:
                start, end = self._time(span)
                value = round(end - start, 3) if kind == "frozen" else span.value
                is_fade = kind in ("black", "white") and end - start <= FADE_S and (
                    (span.first == 0) != (span.last == self.num_frames - 1)
                )
                is_fault = value >= SPIKE_FAULT if kind == "spike" else not is_fade
                advice = "fine if a fade is meant" if is_fade else _OTHER_SEED
                yield Finding(kind, "fault" if is_fault else "warning", (start, end), value, limit,
                              text.format(start=start, end=end, value=value, advice=advice))

    def _picture_findings(self) -> Iterator[Finding]:
        is_flat = any(runs.spans.found for runs in self._flat.values())
        if self._largest_change < STILL and not is_flat and self.num_frames / self._fps >= STILL_S:
            yield Finding(
                "still", "warning", None, self._largest_change, STILL,
                "nothing moves from start to end; if something should, name its motion in the "
                "prompt",
            )
        if self._likeness is not None:
            ratio, likeness = self._likeness
            if ratio < PSNR or likeness < SSIM:
                yield Finding(
                    "first-frame", "fault", (0.0, round(1 / self._fps, 3)), ratio, PSNR,
                    f"the first frame is unlike the picture given: {ratio:.1f} dB and a similarity "
                    f"of {likeness:.2f}, below {PSNR:g} dB or {SSIM:g}; take another seed or a "
                    "picture in the clip's aspect",
                )
        drift = self._drifts.worst
        if drift is not None and drift.most >= DRIFT:
            yield Finding(
                "drift", "fault" if drift.most >= DRIFT_FAULT else "warning",
                self._time(Span(drift.first, drift.last, 0)), drift.most, DRIFT,
                f"the colours drift: {drift.text()} (of the range); lower --guidance, add "
                "--guidance-rescale 0.7 or make it shorter",
            )


def check_file(path: str | os.PathLike[str], image: Picture | None = None) -> list[Finding]:
    """Check a video, an animation or a folder of PNGs, also against its recipe if it has one.

    `image` is the expected first frame, fitted as the recipe says, or else by the mode that gives
    the closest match.

    Raises:
        InputError: missing or damaged.
    """
    given = None if image is None else load_image(image)[0]
    recipe = read_recipe(path) or {}
    plan = recipe["plan"] if isinstance(recipe.get("plan"), dict) else {}
    wanted, count = recipe_rate(recipe), plan.get("kept_frames")
    is_film = not (Path(path).is_dir() or Path(path).suffix.lower() in PICTURE_SUFFIXES)
    sound = read_sound(path) if is_film else None
    fps = wanted or Fraction(25)
    if not Path(path).is_dir():  # a folder has no frame rate
        with VideoReader(path) as reader:
            fps = reader.fps
    frames = read_frames(path)
    first = next(frames)
    height, width, _ = first.shape
    samples, rate = sound or (None, 48_000)
    left_out = recipe.get("head_frames", 0)
    is_count = isinstance(count, int) and isinstance(left_out, int)
    count = max(count - left_out, 0) if is_count else 0
    if given is not None:
        modes: tuple[Fit, ...] = ("crop", "pad")
        planned = [mode for mode in modes if mode == plan.get("fit")]
        candidates = [fit(given, height, width, mode) for mode in planned or modes]
        given = max(candidates, key=lambda fitted: psnr(first, fitted))
    checker = ClipChecker(ClipInfo(fps, (width, height), count, samples, rate), given)
    for frame in chain([first], frames):
        checker.feed(frame[None])
    count = checker.num_frames
    if count == 1 and not is_film:  # a picture has no frame rate
        wanted = None
    found = [*checker.finish(), *check_length(count, fps, count, wanted)]
    return found + checker.check_ending(recipe)


def check_length(
    num_frames: int, fps: Fraction, wanted_frames: int, wanted_fps: Fraction | None = None
) -> list[Finding]:
    """Return findings if the number of frames or the frame rate differs from those wanted."""
    found, wanted_fps = [], wanted_fps or fps
    if num_frames != wanted_frames:
        found.append(Finding(
            "length", "fault", None, num_frames, wanted_frames,
            f"the clip has {num_frames} frames instead of {wanted_frames}; generate it again",
        ))
    if abs(fps / wanted_fps - 1) > LENGTH:
        found.append(Finding(
            "fps", "fault", None, float(fps), float(wanted_fps),
            f"the clip runs at {float(fps):g} fps instead of {float(wanted_fps):g}; write it "
            "again, as .mp4 if the format's timing is too coarse",
        ))
    return found


def check_sound(sound: Samples, rate: int, seconds: float) -> list[Finding]:
    """Return findings on length, level, clipping and non-finite samples of sound [N, channels].

    `seconds` is the picture's duration.
    """
    found = []
    off = len(sound) / rate - seconds
    if abs(off) > SOUND_S:
        more = "longer" if off > 0 else "shorter"
        found.append(Finding(
            "sound-length", "fault", None, abs(off), SOUND_S,
            f"the sound is {abs(off):.2f} s {more} than the picture; cut or extend it",
        ))
    bad, clipped, loudest = 0, 0, 0.0
    block = max(1, rate // 10)
    for start in range(0, len(sound), block):
        part = sound[start : start + block].astype(np.float64)
        finite = np.isfinite(part)
        bad += int(finite.size - np.count_nonzero(finite))
        part = np.where(finite, part, 0)
        loudest = max(loudest, float(np.square(part).mean()))
        full = np.abs(part) >= 0.999
        clipped += int(np.count_nonzero(full[2:] & full[1:-1] & full[:-2]))
    level = 10 * np.log10(max(loudest, 1e-12))
    share = clipped / max(1, sound.size)
    if bad:
        found.append(Finding(
            "sound-garbage", "fault", None, bad, 0,
            f"{bad} samples of the sound are no numbers; take another seed or --dtype fp32",
        ))
    elif level < SILENCE_DB:
        found.append(Finding(
            "silence", "fault", None, round(level, 1), SILENCE_DB,
            f"the sound is silent: {level:.0f} dB at its loudest; leave it out with --audio none",
        ))
    if share >= CLIPPING:
        found.append(Finding(
            "clipping", "fault" if share >= CLIPPING_FAULT else "warning", None, share, CLIPPING,
            f"{share:.1%} of the sound is cut off at full scale; make it quieter",
        ))
    return found


def _flaws(look: Look) -> dict[str, float]:
    """Return {kind: value} of a single frame's flaws."""
    if look.dark >= FLAT:
        return {"black": look.dark}
    if look.bright >= FLAT:
        return {"white": look.bright}
    if look.spread < BLANK:
        return {"blank": look.spread}
    if look.roughness >= NOISE and look.spread >= NOISE_SPREAD:
        return {"noise": look.roughness}
    return {}
