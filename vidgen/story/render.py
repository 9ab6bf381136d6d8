"""A film's shots rendered, by one worker or several, and the best take of each chosen."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from vidgen.core.errors import OutputError, VidgenError
from vidgen.core.protocols import OnEvent
from vidgen.pipeline.journal.job import job_folder, remove_job
from vidgen.pipeline.workers.scheduler import run_jobs
from vidgen.pipeline.workers.types import Job, Staff
from vidgen.story.film import ShotPlan
from vidgen.story.store import RenderedShot, ShotStore, findings_of
from vidgen.story.takes import ChoiceJob, PartJob, ShotWork

if TYPE_CHECKING:
    from vidgen.pipeline.types import AnyEngine, OnPreview


class Renderer:
    """Renders shots, one after the other or in parallel.

    Args:
        store: of the shots.
        engine: opens the model; called in each worker when it gets its first shot. For several
            workers it must be picklable: a function of a module, or functools.partial of one.
        tell: called with progress, notes and files, as events; `clip` counts the parts.
        overwrite: begin stopped shots again, instead of going on.
        staff: the workers; a single one is this process.
        on_preview: called with each part while it forms, where a single worker makes them.
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
            InputError: a shot that can't be made; names it.
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
                jobs.append(Job(key, part, (*needs, *before), self._name(plan)))
                self._forget(key)
            if not self.store.is_done(plan) and len(plan.takes) > 1 and plan.key not in given:
                takes = tuple(take.key for take in plan.takes)
                jobs.append(Job(plan.key, ChoiceJob(plan.shot.id), takes, self._name(plan)))
            keys = {job.key for job in jobs}
            given |= keys
            open_keys |= keys
            ahead.append((plan, plan.key in given))
            yield from jobs

    def _name(self, plan: ShotPlan) -> str:
        return self.film.script.where(plan.shot)

    def _forget(self, key: str) -> None:
        """Under `overwrite`, remove what was kept of a part that was stopped."""
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
            self.store.choice(plan) if len(plan.takes) > 1 else None, made,
        )


def keys_of(plan: ShotPlan) -> Iterator[str]:
    """Yield the addresses of all that belongs to a shot."""
    yield plan.key
    for take in plan.takes:
        yield from (part.key for part in take.parts)


def _named(error: Exception, name: str) -> Exception:
    """Return an error that names its shot."""
    kind = type(error) if isinstance(error, VidgenError) else VidgenError
    named = kind(f"{name}: {error}")
    named.__cause__ = error
    return named
