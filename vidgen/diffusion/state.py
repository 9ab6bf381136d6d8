"""State of a clip during denoising, picture and sound: latents and all known values.

Sampling and training build the model's input from it with the same function, `denoise_inputs`;
`condition` writes a request's known values into it. Sound is a further sequence of tokens with its
own noise, known values and times. Samplers work elementwise on both, packed into one tensor.

Axes: B batch, C latent channels, F latent frames, h w latent rows and columns, N sound latents,
n numbers of a clip's picture and sound together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from vidgen.core.errors import InputError
from vidgen.core.protocols import KeyTokens
from vidgen.diffusion.flow import add_noise, shuffled

FIRST_REFERENCE_POSITION = -4.0
"""Latest time position of reference images, outside of the clip."""


class UpsampledKnown(NamedTuple):
    """Known latents of a clip's first frames under `vidgen.diffusion.temporal_upsampling`."""

    latents: Tensor  # [B, C, n, h, w]
    denoise_mask: Tensor  # [B, 1, n, h, w] bool, False for known latents
    alone: bool = True  # whether the first latent frame stands for a single frame


@dataclass(frozen=True)
class PartlyKnown:
    """Latents between noise and the result, and their known values."""

    latents: Tensor  # noise or latest step, [B, C, N] of sound or [B, C, F, h, w] of a picture
    clean: Tensor  # known values, of the same shape; undefined where `denoise_mask` is True
    denoise_mask: Tensor  # bool, the same shape with one channel, True for latents to generate

    @cached_property
    def any_known(self) -> bool:
        """True if any latent in place is known."""
        return not bool(self.denoise_mask.all())

    def impose(self, latents: Tensor) -> Tensor:
        """Write the known values into latents."""
        return torch.where(self.denoise_mask, latents, self.clean.to(latents))

    def begun_by(self, latents: Tensor) -> Self:
        """Return the state with the first latents known, [B or 1, C, n] or [B or 1, C, n, h, w].

        More latents than the state has raise InputError.
        """
        count, total = latents.shape[2], self.latents.shape[2]
        if count > total:
            raise InputError(f"{count} latents are known of a clip or sound that has {total}; trim "
                             "them to its length")
        clean, mask = self.clean.clone(), self.denoise_mask.clone()
        clean[:, :, :count] = latents.to(clean)
        mask[:, :, :count] = False
        return replace(self, clean=clean, denoise_mask=mask)


@dataclass(frozen=True)
class SoundState(PartlyKnown):
    """Sound latents between noise and the result, and their known values."""

    start_s: float = 0.0  # start of the first latent, after the picture's first latent frame
    sees_picture: bool = True  # whether sound tokens attend to picture tokens
    takes: int = 1  # sounds for one picture, adjacent rows of the batch with equal pictures

    def levels(self, sigma: Tensor) -> Tensor:
        """Return the noise level of each latent: sigma [B], or [B, N] with 0 where it is known."""
        if not self.any_known:
            return sigma
        return sigma[:, None] * self.denoise_mask[:, 0].to(sigma.dtype)


