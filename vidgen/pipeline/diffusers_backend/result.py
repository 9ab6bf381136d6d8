"""A diffusers pipeline's result: decoded later, in temporal tiles, and kept in the clip's journal.

Each family normalises, unpacks and even noises its latents in its own way before decoding. So its
pipeline does that, and only the decoding itself is deferred. Between two steps a pipeline holds
state that can't be read or set from outside; so a journal keeps only the result, and denoising
that was killed starts again.

Axes: B batch, C latent channels, F latent frames, h w latent rows and columns, N pictures or
samples of sound, T frames, H W pixel rows and columns.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vidgen.media.types import Frames, Samples
from vidgen.pipeline.diffusers_backend.plan import Abilities
from vidgen.pipeline.journal.job import MADE
from vidgen.pipeline.journal.journal import Journal

TILE = 64
"""Frames of a temporal tile if the VAE has none of its own."""
OVERLAP = 24
"""Frames over which two tiles are blended."""
_BASE = 16
"""Of a frame's number: few enough levels that neither bfloat16 nor bytes blur them."""


@dataclass(frozen=True)
class Decode:
    """A deferred decoding: arguments of the VAE."""

    latents: Tensor  # [B, C, F, h, w] or pictures [N, C, h, w], on the CPU
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def is_video(self) -> bool:
        """True if time is an axis of the latents, not of the batch."""
        return self.latents.ndim == 5


@contextmanager
def deferred_decoding(vae: nn.Module, length: Callable[[Tensor], int]) -> Iterator[list[Decode]]:
    """Make `vae.decode` within the block record its arguments and return numbered frames.

    `length` returns the number of frames of latents [B, C, F, h, w].
    """
    noted: list[Decode] = []
    count = 0

    def decode(latents: Tensor, *arguments: Any, return_dict: bool = True, **options: Any) -> Any:
        from diffusers.models.autoencoders.vae import DecoderOutput

        nonlocal count
        given = latents.cpu().clone(memory_format=torch.contiguous_format)  # as from a journal
        noted.append(Decode(given, arguments, options))
        num_frames = length(latents) if latents.ndim == 5 else len(latents)
        frames = _numbered(count, num_frames).to(latents.device)
        count += num_frames
        video = frames.transpose(0, 1)[None] if latents.ndim == 5 else frames
        return DecoderOutput(sample=video) if return_dict else (video,)

    vae.decode = decode  # type: ignore[assignment]
    try:
        yield noted
    finally:
        del vae.decode


def shown_frames(frames: Any) -> range | None:
    """Return the numbers of the frames shown, from [T, 8, 8, 3] in [0, 1]; None if changed."""
    digits = np.floor(np.asarray(frames, dtype=np.float64).mean(axis=(1, 2)) * _BASE)
    numbers = digits @ _BASE ** np.arange(3)
    shown = range(int(numbers[0]), int(numbers[0]) + len(numbers))
    return shown if numbers.tolist() == list(shown) else None


