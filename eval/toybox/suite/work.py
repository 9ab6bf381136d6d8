"""What workers of `python -m eval.toybox` do: make some clips of a source, and score them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.toybox.judge import JudgeFolder, embedded_judge
from eval.toybox.sound_judge import SoundJudgeFolder, embedded_ear
from eval.toybox.suite.clips import Maker
from eval.toybox.suite.items import SOURCES, SUITES, Benchmark, Item
from eval.toybox.suite.scoring import Row, Scorer
from train.toybox.world.captions import prompts
from train.toybox.world.scenes import WORLD_VERSION
from vidgen.core.errors import InputError
from vidgen.core.protocols import OnEvent
from vidgen.core.request import Request
from vidgen.media.types import Frames
from vidgen.pipeline.codec import to_frames
from vidgen.pipeline.engine import Engine, load
from vidgen.pipeline.inputs import Inputs
from vidgen.pipeline.types import Plan

MEASURES_VERSION = 4
SHEET_FRAMES = 6
SHORTEST_MOTION = 5


@dataclass(frozen=True)
class Batch:
    """Clips of a source that are made together.

    Attributes:
        source: one of `SOURCES`.
        first: index of its first clip among all of the source.
        items: the clips.
        keep: whether frames are wanted for the sheet, too.
    """

    source: str
    first: int
    items: tuple[Item, ...]
    keep: bool = False


@dataclass(frozen=True)
class Scored:
    """What came of a batch: of each clip a row and, if wanted, `SHEET_FRAMES` frames."""

    rows: list[Row]
    frames: list[list[Frames]]


class Studio:
    """A benchmark's model, judges and metrics, opened.

    Args:
        bench: the settings.

    Raises:
        ModelError: no such model or judge.
        InputError: a setting that can't be honoured, or a suite for which the model has no task.
    """

    def __init__(self, bench: Benchmark) -> None:
        self.bench = bench
        engine = load(bench.model, dtype=bench.dtype)
        if not isinstance(engine, Engine):
            raise InputError(f"{bench.model} is of another family, which the world's metrics can't "
                             "batch; score its clips with vidgen eval PROMPTS")
        self.engine = engine
        self._judge_folder = JudgeFolder(Path(bench.judge)) if bench.judge else embedded_judge()
        self.judge = self._judge_folder.load(engine.device)
        self.plan = self._plan()
        self.maker = Maker(bench, engine, self.plan)
        self.maker.check(SUITES[bench.suite])
        self.ear_folder = self._ear_folder()
        ear = None if self.ear_folder is None else self.ear_folder.load(engine.device)
        self._scorer = Scorer(
            self.judge, ear, self.maker.windows, float(self.plan.fps), engine.device
        )
        self.identity = self._identity()

    @property
    def sources(self) -> tuple[str, ...]:
        """Those of the suite that this model can make."""
        return tuple(name for name in SUITES[self.bench.suite] if self.maker.can_make(name))

    def _ear_folder(self) -> SoundJudgeFolder | None:
        """The judge of sound, where it is asked for."""
        if "sound" not in self.sources:
            return None
        if self.bench.sound_judge is None:
            return embedded_ear()
        return SoundJudgeFolder(Path(self.bench.sound_judge))

    def _plan(self) -> Plan:
        bench = self.bench
        request = Request.of(prompts(bench.split, 1)[0][1], {"seed": bench.seed, **bench.settings})
        plan = self.engine.plan(request, Inputs())
        if "image" in SUITES[bench.suite] and plan.num_frames < SHORTEST_MOTION:
            raise InputError(f"frames is {plan.num_frames}, too few to see a clip go on from its "
                             f"first frame; give {SHORTEST_MOTION} or more, or another --suite")
        return plan

    def _identity(self) -> dict[str, Any]:
        plan = asdict(self.plan)
        kept = ("negative", "width", "height", "num_frames", "num_steps", "shift", "sampler",
                "guidance", "candidates", "regional_prompts")  # fmt: skip
        return {
            "measures_version": MEASURES_VERSION,
            "world_version": WORLD_VERSION,
            "model": {"name": self.engine.folder.name, "sha256": self.engine.folder.content_hash},
            "judge": self._judge_folder.sha256,
            "split": self.bench.split,
            "settings": {name: plan[name] for name in kept} | {"fps": str(self.plan.fps)},
            "dtype": self.engine.dtype,
            "batch": self.bench.batch,
        }

    @property
    def ear_sha256(self) -> str | None:
        """Of the judge of sound, where there is one."""
        return None if self.ear_folder is None else self.ear_folder.sha256

    def key(self, item: Item) -> str:
        """SHA-256 of all that shapes an item's scores."""
        material = SOURCES[item.source].material
        own: int | str | None = None
        if material == "extend":
            own = self.bench.windows
        elif material == "sound":
            own = self.ear_sha256
        read = self.engine.tokenizer.replacements(item.prompt)
        address = json.dumps([self.identity, asdict(item), own, *read.items()], sort_keys=True)
        return hashlib.sha256(address.encode()).hexdigest()

    def score(self, batch: Batch) -> Scored:
        """Make a batch's clips and score them."""
        made = self.maker.make(batch.source, batch.items)
        frames = [_looks(clip) for clip in made.video] if batch.keep else []
        return Scored(self._scorer.score(batch.source, batch.items, made), frames)


def _looks(clip: Tensor) -> list[Frames]:
    """`SHEET_FRAMES` frames [H, W, 3] of a clip [3, T, H, W] in [-1, 1], evenly apart."""
    moments = torch.linspace(0, clip.shape[1] - 1, SHEET_FRAMES).round().long()
    return [frame.numpy() for frame in to_frames(clip[:, moments])]


class ToyboxWork:
    """Scores batches, wherever it is sent; each worker opens model and judges once.

    Args:
        bench: the settings.
        identity: what the scheduler's own model, judge and plan are; None: whatever is here.
    """

    def __init__(self, bench: Benchmark, identity: tuple[Any, ...] | None = None) -> None:
        self._bench, self._identity = bench, identity

    def __reduce__(self) -> tuple[Any, ...]:
        """What is opened isn't sent."""
        return ToyboxWork, (self._bench, self._identity)

    @cached_property
    def studio(self) -> Studio:
        """Model and judges.

        Raises:
            InputError: they are others than the scheduler's.
        """
        studio = Studio(self._bench)
        if self._identity not in (None, (studio.identity, studio.ear_sha256)):
            raise InputError(f"model {self._bench.model} or a judge is another one here than where "
                             "the command was given; copy them again")
        return studio

    def settled(self) -> ToyboxWork:
        """The same for other workers, which are to have what this one has opened."""
        studio = self.studio
        work = ToyboxWork(
            replace(self._bench, dtype=studio.engine.dtype), (studio.identity, studio.ear_sha256)
        )
        work.studio = studio
        return work

    def __call__(self, batch: Batch, _tell: OnEvent) -> Scored:
        """Do one batch."""
        return self.studio.score(batch)