@dataclass(frozen=True)
class LatentState(PartlyKnown):
    """Latents of a clip between noise and the result, and all known values."""

    keys: KeyTokens | None = None  # known stills at their own time positions
    stacked: Tensor | None = None  # [B, _, F, h, w], extra channels of the model's input
    control: Tensor | None = None  # [B, _, F, h, w], input of VACE's control blocks
    image_context: Tensor | None = None  # [B, _, D], CLIP features of known pictures
    num_references: int = 0  # leading latent frames that are references, not the clip
    sound: SoundState | None = None
    known_sigma: Tensor | None = None  # [B], noise level of values known in place; None: 0
    hides_known: bool = False  # add noise to values known in place, to hide them; see `Guidance`
    noise: Tensor | None = None  # the starting noise, if `latents` also contain a clip
    spacing: float = 1.0  # of latent frames on the time axis; 1 at the model's frame rate
    lead: float = 0.0  # index of the latent frame at time position 0
    known_upsampled: UpsampledKnown | None = None  # for temporal upsampling, beyond a first frame
    video_upsampled: Tensor | None = None  # [B, C, n, h, w], clip that sampling begins from

    @cached_property
    def is_known(self) -> bool:
        """True if the whole picture is known, so that only sound is generated."""
        return not bool(self.denoise_mask.any())

    @property
    def starting_noise(self) -> Tensor:
        """Starting noise [B, C, F, h, w], without a clip that sampling begins from."""
        return self.latents if self.noise is None else self.noise

    @cached_property
    def times(self) -> Tensor | None:
        """Positions [F] of latent frames on the time axis; None: 0, 1, 2, ..."""
        if self.spacing == 1:
            return None
        numbers = torch.arange(self.latents.shape[2], device=self.latents.device)
        return (numbers - self.lead) * self.spacing

    @cached_property
    def timed_keys(self) -> KeyTokens | None:
        """`keys` with positions scaled by `spacing`; those of references, not after 0, stay."""
        if self.keys is None or self.spacing == 1:
            return self.keys
        at = self.keys.positions
        return replace(self.keys, positions=torch.where(at > 0, at * self.spacing, at))

    @property
    def has_given(self) -> Tensor:
        """True if whole frames of each clip are given, in place or as stills, [B] bool.

        Noised beginnings of later windows and partial frames kept by a mask don't count.
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
        """True if each latent frame is known or generated as a whole."""
        pixels = self.denoise_mask.flatten(3)
        return bool((pixels == pixels[..., :1]).all())

    def rows(self, index: Tensor | slice) -> LatentState:
        """Return some clips of the batch, by numbers, by a mask [B] or by a slice."""
        chosen: LatentState = mapped(self, lambda tensor: tensor[index])
        return chosen

    def to(self, device: torch.device) -> LatentState:
        """Return the state on another device."""
        there: LatentState = moved(self, device)
        return there

    def begin(self) -> Tensor:
        """Return the starting latents of a sampler: [B, C, F, h, w], with sound [B, n]."""
        sound = None if self.sound is None else self.sound.latents
        return self.project(self.pack(self.latents, sound))

    def fresh(self, step: int) -> Tensor:
        """Return new noise for a sampling step, in a sampler's layout; see `shuffled`."""
        picture = shuffled(self.starting_noise, step)
        return self.pack(picture,
                         None if self.sound is None else shuffled(self.sound.latents, step))

    def project(self, latents: Tensor) -> Tensor:
        """Write all known values into latents in a sampler's layout, as its `project`."""
        picture, sound = self.unpack(latents)
        if self.sound is None or sound is None:
            return self.impose(picture)
        return self.pack(self.impose(picture), self.sound.impose(sound))

    def unpack(self, latents: Tensor) -> tuple[Tensor, Tensor | None]:
        """Split latents or a velocity in a sampler's layout into picture and sound."""
        if self.sound is None:
            return latents, None
        pixels, tokens = self.latents.shape[1:], self.sound.latents.shape[1:]
        picture, sound = latents.split([pixels.numel(), tokens.numel()], dim=1)
        return picture.reshape(-1, *pixels), sound.reshape(-1, *tokens)

    def pack(self, picture: Tensor, sound: Tensor | None) -> Tensor:
        """Undo `unpack`; a single channel, as of masks, is expanded to all."""
        if self.sound is None or sound is None:
            return picture
        parts = [picture.expand(-1, *self.latents.shape[1:]).flatten(1),
                 sound.expand(-1, *self.sound.latents.shape[1:]).flatten(1)]
        return torch.cat(parts, dim=1)

    @cached_property
    def generated(self) -> Tensor:
        """The mask of generated values in a sampler's layout."""
        sound = None if self.sound is None else self.sound.denoise_mask
        return self.pack(self.denoise_mask, sound)


def new_state(noise: Tensor) -> LatentState:
    """Return a state with nothing known, for text-to-video."""
    mask = torch.ones_like(noise[:, :1], dtype=torch.bool)
    return LatentState(latents=noise, clean=torch.zeros_like(noise), denoise_mask=mask)


def finished(latents: Tensor) -> LatentState:
    """Return the state of a finished picture [B, C, F, h, w], to generate sound for it."""
    unmade = torch.zeros_like(latents[:, :1], dtype=torch.bool)
    return LatentState(latents=latents, clean=latents, denoise_mask=unmade)


def new_sound(noise: Tensor, start_s: float = 0.0, takes: int = 1) -> SoundState:
    """Return sound with nothing known, from noise [B, C, N]."""
    mask = torch.ones_like(noise[:, :1], dtype=torch.bool)
    return SoundState(noise, torch.zeros_like(noise), mask, start_s, takes=takes)


def sound_span(
    first: int, count: int, stride_t: int, fps: Fraction | float, tokens_per_s: float
) -> tuple[int, int, float]:
    """Return the sound latents of `count` latent frames: (first, end, `SoundState.start_s`).

    Frame j of a clip starts at j / fps. Latent frame f ends with frame stride_t * f, whose time is
    its position for attention.
    """
    rate, fps = Fraction(tokens_per_s), Fraction(fps)
    shown = 0 if first == 0 else stride_t * (first - 1) + 1
    ends = stride_t * (first + count - 1) + 1
    begin, end = math.floor(shown / fps * rate), math.ceil(ends / fps * rate)
    return begin, end, float(begin / rate - first * stride_t / fps)


def denoise_inputs(
    state: LatentState, sigma: Tensor, latents: Tensor | None = None, *, patch: int = 1
) -> tuple[Tensor, Tensor]:
    """Return the model's latents [B, _, F, h, w] and sigma for a state at noise level `sigma` [B].

    Known values replace those in the latents (None: the state's own), and their sigma is 0 or
    `known_sigma`; with `hides_known` they get the starting noise, and sigma stays as it is.
    `stacked` channels are appended; `keys` are not part of the result. The returned sigma is [B],
    [B, F] for whole known frames, or [B, F, h / patch, w / patch] for known tokens.
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


def are_references(keys: KeyTokens) -> Tensor:
    """Return a mask [B, K] of stills that are reference images, by their time positions."""
    return keys.positions <= FIRST_REFERENCE_POSITION


def moved(value: Any, device: torch.device | str) -> Any:
    """Return nested data with its tensors moved to a device."""
    return mapped(value, lambda tensor: tensor.to(device))


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return nested tuples, lists, mappings and dataclasses with `change` applied to tensors."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple | list):
        items = [mapped(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, Mapping):
        return {key: mapped(item, change) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value,
                       **{f.name: mapped(getattr(value, f.name), change) for f in fields(value)})
    return value
