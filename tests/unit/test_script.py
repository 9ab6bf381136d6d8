"""Scripts: what is read as people mean it, and every mistake told with its line and remedy."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vidgen.core.config import dump
from vidgen.core.errors import InputError
from vidgen.story.elements import Camera, Caption, ShotFrame, TimedPrompt
from vidgen.story.script import Script

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "configs/scripts").glob("*.yaml"))
SCHEMA = json.loads((ROOT / "docs/script.schema.json").read_text())

FILM = """\
version: 1
project: {fps: 12, style: by day, defaults: {duration: 2, camera: static}}
characters:
  hero: a red car
  cat: {description: a cat, seed: 4}
places: {desert: the desert}
scenes: {a: {title: One, place: desert, style: wide}}
shots:
  - {id: one, scene: a, prompt: "{hero} drives through {place}", camera: pan-left}
  - prompt: ["{cat} spins", {at: 1, prompt: "{{cat}} rises"}]
    id: two
    continue_from: one
    caption: hello
    last_frame: {shot: one, frame: first}
"""


def read(folder, text, name="film.yaml"):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return Script.read(path)


def shots(text):
    return f"version: 1\nshots:\n{text}"


def test_a_script_reads_as_it_is_meant(tmp_path):
    script = read(tmp_path, FILM)
    one, two = script.shots
    assert script.words(one, one.prompt[0].prompt) == (
        "a red car drives through the desert, the camera pans left, wide, by day"
    )
    assert script.words(two, two.prompt[1].prompt) == (
        "{cat} rises, the camera stays still, by day"
    )
    assert script.cast(one) == ["hero", "desert"]
    assert script.cast(two) == ["cat"]
    assert two.prompt == (TimedPrompt("{cat} spins"), TimedPrompt("{{cat}} rises", 1.0))
    assert two.caption == (Caption("hello"),)
    assert two.last_frame == ShotFrame("one", "first")
    assert two.needs == ("one", "one")
    assert script.lines == {"one": 9, "two": 10}


@pytest.mark.parametrize(("strength", "words"), [
    (0.2, "the camera pans left slowly"), (0.5, "the camera pans left"),
    (0.9, "the camera pans left quickly"),
])
def test_a_cameras_strength_is_its_pace(strength, words):
    assert Camera("pan-left", strength).words == words
    assert Camera("static", strength).words == "the camera stays still"


def test_json_yaml_with_and_without_a_mark_of_byte_order_are_one(tmp_path):
    script = read(tmp_path, FILM)
    data = dump(script)
    for text, name in (
        (json.dumps(data, indent="\t"), "film.json"), (json.dumps(data), "flat.json"),
        ("\ufeff" + FILM, "bom.yaml"), ("\ufeff" + json.dumps(data), "bom.json"),
    ):
        assert read(tmp_path, text, name) == script


def test_json_keeps_signs_beyond_the_basic_plane_and_backslashes(tmp_path):
    prompts = ["a \U0001f600 smiles", "a path \\ud83d here", "a tab \t in text"]
    data = {"shots": [{"id": f"s{i}", "prompt": p} for i, p in enumerate(prompts)]}
    script = read(tmp_path, json.dumps(data), "film.json")
    assert [shot.prompt[0].prompt for shot in script.shots] == prompts


@pytest.mark.parametrize("keys", [{"prompt": "a \ud800"}, {"prompt": "x", "caption": "\udc00"}])
def test_half_a_character_is_refused_before_anything_is_rendered(tmp_path, keys):
    with pytest.raises(InputError, match=r"contains .*, half of a character; remove it"):
        read(tmp_path, json.dumps({"shots": [{"id": "a", **keys}]}), "film.json")


def test_a_plain_list_is_a_prompt_a_line_and_its_ids_last(tmp_path):
    text = "# two cats\n\na cat {walks}\na dog, sleeping\na cat {walks}\n"
    script = read(tmp_path, text, "list.txt")
    assert [shot.id for shot in script.shots] == ["a-cat-walks", "a-dog-sleeping", "a-cat-walks-2"]
    assert script.words(script.shots[0], script.shots[0].prompt[0].prompt) == "a cat {walks}"
    assert [*script.lines.values()] == [3, 4, 5]
    longer = read(tmp_path, "a bee hums\n" + text, "list.txt")
    assert [shot.id for shot in longer.shots[1:]] == [shot.id for shot in script.shots]


def test_the_order_follows_the_script_but_for_what_shots_need(tmp_path):
    script = read(tmp_path, shots(
        "  - {id: a, prompt: x, continue_from: c}\n  - {id: b, prompt: x}\n"
        "  - {id: c, prompt: x, last_frame: {shot: d}}\n  - {id: d, prompt: x}\n"))
    assert [shot.id for shot in script.order()] == ["d", "c", "a", "b"]


@pytest.mark.parametrize(("text", "message"), [
    ("version: 2\nshots: [{prompt: x}]", "line 1: version is 2; this vidgen reads version 1"),
    ("version: '1'\nshots: [{prompt: x}]", "line 1: version is '1'; this vidgen reads version 1: "
     "write it without quotes"),
    ("version: true\nshots: [{prompt: x}]", "line 1: version is True"),
    ("version: 1", "the key 'shots' is missing"),
    ("shots: []", "the script has no shots"),
    (shots("  - {promt: x}"), "line 3: shots[0]: unknown key 'promt'; did you mean 'prompt'"),
    (shots("  - {prompt: x, seconds: 2}"), "unknown key 'seconds'; did you mean 'duration'"),
    (shots("  - {prompt: x, image: a.png}"), "unknown key 'image'; did you mean 'first_frame'"),
    ("projekt: {}\nshots: [{prompt: x}]", "line 1: unknown key 'projekt'; did you mean 'project'"),
    ("project: {defaults: {step: 3}}\nshots: [{prompt: x}]",
     "line 1: project.defaults: unknown key 'step'; did you mean 'steps'"),
    (shots("  - {prompt: x, duration: soon}"), "duration must be a number, not str 'soon'"),
    (shots("  - {prompt: x, duration: 0}"), "line 3: shots[0]: duration is 0; give seconds above"),
    (shots("  - {prompt: x, duration: .nan}"), "duration is nan"),
    (shots(f"  - {{prompt: x, duration: {'9' * 400}}}"), "duration has 400 digits"),
    (shots("  - {prompt: x, takes: 0}"), "takes is 0; give a whole number from 1 to 100"),
    (shots("  - {prompt: x, takes: 1.5}"), "takes must be a whole number"),
    *((f"project: {{defaults: {{{key}}}}}\nshots: [{{prompt: x}}]", message) for key, message in (
        ("takes: -2", "line 1: project.defaults: takes is -2; give a whole number from 1 to 100"),
        ("takes: 0", "takes is 0; give"), ("takes: 101", "takes is 101; give"),
        ("duration: .nan", "line 1: project.defaults: duration is nan; give seconds"),
        ("duration: .inf", "duration is inf; give seconds above 0, 3600 at most"),
    )),
    (shots("  - {prompt: ''}"), "the prompt is empty"),
    (shots("  - {prompt: []}"), "the list of prompts is empty"),
    (shots("  - {prompt: 3}"), "prompt must be text, not int 3; write it in quotes"),
    (shots("  - {prompt: [{prompt: x, at: 1}]}"), "the first must begin at 0"),
    (shots("  - {prompt: [x, {prompt: y, at: 2}, {prompt: z, at: 1}]}"), "each other one after"),
    (shots("  - {prompt: x, duration: 2, frames: 9}"), "duration and frames are both given"),
    (shots("  - {prompt: x, camera: pan-lef}"), "'pan-lef' is unknown; did you mean 'pan-left'"),
    (shots("  - {prompt: x, camera: {move: static, speed: 2}}"), "unknown key 'speed'"),
    (shots("  - {prompt: x, transition: dissolv}"), "did you mean 'dissolve'"),
    (shots("  - {prompt: x, sound: {}}"), "sound needs one of effects and file"),
    (shots("  - {prompt: x, music: {file: a.mp3, prompt: b}}"), "and one alone"),
    (shots("  - {prompt: x, id: a b}"), "id 'a b' is no name"),
    (shots("  - {prompt: x, id: a}\n  - {prompt: y, id: a}"),
     "line 4: shot 'a' exists already, in line 3"),
    (shots("  - {prompt: '{her} runs'}"),
     "line 3: shot 'her-runs': unknown character or place 'her'"),
    ("characters: {hero: a car}\n" + shots("  - {prompt: '{heroo} runs'}"), "did you mean 'hero'"),
    (shots("  - {prompt: x, characters: [hero]}"), "unknown character 'hero'"),
    (shots("  - {prompt: x, narration: {text: y, speaker: me}}"), "unknown character 'me'"),
    (shots("  - {prompt: '{place} at night'}"), "neither the shot nor its scene has one"),
    (shots("  - {prompt: 'a { b'}"), "has a single {"),
    ("characters: {a: x}\nplaces: {a: y}\n" + shots("  - {prompt: x}"),
     "line 2: 'a' is a character and a place"),
    ("version: 1\ncharacters:\n  a b: x\nshots: [{prompt: x}]", "line 3: 'a b' can't be a name"),
    ("places: {place: x}\nshots: [{prompt: x}]", "line 1: 'place' can't be a name"),
    ("version: 1\nscenes: {s: {place: moon}}\nshots: [{prompt: x}]",
     "line 2: scene 's' plays in the unknown place 'moon'"),
    ("project:\n  finish:\n    font: x.ttf\nshots: [{prompt: x}]", "line 3: font 'x.ttf' does not"),
    (shots("  - {prompt: x, scene: s}"), "unknown scene 's'"),
    (shots("  - {prompt: x, continue_from: y}"), "needs the unknown shot 'y'"),
    (shots("  - {prompt: x, id: one, first_frame: {shot: ones}}\n  - {id: on, prompt: x}"),
     "did you mean 'one'"),
    (shots("  - {prompt: x, id: a, continue_from: a}"), "in a circle of shots: a needs a;"),
    (shots("  - {prompt: x, id: a, continue_from: b}\n  - {prompt: x, id: b, last_frame: "
           "{shot: c}}\n  - {prompt: x, id: c, first_frame: {shot: a}}"),
     "in a circle of shots: a needs b needs c needs a"),
    (shots("  - {prompt: x, id: a, continue_from: b, first_frame: c.png}"), "both given"),
    (shots("  - {prompt: x, first_frame: none.png}"), "first_frame 'none.png' does not exist in"),
    ("characters: {a: {description: x, reference: a.png}}\n" + shots("  - {prompt: '{a}'}"),
     "reference 'a.png' does not exist"),
    (shots("  - {prompt: x, music: tune.mp3}"), "music 'tune.mp3' does not exist"),
    (shots("  - {prompt: x, narration: '@speech.wav'}"), "narration 'speech.wav' does not exist"),
    (shots("\t- {prompt: x}"), "line 3: a tab where YAML allows only spaces"),
    (shots("  -\tprompt: x\n\tseed: 3"), "a tab where"),
    (shots("  - {prompt: x"), "is not YAML: line"),
    ("a: 1\na: 2", "appears a second time"),
    ("- a\n- b", "must be a mapping"),
    ("shots: &s [*s]", "is not YAML: line 1"),
    ("project: &p {defaults: *p}\nshots: [{prompt: x}]", "line 1: found unconstructable recursive"),
])
def test_a_mistake_is_reported_with_its_place_and_remedy(tmp_path, text, message):
    with pytest.raises(InputError) as caught:
        read(tmp_path, text)
    assert message in str(caught.value)
    assert str(tmp_path / "film.yaml") in str(caught.value)


def test_aliases_may_repeat_but_not_without_end(tmp_path):
    good = "shots:\n  - &s {id: a, prompt: x}\n  - {id: b, prompt: x, camera: &c static}\n"
    assert len(read(tmp_path, good).shots) == 2
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    start = time.process_time()
    with pytest.raises(InputError, match="expand to more than 2,000,000 values"):
        read(tmp_path, "\n".join(lines))
    assert time.process_time() - start < 5


@pytest.mark.parametrize(("name", "text", "message"), [
    ("g.txt", "# nothing\n", "the script has no shots"),
    ("h.toml", "", "must end in one of .yaml"),
    ("i.json", '{"shots": [{"prompt": "x"}}', "is not YAML: line 1"),
    ("j.json", '{"shots": [\n{"prompt": "x", "sed": 3}]}', "line 2: shots[0]: unknown key 'sed'"),
    ("k.json", '{"version": 1,\n "version": 1}', "line 2: the key 'version' appears"),
])
def test_mistakes_of_other_formats_are_reported(tmp_path, name, text, message):
    with pytest.raises(InputError) as caught:
        read(tmp_path, text, name)
    assert message in str(caught.value)


def test_a_missing_or_binary_script_is_reported(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        Script.read(tmp_path / "none.yaml")
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(InputError, match=r"can't be read as text.*save it as UTF-8"):
        Script.read(tmp_path / "x.txt")


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=200))
@settings(max_examples=60, deadline=None)
def test_any_text_is_read_or_refused_in_words(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("any")
    for name in ("x.yaml", "x.txt", "x.json"):
        told = str(folder)
        try:
            read(folder, f"shots: [{{prompt: {text}" if name == "x.yaml" else text, name)
        except InputError as error:
            told = str(error)
        assert str(folder) in told


@given(st.sampled_from([".yaml", ".json"]), st.data())
@settings(max_examples=80, deadline=None)
def test_a_damaged_script_is_read_or_refused_in_words(tmp_path_factory, suffix, data):
    texts = {".yaml": FILM,
             ".json": json.dumps({"version": 1, "shots": [{"prompt": "a cat", "seed": 3}]})}
    text = texts[suffix]
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 12)))
    pieces = st.text(alphabet="{}[]:,-&*!|>%@\"'#\n\t 0aé~", max_size=6)
    folder = tmp_path_factory.mktemp("damaged")
    told = str(folder)
    try:
        read(folder, text[:start] + data.draw(pieces) + text[end:], f"film{suffix}")
    except InputError as error:
        told = str(error)
    assert str(folder) in told


def test_ten_thousand_shots_are_read_in_seconds(tmp_path):
    lines = "".join(
        f"  - id: s{n}\n    prompt: a red car drives through scene {n}\n    duration: 2\n"
        + (f"    continue_from: s{n - 1}\n" if n else "")
        for n in range(10_000)
    )
    start = time.process_time()
    script = read(tmp_path, shots(lines))
    assert len(script.order()) == 10_000
    assert time.process_time() - start < 30


def valid(schema, value, whole):
    """Whether a value fits a schema, of the few words that ours is made of."""
    if "$ref" in schema:
        return valid(whole["$defs"][schema["$ref"].rpartition("/")[2]], value, whole)
    if "anyOf" in schema:
        return any(valid(each, value, whole) for each in schema["anyOf"])
    if "enum" in schema:
        return value in schema["enum"]
    kinds = {"object": dict, "array": list, "string": str, "boolean": bool,
             "number": int | float, "integer": int, "null": type(None)}
    named = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    if not any(isinstance(value, kinds[name]) for name in named):
        return False
    if isinstance(value, list) and "items" in schema:
        items = schema.get("prefixItems") or [schema["items"]] * len(value)
        return all(valid(part, each, whole) for part, each in zip(items, value, strict=True))
    if isinstance(value, dict):
        known, more = schema.get("properties", {}), schema.get("additionalProperties")
        if more is False and not value.keys() <= known.keys():
            return False
        return value.keys() >= set(schema.get("required", ())) and all(
            valid(known.get(key, more), each, whole) for key, each in value.items()
        )
    return True


def test_the_published_schema_describes_every_key_of_a_shot():
    shot = SCHEMA["$defs"]["Shot"]
    assert shot["required"] == ["prompt"]
    assert all("description" in each for each in shot["properties"].values())


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_load_and_fit_the_schema(path):
    import yaml

    script = Script.read(path)
    data = yaml.safe_load(path.read_text())
    assert valid(SCHEMA, data, SCHEMA)
    assert valid(SCHEMA, json.loads(json.dumps(dump(script))), SCHEMA)
    data["shots"][0]["promt"] = "x"
    assert not valid(SCHEMA, data, SCHEMA)
    header = [line for line in path.read_text().splitlines() if line.startswith("# ")]
    assert any(line.startswith("# Command: vidgen script") for line in header)
    assert any(line.startswith("# Cost: ") for line in header)


def test_a_script_is_read_without_torch():
    program = (
        f"import sys, vidgen\nvidgen.Script.read({str(EXAMPLES[0])!r})\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
