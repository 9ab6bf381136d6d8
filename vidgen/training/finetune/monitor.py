"""What a fine-tuning run tells while it learns: events, TensorBoard, tokens a second, MFU."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch

from vidgen.core.errors import InputError
from vidgen.core.protocols import OnEvent
from vidgen.training.engines.distributed import Place
from vidgen.training.finetune.config import FinetuneRun

_SIDE = {"cpu": 1024, "cuda": 8192}


class Monitor:
    """Hears every line of the run's curve before it is written, and adds what only it knows.

    Args:
        run: the run.
        place: of this process.
        device: what the steps run on.
        tell: gets events.
        tensorboard: whether to write TensorBoard's files, too.

    Raises:
        InputError: TensorBoard isn't installed.
    """

    def __init__(
        self, run: FinetuneRun, place: Place, device: torch.device, tell: OnEvent, *,
        tensorboard: bool,
    ) -> None:
        self._run, self._place, self._tell = run, place, tell
        dtype = torch.bfloat16 if run.dtype == "bf16" else torch.float32
        self._peak = matmul_peak(device, dtype) if place.main else math.inf
        self._board = _open_board(Path(run.folder)) if tensorboard and place.main else None

    def __call__(self, record: dict[str, Any]) -> None:
        """Take in a line of the curve."""
        step = record["step"]
        if "seconds_per_step" in record:
            self._add_rates(record)
            left = (self._run.steps - step) * record["seconds_per_step"]
            self._tell({"event": "progress", "stage": "train", "done": step,
                        "total": self._run.steps, "eta_s": left,
                        **{k: v for k, v in record.items() if k != "step"}})  # fmt: skip
        elif "validation" in record:
            self._tell({"event": "validation", **record})
        else:
            self._tell({**record, "event": "note", "text": _complaint(record)})
        if self._board is not None:
            values = record.get("validation", record)
            kind = "validation" if "validation" in record else "train"
            for name, value in values.items():
                if isinstance(value, int | float) and name not in ("step", "phase"):
                    self._board.add_scalar(f"{kind}/{name}", value, step)
            self._board.flush()

    def _add_rates(self, record: dict[str, Any]) -> None:
        """Tokens a second of all ranks, and this one's share of the peak that it can reach.

        Both from the means of a micro-batch; a step has `accumulate` of them on each data rank.
        """
        each_s = self._run.accumulate / record["seconds_per_step"]
        record["tokens_per_s"] = record.pop("tokens") * each_s * self._place.data_size
        flops_per_s = record.pop("flops") * each_s / self._place.sequence
        record["mfu"] = flops_per_s / self._peak


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs a second of a large square product here and now: what MFU is measured against."""
    side = _SIDE.get(device.type, 1024)
    a = torch.ones(side, side, device=device, dtype=dtype)
    times = []
    for _ in range(4):
        begin = time.perf_counter()
        product = a @ a
        float(product[0, 0])  # waits for the device
        times.append(time.perf_counter() - begin)
    return float(2 * side**3 / min(times[1:]))  # the first one warms up


def _open_board(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError(
            "tensorboard: true needs the package tensorboard; install it: pip install "
            "'vidgen[train]', or leave it out: curve.jsonl has the same figures"
        ) from None
    return SummaryWriter(str(folder / "tensorboard"))


def _complaint(record: dict[str, Any]) -> str:
    files = ", ".join(record.get("files", ())) or "unknown files"
    return f"step {record['step']}: loss {record['loss']:.4g} of {files}: {record['event']}"
