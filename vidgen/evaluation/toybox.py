"""`vidgen eval toybox`: does a model show what the sentence says? Scored by judge and rulers.

Sources of clips are named in `toybox_items.SOURCES`: what is generated stands beside the same
scenes rendered, which is what the rulers make of perfection, and beside these behind the VAE, which
is the best that a generator can reach.

Each clip's scores are a line of `<output>.jsonl`, addressed by all that shaped them; a run that was
killed finds them there and goes on.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from vidgen.core.errors import InputError
from vidgen.core.request import Request
from vidgen.core.runtime import fingerprint
from vidgen.evaluation.judging import judge_renders
from vidgen.evaluation.phrasings import read_phrasings
from vidgen.evaluation.score_log import ScoreLog
from vidgen.evaluation.toybox_clips import Maker
from vidgen.evaluation.toybox_items import SOURCES, SUITES, Item, Suite, items_of
from vidgen.evaluation.toybox_scoring import Scorer
from vidgen.media.sheet import contact_sheet
from vidgen.pipeline.inputs import Inputs
from vidgen.pipeline.plan import Plan
from vidgen.pipeline.video import Engine, load, to_frames
from vidgen.toybox.captions import prompts
from vidgen.toybox.judge import Judge, JudgeFolder, embedded_judge
from vidgen.toybox.scenes import SEED_RANGES, WORLD_VERSION
from vidgen.toybox.sound_judge import SoundJudgeFolder, embedded_ear

OnEvent = Callable[[dict[str, Any]], None]
MEASURES_VERSION = 2
SHEET_CLIPS, SHEET_FRAMES = 16, 6
SHORTEST_MOTION = 5
JUDGE_SEEDS = 1 << 24  # from the end of the judge's range: scenes it never learned from


@dataclass(frozen=True)
class Benchmark:
    """What to score, and how the clips are made.

    Args:
        model: name or folder.
        split: "dev" for choosing, "test" once for a release.
        prompts: of text to video.
        held_out: prompts of triples never trained on.
        images: first frames of image to video.
        reserved: clips of reserved sprites.
        two: prompts of two actors.
        pairs: of matched triples, one seen in training and one held out.
        phrasings: prompts as people type them, each beside the grammar's caption of its scene.
        extensions: clips of several windows.
        windows: of each of them.
        sounds: bouncing clips with their sound.
        suite: which part to run.
        seed: of the first clip; the others follow.
        batch: clips made at once.
        steps: and the following, None: the model's own.
        judge: folder of another judge than the embedded one.
        sound_judge: folder of a judge of sound; None: the embedded one.
    """

    model: str = "toybox"
    split: Literal["dev", "test"] = "dev"
    prompts: int = 300
    held_out: int = 100
    images: int = 200
    reserved: int = 60
    two: int = 60
    pairs: int = 1000
    phrasings: int = 200
    extensions: int = 20
    windows: int = 4
    sounds: int = 100
    suite: Suite = "all"
    seed: int = 0
    batch: int = 8
    steps: int | None = None
    guidance: float | None = None
    shift: float | None = None
    sampler: str | None = None
    frames: int | None = None
    size: str | None = None
    dtype: str | None = None
    judge: str | None = None
    sound_judge: str | None = None

    def __post_init__(self) -> None:
        counts = ("held_out", "images", "reserved", "two", "pairs", "phrasings", "extensions",
                  "sounds")
        least = dict.fromkeys(counts, 0) | {"prompts": 1, "batch": 1, "windows": 2}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise InputError(f"{name} is {getattr(self, name)}; give {value} or more")


class ToyboxRun:
    """A benchmark on its way: makes clips, has them judged, remembers."""

    def __init__(self, bench: Benchmark, output: Path, on_event: OnEvent) -> None:
        self.bench, self.tell = bench, on_event
        self.engine: Engine = load(bench.model, dtype=bench.dtype)
        device = self.engine.device
        self.judge_folder = JudgeFolder(Path(bench.judge)) if bench.judge else embedded_judge()
        self.judge: Judge = self.judge_folder.load(device)
        self.plan = self._plan()
        self.maker = Maker(bench, self.engine, self.plan)
        self.sources = self._sources()
        self.ear_folder = self._ear_folder()
        ear = None if self.ear_folder is None else self.ear_folder.load(device)
        self.scorer = Scorer(self.judge, ear, self.maker.windows, float(self.plan.fps), device)
        self.identity = self._identity()
        self.log = ScoreLog(output.with_name(output.name + ".jsonl"))
        self.sheet: dict[int, list[Any]] = {}
        drawn = [name for name in self.sources if name in ("text", "image", "phrased")]
        self.sheet_source = drawn[0] if drawn else None

    def _sources(self) -> tuple[str, ...]:
        """The sources of the suite that this model can make; tells which it can't."""
        wanted = SUITES[self.bench.suite]
        self.maker.check(wanted)
        left_out = [name for name in wanted if not self.maker.can_make(name)]
        if left_out:
            text = f"{self.engine.folder.name} can't make {', '.join(left_out)}; they are left out"
            self.tell({"event": "note", "text": text})
        return tuple(name for name in wanted if name not in left_out)

    def _ear_folder(self) -> SoundJudgeFolder | None:
        """The judge of sound, where it is asked for."""
        if "sound" not in self.sources:
            return None
        if self.bench.sound_judge is None:
            return embedded_ear()
        return SoundJudgeFolder(Path(self.bench.sound_judge))

    def _plan(self) -> Plan:
        bench = self.bench
        names = ("steps", "guidance", "shift", "sampler", "frames", "size")
        options = {name: getattr(bench, name) for name in names}
        request = Request.of(prompts(bench.split, 1)[0][1], {"seed": bench.seed, **options})
        plan = self.engine.plan(request, Inputs())
        if "image" in SUITES[bench.suite] and plan.num_frames < SHORTEST_MOTION:
            raise InputError(f"frames is {plan.num_frames}, too few to see a clip go on from its "
                             f"first frame; give {SHORTEST_MOTION} or more, or another --suite")
        return plan

    def _identity(self) -> dict[str, Any]:
        plan = asdict(self.plan)
        kept = ("negative", "width", "height", "num_frames", "num_steps", "shift", "sampler",
                "guidance")  # fmt: skip
        return {
            "measures_version": MEASURES_VERSION,
            "world_version": WORLD_VERSION,
            "model": {"name": self.engine.folder.name, "sha256": self.engine.folder.content_hash},
            "judge": self.judge_folder.sha256,
            "split": self.bench.split,
            "settings": {name: plan[name] for name in kept} | {"fps": str(self.plan.fps)},
            "dtype": self.engine.dtype,
            "batch": self.bench.batch,
        }

    def key(self, item: Item) -> str:
        """SHA-256 of all that shapes an item's scores."""
        material, own = SOURCES[item.source].material, None
        if material == "extend":
            own = self.bench.windows
        elif material == "sound" and self.ear_folder is not None:
            own = self.ear_folder.sha256
        address = json.dumps([self.identity, asdict(item), own], sort_keys=True)
        return hashlib.sha256(address.encode()).hexdigest()

    def score(self, source: str, *, sheet: bool = False) -> list[dict[str, Any]]:
        """The scores of every item of a source, in order; makes those that are missing.

        Clips are made in the same batches in every run, so resuming changes nothing.
        """
        items = self.items(source)
        start, made = time.monotonic(), 0
        wanted = sheet and source == self.sheet_source
        for first in range(0, len(items), self.bench.batch):
            part = items[first : first + self.bench.batch]
            shown = wanted and first < SHEET_CLIPS
            if shown or any(self.key(item) not in self.log.scores for item in part):
                scores = self._score_batch(source, part, keep=shown)
                self.log.add((self.key(item), row) for item, row in zip(part, scores, strict=True))
                made += len(part)
            done = first + len(part)
            left = (time.monotonic() - start) / max(1, made) * (len(items) - done)
            self.tell({"event": "progress", "stage": source, "done": done, "total": len(items),
                       "seconds_left": round(left)})  # fmt: skip
        return [self.log.scores[self.key(item)] for item in items]

    def items(self, source: str) -> list[Item]:
        """The clips of a source."""
        return items_of(self.bench, source)

    def _score_batch(
        self, source: str, items: Sequence[Item], *, keep: bool = False
    ) -> list[dict[str, Any]]:
        made = self.maker.make(source, items)
        if keep:
            self._keep_for_sheet(items, made.video)
        return self.scorer.score(source, items, made)

    def _keep_for_sheet(self, items: Sequence[Item], video: Tensor) -> None:
        moments = torch.linspace(0, video.shape[2] - 1, SHEET_FRAMES).round().long()
        for item, clip in zip(items, video, strict=True):
            self.sheet[item.index] = [frame.numpy() for frame in to_frames(clip[:, moments])]

    def save_sheet(self, path: Path) -> None:
        """Write the first clips, several frames each, one clip a row, under their prompts."""
        assert self.sheet_source is not None
        texts = [item.prompt for item in self.items(self.sheet_source)]
        frames = [frame for index in sorted(self.sheet) for frame in self.sheet[index]]
        labels = [text for i in sorted(self.sheet) for text in _split(texts[i], SHEET_FRAMES)]
        contact_sheet(frames, path, columns=SHEET_FRAMES, labels=labels)


