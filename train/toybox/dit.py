"""Train the embedded model's transformer and text encoder, jointly, on cached latents.

    python -m train.toybox.cache -c train/toybox/configs/dit.yaml
        first: render and encode clips
    python -m train.toybox.dit   -c train/toybox/configs/dit.yaml [--set run.seed=1]... [--resume]

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
from torch import Tensor, nn

from train.toybox.initial import init_dit
from train.toybox.muon import Muon
from train.toybox.phases import Phase
from train.toybox.program import run_program
from train.toybox.tasks.channel_weights import channel_weights
from train.toybox.tasks.dit_config import DiTData
from train.toybox.tasks.dit_data import Batch, ClipDraws
from train.toybox.tasks.dit_draws import Drawn
from train.toybox.tasks.toybox_data import load_vae
from train.toybox.tasks.truth_heads import AttributeHeads, TruthHeads
from vidgen.core.errors import InputError
from vidgen.core.runtime import choose_device
from vidgen.diffusion.flow import add_noise, squared_error, velocity_of
from vidgen.diffusion.state import moved
from vidgen.models.audio_spectra import AudioVAEConfig
from vidgen.models.dit import SpacetimeDiT
from vidgen.models.dit_types import AudioConfig
from vidgen.models.presets import DIT_PRESETS, TEXT_PRESETS
from vidgen.models.text import UMT5Encoder, encode_tokens
from vidgen.pipeline.denoise import velocity
from vidgen.training.optim import build_optimizers, named_parameters
from vidgen.weights.component import Role
from vidgen.weights.load import load_module
from vidgen.weights.store import find_files, open_tensors
from vidgen.weights.tensors import Tensors

Module = TypeVar("Module", bound=nn.Module)

VALIDATION_SIGMAS = (0.2, 0.4, 0.6, 0.8, 0.95)
WEIGHED = 8  # clips on which the channels are weighed


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
        cue_weight: of the loss that has tokens of sound say whether a sound begins there: what the
            picture settles, but few tokens of a clip's velocity; likewise.
        mark_weight: of the loss that has tokens that are half sprite or more say when within their
            latent frame it comes to a mark, such as the floor: what tokens of sound can then be
            told; likewise.
        pixel_weights: whether errors in the latents' channels count by what the VAE makes of them
            in pixels (`channel_weights`) instead of all alike; in the validation's figures, too.
        part: "sound" trains the transformer's own parts for sound alone, first of all;
            "transformer" leaves the text encoder as it is.
        init: folder of a released model whose transformer and text encoder to start from.
        keep: folder of a released model, what of which the run isn't to forget: above the noise
            level `keep_above`, and of sound at all levels, it learns what that one's transformer
            says instead of the clips' velocity (Li & Hoiem 2016, sec. 3). Both read one text, so
            `part` is "transformer".
        keep_above: see `keep`.
    """

    preset: str = "toybox"
    text_preset: str = "toybox"
    attribute_weight: float = 0.1
    text_warmup: int = 0
    sprite_weight: float = 0.0
    cover_weight: float = 0.0
    name_weight: float = 0.0
    cue_weight: float = 0.0
    mark_weight: float = 0.0
    pixel_weights: bool = False
    part: Literal["all", "sound", "transformer"] = "all"
    init: str | None = None
    keep: str | None = None
    keep_above: float = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.validation_sigmas:
            raise InputError(f"levels are {list(self.levels)}, between which no clip is validated; "
                             f"take in one of {', '.join(map(str, VALIDATION_SIGMAS))}")
        if not 0 <= self.keep_above <= 1:
            raise InputError(f"keep_above is {self.keep_above}; a noise level lies in 0..1")
        if self.keep and self.part != "transformer":
            raise InputError(f"part is {self.part!r}; keep needs part: transformer, since both "
                             "networks read one text")

    @property
    def truth_weights(self) -> dict[str, float]:
        """Of what `TruthHeads` asks."""
        return {"cover": self.cover_weight, "names": self.name_weight, "marks": self.mark_weight,
                "cues": self.cue_weight, "voices": self.name_weight}

    @property
    def validation_sigmas(self) -> list[float]:
        """Noise levels of the validation, those that are learned."""
        low, high = self.levels
        return [level for level in VALIDATION_SIGMAS if low <= level <= high]


