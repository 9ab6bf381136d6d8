"""One request, whatever door it comes in by: the same limits, refused by value and limit."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from vidgen.cli.main import verb_parser
from vidgen.cli.options import given_options
from vidgen.cli.replay import typed_options
from vidgen.cli.sweep import _cell, read_axis
from vidgen.core.errors import InputError
from vidgen.core.request import Request, Saving, limits_of
from vidgen.core.values import MAX_SIDE, MIN_SIDE
from vidgen.server.schema import ExtraParams, VideoRequest
from vidgen.server.types import NAMES
from vidgen.story.film import FilmPlan
from vidgen.story.script import Script, Shot
from vidgen.weights.folder import ModelFolder
from vidgen.weights.layouts import open_model

NEEDED = {
    "strength": {"video": "a.mp4"}, "control_scale": {"video": "a.mp4"}, "voice": {"say": ["Hi"]},
    "audio_prompt": {"audio_model": "heard"},
}
"""Options without which another one is refused."""
IN_SHOTS = ("prompt", "negative", "steps", "guidance", "shift", "seed", "seconds")
OWN_LIMITS = {"voice": "the service takes languages alone, no files"}
Case = tuple[str, Any, str]
"""An option, its value, and the limit that it breaks; empty: none."""


def cases() -> Iterator[Case]:
    """Yield the values at the ends of every option's limits, and those next beyond."""
    for name, field in (Request.model_fields | Saving.model_fields).items():
        limits = limits_of(field)
        for end, limit in limits.items():
            yield name, limit + 0.01 if end == "gt" else limit, ""
            yield name, limit + {"ge": -1, "gt": 0, "le": 1}[end], str(limit)
        longest = next((each.max_length for each in field.metadata
                        if hasattr(each, "max_length")), None)
        if longest is not None:
            yield name, "a" * longest, ""
            yield name, "a" * (longest + 1), str(longest)
    for side, limit in ((MIN_SIDE, ""), (MIN_SIDE - 1, str(MIN_SIDE)), (MAX_SIDE, ""),
                        (MAX_SIDE + 1, str(MAX_SIDE))):
        yield "size", f"{side}x64", limit


def given(name: str, value: Any) -> dict[str, Any]:
    rest = {} if name in Saving.model_fields else {"prompt": "a red car"}
    return rest | NEEDED.get(name, {}) | {name: value}


def of(name: str) -> type[Request | Saving]:
    return Saving if name in Saving.model_fields else Request


def by_python(name: str, value: Any) -> None:
    of(name)(**given(name, value))


@cache
def parser(verb: str) -> Any:
    return verb_parser(verb)[1]


def is_of(verb: str, name: str) -> bool:
    return name in {action.dest for action in parser(verb)._actions}


def by_command_line(name: str, value: Any) -> None:
    verb, words = ("generate", []) if is_of("generate", name) else (
        "extend", ["a.mp4", "--seconds=1"])
    for key, one in {"prompt": "a red car", **given(name, value)}.items():
        text = one[0] if isinstance(one, list) else one
        is_plain = (verb, key) == ("generate", "prompt")
        words.append(str(text) if is_plain else f"--{key.replace('_', '-')}={text}")
    of(name)(**given_options(parser(verb).parse(words), of(name)))


def by_sweep(name: str, value: Any) -> None:
    axis = read_axis(f"{name}={value}")
    rest = {"settings": {}, **given(name, None)}
    del rest[name]
    _cell({"prompt": "a red car", **rest}, [(axis, axis.values[0])], Path("cells"))


def by_replay(name: str, value: Any) -> None:
    of(name)(**given(name, value) | typed_options([(name, str(value))]))


def by_body(name: str, value: Any) -> None:
    field = NAMES.get(name, name)
    is_own = field in VideoRequest.model_fields
    body = {field: value} if is_own else {"extra_params": {field: value}}
    VideoRequest(**{"prompt": "a red car", **body})


@cache
def model() -> ModelFolder:
    return open_model("toybox")


def by_script(name: str, value: Any) -> None:
    key = "duration" if name == "seconds" else name
    Path("film.json").write_text(json.dumps({"shots": [{"prompt": "a red car", key: value}]}))
    script = Script.read("film.json")
    (shot,) = script.shots
    film = FilmPlan(script, model(), Fraction(12), (128, 128))
    film.request(shot, shot.seed or 0, 0, 9)


def is_set(name: str) -> bool:
    """Whether `sweep --over` and `replay --set` take an option."""
    return is_of("generate", name) and name not in ("count", "retry")


DOORS: dict[Callable[[str, Any], None], Callable[[str], bool]] = {
    by_python: lambda _: True,
    by_command_line: lambda _: True,
    by_sweep: is_set,
    by_replay: is_set,
    by_body: lambda name: name not in OWN_LIMITS and (
        NAMES.get(name, name) in VideoRequest.model_fields or name in ExtraParams.model_fields),
    by_script: lambda name: name in IN_SHOTS,
}
"""Each with the options that it has."""


@pytest.mark.parametrize("door", DOORS)
def test_every_door_has_the_limits_of_the_request(
    door: Callable[[str, Any], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vidgen.cli.sweep._identity", lambda *_: "clip")  # which reads files
    asked = [case for case in cases() if DOORS[door](case[0])]
    assert len({name for name, *_ in asked}) >= len(IN_SHOTS)
    for name, value, limit in asked:
        if not limit:
            door(name, value)
            continue
        with pytest.raises(InputError) as refused:
            door(name, value)
        told = str(refused.value).replace(",", "")
        shown = str(len(value)) if len(str(value)) > 80 else str(value).partition("x")[0]
        assert shown in told, (name, told)
        assert limit in told, (name, told)


def test_every_option_that_a_shot_has_is_asked_for() -> None:
    own = {"camera", "transition", "takes"}
    assert {*IN_SHOTS} >= (Shot.__dataclass_fields__.keys() & Request.model_fields.keys()) - own - {
        "lora", "sampler", "frames"}
