"""Train the judge of Toybox sound, which names voices and ambiences, on its own range of seeds.

    python -m train.toybox.sound_judge -c train/toybox/configs/sound_judge.yaml [--resume]

It never hears a generated clip or a codec's output. Every validation writes the averaged weights in
bf16 to `<folder>/sound_judge`, a component folder to be copied to `vidgen/assets/sound_judge`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eval.toybox.sound_judge import SoundJudge, SoundJudgeConfig
from eval.toybox.suite.listening import judge_sounds
from train.toybox.model_files import save_module
from train.toybox.phases import Phase, PhasedRun
from train.toybox.program import run_program
from train.toybox.tasks.judge_data import judge_scene
from train.toybox.tasks.sound_data import SoundBatch, damage_sound, hollow_out, label_sounds
from train.toybox.world.scenes import SEED_RANGES
from train.toybox.world.sound import synthesize
from vidgen.core.runtime import choose_device
from vidgen.training.optim import build_optimizers

VALIDATION_SEEDS = 1 << 24  # the last ones of the judge's range
RUN_SEEDS = 1 << 32  # scenes that a run may use


@dataclass(frozen=True)
class SoundJudgeRun:
    """The whole YAML file.

    Args:
        clip_frames: lengths of the clips, in turns; a phase's `num_frames` doesn't matter.
        empty: share of scenes without an actor.
        nothing: share of sounds made unrecognisable.
        validation_clips: fresh sounds to validate on.
    """

    run: PhasedRun
    model: SoundJudgeConfig = field(default_factory=SoundJudgeConfig)
    clip_frames: tuple[int, ...] = (33, 33, 17, 33, 9, 49)
    empty: float = 0.06
    nothing: float = 0.08
    validation_clips: int = 256


class SoundJudgeTask:
    """Voices and ambiences, learned from fresh sounds at every step."""

    def __init__(self, config: SoundJudgeRun) -> None:
        self.config = config
        self.device = choose_device(config.run.device)
        torch.manual_seed(config.run.seed)
        self.judge = SoundJudge(config.model).to(self.device)
        self.modules: dict[str, nn.Module] = {"judge": self.judge}

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """AdamW over everything."""
        return build_optimizers(self.modules, self.config.run.optim)

    def batch(self, phase: Phase, step: int, micro: int) -> SoundBatch:
        """Sounds of scenes never used before, some hollowed out, all damaged by fours."""
        count = step * phase.accumulate + micro
        generator = torch.Generator().manual_seed(self.config.run.seed * 10**9 + count)
        first = SEED_RANGES["judge"][0] + self.config.run.seed * RUN_SEEDS
        first += count * phase.batch_size
        scenes = [judge_scene(first + i, self.config.empty) for i in range(phase.batch_size)]
        num_frames = self.config.clip_frames[count % len(self.config.clip_frames)]
        model = self.config.model
        batch = label_sounds(scenes, synthesize(scenes, num_frames), model)
        spoilt = torch.rand(len(scenes), generator=generator) < self.config.nothing
        hollow_out(batch, spoilt.nonzero()[:, 0].tolist(), model, generator)
        parts = [damage_sound(part, generator) for part in batch.sound.split(4)]
        batch.sound = torch.cat(parts)
        return batch

    def loss(self, batch: SoundBatch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropies of the voices' shares and of the ambience."""
        del step
        heard = self.judge(batch.sound.to(self.device))
        voices = F.cross_entropy(heard.voices, batch.voices.to(self.device))
        ambiences = F.cross_entropy(heard.ambiences, batch.ambiences.to(self.device))
        return voices + ambiences, {"voices": voices.detach(), "ambiences": ambiences.detach()}

    def validate(self, step: int, folder: Path) -> dict[str, float]:
        """Accuracy on fresh sounds and on what holds nothing; writes the averaged judge."""
        del step
        state, config = self.judge.state_dict(), self.config.model
        save_module(state, config, folder / "sound_judge", torch.bfloat16)
        first = SEED_RANGES["judge"][1] - VALIDATION_SEEDS
        scores = judge_sounds(self.judge, first, self.config.validation_clips)
        return {name: value.rate for name, value in scores.items() if value.total}


if __name__ == "__main__":
    raise SystemExit(run_program(__doc__, SoundJudgeRun, SoundJudgeTask))