class DiTTask:
    """Velocity prediction on cached latents."""

    alternates = True  # what makes sound rests in steps without it
    makes_on_cpu = True

    def __init__(self, config: DiTRun) -> None:
        self.config = config
        self.device = choose_device(config.run.device)
        torch.manual_seed(config.run.seed)
        self.dit = self._network(config.role, SpacetimeDiT, DIT_PRESETS[config.preset])
        self.text = self._network("text_encoder", UMT5Encoder, TEXT_PRESETS[config.text_preset])
        if not config.init:
            init_dit(self.dit)
        self.former = None
        if config.keep:
            preset = DIT_PRESETS[config.preset]
            self.former = self._released(config.keep, "transformer", SpacetimeDiT, preset)
        self.heads = AttributeHeads(self.text.config.hidden_dim).to(self.device)
        self.modules: dict[str, nn.Module] = {
            "transformer": self.dit, "text_encoder": self.text, "attributes": self.heads,
        }
        self.truth = None
        if any(config.truth_weights.values()):
            self.truth = self.modules["truth"] = TruthHeads(self.dit).to(self.device)
        if config.part == "sound":
            for name, parameter in named_parameters(self.modules).items():
                parameter.requires_grad_("audio" in name or name.startswith("truth."))
        if config.part == "transformer":
            self.text.requires_grad_(requires_grad=False)
        self.clips = ClipDraws(config, self.device, self.dit.config.patch_size,
                               marks=config.mark_weight > 0)
        self.frames_per_s = config.fps / self.clips.strides.t
        self.channels = self._channels() if config.pixel_weights else None
        for cache in self.clips.draws.sounds.values():
            _check_sound(self.dit.config.audio, cache.config)

    def _network(self, part: Role, kind: type[Module], architecture: Any) -> Module:
        """Fresh, or with the weights of the released model to start from.

        An expert at low noise begins as the other one, where the model has none yet.
        """
        if not self.config.init:
            return kind(architecture).to(self.device)
        begun = part if (Path(self.config.init) / part).is_dir() else "transformer"
        module = self._released(self.config.init, begun, kind, architecture)
        return module.requires_grad_(requires_grad=True)

    def _released(self, model: str, part: str, kind: type[Module], architecture: Any) -> Module:
        """A part of a model's folder, frozen; parts for sound are left there by a deaf network."""
        stored = open_tensors(find_files(Path(model) / part))
        deaf = kind is SpacetimeDiT and architecture.audio is None
        taken = Tensors({name: lazy for name, lazy in stored.items()
                         if not (deaf and "audio" in name)})
        return load_module(lambda: kind(architecture), taken, torch.float32, self.device)

    def _channels(self) -> Tensor:
        """What each channel counts, [C, 1, 1, 1], measured on some clips kept aside."""
        vae = load_vae(self.clips.caches[0].config.vae, self.device)
        some = self.clips.data[0].clips[-WEIGHED:, :, :3].float().to(self.device)
        return channel_weights(vae, some).to(self.device).view(-1, 1, 1, 1)

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Muon for the blocks' matrices, AdamW for all else."""
        return build_optimizers(
            self.modules,
            self.config.run.optim,
            use_muon=lambda name, _: name.startswith("transformer.blocks."),
            make_muon=Muon,
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
            told = self.clips.draws.captions(step * batch_size, batch_size)
            ids, mask, labels = moved(told, self.device)
            bf16 = self.config.run.dtype == "bf16"
            with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
                loss = self.heads.loss(encode_tokens(self.text, ids, mask), mask, labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step % 100 == 99:
                print(f"words {step + 1}/{steps} loss {loss.item():.4f}", file=sys.stderr)

    def batch(self, phase: Phase, step: int, micro: int) -> Drawn:
        """What is drawn of clips of one geometry, each with a caption and a condition of its own.

        Latents and noise are put in where they lie, within the step.
        """
        return self.clips.draws.draw(phase, step, micro)

    def loss(self, batch: Drawn, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared error of the velocity where it is to be generated, and what else is weighed."""
        del step
        config = self.config
        with torch.autocast(self.device.type, enabled=False):
            made = self.clips.made(batch)
        context = encode_tokens(self.text, made.ids, made.mask)
        error, sound = self._errors(made, context, config.sprite_weight, self.former)
        total, values = error, {"velocity": error}
        if config.attribute_weight:
            values["attributes"] = self.heads.loss(context, made.mask, made.labels)
            total = total + config.attribute_weight * values["attributes"]
        if self.truth is not None:
            truth = self.truth.losses(made)
            weights = config.truth_weights
            total = total + sum(weights[name] * value for name, value in truth.items())
            values |= truth
        if sound is not None:
            total, values["sound"] = total + sound, sound
        return total, {name: value.detach() for name, value in values.items()}

    def _errors(
        self, batch: Batch, context: Tensor, sprite_weight: float = 0.0,
        former: SpacetimeDiT | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Of the picture's velocity, and of the sound's where there is sound.

        What `former` says is the truth above `keep_above`, and of sound.
        """
        state, clean, heard = batch.state, batch.state.clean, batch.state.sound
        begun = clean if batch.begun is None else batch.begun
        noisy, sound_error = add_noise(begun, batch.noise, batch.sigma), None
        wanted = (velocity_of(clean, batch.noise) if batch.begun is None
                  else (noisy - clean) / batch.sigma.float().view(-1, 1, 1, 1, 1))
        wanted_sound = None
        if heard is not None and batch.sound_noise is not None:
            noisy = state.pack(noisy, add_noise(heard.clean, batch.sound_noise, batch.sigma))
            wanted_sound = velocity_of(heard.clean, batch.sound_noise)
        says = partial(
            velocity, state=state, latents=noisy, sigma=batch.sigma,
            context=(context, batch.mask.sum(1)), patch=self.dit.config.patch_size,
            frames_per_s=self.frames_per_s,
        )
        made, sound = state.unpack(says(self.dit))
        if former is not None:
            keeps = (batch.sigma >= self.config.keep_above).view(-1, 1, 1, 1, 1)
            if bool(keeps.any()) or wanted_sound is not None:
                with torch.no_grad():
                    said, wanted_sound = state.unpack(says(former))
                wanted = torch.where(keeps, said.float(), wanted)
        if heard is not None and wanted_sound is not None and sound is not None:
            sound_error = squared_error(sound, wanted_sound, heard.denoise_mask).mean()
        clear = (1 - batch.sigma).view(-1, 1, 1, 1, 1)
        weight = state.denoise_mask * (1 + sprite_weight * clear * batch.cover)
        weight = weight if self.channels is None else weight * self.channels
        return squared_error(made, wanted, weight).mean(), sound_error

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
        for level in self.config.validation_sigmas:
            batch = self.clips.held_aside(num_frames, level, sound=sound)
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
