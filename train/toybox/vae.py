"""Train the embedded model's video VAE on clips of the Toybox world, rendered as it goes.

    python -m train.toybox.vae -c train/toybox/configs/vae.yaml
        [--set run.optim.lr=2e-4]... [--resume]

Single frames first: the frames of a clip resemble each other, so a still teaches several times
more a second, and the temporal taps are free. Then clips, with temporal weights inflated so that
the clip phase starts from "every frame repeats its neighbour" instead of from noise.
With `oversampling` latent frames lie closer in time than they do alone, too: where a transformer
draws them so, and where a clip is given at the rate that it is shown at.
`part: decoder` freezes the encoder, so that cached latents stay true while pictures get better;
`part: encoder` freezes the decoder, and with it what latents mean: a transformer that was taught on
the old encoder's still serves.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.toybox.muon import Muon
from train.toybox.phases import Phase, PhasedRun
from train.toybox.program import run_program
from train.toybox.tasks.toybox_data import cut_around, fresh_seed, load_vae
from train.toybox.tasks.wider import with_wider_encoder
from train.toybox.world.render import render
from train.toybox.world.scenes import SEED_RANGES, SceneMix, sample_scenes
from vidgen.core.errors import InputError
from vidgen.core.runtime import choose_device
from vidgen.media.grid import contact_sheet
from vidgen.models.presets import VAE_PRESETS
from vidgen.models.vae import CausalVAE
from vidgen.models.vae_blocks import Downsample, Upsample
from vidgen.ops.conv import CausalConv3d
from vidgen.training.optim import build_optimizers


@dataclass(frozen=True)
class VAELoss:
    """Weights of the reconstruction losses; pixels in [-1, 1].

    Args:
        mask: extra weight of pixels on a sprite, which are few and matter most.
        kl: a quarter of the latent channels are lost to it, at 1e-3 as at 1e-4.
        keep: squared distance, in deviations, from the latents of the encoder that `part: encoder`
            began with: channels that the decoder ignores would drift from what a transformer knows.
        equivariance: scale-equivariance (Skorokhodov et al. 2025, eq. 4): latents pooled by 2
            must decode to the clip pooled by 2; drawn on a share of the steps.
    """

    l1: float = 1.0
    mse: float = 2.0
    gradient: float = 1.0
    kl: float = 1e-4
    keep: float = 0.0
    mask: float = 2.0
    equivariance: float = 0.25
    equivariance_share: float = 0.25


@dataclass(frozen=True)
class VAERun:
    """The whole YAML file.

    Args:
        part: "decoder" keeps the encoder, and with it every cached latent, as it is; "encoder"
            keeps the decoder, and with it what every latent shows.
        clip_frames: lengths of the clips, in turns, that windows of a phase's frames are cut from;
            a motion spans its clip, so shorter clips move faster.
        oversampling: latent frames for each one that four clips in five have: two given as they are
            shown, and two rendered at so much higher a frame rate, as a transformer draws them, and
            shown at the other.
        crop: side in pixels of squares around sprites that two in three of the clip steps show, as
            many as make the frames' area: what moves is a small part of a frame, and most of its
            error.
        mix: how often scenes are rich; tinted sprites are the hardest.
        validation_clips: renders to validate on.
        init: component folder of a released VAE to start from, and to take the config of.
        encoder_dim: width of the encoder, a multiple of the released one's, which it begins as;
            None: as wide.

    Raises:
        InputError: a crop that the VAE or the frame can't have, no clip to validate on, or nothing
            released to go on from.
    """

    run: PhasedRun
    preset: str = "toybox"
    part: Literal["all", "decoder", "encoder"] = "all"
    clip_frames: tuple[int, ...] = (33, 33, 33, 17)
    oversampling: int = 1
    crop: int | None = None
    height: int = 128
    width: int = 128
    loss: VAELoss = VAELoss()
    mix: SceneMix = field(default_factory=SceneMix)
    validation_clips: int = 16
    init: str | None = None
    encoder_dim: int | None = None

    def __post_init__(self) -> None:
        side, limit = VAE_PRESETS[self.preset].strides.hw, min(self.height, self.width)
        needs = {f"part: {self.part}": self.part != "all", "loss.keep": self.loss.keep,
                 "encoder_dim": self.encoder_dim}
        what = next((name for name, needed in needs.items() if needed), None)
        if what and not self.init:
            raise InputError(f"{what} needs init: the folder of the released VAE")
        if self.crop is not None and (self.crop % side or not 0 < self.crop <= limit):
            raise InputError(f"crop is {self.crop}; give a multiple of {side} up to {limit}, or "
                             "none")
        VAE_PRESETS[self.preset].steady_stages(self.oversampling)
        if self.validation_clips < 1:
            raise InputError(f"validation_clips is {self.validation_clips}; give 1 or more")


FPS = 12.0
TURNS = ("given", "drawn", "given", "drawn", "as it is")
"""How clips are encoded under `oversampling`, step by step; of no common measure with four."""


@torch.no_grad()
def inflate(vae: CausalVAE) -> None:
    """Make weights trained on single frames ready for clips.

    For one frame only the last temporal taps work, so all others are still random; left alone they
    would wreck a trained picture. Zeroing them makes every frame pass as if alone. Upsampling
    starts as repetition, so a latent frame decodes to a still clip right away, and downsampling as
    the mean of the two frames it merges, which starts 0.9 dB above keeping the later one (inflation
    as in Carreira & Zisserman 2017, with the image at the causal end).
    """
    for module in vae.modules():
        if isinstance(module, CausalConv3d):
            module.weight[:, :, :-1] = 0
        elif isinstance(module, Downsample | Upsample) and module.time_conv is not None:
            for parameter in module.time_conv.parameters():
                nn.init.zeros_(parameter)
            weight, same = module.time_conv.weight, torch.eye(module.time_conv.in_channels)
            if isinstance(module, Downsample):
                weight[:, :, 1:, 0, 0] = 0.5 * same[..., None]
            else:
                weight[:, :, -1, 0, 0] = same.repeat(2, 1)


class VAETask:
    """Reconstruction of rendered clips."""

    def __init__(self, config: VAERun) -> None:
        self.config = config
        self.device = choose_device(config.run.device)
        torch.manual_seed(config.run.seed)
        if config.init:
            self.vae = load_vae(config.init, self.device)
            if config.encoder_dim:
                self.vae = with_wider_encoder(self.vae, config.encoder_dim)
            self.vae.requires_grad_(requires_grad=True)
        else:
            self.vae = CausalVAE(VAE_PRESETS[config.preset]).to(self.device)
        if config.part != "all":
            frozen = self.vae.encoder if config.part == "decoder" else self.vae.decoder
            frozen.requires_grad_(requires_grad=False)
        self.before = None
        if config.loss.keep and config.init:
            self.before = load_vae(config.init, self.device)
        self.modules: dict[str, nn.Module] = {"vae": self.vae}

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """AdamW, or Muon for the convolutions between the first and the last."""
        return build_optimizers(
            self.modules, self.config.run.optim,
            use_muon=lambda name, _: "conv_in" not in name and "conv_out" not in name,
            make_muon=Muon,
        )

    def start_phase(self, index: int, phase: Phase) -> bool:
        """Inflate temporal weights that only ever saw single frames; a released VAE's saw clips."""
        previous = self.config.run.phases[index - 1].num_frames if index else phase.num_frames
        if previous == 1 and phase.num_frames > 1 and not self.config.init:
            inflate(self.vae)
            return True
        return False

    def batch(self, phase: Phase, step: int, micro: int) -> dict[str, Tensor]:
        """Windows of rendered clips; a quarter of the clip steps still show single frames."""
        count, num_frames, crop = phase.batch_size, phase.num_frames, None
        base = fresh_seed(self.config.run.seed, step, micro)
        if num_frames > 1 and step % 4 == 3:
            count, num_frames = count * num_frames // 3, 1
        elif num_frames > 1 and step % 4 != 0 and self.config.crop:
            crop = self.config.crop
            count = count * self.config.height * self.config.width // crop**2
        scenes = sample_scenes(base, count, self.config.mix, split="any")
        turn = self.config.clip_frames[step // 4 % len(self.config.clip_frames)]
        length = max(turn, num_frames)
        draw = torch.Generator().manual_seed(base)
        starts = torch.randint(length - num_frames + 1, (count, 1), generator=draw)
        finer, _ = self._rates(step)
        window = starts * finer + torch.arange(1 + (num_frames - 1) * finer)
        shown = render(
            scenes, num_frames=1 + (length - 1) * finer, frames=window.tolist(), fps=FPS * finer,
            height=self.config.height, width=self.config.width, device=self.device,
        )
        video, mask = shown.video, shown.masks.amax(1, keepdim=True)
        if crop:
            video, mask = cut_around(video, mask, crop)
        return {"video": video, "mask": mask}

    def _rates(self, step: int) -> tuple[int, int]:
        """Frames that are rendered for each one that is shown, and the VAE's oversampling."""
        if self.config.oversampling == 1 or TURNS[step % len(TURNS)] == "as it is":
            return 1, 1
        drawn = TURNS[step % len(TURNS)] == "drawn"
        return self.config.oversampling if drawn else 1, self.config.oversampling

    def loss(
        self, batch: dict[str, Tensor], step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """L1, squared and gradient errors, KL, and scale equivariance on some steps."""
        weights, video = self.config.loss, batch["video"]
        video = video.contiguous(memory_format=torch.channels_last_3d)
        finer, oversampling = self._rates(step)
        given = oversampling // finer
        shown, mask = video[:, :, ::finer], batch["mask"][:, :, ::finer]
        mean, logvar = self.vae.at_rate(given).encode_moments(video)
        mean, logvar = mean.float(), logvar.float().clamp(-20, 10)
        latents = mean + torch.randn_like(mean) * (0.5 * logvar).exp()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        shown_by = self.vae.at_rate(oversampling)
        decoded = shown_by.decode_raw(latents).float()
        total, error = self._distance(decoded, shown, mask)
        if step % max(1, round(1 / max(weights.equivariance_share, 1e-6))) == 0:
            small = F.avg_pool3d(latents, (1, 2, 2))
            target, inside = (F.avg_pool3d(each, (1, 2, 2)) for each in (shown, mask))
            pooled, _ = self._distance(shown_by.decode_raw(small).float(), target, inside)
            total = total + weights.equivariance * pooled
        total = total + weights.kl * kl
        if self.before is not None:
            with torch.no_grad():
                before = self.before.at_rate(given).encode(video).float()
            drift = self.vae.normalize(mean) - before
            total = total + weights.keep * drift.square().mean()
        psnr = -10 * (error.detach().square().mean() / 4).log10()
        return total, {"kl": kl.detach(), "psnr": psnr}

    def _distance(
        self, decoded: Tensor, video: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        weights, error = self.config.loss, decoded - video
        emphasis = 1 + weights.mask * mask
        emphasis = emphasis / emphasis.mean()
        total = weights.l1 * (emphasis * error.abs()).mean()
        total = total + weights.mse * (emphasis * error.square()).mean()
        slopes = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        return total + weights.gradient * slopes, error

    def validate(self, step: int, folder: Path) -> dict[str, float]:
        """PSNR in dB on held-out renders: clips and stills, whole frames and inside the sprite."""
        count = self.config.validation_clips
        scenes = sample_scenes(SEED_RANGES["dev"][0], count, split="any")
        size = {"height": self.config.height, "width": self.config.width}
        scores: dict[str, float] = {}
        shown = render(scenes, num_frames=33, frames=range(8, 25), device=self.device, **size)
        video, mask = shown.video, shown.masks.amax(1, keepdim=True)
        shows = {"still": (video[:, :, 8:9], mask[:, :, 8:9], 1)}
        if self.config.run.phase_at(step - 1)[1].num_frames > 1:
            shows["clip"] = video, mask, 1
            if self.config.oversampling > 1:
                shows["finer_clip"] = video, mask, self.config.oversampling
        for name, (video, mask, oversampling) in shows.items():
            decoded = self._reconstruct(video, oversampling)
            error = (decoded - video).square() / 4
            inside = (error * mask).sum() / (3 * mask.sum())
            scores[f"{name}_psnr"] = float(-10 * error.mean((1, 2, 3, 4)).log10().mean())
            scores[f"{name}_mask_psnr"] = float(-10 * inside.log10())
        rows = torch.cat([video[:8, :, -1], decoded[:8, :, -1]])
        pixels = ((rows + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        contact_sheet(list(pixels), folder / f"sheet-{step:07d}.png", columns=8)
        return scores

    def _reconstruct(self, video: Tensor, oversampling: int) -> Tensor:
        parts = []
        bf16, vae = self.config.run.dtype == "bf16", self.vae.at_rate(oversampling)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            for clip in video.split(8):
                mean, _ = vae.encode_moments(clip)
                parts.append(vae.decode_raw(mean))
        return torch.cat(parts).float().clamp(-1, 1)


if __name__ == "__main__":
    raise SystemExit(run_program(__doc__, VAERun, VAETask))
