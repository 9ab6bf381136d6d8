"""Checks of a clip while its frames stream past, or of a file.

`ClipChecker` holds as much after an hour as after a second and costs well under a millisecond a
frame. Every limit stands here with its reason; docs/reference/metrics.md repeats them for users.

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
"""Flashes in any second; more can bring on seizures (ITU-R BT.1702-3; WCAG 2.2, 2.3.1)."""
SPIKE, SPIKE_FAULT = 0.03, 0.1
"""Jump of half the picture and back, of the range. Clean renders stay below 0.003, a decoder's own
flicker below 0.005; from a tenth on it counts as a flash."""
FLAT = 0.98
"""Share of pixels that are black (below 10% of the range) or white (above 90%)."""
BLANK = 1.0
"""Spread of the pixels in levels, below which a frame is one colour: NaN decodes to that."""
NOISE, NOISE_SPREAD = 0.6, 12.0
"""Share of the variance that lies between neighbouring pixels, where pixels spread at all.
Pictures stay below 0.3; white noise has 1."""
FROZEN_S, FROZEN_FRAMES = 0.4, 4
"""Repeats of a frame that was on the move. Shorter ones are drawn on twos or lost in a blink."""
STILL, STILL_S = 1.5, 1.0
"""Levels within which all cells' means stay at their first values, for at least so many seconds."""
FADE_S = 1.0
"""A black or white start or end up to this long may be a fade that was meant."""
PSNR, SSIM = 20.0, 0.6
"""First frame against the picture given: another picture has 7 to 15 dB, a small VAE's round trip
25 to 35 dB and a similarity above 0.8."""
DRIFT, DRIFT_FAULT = 0.08, 0.15
"""Change of colour, saturation or contrast over a shot, of the range; clean renders with moving
cameras stay below 0.05, and a step of 0.08 between two stills is plain to see."""
LENGTH = 0.02
"""Share by which a duration may differ: animations count in hundredths of a second."""
SOUND_S = 0.1
"""Difference of the lengths of sound and picture; ITU-R BT.1359 finds 0.09 s still acceptable."""
SILENCE_DB = -60.0
"""Level of the loudest tenth of a second: room noise is louder."""
CLIPPING, CLIPPING_FAULT = 0.001, 0.01
"""Share of samples that stand at full scale, three or more in a row."""

_OTHER_SEED = "take another seed or --dtype fp32"
_FLASHES = (FLASHES, "{value:g} flashes in a second between {start:g} and {end:g} s can bring on "
            "seizures; don't show it, take another seed or lower --guidance")
