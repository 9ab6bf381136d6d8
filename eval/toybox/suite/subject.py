"""Whether a subject was learned, and whether the others came to harm: scored by the judge.

The subject is asked for in motions and places in which it was never shown. Every prompt is made
with and without what was learned, of the same seed, so that differences are paired.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from eval.toybox.judge import Judge
from eval.toybox.rates import Rate
from eval.toybox.suite.judging import grade
from train.toybox.world.captions import prompts
from train.toybox.world.scenes import Scene
from train.toybox.world.subject import Subject
from vidgen.core.protocols import OnEvent
from vidgen.core.store import ScoreLog
from vidgen.evaluation.statistics import paired_interval
from vidgen.pipeline.codec import as_video
from vidgen.pipeline.denoise import hashes_of
from vidgen.pipeline.engine import Engine
from vidgen.weights.lora import parse_option

TASKS = ("sprite", "motion", "place")
WITH, WITHOUT = "with", "without"


@dataclass(frozen=True)
class SubjectTest:
    """What is asked for.

    Args:
        subject: what was learned.
        lora: what holds it, as `--lora` takes it.
        count: prompts of the subject.
        others: prompts of sprites that the model knew before.
        split: "dev" for choosing, "test" once for a release.
        seed: of the first clip; the others follow.
        steps: and the following, None: the model's own.
    """

    subject: Subject
    lora: tuple[str, ...]
    count: int = 120
    others: int = 240
    split: Literal["dev", "test"] = "dev"
    seed: int = 0
    steps: int | None = None
    frames: int | None = None
    size: str | None = None


def measure(
    test: SubjectTest, engine: Engine, judge: Judge, judge_hash: str, log: ScoreLog,
    on_event: OnEvent,
) -> dict[str, Any]:
    """Make, judge and count all clips; those whose scores are in the log aren't made again.

    Returns:
        For "subject" and "others": rates with intervals of `TASKS`, with and without what was
        learned, and the paired interval of their difference.
    """
    asked = {
        "subject": test.subject.prompts(test.count, test.split),
        "others": prompts(test.split, test.others),
    }
    identity = {
        "model": engine.folder.content_hash, "judge": judge_hash, "dtype": engine.dtype,
        "steps": test.steps, "frames": test.frames, "size": test.size,
    }
    result: dict[str, Any] = {}
    for name, pairs in asked.items():
        rows: dict[str, list[dict[str, bool]]] = {}
        for side, lora in ((WITHOUT, ()), (WITH, test.lora)):
            marks = identity | {"lora": [[hashes_of(choice.path), choice.weight, choice.expert]
                                         for choice in map(parse_option, lora)]}
            rows[side] = []
            for index, (scene, prompt) in enumerate(pairs):
                seed = test.seed + index
                key = _key(marks, prompt, seed, scene)
                if key not in log.scores:
                    verdict = _judged(test, engine, judge, prompt, seed, lora)
                    log.add([(key, grade(verdict, scene))])
                rows[side].append(log.scores[key])
                on_event({"event": "progress", "stage": f"{name} {side}", "done": index + 1,
                          "total": len(pairs)})  # fmt: skip
        result[name] = _summary(rows)
    return result


def _key(marks: dict[str, Any], prompt: str, seed: int, scene: Scene) -> str:
    facts = json.dumps([marks, prompt, seed, asdict(scene)], sort_keys=True)
    return hashlib.sha256(facts.encode()).hexdigest()


@torch.no_grad()
def _judged(
    test: SubjectTest, engine: Engine, judge: Judge, prompt: str, seed: int, lora: Sequence[str]
) -> Any:
    clip = engine.generate(
        prompt, seed=seed, steps=test.steps, frames=test.frames, size=test.size, audio="none",
        lora=list(lora),
    )
    assert not isinstance(clip, list)
    return judge.verdicts(as_video(clip.frames).to(engine.device))[0]


def _summary(rows: Mapping[str, Sequence[Mapping[str, bool]]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for task in TASKS:
        outcomes = {side: [row[task] for row in made] for side, made in rows.items()}
        rates = {side: Rate.of(known) for side, known in outcomes.items()}
        result[task] = {
            side: {"rate": rate.rate, "interval": rate.interval, "clips": rate.total}
            for side, rate in rates.items()
        }
        if outcomes[WITH]:
            learned, before = (list(map(float, outcomes[side])) for side in (WITH, WITHOUT))
            result[task]["difference"] = paired_interval(learned, before)
    return result
