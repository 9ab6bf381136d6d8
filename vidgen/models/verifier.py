"""A verifier: which of the things that it knows the latents of a clip show, and how surely.

A generator draws what it is asked for more often than not; a network that notices when it didn't is
far smaller, and lets another candidate be drawn (verifiers of search over a diffusion model's
noise: Ma et al. 2025, "Inference-time scaling for diffusion models beyond scaling denoising
steps"). It looks at latents, so nothing is decoded before it is content.

Axes: B clips, C latent channels, F latent frames, h w latent rows and columns, K labels, T tints.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vidgen.models.words import SPECIAL, WORD, split_words
from vidgen.ops.conv import Residual, conv_block

SMALL = 2.0
"""Latents of a thing that leave a doubt of 1 / e whether it is there."""
MOST = 0.75
"""Share of the frames that count: things come, and what drives past is gone at the end."""
_ABSENT = re.compile(r"\b(?:like|as if|without)\b[^,.;:!?]*", re.IGNORECASE)
"""Parts of a sentence that compare, or say what isn't there: "bounces like a ball"."""
_ARTICLE = r"\b(?:an?|the|one|some|this|that|another|my|our|your|his|her|its|their)\b"
_BEFORE = re.compile(rf"{_ARTICLE}(?:[ \t]+(?!{_ARTICLE})[\w'-]+){{0,4}}[ \t]+$", re.IGNORECASE)
"""Beginning of a name's phrase: "the little blue " of "the little blue car"."""
ANY = -1
"""Stands for a tint where any will do."""
TINT_DIM = 64
"""Width of the features that tints are found by."""
LIKELY = 0.3
"""Share of a thing's latents from which all of it has a tint."""


class Want(NamedTuple):
    """A thing that a clip is to show: the numbers of its label and of its tint, or `ANY`."""

    label: int
    tint: int = ANY


class Mention(NamedTuple):
    """A thing that a prompt names: its label's number, its phrase's place, its tint's number."""

    label: int
    start: int
    stop: int
    tint: int = ANY


class Answers(NamedTuple):
    """Logits of what latent frames show, float32.

    names: [N, K + 1, h, w], of none last.
    tints: [N, T + 1, h, w], of a thing's own colours last; or None.
    """

    names: Tensor
    tints: Tensor | None


@dataclass(frozen=True)
class VerifierConfig:
    """Vocabulary and sizes of a verifier.

    Args:
        labels: K things, each with all that prompts call it by, in lower case.
        tints: T colours, each with all the words for it; a thing of such a colour by itself has it,
            too. Empty: tints aren't judged.
        latent_channels: C.
        dim: width.
        num_blocks: of two convolutions; an answer depends on 2 * num_blocks + 1 latents each way.
        enough: the score from which a clip shows what was asked for.
        legible: the noise level below which a guess of the clip shows where things are.
        looks: noise levels between which looks are settled: prompts of single things name these
            there, elsewhere what the things do.

    Raises:
        ValueError: a label without a name.
    """

    labels: tuple[tuple[str, ...], ...] = ()
    tints: tuple[tuple[str, ...], ...] = ()
    latent_channels: int = 16
    dim: int = 96
    num_blocks: int = 4
    enough: float = 0.9
    legible: float = 0.85
    looks: tuple[float, float] = (0.55, 0.75)

    def __post_init__(self) -> None:
        for kind, names in (("label", self.labels), ("tint", self.tints)):
            if not all(names):
                raise ValueError(f"{kind} {names.index(())} has no name")

    @cached_property
    def _by_words(self) -> dict[tuple[str, ...], int]:
        return {tuple(split_words(name)): number
                for number, names in enumerate(self.labels) for name in names}

    @cached_property
    def _tints_by_word(self) -> dict[str, int]:
        return {word: number for number, words in enumerate(self.tints) for word in words}

    @cached_property
    def _tinted(self) -> re.Pattern[str]:
        """Beginning of a phrase without an article: "red " of "red car"."""
        words = "|".join(map(re.escape, self._tints_by_word)) or r"(?!)"
        return re.compile(rf"\b(?:(?:{words})[ \t]+)+$", re.IGNORECASE)

    def labels_in(self, prompt: str) -> frozenset[int]:
        """The numbers of the labels that a prompt names; of names within names the longest."""
        return frozenset(mention.label for mention in self.mentions(prompt))

    def wants_in(self, prompt: str) -> frozenset[Want]:
        """Return what a prompt asks for: labels in the tints that it gives them."""
        return frozenset(Want(found.label, found.tint) for found in self.mentions(prompt))

    def mentions(self, prompt: str) -> list[Mention]:
        """Find the labels that a prompt names, each with the article and adjectives before it."""
        text = _ABSENT.sub(_blank, SPECIAL.sub(_blank, prompt))
        words, found, at = [*WORD.finditer(text)], list[Mention](), 0
        longest = max(map(len, self._by_words), default=0)
        while at < len(words):
            named = [tuple(word[0].lower() for word in words[at : at + n])
                     for n in range(longest, 0, -1)]
            name = next((name for name in named if name in self._by_words), ())
            if name:
                start, stop = words[at].start(), words[at + len(name) - 1].end()
                from_ = found[-1].stop if found else 0
                before = _BEFORE.search(text, from_, start) or self._tinted.search(
                    text, from_, start)
                begun = before.start() if before else start
                tint = self._tint_in(text[begun:start])
                found.append(Mention(self._by_words[name], begun, stop, tint))
            at += len(name) or 1
        return found

    def _tint_in(self, before: str) -> int:
        """The tint that the words before a name give it; `ANY` of none or several."""
        words = (word[0].lower() for word in WORD.finditer(before))
        tints = {self._tints_by_word[word] for word in words if word in self._tints_by_word}
        return tints.pop() if len(tints) == 1 else ANY

    def prompts_of_each(self, prompt: str) -> dict[int, str]:
        """The prompt as it would be if all that it names were the same, by label.

        "a red cat passes the dog" is "a red cat passes a red cat" and "the dog passes the dog".
        """
        mentions, texts = self.mentions(prompt), dict[int, str]()
        for label, phrase in self._phrases(prompt).items():
            text = prompt
            for other in reversed(mentions):
                if other.label != label:
                    text = text[: other.start] + phrase + text[other.stop :]
            texts[label] = text
        return texts

    def looks_of_each(self, prompt: str) -> dict[int, str]:
        """Return a prompt for the looks of each thing alone, by label: "a red cat and a red cat".

        It says nothing of what the two do, so all of it is about their looks.
        """
        return {label: f"{phrase} and {phrase}" for label, phrase in self._phrases(prompt).items()}

    def _phrases(self, prompt: str) -> dict[int, str]:
        """Return the first phrase for each label that a prompt names, with all that precedes it."""
        phrases = dict[int, str]()
        for label, start, stop, _ in self.mentions(prompt):
            phrases.setdefault(label, prompt[start].lower() + prompt[start + 1 : stop])
        return phrases

    def names(self, wants: Collection[Want]) -> str:
        """Name what is wanted, for people."""
        return " and ".join(
            " ".join([*([] if tint == ANY else self.tints[tint][:1]), self.labels[label][0]])
            for label, tint in sorted(wants)
        )


