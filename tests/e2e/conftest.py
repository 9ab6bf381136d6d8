"""Fixtures that several files of whole runs share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults import ForkServer


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    """Forks processes that have everything imported."""
    with ForkServer() as server:
        yield server
