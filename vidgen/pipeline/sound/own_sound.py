"""Sound that a model generates for its own clips, from noise to samples.

The picture is sampled first and doesn't depend on the sound. The same transformer then denoises the
sound, with the finished picture as a condition. Sound latents have the clip's clock, not that of
its windows: a window samples the latents that sound while it is shown, given those before them.

Noise decides the moment of an impact that the picture leaves open. A model's onset detector
predicts impacts from the picture alone; sounds are drawn until one matches them. Without impacts,
or without a detector, the sound is kept whose onsets agree best with those of the others (minimum
Bayes risk, Kumar & Byrne 2004, eq. 2, with the F-measure of onsets as the gain).

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

from vidgen.diffusion.flow import draw_sound_noise
from vidgen.diffusion.guidance import Guidance
from vidgen.diffusion.state import LatentState, new_sound, sound_span
from vidgen.diffusion.temporal_upsampling import finished_upsampled
from vidgen.media.mastering import hold_peaks
from vidgen.media.mix import SEAM_S, bring_forward, rise
from vidgen.media.onsets import Times, find_onsets, pair_times
from vidgen.media.sound import RATE, read_sound, resampled, room
from vidgen.models.onset_detector import part_times
from vidgen.pipeline.best_of_n import best_of
from vidgen.pipeline.journal.job import SOUND_LATENTS

if TYPE_CHECKING:
    from vidgen.core.request import Request
    from vidgen.diffusion.temporal_upsampling import LatentRate
    from vidgen.media.types import Samples
    from vidgen.models.audio_spectra import AudioVAEConfig
    from vidgen.pipeline.journal.journal import Journal
    from vidgen.pipeline.loader import ModelLoader
    from vidgen.pipeline.tail import Beginning
    from vidgen.pipeline.types import Plan
    from vidgen.weights.family import ModelDefaults

AT_ONCE = 256
"""Latents decoded at a time."""
FURTHEST_S = 0.05
"""Limit of the shift that moves a clip's sound to its visible impacts."""
TOGETHER_S = 0.06
"""Largest distance of two sounds' onsets that count as the same."""
COMPARED = 4
"""Sounds to draw before they are compared with the picture."""
ONSET_DETECTOR: Literal["onset_detector"] = "onset_detector"
NEAR_S = 0.1
"""Largest distance of an impact and an onset that match."""
FEWEST = 0.5
"""A clip with fewer expected impacts counts as one without any."""
_SURE = 0.3
"""Expected impacts near an onset from which it counts as the sound of one."""


class Kept(NamedTuple):
    """The best sound of a window."""

    latents: Tensor  # [C, k]
    late_s: float = 0.0  # sum of its delays after the impacts that it matches
    met: float = 0.0  # number of these matches


@dataclass(frozen=True)
class Impacts:
    """Impacts expected in a picture."""

    times: NDArray[np.float64]  # moments in seconds, ascending, [n]
    expected: NDArray[np.float64]  # number of impacts expected at each, [n]
    enough: float = 1.0  # fit of a sound that ends the search
    new_from_s: float = 0.0  # `lateness` ignores earlier onsets, which are of given sound

    @property
    def any_seen(self) -> bool:
        """True if sounds can be compared with them."""
        return float(self.expected.sum()) >= FEWEST

    def _near(self, onset: float) -> NDArray[np.bool_]:
        return np.abs(self.times - onset) <= NEAR_S

    def fit(self, onsets: Times) -> float:
        """Return the expected F-measure of a sound's onsets against these impacts.

        An onset matches at most one impact, and an impact at most one onset.
        """
        left, met = self.expected.copy(), 0.0
        for near in map(self._near, onsets):
            met += min(1.0, float(left[near].sum()))
            left[near] = 0
        total = float(self.expected.sum()) + len(onsets)
        return 2 * met / total if total else 1.0

    def lateness(self, onsets: Times) -> tuple[float, float]:
        """Return the sum of new onsets' delays after the impacts they match, and their number."""
        late_s = count = 0.0
        for onset in onsets[onsets >= self.new_from_s]:
            near = self._near(onset)
            expected = float(self.expected[near].sum())
            if expected >= _SURE:
                seen = float(self.times[near] @ self.expected[near]) / expected
                late_s += min(1.0, expected) * (float(onset) - seen)
                count += min(1.0, expected)
        return late_s, count


