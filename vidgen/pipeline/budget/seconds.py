"""How long each stage of a generation takes on a machine of known rates."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from vidgen.diffusion.schedule import make_sigmas
from vidgen.models.tokenizer import read_as
from vidgen.pipeline.budget.job import Job
from vidgen.pipeline.budget.workload import (
    Op,
    image_ops,
    listening_ops,
    onset_detector_ops,
    sound_ops,
    text_ops,
    transformer_ops,
    vae_ops,
    verifier_ops,
)
from vidgen.pipeline.levels import sigmas_of, split_of
from vidgen.pipeline.sound.impacts import ONSET_DETECTOR
from vidgen.pipeline.sound.own_sound import sound_plan

if TYPE_CHECKING:
    from vidgen.weights.component import Role

BUILDING_S = 0.06
"""To make the networks' modules, empty."""
REFINE_PASSES = 2.5
"""Of the decoder, that a step of `refine_first` takes the time of."""


@dataclass(frozen=True)
class Seconds:
    """Times of a job's stages, each of one clip, without what loading adds; see `load`."""

    job: Job

    def text(self) -> float:
        """To encode the prompt and, under guidance, the negative one."""
        job = self.job
        ops = text_ops(job.folder.components["text_encoder"].config, job.text_tokens)
        asked = sound_plan(job.plan, job.folder.defaults) if job.makes_sound else job.plan
        return job.rates.seconds(ops) * (1 if asked.guidance.is_off else 2)

    def prepare(self) -> float:
        """To encode what is given, and to refine first frames."""
        job, seconds = self.job, 0.0
        for (frames, oversampling), times in job.encoded:
            latent = 1 + (frames - 1) * oversampling // job.vae.strides.t
            once = self._through_vae(latent, oversampling, decode=False)
            shown = self._through_vae(latent, oversampling) if times > 1 else 0.0
            seconds += times * once + (times - 1) * shown
        if job.num_refined:
            passes = job.num_refined * (1 + REFINE_PASSES * job.plan.refine_steps)
            seconds += passes * self._through_vae(1, 1)
        if job.passes.shown:
            seconds += self._through_vae(job.passes.shown, job.plan.oversampling)
        if job.image is not None:
            seconds += job.rates.seconds(image_ops(job.image))
        return seconds

    def denoise(self) -> float:
        """To sample a candidate of each window, and to look at it where others may follow."""
        job = self.job
        image_tokens = 0 if job.image is None else job.image.num_tokens
        seconds = 0.0
        windows = zip(job.passes.windows, job.passes.drawn, job.passes.has_given, strict=True)
        for frames, drawn, has_given in windows:
            above, below = self._num_passes(has_given=has_given)
            seconds += above * self._pass(frames, image_tokens)
            seconds += below * self._pass(drawn, image_tokens) if below else 0.0
            if job.plan.candidates > 1:
                seconds += job.rates.seconds(verifier_ops(
                    job.folder.components["verifier"].config, drawn, job.rows * job.columns
                ))
        return seconds

    def sound(self) -> float:
        """To make the model's own sound, to compare its takes, and to decode the one that is kept.

        Each window's picture passes once, its sounds at every step; of those that are drawn until
        one goes with the picture the first ones.
        """
        job = self.job
        config = job.folder.components["sound_vae"].config
        candidates = job.sounds_at_once
        decodes = 1 if candidates == 1 else 1 + candidates  # each to be compared, one to be heard
        made = decodes * job.rates.seconds(sound_ops(config, job.sound_latents(job.passes.decoded)))
        audio, plan = job.dit.audio, sound_plan(job.plan, job.folder.defaults)
        assert audio is not None
        sigmas = make_sigmas(plan.num_steps, plan.shift).tolist()[:-1]
        looks, seconds = candidates > 1 and ONSET_DETECTOR in job.folder.components, 0.0
        for frames, drawn in zip(job.passes.windows, job.passes.drawn, strict=True):
            if looks:
                seconds += job.rates.seconds(onset_detector_ops(
                    job.folder.components[ONSET_DETECTOR].config, drawn, job.rows * job.columns
                ))
            tokens, seen = job.sound_latents(frames), drawn * job.frame_tokens
            branches = [
                job.rates.seconds(listening_ops(
                    job.dit, audio, tokens, tokens + keys, job.text_tokens + 1,
                    candidates,
                ))
                for keys in (seen, 0)  # the negative pass hears itself alone
            ]  # fmt: skip
            seconds += self._pass(drawn, 0)
            seconds += sum(sum(branches[: len(plan.guidance.branches_at(s))]) for s in sigmas)
        return made + seconds

    def decode(self) -> float:
        """To decode all frames."""
        job = self.job
        return self._through_vae(job.finer(job.passes.decoded), job.plan.oversampling)

    def encode_video(self) -> float:
        """Work of the video encoder, on one core."""
        job = self.job
        kind, pixels = f"write{job.suffix}", job.plan.width * job.plan.height
        kind = kind if kind in job.rates.rates else "write.mp4"
        return job.passes.kept * pixels / job.rates.rate(kind, pixels)

    def mux(self, decode_s: float) -> float:
        """What writing adds to decoding, which it runs beside."""
        job = self.job
        work, cores = self.encode_video(), os.cpu_count() or 1
        shared = decode_s * torch.get_num_threads() if job.on_cpu else 0.0
        wall = max(decode_s, work / min(4, cores), (shared + work) / cores)
        # the last frames come when nothing is left to decode
        last = min(job.vae.strides.t, job.passes.kept) / job.passes.kept
        return max(wall - decode_s, work * last)

    def load(self, role: Role) -> float:
        """To bring a network's weights into memory."""
        job = self.job
        if job.setup.offload == "block" and role != "vae":
            return 0.0
        read = 0.0 if job.mapped(role) else self._read(role)
        if job.packed(role):  # each weight is laid out anew, about as fast as it is read
            read += job.rates.seconds([Op("load", 1, job.size(role))])
        return read

    def fresh(self, num_bytes: int) -> float:
        """To be given so much memory."""
        job = self.job
        return job.rates.seconds([Op("fresh", 1, num_bytes)]) if job.on_cpu else 0.0

    def _read(self, role: Role) -> float:
        bytes_read = self.job.folder.components[role].store.num_bytes
        return self.job.rates.seconds([Op("load", 1, bytes_read)])

    def _through_vae(self, frames: int, oversampling: int, *, decode: bool = True) -> float:
        """So many latent frames of a rate through the decoder, or the encoder."""
        job = self.job
        return job.vae_rates.seconds(vae_ops(
            job.vae, frames, job.rows, job.columns, decode=decode, tiles=job.setup.tiles,
            oversampling=oversampling,
        ))

    def _num_passes(self, *, has_given: bool) -> tuple[int, int]:
        """Forward passes of all steps of a window: at the clip's rate, and at a finer one."""
        plan = self.job.plan
        guidance = plan.guidance.of_clip(has_given=has_given and plan.strength == 1)
        sigmas = make_sigmas(plan.num_steps, plan.shift, strength=plan.strength)
        told, legible = (0, 0.0) if has_given else self._told_apart
        passes = [
            len(guidance.branches_at(sigma)) + told * (sigma < legible)
            for sigma in sigmas.tolist()[:-1]
        ]
        if plan.oversampling > 1:
            split = split_of(plan, sigmas_of(plan), self.job.folder)
            return sum(passes[:split]), sum(passes[split:])
        remembered = plan.roll is not None  # a turn is read once more
        return sum(passes) + remembered, 0

    @cached_property
    def _told_apart(self) -> tuple[int, float]:
        """How many things the prompt tells apart, and below which noise level."""
        plan = self.job.plan
        if plan.binding == 0:
            return 0, 0.0
        config = self.job.folder.components["verifier"].config
        told = len(config.labels_in(read_as(plan.prompt, dict(plan.readings))))
        return (told if told > 1 else 0), config.legible

    def _pass(self, frames: int, image_tokens: int) -> float:
        """One forward pass over so many latent frames, stills included."""
        job = self.job
        one = job.rates.seconds(transformer_ops(
            job.dit, frames, job.frame_tokens, job.text_tokens,
            controlled=bool(job.dit.control_layers), image_tokens=image_tokens,
            sound_tokens=job.sound_latents(frames) if job.request.follow_audio else 0,
        ))
        if job.setup.offload == "block":  # blocks come while others compute, of a CPU's own time
            read_s = self._read("transformer")
            one = one + read_s if job.on_cpu else max(one, read_s)
        elif job.setup.quantize:  # each weight is widened when it is used
            one += job.rates.seconds([Op("load", 1, 3 * job.size("transformer"))])
        return one
