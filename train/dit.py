"""Train the embedded model's transformer and text encoder, jointly, on cached latents.

    python train/cache.py -c configs/train/toybox_dit.yaml      first: render and encode clips
    python train/dit.py   -c configs/train/toybox_dit.yaml [--set run.seed=1]... [--resume]

Nothing is rendered or encoded inside the step; captions are drawn anew each time a clip is seen.
Conditions are mixed from the start. The text encoder also has to name what the caption says
(sprite, motion, place, ...) through linear heads, which are dropped on export.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidgen.core.errors import InputError
from vidgen.core.protocols import KeyTokens
from vidgen.core.runtime import choose_device
from vidgen.diffusion.condition import (
    ConditionMix,
    LatentState,
    Stills,
    denoise_inputs,
    training_conditions,
)
from vidgen.diffusion.flow import add_noise, to_timestep, velocity_loss
from vidgen.diffusion.schedule import draw_sigmas
from vidgen.models.dit import SpacetimeDiT
from vidgen.models.dit_inputs import Stream
from vidgen.models.presets import DIT_PRESETS, TEXT_PRESETS
from vidgen.models.text import PromptTokenizer, UMT5Encoder, encode_tokens
from vidgen.ops.patchify import patchify_latents
from vidgen.toybox.captions import CLASSES, attributes, caption
from vidgen.training.config import Phase, RunConfig
from vidgen.training.optim import build_optimizers
from vidgen.training.program import run_program
from vidgen.training.toybox_data import CacheConfig, ToyboxCache
from vidgen.weights.load import load_module

Module = TypeVar("Module", bound=nn.Module)

VALIDATION_SIGMAS = (0.2, 0.4, 0.6, 0.8, 0.95)
PLAIN = ConditionMix(text=0.65, first=0.17, prefix=0.12, mask=0.06)
WITH_STILLS = ConditionMix(
    text=0.4, first=0.05, last=0.2, both=0.2, frames=0.1, prefix=0.05, mask=0.0, reference=0.4
)
WINDOW = ConditionMix(text=0, first=0, last=0, both=0, frames=0, prefix=1, mask=0, reference=0)
TEXT_ONLY = ConditionMix(text=1, first=0, last=0, both=0, frames=0, prefix=0, mask=0, reference=0)


@dataclass(frozen=True)
class DiTRun:
    """The whole YAML file.

    Args:
        caches: what `train/cache.py` made; one entry an aspect ratio, drawn by clip count.
        tokenizer: folder with `tokenizer.json`.
        shifts: of the training times, one a phase: larger clips need more noise. Motion is settled
            above a noise level of 0.85.
        uniform_share: share of a clip batch's times drawn evenly instead, so that the low levels,
            where edges become crisp, aren't forgotten.
        conditions: of batches without stills, which cost no tokens.
        still_conditions: of the share of batches that get last frames, keyframes, references.
        still_share: that share.
        caption_dropout: share of samples that see an empty prompt, for guidance.
        image_shares: share of each phase's batches that are single frames, `image_batch` of them:
            cheap samples of what things look like, without which clips make the model forget
            stills. None without.
        image_batch: samples of such a batch.
        image_shift: of such a batch's training times.
        window_share: share of clip batches cut from the inside of clips, all under a prefix:
            what a window of a long clip is, whose first latent is no single frame.
        attribute_weight: of the caption-to-attributes loss.
        text_warmup: steps of that loss alone before the first step, so that the transformer never
            learns from a text encoder that knows no words.
        sprite_weight: how much more the velocity's error counts on sprites, which are few and
            matter most; fades as noise grows and hides where they are.
        cover_weight: of the loss that has tokens half-way through the blocks say how much of them
            is sprite: what a sentence says of motion is lost in the velocity's error, where noise
            is high and sprites are few, but not here (after Yu et al. 2024, who align such tokens
            with another network's; here there is the truth). The head is dropped on export.
        init: folder of a released model whose transformer and text encoder to start from.
        compile: torch.compile the blocks, on devices that our own kernels don't serve; pays in runs
            of hours, as every shape compiles anew.
        validation_clips: taken off the end of the first cache, never trained on.
    """

    run: RunConfig
    caches: tuple[CacheConfig, ...]
    tokenizer: str
    shifts: tuple[float, ...]
    uniform_share: float = 0.0
    preset: str = "toybox"
    text_preset: str = "toybox"
    conditions: ConditionMix = PLAIN
    still_conditions: ConditionMix = WITH_STILLS
    still_share: float = 0.25
    caption_dropout: float = 0.1
    image_shares: tuple[float, ...] = ()
    image_batch: int = 64
    image_shift: float = 1.0
    window_share: float = 0.0
    attribute_weight: float = 0.1
    text_warmup: int = 0
    sprite_weight: float = 0.0
    cover_weight: float = 0.0
    init: str | None = None
    compile: bool = False
    validation_clips: int = 64

    def __post_init__(self) -> None:
        """Check what would otherwise show hours into the run."""
        phases = self.run.phases
        if len(self.shifts) != len(phases):
            raise InputError(f"shifts has {len(self.shifts)} entries for {len(phases)} phases; "
                             "give one a phase")
        if self.image_shares and len(self.image_shares) != len(phases):
            raise InputError(f"image_shares has {len(self.image_shares)} entries for {len(phases)} "
                             "phases; give one a phase, or none")
        longest = min((cache.num_frames for cache in self.caches), default=0)
        asked = max(phase.num_frames for phase in phases)
        if asked > longest:
            raise InputError(f"a phase has clips of {asked} frames, the caches hold {longest}; "
                             "cache longer clips or shorten the phase")
        kept = self.caches[0].shards * self.caches[0].shard_size
        if self.validation_clips >= kept:
            raise InputError(f"validation_clips is {self.validation_clips} of {kept} cached clips; "
                             "leave some to train on")


class AttributeHeads(nn.Module):
    """Linear heads from the mean text embedding to every attribute's classes."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.heads = nn.ModuleDict(
            {name: nn.Linear(dim, len(classes)) for name, classes in CLASSES.items()}
        )

    def loss(self, context: Tensor, mask: Tensor, labels: dict[str, Tensor]) -> Tensor:
        """Mean cross-entropy over attributes; label -1 is left out. context [B, S, D]."""
        pooled = context.sum(1) / mask.sum(1, keepdim=True)
        losses = [
            F.cross_entropy(head(pooled), labels[name], ignore_index=-1)
            for name, head in self.heads.items()
            if (labels[name] >= 0).any()
        ]
        return torch.stack(losses).mean()


