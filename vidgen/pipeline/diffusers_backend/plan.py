"""Plan a clip of a diffusers pipeline, by the signature of its call.

Only two short tables name families, for facts that no signature holds.
"""

from __future__ import annotations

import inspect
import logging
import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from vidgen.core.errors import InputError, nearest
from vidgen.core.request import DEFAULTS, Request
from vidgen.core.shapes import Strides, check_num_frames, check_size
from vidgen.pipeline.inputs import Inputs
from vidgen.pipeline.types import draw_seed

if TYPE_CHECKING:
    from vidgen.core.values import Fit

log = logging.getLogger(__name__)

SIBLINGS = {
    ("LTXPipeline", "image"): "LTXImageToVideoPipeline",
    ("LTX2Pipeline", "image"): "LTX2ImageToVideoPipeline",
    ("SkyReelsV2DiffusionForcingPipeline", "image"):
        "SkyReelsV2DiffusionForcingImageToVideoPipeline",
    ("CogVideoXPipeline", "video"): "CogVideoXVideoToVideoPipeline",
}
"""Pipelines that add an option to another one and share its weights."""
RATES = {"HunyuanVideo": 24, "Mochi": 30}
"""Frame rates that families learned, if their published examples show another rate or none."""

_TEMPORAL = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio",
             "vae_temporal_scale_factor")
_SPATIAL = ("vae_scale_factor_spatial", "vae_spatial_compression_ratio",
            "vae_spatial_scale_factor", "vae_scale_factor")
_LENGTH = ("num_frames", "frames", "video_length")
_RATE = ("frame_rate", "fps")
_PLAIN = {"negative": "negative_prompt", "steps": "num_inference_steps", "image": "image",
          "last_image": "last_image", "guidance_rescale": "guidance_rescale", "latents": "latents"}
"""Options that correspond to one parameter."""
_ALWAYS = {"prompt", "seed", "fit", "audio", "audio_loop", "audio_model", "audio_prompt", "say",
           "voice"}
_FLOW = ("FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler")
_OWN_SCHEDULE = ("invert_sigmas", "stochastic_sampling", "use_karras_sigmas",
                 "use_exponential_sigmas", "use_beta_sigmas")
"""Settings that give two flow schedulers different noise levels."""


@dataclass(frozen=True)
class DiffusersPlan:
    """Choices that define a clip or picture; None leaves a value to the pipeline."""

    pipeline: str  # class name
    prompt: str
    negative: str | None
    seed: int
    width: int | None
    height: int | None
    num_frames: int | None
    kept_frames: int | None  # frames of the clip, the first ones of the result
    fps: Fraction
    num_steps: int | None
    guidance_scale: float | None  # of the pipeline's kind of guidance
    guidance_rescale: float | None
    sampler: str  # class name of the scheduler
    shift: float | None
    strength: float | None
    fit: Fit


def defaults_of(pipeline: type) -> dict[str, Any]:
    """Return the defaults of a pipeline's call, by parameter."""
    parameters = inspect.signature(pipeline.__call__).parameters
    return {p.name: p.default for p in parameters.values() if p.kind is not p.VAR_KEYWORD}


