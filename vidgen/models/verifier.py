"""A verifier: find the things of its vocabulary that a clip's latents show, with scores.

It is far smaller than a generator and decides when another candidate is needed (verifiers of search
over a diffusion model's noise: Ma et al. 2025, "Inference-time scaling for diffusion models beyond
scaling denoising steps"). It reads latents, so nothing is decoded before a candidate is accepted.

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
"""Number of a thing's latents at which the doubt that it exists is 1 / e."""
MOST = 0.75
"""Share of the frames that count: things may enter late or leave early."""
_ABSENT = re.compile(r"\b(?:like|as if|without)\b[^,.;:!?]*", re.IGNORECASE)
"""Comparisons and exclusions: "bounces like a ball"."""
_ARTICLE = r"\b(?:an?|the|one|some|this|that|another|my|our|your|his|her|its|their)\b"
_BEFORE = re.compile(rf"{_ARTICLE}(?:[ \t]+(?!{_ARTICLE})[\w'-]+){{0,4}}[ \t]+$", re.IGNORECASE)
"""Beginning of a name's phrase: "the little blue " of "the little blue car"."""
ANY = -1
"""Stands for a tint where any will do."""
TINT_DIM = 64
"""Width of the features for tints."""
LIKELY = 0.3
"""Share of a thing's latents in a tint from which the whole thing has it."""


class Want(NamedTuple):
    """A thing that a clip should show: the numbers of its label and of its tint, or `ANY`."""

    label: int
    tint: int = ANY


class Mention(NamedTuple):
    """A thing in a prompt: the numbers of its label and tint, and the place of its phrase."""

    label: int
    start: int
    stop: int
    tint: int = ANY


class Answers(NamedTuple):
    """Logits of N latent frames, float32.

    Attributes:
        names: [N, K + 1, h, w], of no thing last.
        tints: [N, T + 1, h, w], of a thing's own colours last; or None.
    """

    names: Tensor
    tints: Tensor | None


@dataclass(frozen=True)
class VerifierConfig:
    """Vocabulary and sizes of a verifier.

    Args:
        labels: K things, each with all its names in prompts, in lower case.
        tints: T colours, each with all its words; a thing of that natural colour has it, too.
            Empty: tints aren't judged.
        latent_channels: C.
        num_blocks: of two convolutions; the receptive field is 2 * num_blocks + 1 latents each way.
        enough: least score of an accepted clip.
        legible: the noise level below which a guess of the clip shows where things are.
        looks: noise levels between which looks are settled: regional prompts name looks there,
            actions elsewhere.

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
        """Return the labels that a prompt names; of names within names the longest."""
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
        """Return the tint in the words before a name; `ANY` for none or several."""
        words = (word[0].lower() for word in WORD.finditer(before))
        tints = {self._tints_by_word[word] for word in words if word in self._tints_by_word}
        return tints.pop() if len(tints) == 1 else ANY

    def prompts_of_each(self, prompt: str) -> dict[int, str]:
        """Return for each label the prompt with all its things replaced by that one.

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
        """Return for each label a prompt of its looks alone: "a red cat and a red cat"."""
        return {label: f"{phrase} and {phrase}" for label, phrase in self._phrases(prompt).items()}

    def _phrases(self, prompt: str) -> dict[int, str]:
        """Return the first phrase of each label in a prompt, with article and adjectives."""
        phrases = dict[int, str]()
        for label, start, stop, _ in self.mentions(prompt):
            phrases.setdefault(label, prompt[start].lower() + prompt[start + 1 : stop])
        return phrases

    def names(self, wants: Collection[Want]) -> str:
        """Describe things in words."""
        return " and ".join(
            " ".join([*([] if tint == ANY else self.tints[tint][:1]), self.labels[label][0]])
            for label, tint in sorted(wants)
        )


class Verifier(nn.Module):
    """A convolutional network that classifies the latents of each frame by itself."""

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
        """Return probabilities [B, K + 1, F, h, w] of labels, none last, of [B, C, F, h, w]."""
        names = self.names(self._features(self._frames(latents))).float()
        return self._shares(names, len(latents))

    @torch.no_grad()
    def shown(self, latents: Tensor) -> Tensor:
        """Return the probability that each frame of latents [B, C, F, h, w] shows each label.

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
        """Map clips [B, C, F, h, w] to frames [B * F, C, h, w] in the weights' dtype."""
        return latents.transpose(1, 2).flatten(0, 1).to(self.names.weight.dtype)

    @staticmethod
    def _shares(logits: Tensor, clips: int) -> Tensor:
        return logits.softmax(1).unflatten(0, (clips, -1)).transpose(1, 2)


def _blank(found: re.Match[str]) -> str:
    """Return as many spaces, so that positions don't change."""
    return " " * len(found[0])


def score(shown: Tensor, wants: Collection[Want]) -> float:
    """Return the probability that a clip shows one or more things together in `MOST` frames.

    `shown` [F, K, T + 1] is `Verifier.shown`'s of the clip.
    """
    together = torch.stack([shown[:, label, tint] for label, tint in wants]).amin(0)
    return float(together.topk(math.ceil(MOST * len(together))).values.mean())
