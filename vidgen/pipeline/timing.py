"""Estimate computing time: FLOPs of the architectures, divided by rates measured on the machine.

Each model's networks are measured once for each dtype and number of threads, at small sizes, in a
few seconds. With one CPU thread the clock is that thread's own time, so that other programs don't
count; otherwise it is wall time.

Axes: L tokens, S text tokens, D width, F latent frames.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from vidgen.core.runtime import fingerprint
from vidgen.core.shapes import Tiles
from vidgen.core.store import read_cache, write_cache
from vidgen.models.dit import SpacetimeDiT
from vidgen.models.dit_types import DiTConfig
from vidgen.models.vae import CausalVAE, VAEConfig, by_decoder
from vidgen.models.vae_tiles import tile_areas
from vidgen.ops import native
from vidgen.ops.attention import attention
from vidgen.ops.linear import pack
from vidgen.pipeline.loader import ModelLoader
from vidgen.weights.component import Component

if TYPE_CHECKING:
    from vidgen.weights.folder import ModelFolder

FORMAT = 13
CALIBRATION = "calibration"
LOAD_BYTES_PER_S = 3e9
"""Speed of loading weights from files in the page cache."""
IN_A_RUN = 1.15
"""Ratio of a network's time in a generation to its time alone, with warm processor caches."""
_BUDGET_S = 0.12
# what is measured: heads and tokens of attention; latent frames, side in latents and text tokens of
# the transformer, and its largest size; latent frames and side in latents of the VAE
_ATTENTION = (4, 1900)
_TRANSFORMER = (5, 24, 16)
_LAYERS, _WIDTH = 2, 1536
_VAE = (2, 10)


class Flops(NamedTuple):
    """FLOPs of each kind, with the norms and activations between them; or FLOPs per second."""

    linear: float = 0.0
    attention: float = 0.0
    conv: float = 0.0

    def seconds(self, rates: Flops) -> float:
        """Return the time at `rates` of operations that run one after the other."""
        return IN_A_RUN * sum(flops / rate for flops, rate in zip(self, rates, strict=True))


NOMINAL = Flops(60e9, 60e9, 60e9)
"""Rates of a typical core, to weigh stages while nothing was measured."""


def transformer_flops(
    config: DiTConfig, frames: int, frame_tokens: int, text_tokens: int, *, sound_tokens: int = 0,
    seen: int = 0,
) -> Flops:
    """Count one forward pass over `frames` latent frames, stills included, and sound tokens.

    All tokens also attend to `seen` tokens of an earlier pass. Image features aren't counted.
    """
    width, tokens = config.hidden_dim, frames * frame_tokens
    keys, context = tokens + sound_tokens + seen, text_tokens + 1
    layers, controls = config.num_layers + len(config.control_layers), len(config.control_layers)
    linear = layers * (tokens * (6 * width + 2 * config.ffn_dim) + 2 * context * width)
    if config.audio is not None:
        linear += layers * sound_tokens * (6 * width + 2 * config.audio.ffn_dim)
    ends = tokens * config.patch_size**2 * (config.in_channels + config.out_channels)
    ends += context * (config.text_dim + width) + config.freq_dim + 7 * width
    ends += tokens * width * (controls + (controls > 0))
    return Flops(linear=2 * width * (linear + ends),
                 attention=layers * 4 * width * (tokens + sound_tokens) * (keys + context))


def network_flops(component: Component[Any], positions: int, without: str = "-") -> Flops:
    """Count a pass of another network, except weights whose names begin with `without`."""
    weights = sum(lazy.likeness.numel() for name, lazy in component.tensors.items()
                  if not name.startswith(without))
    return Flops(linear=2 * weights * positions)


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


def vae_flops(
    config: VAEConfig, frames: int, rows: int, columns: int, *, decode: bool,
    tiles: Tiles | None = None, rate: int = 1,
) -> Flops:
    """Count the decoding or encoding of a clip of `frames` latent frames of rows x columns.

    The first latent frame is one frame, which uses only the last of the three taps in time.
    """
    middle, parts = vae_parts(config, rows, columns, decode=decode, tiles=tiles, every_tile=True,
                              rate=rate)
    return Flops(conv=sum(2 * 27 * sum(part.inputs) * part.width * part.pixels
                          * (1 / 3 + (frames - 1) * part.frames) for part in (middle, *parts)))


