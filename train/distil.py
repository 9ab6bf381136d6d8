"""Teach a low-rank delta of a model to make clips in few steps, or turn by turn without end.

    python train/cache.py        -c configs/train/toybox_student.yaml    first: render and encode
    python train/trajectories.py -c configs/train/toybox_student.yaml    then: what is to be learned
    python train/distil.py -c configs/train/toybox_student.yaml [--set a.b=c]... [--resume]
    python train/distil.py -c configs/train/toybox_student_match.yaml    then: what its clips lack

The first run is a plain regression on what the teacher answered, the second compares the student's
own clips with the teacher's. toybox_roller.yaml and toybox_roller_match.yaml teach the delta that
rolls clips out, which begins as the student, in the same two parts. See `vidgen.training.distil`.
"""

from __future__ import annotations

from typing import Any

from vidgen.training.distil.config import DistilRun
from vidgen.training.distil.match import MatchTask
from vidgen.training.distil.roll import RollMatchTask, RollTask
from vidgen.training.distil.student import DeltaTask, DistilTask
from vidgen.training.program import run_program


def task_of(config: DistilRun) -> DeltaTask[Any]:
    """What a run's student learns: the teacher's answers, of turns too, or what its clips lack."""
    if config.match is not None:
        return MatchTask(config) if config.roll is None else RollMatchTask(config)
    return DistilTask(config) if config.roll is None else RollTask(config)


if __name__ == "__main__":
    raise SystemExit(run_program(__doc__, DistilRun, task_of))
