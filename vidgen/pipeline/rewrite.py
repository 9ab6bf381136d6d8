"""A short prompt rewritten by a language model that lies on this machine.

Models of video were trained on long captions and show more of them. The text is written greedily,
so the same model gives the same words; what is of no use is refused, never put in the prompt's
place.
"""

from __future__ import annotations

import gc
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidgen.core.errors import InputError, ModelError
from vidgen.core.request import MAX_PROMPT, Request
from vidgen.core.runtime import choose_device
from vidgen.pipeline.journal.recall import recall
from vidgen.pipeline.policy import Policy, enforce
from vidgen.weights.folder import hash_files
from vidgen.weights.load import trim_memory

if TYPE_CHECKING:
    from vidgen.pipeline.journal.journal import Journal

INSTRUCTION = (
    "You write prompts for a model that makes short video clips. Rewrite the user's prompt as one "
    "paragraph of up to 80 words that says what is seen: subject, movement, place, light, camera. "
    "Keep everything the user says, add nothing that contradicts it, and write in the user's "
    "language. Answer with the paragraph alone."
)
_LONGEST_TOKENS = 256
_KEPT_SHARE = 0.5
"""Of the prompt's own words that a rewriting must have."""


@dataclass(frozen=True)
class Rewriting:
    """A prompt rewritten.

    Attributes:
        text: what takes its place.
        record: the prompt as it was given, and what rewrote it, for the recipe.
    """

    text: str
    record: dict[str, Any]


class LanguageModel:
    """A causal language model of transformers, from a folder; nothing is fetched or run from it.

    Args:
        folder: as `save_pretrained` writes it, weights in safetensors, with its tokenizer.
        device: where it computes.

    Raises:
        ModelError: no such folder, or no such model in it.
    """

    def __init__(self, folder: str | Path, device: str = "auto") -> None:
        self.path, self.device = Path(folder), choose_device(device)
        if not (self.path / "config.json").is_file():
            raise ModelError(f"{folder} holds no language model; give the folder of one that "
                             "transformers saved, such as Qwen2.5-1.5B-Instruct")

    @cached_property
    def sha256(self) -> str:
        """Of its weights' and tokenizer's files."""
        names = sorted(self.path.glob("*.safetensors")) + sorted(self.path.glob("*.json"))
        hashes = hash_files(names)
        told = "".join(f"{path.name} {hashes[path]}\n" for path in names)
        return hashlib.sha256(told.encode()).hexdigest()

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        """(tokenizer, model)."""
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        own = {"local_files_only": True, "trust_remote_code": False}
        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.path, **own)
            model = AutoModelForCausalLM.from_pretrained(
                self.path, dtype="auto", use_safetensors=True, **own)
        except (OSError, ValueError, KeyError, ImportError) as error:
            first = str(error).strip().splitlines()[0]
            raise ModelError(f"{self.path} can't be opened as a language model: {first}") from error
        finally:
            if shown:
                logging.enable_progress_bar()
        return tokenizer, model.to(self.device).eval()

    def answer(self, instruction: str, asked: Sequence[str], max_tokens: int) -> str:
        """What the model says, greedily.

        Args:
            instruction: what it is to do.
            asked: the user's turns and, between them, its own earlier answers.
            max_tokens: of the answer.

        Raises:
            InputError: a text that is longer than it reads.
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
        """What it is, for recipes."""
        return {"name": self.path.resolve().name, "sha256": self.sha256,
                "transformers": version("transformers")}

    def close(self) -> None:
        """Leave the memory."""
        vars(self).pop("_loaded", None)
        gc.collect()
        trim_memory()


def settle_texts(
    request: Request, journals: Sequence[Journal], policy: Policy | None
) -> tuple[Request, dict[str, Any]]:
    """Recall how jobs began, rewrite the prompt if asked, and have the policy see every text.

    Returns:
        The request whose prompt is what is to be encoded, and what recipes say of it besides.

    Raises:
        InputError: a text that the policy refuses, or a damaged journal.
    """
    enforce(policy, request)
    request, rewritten = settle_prompt(recall(request, journals), journals)
    enforce(policy, request)
    return request, rewritten


def settle_prompt(
    request: Request, journals: Sequence[Journal] = ()
) -> tuple[Request, dict[str, Any]]:
    """A request whose prompt is what is to be encoded, and what recipes say of it besides.

    Args:
        request: that may ask for a rewriting.
        journals: of its clips; one that was begun with a rewriting goes on with that.

    Raises:
        ModelError: no such model.
        InputError: what it wrote is of no use.
    """
    if request.expand is None:
        return request, {}
    sha256 = LanguageModel(request.expand).sha256
    for recipe in (journal.recipe or {} for journal in journals):
        kept = recipe.get("rewritten")
        if kept and (kept["prompt"], kept["by"]["sha256"]) == (request.prompt, sha256):
            text = recipe["plan"]["prompt"]
            return replace(request, prompt=text, expand=None), {"rewritten": kept}
    made = rewrite_prompt(request.expand, request.prompt)
    return replace(request, prompt=made.text, expand=None), {"rewritten": made.record}


def rewrite_prompt(folder: str | Path, prompt: str) -> Rewriting:
    """A prompt rewritten by a language model, which leaves the memory afterwards.

    Args:
        folder: of the model.
        prompt: as a person wrote it.

    Raises:
        ModelError: no such model.
        InputError: what it wrote is of no use; says why, and the prompt stays as it was.
    """
    model = LanguageModel(folder)
    try:
        text, why = try_rewriting(model, prompt)
    finally:
        model.close()
    if why is not None:
        raise InputError(f"what {folder} made of the prompt is of no use: {why}; leave --expand "
                         "out to use your own words, or give a model that was taught to follow "
                         "instructions")
    return Rewriting(text, {"prompt": prompt, "by": model.facts()})


def try_rewriting(model: LanguageModel, prompt: str) -> tuple[str, str | None]:
    """What a model makes of a prompt, and why that can't take its place; None where it can.

    Raises:
        InputError: a prompt that is longer than the model reads.
    """
    text = one_paragraph(model.answer(INSTRUCTION, [prompt], _LONGEST_TOKENS))
    why = fault_of(text, prompt)
    shown = text if len(text) <= 80 else f"{text[:77]}..."
    return text, None if why is None else f"{why} ({shown!r})"


def one_paragraph(text: str) -> str:
    """A text without line breaks, quotes around it, or a last sentence that was cut off."""
    text = re.sub(r"<think>.*?</think>", " ", text, flags=re.DOTALL)
    text = " ".join(text.split()).strip("\"'“”` ")
    end = max(text.rfind(sign) for sign in ".!?。！？")
    return text[: end + 1] if end > len(text) // 2 else text


def fault_of(text: str, prompt: str) -> str | None:
    """Why a rewriting of a prompt can't take its place; None where it can."""
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
