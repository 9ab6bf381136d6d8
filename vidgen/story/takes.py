"""Parts of a film's shots rendered by a worker, and the best of a shot's takes chosen.

The best take has the fewest faults in its file's checks. Where the model's folder has a verifier,
it then scores each take for what the prompts name; without one the checks alone decide. Among
equals the first take is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidgen.core.protocols import OnEvent
from vidgen.media.checks import Finding
from vidgen.media.join import ContinuedClip
from vidgen.media.video_reader import VideoReader
from vidgen.models.tokenizer import read_as
from vidgen.pipeline.best_of_n import Verified, verify_video
from vidgen.pipeline.codec import as_video
from vidgen.pipeline.model import OpenedModel
from vidgen.pipeline.regional_prompts import VERIFIER
from vidgen.pipeline.workers.clip_work import EngineWork, write_request
from vidgen.story.elements import ShotFrame
from vidgen.story.film import Part, ShotPlan, Take
from vidgen.story.store import ShotStore, findings_of

if TYPE_CHECKING:
    from vidgen.core.request import Request
    from vidgen.media.clip import Clip
    from vidgen.media.types import Frames
    from vidgen.pipeline.types import AnyEngine, OnPreview


@dataclass(frozen=True, slots=True)
class PartJob:
    """A part of a take to be rendered.

    Attributes:
        shot: its id.
        take: which of the shot's takes.
        index: which of the take's parts.
        clip: number of the part among all that are rendered.
        note: reported when it begins.
    """

    shot: str
    take: int
    index: int
    clip: int
    note: str = ""


@dataclass(frozen=True, slots=True)
class ChoiceJob:
    """A shot whose best take is to be chosen."""

    shot: str


class ShotWork(EngineWork):
    """Renders parts of a film's shots into its store, and chooses among takes.

    Args:
        open_engine: opens the model, once in each worker.
        model_sha256: of the model's files.
        store: of the shots.
        on_preview: called with each part while it forms; not where work is pickled.
    """

    def __init__(
        self, open_engine: Callable[[], AnyEngine], model_sha256: str, store: ShotStore,
        on_preview: OnPreview | None = None,
    ) -> None:
        super().__init__(open_engine, model_sha256)
        self.store, self.film, self.on_preview = store, store.film, on_preview

    def __call__(self, payload: PartJob | ChoiceJob, tell: OnEvent) -> None:
        """Do one job.

        Raises:
            InputError: a part that can't be made.
        """
        plan = self.film.shots[payload.shot]
        if isinstance(payload, ChoiceJob):
            self._choose(plan, tell)
            return
        if payload.note:
            tell({"event": "note", "text": payload.note, "shot": payload.shot})
        take = plan.takes[payload.take]
        request, head = self._request(plan, take, payload.index)
        told = {"clip": payload.clip, "shot": payload.shot, "seed": take.seed}
        cut = partial(_without_head, head=head) if head and not payload.index else None
        path = self.store.path(take.parts[payload.index].key)
        write_request(self.engine, request, path, tell, told, cut, self.on_preview)

    def _request(self, plan: ShotPlan, take: Take, index: int) -> tuple[Request, int]:
        """Return the request for a part, and how many of its first frames are another file's."""
        film, shot = self.film, plan.shot
        num_frames, last = take.parts[index].num_frames, len(take.parts) - 1
        request = film.request(shot, take.seed, index, num_frames)
        shown = {"image": (shot.first_frame, 0), "last_image": (shot.last_frame, last)}
        pictures: dict[str, Any] = {
            option: picture_of(self.store.file(film.shots[each.shot]), each.frame)
            for option, (each, part) in shown.items()
            if isinstance(each, ShotFrame) and part == index
        }
        before, head = None, 0
        if index:
            before = self.store.path(take.parts[index - 1].key)
            head = sum(part.num_frames for part in take.parts[:index])
        elif shot.continue_from is not None:
            earlier = film.shots[shot.continue_from]
            before, head = self.store.file(earlier), earlier.num_frames
        if before is not None:
            seconds = float((head + num_frames) / film.fps)
            request = request.replace(prefix=str(before), seconds=seconds)
        return request.replace(**pictures), head

    def _choose(self, plan: ShotPlan, tell: OnEvent) -> None:
        engine = self.engine
        assert isinstance(engine, OpenedModel), "films are made by the engine's own models"
        scores = []
        for take in plan.takes:
            path = self.store.path(take.key)
            verified = tuple(verify_take(engine, path, take.parts))
            scores.append(score_take(take.seed, path, findings_of(path), verified))
        choice = best_take(scores)
        self.store.keep(plan.key, choice)
        best = next(take for take in choice["takes"] if take["seed"] == choice["seed"])
        tell({"event": "note", "shot": plan.shot.id,
              "text": f"shot {plan.shot.id}: of {len(scores)} takes that of seed "
                      f"{choice['seed']} is kept: {'; '.join(best['reasons'])}"})


def picture_of(path: Path, which: str) -> Frames:
    """Return the first or last frame of a file, uint8 [H, W, 3].

    Raises:
        InputError: it is missing or damaged.
    """
    with VideoReader(path) as reader:
        frames = iter(reader)
        frame = next(frames)
        if which == "last":
            for frame in frames:  # noqa: B007
                pass
    return frame


def _without_head(clip: Clip, head: int) -> Clip:
    """Return the frames after those of the shot that it goes on from."""
    assert isinstance(clip, ContinuedClip), "shots of a film have one size and rate"
    assert clip.head_frames == head, (clip.head_frames, head)
    return clip.added()


@dataclass(frozen=True, slots=True)
class TakeScore:
    """The quality of a take.

    Attributes:
        seed: of the take.
        path: name of its file.
        faults: kinds of findings that are faults.
        warnings: kinds of findings that may be meant.
        verified: the verifier's score for each prompt that names something it knows.
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
    """Return the choice among takes as JSON data: the seed, why, and every take's score."""
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
        verified: the verifier's scores; empty: the checks alone decide.
    """
    faults = tuple(each.kind for each in findings if each.severity == "fault")
    warnings = tuple(each.kind for each in findings if each.severity == "warning")
    reasons = [each.text for each in findings] or ["the checks found nothing"]
    for each in verified:
        verb = "sees" if each.is_enough else "misses"
        reasons.append(f"the verifier {verb} {each.names} ({each.score:.2f})")
    return TakeScore(seed, path.name, faults, warnings, tuple(verified), tuple(reasons))


def verify_take(model: OpenedModel, path: Path, parts: Sequence[Part]) -> Iterator[Verified]:
    """Yield the verifier's score for each prompt of a take that names something it knows.

    Args:
        model: that made it; nothing is scored without a verifier.
        path: the take's file.
        parts: the stretches that the file holds, each under a prompt.
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
