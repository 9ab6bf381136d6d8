"""Have the teacher make the trajectories that `train/distil.py` learns from.

    python train/trajectories.py -c configs/train/toybox_student.yaml
    torchrun --nproc-per-node 2 train/trajectories.py -c ...    each process makes its share of them

Captions and conditions come from cached clips (`train/cache.py` with the same YAML, first). Goes on
where it stopped; a run that found more shards than it needs leaves them alone.
"""

from __future__ import annotations

import argparse

from rich.progress import track

from vidgen.core.config import build
from vidgen.core.config_file import load_run
from vidgen.pipeline.parts import DTYPES
from vidgen.training.distil.config import DistilRun
from vidgen.training.distil.data import open_shards
from vidgen.training.program import exit_code


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
