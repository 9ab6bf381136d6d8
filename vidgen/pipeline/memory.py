"""Estimate a generation's memory and time, stage by stage.

Weights are counted from the files' headers, activations from the architectures, as the tensors
alive at a stage's peak. A clip's work (windows to denoise, frames to encode and decode) follows
from its plan and request alone; `timing` converts it to seconds.

Axes: L tokens, D width.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from vidgen.core.shapes import Tiles
from vidgen.diffusion.cache import TENSORS_HELD
from vidgen.diffusion.state import sound_span
from vidgen.media.ending import read_ending
from vidgen.models.audio_spectra import NOISE_FRAMES, AudioVAEConfig
from vidgen.models.dit_types import DiTConfig
from vidgen.models.tokenizer import normalise_words
from vidgen.models.vae import VAEConfig
from vidgen.models.vae_tiles import AT_ONCE
from vidgen.ops import native
from vidgen.ops.attention import _BLOCK, _MAX_SCORES, used_backend
from vidgen.pipeline import tail
from vidgen.pipeline.denoise import boundary_of, settles, sigma_split, sigmas_of
from vidgen.pipeline.loader import DTYPES, EXPERTS, STREAMED, ModelLoader
from vidgen.pipeline.settings import makes_sound
from vidgen.pipeline.sound.own_sound import AT_ONCE as SOUND_AT_ONCE
from vidgen.pipeline.sound.own_sound import ONSET_DETECTOR, drawn_at_once, sound_plan
from vidgen.pipeline.timing import (
    LOAD_BYTES_PER_S,
    NOMINAL,
    VAEPart,
    known_rates,
    network_flops,
    transformer_flops,
    vae_flops,
    vae_parts,
)
from vidgen.pipeline.types import Estimate, Plan, Setup, StageEstimate

if TYPE_CHECKING:
    from vidgen.core.request import Request
    from vidgen.weights.component import Role
    from vidgen.weights.folder import ModelFolder

KERNELS_BYTES = 76_000_000
"""Torch's kernels, thread pools and allocator on a CPU after their first use."""
HOLES, MOST_KEPT = 0.8, 200_000_000
"""On a CPU glibc keeps freed memory and holes between blocks, as a share of the live bytes; it
returns pieces from 32 MB on at once, so that both stop growing.
"""
ENCODER_BYTES, ENCODER_BYTES_PER_PIXEL = 6_000_000, 200
"""Memory of a video encoder: x264 holds some dozens of planes."""
BUILDING_S = 0.4
"""Time to create the networks' empty modules, with Python's imports."""


class Window(NamedTuple):
    """Work of one window: one run of the sampler."""

    frames: int  # latent frames at or above the boundary, stills included
    drawn: int  # latent frames below the boundary, stills included
    above: int  # forward passes over `frames`
    below: int  # forward passes over `drawn`
    has_given: bool  # whether frames are given, as guidance counts them


class Passes(NamedTuple):
    """The work of one clip."""

    windows: tuple[Window, ...]
    # (frames, rate) of each video or still that the VAE encodes, of all windows
    encoded: tuple[tuple[int, int], ...]
    decoded: int  # latent frames, without `shown`
    shown: int  # latent frames that later windows decode to continue from
    kept: int  # frames that are written


