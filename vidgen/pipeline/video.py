"""The pipeline: from a request to a clip, in five verbs.

    encode the prompt -> prepare the latent state -> sample -> decode -> write

Sound, where the model makes it, is sampled behind the picture: a state of which that is known.

A task (a first frame, a mask, a clip to re-imagine) is a condition written into the state by
`prepare`; nothing else knows of it.

Axes: B batch, C latent channels, F latent frames, h w latent rows and columns, T frames, H W
pixel rows and columns.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from vidgen.core.errors import InputError
from vidgen.core.protocols import OnStep, SamplerState
from vidgen.core.request import Request
from vidgen.core.runtime import best_dtype, choose_device
from vidgen.core.values import check_picture
from vidgen.diffusion.noise import draw_noise
from vidgen.diffusion.oversampling import sample_finer
from vidgen.diffusion.samplers import sample_state, sample_with_scheduler
from vidgen.diffusion.state import LatentState, new_state
from vidgen.media.clip import Clip, Keeper
from vidgen.media.label import with_label
from vidgen.media.manifest import Signing
from vidgen.media.provenance import stamped
from vidgen.media.read import fit
from vidgen.media.types import ClipInfo
from vidgen.models.tokenizer import read_as
from vidgen.ops.attention import asked_backend, require_backend
from vidgen.pipeline.bound import VERIFIER, Bound, is_bindable, told_apart
from vidgen.pipeline.budget.preflight import Asked, preflight
from vidgen.pipeline.denoised import DenoisedClip
from vidgen.pipeline.devices.crew import start_crew
from vidgen.pipeline.experts import NO_LORAS, Loras, read_loras
from vidgen.pipeline.inputs import Inputs, read_inputs
from vidgen.pipeline.journal.journal import Journal
from vidgen.pipeline.journal.recall import journals_of, recall
from vidgen.pipeline.levels import settles, sigmas_of, split_of
from vidgen.pipeline.long.rolling import RolledClip
from vidgen.pipeline.long.tail import ANCHOR_TASK, make_tail
from vidgen.pipeline.networks import Contexts, denoising
from vidgen.pipeline.opened import OpenedModel
from vidgen.pipeline.parts import DTYPES, Offload
from vidgen.pipeline.plan import Plan
from vidgen.pipeline.policy import Policy, enforce, policy_from_environment
from vidgen.pipeline.prepare import Encoder, write_conditions
from vidgen.pipeline.preview import Glimpses, OnPreview
from vidgen.pipeline.recipe import make_recipe
from vidgen.pipeline.rewrite import settle_prompt
from vidgen.pipeline.sound.own_sound import sound_plan
from vidgen.pipeline.sound.soundtrack import make_soundtrack
from vidgen.pipeline.step_caches import carrying, make_caches
from vidgen.pipeline.tasks import SOUND, check_tasks
from vidgen.weights.folder import ForeignFolder
from vidgen.weights.layouts import open_model

if TYPE_CHECKING:
    from vidgen.pipeline.budget.stages import Estimate
    from vidgen.pipeline.foreign.engine import ForeignEngine
    from vidgen.weights.quantize import Quantization

log = logging.getLogger(__name__)

Stage = Literal["prompt", "prepare", "sample", "sound"]
Report = Callable[[Stage, int, int], None]
"""Told of a stage, and how much of it is done of how much."""


@dataclass(frozen=True)
class Progress:
    """What `on_event` is told: `done` of `total` in a stage of clip `clip` of `num_clips`."""

    stage: Stage
    done: int
    total: int
    clip: int = 1
    num_clips: int = 1


def load(
    model: str | os.PathLike[str] = "toybox", *, device: str = "auto", dtype: str | None = None,
    offload: Offload | Literal["auto"] | None = None, quantize: Quantization | None = None,
    policy: Policy | None = None, devices: int | None = None, shard: bool | None = False,
) -> Engine | ForeignEngine:
    """Open a model; it comes into memory as `offload` says.

    Args:
        model: an embedded model's name, a model folder (ours, diffusers' or Wan's own layout), or
            an id on the Hugging Face hub.
        device: "auto", "cpu", "cuda", ...
        dtype: "fp32", "bf16" or "fp16"; None: bf16 where the processor has it, else fp32.
        offload: "none" keeps all in memory, "stage" what the stage at work needs, "block" two
            blocks of the transformer at a time; None or "auto": the first of them with which each
            clip fits into the memory.
        quantize: "int8" keeps linear layers' weights in 8 bits.
        policy: refuses prompts; None takes the word list that VIDGEN_POLICY names, if one.
        devices: how many share the work, None is 1; see docs/devices.md.
        shard: spread the transformers' weights over the devices; `offload` is then "stage" unless
            it is given.

    Raises:
        InputError: choices that don't go together, or more devices than there are.
        ModelError: no such model, files that are missing, damaged or don't fit together, or more
            than the memory holds.
    """
    check_picture("model", model, array=False)
    policy = policy or policy_from_environment()
    Signing.from_environment()  # one that can't sign is told of now, not when a clip is made
    folder, place = open_model(os.fspath(model)), choose_device(device)
    asked = Asked(None if offload == "auto" else offload, dtype)
    if shard and asked.offload is None:
        asked = asked._replace(offload="stage")
    if isinstance(folder, ForeignFolder):
        from vidgen.pipeline.foreign.engine import ForeignEngine

        if quantize or (devices or 1) > 1:
            option = f"quantize {quantize!r}" if quantize else f"devices {devices}"
            raise InputError(f"{option} works with the Wan family, not with {folder.class_name}; "
                             "leave it out")
        dtype = dtype or best_dtype(place)
        return ForeignEngine(folder, place, dtype, asked.offload or "none", policy=policy)
    crew = start_crew(devices, place, shard=shard, offload=asked.offload, quantize=quantize)
    return Engine(folder, place, asked, quantize, policy, crew)


class Engine(OpenedModel):
    """A model ready to generate."""

    def generate(
        self,
        prompt: str | Request,
        *,
        on_event: Callable[[Progress], None] | None = None,
        on_estimate: Callable[[Estimate], None] | None = None,
        on_preview: OnPreview | None = None,
        journal: Journal | Sequence[Journal] | None = None,
        **options: Any,
    ) -> Clip | list[Clip]:
        """Make a clip, or a list of them where `count` is over 1.

        Args:
            prompt: what is to be seen, or a whole request.
            on_event: told of progress; raising `Cancelled` stops cleanly between two steps.
            on_estimate: told what it will take, before the work begins.
            on_preview: shown small frames of the clip while it forms, as often as that takes 2% of
                the time.
            journal: keeps the state beside the output, one for each clip, so that a run that was
                stopped or killed goes on; see docs/journal.md.
            options: fields of `Request`, which are the command line's long options; of a request
                that is given they are changed.

        Returns:
            A lazy clip, or a list of them: pixels are decoded while they are saved or asked for.

        Raises:
            InputError: what can't be honoured, with value, limit and remedy.
        """
        request = Request.of(prompt, options)
        tell = on_event or (lambda _progress: None)
        enforce(self.policy, request)
        journals = journals_of(journal, request.count)
        request, rewritten = settle_prompt(recall(request, journals), journals)
        enforce(self.policy, request)
        request, inputs = self.read(request)
        first = self.plan(request, inputs)
        if first.roll and (on_preview is not None or self.crew is not None):
            option = "preview" if on_preview is not None else "devices"
            raise InputError(f"{option} doesn't go with roll, which makes a clip while it is "
                             "written, on one device; leave one of them out")
        makes_sound = SOUND in self.folder.tasks and first.roll is None
        track = make_soundtrack(
            request, first.kept_frames, first.fps, self, has_sound=makes_sound
        )
        estimate = preflight(self, first, request)
        if request.strict:
            require_backend(asked_backend(), self.device, DTYPES[self.dtype])
        if on_estimate is not None:
            on_estimate(estimate)
        first = replace(first, tiles=estimate.setup.tiles)
        loras = read_loras(request.lora, self.folder)
        plans = [replace(first, seed=first.seed + index) for index in range(request.count)]
        recipes = [
            stamped(make_recipe(self, plan, request, inputs, loras) | track.facts | rewritten,
                    kept.recipe)
            for plan, kept in zip(plans, journals, strict=True)
        ]
        for kept, recipe in zip(journals, recipes, strict=True):
            kept.check(recipe)

        @cache  # once for all clips, and not where all are sampled already
        def contexts() -> Contexts:
            tell(Progress("prompt", 0, 1, num_clips=request.count))
            fullest = sound_plan(first, self.folder.defaults) if track.is_own else first
            return self.encode_prompt(fullest, loras)

        clips = []
        for index, (plan, recipe, kept) in enumerate(zip(plans, recipes, journals, strict=True), 1):
            if kept.finished:
                clips.append(kept.clip())
                continue

            def report(stage: Stage, done: int, total: int, clip: int = index) -> None:
                tell(Progress(stage, done, total, clip, request.count))

            with kept.running(recipe, self.device):
                if plan.roll:
                    rolled = RolledClip(self, plan, request, inputs, loras, contexts()[0])
                    clip = self.lazy(plan, rolled.videos, recipe, journal=kept)
                else:
                    if kept.latents is None:
                        contexts()  # before pictures are encoded
                    glimpses = Glimpses(self, on_preview, plan.fps, index)
                    made = DenoisedClip(
                        self, plan, request, inputs, loras, contexts, track, kept, report
                    )
                    clip = made.clip(recipe, glimpses)
                clips.append(track.under(clip, plan.seed, partial(report, "sound"), kept))
                if request.begins_with_image:
                    (picture,) = inputs.images["image"]
                    clips[-1].first_frame = fit(picture, plan.height, plan.width, plan.fit)
        return clips if request.count > 1 else clips[0]

    def read(self, request: Request) -> tuple[Request, Inputs]:
        """The request's pictures and clips; a first frame that a model is to draw is drawn here."""
        two = self.dit_config.image_positions is not None
        check_tasks(request, self.folder.name, self.folder.tasks, both=two)
        if request.first_frame_model is None:
            return request, read_inputs(request)
        from vidgen.pipeline.first_frame import with_first_frame

        size = request.size or (self.folder.defaults.width, self.folder.defaults.height)
        return with_first_frame(replace(request, size=size), size, self.device, self.dtype)

    def encode_prompt(self, plan: Plan, loras: Loras = NO_LORAS) -> list[tuple[Tensor, Tensor]]:
        """(context [1, S, D], lengths [1]) of the prompt and, under guidance, of the negative."""
        prompts = [plan.prompt] if plan.guidance.is_off else [plan.prompt, plan.negative]
        texts = [read_as(prompt, dict(plan.readings)) for prompt in prompts]
        return [self.encode_texts([text], loras.tokens) for text in texts]

    def told_apart(
        self, plan: Plan, read: Sequence[str], loras: Loras = NO_LORAS
    ) -> Bound | None:
        """What prompts, in words that the model knows, name that is to be told apart, if any."""
        if plan.binding == 0:
            return None
        encode = partial(self.encode_texts, learned=loras.tokens)
        return told_apart(self.folder.components[VERIFIER].config, read, plan.binding, encode)

    @torch.no_grad()
    def prepare(self, plan: Plan, request: Request, inputs: Inputs) -> LatentState:
        """Noise of the seed, and every condition of the request written beside it."""
        noise = draw_noise(plan.seed, plan.latents) if request.latents is None else request.latents
        if tuple(noise.shape) != plan.latents.dims:
            raise InputError(f"latents are {list(noise.shape)}; this clip needs "
                             f"{list(plan.latents.dims)}")
        state = new_state(noise.float().to(self.device))
        describe = None if self.dit_config.image_dim is None else self.describe
        model = Encoder(
            partial(self.encode_video, tiles=plan.tiles, passes=plan.encode_passes),
            partial(self.encode_first, num_steps=plan.refine_steps, tiles=plan.tiles,
                    passes=plan.encode_passes),
            describe, self.folder.conditioning, self.vae_config.strides, self.dit_config.patch_size,
        )
        sigmas = sigmas_of(plan, request.scheduler)
        return write_conditions(state, plan, request, inputs, model, float(sigmas[0]),
                                settles=settles(plan, sigmas, self.folder))

    @torch.no_grad()
    def sample(
        self,
        plan: Plan,
        state: LatentState,
        contexts: Contexts,
        on_step: OnStep | None = None,
        scheduler: Any = None,
        loras: Loras = NO_LORAS,
        resume: SamplerState | None = None,
        *,
        remember: bool = True,
        told: Bound | None = None,
    ) -> Tensor:
        """Clean latents [1, C, F, h, w], float32, by our sampler or a diffusers scheduler.

        With sound in the state both come packed; see `LatentState.apart`. A plan of two frame rates
        gives the finer one's; see `vidgen.diffusion.oversampling`.
        With `remember` the states that `on_step` is told hold what a step cache remembers. What is
        `told` apart is bound to what is seen of it where words alone say what a clip shows.
        """
        contexts = contexts[:1] if plan.guidance.is_off else contexts
        has_given = plan.strength == 1 and bool(state.has_given.all())
        guidance = plan.guidance.of_clip(has_given=has_given)
        plan, told = replace(plan, guidance=guidance), told if is_bindable(state) else None
        sigmas = sigmas_of(plan, scheduler)

        def run(
            state: LatentState, sigmas: Tensor, on_step: OnStep | None, resume: SamplerState | None
        ) -> Tensor:
            return self._run(plan, state, sigmas, contexts, on_step, scheduler, loras, resume,
                             remember=remember, told=told)

        if plan.oversampling == 1:
            return run(state, sigmas, on_step, resume)
        split = split_of(plan, sigmas, self.folder)
        return sample_finer(
            run, state, sigmas, split, plan.oversampling, self.vae_config.strides.t,
            on_step=on_step, resume=resume,
        )

    def _run(
        self, plan: Plan, state: LatentState, sigmas: Tensor, contexts: Contexts,
        on_step: OnStep | None, scheduler: Any, loras: Loras, resume: SamplerState | None, *,
        remember: bool, told: Bound | None,
    ) -> Tensor:
        """One run of a sampler over noise levels, at one frame rate."""
        caches = make_caches(plan.cache, sigmas, plan.guidance)
        if caches is not None and resume is not None and resume.cache:
            caches.restore(resume.cache)
        if caches is not None and on_step is not None and remember:
            crew = self.crew
            on_step = carrying(caches.state if crew is None else crew.remembered, on_step)
        level = float(sigmas[resume.step if resume else 0])
        assert self.crew is None or told is None, "a crew's clips aren't told apart"
        model = self.crew.denoising if self.crew else partial(denoising, told=told)
        with model(self.parts, plan, state, contexts, loras, level, caches) as denoise:
            if scheduler is not None:
                latents = sample_with_scheduler(
                    denoise, state.begin(), scheduler, plan.num_steps, strength=plan.strength,
                    on_step=on_step, project=state.project, resume=resume,
                )
            else:
                latents = sample_state(
                    plan.sampler, denoise, state, sigmas, on_step=on_step, resume=resume
                )
        return latents if state.sound is not None else latents[:, :, state.num_references :]

    def decode(
        self, plan: Plan, latents: Tensor, recipe: dict[str, Any], journal: Keeper | None = None
    ) -> Clip:
        """A lazy clip whose chunks come out of the VAE while it is written."""
        if "tail" not in recipe:  # a long clip has its own
            unseen = plan.num_frames - plan.kept_frames
            anchor = latents[:, :, :1] if ANCHOR_TASK in self.folder.tasks else None
            recipe["tail"] = make_tail(latents, plan.latents.num_frames, unseen, anchor=anchor,
                                       oversampling=plan.oversampling)
        videos = partial(self.decode_video, latents, tiles=plan.tiles,
                         oversampling=plan.oversampling)
        return self.lazy(plan, videos, recipe, latents, journal)

    def lazy(
        self, plan: Plan, videos: Callable[[int], Iterator[Tensor]], recipe: dict[str, Any],
        latents: Tensor | None = None, journal: Keeper | None = None,
    ) -> Clip:
        """A lazy clip of a plan's length out of `videos`, [1, 3, n, H, W] each, from a frame on."""

        def chunks(start: int = 0) -> Iterator[Any]:
            left = plan.kept_frames - start
            for video in videos(start):
                frames = to_frames(video[0])[:left]
                left -= len(frames)
                if len(frames):
                    yield frames.numpy()
                if not left:
                    return

        info = ClipInfo(
            fps=plan.fps, size=(plan.width, plan.height), num_frames=plan.kept_frames,
            recipe=recipe, stride_t=self.vae_config.strides.t // plan.oversampling,
        )
        is_labelled = recipe.get("request", {}).get("label") == "visible"
        source = with_label(chunks, info.size, info.fps) if is_labelled else chunks
        return Clip(source, info, latents, journal)

def to_frames(video: Tensor) -> Tensor:
    """[3, T, H, W] in [-1, 1] as uint8 [T, H, W, 3] on the CPU."""
    scaled = (video.float().clamp(-1, 1) + 1) * 127.5
    return scaled.round().to(torch.uint8).permute(1, 2, 3, 0).cpu()
