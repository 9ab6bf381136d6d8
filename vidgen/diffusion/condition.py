"""The one mechanism for conditions: known values in the latents, and known stills beside them.

A task is a `LatentState` with conditions written into it. Known latents stand in place with
sigma = 0 for their tokens (as Wan 2.2 TI2V-5B has its first frame); a still for a later moment
can't stand in place, since a latent frame there stands for `stride_t` frames, so it joins as extra
tokens at its own time position. Sampling and training build the model's input by the same function.

Axes: B batch, C latent channels, F latent frames, K key stills, h w latent rows and columns,
T H W frames, pixel rows and columns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vidgen.core.errors import InputError
from vidgen.core.protocols import KeyTokens
from vidgen.core.shapes import Strides
from vidgen.core.tensors import mapped, moved
from vidgen.diffusion.flow import add_noise
from vidgen.diffusion.noise import shuffled
from vidgen.diffusion.sound import Packing, SoundState

FIRST_REFERENCE_POSITION = -4.0
REFERENCE_SPACING = 2.0


class FinerKnown(NamedTuple):
    """What is known of a clip at a finer frame rate, see `vidgen.diffusion.oversampling`.

    Attributes:
        latents: [B, C, n, h, w] of its first n finer latent frames, as they are shown.
        denoise_mask: [B, 1, n, h, w] bool, True where they aren't known.
        alone: whether the first of them is a single frame.
    """

    latents: Tensor
    denoise_mask: Tensor
    alone: bool = True


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
        known_sigma: [B], how much of what is known in place is noise; None: nothing.
        hides_known: what is known in place is shown as noisy as all else; see `Guidance`.
        noise: [B, C, F, h, w], the starting noise where `latents` are more than that; None there.
        spacing: how far latent frames lie apart on the time axis, where those of the model's own
            frame rate lie one apart.
        lead: which of them lies at 0 there.
        known_finer: what is known in place at a finer frame rate, where that isn't a single frame.
        video_finer: [B, C, n, h, w], the clip that sampling begins from at that rate, or None.
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
    known_sigma: Tensor | None = None
    hides_known: bool = False
    noise: Tensor | None = None
    spacing: float = 1.0
    lead: float = 0.0
    known_finer: FinerKnown | None = None
    video_finer: Tensor | None = None

    @cached_property
    def any_known(self) -> bool:
        """Whether any latent in place is known."""
        return not bool(self.denoise_mask.all())

    @cached_property
    def is_known(self) -> bool:
        """Whether all of the picture is, so that only sound is to be made, which it doesn't see."""
        return not bool(self.denoise_mask.any())

    @property
    def starting_noise(self) -> Tensor:
        """What sampling begins with, [B, C, F, h, w], without the clip that it may begin from."""
        return self.latents if self.noise is None else self.noise

    @cached_property
    def times(self) -> Tensor | None:
        """Where its latent frames lie on the time axis, [F]; None: one apart."""
        if self.spacing == 1:
            return None
        numbers = torch.arange(self.latents.shape[2], device=self.latents.device)
        return (numbers - self.lead) * self.spacing

    @cached_property
    def timed_keys(self) -> KeyTokens | None:
        """The stills where they lie on that axis; references lie outside of the clip's time."""
        if self.keys is None or self.spacing == 1:
            return self.keys
        at = self.keys.positions
        return replace(self.keys, positions=torch.where(at > 0, at * self.spacing, at))

    @property
    def has_given(self) -> Tensor:
        """Whether whole frames of a clip are given, in place or as stills, and shown as they are.

        So not what later windows go on from through noise, nor the parts that a mask keeps. [B].
        """
        frames = self.denoise_mask.flatten(3)
        whole = (frames == frames[..., :1]).flatten(1).all(1)
        given = ~frames.flatten(1).all(1)
        if self.keys is not None:
            timed = ~are_references(self.keys)
            given = given | (timed if self.keys.valid is None else timed & self.keys.valid).any(1)
        return given & whole & (self.known_sigma is None)

    @cached_property
    def whole_frames(self) -> bool:
        """Whether each latent frame is known or generated as a whole."""
        pixels = self.denoise_mask.flatten(3)
        return bool((pixels == pixels[..., :1]).all())

    def rows(self, index: Tensor | slice) -> LatentState:
        """Some clips of the batch, by their numbers, by a mask [B] or by a slice."""
        chosen: LatentState = mapped(self, lambda tensor: tensor[index])
        return chosen

    def stretch(self, frames: slice) -> LatentState:
        """Some latent frames of the picture alone, without stills and sound."""
        return LatentState(
            self.latents[:, :, frames], self.clean[:, :, frames], self.denoise_mask[:, :, frames]
        )

    def impose(self, latents: Tensor) -> Tensor:
        """Write the known values into the picture's latents, exactly."""
        return torch.where(self.denoise_mask, latents, self.clean.to(latents))

    def to(self, device: torch.device) -> LatentState:
        """The same state on another device."""
        there: LatentState = moved(self, device)
        return there

    @cached_property
    def packing(self) -> Packing | None:
        """How picture and sound lie in the one tensor that samplers see; None without sound."""
        return None if self.sound is None else Packing.of(self.latents, self.sound.latents)

    def begin(self) -> Tensor:
        """What a sampler starts from: [B, C, F, h, w], with sound [B, n]."""
        sound = None if self.sound is None else self.sound.latents
        return self.project(self.together(self.latents, sound))

    def fresh(self, step: int) -> Tensor:
        """Noise for a step of sampling, as a sampler has it; see `shuffled`."""
        picture = shuffled(self.starting_noise, step)
        return self.together(
            picture, None if self.sound is None else shuffled(self.sound.latents, step)
        )

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


