"""How fast this machine is: a few seconds of measuring, kept per machine, dtype and thread count.

Rates are those of our own functions at a small and a large size; between them they are
interpolated. On a CPU the clock is the time that the computing thread was given, so that other
programs don't count; where several compute, it is the wall's.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from vidgen.core.errors import OutputError
from vidgen.core.runtime import (
    atomic_write,
    available_memory,
    cache_folder,
    fingerprint,
    reuse_freed_memory,
)
from vidgen.media.types import ClipInfo
from vidgen.media.write import CONTAINERS, write_clip
from vidgen.models.dit import SpacetimeDiT
from vidgen.models.dit_blocks import Block
from vidgen.models.dit_types import Context, Layout, Stream, TimeVectors
from vidgen.models.presets import DIT_PRESETS, VAE_PRESETS
from vidgen.models.vae import CausalVAE
from vidgen.models.vae_blocks import ResidualBlock
from vidgen.ops import native
from vidgen.ops.attention import attention
from vidgen.ops.conv import CausalConv3d, StreamCache, channels_last
from vidgen.ops.linear import pack
from vidgen.pipeline.budget.workload import Op, attention_op, block_ops, transformer_ops, vae_ops

FORMAT = 11
_KEPT = 24  # machines, versions and settings whose rates stay
_BUDGET_S = 0.12
_LONG_S = 1.0
_IMITATED = 2e9
"""Of a convolution's operations a second, where the processor lacks instructions for the dtype; a
laptop's core has ten times as many in its own ones."""
_TEXT = 16
# what is measured: widths; heads and tokens; channels, side and frames; channels and side; width,
# heads, feed-forward and tokens
_GEMMS = (128, 256, 512, 1536, 3072)
_ATTENTIONS = ((4, 256), (4, 576), (4, 1900))  # the last one's scores stay below glibc's 32 MB
_CONVS = ((32, 64, 4), (96, 64, 4), (192, 48, 4), (384, 32, 2))
_RESIDUALS = ((32, 32), (96, 64), (96, 112))
_FRESH = 1 << 30  # bytes, more than other programs have just left behind
_SIDE = 16  # of the latents that whole networks are run on
_BLOCKS = ((256, 4, 896, 576), (256, 4, 896, 2304), (1536, 12, 8960, 432))

Points = Sequence[tuple[float, float]]
Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Calibration:
    """A machine's rates.

    Attributes:
        rates: by kind of `Op`, (size, amount a second) in rising size; "write.mp4" and the like:
            (pixels of a frame, pixels a second) of one core.
        measured: False for a machine that nobody measured: then times only weigh stages against
            each other.
    """

    rates: Mapping[str, Points]
    measured: bool = True

    def rate(self, kind: str, size: float) -> float:
        """Amount a second, interpolated in logarithms and constant beyond the measured sizes."""
        points = self.rates[kind]
        for (low, slow), (high, fast) in pairwise(points):
            if size <= high:
                share = min(max(math.log(size / low) / math.log(high / low), 0.0), 1.0)
                between: float = slow * (fast / slow) ** share
                return between
        return points[-1][1]

    def seconds(self, ops: Sequence[Op]) -> float:
        """Time of work that is done one after the other."""
        return sum(op.amount / self.rate(op.kind, op.size) for op in ops if op.amount)


NOMINAL = Calibration(
    {
        "gemm": ((1, 60e9),), "attention": ((1, 40e9),), "conv": ((1, 60e9),),
        "tokens": ((1, 4e8),), "pixels": ((1, 3e8),), "block": ((1, 2e3),), "layer": ((1, 2e4),),
        "weights": ((1, 1e9),), "load": ((1, 1e9),), "fresh": ((1, 2e9),),
        **{f"write{suffix}": ((1, 1e7),) for suffix in CONTAINERS},
    },
    measured=False,
)
"""An ordinary core, for weighing stages where nothing was measured."""


