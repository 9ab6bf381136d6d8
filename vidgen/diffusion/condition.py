"""The one mechanism for conditions: known values in the latents, and known stills beside them.

A task is a `LatentState` with conditions written into it. Known latents stand in place with
sigma = 0 for their tokens (as Wan 2.2 TI2V-5B has its first frame); a still for a later moment
can't stand in place, since a latent frame there stands for `stride_t` frames, so it joins as extra
tokens at its own time position. Sampling and training build the model's input by the same function.

Axes: B batch, C latent channels, F latent frames, K key stills, h w latent rows and columns,
T H W frames, pixel rows and columns.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from vidgen.core.errors import InputError
from vidgen.core.protocols import KeyTokens
from vidgen.core.shapes import Strides
from vidgen.diffusion.flow import add_noise
from vidgen.diffusion.sound import Packing, SoundState

FIRST_REFERENCE_POSITION = -4.0
REFERENCE_SPACING = 2.0


@dataclass(frozen=True)
class LatentState:
    """Latents on their way from noise to a clip, and all that is known of the clip beforehand.

    Attributes:
        latents: [B, C, F, h, w], the starting noise, or where sampling has come to.
        clean: [B, C, F, h, w], the known values; anything where not known.
        denoise_mask: [B, 1, F, h, w] bool, True where latents are to be generated.
        keys: known stills at times of their own, or None.
        stacked: [B, _, F, h, w] channels that the model reads behind the latents', or None.
        control: [B, _, F, h, w] what VACE's control blocks read, or None.
        image_context: [B, _, D] CLIP features of known pictures, or None.
        num_references: leading latent frames that are references, not the clip.
        sound: the clip's sound on its way, or None.
    """

    latents: Tensor
    clean: Tensor
    denoise_mask: Tensor
    keys: KeyTokens | None = None
    stacked: Tensor | None = None
    control: Tensor | None = None
    image_context: Tensor | None = None
    num_references: int = 0
    sound: SoundState | None = None

    @cached_property
    def any_known(self) -> bool:
        """Whether any latent in place is known."""
        return not bool(self.denoise_mask.all())

    @cached_property
    def whole_frames(self) -> bool:
        """Whether each latent frame is known or generated as a whole."""
        pixels = self.denoise_mask.flatten(3)
        return bool((pixels == pixels[..., :1]).all())

    def impose(self, latents: Tensor) -> Tensor:
        """Write the known values into the picture's latents, exactly."""
        return torch.where(self.denoise_mask, latents, self.clean.to(latents))

    @cached_property
    def packing(self) -> Packing | None:
        """How picture and sound lie in the one tensor that samplers see; None without sound."""
        return None if self.sound is None else Packing.of(self.latents, self.sound.latents)

    def begin(self) -> Tensor:
        """What a sampler starts from: [B, C, F, h, w], with sound [B, n]."""
        sound = None if self.sound is None else self.sound.latents
        return self.project(self.together(self.latents, sound))

    def project(self, latents: Tensor) -> Tensor:
        """Write all that is known into what a sampler has; its `project`."""
        picture, sound = self.apart(latents)
        if self.sound is None or sound is None:
            return self.impose(picture)
        return self.together(self.impose(picture), self.sound.impose(sound))

    def apart(self, latents: Tensor) -> tuple[Tensor, Tensor | None]:
        """The picture's and the sound's share of what a sampler has, or of its velocity."""
        return (latents, None) if self.packing is None else self.packing.unpack(latents)

    def together(self, picture: Tensor, sound: Tensor | None) -> Tensor:
        """The inverse of `apart`."""
        if self.packing is None or sound is None:
            return picture
        return self.packing.pack(picture, sound)

    @cached_property
    def generated(self) -> Tensor:
        """The mask of what is to be generated, as a sampler has it."""
        sound = None if self.sound is None else self.sound.denoise_mask
        return self.together(self.denoise_mask, sound)


def new_state(noise: Tensor) -> LatentState:
    """A state with nothing known: text-to-video."""
    mask = torch.ones_like(noise[:, :1], dtype=torch.bool)
    return LatentState(latents=noise, clean=torch.zeros_like(noise), denoise_mask=mask)


def prefix(state: LatentState, latents: Tensor) -> LatentState:
    """The clip begins with these latent frames, [B or 1, C, n, h, w]: extension.

    Raises:
        InputError: a prefix that leaves nothing to generate.
    """
    count, total = latents.shape[2], state.latents.shape[2]
    if count >= total:
        raise InputError(
            f"a beginning of {count} latent frames leaves nothing to generate in a clip of {total}"
        )
    clean, mask = state.clean.clone(), state.denoise_mask.clone()
    clean[:, :, :count] = latents.to(clean)
    mask[:, :, :count] = False
    return replace(state, clean=clean, denoise_mask=mask)


