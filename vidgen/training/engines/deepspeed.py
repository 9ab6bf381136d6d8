"""Training by DeepSpeed: ZeRO 1, 2 and 3 (Rajbhandari et al. 2020), with offload to the CPU.

Trained weights are float32 and computed with under autocast, as on one device: ZeRO shards the
float32 weights themselves, so no second copy of them is needed. Frozen weights keep their dtype.

Axes: S elements of a rank's shard of a weight, padded.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vidgen.core.errors import InputError, ModelError, OutputError, nearest
from vidgen.core.runtime import choose_device
from vidgen.training import checkpoint
from vidgen.training.config import RunConfig
from vidgen.training.engines.distributed import Place
from vidgen.training.engines.engine import TrainingEngine
from vidgen.training.optim import EMA, set_lr
from vidgen.training.task import Task
from vidgen.weights.load import read_tensors
from vidgen.weights.tensors import Lazy, held

_WRITERS = ("PytorchStreamWriter", "inline_container")  # in torch.save's errors of writing
_TAG = "zero"
"""Name of DeepSpeed's folder in a checkpoint."""
_RUNS_OWN = {
    "train_batch_size": "batch_size", "train_micro_batch_size_per_gpu": "batch_size",
    "gradient_accumulation_steps": "accumulate", "gradient_clipping": "optim.grad_clip",
    "optimizer": "optim", "scheduler": "optim", "bf16": "dtype", "fp16": "dtype",
    "data_types": "dtype", "torch_autocast": "dtype", "checkpoint": "engine",
    "sequence_parallel_size": "engine.sequence", "managed_gradient_accumulation": "accumulate",
}
"""Keys that a DeepSpeed JSON may not have, and the run's keys to set instead."""


@dataclass(frozen=True)
class ZeroSettings:
    """Hold the settings of a DeepSpeed JSON; the defaults are those of plain torch."""

    # ZeRO shards 1: the optimiser's state, 2: also gradients, 3: also weights; 0: nothing
    stage: int = 0
    # whether moments and the float32 shard of the weights are in the CPU's memory
    offload_optimizer: bool = False
    offload_weights: bool = False  # whether the shards of the weights are in the CPU's memory
    config: dict[str, Any] = field(default_factory=dict)  # for `deepspeed.initialize`


def _find_settings(name: str) -> Path:
    if Path(name).is_file():
        return Path(name)
    here = Path(str(files("vidgen")))
    ours = {path.stem: path for folder in (here.parent / "train", here / "configs")
            for path in sorted(folder.glob("deepspeed/*.json"))}
    stem = Path(name).name.removesuffix(".json")
    if stem not in ours:
        raise InputError(f"engine.deepspeed is {name!r}, neither a file nor a shipped config; "
                         f"{nearest(stem, ours)}")
    return ours[stem]


def read_settings(run: RunConfig) -> ZeroSettings:
    """Read the DeepSpeed settings of a run: a JSON by its path, or a shipped one by its name.

    Raises:
        InputError: no such file, not JSON, no ZeRO stage, or keys that the run itself sets.
    """
    if run.engine.deepspeed is None:
        return ZeroSettings()
    path = _find_settings(run.engine.deepspeed)
    try:
        settings = json.loads(path.read_text())
        zero = settings.get("zero_optimization", {})
        stage = zero.get("stage")
        offloads = [(zero.get(f"offload_{what}") or {}).get("device", "none")
                    for what in ("optimizer", "param")]
    except (ValueError, AttributeError) as error:
        raise InputError(f"{path} is not a DeepSpeed JSON: {error}") from error
    if stage not in (1, 2, 3):
        raise InputError(f"{path}: zero_optimization.stage is {stage!r}; give 1, 2 or 3, or leave "
                         "engine.deepspeed out")
    for key, ours in _RUNS_OWN.items():
        if key in settings:
            raise InputError(f"{path}: {key!r} is set by the run: leave it out and set {ours}")
    if any(device not in ("none", "cpu") for device in offloads):
        raise InputError(f"{path}: offload goes to 'cpu' only, not {offloads}: checkpoints don't "
                         "include data offloaded to a disk")
    # The loop counts a step's micro-batches and marks the last one, so DeepSpeed gets 1.
    config = {
        **settings, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1,
        "gradient_clipping": run.optim.grad_clip, "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    return ZeroSettings(stage, offloads[0] == "cpu", offloads[1] == "cpu", config)


def shard_weights(run: RunConfig) -> Callable[[nn.Parameter], None] | None:
    """Return a function for `load_module` to call with each weight it has read, or None.

    Under ZeRO-3 it reduces a parameter to this rank's shard, so that loading needs memory for the
    shards and the largest tensor. Else it is None. Call it inside `join_ranks`.
    """
    settings = read_settings(run)
    if settings.stage < 3:
        return None
    deepspeed = _import_deepspeed(choose_device(run.device))
    shared: list[Any] = []

    def each(parameter: nn.Parameter) -> None:
        if shared:
            shared[0].convert_to_zero_parameters(param_list=[parameter])
            return
        alone = nn.ParameterList([parameter])
        deepspeed.zero.Init(alone, config_dict_or_path=settings.config)
        shared.append(parameter)

    return each


def _import_deepspeed(device: torch.device) -> ModuleType:
    """Import DeepSpeed for a device, without compiled operators and with only errors logged."""
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
    if device.type == "cpu":  # else its operator for shared memory would be compiled
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo",
                               auto_mpi_discovery=False, verbose=False)
    module: ModuleType = deepspeed
    return module


