"""Journal of a generation: a stopped or killed one resumes from its last saved state.

    with journal.running(recipe, device):   # resume the job, or begin it
        journal.latents, journal.state      # results of an earlier process
        journal.on_step(info)               # after each step
        journal.keep_latents(latents)       # before decoding
    journal.segments(), journal.keep(...)   # while the clip is written
    journal.close()                         # remove the job's folder after the last write

The module `job` describes the files.

Axes: B batch, C latent channels, F latent frames, h w latent rows and columns.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from vidgen.core.errors import InputError, OutputError
from vidgen.core.protocols import SamplerState, StepInfo
from vidgen.media.clip import Clip
from vidgen.media.types import Samples, Segment
from vidgen.pipeline import recorded
from vidgen.pipeline.journal import job
from vidgen.pipeline.journal.job import JOB, MADE, SEGMENTS, SOUND, STATE, TRIED, WINDOWS

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from vidgen.core.request import Request

log = logging.getLogger(__name__)

PATIENCE = 50
"""Pause after a save, in durations of that save, so that saves take at most 2% of the time."""


class Journal:
    """Progress of one clip, saved next to its output.

    Args:
        output: the file or folder to be written; None: a journal that keeps nothing.
        resume: continue an existing job; start if none exists.
        overwrite: start again even if a job or an output exists.
        marks: `label` and `aigc` of the file, as `core.request.Saving.marks` returns them.

    Raises:
        OutputError: an unfinished job exists and neither option is set, or another process runs
            the job.
    """

    def __init__(
        self, output: str | os.PathLike[str] | None, *, resume: bool = False,
        overwrite: bool = False, marks: Mapping[str, str] | None = None,
    ) -> None:
        self.marks: Mapping[str, str] = marks or {}
        self.output = None if output is None else Path(output)
        self.folder = Path() if output is None else job.job_folder(output)
        self.resume, self.overwrite = resume, overwrite  # the job saves `overwrite`
        self.state: SamplerState | None = None  # last sampler state, on the device of `running`
        self.latents: Tensor | None = None  # finished ones, [1, C, F, h, w] float32, same device
        self.done: Tensor | None = None  # latents of finished windows, [1, C, n, h, w] float32, CPU
        self.num_windows = self._num_done = 0
        self.num_frames = self._num_segments = 0  # of the finished segments
        self._pending: dict[str, tuple[Mapping[str, Any], dict[str, Any]]] = {}  # unsaved files
        self.keeps = False  # True while progress is saved
        self._due_s = self._cost_s = 0.0
        self._is_worth_keeping = False
        self._lock: TextIO | None = None
        if self.unfinished and not (resume or overwrite):
            facts = job.job_facts(self.folder)
            if facts["running"]:
                raise self._in_use()
            raise OutputError(f"{self.output} is not finished ({job.progress_text(facts)}, kept in "
                              f"{self.folder}); --resume continues it, --overwrite starts again")

    @property
    def unfinished(self) -> bool:
        """True if a job exists that can be resumed."""
        return self.output is not None and (self.folder / JOB).is_file()

    @property
    def finished(self) -> bool:
        """True if the job to resume has its finished output."""
        from vidgen.media.probe import read_recipe

        if self.output is None or not (self.resume and self.output.exists()):
            return False
        if not self.unfinished:
            return True
        made = read_recipe(self.output)  # a kill may come between the file's write and `close`
        return made is not None and not recorded.decisive_differences(made, self.recipe or {})

    @property
    def recipe(self) -> dict[str, Any] | None:
        """The recipe of the job or the finished output, or None; InputError if damaged."""
        from vidgen.media.probe import read_recipe

        if not self.resume or self.output is None:
            return None
        if self.unfinished:
            recipe: dict[str, Any] = job.read_job(self.folder)["recipe"]
            return recipe
        return read_recipe(self.output) if self.output.exists() else None

    @contextmanager
    def running(self, recipe: dict[str, Any], device: torch.device | str = "cpu") -> Iterator[None]:
        """Resume or begin the job; save its state if an exception leaves the block.

        The earlier `state` and `latents` are put on `device`.

        Raises:
            InputError: the job is damaged, or of another request, model or version; the message
                names the differences.
            OutputError: another process works on the job.
        """
        if self.output is not None:
            self._resume_or_begin(recipe, device)
        try:
            yield
        except BaseException:
            self.pause()
            raise

    def take_state(self) -> SamplerState | None:
        """Return `state` and clear it, so that only one window resumes from it."""
        state, self.state = self.state, None
        return state

    def on_step(self, info: StepInfo) -> None:
        """Record a step; save its state if enough time passed since the last save."""
        if self.keeps:
            facts = {"step": info.step, "num_steps": info.num_steps, "num_done": self._num_done}
            self._keep_soon(STATE, job.state_tensors(info.state), facts)

    def keep_job(self) -> None:
        """Keep the job from now on, even if it holds only the recipe."""
        self._is_worth_keeping = True

    def keep_recipe(self, recipe: dict[str, Any]) -> None:
        """Replace the job's recipe by one with the values that were open until now."""
        if self.keeps:
            with self._saving():
                job.write_job(self.folder, self._marked(recipe), overwrite=self.overwrite)

    def keep_window(self, done: Tensor) -> None:
        """Save the newest window of all finished latents `done` [1, C, n, h, w]."""
        self.state = None
        self._pending.pop(STATE, None)
        if self.keeps:
            name, new = job.part_name(WINDOWS, self.num_windows), done[:, :, self._num_done :]
            self.keep_arrays(name, {"latents": new}, {"until": done.shape[2]})
            self.num_windows, self._num_done = self.num_windows + 1, done.shape[2]

    def keep_sound(self, samples: Samples, rate: int) -> None:
        """Save the clip's sound, float32 [N, c] at `rate` samples per second."""
        self.keep_arrays(SOUND, {"samples": samples}, {"rate": rate})

    def kept_sound(self) -> tuple[Samples, int] | None:
        """Return the saved sound, float32 [N, c], and its rate in Hz; None if none is saved."""
        kept = self.kept_arrays(SOUND, "samples")
        return None if kept is None else (kept[0]["samples"], kept[1]["rate"])

    def keep_arrays(self, name: str, arrays: Mapping[str, Any], facts: dict[str, Any]) -> None:
        """Save a file of arrays or tensors with JSON data `facts`."""
        if not self.keeps:
            return
        if any(getattr(each, "is_cuda", False) for each in arrays.values()):
            import torch

            torch.cuda.synchronize()  # don't count steps still running as the save's cost
        with self._saving():
            job.write_arrays(self.folder / name, arrays, facts)

    def kept_arrays(self, name: str, *names: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Return arrays and JSON data of a saved file, which must hold `names`; None if missing."""
        path = self.folder / name
        return job.read_arrays(path, *names) if self.keeps and path.is_file() else None

    def keep_latents(self, latents: Tensor, num_shown: int = 0) -> None:
        """Save the new finished latents [1, C, F, h, w] before they are decoded.

        `num_shown` frames of a continued clip exist already and aren't written again.
        """
        self.latents = latents
        self._pending.pop(STATE, None)
        self.keep_arrays(STATE, {"latents": latents}, {"finished": True, "num_shown": num_shown})

    def segments(self) -> Iterator[Segment]:
        """Yield the finished segments, from the clip's start."""
        kept = job.kept_paths(self.folder, SEGMENTS) if self.num_frames else ()
        return map(job.read_segment, kept)

    def keep(self, segment: Segment) -> None:
        """Save the next finished segment."""
        if self.keeps:
            name = job.part_name(SEGMENTS, self._num_segments)
            self._num_segments += 1
            self._keep_soon(name, *job.segment_arrays(segment))

    def pause(self) -> None:
        """Save unsaved progress and release the job; remove a job that has no result."""
        self._flush()
        if self.keeps and not (self._has_result or self.num_windows or self._is_worth_keeping):
            self.close()
        if self.keeps:
            self._count_segments()
        self._release()

    def close(self) -> None:
        """Remove the job of a written clip."""
        self.num_frames = self._num_segments = 0
        self._pending = {}
        if self.output is not None and self.folder.is_dir():
            shutil.rmtree(self.folder, ignore_errors=True)
        self._release()

    def clip(self) -> Clip:
        """Return the clip of a finished output."""
        assert self.output is not None
        job.sweep(self.folder)  # a kill may come between the file's write and `close`
        self.close()
        return Clip.from_file(self.output)

    def check(self, recipe: dict[str, Any]) -> None:
        """Raise InputError with the differences if the job or output is of another recipe."""
        old, place = self.recipe, self.folder if self.unfinished else self.output
        recipe = self._marked(recipe)
        if old is None:
            if self.finished:
                raise InputError(f"{place} holds no recipe, so it may be any clip; choose another "
                                 "name or give --overwrite")
            return
        if differ := recorded.decisive_differences(old, recipe):
            without = old.get("kernels") == "none" and recipe.get("kernels") != "none"
            how = " (VIDGEN_NATIVE=0 leaves the compiled kernels out)" if without else ""
            raise InputError(f"{place} is another clip's: {'; '.join(differ)}; repeat the options "
                             f"that it was made with{how}, choose another name, or start again "
                             "with --overwrite")

    def _marked(self, recipe: Mapping[str, Any]) -> dict[str, Any]:
        return {**recipe, **self.marks}

    @property
    def _has_result(self) -> bool:
        return any((self.folder / name).is_file() for name in (STATE, TRIED, MADE))

    def _resume_or_begin(self, recipe: dict[str, Any], device: torch.device | str) -> None:
        resumes = self.resume and self.unfinished
        self.check(recipe)
        if resumes:
            assert self.output is not None
            self.overwrite |= job.read_job(self.folder)["overwrite"]
            if self.output.exists() and not self.overwrite:
                raise OutputError(f"{self.output} exists and isn't the clip of {self.folder}; move "
                                  "it away, or give --overwrite to start again")
        self._due_s = time.monotonic()
        try:
            self.folder.mkdir(exist_ok=True)
            self._lock, self.keeps = job.lock_job(self.folder), True
            if self._lock is not None:
                weakref.finalize(self, self._lock.close)
            job.sweep(self.folder)
        except BlockingIOError:
            raise self._in_use() from None
        except OSError as error:
            self._give_up(error)
        if resumes:
            self._restore(device)
        elif self.keeps:
            with self._saving():
                job.begin_job(self.folder, self._marked(recipe), overwrite=self.overwrite)
            self._due_s += PATIENCE * self._cost_s  # the first save waits

    def _restore(self, device: torch.device | str) -> None:
        import torch

        windows = [torch.from_numpy(job.read_arrays(path, "latents")[0]["latents"])
                   for path in job.kept_paths(self.folder, WINDOWS)]
        self.done = torch.cat(windows, dim=2) if windows else None
        self.num_windows = len(windows)
        self._num_done = 0 if self.done is None else self.done.shape[2]
        self.state = self.latents = None
        if (path := self.folder / STATE).is_file():
            arrays, facts = job.read_arrays(path, "latents")
            tensors = {name: torch.from_numpy(each).to(device) for name, each in arrays.items()}
            if facts.get("finished"):
                self.latents = tensors["latents"]
            elif facts["num_done"] == self._num_done:  # otherwise of a window that finished later
                self.state = job.state_of(facts["step"], tensors)
        self._count_segments()

    def _in_use(self) -> OutputError:
        return OutputError(f"{self.output} is being made by another process; wait for it, or "
                           "choose another name")

    def _count_segments(self) -> None:
        kept = job.kept_paths(self.folder, SEGMENTS)
        self._num_segments = len(kept)
        self.num_frames = sum(job.read_segment(path).num_frames for path in kept)

    def _keep_soon(self, name: str, arrays: Mapping[str, Any], facts: dict[str, Any]) -> None:
        self._pending[name] = arrays, facts
        if time.monotonic() >= self._due_s:
            self._flush()

    def _flush(self) -> None:
        pending, self._pending = self._pending, {}
        for name, (arrays, facts) in pending.items():
            self.keep_arrays(name, arrays, facts)

    @contextmanager
    def _saving(self) -> Iterator[None]:
        """Time a save, which sets the pause until the next; a failed save ends the journal."""
        start = time.monotonic()
        try:
            yield
        except (OSError, OutputError) as error:
            self._give_up(error)
        self._cost_s = time.monotonic() - start
        self._due_s = max(self._due_s, start) + (PATIENCE + 1) * self._cost_s

    def _give_up(self, reason: object) -> None:
        """Continue without a journal, with a warning; the output itself may still fit."""
        self.keeps, self._pending = False, {}
        log.warning("progress of %s can't be saved any more, so a stop now loses more: %s",
                    self.output, reason)
        if not self._has_result:
            self.close()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()
        self._lock, self.keeps = None, False


def recall(request: Request, journals: Sequence[Journal]) -> Request:
    """Return the request with the seed and normalised words of its jobs; set their thread count.

    A thread count that this machine can't provide raises InputError.
    """
    for index, journal in enumerate(journals):
        recipe = journal.recipe or {}
        if request.seed is None and "plan" in recipe:
            request = request.replace(seed=recipe["plan"]["seed"] - index)
        if request.word_normalisation == "auto" and "word_normalisation" in recipe.get("plan", ()):
            known = recorded.recorded_word_normalisation(recipe["plan"])
            request = request.replace(word_normalisation=known)
        threads = recipe.get("machine", {}).get("threads")
        if threads and journal.unfinished:
            _use_threads(threads, journal)
    return request


def recalled_tiles(journals: Sequence[Journal]) -> str | None:
    """Return the option `tiles` of the first job that records it, or None."""
    plans = ((journal.recipe or {}).get("plan", {}) for journal in journals)
    return next((recorded.recorded_tiles(plan) for plan in plans if "tiles" in plan), None)


def journals_of(journal: Journal | Sequence[Journal] | None, count: int) -> Sequence[Journal]:
    """Return one journal per clip; raise InputError if their number isn't `count`."""
    if journal is None:
        return [Journal(None) for _ in range(count)]
    journals = [journal] if isinstance(journal, Journal) else journal
    if len(journals) != count:
        raise InputError(f"{len(journals)} journals for {count} clips; give one for each")
    return journals


def _use_threads(threads: int, journal: Journal) -> None:
    import torch

    if torch.get_num_threads() == threads:
        return
    torch.set_num_threads(threads)
    if torch.get_num_threads() != threads:
        raise InputError(f"{journal.folder} began with {threads} threads; this machine can't use "
                         "that many")
    log.warning("%s continues with %d threads, as it began", journal.output, threads)
