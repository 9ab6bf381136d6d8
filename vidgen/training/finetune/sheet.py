"""Sheets of sample clips during training, and of A/B clips with and without the result.

The pipeline of `vidgen generate` makes both.

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
    """Check before training that the model can make the sheets' clips.

    Raises:
        InputError: a prompt, size, length or other setting of `validation` is invalid.
    """
    settings = config.validation
    options = {name: getattr(settings, name)
               for name in ("seed", "steps", "size", "frames", "guidance")}
    try:
        requests = [Request(prompt=each, **options) for each in settings.prompts or ("a clip",)]
        make_plan(requests[0], folder)
    except InputError as error:
        raise InputError(f"validation: {error}") from None


class Sheets:
    """Sheets of clips, always of the same prompts and seeds.

    Prompts, if the run sets none, and first frames, if needed, are those of held-out clips.
    """

    def __init__(self, config: FinetuneConfig, dataset: Dataset) -> None:
        self.config, self._dataset = config, dataset
        self._shown = set[str]()

    def _is_new(self, record: logging.LogRecord) -> bool:
        """Let each message through once, as all sheets have the same prompts."""
        is_new = record.getMessage() not in self._shown
        self._shown.add(record.getMessage())
        return is_new

    def __call__(self, step: int, folder: Path, modules: Mapping[str, nn.Module]) -> None:
        """Write `sheet-STEP.png`, generated with `modules`."""
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
        """Write a sheet of clips without and with the result, of the same seeds.

        Return the mean absolute difference of their frames, from 0 to 255. `use` has values of
        `--lora`, or one model folder.
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
        return load_own(model, "only the embedded model and the Wan family can be fine-tuned",
                        device=run.device, dtype=run.dtype, offload="stage")

    @cached_property
    def _examples(self) -> list[tuple[str, torch.Tensor | None]]:
        """Prompts, each with latents [1, C, F, h, w] if the model needs first or last frames."""
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
            if engine.dit_config.image_positions is not None:  # it learned both positions
                options["last_image"] = to_frames(frames[:, -1:])[0].numpy()
        engine_log.addFilter(self._is_new)
        try:
            clip = engine.generate(prompt, **options)
        finally:
            engine_log.removeFilter(self._is_new)
        assert not isinstance(clip, list)
        return clip.frames


def _write(path: Path, clips: Sequence[Frames], labels: Sequence[str]) -> None:
    frames, texts = [], []
    for clip, label in zip(clips, labels, strict=True):
        picks = np.linspace(0, len(clip) - 1, SHOWN).round().astype(int)
        frames += [clip[pick] for pick in picks]
        texts += [label, *[""] * (SHOWN - 1)]
    contact_sheet(frames, path, columns=SHOWN, labels=texts)
