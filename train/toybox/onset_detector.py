"""Train a model's onset detector, which tells from latents when something is seen to be hit.

    python -m train.toybox.cache -c train/toybox/configs/onset_detector.yaml
        first: the clips it sees
    python -m train.toybox.onset_detector -c train/toybox/configs/onset_detector.yaml [--resume]

It learns only from training scenes, varied as a generator's clips vary, some of them redrawn by
one, and from none of the metrics that score clips. `train/toybox/release.py
onset_detector` puts the averaged weights into a model folder.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.toybox.phases import Phase, PhasedRun
from train.toybox.program import run_program
from train.toybox.tasks.onset_data import Followed, followed, varied
from train.toybox.tasks.toybox_data import CacheConfig, ToyboxCache
from vidgen.core.errors import InputError
from vidgen.core.runtime import choose_device
from vidgen.models.onset_detector import OnsetDetector, OnsetDetectorConfig
from vidgen.pipeline.sound.own_sound import ONSET_DETECTOR
from vidgen.training.optim import build_optimizers
from vidgen.training.task import generator_of


@dataclass(frozen=True)
class OnsetDetectorRun:
    """The whole YAML file.

    Args:
        caches: what `train/toybox/cache.py` made; each batch is of one, the larger the more often.
        model: its sizes.
        noise: the highest level of noise in what it sees.
        validation_clips: of each cache, never trained on.
    """

    run: PhasedRun
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


class OnsetDetectorTask:
    """When something is hit, part by part of latent frames.

    Where the sprite is is asked, too, by a layer that is not released: who follows it there also
    knows what it does where it is drawn badly.
    """

    def __init__(self, config: OnsetDetectorRun) -> None:
        self.config = config
        self.device = choose_device(config.run.device)
        torch.manual_seed(config.run.seed)
        self.detector = OnsetDetector(config.model).to(self.device)
        caches = [ToyboxCache(entry) for entry in config.caches]
        (t,) = {cache.strides.t for cache in caches}
        self.places = nn.Conv1d(config.model.time_dim, 2 * t, 1).to(self.device)
        self.modules: dict[str, nn.Module] = {ONSET_DETECTOR: self.detector, "places": self.places}
        self.aside: dict[str, Followed] = {}
        self.clips: list[Followed] = []
        kept = config.validation_clips
        for entry, cache in zip(config.caches, caches, strict=True):
            clips = followed(cache, config.model.num_parts)
            self.aside[Path(entry.folder).name] = Followed(*(part[:kept] for part in clips))
            self.clips.append(Followed(*(part[kept:] for part in clips)))

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """As the run says, over everything."""
        return build_optimizers(self.modules, self.config.run.optim)

    def batch(self, phase: Phase, step: int, micro: int) -> Followed:
        """Clips of one cache, which the step settles, each varied in its own way."""
        seed = self.config.run.seed
        sizes = torch.tensor([float(len(clips.latents)) for clips in self.clips])
        which = int(torch.multinomial(sizes, 1, generator=generator_of(seed, step)))
        clips, draw = self.clips[which], generator_of(seed, step, micro)
        rows = torch.randint(len(clips.latents), (phase.batch_size,), generator=draw)
        some = varied(Followed(*(part[rows] for part in clips)), self.config.noise, draw)
        return Followed(*(part.to(self.device) for part in some))

    def loss(self, batch: Followed, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy, summed over the parts of a latent frame, and how far off places are."""
        del step
        features = self.detector.follow(batch.latents)
        missed = _missed(self.detector.odds(features), batch.impacts)
        places = self.places(features).transpose(1, 2).float().unflatten(2, (-1, 2))
        told = ~batch.places.isnan()
        off = F.smooth_l1_loss(places[told], batch.places[told], beta=0.05, reduction="sum")
        off = off / told.sum().clamp(min=1)
        return missed + off, {"missed": missed.detach(), "off": off.detach()}

    def validate(self, step: int, folder: Path) -> dict[str, float]:
        """What is missed in each cache's clips that are kept aside, as they are."""
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
