"""Clips noised and drawn anew by a model: what happens in them stays, and looks as it draws it.

Axes: B clips, C latent channels, F latent frames, h w latent rows and columns, T H W frames, pixel
rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vidgen.core.errors import InputError
from vidgen.core.request import Request
from vidgen.diffusion import condition
from vidgen.evaluation.generation import fresh_state, pixels, read_prompts, text_contexts
from vidgen.pipeline.inputs import Inputs
from vidgen.pipeline.levels import sigmas_of
from vidgen.pipeline.video import Engine, load


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

    @torch.no_grad()
    def latents(
        self, latents: Tensor, prompts: Sequence[str], seeds: Sequence[int], strength: float
    ) -> Tensor:
        """Draw clips anew from where the last `strength` of the model's steps begin.

        Args:
            latents: normalised, [B, C, F, h, w], of any size and length.
            prompts: what is to be seen, B of them.
            seeds: of the noise, one each.
            strength: above 0, up to 1.

        Returns:
            Latents like those given, float32.
        """
        F, h, w = latents.shape[2:]
        shape = replace(self._plan.latents, num_frames=F, height=h, width=w)
        plan = replace(self._plan, strength=strength, latents=shape, oversampling=1)
        begins = float(sigmas_of(plan)[0])
        state = condition.video_at_strength(
            fresh_state(self.engine, plan, seeds), latents.to(self.engine.device), begins
        )
        contexts = text_contexts(self.engine, plan, read_prompts(self.engine, prompts))
        return self.engine.sample(plan, state, contexts).float()

    @torch.no_grad()
    def video(
        self, video: Tensor, prompts: Sequence[str], seeds: Sequence[int], strength: float
    ) -> Tensor:
        """The same for video [B, 3, T, H, W] in [-1, 1], which comes back on the CPU."""
        latents = self.engine.encode_video(video, passes=self._plan.encode_passes)
        return pixels(self.engine, self.latents(latents, prompts, seeds, strength))
