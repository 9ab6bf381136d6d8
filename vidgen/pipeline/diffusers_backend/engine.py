"""Run other families (LTX-Video, HunyuanVideo, CogVideoX, ...) by diffusers, as requests and clips.

The adapter follows the signature of a pipeline's call, so most unknown families work:

    read the inputs -> make the plan -> call the pipeline -> write

The state of a pipeline between two steps can't be read or set, so a journal keeps its result and
the segments encoded since; interrupted denoising starts again.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
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
from vidgen.pipeline.diffusers_backend.pipe import LoadedPipeline, Made
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
from vidgen.pipeline.types import OnPreview, Progress, Report, draw_seed, reporter
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
        offload: "none" keeps the model on the device, "stage" one component and "block" one layer
            at a time; the CPU ignores it.
        loader: diffusers class that loads the folder; None: the class that the folder names.

    Raises:
        ModelError: the installed diffusers has no such class, or files are missing or damaged.
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
        on_estimate: Callable[[Any], None] | None = None,  # noqa: ARG002  no estimates exist
        on_preview: OnPreview | None = None, journal: Journal | Sequence[Journal] | None = None,
        **options: Any,
    ) -> Clip | list[Clip]:
        """Make a clip, or a list of clips if `count` is over 1; see `Engine.generate`.

        `on_estimate` isn't called. A clip whose pipeline finished resumes after its last finished
        segment.

        Raises:
            InputError: an option that this family can't honour; the message lists those it can.
        """
        request = Request.of(prompt, options, count)
        if on_preview is not None:
            raise InputError(f"{self.folder.name} shows no previews; leave --preview out")
        journals = journals_of(journal, count)
        enforce(self.policy, request)
        request, inputs = self._read(recall(request, journals))
        given = next((option for option in ("video", "image") if request.has(option)), None)
        able = Abilities(self.pipe.taking(given))
        scheduler = make_scheduler(able.pipe.scheduler, request)
        first = make_diffusers_plan(request, inputs, able, scheduler)
        plans = [replace(first, seed=first.seed + index) for index in range(count)]

        @cache  # shared by clips of equal length
        def track(num_frames: int) -> Soundtrack:
            return make_soundtrack(request, num_frames, first.fps, self, has_sound=able.has_sound)

        recipes = []
        for plan, kept in zip(plans, journals, strict=True):
            recipe = make_diffusers_recipe(self, plan, request, inputs)
            recipe = _as_settled(recipe, kept.recipe)
            known = recipe["plan"]["kept_frames"]  # None: known when the clip is made
            recipes.append(stamped(recipe | (track(known).facts if known else {}), kept.recipe))
            kept.check(recipes[-1])

        clips = []
        for index, (plan, recipe, kept) in enumerate(zip(plans, recipes, journals, strict=True), 1):
            if kept.finished:
                clips.append(kept.clip())
                continue
            report = reporter(on_event, index, count)
            with kept.running(recipe):
                made = self._made(plan, scheduler, request, inputs, able, kept, report)
                frames = made[0][: plan.kept_frames]
                if request.frames is not None and len(frames) < request.frames:
                    log.warning("%s made %d of the %d requested frames", plan.pipeline,
                                len(frames), request.frames)
                height, width = frames.shape[1:3]
                settled = replace(plan, width=width, height=height, kept_frames=len(frames),
                                  num_frames=plan.num_frames or len(made[0]))
                sound = track(len(frames))
                whole = recipe | {"plan": plan_facts(settled)} | sound.facts
                kept.keep_recipe(whole)
                clip = _clip(plan, made, whole, able.strides.t, kept)
                clips.append(sound.under(clip, plan.seed, partial(report, "sound"), kept))
        return clips if count > 1 else clips[0]

    def close(self) -> None:
        """Free the memory; the engine can't be used afterwards."""
        self.pipe.close()

    def _read(self, request: Request) -> tuple[Request, Inputs]:
        able = Abilities(self.pipe.own)
        able.refuse(request)
        if request.first_frame_model is None:
            return request, read_inputs(request)
        size = request.size or able.default_size() or (512, 512)
        return with_first_frame(request, size, self.device, self.dtype)

    def _made(
        self, plan: DiffusersPlan, scheduler: Any, request: Request, inputs: Inputs,
        able: Abilities, kept: Journal, report: Report,
    ) -> Made:
        """Return the pipeline's result, from the journal if it has one."""
        if (earlier := kept.kept_arrays(MADE, "frames")) is not None:
            arrays, facts = earlier
            return arrays["frames"], arrays.get("sound"), facts["sound_rate"]

        def on_step(done: int, total: int) -> None:
            kept.keep_job()
            report("sample", done, total)

        report("prompt", 0, 1)
        arguments = _arguments(plan, request, inputs, able)
        frames, sound, rate = self.pipe.make(able, plan, scheduler, arguments, on_step)
        arrays = {"frames": frames} | ({} if sound is None else {"sound": sound})
        kept.keep_arrays(MADE, arrays, {"num_frames": len(frames), "finished": True,
                                        "sound_rate": rate})
        return frames, sound, rate


