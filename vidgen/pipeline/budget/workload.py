"""How much there is to compute and to hold, counted from the architectures without any weights.

Products are counted in FLOPs, the rest in elements that pass through memory. What is held is
counted at the fullest moment of a forward pass: the tensors that its variables keep alive there.

Axes: L tokens, S text tokens, D width, P pixels of a frame, n frames that a latent frame gives.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Literal, NamedTuple

from vidgen.core.shapes import Tiles
from vidgen.models.audio_spectra import NOISE_FRAMES, AudioVAEConfig
from vidgen.models.dit_types import AudioConfig, DiTConfig
from vidgen.models.image import ImageConfig
from vidgen.models.onset_detector import SMEARS, OnsetDetectorConfig
from vidgen.models.text import TextConfig
from vidgen.models.vae import VAEConfig, by_decoder
from vidgen.models.vae_tiles import AT_ONCE, tile_areas
from vidgen.models.verifier import TINT_DIM, VerifierConfig
from vidgen.ops.attention import _BLOCK, _MAX_SCORES

Kind = Literal[
    "gemm", "attention", "tokens", "block", "conv", "pixels", "layer", "weights", "load", "fresh"
]


class Op(NamedTuple):
    """Work of one kind.

    Attributes:
        kind: "gemm", "attention" and "conv" in FLOPs; "tokens" and "pixels" in elements of norms,
            gates and activations; "block" and "layer" in calls; "weights" in those of a
            convolution that a call puts into its kernel's order; "load" in bytes from files;
            "fresh" in bytes that the system is asked for.
        size: what the rate depends on: the width, channels, or scores or elements at once.
        amount: how much.
    """

    kind: Kind
    size: float
    amount: float


def attention_op(num_heads: int, head_dim: int, tokens: int, keys: float) -> Op:
    """Attention; a score's softmax costs about as much as 64 of its products."""
    scores = num_heads * tokens * keys
    return Op("attention", scores, 4 * scores * (head_dim + 64))


