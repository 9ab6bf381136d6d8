"""What a person asks for: the command line's long options, as one checked value.

A field left None takes the model's own default. All that can be judged without a model is judged
when the request is made; what needs strides, limits or files is judged where those are known.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any, get_args

from vidgen.core.errors import InputError, nearest
from vidgen.core.values import (
    Fit,
    check_cache,
    check_flag,
    check_number,
    check_picture,
    check_sampler,
    check_text,
    check_tiles,
    check_whole,
    parse_fps,
    parse_frames,
    parse_interval,
    parse_loras,
    parse_pictures,
    parse_readings,
    parse_said,
    parse_settings,
    parse_size,
    plain,
    plain_picture,
)

if TYPE_CHECKING:
    from torch import Tensor

    from vidgen.core.values import Picture

MAX_PROMPT = 20_000
MAX_DEVICES = 1024
MAX_SECONDS = 3600
_TEXTS = {
    "prompt": MAX_PROMPT, "negative": MAX_PROMPT, "aigc": 200, "audio_prompt": MAX_PROMPT,
    "audio_model": 4096, "voice": 4096, "expand": 4096, "model": 4096, "first_frame_model": 4096,
}
"""The most characters of each."""
_NEVER_LEFT_OUT = ("count", "retry", "strict", "label", "fit", "tiles", "cache", "settings")
_WHOLE = {
    "seed": (0, 2**63 - 1), "frames": (1, 100_000), "steps": (1, 1000), "count": (1, 1000),
    "retry": (0, 100), "overlap": (1, 1000), "devices": (1, MAX_DEVICES),
}
_NUMBER = {
    "guidance": (0, 100), "guidance_low": (0, 100), "guidance_rescale": (0, 1),
    "strength": (0, 1), "control_scale": (0, 10), "colour_hold": (0, 1), "fps": (1, 240),
}
_ABOVE_ZERO = {"seconds": MAX_SECONDS, "shift": 100}
_FLAGS = ("roll", "audio_loop", "follow_audio", "strict", "shard")
_ARRAYS = {"image": True, "last_image": True, "mask": True, "video": False, "prefix": False,
           "control": False}
"""Options that take one picture or clip, and whether pixels will do for it."""
_CHOICE = {
    "fit": get_args(Fit), "dtype": ("fp32", "bf16", "fp16"),
    "offload": ("none", "stage", "block"), "quantize": ("int8",), "label": ("none", "visible"),
}
_NEEDS = {
    "strength": ("video",), "mask": ("video", "image"),
    "control_scale": ("control", "video", "image", "last_image", "frame", "reference", "prefix"),
    "audio_loop": ("audio", "audio_model"), "follow_audio": ("audio",),
    "audio_prompt": ("audio_model",), "voice": ("say",),
}
_ELSEWHERE = {
    "output": "save the clip: clip.save(PATH)",
    "overwrite": "clip.save(PATH, overwrite=True) takes it",
    "resume": "give a journal: vidgen.Journal(PATH, resume=True)",
    "preview": "give on_preview, which is shown small frames",
    "events": "give on_event, which is told of the progress",
    "attention": "choose it around the call: with vidgen.core.runtime.attention_by(NAME)",
}
"""What the command line takes beside a request's options, and who takes it in Python."""
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
"""What other programs call some options."""
NO_AUDIO, OWN_AUDIO = "none", "generate"
"""Values of `audio` that name no file."""
_OF_SOUND = "audio_"
"""What names of settings begin with that shape a model's own sound."""
OWN_FILE = "@"
"""What a text of `say` begins with that names a sound file."""
LOADING = ("model", "dtype", "offload", "quantize", "devices", "shard")
"""Options that say how a model is loaded, not what it makes."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One generation; see `vidgen generate --help` for the same words.

    Args:
        prompt: what is to be seen, 1 to 20,000 characters; models read fewer.
        negative: what is not to be seen.
        readings: how words are read that the model wasn't taught, of prompt and negative: "auto" as
            the known ones that are meant, "none" as written, or WORD=KNOWN, parted by commas.
        seed: 0 to 2**63 - 1; None draws one, which the recipe records.
        seconds: length; the nearest reachable count is generated and trimmed. Excludes `frames`.
        frames: exact number of frames, 1 modulo the model's temporal stride.
        fps: frames per second, as a number or fraction.
        size: (width, height) in pixels, or "WxH".
        fit: how pictures of another aspect are brought to the clip's: "crop" or "pad".
        steps: number of denoising steps.
        guidance: classifier-free guidance scale; 1 is the conditional pass alone.
        guidance_low: guidance of the low-noise expert, for models that have two.
        guidance_interval: (low, high) in sigma within which guidance acts; None is the model's own.
        cache: "none", "first-block", "magnitude" or "forecast", each with a `:THRESHOLD` behind it
            or without: leaves most of the transformer out at steps that change little.
        guidance_rescale: 0 to 1, how far the guided velocity's deviation is brought back.
        sampler: name of a sampler, or in Python any flow scheduler object of diffusers, which
            brings its own shift.
        shift: of the noise schedule towards high noise, above 0.
        image: the first frame, a path, a picture of Pillow or uint8 [H, W, 3].
        last_image: the last frame.
        frame: (seconds, picture) pairs, known frames at any time.
        reference: pictures of subjects that are to appear.
        mask: picture or video, white where new content is wanted; needs `video` or `image`.
        video: a clip to start from; with `strength`, to re-imagine.
        strength: 0 keeps `video`, 1 ignores it.
        prefix: a clip to go on from: it begins the new clip, whose length counts it in.
        roll: whether the clip is rolled out turn by turn while it is written, by a model with a
            roller; see docs/stream.md.
        overlap: latent frames that the windows of a long clip share; see docs/extend.md.
        colour_hold: 0 to 1, how far a window's colours are brought back to the clip's.
        control: a clip whose depth, pose or edges to follow, for models that can (Wan VACE).
        control_scale: how strongly conditions act in such a model, 1 as trained.
        first_frame_model: folder of a text-to-image model that draws the first frame.
        expand: folder of a language model that rewrites the prompt; the recipe keeps both texts.
        lora: adapters for this request alone, each PATH[:WEIGHT][@high|@low]; see docs/lora.md.
        audio: "none", "generate" (the model's own) or a sound or video file; None is the model's
            own where it makes sound. See docs/sound.md.
        audio_loop: whether sound that is shorter than the clip starts again.
        follow_audio: whether the picture is made to go with the sound of the file in `audio`, for
            models that make sound.
        audio_model: folder of a text-to-audio model of diffusers that makes the sound.
        audio_prompt: what it is to make; None: `prompt`.
        say: (seconds, text) pairs that are spoken, or texts that follow each other; `@FILE` is
            speech in a file.
        voice: one of espeak-ng's, such as "en-gb", or the file of a Kokoro voice.
        settings: values of what one model alone can do, by name, each a number, True or False, or
            texts KEY=VALUE; `vidgen models` lists a model's own with their defaults.
        strict: refuse a clip that its checks find faulty, and an attention back end that was
            asked for but can't be used.
        retry: how many further seeds to try while the checks find faults.
        label: "visible" burns a label into the first 2 seconds; "none" only marks the file.
        aigc: names the content's producer in the metadata field of GB 45438-2025.
        count: how many clips, of seeds S, S + 1, ...
        model: name or folder of the model; None is the engine's own.
        dtype: "fp32", "bf16" or "fp16"; None is the machine's best.
        offload: "none", "stage" or "block": how much of the model is in memory at once; like
            `model` and `dtype` a matter of loading, which an engine can't change later.
        quantize: "int8" keeps the linear layers' weights in 8 bits; also a matter of loading.
        tiles: "auto", "none" or ROWSxCOLUMNS: how pictures are cut for the VAE; "auto" cuts those
            that don't fit the memory as a whole.
        devices: how many share the work; also a matter of loading.
        shard: whether the transformer's weights are spread over them; also a matter of loading.
        latents: initial noise [B, C, F, h, w] instead of the seed's.

    Raises:
        InputError: on construction, with the value, the limit and the remedy.
    """

    prompt: str
    negative: str | None = None
    readings: str = "auto"
    seed: int | None = None
    seconds: float | None = None
    frames: int | None = None
    fps: Fraction | None = None
    size: tuple[int, int] | None = None
    fit: Fit = "crop"
    steps: int | None = None
    guidance: float | None = None
    guidance_low: float | None = None
    guidance_interval: tuple[float, float] | None = None
    guidance_rescale: float | None = None
    cache: str = "none"
    sampler: Any = None
    shift: float | None = None
    image: Picture | None = None
    last_image: Picture | None = None
    frame: tuple[tuple[float, Picture], ...] = ()
    reference: tuple[Picture, ...] = ()
    mask: Picture | None = None
    video: str | os.PathLike[str] | None = None
    strength: float | None = None
    prefix: str | os.PathLike[str] | None = None
    roll: bool | None = None
    overlap: int | None = None
    colour_hold: float | None = None
    control: str | os.PathLike[str] | None = None
    control_scale: float | None = None
    first_frame_model: str | None = None
    expand: str | None = None
    lora: tuple[str, ...] = ()
    audio: str | os.PathLike[str] | None = None
    audio_loop: bool | None = None
    follow_audio: bool | None = None
    audio_model: str | None = None
    audio_prompt: str | None = None
    say: tuple[tuple[float | None, str], ...] = ()
    voice: str | None = None
    settings: Mapping[str, int | float | bool] = field(default_factory=dict)
    strict: bool = False
    retry: int = 0
    label: str = "none"
    aigc: str | None = None
    count: int = 1
    model: str | None = None
    dtype: str | None = None
    offload: str | None = None
    quantize: str | None = None
    tiles: str = "auto"
    devices: int | None = None
    shard: bool | None = None
    latents: Tensor | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        convert = {
            **dict.fromkeys((*_WHOLE, *_NUMBER, *_ABOVE_ZERO, *_FLAGS), plain),
            **{name: plain_picture for name, array in _ARRAYS.items() if array},
            "fps": parse_fps, "size": parse_size, "guidance_interval": parse_interval,
            "frame": parse_frames, "reference": parse_pictures, "lora": parse_loras,
            "say": parse_said, "settings": parse_settings,
        }
        if self.offload == "auto":  # as the command line says it
            object.__setattr__(self, "offload", None)
        for name, function in convert.items():
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, function(value))
        self._validate()

    @classmethod
    def of(cls, prompt: str | Request, options: Mapping[str, Any]) -> Request:
        """A request from keywords that may be misspelt; a request that is there, so changed.

        Raises:
            InputError: an unknown option, with the nearest known one, or a bad value.
        """
        known = {f.name for f in fields(cls)} - {"prompt"}
        for name in options:
            if name in _ELSEWHERE:
                raise InputError(f"{name} is no option of a clip; {_ELSEWHERE[name]}")
            if name not in known:
                raise InputError(f"unknown option {name!r}; {nearest(name, known, CALLED)}")
        if isinstance(prompt, Request):
            return replace(prompt, **options)
        return cls(prompt=prompt, **options)

    def has(self, option: str) -> bool:
        """Whether an option was given."""
        value = getattr(self, option)
        return value is not None and not (isinstance(value, tuple | dict) and not value)

    @property
    def begins_with_image(self) -> bool:
        """Whether `image` is the first frame; under a mask alone it is the whole clip."""
        return self.image is not None and (self.mask is None or self.video is not None)

    @property
    def audio_file(self) -> str | os.PathLike[str] | None:
        """The file given as `audio`, or None where that is a word or left out."""
        return None if self.audio in (None, NO_AUDIO, OWN_AUDIO) else self.audio

    @property
    def files(self) -> list[tuple[str, str | os.PathLike[str]]]:
        """Pictures, clips and sound that are given as files, each with its option."""
        given = [(name, getattr(self, name)) for name in _ARRAYS]
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
        """The scheduler object given as `sampler`, or None where that is a name or left out."""
        return None if isinstance(self.sampler, str) else self.sampler

    def _validate(self) -> None:
        if self.prompt is None:
            raise InputError("prompt must be text, not None")
        for name in _NEVER_LEFT_OUT:
            if getattr(self, name) is None:
                raise InputError(f"{name} is None; leave it out, or give a value")
        for name, limit in _TEXTS.items():
            check_text(name, getattr(self, name), limit)
        if not self.prompt.strip():
            raise InputError("the prompt is empty; say what is to be seen")
        self._validate_numbers()
        for name in _FLAGS:
            check_flag(name, getattr(self, name))
        for name, array in _ARRAYS.items():
            check_picture(name, getattr(self, name), array=array)
        check_sampler(self.sampler)
        check_cache(self.cache)
        check_tiles(self.tiles)
        parse_readings(self.readings)
        for name, known in _CHOICE.items():
            value = getattr(self, name)
            if value is not None and value not in known:
                raise InputError(f"{name} is {value!r}; {nearest(str(value), known)}")
        self._validate_together()
        self._validate_sound()

    def _validate_numbers(self) -> None:
        for name, (low, high) in _WHOLE.items():
            check_whole(name, getattr(self, name), low, high)
        for side in self.size or ():
            check_whole("size", side, 16, 8192)
        for name, span in _NUMBER.items():
            check_number(name, getattr(self, name), *span)
        for name, limit in _ABOVE_ZERO.items():
            check_number(name, getattr(self, name), 0, limit, above=True)
        for seconds, _ in self.frame:
            check_number("frame", seconds, 0, MAX_SECONDS)

    def _validate_together(self) -> None:
        if self.seconds is not None and self.frames is not None:
            raise InputError("seconds and frames are both given; give one of them")
        for name, needs in _NEEDS.items():
            if self.has(name) and not any(self.has(other) for other in needs):
                raise InputError(f"{name} needs {' or '.join(needs)}; add it or leave this out")
        if self.first_frame_model is not None and self.image is not None:
            raise InputError("image and first_frame_model are both given; the first frame is one "
                             "of them")
        if self.latents is not None and self.count > 1:
            raise InputError(f"latents are the noise of one clip, but count is {self.count}; leave "
                             "one of them out")

    def _validate_sound(self) -> None:
        if not isinstance(self.audio, str | os.PathLike | None):
            raise InputError(f"audio is {type(self.audio).__name__}; give none, generate or a file")
        if self.audio_model is not None and self.audio not in (None, OWN_AUDIO):
            raise InputError(f"audio {os.fspath(self.audio)!r} and audio_model are both given; the "
                             "sound is one of them")
        for seconds, text in self.say:
            check_number("say", seconds, 0, MAX_SECONDS)
            if not isinstance(text, str) or not text.strip():
                raise InputError(f"say holds {text!r}; give the text that is to be spoken")
            check_text("say", text, MAX_PROMPT)


DEFAULTS: Mapping[str, Any] = {
    each.name: {} if each.name == "settings" else each.default for each in fields(Request)
}
"""Values of the options that a request leaves out."""


def silenced(settings: Mapping[str, int | float | bool]) -> dict[str, Any]:
    """Return the options of a clip whose output can't hold sound, in place of its `settings`."""
    kept = {name: value for name, value in settings.items() if not name.startswith(_OF_SOUND)}
    return {"audio": NO_AUDIO, "settings": kept}
