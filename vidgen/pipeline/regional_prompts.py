"""Prompts of the single things that a prompt names, for `vidgen.diffusion.regional_prompts`.

Axes: B batch, n things with prompts of their own, S text tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from vidgen.diffusion.regional_prompts import NO_LABEL, with_regions

if TYPE_CHECKING:
    from vidgen.core.protocols import Denoise
    from vidgen.diffusion.state import LatentState
    from vidgen.models.verifier import VerifierConfig
    from vidgen.pipeline.loader import ModelLoader

VERIFIER: Literal["verifier"] = "verifier"


@dataclass(frozen=True)
class RegionalPrompts:
    """Contexts of the things that clips' prompts name.

    Attributes:
        strength: see `with_regions`.
        labels: [B, n] of each clip, `NO_LABEL` where it names fewer than another; on the CPU.
        contexts: 2 n of (context [B, S, D], lengths [B]): of each thing's actions, then of its
            looks; those of the prompt itself for `NO_LABEL`.
    """

    strength: float
    labels: Tensor
    contexts: Sequence[tuple[Tensor, Tensor]]

    @contextmanager
    def applied(
        self, loader: ModelLoader, state: LatentState, denoise_all: Denoise,
        denoise_each: Sequence[Denoise],
    ) -> Iterator[Denoise]:
        """Yield the model of the prompt with regional prompts; `denoise_each` is by `contexts`."""
        count = self.labels.shape[1]
        with loader.use(VERIFIER) as verifier:
            known = verifier.config
            by_level = [_between(known.looks, looks, does) for does, looks in
                        zip(denoise_each[:count], denoise_each[count:], strict=True)]
            yield with_regions(denoise_all, by_level, verifier.where, state, self.labels,
                               self.strength, known.legible)


def _between(levels: tuple[float, float], inside: Denoise, outside: Denoise) -> Denoise:
    """Return one model between two noise levels, another elsewhere."""
    def denoise(latents: Tensor, sigma: Tensor) -> Tensor:
        is_inside = levels[0] < float(sigma.max()) < levels[1]
        return (inside if is_inside else outside)(latents, sigma)

    return denoise


def regional_prompts(
    config: VerifierConfig,
    prompts: Sequence[str],
    strength: float,
    encode: Callable[[Sequence[str]], tuple[Tensor, Tensor]],
) -> RegionalPrompts | None:
    """Return the regional prompts of clips; None where each prompt names one thing or none.

    Args:
        config: of the model's verifier.
        prompts: after word normalisation.
        strength: see `with_regions`.
        encode: maps texts to (context [B, S, D], lengths [B]).
    """
    actions = [config.prompts_of_each(prompt) for prompt in prompts]
    most = max(map(len, actions))
    if most < 2:
        return None
    looks = [config.looks_of_each(prompt) for prompt in prompts]
    labels = [[*named, *[NO_LABEL] * (most - len(named))] for named in actions]
    contexts = [
        encode([own.get(label, prompt)
                for own, label, prompt in zip(texts, each, prompts, strict=True)])
        for texts in (actions, looks) for each in zip(*labels, strict=True)
    ]
    return RegionalPrompts(strength, torch.tensor(labels), contexts)


def can_be_regional(state: LatentState) -> bool:
    """Return whether words alone say what a state's clips show: nothing else of them is known."""
    return not state.any_known and state.keys is None
