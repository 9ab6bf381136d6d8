"""Train a model's verifier, which tells from latents whether a clip shows what was asked for.

    python train/cache.py -c configs/train/toybox_verifier.yaml     first: the latents that it sees
    python train/verifier.py -c configs/train/toybox_verifier.yaml [--resume]

It learns from training scenes' latents alone, through noise, as what a generator draws isn't as
clean: no generated clip, and nothing of the judge that scores clips. `train/release.py verifier`
puts the averaged weights into a model folder.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidgen.core.errors import InputError
from vidgen.core.runtime import choose_device
from vidgen.diffusion.flow import add_noise
from vidgen.models.verifier import Verifier, VerifierConfig
from vidgen.training.config import Phase, RunConfig
from vidgen.training.draws import generator_of
from vidgen.training.embedded.toybox_data import CacheConfig, ToyboxCache
from vidgen.training.embedded.verifier_data import (
    LABELS,
    NONE,
    UNSURE,
    NamedFrames,
    named_frames,
)
from vidgen.training.optim import build_optimizers
from vidgen.training.program import run_program

VALIDATION_LEVELS = (0.0, 0.2, 0.4)


@dataclass(frozen=True)
class VerifierRun:
    """The whole YAML file.

    Args:
        caches: what `train/cache.py` made, of one size.
        model: its sizes; the labels are the world's.
        noise: the highest level of noise in what it sees, a fifth of which has none.
        none_weight: how much less a latent counts that shows no sprite: most do.
        validation_frames: of the first cache, never trained on.
    """

    run: RunConfig
    caches: tuple[CacheConfig, ...]
    model: VerifierConfig = field(default_factory=VerifierConfig)
    noise: float = 0.7
    none_weight: float = 0.05
    validation_frames: int = 512

    def __post_init__(self) -> None:
        sizes = {(cache.height, cache.width) for cache in self.caches}
        if len(sizes) != 1:
            raise InputError(f"caches are of {len(sizes)} sizes; name some of one size")
        if not 0 <= self.noise < 1:
            raise InputError(f"noise is {self.noise}; a noise level lies in 0..1, below 1")


class Seen(NamedTuple):
    """A batch: latents [N, C, h, w], and what they show, [N, h, w]."""

    latents: Tensor
    names: Tensor


class VerifierTask:
    """Names of latents through noise."""

    def __init__(self, config: VerifierRun) -> None:
        self.config = config
        self.device = choose_device(config.run.device)
        torch.manual_seed(config.run.seed)
        self.verifier = Verifier(replace(config.model, labels=LABELS)).to(self.device)
        self.modules: dict[str, nn.Module] = {"verifier": self.verifier}
        parts = [named_frames(ToyboxCache(entry)) for entry in config.caches]
        kept = config.validation_frames
        if kept >= len(parts[0].latents):
            raise InputError(f"validation_frames is {kept}, but the first cache has "
                             f"{len(parts[0].latents)}; leave some to learn from")
        self.aside = NamedFrames(*(part[:kept] for part in parts[0]))
        self.frames = NamedFrames(*(torch.cat(same)[kept:] for same in zip(*parts, strict=True)))

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """As the run says, over everything."""
        return build_optimizers(self.modules, self.config.run.optim)

    def batch(self, phase: Phase, step: int, micro: int) -> Seen:
        """Any frames, four in five of them through noise."""
        draw = generator_of(self.config.run.seed, step, micro)
        rows = torch.randint(len(self.frames.latents), (phase.batch_size,), generator=draw)
        levels = self.config.noise * torch.rand(len(rows), generator=draw)
        levels *= torch.rand(len(rows), generator=draw) < 0.8
        return self._seen(self.frames, rows, levels, draw)

    def _seen(
        self, frames: NamedFrames, rows: Tensor, levels: Tensor, draw: torch.Generator
    ) -> Seen:
        clean = frames.latents[rows].float()
        noisy = add_noise(clean, torch.randn(clean.shape, generator=draw), levels)
        return Seen(noisy.to(self.device), frames.names[rows].long().to(self.device))

    def loss(self, batch: Seen, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of what is sure."""
        del step
        weight = torch.ones(NONE + 1, device=self.device)
        weight[NONE] = self.config.none_weight
        logits = self.verifier(batch.latents)
        named = F.cross_entropy(logits, batch.names, weight, ignore_index=UNSURE)
        return named, {"named": named.detach(), "right": _right(logits, batch.names)}

    def validate(self, step: int, folder: Path) -> dict[str, float]:
        """Share of latents that show a sprite named rightly, through several levels of noise."""
        del step, folder
        scores = {}
        for level in VALIDATION_LEVELS:
            draw, shares = generator_of(round(100 * level)), []
            for rows in torch.arange(len(self.aside.latents)).split(128):
                seen = self._seen(self.aside, rows, torch.full((len(rows),), level), draw)
                shares.append(_right(self.verifier(seen.latents), seen.names))
            scores[f"right_{level}"] = float(torch.stack(shares).mean())
        return scores


def _right(logits: Tensor, names: Tensor) -> Tensor:
    """Share of the latents with a name that get it."""
    named = (names >= 0) & (names < NONE)
    found = logits[:, :NONE].argmax(1) == names
    return (found & named).sum() / named.sum().clamp(min=1)


if __name__ == "__main__":
    raise SystemExit(run_program(__doc__, VerifierRun, VerifierTask))
