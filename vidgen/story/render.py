"""Shots rendered into a folder of files by address: what is there is never made twice.

    FILM.shots/
        ADDRESS.mp4              a take of a shot, or a stretch of one that has several prompts
        ADDRESS.json             of several takes: which was chosen, and why
        ADDRESS.mp4.vidgen-job/  one that was stopped, which goes on
        shots.json               the film's shots as they were rendered last, for who joins them

All of it may be removed at any time: what is missing is rendered again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidgen.core.config import dump
from vidgen.core.errors import InputError
from vidgen.core.runtime import atomic_write
from vidgen.media.checks import Finding, as_data, recorded
from vidgen.media.join import ContinuedClip
from vidgen.media.read import VideoReader, read_recipe
from vidgen.pipeline.job import job_folder, remove_job
from vidgen.pipeline.journal import Journal
from vidgen.story.elements import ShotFrame
from vidgen.story.film import FilmPlan, ShotPlan, Take
from vidgen.story.takes import best_take, judge_for, score_take

if TYPE_CHECKING:
    from vidgen.core.request import Request
    from vidgen.media.clip import Clip
    from vidgen.media.encode import Frames
    from vidgen.pipeline.video import Engine
    from vidgen.story.script import Shot
    from vidgen.toybox.judge import Judge

INDEX = "shots.json"
INDEX_VERSION = 1
Tell = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class RenderedShot:
    """A shot that is there.

    Attributes:
        shot: as it is written, with the film's transition where it has none of its own, and with
            all that the picture doesn't show yet.
        path: its file, without sound.
        num_frames: of it.
        fps: its rate.
        size: (width, height).
        seed: of the take.
        findings: of the checks.
        choice: which take was chosen and why; None where there was one.
        made: whether it was rendered now.
    """

    shot: Shot
    path: Path
    num_frames: int
    fps: Fraction
    size: tuple[int, int]
    seed: int
    findings: tuple[Finding, ...] = ()
    choice: Mapping[str, Any] | None = None
    made: bool = False

    def as_data(self) -> dict[str, Any]:
        """JSON data: what was made, and in `shot` the script's fields."""
        return {
            "id": self.shot.id, "path": str(self.path), "num_frames": self.num_frames,
            "fps": str(self.fps), "duration_s": float(self.num_frames / self.fps),
            "width": self.size[0], "height": self.size[1], "seed": self.seed, "made": self.made,
            "checks": as_data(self.findings), "choice": self.choice, "shot": dump(self.shot),
        }


@dataclass(frozen=True)
class Store:
    """The folder that a film's shots lie in.

    Args:
        folder: made when something is written.
        film: whose shots they are.
    """

    folder: Path
    film: FilmPlan

    def path(self, key: str) -> Path:
        """The file of a part."""
        return self.folder / f"{key}{self.film.suffix}"

    def missing(self, plan: ShotPlan) -> list[tuple[Take, int]]:
        """Parts of a shot that are yet to be rendered: the take, and which part it is.

        A part that is there stands for those before it.
        """
        left = []
        for take in plan.takes:
            there = [n for n, part in enumerate(take.parts) if self.path(part.key).is_file()]
            begin = there[-1] + 1 if there else 0
            left += [(take, index) for index in range(begin, len(take.parts))]
        return left

    def choice(self, plan: ShotPlan) -> dict[str, Any] | None:
        """What was chosen of several takes; None where nothing was yet, or it can't be read."""
        try:
            choice = json.loads((self.folder / f"{plan.key}.json").read_text("utf-8"))
            return choice if choice["seed"] in [take.seed for take in plan.takes] else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def keep_choice(self, plan: ShotPlan, choice: Mapping[str, Any]) -> None:
        """Write down a choice."""
        atomic_write(self.folder / f"{plan.key}.json", json.dumps(choice, indent=1).encode())

    def take(self, plan: ShotPlan) -> Take:
        """The take that stands for a shot whose takes are there."""
        choice = self.choice(plan)
        if choice is None:
            return plan.takes[0]
        return next(take for take in plan.takes if take.seed == choice["seed"])

    def file(self, plan: ShotPlan) -> Path:
        """The file of a shot whose takes are there."""
        return self.path(self.take(plan).key)

    def is_done(self, plan: ShotPlan) -> bool:
        """Whether nothing is left to do for a shot."""
        chosen = len(plan.takes) == 1 or self.choice(plan) is not None
        return chosen and not self.missing(plan)

    def write_index(self, rendered: Sequence[RenderedShot]) -> Path:
        """Write down the film's shots, for who joins them and for people."""
        film = self.film
        data = {
            "version": INDEX_VERSION, "script": str(film.script.path),
            "title": film.script.project.title, "fps": str(film.fps), "size": list(film.size),
            "characters": dump(film.script.characters), "scenes": dump(film.script.scenes),
            "shots": [each.as_data() for each in rendered],
        }
        atomic_write(self.folder / INDEX, json.dumps(data, indent=1).encode())
        return self.folder / INDEX


