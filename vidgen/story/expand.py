"""A film's prompts rewritten, and whole scripts drafted, by a language model.

`prompts.json` in the shots' store holds, by the hash of the model's files, the new text of each
prompt, or why there is none. So a second command needs no language model, and only changed prompts
are rewritten.

A draft is untrusted data: it may name what is seen and said, but no files, models, adapters or
settings.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from vidgen.core.config_file import load_yaml
from vidgen.core.errors import InputError, nearest
from vidgen.core.protocols import OnEvent
from vidgen.core.request import OWN_FILE
from vidgen.core.runtime import atomic_write
from vidgen.core.store import Store
from vidgen.pipeline.rewrite import LanguageModel, try_rewriting
from vidgen.story.elements import check_text
from vidgen.story.film import Expansion
from vidgen.story.script import VERSION, Script

INSTRUCTION = """\
You write scripts of short films as YAML. Answer with the YAML alone, of this form:

version: 1
project: {title: The title, style: how all of it looks}
characters:
  fox: {description: a small red fox}
places:
  city: {description: a city at night}
shots:
  - {id: street, prompt: "{fox} runs along a street in {city}", duration: 3, camera: pan-left}
  - {id: roof, prompt: "{fox} sits on a roof", duration: 2, narration: It was late.}

A prompt says what is seen in one sentence, with {name} for characters and places. The camera is \
static, pan-left, pan-right, zoom-in or zoom-out. Tell the user's idea in 3 to 12 shots."""
LONGEST_TOKENS = 2048
MAX_DRAFT_SHOTS = 100
_DESCRIBED = frozenset({"description"})
_KEYS = {
    "script": frozenset({"version", "project", "characters", "places", "scenes", "shots"}),
    "project": frozenset({"title", "style"}), "characters": _DESCRIBED, "places": _DESCRIBED,
    "scenes": frozenset({"title", "place", "style"}),
    "shots": frozenset({"id", "scene", "place", "characters", "prompt", "duration", "camera",
                        "narration", "caption", "transition"}),
}  # fmt: skip
"""Keys that a draft may hold, by place."""
PROMPTS = "prompts"
_KEEP_S = 10.0  # between two writings of the file


def expand_prompts(script: Script, model: str | Path, folder: Path, tell: OnEvent) -> Expansion:
    """Rewrite a film's prompts by a language model, which is closed afterwards.

    A prompt whose rewriting is of no use stays unchanged, with a note. `folder`, of the film's
    shots, keeps the new texts.

    Raises:
        ModelError: no such model.
        InputError: no rewriting is of use, or a prompt is longer than the model reads.
    """
    prompts = list(dict.fromkeys(script.described(shot, each.prompt) for shot in script.shots
                                 for each in shot.prompt))
    writer = LanguageModel(model)
    store = Store(folder)
    kept = _known_texts(store)
    known = kept.setdefault(writer.sha256, {})
    missing = [prompt for prompt in prompts if prompt not in known]
    try:
        if missing:
            _rewrite(writer, missing, known, lambda: store.keep(PROMPTS, kept), tell)
        by = writer.facts()
    finally:
        writer.close()
    texts = {prompt: known[prompt]["text"] for prompt in prompts if "text" in known[prompt]}
    stay = [prompt for prompt in prompts if prompt not in texts]
    if not texts:
        raise InputError(f"what {model} made of the film's prompts is of no use: "
                         f"{known[stay[0]]['fault']}; leave --expand out to use your own words, "
                         "or give a model that was taught to follow instructions")
    for prompt in stay:
        tell({"event": "note", "text": f"the prompt {prompt!r} stays as it is, since what "
              f"{by['name']} made of it is of no use: {known[prompt]['fault']}"})
    return Expansion(texts, by)


def _rewrite(
    writer: LanguageModel, prompts: list[str], known: dict[str, dict[str, str]],
    keep: Callable[[], None], tell: OnEvent,
) -> None:
    kept_s = time.monotonic()
    try:
        for done, prompt in enumerate(prompts):
            tell({"event": "progress", "stage": "expand", "done": done, "total": len(prompts)})
            text, fault = try_rewriting(writer, prompt)
            known[prompt] = {"text": text} if fault is None else {"fault": fault}
            if time.monotonic() - kept_s > _KEEP_S:
                keep()
                kept_s = time.monotonic()
    finally:
        keep()
    tell({"event": "progress", "stage": "expand", "done": len(prompts), "total": len(prompts)})


