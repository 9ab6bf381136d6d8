"""Toybox clips as cached latents: rendered and encoded once, described anew each time."""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from train.toybox.tasks.latents import LatentShards
from train.toybox.tasks.model_made import Redrawn, Settled, as_settled, drawn_anew
from train.toybox.world.cast import SPRITE_NAMES
from train.toybox.world.cues import scene_marks
from train.toybox.world.render import Rendered, render
from train.toybox.world.scenes import (
    MOTIONS,
    PLACES,
    SEED_RANGES,
    WORLD_VERSION,
    Actor,
    Scene,
    SceneMix,
    is_held_out,
    sample_scenes,
    times_in,
)
from vidgen.core.errors import InputError
from vidgen.core.runtime import best_dtype
from vidgen.core.shapes import Strides
from vidgen.models.vae import CausalVAE, VAEConfig
from vidgen.training.task import seed_of
from vidgen.weights.configs import config_of
from vidgen.weights.layouts import open_model
from vidgen.weights.load import load_module, read_tensors

if TYPE_CHECKING:
    from train.toybox.redrawing import Redrawer

MID_FRAME = 16
_QUARTERS = 0.25, 0.5, 0.75
"""Of a clip's length: where a cache of stills alone looks at it."""
MARK_BINS = 8
"""Parts of a latent frame that marks are told apart by: 42 ms each where it stands for 4 frames."""
_AT_ONCE = {"cpu": (16, 16), "cuda": (1024, 2048)}
"""Clips, and those of which stills alone are kept: painting them takes a GPU as long as a few."""
_ENCODED = 256
"""Clips that are encoded at once: cuDNN counts a tensor's numbers in 32 bits."""
_MOST_CLIPS = 1 << 12  # of a batch


@dataclass(frozen=True)
class CacheConfig:
    """One geometry of cached clips.

    Args:
        folder: where the shards lie.
        vae: component folder of the VAE whose encoder made them.
        shards: how many shards of `shard_size` clips.
        first_scene: offset into the training range of scene seeds; geometries don't share scenes.
        motion: of an actor in all of its scenes, one after the other as they come; None: any.
        sprites: of which one is an actor in all of its scenes, likewise: those that are learned
            last; empty: any.
        mix: how often its scenes are rich, as in what is rarely seen otherwise: tinted sprites.
        stills_only: for batches of single frames alone, at a sixth of the price of a clip.
        redrawn: who draws its clips anew, which sound is to be made for; None: they are encoded
            alone. Stills, and how much of a latent is sprite, are those of the scene.
        settled: who settles its clips at half their rate or less, and where, which is kept beside
            them: what an expert at low noise goes on from; or None.
    """

    folder: str
    vae: str
    shards: int
    shard_size: int = 256
    first_scene: int = 0
    num_frames: int = 33
    fps: int = 12
    height: int = 128
    width: int = 128
    motion: str | None = None
    sprites: tuple[str, ...] = ()
    mix: SceneMix = field(default_factory=SceneMix)
    stills_only: bool = False
    redrawn: Redrawn | None = None
    settled: Settled | None = None

    def __post_init__(self) -> None:
        if self.num_frames <= MID_FRAME and not self.stills_only:
            raise InputError(f"num_frames is {self.num_frames}, but frame {MID_FRAME} is kept as a "
                             f"still; give {MID_FRAME + 1} or more")
        for name in ("redrawn", "settled"):
            if getattr(self, name) is not None and self.stills_only:
                raise InputError(f"{name} is of clips, of which stills_only keeps none; leave one "
                                 "out")
        if self.redrawn and self.settled and self.redrawn.model != self.settled.model:
            raise InputError(f"redrawn is by {self.redrawn.model}, settled by "
                             f"{self.settled.model}; one model makes both, so name the same or "
                             "leave one out")
        if self.motion is not None and self.motion not in MOTIONS:
            raise InputError(
                f"motion is {self.motion!r}; give one of {', '.join(MOTIONS)}, or none"
            )
        unknown = [name for name in self.sprites if name not in SPRITE_NAMES]
        if unknown:
            raise InputError(
                f"sprites has {unknown[0]!r}; give some of {', '.join(SPRITE_NAMES)}, or none"
            )

    def frames_of(self, num_frames: int, fps: int) -> int:
        """How many of its frames last as long as `num_frames` at another rate do."""
        return 1 + (num_frames - 1) * self.fps // fps

    @property
    def takes_all(self) -> bool:
        """Whether every scene that comes is taken."""
        return self.motion is None and not self.sprites

    @property
    def drawn_by(self) -> str | None:
        """Folder of the model that makes some of it, or None."""
        how = self.redrawn or self.settled
        return None if how is None else how.model

    def takes(self, scene: Scene) -> bool:
        """Whether a scene is one of the cache's."""
        return (self.motion is None or self.motion in [each.motion for each in scene.actors]) and (
            not self.sprites or any(each.sprite in self.sprites for each in scene.actors)
        )


