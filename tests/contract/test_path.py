"""The way from the shell to the transformer is short, and the engine's module loads little."""

from __future__ import annotations

import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest

import vidgen
from tests.wan_models import build_diffusers
from vidgen.cli.main import main
from vidgen.models.dit import SpacetimeDiT

PACKAGE = str(Path(vidgen.__file__).parent)
MOST_FRAMES = 12
MOST_MODULES = 80


def test_few_frames_lie_between_the_shell_and_the_transformer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_diffusers(tmp_path / "wan", "t2v")
    seen: list[list[str]] = []
    forward = SpacetimeDiT.forward

    def noted(self: SpacetimeDiT, *args: Any, **options: Any) -> Any:
        stack = traceback.extract_stack()[:-1]
        seen.append([frame.name for frame in stack if frame.filename.startswith(PACKAGE)])
        return forward(self, *args, **options)

    monkeypatch.setattr(SpacetimeDiT, "forward", noted)
    out = str(tmp_path / "a.mp4")
    assert main(["generate", "a cat", "--model", str(model), "--steps", "2", "--frames", "5",
                 "--size", "32x32", "--seed", "1", "-o", out]) == 0  # fmt: skip
    assert len(seen) == 4, "two steps under two prompts"
    for names in seen:
        assert names[0] == "main"
        assert len(names) + 1 <= MOST_FRAMES, [*names, "forward"]


def test_the_engines_module_loads_few_others() -> None:
    program = (
        "import sys, vidgen.pipeline.engine\n"
        "print(*(name for name in sys.modules if name.split('.')[0] == 'vidgen'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert len(done.stdout.split()) <= MOST_MODULES
