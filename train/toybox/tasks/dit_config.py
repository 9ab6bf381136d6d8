"""What a run of the embedded transformer says of its data: caches, noise levels, mixes."""

from __future__ import annotations

from dataclasses import dataclass

from train.toybox.phases import PhasedRun
from train.toybox.tasks.mix import ConditionMix
from train.toybox.tasks.sound_cache import SoundMix
from train.toybox.tasks.toybox_data import CacheConfig
from vidgen.core.errors import InputError
from vidgen.weights.component import Role

PLAIN = ConditionMix(text=0.65, first=0.17, prefix=0.12, mask=0.06)
WITH_STILLS = ConditionMix(
    text=0.4, first=0.05, last=0.2, both=0.2, frames=0.1, prefix=0.05, mask=0.0, reference=0.4
)


@dataclass(frozen=True, kw_only=True)
class DiTData:
    """The part of a run that says what it learns from.

    Args:
        run: phases, seed and device; their frames and batch sizes count at `fps`.
        caches: what `train/toybox/cache.py` made; one entry an aspect ratio, drawn by clip count.
        tokenizer: folder with `tokenizer.json`.
        fps: the model's own frame rate, whose latent frames lie one apart on the time axis; those
            of a cache at twice the rate lie half as far.
        shifts: of the training times, one a phase: larger clips need more noise. Motion is settled
            above a noise level of 0.85.
        levels: the lowest and the highest noise level that are learned. Where the highest is below
            1 it is the expert at low noise that learns.
        boundary: the noise level below which that expert denoises; None: the highest of these.
        uniform_share: share of a clip batch's times drawn evenly instead, so that the low levels,
            where edges become crisp, aren't forgotten.
        conditions: of batches without stills, which cost no tokens.
        still_conditions: of the share of batches that get last frames, keyframes, references.
        still_share: that share.
        caption_dropout: share of samples that see an empty prompt, for guidance.
        loose_share: share of captions that `loose_caption` writes, as people do, in the warm-up
            of words, too; nearly half of those are plain again. Validation has none.
        anonymous_share: of the samples that are given a reference, the share whose caption doesn't
            name what it shows ("it"); `loose_caption` writes them all.
        image_shares: share of each phase's batches that are single frames, `image_batch` of them:
            cheap samples of what things look like, without which clips make the model forget
            stills. None without.
        image_batch: samples of such a batch.
        image_shift: of such a batch's training times.
        crop_share: share of batches, of clips and of single frames, that are squares around
            sprites, as many as make the frames' area: most of a frame is background, which is
            learned long before.
        crop: their side in latents.
        crop_level: the highest of their noise levels, evenly drawn from the lowest on: above it a
            caption doesn't tell what a square is cut from.
        window_share: share of clip batches cut from the inside of clips, all under a prefix:
            what a window of a long clip is, whose first latent is no single frame.
        anchor_share: of their samples, the share that is given the clip's first frame as a
            reference: what keeps a long clip to the looks it began with.
        history_noise: of their samples, the highest level of noise in what they go on from, drawn
            evenly from 0 on: so that the faults of a window aren't taken for the picture.
        handed_share: of the clips of caches with `settled` that are given what they were settled
            behind, nothing or a first frame, the share that begins from what was settled instead
            of from themselves: at its own frame rate, with frames drawn between, which is what an
            expert at low noise is handed in sampling.
        handed_from: the lowest noise level at which that happens; the highest is the boundary.
        validation_clips: taken off the end of the first cache, never trained on.
        sound: what is learned of sound, or None; clips' sound is cached beside their latents.

    Raises:
        InputError: what would otherwise show hours into the run.
    """

    run: PhasedRun
    caches: tuple[CacheConfig, ...]
    tokenizer: str
    shifts: tuple[float, ...]
    fps: int = 12
    levels: tuple[float, float] = (0.0, 1.0)
    boundary: float | None = None
    uniform_share: float = 0.0
    conditions: ConditionMix = PLAIN
    still_conditions: ConditionMix = WITH_STILLS
    still_share: float = 0.25
    caption_dropout: float = 0.1
    loose_share: float = 0.0
    anonymous_share: float = 0.0
    image_shares: tuple[float, ...] = ()
    image_batch: int = 64
    image_shift: float = 1.0
    crop_share: float = 0.0
    crop: int = 8
    crop_level: float = 0.7
    window_share: float = 0.0
    anchor_share: float = 0.0
    history_noise: float = 0.0
    handed_share: float = 0.0
    handed_from: float = 0.8
    validation_clips: int = 64
    sound: SoundMix | None = None

    @property
    def role(self) -> Role:
        """Which of a model's two experts learns: the one at low noise, or the first or only one."""
        return "transformer_2" if self.levels[1] < 1 else "transformer"

    @property
    def handed_to(self) -> float:
        """The highest noise level at which clips are handed over."""
        return self.boundary or self.levels[1]

    def __post_init__(self) -> None:
        phases = self.run.phases
        if len(self.shifts) != len(phases):
            raise InputError(f"shifts has {len(self.shifts)} entries for {len(phases)} phases; "
                             "give one a phase")
        if self.image_shares and len(self.image_shares) != len(phases):
            raise InputError(f"image_shares has {len(self.image_shares)} entries for {len(phases)} "
                             "phases; give one a phase, or none")
        for name in ("loose_share", "anonymous_share", "anchor_share", "history_noise",
                     "crop_share", "crop_level", "still_share", "window_share", "handed_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}; a share lies in 0..1")
        if not 0 <= self.levels[0] < self.levels[1] <= 1:
            raise InputError(f"levels are {list(self.levels)}; they lie in 0..1, the lowest first")
        if self.boundary is not None and not self.levels[0] < self.boundary <= self.levels[1] < 1:
            raise InputError(f"boundary is {self.boundary}, which is an expert's at low noise; it "
                             f"lies within its levels, {list(self.levels)}, of which the highest "
                             "is below 1")
        if self.crop_share and self.crop_level <= self.levels[0]:
            raise InputError(f"crop_level is {self.crop_level}, levels begin at {self.levels[0]}; "
                             "give a crop_level above that, or crop_share 0")
        if self.handed_share and not self.levels[0] <= self.handed_from < self.handed_to < 1:
            raise InputError(f"handed_from is {self.handed_from}; clips are handed to an expert at "
                             f"low noise, between its levels {list(self.levels)} and below its "
                             f"boundary, {self.handed_to}; or give handed_share 0")
        if self.caches and self.caches[0].stills_only:
            raise InputError("the first of the caches is stills_only; validation takes clips from "
                             "it, so name one of clips before it")
        clips = [cache for cache in self.caches if not cache.stills_only]
        asked = max(phase.num_frames for phase in phases)
        for cache in clips:
            needed = cache.frames_of(asked, self.fps)
            if needed > cache.num_frames:
                raise InputError(f"a phase has clips of {asked} frames at {self.fps} a second, "
                                 f"which are {needed} of {cache.folder}; it holds "
                                 f"{cache.num_frames}. Cache longer clips or shorten the phase")
        kept = self.caches[0].shards * self.caches[0].shard_size
        if self.validation_clips >= kept:
            raise InputError(f"validation_clips is {self.validation_clips} of {kept} cached clips; "
                             "leave some to train on")
