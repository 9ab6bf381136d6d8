"""A verifier: which of the things that it knows the latents of a clip show, and how surely.

A generator draws what it is asked for more often than not; a network that tells when it didn't is
far smaller, and lets another candidate be drawn (verifiers of search over a diffusion model's
noise: Ma et al. 2025, "Inference-time scaling for diffusion models beyond scaling denoising
steps"). It looks at latents, so nothing is decoded before it is content.

Axes: B clips, C latent channels, F latent frames, h w latent rows and columns, K labels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from vidgen.models.conv_blocks import Residual, conv_block
from vidgen.models.words import split_words

SMALL = 2.0
"""So many latents of a thing leave a doubt of 1 / e whether it is there."""
MOST = 0.75
"""Share of the frames that count: things come, and what drives past is gone at the end."""
_ABSENT = re.compile(r"\b(?:like|as if|without)\b[^,.;:!?]*", re.IGNORECASE)
"""What a sentence compares with, or says isn't there: "bounces like a ball"."""


@dataclass(frozen=True)
class VerifierConfig:
    """What a verifier knows, and its sizes.

    Args:
        labels: K things, each with all that prompts call it by, in lower case.
        latent_channels: C.
        dim: width.
        num_blocks: of two convolutions; an answer depends on 2 * num_blocks + 1 latents each way.
        enough: the score from which a clip shows what was asked for.

    Raises:
        ValueError: a label without a name.
    """

    labels: tuple[tuple[str, ...], ...] = ()
    latent_channels: int = 16
    dim: int = 96
    num_blocks: int = 4
    enough: float = 0.9

    def __post_init__(self) -> None:
        if not all(self.labels):
            raise ValueError(f"label {self.labels.index(())} has no name")

    @cached_property
    def _by_words(self) -> dict[tuple[str, ...], int]:
        return {tuple(split_words(name)): number
                for number, names in enumerate(self.labels) for name in names}

    def labels_in(self, prompt: str) -> frozenset[int]:
        """The numbers of the labels that a prompt names; of names within names the longest."""
        words, found, at = split_words(_ABSENT.sub(" ", prompt)), set(), 0
        longest = max(map(len, self._by_words), default=0)
        while at < len(words):
            lengths = range(longest, 0, -1)
            length = next((n for n in lengths if tuple(words[at : at + n]) in self._by_words), 0)
            if length:
                found.add(self._by_words[tuple(words[at : at + length])])
            at += length or 1
        return frozenset(found)

    def names(self, labels: Collection[int]) -> str:
        """Labels by their own names, for people."""
        return " and ".join(self.labels[label][0] for label in sorted(labels))


class Verifier(nn.Module):
    """Convolutions over each latent frame by itself, which name what each latent shows."""

    def __init__(self, config: VerifierConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = conv_block(config.latent_channels, config.dim)
        self.body = nn.Sequential(*(Residual(config.dim) for _ in range(config.num_blocks)))
        self.names = nn.Conv2d(config.dim, len(config.labels) + 1, 1)

    def forward(self, latents: Tensor) -> Tensor:
        """Logits [N, K + 1, h, w] of latent frames [N, C, h, w], float32; the last is of none."""
        seen = latents.contiguous(memory_format=torch.channels_last)
        logits: Tensor = self.names(self.body(self.stem(seen))).float()
        return logits

    @torch.no_grad()
    def shown(self, latents: Tensor) -> Tensor:
        """How surely each label is shown in each frame of latents [B, C, F, h, w]: [B, F, K]."""
        frames = latents.transpose(1, 2).flatten(0, 1)
        logits = self(frames.to(self.names.weight.dtype))
        expected = logits.softmax(1)[:, :-1].sum((2, 3))  # latents that show it
        return (1 - torch.exp(-expected / SMALL)).unflatten(0, (len(latents), -1))


def score(shown: Tensor, labels: Collection[int]) -> float:
    """How surely a clip shows all of some labels at once, 0 to 1, in `MOST` of its frames.

    Args:
        shown: [F, K], as `Verifier.shown` gives it.
        labels: their numbers, one or more.
    """
    together = shown[:, sorted(labels)].amin(1)
    return float(together.topk(math.ceil(MOST * len(together))).values.mean())