@dataclass(frozen=True)
class Stills:
    """Stills of training clips, each encoded alone.

    Attributes:
        latents: [B, C, K, h, w].
        frame_index: [B, K] int64; see `vidgen.diffusion.condition.Given`.
    """

    latents: Tensor
    frame_index: Tensor


@dataclass(frozen=True)
class CachedClips:
    """Latents of N clips, float16, normalised.

    Attributes:
        clips: [N, C, F, h, w]; of a cache of stills alone one frame of each clip, F = 1.
        stills: three a clip, each encoded alone: frame 16, the last frame (or two others of a cache
            of stills alone), and the clip's first sprite shown in another place (the reference,
            index -1).
        cover: [N, 1, F, h, w] in [0, 1], how much of a latent's pixels is sprite.
        still_cover: [N, 1, 3, h, w].
        settled: [N, C, n, h, w], the clips as a model settles them at its own frame rate, or None.
    """

    clips: Tensor
    stills: Stills
    cover: Tensor
    still_cover: Tensor
    settled: Tensor | None = None

    def to(self, device: torch.device) -> CachedClips:
        """The same on another device; which frames its stills show stays on the CPU."""
        stills = Stills(self.stills.latents.to(device), self.stills.frame_index)
        settled = None if self.settled is None else self.settled.to(device)
        return CachedClips(self.clips.to(device), stills, self.cover.to(device),
                           self.still_cover.to(device), settled)


