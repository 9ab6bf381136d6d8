"""Bodies of requests, built from the fields of `Request` under the names of common video APIs.

Limits and descriptions come from the fields. Values may be strings, as in multipart.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    WithJsonSchema,
    create_model,
    model_validator,
)

from vidgen.core.errors import InputError, OptionError, nearest, quoted
from vidgen.core.request import OWN_FILE, Options, Request, Saving, expected, limits_of
from vidgen.core.values import MAX_SIDE, MIN_SIDE
from vidgen.server.types import NAMES, Upload

CONTINUED = ("prompt", "seconds", "negative", "seed", "steps", "guidance", "shift")
"""Options of an extension; others come from the recipe of the clip to extend."""
SHAPED = (*CONTINUED, "frames", "fps", "size", "strength", "say", "voice")
"""Options of any other clip, except files."""
_EXTRA = ("sampler", "cache", "fit", "guidance_low", "guidance_rescale", "label", "aigc",
          "word_normalisation", "settings")
MAX_LINES, MAX_LORAS, MAX_FILES = 100, 8, 100
_VOICE = re.compile(r"[a-zA-Z]{2,3}(?:-[a-zA-Z0-9]+)*(?:\+[a-zA-Z0-9]+)?")


class Body(Options):
    """Base of bodies and of objects within them; null is the same as a missing field."""

    model_config = ConfigDict(strict=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _given(cls, options: Any) -> Any:
        if not isinstance(options, dict):
            return options  # an object within a body
        given = {name: value for name, value in options.items() if value is not None}
        for name, field in cls.model_fields.items():
            if limits_of(field) and isinstance(given.get(name), bool):
                raise OptionError(f"{name} is {given[name]}; {expected(field)}", name)
        return given

    @classmethod
    def _unknown(cls, name: str) -> str:
        return f"unknown field {name!r}; {nearest(name, cls.model_fields, NAMES)}"


def _from_json(value: Any) -> Any:
    """Parse JSON text, the form of structured values in multipart."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            raise ValueError("send valid JSON") from None
    return value


def _listed(value: Any) -> Any:
    value = _from_json(value)
    return [value] if isinstance(value, str | dict | Upload) else value


def _reference(value: Any) -> Upload | str | dict[str, str]:
    """Return an upload, a URL, or the id of a finished video as {"id": ...}."""
    if isinstance(value, Upload):
        return value
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
            raise ValueError("this service stores no files; send the file itself")
    raise ValueError("give a file, a data: or https: URL, or {\"id\": a video's}")


def _spoken(lines: tuple[tuple[float | None, str], ...]) -> tuple[tuple[float | None, str], ...]:
    """Check texts to speak; refuse too many, and file names on the service's machine."""
    for _, text in lines:
        if text.startswith(OWN_FILE):
            raise InputError(f"say has {quoted(text)}; give the text to speak")
    if len(lines) > MAX_LINES:
        raise InputError(f"say has {len(lines)} texts; give at most {MAX_LINES}")
    return lines


def _language(voice: str) -> str:
    """Check a voice; refuse file names on the service's machine."""
    if not _VOICE.fullmatch(voice):
        raise InputError(f"voice is {quoted(voice)}; give a language such as en-gb")
    return voice


def _any_of(*schemas: dict[str, Any], **more: Any) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": list(schemas), **more})


_NULL, _NUMBER, _TEXT = {"type": "null"}, {"type": "number"}, {"type": "string"}
_FILE = {**_TEXT, "format": "binary"}
_FPS = limits_of(Request.model_fields["fps"])
_SENT: dict[str, tuple[Any, ...]] = {
    "sampler": (_any_of(_TEXT, _NULL),),
    "fps": (PlainSerializer(str), _any_of({**_NUMBER, "minimum": _FPS["ge"], "maximum": _FPS["le"]},
                    {**_TEXT, "pattern": "^[0-9]{1,9}/[0-9]{1,9}$"}, _NULL),),
    "size": (_any_of({**_TEXT, "pattern": r"^[1-9]\d{1,3}x[1-9]\d{1,3}$"}, _NULL),),
    "say": (BeforeValidator(_listed), AfterValidator(_spoken), _any_of(_TEXT, {
        "type": "array", "maxItems": MAX_LINES, "items": {"anyOf": [_TEXT, {
            "type": "array", "prefixItems": [_NUMBER, _TEXT], "minItems": 2, "maxItems": 2}]},
    }, _NULL)),
    "voice": (AfterValidator(_language), _any_of(
        {**_TEXT, "pattern": f"^{_VOICE.pattern}$"}, _NULL)),
    "settings": (_any_of({"type": "object", "additionalProperties": {
        "type": ["boolean", "number"]}}, _NULL),),
}
"""Additional checks of fields, and schemas of values with several forms."""
Reference = Annotated[Any, PlainValidator(_reference), _any_of(
    {**_FILE, "description": "a file (multipart), or a data: or https: URL"},
    {"type": "object", "properties": {
        "image_url": _TEXT, "id": {**_TEXT, "description": "of a finished video"}}})]