def block_ops(width: int, head_dim: int, ffn_dim: int, tokens: int, keys: float, context: int
              ) -> list[Op]:
    """One block of a transformer with cross-attention.

    Args:
        width: D.
        head_dim: of a head.
        ffn_dim: hidden width of the feed-forward.
        tokens: L.
        keys: tokens that each of them attends to.
        context: S.
    """
    flops = 2 * width * (tokens * (6 * width + 2 * ffn_dim) + 2 * context * width)
    return [
        Op("gemm", width, flops),
        attention_op(width // head_dim, head_dim, tokens, keys + context),
        Op("tokens", tokens * width, tokens * (8 * width + ffn_dim)),
        Op("block", 1, 1),
    ]


def transformer_ops(
    config: DiTConfig, frames: int, frame_tokens: int, text_tokens: int, *, image_tokens: int = 0,
    controlled: bool = False, sound_tokens: int = 0,
) -> list[Op]:
    """One forward pass.

    Args:
        config: the transformer's.
        frames: latent frames, stills that join as tokens included.
        frame_tokens: tokens of each.
        text_tokens: S, at most the model's own.
        image_tokens: rows of image features.
        controlled: whether control blocks run.
        sound_tokens: sound latents beside them, each a token.
    """
    width, tokens = config.hidden_dim, frames * frame_tokens
    keys = float(tokens + sound_tokens)
    if config.pattern == "factorised":
        keys = (frames + frame_tokens) / 2
    context = text_tokens + 1 + image_tokens
    block = block_ops(width, config.head_dim, config.ffn_dim, tokens, keys, context)
    ops = [Op(op.kind, op.size, op.amount * config.num_layers) for op in block]
    if sound_tokens and config.audio is not None:
        ops += listening_ops(config, config.audio, sound_tokens, keys, 0)
    if controlled:
        count = len(config.control_layers)
        ops += [Op(op.kind, op.size, op.amount * count) for op in block]
        ops.append(Op("gemm", width, 2 * tokens * width**2 * (count + 1)))
    ends = tokens * config.patch_size**2 * (config.in_channels + config.out_channels)
    texts = context * (config.text_dim + width)
    times = config.freq_dim + 7 * width
    ops.append(Op("gemm", width, 2 * width * (ends + texts + times)))
    return [*ops, Op("block", 1, 1)]


def listening_ops(
    config: DiTConfig, audio: AudioConfig, tokens: int, keys: float, context: int, takes: int = 1
) -> list[Op]:
    """One pass of so many tokens of sound, each of which attends to `keys` tokens.

    All `takes` of one picture pass together.
    """
    width = config.hidden_dim
    block = block_ops(width, config.head_dim, audio.ffn_dim, tokens, keys, context)
    ops = [
        Op(op.kind, op.size, op.amount * config.num_layers * (1 if op.kind == "block" else takes))
        for op in block
    ]
    return [*ops, Op("gemm", width, 4 * width * takes * tokens * audio.channels)]


def transformer_bytes(
    config: DiTConfig, tokens: int, itemsize: int, *, blocked: bool, timed_tokens: bool = False
) -> int:
    """The most that one forward pass holds beside the weights.

    Args:
        config: the transformer's.
        tokens: L.
        itemsize: bytes of an element.
        blocked: whether attention holds the scores of a block of queries, see `ops.attention`.
        timed_tokens: whether tokens of a frame differ in time, so that each has its own modulation.
    """
    width = config.hidden_dim
    # tokens before all blocks and before this one, normed, mixed, crossed, summed, normed again
    ffn = 7 * width * itemsize + 2 * config.ffn_dim * itemsize
    gate = 7 * width * itemsize + (12 + itemsize) * width
    turn = 5 * width * itemsize + (8 if itemsize < 4 else 4) * width
    held = tokens * (max(ffn, gate, turn) + 4 * config.head_dim)
    if timed_tokens:
        held += tokens * 24 * width
    if blocked:
        held += 2 * 4 * min(_BLOCK * tokens, tokens**2, _MAX_SCORES)
    largest = itemsize * width * max(config.ffn_dim, width)  # a weight in the kernel's own order
    return held + largest


def sound_ops(config: AudioVAEConfig, latents: int) -> list[Op]:
    """So many latents of sound through the decoder."""
    width, frames = config.decoder_dim, latents * config.frames_per_token
    at_latents, at_frames = config.decoder_layers
    blocks = latents * at_latents + frames * at_frames
    said = 3 * config.num_bins + 2 * config.gains_per_frame
    ends = latents * config.latent_channels + frames * (width + said)
    passing = blocks * (config.expansion + config.kernel_size) * width
    played = 1 + bool(config.gains_per_frame)  # tones and noise apart, where each has its gains
    spectra = played * frames * config.window * (8 + math.log2(config.window))
    return [
        Op("gemm", width, 2 * width * (2 * blocks * config.expansion * width + ends)),
        Op("tokens", frames * width, passing + spectra),
        Op("block", 1, at_latents + at_frames),
    ]


def sound_bytes(config: AudioVAEConfig, latents: int, itemsize: int) -> int:
    """The most that the sound's decoder holds of so many latents that it takes at a time."""
    frames = latents * config.frames_per_token
    block = (3 + 2 * config.expansion) * config.decoder_dim * itemsize
    # what it says, in float32; phases in float64, complex spectra twice, windows of samples twice;
    # with gains spectra of tones and of noise, and three of their windows
    spectra, windows = (4, 6) if config.gains_per_frame else (2, 2)
    render = config.num_bins * (3 * 4 + 2 * 8 + spectra * 8) + windows * 4 * config.window
    return frames * max(block, render) + 8 * NOISE_FRAMES * config.num_bins


def text_ops(config: TextConfig, tokens: int) -> list[Op]:
    """One prompt through the text encoder."""
    inner = config.num_heads * config.head_dim
    flops = 2 * tokens * config.hidden_dim * (4 * inner + 3 * config.ffn_dim)
    return [
        Op("gemm", config.hidden_dim, config.num_layers * flops),
        Op("block", 1, config.num_layers),
    ]


def image_ops(config: ImageConfig) -> list[Op]:
    """One picture through the image encoder."""
    tokens, width = config.num_tokens, config.hidden_dim
    block = block_ops(width, width // config.num_heads, config.ffn_dim, tokens, tokens, 0)
    return [Op(op.kind, op.size, op.amount * config.num_layers) for op in block]


def verifier_ops(config: VerifierConfig, frames: int, pixels: int) -> list[Op]:
    """So many latent frames of so many latents through a verifier."""
    layers, D = 2 * config.num_blocks, config.dim
    flops = 2 * 9 * D * (layers * D + config.latent_channels) * pixels * frames
    if config.tints:
        flops += 2 * 9 * D * TINT_DIM * pixels * frames
    return [
        Op("conv", D, flops),
        Op("layer", 1, 1 + layers),
        Op("pixels", D * pixels, (1 + layers) * D * pixels * frames),
    ]


def onset_detector_ops(config: OnsetDetectorConfig, frames: int, pixels: int) -> list[Op]:
    """An onset detector's looks at so many latent frames of so many latents."""
    times = len(SMEARS)
    layers, D, T = 2 * config.num_blocks, config.dim, config.time_dim
    looks, told = config.num_looks, config.num_values + 2
    each = 9 * D * (layers * D + config.latent_channels)  # of a latent
    each += D * (looks + config.num_values) + looks * told
    across = T * (looks * told + config.num_time_blocks * 2 * 3 * T + config.num_parts)
    return [
        Op("conv", D, times * 2 * frames * (each * pixels + across)),
        Op("layer", 1, times * (5 + layers + 2 * config.num_time_blocks)),
        Op("pixels", D * pixels, times * (1 + layers) * D * pixels * frames),
    ]


class Layer(NamedTuple):
    """A convolution of the VAE: n frames of `rows` x `columns` come out for each latent frame.

    Attributes:
        taps: in time and over pixels.
        norm: whether a norm and an activation stand before it.
        inside: which convolution of a residual block it is, 1 or 2; 0: of none.
    """

    inputs: int
    outputs: int
    taps: tuple[int, int]
    frames: int
    pixels: int
    norm: bool = False
    inside: int = 0


def decoder_layers(
    config: VAEConfig, rows: int, columns: int, oversampling: int = 1
) -> Iterator[Layer]:
    """Convolutions of the decoder for latents of rows x columns, in order."""
    areas = [rows * columns * 4 ** min(i, config.num_stages - 1)
             for i in range(config.num_stages + 1)]
    return chain(_decoder_begin(config, areas[0]), _decoder_stages(config, areas, oversampling))


def encoder_layers(
    config: VAEConfig, rows: int, columns: int, oversampling: int = 1
) -> Iterator[Layer]:
    """Convolutions of the encoder for a video whose latents are rows x columns, in order."""
    last = config.num_stages - 1
    areas = [rows * columns * 4 ** min(last - i, last) for i in range(-1, config.num_stages)]
    return chain(_encoder_stages(config, areas, oversampling), _encoder_end(config, areas[-1]))


def _decoder_begin(config: VAEConfig, pixels: int) -> Iterator[Layer]:
    width = config.decoder_dim * config.channel_mults[-1]
    yield Layer(config.latent_channels, width, (3, 9), 1, pixels)
    yield from _residual(width, width, 1, pixels)
    yield from _residual(width, width, 1, pixels)


def _decoder_stages(
    config: VAEConfig, areas: Sequence[int], oversampling: int
) -> Iterator[Layer]:
    """The stages and the last convolution, which read so many pixels."""
    outs, frames = [config.decoder_dim * m for m in config.channel_mults[::-1]], 1
    width, resamples = outs[0], (*config.resamples[-2::-1], None)
    finer = by_decoder(config.finer_stages(oversampling))
    for out, resample, pixels, kept in zip(outs, resamples, areas, finer, strict=False):
        for i in range(config.num_blocks + 1):
            yield from _residual(out if i else width, out, frames, pixels)
        width = out
        if resample:
            if resample == "spacetime":
                yield Layer(out, 2 * out, (3, 1), frames, pixels)
                frames *= 1 if kept else 2
            width = out if config.stage_shortcuts else out // 2
            yield Layer(out, 4 * width, (1, 4), frames, pixels)  # four phases, see `Upsample`
    yield Layer(width, 3 * config.patch_size**2, (3, 9), frames, areas[len(outs)], norm=True)


def _encoder_stages(
    config: VAEConfig, areas: Sequence[int], oversampling: int
) -> Iterator[Layer]:
    """The first convolution and the stages, which read so many pixels."""
    width, frames = config.encoder_dim, config.strides.t // oversampling
    yield Layer(3 * config.patch_size**2, width, (3, 9), frames, areas[0])
    finer = config.finer_stages(oversampling)
    for mult, resample, pixels, kept in zip(
        config.channel_mults, config.resamples, areas[1:], finer, strict=False
    ):
        out = config.encoder_dim * mult
        for i in range(config.num_blocks):
            yield from _residual(out if i else width, out, frames, pixels)
        width = out
        if resample:
            yield Layer(out, out, (1, 9), frames, pixels // 4)
            if resample == "spacetime":
                frames //= 1 if kept else 2
                yield Layer(out, out, (3, 1), frames, pixels // 4)


def _encoder_end(config: VAEConfig, pixels: int) -> Iterator[Layer]:
    width = config.encoder_dim * config.channel_mults[-1]
    yield from _residual(width, width, 1, pixels)
    yield from _residual(width, width, 1, pixels)
    yield Layer(width, 2 * config.latent_channels, (3, 9), 1, pixels, norm=True)


def _residual(inputs: int, outputs: int, frames: int, pixels: int) -> Iterator[Layer]:
    yield Layer(inputs, outputs, (3, 9), frames, pixels, norm=True, inside=1)
    yield Layer(outputs, outputs, (3, 9), frames, pixels, norm=True, inside=2)
    if inputs != outputs:
        yield Layer(inputs, outputs, (1, 1), frames, pixels)


def vae_ops(
    config: VAEConfig, frames: int, rows: int, columns: int, *, decode: bool,
    tiles: Tiles | None = None, oversampling: int = 1,
) -> list[Op]:
    """A clip of so many latent frames of rows x columns through the decoder or the encoder."""
    ops = []
    for layer, calls in _calls(config, rows, columns, tiles, oversampling, decode=decode):
        inputs, outputs = max(layer.inputs, 16), max(layer.outputs, 16)  # a kernel's vectors
        width, folded = (inputs * outputs) ** 0.5, 4 if layer.taps == (1, 4) else 1
        flops = 2 * inputs * outputs * layer.taps[1] * layer.pixels
        # the first latent frame gives one frame, which only the last taps in time see
        amount = flops * (1 + (frames - 1) * layer.frames * layer.taps[0])
        ops.append(Op("conv", width, amount))
        ops.append(Op("layer", 1, frames * calls))
        weights = layer.inputs * layer.outputs * layer.taps[0] * layer.taps[1]
        ops.append(Op("weights", 1, frames * calls * folded * weights))
        if layer.norm or layer.taps != (1, 1):
            frame = (layer.inputs if layer.norm else layer.outputs) * layer.pixels
            shown = frame * (1 + (frames - 1) * layer.frames)
            ops.append(Op("pixels", frame * layer.frames / calls, shown))
    width = config.channel_mults[-1] * (config.decoder_dim if decode else config.encoder_dim)
    area = rows * columns
    ops.append(Op("gemm", width, frames * 8 * area * width**2))
    attended = attention_op(1, width, area, area)
    return [*ops, attended._replace(amount=frames * attended.amount)]


def refine_bytes(config: VAEConfig, rows: int, columns: int, itemsize: int) -> int:
    """What gradients through the decoder of one latent frame need kept, in bytes.

    Each convolution's input, and what stands before its norm.
    """
    return sum(
        layer.inputs * layer.pixels * itemsize * (1 + 2 * layer.norm)
        for layer in decoder_layers(config, rows, columns)
    )


def _calls(
    config: VAEConfig, rows: int, columns: int, tiles: Tiles | None, oversampling: int, *,
    decode: bool,
) -> Iterator[tuple[Layer, int]]:
    """Each convolution, with the pixels of all its calls, and how many calls those are."""
    if tiles is None:
        layers = decoder_layers if decode else encoder_layers
        for layer in layers(config, rows, columns, oversampling):
            yield layer, 1
        return
    whole = (_decoder_begin if decode else _encoder_end)(config, rows * columns)
    _, areas = tile_areas(config, rows, columns, tiles, decode=decode)
    for layer in whole:
        yield layer, 1
    for layer in (_decoder_stages if decode else _encoder_stages)(config, areas, oversampling):
        yield layer, tiles.count


def vae_bytes(
    config: VAEConfig, rows: int, columns: int, itemsize: int, *, decode: bool, whole: bool = True,
    fused: bool = False, tiles: Tiles | None = None, oversampling: int = 1,
) -> int:
    """The most that the decoder or encoder holds in a stream, in bytes.

    Args:
        config: the VAE's.
        rows: of latents.
        columns: of latents.
        itemsize: bytes of an element.
        decode: which of the two.
        whole: False for a single frame, which keeps less.
        fused: whether norms write straight into what a convolution reads, see `ops.native`.
        tiles: that the picture is cut into; what they keep between their turns lies elsewhere.
        oversampling: see `CausalVAE.encode_moments`.
    """
    if tiles is None:
        layers = (decoder_layers if decode else encoder_layers)(config, rows, columns, oversampling)
        return itemsize * sum(_held(layers, whole=whole, fused=fused))
    uncut = (_decoder_begin if decode else _encoder_end)(config, rows * columns)
    kept, fullest = _held(uncut, whole=whole, fused=fused)
    largest, _ = tile_areas(config, rows, columns, tiles, decode=decode)
    stages = (_decoder_stages if decode else _encoder_stages)(config, largest, oversampling)
    in_tile = sum(_held(stages, whole=whole, fused=fused))
    # what waits for a tile's turn, and what they put together
    width = config.channel_mults[-1] * (config.decoder_dim if decode else config.encoder_dim)
    frames = config.strides.t // oversampling if whole else 1
    frame = 3 * rows * columns * config.strides.hw**2 * frames
    passing = (AT_ONCE if whole else 1) * (width * rows * columns + frame)
    return itemsize * (kept + max(fullest, in_tile + passing))


def _held(layers: Iterable[Layer], *, whole: bool, fused: bool) -> tuple[int, int]:
    """Elements that are remembered of earlier frames, and those alive at the fullest moment."""
    kept, fullest = 0, 0
    for layer in layers:
        n = layer.frames if whole else 1
        came, made = (c * n * layer.pixels for c in (layer.inputs, layer.outputs))
        history = layer.inputs * 2 * layer.pixels if layer.taps[0] > 1 and whole else 0
        joined = came + history if history else 0
        # a stage's and a block's input, what is normed, what the kernel is given, what it makes
        held = came + joined + made + history
        if layer.norm and not fused:
            held += came + joined
        if layer.inside:
            held += came * layer.inside
        if layer.taps[1] == 4:
            held = came + 3 * made
        kept += history
        fullest = max(fullest, held)
    return kept, fullest
