"""Reference tables of the docs, made from the code and its word lists.

    python -m tests.reference        write the tables

They are docs/reference/options.md and docs/script.schema.json as a whole, what_can_i_ask_for.md
between <!-- words --> and <!-- /words -->, and api.md between <!-- fields --> and <!-- /fields -->.
A contract test compares them with the code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter
from pydantic.fields import FieldInfo
from pydantic.json_schema import GenerateJsonSchema

from train.toybox.world.captions import phrases
from train.toybox.world.cast import SPRITES
from train.toybox.world.scenes import TINTS
from vidgen.cli.main import verb_parser
from vidgen.cli.options import FIELDS
from vidgen.core.request import GROUPS, MODEL, Request
from vidgen.pipeline.settings import SETTINGS, settings_of
from vidgen.server.schema import SHAPED
from vidgen.server.types import NAMES
from vidgen.story.script import Script
from vidgen.weights.layouts import open_model

REFERENCE = Path(__file__).parents[1] / "docs/reference"
OPTIONS, WORDS = REFERENCE / "options.md", REFERENCE / "what_can_i_ask_for.md"
API = REFERENCE / "api.md"
SCHEMA = REFERENCE.parent / "script.schema.json"
_PICTURE = "![{}](words/{}.webp)\n"
_DRAWN = ("motions", "places", "weathers")
INTRO = """\
# Options of a generation

Every option of `vidgen generate`, by the headings of `vidgen generate --help-all`. In Python the
options are keywords of `engine.generate` with `_` for `-`, those of the model keywords of
`vidgen.load`, and `label` and `aigc` keywords of `clip.save`; over HTTP they are
[fields of a request](api.md). `vidgen plan` and `vidgen sweep` take the same
options. An empty default means that the model chooses: `vidgen models --json` lists its defaults.

`python -m tests.reference` makes this page from
[`vidgen/core/request.py`](../../vidgen/core/request.py).
"""
LOADING = """
In Python the options from `--model` on are keywords of `vidgen.load`.
"""
COMMAND = """
## Command line only

