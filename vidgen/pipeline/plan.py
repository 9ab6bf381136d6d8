"""Turn a request into a plan: settle every open choice before any work.

The recipe stores the plan.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidgen.core.errors import InputError, ModelError, OptionError, nearest
from vidgen.core.request import MAX_SECONDS, Request
from vidgen.core.runtime import atomic_write, cache_folder
from vidgen.core.shapes import latent_shape
from vidgen.core.store import read_cache
from vidgen.core.values import parse_word_normalisation
from vidgen.diffusion.cache import CacheChoice, Magnitudes
from vidgen.diffusion.guidance import Guidance
from vidgen.diffusion.samplers import SAMPLERS
from vidgen.media.speech import Voice
from vidgen.models.tokenizer import PromptTokenizer, normalise_words
from vidgen.pipeline.denoise import (
    boundary_of,
    read_loras,
    sigma_split,
    sigmas_of,
    upsampling_of,
)
from vidgen.pipeline.inputs import Inputs, read_inputs
from vidgen.pipeline.settings import (
    SETTINGS,
    check_settings,
    check_tasks,
    makes_sound,
    settled_value,
    words_alone,
)
from vidgen.pipeline.types import Plan, draw_seed
from vidgen.weights.folder import DiffusersFolder
from vidgen.weights.layouts import open_model
from vidgen.weights.lora import parse_option

if TYPE_CHECKING:
    from vidgen.weights.family import ModelDefaults
    from vidgen.weights.folder import FewStepConfig, ModelFolder

log = logging.getLogger(__name__)

SAMPLING = ("sampler", "shift", "guidance", "guidance_low", "guidance_interval", "guidance_rescale")
"""Options of sampling that a distilled model fixes, as it does the settings of sampling."""
MAGNITUDES = "magnitudes.json"
"""File name of magnitudes, in a model's folder or in the user's cache by the model's hash."""
THRESHOLDS = {"first-block": 0.1, "magnitude": 0.05, "forecast": 0.2}
"""Defaults, with a PSNR of 32 dB or more to the clip without a cache; see docs/howto/speed.md."""
AT_ONE_RATE = ("control", "follow_audio")
"""Options that exclude temporal upsampling: their inputs are read at the clip's frame rate."""


def make_plan(
    request: Request, folder: ModelFolder, inputs: Inputs | None = None,
    tokenizer: PromptTokenizer | None = None, devices: int | None = 1,
) -> Plan:
    """Return the plan of a request for one clip; the model's defaults fill what it leaves open.

    Args:
        inputs: files that give the aspect ratio and length if the request doesn't; None: it names
            no files, or gives size and length.
        tokenizer: normalises words and checks the texts' lengths; None skips both.

    Raises:
        InputError: the model doesn't support a size, count, sampler, setting or text; the message
            names the nearest that it does.
    """
    check_settings(request, folder)
    defaults, vae = folder.defaults, folder.components["vae"].config
    patch, strides = folder.components["transformer"].config.patch_size, vae.strides
    few_step, read = _few_step(request, folder), inputs or Inputs()
    fps = request.fps or Fraction(defaults.fps).limit_denominator(1001)
    own_length = defaults.num_frames, defaults.num_frames
    num_frames, kept = read.length(request, fps, strides) or own_length
    own_size = defaults.width, defaults.height
    width, height = read.size(request, own_size, strides.hw * patch) or own_size
    shape = latent_shape(num_frames, height, width, strides, vae.latent_channels, patch=patch)
    _check_stills(request, fps, kept)
    if read.ending is not None:
        _check_beginning(read.ending.frames_at(fps), request, fps, kept)
    if kept > MAX_SECONDS * fps:
        raise InputError(f"{kept} frames at {float(fps):g} fps last {float(kept / fps):g} s; "
                         f"give fewer frames or a higher fps, for {MAX_SECONDS} s at most")
    _warn_unseen(defaults, width, height)
    if request.video is not None and request.strength is None and request.mask is None:
        raise InputError("a video needs strength or mask; give strength from 0 to 1 to vary the "
                         "video, or a mask to repaint a part of it")
    plan = Plan(
        prompt=request.prompt,
        negative=defaults.negative_prompt if request.negative is None else request.negative,
        seed=draw_seed() if request.seed is None else request.seed,
        width=width, height=height, num_frames=num_frames, kept_frames=kept, fps=fps,
        num_steps=few_step.num_steps if few_step else request.steps or defaults.num_steps,
        shift=float(request.shift or defaults.shift),
        sampler=few_step.sampler if few_step else _sampler(request.sampler or defaults.sampler),
        guidance=Guidance() if few_step else _guidance(request, folder, devices),
        strength=1.0 if request.strength is None else float(request.strength),
        control_scale=1.0 if request.control_scale is None else float(request.control_scale),
        fit=request.fit, latents=shape, few_step=few_step, cache=_cache(request, folder),
        encode_passes=int(settled_value("encode_passes", request, folder)),
        refine_steps=int(settled_value("refine", request, folder)),
        **_sound_of(request, folder), **_candidates(request, folder, devices),
    )
    plan = replace(plan, temporal_upsampling=_oversampling(plan, request, folder))
    _warn_of_idle_loras(plan, request, folder)
    return plan if tokenizer is None else _with_readings(plan, request, tokenizer)


