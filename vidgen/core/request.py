"""The request: all options of one clip, validated.

`Request` is the only definition of an option's limits, help text and default. The options of the
command line, Python's keywords, the fields of the HTTP API and the reference tables of the docs are
generated from its fields. A field left None takes the model's default. Construction checks all that
needs no model; making the plan checks the rest.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import partial
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from vidgen.core import values
from vidgen.core.errors import InputError, OptionError, nearest, quoted
from vidgen.core.values import MAX_PROMPT, Attention, File, Fit

MAX_DEVICES = 1024
MAX_SECONDS = 3600
NO_AUDIO, OWN_AUDIO = "none", "generate"
"""Values of `audio` that name no file."""
OWN_FILE = "@"
"""First character of a `say` text that names a sound file."""
PROMPT, CONDITIONS, LENGTH, SOUND, MODEL, OUTPUT = GROUPS = (
    "Prompt and sampling", "Conditions", "Length and size", "Sound", "Model and memory", "Output")
"""Headings of the command line's help and of the reference tables."""
CALLED = {
    "num_inference_steps": "steps", "sample_steps": "steps", "sampling_steps": "steps",
    "guidance_scale": "guidance", "cfg": "guidance", "cfg_scale": "guidance",
    "sample_guide_scale": "guidance", "flow_shift": "shift", "sample_shift": "shift",
    "scheduler": "sampler", "negative_prompt": "negative", "n_prompt": "negative",
    "generator": "seed", "base_seed": "seed", "height": "size", "width": "size",
    "resolution": "size", "num_frames": "frames", "frame_num": "frames", "duration": "seconds",
    "length": "seconds", "frame_rate": "fps", "init_image": "image", "first_frame": "image",
    "last_frame": "last_image", "num_videos_per_prompt": "count", "n": "count",
    "torch_dtype": "dtype", "precision": "dtype",
}
"""Names that other programs use for some options."""
_ELSEWHERE = {
    "output": "save the clip: clip.save(PATH)",
    "overwrite": "pass it to save: clip.save(PATH, overwrite=True)",
    "label": "pass it to save: clip.save(PATH, label='visible')",
    "aigc": "pass it to save: clip.save(PATH, aigc='PRODUCER')",
    "count": "pass it to generate: engine.generate(PROMPT, count=N)",
    "strict": "read clip.findings after clip.save",
    "retry": "read clip.findings after clip.save, and generate with another seed",
    "resume": "pass a journal: vidgen.Journal(PATH, resume=True)",
    "preview": "pass on_preview, a callback that receives small frames",
    "events": "pass on_event, a callback that receives progress events",
}
"""Options of the command line that are no fields of a request, with their Python equivalents."""
_NEEDS = {
    "strength": ("video",), "mask": ("video", "image"),
    "control_scale": ("control", "video", "image", "last_image", "frame", "reference", "prefix"),
    "audio_loop": ("audio", "audio_model"), "follow_audio": ("audio",),
    "audio_prompt": ("audio_model",), "voice": ("say",),
}
_FILES = ("image", "last_image", "mask", "video", "prefix", "control")
_SOUND_PREFIX = "audio_"
"""Prefix of the settings that shape a model's own sound."""


_AS_TEXT = partial(PlainValidator, json_schema_input_type=str)


def _parsed(parse: Callable[[Any], Any], remedy: str, kind: Callable[..., Any] = _AS_TEXT) -> Any:
    """Return a validator that parses a value; `remedy` is what to give instead of a wrong one."""
    def validate(value: Any) -> Any:
        try:
            return parse(value)
        except (ValueError, TypeError, AttributeError, ArithmeticError):
            raise ValueError(remedy) from None

    return kind(validate)


OnePicture = Annotated[Any, _parsed(
    values.parse_picture,
    "give the path of a file, a Pillow image, or a uint8 array [H, W, 3]")]
OneFile = Annotated[Any, _parsed(values.parse_file, "give the path of a file")]


def option(
    default: Any, group: str, text: str, metavar: str | None = None, *, basic: bool = False,
    **limits: Any,
) -> Any:
    """Declare a field of the request.

    Args:
        default: None stands for the model's default.
        text: help text.
        metavar: placeholder of the value in the command line's help.
        basic: list the option in `--help`, not only in `--help-all`.
        limits: limits of `pydantic.Field`, such as `ge` and `max_length`.
    """
    extra: dict[str, Any] = {"group": group, "metavar": metavar, "basic": basic}
    return Field(default, description=text, json_schema_extra=extra, **limits)


