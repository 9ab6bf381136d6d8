"""How like two pictures are, in numpy. Axes: H W rows and columns of pixels."""

from __future__ import annotations

import numpy as np

from vidgen.media.cells import LUMA, Array
from vidgen.media.types import Frames


def psnr(frame: Frames, reference: Frames) -> float:
    """10 log10(peak^2 / MSE) in dB of two pictures uint8 [H, W, 3]; 100 where they are equal."""
    error = np.subtract(frame, reference, dtype=np.float32)
    return float(min(100.0, 10 * np.log10(255**2 / max(float(np.square(error).mean()), 1e-12))))


def ssim(frame: Frames, reference: Frames, side: int = 8) -> float:
    """Structural similarity of the luma (Wang et al. 2004, eq. 13), over blocks side by side."""
    def blocks(picture: Frames) -> Array:
        luma = picture @ LUMA
        height, width = (max(1, size // side) for size in luma.shape)
        luma = luma[: height * side, : width * side]
        return luma.reshape(height, luma.shape[0] // height, width, -1).swapaxes(1, 2)

    a, b = blocks(frame), blocks(reference)
    mean_a, mean_b = a.mean((2, 3)), b.mean((2, 3))
    covariance = (a * b).mean((2, 3)) - mean_a * mean_b
    one, two = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    likeness = (2 * mean_a * mean_b + one) * (2 * covariance + two)
    likeness /= (mean_a**2 + mean_b**2 + one) * (a.var((2, 3)) + b.var((2, 3)) + two)
    return float(likeness.mean())