def settle(folder: ModelFolder, request: Request, devices: int | None = 1) -> Plan:
    """Return the plan of a request without opening the model, whose weights may be absent.

    Errors are those of `make_plan` and of `read_inputs`.
    """
    dit = folder.components["transformer"].config
    check_tasks(request, folder.name, folder.tasks, both=dit.image_positions is not None)
    inputs = Inputs() if request.first_frame_model else read_inputs(request)
    tokenizer = PromptTokenizer(folder.tokenizer, dit.text_len) if folder.files else None
    return make_plan(request, folder, inputs, tokenizer, devices)


def _few_step(request: Request, folder: ModelFolder) -> FewStepConfig | None:
    """Return the model's distilled model if it fits the request, else None.

    It fits if the request has its step count and changes nothing else of sampling: no option of
    `SAMPLING`, no setting of sampling, no negative prompt, no step cache, no `strength` (which
    would begin between its noise levels), and no sound to follow.
    """
    few_step = folder.few_step
    asks_more = (
        any(map(request.has, SAMPLING))
        or any(SETTINGS[name].topic == "sampling" for name in request.settings)
        or request.negative not in (None, folder.defaults.negative_prompt)
        or request.cache != "none" or request.strength not in (None, 1) or request.follow_audio
    )
    if few_step is None or request.steps != few_step.num_steps or asks_more:
        return None
    return few_step


def _sampler(sampler: Any) -> str:
    if not isinstance(sampler, str):
        return type(sampler).__name__
    if sampler not in SAMPLERS:
        raise OptionError(f"sampler is {sampler!r}; {nearest(sampler, SAMPLERS)}", "sampler")
    return sampler


def _check_beginning(num_frames: int, request: Request, fps: Fraction, kept: int) -> None:
    if num_frames >= kept:
        raise InputError(f"the clip to continue has {num_frames} frames, which leaves nothing to "
                         f"generate in a clip of {kept}; give more seconds")
    if request.image is not None:
        raise InputError("image and prefix are both given, but a clip has one beginning; give one "
                         "of them")
    for seconds, _ in request.frame:
        if round(seconds * fps) < num_frames:
            raise InputError(f"frame {seconds} is within the clip to continue, which has "
                             f"{float(num_frames / fps):g} s; give a later time")


def _guidance(request: Request, folder: ModelFolder, devices: int | None) -> Guidance:
    """Return a request's guidance; --guidance alone is also that of low noise and of images."""
    defaults, requested = folder.defaults, request.guidance
    low = defaults.guidance_scale_2 if requested is None else None
    if request.guidance_low is not None:
        if defaults.boundary is None:
            raise OptionError(f"guidance_low is {request.guidance_low}, but this model has no "
                              "low-noise expert; leave it out", "guidance_low")
        low = float(request.guidance_low)
    known: float | None = settled_value("image_guidance", request, folder)
    why = None
    if "image_guidance" not in defaults.settings:
        known, why = None, SETTINGS["image_guidance"].missing
    elif requested is not None and "image_guidance" not in request.settings:
        known = float(requested)
    reach = int(settled_value("image_guidance_reach", request, folder, why))
    why = "guidance of references needs one device per clip" if (devices or 1) > 1 else None
    reference_scale = settled_value("reference_guidance", request, folder, why)
    return Guidance(
        scale=defaults.guidance_scale if requested is None else float(requested),
        interval=request.guidance_interval or defaults.guidance_interval,
        rescale=float(request.guidance_rescale or 0.0),
        low_scale=low, boundary=defaults.boundary or 0.0, known_scale=known,
        reference_scale=reference_scale if request.reference else 0.0, reach=reach,
    )