class Abilities:
    """A pipeline's parameters and attributes, and the `options` of a request that it can honour."""

    def __init__(self, pipe: Any) -> None:
        self.pipe, self.name = pipe, type(pipe).__name__
        self.defaults = defaults_of(type(pipe))  # `inspect.Parameter.empty` if required
        self._config = getattr(getattr(pipe, "transformer", None), "config", {})
        # frames and pixels a side of one latent
        self.strides = Strides(int(_first(pipe, _TEMPORAL) or 1), int(_first(pipe, _SPATIAL) or 8))
        patch = self._config.get("patch_size") or 1
        sides = [self.strides.hw * (patch if isinstance(patch, int) else patch[-1])]
        for name in ("video_processor", "image_processor"):  # which round sizes, too
            config = getattr(getattr(pipe, name, None), "config", {})
            sides.append(config.get("vae_scale_factor", 1))
        self.multiple = math.lcm(*sides)  # pixels a side of one token
        # parameters for the number of frames and the frame rate, or None
        self.length = next((name for name in _LENGTH if name in self.defaults), None)
        self.rate = next((name for name in _RATE if name in self.defaults), None)
        # with distilled guidance, the scale is an input of a model that has no unguided pass
        has_unguided = (self.defaults.get("true_cfg_scale") or 0) > 1
        self.is_distilled = "true_cfg_scale" in self.defaults and not has_unguided
        guidance = "true_cfg_scale" if has_unguided else "guidance_scale"
        self.guidance = guidance if guidance in self.defaults else None  # set by --guidance
        guider = getattr(pipe, "guider", None)  # guides if the call has no parameter for it
        guides = self.guidance is None and hasattr(guider, "guidance_scale")
        self.guider: Any = guider if guides else None
        self.is_image = self.length is None and "video" not in self.defaults
        self.has_sound = any(getattr(pipe, part, None) for part in ("audio_vae", "vocoder"))
        # HunyuanVideo repeats the picture in the first frames, which are cut off
        puts_first = self._config.get("image_condition_type") == "latent_concat"
        self.cut_frames = self.strides.t if puts_first else 0
        self.options = _ALWAYS | self._options()

    def _options(self) -> set[str]:
        known, makes_clips = self.defaults, not self.is_image
        # with `denoise_strength`, LTX's `strength` weights the given frames instead
        varies = {"video", "strength"} <= known.keys() and "denoise_strength" not in known
        varies |= (self.name, "video") in SIBLINGS
        # the input of a model of pictures is a picture to edit, not a first frame
        begins = makes_clips and ("image" in known or (self.name, "image") in SIBLINGS)
        is_flow = flow_shift(self.pipe.scheduler) is not None
        can = {option: name in known for option, name in _PLAIN.items()} | {
            "size": {"height", "width"} <= known.keys(),
            "guidance": self.guidance is not None or self.guider is not None,
            "frames": True, "seconds": makes_clips, "fps": makes_clips,
            "video": varies, "strength": varies, "image": begins, "first_frame_model": begins,
            "last_image": makes_clips and "last_image" in known,
            "negative": "negative_prompt" in known and not self.is_distilled,
            "sampler": is_flow, "shift": is_flow,
        }
        return {option for option, is_possible in can.items() if is_possible}

    def refuse(self, request: Request) -> None:
        """Raise InputError for the first option that can't be honoured; list those that can."""
        for name, own in DEFAULTS.items():
            value = getattr(request, name)
            is_set = type(value) is not type(own) or value != own  # doesn't compare arrays
            if is_set and name not in self.options:
                reason = ""
                if name == "negative" and self.is_distilled:
                    reason = " (its guidance is distilled)"
                asked = next(iter(request.settings)) if name == "settings" else name
                can = ", ".join(sorted(self.options - _ALWAYS))
                raise InputError(f"{asked} can't be honoured by {self.name}{reason}; "
                                 f"leave it out. It takes {can}")
        for option, kind in (("image", "Image"), ("video", "Video")):
            is_named = re.search(rf"{kind}(To|2)Video", self.name) is not None
            is_needed = self.defaults.get(option) is inspect.Parameter.empty or is_named
            drawn = option == "image" and request.first_frame_model is not None
            if is_needed and getattr(request, option) is None and not drawn:
                raise InputError(f"{self.name} starts from a given {option}; give --{option}")
        if self.is_image and request.frames not in (None, 1):
            raise InputError(f"frames is {request.frames}, but {self.name} makes one picture; "
                             "give --frames 1")

    def default_size(self) -> tuple[int, int] | None:
        """Return the default (width, height); None if the pipeline defines none."""
        pipe, config = self.pipe, self._config
        width, height = self.defaults.get("width"), self.defaults.get("height")
        if isinstance(width, int) and isinstance(height, int):
            return width, height
        if hasattr(pipe, "default_width"):
            return pipe.default_width, pipe.default_height
        if config.get("sample_width"):
            return (config["sample_width"] * self.strides.hw,
                    config["sample_height"] * self.strides.hw)
        if getattr(pipe, "default_sample_size", None):
            side = pipe.default_sample_size * self.strides.hw
            return side, side
        if hasattr(pipe, "default_aspect_ratio"):
            columns, rows = pipe.default_aspect_ratio
            sides = pipe.video_processor.calculate_default_height_width
            height, width = sides(rows, columns, pipe.target_size)
            return width, height
        return None

    def default_fps(self) -> Fraction:
        """Return the frame rate of the call, else of the example in its documentation, else 24."""
        own = self.defaults.get(self.rate or "")
        if isinstance(own, int | float):
            return Fraction(own).limit_denominator(1001)
        known = (fps for family, fps in RATES.items() if self.name.startswith(family))
        shown = re.search(r"fps=(\d+)", type(self.pipe).__call__.__doc__ or "")
        return Fraction(next(known, int(shown[1]) if shown else 24))

    def default_frames(self) -> int | None:
        """Return the number of frames of the call, else of the transformer's configuration."""
        own = self.defaults.get(self.length or "")
        return own if isinstance(own, int) else self._config.get("sample_frames")

    def default_guidance(self) -> float | None:
        """Return the guidance scale of the guider or the call."""
        if self.guider is not None:
            return float(self.guider.guidance_scale)
        own = self.defaults.get(self.guidance or "")
        return float(own) if isinstance(own, int | float) else None