def machine_key(device: torch.device, dtype: torch.dtype) -> str:
    """What rates depend on, as text."""
    facts = fingerprint()
    names = ("cpu", "cpu_capability", "torch", "libavcodec", "threads", "gpu")
    kernels = dtype in native.known_dtypes() if device.type == "cpu" else False
    return json.dumps([
        FORMAT, _code(), kernels, *(facts[name] for name in names), os.cpu_count(), device.type,
        str(dtype),
    ])


@lru_cache(maxsize=1)
def _code() -> str:
    """A hash of the code that is measured: another version has other rates."""
    root, seen = Path(__file__).parents[2], hashlib.sha256()
    for path in sorted(p for room in ("ops", "models") for p in (root / room).rglob("*.*")):
        if path.suffix in (".py", ".cpp", ".h"):
            seen.update(path.read_bytes())
    return seen.hexdigest()[:16]


def cached_calibration(device: torch.device, dtype: torch.dtype) -> Calibration | None:
    """This machine's rates if they were measured before; a damaged cache counts as none."""
    rates = _entries().get(machine_key(device, dtype))
    return Calibration(rates) if _is_rates(rates) else None


def calibrate(device: torch.device, dtype: torch.dtype) -> Calibration:
    """Measure this machine, some seconds, and keep the result for next time.

    A cache that can't be written isn't written.
    """
    rates = {kind: sorted(points) for kind, points in _measure(device, dtype).items()}
    place = _place()
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        entries = _entries() | {machine_key(device, dtype): rates}
        latest = dict([*entries.items()][-_KEPT:])
        atomic_write(place, json.dumps(latest, indent=1).encode())
    except (OSError, OutputError):
        pass
    return Calibration(rates)


def _place() -> Path:
    return cache_folder() / "calibration.json"


