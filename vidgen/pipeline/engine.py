"""The pipeline: from a request to a clip, in five verbs.

    encode the prompt -> prepare the latent state -> sample -> decode -> write

A model's own sound is sampled after the picture, with the picture as a condition.

A task (a first frame, a mask, a clip to re-imagine) is a condition that `prepare` writes into the
state; no other code knows of it.

Axes: B batch, C latent channels, F latent frames, h w latent rows and columns, N samples.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import Tensor

from vidgen.core.errors import InputError
from vidgen.core.protocols import SamplerState, StepInfo
from vidgen.core.request import Loading, Request
from vidgen.core.runtime import attention_by, best_dtype, choose_device
from vidgen.core.values import Attention
from vidgen.diffusion.state import LatentState
from vidgen.media.clip import Clip
from vidgen.media.provenance import stamped
from vidgen.media.read import fit
from vidgen.models.tokenizer import normalise_words
from vidgen.pipeline.best_of_n import counted_on, sample_best
from vidgen.pipeline.denoise import read_loras, sigmas_of
from vidgen.pipeline.inputs import Inputs, read_inputs
from vidgen.pipeline.journal.journal import Journal, journals_of, recall, recalled_tiles
from vidgen.pipeline.model import OpenedModel
from vidgen.pipeline.policy import Policy, enforce, policy_from_environment
from vidgen.pipeline.preview import Glimpses
from vidgen.pipeline.recipe import make_recipe
from vidgen.pipeline.settings import SOUND, check_tasks
from vidgen.pipeline.types import (
    AnyEngine,
    Contexts,
    Loras,
    Offload,
    OnPreview,
    Plan,
    Progress,
    Report,
    reporter,
)
from vidgen.weights.folder import DiffusersFolder

if TYPE_CHECKING:
    from vidgen.diffusion.cache import Magnitudes
    from vidgen.media.types import Samples
    from vidgen.ops.quantized import Quantization
    from vidgen.pipeline.sound.soundtrack import Soundtrack
    from vidgen.pipeline.types import Estimate

log = logging.getLogger(__name__)


def load(
    model: str | os.PathLike[str] = "toybox", *, device: str = "auto", dtype: str | None = None,
    offload: Offload | Literal["auto"] | None = None, quantize: Quantization | None = None,
    policy: Policy | None = None, devices: int | None = None, shard: bool | None = False,
    tiles: str = "auto", attention: Attention = "auto",
) -> AnyEngine:
    """Open a model; `offload` controls when its networks are loaded.

    Args:
        model: an embedded model's name, a model folder (ours, diffusers' or Wan's own layout), or
            an id on the Hugging Face hub.
        device: "auto", "cpu", "cuda", ...
        dtype: "fp32", "bf16" or "fp16"; None: bf16 if the processor has it, else fp32.
        offload: "none" keeps all in memory, "stage" the running stage's networks, "block" two
            blocks of the transformer at a time; None or "auto": the first of them that fits each
            clip.
        quantize: "int8" or "fp8" keeps the weights of linear layers in 8 bits.
        policy: refuses prompts; None: the word list named by VIDGEN_POLICY, if any.
        devices: number of devices that share the work, None is 1; see
            docs/howto/memory_and_devices.md.
        shard: spread the transformers' weights over the devices, by default with offload "stage".
        tiles: "RxC", rows and columns in which the VAE takes a picture; "none" takes it whole,
            "auto" cuts it where the whole doesn't fit the memory.
        attention: back end of attention; "auto" is that of VIDGEN_ATTENTION, or the fastest with
            PyTorch's own error.

    Raises:
        InputError: options that conflict, or more devices than exist.
        ModelError: no such model, files missing, damaged or inconsistent, or too little memory.
    """
    from vidgen.media.manifest import signer_info
    from vidgen.pipeline.parallel.devices import start_devices
    from vidgen.weights.layouts import open_model

    policy = policy or policy_from_environment()
    signer_info()  # refuse one that can't sign before a clip is made
    loading = Loading(model=model, dtype=dtype, offload=offload,  # type: ignore[arg-type]
                      quantize=quantize, devices=devices, shard=shard, tiles=tiles,
                      attention=attention)
    if shard and loading.offload is None:
        loading = loading.replace(offload="stage")
    folder, place = open_model(loading.model), choose_device(device)
    if isinstance(folder, DiffusersFolder):
        from vidgen.pipeline.diffusers_backend.engine import DiffusersEngine

        refused = {"quantize": quantize, "devices": (devices or 1) > 1 and devices,
                   "tiles": tiles != "auto" and tiles,
                   "attention": attention != "auto" and attention}
        if option := next((f"{name} {value}" for name, value in refused.items() if value), None):
            raise InputError(f"{option} works with the Wan family, not with {folder.class_name}; "
                             "leave it out")
        dtype = dtype or best_dtype(place)
        return DiffusersEngine(folder, place, dtype, loading.offload or "none", policy=policy)
    with attention_by(attention):  # in the processes of further devices, too
        shared = start_devices(devices, place, shard=shard, offload=loading.offload,
                               quantize=quantize)
    return Engine(folder, place, loading, policy, shared)


def load_own(model: str, otherwise: str, **loading: Any) -> Engine:
    """Load a model that our own networks run; `loading` are further arguments of `load`.

    For one that diffusers runs raise InputError, with `otherwise` at the end of its message.
    """
    engine = load(model, **loading)
    if not isinstance(engine, Engine):
        engine.close()
        raise InputError(f"{model} is run by diffusers; {otherwise}")
    return engine


class Engine(OpenedModel):
    """A model ready to generate."""

    def generate(
        self, prompt: str | Request, *, count: int = 1,
        on_event: Callable[[Progress], None] | None = None,
        on_estimate: Callable[[Estimate], None] | None = None, on_preview: OnPreview | None = None,
        journal: Journal | Sequence[Journal] | None = None, **options: Any,
    ) -> Clip | list[Clip]:
        """Make a lazy clip, decoded while it is saved or read, or a list where `count` is over 1.

        Args:
            count: number of clips, of the seeds N, N + 1, ...
            on_event: called with progress; raising `Cancelled` stops cleanly between two steps.
            on_estimate: called with the estimate before the work begins.
            on_preview: called with small frames of the forming clip, for at most 2% of the time.
            journal: saves the state next to the output, one for each clip, so that a stopped or
                killed run can resume; see docs/howto/resume.md.
            options: fields of `Request`, as the command line's long options; they override a given
                request's.

        Raises:
            InputError: an option that can't be honoured, with value, limit and remedy.
        """
        from vidgen.pipeline.setups import preflight
        from vidgen.pipeline.sound.own_sound import sound_plan
        from vidgen.pipeline.sound.soundtrack import make_soundtrack

        request = Request.of(prompt, options, count)
        with attention_by(self.loading.attention):
            journals = journals_of(journal, count)
            enforce(self.policy, request)
            request = recall(request, journals)
            request, inputs = self.read(request)
            plan = self.plan(request, inputs)
            track = make_soundtrack(request, plan.kept_frames, plan.fps, self,
                                    has_sound=SOUND in self.folder.tasks)
            tiles = recalled_tiles(journals) if self.loading.tiles == "auto" else None
            loading = self.loading.replace(tiles=tiles) if tiles else self.loading
            estimate = preflight(self.loader, plan, request, loading, count)
            self.adopt(estimate.setup)
            if on_estimate is not None:
                on_estimate(estimate)
            plan = replace(plan, tiles=estimate.setup.tiles)
            loras = read_loras(request.lora, self.folder)
            plans = [replace(plan, seed=plan.seed + index) for index in range(count)]
            recipes = [
                stamped(make_recipe(self, each, request, inputs, loras) | track.facts,
                        kept.recipe)
                for each, kept in zip(plans, journals, strict=True)
            ]
            for kept, recipe in zip(journals, recipes, strict=True):
                kept.check(recipe)

            @cache  # once for all clips, and not where all are sampled already
            def contexts() -> Contexts:
                reporter(on_event, 1, count)("prompt", 0, 1)
                fullest = sound_plan(plan, self.folder.defaults) if track.is_own else plan
                return self.encode_prompt(fullest, loras)

            clips = []
            each_clip = zip(plans, recipes, journals, strict=True)
            for index, (each, recipe, kept) in enumerate(each_clip, 1):
                if kept.finished:
                    clips.append(kept.clip())
                    continue
                with kept.running(recipe, self.device):
                    report = reporter(on_event, index, count)
                    glimpses = Glimpses(self.folder, on_preview, each.fps, index)
                    making = _Making(self, each, request, inputs, loras, contexts, track, kept,
                                     report, glimpses)
                    clips.append(making.clip(recipe))
            return clips if count > 1 else clips[0]

    def read(self, request: Request) -> tuple[Request, Inputs]:
        """Read the request's pictures and clips; draw a first frame if a model is given for it."""
        two = self.dit_config.image_positions is not None
        check_tasks(request, self.folder.name, self.folder.tasks, both=two)
        if request.first_frame_model is None:
            return request, read_inputs(request)
        from vidgen.pipeline.diffusers_backend.engine import with_first_frame

        size = request.size or (self.folder.defaults.width, self.folder.defaults.height)
        return with_first_frame(request.replace(size=size), size, self.device, self.dtype)


