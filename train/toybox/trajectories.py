"""Have the teacher make the trajectories that `train/toybox/distil.py` learns from.

    python -m train.toybox.trajectories -c train/toybox/configs/student.yaml
    torchrun --nproc-per-node 2 -m train.toybox.trajectories -c ...
        each process makes its share of them

Captions and conditions come from cached clips (`train/toybox/cache.py` with the same YAML, first).
Goes on where it stopped; a run that found more shards than it needs leaves them alone.
"""

from __future__ import annotations

import argparse

from rich.progress import track

from train.toybox.distillation.config import DistilRun
from train.toybox.distillation.data import open_shards
from train.toybox.runs import load_run
from vidgen.core.config import build
from vidgen.core.errors import exit_code
from vidgen.pipeline.loader import DTYPES


def main() -> int:
    """Make every shard that is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-c", "--config", required=True, metavar="RUN.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()

    def work() -> None:
        settings = load_run(options.config, options.set)
        config = build(DistilRun, settings, options.config)
        shards = open_shards(config)
        missing = shards.missing()
        if missing:
            teacher = shards.teacher(DTYPES[config.run.dtype])
            for index in track(missing, config.trajectories.folder):
                shards.make(index, teacher)

    return exit_code(work)


if __name__ == "__main__":
    raise SystemExit(main())
