"""What goes through a model for a clip: the windows it denoises, and what the VAE reads and makes.

Counted from the request alone, as `extend` and `prepare` go about it.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from vidgen.diffusion.oversampling import Pace
from vidgen.media.ending import read_ending
from vidgen.pipeline.levels import settles, sigmas_of
from vidgen.pipeline.long.tail import (
    OVERLAP,
    TAIL_FRAMES,
    keeps_to_start,
    split_windows,
    tail_of,
    window_size,
)

if TYPE_CHECKING:
    from vidgen.core.request import Request
    from vidgen.pipeline.types import Plan
    from vidgen.weights.folder import ModelFolder, RollConfig


class Encoded(NamedTuple):
    """A video of so many frames, and the oversampling that it is encoded at."""

    frames: int
    oversampling: int = 1


@dataclass(frozen=True)
class Passes:
    """The work of one clip.

    Attributes:
        windows: latent frames that the transformer reads for each window, stills included.
        drawn: those that it reads below the boundary, which are more under oversampling.
        has_given: whether frames of each window are given, as guidance counts them.
        encoded: each video or still that the VAE's encoder reads, for all windows.
        refined: first frames whose latents are brought nearer to them.
        decoded: latent frames that are decoded, but for `shown`.
        shown: latent frames that later windows decode, to be shown what came before.
        kept: frames that are written.
    """

    windows: tuple[int, ...]
    drawn: tuple[int, ...]
    has_given: tuple[bool, ...]
    encoded: tuple[Encoded, ...]
    refined: int
    decoded: int
    shown: int
    kept: int


@dataclass(frozen=True)
class _Given:
    """The clip that a request goes on from.

    Attributes:
        num_frames: its frames.
        num_latents: latent frames of it that are at hand.
        behind: latent frames before those.
        frames_ahead: frames that the latents stand for beyond its own.
        is_encoded: whether the latents come from its last frames.
    """

    num_frames: int = 0
    num_latents: int = 0
    behind: int = 0
    frames_ahead: int = 0
    is_encoded: bool = False


def count_passes(folder: ModelFolder, plan: Plan, request: Request) -> Passes:
    """Take a clip apart.

    Raises:
        InputError: that clip is missing or no video.
    """
    if plan.roll is not None:
        return _rolled(plan, plan.roll, request)
    strides = folder.components["vae"].config.strides
    size, t, total = window_size(folder, strides), strides.t, plan.latents.num_frames
    given = _Given()
    if request.prefix is not None:
        given = _given(folder, plan, os.fspath(request.prefix))
        missing = plan.kept_frames - given.num_frames - given.frames_ahead
        total = given.num_latents + max(math.ceil(missing / t), 0)
    windows = [(0, total)]
    if given.num_latents or total > size:
        overlap, at_hand = min(request.overlap or OVERLAP, size - 1), given.num_latents
        windows = split_windows(at_hand, total, size, min(overlap, at_hand or overlap))
    factor = plan.oversampling
    read, drawn = list[int](), list[int]()
    encoded = list[Encoded]()
    if given.is_encoded:
        encoded.append(Encoded(1 + (given.num_latents - 1) * t, factor))
    has_given, through_noise, refined = [], folder.defaults.history_noise > 0, 0
    made, shown = given.num_latents, 0
    for start, stop in windows:
        frames, known = 1 + (stop - start - 1) * t, made - start
        first, new_from = (given.behind + start) * t, 1 + (known - 1) * t if known else 0
        new = range(first + new_from, first + frames)
        pictures = _pictures(plan, request, begins=not known, ends=stop == total, new=new)
        stills, own = _conditions(folder, plan, request, frames, *pictures)
        anchored = known > 0 and keeps_to_start(folder, request)
        read.append(stop - start + stills + anchored)
        pace = Pace(factor, alone=start == 0)
        drawn.append(pace.finer(stop - start) + stills + anchored)
        past = max(TAIL_FRAMES, (known + 1) * factor) if known and factor > 1 else 0
        encoded += [Encoded(1 + (past // factor - 1) * t)] if past else []
        shown += past
        has_given.append(
            not through_noise if known else sum(pictures) > 0 and request.mask is None
        )
        encoded += own
        refined += pictures[0] if folder.conditioning == "tokens" else 0
        made = stop
    later = len(windows) - (not given.num_latents)
    shown += TAIL_FRAMES * later if folder.conditioning == "control" else 0
    if folder.conditioning == "control":  # and encode what they were shown
        behind = windows[len(windows) - later :]
        encoded += [Encoded(1 + (stop - start - 1) * t) for start, stop in behind]
    kept = max(plan.kept_frames - given.num_frames, 1)
    return Passes(tuple(read), tuple(drawn), tuple(has_given), tuple(encoded), refined, total,
                  shown, kept)


def _rolled(plan: Plan, roll: RollConfig, request: Request) -> Passes:
    """Turns, each in view of its window; finished ones are read once more, to be remembered."""
    turns = math.ceil(plan.latents.num_frames / roll.turn_frames)
    read = [roll.turn_frames + min(turn * roll.turn_frames, roll.window_frames)
            for turn in range(turns)]
    begins = request.has("image") or request.has("first_frame_model")
    encoded = (Encoded(1),) if begins else ()
    return Passes(tuple(read), tuple(read), (False,) * turns, encoded, len(encoded),
                  turns * roll.turn_frames, 0, plan.kept_frames)


def _pictures(
    plan: Plan, request: Request, *, begins: bool, ends: bool, new: range
) -> tuple[int, int]:
    """Given frames of a window: those in place, at its beginning, and those of later moments."""
    moments = [round(seconds * plan.fps) for seconds, _ in request.frame]
    inside = [moment for moment in moments if moment in new]
    first = begins and (request.begins_with_image or bool(request.first_frame_model))
    last = ends and request.last_image is not None
    in_place = first + inside.count(0)
    return in_place, last + len(inside) - inside.count(0)


def _conditions(
    folder: ModelFolder, plan: Plan, request: Request, frames: int, in_place: int, stills: int
) -> tuple[int, list[Encoded]]:
    """Latent frames that join a window as stills, and each video that is encoded for it."""
    references, still, once = len(request.reference), Encoded(1), Encoded(frames)
    each = [once] if plan.oversampling == 1 else [once, Encoded(frames, plan.oversampling)]
    whole = list[Encoded]()
    if request.strength is not None:
        whole += each if settles(plan, sigmas_of(plan), folder) else each[1:]
    match folder.conditioning:
        case "tokens":
            whole += each * (request.mask is not None)
            return stills + references, whole + [still] * (in_place + stills + references)
        case "channels":
            return 0, [*whole, once]
        case "control":
            return references, [*whole, once, once] + [still] * references
        case _:
            return 0, whole


def _given(folder: ModelFolder, plan: Plan, path: str) -> _Given:
    ending = read_ending(path)
    begun = tail_of(ending, folder, plan)
    if not isinstance(begun, str):
        at_hand = begun.num_given
        return _Given(begun.num_frames, at_hand, begun.num_latents - at_hand, begun.frames_ahead)
    t, count = folder.components["vae"].config.strides.t, ending.frames_at(plan.fps)
    num_latents = 1 + (count - 1) // t
    at_hand = min(TAIL_FRAMES, num_latents)
    return _Given(count, at_hand, num_latents - at_hand, is_encoded=True)
