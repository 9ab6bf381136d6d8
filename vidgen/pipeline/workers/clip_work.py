"""Make a request into a file with a journal, here or in workers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidgen.core.errors import InputError
from vidgen.core.protocols import OnEvent
from vidgen.pipeline.journal.journal import Journal

if TYPE_CHECKING:
    from vidgen.core.request import Request
    from vidgen.media.clip import Clip
    from vidgen.pipeline.types import AnyEngine, Estimate, OnPreview


def write_request(
    engine: AnyEngine, request: Request, path: Path, on_event: OnEvent,
    extra: Mapping[str, Any], *, cut: Callable[[Clip], Clip] | None = None,
    on_preview: OnPreview | None = None, on_estimate: Callable[[Estimate], None] | None = None,
    marks: Mapping[str, str] | None = None,
) -> Clip:
    """Make a request's single clip and write it over an existing file; resume a stopped one.

    Args:
        on_event: called with progress events, and when the file is written.
        extra: further entries of each event.
        cut: returns the part of the clip to be written; None: all of it.
        on_preview, on_estimate: as in `Engine.generate`; the diffusers backend has neither.
        marks: marks of the file, as in `Journal`.
    """
    journal = Journal(path, resume=True, marks=marks)
    if journal.finished:  # a kill came after the write, before its event
        return journal.clip()
    given = {"on_preview": on_preview, "on_estimate": on_estimate}
    own: dict[str, Any] = {name: each for name, each in given.items() if each is not None}
    clip = engine.generate(
        request, journal=journal, **own,
        on_event=lambda p: on_event({
            "event": "progress", "stage": p.stage, "done": p.done, "total": p.total,
            "candidate": p.candidate, "num_candidates": p.num_candidates, **extra}),
    )
    assert not isinstance(clip, list)
    clip = clip if cut is None else cut(clip)
    total = clip.num_frames
    clip.save(path, overwrite=True, on_frames=lambda done: on_event(
        {"event": "progress", "stage": "write", "done": done, "total": total, **extra}))
    on_event({"event": "written", "path": str(path), **extra})
    return clip


@dataclass
class EngineWork:
    """Work with a model that each worker opens once."""

    open_engine: Callable[[], AnyEngine]  # picklable for several workers
    model_sha256: str | None = None  # required of every worker's model; None: any

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the engine, which each worker opens itself."""
        return {name: value for name, value in vars(self).items() if name != "engine"}

    @cached_property
    def engine(self) -> AnyEngine:
        """The engine of all jobs; InputError if its model isn't the scheduler's."""
        engine = self.open_engine()
        found = engine.folder.content_hash
        if self.model_sha256 not in (None, found):
            raise InputError(f"the model in {engine.folder.path} has the SHA-256 {found[:12]}..., "
                             f"the command's {str(self.model_sha256)[:12]}...; copy it again")
        return engine

    def close(self) -> None:
        """Close the engine, if this process opened one."""
        if (engine := vars(self).pop("engine", None)) is not None and hasattr(engine, "close"):
            engine.close()


class ClipWork(EngineWork):
    """Work of making requests into files."""

    def __call__(self, payload: tuple[Request, Path, Mapping[str, Any]], on_event: OnEvent) -> None:
        """Make one clip."""
        request, path, extra = payload
        write_request(self.engine, request, path, on_event, extra)
