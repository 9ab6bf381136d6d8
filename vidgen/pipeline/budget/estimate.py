"""What each stage of a generation takes, counted from configs and the files' headers.

See `workload` for the counts and `calibration` for the machine's rates.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from vidgen.diffusion.schedule import make_sigmas
from vidgen.diffusion.sound import sound_span
from vidgen.media.write import PIXELS_PER_BYTE
from vidgen.ops import native
from vidgen.ops.attention import used_backend
from vidgen.ops.linear import packs
from vidgen.pipeline.budget.calibration import NOMINAL, Calibration, cached_calibration
from vidgen.pipeline.budget.passes import count_passes
from vidgen.pipeline.budget.stages import Estimate, Setup, Stage
from vidgen.pipeline.budget.workload import (
    Op,
    image_ops,
    listening_ops,
    refine_bytes,
    sound_bytes,
    sound_ops,
    text_ops,
    transformer_bytes,
    transformer_ops,
    vae_bytes,
    vae_ops,
)
from vidgen.pipeline.parts import DTYPES, EXPERTS, Parts
from vidgen.pipeline.plan import Plan
from vidgen.pipeline.sound.own_sound import AT_ONCE as SOUND_AT_ONCE
from vidgen.pipeline.sound.own_sound import sound_plan
from vidgen.pipeline.step_caches import TENSORS_HELD
from vidgen.pipeline.tasks import makes_sound
from vidgen.weights.component import fp32_parts
from vidgen.weights.load import Weights

if TYPE_CHECKING:
    from vidgen.core.request import Request
    from vidgen.weights.component import Role
    from vidgen.weights.folder import ModelFolder

KERNELS_BYTES = 52_000_000
"""What torch's kernels, thread pools and allocator take on a CPU once they have been used."""
BUILDING_S = 0.06
"""To make the networks' modules, empty."""
ENCODER_BYTES = 6_000_000
ENCODER_BYTES_PER_PIXEL = 200
"""Of a video encoder: x264 holds some dozens of planes."""
REFINE_PASSES = 2.5
"""Of the decoder, that a step of `refine_first` takes the time of."""
STATE_TENSORS = 4
"""Of a window's latents that a sampler goes on from, at most."""
_HOLES, _MOST_HOLES = 0.5, 150_000_000
"""Share of live memory that stays in holes between blocks, as measured; glibc gives those from
32 MB on back at once, so that holes stop growing."""
Rates = Mapping[torch.dtype, Calibration]
"""By the dtype that they were measured in."""


def estimate(
    folder: ModelFolder, plan: Plan, request: Request, setup: Setup, *,
    rates: Rates | None = None, suffix: str = ".mp4",
) -> Estimate:
    """What a generation takes, from a model's headers.

    Args:
        folder: the model.
        plan: of the clip.
        request: whose conditions and count are meant.
        setup: where and how it runs.
        rates: the machine's; where one is missing, what the cache has, else an ordinary machine's.
        suffix: of the output.
    """
    return _Job(folder, plan, request, setup, rates or {}, suffix).estimate()


