"""Roll a clip out: turns of latent frames, each generated with those before it as a condition.

A causal transformer caches the keys and values of finished frames, so a turn costs the same at any
place, and a clip needs no end. Training takes the same steps.

Axes: B clips, C latent channels, n frames, h w latent rows and columns, H W pixel rows and columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import count
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vidgen.diffusion.flow import add_noise
from vidgen.diffusion.noise import draw_noise
from vidgen.diffusion.samplers import sample_state, whole_timesteps
from vidgen.diffusion.state import LatentState, new_state
from vidgen.models.dit import SpacetimeDiT
from vidgen.models.dit_types import KVCache
from vidgen.pipeline.codec import decode_frames, from_frame, latent_of
from vidgen.pipeline.denoise import velocity
from vidgen.pipeline.experts import experts
from vidgen.pipeline.types import Loras, Plan
from vidgen.weights.folder import RollConfig
from vidgen.weights.student import ROLLER

if TYPE_CHECKING:
    from vidgen.core.request import Request
    from vidgen.pipeline.inputs import Inputs
    from vidgen.pipeline.model import OpenedModel


class Rollout:
    """A causal transformer's memory of clips, and the next turn of each.

    Each call gets the network, causal in turns (`SpacetimeDiT.causal`) and with its delta;
    `context` are features [B, S, D] and lengths [B] of the prompts.
    """

    def __init__(self, context: tuple[Tensor, Tensor], config: RollConfig, sampler: str) -> None:
        self.context, self.config, self.sampler = context, config, sampler
        self.cache = KVCache()

    def velocity(
        self, dit: SpacetimeDiT, state: LatentState, latents: Tensor, sigma: Tensor
    ) -> Tensor:
        """Return the velocity of the next turn's noisy latents [B, C, n, h, w] at sigma [B]."""
        self.cache.recording = False
        return self._see(dit, state, latents, sigma)

    def turn(self, dit: SpacetimeDiT, state: LatentState, sigmas: Tensor) -> Tensor:
        """Sample the next turn [B, C, n, h, w] of a state, along sigmas [P]."""
        return sample_state(self.sampler, partial(self.velocity, dit, state), state, sigmas)

    def remember(self, dit: SpacetimeDiT, latents: Tensor, noise: Tensor) -> None:
        """Add finished frames [B, C, n, h, w], seen through noise, to the memory."""
        self.cache.recording = True
        level = latents.new_full((len(latents),), self.config.history_noise)
        self._see(dit, new_state(noise), add_noise(latents, noise, level), level)
        self.cache.forget(self.config.window_frames)

    def _see(self, dit: SpacetimeDiT, state: LatentState, latents: Tensor, sigma: Tensor) -> Tensor:
        return velocity(dit, state, latents, sigma, self.context, patch=dit.config.patch_size,
                        whole=whole_timesteps(self.sampler), cache=self.cache)


@torch.no_grad()
def rolled_latents(
    engine: OpenedModel, plan: Plan, request: Request, inputs: Inputs, loras: Loras,
    context: tuple[Tensor, Tensor],
) -> Iterator[Tensor]:
    """Yield latent frames [1, C, 1, h, w] float32 without end, the same ones at each call.

    The plan's student is the model's roller; `context` are features [1, S, D] and lengths [1] of
    the prompt.
    """
    student, roll, loader = plan.student, plan.roll, engine.loader
    assert student is not None
    assert roll is not None
    turn, rollout = roll.turn_frames, Rollout(context, roll, plan.sampler)
    loras, sigmas = loras.plus(loader.deltas(ROLLER)), torch.tensor(student.sigmas)
    shape = replace(plan.latents, num_frames=turn)

    def noise(first: int, stream: str) -> Tensor:
        return draw_noise(plan.seed, shape, stream=stream, first_frame=first).to(engine.device)

    for first in count(step=turn):
        with experts(loader, None, loras, 1.0) as transformer_at:
            if first:
                state = new_state(noise(first, "video"))
            else:  # one latent frame to generate after the given
                longer = replace(plan, latents=replace(shape, num_frames=turn + 1))
                state = engine.prepare(longer, request, inputs).stretch(slice(turn))
            dit = transformer_at(1.0)
            with dit.causal(turn):
                made = rollout.turn(dit, state, sigmas.to(engine.device))
                rollout.remember(dit, made, noise(first, "history"))
        yield from made.split(1, dim=2)


def rolled_videos(
    engine: OpenedModel, plan: Plan, request: Request, inputs: Inputs, loras: Loras,
    context: tuple[Tensor, Tensor], start: int = 0,
) -> Iterator[Tensor]:
    """Yield video [1, 3, n, H, W] of `rolled_latents`, one by one, from frame `start` on."""
    t = engine.vae_config.strides.t
    latents = rolled_latents(engine, plan, request, inputs, loras, context)
    videos = decode_frames(engine.loader, latents, latent_of(start, t), plan.tiles)
    return from_frame(videos, start, t)