def _arguments(
    plan: DiffusersPlan, request: Request, inputs: Inputs, able: Abilities
) -> dict[str, Any]:
    def picture(pixels: Frames) -> Image.Image:
        if plan.width and plan.height:
            pixels = fit(pixels, plan.height, plan.width, plan.fit)
        return Image.fromarray(pixels)

    wanted: dict[str | None, Any] = {  # key None: the pipeline has no such parameter
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
    # noise from the CPU is equal on every device, alone or in a batch
    generator = torch.Generator("cpu").manual_seed(plan.seed)
    return given | {"generator": generator, "output_type": "np"}


def _clip(
    plan: DiffusersPlan, made: Made, recipe: dict[str, Any], stride_t: int, journal: Journal
) -> Clip:
    whole, sound, sound_rate = made
    frames = whole[: plan.kept_frames]
    count, height, width = frames.shape[:3]

    def chunks(start: int = 0) -> Iterator[Frames]:
        if start < count:
            yield frames[start:]

    if sound is not None:
        sound = sound[: round(float(count / plan.fps) * sound_rate)]
    info = ClipInfo(plan.fps, (width, height), count, sound, sound_rate, recipe, stride_t=stride_t)
    return Clip(chunks, info, journal=journal)


def _as_settled(recipe: dict[str, Any], earlier: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a recipe with size and length of an `earlier` one, if both requested the same."""
    if earlier is None or not isinstance(plan := earlier.get("plan"), dict):
        return recipe
    asked, before = ({name: each.get("request", {}).get(name) for name in _ASKED}
                     for each in (recipe, earlier))
    if json.loads(json.dumps(asked)) != before:
        return recipe
    known = {name: plan[name] for name in _SETTLED if plan.get(name) is not None}
    return recipe | {"plan": recipe["plan"] | known}


def with_first_frame(
    request: Request, size: tuple[int, int], device: torch.device, dtype: str
) -> tuple[Request, Inputs]:
    """Draw a request's first frame of (width, height) `size`; return the request and its inputs."""
    assert request.first_frame_model is not None
    seed = draw_seed() if request.seed is None else request.seed
    picture, record = draw_first_frame(request.first_frame_model, size, device, dtype, seed=seed,
                                       prompt=request.prompt, negative=request.negative)
    request = request.replace(image=picture, first_frame_model=None, seed=seed)
    inputs = read_inputs(request)
    inputs.records.append(record)
    return request, inputs


def draw_first_frame(
    model: str, size: tuple[int, int], device: torch.device, dtype: str, *,
    on_event: Callable[[Progress], None] | None = None, **options: Any,
) -> tuple[Frames, dict[str, Any]]:
    """Draw a picture with a text-to-image model; return uint8 [height, width, 3] and its record.

    The model draws in the aspect of (width, height) `size` at its own area, which suits it best;
    the result is resized. A negative prompt that it can't read is left out with a warning.

    Args:
        model: folder or hub id, as diffusers saves it: SDXL, SD3, FLUX, ...
        options: of the request: prompt, negative, seed, steps, guidance.

    Raises:
        ModelError: no such folder, or no text-to-image model.
        InputError: the model refuses the arguments.
    """
    opened = open_model(model)
    if not isinstance(opened, DiffusersFolder):
        raise ModelError(f"{model} is no text-to-image model; {_WANTED}")
    import diffusers  # takes seconds, which a wrong name needn't cost

    engine = DiffusersEngine(opened, device, dtype, loader=diffusers.AutoPipelineForText2Image)
    able = Abilities(engine.pipe.own)
    if not able.is_image:
        raise ModelError(f"{model} is a {opened.class_name}, which makes clips; {_WANTED}")
    if options.get("negative") and "negative" not in able.options:
        log.warning("%s reads no negative prompt; the first frame is drawn without", able.name)
        options["negative"] = None
    width, height = size
    own = able.default_size() or size
    drawn = size_for_aspect(width / height, math.prod(own), able.multiple)
    options["negative"] = options.get("negative") or None
    clip = engine.generate(Request(frames=1, size=drawn[::-1], **options), on_event=on_event)
    assert isinstance(clip, Clip)
    assert clip.recipe is not None
    place = str(Path(model).resolve()) if Path(model).is_dir() else model
    record = {"option": "first_frame_model", "path": place}
    record |= {name: clip.recipe[name] for name in ("model", "plan", "dtype")}
    return fit(clip.frames[0], height, width), record
