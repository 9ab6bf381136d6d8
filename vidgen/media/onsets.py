"""Onset detection by spectral flux, more precise than its frames of 2 ms.

Axes: B clips, N samples, T frames, H frequencies.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vidgen.core.errors import InputError

Times = NDArray[np.float64]

HOP_S, WINDOW_S, LAG = 0.002, 0.012, 4  # LAG: frames over which a rise counts
_GAIN = 200.0  # of magnitudes before their logarithm: a full-scale sine is about 1
_MIN_GAP_S, _MEDIAN_S = 0.04, 0.15  # least distance of onsets; reach of the running median
_RISE = 0.08  # least mean rise of log magnitude above the median
#: Delay of the flux's peak after a step, measured on the cues of the training world.
_DELAY_S = 0.0019


def flux(sound: Tensor, rate: int) -> Tensor:
    """Return the mean rise of log magnitude over `LAG` frames, [B, T], of sound [B, N].

    The T frames lie `HOP_S` apart. Energy that moves by one bin doesn't count, so a gliding tone
    is no onset (Boeck & Widmer 2013, eq. 5).
    """
    hop, window = round(HOP_S * rate), 2 * round(WINDOW_S * rate / 2)
    taper = torch.hann_window(window, device=sound.device)
    spectra = torch.stft(F.pad(sound, (window // 2, window // 2)), window, hop, window=taper,
                         center=False, return_complex=True)
    logs = torch.log1p(_GAIN * spectra.abs() / float(taper.sum() / 2))
    before = F.max_pool1d(logs.transpose(1, 2), 3, 1, 1).transpose(1, 2)
    rise = (logs[:, :, LAG:] - before[:, :, :-LAG]).clamp(min=0).mean(1)
    return F.pad(rise, (LAG, 0))


def find_onsets(sound: Tensor, rate: int, share: float = 0.5) -> list[Times]:
    """Return the onsets of each clip of sound [B, N] or [N], in seconds, ascending.

    An onset needs at least a `share` of the strength of the clip's strongest one.

    Raises:
        InputError: another shape, no samples, or a rate below 1.
    """
    if sound.dim() not in (1, 2) or not sound.shape[-1] or rate <= 0:
        raise InputError(
            f"onsets need mono sound [clips, samples] and its rate, not {list(sound.shape)} "
            f"at {rate} Hz"
        )
    curves = flux(sound.float().reshape(-1, sound.shape[-1]), rate).cpu()
    around = 2 * round(_MEDIAN_S / HOP_S) + 1
    padded = F.pad(curves[:, None], (around // 2, around // 2), mode="replicate")[:, 0]
    median = padded.unfold(1, around, 1).median(2).values
    width = 2 * round(_MIN_GAP_S / HOP_S) + 1
    highest = F.max_pool1d(curves[:, None], width, 1, width // 2)[:, 0]
    above = curves - median
    needed = (share * above.amax(1, keepdim=True)).clamp(min=_RISE)
    peaks = (curves == highest) & (above >= needed)
    return [_fit(curve, row) for curve, row in zip(curves.numpy(), peaks.numpy(), strict=True)]


def pair_times(times: Times, others: Times, early_s: float, late_s: float) -> list[tuple[int, int]]:
    """Return the closest of the largest one-to-one pairings of two ascending lists of times.

    The second of a pair comes at most `early_s` before the first, or `late_s` after it. Pairs are
    indices (of times, of others), ascending.
    """
    # for each number of others: minus the number of pairs, their sum of |dt|, the pairs
    best: list[tuple[int, float, list[tuple[int, int]]]] = [(0, 0.0, [])] * (len(others) + 1)
    for i, at in enumerate(times):
        row = [best[0]]
        for j, time in enumerate(others):
            options = [best[j + 1], row[j]]
            if -early_s <= time - at <= late_s:
                count, distance, pairs = best[j]
                options.append((count - 1, distance + abs(time - at), [*pairs, (i, j)]))
            row.append(min(options, key=lambda option: option[:2]))
        best = row
    return best[-1][2]


def _fit(curve: NDArray[np.float32], peaks: NDArray[np.bool_]) -> Times:
    """Return times of a curve's peaks, each the top of the parabola through three frames."""
    found: list[float] = []
    for at in np.flatnonzero(peaks):
        if found and at - found[-1] < 2:  # a plateau
            continue
        shift = 0.0
        if 0 < at < len(curve) - 1:
            left, top, right = (float(v) for v in curve[at - 1 : at + 2])
            bend = left - 2 * top + right
            shift = 0.0 if bend >= 0 else 0.5 * (left - right) / bend
        found.append(at + shift)
    return np.maximum(np.array(found) * HOP_S - _DELAY_S, 0.0)
