"""`vidgen train --plan`: memory and time of a run on each rank, from modules on the meta device.

Weights, gradients, moments and averages are counted parameter by parameter, as the engine holds
them. Activations are what autograd keeps of a block, counted once on real blocks (a test does so
again): bytes a token, in widths of the transformer and of its feed-forward.

Axes: L tokens of a sample, D width, F hidden width of the feed-forward.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from vidgen.core.errors import InputError
from vidgen.core.values import parse_size
from vidgen.diffusion.temporal_upsampling import LatentRate
from vidgen.models.dit import SpacetimeDiT
from vidgen.pipeline.experts import upsampling_of
from vidgen.pipeline.loader import DTYPES, EXPERTS
from vidgen.pipeline.timing import transformer_ops
from vidgen.training.config import RunConfig
from vidgen.training.engines.distributed import check_sharing, current_place
from vidgen.training.engines.zero import ZeroSettings, read_settings
from vidgen.training.finetune.config import FinetuneConfig
from vidgen.training.finetune.model import choose_roles, open_trainable, prepare_module
from vidgen.weights.folder import ModelFolder
from vidgen.weights.published import is_here, published

FULL_BYTES = (56.2, 4.0)
"""Kept of a block whose weights are trained, a token: times D and times F."""
LORA_BYTES = (42.6, 2.0)
"""Kept of a block whose weights are frozen, adapters on its attention beside them; likewise."""
STREAM_BYTES = 4
"""Kept between blocks that are recomputed, a token, times D."""
CONTEXT_BYTES = 1_000_000_000
"""What a GPU's driver and communication take before anything else."""


@dataclass(frozen=True)
class Machine:
    """A device's speed.

    Args:
        name: for the text.
        flops: that its products reach in bf16, a second, at best.
        mfu: share of it that training is taken to reach.
        link: bytes a second that a rank can send.
    """

    name: str = "H100 80GB, NVLink"
    flops: float = 989e12
    mfu: float = 0.4
    link: float = 200e9


@dataclass(frozen=True)
class Sample:
    """The largest sample of a run: latent frames, tokens of each, rows of text."""

    frames: int
    frame_tokens: int
    text_tokens: int = 512


@dataclass(frozen=True)
class TrainingPlan:
    """Memory of each rank and time of each step.

    Attributes:
        ranks: how many processes.
        engine: what holds the state.
        trained: parameters that learn.
        frozen: parameters that don't.
        device: bytes on each rank's device, by what they are.
        host: bytes in the CPU's memory for each rank.
        loading: the most bytes on a device while the weights are read.
        flops: of a step, on each rank.
        sent: bytes that each rank sends in a step.
        step_s: seconds of a step, computing and sending at once.
        machine: what was assumed of the device.
    """

    ranks: int
    engine: str
    trained: int
    frozen: int
    device: dict[str, int]
    host: dict[str, int]
    loading: int
    flops: float
    sent: float
    step_s: float
    machine: str

    @property
    def peak(self) -> int:
        """Bytes on each rank's device when it is fullest."""
        return sum(self.device.values())

    def as_data(self) -> dict[str, Any]:
        """Plain data, for `--json`."""
        return {**asdict(self), "peak": self.peak}

    def lines(self) -> list[str]:
        """For the terminal."""
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
    """Memory and time of a run; its model needs to be here only if nobody published it.

    Args:
        config: the run.
        ranks: processes; None: those that a launcher started, else 1.

    Raises:
        InputError: a model that is neither here nor a published one of the Wan family, experts
            that can't be trained so, or ranks that can't share samples as the run asks.
    """
    ranks = ranks or current_place().size
    check_sharing(config.run, ranks)
    known = known_model(config.model)
    experts = [role for role in EXPERTS if role in known.components]
    roles = choose_roles(config, config.model, len(experts))
    modules: dict[str, nn.Module] = {}
    for role in roles:
        with torch.device("meta"):
            module = SpacetimeDiT(known.components[role].config)
            dtype = torch.float32 if config.method == "full" else DTYPES[config.run.dtype]
            modules[role] = prepare_module(config, module.to(dtype))
    sample = largest_sample(config, known, finer=EXPERTS[1] in roles)
    return plan_training(modules, config.run, sample, ranks=ranks)


