"""Rewrite a short prompt with a local language model.

Video models are trained on long captions and show more of them. The text is decoded greedily, so
the same model gives the same words; an unusable text is refused, never put in the prompt's place.
"""

from __future__ import annotations

import gc
import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vidgen.core.errors import InputError, ModelError
from vidgen.core.request import Request
from vidgen.core.runtime import choose_device
from vidgen.core.values import MAX_PROMPT
from vidgen.pipeline.journal.journal import Journal, recall
from vidgen.pipeline.policy import Policy, enforce
from vidgen.weights.folder import hash_files
from vidgen.weights.load import trim_memory

INSTRUCTION = (
    "You write prompts for a model that makes short video clips. Rewrite the user's prompt as one "
    "paragraph of up to 80 words that says what is seen: subject, movement, place, light, camera. "
    "Keep everything the user says, add nothing that contradicts it, and write in the user's "
    "language. Answer with the paragraph alone."
)
_LONGEST_TOKENS = 256
_KEPT_SHARE = 0.5
"""Of the prompt's own words that the new text must have."""


class LanguageModel:
    """A causal language model of transformers, from a folder; nothing is fetched or run from it.

    `save_pretrained` wrote the folder: weights in safetensors, and the tokenizer.

    Raises:
        ModelError: no such folder, or no such model in it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path, self.device = Path(folder), choose_device("auto")
        if not (self.path / "config.json").is_file():
            raise ModelError(f"{folder} holds no language model; give the folder of one that "
                             "transformers saved, such as Qwen2.5-1.5B-Instruct")

    @cached_property
    def sha256(self) -> str:
        """Hash of its weights' and tokenizer's files."""
        names = sorted(self.path.glob("*.safetensors")) + sorted(self.path.glob("*.json"))
        hashes = hash_files(names)
        lines = "".join(f"{path.name} {hashes[path]}\n" for path in names)
        return hashlib.sha256(lines.encode()).hexdigest()

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        own = {"local_files_only": True, "trust_remote_code": False}
        try:
            with without_bars(logging):
                tokenizer = AutoTokenizer.from_pretrained(self.path, **own)
                model = AutoModelForCausalLM.from_pretrained(
                    self.path, dtype="auto", use_safetensors=True, **own)
        except (OSError, ValueError, KeyError, ImportError) as error:
            first = str(error).strip().splitlines()[0]
            raise ModelError(f"{self.path} can't be opened as a language model: {first}") from error
        return tokenizer, model.to(self.device).eval()

    def answer(self, instruction: str, asked: Sequence[str], max_tokens: int) -> str:
        """Return the model's greedy answer, at most `max_tokens` long.

        `instruction` is the system prompt; `asked` are the user's turns and, between them, the
        model's earlier answers.

        Raises:
            InputError: a text longer than the model's context.
        """
        import torch

        tokenizer, model = self._loaded
        tokens = self._tokens(tokenizer, instruction, asked).to(self.device)
        room = getattr(model.config, "max_position_embeddings", None) or 1 << 30
        if tokens.shape[1] >= room:
            raise InputError(f"the text has {tokens.shape[1]} tokens, and {self.path} reads {room} "
                             "with its answer; shorten it")
        with torch.inference_mode():
            said = model.generate(
                tokens, attention_mask=torch.ones_like(tokens), do_sample=False, num_beams=1,
                max_new_tokens=min(max_tokens, room - tokens.shape[1]), temperature=None,
                top_p=None, top_k=None, pad_token_id=tokenizer.pad_token_id or
                tokenizer.eos_token_id,
            )  # fmt: skip
        text: str = tokenizer.decode(said[0, tokens.shape[1] :], skip_special_tokens=True)
        return text.strip()

    @staticmethod
    def _tokens(tokenizer: Any, instruction: str, asked: Sequence[str]) -> Any:
        turns = [{"role": ("user", "assistant")[index % 2], "content": text}
                 for index, text in enumerate(asked)]
        if tokenizer.chat_template is None:
            whole = "\n\n".join([instruction, *asked]) + "\n\n"
            return tokenizer(whole, return_tensors="pt").input_ids
        try:
            found = tokenizer.apply_chat_template(
                [{"role": "system", "content": instruction}, *turns], add_generation_prompt=True,
                return_tensors="pt", return_dict=True)
        except Exception:  # templates raise what they like for a role they don't know
            turns[0]["content"] = f"{instruction}\n\n{turns[0]['content']}"
            found = tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        return found["input_ids"]

    def facts(self) -> dict[str, Any]:
        """Return its identity for recipes."""
        return {"name": self.path.resolve().name, "sha256": self.sha256,
                "transformers": version("transformers")}

    def close(self) -> None:
        """Free the memory."""
        vars(self).pop("_loaded", None)
        gc.collect()
        trim_memory()


@contextmanager
def without_bars(*libraries: Any) -> Iterator[None]:
    """Hide loading bars of `utils.logging` modules, which would break into our own report."""
    shown = [library for library in libraries if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()


def settle_texts(
    request: Request, journals: Sequence[Journal], policy: Policy | None
) -> tuple[Request, dict[str, Any]]:
    """Recall jobs' settings, rewrite the prompt if requested, and apply the policy to every text.

    Return the request with the final prompt, and the recipe's entries about it. A journal that
    began with a rewritten prompt keeps it.

    Raises:
        InputError: a text that the policy refuses, or a damaged journal.
    """
    enforce(policy, request)
    request = recall(request, journals)
    if request.expand is None:
        return request, {}
    sha256, found = LanguageModel(request.expand).sha256, None
    for recipe in (journal.recipe or {} for journal in journals):
        kept = recipe.get("rewritten")
        if kept and (kept["prompt"], kept["by"]["sha256"]) == (request.prompt, sha256):
            found = recipe["plan"]["prompt"], kept
            break
    text, record = found or rewrite_prompt(request.expand, request.prompt)
    request = request.replace(prompt=text, expand=None)
    enforce(policy, request)
    return request, {"rewritten": record}


def rewrite_prompt(folder: str | Path, prompt: str) -> tuple[str, dict[str, Any]]:
    """Return a prompt rewritten by the model in a folder, and the recipe's record of it."""
    with closing(LanguageModel(folder)) as model:
        text, why = try_rewriting(model, prompt)
    if why is not None:
        raise InputError(f"what {folder} made of the prompt is of no use: {why}; leave --expand "
                         "out to use your own words, or give a model that was taught to follow "
                         "instructions")
    return text, {"prompt": prompt, "by": model.facts()}


