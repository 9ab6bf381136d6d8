"""A clip whose latents are all made before it is decoded: its picture, and then its sound.

Axes: B batch, C latent channels, F latent frames, h w latent rows and columns, N samples.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from vidgen.models.tokenizer import read_as
from vidgen.pipeline.candidates import Tried, keep_tried, kept_tried, sample_best
from vidgen.pipeline.levels import sigmas_of
from vidgen.pipeline.long.extend import LongClip, long_clip
from vidgen.pipeline.sound.own_sound import followed_sound, own_sound, sound_plan

if TYPE_CHECKING:
    from torch import Tensor

    from vidgen.core.protocols import SamplerState, StepInfo
    from vidgen.core.request import Request
    from vidgen.diffusion.state import LatentState
    from vidgen.media.clip import Clip
    from vidgen.media.types import Samples
    from vidgen.pipeline.bound import Bound
    from vidgen.pipeline.experts import Loras
    from vidgen.pipeline.inputs import Inputs
    from vidgen.pipeline.journal.journal import Journal
    from vidgen.pipeline.networks import Contexts
    from vidgen.pipeline.plan import Plan
    from vidgen.pipeline.preview import Glimpses
    from vidgen.pipeline.sound.soundtrack import Soundtrack
    from vidgen.pipeline.video import Engine, Report

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DenoisedClip:
    """A clip on its way, in one window or several.

    Attributes:
        engine: the model.
        plan: of the clip.
        request: whose conditions it meets.
        inputs: its pictures and clips.
        loras: adapters of the model.
        contexts: of the prompts, asked for when they are needed.
        track: what it is to sound like.
        kept: its journal.
        report: told of a stage, and how much of it is done of how much.
    """

    engine: Engine
    plan: Plan
    request: Request
    inputs: Inputs
    loras: Loras
    contexts: Callable[[], Contexts]
    track: Soundtrack
    kept: Journal
    report: Report

    def clip(self, recipe: dict[str, Any], glimpses: Glimpses) -> Clip:
        """The lazy clip, of which pixels are left to decode; its own sound is made already."""
        latents, kept, long = self.kept.latents, self.kept, self._long
        if latents is None:
            self.report("prepare", 0, 1)
            latents = self._picture(glimpses)
            kept.keep_latents(latents, long.num_shown if long else 0)
        decode = long.clip if long else partial(self.engine.decode, self.plan)
        clip = decode(latents, recipe, kept)
        if self.track.is_own:
            samples, rate = kept.kept_sound() or self._sound(latents)
            clip.info = replace(clip.info, sound=samples, sound_rate=rate)
        return clip

    @cached_property
    def prompt(self) -> str:
        """In words that the model knows."""
        return read_as(self.plan.prompt, dict(self.plan.readings))

    @cached_property
    def told(self) -> Bound | None:
        """What of it is told apart."""
        return self.engine.told_apart(self.plan, [self.prompt], self.loras)

    @cached_property
    def _long(self) -> LongClip | None:
        return long_clip(self.engine, self.plan, self.request, self.inputs)

    def _picture(self, glimpses: Glimpses) -> Tensor:
        """Its latents [1, C, F, h, w]."""
        plan, request, long, followed = self.plan, self.request, self._long, None
        if request.follow_audio and self.track.bed is not None:
            followed = followed_sound(self.engine.parts, plan, self.track.bed)
        num_windows = len(long.windows) if long else 1
        sample = _Sampling(self, glimpses, num_windows, self.kept.num_windows)
        if long:
            return long.sample(sample, self.kept.done, self.kept.keep_window, followed)
        state = self.engine.prepare(plan, request, self.inputs)
        if followed:
            state = followed.beside(state, 0, plan.latents.num_frames)
        return state.apart(sample(plan, state))[0]

    def _sound(self, latents: Tensor) -> tuple[Samples, int]:
        """What the model makes to be heard with finished latents: samples [N, c] and their rate."""
        plan = sound_plan(self.plan, self.engine.folder.defaults)
        own = own_sound(self.engine.parts, self.plan, self.request, self._long)

        def sample(state: LatentState, number: int) -> Tensor:
            def on_step(info: StepInfo) -> None:
                done, rounds = number + own.extra_rounds, len(own.windows) + own.extra_rounds
                self.report("sound", done * info.num_steps + info.step, rounds * info.num_steps)

            return self.engine.sample(
                plan, state, self.contexts(), on_step, self.request.scheduler, self.loras
            )

        own.follow(latents, sample, self.kept)
        self.kept.keep_sound(*(made := own.decode()))
        return made


@dataclass
class _Sampling:
    """Samples one plan after the other: the windows of a long clip, or a whole clip.

    Attributes:
        clip: that they are of.
        glimpses: shown its steps.
        num_windows: how many there are.
        number: of the window at work, from 0.
        others: candidates so far that weren't good enough.
    """

    clip: DenoisedClip
    glimpses: Glimpses
    num_windows: int
    number: int
    others: int = 0

    def __call__(self, plan: Plan, state: LatentState) -> Tensor:
        """The best candidate of the next window, as samplers give it."""
        clip = self.clip
        tried = kept_tried(clip.kept, self.number, clip.engine.device)
        self.others += tried.count if tried else 0
        made = sample_best(
            clip.engine.parts, plan, state, [clip.prompt], partial(self._candidate, plan), tried,
            self._keep, self._doubt,
        )
        self.number += 1
        return made

    def _candidate(self, plan: Plan, state: LatentState, _rows: Tensor, candidate: int) -> Tensor:
        clip, request, kept = self.clip, self.clip.request, self.clip.kept
        num_steps = len(sigmas_of(plan, request.scheduler)) - 1

        def on_step(info: StepInfo) -> None:
            kept.on_step(_counted_on(info, candidate))
            seen = state.apart(info.denoised)[0]
            apart = (seen.shape[2] - 1) // max(plan.latents.num_frames - 1, 1) or 1
            shown = replace(info, denoised=seen[:, :, ::apart])
            self.glimpses.on_step(shown, state.num_references)
            done, total = self.number + self.others, self.num_windows + self.others
            clip.report("sample", done * num_steps + info.step, total * num_steps)

        resume = _of_candidate(kept.take_state(), candidate, num_steps)
        return clip.engine.sample(
            plan, state, clip.contexts(), on_step, request.scheduler, clip.loras, resume,
            remember=kept.keeps, told=clip.told,
        )

    def _keep(self, tried: Tried) -> None:
        self.others += 1
        keep_tried(self.clip.kept, self.number, tried)

    def _doubt(self, names: str) -> None:
        log.warning("none of %d candidates shows %s for certain, the surest is kept; give another "
                    "seed, other words or more --candidates", self.clip.plan.candidates, names)


def _counted_on(info: StepInfo, candidate: int) -> StepInfo:
    """A step's news with its candidate's steps behind those of the candidates before."""
    before = candidate * info.num_steps
    state = replace(info.state, step=before + info.state.step)
    return replace(info, num_steps=before + info.num_steps, state=state)


def _of_candidate(
    state: SamplerState | None, candidate: int, num_steps: int
) -> SamplerState | None:
    """A state so counted as its own candidate's sampler takes it; None where it is another's."""
    if state is None or (state.step - 1) // num_steps != candidate:
        return None
    return replace(state, step=state.step - candidate * num_steps)
