"""What is drawn for a batch of the transformer's: clips, captions, conditions, noise levels.

All but latents and noise, so that processes beside the step can draw and hand over little.

Axes: B clips, F latent frames, K stills, h w latent rows and columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from train.toybox.phases import Phase
from train.toybox.tasks.dit_config import DiTData
from train.toybox.tasks.mix import ConditionMix
from train.toybox.tasks.model_made import knows_first
from train.toybox.tasks.sound_cache import SoundCache, SoundGiven, SoundMix, draw_sound
from train.toybox.tasks.toybox_data import ToyboxCache
from train.toybox.world.captions import CLASSES, attributes, caption
from train.toybox.world.paraphrase import loose_caption
from train.toybox.world.scenes import Draws, Scene
from vidgen.core.errors import InputError
from vidgen.diffusion.condition import Given
from vidgen.diffusion.flow import draw_sigmas
from vidgen.models.tokenizer import PromptTokenizer
from vidgen.training.task import generator_of

WINDOW = ConditionMix(text=0, first=0, last=0, both=0, frames=0, prefix=1, mask=0, reference=0)
TEXT_ONLY = ConditionMix(text=1, first=0, last=0, both=0, frames=0, prefix=0, mask=0, reference=0)
FOLLOWED = SoundMix("", picture_known=1)
SHOWN_BY_REFERENCE = ("sprite", "tint")
FIRST, MIDDLE, LAST, POSED = range(4)
"""Single frames of a cached clip: its first one, and its three stills."""


class Told(NamedTuple):
    """Captions as tokens, and what of them is asked for; as in `Batch`."""

    ids: Tensor
    mask: Tensor
    labels: dict[str, Tensor]
    shown: Tensor


@dataclass(frozen=True)
class Drawn:
    """A batch without its latents, on the CPU.

    Attributes:
        which: cache that it is of.
        rows: its clips, [B].
        window: their latent frames; None: single frames.
        pick: which of a clip's single frames a sample is, [B], without `window`.
        stills: which of them conditions choose among.
        crop: side of the squares that are cut out, or None.
        given: the conditions.
        history: how noisy what a window goes on from is, [B], or None.
        sigma: noise levels, [B].
        handed: which clips begin from what a model settled of them, [B] bool, or None.
        told: captions.
        marks: see `Batch`.
        cues: see `Batch`.
        sound: what of the clips' sound is made, or None where they have none.
        noise: state of the CPU's generator that noise is to be drawn by.
    """

    which: int
    rows: Tensor
    window: slice | None
    pick: Tensor | None
    stills: tuple[int, ...]
    crop: int | None
    given: Given
    history: Tensor | None
    sigma: Tensor
    handed: Tensor | None
    told: Told
    marks: Tensor | None
    cues: Tensor | None
    sound: SoundGiven | None
    noise: Tensor


@dataclass(frozen=True)
class _Kind:
    """What all micro-batches of a step have in common.

    Attributes:
        which: cache that they are of.
        num_frames: of the clips.
        inside: whether they are windows from inside of clips.
        conditions: what is drawn of them.
        has_stills: whether conditions may choose among stills.
        crop: as in `Drawn`.
        sound: whether they carry sound.
        dropout: share of empty captions.
        handed: share of clips that begin from what a model settled of them.
    """

    which: int
    num_frames: int
    conditions: ConditionMix
    inside: bool = False
    has_stills: bool = False
    crop: int | None = None
    sound: bool = False
    dropout: float = 0.0
    handed: float = 0.0


class DiTDraws:
    """Draws what batches are made from; what it draws depends on seed and step alone.

    Args:
        config: of the run.
        patch: latents a side of one token.
        marks: whether batches of clips tell of marks.
    """

    def __init__(self, config: DiTData, patch: int, *, marks: bool = True) -> None:
        self.config, self.patch, self.marks = config, patch, marks
        self.tokenizer = PromptTokenizer(config.tokenizer)
        self.caches = [ToyboxCache(entry) for entry in config.caches]
        self.strides = self.caches[0].strides
        self.sounds: dict[int, SoundCache] = {}
        if config.sound is not None:
            self.sounds = {which: SoundCache(config.sound, clips)
                           for which, clips in enumerate(self.caches)
                           if not clips.config.stills_only}
        shortest = min(side for which in range(len(self.caches)) for side in self._sides(which))
        if config.crop_share and (config.crop % patch or not 0 < config.crop <= shortest):
            raise InputError(f"crop is {config.crop}; give a multiple of {patch} up to {shortest}")
        self.num_kept = self.caches[0].num_clips - config.validation_clips

    def draw(self, phase: Phase, step: int, micro: int) -> Drawn:
        """Clips of one geometry, each with a caption and a condition of its own.

        All micro-batches of a step are of one kind, so that no rank waits for another one's.
        """
        config = self.config
        kind = generator_of(config.run.seed, step)
        draw = generator_of(config.run.seed, step, micro)
        counts = [cache.num_clips for cache in self.caches]
        counts[0] = self.num_kept
        moving = [
            0 if cache.config.stills_only else count
            for cache, count in zip(self.caches, counts, strict=True)
        ]
        which = _chosen(moving, kind)
        index = config.run.phase_at(step)[0]
        num_frames, size, shift = phase.num_frames, phase.batch_size, config.shifts[index]
        shares = config.image_shares
        if shares and _happens(shares[index], kind):
            num_frames, size, shift = 1, config.image_batch, config.image_shift
            if moving != counts:
                which = _chosen(counts, kind)
        else:
            num_frames = self.caches[which].config.frames_of(num_frames, config.fps)
            size = max(1, size * phase.num_frames // num_frames)
        if config.crop_share and _happens(config.crop_share, kind):
            height, width = self._sides(which)
            size = size * height * width // config.crop**2
            rows = torch.randint(counts[which], (size,), generator=draw)
            low, high = config.levels
            sigma = draw_sigmas(
                size, draw, mean=None, between=(low, min(high, config.crop_level))
            )
            squares = _Kind(which, num_frames, config.conditions, crop=config.crop,
                            dropout=config.caption_dropout)
            return self._drawn(squares, rows, sigma, draw)
        rows = torch.randint(counts[which], (size,), generator=draw)
        sound = config.sound is not None and num_frames > 1 and _happens(config.sound.share, kind)
        if sound:
            rows = self._with_struck(which, rows, counts[which], draw)
        sigma = draw_sigmas(size, draw, shift=shift, between=config.levels)
        if num_frames > 1:
            even = torch.rand(size, generator=draw) < config.uniform_share
            evenly = draw_sigmas(size, draw, mean=None, between=config.levels)
            sigma = torch.where(even, evenly, sigma)
        is_settled = num_frames > 1 and self.caches[which].config.settled is not None
        frames = _Kind(which, num_frames, config.conditions, sound=sound,
                       dropout=config.caption_dropout,
                       handed=config.handed_share if is_settled else 0)
        if num_frames > 1 and _happens(config.window_share, kind):
            window = replace(WINDOW, reference=config.anchor_share)
            frames = replace(frames, inside=True, has_stills=True, conditions=window, handed=0)
        elif _happens(config.still_share, kind):
            frames = replace(frames, has_stills=True, conditions=config.still_conditions)
        return self._drawn(frames, rows, sigma, draw)

    def held_aside(self, num_frames: int, level: float, *, sound: bool = False) -> Drawn:
        """The validation clips under text alone, at one noise level, the same each time."""
        rows = torch.arange(self.num_kept, self.caches[0].num_clips)
        draw = torch.Generator().manual_seed(round(level * 1000))
        num_frames = self.caches[0].config.frames_of(num_frames, self.config.fps)
        sigma = torch.full((len(rows),), level)
        return self._drawn(_Kind(0, num_frames, TEXT_ONLY, sound=sound), rows, sigma, draw)

    def captions(self, start: int, count: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Token ids, mask and labels of captions `start` to `start + count` of the first cache."""
        numbers = range(start, start + count)
        scenes = [self.caches[0].scene(number % self.num_kept) for number in numbers]
        share = self.config.loose_share
        texts = [
            _wording(scene, number, share) for scene, number in zip(scenes, numbers, strict=True)
        ]
        return (*self.tokenizer.encode(texts), _labels([attributes(scene) for scene in scenes]))

    def _drawn(self, kind: _Kind, rows: Tensor, sigma: Tensor, draw: torch.Generator) -> Drawn:
        """The rest of what is drawn for clips and their noise levels."""
        cache, batch = self.caches[kind.which], len(rows)
        window, pick = None, None
        stills: tuple[int, ...] = (POSED,)
        height, width = self._sides(kind.which)
        if kind.num_frames == 1:
            pick = torch.randint(POSED, (batch,), generator=draw)
        else:
            window = self._window(kind, draw)
            stills = tuple(still for still in (MIDDLE, LAST, POSED)
                           if cache.frames_shown[still] < kind.num_frames)
        index = torch.tensor([cache.frames_shown[still] for still in stills])
        if kind.inside:
            stills, index = (FIRST,), torch.tensor([cache.frames_shown[POSED]])  # as a reference
        count = 1 if window is None else window.stop - window.start
        if kind.crop is not None:
            height = width = kind.crop
        given = kind.conditions.draw(
            (batch, count, height, width), draw, self.strides, patch=self.patch,
            frame_index=index.expand(batch, -1) if kind.has_stills else None,
        )
        handed = None
        if kind.handed:
            handed = _are_given_alike(rows, given) & (
                torch.rand(batch, generator=draw) < kind.handed)
            between = self.config.handed_from, self.config.handed_to
            levels = draw_sigmas(batch, draw, mean=None, between=between)
            sigma = torch.where(handed, levels, sigma)
        scenes = [cache.scene(row) for row in rows.tolist()]
        told = self._told(
            scenes, (given.used & (given.frame_index < 0)).any(1), draw, kind.dropout,
            # a long one pads hundreds
            loose=kind.conditions is not TEXT_ONLY and kind.crop is None,
        )
        marks = cues = made = history = None
        if window is not None and self.marks:
            marks = cache.marks(scenes, window.start, count)
        if kind.sound and window is not None and self.config.sound is not None:
            sound = self.sounds[kind.which]
            mix = self.config.sound if kind.conditions is not TEXT_ONLY else FOLLOWED
            made = draw_sound(given.known, window.start, mix, sound, draw)
            cues = sound.cues(scenes, window.start, count)
        if kind.inside and self.config.history_noise:
            history = self.config.history_noise * torch.rand(batch, generator=draw)
        return Drawn(kind.which, rows, window, pick, stills, kind.crop, given, history, sigma,
                     handed, told, marks, cues, made, draw.get_state())

    def _told(
        self, scenes: Sequence[Scene], given: Tensor, draw: torch.Generator, dropout: float, *,
        loose: bool,
    ) -> Told:
        """Captions of scenes, and the answers that text and picture are asked for.

        Args:
            scenes: B of them.
            given: whether a reference is, [B] bool.
            draw: what is drawn.
            dropout: share of empty captions.
            loose: whether some are worded as people do.
        """
        seeds = torch.randint(2**31, (len(scenes),), generator=draw).tolist()
        share = self.config.loose_share if loose else 0.0
        unnamed = self._unnamed(seeds) & given
        texts = [
            loose_caption(scene, seed, anonymous=True) if hidden else _wording(scene, seed, share)
            for scene, seed, hidden in zip(scenes, seeds, unnamed.tolist(), strict=True)
        ]
        dropped = torch.rand(len(scenes), generator=draw) < dropout
        texts = ["" if drop else text for text, drop in zip(texts, dropped.tolist(), strict=True)]
        truth = _labels([attributes(scene) for scene in scenes])
        labels = {name: value.masked_fill(dropped, -1) for name, value in truth.items()}
        several = torch.tensor([len(scene.actors) > 1 for scene in scenes])
        shown = truth["sprite"].masked_fill((dropped & ~given) | several, -1)
        for name in SHOWN_BY_REFERENCE:
            labels[name] = labels[name].masked_fill(unnamed, -1)
        return Told(*self.tokenizer.encode(texts), labels, shown)

    def _unnamed(self, seeds: list[int]) -> Tensor:
        """Whether a sample's reference, if it has one, is to speak for itself, [B] bool."""
        share = self.config.anonymous_share
        return torch.tensor([Draws(seed, stream=41).chance(share) for seed in seeds])

    def _with_struck(self, which: int, rows: Tensor, stop: int, draw: torch.Generator) -> Tensor:
        """Rows [B] of a batch with sound, a share of them drawn anew among the struck ones."""
        assert self.config.sound is not None
        if not self.config.sound.struck:
            return rows
        struck = self.sounds[which].struck
        struck = struck[struck < stop]
        if not len(struck):
            return rows
        chosen = torch.rand(rows.shape, generator=draw) < self.config.sound.struck
        others = struck[torch.randint(len(struck), rows.shape, generator=draw)]
        return torch.where(chosen, others, rows)

    def _window(self, kind: _Kind, draw: torch.Generator) -> slice:
        """The latent frames of a clip's first `num_frames`, or as many as fit of its inside."""
        length = 1 + (kind.num_frames - 1) // self.strides.t
        if not kind.inside:
            return slice(0, length)
        total = 1 + (self.caches[kind.which].config.num_frames - 1) // self.strides.t
        length = min(length, total - 2)
        first = int(torch.randint(1, total - length + 1, (), generator=draw))
        return slice(first, first + length)

    def _sides(self, which: int) -> tuple[int, int]:
        """Latent rows and columns of a cache."""
        config = self.caches[which].config
        return config.height // self.strides.hw, config.width // self.strides.hw


