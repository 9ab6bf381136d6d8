"""Several takes of a shot, and which is the best: by the checks of each file, then by the verifier.

Where the model's folder has a verifier, it scores each take for what the prompts name. Without one
the checks alone decide; among equals the first take is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidgen.media.checks import Finding
from vidgen.media.video_reader import VideoReader
from vidgen.models.tokenizer import read_as
from vidgen.pipeline.bound import VERIFIER
from vidgen.pipeline.candidates import Verified, verify_video
from vidgen.pipeline.codec import as_video

if TYPE_CHECKING:
    from vidgen.pipeline.model import OpenedModel
    from vidgen.story.film import Part


@dataclass(frozen=True, slots=True)
class TakeScore:
    """How good a take is.

    Attributes:
        seed: of the take.
        path: of its file.
        faults: kinds of findings that are faults.
        warnings: kinds of findings that may be meant.
        verified: of each prompt that names something that the verifier knows, what it sees of it.
        reasons: the same in sentences.
    """

    seed: int
    path: str
    faults: tuple[str, ...]
    warnings: tuple[str, ...]
    verified: tuple[Verified, ...]
    reasons: tuple[str, ...]

    @property
    def rank(self) -> tuple[int, int, int, float, int]:
        """Smaller is better: faults, prompts not shown, warnings, the scores, the seed."""
        missing = sum(not each.is_enough for each in self.verified)
        total = sum(each.score for each in self.verified)
        return len(self.faults), missing, len(self.warnings), -round(total, 3), self.seed


def best_take(scores: Sequence[TakeScore]) -> dict[str, Any]:
    """The choice among takes, as JSON data: the seed, why, and every take's score."""
    ranked = sorted(scores, key=lambda score: score.rank)
    best = ranked[0]
    why = "; ".join(best.reasons)
    if len(ranked) > 1:
        why += f"; next was seed {ranked[1].seed}: {'; '.join(ranked[1].reasons)}"
    return {"seed": best.seed, "why": why, "takes": [asdict(score) for score in scores]}


def score_take(
    seed: int, path: Path, findings: Sequence[Finding], verified: Sequence[Verified] = ()
) -> TakeScore:
    """Score a take.

    Args:
        seed: of the take.
        path: its file.
        findings: of its checks.
        verified: what the verifier sees of each prompt; empty: the checks alone decide.
    """
    faults = tuple(each.kind for each in findings if each.severity == "fault")
    warnings = tuple(each.kind for each in findings if each.severity == "warning")
    reasons = [each.text for each in findings] or ["the checks found nothing"]
    for each in verified:
        verb = "sees" if each.is_enough else "misses"
        reasons.append(f"the verifier {verb} {each.names} ({each.score:.2f})")
    return TakeScore(seed, path.name, faults, warnings, tuple(verified), tuple(reasons))


def verify_take(model: OpenedModel, path: Path, parts: Sequence[Part]) -> Iterator[Verified]:
    """Score a take for what each of its prompts names.

    Args:
        model: that made it; without a verifier nothing is scored.
        path: the take's file.
        parts: the stretches that the file holds, each under a prompt.

    Yields:
        What the verifier sees of each prompt that names something that it knows.
    """
    if VERIFIER not in model.folder.components:
        return
    stride = model.vae_config.strides.t
    with VideoReader(path) as reader:
        frames = iter(reader)
        for part in parts:
            stretch = islice(frames, part.num_frames)
            whole = islice(stretch, 1 + (part.num_frames - 1) // stride * stride)
            prompt = read_as(part.prompt, model.tokenizer.readings(part.prompt))
            verified = verify_video(model.parts, (as_video(f[None]) for f in whole), prompt)
            for _ in stretch:  # frames that fill no latent frame
                pass
            if verified is not None:
                yield verified
