"""A shot's frames at the film's rate and size, and shots of a scene matched in colour.

Rate: film frame n, whose middle is at (n + 1/2) / fps, shows the shot's frame of that time, so
frames are repeated or dropped evenly without drift; or frames between are made by libavfilter's
motion-compensated interpolation. Size: Lanczos, with crop or pad, never stretched.

Colour: mean and deviation of each channel of a shot (R'G'B', 0 to 255) move towards the scene's
mean over frames: Reinhard et al. 2001, "Color Transfer between Images", equations 10 and 11, in
R'G'B' instead of l-alpha-beta and within limits, since shots of different things differ rightly. A
shot near the scene stays unchanged, to the bit.

Axes: H W rows and columns.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeAlias

import av
import numpy as np

from vidgen.core.errors import InputError
from vidgen.media.read import fit
from vidgen.media.types import Frames
from vidgen.media.video_reader import VideoReader

NEAR = 2.0
"""Most levels between the means of an unchanged shot and its scene."""
MAX_SHIFT, MAX_GAIN = 16.0, 1.15
"""Most levels by which a mean is moved, and factor by which a deviation is."""

Values: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Source:
    """A shot's file, and the film's rate and size that its frames are brought to."""

    path: Path
    source_fps: Fraction
    source_frames: int
    fps: Fraction
    num_frames: int  # frames of the film that show it
    size: tuple[int, int]  # (width, height) of the film
    fit: Literal["crop", "pad"] = "crop"
    rate: Literal["repeat", "flow"] = "repeat"
    table: Frames | None = None  # uint8 [3, 256], which replaces each channel's values; or None

    def frames(self) -> Iterator[Frames]:
        """Yield `num_frames` frames uint8 [H, W, 3], one at a time.

        Raises:
            InputError: the file ends too early, or is damaged.
        """
        width, height = self.size
        is_repeated = self.rate == "repeat" or self.source_fps == self.fps
        at_rate = self._repeated if is_repeated else self._flowing
        for frame in at_rate():
            fitted = fit(frame, height, width, self.fit)
            yield fitted if self.table is None else recoloured(fitted, self.table)

    def _read(self) -> Generator[Frames, None, None]:
        count = 0
        with VideoReader(self.path) as reader:
            for frame in reader:
                count += 1
                yield frame
        if count < self.source_frames:
            raise InputError(f"{self.path} ends after frame {count} of {self.source_frames}: it "
                             "was changed or damaged; remove it and render it again")

    def _repeated(self) -> Iterator[Frames]:
        step, last = self.source_fps / self.fps, self.source_frames - 1
        with closing(self._read()) as source:
            at, frame = -1, None
            for number in range(self.num_frames):
                wanted = min(int((number + Fraction(1, 2)) * step), last)
                while at < wanted:
                    frame, at = next(source), at + 1
                assert frame is not None
                yield frame

    def _flowing(self) -> Iterator[Frames]:
        made = 0
        frame = None
        for frame in _interpolated(self._read(), self.source_fps, self.fps):
            if made == self.num_frames:
                return
            yield frame
            made += 1
        while made < self.num_frames:  # after the last frame there is nothing to interpolate to
            assert frame is not None
            yield frame
            made += 1


def recoloured(frame: Frames, table: Frames) -> Frames:
    """Replace each channel's values of a frame uint8 [H, W, 3] by a table uint8 [3, 256]."""
    made = np.empty_like(frame)
    for channel in range(3):
        np.take(table[channel], frame[..., channel], out=made[..., channel])
    return made


def _interpolated(frames: Iterator[Frames], rate: Fraction, fps: Fraction) -> Iterator[Frames]:
    """Yield frames at another rate, by libavfilter's `minterpolate` with its defaults."""
    graph: av.filter.Graph | None = None
    last = None
    number = -1
    for number, frame in enumerate(frames):
        last = frame
        graph = graph or _flow_graph(frame, rate, fps)
        _push(graph, frame, number, rate)
        yield from _pulled(graph)
    if graph is not None and last is not None:
        for extra in (1, 2):  # the filter makes nothing after the last frame but one
            _push(graph, last, number + extra, rate)
        graph.push(None)
        yield from _pulled(graph)