def _are_given_alike(rows: Tensor, given: Given) -> Tensor:
    """Which clips are given what they were settled behind, nothing or a first frame, [B] bool."""
    known = given.known.flatten(3)  # [B, 1, F, h * w]
    first, later = known[:, 0, 0], known[:, 0, 1:].flatten(1)
    given_first = torch.where(knows_first(rows), first.all(1), ~first.any(1))
    return given_first & ~later.any(1) & ~given.used.any(1)


def _happens(share: float, draw: torch.Generator) -> bool:
    return float(torch.rand((), generator=draw)) < share


def _chosen(counts: list[int], draw: torch.Generator) -> int:
    """One of several kinds, as often as it counts."""
    return int(torch.multinomial(torch.tensor(counts).float(), 1, generator=draw))


def _wording(scene: Scene, seed: int, loose_share: float) -> str:
    """A caption, plain or loose; which of them depends on the seed alone."""
    if Draws(seed, stream=40).chance(loose_share):
        return loose_caption(scene, seed)
    return caption(scene, seed)


def _labels(described: Sequence[Mapping[str, str]]) -> dict[str, Tensor]:
    """Class indices by attribute, [B]; -1 where there is nothing to name."""
    table = {}
    for name, classes in CLASSES.items():
        index = {value: i for i, value in enumerate(classes)}
        table[name] = torch.tensor([index.get(entry[name], -1) for entry in described])
    return table
