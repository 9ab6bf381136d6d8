"""Pictures of many shades, whose ways optical flow can follow."""

import numpy as np


def texture(height=96, width=128, seed=0, *, waves=16, steepest=0.4, contrast=30):
    """A smooth picture [H, W, 3] uint8 of some waves, of `steepest` radians a pixel at most."""
    rng, y, x = np.random.default_rng(seed), *np.mgrid[:height, :width]
    out = np.zeros((height, width, 3))
    for _ in range(waves):
        fy, fx, phase = rng.uniform(-steepest, steepest, 3)
        out += np.sin(fy * y + fx * x + 20 * phase)[..., None] * rng.uniform(-1, 1, 3)
    return np.clip(128 + contrast * out, 20, 235).round().astype(np.uint8)
