"""Ranks of one machine take the mean of their gradients through memory that all of them see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.ranks import run_ranks
from vidgen.training.config import RunConfig
from vidgen.training.engines import engine as torch_engine
from vidgen.training.engines.distributed import current_place, join_ranks
from vidgen.training.engines.engine import open_shared_mean

PIECE = torch_engine.PIECE_BYTES // 4
LENGTHS = (1, 2, 1000, PIECE, 2 * PIECE + 7)


def values(rank: int, length: int) -> Tensor:
    return torch.randn(length, generator=torch.Generator().manual_seed(length + rank))


def parameters(rank: int) -> list[nn.Parameter]:
    """Of all ranks, of one in other strides, of the last rank alone, of none."""
    given = [nn.Parameter(torch.zeros(3, 4, 5, 6)) for _ in range(4)]
    for index, parameter in enumerate(given[:2]):
        parameter.grad = values(rank + 10 * index, 360).view(3, 4, 5, 6)
    given[1].grad = given[1].grad.contiguous(memory_format=torch.channels_last)
    if rank == 2:
        given[2].grad = values(rank, 360).view(3, 4, 5, 6)
    return given


def on_each(folder: Path, shared: Path) -> bool:
    """Leaves what a rank got in a file; whether there was shared memory."""
    torch_engine.SHARED_FOLDER = shared
    run = RunConfig(folder=str(folder), device="cpu")
    with join_ranks(run):
        rank, mean = current_place().rank, open_shared_mean(current_place())
        if mean is None:
            return False
        taken = [values(rank, length) for length in LENGTHS]
        for one in taken:
            mean.take(one)
        half = values(rank, 100).bfloat16()
        mean.take(half)
        given = parameters(rank)
        mean.take_gradients(given)
        gradients = [parameter.grad for parameter in given]
        torch.save({"taken": taken, "half": half, "gradients": gradients}, folder / f"{rank}.pt")
    return True


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder, shared = tmp_path_factory.mktemp("ranks"), tmp_path_factory.mktemp("shared")
    assert all(run_ranks(3, on_each, folder, shared, launched=True))
    assert not list(shared.iterdir())
    return [torch.load(folder / f"{rank}.pt") for rank in range(3)]


def test_all_ranks_get_the_mean(ranks):
    for index, length in enumerate(LENGTHS):
        mean = torch.stack([values(rank, length) for rank in range(3)]).mean(0)
        for answer in ranks:
            torch.testing.assert_close(answer["taken"][index], mean)
            assert torch.equal(answer["taken"][index], ranks[0]["taken"][index])
    mean = torch.stack([values(rank, 100) for rank in range(3)]).mean(0)
    torch.testing.assert_close(ranks[2]["half"].float(), mean, atol=0.02, rtol=0.02)


def test_gradients_that_some_ranks_lack_or_lay_out_otherwise(ranks):
    both = [torch.stack([values(rank + 10 * i, 360) for rank in range(3)]).mean(0) for i in (0, 1)]
    alone = values(2, 360) / 3
    for answer in ranks:
        for found, right in zip(answer["gradients"], [*both, alone], strict=False):
            torch.testing.assert_close(found, right.view(3, 4, 5, 6))
        assert answer["gradients"][3] is None


def test_without_shared_memory_there_is_none(tmp_path):
    assert not any(run_ranks(2, on_each, tmp_path, tmp_path / "missing", launched=True))