@dataclass
class _Making:
    """One clip of a request, in one window or several."""

    model: Engine
    plan: Plan
    request: Request
    inputs: Inputs
    loras: Loras
    contexts: Callable[[], Contexts]  # of the prompts, encoded at the first call
    track: Soundtrack
    kept: Journal  # its journal
    report: Report
    glimpses: Glimpses  # previews of its steps
    window: int = 0  # number of the current one
    rejected: int = 0  # candidates so far

    def __post_init__(self) -> None:
        from vidgen.pipeline.windows import WindowedClip

        self.prompt = normalise_words(self.plan.prompt, dict(self.plan.word_normalisation))
        self.windowed = WindowedClip(self.model, self.plan, self.request, self.inputs)

    def clip(self, recipe: dict[str, Any]) -> Clip:
        """Denoise picture and sound; return the lazy clip with its whole sound."""
        from vidgen.pipeline.sound.own_sound import followed_sound

        plan, kept, windowed, followed = self.plan, self.kept, self.windowed, None
        latents = kept.latents
        if latents is None:
            self.contexts()  # before pictures are encoded
            self.report("prepare", 0, 1)
            if self.request.follow_audio and self.track.bed is not None:
                followed = followed_sound(self.model.loader, plan, self.track.bed).add_to
            self.window = kept.num_windows
            for own, state in windowed.states(kept.done, followed):
                done = windowed.add(state, self.sample(own, state))
                if len(windowed.windows) > 1:
                    kept.keep_window(done)
            latents = windowed.latents
            kept.keep_latents(latents, windowed.begun.num_frames)
        clip = windowed.clip(latents, recipe, kept)
        if self.track.is_own:
            samples, rate = kept.kept_sound() or self._sound(latents)
            clip.info = replace(clip.info, sound=samples, sound_rate=rate)
        clip = self.track.under(clip, plan.seed, partial(self.report, "sound"), kept)
        if self.request.begins_with_image:
            (picture,) = self.inputs.images["image"]
            clip.first_frame = fit(picture, plan.height, plan.width, plan.fit)
        return clip

    def _sound(self, latents: Tensor) -> tuple[Samples, int]:
        """Sample the model's own sound for finished latents: samples [N, c] and their rate."""
        from vidgen.pipeline.sound.own_sound import own_sound, sound_plan

        plan = sound_plan(self.plan, self.model.folder.defaults)
        own = own_sound(self.model.loader, self.plan, self.request, self.windowed.windows,
                        self.windowed.begun)

        def sample(state: LatentState, number: int) -> Tensor:
            def report(step: int) -> None:
                done, rounds = number + own.extra_rounds, len(own.windows) + own.extra_rounds
                self.report("sound", done * num_steps + step, rounds * num_steps)

            report(0)
            return self.model.sample(plan, state, contexts, lambda info: report(info.step),
                                     self.request.scheduler, self.loras)

        contexts, num_steps = self.contexts(), len(sigmas_of(plan, self.request.scheduler)) - 1
        own.follow(latents, sample, self.kept)
        self.kept.keep_sound(*(made := own.decode()))
        return made

    def sample(self, plan: Plan, state: LatentState) -> Tensor:
        """Return the next window in the samplers' layout; the best of several candidates."""
        model, kept, scheduler = self.model, self.kept, self.request.scheduler
        num_steps = len(sigmas_of(plan, scheduler)) - 1
        num_windows = len(self.windowed.windows)

        def report(step: int, candidate: int) -> None:
            others = self.rejected + candidate
            before, total = (self.window + others) * num_steps, (num_windows + others) * num_steps
            self.report("sample", before + step, total, candidate + 1, plan.candidates)

        def on_step(info: StepInfo, candidate: int) -> None:
            kept.on_step(counted_on(info, candidate))
            seen = state.unpack(info.denoised)[0]
            apart = (seen.shape[2] - 1) // max(plan.latents.num_frames - 1, 1) or 1
            shown = replace(info, denoised=seen[:, :, ::apart])
            self.glimpses.on_step(shown, state.num_references)
            report(info.step, candidate)

        def begin(resume: SamplerState | None, candidate: int = 0) -> dict[str, Any]:
            report(resume.step if resume else 0, candidate)
            return {"on_step": partial(on_step, candidate=candidate), "resume": resume}

        regional = model.regional_prompts(plan, state, [self.prompt], self.loras)
        sample = partial(model.sample, plan, contexts=self.contexts(), scheduler=scheduler,
                         loras=self.loras, remember=kept.keeps, regional=regional)
        if plan.candidates == 1:
            made = sample(state, **begin(kept.take_state()))
        else:
            made, rejected = sample_best(
                model.loader, plan, state, self.prompt,
                lambda state, candidate, resume: sample(state, **begin(resume, candidate)),
                kept, self.window, num_steps,
            )
            self.rejected += rejected
        self.window += 1
        return made


def measure_magnitudes(engine: Engine) -> Magnitudes:
    """Measure a model's magnitudes in a clip of its defaults, from a grey picture if it needs one.

    One clip is enough: they hardly depend on its content (Ma et al. 2025, fig. 2).
    """
    from vidgen.diffusion.cache import Probe, StepCaches, magnitudes_of

    options: dict[str, Any] = {"seed": 0}
    if "text" not in engine.folder.tasks:
        defaults = engine.folder.defaults
        options["image"] = np.full((defaults.height, defaults.width, 3), 128, np.uint8)
    request, inputs = engine.read(Request(prompt="a red car drives to the right", **options))
    plan = replace(engine.plan(request, inputs), temporal_upsampling=1)
    caches = StepCaches(lambda _: Probe())
    engine.sample(plan, engine.prepare(plan, request, inputs), engine.encode_prompt(plan),
                  caches=caches)
    return magnitudes_of(caches)
