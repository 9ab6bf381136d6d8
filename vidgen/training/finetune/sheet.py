"""Clips to look at: while a model learns, and in the end with and without what it learned.

Both are made by the very pipeline that `vidgen generate` runs.

Axes: F latent frames, h w latent rows and columns, T frames, H W pixel rows and columns.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from vidgen.core.errors import InputError
from vidgen.core.request import Request
from vidgen.media.grid import contact_sheet
from vidgen.media.types import Frames
from vidgen.models.lora import Adapter
from vidgen.pipeline.codec import to_frames
from vidgen.pipeline.engine import Engine, load_own
from vidgen.pipeline.model import log as engine_log
from vidgen.pipeline.plan import make_plan
from vidgen.training.data.dataset import Dataset
from vidgen.training.finetune.config import FinetuneConfig
from vidgen.training.finetune.model import LearnedToken
from vidgen.weights.folder import ModelFolder
from vidgen.weights.lora import write_lora

SHOWN = 4
"""Frames of each clip on a sheet, evenly spread."""


def check_sheets(config: FinetuneConfig, folder: ModelFolder) -> None:
    """Find out before anything is learned whether the sheets' clips can be made.

    Raises:
        InputError: a prompt, size, length or setting of `validation` that can't be.
    """
    settings = config.validation
    asked = {name: getattr(settings, name)
             for name in ("seed", "steps", "size", "frames", "guidance")}
    try:
        requests = [Request(prompt=each, **asked) for each in settings.prompts or ("a clip",)]
        make_plan(requests[0], folder)
    except InputError as error:
        raise InputError(f"validation: {error}") from None


class Sheets:
    """Makes the same clips again and again, with the same seeds.

    Held-out clips give prompts and pictures where the run names none.
    """

    def __init__(self, config: FinetuneConfig, dataset: Dataset) -> None:
        self.config, self._dataset = config, dataset
        self._told = set[str]()

    def _is_new(self, record: logging.LogRecord) -> bool:
        """Let each message through once: the same prompts are made again and again."""
        is_new = record.getMessage() not in self._told
        self._told.add(record.getMessage())
        return is_new

    def __call__(self, step: int, folder: Path, modules: Mapping[str, nn.Module]) -> None:
        """Write `sheet-STEP.png` of the modules as they are now."""
        engine = self._engine
        for role in engine.folder.components:
            if role in modules:
                engine.loader.lend(role, modules[role])
        with tempfile.TemporaryDirectory(prefix="vidgen-") as scratch:
            token = modules.get("token")
            loras: list[str] = []
            if isinstance(token, LearnedToken):
                path = Path(scratch) / "token.safetensors"
                write_lora(Adapter("token", {}, tokens={token.token: token.row}), path, "vidgen")
                loras = [str(path)]
            frames = [self._generate(engine, i, loras) for i in range(len(self._examples))]
        engine.loader.close()
        _write(folder / f"sheet-{step:08d}.png", frames, [prompt for prompt, _ in self._examples])

    def compare(self, use: Sequence[str], path: Path) -> float:
        """Write a sheet of clips without and with what was learned, of the same seeds.

        Return the mean absolute difference of the frames' bytes; 0: nothing was learned.
        """
        count = min(self.config.output.ab_clips, len(self._examples))
        without = [self._generate(self._engine, i, ()) for i in range(count)]
        self._engine.loader.close()
        is_lora = self.config.method == "lora"
        engine = self._engine if is_lora else self._open(use[0])
        with_it = [self._generate(engine, i, use if is_lora else ()) for i in range(count)]
        engine.loader.close()
        rows, labels = [], []
        for (prompt, _), *pair in zip(self._examples, without, with_it, strict=False):
            rows += pair
            labels += [f"without: {prompt}", f"with: {prompt}"]
        _write(path, rows, labels)
        pairs = zip(without, with_it, strict=True)
        return float(np.mean([np.abs(a.astype(np.int16) - b).mean() for a, b in pairs]))

    @cached_property
    def _engine(self) -> Engine:
        return self._open(self.config.model)

    def _open(self, model: str) -> Engine:
        run = self.config.run
        return load_own(model, "only the embedded model and the Wan family are fine-tuned",
                        device=run.device, dtype=run.dtype, offload="stage")

    @cached_property
    def _examples(self) -> list[tuple[str, torch.Tensor | None]]:
        """Prompts, and latents [1, C, F, h, w] to take first and last frame from, if need be."""
        source = self._dataset.held_out or self._dataset
        prompts, count = self.config.validation.prompts, self.config.output.ab_clips
        needs_pictures = "text" not in self._engine.folder.tasks
        indices = range(min(len(source.items), len(prompts) or max(count, 1)))
        batches = [source.item_batch([index]) for index in indices] if (
            needs_pictures or not prompts) else []
        latents = [batch["latents"] if needs_pictures else None for batch in batches]
        if not prompts:
            prompts = tuple(batch["captions"][0] or "a clip" for batch in batches)
        return [(prompt, latents[i % len(latents)] if latents else None)
                for i, prompt in enumerate(prompts)]

    def _generate(self, engine: Engine, index: int, loras: Sequence[str]) -> Frames:
        settings, (prompt, latents) = self.config.validation, self._examples[index]
        largest = max(self._dataset.buckets, key=lambda b: (b.num_frames, b.width * b.height))
        options: dict[str, Any] = {
            "seed": settings.seed + index, "steps": settings.steps, "guidance": settings.guidance,
            "size": settings.size or (largest.width, largest.height),
            "frames": settings.frames or largest.num_frames, "fps": self._dataset.fps,
            "lora": list(loras), "audio": "none", "readings": "none",
        }
        if latents is not None:
            frames = torch.cat(list(engine.decode_video(latents)), dim=2)[0]
            options["image"] = to_frames(frames[:, :1])[0].numpy()
            if engine.dit_config.image_positions is not None:  # it was taught both
                options["last_image"] = to_frames(frames[:, -1:])[0].numpy()
        engine_log.addFilter(self._is_new)
        try:
            clip = engine.generate(prompt, **options)
        finally:
            engine_log.removeFilter(self._is_new)
        assert not isinstance(clip, list)
        return clip.frames


def _write(path: Path, clips: Sequence[Frames], labels: Sequence[str]) -> None:
    """A row a clip, its frames evenly spread."""
    shown, told = [], []
    for clip, label in zip(clips, labels, strict=True):
        picks = np.linspace(0, len(clip) - 1, SHOWN).round().astype(int)
        shown += [clip[pick] for pick in picks]
        told += [label, *[""] * (SHOWN - 1)]
    contact_sheet(shown, path, columns=SHOWN, labels=told)