def first_frame(state: LatentState, latent: Tensor) -> LatentState:
    """The clip begins with a still, encoded alone: [B or 1, C, 1, h, w]."""
    assert latent.shape[2] == 1
    return prefix(state, latent)


def mask(state: LatentState, latents: Tensor, denoise_mask: Tensor) -> LatentState:
    """Keep a clip's latents [B or 1, C, F, h, w] where `denoise_mask` [B or 1, 1, F, h, w] is 0."""
    known = (~(denoise_mask > 0)).expand_as(state.denoise_mask)
    return replace(
        state,
        clean=torch.where(known, latents.to(state.clean), state.clean),
        denoise_mask=state.denoise_mask & ~known,
    )


def video_at_strength(state: LatentState, latents: Tensor, start_sigma: float) -> LatentState:
    """Start from a clip instead of noise: video-to-video (SDEdit, Meng et al. 2022, Alg. 1).

    Args:
        state: whose `latents` are still the starting noise.
        latents: the clip's, [B or 1, C, F, h, w].
        start_sigma: sigmas[0] of `make_sigmas(..., strength=X)`. At strength 0 sampling takes no
            step and gives the clip back; at 1 the noise stays untouched, bit for bit.
    """
    return replace(state, latents=add_noise(latents.to(state.latents), state.latents, start_sigma))


def keyframe(state: LatentState, latent: Tensor, frame_index: int, strides: Strides) -> LatentState:
    """Show a still, encoded alone [B or 1, C, 1, h, w], at frame `frame_index` of the clip.

    Raises:
        InputError: a frame that the clip doesn't have.
    """
    require_frame(frame_index, 1 + (state.latents.shape[2] - 1) * strides.t)
    if frame_index == 0:
        return first_frame(state, latent)
    return _append_key(state, latent, keyframe_position(frame_index, strides))


def require_frame(frame_index: int, num_frames: int) -> None:
    """Raise InputError unless the clip has this frame."""
    if not 0 <= frame_index < num_frames:
        raise InputError(
            f"frame {frame_index} is not in the clip: it has frames 0 to {num_frames - 1}"
        )


def last_frame(state: LatentState, latent: Tensor, strides: Strides) -> LatentState:
    """The clip ends with a still, encoded alone: [B or 1, C, 1, h, w]."""
    return keyframe(state, latent, (state.latents.shape[2] - 1) * strides.t, strides)


def reference(state: LatentState, latent: Tensor, index: int = 0) -> LatentState:
    """Show a still of a subject, [B or 1, C, 1, h, w], outside of the clip's time."""
    return _append_key(state, latent, reference_position(index))


def keyframe_position(frame_index: int, strides: Strides) -> float:
    """Where a frame lies on the latent frames' axis.

    Latent frame i >= 1 stands for frames t * (i - 1) + 1 to t * i; its position i is their centre.
    """
    return 0.0 if frame_index == 0 else (frame_index + (strides.t - 1) / 2) / strides.t


def reference_position(index: int) -> float:
    """The time position reserved for the n-th reference image: before the clip, well apart."""
    return FIRST_REFERENCE_POSITION - REFERENCE_SPACING * index


def denoise_inputs(
    state: LatentState, sigma: Tensor, latents: Tensor | None = None, *, patch: int = 1
) -> tuple[Tensor, Tensor]:
    """What the model gets to see of a state at a noise level, besides `state.keys`.

    Args:
        state: the conditions.
        sigma: [B].
        latents: noisy ones at `sigma`; by default the state's own.
        patch: latents a side of one token.

    Returns:
        (latents, sigma). With nothing known both are as they came. Else the known values are
        written into the latents, and sigma is 0 where known: [B, F] when frames are known as a
        whole, [B, F, h / patch, w / patch] when a token is. Stacked channels come last.
    """
    latents = state.latents if latents is None else latents
    if state.any_known:
        latents = state.impose(latents)
        unknown = state.denoise_mask[:, 0].to(sigma.dtype)
        if state.whole_frames:
            sigma = sigma[:, None] * unknown[:, :, 0, 0]
        else:
            sigma = sigma.view(-1, 1, 1, 1) * F.max_pool2d(unknown, patch)
    if state.stacked is not None:
        latents = torch.cat([latents, state.stacked.to(latents)], dim=1)
    return latents, sigma


def latent_mask(pixels: Tensor, strides: Strides, *, patch: int = 1) -> Tensor:
    """Shrink a mask of pixels to one of latents; a latent touched by any set pixel is set.

    Args:
        pixels: [B, 1, T, H, W], set (over 0.5) where to generate; T = 1 + stride_t * (F - 1).
        strides: the VAE's.
        patch: latents a side of one token; a token is generated or known as a whole.

    Returns:
        [B, 1, F, h, w] bool.
    """
    side = strides.hw * patch
    touched = (pixels > 0.5).float()
    head = F.max_pool3d(touched[:, :, :1], (1, side, side))
    parts = [head]
    if touched.shape[2] > 1:
        parts.append(F.max_pool3d(touched[:, :, 1:], (strides.t, side, side)))
    coarse = torch.cat(parts, dim=2) > 0
    return coarse.repeat_interleave(patch, dim=3).repeat_interleave(patch, dim=4)


