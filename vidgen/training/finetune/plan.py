"""`vidgen train --plan`: memory and time of a run on each rank, from modules on the meta device.

Weights, gradients, moments and averages are counted parameter by parameter, as the engine holds
them. Activations are what autograd keeps of a block, counted once on real blocks (a test does so
again): bytes a token, in widths of the transformer and of its feed-forward.

Axes: L tokens of a sample, D width, F hidden width of the feed-forward.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from vidgen.core.errors import InputError
from vidgen.core.values import parse_size
from vidgen.diffusion.temporal_upsampling import LatentRate
from vidgen.models.dit import SpacetimeDiT
from vidgen.pipeline.loader import DTYPES
from vidgen.pipeline.timing import transformer_ops
from vidgen.training.config import RunConfig
from vidgen.training.data.survey import open_trainable
from vidgen.training.engines.deepspeed import ZeroSettings, read_settings
from vidgen.training.engines.distributed import check_sharing, current_place
from vidgen.training.finetune.config import FinetuneConfig
from vidgen.training.finetune.model import prepare_module, rate_of, trained_roles
from vidgen.weights.folder import ModelFolder
from vidgen.weights.published import is_here, published

FULL_BYTES = (56.2, 4.0)
"""Kept of a block whose weights are trained, a token: times D and times F."""
LORA_BYTES = (42.6, 2.0)
"""Kept of a block whose weights are frozen, with adapters on its attention; likewise."""
STREAM_BYTES = 4
"""Kept between blocks that are recomputed, a token, times D."""
CONTEXT_BYTES = 1_000_000_000
"""Taken by a GPU's driver and communication before anything else."""
MACHINE, FLOPS, MFU, LINK = "H100 80GB, NVLink", 989e12, 0.4, 200e9
"""A device: its products in bf16 a second at best, the share of it that training is taken to reach,
bytes a second that a rank can send."""


@dataclass(frozen=True)
class Sample:
    """The largest sample of a run: latent frames, tokens of each, rows of text."""

    frames: int
    frame_tokens: int
    text_tokens: int = 512


@dataclass(frozen=True)
class TrainingPlan:
    """Memory of each rank and time of each step."""

    ranks: int  # how many processes
    engine: str  # what holds the state
    trained: int  # parameters that learn
    frozen: int  # parameters that don't
    device: dict[str, int]  # bytes on each rank's device, by what they are
    host: dict[str, int]  # bytes in the CPU's memory for each rank
    loading: int  # the most bytes on a device while the weights are read
    flops: float  # of a step, on each rank
    sent: float  # bytes that each rank sends in a step
    step_s: float  # seconds of a step, computing and sending at once
    machine: str  # what was assumed of the device
    peak: int  # bytes on each rank's device when it is fullest

    def as_data(self) -> dict[str, Any]:
        """Return plain data, for `--json`."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Return lines for the terminal."""
        counts = f"{self.trained:,} trained parameters, {self.frozen:,} frozen"
        ranks = "1 rank" if self.ranks == 1 else f"{self.ranks} ranks"
        rows = [f"{ranks} of {self.engine}; {counts}", "memory on each rank's device:"]
        rows += [f"  {name:<24}{size / 1e9:8.2f} GB" for name, size in self.device.items() if size]
        rows.append(f"  {'together':<24}{self.peak / 1e9:8.2f} GB")
        if any(self.host.values()):
            rows.append("in the CPU's memory, for each rank:")
            rows += [f"  {name:<24}{size / 1e9:8.2f} GB" for name, size in self.host.items()]
        rows.append(f"while weights are read: {self.loading / 1e9:.2f} GB")
        rows.append(f"a step: {self.flops / 1e12:,.0f} TFLOP and {self.sent / 1e9:.1f} GB sent by "
                    f"each rank, {self.step_s:.1f} s on {self.machine}")
        return rows


def plan(config: FinetuneConfig, ranks: int | None = None) -> TrainingPlan:
    """Plan memory and time of a run on so many ranks, by default those that a launcher started.

    Raises:
        InputError: a model that is neither here nor a published one of the Wan family, experts
            that can't be trained so, or ranks that can't share samples as the run asks.
    """
    ranks = ranks or current_place().size
    check_sharing(config.run, ranks)
    folder = open_trainable(config.model) if is_here(config.model) else published(config.model)
    if folder is None:
        raise InputError(
            f"model {config.model!r} is neither here nor a published one of the Wan family, so "
            "nothing can be planned; give a model's folder")
    modules: dict[str, nn.Module] = {}
    for role in trained_roles(config, folder):
        with torch.device("meta"):
            module = SpacetimeDiT(folder.components[role].config)
            dtype = torch.float32 if config.method == "full" else DTYPES[config.run.dtype]
            modules[role] = prepare_module(config, module.to(dtype))
    rate = max(rate_of(folder, role) for role in modules)
    return plan_training(modules, config.run, _largest_sample(config, folder, rate), ranks=ranks)


