import math
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vidgen.core.config import ONE, build, dump
from vidgen.core.config_file import apply_overrides, load_yaml
from vidgen.core.errors import InputError, nearest


@dataclass(frozen=True)
class Inner:
    rate: float = 1e-3
    kind: Literal["a", "bee", 3] = "a"


@dataclass(frozen=True)
class Outer:
    name: str
    count: int = 1
    pair: tuple[int, float] = (1, 2.0)
    parts: tuple[Inner, ...] = ()
    inner: Inner = field(default_factory=Inner)
    fps: Fraction | None = None
    folder: Path | None = None
    table: dict[str, int] = field(default_factory=dict)
    either: int | str = 0
    flag: bool = False


def read(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return load_yaml(path)


def test_every_supported_type_survives_yaml_build_dump_and_back(tmp_path):
    text = """
name: no
count: 3
pair: [4, 5]
parts: [{rate: 1e-4}, {kind: bee}]
inner: {kind: 3}
fps: 24000/1001
folder: some/where
table: {a: 1}
either: text
flag: true
"""
    outer = build(Outer, read(tmp_path, text), "run.yaml")
    assert outer == Outer(
        "no", 3, (4, 5.0), (Inner(1e-4), Inner(kind="bee")), Inner(kind=3), Fraction(24000, 1001),
        Path("some/where"), {"a": 1}, "text", True,
    )
    assert build(Outer, dump(outer)) == outer
    assert isinstance(outer.pair[1], float)


@dataclass(frozen=True)
class Point:
    SHORT = "x"

    x: int
    y: int = 0

    def __post_init__(self):
        if self.x < 0:
            raise InputError(f"x is {self.x}")


@dataclass(frozen=True)
class Line:
    points: tuple[Point, ...] = field(default=(), metadata=ONE)
    end: Path | Point = Path()


def test_short_forms_stand_for_the_whole(tmp_path):
    assert build(Line, {"points": 3}) == Line((Point(3),))
    assert build(Line, {"points": [3, {"x": 4, "y": 5}]}) == Line((Point(3), Point(4, 5)))
    assert build(Line, {"points": {"x": 1}, "end": {"x": 2}}) == Line((Point(1),), Point(2))
    assert build(Line, {"end": "a.png"}) == Line((), Path("a.png"))
    with pytest.raises(InputError, match=r"run.yaml, line 2: end: unknown key 'z'"):
        build(Line, read(tmp_path, "end:\n  {x: 1, z: 2}\n"), "run.yaml")
    with pytest.raises(InputError, match=r"run.yaml, line 3: points\[1\]: x is -4"):
        build(Line, read(tmp_path, "points:\n - 3\n - x: -4\n"), "run.yaml")


def test_an_unknown_key_names_file_line_and_nearest_key(tmp_path):
    with pytest.raises(InputError, match=r"run.yaml, line 2: unknown key 'cuont'.*'count'"):
        build(Outer, read(tmp_path, "name: x\ncuont: 3\n"), "run.yaml")


@pytest.mark.parametrize(("text", "told"), [
    ("name: x\nrate: 1", r"line 2: unknown key 'rate'; it belongs in 'parts'"),
    ("name: x\ninner: {flag: true}", r"2: inner: unknown key 'flag'; it belongs next to 'inner'"),
    ("name: x\nparts: [{fps: 3}]", r"line 2: parts\[0\]: unknown key 'fps'; .* next to 'parts'"),
])
def test_a_key_in_another_place_is_reported_where_it_belongs(text, told, tmp_path):
    with pytest.raises(InputError, match=told):
        build(Outer, read(tmp_path, text), "run.yaml")


def test_a_key_belongs_in_the_nearest_mapping_that_knows_it(tmp_path):
    @dataclass(frozen=True)
    class Whole:
        deep: Outer | None = None
        parts: tuple[Inner, ...] = ()

    for text, told in [("rate: 1", "in 'parts'"), ("pair: 1", "in 'deep'"),
                       ("parts: [{pair: 1}]", "in 'deep'"), ("deep: {deep: 1}", "next to 'deep'")]:
        with pytest.raises(InputError, match=f"it belongs {told}"):
            build(Whole, read(tmp_path, text), "run.yaml")


def test_a_nested_unknown_key_names_its_path(tmp_path):
    with pytest.raises(InputError, match=r"line 3: inner: unknown key 'raet'.*'rate'"):
        build(Outer, read(tmp_path, "name: x\ninner:\n  raet: 3\n"), "run.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "the key 'name' is missing"),
        ("name: 3", "name must be text, not int 3"),
        ("{name: x, count: 1.5}", "count must be a whole number, not float 1.5"),
        ("{name: x, count: true}", "count must be a whole number, not bool True"),
        ("{name: x, count: .inf}", "count must be a whole number"),
        ("{name: x, flag: 1}", "flag must be true or false, not int 1"),
        ("{name: x, pair: [1]}", "pair has 1 entries; it must have 2"),
        ("{name: x, parts: [{}, 3]}", r"parts\[1\] must be a mapping, not int 3"),
        ("{name: x, inner: {kind: be}}", "kind is 'be'; did you mean 'bee'"),
        ("{name: x, fps: 1/0}", "fps must be a number or fraction"),
        ("{name: x, either: []}", "either must be a whole number or text, not a list of 0"),
        ("{name: x, table: {a: b}}", "table.a must be a whole number"),
    ],
)
def test_a_wrong_value_says_where_it_stands_and_what_is_expected(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        build(Outer, read(tmp_path, text), "run.yaml")


@pytest.mark.parametrize("given", [
    {"name": "x", "count": "y" * 9000}, {"name": "x", "y" * 9000: 1},
    {"name": "x", "inner": {"kind": "y" * 9000}}, {"name": "x", "pair": ["y" * 9000, 1]},
    {"name": "x", "fps": "y" * 9000}, {"name": "x", "table": {"y" * 9000: "no"}},
])  # fmt: skip
def test_messages_quote_long_values_shortly(given):
    with pytest.raises(InputError) as caught:
        build(Outer, given, "run.yaml")
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2", "line 2: the key 'a' appears a second time"),
        ("1: 2", "line 1: the key 1 is not text"),
        ("- 1", "must be a mapping"),
        ("a: [", "is not YAML"),
        ("a: !!python/object/apply:os.system [ls]", "is not YAML"),
    ],
)
def test_bad_yaml_is_refused(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        read(tmp_path, text)


def test_files_that_are_missing_or_no_text_are_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        load_yaml(tmp_path / "none.yaml")
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(InputError, match="can't be read as text"):
        load_yaml(tmp_path / "x.yaml")


def test_scalars_read_as_people_mean_them(tmp_path):
    values = read(tmp_path, "a: 1e-4\nb: no\nc: 1:30\nd: .inf\ne: -7\nf: null\ng: 1.\nh: '3'\n")
    assert values == {
        "a": 1e-4, "b": "no", "c": "1:30", "d": math.inf, "e": -7, "f": None, "g": 1.0, "h": "3",
    }
    assert read(tmp_path, "") == {}


def test_json_is_read_with_its_tabs_and_pairs_of_surrogates(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{\t"a":\t"\\ud83d\\ude00 \\\\ud83d",\n"b": ["\\ud83d"]}')
    assert load_yaml(path) == {"a": "\U0001f600 \\ud83d", "b": ["\ud83d"]}


def test_aliases_and_anchors_work(tmp_path):
    assert read(tmp_path, "a: &x {k: 1}\nb: *x\n") == {"a": {"k": 1}, "b": {"k": 1}}


def test_overrides_reach_mappings_and_lists_and_leave_the_original_alone(tmp_path):
    base = read(tmp_path, "name: x\nparts: [{rate: 1}]\n")
    changed = apply_overrides(base, ["parts.0.rate=2e-3", "inner.kind=bee", "pair=[3, 4]"])
    outer = build(Outer, changed)
    assert (outer.parts[0].rate, outer.inner.kind, outer.pair) == (2e-3, "bee", (3, 4.0))
    assert base == {"name": "x", "parts": [{"rate": 1}]}


@pytest.mark.parametrize("override", ["novalue", "=3", "parts.1.rate=2", "name.x=2", "parts.x=1"])
def test_an_override_that_leads_nowhere_is_refused(tmp_path, override):
    base = read(tmp_path, "name: x\nparts: [{rate: 1}]\n")
    with pytest.raises(InputError, match="override"):
        apply_overrides(base, [override])


@given(st.floats(allow_nan=False))
def test_floats_survive_an_override(value):
    assert apply_overrides({}, [f"a={value!r}".replace("inf", ".inf")]) == {"a": value}


def test_nearest_names_one_or_all():
    assert nearest("sede", ["seed", "steps"]) == "did you mean 'seed'?"
    assert nearest("xyz", ["b", "a"]) == "known: a, b"
    assert nearest("xyz", []) == "known: none"


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, '{"a": ' + "9" * 5000 + "}"])
def test_json_that_python_gives_up_on_is_refused(tmp_path, text):
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"config .*run\.json is not YAML: a value can't"):
        load_yaml(path)
