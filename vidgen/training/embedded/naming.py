"""What a transformer says of a clip, looked at by a network that knows sprites.

The velocity's squared error says little of what makes a sprite itself: few latents, and of these
the fine ones. So the clip that a velocity points to is shown to a frozen namer, which is to see in
it what it sees in the truth: the same names, by the same features (perceptual losses of diffusion
models: Berrada et al. 2025, "Boosting latent diffusion with perceptual objectives").

Axes: B clips, C latent channels, F latent frames, N some of all their frames, h w latent rows and
columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as nnf
from torch import Tensor

from vidgen.core.errors import InputError
from vidgen.diffusion.flow import add_noise
from vidgen.training.embedded.dit_data import Batch
from vidgen.training.embedded.namer import COVERED, NONE, load_namer


@dataclass(frozen=True)
class NamingConfig:
    """How much a namer's answers count.

    Args:
        namer: its folder, written by `train/namer.py`.
        weight: of them all, beside the velocity's error.
        likeness: how much features count beside names.
        noise: the highest level of noise that is added before the namer looks, evenly drawn, so
            that it isn't pleased by a pattern that nobody sees.
        frames: how many latent frames of a batch it looks at.
    """

    namer: str
    weight: float = 0.2
    likeness: float = 2.0
    noise: float = 0.1
    frames: int = 64

    def __post_init__(self) -> None:
        if not 0 <= self.noise < 1:
            raise InputError(f"noise is {self.noise}; a noise level lies in 0..1, below 1")
        if self.frames < 1:
            raise InputError(f"frames is {self.frames}; give 1 or more")


class Naming:
    """The loss of a namer's answers.

    Args:
        config: what counts how much.
        device: where it looks.

    Raises:
        InputError: no namer there.
        ModelError: a damaged one, or one of another world.
    """

    def __init__(self, config: NamingConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.namer = load_namer(Path(config.namer), device)

    def losses(self, batch: Batch, clean: Tensor, draw: torch.Generator) -> dict[str, Tensor]:
        """What the namer sees otherwise than in the truth, where sprites are to be drawn.

        Less the noisier the batch was, where even the best guess is a blur.

        Args:
            batch: with the truth.
            clean: what the transformer takes its clips for, [B, C, F, h, w], float32.
            draw: which frames are looked at, and through what noise; of the CPU.

        Returns:
            `named`, the cross-entropy of names under those that the truth is given, and `unlike`,
            one less the cosine between features; nothing of latents that show no sprite or are
            given.
        """
        weight = ((batch.cover >= COVERED) & batch.state.denoise_mask) * (
            1 - batch.sigma.view(-1, 1, 1, 1, 1)
        )
        truth, said, weight = (_frames(part) for part in (batch.state.clean, clean, weight))
        some = weight.flatten(1).any(1).nonzero()[:, 0]
        some = some[torch.randperm(len(some), generator=draw)[: self.config.frames].to(some.device)]
        levels = self.config.noise * torch.rand(len(some), generator=draw)
        noise = torch.randn(said[some].shape, generator=draw)
        levels, noise = levels.to(self.device), noise.to(self.device)
        if not len(some):
            nothing = 0 * clean.sum()  # which all the same has a gradient, as on other ranks
            return {"named": nothing, "unlike": nothing}
        with torch.no_grad():
            wanted = self.namer(truth[some], torch.zeros_like(levels))
        found = self.namer(add_noise(said[some], noise, levels), levels)
        share = weight[some, 0] / weight[some].sum()
        names = wanted.names[:, :NONE].softmax(1) * found.names[:, :NONE].log_softmax(1)
        alike = nnf.cosine_similarity(wanted.features.float(), found.features.float(), dim=1)
        return {"named": -(names.sum(1) * share).sum(), "unlike": ((1 - alike) * share).sum()}

    def weighed(self, losses: dict[str, Tensor]) -> Tensor:
        """Their share of what is learned from."""
        config = self.config
        return config.weight * (losses["named"] + config.likeness * losses["unlike"])


def _frames(video: Tensor) -> Tensor:
    """[B, C, F, h, w] as [B * F, C, h, w]."""
    return video.transpose(1, 2).flatten(0, 1)
