"""`python -m eval.toybox`: does a model show what the sentence says? Scored by judge and metrics.

Sources of clips are named in `items.SOURCES`: what is generated stands beside the same
scenes rendered, which is what the metrics make of perfection, and those after the VAE, which is
the best that a generator can reach.

Each clip's scores are a line of `<output>.jsonl`, addressed by all that shaped them; a run that was
killed finds them there and goes on. Clips are made in the same batches in every run; so, with the
same `--threads`, resuming, more workers or more seeds change nothing of what is there.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from eval.toybox.suite.items import SUITES, Benchmark, Item, items_of
from eval.toybox.suite.judging import judge_renders
from eval.toybox.suite.phrasings import read_phrasings
from eval.toybox.suite.summary import summarise
from eval.toybox.suite.work import SHEET_FRAMES, Batch, Scored, ToyboxWork
from train.toybox.world.scenes import SEED_RANGES
from vidgen.core.errors import InputError
from vidgen.core.protocols import OnEvent
from vidgen.core.runtime import fingerprint
from vidgen.core.store import ScoreLog
from vidgen.media.grid import contact_sheet
from vidgen.pipeline.workers.scheduler import run_jobs
from vidgen.pipeline.workers.types import Job, Patience, WorkerOptions

SHEET_CLIPS = 16
JUDGE_SEEDS = 1 << 24  # from the end of the judge's range: scenes it never learned from


class ToyboxRun:
    """A benchmark on its way: hands out batches of clips, remembers their scores.

    Args:
        bench: the settings.
        output: results' file, beside which the scores of single clips go.
        on_event: told of progress, and of what is left out.
        workers: who works.
        has_sheet: whether frames of the first clips are kept.
    """

    def __init__(
        self, bench: Benchmark, output: Path, on_event: OnEvent, workers: WorkerOptions, *,
        has_sheet: bool,
    ) -> None:  # fmt: skip
        self.bench, self.tell = bench, on_event
        self._work = ToyboxWork(bench).settled()
        self.studio = self._work.studio
        patience = Patience(stall=math.inf)  # a batch reports no progress
        self.workers = replace(workers, patience=patience)
        self.log = ScoreLog(output.with_name(output.name + ".jsonl"))
        self.items = {source: items_of(bench, source) for source in self.studio.sources}
        self.sheet: dict[int, list[Any]] = {}
        drawn = [name for name in self.items if name in ("text", "image", "phrased")]
        if has_sheet and not drawn:
            raise InputError(f"--sheet draws generated clips, and suite {bench.suite!r} makes "
                             "none; leave it out")
        self.sheet_source = drawn[0] if has_sheet else None
        left_out = [name for name in SUITES[bench.suite] if name not in self.items]
        if left_out:
            text = f"{self.studio.engine.folder.name} can't make {', '.join(left_out)}"
            on_event({"event": "note", "text": f"{text}; they are left out"})

    def score(self) -> dict[str, list[dict[str, Any]]]:
        """By source the scores of its clips, in order; makes those that are missing."""
        keys = {source: list(map(self.studio.key, items)) for source, items in self.items.items()}
        done, pace = Counter[str](), _Pace()
        jobs = []
        for source, items in self.items.items():
            for batch in self._batches(source, items):
                names = keys[source][batch.first : batch.first + len(batch.items)]
                if batch.keep or any(name not in self.log.scores for name in names):
                    jobs.append(Job(f"{source} {batch.first}", batch))
                else:
                    done[source] += len(names)
            if done[source]:
                self._tell_progress(source, done[source], 0)
        for outcome in run_jobs(iter(jobs), self._work, self.workers, self.tell):
            if outcome.error is not None:
                raise outcome.error
            batch, scored = outcome.job.payload, outcome.result
            source, count = batch.source, len(batch.items)
            self._keep(batch, scored, keys[source][batch.first : batch.first + count])
            done[source] += count
            left = len(self.items[source]) - done[source]
            self._tell_progress(source, done[source], pace.seconds_left(source, count, left))
        return {source: [self.log.scores[key] for key in keys[source]] for source in keys}

    def _batches(self, source: str, items: Sequence[Item]) -> Iterator[Batch]:
        """All clips of a source, none of two seeds of a prompt together."""
        count, size = len({item.index for item in items}), self.bench.batch
        for start in range(0, len(items), count or 1):
            for first in range(start, start + count, size):
                part = tuple(items[first : min(first + size, start + count)])
                keep = source == self.sheet_source and first < SHEET_CLIPS
                yield Batch(source, first, part, keep)

    def _keep(self, batch: Batch, scored: Scored, keys: Sequence[str]) -> None:
        self.log.add(zip(keys, scored.rows, strict=True))
        self.sheet |= dict(enumerate(scored.frames, batch.first))

    def _tell_progress(self, source: str, done: int, seconds_left: int) -> None:
        self.tell({"event": "progress", "stage": source, "done": done,
                   "total": len(self.items[source]), "seconds_left": seconds_left})  # fmt: skip

    def save_sheet(self, path: Path) -> None:
        """Write the first clips, several frames each, one clip a row, under their prompts."""
        assert self.sheet_source is not None
        texts = [item.prompt for item in self.items[self.sheet_source]]
        frames = [frame for index in sorted(self.sheet) for frame in self.sheet[index]]
        labels = [text for i in sorted(self.sheet) for text in _split(texts[i], SHEET_FRAMES)]
        contact_sheet(frames, path, columns=SHEET_FRAMES, labels=labels)


class _Pace:
    """How long the rest of a source takes, by what its clips have taken so far."""

    def __init__(self) -> None:
        self._last, self._since, self._made = time.monotonic(), dict[str, float](), Counter[str]()

    def seconds_left(self, source: str, made: int, left: int) -> int:
        """After `made` more clips of a source."""
        start = self._since.setdefault(source, self._last)
        self._last = time.monotonic()
        self._made[source] += made
        return round((self._last - start) / self._made[source] * left)


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
    told = {
        source: list({item.index: item.prompt for item in part}.values())
        for source, part in items.items()
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def run_toybox(
    bench: Benchmark, output: str | Path, on_event: OnEvent, sheet: str | Path | None = None,
    workers: WorkerOptions | None = None,
) -> dict[str, Any]:
    """Score a model; see the module's words and `summary.summarise` for what comes back.

    Raises:
        ModelError: no such model or judge.
        InputError: a setting that can't be honoured.
    """
    run = ToyboxRun(bench, Path(output), on_event, workers or WorkerOptions(),
                    has_sheet=sheet is not None)
    scores, items = run.score(), run.items
    trust = None
    if bench.suite in ("all", "full", "judge"):
        first = SEED_RANGES["judge"][1] - JUDGE_SEEDS
        trust = judge_renders(run.studio.judge, first, bench.prompts)
    if sheet is not None:
        run.save_sheet(Path(sheet))
    phrasings = read_phrasings(bench.phrasings, bench.split) if "phrased" in items else []
    return {
        "suite": "toybox", "part": bench.suite, **run.studio.identity,
        "sound_judge": run.studio.ear_sha256,
        "seeds": [bench.seed, bench.seed + max(map(len, items.values())) - 1],
        "clips_a_prompt": bench.seeds, "threads": run.workers.num_threads,
        "prompt_suite": {"name": f"toybox, {bench.split}", "sha256": _prompts_hash(items)},
        "machine": {"numpy": np.__version__, **fingerprint()},
        **summarise(
            scores, {name: [i.scene for i in part] for name, part in items.items()}, trust,
            [phrasing.kind for phrasing in phrasings] * bench.seeds,
        ),
    }
