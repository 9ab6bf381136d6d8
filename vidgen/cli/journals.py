"""The journal of a command's output, which goes on from an earlier run or begins again."""

from __future__ import annotations

from typing import Any

from vidgen.cli.report import Report
from vidgen.core.errors import InputError
from vidgen.pipeline.journal.job import job_facts, progress_text
from vidgen.pipeline.journal.journal import Journal


class OutputJournal(Journal):
    """Reports what is done and what goes on; under `overwrite` another clip's output begins again.

    Args:
        output: the file or folder to be written.
        report: told of it.
        resume: go on from what is there, if it is of the same clip.
        overwrite: start anew whatever else is there.

    Attributes:
        is_done: whether the output is this very clip already, as `check` finds out.

    Raises:
        OutputError: an unfinished job lies there, and neither was said; or a process is at it.
    """

    def __init__(
        self, output: str, report: Report, *, resume: bool = False, overwrite: bool = False
    ) -> None:
        super().__init__(output, resume=resume, overwrite=overwrite)
        self.is_done, self._is_told = False, False
        self._name, self._report = output, report
        if resume and overwrite and not self._tells_recipe():
            self.resume = False

    def check(self, recipe: dict[str, Any]) -> None:
        """Check as a journal does; and report what is done, and what goes on.

        Raises:
            InputError: it is another clip's, and isn't to be overwritten.
        """
        try:
            super().check(recipe)
        except InputError:
            if not self.overwrite:
                raise
            self.resume = False
        self.is_done = self.finished
        if not self._is_told:
            self._is_told = True
            self._tell()

    def _tell(self) -> None:
        text = f"{self._name} is done already" if self.is_done else ""
        if self.resume and self.unfinished and not self.is_done:
            facts = job_facts(self.folder)
            text = "" if facts["running"] else f"{self._name} goes on: {progress_text(facts)}"
        if text:
            self._report({"event": "note", "text": text})

    def _tells_recipe(self) -> bool:
        try:
            return self.recipe is not None
        except InputError:
            return False