def known_model(model: str) -> ModelFolder:
    """A folder that can be trained, or what the name of a published one tells of it.

    Raises:
        InputError: it is neither.
    """
    if is_here(model):
        return open_trainable(model)
    folder = published(model)
    if folder is None:
        raise InputError(
            f"model {model!r} is neither here nor a published one of the Wan family, so nothing "
            "can be planned; give a model's folder"
        )
    return folder


def largest_sample(config: FinetuneConfig, known: ModelFolder, *, finer: bool) -> Sample:
    """The sample of most tokens that the data's buckets can hold, at the finer rate if need be."""
    data, strides = config.data, known.components["vae"].config.strides
    dit = known.components["transformer"].config
    side = strides.hw * dit.patch_size
    sizes = [parse_size(size) for size in data.sizes] or list(known.defaults.sizes)
    area = data.area or max(width * height for width, height in sizes)
    num_frames = max(data.frames, default=known.defaults.num_frames)
    frames = 1 + (num_frames - 1) // strides.t
    if finer:
        frames = LatentRate(upsampling_of(known)).num_upsampled(frames)
    sample = Sample(frames, -(-area // side**2))
    return replace(sample, text_tokens=min(sample.text_tokens, dit.text_len))


def plan_training(
    modules: Mapping[str, nn.Module], run: RunConfig, sample: Sample, *, ranks: int,
    machine: Machine | None = None,
) -> TrainingPlan:
    """Memory and time of a run.

    Args:
        modules: as they are trained, on the meta device: dtypes, `requires_grad`, adapters and
            `gradient_checkpointing` set. Those that take no part in a step are counted as held.
        run: engine, accumulation, batch.
        sample: the largest one.
        ranks: processes.
        machine: the device's speed; None: an H100 at 40%.

    Raises:
        InputError: the engine's settings can't be read.
    """
    machine = machine or Machine()
    zero = read_settings(run) if run.engine.deepspeed else None
    parameters = [p for module in modules.values() for p in module.parameters()]
    state = _State.of(parameters, zero, ranks)
    dit = next(m for m in modules.values() if isinstance(m, SpacetimeDiT))
    tokens = run.batch_size * sample.frames * sample.frame_tokens / run.engine.sequence
    device, host = state.held()
    device["activations"] = int(tokens * _activation_bytes(dit))
    device["weights at work"] = _at_work(dit, zero, bf16=run.dtype == "bf16")
    device["driver, communication"] = CONTEXT_BYTES
    flops = run.accumulate * run.batch_size * _flops(dit, sample) / run.engine.sequence
    sent = state.sent(run.accumulate) + run.accumulate * _exchanged(dit, tokens, run)
    return TrainingPlan(
        ranks=ranks, engine=_engine_name(run, zero, ranks), trained=state.trained,
        frozen=sum(p.numel() for p in parameters) - state.trained, device=device, host=host,
        loading=state.loading, flops=flops, sent=sent,
        step_s=max(flops / (machine.flops * machine.mfu), sent / machine.link),
        machine=f"{machine.name} at {machine.mfu:.0%} of {machine.flops / 1e12:.0f} TFLOP/s",
    )


@dataclass(frozen=True)
class _State:
    """Bytes of what lasts over steps: trained parameters, all weights, the largest of them."""

    trained: int
    learning: int
    resting: int
    largest: int
    zero: ZeroSettings | None
    ranks: int

    @classmethod
    def of(cls, parameters: list[nn.Parameter], zero: ZeroSettings | None, ranks: int) -> _State:
        learning = [p for p in parameters if p.requires_grad]
        sizes = [p.numel() * p.element_size() for p in parameters]
        mine = sum(p.numel() * p.element_size() for p in learning)
        trained = sum(p.numel() for p in learning)
        return cls(trained, mine, sum(sizes) - mine, max(sizes), zero, ranks)

    def share(self, num_bytes: int, stage: int) -> int:
        """A rank's part of what ZeRO shares out from a stage on."""
        shared = self.zero is not None and self.zero.stage >= stage
        return -(-num_bytes // self.ranks) if shared else num_bytes

    def held(self) -> tuple[dict[str, int], dict[str, int]]:
        """On the device and in the CPU's memory."""
        fp32 = 4 * self.trained
        zero = self.zero
        weights = self.share(self.learning + self.resting, 3)
        moments = self.share(2 * fp32, 1)
        # ZeRO 1 and 2 step on a copy of a rank's share; so does offloading, in the CPU's memory
        masters = 0 if zero is None or (zero.stage == 3 and not zero.offload_optimizer) else (
            self.share(fp32, 1))
        device = {"weights": weights, "gradients": self.share(fp32, 2), "moments": moments,
                  "fp32 copies": masters, "averages": self.share(fp32, 3)}
        host: dict[str, int] = {}
        if zero is not None and zero.offload_optimizer:
            host |= {name: device.pop(name) for name in ("moments", "fp32 copies")}
            host["gradients"] = self.share(fp32, 1)
        if zero is not None and zero.offload_weights:
            host |= {name: device.pop(name) for name in ("weights", "averages")}
        return device, host

    @property
    def loading(self) -> int:
        """The most that is on the device while weights are read."""
        return self.share(self.learning + self.resting, 3) + self.largest

    def sent(self, accumulate: int) -> float:
        """Bytes a rank sends in a step: reductions of gradients, gatherings of weights."""
        if self.ranks == 1:
            return 0.0
        ring = (self.ranks - 1) / self.ranks
        if self.zero is None or self.zero.stage == 1:
            return 2 * ring * 4 * self.trained
        if self.zero.stage == 2:
            return ring * 4 * self.trained * (accumulate + 1)
        gathered = 2 * (self.learning + self.resting)  # forwards, and backwards
        return ring * accumulate * (gathered + 4 * self.trained)


def _activation_bytes(dit: SpacetimeDiT) -> float:
    """What autograd keeps of the blocks, a token."""
    config = dit.config
    full = any(p.requires_grad for p in dit.get_submodule("blocks.0.ffn").parameters())
    by_width, by_hidden = FULL_BYTES if full else LORA_BYTES
    block = by_width * config.hidden_dim + by_hidden * config.ffn_dim
    if dit.gradient_checkpointing:
        return block + STREAM_BYTES * config.hidden_dim * config.num_layers
    return block * config.num_layers


def _at_work(dit: SpacetimeDiT, zero: ZeroSettings | None, *, bf16: bool) -> int:
    """Whole weights that ZeRO-3 gathers for a block and the next, and autocast's bf16 copies."""
    block = list(dit.blocks[0].parameters())
    copies = sum(2 * p.numel() for p in block if p.requires_grad and p.ndim > 1) if bf16 else 0
    live = 1 if dit.gradient_checkpointing else dit.config.num_layers
    gathered = 0
    if zero is not None and zero.stage == 3:
        gathered = 2 * sum(p.numel() * p.element_size() for p in block)
    buckets = 0 if zero is None else 4 * zero.config["zero_optimization"].get(
        "reduce_bucket_size", 500_000_000)
    trained = 4 * sum(p.numel() for p in dit.parameters() if p.requires_grad)
    return gathered + live * copies + min(buckets, trained)


def _flops(dit: SpacetimeDiT, sample: Sample) -> float:
    """Of a sample's forward and backward pass, and of what is computed again."""
    forward = sum(op.flops for op in transformer_ops(
        dit.config, sample.frames, sample.frame_tokens, sample.text_tokens))
    full = any(p.requires_grad for p in dit.get_submodule("blocks.0.ffn").parameters())
    return forward * (1 + (2 if full else 1) + dit.gradient_checkpointing)


def _exchanged(dit: SpacetimeDiT, tokens: float, run: RunConfig) -> float:
    """Bytes that a rank sends to those it shares samples with: q, k, v and the mixed, each pass."""
    if run.engine.sequence == 1:
        return 0.0
    passes = 2 + dit.gradient_checkpointing
    size = 2 if run.dtype == "bf16" else 4
    others = (run.engine.sequence - 1) / run.engine.sequence
    return passes * 4 * tokens * dit.config.hidden_dim * size * dit.config.num_layers * others


def _engine_name(run: RunConfig, zero: ZeroSettings | None, ranks: int) -> str:
    name = "plain torch" if ranks == 1 else "torch, DDP"
    if zero is not None:
        name = f"DeepSpeed, ZeRO {zero.stage}"
        name += ", offload" if zero.offload_optimizer or zero.offload_weights else ""
    sequence = run.engine.sequence
    return name + (f", {sequence} ranks a sample" if sequence > 1 else "")
