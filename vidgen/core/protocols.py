"""Data and protocols shared by packages of one level; this module doesn't import torch.

Axes: B batch, C latent channels, F latent frames, K key stills, h w latent rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

OnEvent = Callable[[dict[str, Any]], None]
"""Receives events as JSON data; the field `event` names the kind, which determines the others."""


@dataclass(frozen=True)
class KeyTokens:
    """Known still images, which join the tokens of a clip at real-valued time positions."""

    latents: Tensor  # [B, C, K, h, w], each still encoded alone, normalised like the clip's latents
    positions: Tensor  # [B, K] float32, on RoPE's axis of latent frames; fractional or negative too
    valid: Tensor | None = None  # [B, K] bool; attention ignores invalid stills. None: all are

    @property
    def num_keys(self) -> int:
        """K, the largest number of stills of a sample."""
        return int(self.latents.shape[2])


@dataclass(frozen=True)
class SamplerState:
    """State of a sampler between two steps; resuming from it is bit-equal."""

    step: int
    latents: Tensor  # [B, C, F, h, w] float32 at sigmas[step]
    history: tuple[Tensor, ...] = ()  # values of earlier steps, shaped like `latents`
    # tensors of the model's step cache, by name; samplers leave it empty
    cache: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class StepInfo:
    """Report of a sampler after a step."""

    num_steps: int
    sigma: float  # noise level at the start of the step
    sigma_next: float  # noise level at its end, that of `state.latents`
    denoised: Tensor  # [B, C, F, h, w], the model's estimate of the clean latents, for previews
    state: SamplerState  # to resume from after this step

    @property
    def step(self) -> int:
        """Number of the step just taken, from 1 to `num_steps`."""
        return self.state.step


OnStep = Callable[[StepInfo], None]
"""Callback after each step; raising `Cancelled` stops the run cleanly."""


class Denoise(Protocol):
    """Model with fixed prompt and conditions, as samplers call it."""

    def __call__(self, latents: Tensor, sigma: Tensor) -> Tensor:
        """Map noisy latents [B, C, F, h, w] at sigma [B] to a velocity of the same shape."""
        ...


class StepCache(Protocol):
    """Cache that predicts the output of a transformer's blocks from earlier steps.

    A transformer runs its first `lead` blocks and calls `recall`. If that returns tokens, they
    replace the output of the last block; if not, the transformer runs the other blocks and passes
    their output to `keep`. Tokens are [B, L, D] and must not be changed in place.
    """

    @property
    def lead(self) -> int:
        """Number of blocks that run before `recall`."""
        ...

    def recall(self, start: Tensor, tokens: Tensor) -> Tensor | None:
        """Return the predicted output of the last block, or None if it has to be computed.

        Args:
            start: input of the first block.
            tokens: output of block `lead`.
        """
        ...

    def keep(self, tokens: Tensor) -> None:
        """Record the output of the last block, after `recall` returned None."""
        ...
