"""Train a model's verifier, which tells from latents whether a clip shows what was asked for.

    python -m train.toybox.cache -c train/toybox/configs/verifier.yaml
        first: the latents that it sees
    python -m train.toybox.verifier -c train/toybox/configs/verifier.yaml [--resume]

It learns from training scenes' latents alone, through noise, as what a generator draws isn't as
clean: no generated clip, and nothing of the judge that scores clips. `part: tints` teaches one that
is released to tell tints, and leaves the rest of it as it is. `train/toybox/release.py verifier`
puts the averaged weights into a model folder.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.toybox.phases import Phase, PhasedRun
from train.toybox.program import run_program
from train.toybox.tasks.toybox_data import CacheConfig, ToyboxCache
from train.toybox.tasks.verifier_data import (
    COLOURS,
    LABELS,
    NONE,
    OWN,
    UNSURE,
    NamedFrames,
    named_frames,
)
from vidgen.core.errors import InputError
from vidgen.core.runtime import choose_device
from vidgen.diffusion.flow import add_noise
from vidgen.models.verifier import Verifier, VerifierConfig
from vidgen.training.optim import build_optimizers
from vidgen.training.task import generator_of
from vidgen.weights.store import find_files, open_tensors

VALIDATION_LEVELS = (0.0, 0.2, 0.4)


@dataclass(frozen=True)
class VerifierRun:
    """The whole YAML file.

    Args:
        caches: what `train/toybox/cache.py` made, of one size.
        model: its sizes; the labels are the world's.
        noise: the highest level of noise in what it sees, a fifth of which has none.
        none_weight: how much less a latent counts that shows no sprite: most do.
        own_weight: of a tint, likewise one that shows a sprite in its own colours.
        init: folder of the verifier to begin with, or None.
        part: what of it is taught; "tints" needs an `init`.
        validation_frames: of the first cache, never trained on.
    """

    run: PhasedRun
    caches: tuple[CacheConfig, ...]
    model: VerifierConfig = field(default_factory=VerifierConfig)
    noise: float = 0.7
    none_weight: float = 0.05
    own_weight: float = 0.35
    init: str | None = None
    part: Literal["all", "tints"] = "all"
    validation_frames: int = 512

    def __post_init__(self) -> None:
        sizes = {(cache.height, cache.width) for cache in self.caches}
        if len(sizes) != 1:
            raise InputError(f"caches are of {len(sizes)} sizes; name some of one size")
        if not 0 <= self.noise < 1:
            raise InputError(f"noise is {self.noise}; a noise level lies in 0..1, below 1")
        if self.part == "tints" and not self.init:
            raise InputError("part is tints, of a verifier that there isn't; give its folder as "
                             "init, or part: all")


class Seen(NamedTuple):
    """A batch: latents [N, C, h, w], what they show and in which tints, both [N, h, w]."""

    latents: Tensor
    names: Tensor
    tints: Tensor


class VerifierTask:
    """Names and tints of latents through noise."""

    def __init__(self, config: VerifierRun) -> None:
        self.config = config
        self.device = choose_device(config.run.device)
        torch.manual_seed(config.run.seed)
        known = replace(config.model, labels=LABELS, tints=COLOURS)
        self.verifier = Verifier(known).to(self.device)
        if config.init:
            self._begin_with(Path(config.init))
        self.modules: dict[str, nn.Module] = {"verifier": self.verifier}
        parts = [named_frames(ToyboxCache(entry)) for entry in config.caches]
        kept = config.validation_frames
        if kept >= len(parts[0].latents):
            raise InputError(f"validation_frames is {kept}, but the first cache has "
                             f"{len(parts[0].latents)}; leave some to learn from")
        self.aside = NamedFrames(*(part[:kept] for part in parts[0]))
        self.frames = NamedFrames(*(torch.cat(same)[kept:] for same in zip(*parts, strict=True)))

    def _begin_with(self, folder: Path) -> None:
        """Take all weights that a released verifier has."""
        stored = open_tensors(find_files(folder))
        weights = {name: lazy.get() for name, lazy in stored.items()}
        lacking, unknown = self.verifier.load_state_dict(weights, strict=False)
        if unknown or any(not name.startswith("tints.") for name in lacking):
            raise InputError(f"{folder} holds another verifier than model: describes; give its "
                             "sizes, or another init")
        if self.config.part == "tints":
            self.verifier.requires_grad_(requires_grad=False)
            assert self.verifier.tints is not None
            self.verifier.tints.requires_grad_(requires_grad=True)

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
        told = (each[rows].long().to(self.device) for each in (frames.names, frames.tints))
        return Seen(noisy.to(self.device), *told)

    def loss(self, batch: Seen, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropies of what is sure."""
        del step
        config = self.config
        if config.part == "tints":  # whose batch norms keep their statistics
            self.verifier.stem.eval()
            self.verifier.body.eval()
        names, tints = self.verifier(batch.latents)
        tinted = _surprise(tints, batch.tints, OWN, config.own_weight)
        values = {"tinted": tinted, "right_tint": _right(tints, batch.tints, OWN)}
        if config.part == "tints":
            return tinted, {name: value.detach() for name, value in values.items()}
        named = _surprise(names, batch.names, NONE, config.none_weight)
        values |= {"named": named, "right": _right(names, batch.names, NONE)}
        return named + tinted, {name: value.detach() for name, value in values.items()}

    def validate(self, step: int, folder: Path) -> dict[str, float]:
        """Shares of latents that get the name and the tint they have, through levels of noise."""
        del step, folder
        scores = dict[str, float]()
        for level in VALIDATION_LEVELS:
            draw, shares = generator_of(round(100 * level)), []
            for rows in torch.arange(len(self.aside.latents)).split(128):
                seen = self._seen(self.aside, rows, torch.full((len(rows),), level), draw)
                names, tints = self.verifier(seen.latents)
                shares.append(torch.stack([_right(names, seen.names, NONE),
                                           _right(tints, seen.tints, OWN)]))
            right, tint = torch.stack(shares).mean(0).tolist()
            scores |= {f"right_{level}": right, f"right_tint_{level}": tint}
        return scores


def _surprise(logits: Tensor, told: Tensor, seldom: int, weight: float) -> Tensor:
    """Cross-entropy where something is told for certain; one class counts less."""
    weights = torch.ones(logits.shape[1], device=logits.device)
    weights[seldom] = weight
    return F.cross_entropy(logits, told, weights, ignore_index=UNSURE)


def _right(logits: Tensor, told: Tensor, classes: int) -> Tensor:
    """Share of the latents of one of so many classes that get it, before all others of these."""
    known = (told >= 0) & (told < classes)
    found = logits[:, :classes].argmax(1) == told
    return (found & known).sum() / known.sum().clamp(min=1)


if __name__ == "__main__":
    raise SystemExit(run_program(__doc__, VerifierRun, VerifierTask))
