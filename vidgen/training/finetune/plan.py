"""`vidgen train --plan`: memory and time of a run per rank, from modules on the meta device.

Weights, gradients, moments and averages are counted by parameter, as the engine holds them.
Activations are estimated from constants measured on real blocks, which a test measures again.

Axes: D width of the transformer, F hidden width of its feed-forward.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from vidgen.core.errors import InputError
from vidgen.diffusion.temporal_upsampling import LatentRate
from vidgen.models.dit import SpacetimeDiT
from vidgen.pipeline.loader import DTYPES
from vidgen.pipeline.timing import transformer_flops
from vidgen.training.config import FinetuneConfig, Geometry, RunConfig
from vidgen.training.data.survey import open_trainable
from vidgen.training.engines.deepspeed import ZeroSettings, read_settings
from vidgen.training.engines.distributed import check_sharing, current_place
from vidgen.training.finetune.model import prepare_module, rate_of, trained_roles
from vidgen.weights.folder import ModelFolder
from vidgen.weights.published import is_here, published

FULL_BYTES = (56.2, 4.0)
"""Bytes that autograd keeps per token and trained block, to be multiplied by D and F."""
LORA_BYTES = (42.6, 2.0)
"""The same for a frozen block with adapters in its attention."""
STREAM_BYTES = 4
"""Bytes kept per token between blocks that are recomputed, to be multiplied by D."""
CONTEXT_BYTES = 1_000_000_000
"""Bytes that a GPU's driver and communication take."""
MACHINE, FLOPS, MFU, LINK = "H100 80GB, NVLink", 989e12, 0.4, 200e9
"""The assumed device: its name, peak bf16 FLOP/s, the share of those that training reaches, and
bytes per second that a rank can send."""


@dataclass(frozen=True)
class Sample:
    """Hold the size of a run's largest sample: latent frames, tokens per frame, text tokens."""

    frames: int
    frame_tokens: int
    text_tokens: int = 512


@dataclass(frozen=True)
class TrainingPlan:
    """Hold the estimated memory of each rank and time of each step."""

    ranks: int  # number of processes
    engine: str  # name of the engine, with its options
    trained: int  # number of trained parameters
    frozen: int  # number of frozen parameters
    device: dict[str, int]  # bytes on each rank's device, by kind
    host: dict[str, int]  # bytes in the CPU's memory per rank, by kind
    loading: int  # peak bytes on a device while weights are read
    flops: float  # FLOP of a step per rank
    sent: float  # bytes that each rank sends in a step
    step_s: float  # seconds of a step, computing and sending in parallel
    machine: str  # assumed device
    peak: int  # peak bytes on each rank's device

    def lines(self) -> list[str]:
        """Return the plan as lines for the terminal."""
        counts = f"{self.trained:,} trained parameters, {self.frozen:,} frozen"
        ranks = "1 rank" if self.ranks == 1 else f"{self.ranks} ranks"
        rows = [f"{ranks}, {self.engine}; {counts}", "memory on each rank's device:"]
        rows += [f"  {name:<24}{size / 1e9:8.2f} GB" for name, size in self.device.items() if size]
        rows.append(f"  {'total':<24}{self.peak / 1e9:8.2f} GB")
        if any(self.host.values()):
            rows.append("in the CPU's memory, for each rank:")
            rows += [f"  {name:<24}{size / 1e9:8.2f} GB" for name, size in self.host.items()]
        rows.append(f"while weights are read: {self.loading / 1e9:.2f} GB")
        rows.append(f"per step: {self.flops / 1e12:,.0f} TFLOP and {self.sent / 1e9:.1f} GB sent "
                    f"by each rank, {self.step_s:.1f} s on {self.machine}")
        return rows


def plan(config: FinetuneConfig, ranks: int | None = None) -> TrainingPlan:
    """Plan memory and time of a run on `ranks` ranks, by default those of the launcher.

    Raises:
        InputError: the model is neither on this machine nor a published one of the Wan family, or
            its experts or the number of ranks don't fit the settings.
    """
    ranks = ranks or current_place().size
    check_sharing(config.run, ranks)
    folder = open_trainable(config.model) if is_here(config.model) else published(config.model)
    if folder is None:
        raise InputError(
            f"model {config.model!r} is neither on this machine nor a published one of the Wan "
            "family, so its run can't be planned; give a model's folder")
    modules: dict[str, nn.Module] = {}
    for role in trained_roles(config, folder):
        with torch.device("meta"):
            module = SpacetimeDiT(folder.components[role].config)
            dtype = torch.float32 if config.method == "full" else DTYPES[config.run.dtype]
            modules[role] = prepare_module(config, module.to(dtype))
    rate = max(rate_of(folder, role) for role in modules)
    return plan_training(modules, config.run, _largest_sample(config, folder, rate), ranks=ranks)


