"""What prompts name, each told alone: the contexts that binding needs beside the prompt's own.

Axes: B batch, n things that are told apart, S text tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from vidgen.diffusion.binding import NOBODY, bound

if TYPE_CHECKING:
    from vidgen.core.protocols import Denoise
    from vidgen.diffusion.state import LatentState
    from vidgen.models.verifier import VerifierConfig
    from vidgen.pipeline.loader import Parts

VERIFIER: Literal["verifier"] = "verifier"


@dataclass(frozen=True)
class Bound:
    """What is told apart in some clips.

    Attributes:
        strength: see `binding.bound`.
        labels: [B, n] of each clip, `NOBODY` where it names fewer than another; on the CPU.
        contexts: 2 n of (context [B, S, D], lengths [B]): what each does, then how each looks; the
            prompt's own for nobody.
    """

    strength: float
    labels: Tensor
    contexts: Sequence[tuple[Tensor, Tensor]]

    def rows(self, index: Tensor) -> Bound:
        """That of some of the clips."""
        contexts = [(text[index], count[index.to(count.device)]) for text, count in self.contexts]
        return Bound(self.strength, self.labels[index.cpu()], contexts)

    @contextmanager
    def binding(
        self, parts: Parts, state: LatentState, told_all: Denoise, told_alone: Sequence[Denoise]
    ) -> Iterator[Denoise]:
        """The model under the prompt, with what it names bound to what the verifier sees of it."""
        count = self.labels.shape[1]
        with parts.use(VERIFIER) as verifier:
            known = verifier.config
            by_level = [_between(known.looks, looks, does) for does, looks in
                        zip(told_alone[:count], told_alone[count:], strict=True)]
            yield bound(told_all, by_level, verifier.where, state, self.labels, self.strength,
                        known.legible)


def _between(levels: tuple[float, float], inside: Denoise, outside: Denoise) -> Denoise:
    """One model between two noise levels, another elsewhere."""
    def denoise(latents: Tensor, sigma: Tensor) -> Tensor:
        is_inside = levels[0] < float(sigma.max()) < levels[1]
        return (inside if is_inside else outside)(latents, sigma)

    return denoise


def told_apart(
    config: VerifierConfig,
    prompts: Sequence[str],
    strength: float,
    encode: Callable[[Sequence[str]], tuple[Tensor, Tensor]],
) -> Bound | None:
    """What prompts name that is to be told apart; None where each of them names one thing or none.

    Args:
        config: of the model's verifier.
        prompts: as the model reads them.
        strength: see `Bound`.
        encode: makes texts to (context [B, S, D], lengths [B]).
    """
    does = [config.told_alone(prompt) for prompt in prompts]
    most = max(map(len, does))
    if most < 2:
        return None
    looks = [config.told_twice(prompt) for prompt in prompts]
    labels = [[*named, *[NOBODY] * (most - len(named))] for named in does]
    contexts = [
        encode([own.get(label, prompt)
                for own, label, prompt in zip(told, each, prompts, strict=True)])
        for told in (does, looks) for each in zip(*labels, strict=True)
    ]
    return Bound(strength, torch.tensor(labels), contexts)


def is_bindable(state: LatentState) -> bool:
    """Whether words alone say what a state's clips show: nothing else of them is known."""
    return not state.any_known and state.keys is None
