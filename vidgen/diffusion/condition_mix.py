"""Draw conditions for training, and write them into the state of a batch.

Axes: B batch, C latent channels, F latent frames, K stills, h w latent rows and columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vidgen.core.errors import InputError
from vidgen.core.protocols import KeyTokens
from vidgen.core.shapes import Strides
from vidgen.diffusion.condition import keyframe_position, reference_position
from vidgen.diffusion.state import LatentState

KINDS = ("text", "first", "last", "both", "frames", "prefix", "mask")
"""Conditions of which a sample has one; it may have references, too."""


@dataclass(frozen=True)
class ConditionMix:
    """Frequencies of the conditions in training; the weights needn't sum to 1.

    Attributes:
        text: nothing but the caption.
        frames: a random choice of a sample's stills.
        prefix: a beginning of up to two thirds of the latent frames.
        mask: a region kept through the whole clip.
        reference: probability that a sample gets its reference stills, whatever else was drawn.
    """

    text: float = 0.60
    first: float = 0.15
    last: float = 0.05
    both: float = 0.05
    frames: float = 0.05
    prefix: float = 0.10
    mask: float = 0.05
    reference: float = 0.5

    def __post_init__(self) -> None:
        for name in (*KINDS, "reference"):
            weight = getattr(self, name)
            if not 0 <= weight < float("inf"):
                raise InputError(f"condition {name!r} must have a weight from 0, not {weight}")
        if self.reference > 1:
            raise InputError(f"the share of references must lie in 0..1, not {self.reference}")


@dataclass(frozen=True)
class Stills:
    """Stills of training clips, each encoded alone.

    Attributes:
        latents: [B, C, K, h, w].
        frame_index: [B, K] int64, the frame of the clip, which may lie after the end of a clip
            that was cut; -1 - n for reference n.
    """

    latents: Tensor
    frame_index: Tensor


@dataclass(frozen=True)
class Given:
    """Conditions drawn for each sample of a batch.

    Attributes:
        known: [B, 1, F, h, w] bool, latents known in place.
        used: [B, K] bool, the stills that a sample is given.
        frame_index: [B, K], see `Stills`.
    """

    known: Tensor
    used: Tensor
    frame_index: Tensor

    @property
    def has_reference(self) -> Tensor:
        """Samples that are given a reference image, [B] bool."""
        return (self.used & (self.frame_index < 0)).any(1)


def draw_conditions(
    size: tuple[int, int, int, int], generator: torch.Generator, mix: ConditionMix,
    strides: Strides, *, frame_index: Tensor | None = None, patch: int = 1,
) -> Given:
    """Draw a condition for each sample of a batch of latents of `size` B, F, h and w.

    Conditions that need missing stills or several frames leave their share to the others. The
    generator and `frame_index` [B, K] of the stills (see `Stills`; None: no stills) are on the CPU.
    A token has `patch` latents a side.
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
    weights = torch.tensor([float(getattr(mix, kind)) * possible[kind] for kind in kinds])
    drawn = [0] * batch  # "text"
    if weights.any():
        drawn = torch.multinomial(weights, batch, replacement=True, generator=generator).tolist()
    for row, kind in enumerate(kinds[number] for number in drawn):
        if kind in {"first", "both"}:
            known[row, :, :1] = True
        if kind in {"last", "both"}:
            used[row] = frame_index[row] == last_index
        if kind == "frames":
            inside = (frame_index[row] > 0) & (frame_index[row] <= last_index)
            used[row] = _draw_subset(inside, generator)
        if kind == "prefix":
            longest = max(1, 2 * num_frames // 3)
            known[row, :, : _draw_int(1, longest, generator)] = True
        if kind == "mask":
            region = _draw_region(height // patch, width // patch, generator)
            known[row] = region.repeat_interleave(patch, 0).repeat_interleave(patch, 1)
    has_reference = torch.rand(batch, 1, generator=generator) < mix.reference
    used |= (frame_index < 0) & has_reference
    return Given(known, used, frame_index)


def with_given(
    latents: Tensor, given: Given, stills: Tensor | None, strides: Strides
) -> LatentState:
    """Return the state of clean clips [B, C, F, h, w] with drawn conditions, for `denoise_inputs`.

    The loss counts where its `denoise_mask` is set. `stills` are [B, C, K, h, w], or None. The
    state's keys have as many columns as the fullest row needs, and are None when no row needs any.
    """
    keys = None
    if stills is not None:
        keys = _gather_keys(stills, given.frame_index, given.used, strides)
    return LatentState(latents, latents, ~given.known.to(latents.device), keys)


def training_conditions(
    latents: Tensor, generator: torch.Generator, mix: ConditionMix, strides: Strides, *,
    stills: Stills | None = None, patch: int = 1,
) -> LatentState:
    """Draw conditions for clips and return their state: `draw_conditions` and `with_given`."""
    batch, _, frames, height, width = latents.shape
    index = None if stills is None else stills.frame_index.cpu()
    given = draw_conditions((batch, frames, height, width), generator, mix, strides,
                            frame_index=index, patch=patch)
    return with_given(latents, given, None if stills is None else stills.latents, strides)


def _draw_int(low: int, high: int, generator: torch.Generator) -> int:
    return int(torch.randint(low, high + 1, (), generator=generator))


def _draw_subset(candidates: Tensor, generator: torch.Generator) -> Tensor:
    """Return a random choice among the candidates [K] bool, at least one if any exist."""
    luck = torch.rand(len(candidates), generator=generator).where(candidates, 1.0)
    return candidates & ((luck < 0.5) | (luck == luck.min()))


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


def _gather_keys(
    latents: Tensor, frame_index: Tensor, used: Tensor, strides: Strides
) -> KeyTokens | None:
    """Return the used stills, moved to the left of their rows."""
    count = int(used.sum(1).max()) if used.numel() else 0
    if count == 0:
        return None
    order = torch.argsort(used.int(), dim=1, descending=True, stable=True)[:, :count]
    index = frame_index.gather(1, order)
    shown = [
        [keyframe_position(n, strides) if n >= 0 else reference_position(-1 - n) for n in row]
        for row in index.tolist()
    ]
    rows = torch.arange(len(order))[:, None]
    device = latents.device
    return KeyTokens(
        latents=latents.transpose(1, 2)[rows.to(device), order.to(device)].transpose(1, 2),
        positions=torch.tensor(shown, device=device),
        valid=used.gather(1, order).to(device),
    )