class ToyboxCache:
    """Latents of training scenes, with stills for last-frame, keyframe and reference conditions."""

    def __init__(self, config: CacheConfig) -> None:
        self.config = config
        self.manifest = {
            "encoder": encoder_hash(Path(config.vae)),
            "world_version": WORLD_VERSION,
            **{
                name: getattr(config, name)
                for name in ("shard_size", "first_scene", "num_frames", "fps", "height", "width")
            },
        }
        if config.motion is not None:
            self.manifest["motion"] = config.motion
        if config.sprites:
            self.manifest["sprites"] = list(config.sprites)
        if config.mix != SceneMix():
            self.manifest["mix"] = asdict(config.mix)
        if config.stills_only:
            self.manifest["stills_only"] = True
        if config.redrawn is not None:
            model = open_model(config.redrawn.model)
            self.manifest["redrawn"] = {"model": model.content_hash,
                                        "strengths": list(config.redrawn.strengths)}
        if config.settled is not None:
            self.manifest["settled"] = {"model": open_model(config.settled.model).content_hash,
                                        "level": config.settled.level}
        self.shards = LatentShards(config.folder, self.manifest)
        self._scenes: dict[int, Scene] = {}
        self._drawing = threading.Lock()  # a batch may be made in a thread
        self._taken = filter(config.takes, map(self._drawn, itertools.count()))

    @property
    def strides(self) -> Strides:
        """The VAE's."""
        vae: VAEConfig = config_of(VAEConfig, Path(self.config.vae))
        return vae.strides

    @property
    def num_clips(self) -> int:
        """Clips that the config asks for."""
        return self.config.shards * self.config.shard_size

    def scene(self, index: int) -> Scene:
        """The scene of clip `index`; never one of the held-out triples."""
        if index in self._scenes:
            return self._scenes[index]
        with self._drawing:
            if self.config.takes_all:
                self._scenes[index] = self._drawn(index)
            while index not in self._scenes:
                self._scenes[len(self._scenes)] = next(self._taken)
            return self._scenes[index]

    def _drawn(self, number: int) -> Scene:
        seed = SEED_RANGES["train"][0] + self.config.first_scene + number
        return sample_scenes(seed, 1, self.config.mix, split="train")[0]

    def marks(self, scenes: Sequence[Scene], first: int, count: int) -> Tensor:
        """When something comes to a mark, [B, F, MARK_BINS] float 0 or 1.

        Args:
            scenes: B scenes of the cache's.
            first: latent frame of the clips that the stretch begins with.
            count: its latent frames, F.
        """
        config, t = self.config, self.strides.t
        found = torch.zeros(len(scenes), count, MARK_BINS)
        for row, scene in enumerate(scenes):
            size = config.num_frames, config.height, config.width
            for seconds in scene_marks(scene, *size, config.fps):
                frame, part = divmod((seconds * config.fps - 1) / t, 1)  # of the first one's end
                index = int(frame) + 1 - first
                if 0 <= index < count:
                    found[row, index, int(part * MARK_BINS)] = 1
        return found

    def load(self) -> CachedClips:
        """All clips that the config asks for."""
        tensors = self.shards.load(self.config.shards)
        frames = torch.tensor(self.frames_shown[1:])
        stills = Stills(tensors["stills"], frames.expand(self.num_clips, 3))
        return CachedClips(tensors["clips"], stills, tensors["cover"], tensors["still_cover"],
                           tensors.get("settled"))

    def missing(self, dealt: int = 0) -> list[int]:
        """Shards that this process has still to make; `dealt` are those of caches before it."""
        return self.shards.missing(self.config.shards, dealt)

    @property
    def frames_shown(self) -> tuple[int, int, int, int]:
        """Frames of a clip that are kept as single ones: its first, and those of its stills."""
        return (*self._moments(), -1)

    def _moments(self) -> tuple[int, int, int]:
        """Three frames of a clip, each a still of its own; the first one begins a whole clip."""
        count = self.config.num_frames
        if self.config.stills_only:
            first, middle, last = (int(part * count) for part in _QUARTERS)
            return first, middle, last
        return 0, MID_FRAME, count - 1

    @torch.no_grad()
    def make(
        self, index: int, vae: CausalVAE, device: torch.device, redrawer: Redrawer | None = None
    ) -> None:
        """Render, encode and write shard `index`; `redrawer` is `drawn_by`, opened."""
        assert (redrawer is None) == (self.config.drawn_by is None)
        config, moments = self.config, self._moments()
        batch = _AT_ONCE.get(device.type, _AT_ONCE["cpu"])[config.stills_only]
        seen = moments if config.stills_only else range(config.num_frames)
        show = partial(
            render, height=config.height, width=config.width, fps=config.fps, device=device
        )
        first = index * config.shard_size
        scenes = [self.scene(first + i) for i in range(config.shard_size)]
        clips, stills, covers, still_covers, settled = [], [], [], [], []
        for start in range(0, len(scenes), batch):
            part = scenes[start : start + batch]
            shown = show(part, num_frames=config.num_frames, frames=seen)
            posed = show([as_reference(scene) for scene in part], num_frames=1)
            whole = _frame(shown, 0) if config.stills_only else shown
            made = encode(vae, whole.video)
            if config.redrawn is not None and redrawer is not None:
                made = drawn_anew(made, part, config.redrawn, config.fps, redrawer)
            clips.append(made)
            if config.settled is not None and redrawer is not None:
                seldom = encode(vae, whole.video[:, :, :: round(config.fps / redrawer.fps)])
                settled.append(
                    as_settled(seldom, part, config.settled, first + start, redrawer))
            covers.append(latent_cover(whole.masks, vae.strides))
            singles = (*(_frame(shown, seen.index(moment)) for moment in moments[1:]), posed)
            stills.append(torch.cat([encode(vae, still.video) for still in singles], dim=2))
            still_covers.append(
                torch.cat([latent_cover(still.masks, vae.strides) for still in singles], dim=2)
            )
        tensors = {
            "clips": torch.cat(clips), "stills": torch.cat(stills),
            "cover": torch.cat(covers), "still_cover": torch.cat(still_covers),
        } | ({"settled": torch.cat(settled)} if settled else {})
        self.shards.write(index, {name: value.half().cpu() for name, value in tensors.items()})


