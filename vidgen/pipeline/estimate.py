"""What each stage of a generation takes, counted from configs and the files' headers.

See `workload` for the counts and `calibration` for the machine's rates.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from vidgen.core.runtime import megabytes
from vidgen.diffusion.schedule import make_sigmas
from vidgen.ops.attention import used_backend
from vidgen.pipeline.calibration import NOMINAL, Calibration, cached_calibration
from vidgen.pipeline.parts import Offload, Parts
from vidgen.pipeline.plan import Plan
from vidgen.pipeline.workload import (
    Op,
    image_ops,
    text_ops,
    transformer_bytes,
    transformer_ops,
    vae_bytes,
    vae_ops,
)
from vidgen.weights.component import fp32_parts
from vidgen.weights.load import Weights

if TYPE_CHECKING:
    from vidgen.core.request import Request
    from vidgen.weights.component import Role
    from vidgen.weights.folder import ModelFolder
    from vidgen.weights.quantize import Quantization

KERNELS_BYTES = 45_000_000
"""What torch's kernels, thread pools and allocator take on a CPU once they have been used."""
BUILDING_S = 0.06
"""To make the networks' modules, empty."""
ENCODER_BYTES = 6_000_000
ENCODER_BYTES_PER_PIXEL = 200
"""Of a video encoder: x264 holds some dozens of planes."""
_HOLES, _MOST_HOLES = 0.5, 220_000_000
"""Share of live memory that stays in holes between blocks, as measured; glibc gives those from
32 MB on back at once, so that holes stop growing."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_STAGES = {"prompt": ("text",), "prepare": ("prepare",), "sample": ("denoise",)}


@dataclass(frozen=True)
class Setup:
    """Where and how a model runs."""

    device: torch.device
    dtype: str
    offload: Offload = "none"
    quantize: Quantization | None = None

    @property
    def words(self) -> str:
        """The command line's options that give it."""
        words = [f"--dtype {self.dtype}", f"--offload {self.offload}"]
        return " ".join(words + ([f"--quantize {self.quantize}"] if self.quantize else []))


@dataclass(frozen=True)
class Stage:
    """A stage of a generation: its time, of all clips, and what it holds at its fullest."""

    name: str
    seconds: float
    bytes: int


@dataclass(frozen=True)
class Estimate:
    """What a generation will take.

    Attributes:
        stages: "load", "text", "prepare", "denoise", "decode", "mux", in order. Decoding and muxing
            overlap: "mux" is the time that it adds.
        setup: that it holds for.
        encoder_s: what encoding the video takes in all, most of it beside decoding.
        measured: False where this machine was never calibrated: then the seconds are only weights.
        notes: what is not counted.
    """

    stages: tuple[Stage, ...]
    setup: Setup
    encoder_s: float
    measured: bool
    notes: tuple[str, ...] = ()

    @property
    def total_s(self) -> float:
        """Seconds of all stages."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def peak_bytes(self) -> int:
        """Bytes above what the program has after its imports, at the fullest moment."""
        return max(stage.bytes for stage in self.stages)

    def fraction(self, stage: str, done: int, total: int, clip: int = 1, num_clips: int = 1
                 ) -> float:
        """The share of the time that lies behind, loading left out; 0 to 1.

        Args:
            stage: "prompt", "prepare", "sample", or anything else for the writing of clips.
            done: of `total` in this stage.
            total: how much there is to do in it.
            clip: which one it is about, from 1.
            num_clips: how many there are.
        """
        took = {s.name: s.seconds for s in self.stages}
        writing = ("decode", "mux")
        now = _STAGES.get(stage, writing)
        # clips are sampled one after the other, then written one after the other
        order = [("prompt", 1)]
        order += [(name, n) for n in range(num_clips) for name in ("prepare", "sample")]
        order += [("write", n) for n in range(num_clips)]
        behind, here = 0.0, (stage if stage in _STAGES else "write", clip - 1)
        for name, n in order:
            if (name, n) == here or (name == stage == "prompt"):
                break
            names = _STAGES.get(name, writing)
            behind += sum(took[s] for s in names) / (1 if name == "prompt" else num_clips)
        current = sum(took[s] for s in now) / (1 if stage == "prompt" else num_clips)
        whole = self.total_s - took["load"]
        return min((behind + current * done / max(total, 1)) / whole, 1.0) if whole else 1.0

    def as_data(self) -> dict[str, Any]:
        """JSON data."""
        return {
            "stages": [vars(stage) for stage in self.stages], "total_s": self.total_s,
            "encoder_s": self.encoder_s, "peak_bytes": self.peak_bytes, "measured": self.measured,
            "dtype": self.setup.dtype, "offload": self.setup.offload,
            "quantize": self.setup.quantize, "device": str(self.setup.device),
            "threads": torch.get_num_threads(),
            "notes": list(self.notes),
        }


def size_text(num_bytes: int) -> str:
    """A size for people."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else megabytes(num_bytes)


