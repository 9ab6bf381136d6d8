"""What is known of each sample in fine-tuning, written the way its model learned to read it.

Conditions are drawn anew for each sample: text alone, first frame, first and last, a beginning to
go on from; `ModelFolder.conditioning` says how each gets into the transformer.

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
from vidgen.diffusion.condition_mix import KINDS, ConditionMix, Stills, training_conditions
from vidgen.diffusion.state import LatentState, new_state
from vidgen.weights.folder import ModelFolder

_DEFAULTS = {"text": 0.6, "first": 0.2, "last": 0.05, "both": 0.05, "frames": 0.05, "prefix": 0.1}
_TASK = {
    "first": "image", "last": "last-image", "both": "last-image", "frames": "frames",
    "prefix": "extend", "mask": "mask",
}
_IN_CHANNELS, _IN_CONTROL = ("first", "both"), ("text", "first", "both")


def possible_conditions(folder: ModelFolder) -> tuple[str, ...]:
    """The conditions that a model can be trained under, as a run's `conditions` names them."""
    if folder.conditioning == "none":
        return ("text",)
    if folder.conditioning == "control":
        return _IN_CONTROL
    if folder.conditioning == "channels":
        if folder.components["transformer"].config.image_positions is not None:
            return ("both",)  # it was taught positions of two pictures
        return _IN_CHANNELS if "last-image" in folder.tasks else _IN_CHANNELS[:1]
    return ("text", *(kind for kind, task in _TASK.items() if task in folder.tasks))


def settle_conditions(asked: Mapping[str, float] | None, folder: ModelFolder) -> dict[str, float]:
    """How often each condition is drawn; weights needn't sum to 1.

    Args:
        asked: the run's `conditions`; None: the defaults of those that the model can do.
        folder: the model.

    Raises:
        InputError: an unknown condition, one that this model can't do, or no weight over 0.
    """
    possible = possible_conditions(folder)
    if asked is None:
        return {kind: _DEFAULTS[kind] for kind in possible if kind in _DEFAULTS}
    known = set(KINDS)
    for kind, weight in asked.items():
        if kind not in known:
            raise InputError(f"conditions: unknown condition {kind!r}; {nearest(kind, known)}")
        if not 0 <= weight < float("inf"):
            raise InputError(f"conditions.{kind} is {weight}; it must be 0 or more")
        if weight and kind not in possible:
            raise InputError(
                f"conditions.{kind}: {folder.name} can't be conditioned so; it can be trained on "
                f"{', '.join(possible)}"
            )
    if not any(asked.values()):
        raise InputError("conditions: at least one must have a weight over 0")
    return dict(asked)


@dataclass(frozen=True)
class Conditions:
    """Writes conditions for one model.

    Args:
        folder: the model.
        weights: how often each is drawn.
    """

    folder: ModelFolder
    weights: Mapping[str, float]

    def write(
        self, batch: Mapping[str, Any], draw: torch.Generator, rate: int = 1
    ) -> LatentState:
        """The state of a batch of the dataset; its `clean` are the latents.

        Args:
            batch: as `Dataset.batch` gives it, on the CPU.
            draw: a CPU generator; what is drawn depends on it alone.
            rate: latent frames for each of the clip's; above 1 `finer` are the latents.
        """
        if rate > 1:
            batch = {**batch, "latents": batch["finer"]}
            if "still_index" in batch:
                batch["still_index"] = batch["still_index"] * rate
            return replace(self._state(batch, draw), spacing=1 / rate)
        return self._state(batch, draw)

    def _state(self, batch: Mapping[str, Any], draw: torch.Generator) -> LatentState:
        latents = batch["latents"]
        if self.folder.conditioning == "tokens":
            return self._in_place(batch, draw)
        state = replace(new_state(latents), clean=latents)
        kinds = self._kinds(len(latents), draw)
        if self.folder.conditioning == "channels":
            return self._in_channels(state, batch, kinds)
        if self.folder.conditioning == "control":
            return self._in_control(state, batch, kinds)
        return state

    def _in_place(self, batch: Mapping[str, Any], draw: torch.Generator) -> LatentState:
        shares: dict[str, Any] = dict.fromkeys((*KINDS, "reference"), 0.0) | dict(self.weights)
        stills = None
        if "stills" in batch:
            stills = Stills(batch["stills"], batch["still_index"])
        return training_conditions(
            batch["latents"], draw, ConditionMix(**shares), self._strides,
            stills=stills, patch=self.folder.components["transformer"].config.patch_size,
        )

    def _in_channels(
        self, state: LatentState, batch: Mapping[str, Any], kinds: list[str]
    ) -> LatentState:
        rows = [
            condition.known_frames(
                batch[kind][i : i + 1], self._known(state, kind), self._strides
            )
            for i, kind in enumerate(kinds)
        ]
        features: Tensor | None = batch.get("image")
        if features is not None and "image_last" in batch:
            features = torch.cat([features, batch["image_last"]], dim=1)
        return replace(state, stacked=torch.cat(rows), image_context=features)

    def _in_control(
        self, state: LatentState, batch: Mapping[str, Any], kinds: list[str]
    ) -> LatentState:
        if "grey" not in batch:  # pictures: nothing is known of them
            return state
        grey, rows = batch["grey"], []
        side = self._strides.hw
        for i, kind in enumerate(kinds):
            kept = grey if kind == "text" or kind not in batch else batch[kind][i : i + 1]
            known = self._known(state, kind if kept is not grey else "text")
            wanted = (~known).float()[None, None, :, None, None].expand(
                1, 1, -1, state.latents.shape[3] * side, state.latents.shape[4] * side
            )
            rows.append(condition.control_rows(kept, grey, wanted, self._strides))
        return replace(state, control=torch.cat(rows))

    def _known(self, state: LatentState, kind: str) -> Tensor:
        """[T] bool: the pixel frames that are known under a condition."""
        known = torch.zeros(1 + (state.latents.shape[2] - 1) * self._strides.t, dtype=torch.bool)
        known[0] = kind in ("first", "both")
        known[-1] = known[-1] or kind == "both"
        return known

    def _kinds(self, count: int, draw: torch.Generator) -> list[str]:
        names = [name for name, weight in self.weights.items() if weight]
        weights = torch.tensor([self.weights[name] for name in names])
        drawn = torch.multinomial(weights, count, replacement=True, generator=draw)
        return [names[i] for i in drawn.tolist()]

    @property
    def _strides(self) -> Strides:
        return self.folder.components["vae"].config.strides