def _entries() -> dict[str, Any]:
    try:
        entries = json.loads(_place().read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return entries if isinstance(entries, dict) else {}


def _is_rates(rates: Any) -> TypeGuard[Mapping[str, Points]]:
    if not isinstance(rates, dict) or not rates.keys() >= NOMINAL.rates.keys():
        return False
    pairs = [pair for points in rates.values() if isinstance(points, list) for pair in points]
    return all(rates.values()) and all(
        isinstance(pair, list) and len(pair) == 2
        and all(isinstance(value, int | float) and 0 < value < math.inf for value in pair)
        for pair in pairs
    )


@torch.no_grad()
def _measure(device: torch.device, dtype: torch.dtype) -> dict[str, list[tuple[float, float]]]:
    def randn(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, device=device, dtype=kind)

    def rate(amount: float, run: Callable[[], Any]) -> float:
        return amount / _seconds(run, device)

    def linear(width: int) -> nn.Module:
        return _packed(nn.Sequential(nn.Linear(width, width)), device, dtype)

    if device.type == "cpu":
        reuse_freed_memory()  # as `Parts` does
    rates: dict[str, list[tuple[float, float]]] = {}
    rates["gemm"] = [
        (width, rate(2 * 512 * width**2, partial(linear(width), randn(512, width))))
        for width in _GEMMS
    ]
    rates["attention"] = [
        (heads * length**2, rate(attention_op(heads, 64, length, length).amount,
                                 partial(attention, *randn(3, 1, heads, length, 64))))
        for heads, length in _ATTENTIONS
    ]  # fmt: skip
    rates["conv"] = [_conv_rate(*_CONVS[0], device, dtype)]
    few = 1 if rates["conv"][0][1] < _IMITATED else None  # sizes; larger ones would take minutes
    rates["conv"] += [_conv_rate(*size, device, dtype) for size in _CONVS[1:few]]
    overhead = _seconds(_block(24, 2, 32, 16, randn), device)
    rates["block"] = [(1, 1 / overhead)]
    tiny = _packed(CausalConv3d(8, 8, (3, 3, 3)), device, dtype)
    rates["layer"] = [(1, rate(1, partial(tiny, channels_last(randn(1, 8, 1, 4, 4)))))]
    wide = _packed(CausalConv3d(96, 96, (3, 3, 3)), device, dtype)
    taken = _seconds(partial(wide, channels_last(randn(1, 96, 4, 4, 4))), device)
    rates["weights"] = [(1, 27 * 96**2 / taken)]
    so_far = Calibration(rates)
    rates["tokens"] = []
    for width, heads, ffn, length in _BLOCKS[:few]:
        products = block_ops(width, width // heads, ffn, length, length, _TEXT)
        known = overhead + so_far.seconds([op for op in products if op.kind != "tokens"][:2])
        taken = _seconds(_block(width, heads, ffn, length, randn), device)
        elements = length * (8 * width + ffn)
        rates["tokens"].append((length * width, elements / max(taken - known, 0.1 * taken)))
    rates["pixels"] = [_pixels_rate(*size, so_far, device, dtype) for size in _RESIDUALS[:few]]
    if few is None:
        _fit_networks(rates, device, dtype)
    rates["load"] = [(1, _load_rate())]
    rates["fresh"] = [(1, _fresh_rate())]
    for suffix in CONTAINERS:
        rates[f"write{suffix}"] = [_write_rate(suffix, side) for side in (128, 320)]
    return rates


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    """The median of several runs, after one that warms up; that one's where it took very long.

    Of several threads the lower quartile: one that has to wait for a core holds up the others. How
    long these sleep until it is done is in no thread's time, so theirs is the wall's.
    """
    gpu = device.type == "cuda"
    several = not gpu and torch.get_num_threads() > 1
    clock = time.perf_counter if gpu or several else time.thread_time
    times: list[float] = []
    start = clock()
    run()
    if not gpu and (taken := clock() - start) > _LONG_S:  # in a dtype that the CPU only imitates
        return taken
    while len(times) < 3 or (sum(times) < _BUDGET_S and len(times) < 200):
        if gpu:
            torch.cuda.synchronize(device)
        start = clock()
        run()
        if gpu:
            torch.cuda.synchronize(device)
        times.append(clock() - start)
    middle = sorted(times)[len(times) // 4] if several else statistics.median(times)
    return max(middle, 1e-7)


def _packed(module: Module, device: torch.device, dtype: torch.dtype) -> Module:
    """A network, or a part of one, as `Parts` has it in memory."""
    module = module.to(device, dtype).eval()
    pack(module)
    return module


def _block(
    width: int, heads: int, ffn: int, length: int, randn: Callable[..., Tensor]
) -> Callable[[], Any]:
    """A forward pass of a transformer's block on random tokens."""
    x = randn(1, length, width)
    block = Block(width, heads, ffn, 1e-6, axis="all", image=False, audio_ffn_dim=None)
    block = _packed(block, x.device, x.dtype)
    times = TimeVectors(
        randn(1, 1, width, kind=torch.float32), randn(1, 1, 6, width, kind=torch.float32), None
    )
    rope = torch.polar(*randn(2, 1, length, width // heads // 2, kind=torch.float32).abs())
    context = Context(randn(1, _TEXT, width), None, None)
    layout = Layout(1, length, None)
    return lambda: block([Stream(x, times)], rope, layout, context, None, 0)


def _conv_rate(
    channels: int, side: int, frames: int, device: torch.device, dtype: torch.dtype
) -> tuple[float, float]:
    """(channels, operations a second) of a convolution."""
    conv = _packed(CausalConv3d(channels, channels, (3, 3, 3)), device, dtype)
    x = channels_last(torch.randn(1, channels, frames, side, side, device=device, dtype=dtype))
    cache = StreamCache()
    taken = _seconds(lambda: conv(x, cache), device)
    return channels, 2 * 27 * channels**2 * frames * side**2 / taken


def _pixels_rate(
    channels: int, side: int, so_far: Calibration, device: torch.device, dtype: torch.dtype
) -> tuple[float, float]:
    """(elements at once, elements a second) of all but the products in a residual block."""
    block = _packed(ResidualBlock(channels, channels), device, dtype)
    for name, module in block.named_children():
        if isinstance(module, CausalConv3d):
            module.cache_key = name
    x = torch.randn(1, channels, 4, side, side, device=device, dtype=dtype)
    x, cache = channels_last(x), StreamCache()
    taken = _seconds(lambda: block(x, cache), device)
    products = so_far.seconds([Op("conv", channels, 4 * 27 * channels * x.numel())])
    return x.numel(), 2 * x.numel() / max(taken - products, 0.1 * taken)


def _fit_networks(
    rates: dict[str, list[tuple[float, float]]], device: torch.device, dtype: torch.dtype
) -> None:
    """Bring rates to what whole networks take, which isn't the sum of their parts.

    A part that is run again and again finds all it needs in the processor's caches; and what is
    left when parts are taken from each other is uncertain.
    """
    dit = _packed(SpacetimeDiT(DIT_PRESETS["toybox"]), device, dtype)
    vae = _packed(CausalVAE(VAE_PRESETS["toybox"]), device, dtype)
    C, side, so_far = vae.config.latent_channels, _SIDE, Calibration(rates)
    latents = torch.randn(1, C, 9, side, side, device=device, dtype=dtype)
    time_step = torch.tensor([500.0], device=device)
    context = torch.randn(1, _TEXT, dit.config.text_dim, device=device, dtype=dtype)
    passes = transformer_ops(dit.config, 9, side**2 // 4, _TEXT)
    decoding = vae_ops(vae.config, 3, side, side, decode=True)
    for kinds, ops, run in (
        (("gemm", "attention", "tokens", "block"), passes,
         lambda: dit(latents, time_step, context)),
        (("conv", "pixels", "layer", "weights"), decoding,
         lambda: [*vae.stream_decode(latents[:, :, :3])]),
    ):  # fmt: skip
        slower = min(max(_seconds(run, device) / so_far.seconds(ops), 0.5), 2.0)
        for kind in kinds:
            rates[kind] = [(size, rate / slower) for size, rate in rates[kind]]


def _load_rate() -> float:
    """Bytes a second from a file that lies in the system's memory, cast on the way."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    def run() -> Tensor:
        with safe_open(path, framework="pt") as file:
            read: Tensor = file.get_tensor("x")
            return read.to(torch.bfloat16)

    with tempfile.TemporaryDirectory() as folder:
        path, value = Path(folder) / "x.safetensors", torch.ones(24_000_000)
        save_file({"x": value}, path)
        return value.nbytes / _seconds(run, torch.device("cpu"))


def _fresh_rate() -> float:
    """Bytes a second of memory that the system hands out.

    Of little it hands out what another process has just left; the host of a virtual machine takes
    back what lies idle, and to have that again takes up to thirty times as long. The host's work is
    in no thread's time, so the clock is the wall's.
    """
    free = available_memory(torch.device("cpu"))
    size = _FRESH if free is None else min(_FRESH, max(free // 8, 1 << 20))
    start, waited = time.perf_counter(), _waited_s()
    torch.empty(size, dtype=torch.uint8).fill_(1)
    return size / (time.perf_counter() - start - (_waited_s() - waited))


def _waited_s() -> float:
    """How long this thread has waited for a core that other programs had, where Linux tells."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0


def _write_rate(suffix: str, side: int) -> tuple[float, float]:
    """(pixels of a frame, pixels a second of one core) of a container's encoder."""
    count = 24
    info = ClipInfo(Fraction(12), (side, side), count)
    frames = np.stack(list(_moving_picture(side, count)))
    with tempfile.TemporaryDirectory() as folder:
        times = []
        for number in range(2):
            start = time.process_time()
            write_clip(f"{folder}/{number}{suffix}", iter([frames]), info)
            times.append(time.process_time() - start)
    return side**2, count * side**2 / max(min(times), 1e-4)


def _moving_picture(side: int, count: int) -> Iterator[Any]:
    """Frames uint8 [side, side, 3] of smooth shapes that drift, with a little grain."""
    grain = np.random.default_rng(0).normal(0, 2, (side, side, 3))
    y, x = np.mgrid[:side, :side] / side * 2 * np.pi
    for t in range(count):
        waves = [np.sin(k * x + 0.1 * t) * np.cos((4 - k) * y - 0.07 * t) for k in (1, 2, 3)]
        yield np.clip(128 + 80 * np.stack(waves, -1) + grain, 0, 255).astype(np.uint8)
