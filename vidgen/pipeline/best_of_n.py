"""Best-of-n: draw candidates until one is good enough, and keep the one with the highest score.

Candidates differ in their noise. The model's verifier scores their latents before anything is
decoded; usually the first one passes. Each window of a long clip has its own candidates, which must
still show what the frames before the window show. See `sound.own_sound` for sounds.

Axes: B clips, C latent channels, F latent frames, h w latent rows and columns, K labels.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from vidgen.diffusion.flow import shuffled
from vidgen.models.verifier import ANY, Want, score
from vidgen.pipeline.journal.job import TRIED

if TYPE_CHECKING:
    from vidgen.core.protocols import SamplerState, StepInfo
    from vidgen.diffusion.state import LatentState
    from vidgen.models.verifier import Verifier
    from vidgen.pipeline.journal.journal import Journal
    from vidgen.pipeline.loader import ModelLoader
    from vidgen.pipeline.types import Plan

log = logging.getLogger(__name__)

VERIFIER: Literal["verifier"] = "verifier"
CANDIDATE_NOISE = -2
"""Step number that no sampler uses: `shuffled` seeds the second candidate's noise with it, the
third's with one less, and so on."""


@dataclass(frozen=True)
class Best:
    """The best candidate so far."""

    score: float
    made: Any
    count: int  # candidates drawn so far


def best_of(
    draw: Callable[[range], Iterable[tuple[float, Any]]], most: int, enough: float, *,
    at_once: int = 1, best: Best | None = None, keep: Callable[[Best], None] | None = None,
) -> Best:
    """Draw up to `most` candidates until one scores `enough`; return the best, the first of a tie.

    Args:
        draw: yields (score, candidate) for each number of a range of `at_once`.
        best: best candidate of an interrupted run, which continues after its `count`.
        keep: called with the best candidate before more are drawn, to save it.
    """
    count = best.count if best else 0
    while count < most and (best is None or best.score < enough):
        if best is not None and keep is not None:
            keep(best)
        numbers = range(count, count := min(count + at_once, most))
        drawn = [Best(*each, count) for each in draw(numbers)]
        found = [replace(best, count=count), *drawn] if best else drawn
        best = max(found, key=lambda each: each.score)
    assert best is not None
    return best


@dataclass(frozen=True, slots=True)
class Verified:
    """Verdict on a finished clip."""

    names: str  # the things that the prompt names, in the verifier's words
    score: float  # from 0 to 1; see `verifier.score`
    is_enough: bool  # whether the score satisfies the model


def candidate_state(state: LatentState, number: int) -> LatentState:
    """Return a state with the noise of candidate `number`; 0 keeps the state's own noise."""
    if not number:
        return state
    assert state.noise is None, "a clip that starts from another one has one candidate"
    return replace(state, latents=shuffled(state.latents, CANDIDATE_NOISE + 1 - number))


@torch.no_grad()
def wanted(verifier: Verifier, state: LatentState, prompts: Sequence[str]) -> list[frozenset[Want]]:
    """Return the things that each clip of a state must show; none if its prompt names none.

    These are the things that the prompt names, with their colours. If the first frames of a clip
    are known, from a picture or the previous window, only named things that those frames show
    count, without colours; if the prompt names nothing, all that they show count.
    """
    known = _known(state)
    if known is None:
        return [verifier.config.wants_in(prompt) for prompt in prompts]
    named = [verifier.config.labels_in(prompt) for prompt in prompts]
    seen = verifier.shown(known)[:, -1, :, ANY] >= verifier.config.enough  # [B, K]
    visible = [frozenset(row.nonzero()[:, 0].tolist()) for row in seen]
    kept = (shown & labels if labels else shown
            for labels, shown in zip(named, visible, strict=True))
    return [frozenset(map(Want, labels)) for labels in kept]


def _known(state: LatentState) -> Tensor | None:
    """Return the known latent frames at the start of the clips, [B, C, n, h, w], or None."""
    if state.known_upsampled is not None:
        return state.known_upsampled.latents
    known = ~state.denoise_mask.flatten(3).any(3)[0, 0, state.num_references :]  # clips agree
    count = int(known.long().cumprod(0).sum())
    return state.clean[:, :, state.num_references :][:, :, :count] if count else None


def sample_best(
    loader: ModelLoader, plan: Plan, state: LatentState, prompt: str,
    sample: Callable[[LatentState, int, SamplerState | None], Tensor], journal: Journal,
    window: int, num_steps: int,
) -> tuple[Tensor, int]:
    """Draw candidates of one window of a clip until one satisfies the verifier.

    Return the latents of the best one, in the samplers' layout, and the number of candidates drawn
    before the last one. The journal saves the best candidate so far.

    Args:
        state: noisy state of the first candidate.
        prompt: prompt after word normalisation.
        sample: denoises (state, candidate number, saved sampler state or None) to clean latents.
        num_steps: number of steps of one candidate.
    """
    arrays, facts = journal.kept_arrays(TRIED, "latents") or ({}, {})
    best = None
    if facts.get("window") == window:
        latents = torch.from_numpy(arrays["latents"]).to(state.latents.device)
        best = Best(facts["score"], latents, facts["count"])

    def keep(best: Best) -> None:
        facts = {"window": window, "count": best.count, "score": best.score}
        journal.keep_arrays(TRIED, {"latents": best.made}, facts)

    with loader.use(VERIFIER) as verifier:
        (wants,), enough = wanted(verifier, state, [prompt]), verifier.config.enough

        def draw(numbers: range) -> Iterator[tuple[float, Tensor]]:
            for number in numbers:
                begun = candidate_state(state, number)
                made = sample(begun, number, _of_candidate(journal.take_state(), number, num_steps))
                shown = verifier.shown(begun.unpack(made)[0])[0]
                yield score(shown, wants) if wants else enough, made

        best = best_of(draw, plan.candidates, enough, best=best, keep=keep)
        if best.score < enough:
            is_named = bool(verifier.config.labels_in(prompt))
            names = verifier.config.names(wants) if is_named else "what the given frames show"
            log.warning("none of %d candidates clearly shows %s: kept the best match; rephrase, "
                        "change the seed or raise candidates", plan.candidates, names)
    return best.made, best.count - 1


@torch.no_grad()
def verify_video(loader: ModelLoader, video: Iterable[Tensor], prompt: str) -> Verified | None:
    """Score a finished clip against a prompt with the model's verifier, in bounded memory.

    Return None if the normalised prompt names nothing that the verifier knows. `video` yields
    successive chunks [1, 3, t, H, W] in [-1, 1], each of whole latent frames.
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


def counted_on(info: StepInfo, candidate: int) -> StepInfo:
    """Offset a candidate's step count by the steps of the candidates before it."""
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
