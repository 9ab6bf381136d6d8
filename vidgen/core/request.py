"""The request: all that shapes one clip, as one checked value.

`Request` is the only place where an option's limits, help and default stand. Options of the command
line, Python's keywords, fields of the HTTP API and the reference table of the docs are made of its
fields. A field left None takes the model's default. Whatever can be checked without a model is
checked on construction; the rest when the plan is made.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from fractions import Fraction
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
"""First character of a text of `say` that names a sound file."""
WHAT, CONDITIONS, LENGTH, SOUND, MODEL, OUTPUT = GROUPS = (
    "What", "Conditions", "Length and size", "Sound", "Model and memory", "Output")
"""Headings of help."""
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
"""Names of other programs for some options."""
_ELSEWHERE = {
    "output": "save the clip: clip.save(PATH)",
    "overwrite": "clip.save(PATH, overwrite=True) takes it",
    "label": "clip.save(PATH, label='visible') takes it",
    "aigc": "clip.save(PATH, aigc='PRODUCER') takes it",
    "count": "give it to generate: engine.generate(PROMPT, count=N)",
    "strict": "read clip.findings after clip.save",
    "retry": "read clip.findings after clip.save, and generate with another seed",
    "resume": "give a journal: vidgen.Journal(PATH, resume=True)",
    "preview": "give on_preview, which is shown small frames",
    "events": "give on_event, which is told of the progress",
}
"""Options of the command line that no request has, and what takes them in Python."""
_NEEDS = {
    "strength": ("video",), "mask": ("video", "image"),
    "control_scale": ("control", "video", "image", "last_image", "frame", "reference", "prefix"),
    "audio_loop": ("audio", "audio_model"), "follow_audio": ("audio",),
    "audio_prompt": ("audio_model",), "voice": ("say",),
}
_FILES = ("image", "last_image", "mask", "video", "prefix", "control")
_OF_SOUND = "audio_"
"""First part of the names of settings that shape a model's own sound."""

OnePicture = Annotated[Any, PlainValidator(values.parse_picture, json_schema_input_type=str)]
OneFile = Annotated[Any, PlainValidator(values.parse_file, json_schema_input_type=str)]


def option(
    default: Any, group: str, text: str, metavar: str | None = None, *, basic: bool = False,
    **limits: Any,
) -> Any:
    """Declare a field of the request.

    Args:
        default: if it is left out; None is the model's own.
        metavar: name of its value on the command line.
        basic: whether `--help` lists it, not only `--help-all`.
    """
    extra: dict[str, Any] = {"group": group, "metavar": metavar, "basic": basic}
    return Field(default, description=text, json_schema_extra=extra, **limits)


