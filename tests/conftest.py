"""Fixtures that several rooms of tests share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model folder; tests copy it before they change it."""
    from tests.models import build_tiny_model

    return build_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session", autouse=True)
def kernels() -> None:
    """Compile the kernels where all tests find them, before one moves the cache folder."""
    from vidgen.ops import native

    native.why_not()
