"""Formulas of picture quality. Axes: B clips, C colours, T frames, H W pixels."""

from __future__ import annotations

from torch import Tensor


def psnr(video: Tensor, reference: Tensor, mask: Tensor | None = None) -> Tensor:
    """Peak signal-to-noise ratio of each clip, 10 log10(peak^2 / MSE) in dB, with peak = 2.

    Args:
        video: [B, C, T, H, W] in [-1, 1].
        reference: the same shape.
        mask: [B, 1, T, H, W] in [0, 1], weights of the pixels' squared errors; None counts all
            alike. A clip whose mask is empty has no ratio: NaN.

    Returns:
        [B] float32; infinite where the two are equal.
    """
    error = (video.float() - reference.float()).square()
    if mask is None:
        mse = error.mean((1, 2, 3, 4))
    else:
        mse = (error * mask).sum((1, 2, 3, 4)) / (mask.sum((1, 2, 3, 4)) * error.shape[1])
    return 10 * (4 / mse).log10()