def _largest_sample(config: FinetuneConfig, folder: ModelFolder, rate: int) -> Sample:
    """Return the sample with most tokens in the data's buckets, at an upsampling `rate`."""
    geometry = Geometry.of(config.data, folder)
    frames = 1 + (max(geometry.frames) - 1) // geometry.stride_t
    if rate > 1:
        frames = LatentRate(rate).num_upsampled(frames)
    tokens = max(width * height for width, height in geometry.sizes) // geometry.multiple**2
    text_len = folder.components["transformer"].config.text_len
    return Sample(frames, tokens, min(Sample.text_tokens, text_len))


def plan_training(
    modules: Mapping[str, nn.Module], run: RunConfig, sample: Sample, *, ranks: int
) -> TrainingPlan:
    """Plan memory and time of a run from its largest sample.

    Args:
        modules: the modules on the meta device, prepared for training: dtypes, `requires_grad`,
            adapters, `gradient_checkpointing`. Memory counts all of them, time the first one.
    """
    zero = read_settings(run)
    parameters = [p for module in modules.values() for p in module.parameters()]
    sizes = [p.numel() * p.element_size() for p in parameters]
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    fp32, sequence = 4 * trained, run.engine.sequence
    dit = next(m for m in modules.values() if isinstance(m, SpacetimeDiT))
    tokens = run.batch_size * sample.frames * sample.frame_tokens / sequence

    def share(num_bytes: int, first_stage: int) -> int:
        """Return a rank's bytes of state that ZeRO shards from `first_stage` on."""
        return -(-num_bytes // ranks) if zero.stage >= first_stage else num_bytes

    # ZeRO 1 and 2 update a copy of a rank's shard; offloading has the copy in the CPU's memory
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
    forward = sum(transformer_flops(
        dit.config, sample.frames, sample.frame_tokens, sample.text_tokens))
    # frozen weights need no gradients; checkpointing repeats the forward pass
    passes = 2 + _learns_whole(dit) + dit.gradient_checkpointing
    flops = run.accumulate * run.batch_size * (forward * passes) / sequence
    ring = (ranks - 1) / ranks
    if zero.stage < 2:
        sent = 2 * ring * fp32
    elif zero.stage == 2:
        sent = ring * fp32 * (run.accumulate + 1)
    else:  # weights are gathered in the forward and in the backward pass
        sent = ring * run.accumulate * (2 * sum(sizes) + fp32)
    if sequence > 1:  # q, k, v and the attention's output, in each pass
        values = (2 + dit.gradient_checkpointing) * 4 * tokens * dit.config.hidden_dim
        size = values * (2 if run.dtype == "bf16" else 4) * dit.config.num_layers
        sent += run.accumulate * (size * ((sequence - 1) / sequence))
    engine = "plain torch" if ranks == 1 else "torch, DDP"
    if zero.stage:
        engine = f"DeepSpeed, ZeRO {zero.stage}"
        engine += ", offload" if zero.offload_optimizer or zero.offload_weights else ""
    return TrainingPlan(
        ranks=ranks, engine=engine + (f", {sequence} ranks per sample" if sequence > 1 else ""),
        trained=trained, frozen=sum(p.numel() for p in parameters) - trained, device=device,
        host=host, loading=share(sum(sizes), 3) + max(sizes), flops=flops, sent=sent,
        step_s=max(flops / (FLOPS * MFU), sent / LINK), peak=sum(device.values()),
        machine=f"{MACHINE} at {MFU:.0%} of {FLOPS / 1e12:.0f} TFLOP/s")


def _activation_bytes(dit: SpacetimeDiT) -> float:
    """Return the bytes per token that autograd keeps of all blocks."""
    config = dit.config
    by_width, by_hidden = FULL_BYTES if _learns_whole(dit) else LORA_BYTES
    block = by_width * config.hidden_dim + by_hidden * config.ffn_dim
    if dit.gradient_checkpointing:
        return block + STREAM_BYTES * config.hidden_dim * config.num_layers
    return block * config.num_layers


def _at_work(dit: SpacetimeDiT, zero: ZeroSettings, *, bf16: bool) -> int:
    """Return bytes of weights that ZeRO-3 gathers for two blocks, buckets, and bf16 copies."""
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