class _Clip(Body):
    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        given = self.model_fields_set
        if len(given & {"width", "height"}) == 1:
            raise OptionError("width and height go together; give both, or size", "width")
        for one, other in (("size", "width"), ("seconds", "num_frames"),
                           ("audio_reference", "generate_sound")):
            if {one, other} <= given:
                raise OptionError(f"{one} and {other} are both given; give one of them", one)
        return self


def _body(
    name: str, doc: str, own: dict[str, Any], options: tuple[str, ...],
    required: tuple[str, ...] = (),
) -> type[Body]:
    """Return a body with its `own` fields and `options` of clips."""
    fields = dict(own)
    for option in options:
        field = (Request.model_fields | Saving.model_fields)[option]
        hint: Any = field.annotation
        checks = (*field.metadata, *_SENT.get(option, ()), Field(
            description=field.description, serialization_alias=option))
        fields[NAMES.get(option, option)] = (
            (Annotated[(hint, *checks)], ...) if option in required
            else (Annotated[(hint | None, *checks)], None))
    return create_model(name, __base__=_Clip, __doc__=doc, __module__=__name__, **fields)


ExtraParams = _body("ExtraParams", "Options under vidgen's own names.", {}, _EXTRA)


class LoraChoice(Body):
    """LoRA of the service's folder, by its file name without suffix."""

    name: str = Field(max_length=200)
    scale: float = Field(1.0, ge=-10, le=10)


_SIDE = (int | None, Field(None, ge=MIN_SIDE, le=MAX_SIDE, exclude=True))
_INPUT = (Reference | None, Field(None, exclude=True))
_VIDEO = {"video": (Reference, Field(exclude=True))}
_CONTINUED = {
    "model": (str | None, Field(None, max_length=200, exclude=True,
                                description="name of the served model")),
    "last_image_reference": _INPUT,
    "extra_params": (Annotated[ExtraParams | None, BeforeValidator(_from_json)], None),
}
_SHAPED = _CONTINUED | {
    "width": _SIDE, "height": _SIDE, "generate_sound": (bool | None, Field(None, exclude=True)),
    "lora": (Annotated[list[LoraChoice | str] | None, BeforeValidator(_listed)],
             Field(None, max_length=MAX_LORAS, exclude=True)),
    "audio_reference": _INPUT,
}
_STARTED = _SHAPED | {
    "input_reference": _INPUT, "image_reference": _INPUT, "video_reference": _INPUT}
VideoRequest = _body("VideoRequest", "POST /v1/videos.", _STARTED, SHAPED, ("prompt",))
RemixRequest = _body(
    "RemixRequest", "POST /v1/videos/{id}/remix; its fields replace those of the source's request.",
    _STARTED, SHAPED)
EditRequest = _body("EditRequest", "POST /v1/videos/edits.", _SHAPED | _VIDEO, SHAPED, ("prompt",))
ExtensionRequest = _body("ExtensionRequest", "POST /v1/videos/extensions.", _CONTINUED | _VIDEO,
                         CONTINUED, ("prompt", "seconds"))


class FilmRequest(Body):
    """POST /v1/films."""

    script: Annotated[Any, _any_of(
        {"type": "object", "additionalProperties": True}, _TEXT,
        description="a script as an object, as text, or as a file")]
    format: Literal["yaml", "json"] = "yaml"
    draft: bool = False
    model: str | None = Field(None, max_length=200, description="name of the served model")
    previous_film_id: str | None = Field(None, max_length=100)
    files: Annotated[list[Any] | None, BeforeValidator(_listed), WithJsonSchema({
        "type": "array", "items": _FILE,
        "description": "files that the script names, under the same names (multipart)",
    })] = Field(None, max_length=MAX_FILES)


def body_schema(body: type[Body]) -> dict[str, Any]:
    """Return a body's part of the OpenAPI document."""
    schema = body.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs", None)
    return {"requestBody": {"required": True, "content": {
        "application/json": {"schema": _as_text(schema)},
        "multipart/form-data": {"schema": schema},
    }}}


def _as_text(schema: Any) -> Any:
    """Return a schema for JSON, in which strings can't be files."""
    if isinstance(schema, dict):
        return {key: _as_text(value) for key, value in schema.items()
                if (key, value) != ("format", "binary")}
    return [_as_text(each) for each in schema] if isinstance(schema, list) else schema


def shared_schemas() -> dict[str, Any]:
    """Return the schemas to which the bodies' schemas refer."""
    found: dict[str, Any] = {}
    for body in (VideoRequest, EditRequest, ExtensionRequest, FilmRequest):
        schema = body.model_json_schema(ref_template="#/components/schemas/{model}")
        found |= schema.get("$defs", {})
    return found