@dataclass
class OwnSound:
    """A clip's sound while it is generated."""

    loader: ModelLoader
    plan: Plan  # of the whole clip
    latents: Tensor  # generated or given so far, [1, C, K], on the CPU
    windows: Sequence[tuple[int, int]]  # [start, stop) of each, in the picture's latent frames
    rate: LatentRate  # of the finished picture's latents
    num_dropped: int = 0  # latent frames of the clip before the first of the windows'
    begins: int = 0  # index of the first of `latents` in the clip
    earlier: tuple[Samples, int] | None = None  # samples [N, c], rate of the continued clip's sound
    starts_s: Fraction = Fraction(0)  # end of the continued clip
    late_s: float = 0.0  # sum of the delays after impacts so far
    met: float = 0.0  # number of these impacts
    extra_rounds: int = 0  # of candidates, after the first round of each window

    def __post_init__(self) -> None:
        components = self.loader.folder.components
        self._config: AudioVAEConfig = components["sound_vae"].config
        self._stride_t: int = components["vae"].config.strides.t

    @property
    def _ends(self) -> int:
        return self.begins + self.latents.shape[2]

    def _span(self, first: int, count: int) -> tuple[int, int, float]:
        rate = self._config.tokens_per_s
        return sound_span(first, count, self._stride_t, self.plan.fps, rate)

    def follow(
        self, picture: Tensor, sample: Callable[[LatentState, int], Tensor], journal: Journal
    ) -> None:
        """Generate the sound of a finished picture, latents [1, C, F, h, w], window by window.

        `sample` denoises the candidates of a window, given its number. The journal keeps the sound
        of all windows but the last.
        """
        kept = journal.kept_arrays(SOUND_LATENTS, "latents")
        if kept is not None:
            self.latents, self.begins = torch.from_numpy(kept[0]["latents"]), kept[1]["begins"]
            self.late_s, self.met = kept[1]["lateness"]
        for number, (start, stop) in enumerate(self.windows):
            begin, end, _ = self._span(self.num_dropped + start, stop - start)
            if self.latents.shape[2] and self._ends >= end:
                continue  # generated before a kill
            made = self._best(picture, number, sample)
            if not self.latents.shape[2]:
                self.begins = begin
            new = made.latents[None, :, max(0, self._ends - begin) : end - begin]
            self.latents = torch.cat([self.latents, new.float().cpu()], dim=2)
            self.late_s, self.met = self.late_s + made.late_s, self.met + made.met
            if number + 1 < len(self.windows):
                facts = {"begins": self.begins, "lateness": [self.late_s, self.met]}
                journal.keep_arrays(SOUND_LATENTS, {"latents": self.latents.numpy()}, facts)

    def _best(
        self, picture: Tensor, number: int, sample: Callable[[LatentState, int], Tensor]
    ) -> Kept:
        """Return the best of a window's candidates."""
        config, most, (start, stop) = self._config, self.plan.sound_candidates, self.windows[number]
        first, count, rate = self.num_dropped + start, stop - start, self.rate.after(start)
        seen = slice(self.rate.num_upsampled(start), self.rate.num_upsampled(stop))
        shown = picture[:, :, seen].to(self.loader.device)

        def draw(takes: range) -> Tensor:
            self.extra_rounds += takes.start > 0
            known = finished_upsampled(shown.expand(len(takes), *[-1] * 4), rate, self._stride_t)
            state = self.add_to(known, first, count, takes)
            sound = state.unpack(sample(state, number))[1]
            assert sound is not None
            return sound

        @torch.no_grad()
        def decode(latents: Tensor) -> Tensor:
            with self.loader.use("sound_vae") as vae:
                return vae.decode(latents, latents.shape[2] * config.samples_per_token)

        impacts = None
        if most > 1:
            impacts = impacts_seen(self.loader, shown, rate, first, self.plan.fps)
        if impacts is not None:  # in the window's own time
            begin = self._span(first, 1)[0]
            later_s = self.plan.sound_delay_s - begin / config.tokens_per_s
            impacts = replace(impacts, times=impacts.times + later_s,
                              new_from_s=max(0, self._ends - begin) / config.tokens_per_s)
        return best_sound(draw, decode, config.sample_rate, most, impacts)

    def add_to(
        self, state: LatentState, first: int, count: int, takes: Sequence[int] = (0,)
    ) -> LatentState:
        """Add the sound of latent frames `first` to `first + count` to a picture's state.

        Sound that exists is known, the rest is noise. The state has a row for each candidate; the
        numbers `takes` decide their noise.
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

        A continued clip's samples stay. The new ones follow at its rate, shifted as a whole by
        their mean delay after visible impacts.
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
        """Yield the decoded sound from `starts_s` on, in blocks [n, 1]."""
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


def followed_sound(loader: ModelLoader, plan: Plan, bed: Samples) -> OwnSound:
    """Return the given sound that a clip's picture follows; all of it is known."""
    return OwnSound(loader, plan, _encode(loader, bed, RATE), (), plan.rate)


def own_sound(
    loader: ModelLoader, plan: Plan, request: Request, windows: Sequence[tuple[int, int]],
    begun: Beginning,
) -> OwnSound:
    """Return the sound to generate for a clip's windows after `begun`."""
    config = loader.folder.components["sound_vae"].config
    nothing = torch.zeros(1, config.latent_channels, 0)
    own = OwnSound(loader, plan, nothing, windows, begun.rate, begun.num_dropped)
    if not begun.num_latents:
        return own
    own.starts_s = begun.num_frames / plan.fps
    own.earlier = read_sound(request.prefix)  # type: ignore[arg-type]
    if own.earlier is not None:
        samples, rate = own.earlier
        own.begins = own._span(own.num_dropped, 1)[0]
        known = math.floor(own.starts_s * Fraction(config.tokens_per_s)) - own.begins
        first = round(own.begins * config.samples_per_token / config.sample_rate * rate)
        before = samples[first : round(own.starts_s * rate)]
        if known > 0 and len(before):
            own.latents = _encode(loader, before, rate)[:, :, :known]
    return own


