"""DeepSpeed's settings: read strictly from a JSON, completed by what the run says."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidgen.core.errors import InputError, nearest
from vidgen.core.runtime import choose_device
from vidgen.training.config import RunConfig

if TYPE_CHECKING:
    from types import ModuleType

    import torch
    from torch import nn

_STAGES = (1, 2, 3)
_RUNS_OWN = {
    "train_batch_size": "batch_size", "train_micro_batch_size_per_gpu": "batch_size",
    "gradient_accumulation_steps": "accumulate", "gradient_clipping": "optim.grad_clip",
    "optimizer": "optim", "scheduler": "optim", "bf16": "dtype", "fp16": "dtype",
    "data_types": "dtype", "torch_autocast": "dtype", "checkpoint": "engine",
    "sequence_parallel_size": "engine.sequence", "managed_gradient_accumulation": "accumulate",
}
"""What a DeepSpeed JSON may not say, and the key of the run that says it."""


@dataclass(frozen=True)
class ZeroSettings:
    """What a DeepSpeed JSON asks for, as far as others need to know.

    Args:
        stage: of ZeRO: what is shared out: 1 the optimiser's state, 2 also gradients, 3 also
            weights.
        offload_optimizer: whether moments, and the weights' fp32 share, lie in the CPU's memory.
        offload_weights: whether the ranks' shares of the weights do, too.
        config: the whole, for `deepspeed.initialize`.
    """

    stage: int
    offload_optimizer: bool
    offload_weights: bool
    config: dict[str, Any]


def find_settings(name: str) -> Path:
    """A DeepSpeed JSON by its path, or one of ours by its name.

    Raises:
        InputError: there is none.
    """
    if Path(name).is_file():
        return Path(name)
    here = Path(str(files("vidgen")))
    ours = {path.stem: path for folder in (here.parent / "train", here / "configs")
            for path in sorted(folder.glob("deepspeed/*.json"))}
    stem = Path(name).name.removesuffix(".json")
    if stem not in ours:
        raise InputError(f"engine.deepspeed is {name!r}, no file and none of ours; "
                         f"{nearest(stem, ours)}")
    return ours[stem]


def read_settings(run: RunConfig) -> ZeroSettings:
    """The DeepSpeed settings of a run.

    Raises:
        InputError: not JSON, no ZeRO stage, or keys that the run itself has.
    """
    assert run.engine.deepspeed is not None
    path = find_settings(run.engine.deepspeed)
    try:
        settings = json.loads(path.read_text())
        zero = settings.get("zero_optimization", {})
        stage = zero.get("stage")
        offloads = [(zero.get(f"offload_{what}") or {}).get("device", "none")
                    for what in ("optimizer", "param")]
    except (ValueError, AttributeError) as error:
        raise InputError(f"{path} is no DeepSpeed JSON: {error}") from error
    if stage not in _STAGES:
        raise InputError(f"{path}: zero_optimization.stage is {stage!r}; give 1, 2 or 3, or leave "
                         "engine.deepspeed out")
    for key, ours in _RUNS_OWN.items():
        if key in settings:
            raise InputError(f"{path}: {key!r} is the run's to say: leave it out and set {ours}")
    if any(device not in ("none", "cpu") for device in offloads):
        raise InputError(f"{path}: offload goes to 'cpu' only, not {offloads}: what lies on a disk "
                         "is in no checkpoint")
    # A step's micro-batches are counted by the loop, which says which one is the last.
    config = {
        **settings, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1,
        "gradient_clipping": run.optim.grad_clip, "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    return ZeroSettings(stage, offloads[0] == "cpu", offloads[1] == "cpu", config)


def share_out(run: RunConfig) -> Callable[[nn.Parameter], None] | None:
    """What `load_module` is to do with `each` weight it has read, so that no rank holds them all.

    Returns:
        Under ZeRO-3 a function that leaves a rank only its share of a parameter, so that loading
        takes a share of all and the largest tensor; else None. Inside `join_ranks` alone.
    """
    if run.engine.deepspeed is None or read_settings(run).stage < 3:
        return None
    deepspeed = import_deepspeed(choose_device(run.device))
    shared: list[Any] = []

    def each(parameter: nn.Parameter) -> None:
        if shared:
            shared[0].convert_to_zero_parameters(param_list=[parameter])
            return
        import torch

        alone = torch.nn.ParameterList([parameter])
        deepspeed.zero.Init(alone, config_dict_or_path=read_settings(run).config)
        shared.append(parameter)

    return each


def import_deepspeed(device: torch.device) -> ModuleType:
    """DeepSpeed, made ready for a device; it compiles nothing, and logs only errors.

    Raises:
        InputError: it isn't installed.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", "0")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import deepspeed
            import deepspeed.ops
            from deepspeed.utils import logger
    except ImportError as error:
        raise InputError("engine.deepspeed needs DeepSpeed: pip install 'vidgen[train]'") from error
    logger.setLevel(logging.ERROR)
    if device.type == "cpu":  # its operator for shared memory would be compiled first
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        "nccl" if device.type == "cuda" else "gloo", auto_mpi_discovery=False, verbose=False
    )
    module: ModuleType = deepspeed
    return module
