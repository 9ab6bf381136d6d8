"""Estimate computing time: FLOPs of the architectures, divided by rates measured on the machine.

A machine is measured once for each dtype and number of threads, in a few seconds. With one CPU
thread the clock is that thread's own time, so that other programs don't count; otherwise it is wall
time.

Axes: L tokens, S text tokens, D width, F latent frames.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from vidgen.core.runtime import fingerprint, reuse_freed_memory
from vidgen.core.shapes import Tiles
from vidgen.core.store import read_cache, write_cache
from vidgen.models.dit import SpacetimeDiT
from vidgen.models.dit_types import AudioConfig, DiTConfig
from vidgen.models.presets import DIT_PRESETS, VAE_PRESETS
from vidgen.models.vae import CausalVAE, VAEConfig, by_decoder
from vidgen.models.vae_tiles import tile_areas
from vidgen.ops import native
from vidgen.ops.attention import attention
from vidgen.ops.linear import pack
from vidgen.weights.component import Component

FORMAT = 12
CALIBRATION = "calibration"
LOAD_BYTES_PER_S = 3e9
"""Speed of loading weights from files in the page cache."""
IN_A_RUN = 1.15
"""Ratio of a network's time in a generation to its time alone, with warm processor caches."""
WRITE_PIXELS_PER_S = 2e7
"""Speed of a video encoder on one core."""
_BUDGET_S, _LONG_S = 0.12, 1.0
_TEXT = 16
# cases to measure: heads and tokens of attention; (network, latent frames, side in latents)
_ATTENTION = (4, 1900)
_TRANSFORMERS = ((DIT_PRESETS["toybox"], 9, 16),
                 (replace(DIT_PRESETS["wan-1.3b"], num_layers=1), 3, 24))
_VAES = ((VAE_PRESETS["toybox"], 3, 16), (VAEConfig(16, 1, 192, (1,), 1, ()), 3, 48))


class Op(NamedTuple):
    """FLOPs of one kind; their rate includes the norms and activations between them."""

    kind: Literal["linear", "attention", "conv"]  # selects the rate
    width: float  # of tokens, or channels; the rate depends on it
    flops: float


def transformer_ops(
    config: DiTConfig, frames: int, frame_tokens: int, text_tokens: int, *, image_tokens: int = 0,
    controlled: bool = False, sound_tokens: int = 0,
) -> list[Op]:
    """Count one forward pass over `frames` latent frames, stills included, and sound tokens."""
    width, tokens = config.hidden_dim, frames * frame_tokens
    keys = float(tokens + sound_tokens)
    context = text_tokens + 1 + image_tokens
    controls = len(config.control_layers) if controlled else 0
    ops = _block_ops(width, config.ffn_dim, tokens, keys, context, config.num_layers + controls)
    if sound_tokens and config.audio is not None:
        ops += listening_ops(config, config.audio, sound_tokens, keys, 0)
    ends = tokens * config.patch_size**2 * (config.in_channels + config.out_channels)
    ends += context * (config.text_dim + width) + config.freq_dim + 7 * width
    ends += tokens * width * (controls + 1) if controlled else 0
    return [*ops, Op("linear", width, 2 * width * ends)]


def listening_ops(
    config: DiTConfig, audio: AudioConfig, tokens: int, keys: float, context: int, takes: int = 1
) -> list[Op]:
    """Count a pass of the sound tokens of all takes, each of which attends to `keys` keys."""
    width = config.hidden_dim
    ops = _block_ops(width, audio.ffn_dim, tokens, keys, context, takes * config.num_layers)
    ends = 2.0 * takes * tokens * audio.channels
    if takes > 1:  # each take's copy of the keys costs about what their projection does
        ends += takes * keys * width * config.num_layers
    return [*ops, Op("linear", width, 2 * width * ends)]


def _block_ops(
    width: int, ffn_dim: int, tokens: int, keys: float, context: int, count: int
) -> list[Op]:
    linear = 2 * width * (tokens * (6 * width + 2 * ffn_dim) + 2 * context * width)
    return [Op("linear", width, count * linear),
            Op("attention", width, count * 4 * width * tokens * (keys + context))]


