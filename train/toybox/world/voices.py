"""What each sprite sounds like: calls, which begin at a moment, and drones, which go on.

Both are sums of partials that glide together, shaped by formants, with a band of noise. A call's
attack takes 2 ms, so that its onset is a moment.

Axes: N samples, P partials.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from train.toybox.world.noise import uniform_noise

Array = NDArray[np.float64]
Spectrum = NDArray[np.complex128]

#: Partials by family: ratio to the pitch, weight, and how much faster than the pitch they decay.
TIMBRES: dict[str, tuple[tuple[float, float, float], ...]] = {
    "sine": ((1.0, 1.0, 1.0),),
    "voice": tuple((k, 1 / k, 1.0) for k in range(1, 15)),
    "reed": tuple((k, k**-0.4, 1.0) for k in range(1, 15)),
    "odd": tuple((k, 1 / k, 1.0) for k in range(1, 14, 2)),
    "string": tuple((k, k**-0.8, 0.6 + 0.4 * k) for k in range(1, 11)),
    "chord": tuple(
        (root * k, k**-1.2, 0.7 + 0.3 * k) for root in (1, 1.5, 2, 2.52, 3) for k in range(1, 5)
    ),
    "organ": tuple((root * k, 1 / k**1.5, 1.0) for root in (1, 1.26, 1.5) for k in (1, 2, 3)),
    "bar": ((1.0, 1.0, 1.0), (2.756, 0.5, 2.5), (5.404, 0.25, 5.0)),
    "bell": (
        (0.5, 0.5, 0.6), (1.0, 1.0, 0.8), (1.2, 0.6, 1.0), (1.5, 0.4, 1.2), (2.0, 0.7, 1.3),
        (2.67, 0.4, 2.0), (4.0, 0.3, 3.0),
    ),
    "metal": (
        (1.0, 1.0, 1.0), (1.41, 0.8, 1.2), (2.09, 0.7, 1.5), (2.56, 0.5, 2.0), (3.6, 0.4, 3.0),
    ),
    "breath": (),
}  # fmt: skip
_ATTACK_S, _RELEASE_S = 0.002, 0.012
_TOP = 7200.0  # Hz; partials above it are left out, whatever the rate
_TABLE = 8192  # points of one period, read without interpolation: 78 dB above its error


@dataclass(frozen=True)
class Call:
    """A sound with a beginning.

    Args:
        timbre: of `TIMBRES`.
        pitch: Hz, evenly spaced over a syllable and joined by even steps of pitch.
        length_s: of a syllable.
        decay_s: time constant of dying away; 0 holds the sound to its end.
        formants: (Hz, width in Hz) of resonances; none leaves the partials as they are.
        noise: share of noise, in [0, 1].
        band: of the noise, Hz.
        flutter: (Hz, depth) of a tremolo.
        vibrato: (Hz, depth as a share of the pitch).
        notes: pitch factors of the syllables, one after the other.
        gap_s: from one syllable's beginning to the next.
    """

    timbre: str
    pitch: tuple[float, ...]
    length_s: float
    decay_s: float = 0.0
    formants: tuple[tuple[float, float], ...] = ()
    noise: float = 0.0
    band: tuple[float, float] = (1000.0, 4000.0)
    flutter: tuple[float, float] = (0.0, 0.0)
    vibrato: tuple[float, float] = (0.0, 0.0)
    notes: tuple[float, ...] = (1.0,)
    gap_s: float = 0.0

    @property
    def duration_s(self) -> float:
        """Seconds from the first syllable's beginning to the last one's end."""
        return self.gap_s * (len(self.notes) - 1) + self.length_s


@dataclass(frozen=True)
class Drone:
    """A sound that goes on and follows the speed.

    Args:
        timbre: of `TIMBRES`.
        pitch: Hz at rest.
        reach: share by which the pitch is higher at a speed of one frame side a second.
        formants: as of a `Call`.
        noise: share of noise, in [0, 1].
        band: of the noise, Hz.
        flutter: (Hz, depth) of a tremolo that follows the pitch.
    """

    timbre: str
    pitch: float
    reach: float = 0.6
    formants: tuple[tuple[float, float], ...] = ()
    noise: float = 0.15
    band: tuple[float, float] = (200.0, 1500.0)
    flutter: tuple[float, float] = (0.0, 0.0)


# fmt: off
VOICES: dict[str, Call | Drone] = {
    "car": Drone("reed", 98, 0.7, ((300, 200), (900, 500))),
    "bus": Drone("reed", 58, 0.5, ((180, 120), (520, 250)), 0.25, (80, 700)),
    "tractor": Drone("voice", 76, 0.5, ((230, 200), (1300, 400)), 0.2, (300, 1200), (11, 0.6)),
    "bicycle": Call("bell", (2300,), 0.32, 0.12, notes=(1, 1), gap_s=0.13),
    "airplane": Drone("reed", 165, 0.3, ((650, 500), (2300, 900)), 0.55, (900, 4200)),
    "helicopter": Drone("odd", 118, 0.3, ((400, 400),), 0.5, (250, 1700), (17, 0.7)),
    "rocket": Drone("breath", 50, 0.3, (), 1.0, (60, 2600), (31, 0.3)),
    "sailboat": Call("reed", (150, 118, 165), 0.34, 0.0, ((800, 250), (1600, 300)), 0.1, (500,
                     1500), (33, 0.6)),
    "train": Call("organ", (590, 640, 630), 0.42, 0.0, (), 0.2, (1500, 5000)),
    "flying saucer": Drone("sine", 310, 0.8, (), 0.0, (400, 800), (6, 0.5)),
    "cat": Call("voice", (520, 760, 620, 430), 0.36, 0.0, ((900, 350), (2400, 500)), 0.03),
    "dog": Call("voice", (420, 560, 300), 0.13, 0.07, ((700, 300), (1400, 400)), 0.25, (600, 3000)),
    "horse": Call("voice", (900, 1100, 760, 520), 0.46, 0.0, ((1200, 500), (2600, 600)), 0.12,
                  (1500, 4500), (13, 0.6), (13, 0.05)),
    "cow": Call("voice", (150, 172, 165, 128), 0.5, 0.0, ((320, 120), (780, 180)), 0.03, (200,
                900)),
    "pig": Call("reed", (240, 300, 200), 0.15, 0.0, ((500, 180), (1900, 350)), 0.45, (800, 2600),
                (42, 0.6), notes=(1, 0.6), gap_s=0.19),
    "elephant": Call("reed", (340, 470, 520, 480), 0.45, 0.0, ((1100, 400), (2900, 700)), 0.15,
                     (1500, 5000), (27, 0.5)),
    "penguin": Call("reed", (280, 330, 250), 0.28, 0.0, ((1000, 200), (2000, 250)), 0.05,
                    flutter=(24, 0.6)),
    "fish": Call("sine", (380, 900), 0.1, 0.06, notes=(1, 1.25, 1.55), gap_s=0.11),
    "whale": Call("sine", (130, 95, 210, 260), 0.6, 0.0, vibrato=(4, 0.02)),
    "octopus": Call("sine", (520, 240), 0.08, 0.05, notes=(1, 0.8, 1.1, 0.7), gap_s=0.085),
    "turtle": Call("bar", (330,), 0.14, 0.035, noise=0.08, band=(300, 1200)),
    "crab": Call("bar", (1850,), 0.06, 0.012, noise=0.3, band=(2000, 6000), notes=(1, 1, 1),
                 gap_s=0.075),
    "frog": Call("voice", (185, 210, 240), 0.16, 0.0, ((620, 200), (1150, 200)), 0.05, flutter=(38,
                 0.6), notes=(1, 1.15), gap_s=0.2),
    "rabbit": Call("sine", (2700, 3500, 2500), 0.09, 0.05, notes=(1, 1.05), gap_s=0.13),
    "owl": Call("sine", (400, 430, 385), 0.2, 0.0, (), 0.06, (350, 700), notes=(1, 0.6),
                gap_s=0.26),
    "butterfly": Call("sine", (4700,), 0.05, 0.02, notes=(1, 1.12, 0.94, 1.19, 1.06), gap_s=0.06),
    "bee": Drone("reed", 228, 0.25, ((700, 500), (2600, 900)), 0.04, (1500, 4000), (8, 0.3)),
    "snail": Call("sine", (900, 300), 0.42, 0.0, (), 0.3, (500, 1400), (9, 0.6)),
    "giraffe": Call("voice", (86, 100, 92), 0.5, 0.0, ((170, 80), (420, 100)), vibrato=(6, 0.03)),
    "dinosaur": Call("reed", (120, 95, 62), 0.52, 0.0, ((420, 250), (1000, 300)), 0.45, (150,
                     1100), (19, 0.5)),
    "duck": Call("reed", (300, 270), 0.15, 0.0, ((1350, 200), (2700, 300)), 0.05, notes=(1, 0.6),
                 gap_s=0.2),
    "lion": Call("voice", (175, 215, 110), 0.55, 0.0, ((650, 350), (1700, 400)), 0.6, (300, 2800),
                 (48, 0.6)),
    "flamingo": Call("reed", (470, 500), 0.12, 0.0, ((1700, 250), (3300, 400)), 0.1, notes=(1, 1,
                     0.85), gap_s=0.15),
    "apple": Call("breath", (1000,), 0.16, 0.03, (), 1.0, (1500, 5200), (70, 0.6)),
    "banana": Call("sine", (600, 1900), 0.34, 0.0, (), 0.04, (1500, 3000)),
    "pizza": Call("breath", (1000,), 0.42, 0.14, (), 1.0, (3600, 7000), (120, 0.6)),
    "hamburger": Call("sine", (210, 100), 0.14, 0.05, (), 0.35, (150, 600), notes=(1, 0.6),
                      gap_s=0.13),
    "watermelon": Call("odd", (148, 132), 0.24, 0.06, ((300, 150),)),
    "strawberry": Call("bar", (1320,), 0.24, 0.07),
    "ice cream": Call("metal", (1570,), 0.3, 0.11, notes=(1, 1.335, 1.587), gap_s=0.12),
    "doughnut": Call("voice", (180, 300, 230, 260), 0.42, 0.16, ((600, 300),), vibrato=(11, 0.16)),
    "cake": Call("string", (784,), 0.3, 0.12, notes=(1, 1.26, 1.5), gap_s=0.11),
    "carrot": Call("bar", (640, 600), 0.08, 0.02, noise=0.65, band=(2500, 6500), notes=(1, 1.3),
                   gap_s=0.07),
    "pineapple": Call("breath", (1000,), 0.05, 0.012, (), 1.0, (4200, 6800), notes=(1, 0.8, 0.9,
                      0.7, 1), gap_s=0.055),
    "mushroom": Call("sine", (1150, 420), 0.09, 0.04),
    "soccer ball": Call("bar", (235, 205), 0.26, 0.06, noise=0.25, band=(900, 2200)),
    "balloon": Call("reed", (950, 1250, 900, 1400), 0.3, 0.0, ((2100, 400), (4200, 800)), 0.12,
                    (2500, 6000), (58, 0.6)),
    "guitar": Call("chord", (196,), 0.6, 0.22),
    "umbrella": Call("breath", (1000,), 0.2, 0.05, (), 1.0, (220, 900), notes=(1, 0.6), gap_s=0.15),
    "alarm clock": Call("bell", (3100,), 0.5, 0.0, (), 0.04, (3000, 6000), (24, 0.6)),
    "gift": Call("metal", (3900,), 0.1, 0.05, (), 0.35, (5000, 7000), notes=(1, 1.1, 0.95, 1.06),
                 gap_s=0.075),
    "crown": Call("bell", (1180,), 0.6, 0.24),
    "teddy bear": Call("odd", (1050, 1300, 800), 0.2, 0.0, ((1600, 500), (3400, 700)), 0.2, (2000,
                       5000), notes=(1, 0.6), gap_s=0.24),
    "robot": Call("odd", (880,), 0.09, 0.0, notes=(1, 1.5, 0.75), gap_s=0.11),
    "ghost": Call("sine", (480, 660, 500, 560), 0.6, 0.0, (), 0.03, (400, 900), (0, 0), (6, 0.05)),
    "snowman": Call("breath", (1000,), 0.2, 0.06, (), 1.0, (900, 2400), (95, 0.6), notes=(1, 0.6),
                    gap_s=0.22),
    "star": Call("sine", (2093,), 0.22, 0.08, notes=(1, 1.26, 1.5, 2), gap_s=0.075),
    "heart": Call("sine", (72, 50), 0.13, 0.05, (), 0.12, (60, 160), notes=(1.15, 1), gap_s=0.2),
    "sunflower": Call("string", (392,), 0.42, 0.15, notes=(1, 1.335), gap_s=0.15),
    "cactus": Call("breath", (1000,), 0.26, 0.0, (), 1.0, (1500, 3200), (34, 0.6)),
    "unicorn": Call("voice", (1300, 1700, 1500, 900), 0.42, 0.0, ((2200, 500), (4000, 700)), 0.05,
                    vibrato=(9, 0.08)),
    "scooter": Drone("reed", 255, 0.6, ((1000, 300), (3000, 600)), 0.1, (1500, 4000), (29, 0.5)),
    "trumpet": Call("reed", (466,), 0.2, 0.0, ((1500, 600), (2600, 700)), notes=(1, 1.335, 1.587),
                    gap_s=0.18),
}
# fmt: on


def ring_call(call: Call, seed: int, factor: float, rate: int) -> Array:
    """Return one call, [N], its loudest moment at 1.

    Args:
        call: which; `replace(call, notes=(1.0,))` is its first syllable alone.
        seed: of its noise.
        factor: of its pitch.
        rate: samples a second.
    """
    whole = np.zeros(math.ceil(call.duration_s * rate))
    count = math.ceil(call.length_s * rate)
    hiss = band_noise(uniform_noise([seed], 40, count)[0], call.band, rate) if call.noise else None
    for index, note in enumerate(call.notes):
        start = round(index * call.gap_s * rate)
        part = _syllable(call, factor * note, count, rate, hiss)
        whole[start : start + count] += part[: len(whole) - start]
    loudest = max(float(np.abs(whole).max()), 1e-9)
    return whole / loudest


def _syllable(call: Call, factor: float, count: int, rate: int, hiss: Array | None) -> Array:
    seconds = np.arange(count) / rate
    knots = np.linspace(0, call.length_s, len(call.pitch))
    pitch = factor * np.exp(np.interp(seconds, knots, np.log(call.pitch)))
    if call.vibrato[1]:
        pitch = pitch * (1 + call.vibrato[1] * np.sin(math.tau * call.vibrato[0] * seconds))
    tone = partials(call.timbre, pitch, call.formants, rate, call.decay_s)
    tone = tone / max(np.abs(tone).max(), 1e-9)
    if hiss is not None:
        tone = (1 - call.noise) * tone + call.noise * hiss / max(np.abs(hiss).max(), 1e-9)
    envelope = np.minimum(seconds / _ATTACK_S, 1)
    if call.decay_s:
        envelope = envelope * np.exp(-seconds / call.decay_s)
    envelope = envelope * np.clip((call.length_s - seconds) / _RELEASE_S, 0, 1)
    swelling: Array = tone * envelope
    return swelling * tremolo(call.flutter, seconds)


def partials(
    timbre: str, pitch: Array, formants: tuple[tuple[float, float], ...], rate: int,
    decay_s: float = 0.0,
) -> Array:
    """Return the sum of a timbre's partials along a pitch [N] in Hz, [N].

    `decay_s` is the pitch's own time constant, which is left to the caller; partials that decay
    faster do so here.
    """
    cycles = np.cumsum(pitch) / rate
    middle, top = float(np.exp(np.log(pitch).mean())), float(pitch.max())
    heard = [
        (ratio, weight * _resonance(ratio * middle, formants), haste)
        for ratio, weight, haste in TIMBRES[timbre] if ratio * top <= _TOP
    ]  # fmt: skip
    if all(ratio == int(ratio) and haste == 1 for ratio, _, haste in heard):
        turn = math.tau * np.arange(_TABLE) / _TABLE
        table = sum((gain * np.sin(ratio * turn) for ratio, gain, _ in heard), np.zeros(_TABLE))
        return table[((cycles % 1) * _TABLE).astype(np.int64)]
    total, seconds = np.zeros(len(pitch)), np.arange(len(pitch)) / rate
    for ratio, gain, haste in heard:
        part = gain * np.sin(math.tau * ratio * cycles)
        if decay_s and haste != 1:
            part *= np.exp(-seconds * (haste - 1) / decay_s)
        total += part
    return total


def _resonance(hertz: float, formants: tuple[tuple[float, float], ...]) -> float:
    """Gain at a frequency: a floor, and a bell around each formant, each weaker than the last."""
    if not formants:
        return 1.0
    bells = (
        math.exp(-0.5 * ((hertz - centre) / width) ** 2) / (1 + 0.5 * index)
        for index, (centre, width) in enumerate(formants)
    )
    return 0.04 + sum(bells)


def tremolo(flutter: tuple[float, float], seconds: Array) -> Array:
    """Return the gain [N] of a tremolo (Hz, depth), which begins loud."""
    hertz, depth = flutter
    return 1 - depth * (0.5 - 0.5 * np.cos(math.tau * hertz * seconds))


def band_noise(uniform: NDArray[np.float32], band: tuple[float, float], rate: int) -> Array:
    """Return numbers [..., N] in [0, 1) as noise of a band of frequencies with deviation 1."""
    spectrum = np.fft.rfft(uniform.astype(np.float64) - 0.5)
    return shape_noise(spectrum, band, uniform.shape[-1], rate)


def shape_noise(spectrum: Spectrum, band: tuple[float, float], count: int, rate: int) -> Array:
    """Return noise [..., count] of deviation 1 from white noise's spectrum, kept to a band in Hz.

    The band's edges are those of a second-order Butterworth filter's magnitude.
    """
    gain, deviation = _band_gain(band, count, rate)
    return np.fft.irfft(spectrum * gain, count) / deviation


@lru_cache(maxsize=64)
def _band_gain(band: tuple[float, float], count: int, rate: int) -> tuple[Array, float]:
    hertz, (low, high) = np.fft.rfftfreq(count, 1 / rate), band
    gain = 1 / np.sqrt(1 + (low / np.maximum(hertz, 1e-3)) ** 4) / np.sqrt(1 + (hertz / high) ** 4)
    return gain, math.sqrt(float((gain**2).mean()) / 12)  # uniform numbers deviate by 1 / sqrt(12)
