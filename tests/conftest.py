"""Fixtures that several rooms of tests share."""

from __future__ import annotations

import gc
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import ForkServer
from tests.warm import HARNESS, PRODUCT, start_warm


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model folder; tests copy it before they change it."""
    from tests.models import build_tiny_model

    return build_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_experts(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a second expert at low noise; tests copy it before they change it."""
    from tests.models import add_low_expert

    folder = tmp_path_factory.mktemp("models") / "experts"
    return add_low_expert(Path(shutil.copytree(tiny_model, folder)))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Compute on one thread, as the whole suite does."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def server() -> Iterator[ForkServer]:
    """Forks processes that have everything imported."""
    with ForkServer() as server:
        yield server


@pytest.fixture(scope="session", autouse=True)
def warm_starts(request: pytest.FixtureRequest) -> None:
    """Fork programs instead of starting them; in the full-size runs only the tests' own."""
    if sys.platform == "linux":
        is_short = "not long" in request.config.option.markexpr
        start_warm(HARNESS | PRODUCT if is_short else HARNESS)


@pytest.fixture(scope="session", autouse=True)
def few_collections() -> None:
    """Spare the collector what all test files imported, a tenth of the whole time."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def interrupts() -> None:
    """Let processes that tests start be interrupted, even where these run in the background."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Give tests a cache without this machine's speed and hashes, but with compiled kernels."""
    from vidgen.core.runtime import cache_folder
    from vidgen.ops import native

    native.why_not()
    kernels = cache_folder() / "native"
    folder = tmp_path_factory.mktemp("cache")
    (folder / "vidgen").mkdir()
    if kernels.is_dir():
        (folder / "vidgen" / "native").symlink_to(kernels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield
