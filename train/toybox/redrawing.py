"""Clips noised and drawn anew by a model: what happens in them stays, and looks as it draws it.

Axes: B clips, C latent channels, F latent frames, h w latent rows and columns, T H W frames, pixel
rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from eval.toybox.generation import fresh_state, pixels, read_prompts, text_contexts
from vidgen.core.errors import InputError
from vidgen.core.request import Request
from vidgen.diffusion import condition
from vidgen.diffusion.flow import denoised_of
from vidgen.diffusion.temporal_upsampling import LatentRate
from vidgen.pipeline.denoise import denoising, settles, sigmas_of
from vidgen.pipeline.engine import Engine, load
from vidgen.pipeline.inputs import Inputs
from vidgen.pipeline.types import NO_LORAS, Plan


class Redrawer:
    """A model that draws batches of clips anew (SDEdit, Meng et al. 2022, Alg. 1).

    Args:
        model: folder or name of a model of toybox's kind.
        device: where it draws, as `load` takes it.

    Raises:
        InputError: it is of another family.
        ModelError: there is none, or it is damaged.
    """

    def __init__(self, model: str, device: str = "auto") -> None:
        engine = load(model, device=device)
        if not isinstance(engine, Engine):
            raise InputError(f"{model} is of a family that can't draw batches anew; give a folder "
                             "of toybox's kind")
        self.engine = engine
        empty = Request.of("a cat", {"seed": 0})  # each clip has its own words and noise
        self._plan = engine.plan(empty, Inputs())
        self.fps = float(self._plan.fps)

    @torch.no_grad()
    def latents(
        self, latents: Tensor, prompts: Sequence[str], seeds: Sequence[int], strength: float,
        rate: int = 1,
    ) -> Tensor:
        """Draw clips anew from where the last `strength` of the model's steps begin.

        Args:
            latents: normalised, [B, C, F, h, w], of any size and length.
            prompts: what is to be seen, B of them.
            seeds: of the noise, one each.
            strength: above 0, up to 1.
            rate: how many there are for each latent frame at the model's own rate.

        Returns:
            Latents like those given, float32.

        Raises:
            InputError: a rate that the model doesn't draw at, at all or from there.
        """
        if rate not in (1, self._plan.temporal_upsampling):
            raise InputError(f"clips of {rate} times the model's frame rate can't be drawn "
                             f"again; it draws {self._plan.temporal_upsampling} latent frames for "
                             "one")
        plan = replace(self._plan_like(latents, rate), strength=strength)
        sigmas, given = sigmas_of(plan), latents.to(self.engine.device)
        state = fresh_state(self.engine, plan, seeds)
        if rate == 1:
            state = condition.video_at_strength(state, given, float(sigmas[0]))
        elif settles(plan, sigmas, self.engine.folder):
            raise InputError(f"strength is {strength}, from where the model draws clips at its own "
                             f"frame rate alone; give less for {rate} times that")
        else:
            state = replace(state, video_upsampled=given)
        contexts = text_contexts(self.engine, plan, read_prompts(self.engine, prompts))
        return self.engine.sample(plan, state, contexts).float()

    @torch.no_grad()
    def guess(
        self, latents: Tensor, prompts: Sequence[str], seeds: Sequence[int], level: float, *,
        knows_first: bool = False,
    ) -> Tensor:
        """What the model says of clips in one step, once they are noised to a level.

        Args:
            latents: normalised, [B, C, F, h, w], at the model's own frame rate.
            prompts: what is to be seen, B of them.
            seeds: of the noise, one each.
            level: the noise level.
            knows_first: whether it is given their first frames.

        Returns:
            Latents like those given, float32.
        """
        plan, given = self._plan_like(latents), latents.to(self.engine.device)
        plan = replace(plan, guidance=plan.guidance.of_clip(has_given=knows_first))
        state = fresh_state(self.engine, plan, seeds)
        state = condition.video_at_strength(state, given, level)
        if knows_first:
            state = condition.prefix(state, given[:, :, :1])
        contexts = text_contexts(self.engine, plan, read_prompts(self.engine, prompts))
        noisy = state.begin()
        with denoising(self.engine.loader, plan, state, contexts, NO_LORAS, level) as denoise:
            velocity = denoise(noisy, torch.full((len(noisy),), level, device=noisy.device))
        return state.project(denoised_of(noisy, velocity.float(), level))

    @torch.no_grad()
    def video(
        self, video: Tensor, prompts: Sequence[str], seeds: Sequence[int], strength: float
    ) -> Tensor:
        """The same for video [B, 3, T, H, W] in [-1, 1], which comes back on the CPU."""
        latents = self.engine.encode_video(video, passes=self._plan.encode_passes)
        return pixels(self.engine, self.latents(latents, prompts, seeds, strength))

    def _plan_like(self, latents: Tensor, rate: int = 1) -> Plan:
        """That of clips like those given, [B, C, F, h, w]."""
        F, h, w = latents.shape[2:]
        frames = LatentRate(rate).num_shown(F)
        span = replace(self._plan.latents, num_frames=frames, height=h, width=w)
        return replace(self._plan, latents=span, temporal_upsampling=rate)
