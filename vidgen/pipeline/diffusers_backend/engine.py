"""Other families (LTX-Video, HunyuanVideo, CogVideoX, ...) with our own request and clip.

One adapter over the pipelines of diffusers, led by the signature of their call, so that most
unknown families work:

    read the pictures -> settle the request -> call the pipeline -> write

Between two steps a pipeline holds state that can't be read or set from outside. So a journal keeps
its result and the segments that were encoded since; denoising that was killed starts again.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vidgen.core.errors import InputError, ModelError
from vidgen.core.request import Request
from vidgen.core.shapes import size_for_aspect
from vidgen.media.clip import Clip
from vidgen.media.provenance import stamped
from vidgen.media.read import fit
from vidgen.media.types import ClipInfo, Frames
from vidgen.pipeline.diffusers_backend.pipe import LoadedPipeline, PipelineResult
from vidgen.pipeline.diffusers_backend.plan import (
    Abilities,
    DiffusersPlan,
    make_diffusers_plan,
    make_scheduler,
)
from vidgen.pipeline.inputs import Inputs, read_inputs, video_frames
from vidgen.pipeline.journal.job import MADE
from vidgen.pipeline.journal.journal import Journal, journals_of, recall
from vidgen.pipeline.loader import DTYPES
from vidgen.pipeline.policy import Policy, enforce
from vidgen.pipeline.recipe import make_diffusers_recipe, plan_facts
from vidgen.pipeline.sound.soundtrack import Soundtrack, make_soundtrack
from vidgen.pipeline.types import OnPreview, Progress, Report, Reporter, draw_seed
from vidgen.weights.folder import DiffusersFolder
from vidgen.weights.layouts import open_model

log = logging.getLogger(__name__)
_WANTED = "a first frame is drawn by one such as SDXL, SD3 or FLUX, as diffusers saves it"
_ASKED = ("size", "frames", "seconds")
"""Options that determine size and length."""
_SETTLED = ("width", "height", "num_frames", "kept_frames")
"""Entries of a plan that are known only after the pipeline has run."""


class DiffusersEngine:
    """Another family's model, ready to generate.

    Args:
        dtype: "fp32", "bf16" or "fp16".
        offload: "none" keeps all of it on the device, "stage" one component and "block" one layer
            at a time; on the CPU all three are the same.
        loader: class of diffusers that loads the folder, instead of the one the folder names.

    Raises:
        ModelError: a class that this diffusers doesn't have, or files missing or damaged.
    """

    def __init__(
        self, folder: DiffusersFolder, device: torch.device, dtype: str, offload: str = "none",
        *, loader: Any = None, policy: Policy | None = None,
    ) -> None:
        self.folder, self.device, self.dtype, self.offload = folder, device, dtype, offload
        self.policy = policy
        self.pipe = LoadedPipeline(folder, device, DTYPES[dtype], offload, loader)

    def generate(
        self, prompt: str | Request, *, count: int = 1,
        on_event: Callable[[Progress], None] | None = None,
        on_estimate: Callable[[Any], None] | None = None,  # noqa: ARG002  nothing is known
        on_preview: OnPreview | None = None, journal: Journal | Sequence[Journal] | None = None,
        **options: Any,
    ) -> Clip | list[Clip]:
        """Make a clip, or a list of them where `count` is over 1; see `Engine.generate`.

        Diffusers has neither estimates, so that `on_estimate` isn't called, nor previews. A clip
        stopped while denoising starts again; one whose pipeline was done resumes after the finished
        segments.

        Raises:
            InputError: an option that this family can't honour, with those that it can.
        """
        request = Request.of(prompt, options, count)
        if on_preview is not None:
            raise InputError(f"{self.folder.name} shows no previews; leave --preview out")
        journals = journals_of(journal, count)
        enforce(self.policy, request)
        request = recall(request, journals)
        request, inputs = self._read(request)
        shown = (option for option in ("video", "image") if getattr(request, option) is not None)
        able = Abilities(self.pipe.taking(next(shown, None)))
        scheduler = make_scheduler(able.pipe.scheduler, request)
        first = make_diffusers_plan(request, inputs, able, scheduler)
        plans = [replace(first, seed=first.seed + index) for index in range(count)]

        @cache  # clips of one length share it
        def track(num_frames: int) -> Soundtrack:
            return make_soundtrack(request, num_frames, first.fps, self, has_sound=able.has_sound)

        recipes = []
        for plan, kept in zip(plans, journals, strict=True):
            recipe = make_diffusers_recipe(self, plan, request, inputs)
            recipe = _as_settled(recipe, kept.recipe)
            known = recipe["plan"]["kept_frames"]  # None: it shows when the clip is made
            recipe = stamped(recipe | (track(known).facts if known else {}), kept.recipe)
            kept.check(recipe)
            recipes.append(recipe)

        clips = []
        for index, (plan, recipe, kept) in enumerate(zip(plans, recipes, journals, strict=True), 1):
            if kept.finished:
                clips.append(kept.clip())
                continue
            report = Reporter(on_event, index, count)
            with kept.running(recipe):
                made = self._made(plan, scheduler, request, inputs, able, kept, report)
                frames = made.frames[: plan.kept_frames]
                if request.frames is not None and len(frames) < request.frames:
                    log.warning("%s gave %d frames of the %d asked for", plan.pipeline,
                                len(frames), request.frames)
                height, width = frames.shape[1:3]
                settled = replace(plan, width=width, height=height, kept_frames=len(frames),
                                  num_frames=plan.num_frames or len(made.frames))
                sound = track(len(frames))
                whole = recipe | {"plan": plan_facts(settled)} | sound.facts
                kept.keep_recipe(whole)
                clip = _clip(frames, plan.fps, made, whole, able.strides.t, kept)
                clips.append(sound.under(clip, plan.seed, partial(report, "sound"), kept))
        return clips if count > 1 else clips[0]

    def close(self) -> None:
        """Free the pipeline's memory; this engine can't be used afterwards."""
        self.pipe.close()

    def _made(
        self, plan: DiffusersPlan, scheduler: Any, request: Request, inputs: Inputs,
        able: Abilities, kept: Journal, report: Report,
    ) -> PipelineResult:
        if (earlier := kept.kept_arrays(MADE, "frames")) is not None:
            arrays, facts = earlier
            return PipelineResult(arrays["frames"], arrays.get("sound"), facts["sound_rate"])

        def on_step(done: int, total: int) -> None:
            kept.keep_job()
            report("sample", done, total)

        report("prompt", 0, 1)
        arguments = self._arguments(plan, request, inputs, able)
        made = self.pipe.make(able, plan, scheduler, arguments, on_step)
        arrays = {"frames": made.frames} | ({} if made.sound is None else {"sound": made.sound})
        kept.keep_arrays(MADE, arrays, {"num_frames": len(made.frames), "finished": True,
                                        "sound_rate": made.sound_rate})
        return made

    def _read(self, request: Request) -> tuple[Request, Inputs]:
        able = Abilities(self.pipe.own)
        able.refuse(request)
        if request.first_frame_model is None:
            return request, read_inputs(request)
        size = request.size or able.default_size() or (512, 512)
        return with_first_frame(request, size, self.device, self.dtype)

    def _arguments(
        self, plan: DiffusersPlan, request: Request, inputs: Inputs, able: Abilities
    ) -> dict[str, Any]:
        def picture(pixels: Frames) -> Image.Image:
            if plan.width and plan.height:
                pixels = fit(pixels, plan.height, plan.width, plan.fit)
            return Image.fromarray(pixels)

        wanted: dict[str | None, Any] = {  # None: parameters that this pipeline doesn't have
            "prompt": plan.prompt, "negative_prompt": plan.negative,
            "num_inference_steps": plan.num_steps, "guidance_rescale": plan.guidance_rescale,
            "width": plan.width, "height": plan.height, "strength": plan.strength,
            "latents": request.latents, able.guidance: plan.guidance_scale,
            able.length: plan.num_frames,
            able.rate: int(plan.fps) if plan.fps.denominator == 1 else float(plan.fps),
        }
        for option in ("image", "last_image"):
            for pixels in inputs.images.get(option, ()):
                wanted[option] = picture(pixels)
        if request.video is not None:
            assert plan.num_frames is not None
            frames = video_frames(request.video, plan.num_frames, plan.fps)
            wanted["video"] = [picture(frame) for frame in frames]
        given = {name: value for name, value in wanted.items()
                 if name in able.defaults and value is not None}
        # Noise comes from the CPU, as ours does: the same on every device, alone or in a batch.
        given["generator"] = torch.Generator("cpu").manual_seed(plan.seed)
        return given | {"output_type": "np"}


def _clip(
    frames: Frames, fps: Fraction, made: PipelineResult, recipe: dict[str, Any], stride_t: int,
    journal: Journal,
) -> Clip:
    def chunks(start: int = 0) -> Iterator[Frames]:
        if start < len(frames):
            yield frames[start:]

    sound, rate = made.sound, made.sound_rate
    if sound is not None:
        sound = sound[: round(float(len(frames) / fps) * rate)]
    size = (frames.shape[2], frames.shape[1])
    info = ClipInfo(fps, size, len(frames), sound, rate, recipe, stride_t=stride_t)
    return Clip(chunks, info, journal=journal)


def _as_settled(recipe: dict[str, Any], earlier: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a recipe with the size and length of an `earlier` one of the same wishes, if any."""
    if earlier is None or not isinstance(plan := earlier.get("plan"), dict):
        return recipe
    wishes = [[each.get("request", {}).get(name) for name in _ASKED] for each in (recipe, earlier)]
    if json.loads(json.dumps(wishes[0])) != wishes[1]:
        return recipe
    known = {name: plan[name] for name in _SETTLED if plan.get(name) is not None}
    return recipe | {"plan": recipe["plan"] | known}


