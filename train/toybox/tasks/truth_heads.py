"""What the transformer's training asks beside the velocity: linear heads, dropped on export.

The world knows what a caption says and what each token shows: what others have such tokens learn
from another network's features (Yu et al. 2024, "Representation alignment for generation").

Axes: B clips, S text tokens, L picture tokens, K sound tokens, D width.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.toybox.tasks.dit_data import Batch
from train.toybox.tasks.toybox_data import MARK_BINS
from train.toybox.world.captions import CLASSES
from vidgen.models.dit import SpacetimeDiT
from vidgen.models.dit_types import Stream
from vidgen.ops.latents import patchify_latents

SHOWN = 0.5  # share of a token's cover from which it is to name its sprite


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
    told of a mark only once the picture's tokens know of it. All runs of a seed draw the same ones,
    in this order, and released weights have learned with these very heads: a new one comes last.
    """

    def __init__(self, dit: SpacetimeDiT) -> None:
        super().__init__()
        width, sprites = dit.config.hidden_dim, len(CLASSES["sprite"])
        self.cover = nn.Linear(width, dit.config.patch_size**2)
        self.names = nn.Linear(width, sprites)
        self.marks = nn.Linear(width, MARK_BINS)
        self.cues = nn.Linear(width, 1)
        self.voices = nn.Linear(width, sprites)
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

        `cover` says how much of a token is sprite; where half of it or more is, `names` which, and
        `marks` when it comes to one. Of sound `cues` says whether one begins there, `voices` whose
        it is.
        """
        target = patchify_latents(batch.cover, self.patch)
        tokens = self.tokens["half"][0][:, : target.shape[1]]
        is_sprite = target.mean(2) >= SHOWN
        found = {
            "cover": _binary(self.cover(tokens), target.clamp(0, 1)),
            "names": _naming(self.names, tokens, batch.shown, is_sprite),
        }
        if batch.marks is not None:
            wanted = batch.marks.repeat_interleave(is_sprite.shape[1] // batch.marks.shape[1], 1)
            told = _binary(self.marks(tokens), wanted, reduction="none").mean(2)
            found["marks"] = (told * is_sprite).sum() / is_sprite.sum().clamp(min=1)
        if batch.cues is not None:
            anywhere = torch.ones_like(batch.cues, dtype=torch.bool)
            found["cues"] = _binary(self.cues(self.tokens["last"][1])[..., 0], batch.cues)
            found["voices"] = _naming(
                self.voices, self.tokens["half"][1], batch.shown, anywhere
            )
        return found


def _binary(logits: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    return F.binary_cross_entropy_with_logits(logits.float(), target, reduction=reduction)


def _naming(head: nn.Linear, tokens: Tensor, names: Tensor, there: Tensor) -> Tensor:
    """Cross-entropy of tokens [B, L, D] where they are there [B, L], of names [B], -1 for none."""
    there = there & (names >= 0)[:, None]
    wanted = names[:, None].expand_as(there)[there]
    wrong = F.cross_entropy(head(tokens[there]).float(), wanted, reduction="sum")
    return wrong / max(1, len(wanted))