def count_passes(folder: ModelFolder, plan: Plan, request: Request) -> Passes:
    """Count the work of one clip; raise InputError if the clip to continue can't be read."""
    t, begun = folder.components["vae"].config.strides.t, tail.no_beginning(plan)
    if request.prefix is not None:
        begun = _beginning(folder, plan, os.fspath(request.prefix))
    spans = tail.windows_after(begun, plan, request, folder)
    windows, encoded = list[Window](), list[tuple[int, int]]()
    made, total, shown = begun.num_given, spans[-1][1] if spans else begun.num_given, 0
    if begun.hand_over == "pixels":
        encoded.append((1 + (begun.num_given - 1) * t, plan.temporal_upsampling))
    for start, stop in spans:
        frames, known = 1 + (stop - start - 1) * t, made - start
        first = (begun.num_dropped + start) * t
        new = range(first + (1 + (known - 1) * t if known else 0), first + frames)
        inside = [at for seconds, _ in request.frame if (at := round(seconds * plan.fps)) in new]
        begins = not known and (request.begins_with_image or bool(request.first_frame_model))
        in_place = begins + inside.count(0)
        later = (stop == total and request.last_image is not None) + len(inside) - inside.count(0)
        stills, own = _conditions(folder, plan, request, frames, in_place, later)
        stills += known > 0 and tail.keeps_to_start(folder, request)
        has_given = (folder.defaults.history_noise == 0 if known else
                     in_place + later > 0 and request.mask is None)
        finer = plan.rate.after(start).num_upsampled(stop - start)
        windows.append(Window(stop - start + stills, finer + stills,
                              *_num_passes(folder, plan, has_given=has_given), has_given))
        encoded += own
        if known and plan.temporal_upsampling > 1:  # the earlier frames, at the other rate
            past = max(tail.TAIL_FRAMES, (known + 1) * plan.temporal_upsampling)
            encoded.append((1 + (past // plan.temporal_upsampling - 1) * t, 1))
            shown += past
        if known and folder.conditioning == "control":  # the earlier frames, as a clip of their own
            encoded.append((frames, 1))
            shown += tail.TAIL_FRAMES
        made = stop
    return Passes(tuple(windows), tuple(encoded), total, shown,
                  max(plan.kept_frames - begun.num_frames, 1))


def _num_passes(folder: ModelFolder, plan: Plan, *, has_given: bool) -> tuple[int, int]:
    """Count forward passes of a window at or above the boundary, and below it."""
    guidance = plan.guidance.of_clip(has_given=has_given and plan.strength == 1)
    sigmas, things, legible = sigmas_of(plan), 0, 0.0
    if plan.regional_prompts and not has_given:
        config = folder.components["verifier"].config
        things = len(config.labels_in(normalise_words(plan.prompt, dict(plan.word_normalisation))))
        things, legible = things * (things > 1), config.legible
    passes = [len(guidance.branches_at(sigma)) + things * (sigma < legible)
              for sigma in sigmas.tolist()[:-1]]
    split = sigma_split(plan, sigmas, folder) if plan.temporal_upsampling > 1 else len(passes)
    return sum(passes[:split]), sum(passes[split:])


def _conditions(
    folder: ModelFolder, plan: Plan, request: Request, frames: int, in_place: int, later: int
) -> tuple[int, list[tuple[int, int]]]:
    """Count a window's latent frames of stills; list (frames, rate) of all that it encodes.

    `in_place` stills are the window's first frame, `later` ones follow it.
    """
    references, still, once = len(request.reference), (1, 1), (frames, 1)
    each = [once] if plan.temporal_upsampling == 1 else [once, (frames, plan.temporal_upsampling)]
    whole = list[tuple[int, int]]()
    if request.strength is not None:
        whole += each if settles(plan, sigmas_of(plan), folder) else each[1:]
    match folder.conditioning:
        case "tokens":
            whole += each * (request.mask is not None)
            return later + references, whole + [still] * (in_place + later + references)
        case "channels":
            return 0, [*whole, once]
        case "control":
            return references, [*whole, once, once] + [still] * references
        case _:
            return 0, whole


def _beginning(folder: ModelFolder, plan: Plan, path: str) -> tail.Beginning:
    """Return a clip's beginning with latents on the meta device."""
    ending = read_ending(path)
    begun = tail.tail_of(ending, folder, plan)
    if not isinstance(begun, str):
        return begun
    t, count = folder.components["vae"].config.strides.t, ending.frames_at(plan.fps)
    num_latents = 1 + (count - 1) // t
    latents = torch.empty(1, 1, min(tail.TAIL_FRAMES, num_latents), 1, 1, device="meta")
    return tail.Beginning(latents, count, num_latents, hand_over="pixels")


def transformer_bytes(
    config: DiTConfig, tokens: int, itemsize: int, *, blocked: bool, timed_tokens: bool = False
) -> int:
    """Count the peak of one forward pass over L tokens, without the weights.

    `blocked` attention holds the scores of a block of queries, see `ops.attention`; with
    `timed_tokens` each token has its own modulation.
    """
    width = config.hidden_dim
    # tokens before all blocks and before this one, normed, mixed, crossed, summed, normed again;
    # then the feed-forward's hidden ones, or a gate's in float32
    held = 7 * width * itemsize + max(2 * config.ffn_dim * itemsize, (12 + itemsize) * width)
    held += 4 * config.head_dim + (24 * width if timed_tokens else 0)
    scores = 8 * min(_BLOCK * tokens, tokens**2, _MAX_SCORES) if blocked else 0
    largest = itemsize * width * max(config.ffn_dim, width)  # a weight in the kernel's own order
    return tokens * held + scores + largest


def vae_bytes(
    config: VAEConfig, rows: int, columns: int, itemsize: int, *, decode: bool, whole: bool = True,
    fused: bool = False, tiles: Tiles | None = None, rate: int = 1,
) -> int:
    """Count the peak of the decoder or encoder in a stream; see `vae_parts`.

    A single frame isn't `whole`. `fused` norms write straight into a convolution's input, see
    `ops.native`. Memory that tiles keep between their turns isn't included.
    """

    def kept(part: VAEPart) -> int:
        return 2 * sum(part.inputs) * part.pixels

    def live(part: VAEPart) -> int:
        # a block's input, what is normed, what the kernel is given after two frames of history,
        # what it makes
        frames, widest = part.frames if whole else 1, max(part.inputs)
        read = widest * (frames * (3 if fused else 5) + 4)
        return part.pixels * (read + 2 * frames * part.width)

    middle, parts = vae_parts(config, rows, columns, decode=decode, tiles=tiles, rate=rate)
    inside = sum(map(kept, parts)) + max(map(live, parts))
    if tiles is not None:  # what waits for a tile's turn, and what they put together
        frames = config.strides.t // rate if whole else 1
        picture = 3 * rows * columns * config.strides.hw**2 * frames
        inside += (AT_ONCE if whole else 1) * (middle.width * rows * columns + picture)
    return itemsize * (kept(middle) + max(live(middle), inside))


def sound_bytes(config: AudioVAEConfig, latents: int, itemsize: int) -> int:
    """Count the sound decoder's peak for `latents` that it decodes at a time."""
    # its output and spectra, in float32 and float64, and windows of samples; with gains for tones
    # and for noise, twice
    each = config.num_bins * 28 + (2 if config.gains_per_frame else 1) * 20 * config.window
    each = max(each, 7 * config.decoder_dim * itemsize)
    return latents * config.frames_per_token * each + 8 * NOISE_FRAMES * config.num_bins


def estimate(
    folder: ModelFolder, plan: Plan, request: Request, setup: Setup, *, count: int = 1
) -> Estimate:
    """Estimate a generation of `count` clips from a model's file headers alone.

    Time is by the rates measured earlier, or else those of a typical machine.
    """
    clip, stages, freed = _Clip(folder, plan, request, setup), list[StageEstimate](), 0
    for name, once_s, live, roles in clip.stages():
        seconds, quantize = once_s, setup.quantize or "none"
        if setup.offload == "none":
            held = clip.loader.needed_bytes(quantize=quantize)
        else:
            seconds += sum(map(clip.load_s, roles))
            held = max((clip.loader.needed_bytes(role, quantize=quantize) for role in roles),
                       default=0)
        if clip.on_cpu:
            held += KERNELS_BYTES + min(int(freed + HOLES * (freed + live)), MOST_KEPT)
            freed += live
        times = 1 if name in ("load", "text") else count
        stages.append(StageEstimate(name, times * seconds, held + live))
    measured = clip.rates is not NOMINAL
    notes = {
        "the first frame's own generation is not counted": request.first_frame_model,
        "adapters are not counted": request.lora,
        "sound by --audio-model is not counted": request.audio_model,
        f"upper bound: the steps that --cache {request.cache} skips depend on the clip":
            request.cache != "none",
        "estimate for a typical machine; run vidgen plan to calibrate": not measured,
    }
    return Estimate(tuple(stages), setup, count * clip.passes.kept, measured,
                    tuple(note for note, holds in notes.items() if holds))


class _Clip:
    """Seconds and bytes of each stage of one clip, the weights' left out."""

    def __init__(self, folder: ModelFolder, plan: Plan, request: Request, setup: Setup) -> None:
        self.folder, self.plan, self.request, self.setup = folder, plan, request, setup
        self.on_cpu, self.dtype = setup.device.type == "cpu", DTYPES[setup.dtype]
        self.loader = ModelLoader(folder, setup.device, self.dtype, setup.offload, setup.quantize)
        self.vae: VAEConfig = folder.components["vae"].config
        self.dit: DiTConfig = folder.components["transformer"].config
        self.rates = known_rates(folder, setup.device, self.dtype) or NOMINAL
        self.passes = count_passes(folder, plan, request)
        self.grid, self.pixels = (plan.latents.height, plan.latents.width), plan.width * plan.height
        self.frame_tokens = math.prod(self.grid) // self.dit.patch_size**2
        longest = max(len(text.encode()) for text in (plan.prompt, plan.negative))
        self.text_tokens = min(longest // 4 + 2, self.dit.text_len)  # about four bytes each
        self.longest = max((window.frames for window in self.passes.windows), default=0)
        drawn = max((window.drawn for window in self.passes.windows), default=0)
        self.tokens = drawn * self.frame_tokens + self.followed(self.longest)

    def stages(self) -> Iterator[tuple[str, float, int, Sequence[Role]]]:
        """Yield each stage's name, seconds, live bytes, and the networks that it runs in turn."""
        windows, sounds = self.passes.windows, makes_sound(self.request, self.folder.tasks)
        loads = sum(map(self.load_s, self.folder.components))
        yield "load", BUILDING_S + loads * (self.setup.offload == "none"), 0, ()
        yield "text", *self.text(sounds), ("text_encoder",)
        yield "prepare", *self.prepare(), ("vae",) if self.passes.encoded else ()
        audio = bool(self.request.follow_audio)
        alone = boundary_of(self.folder, self.plan, has_audio=audio) is None
        yield "denoise", *self.denoise(), EXPERTS[: 1 if alone else 2] * len(windows)
        if sounds:
            yield "sound", *self.sound(), (*EXPERTS[:1] * len(windows), "sound_vae")
        yield "decode", *self.decode(), ("vae",)

    def text(self, sounds: bool) -> tuple[float, int]:
        """Count the prompt's encoding, and the negative one's."""
        encoder, tokens = self.folder.components["text_encoder"], self.text_tokens
        config = encoder.config
        plan = sound_plan(self.plan, self.folder.defaults) if sounds else self.plan
        once = network_flops(encoder, tokens, without="shared.").seconds(self.rates)
        wide = 4 * tokens * max(config.ffn_dim * 3, config.hidden_dim * 6)
        live = wide + 8 * config.num_heads * tokens**2
        return once * (1 if plan.guidance.is_off else 2), live

    def prepare(self) -> tuple[float, int]:
        """Count the encoding of given pictures and clips."""
        passes, shown, live = self.plan.encode_passes, self.passes.shown, 0
        seconds = self.vae_s(shown, self.plan.temporal_upsampling) if shown else 0.0
        for frames, rate in self.passes.encoded:
            latents = 1 + (frames - 1) * rate // self.vae.strides.t
            seconds += passes * self.vae_s(latents, rate, decode=False)
            # later passes decode the latents and encode the result at the same time
            held = sum(self.vae_bytes(rate, decode=decode, whole=frames > 1)
                       for decode in (False, True)[: min(passes, 2)])
            # the clip as floats, twice while it is scaled, and in the VAE's dtype
            each = 9 + self.loader.dtype_of("vae").itemsize
            live = max(live, held + 3 * frames * self.pixels * each)
        return seconds, live

    def denoise(self) -> tuple[float, int]:
        seconds = sum(window.above * self.pass_s(window.frames)
                      + window.below * self.pass_s(window.drawn) for window in self.passes.windows)
        guidance = self.plan.guidance
        branches = 1 + (not guidance.is_off) + (guidance.reference_scale > 0)
        cached = branches * TENSORS_HELD[self.request.cache.partition(":")[0]]
        timed = self.request.mask is not None and self.folder.conditioning == "tokens"
        live = cached * self.tokens * self.dit.hidden_dim * self.dtype.itemsize
        return seconds, live + self.pass_bytes(self.tokens, timed_tokens=timed)

    def sound(self) -> tuple[float, int]:
        """Count the model's own sound: all candidates drawn together, one of which is kept.

        Each window's picture passes once, its sounds pass at every step.
        """
        vae, windows = self.folder.components["sound_vae"], self.passes.windows
        takes = drawn_at_once(self.plan.sound_candidates,
                              is_seen=ONSET_DETECTOR in self.folder.components)
        whole, sounds = map(self.sound_latents, (self.passes.decoded, self.longest))
        decoded = network_flops(vae, whole * vae.config.frames_per_token, without="encoder.")
        seconds = (1 if takes == 1 else 1 + takes) * decoded.seconds(self.rates)
        plan = sound_plan(self.plan, self.folder.defaults)
        passes = sum(len(plan.guidance.branches_at(s)) for s in sigmas_of(plan).tolist()[:-1])
        for window in windows:
            sound_flops = transformer_flops(
                self.dit, 0, 0, self.text_tokens, sound_tokens=self.sound_latents(window.frames),
                seen=window.drawn * self.frame_tokens)
            seconds += self.pass_s(window.drawn) + passes * takes * sound_flops.seconds(self.rates)
        # keys and values of the picture, copied for each take
        layer = 2 * self.tokens * self.dit.hidden_dim * self.dtype.itemsize
        listening = self.dit.num_layers * layer + max(
            self.pass_bytes(self.tokens), self.pass_bytes(takes * sounds) + takes * layer)
        at_once = max(min(whole, SOUND_AT_ONCE), takes * sounds if takes > 1 else 0)
        itemsize = self.loader.dtype_of("sound_vae").itemsize
        return seconds, max(listening, sound_bytes(vae.config, at_once, itemsize))

    def decode(self) -> tuple[float, int]:
        """Count decoding; the frames are encoded at the same time, which takes less."""
        plan = self.plan
        seconds = self.vae_s(plan.rate.num_upsampled(self.passes.decoded), plan.temporal_upsampling)
        live = self.vae_bytes(plan.temporal_upsampling, decode=True, whole=plan.num_frames > 1)
        # a chunk's frames: as floats, as bytes, and queued for the encoder
        live += 3 * self.pixels * (self.vae.strides.t // plan.temporal_upsampling) * 12
        live += ENCODER_BYTES + ENCODER_BYTES_PER_PIXEL * self.pixels if self.on_cpu else 0
        return seconds, live

    def load_s(self, role: Role) -> float:
        """Return the time to load a network's weights; 0 if they are streamed in each pass."""
        streamed = self.setup.offload == "block" and role in STREAMED
        size = self.folder.components[role].tensors.num_bytes
        return 0.0 if streamed else size / LOAD_BYTES_PER_S

    def pass_s(self, frames: int) -> float:
        seconds = transformer_flops(
            self.dit, frames, self.frame_tokens, self.text_tokens,
            sound_tokens=self.followed(frames)).seconds(self.rates)
        read_s = self.folder.components["transformer"].tensors.num_bytes / LOAD_BYTES_PER_S
        if self.setup.offload == "block":  # a GPU computes while blocks load
            return seconds + read_s if self.on_cpu else max(seconds, read_s)
        return seconds + read_s if self.setup.quantize else seconds  # dequantised

    def pass_bytes(self, tokens: int, *, timed_tokens: bool = False) -> int:
        blocked = used_backend("auto", self.setup.device, self.dtype) == "blocked"
        return transformer_bytes(self.dit, tokens, self.dtype.itemsize, blocked=blocked,
                                 timed_tokens=timed_tokens)

    def vae_s(self, frames: int, rate: int, *, decode: bool = True) -> float:
        return vae_flops(self.vae, frames, *self.grid, decode=decode, tiles=self.setup.tiles,
                         rate=rate).seconds(self.rates)

    def vae_bytes(self, rate: int, *, decode: bool, whole: bool) -> int:
        dtype = self.loader.dtype_of("vae")
        fused = self.on_cpu and dtype in native.known_dtypes()
        return vae_bytes(self.vae, *self.grid, dtype.itemsize, decode=decode, whole=whole,
                         fused=fused, tiles=self.setup.tiles, rate=rate)

    def followed(self, frames: int) -> int:
        """Count the tokens of a sound that the picture follows."""
        return self.sound_latents(frames) if self.request.follow_audio and frames else 0

    def sound_latents(self, frames: int) -> int:
        if "sound_vae" not in self.folder.components:
            return 0
        rate = self.folder.components["sound_vae"].config.tokens_per_s
        begin, end, _ = sound_span(0, frames, self.vae.strides.t, self.plan.fps, rate)
        return end - begin
