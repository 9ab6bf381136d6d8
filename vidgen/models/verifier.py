"""A verifier: score which things of its vocabulary a clip's latents show.

It is far smaller than a generator and decides whether another candidate is needed (as in Ma et al.
2025, "Inference-time scaling for diffusion models beyond scaling denoising steps"). It reads
latents, so that no candidate is decoded before it is accepted.

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
"""Expected number of a thing's latents at which the probability of its absence is 1 / e."""
MOST = 0.75
"""Share of the frames, the best ones, that count: things may enter late or leave early."""
_ABSENT = re.compile(r"\b(?:like|as if|without)\b[^,.;:!?]*", re.IGNORECASE)
"""Comparisons and exclusions: "bounces like a ball"."""
_ARTICLE = r"\b(?:an?|the|one|some|this|that|another|my|our|your|his|her|its|their)\b"
_BEFORE = re.compile(rf"{_ARTICLE}(?:[ \t]+(?!{_ARTICLE})[\w'-]+){{0,4}}[ \t]+$", re.IGNORECASE)
"""Beginning of a name's phrase: "the little blue " of "the little blue car"."""
ANY = -1
"""Tint of a `Want` that any tint satisfies."""
TINT_DIM = 64
"""Width of the features for tints."""
LIKELY = 0.3
"""Share of a thing's latents in a tint from which the thing counts as having it."""


class Want(NamedTuple):
    """A thing that a clip should show: indices of its label and its tint, or `ANY` tint."""

    label: int
    tint: int = ANY


class Mention(NamedTuple):
    """A thing in a prompt: indices of its label and tint, and its phrase's first and end letter."""

    label: int
    start: int
    stop: int
    tint: int = ANY


class Answers(NamedTuple):
    """Logits of N latent frames, float32.

    Attributes:
        names: [N, K + 1, h, w]; the last is "no thing".
        tints: [N, T + 1, h, w]; the last is "natural colours". None: the verifier has no tints.
    """

    names: Tensor
    tints: Tensor | None


@dataclass(frozen=True)
class VerifierConfig:
    """Vocabulary and sizes of a verifier.

    Args:
        labels: K things, each with all its names in prompts, in lower case.
        tints: T colours, each with all its words; they include natural colours of things.
            Empty: tints aren't judged.
        latent_channels: C.
        num_blocks: blocks of two convolutions; the receptive field is 2 * num_blocks + 1 latents in
            each direction.
        enough: least score of an accepted clip.
        legible: sigma below which the denoised estimate shows the positions of things.
        looks: (low, high) sigma between which things get their looks: regional prompts describe
            looks there, and actions elsewhere.

    Raises:
        ValueError: a label or tint without a name.
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
        """Pattern of the beginning of a phrase without an article: "red " of "red car"."""
        words = "|".join(map(re.escape, self._tints_by_word)) or r"(?!)"
        return re.compile(rf"\b(?:(?:{words})[ \t]+)+$", re.IGNORECASE)

    def labels_in(self, prompt: str) -> frozenset[int]:
        """Return the labels that a prompt names; a longer name takes precedence over its parts."""
        return frozenset(mention.label for mention in self.mentions(prompt))

    def wants_in(self, prompt: str) -> frozenset[Want]:
        """Return the things that a prompt asks for, with their tints."""
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
        """Return the tint in the words before a name; `ANY` if they contain none or several."""
        words = (word[0].lower() for word in WORD.finditer(before))
        tints = {self._tints_by_word[word] for word in words if word in self._tints_by_word}
        return tints.pop() if len(tints) == 1 else ANY

    def prompts_of_each(self, prompt: str) -> dict[int, str]:
        """Return, for each label, the prompt with all things replaced by that label's.

        "a red cat passes the dog" gives "a red cat passes a red cat" and "the dog passes the dog".
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
        """Return, for each label, a prompt of only its looks: "a red cat and a red cat"."""
        return {label: f"{phrase} and {phrase}" for label, phrase in self._phrases(prompt).items()}

    def _phrases(self, prompt: str) -> dict[int, str]:
        """Return the first phrase of each label in a prompt, with article and adjectives."""
        phrases = dict[int, str]()
        for label, start, stop, _ in self.mentions(prompt):
            phrases.setdefault(label, prompt[start].lower() + prompt[start + 1 : stop])
        return phrases

    def names(self, wants: Collection[Want]) -> str:
        """Return a phrase that names things: "red cat and dog"."""
        return " and ".join(
            " ".join([*([] if tint == ANY else self.tints[tint][:1]), self.labels[label][0]])
            for label, tint in sorted(wants)
        )


class Verifier(nn.Module):
    """Convolutional network that classifies each latent pixel, in each frame separately."""

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
        """Return the logits of latent frames [N, C, h, w]."""
        seen = self._features(latents)
        return Answers(self.names(seen).float(),
                       None if self.tints is None else self.tints(seen).float())

    def _features(self, latents: Tensor) -> Tensor:
        seen: Tensor = self.body(self.stem(latents.contiguous(memory_format=torch.channels_last)))
        return seen

    @torch.no_grad()
    def where(self, latents: Tensor) -> Tensor:
        """Return each latent's label probabilities, [B, K + 1, F, h, w], of [B, C, F, h, w].

        The last is the probability of no thing.
        """
        names = self.names(self._features(self._frames(latents))).float()
        return self._shares(names, len(latents))

    @torch.no_grad()
    def shown(self, latents: Tensor) -> Tensor:
        """Return the probability that each frame of latents [B, C, F, h, w] shows each label.

        Returns:
            [B, F, K, T + 1]: in each of the tints, then in any; T is 0 without tints.
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
        """Map clips [B, C, F, h, w] to frames [B * F, C, h, w] in the weights' dtype."""
        return latents.transpose(1, 2).flatten(0, 1).to(self.names.weight.dtype)

    @staticmethod
    def _shares(logits: Tensor, clips: int) -> Tensor:
        return logits.softmax(1).unflatten(0, (clips, -1)).transpose(1, 2)


def _blank(found: re.Match[str]) -> str:
    """Return equally many spaces, so that positions don't change."""
    return " " * len(found[0])


def score(shown: Tensor, wants: Collection[Want]) -> float:
    """Return the mean probability, over the best `MOST` of frames, that a clip shows all things.

    `shown` [F, K, T + 1] is the clip's entry in the result of `Verifier.shown`.
    """
    together = torch.stack([shown[:, label, tint] for label, tint in wants]).amin(0)
    return float(together.topk(math.ceil(MOST * len(together))).values.mean())