class Options(BaseModel):
    """Base of groups of options, validated on construction; None leaves an option out.

    Raises:
        OptionError: an invalid option; the message has the value, the limit and the remedy.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, arbitrary_types_allowed=True)

    def __init__(self, /, **options: Any) -> None:
        try:
            super().__init__(**options)
        except ValidationError as error:
            raise self._refusal(error) from None

    def replace(self, **options: Any) -> Self:
        """Return a copy with some options replaced, validated again."""
        given = {name: getattr(self, name) for name in self.model_fields_set}
        return type(self)(**given | options)

    @model_validator(mode="before")
    @classmethod
    def _given(cls, options: dict[str, Any]) -> dict[str, Any]:
        """Convert numbers of other libraries to Python's own."""
        return {name: values.plain(value) for name, value in options.items()}

    @field_validator("*", mode="wrap")
    @classmethod
    def _named(
        cls, value: Any, check: ValidatorFunctionWrapHandler, info: ValidationInfo
    ) -> Any:
        """Add the option's name to errors of its validators."""
        try:
            return check(value)
        except OptionError:
            raise
        except InputError as error:
            raise OptionError(str(error), str(info.field_name)) from None

    @classmethod
    def _unknown(cls, name: str) -> str:
        if (meant := CALLED.get(name, name)) in _ELSEWHERE:
            return f"{name} is not an option of a clip; {_ELSEWHERE[meant]}"
        if meant in Loading.model_fields:
            return f"{name} is not an option of a clip; pass {meant} to vidgen.load"
        known = set(cls.model_fields) - {"prompt"}
        return f"unknown option {name!r}; {nearest(name, known, CALLED)}"

    @classmethod
    def _refusal(cls, error: ValidationError) -> OptionError:
        """Return the error of the first unknown option, or else of the first invalid one."""
        problems = error.errors(include_url=False)
        found = next((each for each in problems if each["type"] == "extra_forbidden"), problems[0])
        name, value, kind = str(found["loc"][0]), found["input"], found["type"]
        if kind == "extra_forbidden":
            return OptionError(cls._unknown(name), name, "unknown")
        if kind == "missing":
            return OptionError(f"{name} is missing; give it", name, "missing")
        if kind == "string_type" and (name == "prompt" or value is not None):
            message = f"{name} must be text, not {quoted(value)}"
        elif value is None:
            message = f"{name} is None; leave it out, or give a value"
        elif kind == "string_pattern_mismatch":
            message = f"the {name} is empty; give a prompt that describes the clip"
        elif kind == "string_too_long":
            limit = found["ctx"]["max_length"]
            message = f"{name} has {len(value)} characters; shorten it to {limit}"
        elif kind == "string_unicode":
            message = values.broken_text(name, value)
        elif kind == "literal_error":
            choices = found["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", ")
            message = f"{name} is {quoted(value)}; {nearest(str(value), choices)}"
        else:
            own = found["msg"].removeprefix("Value error, ")
            remedy = own if kind == "value_error" else expected(cls.model_fields[name]) or own
            message = f"{name} is {quoted(value)}; {remedy}"
        return OptionError(message, name)


class Loading(Options):
    """Options of loading a model; see `vidgen.load`."""

    model: Annotated[str, BeforeValidator(
        lambda model: os.fspath(model) if isinstance(model, os.PathLike) else model)] = option(
        "toybox", MODEL, "model name, folder, or Hugging Face Hub id",
        "NAME|FOLDER|HUB_ID", basic=True, max_length=4096)
    dtype: Literal["fp32", "bf16", "fp16"] | None = option(
        None, MODEL, "data type of the computation; default: the fastest on this machine")
    offload: Annotated[
        Literal["none", "stage", "block"] | None,
        BeforeValidator(lambda value: None if value == "auto" else value)] = option(
        None, MODEL, "part of the model kept in memory: none keeps all, stage one stage, block two "
        "transformer blocks; default: the first that fits", basic=True)
    quantize: Literal["int8", "fp8"] | None = option(
        None, MODEL, "store the weights of linear layers in 8 bits, in half the memory", basic=True)
    devices: int | None = option(
        None, MODEL, "number of devices to run on; default 1", "N", ge=1, le=MAX_DEVICES)
    shard: bool | None = option(
        None, MODEL, "shard the transformer's weights across the devices")
    tiles: Annotated[str, _parsed(
        values.parse_tiles,
        "give auto, none, or rows and columns from 1 to 99, such as 2x3",
        AfterValidator)] = option(
        "auto", MODEL, "rows x columns of VAE tiles; auto tiles when a whole frame doesn't fit in "
        "memory", "auto|none|RxC")
    attention: Attention = option(
        "auto", MODEL, "attention back end; auto is the fastest one as accurate as PyTorch's; one "
        "that can't run here is replaced with a warning, or is an error with --strict")


class Saving(Options):
    """Options of saving clips; see `Clip.save`."""

    count: int = option(
        1, OUTPUT, "number of clips, with seeds N, N+1, ...", "N", basic=True, ge=1, le=1000)
    strict: bool = option(
        False, OUTPUT, "fail if the quality checks find a fault, or if the --attention back end "
        "can't run")
    retry: int = option(
        0, OUTPUT, "try up to N more seeds if the quality checks find a fault", "N", ge=0, le=100)
    label: Literal["none", "visible"] = option(
        "none", OUTPUT, "visible: burn the label \"AI generated\" into the first 2 seconds; the "
        "file's metadata is marked either way")
    aigc: str | None = option(
        None, OUTPUT, "write the AIGC metadata field of GB 45438-2025 for this producer",
        "PRODUCER", max_length=200)

    @property
    def marks(self) -> dict[str, str]:
        """`label` and `aigc` as a clip's recipe records them; those not given are left out."""
        given = {"label": self.label, "aigc": self.aigc}
        return {name: value for name, value in given.items() if value not in (None, "none")}


class Request(Options):
    """Options of one generation; the description of a field is the help text of its option."""

    prompt: str = option(
        ..., PROMPT, "text that describes the clip, up to 20,000 characters; models read fewer",
        "PROMPT", basic=True, max_length=MAX_PROMPT, pattern=r"\S")
    negative: str | None = option(
        None, PROMPT, "negative prompt: what the clip must not show", "TEXT", basic=True,
        max_length=MAX_PROMPT)
    seed: int | None = option(
        None, PROMPT, "random seed; the same seed makes the same clip; default: random, recorded",
        "N", basic=True, ge=0, le=2**63 - 1)
    steps: int | None = option(
        None, PROMPT, "number of denoising steps", "N", basic=True, ge=1, le=1000)
    guidance: float | None = option(
        None, PROMPT, "classifier-free guidance scale; 1 turns guidance off", "G", basic=True,
        ge=0, le=100)
    guidance_low: float | None = option(
        None, PROMPT, "guidance scale of the low-noise expert, for models with two experts", "G",
        ge=0, le=100)
    guidance_interval: Annotated[tuple[float, float], _parsed(
        values.parse_interval, "give two numbers from 0 to 1, the lower one first")
    ] | None = option(
        None, PROMPT, "apply guidance only between these noise levels, 0 to 1", "LOW HIGH")
    guidance_rescale: float | None = option(
        None, PROMPT, "guidance rescale, 0 to 1; higher values reduce over-saturation", "X",
        ge=0, le=1)
    sampler: Annotated[Any, _parsed(
        values.parse_sampler, "give a name, or one of diffusers' flow schedulers")] = option(
        None, PROMPT, "euler, unipc or ancestral; in Python also a flow scheduler of diffusers, "
        "with its own shift", "NAME")
    shift: float | None = option(
        None, PROMPT, "shift of the noise schedule toward high noise", "X", gt=0, le=100)
    cache: Annotated[str, _parsed(
        values.parse_cache,
        "give a threshold from 0 to 100 after the colon, such as forecast:0.1",
        AfterValidator)] = option(
        "none", PROMPT, "step cache, which skips most of the transformer at steps that change "
        "little: none, first-block, magnitude or forecast; a lower threshold is closer to the "
        "result without a cache", "METHOD[:THRESHOLD]")
    word_normalisation: Annotated[str, _parsed(
        values.check_word_normalisation,
        "give auto, none, or words and their replacements, such as bicylce=bicycle,taxi=car",
        AfterValidator)] = option(
        "auto", PROMPT, "replacement of words that the model doesn't know: auto takes the nearest "
        "known word, none keeps them", "auto|none|WORD=KNOWN,...")
    lora: Annotated[tuple[str, ...], _parsed(
        values.parse_loras, "give PATH or PATH:WEIGHT, or a list of them")] = option(
        (), PROMPT, "LoRA adapter; add @high or @low for one expert only; repeatable",
        "PATH[:WEIGHT]", basic=True)
    settings: Annotated[dict[str, Any], _parsed(
        values.parse_settings, "give a mapping, or a list of KEY=VALUE")] = option(
        {}, PROMPT, "model-specific setting; vidgen models lists them; repeatable",
        "KEY=VALUE", basic=True)
    latents: Any = option(
        None, PROMPT, "initial noise [B, C, F, h, w], instead of noise drawn from the seed")

    image: OnePicture | None = option(None, CONDITIONS, "first frame", "IMAGE", basic=True)
    last_image: OnePicture | None = option(None, CONDITIONS, "last frame", "IMAGE", basic=True)
    frame: Annotated[tuple[Any, ...], _parsed(
        values.parse_frames, "give a list of pairs (seconds, picture)")] = option(
        (), CONDITIONS, "frame at a given time; repeatable", "SECONDS=IMAGE")
    reference: Annotated[tuple[Any, ...], _parsed(
        values.parse_pictures, "give a picture or a list of pictures, each the path of a file, a "
        "Pillow image, or a uint8 array [H, W, 3]")] = option(
        (), CONDITIONS, "reference image of a subject to show; repeatable", "IMAGE", basic=True)
    video: OneFile | None = option(
        None, CONDITIONS, "clip to start from (video to video)", "CLIP", basic=True)
    strength: float | None = option(
        None, CONDITIONS, "amount of change to --video: 0 keeps it, 1 ignores it", "X", ge=0, le=1)
    mask: OnePicture | None = option(
        None, CONDITIONS, "mask of --video or --image: white is generated, black is kept",
        "IMAGE|CLIP")
    control: OneFile | None = option(
        None, CONDITIONS, "control video: depth, pose or edges to follow (Wan VACE)", "CLIP")
    control_scale: float | None = option(
        None, CONDITIONS, "strength of the conditions of Wan VACE; trained with 1", "X", ge=0,
        le=10)
    first_frame_model: str | None = option(
        None, CONDITIONS, "folder of a text-to-image model that generates the first frame",
        "FOLDER", max_length=4096)
    prefix: OneFile | None = option(
        None, CONDITIONS, "clip to continue; the length includes it", "CLIP")

    seconds: float | None = option(
        None, LENGTH, "length in seconds; the next possible number of frames is generated and "
        "trimmed", "S", basic=True, gt=0, le=MAX_SECONDS)
    frames: int | None = option(
        None, LENGTH, "exact number of frames, 1 more than a multiple of the model's temporal "
        "stride; instead of --seconds", "N", ge=1, le=100_000)
    fps: Annotated[Fraction, _parsed(
        values.parse_fps, "give a number, or a fraction such as 24000/1001", BeforeValidator)
    ] | None = option(
        None, LENGTH, "frames per second, such as 12 or 24000/1001", "F", ge=1, le=240)
    size: Annotated[tuple[int, int], _AS_TEXT(values.parse_size)] | None = option(
        None, LENGTH, "width and height in pixels", "WxH", basic=True)
    fit: Fit = option("crop", LENGTH, "crop or pad pictures of another aspect ratio")

    audio: Annotated[Any, _parsed(
        values.parse_file, "give none, generate or the path of a file")] | None = option(
        None, SOUND, "none, generate (by the model) or an audio file; default: generate if the "
        "model makes sound", "none|generate|FILE", basic=True)
    audio_loop: bool | None = option(
        None, SOUND, "loop audio that is shorter than the clip; default: silence after its end")
    follow_audio: bool | None = option(
        None, SOUND, "generate the picture to match --audio FILE, with a model that makes sound")
    audio_model: str | None = option(
        None, SOUND, "folder of a text-to-audio model that generates the sound", "FOLDER",
        max_length=4096)
    audio_prompt: str | None = option(
        None, SOUND, "prompt for --audio-model; default: PROMPT", "TEXT", max_length=MAX_PROMPT)
    say: Annotated[tuple[Any, ...], _parsed(
        values.parse_speech, "give a list of texts or pairs (seconds, text)")] = option(
        (), SOUND, "speech at a time, or after the previous line; @FILE is recorded speech; "
        "repeatable", "[SECONDS=]TEXT|@FILE", basic=True)
    voice: str | None = option(
        None, SOUND, "espeak-ng voice of --say; default: en-us", "NAME", max_length=4096)

    @classmethod
    def of(cls, prompt: str | Request, options: Mapping[str, Any], count: int = 1) -> Request:
        """Return the request for a prompt with options, or a request with some options replaced.

        Args:
            count: number of clips to make, only checked.

        Raises:
            InputError: an option or `count` out of its limits, or options that conflict.
        """
        request = prompt.replace(**options) if isinstance(prompt, Request) else cls(
            prompt=prompt, **options)
        Saving(count=count)
        if request.latents is not None and count > 1:
            raise InputError(f"latents are the noise of one clip, but count is {count}; leave out "
                             "one of them")
        return request

    def has(self, option: str) -> bool:
        """Return whether an option was given."""
        value = getattr(self, option)
        return value is not None and not (isinstance(value, tuple | dict) and not value)

    @property
    def begins_with_image(self) -> bool:
        """True if `image` is the first frame; with a mask but no video it is the whole clip."""
        return self.image is not None and (self.mask is None or self.video is not None)

    @property
    def audio_file(self) -> File | None:
        """The file given as `audio`; None for "none", "generate" or no value."""
        return None if self.audio in (None, NO_AUDIO, OWN_AUDIO) else self.audio

    @property
    def files(self) -> list[tuple[str, File]]:
        """Pairs (option, path) of all pictures, clips and sound given as files."""
        given = [(name, getattr(self, name)) for name in _FILES]
        given += [("frame", picture) for _, picture in self.frame]
        given += [("reference", picture) for picture in self.reference]
        given.append(("audio", self.audio_file))
        return [(name, file) for name, file in given if isinstance(file, str | os.PathLike)]

    @property
    def wants_sound(self) -> bool:
        """True if an option asks for sound, which the output format must then support."""
        return self.audio not in (None, NO_AUDIO) or bool(self.audio_model or self.say)

    @property
    def scheduler(self) -> Any:
        """The scheduler object given as `sampler`; None for a name or no value."""
        return None if isinstance(self.sampler, str) else self.sampler

    @model_validator(mode="after")
    def _fits_together(self) -> Request:
        if self.seconds is not None and self.frames is not None:
            raise InputError("seconds and frames are both given; give one of them")
        for name, needs in _NEEDS.items():
            if self.has(name) and not any(self.has(other) for other in needs):
                raise OptionError(f"{name} needs {' or '.join(needs)}; add it or leave this out",
                                  name)
        if self.first_frame_model is not None and self.image is not None:
            raise InputError("image and first_frame_model are both given; give one of them")
        if self.scheduler is not None and self.shift is not None:
            raise InputError(f"shift is {self.shift}, but {type(self.scheduler).__name__} has its "
                             "own; set it there")
        if self.audio_model is not None and self.audio not in (None, OWN_AUDIO):
            raise InputError(f"audio {str(self.audio)!r} and audio_model are both given; give one "
                             "of them")
        return self


DEFAULTS: Mapping[str, Any] = {
    name: field.default for name, field in Request.model_fields.items()
}
"""Default of each option, by name."""


def limits_of(field: FieldInfo) -> dict[str, Any]:
    """Return the limits that an option has, as a mapping of "ge", "gt" and "le" to values."""
    return {key: value for each in field.metadata for key in ("ge", "gt", "le")
            if (value := getattr(each, key, None)) is not None}


def expected(field: FieldInfo) -> str:
    """Return the values an option takes, for a message; "" for anything but flags and numbers."""
    kinds, limits = str(field.annotation), limits_of(field)
    if "bool" in kinds:
        return "give True or False"
    number = "a whole number" if "int" in kinds else "a number"
    if "gt" in limits:
        return f"give {number} above {limits['gt']}, {limits['le']} at most"
    return f"give {number} from {limits['ge']} to {limits['le']}" if limits else ""


def silenced(settings: Mapping[str, int | float | bool]) -> dict[str, Any]:
    """Return options that turn sound off: `audio`, and `settings` without those of sound."""
    kept = {name: value for name, value in settings.items() if not name.startswith(_SOUND_PREFIX)}
    return {"audio": NO_AUDIO, "settings": kept}
