"""Outputs of a command: names, seeds, journals, and results of an earlier run."""

from __future__ import annotations

import os
import secrets
import shutil
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidgen.cli.report import Report
from vidgen.core.errors import InputError, OutputError
from vidgen.core.request import Request, Saving
from vidgen.core.runtime import ATTENTION_VARIABLE, attention_by, slug
from vidgen.media.checks import as_data, verdict
from vidgen.pipeline.journal.job import job_facts, progress_text
from vidgen.pipeline.journal.journal import Journal

if TYPE_CHECKING:
    from vidgen.media.clip import Clip

SAME_COMMAND = "run the same command with --resume to continue"


class OutputJournal(Journal):
    """Journal of an output that reports whether the clip is finished already, or resumes.

    Args:
        resume: continue the output's job if it is of the same clip.
        overwrite: start over if the output or its job is of another clip.
        prompt: with both, start over if the job is of another prompt.

    Attributes:
        is_done: whether the output is this very clip already, set by `check`.

    Raises:
        OutputError: the output has an unfinished job and neither option is given, or another
            process is working on it.
    """

    def __init__(
        self, output: str, report: Report, *, resume: bool = False, overwrite: bool = False,
        marks: Mapping[str, str] | None = None, prompt: str | None = None,
    ) -> None:
        super().__init__(output, resume=resume, overwrite=overwrite, marks=marks)
        self.is_done, self._is_reported = False, False
        self._name, self._report = output, report
        if resume and overwrite:
            try:
                plan = (self.recipe or {}).get("plan", {})
                self.resume = prompt in (None, plan.get("prompt", prompt))
            except InputError:  # a damaged job
                self.resume = False

    def check(self, recipe: dict[str, Any]) -> None:
        """Check the recipe, then report a finished or resumed output.

        Raises:
            InputError: the output is of another clip, and `overwrite` is False.
        """
        try:
            super().check(recipe)
        except InputError:
            if not self.overwrite:
                raise
            self.resume = False
        self.is_done = self.finished
        if self._is_reported:
            return
        self._is_reported = True
        if self.is_done:
            self._report.note(f"{self._name} is done already")
        elif self.resume and self.unfinished and not (facts := job_facts(self.folder))["running"]:
            self._report.note(f"{self._name} resumes: {progress_text(facts)}")


def output_names(output: str | None, request: Request, count: int = 1) -> list[str]:
    """Return the clips' outputs: the name itself for one, name-1, name-2, ... for several."""
    if output is None:
        output = f"{slug(request.prompt)}-{request.seed}.mp4"
    if count == 1:
        return [output]
    tail = "/" if output.endswith("/") else Path(output).suffix
    stem = output.removesuffix(tail)
    return [f"{stem}-{number}{tail}" for number in range(1, count + 1)]


def choose_seed(args: Namespace, request: Request, saving: Saving, report: Report) -> int:
    """Return the first seed of the outputs that --resume continues, or a new one."""
    if args.resume and args.output is None:
        raise InputError("--resume needs the output or the seed of the earlier run; give -o or "
                         "--seed; vidgen jobs lists unfinished clips")
    names = output_names(args.output, request, saving.count) if args.resume else []
    plans = [(Journal(name, resume=True).recipe or {}).get("plan") for name in names]
    seeds = [plan["seed"] - index for index, plan in enumerate(plans)
             if plan and plan["prompt"] == request.prompt]
    if seeds:
        return int(min(seeds))  # those of --retry are higher
    seed = secrets.randbelow(2**31)
    report.note(f"seed {seed}")
    return seed


def clip_seeds(
    request: Request, journals: Sequence[Journal], retry: int
) -> tuple[list[int], range]:
    """Return each clip's seed, its own or one of --retry, and the seeds not tried yet."""
    first = request.seed or 0
    spare = range(first + len(journals), first + len(journals) + retry)
    seeds = [seed if seed is not None and seed in spare else first + index
             for index, seed in enumerate(map(seed_of, journals))]
    return seeds, spare[max(seeds) - spare.start + 1 :] if max(seeds) in spare else spare


def seed_of(journal: Journal) -> int | None:
    """Return the seed of a job or of its finished output; None if neither has one."""
    plan = (journal.recipe or {}).get("plan")
    seed = plan.get("seed") if isinstance(plan, dict) else None
    return seed if isinstance(seed, int) else None


def journals_of_outputs(
    paths: Sequence[str], args: Namespace, report: Report, marks: Mapping[str, str],
    prompt: str | None = None,
) -> list[OutputJournal]:
    """Return a journal for each output; `prompt` as in `OutputJournal`."""
    return [OutputJournal(path, report, resume=args.resume, overwrite=args.overwrite, marks=marks,
                          prompt=prompt) for path in paths]


@contextmanager
def resumable(
    journals: Sequence[Journal], report: Report, attention: str | None = None,
    remedy: str = SAME_COMMAND,
) -> Iterator[None]:
    """Report `remedy`, the way to continue, if the work stops, unless another process does it.

    Attention uses the given back end, else that of an unfinished clip, unless the command or the
    environment names one.
    """
    if attention is None:
        recipes = [journal.recipe or {} for journal in journals if journal.unfinished]
        began = next((recipe["attention"] for recipe in recipes if "attention" in recipe), "auto")
        attention = "auto" if os.environ.get(ATTENTION_VARIABLE) else str(began)
    try:
        with attention_by(attention):
            yield
    except BaseException as error:
        for journal in journals:
            journal.pause()
            if isinstance(error, OutputError) and job_facts(journal.folder)["running"]:
                continue
            if journal.unfinished and not isinstance(error, InputError):
                report.note(f"{journal.output} is not finished; {remedy}")
        raise


def clip_facts(
    clip: Clip, path: str, seed: int | None, report: Report, *, strict: bool = False
) -> dict[str, Any]:
    """Return a written clip's facts and the findings of its checks; report the findings.

    With `strict` a faulty clip is moved to NAME.faulty.SUFFIX.
    """
    facts: dict[str, Any] = {
        "path": path, "seed": seed, "num_frames": clip.num_frames, "fps": str(clip.fps),
        "width": clip.size[0], "height": clip.size[1],
        "seconds": float(clip.num_frames / clip.fps), "sound": clip.sound is not None,
        "captions": clip.captions}
    if clip.findings is None:
        return facts
    found = as_data(clip.findings)
    for finding in found["findings"]:
        report.note(f"{path}: {finding['text']}")
    if strict and found["verdict"] == "fault":
        facts["path"] = str(set_aside(path))
        report.note(f"{path} was moved to {facts['path']}; --retry N tries other seeds")
    return {**facts, "checks": found}


def is_faulty(clip: Clip) -> bool:
    """Return whether a clip's checks found a fault."""
    return verdict(clip.findings or ()) == "fault"


def set_aside(path: str) -> Path:
    """Move a faulty output to "name.faulty.mp4", replacing an older one of that name."""
    source = Path(path)
    target = source.with_name(f"{source.stem}.faulty{source.suffix}")
    if target.is_dir():
        shutil.rmtree(target)
    return source.replace(target)
