"""`vidgen`, which saves at every step: `python -m tests.impatient ARGUMENTS`.

A save waits 50 times as long as the last took; on a slow disk the first would be the last.
(`tests.faults.command` saves as often, but in shorter segments, whose frames are others.)
"""

from __future__ import annotations

import sys

from vidgen.cli.main import main
from vidgen.pipeline.journal import journal

if __name__ == "__main__":
    journal.PATIENCE = 0
    sys.exit(main(sys.argv[1:]))
