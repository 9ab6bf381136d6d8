"""Bodies of requests: fields in OpenAI's shape and, besides, under the peers' names.

Values may be strings, as multipart sends them; what can't be read as the right type is refused,
and so is a field that nobody knows.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    WithJsonSchema,
    model_validator,
)

from vidgen.core.errors import InputError
from vidgen.core.request import OWN_FILE
from vidgen.core.values import parse_fps
from vidgen.server.types import Upload

MAX_FPS = 240
_FILE_OR_URL = {
    "anyOf": [
        {"type": "string", "format": "binary",
         "description": "a file (multipart), or a data: or https: URL"},
        {"type": "object", "properties": {"image_url": {"type": "string"}, "id": {
            "type": "string", "description": "of a finished video"}}},
    ]
}
_SIZE = r"^[1-9]\d{1,3}x[1-9]\d{1,3}$"
_FRACTION = r"[0-9]{1,9}/[0-9]{1,9}"
_VOICE = re.compile(r"[a-z]{2,3}(?:-[a-z0-9]+)*(?:\+[a-z0-9]+)?", re.IGNORECASE)


def _reference(value: Any) -> Upload | str | dict[str, str]:
    """A file that came in, a URL, or a finished video."""
    if isinstance(value, Upload):
        return value
    if isinstance(value, str) and value.lstrip().startswith("{"):
        value = _from_json(value)
    if isinstance(value, str) and re.match(r"(data|https?):", value):
        return value
    if isinstance(value, dict) and len(value) == 1:
        (name, inner), = value.items()
        if name in ("image_url", "video_url", "audio_url", "url") and isinstance(inner, str):
            return _reference(inner)
        if name in ("id", "video_id") and isinstance(inner, str):
            return {"id": inner}
        if name == "file_id":
            raise ValueError("this service keeps no files; send the file itself")
    raise ValueError("give a file, a data: or https: URL, or {\"id\": a video's}")


def _from_json(value: Any) -> Any:
    """Structured values come as JSON in the strings of multipart."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            raise ValueError("it is no JSON") from None
    return value


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("give a number")
    return value


def _listed(value: Any) -> Any:
    value = _from_json(value)
    return [value] if isinstance(value, str | dict) else value


def _size(value: str) -> str:
    if not re.fullmatch(_SIZE, value):
        raise ValueError("give WIDTHxHEIGHT in pixels, such as 832x480")
    return value


def _rate(value: Any) -> str:
    """An exact frame rate out of a number, or of text such as 24000/1001, as clips tell theirs."""
    value = _no_bool(value)
    try:
        if isinstance(value, str) and not re.fullmatch(_FRACTION, value):
            value = float(value)
        rate = parse_fps(value)
    except (ValueError, InputError):
        rate = None
    if rate is None or not 1 <= rate <= MAX_FPS:
        raise ValueError(f"give a number from 1 to {MAX_FPS}, or one such as 24000/1001")
    return str(rate)


Size = Annotated[str, AfterValidator(_size), WithJsonSchema({"type": "string", "pattern": _SIZE})]
Reference = Annotated[Any, PlainValidator(_reference), WithJsonSchema(_FILE_OR_URL)]
Whole = Annotated[int, BeforeValidator(_no_bool)]
Number = Annotated[float, BeforeValidator(_no_bool)]
Rate = Annotated[str, PlainValidator(_rate), WithJsonSchema({"anyOf": [
    {"type": "number", "minimum": 1, "maximum": MAX_FPS},
    {"type": "string", "pattern": f"^{_FRACTION}$"},
]})]
SettingName = Annotated[str, Field(min_length=1, max_length=40)]
Prompt = Annotated[str, Field(min_length=1, max_length=20_000)]


class Strict(BaseModel):
    """A body; unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())


class LoraAsk(Strict):
    """An adapter by its name in the service's folder."""

    name: str = Field(max_length=200)
    scale: Number = Field(1.0, ge=-10, le=10)


class ExtraParams(Strict):
    """What engines call by their own names."""

    sampler: str | None = Field(None, max_length=40)
    cache: str | None = Field(None, max_length=40)
    fit: Literal["crop", "pad"] | None = None
    guidance_low: Number | None = Field(None, ge=0, le=20)
    guidance_rescale: Number | None = Field(None, ge=0, le=1)
    overlap: Whole | None = Field(None, ge=1, le=1000)
    colour_hold: Number | None = Field(None, ge=0, le=1)
    roll: bool | None = None
    label: Literal["none", "visible"] | None = None
    readings: str | None = Field(None, max_length=2000)
    settings: dict[SettingName, bool | int | float] | None = Field(None, max_length=40)