def _known_texts(store: Store) -> dict[str, dict[str, dict[str, str]]]:
    """Return the kept texts, without entries that a damaged file might hold."""
    try:
        return {sha256: {prompt: made for prompt, made in known.items()
                         if made.keys() in ({"text"}, {"fault"})}
                for sha256, known in store.data(PROMPTS).items()}
    except AttributeError:
        return {}


def write_draft(folder: str | Path, idea: str, path: str | Path) -> Script:
    """Have the language model of a folder draft a script; write it, over an existing file.

    Idea and model are kept in `project.drafted_from`.

    Raises:
        ModelError: no such model.
        InputError: no idea, or two drafts that were no scripts; nothing is written.
    """
    check_text("idea", idea)
    model = LanguageModel(folder)
    try:
        data = _drafted(model, idea)
    finally:
        model.close()
    facts = {"idea": idea, "model": model.facts()["name"], "sha256": model.sha256}
    data["project"] = {**(data.get("project") or {}), "drafted_from": facts}
    text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100)
    head = ("# Drafted by a language model. Read it, change it, then:\n"
            f"#   vidgen script {Path(path).name} --check\n")
    atomic_write(path, (head + text).encode())
    return Script.read(path)


def _drafted(model: LanguageModel, idea: str) -> dict[str, Any]:
    turns, fault = [idea], ""
    for _ in range(2):
        try:
            answer = model.answer(INSTRUCTION, turns, LONGEST_TOKENS)
        except InputError:
            if fault:  # with its first answer the talk is too long for it
                break
            raise
        try:
            return parse_draft(answer)
        except InputError as error:
            fault = str(error)
            turns += [answer, f"That can't be read: {fault}. Write all of it again, corrected."]
    raise InputError(
        f"what {model.path} drafted is no script: {fault}; nothing was written. Give a model that "
        "was taught to follow instructions, say more in the idea, or begin with --init")


def parse_draft(answer: str) -> dict[str, Any]:
    """Return the script in an answer, checked.

    Raises:
        InputError: it has none, or the script holds a key that a draft may not.
    """
    answer = re.sub(r"<think>.*?</think>", "", answer, flags=re.DOTALL)
    fenced = re.search(r"```(?:ya?ml)?\s*\n(.*?)(?:```|\Z)", answer, re.DOTALL)
    text = fenced[1] if fenced else answer
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "draft.yaml"
        path.write_text(text, "utf-8", errors="replace")
        try:
            data = load_yaml(path, "script")
            _check_keys(data)
            script = Script.read(path)
        except InputError as error:
            raise InputError(_without_place(str(error), path)) from None
    if len(script.shots) > MAX_DRAFT_SHOTS:
        raise InputError(f"it has {len(script.shots)} shots; give {MAX_DRAFT_SHOTS} at most")
    if any(said.text.startswith(OWN_FILE) for shot in script.shots for said in shot.narration):
        raise InputError("a narration names a file; give the words that are spoken")
    return {"version": VERSION, **_plain({k: v for k, v in data.items() if k != "version"})}


def _without_place(text: str, path: Path) -> str:
    """Return a message without the temporary file that held the draft."""
    for place in (f"script {path}", f"{path}, ", f"{path}: ", str(path)):
        text = text.replace(place, "the script" if place.startswith("script") else "")
    return text.replace(str(path.parent.resolve()), "its folder")


def _check_keys(data: Mapping[str, Any]) -> None:
    parts = [("script", data), ("project", data.get("project"))]
    for name in ("characters", "places", "scenes", "shots"):
        value = data.get(name)
        listed = list(value.values()) if isinstance(value, Mapping) else value
        parts += [(name, part) for part in listed] if isinstance(listed, list) else []
    for where, part in parts:
        for key in part if isinstance(part, Mapping) else ():
            if key not in _KEYS[where]:
                raise InputError(f"{where} can't have the key {key[:40]!r} in a draft; "
                                 f"{nearest(key, _KEYS[where])}")


def _plain(value: Any) -> Any:
    """Return data that YAML writes without marks of Python's types."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
