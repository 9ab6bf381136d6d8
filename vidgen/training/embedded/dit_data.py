"""What the transformer learns from: cached clips, each time described, conditioned, noised anew.

Axes: B clips, C latent channels, F latent frames, h w latent rows and columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from vidgen.core.errors import InputError
from vidgen.diffusion.condition import LatentState, noise_known
from vidgen.diffusion.condition_mix import (
    ConditionMix,
    Stills,
    has_reference,
    training_conditions,
)
from vidgen.diffusion.schedule import draw_sigmas
from vidgen.models.tokenizer import PromptTokenizer
from vidgen.toybox.captions import CLASSES, attributes, caption
from vidgen.toybox.paraphrase import loose_caption
from vidgen.toybox.scenes import Draws, Scene
from vidgen.training.config import Phase
from vidgen.training.draws import generator_of
from vidgen.training.embedded.dit_config import DiTData
from vidgen.training.embedded.sound_cache import SoundCache, SoundMix, with_sound
from vidgen.training.embedded.toybox_data import CachedClips, ToyboxCache, cut_around

WINDOW = ConditionMix(text=0, first=0, last=0, both=0, frames=0, prefix=1, mask=0, reference=0)
TEXT_ONLY = ConditionMix(text=1, first=0, last=0, both=0, frames=0, prefix=0, mask=0, reference=0)
FOLLOWED = SoundMix("", picture_known=1)
SHOWN_BY_REFERENCE = ("sprite", "tint")


@dataclass(frozen=True)
class Batch:
    """One micro-batch: latents with conditions, noise levels and noise, and described.

    `cover` [B, 1, F, h, w] says how much of a latent is sprite, `labels` what the caption says,
    `shown` [B] which sprite caption or reference tell of, -1 for none or two. `sound_noise`
    [B, C, K] goes with the state's sound, and `cues` [B, K], whether one begins there. `marks`
    [B, F, n] says where within a clip's latent frame something comes to a mark.
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
    sound_noise: Tensor | None = None
    cues: Tensor | None = None


class _Told(NamedTuple):
    """Captions as tokens, and what of them is asked for; as in `Batch`."""

    ids: Tensor
    mask: Tensor
    labels: dict[str, Tensor]
    shown: Tensor


