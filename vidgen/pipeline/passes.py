"""Work of a model for one clip, counted from its plan and request alone.

The windows that the transformer denoises, and the frames that the VAE encodes and decodes, as in
`extend` and `prepare`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from vidgen.media.ending import read_ending
from vidgen.models.tokenizer import read_as
from vidgen.pipeline.experts import settles, sigma_split, sigmas_of
from vidgen.pipeline.long import tail

if TYPE_CHECKING:
    from vidgen.core.request import Request
    from vidgen.pipeline.types import Plan
    from vidgen.weights.folder import ModelFolder


class Window(NamedTuple):
    """A run of the sampler."""

    frames: int  # latent frames that the transformer reads, stills included
    drawn: int  # those that it reads below the boundary
    above: int  # forward passes over `frames`
    below: int  # forward passes over `drawn`
    has_given: bool  # whether frames are given, as guidance counts them


class Encoded(NamedTuple):
    """A video's number of frames, and the rate of its encoding."""

    frames: int
    rate: int = 1


@dataclass(frozen=True)
class Passes:
    """The work of one clip."""

    windows: tuple[Window, ...]
    encoded: tuple[Encoded, ...]  # each video or still that the VAE encodes, of all windows
    refined: int  # first frames whose latents are refined
    decoded: int  # latent frames, without `shown`
    shown: int  # latent frames that later windows decode to continue from
    kept: int  # frames that are written


def count_passes(folder: ModelFolder, plan: Plan, request: Request) -> Passes:
    """Count a clip's work; raise InputError if the clip that it continues is missing."""
    t, begun = folder.components["vae"].config.strides.t, tail.no_beginning(plan)
    if request.prefix is not None:
        begun = _beginning(folder, plan, os.fspath(request.prefix))
    spans = tail.windows_after(begun, plan, request, folder)
    encoded, shown, total = list[Encoded](), 0, spans[-1][1] if spans else begun.num_given
    if begun.hand_over == "pixels":
        encoded.append(Encoded(1 + (begun.num_given - 1) * t, plan.oversampling))
    windows, refined, made = list[Window](), 0, begun.num_given
    for start, stop in spans:
        frames, known = 1 + (stop - start - 1) * t, made - start
        first, new_from = (begun.num_gone + start) * t, 1 + (known - 1) * t if known else 0
        new = range(first + new_from, first + frames)
        pictures = _pictures(plan, request, begins=not known, ends=stop == total, new=new)
        stills, own = _conditions(folder, plan, request, frames, *pictures)
        stills += known > 0 and tail.keeps_to_start(folder, request)
        has_given = (folder.defaults.history_noise == 0 if known else
                     sum(pictures) > 0 and request.mask is None)
        finer = plan.rate.after(start).num_upsampled(stop - start)
        windows.append(Window(stop - start + stills, finer + stills,
                              *_num_passes(folder, plan, has_given=has_given), has_given))
        if known and plan.oversampling > 1:  # what came before, at the other rate
            past = max(tail.TAIL_FRAMES, (known + 1) * plan.oversampling)
            encoded.append(Encoded(1 + (past // plan.oversampling - 1) * t))
            shown += past
        if known and folder.conditioning == "control":  # what came before, as a clip of its own
            encoded.append(Encoded(frames))
            shown += tail.TAIL_FRAMES
        encoded += own
        refined += pictures[0] if folder.conditioning == "tokens" else 0
        made = stop
    kept = max(plan.kept_frames - begun.num_frames, 1)
    return Passes(tuple(windows), tuple(encoded), refined, total, shown, kept)


def _num_passes(folder: ModelFolder, plan: Plan, *, has_given: bool) -> tuple[int, int]:
    """Count forward passes of a window: at the clip's rate, and at a finer one."""
    guidance = plan.guidance.of_clip(has_given=has_given and plan.strength == 1)
    sigmas, things, legible = sigmas_of(plan), 0, 0.0
    if plan.binding and not has_given:
        config = folder.components["verifier"].config
        things = len(config.labels_in(read_as(plan.prompt, dict(plan.readings))))
        things, legible = things * (things > 1), config.legible
    passes = [len(guidance.branches_at(sigma)) + things * (sigma < legible)
              for sigma in sigmas.tolist()[:-1]]
    split = sigma_split(plan, sigmas, folder) if plan.oversampling > 1 else len(passes)
    return sum(passes[:split]), sum(passes[split:])


def _pictures(
    plan: Plan, request: Request, *, begins: bool, ends: bool, new: range
) -> tuple[int, int]:
    """Count given frames of a window: one in place, at its beginning, and later ones."""
    inside = [at for seconds, _ in request.frame if (at := round(seconds * plan.fps)) in new]
    first = begins and (request.begins_with_image or bool(request.first_frame_model))
    last = ends and request.last_image is not None
    in_place = first + inside.count(0)
    return in_place, last + len(inside) - inside.count(0)


def _conditions(
    folder: ModelFolder, plan: Plan, request: Request, frames: int, in_place: int, stills: int
) -> tuple[int, list[Encoded]]:
    """Count latent frames added to a window as stills, and list what is encoded for it."""
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


def _beginning(folder: ModelFolder, plan: Plan, path: str) -> tail.Beginning:
    """Return the beginning that a clip will have, with latents that hold no values."""
    ending = read_ending(path)
    begun = tail.tail_of(ending, folder, plan)
    if not isinstance(begun, str):
        return begun
    t, count = folder.components["vae"].config.strides.t, ending.frames_at(plan.fps)
    num_latents = 1 + (count - 1) // t
    latents = torch.empty(1, 1, min(tail.TAIL_FRAMES, num_latents), 1, 1, device="meta")
    return tail.Beginning(latents, count, num_latents, hand_over="pixels")
