"""The clips of the suites: generated, rendered, or rendered and passed through the VAE.

Axes: B clips, T frames, H W pixel rows and columns, N samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from eval.toybox.generation import (
    generate_batch,
    generate_with_sound,
    round_trip,
    sound_round_trip,
)
from eval.toybox.metrics.drift import Windows
from eval.toybox.suite.items import SOURCES, Benchmark, Item
from train.toybox.world.cues import SAMPLE_RATE
from train.toybox.world.render import Rendered, render
from train.toybox.world.sound import synthesize
from vidgen.core.errors import InputError
from vidgen.core.request import Request
from vidgen.media.sound import resampled
from vidgen.pipeline.codec import as_video
from vidgen.pipeline.settings import SOUND, own_value
from vidgen.pipeline.tail import window_size

if TYPE_CHECKING:
    from vidgen.pipeline.engine import Engine
    from vidgen.pipeline.types import Plan

_NEEDS = {"extend": "extend", "sound": SOUND}  # material -> the model's task that it takes


@dataclass(frozen=True)
class Made:
    """Some clips of a source.

    Attributes:
        video: [B, 3, T, H, W] in [-1, 1], on the CPU.
        shown: the renders that they were made from, or None; of generated clips the first frames.
        sound: [B, N] at the world's rate, or None.
    """

    video: Tensor
    shown: Rendered | None = None
    sound: Tensor | None = None


class Maker:
    """Makes the clips of a benchmark.

    Args:
        bench: its settings.
        engine: the model.
        plan: of a clip.
    """

    def __init__(self, bench: Benchmark, engine: Engine, plan: Plan) -> None:
        self.bench, self.engine, self.plan = bench, engine, plan
        strides = engine.vae_config.strides
        size = window_size(engine.folder)
        overlap = min(int(own_value("overlap", engine.folder)), size - 1)
        self.windows = Windows(size, overlap, bench.windows, strides.t)

    def can_make(self, source: str) -> bool:
        """Whether the model has the task that a source takes."""
        task = _NEEDS.get(SOURCES[source].material)
        return task is None or task in self.engine.folder.tasks

    def check(self, sources: Sequence[str]) -> None:
        """Refuse a part of the benchmark of which this model can't make a clip.

        Raises:
            InputError: with the task that is missing.
        """
        if not any(self.can_make(source) for source in sources):
            task = _NEEDS[SOURCES[sources[0]].material]
            raise InputError(f"{self.engine.folder.name} lacks the task {task!r}, which this part "
                             "of the benchmark takes; choose another --suite")

    def make(self, source: str, items: Sequence[Item]) -> Made:
        """The clips of some items of a source."""
        material, way = SOURCES[source]
        if way == "generate":
            return self._generated(material, items)
        shown = self._rendered(material, items)
        sound = synthesize([i.scene for i in items], *self._size) if material == "sound" else None
        if way == "render":
            return Made(shown.video, shown, sound)
        heard = None if sound is None else self._through_sound_vae(sound)
        return Made(round_trip(self.engine, shown.video), shown, heard)

    @property
    def _size(self) -> tuple[int, int, int, float]:
        plan = self.plan
        return plan.num_frames, plan.height, plan.width, float(plan.fps)

    def _rendered(
        self, material: str, items: Sequence[Item], frames: Sequence[int] | None = None
    ) -> Rendered:
        count, height, width, fps = self._size
        count = self.windows.num_frames if material == "extend" else count
        return render([item.scene for item in items], count, height, width, fps, frames=frames)

    def _generated(self, material: str, items: Sequence[Item]) -> Made:
        texts, seeds = [item.prompt for item in items], [item.seed for item in items]
        if material == "sound":
            video, sound = generate_with_sound(self.engine, self.plan, texts, seeds)
            return Made(video, sound=_resampled(sound, self._sound_rate, SAMPLE_RATE))
        if material == "extend":
            return Made(torch.cat([self._long(item) for item in items]))
        if material == "image":
            shown = self._rendered(material, items, [0])
            return Made(generate_batch(self.engine, self.plan, texts, seeds, shown.video), shown)
        return Made(generate_batch(self.engine, self.plan, texts, seeds))

    def _long(self, item: Item) -> Tensor:
        """A clip of several windows, [1, 3, T, H, W]."""
        settings = {**self.bench.settings.get("settings", {}), "overlap": self.windows.overlap}
        clip = self.engine.generate(Request.of(item.prompt, self.bench.settings | {
            "seed": item.seed, "frames": self.windows.num_frames, "settings": settings,
        }))  # fmt: skip
        assert not isinstance(clip, list)
        return as_video(clip.frames)

    @property
    def _sound_rate(self) -> int:
        return self.engine.folder.components["sound_vae"].config.sample_rate

    def _through_sound_vae(self, sound: Tensor) -> Tensor:
        there = _resampled(sound, SAMPLE_RATE, self._sound_rate)
        return _resampled(sound_round_trip(self.engine, there), self._sound_rate, SAMPLE_RATE)


def _resampled(sound: Tensor, rate: int, wanted: int) -> Tensor:
    """Sound [B, N] at another rate."""
    if rate == wanted:
        return sound
    clips = [
        np.concatenate(list(resampled([clip[:, None].numpy()], 1, rate, wanted))) for clip in sound
    ]
    return torch.stack([torch.from_numpy(clip[:, 0]) for clip in clips])
