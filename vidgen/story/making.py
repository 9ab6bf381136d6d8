"""What a worker does for a film: renders a part of a shot, or chooses among its takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidgen.core.protocols import OnEvent
from vidgen.media.checks import Finding, recorded
from vidgen.media.join import ContinuedClip
from vidgen.media.probe import read_recipe
from vidgen.media.video_reader import VideoReader
from vidgen.pipeline.model import OpenedModel
from vidgen.pipeline.workers.clip_work import EngineWork, write_request
from vidgen.story.elements import ShotFrame
from vidgen.story.takes import best_take, score_take, verify_take

if TYPE_CHECKING:
    from vidgen.core.request import Request
    from vidgen.media.clip import Clip
    from vidgen.media.types import Frames
    from vidgen.pipeline.diffusers_backend.engine import ForeignEngine
    from vidgen.pipeline.engine import Engine
    from vidgen.pipeline.types import OnPreview
    from vidgen.story.film import ShotPlan, Take
    from vidgen.story.render import Store


@dataclass(frozen=True, slots=True)
class PartJob:
    """A part of a take to be rendered.

    Attributes:
        shot: its id.
        take: which of the shot's.
        index: which of the take's parts.
        clip: number of the part among all that are rendered.
        note: said when it begins.
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
        open_engine: makes the model ready, once in each worker.
        model_sha256: of the model's files.
        store: where the shots lie.
        on_preview: shown each part while it forms; not where work is pickled.
    """

    def __init__(
        self, open_engine: Callable[[], Engine | ForeignEngine], model_sha256: str, store: Store,
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
        """What makes a part, and how many frames of its beginning are another file's."""
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
            request = replace(request, prefix=str(before), seconds=seconds)
        return replace(request, **pictures), head

    def _choose(self, plan: ShotPlan, tell: OnEvent) -> None:
        engine = self.engine
        assert isinstance(engine, OpenedModel), "films are made by the engine's own models"
        scores = []
        for take in plan.takes:
            path = self.store.path(take.key)
            verified = tuple(verify_take(engine, path, take.parts))
            scores.append(score_take(take.seed, path, findings_of(path), verified))
        choice = best_take(scores)
        self.store.keep_choice(plan, choice)
        best = next(take for take in choice["takes"] if take["seed"] == choice["seed"])
        tell({"event": "note", "shot": plan.shot.id,
              "text": f"shot {plan.shot.id}: of {len(scores)} takes that of seed "
                      f"{choice['seed']} is kept: {'; '.join(best['reasons'])}"})


def findings_of(path: Path) -> Sequence[Finding]:
    """What a file's checks found when it was written."""
    return recorded(read_recipe(path)) or []


def picture_of(path: Path, which: str) -> Frames:
    """The first or last frame of a file, uint8 [H, W, 3].

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
    """The frames behind those of the shot that it goes on from."""
    assert isinstance(clip, ContinuedClip), "shots of a film have one size and rate"
    assert clip.head_frames == head, (clip.head_frames, head)
    return clip.added()


