"""A model's own sound for its clips, from noise to samples.

The picture is sampled first and is the same without sound. The same transformer then denoises the
sound, with the finished picture as a condition. Sound latents lie on the clip's clock whatever its
windows are: each window samples those heard while it is shown, and knows those sampled before.

Where a picture leaves the moment of an impact open, each draw of noise puts its sound elsewhere. A
model's onset detector predicts impacts from the picture alone; sounds are drawn until one matches.
Without impacts, or without a detector, the sound is kept whose onsets agree best with those of the
others (minimum Bayes risk, Kumar & Byrne 2004, eq. 2, with onsets' F-measure as the gain).

Axes: C latent channels, F latent frames, N candidates, K or k sound latents, n samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vidgen.diffusion.guidance import Guidance
from vidgen.diffusion.noise import draw_sound_noise
from vidgen.diffusion.state import LatentState, new_sound, sound_span
from vidgen.diffusion.temporal_upsampling import finished_upsampled
from vidgen.media.mastering import hold_peaks
from vidgen.media.mix import SEAM_S, bring_forward, rise
from vidgen.media.onsets import Times, find_onsets, pair_times
from vidgen.media.sound import RATE, read_sound, resampled, room
from vidgen.models.onset_detector import part_times
from vidgen.pipeline.best_of_n import best_of
from vidgen.pipeline.journal.job import HEARD
from vidgen.pipeline.long.tail import Beginning, no_beginning

if TYPE_CHECKING:
    from vidgen.core.request import Request
    from vidgen.diffusion.temporal_upsampling import LatentRate
    from vidgen.media.types import Samples
    from vidgen.models.audio_spectra import AudioVAEConfig
    from vidgen.pipeline.journal.journal import Journal
    from vidgen.pipeline.loader import ModelLoader
    from vidgen.pipeline.types import Plan
    from vidgen.weights.family import ModelDefaults
    from vidgen.weights.folder import ModelFolder

AT_ONCE = 256
"""Latents decoded at a time."""
FURTHEST_S = 0.05
"""Limit of the shift that moves a clip's sound to its visible impacts."""
TOGETHER_S = 0.06
"""Onsets of two sounds within this distance are the same."""
COMPARED = 4
"""Sounds that are drawn before they are compared with the picture."""

ONSET_DETECTOR: Literal["onset_detector"] = "onset_detector"
NEAR_S = 0.1
"""An impact and an onset within this distance match."""
FEWEST = 0.5
"""Impacts expected in a clip below which it counts as having none."""
_SURE = 0.3
"""Impacts expected near an onset from which it counts as one of them."""


class Kept(NamedTuple):
    """The best sound: latents [C, k], and its delay after the impacts that it matches."""

    latents: Tensor
    late_s: float = 0.0  # sum of the delays
    met: float = 0.0  # number of matches


@dataclass(frozen=True)
class Impacts:
    """Expected impacts in a picture."""

    times: NDArray[np.float64]  # moments in seconds, rising, [n]
    expected: NDArray[np.float64]  # impacts expected at each of them, [n]
    enough: float = 1.0  # fit of a sound that ends the search
    new_from_s: float = 0.0  # earlier sound is given, and has no lateness

    @property
    def any_seen(self) -> bool:
        """True if sounds can be compared with them."""
        return float(self.expected.sum()) >= FEWEST

    def fit(self, onsets: Times) -> float:
        """Return the expected F-measure of a sound's onsets against them.

        An onset meets at most one impact, and each expected one counts for one onset.
        """
        left, met = self.expected.copy(), 0.0
        for onset in onsets:
            near = np.abs(self.times - onset) <= NEAR_S
            met += min(1.0, float(left[near].sum()))
            left[near] = 0
        total = float(self.expected.sum()) + len(onsets)
        return 2 * met / total if total else 1.0

    def lateness(self, onsets: Times) -> tuple[float, float]:
        """Return the sum of new onsets' delays after the impacts they match, and their number."""
        late_s = count = 0.0
        for onset in onsets[onsets >= self.new_from_s]:
            near = np.abs(self.times - onset) <= NEAR_S
            expected = float(self.expected[near].sum())
            if expected >= _SURE:
                seen = float(self.times[near] @ self.expected[near]) / expected
                late_s += min(1.0, expected) * (float(onset) - seen)
                count += min(1.0, expected)
        return late_s, count


