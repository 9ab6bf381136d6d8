"""A student whose own clips can't be told from its guided teacher's: distribution matching.

The student makes clips by its own few steps. They are noised, and two networks say what they take
them for: the teacher under guidance, and a *follower*, a second delta that learns all the while
what the student's clips are like. Where the two differ lies what the student does too much or too
little of, and that is its gradient (Yin et al. 2024, "Improved distribution matching
distillation"). The mean of many answers, which a regression learns, is blurred; this isn't. Where
there is a critic, it sees true clips, too, and the student is drawn to these (`distil_critic`).

All three are the teacher's network, twice with a delta, so its weights are in memory once, and once
more in the dtype of the run.

Axes: B clips, C latent channels, F latent frames, h w latent rows and columns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from vidgen.core.protocols import Denoise
from vidgen.diffusion.condition import LatentState
from vidgen.diffusion.flow import add_noise, denoised_of, squared_error, velocity_loss
from vidgen.diffusion.samplers import sample_state
from vidgen.diffusion.schedule import draw_sigmas
from vidgen.pipeline.parts import DTYPES
from vidgen.training.checkpoint import load_averages
from vidgen.training.config import Phase
from vidgen.training.distil import Delta, DeltaTask, DistilRun
from vidgen.training.distil_critic import Critic, surprise
from vidgen.training.draws import generator_of
from vidgen.training.optim import build_optimizers

LEVELS = (0.9, 0.7, 0.5, 0.3)
"""Of noise, at which validation compares clips."""


@dataclass(frozen=True)
class MatchBatch:
    """Clips that the student is to make, and how they are looked at.

    Attributes:
        state: noise under conditions.
        ids: of the captions' tokens, [B, S].
        mask: [B, S].
        last: number of the student's step that is taught; those before it lead there.
        sigma: [2, B], the noise levels at which clips are compared, and followed.
        noise: [2, B, C, F, h, w], of both.
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
        self.follower = Delta(self.dit, config.delta)
        self.modules["follower"] = self.follower
        if self.match.start is not None:
            self.delta.load_state_dict(load_averages(Path(self.match.start), "student"))
        self.follower.load_state_dict(self.delta.state_dict())
        self.critic: Critic | None = None
        if self.match.critic is not None:
            self.critic = self.modules["critic"] = Critic(self.dit, self.match.critic.block)
        self.teacher = self.shards.teacher(DTYPES[config.run.dtype])

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """AdamW over the factors of both deltas, and over the critic."""
        rates = {"student": self.config.run.optim.lr, "follower": self.match.follower_lr}
        if self.match.critic is not None:
            rates["critic"] = self.match.critic.lr
        return [
            optimizer for name, lr in rates.items()
            for optimizer in build_optimizers(
                {name: self.modules[name]}, replace(self.config.run.optim, lr=lr)
            )
        ]

    def batch(self, phase: Phase, step: int, micro: int) -> MatchBatch:
        """Conditions as the transformer's own training draws them; all ranks teach one step."""
        seed, steps = self.config.run.seed, (self.match.first_step, len(self.sigmas) - 1)
        last = int(torch.randint(*steps, (), generator=generator_of(seed, step)))
        draw = generator_of(seed, step, micro, 1)  # the 1: nothing as the conditions' noise is
        state, ids, mask = self.shards.draw(phase, step, micro)
        sigma = torch.stack([
            draw_sigmas(len(ids), draw, shift=self.match.shift, mean=None,
                        between=self.match.between)
            for _ in range(2)
        ])
        noise = torch.randn(2, *state.latents.shape, generator=draw)
        return MatchBatch(state, ids, mask, last, sigma.to(self.device), noise.to(self.device))

    def loss(self, batch: MatchBatch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Of the student, whose gradient is where its clips are to go, and of its follower."""
        context = self.context(batch.ids, batch.mask)
        state, made = self.play(batch, context)
        clean, generated = made.detach(), state.denoise_mask
        follower = self.with_delta(self.follower, state, context)
        change, gap = self.change(batch, state, clean, follower, step)
        matching = squared_error(made, clean + change, generated).mean()
        level, noise = batch.sigma[1], batch.noise[1]
        answer = follower(state.project(add_noise(clean, noise, level)), level)
        following = velocity_loss(answer, clean, noise, generated).mean()
        loss, numbers = matching + following, {"gap": gap, "following": following.detach()}
        if self.critic is not None and self.match.critic is not None:
            score = self.critic.score(generated)
            follower(state.project(add_noise(state.clean, noise, level)), level)
            told = surprise(score, self.critic.score(generated))
            loss = loss + self.match.critic.weight * told
            numbers["critic"] = told.detach()
        return loss, numbers

    def change(
        self, batch: MatchBatch, state: LatentState, clean: Tensor, follower: Denoise, step: int
    ) -> tuple[Tensor, Tensor]:
        """Where clips are to go, [B, C, F, h, w], and how far teacher and follower differ."""
        critic, config = self.critic, self.match.critic
        sigma, generated = batch.sigma[0], state.denoise_mask
        with torch.set_grad_enabled(critic is not None):
            clean = clean.clone().requires_grad_(critic is not None)
            noisy = state.project(add_noise(clean, batch.noise[0], sigma))
            answer = follower(noisy, sigma)
            way = None if critic is None else critic.way_to_truth(clean, generated)
        with torch.no_grad():
            teacher = self.teacher.answers(state, batch.ids, batch.mask, self.config.trajectories)
            change = _change(clean, noisy, sigma, teacher(noisy, sigma), answer, generated)
            gap = squared_error(change, torch.zeros_like(change), generated).mean().sqrt()
            if way is not None and config is not None:
                change = change + config.share_at(step) * gap * way
        return change, gap

    def play(
        self, batch: MatchBatch, context: tuple[Tensor, Tensor]
    ) -> tuple[LatentState, Tensor]:
        """The clips that the student makes of a batch, and what teacher and follower know of them.

        Gradients flow through its step number `last` alone.
        """
        return batch.state, self.made(batch.state, context, batch.last)

    def made(self, state: LatentState, context: tuple[Tensor, Tensor], last: int) -> Tensor:
        """Clean latents as the student sees them at its step number `last`, by its own steps."""
        return self.steps_to(last, self.with_delta(self.delta, state, context), state)

    def steps_to(self, last: int, student: Denoise, state: LatentState) -> Tensor:
        """Clean latents of a state as a student sees them at its step number `last`."""
        sigmas = torch.cat([self.sigmas[: last + 1], self.sigmas[-1:]])

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
        clean = self.made(state, context, len(self.sigmas) - 2)
        follower = self.with_delta(self.follower, state, context)
        teacher = self.teacher.answers(state, given.ids, given.mask, self.config.trajectories)
        gaps, errors = [], []
        for index, level in enumerate(LEVELS):
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
