"""A student whose own clips can't be told from its guided teacher's: distribution matching.

The student makes clips by its own few steps. They are noised, and two networks say what they take
them for: the teacher under guidance, and a *follower*, a second delta that learns all the while
what the student's clips are like. Where the two differ lies what the student does too much or too
little of, and that is its gradient (Yin et al. 2024, "Improved distribution matching distillation",
without its GAN). The mean of many answers, which a regression learns, is blurred; this isn't.

All three are the teacher's network, twice with a delta, so its weights are in memory once, and once
more in the dtype of the run.

Where the model draws below its boundary at a finer frame rate, so does the expert's part of the
student: its clips are handed over as in sampling, and compared at that rate.

Axes: B clips, C latent channels, F latent frames, n of them at the rate of the step that is taught,
h w latent rows and columns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from eval.toybox.generation import sample_state
from train.toybox.distillation.config import LOW, DistilRun
from train.toybox.distillation.delta import Delta
from train.toybox.distillation.student import DeltaTask
from train.toybox.phases import Phase
from vidgen.core.errors import InputError
from vidgen.core.protocols import Denoise
from vidgen.diffusion.flow import add_noise, denoised_of, draw_sigmas, squared_error, velocity_loss
from vidgen.diffusion.state import LatentState
from vidgen.diffusion.temporal_upsampling import LatentRate, upsampled_state
from vidgen.pipeline.denoise import upsampling_of
from vidgen.pipeline.loader import DTYPES
from vidgen.training.checkpoint import load_averages
from vidgen.training.optim import build_optimizers
from vidgen.training.task import generator_of

LEVELS = (0.9, 0.7, 0.5, 0.3)
"""Of noise, at which validation compares clips: those of the run's, or the middle of these."""


@dataclass(frozen=True)
class MatchBatch:
    """Clips that the student is to make, and how they are looked at.

    Attributes:
        state: noise under conditions.
        ids: of the captions' tokens, [B, S].
        mask: [B, S].
        last: number of the student's step that is taught; those before it lead there.
        sigma: [2, B], the noise levels at which clips are compared, and followed.
        noise: [2, B, C, n, h, w], of both.
    """

    state: LatentState
    ids: Tensor
    mask: Tensor
    last: int
    sigma: Tensor
    noise: Tensor