@dataclass
class OwnSound:
    """A clip's sound while it is made."""

    loader: ModelLoader
    plan: Plan  # of the whole clip
    latents: Tensor  # made or known so far, [1, C, K], on the CPU
    windows: Sequence[tuple[int, int]]  # [start, stop) sampled at once, in the picture's latents
    rate: LatentRate  # rate of the finished picture's latents against those
    num_gone: int = 0  # latent frames of the clip before the first of them
    begins: int = 0  # the clip's sound latent with which `latents` begins
    earlier: tuple[Samples, int] | None = None  # samples [N, c], rate of the continued clip's sound
    starts_s: Fraction = Fraction(0)  # the end of the continued clip
    late_s: float = 0.0  # sum of the delays after impacts so far
    met: float = 0.0  # their number
    extra_rounds: int = 0  # of candidates, after the first of each window

    def follow(
        self, picture: Tensor, sample: Callable[[LatentState, int], Tensor], journal: Journal
    ) -> None:
        """Make the sound of a finished picture, window by window.

        The picture's latents are [1, C, F, h, w]. `sample` denoises a window's sounds, given the
        number of the window; the journal keeps the sound before the last window.
        """
        kept = journal.kept_arrays(HEARD, "latents")
        if kept is not None:
            self.latents, self.begins = torch.from_numpy(kept[0]["latents"]), kept[1]["begins"]
            self.late_s, self.met = kept[1]["lateness"]
        for number, (start, stop) in enumerate(self.windows):
            first, count = self.num_gone + start, stop - start
            begin, end, _ = self._span(first, count)
            if self.latents.shape[2] and self._ends >= end:
                continue  # made before a kill
            seen = slice(self.rate.num_upsampled(start), self.rate.num_upsampled(stop))
            shown = picture[:, :, seen].to(self.loader.device)
            made = self._made(shown, self.rate.after(start), first, count, sample, number)
            if not self.latents.shape[2]:
                self.begins = begin
            new = made.latents[None, :, max(0, self._ends - begin) : end - begin]
            self.latents = torch.cat([self.latents, new.float().cpu()], dim=2)
            self.late_s, self.met = self.late_s + made.late_s, self.met + made.met
            if number + 1 < len(self.windows):
                facts = {"begins": self.begins, "lateness": [self.late_s, self.met]}
                journal.keep_arrays(HEARD, {"latents": self.latents.numpy()}, facts)

    def _made(
        self, shown: Tensor, rate: LatentRate, first: int, count: int,
        sample: Callable[[LatentState, int], Tensor], number: int,
    ) -> Kept:
        """Return the best sound of a stretch, `count` latent frames from `first` on."""
        config = self._config

        def draw(takes: range) -> Tensor:
            self.extra_rounds += takes.start > 0
            known = finished_upsampled(shown.expand(len(takes), *[-1] * 4), rate, self._stride_t)
            state = self.add_to(known, first, count, takes)
            sound = state.unpack(sample(state, number))[1]
            assert sound is not None
            return sound

        @torch.no_grad()
        def hear(latents: Tensor) -> Tensor:
            with self.loader.use("sound_vae") as vae:
                return vae.decode(latents, latents.shape[2] * config.samples_per_token)

        impacts, most = None, self.plan.sound_candidates
        if most > 1:
            impacts = impacts_seen(self.loader, shown, rate, first, self.plan.fps)
        if impacts is not None:
            begin = self._span(first, 1)[0]
            later_s = self.plan.sound_delay_s - begin / config.tokens_per_s
            impacts = replace(impacts, times=impacts.times + later_s,
                              new_from_s=max(0, self._ends - begin) / config.tokens_per_s)
        at_once = drawn_at_once(self.loader.folder, most)
        return best_sound(draw, hear, config.sample_rate, most, at_once, impacts)

    def add_to(
        self, state: LatentState, first: int, count: int, takes: Sequence[int] = (0,)
    ) -> LatentState:
        """Add the sound of a stretch, as far as it is known, to the picture's state.

        The stretch has `count` latent frames from `first` on. The state has a row for each of the
        sounds of numbers `takes`, each of which has noise of its own.
        """
        begin, end, start_s = self._span(first, count)
        channels = self._config.latent_channels
        noise = draw_sound_noise([self.plan.seed], channels, begin, end, takes)
        start_s -= self.plan.sound_delay_s
        sound = new_sound(noise.to(state.latents.device), start_s, len(takes))
        known = self.latents[:, :, max(0, begin - self.begins) :]
        if begin >= self.begins and known.shape[2]:
            sound = sound.begun_by(known[:, :, : end - begin])
        return replace(state, sound=sound)

    def decode(self) -> tuple[Samples, int]:
        """Return samples float32 [N, c] of the whole clip, and their rate.

        Those of a continued clip stay; the new ones follow at its rate, moved as a whole to where
        the impacts are seen.
        """
        config = self._config
        earlier, rate = self.earlier or (None, config.sample_rate)
        length = round(self.plan.kept_frames / self.plan.fps * rate)
        samples = room(length, 1 if earlier is None else earlier.shape[1])
        begin = position = min(round(self.starts_s * rate), length)
        if earlier is not None:
            samples[: min(begin, len(earlier))] = earlier[:begin]
        for block in resampled(self._blocks(), 1, config.sample_rate, rate):
            part = block[: length - position]
            samples[position : position + len(part)] = part
            position += len(part)
        late_s = self.late_s / self.met if self.met else 0.0
        late_s = max(-FURTHEST_S, min(late_s, FURTHEST_S))
        bring_forward(samples[begin:], round(late_s * rate))
        hold_peaks(samples[begin:], rate)
        if begin:
            rise(samples, begin, min(begin + round(SEAM_S * rate), length))
        return samples, rate

    @torch.no_grad()
    def _blocks(self) -> Iterator[Samples]:
        """Yield the decoded sound, blocks [n, 1], from `starts_s` on."""
        config = self._config
        early_s = self.starts_s - self.begins / Fraction(config.tokens_per_s)
        skip = round(early_s * config.sample_rate)
        if skip < 0:
            yield np.zeros((-skip, 1), np.float32)
        with self.loader.use("sound_vae") as vae:
            pieces = (part.to(self.loader.device) for part in self.latents.split(AT_ONCE, dim=2))
            for sound in vae.stream_decode(pieces):
                block = sound[0, max(0, skip) :].float()
                skip = max(0, skip) - sound.shape[1]
                if len(block):
                    yield block.cpu().numpy()[:, None]

    def _span(self, first: int, count: int) -> tuple[int, int, float]:
        rate = self._config.tokens_per_s
        return sound_span(first, count, self._stride_t, self.plan.fps, rate)

    @property
    def _ends(self) -> int:
        return self.begins + self.latents.shape[2]

    @property
    def _config(self) -> AudioVAEConfig:
        return self.loader.folder.components["sound_vae"].config

    @property
    def _stride_t(self) -> int:
        stride_t: int = self.loader.folder.components["vae"].config.strides.t
        return stride_t


