"""VACE's branch of a `SpacetimeDiT`: blocks that turn a control into what other blocks add.

Axes: B batch, C channels, F latent frames, h w latent rows and columns, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from vidgen.core.errors import InputError
from vidgen.core.protocols import KeyTokens
from vidgen.models.dit_blocks import BlockLayers, compute_dtype
from vidgen.models.dit_inputs import Context, Layout, Stream

if TYPE_CHECKING:
    from vidgen.models.dit import DiTConfig


class ControlBlock(BlockLayers):
    """A block of VACE's branch: it refines control tokens and draws from them what a block adds."""

    def __init__(
        self, width: int, num_heads: int, ffn_dim: int, eps: float, *, image: bool, first: bool
    ) -> None:
        super().__init__(
            width, num_heads, ffn_dim, eps, axis="all", image=image, audio_ffn_dim=None
        )
        self.proj_in = nn.Linear(width, width) if first else None
        self.proj_out = nn.Linear(width, width)

    def forward(
        self, control: Tensor, video: Stream, rope: Tensor, layout: Layout, context: Context
    ) -> tuple[Tensor, Tensor]:
        """Give what to add to the video and the next control tokens, both [B, L, D].

        Args:
            control: tokens [B, L, D] of the block before; the first joins them with the video's.
            video: tokens before all blocks, and their times.
            rope: [B or 1, L, d/2].
            layout: of the tokens.
            context: text and image.
        """
        if self.proj_in is not None:
            control = video.tokens + self.proj_in(control).to(video.tokens.dtype)
        [out] = self.update([Stream(control, video.time)], rope, layout, context, None, 0)
        return self.proj_out(out.tokens.to(compute_dtype(self.proj_out.weight))), out.tokens


def control_scales(
    config: DiTConfig, latents: Tensor, extra: KeyTokens | None, control: Tensor | None,
    scale: float | Sequence[float],
) -> dict[int, float]:
    """The strength of a control by layer; empty where there is none.

    Args:
        config: of the model.
        latents: [B, C, F, h, w] that are denoised.
        extra: stills, which the control says nothing of.
        control: [B, control_channels, F, h, w], or None.
        scale: one for all control layers, or one for each.

    Raises:
        InputError: for shapes and options that the model can't take.
    """
    layers = config.control_layers
    if control is None:
        return {}
    if not layers:
        raise InputError("control was given to a model without control_layers")
    if extra is not None:
        raise InputError(
            "stills can't join a pass with control; put them before the frames of latents and "
            "control instead"
        )
    batch, _, *size = latents.shape
    expected = (batch, config.control_channels, *size)
    if tuple(control.shape) != expected:
        raise InputError(f"control has shape {tuple(control.shape)}, not {expected}")
    scales = [scale] * len(layers) if isinstance(scale, int | float) else list(scale)
    if len(scales) != len(layers):
        raise InputError(
            f"control_scale has {len(scales)} values; give one, or one for each of the "
            f"{len(layers)} control layers"
        )
    return dict(zip(layers, scales, strict=True))
