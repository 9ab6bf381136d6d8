"""A film's shots rendered, by one worker or several, and the best take of each chosen.

The best take has the fewest faults in its file's checks. Where the model's folder has a verifier,
it then scores each take for what the prompts name; otherwise the checks alone decide. Among equals
the first take is kept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidgen.core.errors import OutputError, VidgenError
from vidgen.core.protocols import OnEvent
from vidgen.media.checks import Finding
from vidgen.media.join import ContinuedClip
from vidgen.media.video_reader import VideoReader
from vidgen.models.tokenizer import read_as
from vidgen.pipeline.best_of_n import VERIFIER, Verified, verify_video
from vidgen.pipeline.codec import as_video
from vidgen.pipeline.journal.job import job_folder, remove_job
from vidgen.pipeline.model import OpenedModel
from vidgen.pipeline.workers.clip_work import EngineWork, write_request
from vidgen.pipeline.workers.scheduler import run_jobs
from vidgen.pipeline.workers.types import Job, Staff
from vidgen.story.elements import ShotFrame
from vidgen.story.film import Part, ShotPlan, Take
from vidgen.story.store import RenderedShot, ShotStore, findings_of

if TYPE_CHECKING:
    from vidgen.core.request import Request
    from vidgen.media.clip import Clip
    from vidgen.media.types import Frames
    from vidgen.pipeline.types import AnyEngine, OnPreview


class Renderer:
    """Renders shots, one after the other or in parallel.

    Args:
        engine: opens the model, once in each worker; picklable for several workers.
        tell: called with progress, notes and files, as events; `clip` counts the parts.
        overwrite: begin stopped shots again, instead of resuming them.
        staff: the workers; a single one is this process.
        on_preview: called with each part while it forms, for a single worker.
    """

    def __init__(
        self, store: ShotStore, engine: Callable[[], AnyEngine], tell: OnEvent, *,
        overwrite: bool = False, staff: Staff | None = None,
        on_preview: OnPreview | None = None,
    ) -> None:
        self.store, self.film, self.tell = store, store.film, tell
        self.overwrite, self.staff = overwrite, staff or Staff()
        self.work = ShotWork(engine, self.film.folder.content_hash, store, on_preview)

    def close(self) -> None:
        """Close the engine, if this process opened one."""
        self.work.close()

    def render(self, plans: Sequence[ShotPlan]) -> Iterator[RenderedShot]:
        """Render missing shots; yield each shot in this order, as soon as it exists.

        Raises:
            InputError: a shot that can't be made, with its place in the script.
        """
        self.store.folder.mkdir(parents=True, exist_ok=True)
        ahead: deque[tuple[ShotPlan, bool]] = deque()
        open_keys = set[str]()
        for outcome in run_jobs(self._jobs(plans, ahead, open_keys), self.work, self.staff,
                                self.tell):
            if outcome.error is not None:
                raise _named(outcome.error, outcome.job.name)
            open_keys.discard(outcome.job.key)
            while ahead and open_keys.isdisjoint(keys_of(ahead[0][0])):
                plan, made = ahead.popleft()
                yield self._rendered(plan, made=made)
        for plan, made in ahead:
            yield self._rendered(plan, made=made)

    def _jobs(
        self, plans: Sequence[ShotPlan], ahead: deque[tuple[ShotPlan, bool]], open_keys: set[str]
    ) -> Iterator[Job]:
        """Yield a job for each missing part and for each choice, after those that it needs.

        Shots that are equal in all that shapes them have one address, so one job.
        """
        given, clip = set[str](), 0
        for number, plan in enumerate(plans, 1):
            jobs = list[Job]()
            where = self.film.script.where(plan.shot)
            text = f"shot {plan.shot.id}, {number} of {len(plans)}"
            needs = tuple(self.film.shots[name].key for name in plan.shot.needs)
            for take, index in self.store.missing(plan):
                key = take.parts[index].key
                if key in given:
                    continue
                clip += 1
                part = PartJob(plan.shot.id, plan.takes.index(take), index, clip,
                               "" if jobs else text)
                before = (take.parts[index - 1].key,) if index else ()
                jobs.append(Job(key, part, (*needs, *before), where))
                self._forget(key)
            if not self.store.is_done(plan) and len(plan.takes) > 1 and plan.key not in given:
                takes = tuple(take.key for take in plan.takes)
                jobs.append(Job(plan.key, ChoiceJob(plan.shot.id), takes, where))
            keys = {job.key for job in jobs}
            given |= keys
            open_keys |= keys
            ahead.append((plan, plan.key in given))
            yield from jobs

    def _forget(self, key: str) -> None:
        """Under `overwrite`, remove the journal of a part that was stopped."""
        folder = job_folder(path := self.store.path(key))
        if not (self.overwrite and folder.is_dir()):
            return
        try:
            remove_job(folder)
        except BlockingIOError:
            raise OutputError(f"{path} is being made by another process; wait for it") from None

    def _rendered(self, plan: ShotPlan, *, made: bool) -> RenderedShot:
        take = self.store.take(plan)
        path = self.store.path(take.key)
        if job_folder(path).is_dir():  # a kill came after the file, before the end of its job
            with suppress(OSError):
                remove_job(job_folder(path))
        findings = tuple(findings_of(path))
        for finding in findings if made and len(plan.takes) == 1 else ():
            self.tell({"event": "note", "text": f"shot {plan.shot.id}: {finding.text}",
                       "shot": plan.shot.id})
        shot = replace(plan.shot, transition=self.film.script.option(plan.shot, "transition"))
        return RenderedShot(
            shot, path, plan.num_frames, self.film.fps, self.film.size, take.seed, findings,
            self.store.choice(plan) if len(plan.takes) > 1 else None, made)


def keys_of(plan: ShotPlan) -> Iterator[str]:
    """Yield the addresses of all that belongs to a shot."""
    yield plan.key
    for take in plan.takes:
        yield from (part.key for part in take.parts)


def _named(error: Exception, name: str) -> Exception:
    kind = type(error) if isinstance(error, VidgenError) else VidgenError
    named = kind(f"{name}: {error}")
    named.__cause__ = error
    return named


@dataclass(frozen=True, slots=True)
class PartJob:
    """A part of a take to be rendered."""

    shot: str  # its id
    take: int  # index among the shot's takes
    index: int  # among the take's parts
    clip: int  # number of the part among all that are rendered
    note: str = ""  # reported when it begins


@dataclass(frozen=True, slots=True)
class ChoiceJob:
    """A shot whose best take is to be chosen."""

    shot: str


class ShotWork(EngineWork):
    """Renders parts of a film's shots into its store, and chooses among takes.

    Args:
        open_engine: opens the model, once in each worker.
        on_preview: called with each part while it forms; not where work is pickled.
    """

    def __init__(
        self, open_engine: Callable[[], AnyEngine], model_sha256: str, store: ShotStore,
        on_preview: OnPreview | None = None,
    ) -> None:
        super().__init__(open_engine, model_sha256)
        self.store, self.film, self.on_preview = store, store.film, on_preview

    def __call__(self, payload: PartJob | ChoiceJob, tell: OnEvent) -> None:
        """Do one job; raise InputError for a part that can't be made."""
        plan = self.film.shots[payload.shot]
        if isinstance(payload, ChoiceJob):
            self._choose(plan, tell)
            return
        if payload.note:
            tell({"event": "note", "text": payload.note, "shot": payload.shot})
        take = plan.takes[payload.take]
        request, head = self._request(plan, take, payload.index)
        facts = {"clip": payload.clip, "shot": payload.shot, "seed": take.seed}
        cut = partial(_without_head, head=head) if head and not payload.index else None
        path = self.store.path(take.parts[payload.index].key)
        write_request(self.engine, request, path, tell, facts, cut, self.on_preview)

    def _request(self, plan: ShotPlan, take: Take, index: int) -> tuple[Request, int]:
        """Return the request for a part, and how many of its first frames another file holds."""
        film, shot = self.film, plan.shot
        num_frames, last = take.parts[index].num_frames, len(take.parts) - 1
        request = film.request(shot, take.seed, index, num_frames)
        shown = {"image": (shot.first_frame, 0), "last_image": (shot.last_frame, last)}
        pictures: dict[str, Any] = {
            option: picture_of(self.store.file(film.shots[each.shot]), each.frame)
            for option, (each, part) in shown.items()
            if isinstance(each, ShotFrame) and part == index}
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
    assert isinstance(clip, ContinuedClip), "shots of a film have one size and rate"
    assert clip.head_frames == head, (clip.head_frames, head)
    return clip.added()


