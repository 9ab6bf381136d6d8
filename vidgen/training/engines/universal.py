"""DeepSpeed checkpoints for another number of ranks than wrote them: its universal layout."""

from __future__ import annotations

import contextlib
import os
import shutil
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vidgen.training.engines.distributed import Place


@contextmanager
def as_universal(folder: Path, place: Place, *, needed: bool) -> Iterator[Path]:
    """A DeepSpeed folder in its universal layout, which lies beside it inside the block.

    Each parameter's weight and moments are then files of their own, whole.

    Args:
        folder: as DeepSpeed wrote it; its hashes have been checked.
        place: of this process; the main rank converts.
        needed: False gives the folder as it is.
    """
    if not needed:
        yield folder
        return
    universal = folder.with_name(f".{folder.name}.universal.tmp")
    if place.main:
        shutil.rmtree(universal, ignore_errors=True)
        _convert(folder, universal)
    place.barrier()
    try:
        yield universal
    finally:
        place.barrier()
        if place.main:
            shutil.rmtree(universal, ignore_errors=True)


def _convert(folder: Path, universal: Path) -> None:
    from deepspeed.checkpoint.ds_to_universal import main

    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):  # noqa: PTH123
        main(Namespace(
            input_folder=str(folder), output_folder=str(universal), num_extract_workers=1,
            num_merge_workers=1, keep_temp_folder=False, strict=True, inject_missing_state=True,
        ))
