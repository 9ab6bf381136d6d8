"""A task for tests of engines: a tiny transformer learns velocities, whole or by LoRA."""

from __future__ import annotations

import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from train.toybox.initial import init_dit
from vidgen.diffusion.flow import add_noise, to_timestep, velocity_loss
from vidgen.models.dit import SpacetimeDiT
from vidgen.models.presets import DIT_PRESETS
from vidgen.training.config import EngineConfig, OptimConfig, RunConfig
from vidgen.training.engines.distributed import current_place, join_ranks
from vidgen.training.loop import TrainResult, train
from vidgen.training.optim import build_optimizers
from vidgen.training.task import Task


class Velocity(Task):
    """Batches [2, 4, 2, 4, 4] of latents; every one depends on (step, micro) alone.

    Args:
        run: seed, rates.
        lora: train adapters of rank 2 alone, on a frozen transformer, in bfloat16 if the run is.
        poison: steps whose loss is NaN.
        kill_at: step in which rank 1, or the only one, kills itself.
        dropout: drawn from torch's own generator, which each rank has to keep.
    """

    def __init__(
        self, run: RunConfig, *, lora: bool = False, poison: frozenset[int] = frozenset(),
        kill_at: int | None = None, dropout: float = 0.0,
    ) -> None:
        self.run, self.poison, self.kill_at, self.dropout = run, poison, kill_at, dropout
        torch.manual_seed(run.seed)
        self.dit = SpacetimeDiT(DIT_PRESETS["tiny"])
        init_dit(self.dit)
        for parameter in self.dit.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
        if lora:
            self.dit.requires_grad_(requires_grad=False)
            if run.dtype == "bf16":
                for name, parameter in self.dit.named_parameters():
                    if not any(part in name for part in SpacetimeDiT.fp32_weights):
                        parameter.data = parameter.data.bfloat16()
            targets = ["q", "k", "v", "out", "up", "down"]
            adapter = LoraConfig(r=2, lora_alpha=2, target_modules=targets, lora_dropout=0.0)
            inject_adapter_in_model(adapter, self.dit)
            for name, parameter in self.dit.named_parameters():
                if "lora_B" in name:  # else the first steps move one factor alone
                    parameter.data = 0.02 * torch.randn_like(parameter)
                if "lora_" in name:
                    parameter.data = parameter.data.float()
        self.modules: dict[str, nn.Module] = {"transformer": self.dit}

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return build_optimizers(self.modules, self.run.optim, use_muon=lambda n, _: "ffn" in n)

    def batch(self, step: int, micro: int) -> tuple[Tensor, ...]:
        draw = torch.Generator().manual_seed(1000 * step + micro)
        clean, noise = torch.randn(2, self.run.batch_size, 4, 2, 4, 4, generator=draw)
        context = torch.randn(self.run.batch_size, 3, 16, generator=draw)
        sigma = torch.rand(self.run.batch_size, generator=draw)
        return clean.cumsum(2), noise, sigma, context

    def loss(self, batch: tuple[Tensor, ...], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        place = current_place()
        if step == self.kill_at and place.rank == place.size - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        clean, noise, sigma, context = batch
        noisy = torch.nn.functional.dropout(add_noise(clean, noise, sigma), self.dropout)
        velocity = self.dit(noisy, to_timestep(sigma), context, ranks=place.ranks)
        error = velocity_loss(velocity.float(), clean, noise).mean()
        if step in self.poison:
            error = error * math.nan
        return error, {"velocity": error.detach()}

    def files(self, batch: tuple[Tensor, ...]) -> list[str]:
        return [f"clip-{float(batch[0].sum()):.2f}.mp4"]

    def validate(self, _step: int, folder: Path) -> dict[str, float]:
        clean, noise, sigma, context = self.batch(10_000, 0)
        noisy = add_noise(clean, noise, sigma)
        velocity = self.dit(noisy, to_timestep(sigma), context, ranks=current_place().ranks)
        (folder / "sheet.txt").write_text("seen")
        return {"held_out": float(velocity_loss(velocity.float(), clean, noise).mean())}


def make_run(folder: Path, *, accumulate: int = 1, **changes: Any) -> RunConfig:
    """Six steps in float32, each told in the curve; changes are fields of `RunConfig`."""
    engine = EngineConfig(changes.pop("deepspeed", None), changes.pop("sequence", 1))
    run = RunConfig(
        folder=str(folder), steps=6, batch_size=2, accumulate=accumulate, device="cpu",
        optim=OptimConfig(lr=1e-2, warmup_steps=2, grad_clip=0.5), dtype="fp32", log_every=1,
        validate_every=100, ema_decay=0.7, engine=engine,
    )
    return replace(run, **changes)


def follow(run: RunConfig, *, resume: bool = False, **task: Any) -> tuple[TrainResult, list[dict]]:
    """Train in this process's place; the result, and what the main rank wrote down."""
    records: list[dict[str, Any]] = []
    result = train(Velocity(run, **task), run, resume=resume, on_record=records.append)
    return result, records


def join_and_follow(run: RunConfig, **options: Any) -> tuple[TrainResult, list[dict]]:
    """The same, first taking this process's place; with DeepSpeed once a process."""
    with join_ranks(run):
        return follow(run, **options)