def _append_key(state: LatentState, latent: Tensor, position: float) -> LatentState:
    batch = state.latents.shape[0]
    latents = latent.to(state.latents).expand(batch, -1, -1, -1, -1)
    positions = torch.full((batch, 1), position, device=latents.device)
    if state.keys is None:
        return replace(state, keys=KeyTokens(latents, positions))
    assert state.keys.valid is None, "stills can't be added to a ragged batch"
    keys = KeyTokens(
        latents=torch.cat([state.keys.latents, latents], dim=2),
        positions=torch.cat([state.keys.positions, positions], dim=1),
    )
    return replace(state, keys=keys)


@dataclass(frozen=True)
class ConditionMix:
    """How often training draws each condition; the weights needn't sum to 1.

    Attributes:
        text: nothing but the caption.
        first: the first frame.
        last: the last frame.
        both: the first and the last frame.
        frames: a random choice of a sample's stills.
        prefix: a beginning of up to two thirds of the latent frames.
        mask: a region kept through the whole clip.
        reference: a probability of its own: how often a sample that has reference stills gets
            them, beside whatever else was drawn.
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
        for name, weight in asdict(self).items():
            if not 0 <= weight < float("inf"):
                raise InputError(f"condition {name!r} must have a weight from 0, not {weight}")
        if self.reference > 1:
            raise InputError(f"the share of references must lie in 0..1, not {self.reference}")


@dataclass(frozen=True)
class Stills:
    """Stills of training clips, each encoded alone.

    Attributes:
        latents: [B, C, K, h, w].
        frame_index: [B, K] int64: the frame of the clip that it shows, which may lie behind the end
            of a clip that was cut; -1 - n for reference n.
    """

    latents: Tensor
    frame_index: Tensor


def training_conditions(
    latents: Tensor,
    generator: torch.Generator,
    mix: ConditionMix,
    strides: Strides,
    *,
    stills: Stills | None = None,
    patch: int = 1,
) -> LatentState:
    """Draw a condition for each sample of a batch.

    Args:
        latents: the clips', clean, [B, C, F, h, w]; becomes the state's `clean`.
        generator: a CPU generator.
        mix: how often which; conditions that need stills or several frames, where there are none,
            leave their share to the others.
        strides: the VAE's.
        stills: what last frames, frames at any time and references are taken from.
        patch: latents a side of one token.

    Returns:
        A state for `denoise_inputs`, whose `denoise_mask` says where the loss counts. Its keys hold
        as many columns as the fullest row needs and are None when no row needs any.
    """
    batch, _, num_frames, height, width = latents.shape
    known = torch.zeros(batch, 1, num_frames, height, width, dtype=torch.bool)
    frame_index = torch.zeros(batch, 0, dtype=torch.long) if stills is None else stills.frame_index
    frame_index = frame_index.cpu()
    used = torch.zeros(frame_index.shape, dtype=torch.bool)
    several, last_index = num_frames > 1, (num_frames - 1) * strides.t
    possible = {
        "text": True,
        "first": several,
        "prefix": several,
        "mask": min(height, width) >= 2 * patch,
        **dict.fromkeys(("last", "both", "frames"), several and stills is not None),
    }
    kinds = _draw_kinds(mix, possible, batch, generator)
    for row, kind in enumerate(kinds):
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
    keys = None if stills is None else _gather_keys(stills.latents, frame_index, used, strides)
    return LatentState(latents, latents, ~known.to(latents.device), keys)


def _draw_kinds(
    mix: ConditionMix, possible: dict[str, bool], batch: int, generator: torch.Generator
) -> list[str]:
    names = list(possible)
    weights = torch.tensor([float(getattr(mix, name)) * possible[name] for name in names])
    if not weights.any():
        return ["text"] * batch
    drawn = torch.multinomial(weights, batch, replacement=True, generator=generator)
    return [names[i] for i in drawn.tolist()]


def _draw_int(low: int, high: int, generator: torch.Generator) -> int:
    return int(torch.randint(low, high + 1, (), generator=generator))


def _draw_subset(candidates: Tensor, generator: torch.Generator) -> Tensor:
    """A random choice among the candidates [K] bool, at least one if there are any."""
    luck = torch.rand(len(candidates), generator=generator).where(candidates, 1.0)
    return candidates & ((luck < 0.5) | (luck == luck.min()))


def _draw_region(height: int, width: int, generator: torch.Generator) -> Tensor:
    """[height, width] bool: a box or a half-plane, its inside or its outside; never all or none."""
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
    """The used stills, moved to the left of their rows."""
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