def followed_sound(loader: ModelLoader, plan: Plan, bed: Samples) -> OwnSound:
    """Return the given sound that a clip's picture follows, known from start to end."""
    return OwnSound(loader, plan, _encode(loader, bed, RATE), (), plan.rate)


def own_sound(
    loader: ModelLoader, plan: Plan, request: Request,
    windows: Sequence[tuple[int, int]] | None = None, begun: Beginning | None = None,
) -> OwnSound:
    """Return the sound to make for a clip of one window, or of several after `begun`."""
    config, begun = loader.folder.components["sound_vae"].config, begun or no_beginning(plan)
    windows = [(0, plan.latents.num_frames)] if windows is None else windows
    nothing = torch.zeros(1, config.latent_channels, 0)
    own = OwnSound(loader, plan, nothing, windows, begun.rate, begun.num_gone)
    if not begun.num_latents:
        return own
    own.starts_s = begun.num_frames / plan.fps
    own.earlier = read_sound(request.prefix)  # type: ignore[arg-type]
    if own.earlier is not None:
        samples, rate = own.earlier
        own.begins = own._span(own.num_gone, 1)[0]
        known = math.floor(own.starts_s * Fraction(config.tokens_per_s)) - own.begins
        first = round(own.begins * config.samples_per_token / config.sample_rate * rate)
        heard = samples[first : round(own.starts_s * rate)]
        if known > 0 and len(heard):
            own.latents = _encode(loader, heard, rate)[:, :, :known]
    return own