In Python: `clip.save(PATH, overwrite=...)`, a [journal](../howto/resume.md#in-python), and the
callbacks `on_event` and `on_preview`.
"""
MODELS = """
## Settings of one model

A feature of one model is a setting instead of an option: `--set KEY=VALUE`, in Python
`settings={"candidates": 1}`, over HTTP `extra_params.settings`. The values of `toybox` are in
`defaults.settings` of its `model.json`; `vidgen models` lists the settings of every model.
"""


def options_page() -> str:
    """Return the page of all options, in Markdown."""
    parts = [INTRO]
    for group in GROUPS:
        rows = [_row(name, field) for name, field in (Request.model_fields | FIELDS).items()
                if _extra(field)["group"] == group]
        parts += [f"## {group}\n", _table("option", "value", "default", "meaning", rows=rows)]
        parts += [LOADING] if group == MODEL else []
    parts += [COMMAND, _table("option", "value", "meaning", rows=_command_rows())]
    parts += [MODELS, _table("setting", "value", "toybox", "meaning", rows=_setting_rows())]
    return "".join(f"{part}\n" for part in parts)


def _extra(field: FieldInfo) -> dict[str, Any]:
    extra = field.json_schema_extra
    assert isinstance(extra, dict)
    return extra


def _row(name: str, field: FieldInfo) -> tuple[str, ...]:
    known = verb_parser("generate")[1].options()
    flag = _flag(name)
    shown = f"`{flag}`" if flag in known or name == "prompt" else f"`{name}`, in Python"
    value = " ".join(each for each in (_value(name, field), _limits(field)) if each)
    default = "" if field.default in (None, (), {}) or field.is_required() else field.default
    return shown, value, f"{default}".replace("False", ""), f"{field.description}"


def _flag(name: str) -> str:
    """Return the command line's name of a field."""
    names = {"prompt": "PROMPT", "settings": "--set"}
    return names.get(name) or f"--{name.replace('_', '-')}"


def _value(name: str, field: FieldInfo) -> str:
    """Return the values of an option: its choices, or what its help calls them."""
    hint = field.annotation
    kinds = (hint,) if get_origin(hint) is Literal else get_args(hint) or (hint,)
    for kind in kinds:
        if get_origin(kind) is Literal:
            choices = (*(["auto"] if name == "offload" else []), *get_args(kind))
            return f"`{'|'.join(choices)}`"
    metavar = _extra(field)["metavar"]
    return f"`{metavar}`" if metavar and name != "prompt" else ""


def _limits(field: FieldInfo) -> str:
    limits = {key: value for each in field.metadata for key in ("ge", "gt", "le", "max_length")
              if (value := getattr(each, key, None)) is not None}
    low, high = limits.get("ge"), limits.get("le")
    if "gt" in limits:
        return f"above {limits['gt']}, up to {_number(high)}"
    return "" if high is None else f"{_number(low)} to {_number(high)}"


def _number(value: Any) -> str:
    return "2^63 - 1" if value == 2**63 - 1 else f"{value:g}" if value < 1e5 else f"{value:,}"


def _command_rows() -> Iterator[tuple[str, ...]]:
    for action in verb_parser("generate", ["--help-all"])[1]._actions:
        if action.dest not in FIELDS and action.dest != "help":
            flags = ", ".join(f"`{flag}`" for flag in action.option_strings)
            shown = "|".join(action.choices) if action.choices else action.metavar
            text = (action.help or "") % {"default": action.default}
            yield flags, f"`{shown}`" if shown else "", text


def _setting_rows() -> Iterator[tuple[str, ...]]:
    own = settings_of(open_model("toybox"))
    for name, setting in SETTINGS.items():
        value = "true, false" if setting.kind is bool else f"{setting.low:g} to {setting.high:g}"
        shown = own.get(name, "")
        yield f"`{name}`", value, f"{shown:g}" if shown not in (True, "") else str(
            shown).lower(), setting.help


def _table(*names: str, rows: Iterable[tuple[str, ...]]) -> str:
    lines = [names, ("---",) * len(names), *rows]
    return "\n".join("| " + " | ".join(each.replace("|", "\\|") for each in line) + " |"
                     for line in lines)


def words_page() -> str:
    """Return the page of what the embedded model knows, its tables made of the world's words."""
    return _filled(WORDS, "words", _words())


def api_page() -> str:
    """Return the page of the HTTP API, its options of a generation made from the code."""
    rows = [(f"`{NAMES.get(name, name)}`", f"`{_flag(name)}`",
             f"{Request.model_fields[name].description}") for name in SHAPED]
    return _filled(API, "fields", _table("field", "option", "meaning", rows=rows) + "\n")


def pages() -> dict[Path, str]:
    """Return the text of each page that has tables made from the code."""
    schema = json.dumps(script_schema(), indent=1) + "\n"
    return {OPTIONS: options_page(), WORDS: words_page(), API: api_page(), SCHEMA: schema}


def script_schema() -> dict[str, Any]:
    """Return the JSON Schema of scripts; editors complete and check by it.

    Draft 2020-12 (json-schema.org). A field is described by the text in its `Annotated`.
    """
    class Schema(GenerateJsonSchema):
        """Adds the texts of fields, short forms, and that no other keys are allowed."""

        def dataclass_schema(self, schema: Any) -> dict[str, Any]:
            made, properties = super().dataclass_schema(schema), {}
            own = {field.name: field for field in fields(schema["cls"]) if field.init}
            hints = get_type_hints(schema["cls"], include_extras=True)
            for name, field in own.items():
                part = {key: value for key, value in made["properties"][name].items()
                        if key != "title" and not (key == "default" and value in (None, []))}
                if field.metadata.get("one"):
                    several = {key: part.pop(key) for key in ("type", "items")}
                    part = {"anyOf": [several["items"], several], **part}
                if get_origin(hints[name]) is Annotated:
                    part["description"] = get_args(hints[name])[1]
                properties[name] = part
            made |= {"properties": properties, "additionalProperties": False}
            short = getattr(schema["cls"], "SHORT", None)
            if short is None:
                return made
            plain = {key: value for key, value in properties[short].items()
                     if key not in ("default", "description")}
            return {"anyOf": [plain, made], "description": made.pop("description")}

    whole = TypeAdapter(Script).json_schema(schema_generator=Schema)
    draft = "https://json-schema.org/draft/2020-12/schema"
    return {"$schema": draft, **whole, "title": "vidgen script"}


def _filled(page: Path, block: str, text: str) -> str:
    parts = re.compile(rf"(?<=<!-- {block} -->\n).*?(?=<!-- /{block} -->)", re.DOTALL)
    return parts.sub(lambda _: text, page.read_text())


def _words() -> str:
    """Return the tables of subjects and of phrases, each phrase in its plainest verb."""
    known = phrases()
    kinds: dict[str, list[str]] = {}
    for sprite in SPRITES.values():
        if not sprite.reserved:
            also = f" ({', '.join(sprite.synonyms)})" if sprite.synonyms else ""
            kinds.setdefault(sprite.kind, []).append(f"{sprite.name}{also}")
    rows = [(kind, ", ".join(names)) for kind, names in kinds.items()]
    rows += [("colours", ", ".join(TINTS))]
    rows += [(f"{size} size", ", ".join(words)) for size, words in known["sizes"].items()]
    parts = ["## Subjects\n", _PICTURE.format("Subjects", "subjects"),
             _table("kind", "subject (other names)", rows=rows)]
    for title, kind in (("Motions", "motions"), ("Two subjects", "relations"),
                        ("Places", "places"), ("Times", "times"), ("Weathers", "weathers"),
                        ("Cameras", "cameras"), ("Speeds", "speeds"), ("Sounds", "sounds")):
        rows = [(name, "; ".join(_plain(text) for text in texts[:4]))
                for name, texts in known[kind].items()]
        parts += [f"\n## {title}\n"]
        parts += [_PICTURE.format(title, kind)] if kind in _DRAWN else []
        parts += [_table(title.lower(), "say", rows=rows)]
    return "".join(f"{part}\n" for part in parts)


def _plain(text: str) -> str:
    """Return a phrase of the captions' grammar as a person would type it."""
    text = re.sub(r"(\w+)/\w+", r"\1", text)
    names = {"go": "moves", "go2": "moves", "direction": "left", "opposite": "right",
             "other": "a dog", "verb": "bounces", "verb2": "spins"}
    return text.format(**names)


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text)
