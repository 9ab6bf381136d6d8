"""Stopping work at a certain point of it, as whoever is told of progress may."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import pytest

from vidgen.core.errors import Cancelled
from vidgen.pipeline.journal.journal import Journal
from vidgen.pipeline.types import Progress, Stage

OnEvent = Callable[[Progress], None]


def stop_at(done: int, stage: Stage = "sample", clip: int = 1) -> OnEvent:
    """Stop where so much is done of a stage of a clip."""

    def on_event(progress: Progress) -> None:
        if (progress.clip, progress.stage, progress.done) == (clip, stage, done):
            raise Cancelled("stopped")

    return on_event


def stop_after(count: int, stages: Collection[Stage] = ("sample",)) -> OnEvent:
    """Stop after so many steps of some stages, of whichever candidate or window they are."""
    steps = list[int]()
    each = [noting(steps, stage) for stage in stages]

    def on_event(progress: Progress) -> None:
        before = len(steps)
        for note in each:
            note(progress)
        if before < len(steps) == count:
            raise Cancelled("stopped")

    return on_event


def noting(steps: list[int], stage: Stage = "sample") -> OnEvent:
    """Note what is done after each step of a stage; where the stage begins is no step."""
    told = list[int]()

    def on_event(progress: Progress) -> None:
        if progress.stage == stage:
            if told and progress.done > told[-1]:
                steps.append(progress.done)
            told.append(progress.done)

    return on_event


def interrupt_behind(frames: int) -> Callable[[int], None]:
    """Interrupt the writing of a clip, as Ctrl-C does, once more than so many frames are there."""

    def on_frames(count: int) -> None:
        if count > frames:
            raise KeyboardInterrupt

    return on_frames


def interrupt_in_journal(patch: pytest.MonkeyPatch, method: str, calls: int) -> None:
    """Interrupt behind so many calls of a method of `Journal`, each of which is done."""
    done, left = getattr(Journal, method), [calls]

    def interrupted(self: Journal, *given: Any) -> Any:
        result = done(self, *given)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return result

    patch.setattr(Journal, method, interrupted)