def network_ops(
    component: Component[Any], width: int, positions: int, without: str = "-"
) -> list[Op]:
    """Count a pass of another network, except weights whose names begin with `without`."""
    weights = sum(lazy.likeness.numel() for name, lazy in component.tensors.items()
                  if not name.startswith(without))
    return [Op("linear", width, 2 * weights * positions)]


class VAEPart(NamedTuple):
    """3x3x3 convolutions of the VAE at one resolution."""

    inputs: tuple[int, ...]  # input channels of each convolution, which caches two frames
    width: int  # output channels of each convolution
    frames: int  # per latent frame
    pixels: int  # per frame


def vae_parts(
    config: VAEConfig, rows: int, columns: int, *, decode: bool, tiles: Tiles | None = None,
    every_tile: bool = False, rate: int = 1,
) -> tuple[VAEPart, list[VAEPart]]:
    """Return the middle of the decoder or encoder, which is never tiled, and the rest in order.

    `rows` and `columns` count latents. Pixels are of the largest of the `tiles`, or with
    `every_tile` the sum of all tiles.
    """
    scales = [4 ** min(i, config.num_stages - 1) for i in range(config.num_stages + 1)]
    areas = [rows * columns * scale for scale in (scales if decode else scales[::-1])]
    if tiles is not None:
        areas = tile_areas(config, rows, columns, tiles, decode=decode)[every_tile]
    dim, colours = config.decoder_dim if decode else config.encoder_dim, 3 * config.patch_size**2
    widths = [dim * mult for mult in config.channel_mults]
    first = config.latent_channels if decode else widths[-1]
    middle = VAEPart((first, *[widths[-1]] * 4), widths[-1], 1, rows * columns)
    temporal, steady = (*config.temporal_downsample, False), config.steady_stages(rate)
    frames, came, parts = config.strides.t // rate, dim, list[VAEPart]()
    if decode:
        widths, temporal, steady = widths[::-1], (*temporal[-2::-1], False), by_decoder(steady)
        frames, came = 1, widths[0]
    else:
        parts.append(VAEPart((colours,), dim, frames, areas[0]))
    for width, halved, kept in zip(widths, temporal, steady, strict=True):
        others = [width] * (2 * (config.num_blocks + decode) - 1)
        parts.append(VAEPart((came, *others), width, frames, areas[len(parts)]))
        came = width // 2 if decode and not config.stage_shortcuts else width
        if halved and not kept:
            frames = frames * 2 if decode else frames // 2
    if decode:
        parts.append(VAEPart((widths[-1],), colours, frames, areas[len(parts)]))
    return middle, parts


def vae_ops(
    config: VAEConfig, frames: int, rows: int, columns: int, *, decode: bool,
    tiles: Tiles | None = None, rate: int = 1,
) -> list[Op]:
    """Count the decoding or encoding of a clip of `frames` latent frames of rows x columns.

    The first latent frame is one frame, which uses only the last of the three taps in time.
    """
    middle, parts = vae_parts(config, rows, columns, decode=decode, tiles=tiles, every_tile=True,
                              rate=rate)
    return [Op("conv", part.width, 2 * 27 * sum(part.inputs) * part.width * part.pixels
               * (1 / 3 + (frames - 1) * part.frames)) for part in (middle, *parts)]


@dataclass(frozen=True)
class Rates:
    """A machine's rates in one dtype."""

    # by kind of `Op`, (width, FLOPs per second) in rising width
    points: Mapping[str, Sequence[tuple[float, float]]]
    measured: bool = True  # False: times are only relative weights of stages

    def rate(self, kind: str, width: float) -> float:
        """Return FLOPs per second, interpolated in logarithms between measured widths."""
        points = self.points[kind]
        for (low, slow), (high, fast) in pairwise(points):
            if width <= high:
                share = min(max(math.log(width / low) / math.log(high / low), 0.0), 1.0)
                return float(slow * (fast / slow) ** share)
        return points[-1][1]

    def seconds(self, ops: Sequence[Op]) -> float:
        """Return the time in seconds of operations that run one after the other."""
        return IN_A_RUN * sum(op.flops / self.rate(op.kind, op.width) for op in ops)


NOMINAL = Rates({"linear": [(1, 60e9)], "attention": [(1, 60e9)], "conv": [(1, 60e9)]},
                measured=False)
"""Rates of a typical core, to weigh stages while nothing was measured."""


