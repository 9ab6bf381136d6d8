"""The judge's ear: a small network that tells whose voice and which place a Toybox clip sounds of.

Like the judge of pictures it may answer "nothing", and it learns from the world's own sound alone
(`train/toybox/sound_judge.py`), never from a generated clip or a codec's output.

Axes: B clips, N samples, M mel bands, T frames, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eval.toybox.judge import ASSETS, NOTHING, JudgeFiles, config_of_this_world, ranked
from train.toybox.mel import log_mel
from train.toybox.world.ambience import LAYERS
from train.toybox.world.cast import SPRITES
from train.toybox.world.cues import SAMPLE_RATE
from train.toybox.world.scenes import WORLD_VERSION
from vidgen.core.errors import InputError
from vidgen.ops.conv import conv_block
from vidgen.weights.load import load_module

MIN_SAMPLES = 4096  # a quarter of a second; shorter sound is followed by silence
_WINDOW, _HOP, _FLOOR = 1024, 320, 3e-4
_MEAN, _SPREAD = -6.3, 1.2  # of log mel magnitudes in the world, about


@dataclass(frozen=True)
class SoundJudgeConfig:
    """Classes in the order of the network's outputs, each followed by "nothing", and widths."""

    voices: tuple[str, ...] = tuple(SPRITES)
    ambiences: tuple[str, ...] = tuple(LAYERS)
    bands: int = 96
    dims: tuple[int, int, int] = (24, 48, 96)
    hidden_dim: int = 192
    world_version: int = WORLD_VERSION


class SoundLogits(NamedTuple):
    """What clips sound of: voices [B, K + 1] and ambiences [B, K + 1], the last is "nothing"."""

    voices: Tensor
    ambiences: Tensor


@dataclass(frozen=True)
class Heard:
    """What a clip sounds of, as probabilities.

    Attributes:
        voices: shares of the answer, sprites and `NOTHING`; two actors share it.
        ambiences: one answer, `NOTHING` included.
    """

    voices: dict[str, float]
    ambiences: dict[str, float]

    @property
    def voice(self) -> str:
        """The sprite heard best, or `NOTHING`."""
        return max(self.voices, key=self.voices.__getitem__)

    @property
    def ambience(self) -> str:
        """The place's ambience, or `NOTHING`."""
        return max(self.ambiences, key=self.ambiences.__getitem__)

    def hears(self, sprites: Sequence[str]) -> bool:
        """Whether these, one or two, are the voices heard best."""
        wanted = set(sprites)
        return set(ranked(self.voices)[: len(wanted)]) == wanted


class SoundJudge(nn.Module):
    """Convolutions over mel spectra; where in frequency something is stays, when does not."""

    def __init__(self, config: SoundJudgeConfig) -> None:
        super().__init__()
        self.config = config
        a, b, c = config.dims
        self.trunk = nn.Sequential(
            conv_block(1, a), conv_block(a, b, 2), conv_block(b, b), conv_block(b, c, 2),
            conv_block(c, c),
        )
        self.narrow = conv_block(c, c // 2)
        heard = 2 * (c // 2) * -(-config.bands // 4)
        self.mix = nn.Sequential(nn.Linear(heard, config.hidden_dim), nn.ReLU())
        self.voices = nn.Linear(config.hidden_dim, len(config.voices) + 1)
        self.ambiences = nn.Linear(config.hidden_dim, len(config.ambiences) + 1)

    def forward(self, sound: Tensor) -> SoundLogits:
        """Listen to sound [B, N] at `SAMPLE_RATE`, in [-1, 1]."""
        if sound.dim() != 2 or not sound.shape[1]:
            raise InputError(f"the judge hears sound [clips, samples], not {list(sound.shape)}")
        sound = F.pad(sound, (0, max(0, MIN_SAMPLES - sound.shape[1])))
        mel = log_mel(
            sound, SAMPLE_RATE, window=_WINDOW, hop=_HOP, bands=self.config.bands, floor=_FLOOR
        )
        x = self.narrow(self.trunk(((mel - _MEAN) / _SPREAD)[:, None]))
        pooled = torch.cat([x.mean(3), x.amax(3)], 1).flatten(1)
        mixed = self.mix(pooled)
        return SoundLogits(self.voices(mixed).float(), self.ambiences(mixed).float())

    @torch.no_grad()
    def verdicts(self, sound: Tensor) -> list[Heard]:
        """Judge the sound of clips, [B, N] at `SAMPLE_RATE`, of any length."""
        logits = self(sound.float().clamp(-1, 1))
        names = (*self.config.voices, NOTHING), (*self.config.ambiences, NOTHING)
        rows = [
            [dict(zip(known, row, strict=True)) for row in answer.softmax(1).tolist()]
            for known, answer in zip(names, logits, strict=True)
        ]
        return [Heard(*answer) for answer in zip(*rows, strict=True)]


@dataclass(frozen=True)
class SoundJudgeFolder(JudgeFiles):
    """A judge's ear on disk."""

    def load(self, device: torch.device | str = "cpu") -> SoundJudge:
        """Bring it into memory, in float32.

        Raises:
            ModelError: files missing or damaged, or of another world.
        """
        config = config_of_this_world(SoundJudgeConfig, self.path, "sound_judge")
        return load_module(lambda: SoundJudge(config), self.path, torch.float32, device)


def embedded_ear() -> SoundJudgeFolder:
    """The judge of sound released with this checkout."""
    return SoundJudgeFolder(ASSETS / "sound_judge")
