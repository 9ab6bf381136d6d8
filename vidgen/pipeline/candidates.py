"""Candidates of a clip: drawn from other noise until the model's verifier sees what was asked for.

Most clips show it at once, and are the first candidate. The verifier looks at latents, before
anything is decoded; where none satisfies it, the one that does so best is kept. Of a long clip each
window is a clip of its own here, which has to show what the last frames before it showed.

Axes: B clips, C latent channels, F latent frames, h w latent rows and columns, K labels.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vidgen.diffusion.noise import shuffled
from vidgen.models.verifier import ANY, Want, score
from vidgen.pipeline.bound import VERIFIER
from vidgen.pipeline.journal.job import TRIED, as_array
from vidgen.pipeline.settings import settled_value
from vidgen.pipeline.tasks import words_alone

if TYPE_CHECKING:
    from vidgen.core.protocols import SamplerState, StepInfo
    from vidgen.core.request import Request
    from vidgen.diffusion.state import LatentState
    from vidgen.models.verifier import Verifier
    from vidgen.pipeline.journal.journal import Journal
    from vidgen.pipeline.loader import Parts
    from vidgen.pipeline.types import Plan
    from vidgen.weights.folder import ModelFolder

log = logging.getLogger(__name__)

CANDIDATE_NOISE = -2
"""A step that no sampler takes, by which `shuffled` draws the noise of the second candidate; that
of the third is one less, and so on."""

Sample = Callable[["LatentState", Tensor, int], Tensor]
"""Samples a state of some clips, whose numbers [n] it is told, and that of this candidate."""


@dataclass(frozen=True)
class Tried:
    """The best candidate of a clip so far.

    Attributes:
        count: how many there were.
        score: how surely it shows what was asked for.
        latents: [1, C, F, h, w], with sound packed as a sampler has it.
    """

    count: int
    score: float
    latents: Tensor


@dataclass(frozen=True, slots=True)
class Verified:
    """How surely a finished clip shows what a prompt names.

    Attributes:
        names: what the prompt names, in the verifier's words.
        score: from 0 to 1; see `verifier.score`.
        is_enough: whether the score satisfies the model.
    """

    names: str
    score: float
    is_enough: bool


def with_verifier(plan: Plan, request: Request, folder: ModelFolder) -> Plan:
    """The plan with what a verifier is for: as the request, or the model, has it.

    Raises:
        InputError: more than one candidate of a clip that can have no other, or without a verifier;
            binding of a clip that can't be bound.
    """
    why = None
    if VERIFIER not in folder.components:
        why = f"{folder.name} has no verifier"
    elif plan.roll is not None:
        why = "a clip that is rolled out is written while it is made"
    elif plan.strength < 1:
        why = "what a clip that begins from another one shows is that one's"
    shared = "several devices that share a clip don't tell things apart"
    alone = why or (shared if (request.devices or 1) > 1 else None)
    binding = settled_value("binding", request, folder, alone)
    return replace(
        plan, candidates=int(settled_value("candidates", request, folder, why)),
        binding=binding if words_alone(request) else 0.0,
    )


def anew(state: LatentState, number: int) -> LatentState:
    """A state's clips as their candidate of a number begins: the same under other noise."""
    if not number:
        return state
    assert state.noise is None, "a clip that begins from another one has no other candidate"
    return replace(state, latents=shuffled(state.latents, CANDIDATE_NOISE + 1 - number))


@torch.no_grad()
def wanted(
    verifier: Verifier, state: LatentState, prompts: Sequence[str]
) -> list[frozenset[Want]]:
    """What each of a state's clips is to show; nothing where that can't be told.

    That is what its prompt names, in the tints that it gives it. Of a clip whose first frames are
    known, a picture or the window before, it is what these show of it, or all that they show where
    the prompt names nothing.
    """
    known = _known(state)
    if known is None:
        return [verifier.config.wants_in(prompt) for prompt in prompts]
    named = [verifier.config.labels_in(prompt) for prompt in prompts]
    seen = verifier.shown(known)[:, -1, :, ANY] >= verifier.config.enough  # [B, K]
    there = [frozenset(row.nonzero()[:, 0].tolist()) for row in seen]
    kept = (shown & asked if asked else shown for asked, shown in zip(named, there, strict=True))
    return [frozenset(map(Want, labels)) for labels in kept]


def _known(state: LatentState) -> Tensor | None:
    """The whole frames that a state's clips begin with, [B, C, n, h, w], or None."""
    if state.known_finer is not None:
        return state.known_finer.latents
    known = ~state.denoise_mask.flatten(3).any(3)[0, 0, state.num_references :]  # of all alike
    count = int(known.long().cumprod(0).sum())
    return state.clean[:, :, state.num_references :][:, :, :count] if count else None


