"""Sampling of a clip before it is decoded: its picture, and then its sound.

Axes: B batch, C latent channels, F latent frames, h w latent rows and columns, N samples.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from vidgen.media.read import fit
from vidgen.models.tokenizer import read_as
from vidgen.pipeline.best_of_n import counted_on, sample_best
from vidgen.pipeline.experts import sigmas_of
from vidgen.pipeline.long.extend import LongClip, long_clip
from vidgen.pipeline.sound.own_sound import followed_sound, own_sound, sound_plan

if TYPE_CHECKING:
    from torch import Tensor

    from vidgen.core.protocols import StepInfo
    from vidgen.core.request import Request
    from vidgen.diffusion.state import LatentState
    from vidgen.media.clip import Clip
    from vidgen.media.types import Samples
    from vidgen.pipeline.denoise import RegionalPrompts
    from vidgen.pipeline.inputs import Inputs
    from vidgen.pipeline.journal.journal import Journal
    from vidgen.pipeline.model import OpenedModel
    from vidgen.pipeline.preview import Glimpses
    from vidgen.pipeline.sound.soundtrack import Soundtrack
    from vidgen.pipeline.types import Contexts, Loras, Plan, Report

log = logging.getLogger(__name__)


@dataclass
class Making:
    """One clip of a request, in one window or several."""

    model: OpenedModel
    plan: Plan
    request: Request
    inputs: Inputs
    loras: Loras
    contexts: Callable[[], Contexts]  # of the prompts, encoded at the first call
    track: Soundtrack
    kept: Journal  # its journal
    report: Report  # called with a stage, the units done, and their total
    glimpses: Glimpses  # previews of its steps
    window: int = 0  # number of the current one
    rejected: int = 0  # candidates so far

    def clip(self, recipe: dict[str, Any]) -> Clip:
        """Denoise picture and sound; return the lazy clip."""
        plan, kept, long, followed = self.plan, self.kept, self._long, None
        latents = kept.latents
        if latents is None:
            self.contexts()  # before pictures are encoded
            self.report("prepare", 0, 1)
            if self.request.follow_audio and self.track.bed is not None:
                followed = followed_sound(self.model.loader, plan, self.track.bed).add_to
            self.window = kept.num_windows
            if long:
                latents = long.sample(self.sample, kept.done, kept.keep_window, followed)
            else:
                state = self.model.prepare(plan, self.request, self.inputs)
                if followed:
                    state = followed(state, 0, plan.latents.num_frames)
                latents = state.unpack(self.sample(plan, state))[0]
            kept.keep_latents(latents, long.begun.num_frames if long else 0)
        decode = long.clip if long else partial(self.model.decode, plan)
        clip = decode(latents, recipe, kept)
        if self.track.is_own:
            samples, rate = kept.kept_sound() or self._sound(latents)
            clip.info = replace(clip.info, sound=samples, sound_rate=rate)
        return clip

    def finished(self, clip: Clip) -> Clip:
        """Add the clip's whole sound, and the picture that it began with."""
        report = partial(self.report, "sound")
        clip = self.track.under(clip, self.plan.seed, report, self.kept)
        if self.request.begins_with_image:
            (picture,) = self.inputs.images["image"]
            clip.first_frame = fit(picture, self.plan.height, self.plan.width, self.plan.fit)
        return clip

    @cached_property
    def prompt(self) -> str:
        """The prompt in words that the model knows."""
        return read_as(self.plan.prompt, dict(self.plan.readings))

    @cached_property
    def regional(self) -> RegionalPrompts | None:
        """Regional prompts, if any."""
        return self.model.regional_prompts(self.plan, [self.prompt], self.loras)

    @cached_property
    def _long(self) -> LongClip | None:
        return long_clip(self.model, self.plan, self.request, self.inputs)

    def _sound(self, latents: Tensor) -> tuple[Samples, int]:
        """Sample the model's own sound for finished latents: samples [N, c] and their rate."""
        plan = sound_plan(self.plan, self.model.folder.defaults)
        long = (self._long.windows, self._long.begun) if self._long else ()
        own = own_sound(self.model.loader, self.plan, self.request, *long)

        def sample(state: LatentState, number: int) -> Tensor:
            def on_step(info: StepInfo) -> None:
                done, rounds = number + own.extra_rounds, len(own.windows) + own.extra_rounds
                self.report("sound", done * info.num_steps + info.step, rounds * info.num_steps)

            return self.model.sample(plan, state, self.contexts(), on_step, self.request.scheduler,
                                     self.loras)

        own.follow(latents, sample, self.kept)
        self.kept.keep_sound(*(made := own.decode()))
        return made

    def sample(self, plan: Plan, state: LatentState) -> Tensor:
        """Return the next window in the samplers' layout; the best of several candidates."""
        model, kept, scheduler = self.model, self.kept, self.request.scheduler
        num_steps = len(sigmas_of(plan, scheduler)) - 1
        num_windows = len(self._long.windows) if self._long else 1

        def on_step(info: StepInfo, candidate: int = 0) -> None:
            kept.on_step(counted_on(info, candidate))
            seen = state.unpack(info.denoised)[0]
            apart = (seen.shape[2] - 1) // max(plan.latents.num_frames - 1, 1) or 1
            shown = replace(info, denoised=seen[:, :, ::apart])
            self.glimpses.on_step(shown, state.num_references)
            others = self.rejected + candidate
            done, total = self.window + others, num_windows + others
            self.report("sample", done * num_steps + info.step, total * num_steps)

        sample = partial(model.sample, plan, contexts=self.contexts(), scheduler=scheduler,
                         loras=self.loras, remember=kept.keeps, regional=self.regional)
        if plan.candidates == 1:
            made = sample(state, on_step=on_step, resume=kept.take_state())
        else:
            made, rejected = sample_best(
                model.loader, plan, state, self.prompt,
                lambda state, candidate, resume: sample(
                    state, on_step=partial(on_step, candidate=candidate), resume=resume),
                kept, self.window, num_steps,
            )
            self.rejected += rejected
        self.window += 1
        return made
