"""Sound latents of the clips that the transformer learns from, and the sound of a batch.

Axes: B clips, C latent channels, F latent frames, h w latent rows and columns, K sound latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from train.toybox.tasks.latents import LatentShards
from train.toybox.tasks.toybox_data import ToyboxCache, encoder_hash
from train.toybox.world.cues import sound_cues
from train.toybox.world.scenes import Scene
from train.toybox.world.sound import synthesize
from vidgen.core.errors import InputError
from vidgen.diffusion.state import LatentState, SoundState, sound_span
from vidgen.models.audio import AudioVAE
from vidgen.models.audio_spectra import AudioVAEConfig
from vidgen.weights.configs import config_of

FOLDER = "sound"
"""Inside the folder of the clips' latents."""


@dataclass(frozen=True)
class SoundMix:
    """How much sound a transformer learns.

    Args:
        vae: component folder of the sound VAE.
        share: of the clip batches that carry sound.
        picture_known: share of those batches that get sound for given pictures; the others get
            pictures for given sound.
        struck: share that is drawn among clips in which something is hit: what the picture tells
            of a sound's moment is rare otherwise.
    """

    vae: str
    share: float = 0.5
    picture_known: float = 0.9
    struck: float = 0.0

    def __post_init__(self) -> None:
        for name in ("share", "picture_known", "struck"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}; give a share from 0 to 1")


class SoundCache:
    """The sound of a cache's clips, encoded; one shard for each of its shards."""

    def __init__(self, mix: SoundMix, clips: ToyboxCache) -> None:
        self.mix, self.clips = mix, clips
        self.config: AudioVAEConfig = config_of(AudioVAEConfig, Path(mix.vae))
        told = {"encoder": encoder_hash(Path(mix.vae), AudioVAEConfig)}
        manifest = clips.manifest | told
        self.shards = LatentShards(Path(clips.config.folder) / FOLDER, manifest)

    def missing(self, dealt: int = 0) -> list[int]:
        """Shards that this process has still to make; `dealt` are those of caches before it."""
        return self.shards.missing(self.clips.config.shards, dealt)

    @torch.no_grad()
    def make(self, index: int, vae: AudioVAE, device: torch.device, batch: int = 32) -> None:
        """Synthesise, encode and write shard `index`."""
        config = self.clips.config
        first, parts = index * config.shard_size, []
        for start in range(first, first + config.shard_size, batch):
            stop = min(start + batch, first + config.shard_size)
            scenes = [self.clips.scene(i) for i in range(start, stop)]
            sound = synthesize(scenes, config.num_frames, config.height, config.width, config.fps)
            parts.append(vae.encode(sound.to(device)).cpu())
        self.shards.write(index, {"sound": torch.cat(parts).half()})

    def cues(self, scenes: Sequence[Scene], first: int, count: int) -> Tensor:
        """Where in a stretch of the scenes' clips a sound begins, [B, K] float 0 or 1.

        Args:
            scenes: B scenes of the cache's.
            first: latent frame of the clips that the stretch begins with.
            count: its latent frames.
        """
        config = self.clips.config
        begin, end, _ = self.span(first, count)
        found = torch.zeros(len(scenes), end - begin + 2)  # what begins is seen by its neighbours
        for row, scene in enumerate(scenes):
            cues = sound_cues(scene, config.num_frames, config.height, config.width, config.fps)
            for at in (int(cue.seconds * self.config.tokens_per_s) - begin + 1 for cue in cues):
                found[row, max(0, at - 1) : max(0, at + 2)] = 1
        return found[:, 1:-1]

    @cached_property
    def struck(self) -> Tensor:
        """Clips in which something is hit, by index in rising order, [n]."""
        config = self.clips.config
        size = config.num_frames, config.height, config.width, config.fps
        return torch.tensor([
            index for index in range(self.clips.num_clips)
            if any(cue.kind == "impact" for cue in sound_cues(self.clips.scene(index), *size))
        ])

    def span(self, first: int, count: int) -> tuple[int, int, float]:
        """`sound_span` of a stretch of the clips."""
        return sound_span(first, count, self.clips.strides.t, self.clips.config.fps,
                          self.config.tokens_per_s)

    def load(self) -> Tensor:
        """All sound that the clips' config asks for, [N, C, K] float16."""
        return self.shards.load(self.clips.config.shards)["sound"]


@dataclass(frozen=True)
class SoundGiven:
    """What of a batch's sound is made.

    Attributes:
        generated: [B, 1, K] bool, the tokens that are.
        picture_known: whether they are made for finished pictures.
    """

    generated: Tensor
    picture_known: bool


def draw_sound(
    known: Tensor, first: int, mix: SoundMix, cache: SoundCache, draw: torch.Generator
) -> SoundGiven:
    """Draw whether sound is to be made for all of a batch's pictures, or known.

    Sound for a picture of which a beginning was known goes on from that beginning's.

    Args:
        known: what is of the pictures, [B, 1, F, h, w] bool, on the CPU.
        first: latent frame of the clips that they begin with.
        mix: how often which is known.
        cache: of the sound.
        draw: a CPU generator.
    """
    batch, _, count = known.shape[:3]
    begin, end, _ = cache.span(first, count)
    if float(torch.rand((), generator=draw)) >= mix.picture_known:
        return SoundGiven(torch.zeros(batch, 1, end - begin, dtype=torch.bool), False)
    generated = torch.ones(batch, 1, end - begin, dtype=torch.bool)
    for row in range(batch):
        made = (~known[row]).flatten(2).any(2)[0]  # [F], whether any is generated
        begun = count if not made.any() else int(made.int().argmax())
        if begun > 1 or (begun and first):
            until = cache.span(first, begun)[1] - 1  # the last one goes on behind
            generated[row, :, : max(0, until - begin)] = False
    return SoundGiven(generated, True)


def with_sound(
    state: LatentState, sound: Tensor, first: int, given: SoundGiven, cache: SoundCache
) -> LatentState:
    """A training state with the sound of its clips.

    Args:
        state: of clips cut out from latent frame `first` on.
        sound: all latents of those clips' sound, [B, C, K], on the state's device.
        first: latent frame of the clips that the state begins with.
        given: what of it is made.
        cache: of the sound.
    """
    begin, end, start_s = cache.span(first, state.latents.shape[2])
    clean = sound[:, :, begin:end].float()
    made = SoundState(torch.zeros_like(clean), clean, given.generated.to(clean.device), start_s)
    if given.picture_known:
        state = replace(state, denoise_mask=torch.zeros_like(state.denoise_mask))
    return replace(state, sound=made)
