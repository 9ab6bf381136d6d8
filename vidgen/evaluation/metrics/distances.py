"""Distances of two sets of features: of motion histograms, and FVD and KVD of a network's.

Axes: K features of a set, D width of a feature.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Rows = Sequence[Sequence[float]]


def frechet_distance(ones: Rows, others: Rows, least: int | None = None) -> float | None:
    """Distance of two sets of features as of Gaussians (Dowson and Landau 1982).

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1^.5 C2 C1^.5)^.5). Of the features of I3D it is FVD
    (Unterthiner et al. 2018).

    Args:
        ones: [K, D].
        others: [K', D].
        least: rows that each set needs; None: one more than a row has values.

    Returns:
        The distance, or None where a set has fewer rows.
    """
    a, b = np.asarray(ones, dtype=np.float64), np.asarray(others, dtype=np.float64)
    if not a.size or not b.size or min(len(a), len(b)) < (least or a.shape[1] + 1):
        return None
    between = float(np.square(a.mean(0) - b.mean(0)).sum())
    one, other = (rows - rows.mean(0) for rows in (a, b))
    one, other = one / np.sqrt(len(a) - 1), other / np.sqrt(len(b) - 1)
    # the trace of the root is the sum of the singular values of the product of both factors
    cross = float(np.linalg.svd(one @ other.T, compute_uv=False).sum())
    return max(0.0, between + float(np.square(one).sum() + np.square(other).sum()) - 2 * cross)


def kernel_distance(ones: Rows, others: Rows) -> float | None:
    """Squared maximum mean discrepancy under the kernel (x y / D + 1)^3, without bias.

    Of the features of I3D it is KVD (Binkowski et al. 2018, eq. 4; Unterthiner et al. 2018). It can
    be a little below 0.

    Args:
        ones: [K, D].
        others: [K', D].

    Returns:
        The distance, or None where a set has fewer than two rows.
    """
    a, b = np.asarray(ones, dtype=np.float64), np.asarray(others, dtype=np.float64)
    if min(len(a), len(b)) < 2:
        return None
    within = sum(_mean_of_others(_kernel(rows, rows)) for rows in (a, b))
    return float(within - 2 * _kernel(a, b).mean())


def _kernel(ones: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    kernel: NDArray[np.float64] = (ones @ others.T / ones.shape[1] + 1) ** 3
    return kernel


def _mean_of_others(kernel: NDArray[np.float64]) -> float:
    """Mean of a square matrix without its diagonal."""
    count = len(kernel)
    return float((kernel.sum() - np.trace(kernel)) / (count * (count - 1)))
