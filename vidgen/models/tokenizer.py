"""The tokenizer of prompts, and normalisation of words that a model doesn't know.

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
    """Repair Unicode, resolve HTML entities (twice) and collapse white space, as Wan does."""
    if prompt.isascii() and prompt.isprintable() and "&" not in prompt:  # nothing to repair
        return re.sub(" +", " ", prompt).strip()
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", text).strip()


class PromptTokenizer:
    """Map prompts to token ids, as transformers' AutoTokenizer of the same folder.

    Args:
        folder: with `tokenizer.json` and optionally `words.txt`, the words a model was taught, and
            `synonyms.json`, those of them that were too rare, with commoner ones.
        max_length: most tokens of a prompt, the end mark included.

    Raises:
        ModelError: no usable `tokenizer.json`, or another file is damaged.
    """

    def __init__(self, folder: Path | str, max_length: int = 512) -> None:
        from tokenizers import Tokenizer

        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise ModelError(f"{path} is missing; copy the whole model folder again")
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except BaseException as error:  # the package raises bare Exception, or panics
            if isinstance(error, KeyboardInterrupt):
                raise
            raise ModelError(f"{path} is no tokenizer that can be read: {error}") from error
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
        """Return the id of a token as written in prompts; raise ModelError if it has none."""
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise ModelError(
                f"this model's tokenizer has no token {token!r}; what was learned for it belongs "
                "to another model"
            )
        return int(found)

    def count(self, prompt: str) -> int:
        """Return the number of tokens of a prompt, uncut, the end mark included."""
        return len(self._tokenizer.encode(clean_prompt(prompt)).ids)

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return ids [B, S] int64 of prompts, and their mask [B, S] bool, True for tokens.

        Prompts are cut at `max_length`, with a warning, and padded to the longest.
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
        """Return words the model was never taught, each with likely corrections, best first.

        Without a list of words in the folder the model knows all of language.
        """
        unknown = (word for word in self._ill_known(prompt) if word not in self.words)
        return [(word, self._reader.near(word)) for word in unknown]

    def readings(self, prompt: str, asked: Mapping[str, str] | None = None) -> dict[str, str]:
        """Return words of a prompt with their replacements for the model.

        These are as `asked`; None: for each word that the model was never taught, or too seldom,
        the known one that is meant, if it is clear; see `words.WordReader`.
        """
        if asked is not None:
            words = split_words(clean_prompt(prompt))
            return {word: asked[word] for word in words if word in asked}
        read = {word: self._reader.read(word) for word in self._ill_known(prompt)}
        return {word: known for word, known in read.items() if known is not None}

    def remarks(self, prompt: str, readings: Mapping[str, str]) -> list[str]:
        """Return remarks on a prompt's unknown and rare words, given their replacements."""
        said = [f"reads {word!r} as {readings[word]!r}" if word in readings
                else f"doesn't know the word {word!r}{_near(self._reader.near(word))}"
                for word in self._ill_known(prompt)
                if word in readings or word not in self.words]  # fmt: skip
        return [f"the model {remark}" for remark in said]

    def _ill_known(self, prompt: str) -> list[str]:
        """Return words that the model was never taught, or too seldom."""
        if not self.words:
            return []
        found = dict.fromkeys(split_words(clean_prompt(prompt)))
        return [word for word in found if word not in self.words or word in self.rare_words]

    @cached_property
    def _reader(self) -> WordReader:
        return WordReader(self.words, self._rarity, self.rare_words)

    def _rarity(self, word: str) -> float:
        """Return the rarity of a word in the captions, 0 to 1: common words are one token."""
        return min(1, (len(self._tokenizer.encode(word, add_special_tokens=False)) - 1) / 2)


def read_as(prompt: str, readings: Mapping[str, str]) -> str:
    """Return the prompt for a model, with words replaced."""
    return replace_words(clean_prompt(prompt), readings) if readings else prompt


def _near(words: Sequence[str]) -> str:
    return f"; near it: {', '.join(words)}" if words else ""
