"""A film's prompts written anew by a language model, each once, and kept beside its shots.

`prompts.json` in the shots' folder holds, by the hash of the model's files, what became of each
prompt: the new text, or why there is none. So a second command needs no language model at work,
and a script that was changed asks for the new prompts alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidgen.core.errors import InputError
from vidgen.core.protocols import OnEvent
from vidgen.core.runtime import atomic_write

if TYPE_CHECKING:
    from vidgen.pipeline.rewrite import LanguageModel
    from vidgen.story.script import Script

PROMPTS = "prompts.json"
_KEEP_S = 10.0  # between two writings of the file


@dataclass(frozen=True)
class Expansion:
    """Prompts that a language model wrote anew.

    Attributes:
        texts: by what the script's prompts describe, the names in them replaced.
        by: the model's name, hash and library.
    """

    texts: Mapping[str, str]
    by: Mapping[str, Any]

    def facts(self) -> dict[str, Any]:
        """The recipe's entry: who wrote, and both texts of each prompt."""
        return {"by": dict(self.by), "prompts": [{"prompt": prompt, "text": text}
                                                 for prompt, text in self.texts.items()]}


def expand_prompts(script: Script, model: str | Path, folder: Path, tell: OnEvent) -> Expansion:
    """Have a language model rewrite a film's prompts; it leaves the memory afterwards.

    A prompt of which it makes nothing of use stays as it is, and that is told.

    Args:
        script: checked.
        model: folder of the language model.
        folder: of the film's shots, in which the new texts are kept.
        tell: told of progress and of prompts that stay as they are.

    Raises:
        ModelError: no such model.
        InputError: of no prompt it made anything of use, or one is longer than it reads.
    """
    from vidgen.pipeline.rewrite import LanguageModel

    prompts = list(dict.fromkeys(script.described(shot, each.prompt) for shot in script.shots
                                 for each in shot.prompt))
    writer = LanguageModel(model)
    kept = _read(folder / PROMPTS)
    known = kept.setdefault(writer.sha256, {})
    missing = [prompt for prompt in prompts if prompt not in known]
    try:
        if missing:
            _rewrite(writer, missing, known, lambda: _keep(folder / PROMPTS, kept), tell)
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
    """Ask for each prompt, writing down now and then what became of them."""
    from vidgen.pipeline.rewrite import try_rewriting

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


def _keep(path: Path, kept: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(kept, indent=1, ensure_ascii=False).encode())


def _read(path: Path) -> dict[str, dict[str, dict[str, str]]]:
    """What is kept, without entries that a damaged file might hold."""
    try:
        kept = json.loads(path.read_text("utf-8"))
        return {sha256: {prompt: made for prompt, made in known.items()
                         if made.keys() in ({"text"}, {"fault"})} for sha256, known in kept.items()}
    except (OSError, ValueError, AttributeError):
        return {}