def _check_stills(request: Request, fps: Fraction, kept: int) -> None:
    """Refuse pictures after the clip's end, and two pictures for one frame."""
    known = [0] * request.begins_with_image + [kept - 1] * (request.last_image is not None)
    for seconds, _ in request.frame:
        known.append(round(seconds * fps))
        if known[-1] >= kept:
            raise InputError(f"frame is at {seconds:g} s, after the clip's last one at "
                             f"{float((kept - 1) / fps):.3g} s; give an earlier time or a "
                             "longer clip")
    for option in ("image", "last_image", "frame"):
        if kept == 1 and request.has(option) and request.mask is None:
            raise InputError(f"{option} leaves nothing to generate in a clip of one frame; give a "
                             "longer clip, or the picture as a reference")
    twice = {index for index in known if known.count(index) > 1}
    if twice:
        raise InputError(f"two pictures are given for frame {min(twice)}; give one of them, by "
                         "image, last_image or frame")


def _warn_unseen(defaults: ModelDefaults, width: int, height: int) -> None:
    sizes = [tuple(size) for size in defaults.sizes]
    if sizes and (width, height) not in sizes:
        known = ", ".join(f"{w}x{h}" for w, h in sizes)
        log.warning("the model wasn't trained at %dx%d, but at %s", width, height, known)


def _sound_of(request: Request, folder: ModelFolder) -> dict[str, Any]:
    """Return the plan's fields for the model's own sound; refuse its settings if it makes none."""
    if not makes_sound(request, folder.tasks):
        for name, plain in (("audio_steps", request.steps), ("audio_candidates", 1),
                            ("audio_delay", 0)):
            if (value := request.settings.get(name)) not in (None, plain):
                raise InputError(f"{name} is {value}, but it applies only to sound by the model "
                                 "itself, and this clip has none; leave it out")
        return {}
    return {"sound_steps": int(settled_value("audio_steps", request, folder)),
            "sound_candidates": int(settled_value("audio_candidates", request, folder)),
            "sound_delay_s": settled_value("audio_delay", request, folder)}


def _candidates(request: Request, folder: ModelFolder, devices: int | None) -> dict[str, Any]:
    """Return the plan's number of candidates and its strength of regional prompts."""
    why = None
    if "verifier" not in folder.components:
        why = f"{folder.name} has no verifier"
    elif request.strength not in (None, 1):
        why = "a clip that starts from another one shows the content of that one"
    alone = "regional prompts need one device per clip" if (devices or 1) > 1 else None
    binding = settled_value("regional_prompts", request, folder, why or alone)
    return {"candidates": int(settled_value("candidates", request, folder, why)),
            "regional_prompts": binding if words_alone(request) else 0.0}


def _cache(request: Request, folder: ModelFolder) -> CacheChoice | None:
    """Return the requested step cache; None if every step is computed."""
    method, _, threshold = request.cache.partition(":")
    if method == "none":
        return None
    choice = CacheChoice(method, float(threshold or THRESHOLDS[method]))
    if method != "magnitude":
        return choice
    known = read_magnitudes(folder)
    if known is None:
        raise InputError(f"the magnitudes of {folder.name} were never measured; run `vidgen models "
                         f"--measure {folder.given or folder.path}`, or give --cache forecast")
    return replace(choice, magnitudes=known)


def _oversampling(plan: Plan, request: Request, folder: ModelFolder) -> int:
    """Return the factor of temporal upsampling below the model's boundary."""
    own, requested = upsampling_of(folder), request.settings.get("temporal_upsampling")
    if requested not in (None, 1, own):
        remedy = ("has no temporal upsampling; leave it out" if own == 1 else
                  f"has temporal upsampling by {own}; give 1 or {own}")
        raise InputError(f"temporal_upsampling is {requested}, but {folder.name} {remedy}")
    if requested == 1 or own == 1:
        return 1
    why = _hindrance(plan, request, folder)
    if why is None:
        folder.components["vae"].config.steady_stages(own)
        return own
    if requested is not None:
        raise InputError(f"temporal_upsampling is {requested}, but this clip {why}; leave it out")
    return 1


