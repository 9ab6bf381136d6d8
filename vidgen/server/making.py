"""One clip of the queue: from what was asked to its files, with an engine at hand.

A job that is begun once more finds what exists and goes on. `layout.py` says where files lie.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import resource
import sys
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from vidgen.core.errors import InputError
from vidgen.core.protocols import OnEvent
from vidgen.core.request import Request
from vidgen.core.runtime import atomic_write
from vidgen.media.checks import as_data
from vidgen.media.clip import Clip
from vidgen.media.probe import read_recipe
from vidgen.media.video_reader import VideoReader
from vidgen.pipeline.engine import Engine
from vidgen.pipeline.eta import Clock
from vidgen.pipeline.journal.job import job_folder, remove_job
from vidgen.pipeline.journal.journal import Journal
from vidgen.pipeline.recorded import (
    at_own_size,
    lengthened,
    own_options,
    rate_of_still,
    with_own_options,
)
from vidgen.server.layout import RECIPE, SPRITESHEET, THUMBNAIL, VIDEO, files_of

if TYPE_CHECKING:
    from vidgen.pipeline.types import OnPreview
    from vidgen.weights.folder import ModelFolder

THUMBNAIL_SIDE, SPRITE_SIDE = 512, 160
SPRITES, COLUMNS = 16, 4


class Stopwatch:
    """Seconds of a job's stages, by the events between which they lie, and its peak memory."""

    def __init__(self) -> None:
        self._durations: dict[str, float] = defaultdict(float)
        self._stage: str | None = None
        self._began_s = self._since_s = time.monotonic()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak, where it can be

    def __call__(self, stage: str | None) -> None:
        """Note that a stage goes on, or, with None, that none does."""
        if stage != self._stage:
            if self._stage is not None:
                self._durations[self._stage] += time.monotonic() - self._since_s
            self._stage, self._since_s = stage, time.monotonic()

    def facts(self) -> dict[str, Any]:
        """Return seconds by stage and in all, and the most memory in use since the beginning."""
        self(None)
        return {
            "stage_durations": {name: round(s, 3) for name, s in self._durations.items()},
            "inference_time_s": round(time.monotonic() - self._began_s, 3),
            "peak_memory_mb": round(_peak_memory() / 1e6, 1),
        }