def _split(text: str, parts: int) -> list[str]:
    """A sentence in pieces of about equal length, for the labels of a row."""
    words, width = text.split(), len(text) / parts
    lines = [""] * parts
    for word in words:
        at = min(parts - 1, int(sum(len(line) + 1 for line in lines if line) / (width + 1)))
        lines[at] = f"{lines[at]} {word}".strip()
    return lines


def _prompts_hash(items: Mapping[str, Sequence[Item]]) -> str:
    """SHA-256 over the prompts of all sources, in their order."""
    told = {source: [item.prompt for item in part] for source, part in items.items()}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def run_toybox(
    bench: Benchmark, output: str | Path, on_event: OnEvent, sheet: str | Path | None = None
) -> dict[str, Any]:
    """Score a model; see the module's words and `summary.summarise` for what comes back.

    Raises:
        ModelError: no such model or judge.
        InputError: a setting that can't be honoured.
    """
    from vidgen.evaluation.summary import summarise

    run = ToyboxRun(bench, Path(output), on_event)
    if sheet is not None and run.sheet_source is None:
        raise InputError(f"--sheet draws generated clips, and suite {bench.suite!r} makes none; "
                         "leave it out")
    scores = {source: run.score(source, sheet=sheet is not None) for source in run.sources}
    items = {source: run.items(source) for source in scores}
    trust = None
    if bench.suite in ("all", "full", "judge"):
        first = SEED_RANGES["judge"][1] - JUDGE_SEEDS
        trust = judge_renders(run.judge, first, bench.prompts)
    if sheet is not None:
        run.save_sheet(Path(sheet))
    return {
        "suite": "toybox", "part": bench.suite, **run.identity,
        "sound_judge": None if run.ear_folder is None else run.ear_folder.sha256,
        "seeds": [bench.seed, bench.seed + max(map(len, items.values())) - 1],
        "prompt_suite": {"name": f"toybox, {bench.split}", "sha256": _prompts_hash(items)},
        "augmentation": "none",
        "machine": {"numpy": np.__version__, **fingerprint()},
        **summarise(
            scores, {name: [i.scene for i in part] for name, part in items.items()}, trust,
            [p.kind for p in read_phrasings(bench.phrasings, bench.split)]
            if "phrased" in items else (),
        ),
    }