def finished(latents: Tensor) -> LatentState:
    """A picture [B, C, F, h, w] of which nothing is left to make: what it sounds like may be."""
    unmade = torch.zeros_like(latents[:, :1], dtype=torch.bool)
    return LatentState(latents=latents, clean=latents, denoise_mask=unmade)


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


def noise_known(state: LatentState, sigma: Tensor, noise: Tensor) -> LatentState:
    """Show what is known in place through noise, and say so.

    What is made from it then goes on from what it means and not from its faults, which would grow
    from window to window (noise conditioning augmentation, Ho et al. 2022, section 3.2; Chen et
    al. 2024, "stabilisation"). The noise stays in what sampling gives for known places.

    Args:
        state: the conditions.
        sigma: [B], how much of what is seen is noise.
        noise: [B, C, F, h, w].
    """
    shown = torch.where(state.denoise_mask, state.clean, add_noise(state.clean, noise, sigma))
    return replace(state, clean=shown, known_sigma=sigma)


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
    noise = state.latents
    return replace(
        state, latents=add_noise(latents.to(noise), noise, start_sigma), noise=noise
    )


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


def are_references(keys: KeyTokens) -> Tensor:
    """Tell which stills are reference images, by their time positions, [B, K] bool."""
    return keys.positions <= FIRST_REFERENCE_POSITION


def without_references(keys: KeyTokens | None) -> KeyTokens | None:
    """The stills that stand for moments of the clip, without reference images; None if none do."""
    if keys is None:
        return None
    timed = ~are_references(keys)
    columns = timed.any(0).nonzero().flatten()
    if not len(columns):
        return None
    valid = timed if keys.valid is None else timed & keys.valid
    return KeyTokens(
        keys.latents[:, :, columns], keys.positions[:, columns],
        None if valid[:, columns].all() else valid[:, columns],
    )


def as_negative(state: LatentState, *, hides_given: bool) -> LatentState:
    """What the negative pass is shown; guidance pulls towards all that it goes without.

    That is the prompt, reference images, for sound the picture, since what a prompt says of sound
    would else drown what the picture does, and with `hides_given` given frames.
    """
    return replace(
        state, keys=None if hides_given else without_references(state.keys),
        hides_known=hides_given,
        sound=None if state.sound is None else replace(state.sound, sees_picture=False),
    )


def guidance_share(state: LatentState, reach: int) -> Tensor | None:
    """How far latents are from frames given in place: 0 to 1, which is `reach` latent frames off.

    As samplers have latents, or to be spread over them. Nothing is near a still, which is reached
    by guidance alone, and no sound is near anything. None without a reach.
    """
    if reach == 0:
        return None
    made = state.denoise_mask.flatten(3)[:, 0].any(-1)  # [B, F], whether any of a frame is
    moments = torch.arange(made.shape[1], device=made.device, dtype=torch.float32)
    given = moments.expand(made.shape).masked_fill(made, float("inf"))
    off = (moments[:, None] - given[:, None]).abs().amin(-1)
    share = (off * state.spacing / reach).clamp(max=1)[:, None, :, None, None]
    sound = None if state.sound is None else torch.ones_like(state.sound.latents[:, :1])
    return state.together(share, sound)


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
        written into the latents, and sigma is 0, or `known_sigma`, where known: [B, F] when frames
        are known as a whole, [B, F, h / patch, w / patch] when a token is. Those that the state
        hides are written with the noise that its own latents begin with, and sigma stays. Stacked
        channels come last.
    """
    latents = state.latents if latents is None else latents
    if state.hides_known:
        noisy = add_noise(state.clean.to(latents), state.starting_noise.to(latents), sigma)
        latents = torch.where(state.denoise_mask, latents, noisy)
    elif state.any_known:
        latents = state.impose(latents)
        unknown = state.denoise_mask[:, 0].to(sigma.dtype)
        if state.whole_frames:
            unknown = unknown[:, :, 0, 0]
        else:
            unknown = F.max_pool2d(unknown, patch)
        known = torch.zeros_like(sigma) if state.known_sigma is None else state.known_sigma
        rows = (-1, *[1] * (unknown.ndim - 1))
        sigma = torch.where(unknown > 0, sigma.view(rows), known.to(sigma).view(rows))
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
