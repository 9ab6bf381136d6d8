"""Windows of a long clip, and the last latents of a clip, from which another clip continues.

Axes: C latent channels, F latent frames, m of them kept, h w latent rows and columns.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from vidgen.core.errors import InputError
from vidgen.diffusion.temporal_upsampling import LatentRate
from vidgen.pipeline.settings import settled_value

if TYPE_CHECKING:
    from vidgen.core.request import Request
    from vidgen.media.ending import Ending
    from vidgen.pipeline.types import Plan
    from vidgen.weights.folder import ModelFolder

TAIL_FRAMES = 8
"""Latent frames kept. The embedded decoder, started from 3, errs by at most 8 of 255 in the frames
that follow; from 6 by 2, from 8 by no more than the error of bf16.
"""
TAIL_BYTES = 2_000_000
ANCHOR_TASK = "anchor"
"""Task in `model.json` of a model trained to refer to a long clip's first frame."""
AS_SHOWN = LatentRate(1)


@dataclass(frozen=True)
class Beginning:
    """Hold the end of the clip to continue; a clip that continues none has no latents here."""

    latents: Tensor  # the last ones, normalised, [1, C, m, h, w] float32
    num_frames: int = 0  # existing frames before the new ones
    num_latents: int = 0  # latent frames of the clip so far
    frames_ahead: int = 0  # frames that exist only as latents
    # target mean and deviation of each channel, [2, C]; None: those of the first window
    colours: Tensor | None = None
    hand_over: Literal["latents", "pixels"] = "latents"  # from a recipe, or encoded
    anchor: Tensor | None = None  # the clip's first latent frame, [1, C, 1, h, w], if known
    rate: LatentRate = AS_SHOWN  # of the latents, and whether the first is a single frame

    @property
    def num_given(self) -> int:
        """Latent frames of the clip in `latents`."""
        return self.rate.num_shown(self.latents.shape[2])

    @property
    def num_dropped(self) -> int:
        """Latent frames of the clip before those in `latents`."""
        return self.num_latents - self.num_given

    @property
    def num_reached(self) -> int:
        """Frames for which latents exist."""
        return self.num_frames + self.frames_ahead


def no_beginning(plan: Plan) -> Beginning:
    """Return the empty beginning of a clip that continues no other."""
    shape = plan.latents
    nothing = torch.zeros(1, shape.channels, 0, shape.height, shape.width)
    return Beginning(nothing, rate=plan.rate)


def keeps_to_start(folder: ModelFolder, request: Request) -> bool:
    """Return whether later windows get the clip's first frame as a reference."""
    return (ANCHOR_TASK in folder.tasks and request.settings.get("anchor") is not False
            and not request.reference)


def window_size(folder: ModelFolder) -> int:
    """Return the latent frames of the longest clip that a model was trained on."""
    return 1 + (folder.defaults.max_frames - 1) // folder.components["vae"].config.strides.t


def windows_after(
    begun: Beginning, plan: Plan, request: Request, folder: ModelFolder
) -> list[tuple[int, int]]:
    """Return [start, stop) of the windows after `begun`, in latent frames from its first."""
    size, given, total = window_size(folder), begun.num_given, plan.latents.num_frames
    if given:
        missing = plan.kept_frames - begun.num_reached
        total = given + max(math.ceil(missing / folder.components["vae"].config.strides.t), 0)
    overlap = min(int(settled_value("overlap", request, folder)), size - 1)
    return split_windows(given, total, size, min(overlap, given or overlap))


def split_windows(first: int, total: int, size: int, overlap: int) -> list[tuple[int, int]]:
    """Return latent frames [start, stop) of the windows that fill `first` to `total`.

    All but the first window begin `overlap` before their new frames; the last is as short as
    possible.
    """
    windows, done = [], first
    while done < total:
        start = max(done - overlap, 0)
        windows.append((start, min(start + size, total)))
        done = windows[-1][1]
    return windows