class CoverHead(nn.Module):
    """A linear head from a transformer's tokens, half-way, to the cover of their latents."""

    def __init__(self, dit: SpacetimeDiT) -> None:
        super().__init__()
        self.proj = nn.Linear(dit.config.hidden_dim, dit.config.patch_size**2)
        self.patch = dit.config.patch_size
        dit.blocks[(len(dit.blocks) - 1) // 2].register_forward_hook(self._keep)

    def _keep(self, _block: nn.Module, _inputs: Any, streams: list[Stream]) -> None:
        self.tokens = streams[0].tokens

    def loss(self, cover: Tensor) -> Tensor:
        """Cross-entropy with cover [B, 1, F, h, w] of the clip that went through last."""
        target = patchify_latents(cover, self.patch)
        logits = self.proj(self.tokens[:, : target.shape[1]])
        return F.binary_cross_entropy_with_logits(logits.float(), target.clamp(0, 1))


@dataclass(frozen=True)
class Batch:
    """One micro-batch: latents with conditions, noise levels and noise, and described.

    `cover` [B, 1, F, h, w] says how much of a latent is sprite.
    """

    state: LatentState
    cover: Tensor
    noise: Tensor
    sigma: Tensor
    ids: Tensor
    mask: Tensor
    labels: dict[str, Tensor]


class DiTTask:
    """Velocity prediction on cached latents."""

    def __init__(self, config: DiTRun) -> None:
        self.config = config
        self.device = choose_device(config.run.device)
        torch.manual_seed(config.run.seed)
        self.dit = self._network("transformer", SpacetimeDiT, DIT_PRESETS[config.preset])
        self.text = self._network("text_encoder", UMT5Encoder, TEXT_PRESETS[config.text_preset])
        if not config.init:
            self.dit.init_weights()
        if config.compile:
            self.dit.compile_blocks()
        self.heads = AttributeHeads(self.text.config.hidden_dim).to(self.device)
        self.cover = CoverHead(self.dit).to(self.device)
        self.modules: dict[str, nn.Module] = {
            "transformer": self.dit, "text_encoder": self.text, "attributes": self.heads,
            "cover": self.cover,
        }
        self.tokenizer = PromptTokenizer(config.tokenizer)
        self.caches = [ToyboxCache(entry) for entry in config.caches]
        self.data = [cache.load() for cache in self.caches]
        self.strides = self.caches[0].strides
        self.patch = self.dit.config.patch_size

    def _network(self, part: str, kind: type[Module], architecture: Any) -> Module:
        """Fresh, or with the weights of the released model to start from."""
        if not self.config.init:
            return kind(architecture).to(self.device)
        folder = Path(self.config.init) / part
        module = load_module(lambda: kind(architecture), folder, torch.float32, self.device)
        return module.requires_grad_(requires_grad=True)

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Muon for the blocks' matrices, AdamW for all else."""
        return build_optimizers(
            self.modules,
            self.config.run.optim,
            use_muon=lambda name, _: name.startswith("transformer.blocks."),
        )

    def start_phase(self, index: int, phase: Phase) -> bool:
        """Before the first step, teach the text encoder words."""
        del phase
        if index or not self.config.text_warmup or self.config.init:
            return False
        self._warm_up_text(self.config.text_warmup)
        return True

    def _warm_up_text(self, steps: int, batch_size: int = 64) -> None:
        """Captions to attributes, alone; deterministic, so a run killed here starts over alike."""
        parameters = [*self.text.parameters(), *self.heads.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=self.config.run.optim.lr, betas=(0.9, 0.98))
        first, kept = self.caches[0], self.caches[0].num_clips - self.config.validation_clips
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = self.config.run.optim.lr * (1 - step / steps)
            scenes = [first.scene((step * batch_size + i) % kept) for i in range(batch_size)]
            texts = [caption(scene, step * batch_size + i) for i, scene in enumerate(scenes)]
            ids, mask = (part.to(self.device) for part in self.tokenizer.encode(texts))
            labels = _labels([attributes(scene) for scene in scenes], torch.zeros(batch_size) > 0)
            labels = {name: value.to(self.device) for name, value in labels.items()}
            bf16 = self.config.run.dtype == "bf16"
            with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
                loss = self.heads.loss(encode_tokens(self.text, ids, mask), mask, labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step % 100 == 99:
                print(f"words {step + 1}/{steps} loss {loss.item():.4f}", file=sys.stderr)

    def batch(self, phase: Phase, step: int, micro: int) -> Batch:
        """Clips of one geometry, each with a caption and a condition of its own."""
        run = self.config.run
        draw = torch.Generator().manual_seed(_hash(run.seed, step, micro))
        counts = [cache.num_clips for cache in self.caches]
        counts[0] -= self.config.validation_clips
        which = int(torch.multinomial(torch.tensor(counts).float(), 1, generator=draw))
        index = run.phase_at(step)[0]
        num_frames, size, shift = phase.num_frames, phase.batch_size, self.config.shifts[index]
        shares = self.config.image_shares
        if shares and torch.rand((), generator=draw) < shares[index]:
            num_frames, size, shift = 1, self.config.image_batch, self.config.image_shift
        rows = torch.randint(counts[which], (size,), generator=draw)
        sigma = draw_sigmas(size, draw, shift=shift)
        if num_frames > 1:
            even = torch.rand(size, generator=draw) < self.config.uniform_share
            sigma = torch.where(even, draw_sigmas(size, draw, mean=None), sigma)
        return self._assemble(which, rows, num_frames, sigma, draw)

    def _assemble(
        self, which: int, rows: Tensor, num_frames: int, sigma: Tensor, draw: torch.Generator,
        *, conditions: ConditionMix | None = None, dropout: float | None = None,
    ) -> Batch:
        data = self.data[which]
        inside_clip = (
            num_frames > 1 and conditions is None
            and torch.rand((), generator=draw) < self.config.window_share
        )
        chosen = Stills(data.stills.latents[rows].float(), data.stills.frame_index[rows])
        if num_frames == 1:
            pick = torch.randint(3, (len(rows),), generator=draw)
            latents = _single(data.clips, data.stills.latents, rows, pick)
            cover = _single(data.cover, data.still_cover, rows, pick)
            chosen = Stills(chosen.latents[:, :, 2:], chosen.frame_index[:, 2:])
        else:
            window = self._window(data.clips.shape[2], num_frames, draw, inside=inside_clip)
            latents, cover = (part[rows, :, window].float() for part in (data.clips, data.cover))
            shown = chosen.frame_index[0] < num_frames
            chosen = Stills(chosen.latents[:, :, shown], chosen.frame_index[:, shown])
        if inside_clip:
            conditions = WINDOW
        if conditions is None and torch.rand((), generator=draw) < self.config.still_share:
            conditions, stills = self.config.still_conditions, chosen
        else:
            conditions, stills = conditions or self.config.conditions, None
        state = training_conditions(
            latents, draw, conditions, self.strides, stills=stills, patch=self.patch
        )
        seeds = torch.randint(2**31, (len(rows),), generator=draw).tolist()
        scenes = [self.caches[which].scene(row) for row in rows.tolist()]
        texts = [caption(scene, seed) for scene, seed in zip(scenes, seeds, strict=True)]
        rate = self.config.caption_dropout if dropout is None else dropout
        dropped = torch.rand(len(rows), generator=draw) < rate
        texts = ["" if drop else text for text, drop in zip(texts, dropped.tolist(), strict=True)]
        labels = _labels([attributes(scene) for scene in scenes], dropped)
        ids, mask = self.tokenizer.encode(texts)
        noise = torch.randn(latents.shape, generator=draw)
        return Batch(
            _state_to(state, self.device), cover.to(self.device), noise.to(self.device),
            sigma.to(self.device),
            ids.to(self.device), mask.to(self.device),
            {name: value.to(self.device) for name, value in labels.items()},
        )

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

    def loss(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared error of the velocity where it is to be generated, and the attributes' loss."""
        del step
        context = encode_tokens(self.text, batch.ids, batch.mask)
        error = self._error(batch, context, self.config.sprite_weight)
        told = self.heads.loss(context, batch.mask, batch.labels)
        cover = self.cover.loss(batch.cover)
        total = error + self.config.attribute_weight * told + self.config.cover_weight * cover
        return total, {
            "velocity": error.detach(), "attributes": told.detach(), "cover": cover.detach(),
        }

    def _error(self, batch: Batch, context: Tensor, sprite_weight: float = 0.0) -> Tensor:
        clean = batch.state.clean
        noisy = add_noise(clean, batch.noise, batch.sigma)
        latents, sigma = denoise_inputs(batch.state, batch.sigma, noisy, patch=self.patch)
        velocity = self.dit(
            latents, to_timestep(sigma), context,
            context_lengths=batch.mask.sum(1), extra=batch.state.keys,
        )
        clear = (1 - batch.sigma).view(-1, 1, 1, 1, 1)
        weight = batch.state.denoise_mask * (1 + sprite_weight * clear * batch.cover)
        return velocity_loss(velocity, clean, batch.noise, weight).mean()

    def validate(self, step: int, folder: Path) -> dict[str, float]:
        """Velocity error on clips kept aside, text alone, at fixed noise levels and noise."""
        del folder
        index, phase = self.config.run.phase_at(step - 1)
        scores = self._velocity_errors(phase.num_frames)
        if self.config.image_shares and self.config.image_shares[index] > 0:
            scores["image_mean"] = self._velocity_errors(1)["velocity_mean"]
        return scores

    def _velocity_errors(self, num_frames: int) -> dict[str, float]:
        count = self.config.validation_clips
        rows = torch.arange(self.caches[0].num_clips - count, self.caches[0].num_clips)
        scores = {}
        for level in VALIDATION_SIGMAS:
            draw = torch.Generator().manual_seed(round(level * 1000))
            batch = self._assemble(
                0, rows, num_frames, torch.full((count,), level), draw,
                conditions=TEXT_ONLY, dropout=0.0,
            )
            bf16 = self.config.run.dtype == "bf16"
            with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
                context = encode_tokens(self.text, batch.ids, batch.mask)
                scores[f"velocity_{level}"] = float(self._error(batch, context))
        scores["velocity_mean"] = sum(scores.values()) / len(scores)
        return scores


def _single(clips: Tensor, stills: Tensor, rows: Tensor, pick: Tensor) -> Tensor:
    """One frame a clip, [B, _, 1, h, w]: its first (pick 0), middle (1) or last (2)."""
    frames = torch.cat([clips[rows, :, :1], stills[rows, :, :2]], dim=2).float()
    return frames[torch.arange(len(rows)), :, pick][:, :, None]


def _hash(*values: int) -> int:
    digest = hashlib.sha256(repr(values).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _labels(described: list[dict[str, str | None]], dropped: Tensor) -> dict[str, Tensor]:
    """Class indices by attribute, [B]; -1 where there is nothing to name."""
    table = {}
    for name, classes in CLASSES.items():
        index = {value: i for i, value in enumerate(classes)}
        values = torch.tensor([index.get(entry[name], -1) for entry in described])
        table[name] = values.masked_fill(dropped, -1)
    return table


def _state_to(state: LatentState, device: torch.device) -> LatentState:
    keys = state.keys
    if keys is not None:
        valid = None if keys.valid is None else keys.valid.to(device)
        keys = KeyTokens(keys.latents.to(device), keys.positions.to(device), valid)
    return LatentState(
        state.latents.to(device), state.clean.to(device), state.denoise_mask.to(device), keys
    )


if __name__ == "__main__":
    raise SystemExit(run_program(__doc__, DiTRun, DiTTask))
