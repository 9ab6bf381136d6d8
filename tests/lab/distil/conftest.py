"""What several files of this folder build on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.lab.distilling import make_settings, released
from train.toybox.distillation.config import DistilRun
from train.toybox.distillation.student import DistilTask
from train.toybox.phases import train
from vidgen.core.config import build, dump


@pytest.fixture(scope="session")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run's YAML, its clips and trajectories made."""
    return make_settings(tmp_path_factory.mktemp("distil"))


@pytest.fixture(scope="session")
def run(settings: dict[str, Any]) -> DistilRun:
    """A run that has come to its end."""
    config = build(DistilRun, settings, "run")
    assert train(DistilTask(config), config.run, record=dump(config)).finished
    return config


@pytest.fixture(scope="session")
def model(run: DistilRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher's folder with the student in it."""
    folder = tmp_path_factory.mktemp("released") / "tiny"
    return released(Path(run.run.folder), Path(run.teacher), folder)