def sample_best(
    parts: Parts,
    plan: Plan,
    state: LatentState,
    prompts: Sequence[str],
    sample: Sample,
    tried: Tried | None = None,
    keep: Callable[[Tried], None] | None = None,
    doubt: Callable[[str], None] | None = None,
) -> Tensor:
    """Draw candidates until each clip has one that shows what was asked for.

    Args:
        parts: the networks.
        plan: of the clips.
        state: where their first candidates begin.
        prompts: B of them, as the model reads them.
        sample: denoises.
        tried: of the one clip those that an earlier run has drawn.
        keep: told of the one clip's candidates when more are to be drawn.
        doubt: told what of a clip no candidate shows for certain.

    Returns:
        What `sample` made for each clip: latents [B, C, F, h, w], with sound packed.
    """
    every = torch.arange(len(prompts), device=state.latents.device)
    if plan.candidates == 1:
        return sample(state, every, 0)
    with parts.use(VERIFIER) as verifier:
        wants, enough = wanted(verifier, state, prompts), verifier.config.enough
        best = {0: (tried.score, tried.latents[0])} if tried else {}
        unsure, count = list(range(len(prompts))), tried.count if tried else 0
        while unsure and count < plan.candidates:
            begun = anew(state.rows(every[unsure]), count)
            made = sample(begun, every[unsure], count)
            count += 1
            shown = verifier.shown(begun.apart(made)[0])
            for row, latents, seen in zip(unsure, made, shown, strict=True):
                sure = score(seen, wants[row]) if wants[row] else enough
                if row not in best or sure > best[row][0]:
                    best[row] = sure, latents
            unsure = [row for row in unsure if best[row][0] < enough]
            if keep is not None and unsure and count < plan.candidates:
                keep(Tried(count, best[0][0], best[0][1][None]))
        if doubt is not None:
            for row in unsure:
                doubt(verifier.config.names(wants[row]))
    return torch.stack([best[row][1] for row in range(len(prompts))])


def best_of_window(
    parts: Parts, plan: Plan, state: LatentState, prompt: str, sample: Callable[..., Tensor],
    on_step: Callable[..., None], journal: Journal, window: int, *, num_steps: int,
) -> tuple[Tensor, int]:
    """Draw candidates of one window of a clip; the journal keeps the best so far.

    Args:
        parts: the networks.
        plan: of the window.
        state: where its first candidate begins.
        prompt: as the model reads it.
        sample: denoises a state, given `on_step` and `resume`.
        on_step: called after each step, with the candidate's number.
        journal: of the clip.
        window: number of the window.
        num_steps: of one candidate.

    Returns:
        The best candidate as samplers give it, and how many were rejected.
    """
    tried = kept_tried(journal, window, state.latents.device)
    rejected = tried.count if tried else 0

    def draw(state: LatentState, _rows: Tensor, candidate: int) -> Tensor:
        nonlocal rejected
        rejected = candidate
        resume = _of_candidate(journal.take_state(), candidate, num_steps)
        return sample(state, on_step=partial(on_step, candidate=candidate), resume=resume)

    def doubt(names: str) -> None:
        log.warning("none of %d candidates shows %s for certain, the surest is kept; give another "
                    "seed, other words or more candidates", plan.candidates, names)

    keep = partial(keep_tried, journal, window)
    return sample_best(parts, plan, state, [prompt], draw, tried, keep, doubt), rejected


@torch.no_grad()
def verify_video(parts: Parts, video: Iterable[Tensor], prompt: str) -> Verified | None:
    """Score a finished clip against a prompt with the model's verifier, in bounded memory.

    Args:
        parts: the networks, of which one is a verifier.
        video: successive chunks [1, 3, t, H, W] in [-1, 1] that fill whole latent frames.
        prompt: as the model reads it.

    Returns:
        The score; None where the prompt names nothing that the verifier knows.
    """
    with parts.use("vae") as vae, parts.use(VERIFIER) as verifier:
        wants = verifier.config.wants_in(prompt)
        if not wants:
            return None
        dtype = next(vae.parameters()).dtype
        latents = vae.stream_encode(chunk.to(parts.device, dtype) for chunk in video)
        shown = torch.cat([verifier.shown(each)[0] for each in latents])
        sure = score(shown, wants)
        return Verified(verifier.config.names(wants), sure, sure >= verifier.config.enough)


def keep_tried(journal: Journal, window: int, tried: Tried) -> None:
    """Have a journal keep the best candidate so far of a clip's window."""
    facts = {"window": window, "count": tried.count, "score": tried.score}
    journal.keep_arrays(TRIED, {"latents": as_array(tried.latents)}, facts)


def kept_tried(journal: Journal, window: int, device: torch.device) -> Tried | None:
    """What a journal kept so of this window, or None."""
    arrays, facts = journal.kept_arrays(TRIED, "latents") or ({}, {})
    if facts.get("window") != window:
        return None
    latents = torch.from_numpy(arrays["latents"]).to(device)
    return Tried(facts["count"], facts["score"], latents)


def counted_on(info: StepInfo, candidate: int) -> StepInfo:
    """Count a candidate's steps after those of the candidates before it."""
    before = candidate * info.num_steps
    state = replace(info.state, step=before + info.state.step)
    return replace(info, num_steps=before + info.num_steps, state=state)


def _of_candidate(
    state: SamplerState | None, candidate: int, num_steps: int
) -> SamplerState | None:
    """Return a state with its candidate's own step count; None if it is another candidate's."""
    if state is None or (state.step - 1) // num_steps != candidate:
        return None
    return replace(state, step=state.step - candidate * num_steps)