def make_tail(
    latents: Tensor, num_latents: int, frames_ahead: int, colours: Tensor,
    anchor: Tensor | None = None, rate: int = 1,
) -> dict[str, Any] | None:
    """Return the recipe's record of a clip's last latents, from which the clip can continue.

    The record is JSON data with float16 in base64; None if one latent frame exceeds `TAIL_BYTES`.

    Args:
        latents: the clip's last ones, [1, C, F, h, w]; `rate` of them per latent frame shown.
        num_latents: latent frames of the whole clip, before temporal upsampling.
        frames_ahead: frames at the end that were generated but not kept.
        colours: the windows' target, [2, C].
        anchor: the clip's first latent frame, [1, C, 1, h, w], for models that refer to it.
        rate: factor of temporal upsampling.
    """
    frame_bytes = latents[:, :, :1].numel() * 2 * 4 // 3
    count = min(TAIL_FRAMES, latents.shape[2], TAIL_BYTES // frame_bytes)
    if count < latents.shape[2]:
        count -= count % rate  # whole latent frames of the clip
    if count == 0:
        return None
    kept = {} if anchor is None else {"anchor": _text(anchor[0])}
    return kept | {"shape": [*latents[0, :, -count:].shape], "num_latents": num_latents,
                   "frames_ahead": frames_ahead, "colours": _text(colours),
                   "data": _text(latents[0, :, -count:])}


def read_tail(recipe: Mapping[str, Any] | None, folder: ModelFolder) -> Beginning | None:
    """Return the last latents in a clip's recipe; None if it has none of this model.

    Raises:
        InputError: the record is not in the format of `make_tail`.
    """
    if recipe is None or recipe.get("tail") is None:
        return None
    try:
        if recipe["model"]["sha256"] != folder.content_hash:
            return None
        tail, plan = recipe["tail"], recipe["plan"]
        latents = _tensor(tail["data"], tail["shape"])[None]
        anchor, (C, _, h, w) = tail.get("anchor"), tail["shape"]
        num_latents = int(tail["num_latents"])
        rate = LatentRate(int(plan.get("temporal_upsampling", 1)))
        return Beginning(
            latents, int(plan["kept_frames"]) - int(recipe.get("head_frames", 0)), num_latents,
            int(tail["frames_ahead"]), _tensor(tail["colours"], [2, C]),
            anchor=None if anchor is None else _tensor(anchor, [C, 1, h, w])[None],
            rate=replace(rate, alone=latents.shape[2] == rate.num_upsampled(num_latents)),
        )
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
        raise InputError(f"the latents in the clip's recipe are damaged ({error}); write the clip "
                         "again without its recipe, or generate it again") from None


def tail_of(ending: Ending, folder: ModelFolder, plan: Plan) -> Beginning | str:
    """Return the latents in a file's recipe, or the reason why a clip can't continue from them."""
    if not ending.matches_recipe:
        return "doesn't end as its recipe records"
    begun = read_tail(ending.recipe, folder)
    if begun is None:
        return f"holds no latents of {folder.name} to continue from"
    if begun.num_frames != ending.num_frames:
        return f"has {ending.num_frames} of the {begun.num_frames} frames that its recipe records"
    is_still = ending.num_frames == 1  # which has no rate
    grid = plan.latents.channels, plan.latents.height, plan.latents.width
    same_grid = (begun.latents.shape[1], *begun.latents.shape[3:]) == grid
    if same_grid and (is_still or ending.fps == plan.fps):
        return begun
    return "holds latents of another size or frame rate than requested"


def colours_of(latents: Tensor) -> Tensor:
    """Return the mean and deviation of each channel of [1, C, F, h, w], as [2, C] on the CPU."""
    flat = latents[0].float().flatten(1)
    return torch.stack([flat.mean(1), flat.std(1)]).cpu()


def _text(values: Tensor) -> str:
    return base64.b64encode(values.cpu().to(torch.float16).numpy().tobytes()).decode()


def _tensor(text: str, shape: list[int]) -> Tensor:
    flat = np.frombuffer(base64.b64decode(text, validate=True), np.float16).astype(np.float32)
    if not np.isfinite(flat).all():
        raise ValueError("numbers that are not finite")
    return torch.from_numpy(flat).reshape(shape)