def _largest_sample(config: FinetuneConfig, folder: ModelFolder, rate: int) -> Sample:
    """Return the sample of most tokens that the data's buckets can hold, at the finest rate."""
    data, strides = config.data, folder.components["vae"].config.strides
    dit = folder.components["transformer"].config
    side = strides.hw * dit.patch_size
    sizes = [parse_size(size) for size in data.sizes] or list(folder.defaults.sizes)
    area = data.area or max(width * height for width, height in sizes)
    num_frames = max(data.frames, default=folder.defaults.num_frames)
    frames = 1 + (num_frames - 1) // strides.t
    if rate > 1:
        frames = LatentRate(rate).num_upsampled(frames)
    return Sample(frames, -(-area // side**2), min(Sample.text_tokens, dit.text_len))


def plan_training(
    modules: Mapping[str, nn.Module], run: RunConfig, sample: Sample, *, ranks: int
) -> TrainingPlan:
    """Plan memory and time of a run with its largest sample.

    The modules are as they are trained, on the meta device: dtypes, `requires_grad`, adapters and
    `gradient_checkpointing` set. Those that take no part in a step are counted as held.
    """
    zero = read_settings(run)
    parameters = [p for module in modules.values() for p in module.parameters()]
    sizes = [p.numel() * p.element_size() for p in parameters]
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    fp32, sequence = 4 * trained, run.engine.sequence
    dit = next(m for m in modules.values() if isinstance(m, SpacetimeDiT))
    tokens = run.batch_size * sample.frames * sample.frame_tokens / sequence

    def share(num_bytes: int, first_stage: int) -> int:
        """Return a rank's part of what ZeRO shares out from a stage on."""
        return -(-num_bytes // ranks) if zero.stage >= first_stage else num_bytes

    # ZeRO 1 and 2 step on a copy of a rank's share; so does offloading, in the CPU's memory
    has_copies = zero.stage in (1, 2) or zero.offload_optimizer
    device = {"weights": share(sum(sizes), 3), "gradients": share(fp32, 2),
              "moments": share(2 * fp32, 1), "fp32 copies": share(fp32, 1) if has_copies else 0,
              "averages": share(fp32, 3)}
    host: dict[str, int] = {}
    if zero.offload_optimizer:
        host |= {name: device.pop(name) for name in ("moments", "fp32 copies")}
        host["gradients"] = share(fp32, 1)
    if zero.offload_weights:
        host |= {name: device.pop(name) for name in ("weights", "averages")}
    device["activations"] = int(tokens * _activation_bytes(dit))
    device["weights at work"] = _at_work(dit, zero, bf16=run.dtype == "bf16")
    device["driver, communication"] = CONTEXT_BYTES
    forward = sum(op.flops for op in transformer_ops(
        dit.config, sample.frames, sample.frame_tokens, sample.text_tokens))
    # of frozen weights there are no gradients; checkpointing computes the forward pass again
    passes = 2 + _learns_whole(dit) + dit.gradient_checkpointing
    flops = run.accumulate * run.batch_size * (forward * passes) / sequence
    ring = (ranks - 1) / ranks
    if zero.stage < 2:
        sent = 2 * ring * fp32
    elif zero.stage == 2:
        sent = ring * fp32 * (run.accumulate + 1)
    else:  # weights are gathered forwards and backwards
        sent = ring * run.accumulate * (2 * sum(sizes) + fp32)
    if sequence > 1:  # q, k, v and the mixed, to those that a rank shares samples with, each pass
        values = (2 + dit.gradient_checkpointing) * 4 * tokens * dit.config.hidden_dim
        size = values * (2 if run.dtype == "bf16" else 4) * dit.config.num_layers
        sent += run.accumulate * (size * ((sequence - 1) / sequence))
    engine = "plain torch" if ranks == 1 else "torch, DDP"
    if zero.stage:
        engine = f"DeepSpeed, ZeRO {zero.stage}"
        engine += ", offload" if zero.offload_optimizer or zero.offload_weights else ""
    return TrainingPlan(
        ranks=ranks, engine=engine + (f", {sequence} ranks a sample" if sequence > 1 else ""),
        trained=trained, frozen=sum(p.numel() for p in parameters) - trained, device=device,
        host=host, loading=share(sum(sizes), 3) + max(sizes), flops=flops, sent=sent,
        step_s=max(flops / (FLOPS * MFU), sent / LINK), peak=sum(device.values()),
        machine=f"{MACHINE} at {MFU:.0%} of {FLOPS / 1e12:.0f} TFLOP/s")


def _activation_bytes(dit: SpacetimeDiT) -> float:
    """Bytes that autograd keeps of the blocks, a token."""
    config = dit.config
    by_width, by_hidden = FULL_BYTES if _learns_whole(dit) else LORA_BYTES
    block = by_width * config.hidden_dim + by_hidden * config.ffn_dim
    if dit.gradient_checkpointing:
        return block + STREAM_BYTES * config.hidden_dim * config.num_layers
    return block * config.num_layers


def _at_work(dit: SpacetimeDiT, zero: ZeroSettings, *, bf16: bool) -> int:
    """Whole weights that ZeRO-3 gathers for a block and the next, and autocast's bf16 copies."""
    block = list(dit.blocks[0].parameters())
    copies = sum(2 * p.numel() for p in block if p.requires_grad and p.ndim > 1) if bf16 else 0
    live = 1 if dit.gradient_checkpointing else dit.config.num_layers
    gathered = 2 * sum(p.numel() * p.element_size() for p in block) if zero.stage == 3 else 0
    buckets = 0 if not zero.stage else 4 * zero.config["zero_optimization"].get(
        "reduce_bucket_size", 500_000_000)
    trained = 4 * sum(p.numel() for p in dit.parameters() if p.requires_grad)
    return gathered + live * copies + min(buckets, trained)


def _learns_whole(dit: SpacetimeDiT) -> bool:
    return any(p.requires_grad for p in dit.get_submodule("blocks.0.ffn").parameters())