class Verifier(nn.Module):
    """Convolutions over each latent frame by itself, which name what each latent shows."""

    def __init__(self, config: VerifierConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = conv_block(config.latent_channels, config.dim)
        self.body = nn.Sequential(*(Residual(config.dim) for _ in range(config.num_blocks)))
        self.names = nn.Conv2d(config.dim, len(config.labels) + 1, 1)
        self.tints = None
        if config.tints:
            self.tints = nn.Sequential(conv_block(config.dim, TINT_DIM),
                                       nn.Conv2d(TINT_DIM, len(config.tints) + 1, 1))

    def forward(self, latents: Tensor) -> Answers:
        """Return what latent frames [N, C, h, w] show."""
        seen = self._features(latents)
        return Answers(self.names(seen).float(),
                       None if self.tints is None else self.tints(seen).float())

    def _features(self, latents: Tensor) -> Tensor:
        seen: Tensor = self.body(self.stem(latents.contiguous(memory_format=torch.channels_last)))
        return seen

    @torch.no_grad()
    def where(self, latents: Tensor) -> Tensor:
        """Return what latents [B, C, F, h, w] show: shares [B, K + 1, F, h, w], of none last."""
        names = self.names(self._features(self._frames(latents))).float()
        return self._shares(names, len(latents))

    @torch.no_grad()
    def shown(self, latents: Tensor) -> Tensor:
        """Return how surely each label is shown in each frame of latents [B, C, F, h, w].

        Returns:
            [B, F, K, T + 1]: in each of the tints, and in any.
        """
        answers = self(self._frames(latents))
        names = self._shares(answers.names, len(latents))[:, :-1].flatten(3)
        expected = names.sum(3)  # latents that show it, [B, K, F]
        sure = (1 - torch.exp(-expected / SMALL)).transpose(1, 2)[..., None]
        if answers.tints is None:
            return sure
        tints = self._shares(answers.tints, len(latents))[:, :-1].flatten(3)
        tinted = torch.einsum("bkfp,btfp->bfkt", names, tints)
        shares = tinted / expected.transpose(1, 2)[..., None].clamp(min=1e-6)
        return torch.cat([sure * (shares / LIKELY).clamp(max=1), sure], dim=3)

    def _frames(self, latents: Tensor) -> Tensor:
        """Clips [B, C, F, h, w] frame by frame, [B * F, C, h, w], as the weights compute."""
        return latents.transpose(1, 2).flatten(0, 1).to(self.names.weight.dtype)

    @staticmethod
    def _shares(logits: Tensor, clips: int) -> Tensor:
        return logits.softmax(1).unflatten(0, (clips, -1)).transpose(1, 2)


def _blank(found: re.Match[str]) -> str:
    """Return as many spaces, so that what follows stays where it is."""
    return " " * len(found[0])


def score(shown: Tensor, wants: Collection[Want]) -> float:
    """Return how surely a clip shows all that is wanted, 0 to 1, in `MOST` of its frames.

    Args:
        shown: [F, K, T + 1], as `Verifier.shown` gives it.
        wants: one or more.
    """
    together = torch.stack([shown[:, label, tint] for label, tint in wants]).amin(0)
    return float(together.topk(math.ceil(MOST * len(together))).values.mean())