def sound_plan(plan: Plan, defaults: ModelDefaults) -> Plan:
    """Return the plan by which the sound of a plan's clip is denoised.

    It starts from noise alone; guidance treats the finished picture as it treats given frames. A
    distilled model knows pictures only, so the model itself denoises the sound of its clips.
    """
    if plan.student is not None:
        known = defaults.settings.get("image_guidance")
        plan = replace(plan, student=None, sampler=defaults.sampler, num_steps=defaults.num_steps,
                       shift=defaults.shift, guidance=Guidance(defaults.guidance_scale,
                                                               known_scale=known))
    return replace(plan, strength=1.0, cache=None, oversampling=1,
                   num_steps=plan.sound_steps or plan.num_steps)


@torch.no_grad()
def _encode(loader: ModelLoader, samples: Samples, rate: int) -> Tensor:
    """Return latents [1, C, K] of samples [N, c], encoded second by second."""
    config = loader.folder.components["sound_vae"].config
    blocks = (samples[start : start + rate].mean(1, keepdims=True)
              for start in range(0, len(samples), rate))
    with loader.use("sound_vae") as vae:
        heard = (torch.from_numpy(block[:, 0].copy())[None].to(loader.device)
                 for block in resampled(blocks, 1, rate, config.sample_rate) if len(block))
        return torch.cat(list(vae.stream_encode(heard)), dim=2).float().cpu()


def impacts_seen(
    loader: ModelLoader, picture: Tensor, latent_rate: LatentRate, first: int, fps: Fraction
) -> Impacts | None:
    """Return the impacts that the model's onset detector expects in a picture [1, C, F, h, w].

    The picture begins with latent frame `first` of the clip, at its own `latent_rate`; `fps` is
    the clip's rate as it is shown. Times are seconds of the clip. None without a detector.
    """
    if ONSET_DETECTOR not in loader.folder.components:
        return None
    stride_t = loader.folder.components["vae"].config.strides.t
    with loader.use(ONSET_DETECTOR) as detector:
        expected = detector.expected(picture.to(loader.device))[0].double().cpu()  # [F, P]
    if latent_rate.alone:
        expected[0] = 0  # a single picture
    begins = 0 if latent_rate.alone else latent_rate.factor * (first - 1) + 1
    count, num_parts = expected.shape
    times = part_times(begins, count, num_parts, stride_t, float(fps * latent_rate.factor))
    enough = loader.folder.components[ONSET_DETECTOR].config.enough
    return Impacts(times.flatten().double().numpy(), expected.flatten().numpy(), enough)


def drawn_at_once(folder: ModelFolder, most: int) -> int:
    """Return the sounds drawn at once: all `most` without an onset detector."""
    return min(COMPARED, most) if ONSET_DETECTOR in folder.components else most


def best_sound(
    draw: Callable[[range], Tensor], hear: Callable[[Tensor], Tensor], rate: int, most: int,
    at_once: int, impacts: Impacts | None,
) -> Kept:
    """Draw sounds for a picture until one matches it; return the best.

    Args:
        draw: makes the sounds of a range of numbers, [N, C, k]; at most `most`.
        hear: decodes them, [N, n], at `rate` samples per second.
        at_once: see `drawn_at_once`.
        impacts: of the picture, in the sounds' own time; None without a detector.
    """
    if most == 1:
        return Kept(draw(range(1))[0])
    if impacts is None or not impacts.any_seen:
        made = draw(range(at_once))
        return Kept(made[most_agreed(hear(made), rate)])

    def scored(takes: range) -> list[tuple[float, tuple[Tensor, Times]]]:
        sounds = draw(takes)
        heard = find_onsets(hear(sounds).float().cpu(), rate)
        return [(impacts.fit(each), (sound, each))
                for sound, each in zip(sounds, heard, strict=True)]

    sound, onsets = best_of(scored, most, impacts.enough, at_once=at_once).made
    return Kept(sound, *impacts.lateness(onsets))


def most_agreed(sounds: Tensor, rate: int) -> int:
    """Return the index of the sound [N, n] whose onsets agree best with the others'."""
    onsets = find_onsets(sounds.float().cpu(), rate)
    agreed = [sum(_agreement(one, other) for other in onsets) for one in onsets]
    return int(np.argmax(agreed))


def _agreement(times: Times, others: Times) -> float:
    """Return the F-measure of two sounds' onsets; two without any agree."""
    total = len(times) + len(others)
    return 2 * len(pair_times(times, others, TOGETHER_S, TOGETHER_S)) / total if total else 1.0