@dataclass(frozen=True, slots=True)
class TakeScore:
    """The quality of a take."""

    seed: int
    path: str  # name of its file
    faults: tuple[str, ...]  # kinds of findings that are faults
    warnings: tuple[str, ...]  # kinds of findings that may be meant
    # the verifier's score for each prompt that names something it knows
    verified: tuple[Verified, ...]
    reasons: tuple[str, ...]  # the same in sentences

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
    """Score a take by the findings of its checks, and by the verifier where there is one."""
    faults = tuple(each.kind for each in findings if each.severity == "fault")
    warnings = tuple(each.kind for each in findings if each.severity == "warning")
    reasons = [each.text for each in findings] or ["the checks found nothing"]
    for each in verified:
        verb = "sees" if each.is_enough else "misses"
        reasons.append(f"the verifier {verb} {each.names} ({each.score:.2f})")
    return TakeScore(seed, path.name, faults, warnings, tuple(verified), tuple(reasons))


def verify_take(model: OpenedModel, path: Path, parts: Sequence[Part]) -> Iterator[Verified]:
    """Yield the verifier's score for each prompt of a take that names something it knows.

    Without a verifier nothing is scored. `parts` are the stretches of the file, each of a prompt.
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
            verified = verify_video(model.loader, (as_video(f[None]) for f in whole), prompt)
            for _ in stretch:  # frames that fill no latent frame
                pass
            if verified is not None:
                yield verified
