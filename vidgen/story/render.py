"""A film's shots rendered, by one worker or several, and the best take of each chosen.

Where the model's folder has a verifier, it scores each take for what the prompts name.
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

from vidgen.core.errors import Cancelled, OutputError, VidgenError
from vidgen.core.protocols import OnEvent
from vidgen.media.join import ContinuedClip
from vidgen.media.video_reader import VideoReader
from vidgen.models.tokenizer import normalise_words
from vidgen.pipeline.best_of_n import VERIFIER, Verified, verify_video
from vidgen.pipeline.codec import as_video
from vidgen.pipeline.journal.job import job_folder, remove_job
from vidgen.pipeline.model import OpenedModel
from vidgen.pipeline.workers.clip_work import EngineWork, write_request
from vidgen.pipeline.workers.scheduler import run_jobs
from vidgen.pipeline.workers.types import Job, WorkerOptions
from vidgen.story.elements import ShotFrame
from vidgen.story.film import Part, ShotPlan, Take
from vidgen.story.store import RenderedShot, ShotStore, TakeScore, findings_of, remember

if TYPE_CHECKING:
    from vidgen.core.request import Request
    from vidgen.media.clip import Clip
    from vidgen.media.types import Frames
    from vidgen.pipeline.types import AnyEngine, OnPreview


def render_film(
    work: ShotWork, plans: Sequence[ShotPlan], on_event: OnEvent, *, overwrite: bool = False,
    workers: WorkerOptions | None = None,
) -> Iterator[RenderedShot]:
    """Render missing shots; yield each shot in this order as soon as it is complete.

    Args:
        on_event: called with progress, notes and files, as events; `clip` counts the parts.
        overwrite: restart stopped shots instead of resuming them.
        workers: the workers; a single one is this process.

    Raises:
        InputError: a shot that can't be made, with its place in the script.
    """
    store, made = work.store, list[RenderedShot]()
    store.folder.mkdir(parents=True, exist_ok=True)
    ahead: deque[tuple[ShotPlan, bool]] = deque()
    open_keys = set[str]()
    try:
        for outcome in run_jobs(_jobs(store, plans, ahead, open_keys, overwrite=overwrite), work,
                                workers or WorkerOptions(), on_event):
            if outcome.error is not None:
                raise _named(outcome.error, outcome.job.name)
            open_keys.discard(outcome.job.key)
            while ahead and open_keys.isdisjoint(_keys_of(ahead[0][0])):
                made.append(_rendered(store, *ahead.popleft(), on_event))
                yield made[-1]
        for plan, is_new in ahead:
            made.append(_rendered(store, plan, is_new, on_event))
            yield made[-1]
    finally:
        remember(made)


def _jobs(
    store: ShotStore, plans: Sequence[ShotPlan], ahead: deque[tuple[ShotPlan, bool]],
    open_keys: set[str], *, overwrite: bool,
) -> Iterator[Job]:
    """Yield a job for each missing part, after those that it needs.

    Shots that are equal in all that shapes them have one address, so one job.
    """
    given, shots = set[str](), store.film.shots
    compared = {take.key for plan in plans if len(plan.takes) > 1 for take in plan.takes}
    for number, plan in enumerate(plans, 1):
        is_first = True
        needs = tuple(take.key for name in plan.shot.needs for take in shots[name].takes)
        for take, index in store.missing(plan):
            if (key := take.parts[index].key) in given:
                continue
            given.add(key)
            part = PartJob(plan.shot.id, number, len(plans), plan.takes.index(take), index,
                           len(given), key in compared, is_first)
            is_first = False
            before = (take.parts[index - 1].key,) if index else ()
            if overwrite:
                _forget(store.path(key))
            open_keys.add(key)
            yield Job(key, part, (*needs, *before), store.film.script.where(plan.shot))
        ahead.append((plan, not given.isdisjoint(take.key for take in plan.takes)))


def _forget(path: Path) -> None:
    """Remove the journal of a part that was stopped."""
    try:
        if (folder := job_folder(path)).is_dir():
            remove_job(folder)
    except BlockingIOError:
        raise OutputError(f"{path} is being made by another process; wait for it") from None


def _rendered(store: ShotStore, plan: ShotPlan, is_new: bool, on_event: OnEvent) -> RenderedShot:
    film, take, choice, name = store.film, store.take(plan), store.choice(plan), plan.shot.id
    path = store.path(take.key)
    if job_folder(path).is_dir():  # a kill left the job of a complete file
        with suppress(OSError):
            remove_job(job_folder(path))
    findings = tuple(findings_of(path))
    notes = [finding.text for finding in findings]
    if choice is not None:
        best = next(take for take in choice["takes"] if take["seed"] == choice["seed"])
        index = [each.seed for each in plan.takes].index(choice["seed"])
        notes = [f"kept take seed {choice['seed']} ({index + 1} of {len(plan.takes)}): "
                 f"{'; '.join(best['reasons'])}"]
    for text in notes if is_new else ():
        on_event({"event": "note", "text": f"shot {name}: {text}", "shot": name})
    shot = replace(plan.shot, transition=film.script.option(plan.shot, "transition"))
    return RenderedShot(shot, path, plan.num_frames, film.fps, film.size, take.seed, findings,
                        choice, is_new)


def _keys_of(plan: ShotPlan) -> Iterator[str]:
    return (part.key for take in plan.takes for part in take.parts)


def _named(error: Exception, name: str) -> Exception:
    if isinstance(error, Cancelled):  # its text is a reason that callers compare
        return error
    kind = type(error) if isinstance(error, VidgenError) else VidgenError
    named = kind(f"{name}: {error}")
    named.__cause__ = error
    return named


@dataclass(frozen=True, slots=True)
class PartJob:
    """A part of a take to be rendered."""

    shot: str  # its id
    number: int  # of the shot, from 1
    num_shots: int
    take: int  # index among the shot's takes
    index: int  # among the take's parts
    clip: int  # number of the part among all that are rendered
    is_compared: bool  # whether it ends a take that is one of several
    is_first: bool  # whether the shot begins with it


class ShotWork(EngineWork):
    """Renders parts of a film's shots into its store, and scores takes where a shot has several.

    Args:
        open_engine: opens the model, once in each worker; picklable for several workers.
        on_preview: called with each part while it forms; not where work is pickled.
    """

    def __init__(
        self, open_engine: Callable[[], AnyEngine], store: ShotStore,
        on_preview: OnPreview | None = None,
    ) -> None:
        super().__init__(open_engine, store.film.folder.content_hash)
        self.store, self.film, self.on_preview = store, store.film, on_preview

    def __call__(self, payload: PartJob, on_event: OnEvent) -> None:
        """Render one part; raise InputError if it can't be made."""
        plan = self.film.shots[payload.shot]
        if payload.is_first:
            text = f"shot {payload.shot}, {payload.number} of {payload.num_shots}"
            on_event({"event": "note", "text": text, "shot": payload.shot})
        take = plan.takes[payload.take]
        request, head = self._request(plan, take, payload.index)
        facts = {"clip": payload.clip, "shot": payload.shot, "shot_number": payload.number,
                 "num_shots": payload.num_shots, "take": payload.take + 1,
                 "num_takes": len(plan.takes), "seed": take.seed}
        cut = partial(_without_head, head=head) if head and not payload.index else None
        path = self.store.path(take.parts[payload.index].key)
        write_request(self.engine, request, path, on_event, facts, cut=cut,
                      on_preview=self.on_preview)
        if payload.is_compared:
            engine = self.engine
            assert isinstance(engine, OpenedModel), "films are made by the engine's own models"
            verified = tuple(verify_take(engine, path, take.parts))
            self.store.keep(take.key, asdict(score_take(take.seed, path, verified)))

    def _request(self, plan: ShotPlan, take: Take, index: int) -> tuple[Request, int]:
        """Return the request for a part, and the number of its first frames in another file."""
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


def score_take(seed: int, path: Path, verified: Sequence[Verified] = ()) -> TakeScore:
    """Score a take by the findings of its checks, and by the verifier where there is one."""
    findings = findings_of(path)
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
            prompt = normalise_words(part.prompt, model.tokenizer.replacements(part.prompt))
            verified = verify_video(model.loader, (as_video(f[None]) for f in whole), prompt)
            for _ in stretch:  # frames that fill no latent frame
                pass
            if verified is not None:
                yield verified
