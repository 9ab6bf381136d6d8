"""A film's shots in a store; of several takes of a shot the best is chosen by their scores.

    FILM.shots/
        ADDRESS.mp4   a take of a shot, or a stretch of one that has several prompts
        ADDRESS.wav   a sound or music that the script describes in words
        ADDRESS.json  of one of several takes: its score
        sums.json     SHA-256 of each shot by its name, to detect one that was changed

All of it may be removed at any time: what is missing is rendered again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidgen.core.config import build, dump
from vidgen.core.errors import InputError
from vidgen.core.runtime import sha256_file
from vidgen.core.store import Store
from vidgen.media.checks import Finding, as_data, recorded
from vidgen.media.probe import read_recipe
from vidgen.pipeline.best_of_n import Verified
from vidgen.story.film import FilmPlan, ShotPlan, Take

if TYPE_CHECKING:
    from vidgen.story.script import Shot

SUMS = "sums"


@dataclass(frozen=True)
class RenderedShot:
    """A rendered shot and the facts of its file."""

    shot: Shot  # the shot as it is written, with the film's transition where it has none of its own
    path: Path  # its file, with sound where the model makes it
    num_frames: int
    fps: Fraction
    size: tuple[int, int]  # (width, height)
    seed: int  # of the take
    findings: tuple[Finding, ...] = ()  # of the checks
    # the chosen take and the reason; None for a single take
    choice: Mapping[str, Any] | None = None
    made: bool = False  # whether it was rendered now

    def as_data(self) -> dict[str, Any]:
        """Return JSON data, with the script's fields in `shot`."""
        return {
            "id": self.shot.id, "path": str(self.path), "num_frames": self.num_frames,
            "fps": str(self.fps), "duration_s": float(self.num_frames / self.fps),
            "width": self.size[0], "height": self.size[1], "seed": self.seed, "made": self.made,
            "checks": as_data(self.findings), "choice": self.choice, "shot": dump(self.shot)}


@dataclass(frozen=True, slots=True)
class TakeScore:
    """Score of a take, from the checks of its file and the model's verifier, if it has one.

    The best take has the fewest faults, then the best verifier scores, then the lowest seed.
    """

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
    """Return the best take as JSON data: its seed, the reasons, and all scores."""
    ranked = sorted(scores, key=lambda score: score.rank)
    best = ranked[0]
    why = "; ".join(best.reasons)
    if len(ranked) > 1:
        why += f"; next was seed {ranked[1].seed}: {'; '.join(ranked[1].reasons)}"
    return {"seed": best.seed, "why": why, "takes": [asdict(score) for score in scores]}


class ShotStore(Store):
    """The folder of a film's shots; a take's score is the data of its address."""

    def __init__(self, folder: Path, film: FilmPlan) -> None:
        super().__init__(folder, film.suffix)
        self.film = film

    def missing(self, plan: ShotPlan) -> list[tuple[Take, int]]:
        """Return (take, index) of each part to render; a part's file includes the earlier ones.

        The last part of a take that needs a score and has none is scored from its file.
        """
        left = []
        for take in plan.takes:
            found = [n for n, part in enumerate(take.parts) if self.has(part.key)]
            begin = found[-1] + 1 if found else 0
            if begin == len(take.parts) and len(plan.takes) > 1 and self._score(take) is None:
                begin -= 1
            left += [(take, index) for index in range(begin, len(take.parts))]
        return left

    def left(self, plans: Sequence[ShotPlan]) -> list[tuple[ShotPlan, Take, int]]:
        """Return each part of several shots that is to be rendered; equal parts come once."""
        return [*{take.parts[index].key: (plan, take, index) for plan in plans
                  for take, index in self.missing(plan)}.values()]

    def choice(self, plan: ShotPlan) -> dict[str, Any] | None:
        """Return the choice among several takes; None for one take, or while a score is missing."""
        scores = [score for take in plan.takes if (score := self._score(take)) is not None]
        return best_take(scores) if len(scores) == len(plan.takes) > 1 else None

    def take(self, plan: ShotPlan) -> Take:
        """Return the chosen take of a shot whose takes exist."""
        choice = self.choice(plan)
        if choice is None:
            return plan.takes[0]
        return next(take for take in plan.takes if take.seed == choice["seed"])

    def file(self, plan: ShotPlan) -> Path:
        """Return the file of a shot whose takes exist."""
        return self.path(self.take(plan).key)

    def is_done(self, plan: ShotPlan) -> bool:
        """Return whether all takes of a shot are rendered."""
        return not self.missing(plan)

    def _score(self, take: Take) -> TakeScore | None:
        data = self.data(take.key)
        try:
            return build(TakeScore, data)
        except InputError:
            return None


def findings_of(path: Path) -> Sequence[Finding]:
    """Return the findings of a file's checks when it was written."""
    return recorded(read_recipe(path)) or []


def remember(shots: Sequence[RenderedShot]) -> None:
    """Store the hashes of shots of one film that this run rendered."""
    made = {each.path.name: sha256_file(each.path) for each in shots if each.made}
    if made:
        store = Store(shots[0].path.parent)
        store.keep(SUMS, store.data(SUMS) | made)


def check_shots(shots: Sequence[RenderedShot]) -> None:
    """Compare shots of one film with their stored hashes; store those that are missing.

    Raises:
        InputError: a file that is missing or was changed.
    """
    store = Store(shots[0].path.parent)
    sums = store.data(SUMS)
    for each in shots:
        if not each.path.is_file():
            raise InputError(f"shot {each.shot.id!r}: {each.path} is missing; the same command "
                             "renders it again")
        found = sha256_file(each.path)
        if sums.setdefault(each.path.name, found) != found:
            raise InputError(f"shot {each.shot.id!r}: {each.path} was changed since it was "
                             "rendered; remove it, and the same command renders it again")
    store.keep(SUMS, sums)