def _numbered(first: int, count: int) -> Tensor:
    """Return frames [N, 3, 8, 8] in [-1, 1] whose channels are the digits of their number."""
    numbers = torch.arange(first, first + count)
    digits = torch.stack([numbers // _BASE**place % _BASE for place in range(3)], dim=1)
    return ((2 * digits + 1) / _BASE - 1)[:, :, None, None].expand(-1, -1, 8, 8).contiguous()


def decode_all(
    vae: Any, decodings: Sequence[Decode], device: torch.device, start: int, stop: int
) -> Iterator[Tensor]:
    """Yield frames `start` to `stop` of several decodings, parts [1, 3, t, H, W] in [-1, 1]."""
    first = 0  # number of the decoding's first frame
    for noted in decodings:
        if not noted.is_video and first + len(noted.latents) <= start:
            first += len(noted.latents)
            continue
        position = max(start, first)
        for video in stream_decode(vae, noted, device, position - first):
            yield video[:, :, : stop - position]
            position += video.shape[2]
            if position >= stop:
                return
        first = position


@torch.no_grad()
def stream_decode(
    vae: Any, noted: Decode, device: torch.device, start: int = 0
) -> Iterator[Tensor]:
    """Yield parts of the video, each [1, 3, t, H, W] in [-1, 1]; pictures in one part a decoding.

    Frames from `start` on equal those of the whole: without temporal tiles all of it is decoded.
    """

    def decode(latents: Tensor) -> Tensor:
        given = latents.to(device)
        video: Tensor = vae.decode(given, *noted.arguments, **noted.options, return_dict=False)[0]
        return video if noted.is_video else video.transpose(0, 1)[None]

    tiles = temporal_tiles(vae)
    if tiles is None or not noted.is_video or noted.latents.shape[2] <= tiles[0]:
        yield decode(noted.latents)[:, :, start:]
    else:
        yield from _stream_tiles(vae, decode, noted.latents, *tiles, start)


def temporal_tiles(vae: Any) -> tuple[int, int] | None:
    """Return latent frames of a tile, and from one tile to the next; None without tiles."""
    if not (hasattr(vae, "blend_t") and hasattr(vae, "tile_sample_stride_num_frames")):
        return None
    size, stride = TILE, TILE - OVERLAP
    if vae.use_framewise_decoding:
        size, stride = vae.tile_sample_min_num_frames, vae.tile_sample_stride_num_frames
    ratio = vae.temporal_compression_ratio
    return max(size // ratio, 1), max(stride // ratio, 1)


def prepare_vae(vae: Any) -> None:
    """Let a VAE that caches its convolutions' past decode slice by slice, in less memory."""
    if _carries_past(vae) and hasattr(vae, "use_framewise_decoding"):
        vae.use_framewise_decoding = True


def peak_bytes(vae: Any, num_frames: int, height: int, width: int) -> int | None:
    """Return about the bytes for decoding a clip, or None if the VAE's tiles or slices bound them.

    The widest layer at full resolution counts three times: its input, padded copy and output.
    """
    is_video = any(isinstance(module, nn.Conv3d) for module in vae.modules())
    if temporal_tiles(vae) is not None or _carries_past(vae) or not is_video:
        return None
    config = vae.config
    names = ("decoder_block_out_channels", "block_out_channels", "base_dim")
    widths = next((config[name] for name in names if config.get(name)), 128)
    channels: int = widths if isinstance(widths, int) else min(widths)
    size: int = next(vae.parameters()).element_size()
    patch: int = config.get("patch_size") or 1
    return 3 * channels * num_frames * height * width * size // patch**2


def _carries_past(vae: Any) -> bool:
    parameters = inspect.signature(vae.decoder.forward).parameters
    return "conv_cache" in parameters or "feat_cache" in parameters


def _stream_tiles(
    vae: Any, decode: Any, latents: Tensor, size: int, stride: int, start: int = 0
) -> Iterator[Tensor]:
    """Yield tiles blended over their overlap, as the VAE's own tiling does.

    A tile's first frame is decoded without its past, so all but the first tile start one latent
    frame early and drop it. Those that end before frame `start` are left out, except for the ones
    blended into its own.
    """
    ratio = vae.temporal_compression_ratio
    wanted = max(start - 1, 0) // (stride * ratio)
    first = max(wanted - math.ceil((size - stride) / stride), 0)
    tail, end = None, first * stride * ratio + (first > 0)
    for begin in range(first * stride, latents.shape[2] - 1, stride):
        own, vae.use_framewise_decoding = vae.use_framewise_decoding, False
        try:
            tile = decode(latents[:, :, begin : begin + size + 1])
        finally:
            vae.use_framewise_decoding = own
        if begin > 0:
            tile = tile[:, :, 1:]
        if tail is not None:
            shared = min(tail.shape[2], tile.shape[2])
            ramp = torch.arange(shared, device=tile.device)[:, None, None] / max(shared, 1)
            ramp = ramp.to(tile.dtype)
            blended = tail[:, :, :shared] * (1 - ramp) + tile[:, :, :shared] * ramp
            tile = torch.cat([blended, tile[:, :, shared:]], dim=2)
        kept = stride * ratio + (begin == 0)
        part, tail = tile[:, :, :kept], tile[:, :, kept:]
        end += part.shape[2]
        if end > start:
            yield part[:, :, -(end - start) :]


_ASKED = ("size", "frames", "seconds")
"""Options that determine size and length."""
_SETTLED = ("width", "height", "num_frames", "kept_frames")
"""Entries of a plan that are known only after the pipeline has run."""


@dataclass(frozen=True)
class PipelineResult:
    """A pipeline's result for one clip."""

    num_frames: int  # that it shows
    decodings: Sequence[Decode] = ()  # deferred, in order; empty if that was impossible
    cut: int = 0  # frames that it leaves out before those it shows
    frames: Frames | None = None  # uint8 [T, H, W, 3] if decoding couldn't be deferred
    sound: Samples | None = None  # float32 [N, channels] of the same pipeline
    sound_rate: int = 48_000  # samples per second

    @classmethod
    def of(
        cls, able: Abilities, output: Any, decodings: Sequence[Decode] = (), cut: int = 0
    ) -> PipelineResult:
        """Make it from a pipeline's output and the deferred decodings."""
        shown = output[0] if able.is_image else output[0][0]
        sound, rate = _sound(able.pipe, output)
        return cls(len(shown), decodings, cut, None if decodings else _pixels(shown), sound, rate)

    @property
    def latents(self) -> Tensor | None:
        """Undecoded latents, [B, C, F, h, w] or pictures [T, C, h, w]; None if decoded."""
        return torch.cat([each.latents for each in self.decodings]) if self.decodings else None


def keep_result(journal: Journal, made: PipelineResult) -> None:
    """Save a pipeline's result; if it can't be serialised the journal ends with a warning."""
    if not journal.keeps:
        return
    arrays: dict[str, Any] = {}
    try:
        decodings = [_packed([d.latents, d.arguments, d.options], arrays) for d in made.decodings]
    except TypeError as error:
        journal.give_up(error)
        return
    given = {"frames": made.frames, "sound": made.sound}
    arrays |= {name: array for name, array in given.items() if array is not None}
    facts = {"num_frames": made.num_frames, "cut": made.cut, "sound_rate": made.sound_rate,
             "decodings": decodings, "finished": True}
    journal.keep_arrays(MADE, arrays, facts)


def kept_result(journal: Journal) -> PipelineResult | None:
    """Return the result of `keep_result`, or None; raise InputError if damaged."""
    kept = journal.kept_arrays(MADE)
    if kept is None:
        return None
    arrays, facts = kept
    unpacked = (_unpacked(each, arrays) for each in facts["decodings"])
    decodings = [Decode(latents, tuple(given), options) for latents, given, options in unpacked]
    return PipelineResult(facts["num_frames"], decodings, facts["cut"], arrays.get("frames"),
                          arrays.get("sound"), facts["sound_rate"])


def as_settled(recipe: dict[str, Any], earlier: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a recipe with the size and length of an `earlier` one of the same wishes, if any."""
    if earlier is None or not isinstance(plan := earlier.get("plan"), dict):
        return recipe
    wishes = [[each.get("request", {}).get(name) for name in _ASKED] for each in (recipe, earlier)]
    if json.loads(json.dumps(wishes[0])) != wishes[1]:
        return recipe
    known = {name: plan[name] for name in _SETTLED if plan.get(name) is not None}
    return recipe | {"plan": recipe["plan"] | known}


def _packed(value: Any, arrays: dict[str, Any]) -> Any:
    """Return a VAE's argument as JSON data, its tensors among the arrays; raise TypeError."""
    if value is None or isinstance(value, bool | int | float | str):
        return {"plain": value}
    if isinstance(value, list | tuple):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_packed(each, arrays) for each in value]}
    if isinstance(value, dict):
        return {"dict": {name: _packed(each, arrays) for name, each in value.items()}}
    is_generator = isinstance(value, torch.Generator)
    if not (is_generator or isinstance(value, Tensor)):
        raise TypeError(f"decoding takes a {type(value).__name__}, which can't be written down")
    tensor = value.get_state() if is_generator else value
    name = f"decoding.{len(arrays)}"
    arrays[name] = tensor
    kind = "generator" if is_generator else str(tensor.dtype).removeprefix("torch.")
    return {"tensor": name, "kind": kind, "device": str(value.device)}


def _unpacked(data: Mapping[str, Any], arrays: Mapping[str, Any]) -> Any:
    if "plain" in data:
        return data["plain"]
    if "dict" in data:
        return {name: _unpacked(each, arrays) for name, each in data["dict"].items()}
    if "tensor" not in data:
        kind, items = next(iter(data.items()))
        values = [_unpacked(each, arrays) for each in items]
        return tuple(values) if kind == "tuple" else values
    tensor = torch.from_numpy(arrays[data["tensor"]])
    if data["kind"] != "generator":
        return tensor.to(data["device"], getattr(torch, data["kind"]))
    generator = torch.Generator(data["device"])
    generator.set_state(tensor.to(torch.uint8))
    return generator


def _pixels(frames: Any) -> Frames:
    """Convert pictures in [0, 1], array [T, H, W, 3], to uint8."""
    scaled = np.asarray(frames, dtype=np.float32).clip(0, 1) * 255
    return scaled.round().astype(np.uint8)


def _sound(pipe: Any, output: Any) -> tuple[Samples | None, int]:
    """Return the sound in the output, float32 [N, channels], and its rate."""
    waves = getattr(output, "audio", None)
    if waves is None:
        return None, 48_000
    config = getattr(getattr(pipe, "vocoder", None), "config", {})
    names = ("output_sampling_rate", "sampling_rate", "sample_rate")
    rate = int(next((config[name] for name in names if config.get(name)), 48_000))
    wave = torch.as_tensor(waves)[0].float().cpu().clamp(-1, 1)
    wave = wave[None] if wave.ndim == 1 else wave
    return wave.T.contiguous().numpy(), rate