class _Job:
    """One generation, taken apart."""

    def __init__(
        self, folder: ModelFolder, plan: Plan, request: Request, setup: Setup,
        rates: Rates, suffix: str,
    ) -> None:
        self.folder, self.plan, self.request, self.setup = folder, plan, request, setup
        self.suffix, self.dtype = suffix, DTYPES[setup.dtype]
        # quantised sizes are asked for below; torchao isn't needed to know them
        self.parts = Parts(folder, setup.device, self.dtype, setup.offload)
        self.vae = folder.components["vae"].config
        self.vae_dtype = self.parts.dtype_of("vae")
        self.rates, self.vae_rates = (
            rates.get(dtype) or cached_calibration(setup.device, dtype) or NOMINAL
            for dtype in (self.dtype, self.vae_dtype)
        )
        self.dit = folder.components["transformer"].config
        self.on_cpu = setup.device.type == "cpu"
        self.rows, self.columns = plan.latents.height, plan.latents.width
        self.passes = count_passes(folder, plan, request)

    def estimate(self) -> Estimate:
        text_s, denoise_s, decode_s = self._text_s(), self._denoise_s(), self._decode_s()
        prepare_s, count = self._prepare_s(), self.request.count
        load_s = {role: self._load_s(role) for role in self.folder.components}
        load = BUILDING_S + sum(load_s.values())
        if self.setup.offload != "none":  # each comes when it is used, the VAE twice
            text_s += load_s["text_encoder"]
            experts_s = sum(s for role, s in load_s.items() if role.startswith("transformer"))
            denoise_s += experts_s * len(self.passes.windows)
            if self.passes.encoded:
                prepare_s += load_s["vae"] + load_s.get("image_encoder", 0.0)
            decode_s, load = decode_s + load_s["vae"], BUILDING_S
        mux_s = self._mux_s(decode_s)
        text_b = self._held(("text_encoder",), self._text_bytes())
        prepare_b = self._held(("vae", "image_encoder") if self.passes.encoded else (),
                               self._prepare_bytes())
        denoise_b = self._held(("transformer", "transformer_2"), self._denoise_bytes())
        decode_b = self._held(("vae",), self._decode_bytes())
        stages = (
            Stage("text", text_s, text_b), Stage("prepare", count * prepare_s, prepare_b),
            Stage("denoise", count * denoise_s, denoise_b), *self._sound(count),
            Stage("decode", count * decode_s, decode_b), Stage("mux", count * mux_s, decode_b),
        )
        load_b = self._held((), 0)
        load += self._fresh_s(max(load_b, *(stage.bytes for stage in stages)))  # once, for all
        return Estimate(
            (Stage("load", load, load_b), *stages), self.setup, encoder_s=count * self._encoder_s(),
            kept_frames=count * self.passes.kept, disk_bytes=count * self._disk_bytes(),
            measured=self._measured, notes=self._notes(),
        )

    def _fresh_s(self, num_bytes: int) -> float:
        """To be given so much memory."""
        return self.rates.seconds([Op("fresh", 1, num_bytes)]) if self.on_cpu else 0.0

    def _sound(self, count: int) -> tuple[Stage, ...]:
        """The stage of the model's own sound, where it makes any."""
        if not self._makes_sound:
            return ()
        latents = self._sound_latents(self.passes.decoded)
        config = self.folder.components["sound_vae"].config
        dtype = self.parts.dtype_of("sound_vae")
        candidates = self.plan.sound_candidates
        decodes = 1 if candidates == 1 else 1 + candidates  # each to be compared, one to be heard
        seconds = decodes * self.rates.seconds(sound_ops(config, latents)) + self._listening_s()
        if self.setup.offload != "none":
            seconds += self._load_s("sound_vae")
            seconds += self._load_s("transformer") * len(self.passes.windows)
        compared = 0 if candidates == 1 else candidates * self._window_sound_latents
        at_once = max(min(latents, SOUND_AT_ONCE), compared)
        active = sound_bytes(config, at_once, dtype.itemsize)
        held = max(
            self._held(("transformer",), self._listening_bytes()),
            self._held(("sound_vae",), self._resident(active)),
        )
        return (Stage("sound", count * seconds, held),)

    def _listening_s(self) -> float:
        """To denoise the sound: each window's picture passes once, its sounds at every step."""
        audio, plan = self.dit.audio, sound_plan(self.plan, self.folder.defaults)
        assert audio is not None
        sigmas = make_sigmas(plan.num_steps, plan.shift).tolist()[:-1]
        seconds = 0.0
        for frames in self.passes.windows:
            tokens, seen = self._sound_latents(frames), frames * self._frame_tokens
            branches = [
                self.rates.seconds(listening_ops(
                    self.dit, audio, tokens, tokens + keys, self._text_tokens + 1,
                    plan.sound_candidates,
                ))
                for keys in (seen, 0)  # the negative pass hears itself alone
            ]  # fmt: skip
            seconds += self._pass_s(frames, 0)
            seconds += sum(sum(branches[: len(plan.guidance.branches_at(s))]) for s in sigmas)
        return seconds

    def _listening_bytes(self) -> int:
        """Keys and values of the picture, and what its own pass or that of its sounds holds."""
        tokens, takes = self._tokens, self.plan.sound_candidates
        one_layer = 2 * tokens * self.dit.hidden_dim * self.dtype.itemsize
        listening = self._passing_bytes(takes * self._window_sound_latents)
        listening += takes * one_layer  # each sees a copy
        return self.dit.num_layers * one_layer + max(self._passing_bytes(tokens), listening)

    @property
    def _window_sound_latents(self) -> int:
        """Sound latents beside the longest window."""
        return self._sound_latents(max(self.passes.windows))

    def _sound_latents(self, frames: int) -> int:
        """Sound latents beside so many latent frames of the picture."""
        rate = self.folder.components["sound_vae"].config.tokens_per_s
        begin, end, _ = sound_span(0, frames, self.vae.strides.t, self.plan.fps, rate)
        return end - begin

    @property
    def _makes_sound(self) -> bool:
        """Whether the model's own sound follows the picture."""
        return makes_sound(self.request, self.folder.tasks) and self.plan.roll is None

    @property
    def _measured(self) -> bool:
        return self.rates.measured and self.vae_rates.measured

    def _notes(self) -> tuple[str, ...]:
        notes = []
        if self.request.first_frame_model:
            notes.append("drawing the first frame is not counted")
        if self.request.lora:
            notes.append("adapters are not counted")
        if self.request.audio_model:
            notes.append("the sound by --audio-model is not counted")
        if self.request.cache != "none":
            notes.append(f"up to this: how many steps --cache {self.request.cache} spares depends "
                         "on the clip")
        if not self._measured:
            notes.append("this machine was not measured: `vidgen plan` does")
        return tuple(notes)

    @property
    def _text_tokens(self) -> int:
        """About how many tokens a prompt has: four bytes each."""
        longest = max(len(text.encode()) for text in (self.plan.prompt, self.plan.negative))
        return min(longest // 4 + 2, self.dit.text_len)

    @property
    def _frame_tokens(self) -> int:
        return self.rows * self.columns // self.dit.patch_size**2

    def _num_passes(self, *, has_given: bool) -> int:
        """Forward passes of all steps of a window."""
        plan = self.plan
        guidance = plan.guidance.of_clip(has_given=has_given and plan.strength == 1)
        sigmas = make_sigmas(plan.num_steps, plan.shift, strength=plan.strength).tolist()[:-1]
        remembered = plan.roll is not None  # a turn is read once more
        return sum(len(guidance.branches_at(sigma)) for sigma in sigmas) + remembered

    def _text_s(self) -> float:
        ops = text_ops(self.folder.components["text_encoder"].config, self._text_tokens)
        asked = self.plan
        if self._makes_sound:
            asked = sound_plan(self.plan, self.folder.defaults)
        return self.rates.seconds(ops) * (1 if asked.guidance.is_off else 2)

    def _prepare_s(self) -> float:
        seconds = 0.0
        for frames in self.passes.encoded:
            latent = 1 + (frames - 1) // self.vae.strides.t
            seconds += self.vae_rates.seconds(
                vae_ops(self.vae, latent, self.rows, self.columns, decode=False,
                        tiles=self.setup.tiles)
            )
        if self._num_refined:
            passes = self._num_refined * (1 + REFINE_PASSES * self.plan.refine_steps)
            seconds += passes * self._decoding_s(1)
        if self.passes.shown:
            seconds += self._decoding_s(self.passes.shown)
        encoder = self.folder.components.get("image_encoder")
        if encoder is not None:
            seconds += self.rates.seconds(image_ops(encoder.config))
        return seconds

    @property
    def _num_refined(self) -> int:
        """First frames that gradients go back to; none in tiles."""
        taken = self.plan.refine_steps and self.setup.tiles is None
        return self.passes.refined if taken else 0

    def _denoise_s(self) -> float:
        encoder = self.folder.components.get("image_encoder")
        image_tokens = 0 if encoder is None else encoder.config.num_tokens
        return sum(
            self._pass_s(frames, image_tokens) * self._num_passes(has_given=has_given)
            for frames, has_given in zip(self.passes.windows, self.passes.has_given, strict=True)
        )

    def _pass_s(self, frames: int, image_tokens: int) -> float:
        """One forward pass over so many latent frames, stills included."""
        one = self.rates.seconds(transformer_ops(
            self.dit, frames, self._frame_tokens, self._text_tokens,
            controlled=bool(self.dit.control_layers), image_tokens=image_tokens,
            sound_tokens=self._sound_latents(frames) if self.request.follow_audio else 0,
        ))
        if self.setup.offload == "block":  # blocks come while others compute, of a CPU's own time
            read_s = self._read_s("transformer")
            one = one + read_s if self.on_cpu else max(one, read_s)
        elif self.setup.quantize:  # each weight is widened when it is used
            one += self.rates.seconds([Op("load", 1, 3 * self._size("transformer"))])
        return one

    def _decode_s(self) -> float:
        return self._decoding_s(self.passes.decoded)

    def _decoding_s(self, frames: int) -> float:
        return self.vae_rates.seconds(
            vae_ops(self.vae, frames, self.rows, self.columns, decode=True,
                    tiles=self.setup.tiles)
        )

    def _encoder_s(self) -> float:
        """Work of the video encoder, on one core."""
        kind, pixels = f"write{self.suffix}", self.plan.width * self.plan.height
        kind = kind if kind in self.rates.rates else "write.mp4"
        return self.passes.kept * pixels / self.rates.rate(kind, pixels)

    def _disk_bytes(self) -> int:
        """At most, of the file and its journal, all but sound.

        That keeps the film in segments, float32 latents by windows and as a whole, and the
        sampler's state, of which a new one lies beside the old until it is whole.
        """
        film = self.plan.width * self.plan.height * self.passes.kept // PIXELS_PER_BYTE
        whole = math.prod(self.plan.latents.dims)
        window = whole * max(self.passes.windows, default=0) // self.plan.latents.num_frames
        return 2 * (film + 4 * (whole + STATE_TENSORS * window + self._remembered()))

    def _mux_s(self, decode_s: float) -> float:
        """What writing adds to decoding, which it runs beside."""
        work, cores = self._encoder_s(), os.cpu_count() or 1
        shared = decode_s * torch.get_num_threads() if self.on_cpu else 0.0
        wall = max(decode_s, work / min(4, cores), (shared + work) / cores)
        # the last frames come when nothing is left to decode
        last = min(self.vae.strides.t, self.passes.kept) / self.passes.kept
        return max(wall - decode_s, work * last)

    def _size(self, role: Role) -> int:
        quantize = self.setup.quantize or "none"
        return self.parts.needed_bytes(role, offload="stage", quantize=quantize)

    def _read_s(self, role: Role) -> float:
        bytes_read = self.folder.components[role].store.num_bytes
        return self.rates.seconds([Op("load", 1, bytes_read)])

    def _load_s(self, role: Role) -> float:
        if self.setup.offload == "block" and role != "vae":
            return 0.0
        read = 0.0 if self._mapped(role) else self._read_s(role)
        if self._packed(role):  # each weight is laid out anew, about as fast as it is read
            read += self.rates.seconds([Op("load", 1, self._size(role))])
        return read

    def _mapped(self, role: Role) -> bool:
        component = self.folder.components[role]
        dtype = self.parts.dtype_of(role, self.dtype)
        weights = Weights(component.store, dtype, fp32_parts(role, dtype), component.names)
        changed = self.setup.quantize or self._packed(role)
        return self.on_cpu and not changed and weights.stay_mapped

    def _packed(self, role: Role) -> bool:
        """Whether a network's weights are laid out anew while it is loaded, see `Parts`."""
        return role in EXPERTS and self.on_cpu and not self.setup.quantize and packs(self.dtype)

    def _untouched(self, role: Role) -> int:
        """Bytes of mapped weights that this generation never reads: they aren't brought in."""
        idle = {"vae": () if self.passes.encoded else ("encoder.",), "text_encoder": ("shared.",)}
        component, dtype = self.folder.components[role], self.parts.dtype_of(role, self.dtype)
        if not idle.get(role) or not self._mapped(role):
            return 0
        return sum(
            torch.Size(component.store.shape(name)).numel() * dtype.itemsize
            for name in component.store.names
            if component.names.get(name, name).startswith(idle[role])
        )

    def _held(self, roles: Sequence[str], active: int) -> int:
        """Weights in memory while `roles` work one after the other, and what they hold."""
        present = [role for role in self.folder.components if role in roles]
        offload, quantize = self.setup.offload, self.setup.quantize or "none"
        if offload == "none":
            weights = sum(self._size(role) - self._untouched(role)
                          for role in self.folder.components)
        else:
            sizes = [self.parts.needed_bytes(role, offload=offload, quantize=quantize)
                     - self._untouched(role) for role in present]
            weights = max(sizes, default=0)
        return weights + active + (KERNELS_BYTES if self.on_cpu else 0)

    def _resident(self, live: int) -> int:
        """Live memory as the system sees it."""
        return live + int(min(_HOLES * live, _MOST_HOLES)) if self.on_cpu else live

    def _text_bytes(self) -> int:
        config = self.folder.components["text_encoder"].config
        tokens = self._text_tokens
        wide = 4 * tokens * max(config.ffn_dim * 3, config.hidden_dim * 6)
        return wide + 8 * config.num_heads * tokens**2

    @property
    def _fused(self) -> bool:
        return self.on_cpu and self.vae_dtype in native.known_dtypes()

    def _prepare_bytes(self) -> int:
        if not self.passes.encoded:
            return 0
        longest, itemsize = max(self.passes.encoded), self.vae_dtype.itemsize
        pixels = self.plan.width * self.plan.height
        live = vae_bytes(
            self.vae, self.rows, self.columns, itemsize, decode=False, whole=longest > 1,
            fused=self._fused, tiles=self.setup.tiles,
        )
        if self._num_refined:
            kept = refine_bytes(self.vae, self.rows, self.columns, itemsize)
            live = max(live, kept)
        # the clip as floats, twice while it is scaled, and in the VAE's dtype
        return self._resident(live) + 3 * longest * pixels * (9 + itemsize)

    @property
    def _tokens(self) -> int:
        """Tokens of the largest window."""
        frames = max(self.passes.windows, default=0)
        followed = self._sound_latents(frames) if frames and self.request.follow_audio else 0
        return frames * self._frame_tokens + followed

    def _remembered(self) -> int:
        """Values that a step cache holds."""
        branches = 1 if self.plan.guidance.is_off else 2
        held = branches * TENSORS_HELD[self.request.cache.partition(":")[0]] * self._tokens
        return held * self.dit.hidden_dim

    def _denoise_bytes(self) -> int:
        timed = self.request.mask is not None and self.folder.conditioning == "tokens"
        passing = self._passing_bytes(self._tokens, timed_tokens=timed)
        return self._remembered() * self.dtype.itemsize + passing

    def _passing_bytes(self, tokens: int, *, timed_tokens: bool = False) -> int:
        """What one pass of the transformer holds beside its weights."""
        backend = used_backend("auto", self.setup.device, self.dtype)
        return transformer_bytes(
            self.dit, tokens, self.dtype.itemsize, blocked=backend == "blocked",
            timed_tokens=timed_tokens,
        )

    def _decode_bytes(self) -> int:
        plan = self.plan
        live = vae_bytes(
            self.vae, self.rows, self.columns, self.vae_dtype.itemsize, decode=True,
            whole=plan.num_frames > 1, fused=self._fused, tiles=self.setup.tiles,
        )
        pixels = plan.width * plan.height
        frames = 3 * pixels * self.vae.strides.t * 12  # of a chunk: floats, bytes, in the slot
        encoder = ENCODER_BYTES + ENCODER_BYTES_PER_PIXEL * pixels if self.on_cpu else 0
        return self._resident(live) + frames + encoder