class MatchTask(DeltaTask[MatchBatch]):
    """The student's own clips, the teacher's opinion of them, and what follows the student."""

    def __init__(self, config: DistilRun) -> None:
        super().__init__(config)
        assert config.match is not None
        self.match = config.match
        self._check_levels()
        self.follower = Delta(self.dit, config.delta)
        self.modules["follower"] = self.follower
        if self.match.start is not None:
            self.delta.load_state_dict(load_averages(Path(self.match.start), "student"))
        self.follower.load_state_dict(self.delta.state_dict())
        self.teacher = self.shards.teacher(DTYPES[config.run.dtype])
        folder = self.shards.folder
        self.rate = upsampling_of(folder) if config.delta.part == LOW else 1
        self.stride_t = folder.components["vae"].config.strides.t

    def _check_levels(self) -> None:
        """Refuse steps and levels that aren't those of the part that is taught, or none."""
        first, (low, high) = self.match.first_step, self.match.between
        asked = f"match.first_step is {first} and match.between {[low, high]}"
        above = self.config.delta.above
        takes_over = self.own.stop if above else self.own.start
        remedy = "an earlier step, and no lower level" if above else "that, and no higher level"
        reaches = low < self.boundary if above else high > self.boundary
        if self.other is not None and (first not in self.own or reaches):
            raise InputError(f"{asked}, but the expert at low noise takes over at step "
                             f"{takes_over}, below {self.boundary:g}; give {remedy}")
        if self.levels(first)[0] >= high:
            raise InputError(f"{asked}, but match.phased compares clips of that step at "
                             f"{self.levels(first)[0]:.2f} and above; give a later step, or a "
                             "higher level")

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """AdamW over the factors of both deltas."""
        own = self.config.run.optim
        faster = replace(own, lr=self.match.follower_lr)
        return [*build_optimizers({"student": self.delta}, own),
                *build_optimizers({"follower": self.follower}, faster)]

    def batch(self, phase: Phase, step: int, micro: int) -> MatchBatch:
        """Conditions as the transformer's own training draws them; all ranks teach one step."""
        seed, steps = self.config.run.seed, (self.match.first_step, self.own.stop)
        last = int(torch.randint(*steps, (), generator=generator_of(seed, step)))
        draw = generator_of(seed, step, micro, 1)  # the 1: nothing as the conditions' noise is
        state, ids, mask = self.shards.draw(phase, step, micro)
        sigma = torch.stack([
            draw_sigmas(len(ids), draw, shift=self.match.shift, mean=None,
                        between=self.levels(last))
            for _ in range(2)
        ])
        B, C, F, *size = state.latents.shape
        noise = torch.randn(2, B, C, LatentRate(self.rate).num_upsampled(F), *size, generator=draw)
        return MatchBatch(state, ids, mask, last, sigma.to(self.device), noise.to(self.device))

    def levels(self, last: int) -> tuple[float, float]:
        """The lowest and the highest noise level at which clips of step `last` are compared."""
        low, high = self.match.between
        return (max(low, float(self.sigmas[last + 1])), high) if self.match.phased else (low, high)

    def loss(self, batch: MatchBatch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Of the student, whose gradient is the two networks' difference, and of its follower."""
        del step
        context = self.context(batch.ids, batch.mask)
        state, made = self.play(batch, context)
        follower = self.with_delta(self.follower, state, context)
        clean = made.detach()
        compared, followed = (state.project(add_noise(clean, noise, sigma))
                              for noise, sigma in zip(batch.noise, batch.sigma, strict=True))
        with torch.no_grad():
            teacher = self.teacher.answers(state, batch.ids, batch.mask, self.config.trajectories)
            sigma = batch.sigma[0]
            change = _change(clean, compared, sigma, teacher(compared, sigma),
                             follower(compared, sigma), state.denoise_mask)
        matching = squared_error(made, clean + change, state.denoise_mask).mean()
        answer = follower(followed, batch.sigma[1])
        following = velocity_loss(answer, clean, batch.noise[1], state.denoise_mask).mean()
        return matching + following, {"gap": matching.detach().sqrt(),
                                      "following": following.detach()}

    def play(
        self, batch: MatchBatch, context: tuple[Tensor, Tensor]
    ) -> tuple[LatentState, Tensor]:
        """The clips that the student makes of a batch, and what teacher and follower know of them.

        Gradients flow through its step number `last` alone.
        """
        return self.made(batch.state, context, batch.last)

    def made(
        self, state: LatentState, context: tuple[Tensor, Tensor], last: int
    ) -> tuple[LatentState, Tensor]:
        """Clean latents as the student sees them at its step number `last`, by its own steps.

        Beside them the state that they are of, at the rate of that step.
        """
        first = 0
        if self.rate > 1:
            first, state = self.own.start, self.handed_over(state, context)
        student = self.with_delta(self.delta, state, context)
        return state, self.steps_to(last, student, state, first)

    @torch.no_grad()
    def handed_over(self, state: LatentState, context: tuple[Tensor, Tensor]) -> LatentState:
        """A state at the rate of the expert's steps, as the steps before them leave it."""
        first = self.own.start
        settled = self.steps_to(first - 1, self.with_delta(self.delta, state, context), state)
        return upsampled_state(state, settled, float(self.sigmas[first]), self.rate, self.stride_t)

    def steps_to(
        self, last: int, student: Denoise, state: LatentState, first: int = 0
    ) -> Tensor:
        """Clean latents as a student sees them at its step `last`, from a state at step `first`."""
        sigmas = torch.cat([self.sigmas[first : last + 1], self.sigmas[-1:]])

        def denoise(latents: Tensor, sigma: Tensor) -> Tensor:
            taught = torch.is_grad_enabled() and float(sigma[0]) <= float(sigmas[-2])
            with torch.set_grad_enabled(taught):
                return student(latents, sigma)

        return sample_state(self.config.trajectories.sampler, denoise, state, sigmas)

    def scores(self) -> dict[str, float]:
        """`gap` between teacher and follower on the student's whole clips, and the latter's error.

        The gap of a student that has nothing left to learn is 0, if its follower keeps up.
        """
        given = self.held_out
        state, context = given.state, self.context(given.ids, given.mask)
        state, clean = self.made(state, context, len(self.sigmas) - 2)
        follower = self.with_delta(self.follower, state, context)
        teacher = self.teacher.answers(state, given.ids, given.mask, self.config.trajectories)
        gaps, errors = [], []
        low, high = self.match.between
        levels = [each for each in LEVELS if low <= each <= high] or [(low + high) / 2]
        for index, level in enumerate(levels):
            draw = generator_of(self.config.run.seed, index)
            noise = torch.randn(clean.shape, generator=draw).to(clean)
            sigma = torch.full((len(clean),), level, device=self.device)
            noisy = state.project(add_noise(clean, noise, sigma))
            wanted, answer = teacher(noisy, sigma), follower(noisy, sigma)
            change = _change(clean, noisy, sigma, wanted, answer, state.denoise_mask)
            gaps.append(float(change.square().mean().sqrt()))
            errors.append(float(velocity_loss(answer, clean, noise).mean()))
        return {"gap": sum(gaps) / len(gaps), "following": sum(errors) / len(errors)}


def _change(
    clean: Tensor, noisy: Tensor, sigma: Tensor, wanted: Tensor, answer: Tensor, mask: Tensor
) -> Tensor:
    """Where clips would have to go to be the teacher's (ib., eq. 2).

    In units of how far the teacher itself would change them, so that all levels weigh alike.

    Args:
        clean: the student's clips, [B, C, F, h, w].
        noisy: the same at the noise levels `sigma` [B].
        sigma: [B].
        wanted: the teacher's velocities there.
        answer: the follower's.
        mask: [B, 1, F, h, w], True where latents were made.
    """
    real, own = (denoised_of(noisy, each, sigma) for each in (wanted, answer))
    distance = squared_error(clean, real, mask).sqrt().clamp(min=1e-6)
    return (real - own) / distance.view(-1, *[1] * (clean.ndim - 1))
