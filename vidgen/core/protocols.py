"""Plain data and callables that rooms of one level hand to each other; loads no torch itself.

Axes: B batch, C latent channels, F latent frames, K key stills, h w latent rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

OnEvent = Callable[[dict[str, Any]], None]
"""Gets each event; its field `event` says what the others are about."""


@dataclass(frozen=True)
class KeyTokens:
    """Known still images that join the tokens of a clip at real-valued time positions.

    Attributes:
        latents: [B, C, K, h, w], each still encoded alone, normalised like the clip's latents.
        positions: [B, K] float32, on RoPE's axis of latent frames; may be fractions or negative.
        valid: [B, K] bool, or None when all are; attention must not see a row that is not valid.
    """

    latents: Tensor
    positions: Tensor
    valid: Tensor | None = None

    @property
    def num_keys(self) -> int:
        """K, the number of stills a sample has at most."""
        return int(self.latents.shape[2])


@dataclass(frozen=True)
class SamplerState:
    """All a sampler needs to go on from between two steps; saving it and resuming is bit-equal.

    Attributes:
        latents: [B, C, F, h, w] float32 at sigmas[step].
        history: the sampler's own memory of earlier steps, tensors shaped like `latents`.
        cache: what the model's step cache remembers, by name; samplers leave it empty.
    """

    step: int
    latents: Tensor
    history: tuple[Tensor, ...] = ()
    cache: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class StepInfo:
    """Report of a sampler after a step.

    Attributes:
        sigma: noise level this step started from.
        sigma_next: noise level reached, that of `state.latents`.
        denoised: [B, C, F, h, w], the model's current guess of the clean latents, for previews.
        state: where to resume from after this step.
    """

    num_steps: int
    sigma: float
    sigma_next: float
    denoised: Tensor
    state: SamplerState

    @property
    def step(self) -> int:
        """Number of the step just taken, from 1 to `num_steps`."""
        return self.state.step


OnStep = Callable[[StepInfo], None]
"""Called after each step; raising `Cancelled` stops the run cleanly."""


class Denoise(Protocol):
    """A model closed over its prompt and conditions, as samplers call it."""

    def __call__(self, latents: Tensor, sigma: Tensor) -> Tensor:
        """Map noisy latents [B, C, F, h, w] at sigma [B] to velocity of the same shape."""
        ...


class StepCache(Protocol):
    """Predicts the result of a stack of blocks from its results at earlier steps.

    A transformer runs its first `lead` blocks and asks `recall`. It goes on after the last block
    with the answer, or, without one, runs the other blocks and passes their result to `keep`.
    Tokens are [B, L, D] and must not be changed in place; `start` entered the first block.
    """

    @property
    def lead(self) -> int:
        """Number of blocks that run before `recall` is asked."""
        ...

    def recall(self, start: Tensor, tokens: Tensor) -> Tensor | None:
        """Return the result of the last block, or None where that has to be computed."""
        ...

    def keep(self, tokens: Tensor) -> None:
        """Note the result of the last block, after `recall` gave None."""
        ...
