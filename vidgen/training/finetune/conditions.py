"""Conditions of each sample in fine-tuning: latents of known frames as inputs of the model.

A condition is drawn for each sample: text alone, first frame, first and last frame, a beginning to
extend; `ModelFolder.conditioning` says in which form it enters the transformer.

Axes: B batch, C latent channels, F latent frames, K stills, h w latent rows and columns, T H W
frames, pixel rows and columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vidgen.core.errors import InputError, nearest
from vidgen.core.shapes import Strides
from vidgen.diffusion import condition
from vidgen.diffusion.condition_mix import KINDS, draw_conditions, with_given
from vidgen.diffusion.state import LatentState, new_state
from vidgen.weights.folder import ModelFolder

_DEFAULTS = {"text": 0.6, "first": 0.2, "last": 0.05, "both": 0.05, "frames": 0.05, "prefix": 0.1}
_TASK = {
    "first": "image", "last": "last-image", "both": "last-image", "frames": "frames",
    "prefix": "extend", "mask": "mask",
}
_IN_CHANNELS, _IN_CONTROL = ("first", "both"), ("text", "first", "both")


def possible_conditions(folder: ModelFolder) -> tuple[str, ...]:
    """Return the names of the conditions that a model can be trained with."""
    if folder.conditioning == "none":
        return ("text",)
    if folder.conditioning == "control":
        return _IN_CONTROL
    if folder.conditioning == "channels":
        if folder.components["transformer"].config.image_positions is not None:
            return ("both",)  # it learned positions of two pictures
        return _IN_CHANNELS if "last-image" in folder.tasks else _IN_CHANNELS[:1]
    return ("text", *(kind for kind, task in _TASK.items() if task in folder.tasks))


def settle_conditions(weights: Mapping[str, float] | None, folder: ModelFolder) -> dict[str, float]:
    """Return the relative frequency of each condition; the default has all the model supports.

    Raises:
        InputError: an unknown or unsupported condition, a negative weight, or no weight over 0.
    """
    possible = possible_conditions(folder)
    if weights is None:
        return {kind: _DEFAULTS[kind] for kind in possible if kind in _DEFAULTS}
    known = set(KINDS)
    for kind, weight in weights.items():
        if kind not in known:
            raise InputError(f"conditions: unknown condition {kind!r}; {nearest(kind, known)}")
        if not 0 <= weight < float("inf"):
            raise InputError(f"conditions.{kind} is {weight}; give a number of at least 0")
        if weight and kind not in possible:
            raise InputError(
                f"conditions.{kind}: {folder.name} doesn't support this condition; it supports "
                f"{', '.join(possible)}")
    if not any(weights.values()):
        raise InputError("conditions: give at least one a weight above 0")
    return dict(weights)


@dataclass(frozen=True)
class Conditions:
    """The conditions of one model and their relative frequencies."""

    folder: ModelFolder
    weights: Mapping[str, float]  # relative frequency by condition

    def write(self, batch: Mapping[str, Any], draw: torch.Generator, rate: int = 1) -> LatentState:
        """Return the state of a dataset's batch, with its latents as `clean`, on the CPU.

        At a `rate` above 1 the latents are the batch's `finer` [B, C, n, h, w].
        """
        if rate > 1:
            batch = {**batch, "latents": batch["finer"]}
            if "still_index" in batch:
                batch["still_index"] = batch["still_index"] * rate
        latents, components = batch["latents"], self.folder.components
        strides: Strides = components["vae"].config.strides
        if self.folder.conditioning == "tokens":
            index, (clips, _, frames, *sides) = batch.get("still_index"), latents.shape
            given = draw_conditions((clips, frames, *sides), draw, self.weights, strides,
                                    frame_index=None if index is None else index.cpu(),
                                    patch=components["transformer"].config.patch_size)
            state = with_given(latents, given, batch.get("stills"), strides)
            return replace(state, spacing=1 / rate)
        names = [name for name, weight in self.weights.items() if weight]
        weights = torch.tensor([self.weights[name] for name in names])
        drawn = torch.multinomial(weights, len(latents), replacement=True, generator=draw)
        kinds = [names[i] for i in drawn.tolist()]
        state = replace(new_state(latents), clean=latents, spacing=1 / rate)
        if self.folder.conditioning == "channels":
            rows = []
            for i, kind in enumerate(kinds):
                known = _known(latents, kind, strides)
                rows.append(condition.known_frames(batch[kind][i : i + 1], known, strides))
            features: Tensor | None = batch.get("image")
            if features is not None and "image_last" in batch:
                features = torch.cat([features, batch["image_last"]], dim=1)
            return replace(state, stacked=torch.cat(rows), image_context=features)
        if self.folder.conditioning != "control" or "grey" not in batch:
            return state  # pictures have no condition
        grey, rows = batch["grey"], []
        size = [length * strides.hw for length in latents.shape[3:]]
        for i, kind in enumerate(kinds):
            is_known = kind != "text" and kind in batch
            known = _known(latents, kind if is_known else "text", strides)
            wanted = (~known).float()[None, None, :, None, None].expand(1, 1, -1, *size)
            kept = batch[kind][i : i + 1] if is_known else grey
            rows.append(condition.control_rows(kept, grey, wanted, strides))
        return replace(state, control=torch.cat(rows))


def _known(latents: Tensor, kind: str, strides: Strides) -> Tensor:
    """Return a mask [T] of the pixel frames that a condition gives."""
    known = torch.zeros(1 + (latents.shape[2] - 1) * strides.t, dtype=torch.bool)
    known[0] = kind in ("first", "both")
    known[-1] = known[-1] or kind == "both"
    return known
