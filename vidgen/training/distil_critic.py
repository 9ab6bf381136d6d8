"""Who tells a student's clips from true ones, and draws them there.

Distribution matching takes a student as far as its teacher and no farther: what the teacher blurs
stays blurred. So its follower has a critic, which sees what it sees of clips through noise, the
student's own and true ones under the same captions and conditions (Yin et al. 2024, "Improved
distribution matching distillation", sec. 4.3). It is asked which of two is the true one, since
captions and noise alone say much of how clips look (Jolicoeur-Martineau 2019, the relativistic
loss).

Axes: B clips, C latent channels, F latent frames, h w latent rows and columns, L tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidgen.core.errors import InputError
from vidgen.models.dit import SpacetimeDiT
from vidgen.models.dit_inputs import Stream
from vidgen.ops.patchify import patchify_latents


@dataclass(frozen=True)
class CriticConfig:
    """A critic, and how much a student listens to it.

    Args:
        share: how far it moves a clip, as a share of how far the teacher does.
        block: of the follower, from 0, behind which it reads.
        lr: its peak rate.
        weight: of its loss in what the follower learns.
        warmup_steps: in which a student comes to listen to it, evenly more.
    """

    share: float
    block: int
    lr: float = 1e-3
    weight: float = 0.03
    warmup_steps: int = 50

    def __post_init__(self) -> None:
        for name in ("share", "block", "lr", "weight", "warmup_steps"):
            if not getattr(self, name) >= 0:
                raise InputError(f"match.critic.{name} is {getattr(self, name)}; give 0 or more")

    def share_at(self, step: int) -> float:
        """`share`, as it has come to be at a step."""
        return self.share * min(1.0, step / max(1, self.warmup_steps))


class Critic(nn.Module):
    """How true each token of a network looks behind one of its blocks; undecided at first.

    Args:
        dit: the network.
        block: its number, from 0.

    Raises:
        InputError: no such block.
    """

    def __init__(self, dit: SpacetimeDiT, block: int) -> None:
        super().__init__()
        if block >= len(dit.blocks):
            raise InputError(f"match.critic.block is {block}; the last one is "
                             f"{len(dit.blocks) - 1}")
        width = dit.config.hidden_dim
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, width)
        self.down = nn.Linear(width, 1, bias=False)  # two scores are compared
        nn.init.zeros_(self.down.weight)
        self.patch = dit.config.patch_size
        self.tokens: Tensor | None = None
        dit.blocks[block].register_forward_hook(self._keep)

    def _keep(self, _block: nn.Module, _inputs: Any, streams: list[Stream]) -> None:
        self.tokens = streams[0].tokens

    def score(self, mask: Tensor) -> Tensor:
        """How true the clips look that the network has just seen, [B], the mean over their tokens.

        Args:
            mask: [B, 1, F, h, w], True where latents are of the clip and weren't given.
        """
        assert self.tokens is not None
        weight = patchify_latents(mask.float(), self.patch).mean(2)
        tokens, self.tokens = self.tokens[:, : weight.shape[1]], None
        with torch.autocast(tokens.device.type, enabled=False):
            logits = self.down(F.silu(self.up(self.norm(tokens.float())))).squeeze(2)
        return (logits * weight).sum(1) / weight.sum(1).clamp(min=1e-6)

    def way_to_truth(self, clips: Tensor, mask: Tensor) -> Tensor:
        """Where the clips would have to go to look true, [B, C, F, h, w].

        Root mean square 1 where they were made, over all of them: farthest go those at which it can
        tell most, so hardly those that it sees through much noise.

        Args:
            clips: what the network has just seen, through noise; it leads there by autograd.
            mask: as in `score`.
        """
        [uphill] = torch.autograd.grad(self.score(mask).sum(), clips)
        return uphill / rms(uphill, mask).clamp(min=1e-12)


def surprise(made: Tensor, true: Tensor) -> Tensor:
    """That of two clips each, scored [B], the second one is the true one; ln 2 by guessing."""
    return F.softplus(made - true).mean()


def rms(change: Tensor, mask: Tensor) -> Tensor:
    """Root mean square of [B, C, F, h, w] where `mask` [B, 1, F, h, w] is True; a scalar."""
    return change[mask.expand_as(change)].square().mean().sqrt()
