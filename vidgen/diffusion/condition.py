"""Write conditions into a `LatentState`: in place, as extra tokens, or as extra channels.

For training, `draw_conditions` and `with_given` draw random ones for the clips of a batch.

Known latents in place have sigma = 0 for their tokens (as the first frame in Wan 2.2 TI2V-5B). A
later latent frame stands for `stride_t` frames, so a later still becomes extra tokens at its own
time position. Wan's I2V and VACE take known frames as a second clip in extra channels, encoded as
a whole with grey in place of unknown content, and a mask.

Axes: B batch, C latent channels, F latent frames, K key stills, R references, h w latent rows and
columns, T H W frames, pixel rows and columns, t s temporal and spatial stride.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from vidgen.core.errors import InputError
from vidgen.core.protocols import KeyTokens
from vidgen.core.shapes import Strides
from vidgen.diffusion.flow import add_noise
from vidgen.diffusion.state import FIRST_REFERENCE_POSITION, LatentState, are_references

REFERENCE_SPACING = 2.0
KINDS = ("text", "first", "last", "both", "frames", "prefix", "mask")
"""Conditions; each sample has one, and may have references as well. "text" is the caption alone,
"frames" a random choice of a sample's stills, "prefix" a beginning of up to two thirds of the
latent frames, "mask" a region that is known in all frames."""


def prefix(state: LatentState, latents: Tensor) -> LatentState:
    """Make the clip begin with known latent frames [B or 1, C, n, h, w], for extension.

    A beginning as long as the clip, or longer, raises InputError.
    """
    count, total = latents.shape[2], state.latents.shape[2]
    if count >= total:
        raise InputError(
            f"a beginning of {count} latent frames leaves nothing to generate in a clip of {total}"
        )
    return state.begun_by(latents)


def noise_known(state: LatentState, sigma: Tensor, noise: Tensor) -> LatentState:
    """Add noise [B, C, F, h, w] of level `sigma` [B] to values known in place.

    This keeps errors from growing from window to window (noise conditioning augmentation, Ho et al.
    2022, section 3.2; Chen et al. 2024, "stabilisation"). The result keeps the noise there.
    """
    shown = torch.where(state.denoise_mask, state.clean, add_noise(state.clean, noise, sigma))
    return replace(state, clean=shown, known_sigma=sigma)


def mask(state: LatentState, latents: Tensor, denoise_mask: Tensor) -> LatentState:
    """Keep a clip's latents [B or 1, C, F, h, w] where `denoise_mask` [B or 1, 1, F, h, w] is 0."""
    known = (~(denoise_mask > 0)).expand_as(state.denoise_mask)
    return replace(state, clean=torch.where(known, latents.to(state.clean), state.clean),
                   denoise_mask=state.denoise_mask & ~known)


def video_at_strength(state: LatentState, latents: Tensor, start_sigma: float) -> LatentState:
    """Start from a clip [B or 1, C, F, h, w] instead of noise (SDEdit, Meng et al. 2022, Alg. 1).

    `start_sigma` is sigmas[0] of `make_sigmas(..., strength=X)`. At strength 0 sampling takes no
    step and returns the clip; at 1 the noise stays the same, bit for bit.
    """
    noise = state.latents
    return replace(state, latents=add_noise(latents.to(noise), noise, start_sigma), noise=noise)


def keyframe(state: LatentState, latent: Tensor, frame_index: int, strides: Strides) -> LatentState:
    """Show a still, encoded alone [B or 1, C, 1, h, w], at a frame of the clip, else InputError."""
    require_frame(frame_index, 1 + (state.latents.shape[2] - 1) * strides.t)
    if frame_index == 0:
        return prefix(state, latent)
    return _append_key(state, latent, keyframe_position(frame_index, strides))


def require_frame(frame_index: int, num_frames: int) -> None:
    """Raise InputError unless the clip has this frame."""
    if not 0 <= frame_index < num_frames:
        raise InputError(
            f"frame {frame_index} is not in the clip: it has frames 0 to {num_frames - 1}"
        )


def reference(state: LatentState, latent: Tensor, index: int = 0) -> LatentState:
    """Add a reference image of a subject, [B or 1, C, 1, h, w], at a time outside the clip."""
    return _append_key(state, latent, reference_position(index))


def keyframe_position(frame_index: int, strides: Strides) -> float:
    """Return the position of a frame on the latent frames' axis.

    Latent frame i >= 1 stands for frames t * (i - 1) + 1 to t * i; its position i is their centre.
    """
    return 0.0 if frame_index == 0 else (frame_index + (strides.t - 1) / 2) / strides.t


def reference_position(index: int) -> float:
    """Return the time position of the n-th reference image, long before the clip."""
    return FIRST_REFERENCE_POSITION - REFERENCE_SPACING * index


def without_references(keys: KeyTokens | None) -> KeyTokens | None:
    """Return the stills without reference images; None if no others exist."""
    if keys is None:
        return None
    timed = ~are_references(keys)
    columns = timed.any(0).nonzero().flatten()
    if not len(columns):
        return None
    valid = timed if keys.valid is None else timed & keys.valid
    return KeyTokens(keys.latents[:, :, columns], keys.positions[:, columns],
                     None if valid[:, columns].all() else valid[:, columns])


