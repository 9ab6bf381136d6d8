"""Train the judge, the classifiers that score Toybox clips, on renders of its own range of seeds.

    python -m train.toybox.judge -c train/toybox/configs/judge.yaml
        [--set run.minutes=20]... [--resume]

It never sees a generated clip or a VAE's output. Every validation writes the averaged weights in
bf16 to `<folder>/judge`, a component folder to be copied to `vidgen/assets/judge`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eval.toybox.judge import FrameLogits, Judge, JudgeConfig, JudgeFolder, to_motion_size
from eval.toybox.suite.judging import judge_renders
from train.toybox.model_files import save_module
from train.toybox.phases import Phase, PhasedRun
from train.toybox.program import run_program
from train.toybox.tasks.judge_data import (
    IGNORE,
    Batch,
    PoolConfig,
    RenderPool,
    Transforms,
    to_bytes,
)
from train.toybox.world.scenes import SEED_RANGES
from vidgen.core.runtime import choose_device
from vidgen.media.grid import contact_sheet
from vidgen.training.optim import build_optimizers
from vidgen.training.task import seed_of

POOL_SEEDS = 1 << 32  # scenes that each pool may use; validation has the range's last ones
VALIDATION_SEEDS = 1 << 24


@dataclass(frozen=True)
class JudgeRun:
    """The whole YAML file.

    Args:
        pools: geometries to learn from; `num_frames` and sizes of the phases don't matter.
        part: "frames" leaves MotionNet as it is.
        init: folder of a judge to start from, whose sizes count instead of `model`.
        pictures: frames of each clip that FrameNet looks at in a step.
        small: how much likelier a frame is looked at the less of it is sprite: in proportion to
            (1 / area) ** small.
        nothing: share of clips made unrecognisable.
        frozen: share of clips that show one frame all the time.
        seen_area: share of the picture from which a sprite counts as visible; what is less, but
            not nothing, isn't asked about.
        seen_cell: likewise of a cell.
        validation_clips: fresh renders to validate on.
    """

    run: PhasedRun
    pools: tuple[PoolConfig, ...] = (PoolConfig(),)
    model: JudgeConfig = field(default_factory=JudgeConfig)
    part: Literal["all", "frames"] = "all"
    init: str | None = None
    pictures: int = 3
    small: float = 0.0
    nothing: float = 0.14
    frozen: float = 0.03
    seen_area: float = 0.008
    seen_cell: float = 0.30
    validation_clips: int = 128


class JudgeTask:
    """Both networks, learning from the same batches."""

    def __init__(self, config: JudgeRun) -> None:
        self.config = config
        self.device = choose_device(config.run.device)
        torch.manual_seed(config.run.seed)
        if config.init:
            self.judge = JudgeFolder(Path(config.init)).load(self.device).requires_grad_()
        else:
            self.judge = Judge(config.model).to(self.device)
        self.modules: dict[str, nn.Module] = {"judge": self.judge}
        if config.part == "frames":
            self.judge.motion.requires_grad_(requires_grad=False)
        base = SEED_RANGES["judge"][0] + config.run.seed * len(config.pools) * POOL_SEEDS
        self.pools = [
            RenderPool(pool, self.judge.config, base + i * POOL_SEEDS)
            for i, pool in enumerate(config.pools)
        ]

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """AdamW over everything."""
        return build_optimizers(self.modules, self.config.run.optim)

    def batch(self, phase: Phase, step: int, micro: int) -> Batch:
        """Clips of one pool, turned, spoilt and damaged; a sheet of them at the first step."""
        generator = torch.Generator().manual_seed(seed_of(self.config.run.seed, step, micro))
        shares = torch.tensor([pool.pool.share for pool in self.pools])
        pool = self.pools[int(shares.multinomial(1, generator=generator))]
        pool.advance(step, _tell if len(pool.scenes) == 0 else None)
        batch = pool.draw(step, phase.batch_size, generator)
        change = Transforms(self.judge.config, generator)
        batch = change.apply(batch, nothing=self.config.nothing, frozen=self.config.frozen)
        if step == micro == 0:
            _sheet(batch, Path(self.config.run.folder) / "batch.png")
        return batch

    def loss(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """What the pictures show, in cells and as a whole, and how the clips move."""
        coverage = batch.coverage * (batch.sprites >= 0)[..., None, None, None]
        terms = self._terms_of_frames(batch, coverage, step)
        if self.config.part == "all":
            terms |= self._terms_of_motion(batch, coverage)
        total = sum(terms.values(), torch.zeros((), device=self.device))
        return total, {name: value.detach() for name, value in terms.items()}

    def _terms_of_frames(self, batch: Batch, coverage: Tensor, step: int) -> dict[str, Tensor]:
        """Losses of FrameNet at the frames drawn from each clip."""
        picks = self._picks(coverage, step)
        rows = torch.arange(len(picks))[:, None]
        pictures = batch.video.transpose(1, 2)[rows, picks].flatten(0, 1).to(self.device)
        looked = self.judge.frames(pictures)
        shown = coverage.transpose(1, 2)[rows, picks].flatten(0, 1).to(self.device)
        sprites = batch.sprites.repeat_interleave(picks.shape[1], 0).to(self.device)
        places = batch.places.repeat_interleave(picks.shape[1]).to(self.device)
        terms = self._losses_of_sprites(looked, shown, sprites)
        terms["places"] = F.cross_entropy(looked.places, places, ignore_index=IGNORE)
        return terms

    def _picks(self, coverage: Tensor, step: int) -> Tensor:
        """Which frames to look at, [B, pictures]: no frame of a clip twice."""
        area = coverage.sum(1).mean((2, 3)).clamp(min=self.config.seen_area)
        count = min(self.config.pictures, area.shape[1])
        draw = torch.Generator().manual_seed(step)
        return (area**-self.config.small).multinomial(count, generator=draw)

    def _terms_of_motion(self, batch: Batch, coverage: Tensor) -> dict[str, Tensor]:
        """Losses of MotionNet: motions, cameras, and where actors are."""
        moved = self.judge.motion(to_motion_size(batch.video.to(self.device)))
        motions, cameras = batch.motions.to(self.device), batch.cameras.to(self.device)
        told = motions.sum(1)
        here = F.adaptive_avg_pool2d(coverage.sum(1), moved.actors.shape[-2:]).clamp(max=1)
        weight = torch.tensor(4.0, device=self.device)  # actors fill a tenth of the cells
        wrong = F.binary_cross_entropy_with_logits(
            moved.actors, here.to(self.device), pos_weight=weight, reduction="none"
        )
        return {
            "motions": _mean(F.cross_entropy(moved.motions, motions, reduction="none"), told),
            "cameras": F.cross_entropy(moved.cameras, cameras, ignore_index=IGNORE),
            "actors": _mean(wrong.mean((1, 2, 3)), told),
        }

    def _losses_of_sprites(
        self, looked: FrameLogits, shown: Tensor, sprites: Tensor
    ) -> dict[str, Tensor]:
        """Losses of cells and of whole pictures.

        Args:
            looked: at N pictures.
            shown: [N, A, h, w], the share of each cell that shows each actor.
            sprites: [N, A], the actors' sprites, -1 for none.
        """
        none = len(self.judge.config.sprites)
        most, actor = shown.max(1)
        names = sprites.clamp(min=0)
        named = names[:, :, None, None].expand_as(shown).gather(1, actor[:, None])[:, 0]
        covered = (most >= self.config.seen_cell).float()
        empty = (most < 0.02).float()
        target = torch.where(covered > 0, named, torch.full_like(named, none))
        wrong = F.cross_entropy(looked.cells, target, reduction="none")
        area = shown.mean((2, 3))
        visible = (area >= self.config.seen_area) & (sprites >= 0)
        doubtful = ((area > 1e-4) & ~visible).any(1)
        odds = F.pad(looked.sprites, (0, 1))  # none against none is even
        share = torch.zeros_like(odds).scatter_add(1, names, visible.float())
        share[:, none] = (~visible.any(1)).float()
        share = share / share.sum(1, keepdim=True)
        whole = F.cross_entropy(odds, share, reduction="none")
        return {
            "cells": _mean(wrong, covered) + _mean(wrong, empty),
            "sprites": _mean(whole, (~doubtful).float()),
        }

    def validate(self, step: int, folder: Path) -> dict[str, float]:
        """Accuracy on fresh renders and on noise; writes the averaged judge."""
        del step
        save_module(self.judge.state_dict(), self.judge.config, folder / "judge", torch.bfloat16)
        first = SEED_RANGES["judge"][1] - VALIDATION_SEEDS
        scores = judge_renders(self.judge, first, self.config.validation_clips)
        return {name: value.rate for name, value in scores.items() if value.total}


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    return (values * weights).sum() / weights.sum().clamp(min=1)


def _tell(done: int, total: int) -> None:
    print(f"\rrendering {done}/{total} clips", end="\n" if done >= total else "", file=sys.stderr)


def _sheet(batch: Batch, path: Path) -> None:
    pixels = to_bytes(batch.video[:24, :, ::4].permute(0, 2, 3, 4, 1)).numpy()
    contact_sheet([frame for clip in pixels for frame in clip], path, columns=12)


if __name__ == "__main__":
    raise SystemExit(run_program(__doc__, JudgeRun, JudgeTask))
