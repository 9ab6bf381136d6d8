"""Teach a low-rank delta of a model to make clips in few steps, without guidance.

    python train/cache.py        -c configs/train/toybox_student.yaml    first: render and encode
    python train/trajectories.py -c configs/train/toybox_student.yaml    then: what is to be learned
    python train/distil.py       -c configs/train/toybox_student.yaml [--set a.b=c]... [--resume]

The loss is a plain regression on what the teacher made before; see `vidgen.training.distil`.
"""

from __future__ import annotations

from vidgen.training.distil import DistilRun, DistilTask
from vidgen.training.program import run_program

if __name__ == "__main__":
    raise SystemExit(run_program(__doc__, DistilRun, DistilTask))
