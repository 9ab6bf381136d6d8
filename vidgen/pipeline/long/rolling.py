"""Roll a clip out: turns of latent frames, each generated with those before it as a condition.

A causal transformer caches the keys and values of finished frames, so a turn costs the same at any
place, and a clip needs no end. Training takes the same steps.

Axes: B clips, C latent channels, n frames, h w latent rows and columns, H W pixel rows and columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
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
        return velocity(
            dit, state, latents, sigma, self.context, patch=dit.config.patch_size,
            whole=whole_timesteps(self.sampler), cache=self.cache,
        )


@dataclass(frozen=True)
class RolledClip:
    """A clip that a model's roller makes while it is read."""

    engine: OpenedModel
    plan: Plan  # its student is the model's roller
    request: Request
    inputs: Inputs
    loras: Loras
    context: tuple[Tensor, Tensor]  # features [1, S, D] and lengths [1] of its prompt

    @torch.no_grad()
    def latents(self) -> Iterator[Tensor]:
        """Yield latent frames [1, C, 1, h, w] float32 without end, the same ones at each call."""
        student, roll, first = self.plan.student, self._roll, 0
        assert student is not None
        rollout = Rollout(self.context, roll, self.plan.sampler)
        loader = self.engine.loader
        loras = self.loras.beside(loader.deltas(ROLLER))
        sigmas = torch.tensor(student.sigmas).to(self.engine.device)
        while True:
            with experts(loader, None, loras, 1.0) as given:
                dit = given.at(1.0)
                with dit.causal(roll.turn_frames):
                    made = rollout.turn(dit, self._begin(first), sigmas)
                    rollout.remember(dit, made, self._noise(first, "history"))
            yield from made.split(1, dim=2)
            first += roll.turn_frames

    def videos(self, start: int = 0) -> Iterator[Tensor]:
        """Yield video [1, 3, n, H, W], one latent frame after the other, from frame `start` on."""
        t, loader = self.engine.vae_config.strides.t, self.engine.loader
        made = decode_frames(loader, self.latents(), latent_of(start, t), self.plan.tiles)
        return from_frame(made, start, t)

    @property
    def _roll(self) -> RollConfig:
        assert self.plan.roll is not None
        return self.plan.roll

    def _begin(self, first: int) -> LatentState:
        """Return the state of the turn from latent frame `first` on."""
        turn = self._roll.turn_frames
        if first:
            return new_state(self._noise(first))
        shape = replace(self.plan.latents, num_frames=turn + 1)  # one to generate after the given
        plan = replace(self.plan, latents=shape)
        return self.engine.prepare(plan, self.request, self.inputs).stretch(slice(turn))

    def _noise(self, first: int, stream: str = "video") -> Tensor:
        shape = replace(self.plan.latents, num_frames=self._roll.turn_frames)
        noise = draw_noise(self.plan.seed, shape, stream=stream, first_frame=first)
        return noise.to(self.engine.device)
