"""Train the embedded model's transformer and text encoder, jointly, on cached latents.

    python train/cache.py -c configs/train/toybox_dit.yaml      first: render and encode clips
    python train/dit.py   -c configs/train/toybox_dit.yaml [--set run.seed=1]... [--resume]

Nothing is rendered or encoded inside the step; captions are drawn anew each time a clip is seen.
Conditions are mixed from the start. The text encoder also has to name what the caption says
(sprite, motion, place, ...) through linear heads, which are dropped on export.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidgen.core.errors import InputError
from vidgen.core.runtime import choose_device
from vidgen.diffusion.flow import add_noise, velocity_loss
from vidgen.models.audio import AudioVAEConfig
from vidgen.models.dit import AudioConfig, SpacetimeDiT
from vidgen.models.dit_inputs import Stream
from vidgen.models.presets import DIT_PRESETS, TEXT_PRESETS
from vidgen.models.text import UMT5Encoder, encode_tokens
from vidgen.ops.patchify import patchify_latents
from vidgen.pipeline.networks import velocity
from vidgen.toybox.captions import CLASSES
from vidgen.training.channel_weights import channel_weights
from vidgen.training.config import Phase
from vidgen.training.dit_data import Batch, ClipDraws, DiTData
from vidgen.training.ema import named_parameters
from vidgen.training.optim import build_optimizers
from vidgen.training.program import run_program
from vidgen.training.toybox_data import MARK_BINS, PART_BINS, load_vae
from vidgen.weights.load import load_module

Module = TypeVar("Module", bound=nn.Module)

VALIDATION_SIGMAS = (0.2, 0.4, 0.6, 0.8, 0.95)
WEIGHED = 8  # clips on which the channels are weighed
SHOWN = 0.5  # share of a token's cover from which it is to name its sprite


@dataclass(frozen=True, kw_only=True)
class DiTRun(DiTData):
    """The whole YAML file: what a run learns from, and how.

    Args:
        preset: of the transformer.
        text_preset: of the text encoder.
        attribute_weight: of the caption-to-attributes loss.
        text_warmup: steps of that loss alone before the first step, so that the transformer never
            learns from a text encoder that knows no words.
        sprite_weight: how much more the velocity's error counts on sprites, which are few and
            matter most; fades as noise grows and hides where they are.
        cover_weight: of the loss that has tokens half-way through the blocks say how much of them
            is sprite: what a sentence says of motion is lost in the velocity's error, where noise
            is high and sprites are few, but not here (after Yu et al. 2024, who align such tokens
            with another network's; here there is the truth). Its head is dropped on export.
        name_weight: of the loss that has those that are half sprite or more name it, and all of
            sound name who is heard; likewise.
        part_weight: of the loss that has them say which part of it they show; likewise.
        cue_weight: of the loss that has tokens of sound say whether a sound begins there: what the
            picture settles, but few tokens of a clip's velocity; likewise.
        mark_weight: of the loss that has tokens that are half sprite or more say when within their
            latent frame it comes to a mark, such as the floor: what tokens of sound can then be
            told; likewise.
        pixel_weights: whether errors in the latents' channels count by what the VAE makes of them
            in pixels (`channel_weights`) instead of all alike; in the validation's figures, too.
        part: "sound" trains the transformer's own parts for sound alone, first of all.
        init: folder of a released model whose transformer and text encoder to start from.
        compile: torch.compile the blocks, on devices that our own kernels don't serve; pays in runs
            of hours, as every shape compiles anew.
    """

    preset: str = "toybox"
    text_preset: str = "toybox"
    attribute_weight: float = 0.1
    text_warmup: int = 0
    sprite_weight: float = 0.0
    cover_weight: float = 0.0
    name_weight: float = 0.0
    part_weight: float = 0.0
    cue_weight: float = 0.0
    mark_weight: float = 0.0
    pixel_weights: bool = False
    part: Literal["all", "sound"] = "all"
    init: str | None = None
    compile: bool = False


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


class TruthHeads(nn.Module):
    """Linear heads from a transformer's tokens: what each of them shows, or sounds of.

    They read what leaves the block half-way; `cues` what leaves the last one, since sound can be
    told of a mark only once the picture's tokens know of it. But for `parts` they are drawn alike
    in each run, first of all in this order: released weights have learned with these very heads.
    """

    def __init__(self, dit: SpacetimeDiT) -> None:
        super().__init__()
        width, sprites = dit.config.hidden_dim, len(CLASSES["sprite"])
        self.cover = nn.Linear(width, dit.config.patch_size**2)
        self.names = nn.Linear(width, sprites)
        self.marks = nn.Linear(width, MARK_BINS)
        self.cues = nn.Linear(width, 1)
        self.voices = nn.Linear(width, sprites)
        self.parts = nn.Sequential(
            nn.RMSNorm(width, elementwise_affine=False), nn.Linear(width, PART_BINS**2)
        )
        for parameter in self.parts.parameters():  # it pulls at no token before it knows some
            nn.init.zeros_(parameter)
        self.patch = dit.config.patch_size
        dit.blocks[(len(dit.blocks) - 1) // 2].register_forward_hook(partial(self._keep, "half"))
        dit.blocks[-1].register_forward_hook(partial(self._keep, "last"))
        self.tokens: dict[str, list[Tensor]] = {}

    def _keep(
        self, place: str, _block: nn.Module, _inputs: Any, streams: list[Stream]
    ) -> None:
        self.tokens[place] = [stream.tokens for stream in streams]

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropies of the batch that went through last.

        `cover` says how much of a token is sprite; where half of it or more is, `names` which,
        `parts` what of it, and `marks` when it comes to one. Of sound `cues` says whether one
        begins there, `voices` whose it is.
        """
        target = patchify_latents(batch.cover, self.patch)
        tokens = self.tokens["half"][0][:, : target.shape[1]]
        is_sprite = target.mean(2) >= SHOWN
        found = {
            "cover": _binary(self.cover(tokens), target.clamp(0, 1)),
            "names": _naming(self.names, tokens, batch.shown[:, None], is_sprite),
            "parts": _naming(self.parts, tokens, batch.parts.flatten(1), is_sprite),
        }
        if batch.marks is not None:
            wanted = batch.marks.repeat_interleave(is_sprite.shape[1] // batch.marks.shape[1], 1)
            told = _binary(self.marks(tokens), wanted, reduction="none").mean(2)
            found["marks"] = (told * is_sprite).sum() / is_sprite.sum().clamp(min=1)
        if batch.cues is not None:
            anywhere = torch.ones_like(batch.cues, dtype=torch.bool)
            found["cues"] = _binary(self.cues(self.tokens["last"][1])[..., 0], batch.cues)
            found["voices"] = _naming(
                self.voices, self.tokens["half"][1], batch.shown[:, None], anywhere
            )
        return found


def _binary(logits: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    return F.binary_cross_entropy_with_logits(logits.float(), target, reduction=reduction)


def _naming(head: nn.Module, tokens: Tensor, names: Tensor, there: Tensor) -> Tensor:
    """Cross-entropy of tokens [B, L, D] where they are `there` [B, L].

    `names` are [B, L], or [B, 1] for all of a clip's tokens; -1 for none.
    """
    there = there & (names >= 0)
    wanted = names.expand_as(there)[there]
    wrong = F.cross_entropy(head(tokens[there]).float(), wanted, reduction="sum")
    return wrong / max(1, len(wanted))


class DiTTask:
    """Velocity prediction on cached latents."""

    alternates = True  # what makes sound rests in steps without it

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
        self.truth = TruthHeads(self.dit).to(self.device)
        self.modules: dict[str, nn.Module] = {
            "transformer": self.dit, "text_encoder": self.text, "attributes": self.heads,
            "truth": self.truth,
        }
        if config.part == "sound":
            for name, parameter in named_parameters(self.modules).items():
                parameter.requires_grad_("audio" in name or name.startswith("truth."))
        self.draws = ClipDraws(config, self.device, self.dit.config.patch_size)
        first = self.draws.caches[0]
        self.frames_per_s = first.config.fps / first.strides.t
        self.channels = self._channels() if config.pixel_weights else None
        for cache, _ in self.draws.sounds:
            _check_sound(self.dit.config.audio, cache.config)

    def _network(self, part: str, kind: type[Module], architecture: Any) -> Module:
        """Fresh, or with the weights of the released model to start from."""
        if not self.config.init:
            return kind(architecture).to(self.device)
        folder = Path(self.config.init) / part
        module = load_module(lambda: kind(architecture), folder, torch.float32, self.device)
        return module.requires_grad_(requires_grad=True)

    def _channels(self) -> Tensor:
        """What each channel counts, [C, 1, 1, 1], measured on some clips kept aside."""
        vae = load_vae(self.draws.caches[0].config.vae, self.device)
        some = self.draws.data[0].clips[-WEIGHED:, :, :3].float().to(self.device)
        return channel_weights(vae, some).to(self.device).view(-1, 1, 1, 1)

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
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = self.config.run.optim.lr * (1 - step / steps)
            ids, mask, labels = self.draws.captions(step * batch_size, batch_size)
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
        return self.draws.batch(phase, step, micro)

    def loss(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared error of the velocity where it is to be generated, and the attributes' loss."""
        del step
        context = encode_tokens(self.text, batch.ids, batch.mask)
        error, sound = self._errors(batch, context, self.config.sprite_weight)
        told = self.heads.loss(context, batch.mask, batch.labels)
        truth, config = self.truth.losses(batch), self.config
        weights = {"cover": config.cover_weight, "names": config.name_weight,
                   "parts": config.part_weight,
                   "marks": config.mark_weight, "cues": config.cue_weight,
                   "voices": config.name_weight}
        total = error + config.attribute_weight * told
        total = total + sum(weights[name] * value for name, value in truth.items())
        values = {"velocity": error, "attributes": told, **truth}
        if sound is not None:
            total, values["sound"] = total + sound, sound
        return total, {name: value.detach() for name, value in values.items()}

    def _errors(
        self, batch: Batch, context: Tensor, sprite_weight: float = 0.0
    ) -> tuple[Tensor, Tensor | None]:
        """Of the picture's velocity, and of the sound's where there is sound."""
        state, clean, heard = batch.state, batch.state.clean, batch.state.sound
        noisy, sound_error = add_noise(clean, batch.noise, batch.sigma), None
        if heard is not None and batch.sound_noise is not None:
            noisy = state.together(noisy, add_noise(heard.clean, batch.sound_noise, batch.sigma))
        made, sound = state.apart(velocity(
            self.dit, state, noisy, batch.sigma, (context, batch.mask.sum(1)),
            patch=self.dit.config.patch_size, frames_per_s=self.frames_per_s,
        ))
        if heard is not None and batch.sound_noise is not None and sound is not None:
            sound_error = velocity_loss(
                sound, heard.clean, batch.sound_noise, heard.denoise_mask
            ).mean()
        clear = (1 - batch.sigma).view(-1, 1, 1, 1, 1)
        weight = state.denoise_mask * (1 + sprite_weight * clear * batch.cover)
        weight = weight if self.channels is None else weight * self.channels
        return velocity_loss(made, clean, batch.noise, weight).mean(), sound_error

    def validate(self, step: int, folder: Path) -> dict[str, float]:
        """Velocity error on clips kept aside, text alone, at fixed noise levels and noise.

        That of sound is for the clips' own pictures.
        """
        del folder
        index, phase = self.config.run.phase_at(step - 1)
        scores = self._velocity_errors(phase.num_frames)
        if self.config.image_shares and self.config.image_shares[index] > 0:
            scores["image_mean"] = self._velocity_errors(1)["velocity_mean"]
        if self.config.sound is not None and phase.num_frames > 1:
            scores["sound_mean"] = self._velocity_errors(phase.num_frames, sound=True)["sound_mean"]
        return scores

    def _velocity_errors(self, num_frames: int, *, sound: bool = False) -> dict[str, float]:
        scores, heard = {}, []
        for level in VALIDATION_SIGMAS:
            batch = self.draws.held_aside(num_frames, level, sound=sound)
            bf16 = self.config.run.dtype == "bf16"
            with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
                context = encode_tokens(self.text, batch.ids, batch.mask)
                error, sound_error = self._errors(batch, context)
            scores[f"velocity_{level}"] = float(error)
            heard += [] if sound_error is None else [float(sound_error)]
        scores["velocity_mean"] = sum(scores.values()) / len(scores)
        return scores | ({"sound_mean": sum(heard) / len(heard)} if heard else {})


def _check_sound(mine: AudioConfig | None, made: AudioVAEConfig) -> None:
    """Refuse a sound VAE whose latents the transformer can't read."""
    wanted = None if mine is None else (mine.channels, mine.tokens_per_s)
    given = (made.latent_channels, made.tokens_per_s)
    if wanted != given:
        raise InputError(
            f"the sound VAE makes {given[1]:g} latents of {given[0]} channels a second; the "
            + ("transformer has no parts for sound" if wanted is None else
               f"transformer takes {wanted[1]:g} of {wanted[0]}")
            + "; give a preset and a sound VAE that go together"
        )


if __name__ == "__main__":
    raise SystemExit(run_program(__doc__, DiTRun, DiTTask))
