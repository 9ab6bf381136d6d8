"""Training by DeepSpeed: ZeRO 1, 2 and 3 (Rajbhandari et al. 2020), with offload to the CPU.

Weights that are trained are float32 and their products run in autocast, as on one device: ZeRO
shares out the float32 weights themselves, so no second copy of them is needed. Frozen weights keep
whatever dtype they have.

Axes of a shared-out weight: N its elements, S a rank's share of them, filled up.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vidgen.core.errors import InputError, ModelError, OutputError
from vidgen.core.runtime import choose_device
from vidgen.training.checkpoint import (
    check_manifest,
    live_weights,
    read_meta,
    read_state,
    write_state,
)
from vidgen.training.config import RunConfig
from vidgen.training.engines.distributed import Place
from vidgen.training.engines.zero import import_deepspeed, read_settings
from vidgen.training.optim import EMA, named_parameters, set_lr
from vidgen.training.task import Losses, Task

if TYPE_CHECKING:
    from types import ModuleType

_WRITERS = ("PytorchStreamWriter", "inline_container")  # named where torch.save can't write
_TAG = "zero"
"""DeepSpeed's own folder in a checkpoint."""


class DeepSpeedEngine:
    """See `Engine`.

    Args:
        task: what is trained.
        run: device, dtype, clipping, decay of the averages, DeepSpeed's JSON.
        place: of this process.
        source: the checkpoint that will be loaded, if any.

    Raises:
        InputError: an optimiser that can't be shared out, or a task that needs one engine a part.
    """

    def __init__(self, task: Task, run: RunConfig, place: Place, source: Path | None) -> None:
        self._task, self._place, self.settings = task, place, read_settings(run)
        deepspeed = import_deepspeed(choose_device(run.device))
        config = self.settings.config
        self._resized = source is not None and read_meta(source).get("ranks") != place.size
        if self._resized:
            config = {**config, "checkpoint": {"load_universal": True}}
        self._parameters = named_parameters(task.modules)
        model = Losses(task, choose_device(run.device), bf16=run.dtype == "bf16")
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=_only_adamw(task), config=config, dist_init_required=False,
        )
        if self.settings.stage == 3:
            _tell_of_norms(deepspeed, model)
        self._hyper = [{k: v for k, v in group.items() if k != "params"}
                       for group in self._engine.optimizer.param_groups]
        self.ema = EMA({name: self._own(p) for name, p in self._parameters.items()}, run.ema_decay)

    def loss(self, batch: Any, step: int, *, last: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Engine`."""
        self._engine.set_gradient_accumulation_boundary(last)
        loss, named = self._engine(batch, step)
        return loss, named

    def backward(self, loss: Tensor) -> None:
        """See `Engine`."""
        self._engine.backward(loss)

    def discard(self, loss: Tensor) -> None:
        """See `Engine`: gradients that aren't finite are what DeepSpeed itself drops in a step."""
        self._engine.backward(loss * torch.nan)
        self._engine.step()

    def update(self, scale: float) -> float:
        """See `Engine`."""
        set_lr([self._engine.optimizer], scale)
        self._engine.step()
        return float(self._engine.get_global_grad_norm())

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """See `Engine`."""
        self._release()
        with self.ema.swapped():
            yield
            self._release()

    def save(self, folder: Path) -> None:
        """See `Engine`; DeepSpeed's own files hold weights and moments, ours the averages."""
        try:
            self._engine.save_checkpoint(
                str(folder), tag=_TAG, save_latest=False, exclude_frozen_parameters=True
            )
        except (OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not any(n in str(error) for n in _WRITERS):
                raise
            raise OutputError(f"the checkpoint in {folder.parent} can't be written: the disk may "
                              f"be full ({str(error).splitlines()[0][:120]}); the one before is "
                              "whole: make room and --resume") from error
        averages = {name: _Gathered(self, name) for name in self.ema.shadow}
        if self._place.main:
            buffers = {name: value for name, value in live_weights(self._task, frozen=False).items()
                       if name.removeprefix("model/") not in self._parameters}
            write_state(folder, {**{f"ema/{n}": v for n, v in averages.items()}, **buffers})
        else:
            for each in averages.values():
                each.get()

    def load(self, folder: Path) -> None:
        """See `Engine`."""
        if not (folder / _TAG).is_dir():
            raise ModelError(f"{folder} is no checkpoint of DeepSpeed's; resume by the engine that "
                             "wrote it (engine.deepspeed left out)")
        check_manifest(folder)
        self._release()
        with as_universal(folder / _TAG, self._place, needed=self._resized) as place:
            path, _ = self._engine.load_checkpoint(
                str(place.parent), tag=place.name, load_module_strict=False,
                load_lr_scheduler_states=False,
            )
        if path is None:
            raise ModelError(f"{folder / _TAG} can't be read; resume from another step-* folder")
        for group, hyper in zip(self._engine.optimizer.param_groups, self._hyper, strict=True):
            group.update(hyper)  # rates and decay are the config's, not the past's
        for state in self._engine.basic_optimizer.state.values():
            if "step" in state:  # of the universal layout all groups got one, to count up together
                state["step"] = torch.as_tensor(state["step"]).clone()
        self._load_averages(folder)

    def close(self) -> None:
        """Take DeepSpeed down, before the process group is."""
        self._engine.destroy()

    def _load_averages(self, folder: Path) -> None:
        tensors = read_state(folder)
        for name, shadow in self.ema.shadow.items():
            whole = tensors.get(f"ema/{name}")
            if whole is None:
                raise ModelError(f"{folder} has no averages of {name}: it is of another config")
            if self.settings.stage < 3:
                shadow.copy_(whole)
                continue
            first = self._place.rank * shadow.numel()
            mine = whole.flatten()[first : first + shadow.numel()]
            shadow.zero_()[: mine.numel()].copy_(mine)

    def gather(self, name: str) -> Tensor:
        """A parameter's whole average, on all ranks; all ask at once."""
        shadow = self.ema.shadow[name]
        if self.settings.stage < 3:
            return shadow
        parameter: Any = self._parameters[name]
        parts = [torch.empty_like(shadow) for _ in range(self._place.size)]
        dist.all_gather(parts, shadow)
        return torch.cat(parts)[: parameter.ds_numel].view(parameter.ds_shape)

    def shape(self, name: str) -> torch.Size:
        """Of a whole parameter."""
        parameter: Any = self._parameters[name]
        shape: torch.Size = parameter.ds_shape if self.settings.stage == 3 else parameter.shape
        return shape

    def _own(self, parameter: Any) -> Tensor:
        """What this rank holds of a parameter: all, or its share [S]."""
        own: Tensor = parameter.ds_tensor if self.settings.stage == 3 else parameter
        return own

    def _release(self) -> None:
        """Leave only shares, so that weights are gathered anew from them."""
        if self.settings.stage == 3:
            self._engine.empty_partition_cache()


@dataclass(frozen=True)
class _Gathered:
    """An average that is brought together when it is written."""

    engine: DeepSpeedEngine
    name: str

    @property
    def likeness(self) -> Tensor:
        return torch.empty(self.engine.shape(self.name), device="meta")

    def get(self) -> Tensor:
        return self.engine.gather(self.name).cpu()


def _only_adamw(task: Task) -> torch.optim.Optimizer:
    """The task's optimiser, if ZeRO can share it out.

    Raises:
        InputError: several, or one that isn't elementwise; or parts that take turns.
    """
    if getattr(task, "alternates", False):
        raise InputError("parts that take turns can't be trained by DeepSpeed, which would "
                         "change those that rest: train one after the other, or by torch")
    optimizers = task.optimizers()
    if len(optimizers) > 1 or not isinstance(optimizers[0], torch.optim.AdamW):
        kinds = " and ".join(type(each).__name__ for each in optimizers)
        raise InputError(
            f"ZeRO can't share out {kinds}: a rank's share is a run of numbers, and Muon needs "
            "whole matrices; leave optim.muon_lr out for AdamW alone, or leave engine.deepspeed out"
        )
    return optimizers[0]


def _tell_of_norms(deepspeed: ModuleType, model: nn.Module) -> None:
    """Have ZeRO-3 bring norms' weights together for the module around them.

    That module hands them to a fused kernel, so the norm itself, and ZeRO's hook on it, never runs.
    """
    for parent in model.modules():
        for child in parent.children():
            if isinstance(child, nn.LayerNorm):
                for parameter in child.parameters():
                    deepspeed.zero.register_external_parameter(parent, parameter)


@contextmanager
def as_universal(folder: Path, place: Place, *, needed: bool) -> Iterator[Path]:
    """Within the block a DeepSpeed folder in its universal layout, for another number of ranks.

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