def cut_around(
    video: Tensor, mask: Tensor, side: int, step: int = 1
) -> tuple[Tensor, Tensor]:
    """Cut of each clip [B, C, T, H, W] the square around what its mask [B, 1, T, H, W] shows.

    Args:
        video: pixels or latents.
        mask: where something is to be seen, 0 to 1.
        side: of the squares.
        step: they begin at multiples of it.
    """
    tops, lefts = (_starts_around(shown, side, step)
                   for shown in (mask.amax((1, 2, 4)), mask.amax((1, 2, 3))))
    beside = torch.arange(side, device=video.device)
    rows = tops[:, None] + beside[:, None]  # [B, side, 1]
    columns = lefts[:, None] + beside  # [B, 1, side]
    clips = torch.arange(len(video), device=video.device)[:, None, None]
    # indexed axes come first: [B, side, side, C, T]
    cut = (part[clips, :, :, rows, columns].movedim((1, 2), (3, 4)) for part in (video, mask))
    return next(cut), next(cut)


def _starts_around(shown: Tensor, side: int, step: int) -> Tensor:
    """Where spans of `side` begin whose middles are those of what is shown [B, L]: [B, 1], inside.

    Of nothing shown they begin where the frame does.
    """
    places = torch.arange(shown.shape[1], device=shown.device, dtype=shown.dtype)
    middles = (shown * places).sum(1) / shown.sum(1).clamp(min=1e-6)
    most = (shown.shape[1] - side) // step
    starts = ((middles - side / 2) / step).round().clamp(0, most) * step
    return starts.long()[:, None]


def fresh_seed(*values: int) -> int:
    """Seed of a batch's first scene in the training range, which depends on all of the values.

    Drawn, not counted: ranks share no scenes, however many there are.
    """
    low, high = SEED_RANGES["train"]
    return low + seed_of(*values) % (high - low - _MOST_CLIPS)


def as_reference(scene: Scene) -> Scene:
    """The scene's first sprite, alone and at rest in another place, large enough to be learned.

    No place that would show one of the held-out triples is taken.
    """
    first = scene.actors[0]
    places = [
        place for place in PLACES
        if place != scene.place and not is_held_out(first.sprite, "stays", place)
    ]
    place = places[scene.seed % len(places)]
    actor = Actor(first.sprite, "stays", first.tint, "large")
    return Scene(scene.seed, (actor,), place, times_in(place)[0])


def encode(vae: CausalVAE, video: Tensor) -> Tensor:
    """Normalised latents, under bf16 autocast where the device is fast in it."""
    bf16 = best_dtype(video.device) == "bf16"
    with torch.autocast(video.device.type, torch.bfloat16, enabled=bf16):
        return torch.cat([vae.encode(part).float() for part in video.split(_ENCODED)])


def latent_cover(masks: Tensor, strides: Strides) -> Tensor:
    """Masks of actors [B, 2, T, H, W] as the share of each latent's pixels, [B, 1, F, h, w]."""
    seen = masks.amax(1, keepdim=True)
    parts = [F.avg_pool3d(seen[:, :, :1], (1, strides.hw, strides.hw))]
    if seen.shape[2] > 1:
        parts.append(F.avg_pool3d(seen[:, :, 1:], (strides.t, strides.hw, strides.hw)))
    return torch.cat(parts, dim=2)


def _frame(shown: Rendered, index: int) -> Rendered:
    return Rendered(*(part[:, :, index : index + 1] for part in shown))


def encoder_hash(folder: Path, kind: type = VAEConfig) -> str:
    """SHA-256 of what shapes latents: the encoder's tensors and the statistics, not the decoder."""
    config = config_of(kind, folder)
    digest = hashlib.sha256(repr((config.latents_mean, config.latents_std)).encode())
    tensors = read_tensors(folder / "model.safetensors")
    for name in sorted(name for name in tensors if name.startswith("encoder.")):
        digest.update(name.encode() + tensors[name].view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_vae(folder: str, device: torch.device) -> CausalVAE:
    """The VAE of a component folder, fp32 weights."""
    config = config_of(VAEConfig, Path(folder))
    return load_module(lambda: CausalVAE(config), Path(folder), torch.float32, device)