def make_diffusers_plan(
    request: Request, inputs: Inputs, able: Abilities, scheduler: Any
) -> DiffusersPlan:
    """Return the plan of a request for a pipeline and its scheduler; see `Abilities.refuse`."""
    able.refuse(request)
    if "prompt" not in able.defaults:
        log.warning("%s takes no prompt; the prompt has no effect", able.name)
    fps = request.fps or able.default_fps()
    plays_other = request.fps and able.rate is None and request.fps != able.default_fps()
    if plays_other and not able.is_image:
        log.warning("%s always makes frames for %s fps; at %s fps the clip plays at another speed",
                    able.name, able.default_fps(), request.fps)
    num_frames, kept = (1, 1) if able.is_image else _length(request, inputs, able, fps)
    width, height = _size(request, inputs, able)
    own = able.defaults
    steps, rescale = own.get("num_inference_steps"), own.get("guidance_rescale")
    strength = request.strength if request.strength is not None else own.get("strength")
    return DiffusersPlan(
        pipeline=able.name, prompt=request.prompt, negative=request.negative,
        seed=draw_seed() if request.seed is None else request.seed,
        width=width, height=height, num_frames=num_frames, kept_frames=kept, fps=fps,
        num_steps=request.steps or (steps if isinstance(steps, int) else None),
        guidance_scale=able.default_guidance() if request.guidance is None else request.guidance,
        guidance_rescale=rescale if request.guidance_rescale is None else request.guidance_rescale,
        sampler=type(scheduler).__name__, shift=flow_shift(scheduler),
        strength=strength if request.video is not None else None, fit=request.fit,
    )


def flow_shift(scheduler: Any) -> float | None:
    """Return the shift of a flow scheduler, if it determines the noise levels, else None."""
    config = getattr(scheduler, "config", {})
    if type(scheduler).__name__ not in _FLOW or config.get("use_dynamic_shifting"):
        return None
    if type(scheduler).__name__ == "UniPCMultistepScheduler" and not config["use_flow_sigmas"]:
        return None
    return float(config["flow_shift"] if "flow_shift" in config else config["shift"])


def make_scheduler(own: Any, request: Request) -> Any:
    """Return the pipeline's own scheduler, or one with the request's sampler and shift."""
    import diffusers

    sampler, shift = request.sampler, request.shift
    if request.scheduler is not None:
        return request.scheduler
    if sampler is None and shift is None:
        return own
    shift = flow_shift(own) if shift is None else float(shift)
    kinds = {"euler": _FLOW[0], "unipc": _FLOW[1]}
    if sampler is not None and sampler not in kinds:
        raise InputError(f"sampler is {sampler!r}; {nearest(sampler, kinds)}")
    kind = type(own).__name__ if sampler is None else kinds[sampler]
    if kind == type(own).__name__:
        name = "flow_shift" if "flow_shift" in own.config else "shift"
        return type(own).from_config(own.config, **{name: shift})
    if any(own.config.get(name) for name in _OWN_SCHEDULE):
        raise InputError(f"sampler is {sampler!r}, but this model's noise schedule works only with "
                         f"its own {type(own).__name__}; leave it out")
    shared = {name: own.config[name]
              for name in ("num_train_timesteps", "shift_terminal", "time_shift_type")
              if name in own.config}
    if sampler == "euler":
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=shift, **shared)
    return diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction",
                                             use_flow_sigmas=True, flow_shift=shift, **shared)


def check_sides(width: int | None, height: int | None, multiple: int) -> None:
    """Raise InputError for a side that is no multiple; the message names the nearest ones."""
    for name, side in (("width", width), ("height", height)):
        if side is not None:
            check_size(name, side, multiple)


def _first(owner: Any, names: tuple[str, ...]) -> Any:
    return next((getattr(owner, name) for name in names if getattr(owner, name, None)), None)


def _length(
    request: Request, inputs: Inputs, able: Abilities, fps: Fraction
) -> tuple[int | None, int | None]:
    """Return the frames to generate and to keep."""
    own, known = able.default_frames(), inputs.length(request, fps, able.strides)
    if known is None:
        return own, None
    follows_strides = own is None or (own - 1) % able.strides.t == 0  # else the rule is unknown
    if request.seconds is None and request.frames is not None and follows_strides:
        check_num_frames(request.frames, able.strides)
    return known[0] + able.cut_frames, known[1]


def _size(request: Request, inputs: Inputs, able: Abilities) -> tuple[int | None, int | None]:
    if request.size is not None:
        check_sides(*request.size, able.multiple)
    elif "height" not in able.defaults:
        return None, None
    return inputs.size(request, able.default_size(), able.multiple) or (None, None)
