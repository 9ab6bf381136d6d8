"""What a person asks for: the command line's long options, as one checked value.

A field left None takes the model's own default. All that can be judged without a model is judged
when the request is made; what needs strides, limits or files is judged where those are known.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from fractions import Fraction
from typing import TYPE_CHECKING, Any, TypeAlias

from vidgen.core.errors import InputError, nearest

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    Picture: TypeAlias = str | os.PathLike[str] | np.ndarray[Any, Any]

MAX_PROMPT = 20_000
MAX_DEVICES = 1024
MAX_SECONDS = 3600
_WHOLE = {
    "seed": (0, 2**63 - 1), "frames": (1, 100_000), "steps": (1, 1000), "count": (1, 1000),
    "retry": (0, 100), "refine": (0, 1000), "overlap": (1, 1000), "devices": (1, MAX_DEVICES),
}
_NUMBER = {
    "guidance": (0, 100), "guidance_low": (0, 100), "image_guidance": (0, 100),
    "guidance_rescale": (0, 1), "strength": (0, 1),
    "control_scale": (0, 10), "colour_hold": (0, 1),
}
_ABOVE_ZERO = {"seconds": MAX_SECONDS, "fps": 240, "shift": 100}
_CHOICE = {
    "fit": ("crop", "pad"), "dtype": ("fp32", "bf16", "fp16"),
    "offload": ("none", "stage", "block"), "quantize": ("int8",), "label": ("none", "visible"),
}
_TILES = re.compile(r"auto|none|[1-9]\d?x[1-9]\d?")
_CACHES = ("none", "first-block", "magnitude", "forecast")
_NEEDS = {
    "strength": ("video",), "mask": ("video", "image"),
    "control_scale": ("control", "video", "image", "last_image", "frame", "reference", "prefix"),
    "audio_loop": ("audio", "audio_model"), "follow_audio": ("audio",),
    "audio_prompt": ("audio_model",), "voice": ("say",),
}
NO_AUDIO, OWN_AUDIO = "none", "generate"
"""Values of `audio` that name no file."""
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
        guidance_low: guidance of the low-noise expert, for models that have two (Wan 2.2 A14B).
        image_guidance: guidance where frames are given, which it then pulls towards, for models
            that were taught to do without (toybox).
        guidance_interval: (low, high) in sigma within which guidance acts.
        cache: "none", "first-block", "magnitude" or "forecast", each with a `:THRESHOLD` behind it
            or without: leaves most of the transformer out at steps that change little.
        guidance_rescale: 0 to 1, how far the guided velocity's deviation is brought back.
        sampler: name of a sampler, or in Python any flow scheduler object of diffusers, which
            brings its own shift.
        shift: of the noise schedule towards high noise, above 0.
        image: the first frame, a path or uint8 [H, W, 3].
        last_image: the last frame.
        refine: gradient steps that bring a given first frame's latents nearer to it, through the
            VAE's decoder; 0 takes them as they are encoded. For models that have a number of their
            own (toybox).
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
        anchor: whether the windows of a long clip are shown its first frame as a reference, in
            models that were taught to keep to it; None: yes, unless `reference` is given.
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
    fit: str = "crop"
    steps: int | None = None
    guidance: float | None = None
    guidance_low: float | None = None
    image_guidance: float | None = None
    guidance_interval: tuple[float, float] | None = None
    guidance_rescale: float | None = None
    cache: str = "none"
    sampler: Any = None
    shift: float | None = None
    image: Picture | None = None
    refine: int | None = None
    last_image: Picture | None = None
    frame: tuple[tuple[float, Picture], ...] = ()
    reference: tuple[Picture, ...] = ()
    mask: Picture | None = None
    video: Picture | None = None
    strength: float | None = None
    prefix: Picture | None = None
    roll: bool | None = None
    overlap: int | None = None
    colour_hold: float | None = None
    anchor: bool | None = None
    control: Picture | None = None
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
            "fps": parse_fps, "size": parse_size, "guidance_interval": _interval,
            "frame": _pairs, "reference": _pictures, "lora": _pictures, "say": _said,
        }
        for name, function in convert.items():
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, function(value))
        self._validate()

    @classmethod
    def of(cls, prompt: str, options: Mapping[str, Any]) -> Request:
        """A request from keywords that may be misspelt.

        Raises:
            InputError: an unknown option, with the nearest known one, or a bad value.
        """
        known = {f.name for f in fields(cls)} - {"prompt"}
        for name in options:
            if name not in known:
                raise InputError(f"unknown option {name!r}; {nearest(name, known)}")
        return cls(prompt=prompt, **options)

    def has(self, option: str) -> bool:
        """Whether an option was given."""
        value = getattr(self, option)
        return value is not None and not (isinstance(value, tuple) and not value)

    @property
    def begins_with_image(self) -> bool:
        """Whether `image` is the first frame; under a mask alone it is the whole clip."""
        return self.image is not None and (self.mask is None or self.video is not None)

    @property
    def audio_file(self) -> str | os.PathLike[str] | None:
        """The file given as `audio`, or None where that is a word or left out."""
        return None if self.audio in (None, NO_AUDIO, OWN_AUDIO) else self.audio

    @property
    def wants_sound(self) -> bool:
        """Whether sound is asked for, so that an output must hold it."""
        return self.audio not in (None, NO_AUDIO) or bool(self.audio_model or self.say)

    @property
    def scheduler(self) -> Any:
        """The scheduler object given as `sampler`, or None where that is a name or left out."""
        return None if isinstance(self.sampler, str) else self.sampler

    def _validate(self) -> None:
        texts = {"prompt": MAX_PROMPT, "negative": MAX_PROMPT, "aigc": 200,
                 "audio_prompt": MAX_PROMPT, "audio_model": 4096, "voice": 4096, "expand": 4096}
        for name, limit in texts.items():
            text = getattr(self, name)
            if not isinstance(text, str | None) or (name == "prompt" and text is None):
                raise InputError(f"{name} must be text, not {text!r}")
            if text and len(text) > limit:
                raise InputError(f"{name} has {len(text)} characters; shorten it to {limit}")
        if not self.prompt.strip():
            raise InputError("the prompt is empty; say what is to be seen")
        for name, (low, high) in _WHOLE.items():
            _check_whole(name, getattr(self, name), low, high)
        for side in self.size or ():
            _check_whole("size", side, 16, 8192)
        for name, span in _NUMBER.items():
            _check_number(name, getattr(self, name), *span)
        for name, high in _ABOVE_ZERO.items():
            _check_number(name, getattr(self, name), 0, high, above=True)
        for seconds, _ in self.frame:
            _check_number("frame", seconds, 0, 3600)
        _check_cache(self.cache)
        _check_tiles(self.tiles)
        parse_readings(self.readings)
        for name, known in _CHOICE.items():
            value = getattr(self, name)
            if value is not None and value not in known:
                raise InputError(f"{name} is {value!r}; {nearest(str(value), known)}")
        if self.seconds is not None and self.frames is not None:
            raise InputError("seconds and frames are both given; give one of them")
        for name, needs in _NEEDS.items():
            if self.has(name) and not any(self.has(other) for other in needs):
                raise InputError(f"{name} needs {' or '.join(needs)}; add it or leave this out")
        if self.first_frame_model is not None and self.image is not None:
            raise InputError("image and first_frame_model are both given; the first frame is one "
                             "of them")
        self._validate_sound()

    def _validate_sound(self) -> None:
        if not isinstance(self.audio, str | os.PathLike | None):
            raise InputError(f"audio is {type(self.audio).__name__}; give none, generate or a file")
        if self.audio_model is not None and self.audio not in (None, OWN_AUDIO):
            raise InputError(f"audio {os.fspath(self.audio)!r} and audio_model are both given; the "
                             "sound is one of them")
        for seconds, text in self.say:
            _check_number("say", seconds, 0, 3600)
            if not isinstance(text, str) or not text.strip():
                raise InputError(f"say holds {text!r}; give the text that is to be spoken")
            if len(text) > MAX_PROMPT:
                raise InputError(f"say has {len(text)} characters; shorten it to {MAX_PROMPT}")


def _check_whole(name: str, value: Any, low: int, high: int) -> None:
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if value is not None and not (is_whole and low <= value <= high):
        raise InputError(f"{name} is {value!r}; give a whole number from {low} to {high}")


def _check_number(name: str, value: Any, low: float, high: float, above: bool = False) -> None:
    is_number = isinstance(value, int | float | Fraction) and not isinstance(value, bool)
    if value is None or (is_number and low <= value <= high and not (above and value == low)):
        return
    shown = str(value) if isinstance(value, Fraction) else repr(value)
    span = f"above {low}, {high} at most" if above else f"from {low} to {high}"
    raise InputError(f"{name} is {shown}; give a number {span}")


def _check_tiles(value: Any) -> None:
    if not _TILES.fullmatch(str(value)):
        raise InputError(f"tiles is {value!r}; give auto, none, or rows and columns from 1 to 99, "
                         "such as 2x3")


def _check_cache(value: Any) -> None:
    method, colon, threshold = str(value).partition(":")
    if method not in _CACHES:
        raise InputError(f"cache is {value!r}; {nearest(method, _CACHES)}")
    if colon:
        try:
            number = float(threshold)
        except ValueError:
            number = math.nan
        if method == "none" or not 0 <= number <= 100:
            raise InputError(f"cache is {value!r}; behind the colon comes a threshold from 0 to "
                             "100, such as forecast:0.1")


def parse_readings(value: Any) -> dict[str, str] | None:
    """What "bicylce=bicycle,taxi=car" reads words as, in lower case; None is "auto".

    Raises:
        InputError: neither auto, none nor such pairs.
    """
    if value in ("auto", "none"):
        return None if value == "auto" else {}
    pairs = [[side.strip().lower() for side in pair.split("=")] for pair in str(value).split(",")]
    if not all(len(pair) == 2 and all(pair) and " " not in pair[0] for pair in pairs):
        raise InputError(f"readings is {value!r}; give auto, none, or words and what they are read "
                         "as, such as bicylce=bicycle,taxi=car")
    return dict(pairs)


def parse_fps(value: Any) -> Fraction:
    """A frame rate, exact: a number, or text such as "24000/1001".

    Raises:
        InputError: neither.
    """
    try:
        if isinstance(value, float) or (isinstance(value, str) and "." in value):
            # 23.976 and 29.97 mean the broadcast rates n * 1000 / 1001.
            number = float(value)
            broadcast = Fraction(round(number) * 1000, 1001)
            exact = Fraction(number).limit_denominator(1001)
            return broadcast if abs(number - broadcast) < 1e-3 else exact
        return Fraction(value)
    except (ValueError, TypeError, OverflowError, ZeroDivisionError):
        raise InputError(f"fps is {value!r}; give a number or one such as 24000/1001") from None


def parse_size(value: Any) -> tuple[int, int]:
    """(width, height) of such a pair, or of text such as "832x480".

    Raises:
        InputError: neither.
    """
    if isinstance(value, str):
        match = re.fullmatch(r"(\d{1,9})[xX×](\d{1,9})", value.strip())
        if match:
            return int(match[1]), int(match[2])
    elif isinstance(value, Iterable):
        sides = tuple(value)
        if len(sides) == 2:
            return sides
    raise InputError(f"size is {value!r}; give width and height in pixels, such as 128x96")


def _interval(value: Any) -> tuple[float, float]:
    ends = tuple(value) if isinstance(value, Iterable) else (value,)
    is_pair = len(ends) == 2 and all(isinstance(end, int | float) for end in ends)
    if not (is_pair and 0 <= ends[0] < ends[1] <= 1):
        raise InputError(f"guidance_interval is {value!r}; give two rising numbers from 0 to 1")
    return float(ends[0]), float(ends[1])


def _pairs(value: Any) -> tuple[tuple[float, Picture], ...]:
    for pair in value:
        if not (isinstance(pair, tuple | list) and len(pair) == 2):
            raise InputError(f"frame holds {pair!r}; give pairs (seconds, picture)")
    return tuple((seconds, picture) for seconds, picture in value)


def _said(value: Any) -> tuple[tuple[float | None, str], ...]:
    """Texts to speak, each with its time or without, or one alone."""
    pairs = []
    for each in (value,) if isinstance(value, str) else value:
        if isinstance(each, str):
            pairs.append((None, each))
        elif isinstance(each, tuple | list) and len(each) == 2:
            pairs.append((each[0], each[1]))
        else:
            raise InputError(f"say holds {each!r}; give texts or pairs (seconds, text)")
    return tuple(pairs)


def _pictures(value: Any) -> tuple[Picture, ...]:
    return (value,) if isinstance(value, str | os.PathLike) else tuple(value)