def estimate(
    folder: ModelFolder, plan: Plan, request: Request, setup: Setup, *,
    calibration: Calibration | None = None, parts: Parts | None = None, suffix: str = ".mp4",
) -> Estimate:
    """What a generation takes, from a model's headers.

    Args:
        folder: the model.
        plan: of the clip.
        request: whose conditions and count are meant.
        setup: where and how it runs.
        calibration: the machine's rates; None: what the cache has, else an ordinary machine's.
        parts: of an engine with this setup, if there is one.
        suffix: of the output.
    """
    dtype = DTYPES[setup.dtype]
    rates = calibration or cached_calibration(setup.device, dtype) or NOMINAL
    return _Job(folder, plan, request, setup, rates, parts, suffix).estimate()


class _Job:
    """One generation, taken apart."""

    def __init__(
        self, folder: ModelFolder, plan: Plan, request: Request, setup: Setup,
        rates: Calibration, parts: Parts | None, suffix: str,
    ) -> None:
        self.folder, self.plan, self.request, self.setup = folder, plan, request, setup
        self.rates, self.suffix, self.dtype = rates, suffix, DTYPES[setup.dtype]
        # quantised sizes are asked for below; torchao isn't needed to know them
        self.parts = parts or Parts(folder, setup.device, self.dtype, setup.offload)
        self.vae = folder.components["vae"].config
        self.dit = folder.components["transformer"].config
        self.on_cpu = setup.device.type == "cpu"
        self.rows, self.columns = plan.latents.height, plan.latents.width
        self.stills, self.encoded = self._conditions()

    def estimate(self) -> Estimate:
        text_s, denoise_s, decode_s = self._text_s(), self._denoise_s(), self._decode_s()
        prepare_s, count = self._prepare_s(), self.request.count
        load_s = {role: self._load_s(role) for role in self.folder.components}
        load = BUILDING_S + sum(load_s.values())
        if self.setup.offload != "none":  # each comes when it is used, the VAE twice
            text_s += load_s["text_encoder"]
            denoise_s += sum(s for role, s in load_s.items() if role.startswith("transformer"))
            prepare_s += load_s["vae"] + load_s.get("image_encoder", 0.0) if self.encoded else 0.0
            decode_s, load = decode_s + load_s["vae"], BUILDING_S
        mux_s = self._mux_s(decode_s)
        text_b = self._held(("text_encoder",), self._text_bytes())
        prepare_b = self._held(("vae", "image_encoder") if self.encoded else (),
                               self._prepare_bytes())
        denoise_b = self._held(("transformer", "transformer_2"), self._denoise_bytes())
        decode_b = self._held(("vae",), self._decode_bytes())
        stages = (
            Stage("load", load, self._held((), 0)), Stage("text", text_s, text_b),
            Stage("prepare", count * prepare_s, prepare_b),
            Stage("denoise", count * denoise_s, denoise_b),
            Stage("decode", count * decode_s, decode_b), Stage("mux", count * mux_s, decode_b),
        )
        encoder_s = count * self._encoder_s()
        return Estimate(stages, self.setup, encoder_s, self.rates.measured, self._notes())

    def _notes(self) -> tuple[str, ...]:
        notes = []
        if self.request.first_frame_model:
            notes.append("drawing the first frame is not counted")
        if self.request.lora:
            notes.append("adapters are not counted")
        if not self.rates.measured:
            notes.append("this machine was not measured: `vidgen plan` does")
        return tuple(notes)

    def _conditions(self) -> tuple[int, list[int]]:
        """Latent frames that join as stills, and the frames of each video that is encoded."""
        request, frames = self.request, self.plan.num_frames
        stills = sum(map(bool, (request.image is not None or bool(request.first_frame_model),
                                request.last_image is not None)))
        stills += len(request.frame) + len(request.reference)
        whole = [frames] if request.video is not None else []
        if self.folder.conditioning == "tokens":
            first = request.image is not None or bool(request.first_frame_model)
            if request.mask is not None:
                whole = [*whole, frames][:1] if request.strength is None else [frames] * 2
            if request.prefix is not None:
                whole.append(frames)
            in_place = int(first) + sum(1 for seconds, _ in request.frame if not seconds)
            return stills - in_place, whole + [1] * stills
        if self.folder.conditioning == "channels":
            return 0, [*whole, frames]
        if self.folder.conditioning == "control":
            return len(request.reference), [*whole, frames, frames] + [1] * len(request.reference)
        return 0, whole

    @property
    def _text_tokens(self) -> int:
        """About how many tokens a prompt has: four bytes each."""
        longest = max(len(text.encode()) for text in (self.plan.prompt, self.plan.negative))
        return min(longest // 4 + 2, self.dit.text_len)

    @property
    def _frame_tokens(self) -> int:
        return self.rows * self.columns // self.dit.patch_size**2

    def _passes(self) -> tuple[int, int]:
        """Steps, and forward passes of all of them."""
        plan = self.plan
        sigmas = make_sigmas(plan.num_steps, plan.shift, strength=plan.strength).tolist()[:-1]
        return len(sigmas), sum(1 + (plan.guidance.scale_at(sigma) != 1) for sigma in sigmas)

    def _text_s(self) -> float:
        ops = text_ops(self.folder.components["text_encoder"].config, self._text_tokens)
        return self.rates.seconds(ops) * (1 if self.plan.guidance.is_off else 2)

    def _prepare_s(self) -> float:
        seconds = 0.0
        for frames in self.encoded:
            latent = 1 + (frames - 1) // self.vae.strides.t
            seconds += self.rates.seconds(
                vae_ops(self.vae, latent, self.rows, self.columns, decode=False)
            )
        encoder = self.folder.components.get("image_encoder")
        if encoder is not None:
            seconds += self.rates.seconds(image_ops(encoder.config))
        return seconds

    def _denoise_s(self) -> float:
        encoder = self.folder.components.get("image_encoder")
        ops = transformer_ops(
            self.dit, self.plan.latents.num_frames + self.stills, self._frame_tokens,
            self._text_tokens, controlled=bool(self.dit.control_layers),
            image_tokens=0 if encoder is None else encoder.config.num_tokens,
        )
        one = self.rates.seconds(ops)
        if self.setup.offload == "block":  # blocks come while others compute
            one = max(one, self._read_s("transformer"))
        elif self.setup.quantize:  # each weight is widened when it is used
            one += self.rates.seconds([Op("load", 1, 3 * self._size("transformer"))])
        return one * self._passes()[1]

    def _decode_s(self) -> float:
        frames = self.plan.latents.num_frames
        return self.rates.seconds(vae_ops(self.vae, frames, self.rows, self.columns, decode=True))

    def _encoder_s(self) -> float:
        """Work of the video encoder, on one core."""
        kind, pixels = f"write{self.suffix}", self.plan.width * self.plan.height
        kind = kind if kind in self.rates.rates else "write.mp4"
        return self.plan.kept_frames * pixels / self.rates.rate(kind, pixels)

    def _mux_s(self, decode_s: float) -> float:
        """What writing adds to decoding, which it runs beside."""
        work, cores = self._encoder_s(), os.cpu_count() or 1
        shared = decode_s * torch.get_num_threads() if self.on_cpu else 0.0
        wall = max(decode_s, work / min(4, cores), (shared + work) / cores)
        # the last frames come when nothing is left to decode
        last = min(self.vae.strides.t, self.plan.kept_frames) / self.plan.kept_frames
        return max(wall - decode_s, work * last)

    def _size(self, role: Role) -> int:
        quantize = self.setup.quantize or "none"
        return self.parts.needed_bytes(role, offload="stage", quantize=quantize)

    def _read_s(self, role: Role) -> float:
        bytes_read = self.folder.components[role].store.num_bytes
        return self.rates.seconds([Op("load", 1, bytes_read)])

    def _load_s(self, role: Role) -> float:
        streamed = self.setup.offload == "block" and role != "vae"
        return 0.0 if streamed or self._mapped(role) else self._read_s(role)

    def _mapped(self, role: Role) -> bool:
        component = self.folder.components[role]
        dtype = self.parts.dtype_of(role, self.dtype)
        weights = Weights(component.store, dtype, fp32_parts(role, dtype), component.names)
        return self.on_cpu and not self.setup.quantize and weights.stay_mapped

    def _untouched(self, role: Role) -> int:
        """Bytes of mapped weights that this generation never reads: they aren't brought in."""
        idle = {"vae": () if self.encoded else ("encoder.",), "text_encoder": ("shared.",)}
        component = self.folder.components[role]
        if not idle.get(role) or not self._mapped(role):
            return 0
        return sum(
            torch.Size(component.store.shape(name)).numel() * self.dtype.itemsize
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

    def _prepare_bytes(self) -> int:
        if not self.encoded:
            return 0
        longest, itemsize = max(self.encoded), self.dtype.itemsize
        pixels = self.plan.width * self.plan.height
        live = vae_bytes(
            self.vae, self.rows, self.columns, itemsize, decode=False, whole=longest > 1
        )
        # the clip as floats, twice while it is scaled, and in the VAE's dtype
        return self._resident(live) + 3 * longest * pixels * (9 + itemsize)

    def _denoise_bytes(self) -> int:
        tokens = (self.plan.latents.num_frames + self.stills) * self._frame_tokens
        backend = used_backend("auto", self.setup.device, self.dtype)
        return transformer_bytes(
            self.dit, tokens, self.dtype.itemsize, holds_scores=backend == "matmul",
            timed_tokens=self.request.mask is not None and self.folder.conditioning == "tokens",
        )

    def _decode_bytes(self) -> int:
        plan = self.plan
        live = vae_bytes(
            self.vae, self.rows, self.columns, self.dtype.itemsize, decode=True,
            whole=plan.num_frames > 1,
        )
        pixels = plan.width * plan.height
        frames = 3 * pixels * self.vae.strides.t * 12  # of a chunk: floats, bytes, in the slot
        encoder = ENCODER_BYTES + ENCODER_BYTES_PER_PIXEL * pixels if self.on_cpu else 0
        return self._resident(live) + frames + encoder
