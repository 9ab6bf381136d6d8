"""Fixtures that several rooms of tests share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model folder; tests copy it before they change it."""
    from tests.models import build_tiny_model

    return build_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