def sound_plan(plan: Plan, defaults: ModelDefaults) -> Plan:
    """Return the plan that denoises the sound of a plan's clip.

    It starts from pure noise; guidance treats the finished picture as given frames. A distilled
    model has learned pictures only, so the model itself denoises the sound of its clips.
    """
    if plan.few_step is not None:
        known = defaults.settings.get("image_guidance")
        plan = replace(plan, few_step=None, sampler=defaults.sampler, num_steps=defaults.num_steps,
                       shift=defaults.shift, guidance=Guidance(defaults.guidance_scale,
                                                               known_scale=known))
    return replace(plan, strength=1.0, cache=None, temporal_upsampling=1,
                   num_steps=plan.sound_steps or plan.num_steps)


@torch.no_grad()
def _encode(loader: ModelLoader, samples: Samples, rate: int) -> Tensor:
    """Return latents [1, C, K] of samples [N, c], encoded second by second."""
    config = loader.folder.components["sound_vae"].config
    blocks = (samples[start : start + rate].mean(1, keepdims=True)
              for start in range(0, len(samples), rate))
    with loader.use("sound_vae") as vae:
        given = (torch.from_numpy(block[:, 0].copy())[None].to(loader.device)
                 for block in resampled(blocks, 1, rate, config.sample_rate) if len(block))
        return torch.cat(list(vae.stream_encode(given)), dim=2).float().cpu()


def impacts_seen(
    loader: ModelLoader, picture: Tensor, latent_rate: LatentRate, first: int, fps: Fraction
) -> Impacts | None:
    """Return the impacts that the model's onset detector expects, in seconds of the clip.

    None without a detector. The picture [1, C, F, h, w] has its own `latent_rate` and begins with
    the clip's latent frame `first`; `fps` is the clip's frame rate.
    """
    components = loader.folder.components
    if ONSET_DETECTOR not in components:
        return None
    with loader.use(ONSET_DETECTOR) as detector:
        expected = detector.expected(picture.to(loader.device))[0].double().cpu()  # [F, P]
    begins = latent_rate.factor * (first - 1) + 1
    if latent_rate.alone:
        begins, expected[0] = 0, 0  # a single picture
    count, num_parts = expected.shape
    times = part_times(begins, count, num_parts, components["vae"].config.strides.t,
                       float(fps * latent_rate.factor))
    return Impacts(times.flatten().double().numpy(), expected.flatten().numpy(),
                   components[ONSET_DETECTOR].config.enough)


def drawn_at_once(most: int, *, is_seen: bool) -> int:
    """Return the number of sounds drawn at once: all without an onset detector (`is_seen`)."""
    return min(COMPARED, most) if is_seen else most


def best_sound(
    draw: Callable[[range], Tensor], decode: Callable[[Tensor], Tensor], rate: int, most: int,
    impacts: Impacts | None,
) -> Kept:
    """Draw at most `most` sounds for a picture until one matches it; return the best.

    Args:
        draw: generates the sounds of a range of numbers, [N, C, k].
        decode: decodes them to [N, n], at `rate` samples per second.
        impacts: impacts in the picture, in the sounds' own time; None without a detector.
    """
    if most == 1:
        return Kept(draw(range(1))[0])
    at_once = drawn_at_once(most, is_seen=impacts is not None)
    if impacts is None or not impacts.any_seen:
        made = draw(range(at_once))
        return Kept(made[most_agreed(decode(made), rate)])

    def scored(takes: range) -> list[tuple[float, tuple[Tensor, Times]]]:
        sounds = draw(takes)
        onsets = find_onsets(decode(sounds).float().cpu(), rate)
        return [(impacts.fit(each), (sound, each))
                for sound, each in zip(sounds, onsets, strict=True)]

    sound, onsets = best_of(scored, most, impacts.enough, at_once=at_once).made
    return Kept(sound, *impacts.lateness(onsets))


def most_agreed(sounds: Tensor, rate: int) -> int:
    """Return the index of the sound [N, n] whose onsets agree best with the others'.

    The measure is the F-measure of two sounds' onsets; two sounds without any agree.
    """
    def agreement(times: Times, others: Times) -> float:
        total, pairs = len(times) + len(others), pair_times(times, others, TOGETHER_S, TOGETHER_S)
        return 2 * len(pairs) / total if total else 1.0

    onsets = find_onsets(sounds.float().cpu(), rate)
    return int(np.argmax([sum(agreement(one, other) for other in onsets) for one in onsets]))