class Shape(Strict):
    """What a clip is to be like; shared by all ways to ask for one."""

    model: str | None = Field(None, max_length=200)
    num_frames: Whole | None = Field(None, ge=1, le=100_000)
    size: Size | None = None
    width: Whole | None = Field(None, ge=16, le=8192)
    height: Whole | None = Field(None, ge=16, le=8192)
    fps: Rate | None = None
    seed: Whole | None = Field(None, ge=0, le=2**63 - 1)
    negative_prompt: str | None = Field(None, max_length=20_000)
    num_inference_steps: Whole | None = Field(None, ge=1, le=200)
    guidance_scale: Number | None = Field(None, ge=0, le=20)
    flow_shift: Number | None = Field(None, gt=0, le=100)
    strength: Number | None = Field(None, ge=0, le=1)
    generate_sound: bool | None = None
    lora: Annotated[list[LoraAsk | str] | None, BeforeValidator(_listed)] = Field(
        None, max_length=8)
    say: Annotated[list[str | tuple[Number, str]] | None, BeforeValidator(_listed)] = Field(
        None, max_length=100)
    voice: str | None = Field(None, max_length=40)
    last_image_reference: Reference | None = None
    audio_reference: Reference | None = None
    extra_params: Annotated[ExtraParams | None, BeforeValidator(_from_json)] = None

    @model_validator(mode="after")
    def _fits_together(self) -> Shape:
        if (self.width is None) != (self.height is None):
            raise ValueError("width and height go together; give both, or size")
        if self.size is not None and self.width is not None:
            raise ValueError("size and width are both given; give one of them")
        if self.voice is not None and not _VOICE.fullmatch(self.voice):
            raise ValueError(f"voice is {self.voice!r}; give a language such as en-gb")
        if self.audio_reference is not None and self.generate_sound is not None:
            raise ValueError("audio_reference and generate_sound are both given; the sound is one "
                             "of them")
        for text in self.spoken():
            if text.startswith(OWN_FILE) or not text.strip():
                raise ValueError(f"say holds {text!r}; give the text that is to be spoken")
        return self

    def spoken(self) -> list[str]:
        """The texts of `say`."""
        return [each if isinstance(each, str) else each[1] for each in self.say or ()]


class _Start(Shape):
    """A clip from its beginning."""

    seconds: Number | None = Field(None, gt=0, le=3600)
    input_reference: Reference | None = None
    image_reference: Reference | None = None
    video_reference: Reference | None = None

    @model_validator(mode="after")
    def _one_length(self) -> _Start:
        if self.seconds is not None and self.num_frames is not None:
            raise ValueError("seconds and num_frames are both given; give one of them")
        return self


class VideoAsk(_Start):
    """POST /v1/videos."""

    prompt: Prompt


class RemixAsk(_Start):
    """POST /v1/videos/{id}/remix: what is given replaces what the source was asked with."""

    prompt: Prompt | None = None


class EditAsk(Shape):
    """POST /v1/videos/edits."""

    prompt: Prompt
    video: Reference
    seconds: Number | None = Field(None, gt=0, le=3600)


class ExtensionAsk(Strict):
    """POST /v1/videos/extensions; what is left out is as the clip's recipe has it."""

    prompt: Prompt
    seconds: Number = Field(gt=0, le=3600)
    video: Reference
    model: str | None = Field(None, max_length=200)
    seed: Whole | None = Field(None, ge=0, le=2**63 - 1)
    negative_prompt: str | None = Field(None, max_length=20_000)
    num_inference_steps: Whole | None = Field(None, ge=1, le=200)
    guidance_scale: Number | None = Field(None, ge=0, le=20)
    flow_shift: Number | None = Field(None, gt=0, le=100)
    last_image_reference: Reference | None = None
    extra_params: Annotated[ExtraParams | None, BeforeValidator(_from_json)] = None


def _texts(value: Any) -> Any:
    value = _from_json(value)
    return [value] if isinstance(value, Upload) else value


class FilmAsk(Strict):
    """POST /v1/films."""

    script: Annotated[Any, WithJsonSchema({
        "anyOf": [{"type": "object", "additionalProperties": True}, {"type": "string"}],
        "description": "a script as an object, as text, or as a file",
    })]
    format: Literal["yaml", "json", "txt"] = "yaml"
    draft: bool = False
    model: str | None = Field(None, max_length=200)
    previous_film_id: str | None = Field(None, max_length=100)
    files: Annotated[list[Any] | None, BeforeValidator(_texts), WithJsonSchema({
        "type": "array", "items": {"type": "string", "format": "binary"},
        "description": "what the script names, under those names (multipart)",
    })] = Field(None, max_length=100)


def body_schema(ask: type[Strict]) -> dict[str, Any]:
    """A body's part of the OpenAPI document."""
    schema = ask.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs", None)
    return {"requestBody": {"required": True, "content": {
        "application/json": {"schema": _as_text(schema)},
        "multipart/form-data": {"schema": schema},
    }}}


def _as_text(schema: Any) -> Any:
    """A schema whose strings are no files, which JSON can't hold."""
    if isinstance(schema, dict):
        return {key: _as_text(value) for key, value in schema.items()
                if (key, value) != ("format", "binary")}
    return [_as_text(each) for each in schema] if isinstance(schema, list) else schema


def shared_schemas() -> dict[str, Any]:
    """Return the schemas that the bodies' schemas refer to."""
    found: dict[str, Any] = {}
    for ask in (VideoAsk, EditAsk, ExtensionAsk, FilmAsk):
        found |= ask.model_json_schema(ref_template="#/components/schemas/{model}").get("$defs", {})
    return found
