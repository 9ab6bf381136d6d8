"""A verb's output: its result on stdout, progress and notes on stderr, events as JSON lines.

An event is a dict with the key "event":
    progress   stage, done, total of a stage; fraction and eta_s of the whole run where an estimate
               exists; candidate and num_candidates (at most) of a clip; shot, shot_number,
               num_shots, take and num_takes in a film
    note       text: something was chosen or left out
    written    path: an output that is complete
Each line of the events file also has the Unix time at which it was written.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from vidgen.core.errors import InputError, OutputError
from vidgen.core.runtime import check_output, time_text

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

    from vidgen.media.clip import Clip
    from vidgen.pipeline.types import Clock, Estimate, Progress

LONG_S = 600.0
"""Runs that take longer are announced before they begin."""


class Report:
    """Output of a verb; call it with each event.

    Args:
        as_json: print the result as one JSON object instead of text.
        events: file for JSON lines, "-" for stdout, None for none.
    """

    def __init__(self, *, as_json: bool, events: str | None) -> None:
        if as_json and events == "-":
            raise InputError("--json and --events - both claim stdout; give --events a file")
        self.as_json, self._events_path = as_json, events
        self._stack = ExitStack()
        self._events: TextIO | None = None
        self._bars: Bars | None = None
        self._tasks: dict[str, TaskID] = {}
        self._clock: Clock | None = None
        self._notes = Counter[str]()

    def __enter__(self) -> Report:
        if self._events_path == "-":
            self._events = sys.stdout
        elif self._events_path:
            _check_events(Path(self._events_path))
        return self

    def __exit__(self, *_: object) -> None:
        self._print_counts()
        with suppress(OSError):  # the events could not be written, as was reported
            self._stack.close()

    def __call__(self, event: dict[str, Any]) -> None:
        """Show an event and write it to the file of events."""
        if event["event"] == "progress" and self._clock:
            stage, done, total = event["stage"], event["done"], event["total"]
            event = {**event, **self._clock(stage, done, total, event.get("clip", 1))}
        if self._events_path:
            self._write_event(event)
        if event["event"] == "note":
            self._notes[event["text"]] += 1
            if self._notes[event["text"]] == 1:
                self._print(f"note: {event['text']}")
        elif event["event"] == "progress" and sys.stderr.isatty():
            self._show(event)

    def note(self, text: str) -> None:
        """Report that something was chosen or left out."""
        self({"event": "note", "text": text})

    def progress(self, progress: Progress) -> None:
        """Report the progress of an engine."""
        self({"event": "progress", **vars(progress)})

    def written(self, path: str | os.PathLike[str]) -> None:
        """Report an output that is complete."""
        self({"event": "written", "path": str(path)})

    def _write_event(self, event: Mapping[str, Any]) -> None:
        """Write an event to the file; the first one truncates it."""
        name = "stdout" if self._events_path == "-" else str(self._events_path)
        if self._events is None:
            try:
                file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            except OSError as error:
                raise OutputError(f"{name} can't be written: {error.strerror}") from None
            opened = os.fdopen(file, "w", buffering=1, encoding="utf-8")
            self._events = self._stack.enter_context(opened)
        print_line(json.dumps({"time": time.time(), **event}), self._events, name)

    def expect(
        self, made: Estimate | Sequence[Estimate], *, num_clips: int = 1,
        done: Collection[int] = (), parallel: bool = False,
    ) -> None:
        """Report the fraction done and the time left, by `Clock`, and announce a long run."""
        from vidgen.pipeline.types import Clock

        each = made if isinstance(made, Sequence) else [made]
        self._clock = Clock(made, num_clips, done=done)
        for choice in dict.fromkeys(one.choice for one in each if one.choice):
            self.note(choice)
        if len(done) < num_clips and (text := long_text(each, parallel=parallel)):
            self.note(text)

    def expect_nothing(self) -> None:
        """Report no fraction and no time left from now on, for work without an estimate."""
        self._clock = None

    def save(
        self, clip: Clip, path: str, number: tuple[int, int] = (1, 1), *, overwrite: bool
    ) -> None:
        """Write a clip with progress; `number` is its number, and the number of clips."""
        event = {"event": "progress", "stage": f"write {path}", "total": clip.num_frames,
                "clip": number[0], "num_clips": number[1]}
        clip.save(path, overwrite=overwrite, on_frames=lambda done: self({**event, "done": done}))
        self.written(path)

    def result(self, data: dict[str, Any] | list[Any], text: str) -> None:
        """Print the result: `data` for programs or `text` for people."""
        if self._bars:
            self._bars.stop()
        self._print_counts()
        print_line(json.dumps(data) if self.as_json else text, sys.stdout, "stdout")

    def _print_counts(self) -> None:
        """Print each note that came more than once again, with its count."""
        for text, count in self._notes.items():
            if count > 1:
                self._print(f"note: {text} ({count} times)")
        self._notes.clear()

    def _print(self, line: str) -> None:
        if self._bars:
            self._bars.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=sys.stderr)

    def _show(self, event: Mapping[str, Any]) -> None:
        """Advance the bars of a worker and of all work, that of a film, or that of a stage."""
        done, total, eta_s = event["done"], event["total"], event.get("eta_s")
        percent, tried = round(100 * event.get("fraction", 0.0)), ""
        if event.get("candidate", 1) > 1:
            tried = f", candidate {event['candidate']}/{event['num_candidates']}"
        if "worker" in event:
            if "fraction" in event:
                self._advance("all", "all", percent, 100, eta_s, f"{percent}%")
            key = f"worker {event['worker']}"
            names = (str(event[name]) for name in ("shot", "name", "stage") if name in event)
            self._advance(key, f"{key}: {' '.join(names)}{tried}", done, total)
        elif "shot_number" in event:
            text = f"shot {event['shot_number']}/{event['num_shots']}"
            if event["num_takes"] > 1:
                text += f", take {event['take']}/{event['num_takes']}"
            self._advance("film", text + tried, percent, 100, eta_s, f"{percent}%")
        elif total > 1:
            many = event.get("num_clips", 1) > 1
            many = many and not event["stage"].startswith("write ")  # which names the clip
            stage = f"{event['stage']} {event['clip']}" if many else event["stage"]
            self._advance(stage, stage + tried, done, total, eta_s)

    def _advance(
        self, key: str, text: str, done: int, total: int, eta_s: float | None = None,
        count: str | None = None,
    ) -> None:
        """Show a bar with its description, its count, and the time left by `eta_s` or its speed."""
        if self._bars is None:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            bars = Progress(TextColumn("{task.description}", markup=False), BarColumn(),
                            "{task.fields[count]}", "{task.fields[left]}",
                            console=Console(stderr=True))
            self._bars = self._stack.enter_context(bars)
        if key not in self._tasks:
            self._tasks[key] = self._bars.add_task(text, total=total, count="", left="")
        left = self._bars.tasks[self._tasks[key]].time_remaining if eta_s is None else eta_s
        self._bars.update(
            self._tasks[key], completed=done, total=total, description=text,
            count=count or f"{done}/{total}",
            left="" if left is None or done == total else f"{time_text(left)} left")


def _check_events(path: Path) -> None:
    """Refuse a file for events that can't be written, or holds something else."""
    if not path.exists():
        check_output(path)
    if not path.is_file():
        return
    try:
        with path.open("r+", encoding="utf-8", errors="replace") as file:
            first = file.readline(100_000)
        is_event = not first or "event" in json.loads(first)
    except OSError as error:
        raise OutputError(f"{path} can't be written: {error.strerror}") from None
    except (ValueError, TypeError):
        is_event = False
    if not is_event:
        raise OutputError(f"{path} exists and holds no events; give --events another name")


def print_line(line: str, file: TextIO, name: str) -> None:
    """Print in one write, so that lines of several processes don't mix.

    Raises:
        BrokenPipeError: the reader closed the pipe.
        OutputError: the line can't be written, such as on a full disk.
    """
    try:
        file.write(f"{line}\n")
        file.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"{name} can't be written: {error.strerror}") from None


def elapsed_text(seconds: float) -> str:
    """Return a time with tenths of a second, or in minutes and hours: "3.4 s", "1 h 12 min"."""
    return f"{seconds:.1f} s" if seconds < 60 else time_text(seconds)


def long_text(made: Sequence[Estimate], *, parallel: bool = False) -> str | None:
    """Return a line with a run's time and frames; None for a short run.

    With `parallel` several clips are made at a time, in less than the sum of their times.
    """
    seconds = sum(each.total_s for each in made)
    if seconds <= LONG_S:
        return None
    frames = sum(each.kept_frames for each in made)
    guess = "" if all(each.measured for each in made) else (
        " (estimate for a typical machine; run vidgen plan to calibrate)")
    work = " of work, shared by the workers," if parallel else ""
    return f"this takes about {time_text(seconds)}{work} for {frames} frames{guess}"
