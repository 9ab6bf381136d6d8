"""Teach a low-rank delta of a model to make clips in few steps.

    python -m train.toybox.cache
        -c train/toybox/configs/student.yaml    first: render and encode
    python -m train.toybox.trajectories -c train/toybox/configs/student.yaml
        then: what is to be learned
    python -m train.toybox.distil -c train/toybox/configs/student.yaml [--set a.b=c]... [--resume]
    python -m train.toybox.distil -c train/toybox/configs/student_match.yaml
        then: what its clips lack

The first run is a plain regression on what the teacher answered, the second compares the student's
own clips with the teacher's. See `train.toybox.distillation`.
"""

from __future__ import annotations

from typing import Any

from train.toybox.distillation.config import DistilRun
from train.toybox.distillation.match import MatchTask
from train.toybox.distillation.student import DeltaTask, DistilTask
from train.toybox.program import run_program


def task_of(config: DistilRun) -> DeltaTask[Any]:
    """What a run's student learns: the teacher's answers, or what its clips lack."""
    return DistilTask(config) if config.match is None else MatchTask(config)


if __name__ == "__main__":
    raise SystemExit(run_program(__doc__, DistilRun, task_of))