class ClipDraws:
    """Draws batches from the caches of a run; what it draws depends on seed and step alone."""

    def __init__(self, config: DiTData, device: torch.device, patch: int) -> None:
        self.config, self.device, self.patch = config, device, patch
        self.tokenizer = PromptTokenizer(config.tokenizer)
        self.caches = [ToyboxCache(entry) for entry in config.caches]
        self.data = [cache.load() for cache in self.caches]
        self.sounds: dict[int, tuple[SoundCache, Tensor]] = {}
        if config.sound is not None:
            for which, clips in enumerate(self.caches):
                if not clips.config.stills_only:
                    cache = SoundCache(config.sound, clips)
                    self.sounds[which] = cache, cache.load()
        self.strides = self.caches[0].strides
        shortest = min(min(data.clips.shape[3:]) for data in self.data)
        if config.crop_share and (config.crop % patch or not 0 < config.crop <= shortest):
            raise InputError(f"crop is {config.crop}; give a multiple of {patch} up to {shortest}")
        self.num_kept = self.caches[0].num_clips - config.validation_clips

    def batch(self, phase: Phase, step: int, micro: int) -> Batch:
        """Clips of one geometry, each with a caption and a condition of its own.

        All micro-batches of a step are of one kind, so that no rank waits for another one's.
        """
        run = self.config.run
        kind = generator_of(run.seed, step)
        draw = generator_of(run.seed, step, micro)
        counts = [cache.num_clips for cache in self.caches]
        counts[0] = self.num_kept
        moving = [
            0 if cache.config.stills_only else count
            for cache, count in zip(self.caches, counts, strict=True)
        ]
        which = _drawn(moving, kind)
        index = run.phase_at(step)[0]
        num_frames, size, shift = phase.num_frames, phase.batch_size, self.config.shifts[index]
        shares = self.config.image_shares
        if shares and torch.rand((), generator=kind) < shares[index]:
            num_frames, size, shift = 1, self.config.image_batch, self.config.image_shift
            if moving != counts:
                which = _drawn(counts, kind)
        if self.config.crop_share and torch.rand((), generator=kind) < self.config.crop_share:
            height, width = self.data[which].clips.shape[3:]
            size = size * height * width // self.config.crop**2
            rows = torch.randint(counts[which], (size,), generator=draw)
            low, high = self.config.levels
            span = low, min(high, self.config.crop_level)
            sigma = draw_sigmas(size, draw, mean=None, between=span)
            return self._assemble(which, rows, num_frames, sigma, draw, kind, sound=False,
                                  conditions=self.config.conditions, crop=self.config.crop)
        rows = torch.randint(counts[which], (size,), generator=draw)
        sound = num_frames > 1 and self._draws_sound(kind)
        if sound:
            rows = self._with_struck(which, rows, counts[which], draw)
        levels = self.config.levels
        sigma = draw_sigmas(size, draw, shift=shift, between=levels)
        if num_frames > 1:
            even = torch.rand(size, generator=draw) < self.config.uniform_share
            sigma = torch.where(even, draw_sigmas(size, draw, mean=None, between=levels), sigma)
        return self._assemble(which, rows, num_frames, sigma, draw, kind, sound=sound)

    def held_aside(self, num_frames: int, level: float, *, sound: bool = False) -> Batch:
        """The validation clips under text alone, at one noise level, the same each time."""
        rows = torch.arange(self.num_kept, self.caches[0].num_clips)
        draw = torch.Generator().manual_seed(round(level * 1000))
        sigma = torch.full((len(rows),), level)
        return self._assemble(
            0, rows, num_frames, sigma, draw, draw, conditions=TEXT_ONLY, dropout=0.0, sound=sound
        )

    def captions(self, start: int, count: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Token ids, mask and labels of captions `start` to `start + count` of the first cache."""
        numbers = range(start, start + count)
        scenes = [self.caches[0].scene(number % self.num_kept) for number in numbers]
        share = self.config.loose_share
        texts = [
            _wording(scene, number, share) for scene, number in zip(scenes, numbers, strict=True)
        ]
        ids, mask = self.tokenizer.encode(texts)
        labels = _labels([attributes(scene) for scene in scenes])
        return (ids.to(self.device), mask.to(self.device),
                {name: value.to(self.device) for name, value in labels.items()})

    def _assemble(
        self, which: int, rows: Tensor, num_frames: int, sigma: Tensor, draw: torch.Generator,
        kind: torch.Generator, *, conditions: ConditionMix | None = None,
        dropout: float | None = None, sound: bool, crop: int | None = None,
    ) -> Batch:
        data = self.data[which]
        inside_clip = (
            num_frames > 1 and conditions is None
            and bool(torch.rand((), generator=kind) < self.config.window_share)
        )
        latents, cover, chosen, first = self._cut(data, rows, num_frames, draw, inside=inside_clip)
        if crop is not None:
            latents, cover = cut_around(latents, cover, crop, self.patch)
        if inside_clip:
            conditions = replace(
                WINDOW, reference=self.config.anchor_share,
                prefix_step=self.config.conditions.prefix_step,
            )
            anchors = torch.full((len(rows), 1), -1)
            stills: Stills | None = Stills(data.clips[rows, :, :1].float(), anchors)
        elif conditions is None and torch.rand((), generator=kind) < self.config.still_share:
            conditions, stills = self.config.still_conditions, chosen
        else:
            conditions, stills = conditions or self.config.conditions, None
        state = training_conditions(
            latents, draw, conditions, self.strides, stills=stills, patch=self.patch
        )
        scenes = [self.caches[which].scene(row) for row in rows.tolist()]
        told = self._told(
            scenes, has_reference(state.keys, len(rows)), draw, dropout,
            loose=conditions is not TEXT_ONLY and crop is None,  # a long one pads hundreds
        )
        noise = torch.randn(latents.shape, generator=draw)
        marks = sound_noise = cues = None
        if num_frames > 1:
            marks = self.caches[which].marks(scenes, first, latents.shape[2]).to(self.device)
        if sound:
            assert self.config.sound is not None
            cache, heard = self.sounds[which]
            mix = self.config.sound if conditions is not TEXT_ONLY else FOLLOWED
            state = with_sound(state, heard[rows], first, mix, cache, draw)
            assert state.sound is not None
            sound_noise = torch.randn(state.sound.clean.shape, generator=draw).to(self.device)
            cues = cache.cues(scenes, first, latents.shape[2]).to(self.device)
        if inside_clip and self.config.history_noise:
            level = self.config.history_noise * torch.rand(len(rows), generator=draw)
            some = state.denoise_mask.flatten(1).any(1)  # else a picture, given to be heard
            state = noise_known(state, level * some, noise)
        return Batch(
            state.to(self.device), cover.to(self.device), noise.to(self.device),
            sigma.to(self.device),
            told.ids.to(self.device), told.mask.to(self.device),
            {name: value.to(self.device) for name, value in told.labels.items()},
            told.shown.to(self.device), marks, sound_noise, cues,
        )

    def _cut(
        self, data: CachedClips, rows: Tensor, num_frames: int, draw: torch.Generator, *,
        inside: bool,
    ) -> tuple[Tensor, Tensor, Stills, int]:
        """Latents, what sprites cover of them, their stills, and the latent frame they begin at."""
        stills = Stills(data.stills.latents[rows].float(), data.stills.frame_index[rows])
        if num_frames == 1:
            pick = torch.randint(3, (len(rows),), generator=draw)
            latents = _single(data.clips, data.stills.latents, rows, pick)
            cover = _single(data.cover, data.still_cover, rows, pick)
            return latents, cover, Stills(stills.latents[:, :, 2:], stills.frame_index[:, 2:]), 0
        window = self._window(data.clips.shape[2], num_frames, draw, inside=inside)
        latents, cover = (part[rows, :, window].float() for part in (data.clips, data.cover))
        within = stills.frame_index[0] < num_frames
        within_clip = Stills(stills.latents[:, :, within], stills.frame_index[:, within])
        return latents, cover, within_clip, window.start

    def _told(
        self, scenes: Sequence[Scene], given: Tensor, draw: torch.Generator,
        dropout: float | None, *, loose: bool,
    ) -> _Told:
        """Captions of scenes, and the answers that text and picture are asked for.

        Args:
            scenes: B of them.
            given: whether a reference is, [B] bool.
            draw: what is drawn.
            dropout: share of empty captions; None: the run's.
            loose: whether some are worded as people do.
        """
        seeds = torch.randint(2**31, (len(scenes),), generator=draw).tolist()
        share = self.config.loose_share if loose else 0.0
        unnamed = self._unnamed(seeds) & given
        texts = [
            loose_caption(scene, seed, anonymous=True) if hidden else _wording(scene, seed, share)
            for scene, seed, hidden in zip(scenes, seeds, unnamed.tolist(), strict=True)
        ]
        rate = self.config.caption_dropout if dropout is None else dropout
        dropped = torch.rand(len(scenes), generator=draw) < rate
        texts = ["" if drop else text for text, drop in zip(texts, dropped.tolist(), strict=True)]
        truth = _labels([attributes(scene) for scene in scenes])
        labels = {name: value.masked_fill(dropped, -1) for name, value in truth.items()}
        several = torch.tensor([len(scene.actors) > 1 for scene in scenes])
        shown = truth["sprite"].masked_fill((dropped & ~given) | several, -1)
        for name in SHOWN_BY_REFERENCE:
            labels[name] = labels[name].masked_fill(unnamed, -1)
        return _Told(*self.tokenizer.encode(texts), labels, shown)

    def _unnamed(self, seeds: list[int]) -> Tensor:
        """Whether a sample's reference, if it has one, is to speak for itself, [B] bool."""
        share = self.config.anonymous_share
        return torch.tensor([Draws(seed, stream=41).chance(share) for seed in seeds])

    def _draws_sound(self, draw: torch.Generator) -> bool:
        if self.config.sound is None:
            return False
        return float(torch.rand((), generator=draw)) < self.config.sound.share

    def _with_struck(self, which: int, rows: Tensor, stop: int, draw: torch.Generator) -> Tensor:
        """Rows [B] of a batch with sound, a share of them drawn anew among the struck ones."""
        assert self.config.sound is not None
        if not self.config.sound.struck:
            return rows
        struck = self.sounds[which][0].struck
        struck = struck[struck < stop]
        if not len(struck):
            return rows
        chosen = torch.rand(rows.shape, generator=draw) < self.config.sound.struck
        others = struck[torch.randint(len(struck), rows.shape, generator=draw)]
        return torch.where(chosen, others, rows)

    def _window(
        self, total: int, num_frames: int, draw: torch.Generator, *, inside: bool
    ) -> slice:
        """The latent frames of a clip's first `num_frames`, or as many as fit of its inside."""
        length = 1 + (num_frames - 1) // self.strides.t
        if not inside:
            return slice(0, length)
        length = min(length, total - 2)
        first = int(torch.randint(1, total - length + 1, (), generator=draw))
        return slice(first, first + length)


def _drawn(counts: list[int], draw: torch.Generator) -> int:
    """One of several kinds, as often as it counts."""
    return int(torch.multinomial(torch.tensor(counts).float(), 1, generator=draw))


def _wording(scene: Scene, seed: int, loose_share: float) -> str:
    """A caption, plain or loose; which of them depends on the seed alone."""
    if Draws(seed, stream=40).chance(loose_share):
        return loose_caption(scene, seed)
    return caption(scene, seed)


def _single(clips: Tensor, stills: Tensor, rows: Tensor, pick: Tensor) -> Tensor:
    """One frame a clip, [B, _, 1, h, w]: its first (pick 0), middle (1) or last (2)."""
    frames = torch.cat([clips[rows, :, :1], stills[rows, :, :2]], dim=2).float()
    return frames[torch.arange(len(rows)), :, pick][:, :, None]


def _labels(described: Sequence[Mapping[str, str]]) -> dict[str, Tensor]:
    """Class indices by attribute, [B]; -1 where there is nothing to name."""
    table = {}
    for name, classes in CLASSES.items():
        index = {value: i for i, value in enumerate(classes)}
        table[name] = torch.tensor([index.get(entry[name], -1) for entry in described])
    return table