def _peak_memory() -> int:
    """Return the most bytes in use since the last reset, or since the process began."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    with suppress(OSError, TypeError):
        status = Path("/proc/self/status").read_text()
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])  # type: ignore[index]
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Maker:
    """Makes the clips of one engine.

    `tell` gets progress and notes as events; it raises `Cancelled` to stop between two steps.
    """

    def __init__(self, engine: Engine, tell: OnEvent) -> None:
        self.engine, self.tell = engine, tell
        self._threads = torch.get_num_threads()

    def make(self, folder: Path, spec: dict[str, Any], on_preview: OnPreview) -> dict[str, Any]:
        """Make a clip, or go on with it, and return its facts.

        `spec` has `options`, fields of `Request` with paths from the job's folder, and `added_s`
        to extend the clip in `prefix`. A clip that is rolled out shows no previews.

        Raises:
            InputError: a request that can't be made.
            Cancelled: by `tell`.
        """
        torch.set_num_threads(self._threads)  # a job that went on may have brought others
        watch, output = Stopwatch(), folder / VIDEO
        request = request_of(folder, spec, self.engine.folder)
        clip = self._clip(request, output, watch, on_preview)
        watch("finish")
        self.tell({"event": "progress", "stage": "finish", "done": 0, "total": 1})
        write_stills(output, folder / THUMBNAIL, folder / SPRITESHEET, clip.num_frames)
        recipe = read_recipe(output) or {}
        content = json.dumps(recipe, sort_keys=True).encode()
        atomic_write(folder / RECIPE, content)
        (width, height), plan = clip.size, recipe.get("plan", {})
        return {
            "width": width, "height": height, "num_frames": clip.num_frames, "fps": str(clip.fps),
            "seconds": float(clip.num_frames / clip.fps), "seed": plan.get("seed"),
            "sound": clip.sound is not None, "captions": clip.captions,
            "checks": as_data(clip.findings or []), "hand_over": recipe.get("hand_over"),
            "recipe_sha256": hashlib.sha256(content).hexdigest(), **watch.facts(),
        }

    def _clip(
        self, request: Request, output: Path, watch: Stopwatch, on_preview: OnPreview
    ) -> Clip:
        """Generate and write; the journal of another version is dropped."""
        journal = Journal(output, resume=True)
        went_on = journal.unfinished
        try:
            return self._written(request, journal, watch, on_preview)
        except InputError as error:
            if not went_on:
                raise
            self.tell({"event": "note", "text": f"it starts anew: {error}"})
            remove_job(job_folder(output))
            return self._written(request, Journal(output, overwrite=True), watch, on_preview)

    def _written(
        self, request: Request, journal: Journal, watch: Stopwatch, on_preview: OnPreview
    ) -> Clip:
        clock: list[Clock] = []

        def report(stage: str, done: int, total: int) -> None:
            watch(stage)
            told = clock[-1](stage, done, total) if clock else {}
            self.tell({"event": "progress", "stage": stage, "done": done, "total": total, **told})

        done = journal.finished
        clip = self.engine.generate(
            request, journal=journal, on_event=lambda p: report(p.stage, p.done, p.total),
            on_preview=None if request.roll else on_preview,
            on_estimate=lambda made: clock.append(Clock(made)))
        assert isinstance(clip, Clip), "a request is for one clip"
        if not done:
            assert journal.output is not None
            clip.save(journal.output, overwrite=True,
                      on_frames=lambda count: report("write", count, clip.num_frames))
        return clip


def request_of(folder: Path, spec: dict[str, Any], model: ModelFolder) -> Request:
    """Return the request of a spec, its files in the job's folder.

    Raises:
        InputError: invalid values, or a clip that can't go on.
    """
    options = spec["options"] | files_of(folder, spec["options"])
    added_s = spec.get("added_s")
    if added_s is None:
        return Request.of(options.pop("prompt"), options)
    clip = options.pop("prefix")
    with VideoReader(clip) as reader:
        fps, size, num_frames = reader.fps, reader.size, sum(1 for _ in reader)
    recipe = read_recipe(clip)
    if num_frames == 1:
        fps = rate_of_still(recipe, model)
    own = {} if recipe is None else own_options(recipe, model.name, options.get("audio"))
    own.pop("lora", None)  # a recipe that came from outside names no files of ours
    options = with_own_options(options, own) | lengthened(clip, num_frames, fps, added_s)
    return at_own_size(Request.of(options.pop("prompt"), options), size, model)


def write_stills(video: Path, thumbnail: Path, sheet: Path | None, num_frames: int) -> None:
    """Write the frame at a third of a clip as WebP and up to 16 in rows as JPEG to a `sheet`.

    One frame of the clip is in memory at a time.
    """
    count = 0 if sheet is None else min(SPRITES, num_frames)
    wanted = {round(index * (num_frames - 1) / max(count - 1, 1)) for index in range(count)}
    sprites: list[Image.Image] = []
    with VideoReader(video) as reader:
        for number, frame in enumerate(reader):
            if number == num_frames // 3:
                atomic_write(thumbnail, _encoded(Image.fromarray(frame), "WEBP", THUMBNAIL_SIDE))
                if sheet is None:
                    return
            if number in wanted:
                sprites.append(_scaled(Image.fromarray(frame), SPRITE_SIDE))
    if sheet is not None:
        (width, height), columns = sprites[0].size, min(COLUMNS, len(sprites))
        canvas = Image.new("RGB", (columns * width, math.ceil(len(sprites) / columns) * height))
        for index, sprite in enumerate(sprites):
            canvas.paste(sprite, (index % columns * width, index // columns * height))
        atomic_write(sheet, _encoded(canvas, "JPEG", max(canvas.size)))


def _scaled(picture: Image.Image, side: int) -> Image.Image:
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return picture


def _encoded(picture: Image.Image, kind: str, side: int) -> bytes:
    file = io.BytesIO()
    _scaled(picture, side).save(file, kind, quality=85)
    return file.getvalue()