def latent_mask(pixels: Tensor, strides: Strides, *, patch: int = 1) -> Tensor:
    """Reduce a mask of pixels to one of latents [B, 1, F, h, w] bool, True if any pixel is set.

    Args:
        pixels: [B, 1, T, H, W]; values over 0.5 are generated.
        patch: latents a side of a token, which is generated or known as a whole.
    """
    side = strides.hw * patch
    touched = (pixels > 0.5).float()
    first = touched[:, :, :1].expand(-1, -1, strides.t, -1, -1)  # latent frame 0 is one frame
    touched = torch.cat([first, touched[:, :, 1:]], dim=2)
    coarse = F.max_pool3d(touched, (strides.t, side, side)) > 0
    return coarse.repeat_interleave(patch, dim=3).repeat_interleave(patch, dim=4)


def _append_key(state: LatentState, latent: Tensor, position: float) -> LatentState:
    batch = state.latents.shape[0]
    latents = latent.to(state.latents).expand(batch, -1, -1, -1, -1)
    positions = torch.full((batch, 1), position, device=latents.device)
    if state.keys is not None:
        assert state.keys.valid is None, "stills can't be added to a ragged batch"
        latents = torch.cat([state.keys.latents, latents], dim=2)
        positions = torch.cat([state.keys.positions, positions], dim=1)
    return replace(state, keys=KeyTokens(latents, positions))


def known_frames(latents: Tensor, known: Tensor, strides: Strides) -> Tensor:
    """Return `LatentState.stacked` of Wan's I2V: [mask t | latents C] (Wan 2025, sec. 5.1.1).

    Args:
        latents: [1, C, F, h, w] of the clip with grey in place of unknown frames.
        known: [T] bool, True for known frames.
    """
    flags = known.to(latents)
    flags = torch.cat([flags[:1].expand(strides.t), flags[1:]])  # latent frame 0 is one frame
    mask = rearrange(flags, "(F t) -> 1 t F 1 1", t=strides.t)
    mask = mask.expand(-1, -1, -1, *latents.shape[3:])
    return torch.cat([mask, latents], dim=1)


def control(
    state: LatentState, kept: Tensor, changed: Tensor, wanted: Tensor, references: Sequence[Tensor],
    strides: Strides, noise: Tensor,
) -> LatentState:
    """Write a clip and references into `LatentState.control` (VACE: Jiang et al. 2025, sec. 3.2).

    Args:
        kept: [1, C, F, h, w], latents of the clip with grey in place of content to generate.
        changed: the same with grey in place of content to keep.
        wanted: [1, 1, T, H, W], 1 for pixels to generate, 0 for pixels to keep.
        references: stills [1, C, 1, h, w], which become the first `num_references` latent frames.
        noise: [1, C, R, h, w], starting noise of the references.
    """
    rows = control_rows(kept, changed, wanted, strides)
    for reference in references:  # reversed order, as in the reference code
        empty = torch.zeros_like(rows[:, reference.shape[1] :, :1])
        rows = torch.cat([torch.cat([reference, empty], dim=1), rows], dim=2)
    before = (0, 0, 0, 0, len(references), 0)
    noise = noise.to(state.latents)
    return replace(state, control=rows, num_references=len(references),
                   latents=torch.cat([noise, state.latents], dim=2),
                   noise=None if state.noise is None else torch.cat([noise, state.noise], dim=2),
                   clean=F.pad(state.clean, before),
                   denoise_mask=F.pad(state.denoise_mask, before, value=True))


def control_rows(kept: Tensor, changed: Tensor, wanted: Tensor, strides: Strides) -> Tensor:
    """Return `LatentState.control` without references, [kept C | changed C | mask s * s]."""
    side = strides.hw
    mask = rearrange(wanted[:, 0], "b t (h y) (w x) -> b (y x) t h w", y=side, x=side)
    mask = F.interpolate(mask, size=kept.shape[2:], mode="nearest-exact")
    return torch.cat([kept, changed, mask.to(kept)], dim=1)


def keep_beginning(state: LatentState, kept: Tensor, num_known: int) -> LatentState:
    """Mark the first `num_known` latent frames of a clip as known in a state's `control`.

    `kept` is as in `control`.
    """
    assert state.control is not None
    rows, first, channels = state.control.clone(), state.num_references, kept.shape[1]
    rows[:, :channels, first:] = kept.to(rows)
    rows[:, 2 * channels :, first : first + num_known] = 0
    return replace(state, control=rows)


@dataclass(frozen=True)
class Given:
    """Conditions drawn for each sample of a batch."""

    known: Tensor  # [B, 1, F, h, w] bool, True for latents known in place
    used: Tensor  # [B, K] bool, True for the stills that a sample gets
    frame_index: Tensor  # [B, K], frame of the clip that each still shows; -1 - n for reference n


def draw_conditions(
    size: tuple[int, int, int, int], generator: torch.Generator, weights: Mapping[str, float],
    strides: Strides, *, reference: float = 0.0, frame_index: Tensor | None = None, patch: int = 1,
) -> Given:
    """Draw a condition for each sample of a batch of latents of `size` B, F, h and w, on the CPU.

    Args:
        weights: relative weights of `KINDS`; those of impossible ones go to the others.
        reference: probability that a sample gets its reference stills, independent of the rest.
        frame_index: see `Given`; frames after the end of a trimmed clip are ignored. None: no
            stills.
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

    The loss applies to the latents in its `denoise_mask`. `stills` [B, C, K, h, w] are each encoded
    alone; the state's `keys` have as many columns as the sample with the most stills needs.
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
