"""The pipeline: from a request to a clip, in five verbs.

    encode the prompt -> prepare the latent state -> sample -> decode -> write

A model's own sound is sampled after the picture, with the picture as a condition.

A task (a first frame, a mask, a clip to re-imagine) is a condition that `prepare` writes into the
state; no other code knows of it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from vidgen.core.errors import InputError
from vidgen.core.request import Loading, Request
from vidgen.core.runtime import attention_by, best_dtype, choose_device
from vidgen.core.values import Attention, check_file
from vidgen.media.clip import Clip
from vidgen.pipeline.inputs import Inputs, read_inputs
from vidgen.pipeline.journal.journal import Journal, journals_of, recall, recalled_tiles
from vidgen.pipeline.model import OpenedModel
from vidgen.pipeline.policy import Policy, enforce, policy_from_environment
from vidgen.pipeline.settings import SOUND, check_tasks
from vidgen.pipeline.types import AnyEngine, Contexts, Offload, OnPreview, Plan, Progress, Reporter
from vidgen.weights.folder import DiffusersFolder

if TYPE_CHECKING:
    from vidgen.diffusion.cache import Magnitudes
    from vidgen.pipeline.types import Estimate
    from vidgen.weights.quantize import Quantization

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
        quantize: "int8" keeps linear layers' weights in 8 bits.
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

    check_file("model", model)
    policy = policy or policy_from_environment()
    signer_info()  # refuse one that can't sign before a clip is made
    asked = Loading(model=os.fspath(model), dtype=dtype, offload=offload,  # type: ignore[arg-type]
                    quantize=quantize, devices=devices, shard=shard, tiles=tiles,
                    attention=attention)
    if shard and asked.offload is None:
        asked = asked.replace(offload="stage")
    folder, place = open_model(asked.model), choose_device(device)
    if isinstance(folder, DiffusersFolder):
        from vidgen.pipeline.diffusers_backend.engine import DiffusersEngine

        refused = {"quantize": quantize, "devices": (devices or 1) > 1 and devices,
                   "tiles": tiles != "auto" and tiles,
                   "attention": attention != "auto" and attention}
        if option := next((f"{name} {value}" for name, value in refused.items() if value), None):
            raise InputError(f"{option} works with the Wan family, not with {folder.class_name}; "
                             "leave it out")
        dtype = dtype or best_dtype(place)
        return DiffusersEngine(folder, place, dtype, asked.offload or "none", policy=policy)
    with attention_by(attention):  # in the processes of further devices, too
        shared = start_devices(devices, place, shard=shard, offload=asked.offload,
                               quantize=quantize)
    return Engine(folder, place, asked, policy, shared)


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
        from vidgen.media.provenance import stamped
        from vidgen.pipeline.experts import read_loras
        from vidgen.pipeline.making import Making
        from vidgen.pipeline.preview import Glimpses
        from vidgen.pipeline.recipe import make_recipe
        from vidgen.pipeline.sound.own_sound import sound_plan
        from vidgen.pipeline.sound.soundtrack import make_soundtrack

        request = Request.of(prompt, options, count)
        with attention_by(self.asked.attention):
            journals = journals_of(journal, count)
            enforce(self.policy, request)
            request = recall(request, journals)
            request, inputs = self.read(request)
            plan = self.plan(request, inputs)
            track = make_soundtrack(request, plan.kept_frames, plan.fps, self,
                                    has_sound=SOUND in self.folder.tasks)
            tiles = recalled_tiles(journals) if self.asked.tiles == "auto" else None
            plan = self._fitted(plan, request, count, tiles, on_estimate)
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
                Reporter(on_event, 1, count)("prompt", 0, 1)
                fullest = sound_plan(plan, self.folder.defaults) if track.is_own else plan
                return self.encode_prompt(fullest, loras)

            clips = []
            each_clip = zip(plans, recipes, journals, strict=True)
            for index, (each, recipe, kept) in enumerate(each_clip, 1):
                if kept.finished:
                    clips.append(kept.clip())
                    continue
                with kept.running(recipe, self.device):
                    report = Reporter(on_event, index, count)
                    glimpses = Glimpses(self, on_preview, each.fps, index)
                    making = Making(self, each, request, inputs, loras, contexts, track, kept,
                                    report, glimpses)
                    clips.append(making.finished(making.clip(recipe)))
            return clips if count > 1 else clips[0]

    def _fitted(
        self, plan: Plan, request: Request, count: int, tiles: str | None,
        on_estimate: Callable[[Estimate], None] | None,
    ) -> Plan:
        from vidgen.pipeline.setups import preflight

        asked = self.asked.replace(tiles=tiles) if tiles else self.asked
        estimate = preflight(self.loader, plan, request, asked, count)
        self.adopt(estimate.setup)
        if on_estimate is not None:
            on_estimate(estimate)
        return replace(plan, tiles=estimate.setup.tiles)

    def read(self, request: Request) -> tuple[Request, Inputs]:
        """Read the request's pictures and clips; draw a first frame if a model is given for it."""
        two = self.dit_config.image_positions is not None
        check_tasks(request, self.folder.name, self.folder.tasks, both=two)
        if request.first_frame_model is None:
            return request, read_inputs(request)
        from vidgen.pipeline.diffusers_backend.engine import with_first_frame

        size = request.size or (self.folder.defaults.width, self.folder.defaults.height)
        return with_first_frame(request.replace(size=size), size, self.device, self.dtype)


def measure_magnitudes(engine: Engine) -> Magnitudes:
    """Measure a model's magnitudes in a clip of its defaults, from a grey picture if it needs one.

    One clip is enough: they hardly depend on its content (Ma et al. 2025, fig. 2).
    """
    from vidgen.diffusion.cache import Probe, StepCaches, magnitudes_of
    from vidgen.diffusion.samplers import sample_state
    from vidgen.pipeline.denoise import denoising
    from vidgen.pipeline.experts import sigmas_of
    from vidgen.pipeline.types import NO_LORAS

    options: dict[str, Any] = {"seed": 0}
    if "text" not in engine.folder.tasks:
        defaults = engine.folder.defaults
        options["image"] = np.full((defaults.height, defaults.width, 3), 128, np.uint8)
    request, inputs = engine.read(Request(prompt="a red car drives to the right", **options))
    plan = engine.plan(request, inputs)
    contexts, sigmas = engine.encode_prompt(plan), sigmas_of(plan)
    with torch.no_grad():
        state = engine.prepare(plan, request, inputs)
        caches = StepCaches(lambda _: Probe())
        level = float(sigmas[0])
        with denoising(engine.loader, plan, state, contexts, NO_LORAS, level, caches) as denoise:
            sample_state(plan.sampler, denoise, state, sigmas)
    return magnitudes_of(caches)