def known_rates(device: torch.device, dtype: torch.dtype) -> Rates | None:
    """Return this machine's saved rates; None if they are missing or damaged."""
    try:
        entry = read_cache(CALIBRATION)[_machine(device, dtype)]
        points = {kind: [(float(width), float(rate)) for width, rate in entry[kind]]
                  for kind in NOMINAL.points}
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    values = [value for each in points.values() for pair in each for value in pair]
    valid = all(points.values()) and all(0 < each < math.inf for each in values)
    return Rates(points) if valid else None


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Measure this machine for a few seconds; save and return its rates."""
    points = {kind: sorted(each) for kind, each in _measure(device, dtype).items()}
    write_cache(CALIBRATION, read_cache(CALIBRATION) | {_machine(device, dtype): points})
    return Rates(points)


def _machine(device: torch.device, dtype: torch.dtype) -> str:
    facts = fingerprint()
    names = ("vidgen", "cpu", "cpu_capability", "torch", "libavcodec", "threads", "gpu")
    kernels = device.type == "cpu" and dtype in native.known_dtypes()
    return json.dumps([FORMAT, kernels, *(facts[name] for name in names), os.cpu_count(),
                       device.type, str(dtype)])


@torch.no_grad()
def _measure(device: torch.device, dtype: torch.dtype) -> dict[str, list[tuple[float, float]]]:
    if device.type == "cpu":
        reuse_freed_memory()  # as `ModelLoader` does

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    def ready(module: nn.Module) -> Any:
        module.to(device, dtype).eval()
        pack(module)
        return module

    heads, length = _ATTENTION
    q, k, v = randn(3, 1, heads, length, 64)
    taken = _seconds(lambda: attention(q, k, v), device)
    points = {"attention": [(1.0, 4 * heads * 64 * length**2 / taken)]}

    def transformer(config: DiTConfig, frames: int, side: int) -> tuple[list[Op], float]:
        network = ready(SpacetimeDiT(config))
        given = (randn(1, config.in_channels, frames, side, side),
                 torch.tensor([500.0], device=device), randn(1, _TEXT, config.text_dim))
        taken = _seconds(lambda: network(*given), device)
        ops = transformer_ops(config, frames, side**2 // config.patch_size**2, _TEXT)
        scores = sum(op.flops for op in ops if op.kind == "attention") / points["attention"][0][1]
        return [op for op in ops if op.kind == "linear"], max(taken - scores, 0.3 * taken)

    def vae(config: VAEConfig, frames: int, side: int) -> tuple[list[Op], float]:
        network = ready(CausalVAE(config))
        latents = randn(1, config.latent_channels, frames, side, side)
        taken = _seconds(lambda: [*network.stream_decode(latents)], device)
        return vae_ops(config, frames, side, side, decode=True), taken

    points["linear"] = _points(transformer, _TRANSFORMERS)
    points["conv"] = _points(vae, _VAES)
    return points


def _points(
    run: Callable[..., tuple[list[Op], float]], cases: Sequence[tuple[Any, int, int]]
) -> list[tuple[float, float]]:
    """Return (mean width, FLOPs per second) of cases, the smallest first.

    Stop after a slow case, as in a dtype that the processor only emulates.
    """
    points: list[tuple[float, float]] = []
    for case in cases:
        ops, taken = run(*case)
        flops = sum(op.flops for op in ops)
        points.append((sum(op.width * op.flops for op in ops) / flops, flops / taken))
        if taken > _LONG_S:
            break
    return points


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Return the median time of several runs after a warm-up, or the warm-up's time if it was long.

    With several threads, return the lower quartile of wall time: a thread that waits for a core
    delays the others, and thread time doesn't include their sleep.
    """
    gpu = device.type == "cuda"
    several = not gpu and torch.get_num_threads() > 1
    clock = time.perf_counter if gpu or several else time.thread_time
    times: list[float] = []
    while len(times) < 4 or (sum(times[1:]) < _BUDGET_S and len(times) < 200):
        start = clock()
        run()
        if gpu:
            torch.cuda.synchronize(device)
        times.append(clock() - start)
        if not gpu and times[0] > _LONG_S:
            return times[0]
    return max(sorted(times[1:])[len(times) // (4 if several else 2) - 1], 1e-7)
