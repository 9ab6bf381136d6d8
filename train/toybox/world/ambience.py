"""What a place and its weather sound like: bands of noise that swell, and small sounds in them.

Axes: N samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from train.toybox.world.noise import uniform_noise
from train.toybox.world.scenes import AMBIENCES, Draws, Scene
from train.toybox.world.voices import Array, Call, Spectrum, partials, ring_call, shape_noise


class Layer(NamedTuple):
    """A band of noise.

    band: Hz.
    level: root mean square where it is loudest.
    swell: (seconds, depth) of its coming and going; the period is drawn near the first.
    """

    band: tuple[float, float]
    level: float
    swell: tuple[float, float] = (1.0, 0.0)


ROOM_TONE = "room tone"
#: The layers of each ambience; "room tone" is that of a place without a name in `AMBIENCES`.
LAYERS: dict[str, tuple[Layer, ...]] = {
    "waves": (Layer((150, 1400), 0.050, (2.6, 0.85)), Layer((1500, 5000), 0.018, (2.6, 0.95))),
    "traffic": (Layer((50, 260), 0.050, (1.9, 0.4)), Layer((400, 1100), 0.018, (3.1, 0.6))),
    "birdsong": (Layer((1200, 5000), 0.004),),
    "wind": (Layer((250, 650), 0.045, (2.1, 0.7)), Layer((600, 1300), 0.018, (1.3, 0.9))),
    "bubbles": (Layer((60, 280), 0.030, (3.3, 0.3)),),
    "rumble": (Layer((25, 90), 0.070, (1.7, 0.5)), Layer((90, 400), 0.012, (0.6, 0.9))),
    "hum": (Layer((2000, 6000), 0.002),),
    ROOM_TONE: (Layer((80, 400), 0.003),),
}
#: Places whose ambience lies higher or lower than its layers say.
_HEIGHTS = {
    "ocean": 0.75, "beach": 1.2, "road": 0.8, "meadow": 1.12, "farm": 0.85, "mountains": 0.8,
    "snow": 1.25,
}  # fmt: skip
#: Highest frequency and level of the ambience in weather that muffles it.
_MUFFLED = {"fog": (1500.0, 0.8), "snow": (1000.0, 0.6)}
_BIRDS = (
    Call("sine", (3300, 4300, 3700), 0.075, 0.0, notes=(1, 1.1, 0.95, 1.2), gap_s=0.1),
    Call("sine", (4600, 2900), 0.11, 0.0, notes=(1, 1, 0.9), gap_s=0.16),
    Call("sine", (2500, 2700), 0.14, 0.0, vibrato=(28, 0.06)),
)
_BUBBLE = Call("sine", (340, 760), 0.06, 0.025)


def ambience_of(place: str) -> str:
    """Return the name of a place's ambience, one of `LAYERS`."""
    return AMBIENCES.get(place, ROOM_TONE)


def ambient_sound(scene: Scene, count: int, rate: int) -> Array:
    """Return the sound of a scene's place and weather alone, [count]."""
    draws = Draws(scene.seed, stream=30)
    height = _HEIGHTS.get(scene.place, 1.0) * draws.uniform(0.94, 1.06)
    top, gain = _MUFFLED.get(scene.weather, (rate / 2, 1.0))
    name = ambience_of(scene.place)
    uniform = uniform_noise([scene.seed], 50, count)[0]
    spectrum = np.fft.rfft(uniform.astype(np.float64) - 0.5)
    seconds = np.arange(count) / rate
    total = np.zeros(count)
    for layer in LAYERS[name]:
        low, high = (edge * height for edge in layer.band)
        noise = shape_noise(spectrum, (low, min(high, top)), count, rate)
        total += layer.level * gain * _swell(layer, draws, seconds) * noise
    if name in _DETAILS:
        total += gain * _DETAILS[name](scene.seed, height, seconds, rate)
    if scene.weather == "rain":
        total += _rain(uniform, spectrum, rate)
    return total


def _swell(layer: Layer, draws: Draws, seconds: Array) -> Array:
    period, depth = layer.swell
    hertz, phase = draws.uniform(0.8, 1.25) / period, draws.uniform()
    return 1 - depth * (0.5 - 0.5 * np.cos(math.tau * (hertz * seconds + phase)))


def _birds(seed: int, height: float, seconds: Array, rate: int) -> Array:
    draws = Draws(seed, stream=31)
    bird = draws.choice(_BIRDS)
    factor, gap = height * draws.uniform(0.85, 1.15), draws.uniform(0.7, 1.5)
    phrase = 0.03 * ring_call(bird, seed, factor, rate)
    return _scatter(lambda: (phrase, gap * draws.uniform(0.7, 1.3)), len(seconds), rate)


def _bubbles(seed: int, height: float, seconds: Array, rate: int) -> Array:
    draws = Draws(seed, stream=31)
    sizes = [ring_call(_BUBBLE, seed, height * f, rate) for f in (0.7, 0.9, 1.2, 1.6, 2.1)]
    return _scatter(
        lambda: (draws.uniform(0.01, 0.035) * draws.choice(sizes), draws.uniform(0.05, 0.25)),
        len(seconds), rate,
    )


def _scatter(draw: Callable[[], tuple[Array, float]], count: int, rate: int) -> Array:
    """Lay sounds one after the other; `draw` gives the next one and the seconds before it."""
    total, at = np.zeros(count), 0
    while True:
        sound, gap = draw()
        at += round(gap * rate)
        if at >= count:
            return total
        part = sound[: count - at]
        total[at : at + len(part)] += part


def _hum(seed: int, height: float, seconds: Array, rate: int) -> Array:
    beat = 1 - 0.4 * (0.5 - 0.5 * np.cos(math.tau * 0.7 * seconds + Draws(seed, 31).uniform()))
    return 0.035 * beat * partials("odd", np.full_like(seconds, 104 * height), (), rate)


_DETAILS: dict[str, Callable[[int, float, Array, int], Array]] = {
    "birdsong": _birds, "bubbles": _bubbles, "hum": _hum,
}  # fmt: skip


def _rain(uniform: NDArray[np.float32], spectrum: Spectrum, rate: int) -> Array:
    """Return the sound of rain: a hiss, and drops that stand out of it."""
    drops = np.where(uniform > 0.9975, 1.0, 0.0)
    tail = np.exp(-np.arange(64) / 12) * np.sin(np.arange(64) * 1.7)
    hiss = shape_noise(spectrum, (2200, 7000), len(uniform), rate)
    return 0.022 * hiss + 0.05 * np.convolve(drops, tail)[: len(uniform)]