def open_deepspeed(task: Task, run: RunConfig, place: Place, source: Path | None) -> TrainingEngine:
    """Return DeepSpeed's engine, which refuses experts that take turns, and Muon."""
    return _DeepSpeedEngine(task, run, place, source)


class _DeepSpeedEngine(TrainingEngine):
    def _open(self, run: RunConfig, source: Path | None) -> None:
        settings = read_settings(run)
        deepspeed, config = _import_deepspeed(choose_device(run.device)), settings.config
        ranks = None if source is None else checkpoint.read_meta(source).get("ranks")
        self._resized = source is not None and ranks != self.place.size
        if self._resized:
            config = {**config, "checkpoint": {"load_universal": True}}
        self._deepspeed, *_ = deepspeed.initialize(
            model=self.model, optimizer=_only_adamw(self.task), config=config,
            dist_init_required=False)
        self._shared: dict[str, Any] = {**self.parameters} if settings.stage == 3 else {}
        if self._shared:
            _register_norms(deepspeed, self.model)
        self._hyper = [{k: v for k, v in group.items() if k != "params"}
                       for group in self._deepspeed.optimizer.param_groups]
        shares = {name: p.ds_tensor for name, p in self._shared.items()}  # [S]
        self.ema = EMA(shares or self.parameters, run.ema_decay)

    def close(self) -> None:
        self._deepspeed.destroy()

    def loss(self, batch: Any, step: int, *, last: bool) -> tuple[Tensor, dict[str, Tensor]]:
        self._deepspeed.set_gradient_accumulation_boundary(last)
        loss, named = self._deepspeed(batch, step)
        return loss, named

    def backward(self, loss: Tensor) -> None:
        self._deepspeed.backward(loss)

    def discard(self, loss: Tensor) -> None:
        self._deepspeed.backward(loss * torch.nan)  # DeepSpeed drops gradients that aren't finite
        self._deepspeed.step()

    def update(self, scale: float) -> float:
        set_lr([self._deepspeed.optimizer], scale)
        self._deepspeed.step()
        return float(self._deepspeed.get_global_grad_norm())

    @contextmanager
    def averaged(self) -> Iterator[None]:
        self._release()
        with self.ema.swapped():
            yield
            self._release()

    def save(self, folder: Path) -> None:
        """Write weights and moments in DeepSpeed's files, the averages in `state.safetensors`."""
        try:
            self._deepspeed.save_checkpoint(str(folder), tag=_TAG, save_latest=False,
                                           exclude_frozen_parameters=True)
        except (OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not any(n in str(error) for n in _WRITERS):
                raise
            raise OutputError(f"the checkpoint in {folder.parent} can't be written: the disk may "
                              f"be full ({str(error).splitlines()[0][:120]}); the previous "
                              "checkpoint is complete: free space and --resume") from error
        averages = {f"ema/{name}": _gathered(shadow, self._shared.get(name))
                    for name, shadow in self.ema.shadow.items()}
        if self.place.main:
            live = checkpoint.live_weights(self.task, frozen=False)
            buffers = {name: value for name, value in live.items()
                       if name.removeprefix("model/") not in self.parameters}
            checkpoint.write_tensors(folder / checkpoint.STATE, {**averages, **buffers})
        else:
            for each in averages.values():
                each.get()

    def load(self, folder: Path) -> None:
        if not (folder / _TAG).is_dir():
            raise ModelError(f"{folder} was not written by DeepSpeed; resume with the engine that "
                             "wrote it (leave engine.deepspeed out)")
        checkpoint.check_manifest(folder)
        self._release()
        with _readable(folder / _TAG, self.place, resized=self._resized) as place:
            path, _ = self._deepspeed.load_checkpoint(
                str(place.parent), tag=place.name, load_module_strict=False,
                load_lr_scheduler_states=False)
        if path is None:
            raise ModelError(f"{folder / _TAG} can't be read; resume from another step-* folder")
        for group, hyper in zip(self._deepspeed.optimizer.param_groups, self._hyper, strict=True):
            group.update(hyper)  # keep the config's rates and decay
        for state in self._deepspeed.basic_optimizer.state.values():
            if "step" in state:  # the universal layout gives all groups one tensor to count in
                state["step"] = torch.as_tensor(state["step"]).clone()
        tensors = read_tensors(folder / checkpoint.STATE)
        for name, shadow in self.ema.shadow.items():
            whole = checkpoint.average_of(folder, tensors, name)
            if not self._shared:
                shadow.copy_(whole)
                continue
            first = self.place.rank * shadow.numel()
            mine = whole.flatten()[first : first + shadow.numel()]
            shadow.zero_()[: mine.numel()].copy_(mine)

    def _release(self) -> None:
        """Drop gathered weights, so that the next use gathers them from the shards again."""
        if self._shared:
            self._deepspeed.empty_partition_cache()


def _gathered(shadow: Tensor, shared: Any) -> Lazy:
    """Return an average; all ranks together gather the shards [S] of a ZeRO-3 parameter."""
    if shared is None:
        return held(shadow)

    def gather() -> Tensor:
        parts = [torch.empty_like(shadow) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, shadow)
        return torch.cat(parts)[: shared.ds_numel].view(shared.ds_shape).cpu()

    return Lazy(torch.empty(shared.ds_shape, device="meta"), gather)


def _only_adamw(task: Task) -> torch.optim.Optimizer:
    if task.alternates:
        raise InputError("experts that take turns can't be trained with DeepSpeed, which would "
                         "change the unused one, too: train one after the other, or with torch")
    optimizers = task.optimizers()
    if len(optimizers) > 1 or not isinstance(optimizers[0], torch.optim.AdamW):
        kinds = " and ".join(type(each).__name__ for each in optimizers)
        raise InputError(
            f"ZeRO can't shard {kinds}: a shard is a range of elements, but Muon needs whole "
            "matrices; leave optim.muon_lr out for AdamW alone, or leave engine.deepspeed out"
        )
    return optimizers[0]


def _register_norms(deepspeed: ModuleType, model: nn.Module) -> None:
    """Have ZeRO-3 gather the weights of norms for their parent module.

    The parent passes them to a fused kernel, so the norm's own forward pass, on which ZeRO has its
    hook, never runs.
    """
    for parent in model.modules():
        for child in parent.children():
            if isinstance(child, nn.LayerNorm):
                for parameter in child.parameters():
                    deepspeed.zero.register_external_parameter(parent, parameter)


@contextmanager
def _readable(folder: Path, place: Place, *, resized: bool) -> Iterator[Path]:
    """Yield DeepSpeed's folder, or for another number of ranks a copy in its universal layout.

    That layout has separate files for each parameter's weight and moments, unsharded. The main rank
    converts.
    """
    if not resized:
        yield folder
        return
    from deepspeed.checkpoint.ds_to_universal import main

    universal = folder.with_name(f".{folder.name}.universal.tmp")
    if place.main:
        shutil.rmtree(universal, ignore_errors=True)
        with open(os.devnull, "w") as nothing, redirect_stdout(nothing):  # noqa: PTH123
            main(Namespace(input_folder=str(folder), output_folder=str(universal),
                           num_extract_workers=1, num_merge_workers=1, keep_temp_folder=False,
                           strict=True, inject_missing_state=True))
    place.barrier()
    try:
        yield universal
    finally:
        place.barrier()
        if place.main:
            shutil.rmtree(universal, ignore_errors=True)