def try_rewriting(model: LanguageModel, prompt: str) -> tuple[str, str | None]:
    """Return a model's new text, and the reason why it is unusable, or None."""
    text = one_paragraph(model.answer(INSTRUCTION, [prompt], _LONGEST_TOKENS))
    why = fault_of(text, prompt)
    shown = text if len(text) <= 80 else f"{text[:77]}..."
    return text, None if why is None else f"{why} ({shown!r})"


def one_paragraph(text: str) -> str:
    """Return a text without line breaks, surrounding quotes, or an unfinished last sentence."""
    text = re.sub(r"<think>.*?</think>", " ", text, flags=re.DOTALL)
    text = " ".join(text.split()).strip("\"'“”` ")
    end = max(text.rfind(sign) for sign in ".!?。！？")
    return text[: end + 1] if end > len(text) // 2 else text


def fault_of(text: str, prompt: str) -> str | None:
    """Return the reason why a text can't replace a prompt, or None."""
    words, own = _words(text), {word for word in _words(prompt) if len(word) > 3}
    if not text:
        return "there is nothing"
    if len(text) > MAX_PROMPT:
        return f"it has {len(text)} characters, {MAX_PROMPT} are read"
    if "\ufffd" in text or not all(char.isprintable() for char in text):
        return "it has signs that are no text"
    if len(words) > 20 and len(set(words)) < len(words) / 4:
        return "it repeats itself"
    kept = sum(any(word[:4] == other[:4] for other in words) for word in own)
    if kept < _KEPT_SHARE * len(own):
        return "it isn't about what the prompt says"
    return None


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
