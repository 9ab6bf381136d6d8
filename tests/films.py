"""Films of painted shots: real files as the renderer writes them, without a model at work."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from vidgen.media.types import ClipInfo
from vidgen.media.write import write_clip
from vidgen.story.film import FilmPlan
from vidgen.story.script import Script
from vidgen.story.store import RenderedShot, remember
from vidgen.weights.layouts import open_model

FPS, SIZE = Fraction(12), (64, 48)
COLOURS = [(200, 40, 40), (40, 180, 60), (50, 60, 210), (210, 200, 60), (120, 60, 180)]


def painted(number: int, num_frames: int) -> np.ndarray:
    """Frames uint8 [T, H, W, 3] of one colour, with a white bar that moves to the right."""
    width, height = SIZE
    frames = np.empty((num_frames, height, width, 3), np.uint8)
    frames[:] = COLOURS[number % len(COLOURS)]
    for at, frame in enumerate(frames):
        left = at * 2 % (width - 4)
        frame[height // 4 : height // 2, left : left + 4] = 255
    return frames


def script(folder: Path, text: str) -> Script:
    path = folder / "film.yaml"
    path.write_text(text)
    return Script.read(path)


def film(folder: Path, model: Path, text: str, suffix: str = ".mp4") -> FilmPlan:
    """A film's plan as far as its assembly needs it."""
    return FilmPlan(script(folder, text), open_model(str(model)), FPS, SIZE, suffix)


def render(plan: FilmPlan, folder: Path, lengths: Sequence[int]) -> list[RenderedShot]:
    """A painted file for every shot, of so many frames."""
    folder.mkdir(exist_ok=True)
    shots = []
    for number, (shot, length) in enumerate(zip(plan.script.shots, lengths, strict=True)):
        path = folder / f"{shot.id}{plan.suffix}"
        write_clip(path, [painted(number, length)], ClipInfo(FPS, SIZE, length),
                   overwrite=True)
        shots.append(RenderedShot(shot, path, length, FPS, SIZE, number, made=True))
    remember(shots)
    return shots
