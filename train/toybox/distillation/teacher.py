"""Who teaches a few-step student: a released model under guidance, many clips at a time.

Axes: B clips, P points, C latent channels, F latent frames, h w latent rows and columns, S text
tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from eval.toybox.generation import sample_state
from train.toybox.distillation.config import LOW, TrajectoryConfig
from vidgen.core.protocols import Denoise
from vidgen.diffusion.guidance import Guidance, as_negative, guided
from vidgen.diffusion.samplers import whole_timesteps
from vidgen.diffusion.state import LatentState
from vidgen.models.dit import SpacetimeDiT
from vidgen.models.lora import Adapter, attached
from vidgen.models.text import UMT5Encoder, encode_tokens
from vidgen.models.tokenizer import PromptTokenizer
from vidgen.pipeline.denoise import velocity
from vidgen.weights.component import ExpertRole
from vidgen.weights.folder import ModelFolder

Side = tuple[SpacetimeDiT, Adapter | None]
"""A network with its adapter, or without one."""


@dataclass(frozen=True)
class Trajectories:
    """Guided trajectories, on one device.

    Attributes:
        state: the conditions of each clip; its latents are the starting noise.
        points: [B, P, C, F, h, w], the latents that the teacher was asked at, level by level.
        velocities: [B, P, C, F, h, w], its guided answers.
        end: [B, C, F, h, w], where they led.
        ids: of the captions' tokens, [B, S].
        mask: [B, S], 1 where there is a token.
    """

    state: LatentState
    points: Tensor
    velocities: Tensor
    end: Tensor
    ids: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Sides:
    """Who answers: one network at all noise levels, or another one below `boundary`."""

    high: Side
    low: Side | None = None
    boundary: float = 0.0

    def at(self, sigma: Tensor) -> Side:
        """Who answers at levels [B], which lie on one side."""
        below = sigma < self.boundary
        if self.low is None or not below.any():
            return self.high
        assert below.all(), f"{sigma.tolist()} lie on both sides of {self.boundary}"
        return self.low


class Teacher:
    """A released model under guidance, or as its student answers, many clips at a time.

    Args:
        folder: the model.
        device: where it computes.
        dtype: what it computes in; the latents stay float32.
        student: the delta to answer with, in one pass; None: the guided model answers.
        has_low: whether its expert at low noise answers there, or the first one throughout.
    """

    def __init__(
        self, folder: ModelFolder, device: torch.device, dtype: torch.dtype = torch.float32,
        student: Adapter | None = None, *, has_low: bool = False,
    ) -> None:
        text = folder.components["text_encoder"].load(dtype, device)
        assert isinstance(text, UMT5Encoder)
        self.text, self.device, self.student = text, device, student
        self.sides = Sides((load_dit(folder, "transformer", dtype, device), student))
        if has_low:
            low = load_dit(folder, LOW, dtype, device)
            self.sides = replace(self.sides, low=(low, None), boundary=boundary_of(folder))
        self.negative = PromptTokenizer(folder.tokenizer).encode([folder.defaults.negative_prompt])

    @torch.no_grad()
    def follow(
        self, state: LatentState, ids: Tensor, mask: Tensor, config: TrajectoryConfig
    ) -> Trajectories:
        """Trajectories of clips.

        Args:
            state: where they begin, and their conditions.
            ids: of the captions' tokens, [B, S].
            mask: [B, S].
            config: of the trajectories.
        """
        answer = self.answers(state, ids, mask, config)
        points: list[Tensor] = []
        velocities: list[Tensor] = []

        def denoise(latents: Tensor, sigma: Tensor) -> Tensor:
            points.append(latents)
            velocities.append(answer(latents, sigma))
            return velocities[-1]

        end = sample_state(config.sampler, denoise, state, config.sigmas)
        asked = torch.stack(points, dim=1), torch.stack(velocities, dim=1)
        return Trajectories(state, *asked, end, ids, mask)

    def answers(
        self, state: LatentState, ids: Tensor, mask: Tensor, config: TrajectoryConfig
    ) -> Denoise:
        """Its velocities, float32; arguments as in `follow`."""
        if self.student is not None:
            return self._plain(state, ids, mask, config.sampler)
        groups = []
        for given in (True, False):  # guidance treats them in different ways
            rows = state.has_given == given
            if rows.any():
                guidance = config.guidance.of_clip(has_given=given)
                answer = self._guided(state.rows(rows), ids[rows], mask[rows], guidance,
                                      config.sampler)
                groups.append((rows, answer))

        @torch.no_grad()
        def denoise(latents: Tensor, sigma: Tensor) -> Tensor:
            made = torch.empty_like(latents, dtype=torch.float32)
            for rows, answer in groups:
                made[rows] = answer(latents[rows], sigma[rows]).float()
            return made

        return denoise

    @torch.no_grad()
    def _guided(
        self, state: LatentState, ids: Tensor, mask: Tensor, guidance: Guidance, sampler: str
    ) -> Denoise:
        other_ids, other_mask = (
            part.to(self.device).expand(len(ids), -1) for part in self.negative
        )
        hidden = as_negative(state, hides_given=guidance.known_scale is not None)
        return guided(self._plain(state, ids, mask, sampler),
                      self._plain(hidden, other_ids, other_mask, sampler), guidance)

    @torch.no_grad()
    def _plain(self, state: LatentState, ids: Tensor, mask: Tensor, sampler: str) -> Denoise:
        context = encode_tokens(self.text, ids, mask), mask.sum(1)
        answer = answering(self.sides, state, context, sampler)

        @torch.no_grad()
        def denoise(latents: Tensor, sigma: Tensor) -> Tensor:
            return answer(latents, sigma).float()

        return denoise


def boundary_of(folder: ModelFolder) -> float:
    """The noise level below which a model's expert denoises."""
    boundary = folder.defaults.boundary
    assert boundary is not None, "a model with two transformers says where one follows the other"
    return boundary


def load_dit(
    folder: ModelFolder, role: ExpertRole, dtype: torch.dtype, device: torch.device
) -> SpacetimeDiT:
    """One of a model's transformers."""
    dit = folder.components[role].load(dtype, device)
    assert isinstance(dit, SpacetimeDiT)
    return dit


def answering(
    sides: Sides, state: LatentState, context: tuple[Tensor, Tensor], sampler: str
) -> Denoise:
    """Networks under a state's conditions and without guidance."""

    def denoise(latents: Tensor, sigma: Tensor) -> Tensor:
        dit, adapter = sides.at(sigma)
        with attached(dit, [] if adapter is None else [(adapter, 1.0)]):
            return velocity(dit, state, latents, sigma, context, patch=dit.config.patch_size,
                            whole=whole_timesteps(sampler))

    return denoise