def draw_first_frame(
    folder: str | Path, prompt: str, negative: str | None, seed: int, width: int, height: int, *,
    steps: int | None = None, guidance: float | None = None, device: torch.device | str = "cpu",
    dtype: torch.dtype | str = "fp32", on_event: Callable[[Progress], None] | None = None,
) -> tuple[Frames, dict[str, Any]]:
    """Return a picture by a text-to-image model, uint8 [height, width, 3], and its recipe's record.

    The model is freed afterwards. It draws in the wanted aspect at its own area, where such models
    are at their best; then the picture is resized to (width, height). `folder` is the model's, as
    diffusers saves it, or its id on the hub: SDXL, SD3, FLUX, ... A negative prompt that it can't
    read is left out with a warning; `steps` and `guidance` default to the model's own.

    Raises:
        ModelError: no such folder, or no text-to-image model.
        InputError: the model itself refuses the arguments.
    """
    opened = open_model(str(folder))
    if not isinstance(opened, DiffusersFolder):
        raise ModelError(f"{folder} is no text-to-image model; {_WANTED}")
    import diffusers  # seconds, which a wrong name needn't cost

    names = {value: name for name, value in DTYPES.items()}
    engine = DiffusersEngine(opened, torch.device(device),
                             dtype if isinstance(dtype, str) else names[dtype],
                             loader=diffusers.AutoPipelineForText2Image)
    able = Abilities(engine.pipe.own)
    if not able.is_image:
        raise ModelError(f"{folder} is a {opened.class_name}, which makes clips; {_WANTED}")
    if negative and "negative" not in able.options:
        log.warning("%s reads no negative prompt; the first frame is drawn without", able.name)
        negative = None
    own = able.default_size() or (width, height)
    size = size_for_aspect(width / height, math.prod(own), able.multiple)
    request = Request(prompt=prompt, negative=negative or None, seed=seed, frames=1,
                      size=size[::-1], steps=steps, guidance=guidance)
    clip = engine.generate(request, on_event=on_event)
    assert isinstance(clip, Clip)
    assert clip.recipe is not None
    place = Path(folder).resolve() if Path(folder).is_dir() else folder
    record = {"option": "first_frame_model", "path": str(place)}
    record |= {name: clip.recipe[name] for name in ("model", "plan", "dtype")}
    return fit(clip.frames[0], height, width), record


def with_first_frame(
    request: Request, size: tuple[int, int], device: torch.device, dtype: str
) -> tuple[Request, Inputs]:
    """Draw a request's first frame of (width, height) `size`; return the request and its inputs."""
    assert request.first_frame_model is not None
    seed = draw_seed() if request.seed is None else request.seed
    picture, record = draw_first_frame(request.first_frame_model, request.prompt, request.negative,
                                       seed, *size, device=device, dtype=dtype)
    request = request.replace(image=picture, first_frame_model=None, seed=seed)
    inputs = read_inputs(request)
    inputs.records.append(record)
    return request, inputs
