"""Estimate a generation's memory and time, stage by stage.

Weights are counted from the files' headers, activations from the architectures, as the tensors
alive at a stage's peak. A clip's work (windows to denoise, frames to encode and decode) follows
from its plan and request alone; `timing` converts it to seconds.

Axes: L tokens, D width.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from vidgen.core.shapes import Tiles
from vidgen.diffusion.state import sound_span
from vidgen.media.ending import read_ending
from vidgen.media.write import PIXELS_PER_BYTE
from vidgen.models.audio_spectra import NOISE_FRAMES, AudioVAEConfig
from vidgen.models.dit_types import DiTConfig
from vidgen.models.tokenizer import read_as
from vidgen.models.vae import VAEConfig
from vidgen.models.vae_tiles import AT_ONCE
from vidgen.ops import native
from vidgen.ops.attention import _BLOCK, _MAX_SCORES, used_backend
from vidgen.pipeline.denoise import boundary_of, settles, sigma_split, sigmas_of
from vidgen.pipeline.loader import DTYPES, EXPERTS, STREAMED, ModelLoader
from vidgen.pipeline.long import tail
from vidgen.pipeline.settings import makes_sound
from vidgen.pipeline.sound.own_sound import AT_ONCE as SOUND_AT_ONCE
from vidgen.pipeline.sound.own_sound import drawn_at_once, sound_plan
from vidgen.pipeline.step_caches import TENSORS_HELD
from vidgen.pipeline.timing import (
    LOAD_BYTES_PER_S,
    NOMINAL,
    WRITE_PIXELS_PER_S,
    Rates,
    VAEPart,
    known_rates,
    listening_ops,
    network_ops,
    transformer_ops,
    vae_ops,
    vae_parts,
)
from vidgen.pipeline.types import Estimate, Offload, Plan, Setup, StageEstimate

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
STATE_TENSORS = 4
"""Largest number of tensors of a window's size in a sampler's state."""
BUILDING_S = 0.4
"""Time to create the networks' empty modules, with Python's imports."""
REFINE_PASSES = 2.5
"""Time of a step of `refine_first`, in passes of the decoder."""


class Window(NamedTuple):
    """Work of one window: one run of the sampler."""

    frames: int  # latent frames at or above the boundary, stills included
    drawn: int  # latent frames below the boundary, stills included
    above: int  # forward passes over `frames`
    below: int  # forward passes over `drawn`
    has_given: bool  # whether frames are given, as guidance counts them


@dataclass(frozen=True)
class Passes:
    """The work of one clip."""

    windows: tuple[Window, ...]
    # (frames, rate) of each video or still that the VAE encodes, of all windows
    encoded: tuple[tuple[int, int], ...]
    refined: int  # first frames whose latents are refined
    decoded: int  # latent frames, without `shown`
    shown: int  # latent frames that later windows decode to continue from
    kept: int  # frames that are written


def count_passes(folder: ModelFolder, plan: Plan, request: Request) -> Passes:
    """Count the work of one clip; raise InputError if the clip to continue can't be read."""
    t, begun = folder.components["vae"].config.strides.t, tail.no_beginning(plan)
    if request.prefix is not None:
        begun = _beginning(folder, plan, os.fspath(request.prefix))
    spans = tail.windows_after(begun, plan, request, folder)
    encoded, shown, total = list[tuple[int, int]](), 0, spans[-1][1] if spans else begun.num_given
    if begun.hand_over == "pixels":
        encoded.append((1 + (begun.num_given - 1) * t, plan.oversampling))
    windows, refined, made = list[Window](), 0, begun.num_given
    for start, stop in spans:
        frames, known = 1 + (stop - start - 1) * t, made - start
        first, new_from = (begun.num_gone + start) * t, 1 + (known - 1) * t if known else 0
        new = range(first + new_from, first + frames)
        pictures = _pictures(plan, request, begins=not known, ends=stop == total, new=new)
        stills, own = _conditions(folder, plan, request, frames, *pictures)
        stills += known > 0 and tail.keeps_to_start(folder, request)
        has_given = (folder.defaults.history_noise == 0 if known else
                     sum(pictures) > 0 and request.mask is None)
        finer = plan.rate.after(start).num_upsampled(stop - start)
        windows.append(Window(stop - start + stills, finer + stills,
                              *_num_passes(folder, plan, has_given=has_given), has_given))
        if known and plan.oversampling > 1:  # the earlier frames, at the other rate
            past = max(tail.TAIL_FRAMES, (known + 1) * plan.oversampling)
            encoded.append((1 + (past // plan.oversampling - 1) * t, 1))
            shown += past
        if known and folder.conditioning == "control":  # the earlier frames, as a clip of their own
            encoded.append((frames, 1))
            shown += tail.TAIL_FRAMES
        encoded += own
        refined += pictures[0] if folder.conditioning == "tokens" else 0
        made = stop
    kept = max(plan.kept_frames - begun.num_frames, 1)
    return Passes(tuple(windows), tuple(encoded), refined, total, shown, kept)


def _num_passes(folder: ModelFolder, plan: Plan, *, has_given: bool) -> tuple[int, int]:
    """Count forward passes of a window at or above the boundary, and below it."""
    guidance = plan.guidance.of_clip(has_given=has_given and plan.strength == 1)
    sigmas, things, legible = sigmas_of(plan), 0, 0.0
    if plan.binding and not has_given:
        config = folder.components["verifier"].config
        things = len(config.labels_in(read_as(plan.prompt, dict(plan.readings))))
        things, legible = things * (things > 1), config.legible
    passes = [len(guidance.branches_at(sigma)) + things * (sigma < legible)
              for sigma in sigmas.tolist()[:-1]]
    split = sigma_split(plan, sigmas, folder) if plan.oversampling > 1 else len(passes)
    return sum(passes[:split]), sum(passes[split:])


def _pictures(
    plan: Plan, request: Request, *, begins: bool, ends: bool, new: range
) -> tuple[int, int]:
    """Count a window's given frames: those at its beginning (in place), and later ones."""
    inside = [at for seconds, _ in request.frame if (at := round(seconds * plan.fps)) in new]
    first = begins and (request.begins_with_image or bool(request.first_frame_model))
    last = ends and request.last_image is not None
    in_place = first + inside.count(0)
    return in_place, last + len(inside) - inside.count(0)


def _conditions(
    folder: ModelFolder, plan: Plan, request: Request, frames: int, in_place: int, stills: int
) -> tuple[int, list[tuple[int, int]]]:
    """Count a window's latent frames of stills; list (frames, rate) of all that it encodes."""
    references, still, once = len(request.reference), (1, 1), (frames, 1)
    each = [once] if plan.oversampling == 1 else [once, (frames, plan.oversampling)]
    whole = list[tuple[int, int]]()
    if request.strength is not None:
        whole += each if settles(plan, sigmas_of(plan), folder) else each[1:]
    match folder.conditioning:
        case "tokens":
            whole += each * (request.mask is not None)
            return stills + references, whole + [still] * (in_place + stills + references)
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


def refine_bytes(config: VAEConfig, rows: int, columns: int, itemsize: int) -> int:
    """Count the peak of backpropagation through the decoder of one frame, norms included."""
    middle, parts = vae_parts(config, rows, columns, decode=True)
    return itemsize * sum(3 * sum(part.inputs) * part.pixels for part in (middle, *parts))


def sound_bytes(config: AudioVAEConfig, latents: int, itemsize: int) -> int:
    """Count the sound decoder's peak for `latents` that it decodes at a time."""
    # its output and spectra, in float32 and float64, and windows of samples; with gains for tones
    # and for noise, twice
    each = config.num_bins * 28 + (2 if config.gains_per_frame else 1) * 20 * config.window
    each = max(each, 7 * config.decoder_dim * itemsize)
    return latents * config.frames_per_token * each + 8 * NOISE_FRAMES * config.num_bins


def estimate(
    folder: ModelFolder, plan: Plan, request: Request, setup: Setup, *,
    rates: Mapping[torch.dtype, Rates] | None = None, count: int = 1,
) -> Estimate:
    """Estimate a generation of `count` clips from a model's file headers alone.

    A dtype that `rates` lacks has the rates measured earlier, or else a typical machine's.
    """
    job = _Counting(folder, plan, request, setup, rates or {}, count)
    job.load()
    job.text()
    job.prepare()
    job.denoise()
    if job.makes_sound:
        job.sound()
    encoder_s = job.decode()
    notes = {
        "the first frame's own generation is not counted": request.first_frame_model,
        "adapters are not counted": request.lora,
        "sound by --audio-model is not counted": request.audio_model,
        f"upper bound: the steps that --cache {request.cache} skips depend on the clip":
            request.cache != "none",
        "estimate for a typical machine; run vidgen plan to calibrate": not job.measured,
    }
    return Estimate(tuple(job.stages), setup, encoder_s=count * encoder_s,
                    kept_frames=count * job.passes.kept, disk_bytes=count * job.disk(),
                    measured=job.measured,
                    notes=tuple(note for note, holds in notes.items() if holds))


class _Counting:
    def __init__(
        self, folder: ModelFolder, plan: Plan, request: Request, setup: Setup,
        rates: Mapping[torch.dtype, Rates], count: int,
    ) -> None:
        self.folder, self.plan, self.request, self.setup = folder, plan, request, setup
        self.count = count
        self.on_cpu, self.dtype = setup.device.type == "cpu", DTYPES[setup.dtype]
        # without `quantize`, which needs torchao; `weight_bytes` passes it
        self.loader = ModelLoader(folder, setup.device, self.dtype, setup.offload)
        self.vae: VAEConfig = folder.components["vae"].config
        self.dit: DiTConfig = folder.components["transformer"].config
        self.vae_dtype = self.loader.dtype_of("vae")
        self.rates, self.vae_rates = (
            rates.get(dtype) or known_rates(setup.device, dtype) or NOMINAL
            for dtype in (self.dtype, self.vae_dtype)
        )
        self.measured = self.rates.measured and self.vae_rates.measured
        self.makes_sound = makes_sound(request, folder.tasks)
        self.passes = count_passes(folder, plan, request)
        self.stages: list[StageEstimate] = []
        self.freed = 0
        self.grid, self.pixels = (plan.latents.height, plan.latents.width), plan.width * plan.height
        self.frame_tokens = math.prod(self.grid) // self.dit.patch_size**2
        longest = max(len(text.encode()) for text in (plan.prompt, plan.negative))
        self.text_tokens = min(longest // 4 + 2, self.dit.text_len)  # about four bytes each
        self.image_tokens = 0
        if "image_encoder" in folder.components:
            self.image_tokens = folder.components["image_encoder"].config.num_tokens
        frames = max((window.frames for window in self.passes.windows), default=0)
        drawn = max((window.drawn for window in self.passes.windows), default=0)
        followed = self.sound_latents(frames) if frames and request.follow_audio else 0
        self.tokens, self.longest = drawn * self.frame_tokens + followed, frames
        guidance = plan.guidance
        branches = 1 + (not guidance.is_off) + (guidance.reference_scale > 0)
        cached = TENSORS_HELD[request.cache.partition(":")[0]]
        self.remembered = branches * cached * self.tokens * self.dit.hidden_dim

    def load(self) -> None:
        all_s = sum(map(self.load_s, self.folder.components))
        self.add("load", BUILDING_S + all_s * (self.setup.offload == "none"), 0)

    def text(self) -> None:
        encoder, tokens = self.folder.components["text_encoder"], self.text_tokens
        config = encoder.config
        plan = sound_plan(self.plan, self.folder.defaults) if self.makes_sound else self.plan
        ops = network_ops(encoder, config.hidden_dim, tokens, without="shared.")
        wide = 4 * tokens * max(config.ffn_dim * 3, config.hidden_dim * 6)
        self.add("text", self.rates.seconds(ops) * (1 if plan.guidance.is_off else 2),
                 wide + 8 * config.num_heads * tokens**2, "text_encoder")

    def prepare(self) -> None:
        """Add encoding of the given pictures and clips, and refinement of first frames."""
        steps, left = self.plan.refine_steps, self.passes.refined
        left = 0 if self.setup.tiles or not steps else left
        seconds, live = left * (1 + REFINE_PASSES * steps) * self.vae_s(1, 1), 0
        if left:
            live = refine_bytes(self.vae, *self.grid, self.vae_dtype.itemsize)
        if self.passes.shown:
            seconds += self.vae_s(self.passes.shown, self.plan.oversampling)
        for frames, rate in self.passes.encoded:
            is_refined = frames == 1 and left > 0
            left -= is_refined
            again = 0 if is_refined else self.plan.encode_passes - 1
            latent = 1 + (frames - 1) * rate // self.vae.strides.t
            seconds += (1 + again) * self.vae_s(latent, rate, decode=False)
            seconds += again * self.vae_s(latent, rate)
            # later passes decode the latents and encode the result at the same time
            held = sum(self.vae_bytes(rate, decode=decode, whole=frames > 1)
                       for decode in (False, True)[: 2 if again else 1])
            # the clip as floats, twice while it is scaled, and in the VAE's dtype
            live = max(live, held + 3 * frames * self.pixels * (9 + self.vae_dtype.itemsize))
        roles: list[Role] = ["vae", "image_encoder"] if self.passes.encoded else []
        if roles and self.image_tokens:
            encoder = self.folder.components["image_encoder"]
            seconds += self.rates.seconds(
                network_ops(encoder, encoder.config.hidden_dim, self.image_tokens))
        self.add("prepare", seconds, live, *roles)

    def denoise(self) -> None:
        windows, folder = self.passes.windows, self.folder
        seconds = sum(window.above * self.pass_s(window.frames)
                      + window.below * self.pass_s(window.drawn) for window in windows)
        timed = self.request.mask is not None and folder.conditioning == "tokens"
        live = self.remembered * self.dtype.itemsize
        live += self.pass_bytes(self.tokens, timed_tokens=timed)
        alone = boundary_of(folder, self.plan, has_audio=bool(self.request.follow_audio)) is None
        self.add("denoise", seconds, live, *EXPERTS[: 1 if alone else 2] * len(windows))

    def sound(self) -> None:
        """Add the model's own sound: all candidates drawn together, one of which is kept.

        Each window's picture passes once, its sounds pass at every step.
        """
        vae, audio = self.folder.components["sound_vae"], self.dit.audio
        windows = self.passes.windows
        assert audio is not None
        takes = drawn_at_once(self.folder, self.plan.sound_candidates)
        decodes = 1 if takes == 1 else 1 + takes  # each to be scored, then the best one
        whole = self.sound_latents(self.passes.decoded)
        seconds = decodes * self.rates.seconds(network_ops(
            vae, vae.config.decoder_dim, whole * vae.config.frames_per_token, without="encoder."))
        plan = sound_plan(self.plan, self.folder.defaults)
        passes = [len(plan.guidance.branches_at(sigma)) for sigma in sigmas_of(plan).tolist()[:-1]]
        for window in windows:
            tokens, seconds = self.sound_latents(window.frames), seconds + self.pass_s(window.drawn)
            seen = tokens + window.drawn * self.frame_tokens
            for count, keys in ((len(passes), seen), (sum(passes) - len(passes), tokens)):
                seconds += count * self.rates.seconds(listening_ops(
                    self.dit, audio, tokens, keys, self.text_tokens + 1, takes))
        sounds = takes * self.sound_latents(self.longest) if windows else 0
        # keys and values of the picture, copied for each take
        layer = 2 * self.tokens * self.dit.hidden_dim * self.dtype.itemsize
        listening = self.dit.num_layers * layer + max(
            self.pass_bytes(self.tokens), self.pass_bytes(sounds) + takes * layer)
        at_once = max(min(whole, SOUND_AT_ONCE), sounds if takes > 1 else 0)
        decoding = sound_bytes(vae.config, at_once, self.loader.dtype_of("sound_vae").itemsize)
        self.add("sound", seconds, max(listening, decoding), *EXPERTS[:1] * len(windows),
                 "sound_vae")

    def decode(self) -> float:
        """Add decoding, and the time that writing adds to it; return the encoder's seconds."""
        plan, kept = self.plan, self.passes.kept
        decode_s = self.vae_s(plan.rate.num_upsampled(self.passes.decoded), plan.oversampling)
        live = self.vae_bytes(plan.oversampling, decode=True, whole=plan.num_frames > 1)
        # a chunk's frames: as floats, as bytes, and queued for the encoder
        live += 3 * self.pixels * (self.vae.strides.t // plan.oversampling) * 12
        live += ENCODER_BYTES + ENCODER_BYTES_PER_PIXEL * self.pixels if self.on_cpu else 0
        self.add("decode", decode_s, live, "vae")
        work, cores = kept * self.pixels / WRITE_PIXELS_PER_S, os.cpu_count() or 1
        shared = decode_s * torch.get_num_threads() if self.on_cpu else 0.0
        wall = max(decode_s, work / min(4, cores), (shared + work) / cores)
        # the last frames are written after decoding has ended
        added = max(wall - decode_s, work * min(self.vae.strides.t, kept) / kept)
        self.stages.append(StageEstimate("mux", self.count * added, self.stages[-1].bytes))
        return work

    def disk(self) -> int:
        """Count an upper bound of the file and its journal, without sound.

        The journal keeps the clip in segments, float32 latents of windows and of the whole clip,
        and the sampler's state, whose next version is written before the old one is removed.
        """
        film = self.pixels * self.passes.kept // PIXELS_PER_BYTE
        frames = self.plan.latents.num_frames
        whole = math.prod(self.plan.latents.dims) * self.plan.rate.num_upsampled(frames)
        state = STATE_TENSORS * whole // frames * self.longest // frames
        return 2 * (film + 4 * (whole // frames + state + self.remembered))

    def add(self, name: str, seconds: float, live: int, *roles: Role) -> None:
        """Add a stage of `seconds` per clip and `live` bytes, in which `roles` run in turn."""
        if self.setup.offload == "none":
            held = sum(map(self.weight_bytes, self.folder.components))
        else:
            present = [role for role in roles if role in self.folder.components]
            seconds += sum(map(self.load_s, present))
            held = max(map(self.weight_bytes, present), default=0)
        if self.on_cpu:
            kept = int(self.freed + HOLES * (self.freed + live))
            held += KERNELS_BYTES + min(kept, MOST_KEPT)
            self.freed += live
        count = 1 if name in ("load", "text") else self.count
        self.stages.append(StageEstimate(name, count * seconds, held + live))

    def weight_bytes(self, role: Role) -> int:
        """Count a network's weights, except parts of a mapped file that are never read."""
        offload: Offload = "block" if self.setup.offload == "block" else "stage"
        size = self.loader.needed_bytes(
            role, offload=offload, quantize=self.setup.quantize or "none")
        idle = {"text_encoder": "shared.", "vae": "-" if self.passes.encoded else "encoder."}
        weights = self.loader.weights(role, self.dtype)
        if role not in idle or not self.on_cpu or self.setup.quantize or not weights.stay_mapped:
            return size
        return size - weights.num_bytes(name for name in weights.tensors
                                        if name.startswith(idle[role]))

    def load_s(self, role: Role) -> float:
        """Return the time to load a network's weights; 0 if they are streamed in each pass."""
        streamed = self.setup.offload == "block" and role in STREAMED
        size = self.folder.components[role].tensors.num_bytes
        return 0.0 if streamed else size / LOAD_BYTES_PER_S

    def pass_s(self, frames: int) -> float:
        seconds = self.rates.seconds(transformer_ops(
            self.dit, frames, self.frame_tokens, self.text_tokens,
            controlled=bool(self.dit.control_layers), image_tokens=self.image_tokens,
            sound_tokens=self.sound_latents(frames) if self.request.follow_audio else 0,
        ))
        read_s = self.folder.components["transformer"].tensors.num_bytes / LOAD_BYTES_PER_S
        if self.setup.offload == "block":  # a GPU computes while blocks load
            return seconds + read_s if self.on_cpu else max(seconds, read_s)
        return seconds + read_s if self.setup.quantize else seconds  # dequantised

    def pass_bytes(self, tokens: int, *, timed_tokens: bool = False) -> int:
        blocked = used_backend("auto", self.setup.device, self.dtype) == "blocked"
        return transformer_bytes(self.dit, tokens, self.dtype.itemsize, blocked=blocked,
                                 timed_tokens=timed_tokens)

    def vae_s(self, frames: int, rate: int, *, decode: bool = True) -> float:
        return self.vae_rates.seconds(vae_ops(
            self.vae, frames, *self.grid, decode=decode, tiles=self.setup.tiles, rate=rate))

    def vae_bytes(self, rate: int, *, decode: bool, whole: bool) -> int:
        fused = self.on_cpu and self.vae_dtype in native.known_dtypes()
        return vae_bytes(self.vae, *self.grid, self.vae_dtype.itemsize, decode=decode, whole=whole,
                         fused=fused, tiles=self.setup.tiles, rate=rate)

    def sound_latents(self, frames: int) -> int:
        if "sound_vae" not in self.folder.components:
            return 0
        rate = self.folder.components["sound_vae"].config.tokens_per_s
        begin, end, _ = sound_span(0, frames, self.vae.strides.t, self.plan.fps, rate)
        return end - begin