_OF_SPANS: dict[str, tuple[float, str]] = {  # limit and text of findings with a time, by kind
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
    """A fault, or a possible one.

    Attributes:
        kind: one word, such as "flash"; docs/reference/metrics.md lists them.
        severity: "fault" fails `--strict`; a "warning" may be meant.
        time_s: (start, end) in seconds; None for the whole clip.
        value: the measurement, in the unit of the limit.
        limit: which it must not exceed, or fall below.
        text: a sentence for people, with the remedy.
    """

    kind: str
    severity: Severity
    time_s: tuple[float, float] | None
    value: float
    limit: float
    text: str


def verdict(findings: Iterable[Finding]) -> Verdict:
    """Return the worst severity, or "clean"."""
    severities = {finding.severity for finding in findings}
    return "fault" if "fault" in severities else "warning" if severities else "clean"


def as_data(findings: Iterable[Finding]) -> dict[str, Any]:
    """Return findings as JSON data, for a recipe or a result."""
    kept = list(findings)
    return {"verdict": verdict(kept), "findings": [asdict(finding) for finding in kept]}


def recorded(recipe: Mapping[str, Any] | None) -> list[Finding] | None:
    """Return the findings in a recipe; None where it has none, or something else."""
    try:
        known = (recipe or {})["checks"]["findings"]
        found = [Finding(**{**each, "time_s": each["time_s"] and tuple(each["time_s"])})
                 for each in known]
        verdict(found)
    except (KeyError, TypeError):
        return None
    return found


class ClipChecker:
    """Checks of frames as they come, on their way into a file whose recipe gets the findings.

    Args:
        info: the clip's rate, size, sound and length; 0 frames if that isn't known.
        first_frame: uint8 [H, W, 3], with which the clip should begin; brought to its size.
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
        self._began: Array | None = None  # the first frame's cells, and how far they were left
        self._left = 0.0
        self._ended: Array | None = None  # the last frame's cells
        self._kept: list[Look] | None = None  # since the last `take_looks`

    @cached_property
    def findings(self) -> list[Finding]:
        """Results of `finish`; read them once the last frame has passed."""
        return self.finish()

    def report(self) -> dict[str, Any]:
        """Return the recipe's entries."""
        found = {"checks": as_data(self.findings)}
        return found if self._ended is None else found | {ENDING: ending_text(self._ended)}

    def take_looks(self) -> Looks:
        """Return what was seen since the last call; the first call begins to keep it."""
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
        """See the frames of `take_looks` again; raise InputError if they are damaged."""
        try:
            rows = (looks[name] for name in ("color", "luma", "moved", "figures"))
            for color, luma, moved, figures in zip(*rows, strict=True):
                before = moved if self.num_frames else None
                self._see(Look(color.transpose(1, 2, 0), luma, before, *figures.tolist()))
            self._looker.before, self._given = looks["before"], None
            if "first" in looks:
                self._likeness = looks["first"][0].item(), looks["first"][1].item()
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise InputError(f"what the checks had seen is damaged ({type(error).__name__}: "
                             f"{error}); start anew with --overwrite") from None

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
        self._left = max(self._left, float(np.abs(look.luma - self._began).max()))
        self._ended = look.color
        if look.moved is not None:
            self._freezes.feed(index, look.moved)

    def finish(self) -> list[Finding]:
        """Return all findings; call it once, after the last frame."""
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
        """Compare the last frame with the one in a recipe."""
        off = 0.0 if self._ended is None else ending_distance(recipe, self._ended)
        if off <= LIMIT:
            return []
        last = self.num_frames - 1
        return [Finding(
            "ending", "warning", self._time(Span(last, last, 0)), round(off, 1), LIMIT,
            "the last frame isn't the one that the recipe tells of, so the clip was edited; vidgen "
            "replay makes it as it was",
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
        if self._left < STILL and not is_flat and self.num_frames / self._fps >= STILL_S:
            yield Finding(
                "still", "warning", None, self._left, STILL,
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
    """Check a video, an animation or a folder of PNGs, against its recipe where it has one.

    `image` is the picture with which it is to begin, fitted as the recipe says, or else the way
    that comes nearest.

    Raises:
        InputError: a file that is missing or damaged.
    """
    given = None if image is None else load_image(image)[0]
    recipe = read_recipe(path) or {}
    plan = recipe["plan"] if isinstance(recipe.get("plan"), dict) else {}
    wanted, count = recipe_rate(recipe), plan.get("kept_frames")
    is_film = not (Path(path).is_dir() or Path(path).suffix.lower() in PICTURE_SUFFIXES)
    sound = read_sound(path) if is_film else None
    fps = wanted or Fraction(25)
    if not Path(path).is_dir():  # which has no rate of its own
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
        asked = [mode for mode in modes if mode == plan.get("fit")]
        ways = [fit(given, height, width, mode) for mode in asked or modes]
        given = max(ways, key=lambda fitted: psnr(first, fitted))
    checker = ClipChecker(ClipInfo(fps, (width, height), count, samples, rate), given)
    for frame in chain([first], frames):
        checker.feed(frame[None])
    count = checker.num_frames
    if count == 1 and not is_film:  # a picture has no rate
        wanted = None
    found = [*checker.finish(), *check_length(count, fps, count, wanted)]
    return found + checker.check_ending(recipe)


def check_length(
    num_frames: int, fps: Fraction, wanted_frames: int, wanted_fps: Fraction | None = None
) -> list[Finding]:
    """Compare the number of frames and the rate with those wanted."""
    found, wanted_fps = [], wanted_fps or fps
    if num_frames != wanted_frames:
        found.append(Finding(
            "length", "fault", None, num_frames, wanted_frames,
            f"{num_frames} frames are there where {wanted_frames} were asked for; make it again",
        ))
    if abs(fps / wanted_fps - 1) > LENGTH:
        found.append(Finding(
            "fps", "fault", None, float(fps), float(wanted_fps),
            f"it runs at {float(fps):g} frames a second instead of {float(wanted_fps):g}; write it "
            "again, as .mp4 if the format can't count so finely",
        ))
    return found


def check_sound(sound: Samples, rate: int, seconds: float) -> list[Finding]:
    """Check length, level, clipping and garbage of sound [N, channels] to `seconds` of picture."""
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
    """Return the flaws of a single frame, each with the value that shows it."""
    if look.dark >= FLAT:
        return {"black": look.dark}
    if look.bright >= FLAT:
        return {"white": look.bright}
    if look.spread < BLANK:
        return {"blank": look.spread}
    if look.roughness >= NOISE and look.spread >= NOISE_SPREAD:
        return {"noise": look.roughness}
    return {}