def _hindrance(plan: Plan, request: Request, folder: ModelFolder) -> str | None:
    """Return the reason why a clip has one frame rate at all noise levels, or None."""
    given = [option for option in AT_ONE_RATE if request.has(option)]
    if given:
        return f"has {given[0]}, which is read at the clip's frame rate"
    if plan.sampler not in SAMPLERS:
        return f"is sampled by {plan.sampler}, which has its own noise levels"
    if plan.num_frames == 1:
        return "has a single frame"
    sigmas = sigmas_of(plan)
    split = sigma_split(plan, sigmas, folder)
    if split == len(sigmas) - 1 > 0 or (split == 0 and request.strength is None):
        return f"has no step on one side of the level {folder.defaults.boundary}"
    return None


def _with_readings(plan: Plan, request: Request, tokenizer: PromptTokenizer) -> Plan:
    """Add the normalised words; raise InputError for a text that a model of few words can't take.

    Other models truncate it.
    """
    texts = {"prompt": plan.prompt, "negative": plan.negative}
    given = parse_word_normalisation(request.word_normalisation)
    if given is None and request.lora:
        given = {}  # an unknown word may be one that an adapter learned
    readings = {word: known for text in texts.values()
                for word, known in tokenizer.replacements(text, given).items()}
    for name, text in texts.items():
        require_short(name, normalise_words(text, readings), tokenizer)
    return replace(plan, word_normalisation=tuple(readings.items()))


def _warn_of_idle_loras(plan: Plan, request: Request, folder: ModelFolder) -> None:
    two = "transformer_2" in folder.components
    if two and boundary_of(folder, plan, has_audio=bool(request.follow_audio)) is None:
        for option in request.lora:
            if parse_option(option).expert == "low":
                log.warning("%s has no effect: this clip uses the first expert alone, since it has "
                            "few steps or follows a sound", option)


def require_short(name: str, text: str, tokenizer: PromptTokenizer) -> None:
    """Raise InputError, with length and limit, if a text is too long for a model of few words."""
    count, limit = tokenizer.count(text), tokenizer.max_length
    if count > limit and tokenizer.words:
        raise InputError(f"the {name} has {count} tokens, this model reads {limit}; shorten it")


def require_models(request: Request, folder: ModelFolder) -> None:
    """Check that a request's adapters and further models exist and fit the main model.

    Raises:
        InputError: an adapter's file is missing.
        ModelError: a folder has no such model, or an adapter is of another model.
    """
    read_loras(request.lora, folder)
    for name in (request.first_frame_model, request.audio_model):
        if name is not None:
            open_model(name)
    if request.say:
        Voice(request.voice)


def require_own_model(folder: ModelFolder | DiffusersFolder) -> ModelFolder:
    """Return a folder that vidgen's own networks run; raise InputError if diffusers runs it."""
    if isinstance(folder, DiffusersFolder):
        raise InputError(f"{folder.class_name} can't be estimated; plan supports the embedded "
                         "model and the Wan family")
    return folder


def read_magnitudes(folder: ModelFolder) -> Magnitudes | None:
    """Return a model's magnitudes from its folder or the user's cache; None if it has none.

    A damaged file in the folder raises ModelError.
    """
    path = folder.path / MAGNITUDES
    if path.is_file():
        try:
            return _parse(json.loads(path.read_text("utf-8")))
        except (OSError, ValueError, LookupError, TypeError, AttributeError,
                RecursionError) as error:
            raise ModelError(f"{path} is damaged ({error}); copy it again") from None
    try:
        return _parse(read_cache(Path(MAGNITUDES).stem)[folder.content_hash])
    except (ValueError, KeyError, TypeError, AttributeError):
        return None  # missing or damaged: it is measured again


def write_magnitudes(found: Magnitudes, folder: ModelFolder, into: Path | None = None) -> Path:
    """Save a model's magnitudes in the user's cache, or in the folder `into`; return the path."""
    path, data = (into or cache_folder()) / MAGNITUDES, asdict(found)
    if into is None:
        data = {**read_cache(Path(MAGNITUDES).stem), folder.content_hash: data}
        path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(data).encode())
    return path


def _parse(data: Mapping[str, Any]) -> Magnitudes:
    sigmas = tuple(float(sigma) for sigma in data["sigmas"])
    logs = {str(name): tuple(map(float, each)) for name, each in data["logs"].items()}
    if len(sigmas) < 2 or any(len(each) != len(sigmas) for each in logs.values()):
        raise ValueError("its lists differ in length")
    return Magnitudes(sigmas, logs)