class Renderer:
    """Renders shots one after the other with one engine.

    Args:
        store: where they lie.
        engine: makes a model ready; called when the first shot has to be rendered.
        tell: told of progress, notes and files, as events; `clip` counts the parts to be rendered.
        overwrite: start those that were stopped anew, instead of going on.
    """

    def __init__(
        self, store: Store, engine: Callable[[], Engine], tell: Tell, *, overwrite: bool = False
    ) -> None:
        self.store, self.film, self.tell = store, store.film, tell
        self._open, self.overwrite = engine, overwrite
        self._number = 0

    @cached_property
    def engine(self) -> Engine:
        """The one engine of all shots."""
        return self._open()

    @cached_property
    def judge(self) -> Judge | None:
        """Who judges takes beside the checks."""
        folder = judge_for(self.film.folder)
        return None if folder is None else folder.load()

    def render(self, plans: Sequence[ShotPlan]) -> Iterator[RenderedShot]:
        """Render what isn't there yet, in this order; each is told of when it is there.

        Raises:
            InputError: a shot that can't be made; names it.
        """
        self.store.folder.mkdir(parents=True, exist_ok=True)
        for number, plan in enumerate(plans, 1):
            made = not self.store.is_done(plan)
            if made:
                self.tell({"event": "note", "text": f"shot {plan.shot.id}, {number} of "
                           f"{len(plans)}", "shot": plan.shot.id})
            for take, index in self.store.missing(plan):
                try:
                    self._make(plan, take, index)
                except InputError as error:
                    raise InputError(f"{self.film.script.where(plan.shot)}: {error}") from error
            if len(plan.takes) > 1 and self.store.choice(plan) is None:
                self._choose(plan)
            yield self._rendered(plan, made=made)

    def _make(self, plan: ShotPlan, take: Take, index: int) -> None:
        path, shot = self.store.path(take.parts[index].key), plan.shot
        request, head = self._request(plan, take, index)
        journal = Journal(path, resume=not self.overwrite, overwrite=self.overwrite)
        self._number += 1
        told = {"clip": self._number, "shot": shot.id, "seed": take.seed}
        clip = self.engine.generate(
            request, journal=journal,
            on_event=lambda p: self.tell({"event": "progress", "stage": p.stage, "done": p.done,
                                          "total": p.total, **told}),
        )
        assert not isinstance(clip, list)
        if head and index == 0:
            clip = _without_head(clip, head)
        self._save(clip, path, told)

    def _save(self, clip: Clip, path: Path, told: Mapping[str, Any]) -> None:
        def on_frames(done: int) -> None:
            self.tell({"event": "progress", "stage": "write", "done": done,
                       "total": clip.num_frames, **told})

        clip.save(path, overwrite=True, on_frames=on_frames)
        self.tell({"event": "written", "path": str(path), "shot": told["shot"]})

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

    def _choose(self, plan: ShotPlan) -> None:
        prompts = [part.prompt for part in plan.takes[0].parts]
        scores = []
        for take in plan.takes:
            path = self.store.path(take.key)
            scores.append(score_take(take.seed, path, _findings(path), prompts, self.judge))
        choice = best_take(scores)
        self.store.keep_choice(plan, choice)
        best = next(take for take in choice["takes"] if take["seed"] == choice["seed"])
        self.tell({"event": "note", "shot": plan.shot.id,
                   "text": f"shot {plan.shot.id}: of {len(scores)} takes that of seed "
                           f"{choice['seed']} is kept: {'; '.join(best['reasons'])}"})

    def _rendered(self, plan: ShotPlan, *, made: bool) -> RenderedShot:
        take = self.store.take(plan)
        path = self.store.path(take.key)
        if job_folder(path).is_dir():  # a kill came after the file, before the end of its job
            with suppress(OSError):
                remove_job(job_folder(path))
        findings = tuple(_findings(path))
        for finding in findings if made and len(plan.takes) == 1 else ():
            self.tell({"event": "note", "text": f"shot {plan.shot.id}: {finding.text}",
                       "shot": plan.shot.id})
        shot = replace(plan.shot, transition=self.film.script.option(plan.shot, "transition"))
        return RenderedShot(
            shot, path, plan.num_frames, self.film.fps, self.film.size, take.seed, findings,
            self.store.choice(plan) if len(plan.takes) > 1 else None, made,
        )


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


def _findings(path: Path) -> list[Finding]:
    return recorded(read_recipe(path)) or []