def known_rates(folder: ModelFolder, device: torch.device, dtype: torch.dtype) -> Flops | None:
    """Return the saved rates of a model on this machine; None if they are missing or damaged."""
    try:
        rates = Flops(*map(float, read_cache(CALIBRATION)[_key(folder, device, dtype)]))
    except (KeyError, TypeError, ValueError):
        return None
    return rates if all(0 < rate < math.inf for rate in rates) else None


def measure_rates(folder: ModelFolder, device: torch.device, dtype: torch.dtype) -> Flops:
    """Measure a model's networks for a few seconds; save and return this machine's rates."""
    rates = _measure(folder, device, dtype)
    write_cache(CALIBRATION, read_cache(CALIBRATION) | {_key(folder, device, dtype): rates})
    return rates


def _key(folder: ModelFolder, device: torch.device, dtype: torch.dtype) -> str:
    facts = fingerprint()
    names = ("vidgen", "cpu", "cpu_capability", "torch", "threads", "gpu")
    kernels = device.type == "cpu" and dtype in native.known_dtypes()
    networks = [repr(folder.components[role].config) for role in ("transformer", "vae")]
    return json.dumps([FORMAT, kernels, *(facts[name] for name in names), os.cpu_count(),
                       device.type, str(dtype), *networks])


@torch.no_grad()
def _measure(folder: ModelFolder, device: torch.device, dtype: torch.dtype) -> Flops:
    """Run attention, a few blocks of at most `_WIDTH`, and the VAE's decoder at random weights."""
    vae_dtype = ModelLoader(folder, device, dtype).dtype_of("vae")

    def ready(module: nn.Module, dtype: torch.dtype) -> Any:
        module.to(device, dtype).eval()
        pack(module)
        return module

    def randn(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    full: DiTConfig = folder.components["transformer"].config
    heads, length = _ATTENTION
    q, k, v = randn(3, 1, heads, length, full.head_dim)
    taken = _seconds(lambda: attention(q, k, v), device)
    scores = 4 * heads * full.head_dim * length**2 / taken

    num_heads = min(full.num_heads, max(_WIDTH // full.head_dim, 1))
    config = replace(
        full, num_layers=min(full.num_layers, _LAYERS), num_heads=num_heads,
        ffn_dim=min(full.ffn_dim, 6 * _WIDTH), image_dim=None, image_positions=None,
        control_layers=(), control_channels=None, audio=None)
    frames, side, text = _TRANSFORMER
    dit = ready(SpacetimeDiT(config), dtype)
    given = (randn(1, config.in_channels, frames, side, side),
             torch.tensor([500.0], device=device), randn(1, text, config.text_dim))
    taken = _seconds(lambda: dit(*given), device)
    work = transformer_flops(config, frames, side**2 // config.patch_size**2, text)
    linear = work.linear / max(taken - work.attention / scores, 0.3 * taken)

    frames, side = _VAE
    vae = ready(CausalVAE(folder.components["vae"].config), vae_dtype)
    latents = randn(1, vae.config.latent_channels, frames, side, side, dtype=vae_dtype)
    taken = _seconds(lambda: [*vae.stream_decode(latents)], device)
    decoded = vae_flops(vae.config, frames, side, side, decode=True)
    return Flops(linear, scores, decoded.conv / taken)


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Return the median time of several runs."""
    from torch.utils.benchmark import Timer

    threads, given = torch.get_num_threads(), {"run": run}
    if device.type == "cpu" and threads == 1:
        timer = Timer("run()", globals=given, timer=time.thread_time)
    else:
        timer = Timer("run()", globals=given, num_threads=threads)
    return max(timer.blocked_autorange(min_run_time=_BUDGET_S).median, 1e-7)
