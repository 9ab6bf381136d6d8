"""What checks find: faults and what may be one, their verdict, and how a recipe keeps them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

Severity: TypeAlias = Literal["warning", "fault"]
Verdict: TypeAlias = Literal["clean", "warning", "fault"]


@dataclass(frozen=True)
class Finding:
    """Something that is wrong, or may be.

    Attributes:
        kind: one word, such as "flash"; docs/check.md lists them.
        severity: "fault" fails `--strict`; a "warning" may be meant.
        time_s: (start, end) in seconds, or None where it's the whole clip.
        value: what was measured, in the unit of the limit.
        limit: what it must not exceed, or fall below.
        text: a sentence for people, with what to do.
    """

    kind: str
    severity: Severity
    time_s: tuple[float, float] | None
    value: float
    limit: float
    text: str


def verdict(findings: Iterable[Finding]) -> Verdict:
    """The worst severity, or "clean"."""
    severities = {finding.severity for finding in findings}
    return "fault" if "fault" in severities else "warning" if severities else "clean"


def set_aside(path: str | os.PathLike[str]) -> Path:
    """Move a faulty output to "name.faulty.mp4", so that none takes it for a good one.

    Returns:
        Where it lies now; what lay there before is replaced.
    """
    source = Path(path)
    target = source.with_name(f"{source.stem}.faulty{source.suffix}")
    if target.is_dir():
        shutil.rmtree(target)
    return source.replace(target)


def as_data(findings: Iterable[Finding]) -> dict[str, Any]:
    """Findings as JSON data, for a recipe or a result."""
    kept = list(findings)
    return {"verdict": verdict(kept), "findings": [asdict(finding) for finding in kept]}


def recorded(recipe: Mapping[str, Any] | None) -> list[Finding] | None:
    """The findings that a recipe tells of; None where it tells none, or something else."""
    try:
        told = (recipe or {})["checks"]["findings"]
        found = [Finding(**{**each, "time_s": each["time_s"] and tuple(each["time_s"])})
                 for each in told]
        verdict(found)
    except (KeyError, TypeError):
        return None
    return found