class Options(BaseModel):
    """Options that are checked when they are given; None leaves one out.

    Raises:
        OptionError: on construction, with the value, the limit and the remedy.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, arbitrary_types_allowed=True)

    def __init__(self, /, **options: Any) -> None:
        try:
            super().__init__(**options)
        except ValidationError as error:
            raise self._refusal(error) from None

    def replace(self, **options: Any) -> Self:
        """Return a copy with other values of some options, checked again."""
        given = {name: getattr(self, name) for name in self.model_fields_set}
        return type(self)(**given | options)

    @model_validator(mode="before")
    @classmethod
    def _given(cls, options: dict[str, Any]) -> dict[str, Any]:
        """Take numbers of other libraries as Python's own."""
        return {name: values.plain(value) for name, value in options.items()}

    @field_validator("*", mode="wrap")
    @classmethod
    def _named(
        cls, value: Any, check: ValidatorFunctionWrapHandler, info: ValidationInfo
    ) -> Any:
        """Name the option in the refusals of its own validators."""
        try:
            return check(value)
        except OptionError:
            raise
        except InputError as error:
            raise OptionError(str(error), str(info.field_name)) from None

    @classmethod
    def _unknown(cls, name: str) -> str:
        """Return the message for an option that doesn't exist."""
        if (meant := CALLED.get(name, name)) in _ELSEWHERE:
            return f"{name} is no option of a clip; {_ELSEWHERE[meant]}"
        if meant in Loading.model_fields:
            return f"{name} is no option of a clip; give {meant} to vidgen.load"
        known = set(cls.model_fields) - {"prompt"}
        return f"unknown option {name!r}; {nearest(name, known, CALLED)}"

    @classmethod
    def _refusal(cls, error: ValidationError) -> OptionError:
        """Say what the first invalid option was given, what it takes, and what to do."""
        problems = error.errors(include_url=False)
        found = next((each for each in problems if each["type"] == "extra_forbidden"), problems[0])
        name, value, kind = str(found["loc"][0]), found["input"], found["type"]
        if kind == "extra_forbidden":
            return OptionError(cls._unknown(name), name, "unknown")
        if kind == "missing":
            return OptionError(f"{name} is missing; give it", name, "missing")
        if kind == "string_type" and (name == "prompt" or value is not None):
            told = f"{name} must be text, not {quoted(value)}"
        elif value is None:
            told = f"{name} is None; leave it out, or give a value"
        elif kind == "string_pattern_mismatch":
            told = f"the {name} is empty; say what is to be seen"
        elif kind == "string_too_long":
            limit = found["ctx"]["max_length"]
            told = f"{name} has {len(value)} characters; shorten it to {limit}"
        elif kind == "string_unicode":
            told = values.broken_text(name, value)
        elif kind == "literal_error":
            choices = found["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", ")
            told = f"{name} is {quoted(value)}; {nearest(str(value), choices)}"
        else:
            words = expected(cls.model_fields[name]) or found["msg"].removeprefix("Value error, ")
            told = f"{name} is {quoted(value)}; {words}"
        return OptionError(told, name)


class Loading(Options):
    """How a model is loaded; see `vidgen.load`."""

    model: str = option(
        "toybox", MODEL, "name, folder or hub id",
        "NAME|FOLDER|HUB_ID", basic=True, max_length=4096)
    dtype: Literal["fp32", "bf16", "fp16"] | None = option(
        None, MODEL, "number format of the computation; default the fastest here")
    offload: Annotated[
        Literal["none", "stage", "block"] | None,
        BeforeValidator(lambda value: None if value == "auto" else value)] = option(
        None, MODEL, "keep all, one stage or two blocks of the model in memory; default the first "
        "of them that fits", basic=True)
    quantize: Literal["int8"] | None = option(
        None, MODEL, "keep the linear layers' weights in 8 bits, half the memory", basic=True)
    devices: int | None = option(
        None, MODEL, "devices that share the work; default 1", "N", ge=1, le=MAX_DEVICES)
    shard: bool | None = option(
        None, MODEL, "spread the transformer's weights over the devices")
    tiles: Annotated[str, AfterValidator(values.check_tiles)] = option(
        "auto", MODEL, "rows x columns in which the VAE takes a picture; auto cuts it if the whole "
        "doesn't fit the memory", "auto|none|RxC")
    attention: Attention = option(
        "auto", MODEL, "attention back end; one that can't run here is replaced with a warning, or "
        "refused with --strict; auto is the fastest with PyTorch's own error")


class Saving(Options):
    """How clips are kept; see `Clip.save`."""

    count: int = option(
        1, OUTPUT, "clips to make, of seeds N, N+1, ...", "N", basic=True, ge=1, le=1000)
    strict: bool = option(
        False, OUTPUT, "fail if the checks of a clip find it faulty, or if --attention can't be "
        "used")
    retry: int = option(
        0, OUTPUT, "try up to N further seeds if the checks find faults", "N", ge=0, le=100)
    label: Literal["none", "visible"] = option(
        "none", OUTPUT, "visible: burn a label into the first 2 seconds; otherwise only the file "
        "is marked")
    aigc: str | None = option(
        None, OUTPUT, "write the AIGC field of GB 45438-2025 for this producer", "PRODUCER",
        max_length=200)

    @property
    def marks(self) -> dict[str, str]:
        """The marks of a file as its recipe holds them: `label` and `aigc`, where given."""
        given = {"label": self.label, "aigc": self.aigc}
        return {name: value for name, value in given.items() if value not in (None, "none")}


class Request(Options):
    """One generation. Each field's description is the help of its option."""

    prompt: str = option(
        ..., WHAT, "what the clip shows, up to 20,000 characters; models read fewer", "PROMPT",
        basic=True, max_length=MAX_PROMPT, pattern=r"\S")
    negative: str | None = option(
        None, WHAT, "what the clip must not show", "TEXT", basic=True, max_length=MAX_PROMPT)
    seed: int | None = option(
        None, WHAT, "same seed, same clip; drawn and recorded if left out", "N", basic=True,
        ge=0, le=2**63 - 1)
    steps: int | None = option(
        None, WHAT, "denoising steps", "N", basic=True, ge=1, le=1000)
    guidance: float | None = option(
        None, WHAT, "classifier-free guidance scale; 1 turns it off", "G", basic=True, ge=0, le=100)
    guidance_low: float | None = option(
        None, WHAT, "guidance of the low-noise expert, for models that have two", "G", ge=0, le=100)
    guidance_interval: Annotated[
        tuple[float, float], PlainValidator(values.parse_interval)] | None = option(
        None, WHAT, "guide between these two noise levels only, from 0 to 1", "LOW HIGH")
    guidance_rescale: float | None = option(
        None, WHAT, "0 to 1, against over-saturation by guidance", "X", ge=0, le=1)
    sampler: Annotated[Any, PlainValidator(values.check_sampler, json_schema_input_type=str)] = (
        option(None, WHAT, "euler, unipc or ancestral; in Python also a flow scheduler of "
               "diffusers, which brings its own shift", "NAME"))
    shift: float | None = option(
        None, WHAT, "shift of the noise schedule towards high noise", "X", gt=0, le=100)
    cache: Annotated[str, AfterValidator(values.check_cache)] = option(
        "none", WHAT, "leave out most of the transformer at steps that change little: none, "
        "first-block, magnitude or forecast; a lower threshold stays nearer to the full clip",
        "METHOD[:THRESHOLD]")
    readings: Annotated[str, AfterValidator(values.check_readings)] = option(
        "auto", WHAT, "meaning of words that the model doesn't know: auto takes the nearest known "
        "word, none leaves them", "auto|none|WORD=KNOWN,...")
    lora: Annotated[tuple[str, ...], PlainValidator(values.parse_loras)] = option(
        (), WHAT, "an adapter; add @high or @low for one expert only; repeatable",
        "PATH[:WEIGHT]", basic=True)
    settings: Annotated[dict[str, Any], PlainValidator(values.parse_settings)] = option(
        {}, WHAT, "a setting of this model alone; vidgen models lists them; repeatable",
        "KEY=VALUE", basic=True)
    latents: Any = option(None, WHAT, "initial noise [B, C, F, h, w] in place of the seed's")

    image: OnePicture | None = option(None, CONDITIONS, "the first frame", "IMAGE", basic=True)
    last_image: OnePicture | None = option(
        None, CONDITIONS, "the last frame", "IMAGE", basic=True)
    frame: Annotated[tuple[Any, ...], PlainValidator(values.parse_frames)] = option(
        (), CONDITIONS, "a frame at any time; repeatable", "SECONDS=IMAGE")
    reference: Annotated[tuple[Any, ...], PlainValidator(values.parse_pictures)] = option(
        (), CONDITIONS, "a picture of a subject to show; repeatable", "IMAGE", basic=True)
    video: OneFile | None = option(None, CONDITIONS, "a clip to start from", "CLIP", basic=True)
    strength: float | None = option(
        None, CONDITIONS, "0 keeps --video, 1 ignores it", "X", ge=0, le=1)
    mask: OnePicture | None = option(
        None, CONDITIONS, "white where --video or --image may change", "IMAGE|CLIP")
    control: OneFile | None = option(
        None, CONDITIONS, "depth, pose or edges to follow (Wan VACE)", "CLIP")
    control_scale: float | None = option(
        None, CONDITIONS, "strength of the conditions in such a model; trained with 1", "X",
        ge=0, le=10)
    first_frame_model: str | None = option(
        None, CONDITIONS, "folder of a text-to-image model that draws the first frame", "FOLDER",
        max_length=4096)
    prefix: OneFile | None = option(
        None, CONDITIONS, "a clip to continue; the new clip's length includes it", "CLIP")

    seconds: float | None = option(
        None, LENGTH, "length; the next reachable count of frames is made and trimmed", "S",
        basic=True, gt=0, le=MAX_SECONDS)
    frames: int | None = option(
        None, LENGTH, "exact number of frames, 1 more than a multiple of the model's temporal "
        "stride; instead of --seconds", "N", ge=1, le=100_000)
    fps: Annotated[Fraction, BeforeValidator(values.parse_fps)] | None = option(
        None, LENGTH, "frames per second, such as 12 or 24000/1001", "F", ge=1, le=240)
    size: Annotated[tuple[int, int], PlainValidator(values.parse_size)] | None = option(
        None, LENGTH, "width and height in pixels", "WxH", basic=True)
    fit: Fit = option("crop", LENGTH, "treatment of pictures of another aspect")

    audio: OneFile | None = option(
        None, SOUND, "none, the model's own, or the sound of a file; default the model's own if it "
        "makes sound", "none|generate|FILE", basic=True)
    audio_loop: bool | None = option(
        None, SOUND, "repeat sound that is shorter than the clip; otherwise silence follows")
    follow_audio: bool | None = option(
        None, SOUND, "match the picture to the sound of --audio FILE, by a model that makes sound")
    audio_model: str | None = option(
        None, SOUND, "folder of a text-to-audio model that makes the sound", "FOLDER",
        max_length=4096)
    audio_prompt: str | None = option(
        None, SOUND, "prompt of --audio-model; default PROMPT", "TEXT", max_length=MAX_PROMPT)
    say: Annotated[tuple[Any, ...], PlainValidator(values.parse_said)] = option(
        (), SOUND, "speech at a time, or after the previous line; @FILE is recorded speech; "
        "repeatable", "[SECONDS=]TEXT|@FILE", basic=True)
    voice: str | None = option(
        None, SOUND, "voice of --say: one of espeak-ng; default en-us", "NAME", max_length=4096)

    @classmethod
    def of(cls, prompt: str | Request, options: Mapping[str, Any], count: int = 1) -> Request:
        """Return a request for `count` clips: of keywords, or with some of its options replaced.

        Raises:
            InputError: an option or the count is out of its limits, or they don't go together.
        """
        request = prompt.replace(**options) if isinstance(prompt, Request) else cls(
            prompt=prompt, **options)
        Saving(count=count)
        if request.latents is not None and count > 1:
            raise InputError(f"latents are the noise of one clip, but count is {count}; leave one "
                             "of them out")
        return request

    def has(self, option: str) -> bool:
        """Return whether an option was given."""
        value = getattr(self, option)
        return value is not None and not (isinstance(value, tuple | dict) and not value)

    @property
    def begins_with_image(self) -> bool:
        """Whether `image` is the first frame; under a mask alone it is the whole clip."""
        return self.image is not None and (self.mask is None or self.video is not None)

    @property
    def audio_file(self) -> File | None:
        """The file given as `audio`; None if that is a word or left out."""
        return None if self.audio in (None, NO_AUDIO, OWN_AUDIO) else self.audio

    @property
    def files(self) -> list[tuple[str, File]]:
        """Pictures, clips and sound given as files, each with its option."""
        given = [(name, getattr(self, name)) for name in _FILES]
        given += [("frame", picture) for _, picture in self.frame]
        given += [("reference", picture) for picture in self.reference]
        given.append(("audio", self.audio_file))
        return [(name, file) for name, file in given if isinstance(file, str | os.PathLike)]

    @property
    def wants_sound(self) -> bool:
        """Whether sound is asked for, so that an output must hold it."""
        return self.audio not in (None, NO_AUDIO) or bool(self.audio_model or self.say)

    @property
    def scheduler(self) -> Any:
        """The scheduler object given as `sampler`; None if that is a name or left out."""
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
            raise InputError("image and first_frame_model are both given; the first frame is one "
                             "of them")
        if self.scheduler is not None and self.shift is not None:
            raise InputError(f"shift is {self.shift}, but {type(self.scheduler).__name__} brings "
                             "its own; set it there")
        if self.audio_model is not None and self.audio not in (None, OWN_AUDIO):
            raise InputError(f"audio {str(self.audio)!r} and audio_model are both given; the sound "
                             "is one of them")
        return self


DEFAULTS: Mapping[str, Any] = {
    name: field.default for name, field in Request.model_fields.items()
}
"""Values of the options that a request leaves out."""


def limits_of(field: FieldInfo) -> dict[str, Any]:
    """Return the least and greatest values of an option: ge, gt and le, those that it has."""
    return {key: value for each in field.metadata for key in ("ge", "gt", "le")
            if (value := getattr(each, key, None)) is not None}


def expected(field: FieldInfo) -> str:
    """Return the words for values that an option takes; empty for other than flags and numbers."""
    kinds, limits = str(field.annotation), limits_of(field)
    if "bool" in kinds:
        return "give True or False"
    number = "a whole number" if "int" in kinds else "a number"
    if "gt" in limits:
        return f"give {number} above {limits['gt']}, {limits['le']} at most"
    return f"give {number} from {limits['ge']} to {limits['le']}" if limits else ""


def silenced(settings: Mapping[str, int | float | bool]) -> dict[str, Any]:
    """Return the options of a clip whose output can't hold sound, in place of its `settings`."""
    kept = {name: value for name, value in settings.items() if not name.startswith(_OF_SOUND)}
    return {"audio": NO_AUDIO, "settings": kept}
