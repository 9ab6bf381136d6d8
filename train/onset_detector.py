"""Train a model's onset detector, which tells from latents when something is seen to be hit.

    python train/cache.py -c configs/train/toybox_onset_detector.yaml    first: the clips it sees
    python train/onset_detector.py -c configs/train/toybox_onset_detector.yaml [--resume]

It learns from training scenes' latents alone, varied as what a generator draws varies: no generated
clip, and nothing of the rulers that score clips. `train/release.py onset_detector` puts the
averaged weights into a model folder.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidgen.core.errors import InputError
from vidgen.core.runtime import choose_device
from vidgen.models.onset_detector import OnsetDetector, OnsetDetectorConfig
from vidgen.training.config import Phase, RunConfig
from vidgen.training.draws import generator_of
from vidgen.training.embedded.onset_data import impacts_in, varied
from vidgen.training.embedded.toybox_data import CacheConfig, ToyboxCache
from vidgen.training.optim import build_optimizers
from vidgen.training.program import run_program


@dataclass(frozen=True)
class OnsetDetectorRun:
    """The whole YAML file.

    Args:
        caches: what `train/cache.py` made; each batch is of one, the larger the more often.
        model: its sizes.
        noise: the highest level of noise in what it sees.
        validation_clips: of each cache, never trained on.
    """

    run: RunConfig
    caches: tuple[CacheConfig, ...]
    model: OnsetDetectorConfig = field(default_factory=OnsetDetectorConfig)
    noise: float = 0.6
    validation_clips: int = 32

    def __post_init__(self) -> None:
        if not 0 <= self.noise < 1:
            raise InputError(f"noise is {self.noise}; a noise level lies in 0..1, below 1")
        for cache in self.caches:
            if cache.stills_only:
                raise InputError(f"{cache.folder} has stills_only, where nothing happens; leave it "
                                 "out")
            if cache.shards * cache.shard_size <= self.validation_clips:
                raise InputError(f"validation_clips is {self.validation_clips}, but {cache.folder} "
                                 f"has {cache.shards * cache.shard_size}; leave some to learn from")


class Seen(NamedTuple):
    """Clips [N, C, F, h, w], and when something is hit there, [N, F, P]."""

    latents: Tensor
    impacts: Tensor


class OnsetDetectorTask:
    """When something is hit, part by part of latent frames."""

    def __init__(self, config: OnsetDetectorRun) -> None:
        self.config = config
        self.device = choose_device(config.run.device)
        torch.manual_seed(config.run.seed)
        self.detector = OnsetDetector(config.model).to(self.device)
        self.modules: dict[str, nn.Module] = {"onset_detector": self.detector}
        self.aside: dict[str, Seen] = {}
        self.clips: list[Seen] = []
        for entry in config.caches:
            cache, kept = ToyboxCache(entry), config.validation_clips
            impacts = impacts_in(cache, range(cache.num_clips), config.model.num_parts)
            latents = cache.load().clips
            self.aside[Path(entry.folder).name] = Seen(latents[:kept], impacts[:kept])
            self.clips.append(Seen(latents[kept:], impacts[kept:]))

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """As the run says, over everything."""
        return build_optimizers(self.modules, self.config.run.optim)

    def batch(self, phase: Phase, step: int, micro: int) -> Seen:
        """Clips of one cache, which the step settles, each varied in its own way."""
        seed = self.config.run.seed
        sizes = torch.tensor([float(len(clips.latents)) for clips in self.clips])
        which = int(torch.multinomial(sizes, 1, generator=generator_of(seed, step)))
        clips, draw = self.clips[which], generator_of(seed, step, micro)
        rows = torch.randint(len(clips.latents), (phase.batch_size,), generator=draw)
        latents = clips.latents[rows].float()
        seen = varied(latents, clips.impacts[rows], self.config.noise, draw)
        return Seen(*(part.to(self.device) for part in seen))

    def loss(self, batch: Seen, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy, summed over the parts of a latent frame."""
        del step
        missed = _missed(self.detector(batch.latents), batch.impacts)
        return missed, {"missed": missed.detach()}

    def validate(self, step: int, folder: Path) -> dict[str, float]:
        """The loss of each cache's clips that are kept aside, as they are."""
        del step, folder
        scores = {}
        for name, clips in self.aside.items():
            odds = self.detector(clips.latents.float().to(self.device))
            scores[name] = float(_missed(odds, clips.impacts.to(self.device)))
        return scores


def _missed(odds: Tensor, impacts: Tensor) -> Tensor:
    parts = F.binary_cross_entropy_with_logits(odds[:, 1:], impacts[:, 1:], reduction="none")
    return parts.sum(2).mean()


if __name__ == "__main__":
    raise SystemExit(run_program(__doc__, OnsetDetectorRun, OnsetDetectorTask))
