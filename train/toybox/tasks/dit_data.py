"""What the transformer learns from: cached clips, each time described, conditioned, noised anew.

Axes: B clips, C latent channels, F latent frames, h w latent rows and columns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from train.toybox.phases import Phase
from train.toybox.tasks.dit_config import DiTData
from train.toybox.tasks.dit_draws import DiTDraws, Drawn
from train.toybox.tasks.sound_cache import with_sound
from train.toybox.tasks.toybox_data import cut_around
from vidgen.diffusion.condition import noise_known, with_given
from vidgen.diffusion.state import LatentState
from vidgen.diffusion.temporal_upsampling import LatentRate, interpolated


@dataclass(frozen=True)
class Batch:
    """One micro-batch: latents with conditions, noise levels and noise, and described.

    `cover` [B, 1, F, h, w] says how much of a latent is sprite, `labels` what the caption says,
    `shown` [B] which sprite caption or reference tell of, -1 for none or two. `sound_noise`
    [B, C, K] goes with the state's sound, and `cues` [B, K], whether one begins there. `marks`
    [B, F, n] says where within a clip's latent frame something comes to a mark. `begun`
    [B, C, F, h, w] is what noise is added to where that isn't the state's clean clip.
    """

    state: LatentState
    cover: Tensor
    noise: Tensor
    sigma: Tensor
    ids: Tensor
    mask: Tensor
    labels: dict[str, Tensor]
    shown: Tensor
    marks: Tensor | None = None
    begun: Tensor | None = None
    sound_noise: Tensor | None = None
    cues: Tensor | None = None


class ClipDraws:
    """Batches from the caches of a run, on a device, where latents lie if there is room.

    Args:
        config: of the run.
        device: of the batches.
        patch: latents a side of one token.
        marks: whether batches of clips tell of marks.
    """

    def __init__(
        self, config: DiTData, device: torch.device, patch: int, *, marks: bool = True
    ) -> None:
        self.device, self.patch, self.fps = device, patch, config.fps
        self.draws = DiTDraws(config, patch, marks=marks)
        self.caches, self.strides = self.draws.caches, self.draws.strides
        self.data = [cache.load() for cache in self.caches]
        self.sounds = {which: cache.load() for which, cache in self.draws.sounds.items()}
        size = sum(part.clips.nbytes + part.stills.latents.nbytes for part in self.data)
        if device.type == "cuda" and size < torch.cuda.mem_get_info(device)[0] / 3:
            self.data = [part.to(device) for part in self.data]

    def batch(self, phase: Phase, step: int, micro: int) -> Batch:
        """Clips of one geometry, each with a caption and a condition of its own."""
        return self.made(self.draws.draw(phase, step, micro))

    def held_aside(self, num_frames: int, level: float, *, sound: bool = False) -> Batch:
        """The validation clips under text alone, at one noise level, the same each time."""
        drawn = self.draws.held_aside(num_frames, level, sound=sound)
        return self.made(drawn, same_anywhere=True)

    def made(self, drawn: Drawn, *, same_anywhere: bool = False) -> Batch:
        """A batch of what was drawn.

        Args:
            drawn: all of it but latents and noise.
            same_anywhere: whether the noise is that of a CPU on any device, which takes longer.
        """
        data = self.data[drawn.which]
        rows = drawn.rows.to(data.clips.device)
        singles, stills = None, None
        has_stills = bool(drawn.given.used.any())
        if drawn.window is None or has_stills:
            singles = torch.cat([data.clips[rows, :, :1], data.stills.latents[rows]], dim=2)
        if drawn.window is None:
            assert singles is not None
            assert drawn.pick is not None
            covers = torch.cat([data.cover[rows, :, :1], data.still_cover[rows]], dim=2)
            chosen = torch.arange(len(rows)), slice(None), drawn.pick
            latents, cover = (part[chosen][:, :, None] for part in (singles, covers))
        else:
            latents, cover = (part[rows, :, drawn.window] for part in (data.clips, data.cover))
        latents, cover = (self._here(part).float() for part in (latents, cover))
        if drawn.crop is not None:
            latents, cover = cut_around(latents, cover, drawn.crop, self.patch)
        if singles is not None and has_stills:
            stills = self._here(singles[:, :, list(drawn.stills)]).float()
        begun = None if drawn.handed is None else self._begun(drawn, latents)
        state = with_given(latents, drawn.given, stills, self.strides)
        state = replace(state, spacing=self.fps / self.caches[drawn.which].config.fps)
        draw = torch.Generator().set_state(drawn.noise)
        if not (same_anywhere or self.device.type == "cpu"):
            draw = torch.Generator(self.device).manual_seed(draw.initial_seed())
        noise = self._noise(latents, draw)
        sound_noise = None
        if drawn.sound is not None and drawn.window is not None:
            heard = self.sounds[drawn.which][drawn.rows].to(self.device)
            cache = self.draws.sounds[drawn.which]
            state = with_sound(state, heard, drawn.window.start, drawn.sound, cache)
            assert state.sound is not None
            sound_noise = self._noise(state.sound.clean, draw)
        if drawn.history is not None:
            some = state.denoise_mask.flatten(1).any(1)  # else a picture, given to be heard
            state = noise_known(state, drawn.history.to(self.device) * some, noise)
        told = drawn.told
        return Batch(
            state, cover, noise, self._here(drawn.sigma), self._here(told.ids),
            self._here(told.mask),
            {name: self._here(value) for name, value in told.labels.items()},
            self._here(told.shown),
            None if drawn.marks is None else self._here(drawn.marks), begun, sound_noise,
            None if drawn.cues is None else self._here(drawn.cues),
        )

    def _begun(self, drawn: Drawn, latents: Tensor) -> Tensor:
        """Clips [B, C, F, h, w], those that are handed over as they were settled."""
        settled = self.data[drawn.which].settled
        assert settled is not None
        assert drawn.handed is not None
        finer = round(self.caches[drawn.which].config.fps / self.fps)
        made = interpolated(self._here(settled[drawn.rows.to(settled.device)]).float(),
                            LatentRate(finer), self.strides.t)
        handed = self._here(drawn.handed).view(-1, 1, 1, 1, 1)
        return torch.where(handed, made[:, :, drawn.window], latents)

    def _here(self, value: Tensor) -> Tensor:
        return value.to(self.device, non_blocking=True)

    def _noise(self, like: Tensor, draw: torch.Generator) -> Tensor:
        return torch.randn(like.shape, generator=draw, device=draw.device).to(self.device)


