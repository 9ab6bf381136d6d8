"""What each stage of a generation holds in memory at its fullest, and what it puts on the disk."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vidgen.media.write import PIXELS_PER_BYTE
from vidgen.ops import native
from vidgen.ops.attention import used_backend
from vidgen.pipeline.budget.job import Job
from vidgen.pipeline.budget.workload import (
    refine_bytes,
    sound_bytes,
    transformer_bytes,
    vae_bytes,
)
from vidgen.pipeline.sound.own_sound import AT_ONCE as SOUND_AT_ONCE
from vidgen.pipeline.step_caches import TENSORS_HELD

if TYPE_CHECKING:
    from vidgen.weights.component import Role

KERNELS_BYTES = 52_000_000
"""What torch's kernels, thread pools and allocator take on a CPU once they have been used."""
ENCODER_BYTES = 6_000_000
ENCODER_BYTES_PER_PIXEL = 200
"""Of a video encoder: x264 holds some dozens of planes."""
STATE_TENSORS = 4
"""Of a window's latents that a sampler goes on from, at most."""
_HOLES, _MOST_HOLES = 0.5, 150_000_000
"""Share of live memory that stays in holes between blocks, as measured; glibc gives those from
32 MB on back at once, so that holes stop growing."""


@dataclass(frozen=True)
class Memory:
    """Bytes of a job's stages, weights included."""

    job: Job

    def load(self) -> int:
        """When nothing works yet."""
        return self._held((), 0)

    def text(self) -> int:
        """While prompts are encoded."""
        config = self.job.folder.components["text_encoder"].config
        tokens = self.job.text_tokens
        wide = 4 * tokens * max(config.ffn_dim * 3, config.hidden_dim * 6)
        return self._held(("text_encoder",), wide + 8 * config.num_heads * tokens**2)

    def prepare(self) -> int:
        """While what is given is encoded."""
        job = self.job
        if not job.passes.encoded:
            return self._held((), 0)
        longest = max(video.frames for video in job.passes.encoded)
        least = min(video.oversampling for video in job.passes.encoded if video.frames == longest)
        itemsize = job.vae_dtype.itemsize
        pixels = job.plan.width * job.plan.height
        # behind a first pass what the latents show is decoded while it is encoded
        again = any(passes > 1 for _, passes in job.encoded)
        live = sum(
            vae_bytes(job.vae, job.rows, job.columns, itemsize, decode=decode, whole=longest > 1,
                      fused=self._fused, tiles=job.setup.tiles, oversampling=least)
            for decode in (False, True)[: 1 + again]
        )
        if job.num_refined:
            live = max(live, refine_bytes(job.vae, job.rows, job.columns, itemsize))
        # the clip as floats, twice while it is scaled, and in the VAE's dtype
        active = self._resident(live) + 3 * longest * pixels * (9 + itemsize)
        return self._held(("vae", "image_encoder"), active)

    def denoise(self) -> int:
        """While windows are sampled."""
        job = self.job
        timed = job.request.mask is not None and job.folder.conditioning == "tokens"
        passing = self._passing(job.tokens, timed_tokens=timed)
        active = self._remembered() * job.dtype.itemsize + passing
        return self._held(job.experts, active)

    def sound(self) -> int:
        """While the model's own sound is made: sampled, then decoded."""
        job = self.job
        config = job.folder.components["sound_vae"].config
        itemsize = job.parts.dtype_of("sound_vae").itemsize
        candidates = job.sounds_at_once
        compared = 0 if candidates == 1 else candidates * job.window_sound_latents
        at_once = max(min(job.sound_latents(job.passes.decoded), SOUND_AT_ONCE), compared)
        decoding = self._resident(sound_bytes(config, at_once, itemsize))
        return max(self._held(("transformer",), self._listening()),
                   self._held(("sound_vae",), decoding))

    def decode(self) -> int:
        """While frames are decoded and written."""
        job, pixels = self.job, self.job.plan.width * self.job.plan.height
        live = vae_bytes(
            job.vae, job.rows, job.columns, job.vae_dtype.itemsize, decode=True,
            whole=job.plan.num_frames > 1, fused=self._fused, tiles=job.setup.tiles,
            oversampling=job.plan.oversampling,
        )
        each = job.vae.strides.t // job.plan.oversampling
        frames = 3 * pixels * each * 12  # of a chunk: floats, bytes, in the slot
        encoder = ENCODER_BYTES + ENCODER_BYTES_PER_PIXEL * pixels if job.on_cpu else 0
        return self._held(("vae",), self._resident(live) + frames + encoder)

    def disk(self) -> int:
        """At most, of the file and its journal, all but sound.

        That keeps the film in segments, float32 latents by windows and as a whole, and the
        sampler's state, of which a new one lies beside the old until it is whole.
        """
        job = self.job
        film = job.plan.width * job.plan.height * job.passes.kept // PIXELS_PER_BYTE
        frames = job.plan.latents.num_frames
        whole = math.prod(job.plan.latents.dims) * job.finer(frames) // frames
        window = whole * max(job.passes.windows, default=0) // frames
        return 2 * (film + 4 * (whole + STATE_TENSORS * window + self._remembered()))

    def _held(self, roles: Sequence[str], active: int) -> int:
        """Weights in memory while `roles` work one after the other, and what they hold."""
        job = self.job
        present = [role for role in job.folder.components if role in roles]
        offload, quantize = job.setup.offload, job.setup.quantize or "none"
        if offload == "none":
            weights = sum(job.size(role) - self._untouched(role) for role in job.folder.components)
        else:
            sizes = [job.parts.needed_bytes(role, offload=offload, quantize=quantize)
                     - self._untouched(role) for role in present]
            weights = max(sizes, default=0)
        return weights + active + (KERNELS_BYTES if job.on_cpu else 0)

    def _untouched(self, role: Role) -> int:
        """Bytes of mapped weights that this generation never reads: they aren't brought in."""
        job = self.job
        idle = {"vae": () if job.passes.encoded else ("encoder.",), "text_encoder": ("shared.",)}
        component, dtype = job.folder.components[role], job.parts.dtype_of(role, job.dtype)
        if not idle.get(role) or not job.mapped(role):
            return 0
        return sum(
            torch.Size(component.store.shape(name)).numel() * dtype.itemsize
            for name in component.store.names
            if component.names.get(name, name).startswith(idle[role])
        )

    def _resident(self, live: int) -> int:
        """Live memory as the system sees it."""
        return live + int(min(_HOLES * live, _MOST_HOLES)) if self.job.on_cpu else live

    @property
    def _fused(self) -> bool:
        return self.job.on_cpu and self.job.vae_dtype in native.known_dtypes()

    def _remembered(self) -> int:
        """Values that a step cache holds."""
        job = self.job
        guidance = job.plan.guidance
        branches = 1 + (not guidance.is_off) + (guidance.reference_scale > 0)
        held = branches * TENSORS_HELD[job.request.cache.partition(":")[0]] * job.tokens
        return held * job.dit.hidden_dim

    def _listening(self) -> int:
        """Keys and values of the picture, and what its own pass or that of its sounds holds."""
        job = self.job
        takes = job.sounds_at_once
        one_layer = 2 * job.tokens * job.dit.hidden_dim * job.dtype.itemsize
        listening = self._passing(takes * job.window_sound_latents)
        listening += takes * one_layer  # each sees a copy
        return job.dit.num_layers * one_layer + max(self._passing(job.tokens), listening)

    def _passing(self, tokens: int, *, timed_tokens: bool = False) -> int:
        """What one pass of the transformer holds beside its weights."""
        job = self.job
        backend = used_backend("auto", job.setup.device, job.dtype)
        return transformer_bytes(
            job.dit, tokens, job.dtype.itemsize, blocked=backend == "blocked",
            timed_tokens=timed_tokens,
        )
