"""Draw random conditions for training, and write them into the state of a batch.

Axes: B batch, C latent channels, F latent frames, K stills, h w latent rows and columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vidgen.core.protocols import KeyTokens
from vidgen.core.shapes import Strides
from vidgen.diffusion.condition import keyframe_position, reference_position
from vidgen.diffusion.state import LatentState

KINDS = ("text", "first", "last", "both", "frames", "prefix", "mask")
"""Conditions; each sample has one, and may have references as well. "text" is the caption alone,
"frames" a random choice of a sample's stills, "prefix" a beginning of up to two thirds of the
latent frames, "mask" a region that is known in all frames."""


@dataclass(frozen=True)
class Given:
    """Conditions drawn for each sample of a batch.

    Attributes:
        known: [B, 1, F, h, w] bool, True for latents known in place.
        used: [B, K] bool, True for the stills that a sample gets.
        frame_index: [B, K], frame of the clip that each still shows; -1 - n for reference n.
    """

    known: Tensor
    used: Tensor
    frame_index: Tensor


def draw_conditions(
    size: tuple[int, int, int, int], generator: torch.Generator, weights: Mapping[str, float],
    strides: Strides, *, reference: float = 0.0, frame_index: Tensor | None = None, patch: int = 1,
) -> Given:
    """Draw a condition for each sample of a batch of latents of `size` B, F, h and w.

    The weights of conditions that aren't possible, for lack of stills or frames, go to the others.

    Args:
        generator: on the CPU.
        weights: relative weights of `KINDS`.
        reference: probability that a sample gets its reference stills, independent of the rest.
        frame_index: frames of the stills, see `Given`, on the CPU; frames after the end of a
            trimmed clip are ignored. None: no stills.
        patch: latents a side of one token.
    """
    batch, num_frames, height, width = size
    known = torch.zeros(batch, 1, num_frames, height, width, dtype=torch.bool)
    several, last_index = num_frames > 1, (num_frames - 1) * strides.t
    possible = {
        "text": True,
        "first": several,
        "prefix": several,
        "mask": min(height, width) >= 2 * patch,
        **dict.fromkeys(("last", "both", "frames"), several and frame_index is not None),
    }
    if frame_index is None:
        frame_index = torch.zeros(batch, 0, dtype=torch.long)
    used = torch.zeros(frame_index.shape, dtype=torch.bool)
    kinds = list(possible)
    shares = torch.tensor([float(weights.get(kind, 0)) * possible[kind] for kind in kinds])
    drawn = [0] * batch  # "text"
    if shares.any():
        drawn = torch.multinomial(shares, batch, replacement=True, generator=generator).tolist()
    for row, kind in enumerate(kinds[number] for number in drawn):
        if kind in {"first", "both"}:
            known[row, :, :1] = True
        if kind in {"last", "both"}:
            used[row] = frame_index[row] == last_index
        if kind == "frames":
            inside = (frame_index[row] > 0) & (frame_index[row] <= last_index)
            luck = torch.rand(len(inside), generator=generator).where(inside, 1.0)
            used[row] = inside & ((luck < 0.5) | (luck == luck.min()))  # one, if any exist
        if kind == "prefix":
            longest = max(1, 2 * num_frames // 3)
            known[row, :, : _draw_int(1, longest, generator)] = True
        if kind == "mask":
            region = _draw_region(height // patch, width // patch, generator)
            known[row] = region.repeat_interleave(patch, 0).repeat_interleave(patch, 1)
    has_reference = torch.rand(batch, 1, generator=generator) < reference
    used |= (frame_index < 0) & has_reference
    return Given(known, used, frame_index)


def with_given(
    latents: Tensor, given: Given, stills: Tensor | None, strides: Strides
) -> LatentState:
    """Return the state of clean clips [B, C, F, h, w] with drawn conditions, for `denoise_inputs`.

    The loss applies to the latents in its `denoise_mask`. The state's `keys` have as many columns
    as the sample with the most stills needs; they are None if no sample has any.

    Args:
        stills: [B, C, K, h, w], each encoded alone, or None.
    """
    count = int(given.used.sum(1).max()) if given.used.numel() else 0
    keys = None
    if stills is not None and count:
        order = given.used.int().argsort(dim=1, descending=True, stable=True)[:, :count]
        shown = [
            [keyframe_position(n, strides) if n >= 0 else reference_position(-1 - n) for n in row]
            for row in given.frame_index.gather(1, order).tolist()
        ]
        rows, device = torch.arange(len(order))[:, None], stills.device
        keys = KeyTokens(
            latents=stills.transpose(1, 2)[rows.to(device), order.to(device)].transpose(1, 2),
            positions=torch.tensor(shown, device=device),
            valid=given.used.gather(1, order).to(device),
        )
    return LatentState(latents, latents, ~given.known.to(latents.device), keys)


def _draw_int(low: int, high: int, generator: torch.Generator) -> int:
    return int(torch.randint(low, high + 1, (), generator=generator))


def _draw_region(height: int, width: int, generator: torch.Generator) -> Tensor:
    """Draw a box or half-plane, or its outside, [height, width] bool; never all or nothing."""
    rows, columns = (_draw_int(1, size - 1, generator) for size in (height, width))
    top, left = (_draw_int(0, n, generator) for n in (height - rows, width - columns))
    shape = _draw_int(0, 3, generator)
    if shape == 0:
        top, rows, left = 0, height, 0
    elif shape == 1:
        top, left, columns = 0, 0, width
    region = torch.zeros(height, width, dtype=torch.bool)
    region[top : top + rows, left : left + columns] = True
    return region ^ bool(_draw_int(0, 1, generator))
