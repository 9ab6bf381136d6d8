"""Best-of-n: draw candidates of a clip from other noise until the verifier finds what was asked.

The verifier looks at latents, before anything is decoded; most first candidates satisfy it. Where
none does, the one with the highest score is kept. Each window of a long clip is a clip of its own
here, which has to show what the last frames before it show.

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
from vidgen.pipeline.journal.job import TRIED, as_array
from vidgen.pipeline.regional_prompts import VERIFIER
from vidgen.pipeline.settings import settled_value
from vidgen.pipeline.tasks import words_alone

if TYPE_CHECKING:
    from vidgen.core.protocols import SamplerState, StepInfo
    from vidgen.core.request import Request
    from vidgen.diffusion.state import LatentState
    from vidgen.models.verifier import Verifier
    from vidgen.pipeline.journal.journal import Journal
    from vidgen.pipeline.loader import ModelLoader
    from vidgen.pipeline.types import Plan
    from vidgen.weights.folder import ModelFolder

log = logging.getLogger(__name__)

CANDIDATE_NOISE = -2
"""A step that no sampler takes; `shuffled` draws the second candidate's noise with it, the third's
with one less, and so on."""

Sample = Callable[["LatentState", Tensor, int], Tensor]
"""Samples a state of some clips; also gets their numbers [n], and that of this candidate."""


@dataclass(frozen=True)
class Tried:
    """The best candidate of a clip so far.

    Attributes:
        count: candidates so far.
        score: see `verifier.score`.
        latents: [1, C, F, h, w], with sound packed as a sampler has it.
    """

    count: int
    score: float
    latents: Tensor


@dataclass(frozen=True, slots=True)
class Verified:
    """Verdict on a finished clip.

    Attributes:
        names: things that the prompt names, in the verifier's words.
        score: from 0 to 1; see `verifier.score`.
        is_enough: whether the score satisfies the model.
    """

    names: str
    score: float
    is_enough: bool


def with_verifier(
    plan: Plan, request: Request, folder: ModelFolder, devices: int | None = 1
) -> Plan:
    """Return the plan with the number of candidates and the strength of regional prompts.

    Raises:
        InputError: the model has no verifier, or this clip can't have several candidates or
            regional prompts.
    """
    why = None
    if VERIFIER not in folder.components:
        why = f"{folder.name} has no verifier"
    elif plan.roll is not None:
        why = "a clip that is rolled out is written while it is made"
    elif plan.strength < 1:
        why = "what a clip that begins from another one shows is that one's"
    shared = "several devices that share a clip don't tell things apart"
    alone = why or (shared if (devices or 1) > 1 else None)
    binding = settled_value("binding", request, folder, alone)
    return replace(
        plan, candidates=int(settled_value("candidates", request, folder, why)),
        binding=binding if words_alone(request) else 0.0,
    )


def anew(state: LatentState, number: int) -> LatentState:
    """Return a state with the noise of its clips' candidate of a number."""
    if not number:
        return state
    assert state.noise is None, "a clip that begins from another one has no other candidate"
    return replace(state, latents=shuffled(state.latents, CANDIDATE_NOISE + 1 - number))


@torch.no_grad()
def wanted(
    verifier: Verifier, state: LatentState, prompts: Sequence[str]
) -> list[frozenset[Want]]:
    """Return the things that each of a state's clips is to show; none where the prompt names none.

    They are those of its prompt, in its tints. Of a clip whose first frames are known, from a
    picture or the window before, they are those that these show, or all that they show where the
    prompt names nothing.
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
    """Return the whole frames that a state's clips begin with, [B, C, n, h, w], or None."""
    if state.known_upsampled is not None:
        return state.known_upsampled.latents
    known = ~state.denoise_mask.flatten(3).any(3)[0, 0, state.num_references :]  # of all alike
    count = int(known.long().cumprod(0).sum())
    return state.clean[:, :, state.num_references :][:, :, :count] if count else None


def sample_best(
    loader: ModelLoader,
    plan: Plan,
    state: LatentState,
    prompts: Sequence[str],
    sample: Sample,
    tried: Tried | None = None,
    keep: Callable[[Tried], None] | None = None,
    doubt: Callable[[str], None] | None = None,
) -> Tensor:
    """Draw candidates until each clip has one that satisfies the verifier.

    Args:
        loader: the networks.
        plan: of the clips.
        state: the start of their first candidates.
        prompts: B, after word normalisation.
        sample: denoises.
        tried: the candidates of an earlier run, for a single clip.
        keep: called with a single clip's candidates before more are drawn.
        doubt: called with the names of the things that no candidate of a clip shows for certain.

    Returns:
        Latents [B, C, F, h, w] of the best candidates, with sound packed.
    """
    every = torch.arange(len(prompts), device=state.latents.device)
    if plan.candidates == 1:
        return sample(state, every, 0)
    with loader.use(VERIFIER) as verifier:
        wants, enough = wanted(verifier, state, prompts), verifier.config.enough
        best = {0: (tried.score, tried.latents[0])} if tried else {}
        unsure, count = list(range(len(prompts))), tried.count if tried else 0
        while unsure and count < plan.candidates:
            begun = anew(state.rows(every[unsure]), count)
            made = sample(begun, every[unsure], count)
            count += 1
            shown = verifier.shown(begun.unpack(made)[0])
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
    loader: ModelLoader, plan: Plan, state: LatentState, prompt: str, sample: Callable[..., Tensor],
    on_step: Callable[..., None], journal: Journal, window: int, *, num_steps: int,
) -> tuple[Tensor, int]:
    """Draw candidates of one window of a clip; the journal keeps the best so far.

    Args:
        loader: the networks.
        plan: of the window.
        state: the start of its first candidate.
        prompt: after word normalisation.
        sample: denoises a state, given `on_step` and `resume`.
        on_step: called after each step, with the candidate's number.
        journal: of the clip.
        window: number of the window.
        num_steps: of one candidate.

    Returns:
        The best candidate as samplers give it, and the number of rejected ones.
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
    return sample_best(loader, plan, state, [prompt], draw, tried, keep, doubt), rejected


@torch.no_grad()
def verify_video(loader: ModelLoader, video: Iterable[Tensor], prompt: str) -> Verified | None:
    """Score a finished clip against a prompt with the model's verifier, in bounded memory.

    Args:
        loader: the networks, a verifier among them.
        video: successive chunks [1, 3, t, H, W] in [-1, 1] that fill whole latent frames.
        prompt: after word normalisation.

    Returns:
        The verdict; None where the prompt names nothing that the verifier knows.
    """
    with loader.use("vae") as vae, loader.use(VERIFIER) as verifier:
        wants = verifier.config.wants_in(prompt)
        if not wants:
            return None
        dtype = next(vae.parameters()).dtype
        latents = vae.stream_encode(chunk.to(loader.device, dtype) for chunk in video)
        shown = torch.cat([verifier.shown(each)[0] for each in latents])
        sure = score(shown, wants)
        return Verified(verifier.config.names(wants), sure, sure >= verifier.config.enough)


def keep_tried(journal: Journal, window: int, tried: Tried) -> None:
    """Keep the best candidate so far of a clip's window in a journal."""
    facts = {"window": window, "count": tried.count, "score": tried.score}
    journal.keep_arrays(TRIED, {"latents": as_array(tried.latents)}, facts)


def kept_tried(journal: Journal, window: int, device: torch.device) -> Tried | None:
    """Return the best candidate of this window that `keep_tried` kept, or None."""
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