def _flow_graph(frame: Frames, rate: Fraction, fps: Fraction) -> av.filter.Graph:
    graph = av.filter.Graph()
    graph.threads = 1
    height, width = frame.shape[:2]
    source = graph.add_buffer(
        width=width, height=height, format=av.VideoFormat("rgb24"), time_base=1 / rate
    )
    chain = [
        source, graph.add("format", "pix_fmts=yuv444p"),
        graph.add("minterpolate", f"fps={fps}:mi_mode=mci:scd=none"),
        graph.add("format", "pix_fmts=rgb24"), graph.add("buffersink"),
    ]
    for before, after in pairwise(chain):
        before.link_to(after)
    graph.configure()
    return graph


def _push(graph: av.filter.Graph, frame: Frames, number: int, rate: Fraction) -> None:
    picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
    picture.pts, picture.time_base = number, 1 / rate
    graph.push(picture)


def _pulled(graph: av.filter.Graph) -> Iterator[Frames]:
    while True:
        try:
            yield np.asarray(graph.pull().to_ndarray(), np.uint8)
        except (BlockingIOError, EOFError):
            return


@dataclass
class Colours:
    """Mean and deviation [3] of the channels of frames."""

    count: int = 0
    histogram: Values = field(default_factory=lambda: np.zeros((3, 256)))

    def feed(self, frame: Frames) -> None:
        """Count the values of a frame uint8 [H, W, 3]."""
        self.count += 1
        for channel in range(3):
            self.histogram[channel] += np.bincount(frame[..., channel].ravel(), minlength=256)

    @property
    def mean(self) -> Values:
        """Mean of each channel, [3]."""
        return np.asarray(self.histogram @ np.arange(256) / self.histogram.sum(1))

    @property
    def deviation(self) -> Values:
        """Standard deviation of each channel, [3]."""
        squares = self.histogram @ np.arange(256) ** 2 / self.histogram.sum(1)
        return np.asarray(np.sqrt(np.maximum(0, squares - self.mean**2)))


def measured(frames: Iterable[Frames]) -> Colours:
    """Return the colours of frames uint8 [H, W, 3]."""
    colours = Colours()
    for frame in frames:
        colours.feed(frame)
    return colours


def spread(shots: Sequence[Colours]) -> float:
    """Return the root mean square distance of shots' means from the scene's."""
    means, target = np.stack([each.mean for each in shots]), _target(shots)[0]
    return float(np.sqrt(((means - target) ** 2).mean()))


def matching(shots: Sequence[Colours]) -> list[Frames | None]:
    """Return a table uint8 [3, 256] of new values for each shot of a scene; None: unchanged."""
    mean, deviation = _target(shots)
    tables: list[Frames | None] = []
    for each in shots:
        if np.abs(each.mean - mean).max() <= NEAR:
            tables.append(None)
            continue
        gain = np.clip(deviation / np.maximum(each.deviation, 1), 1 / MAX_GAIN, MAX_GAIN)
        shift = np.clip(mean - each.mean, -MAX_SHIFT, MAX_SHIFT)
        values = np.arange(256)[None] - each.mean[:, None]
        moved = values * gain[:, None] + (each.mean + shift)[:, None]
        tables.append(np.rint(moved).clip(0, 255).astype(np.uint8))
    return tables


def _target(shots: Sequence[Colours]) -> tuple[Values, Values]:
    """Return mean and deviation [3] of a scene, its shots weighted by their frames."""
    weights = [each.count for each in shots]
    return (np.average([each.mean for each in shots], axis=0, weights=weights),
            np.average([each.deviation for each in shots], axis=0, weights=weights))
