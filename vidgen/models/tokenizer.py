"""The tokenizer of prompts, with normalisation of words that a model doesn't know.

Axes: B batch, S text tokens.
"""

from __future__ import annotations

import html
import logging
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from vidgen.core.errors import ModelError
from vidgen.models.words import WordReader, read_synonyms, replace_words, split_words

logger = logging.getLogger(__name__)

EOS, PAD = "</s>", "<pad>"


def clean_prompt(prompt: str) -> str:
    """Repair Unicode, unescape HTML entities (twice) and collapse white space, as Wan does."""
    if prompt.isascii() and prompt.isprintable() and "&" not in prompt:  # nothing to repair
        return re.sub(" +", " ", prompt).strip()
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", text).strip()


class PromptTokenizer:
    """Tokenizer of prompts, equivalent to transformers' AutoTokenizer of the same folder.

    Args:
        folder: contains `tokenizer.json` and optionally `words.txt` (the words in the model's
            training captions) and `synonyms.json` (words that were rare in them, each with a more
            common one).
        max_length: largest number of tokens of a prompt, including the end token.

    Raises:
        ModelError: `tokenizer.json` is missing, or a file is damaged.
    """

    def __init__(self, folder: Path | str, max_length: int = 512) -> None:
        from tokenizers import Tokenizer

        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise ModelError(f"{path} is missing; copy the whole model folder again")
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except BaseException as error:  # the package raises bare Exception, or a Rust panic
            if isinstance(error, KeyboardInterrupt):
                raise
            raise ModelError(
                f"{path} can't be read as a tokenizer: {error}; copy it again"
            ) from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.max_length = max_length
        self.vocab_size: int = self._tokenizer.get_vocab_size()
        self.pad_id: int = self._tokenizer.token_to_id(PAD) or 0
        words = Path(folder) / "words.txt"
        try:
            known = words.read_text("utf-8") if words.is_file() else ""
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"{words} can't be read as text: {error}; copy it again") from error
        self.words = frozenset(known.split())
        rare = Path(folder) / "synonyms.json"
        self.rare_words = read_synonyms(rare) if rare.is_file() else {}

    def token_id(self, token: str) -> int:
        """Return the id of a token as written in prompts; raise ModelError for an unknown one."""
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise ModelError(
                f"this model's tokenizer has no token {token!r}; its embedding was trained for "
                "another model"
            )
        return int(found)

    def count(self, prompt: str) -> int:
        """Return the number of tokens of a prompt before truncation, including the end token."""
        return len(self._tokenizer.encode(clean_prompt(prompt)).ids)

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return token ids [B, S] int64 of prompts, and their mask [B, S] bool, False for padding.

        Prompts are padded to the longest, and truncated to `max_length` with a warning.
        """
        rows = [row.ids for row in self._tokenizer.encode_batch([clean_prompt(p) for p in prompts])]
        for i, row in enumerate(rows):
            if len(row) > self.max_length:
                logger.warning("the prompt has %d tokens; the last %d are cut, the model reads %d",
                               len(row), len(row) - self.max_length, self.max_length)
                rows[i] = row[: self.max_length - 1] + row[-1:]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [self.pad_id] * (longest - len(row)) for row in rows])
        lengths = torch.tensor([len(row) for row in rows])
        return ids, torch.arange(longest) < lengths[:, None]

    def unknown_words(self, prompt: str) -> list[tuple[str, list[str]]]:
        """Return words that the model doesn't know, each with likely corrections, best first.

        Without `words.txt`, every word counts as known.
        """
        unknown = (word for word in self._ill_known(prompt) if word not in self.words)
        return [(word, self._reader.near(word)) for word in unknown]

    def replacements(self, prompt: str, asked: Mapping[str, str] | None = None) -> dict[str, str]:
        """Return replacements for words of a prompt, by the word.

        They are taken from `asked`; None: for each unknown or rare word, the known word that is
        most likely meant, if it is clear; see `words.WordReader`.
        """
        if asked is not None:
            words = split_words(clean_prompt(prompt))
            return {word: asked[word] for word in words if word in asked}
        read = {word: self._reader.read(word) for word in self._ill_known(prompt)}
        return {word: known for word, known in read.items() if known is not None}

    def remarks(self, prompt: str, replacements: Mapping[str, str]) -> list[str]:
        """Return notes on a prompt's unknown and rare words, given their replacements."""
        remarks = [f"reads {word!r} as {replacements[word]!r}" if word in replacements
                   else f"doesn't know the word {word!r}{_near(self._reader.near(word))}"
                   for word in self._ill_known(prompt)
                   if word in replacements or word not in self.words]  # fmt: skip
        return [f"the model {remark}" for remark in remarks]

    def _ill_known(self, prompt: str) -> list[str]:
        """Return words that the training captions contained never or too rarely."""
        if not self.words:
            return []
        found = dict.fromkeys(split_words(clean_prompt(prompt)))
        return [word for word in found if word not in self.words or word in self.rare_words]

    @cached_property
    def _reader(self) -> WordReader:
        return WordReader(self.words, self._rarity, self.rare_words)

    def _rarity(self, word: str) -> float:
        """Estimate a word's rarity in the captions, 0 to 1: common words are a single token."""
        return min(1, (len(self._tokenizer.encode(word, add_special_tokens=False)) - 1) / 2)


def normalise_words(prompt: str, replacements: Mapping[str, str]) -> str:
    """Replace words of a prompt by their replacements for the model."""
    return replace_words(clean_prompt(prompt), replacements) if replacements else prompt


def _near(words: Sequence[str]) -> str:
    return f"; near it: {', '.join(words)}" if words else ""
