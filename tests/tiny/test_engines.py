"""Two ranks by all engines, offloaded or not, learn what one process does; all from one launch."""

from __future__ import annotations

import gc
import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import run_ranks
from tests.velocity import Velocity, follow, make_run
from train.toybox.model_files import save_module
from vidgen.core.errors import InputError, ModelError
from vidgen.models.dit import SpacetimeDiT
from vidgen.training.checkpoint import check_manifest, latest_checkpoint, load_averages
from vidgen.training.config import OptimConfig
from vidgen.training.engines.deepspeed import shard_weights
from vidgen.training.engines.distributed import current_place, join_ranks
from vidgen.training.loop import train
from vidgen.training.optim import build_optimizers
from vidgen.training.task import Task
from vidgen.weights.load import load_module

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("deepspeed is not installed (extra: train)", allow_module_level=True)

ENGINES = {"ddp": None, "zero1": "zero1", "zero2": "zero2", "zero3": "zero3"}
OFFLOADED = {"zero2-offload": "zero2_offload", "zero3-offload": "zero3_offload"}
SHORT = 3
KINDS = {"full": {}, "lora": {"lora": True}}


def losses(records: list[dict[str, Any]]) -> list[float]:
    """Losses and norms of every step, then the held-out score."""
    steps = [record for record in records if "loss" in record and "grad_norm" in record]
    scores = [record["validation"]["held_out"] for record in records if "validation" in record]
    return [s["loss"] for s in steps] + [s["grad_norm"] for s in steps] + scores


def on_two_ranks(folder: Path) -> dict[str, Any]:
    """Every scenario on this rank; curves by name, and messages of what was refused."""
    with join_ranks(make_run(folder / "x", deepspeed="zero1")):
        return scenarios(folder)


def scenarios(folder: Path) -> dict[str, Any]:
    gc.freeze()  # DeepSpeed collects often, and what is imported stays anyway
    found: dict[str, Any] = {}
    for name, engine in {**ENGINES, **OFFLOADED}.items():
        run = make_run(folder / "x", deepspeed=engine)
        for kind, task in KINDS.items():
            here = replace(run, folder=str(folder / f"{name}-{kind}"))
            found[f"{name}-{kind}"] = losses(follow(here, **task)[1])
        if name in OFFLOADED:
            continue
        here = replace(run, folder=str(folder / f"{name}-poison"))
        found[f"{name}-poison"] = losses(follow(here, poison=frozenset({2}))[1])
        straight = replace(run, folder=str(folder / f"{name}-straight"))
        found[f"{name}-straight"] = losses(follow(straight, dropout=0.3)[1])
        found[f"{name}-resumed"] = resumed(folder, straight, name)
    found["bf16"] = losses(follow(make_run(folder / "bf16", deepspeed="zero3", dtype="bf16"),
                                  lora=True)[1])
    found["shares"] = loaded_in_shares(folder)
    with pytest.raises(InputError, match="Muon needs") as refused:
        follow(make_run(folder / "muon", deepspeed="zero3", optim=OptimConfig(muon_lr=1e-3)))
    found["muon"] = str(refused.value)
    return found


def loaded_in_shares(folder: Path) -> dict[str, Any]:
    """Bytes that a rank held while it read a model, and whether it then had the right weights."""
    import deepspeed

    saved = Velocity(make_run(folder / "x")).dit
    if current_place().main:
        save_module(saved.state_dict(), saved.config, folder / "model", torch.float32)
    current_place().barrier()
    share, held, peak = shard_weights(make_run(folder / "x", deepspeed="zero3")), 0, 0

    def each(parameter: torch.nn.Parameter) -> None:
        nonlocal held, peak
        peak = max(peak, held + parameter.nbytes)
        share(parameter)
        assert parameter.numel() == 0
        held += parameter.ds_tensor.nbytes

    made = load_module(lambda: SpacetimeDiT(saved.config), folder / "model", torch.float32, "cpu",
                       each=each)
    with deepspeed.zero.GatheredParameters(list(made.parameters())):
        right = all(torch.equal(a, b)
                    for a, b in zip(made.parameters(), saved.parameters(), strict=True))
    sizes = [p.nbytes for p in saved.parameters()]
    return {"peak": peak, "total": sum(sizes), "largest": max(sizes), "count": len(sizes),
            "right": right}


def resumed(folder: Path, straight: Any, name: str) -> list[float]:
    """Losses of a run of three steps that goes on to six."""
    run = replace(straight, folder=str(folder / f"{name}-resumed"))
    first = losses(follow(replace(run, steps=SHORT), dropout=0.3)[1])
    follow(replace(run, steps=SHORT, folder=str(folder / f"{name}-half")))
    return first[:3] + losses(follow(run, resume=True, dropout=0.3)[1])[:3]


def on_two_that_share(folder: Path) -> dict[str, Any]:
    """Both ranks hold one sample together."""
    found = {}
    with join_ranks(make_run(folder / "x", sequence=2)):
        for name in ("ddp", "zero2"):
            run = make_run(folder / f"{name}-shared", deepspeed=ENGINES[name], sequence=2)
            found[f"{name}-shared"] = losses(follow(run)[1])
    return found


def on_one_rank(folder: Path) -> dict[str, Any]:
    """A checkpoint of two ranks goes on on one, through the universal layout."""
    found = {}
    with join_ranks(make_run(folder / "x", deepspeed="zero1")):
        for name in ("zero1", "zero2", "zero3"):
            run = make_run(folder / f"{name}-half", accumulate=2, deepspeed=name)
            found[name] = losses(follow(run, resume=True)[1])
    return found


class Resting(Task):
    """Three layers: one in all steps, one in every other, one in none; a step's loss is NaN."""

    def __init__(self, run: Any) -> None:
        torch.manual_seed(0)
        self.run, self.net = run, torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))
        self.modules = {"net": self.net}

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return build_optimizers(self.modules, self.run.optim)

    def batch(self, step: int, micro: int) -> torch.Tensor:
        return torch.randn(3, 4, generator=torch.Generator().manual_seed(100 * step + micro))

    def loss(self, batch: torch.Tensor, step: int) -> tuple[torch.Tensor, dict[str, Any]]:
        out = self.net[0](batch) + (self.net[1](batch) if step % 2 else 0)
        return out.square().mean() * (torch.nan if step == 3 else 1), {}

    def validate(self, _step: int, _folder: Path) -> dict[str, float]:
        return {}


def learn_while_parts_rest(folder: Path, accumulate: int) -> list[Any]:
    run = make_run(folder, accumulate=accumulate)
    with join_ranks(run):
        task = Resting(run)
        train(task, run)
    assert task.net[2].weight.grad is None
    return [parameter.tolist() for parameter in task.net.parameters()]


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """The same runs in this process: accumulating twice as much is being two."""
    folder = tmp_path_factory.mktemp("single")
    torch.set_num_threads(1)
    found = {}
    for kind, task in {**KINDS, "poison": {"poison": frozenset({2})}}.items():
        found[kind] = losses(follow(make_run(folder / kind, accumulate=2), **task)[1])
    found["shared"] = losses(follow(make_run(folder / "shared"))[1])
    found["bf16"] = losses(
        follow(make_run(folder / "bf16", accumulate=2, dtype="bf16"), lora=True)[1])
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def double(folder: Path) -> dict[str, Any]:
    return run_ranks(2, on_two_ranks, folder, launched=True, timeout_s=1800)[0]


each_engine = pytest.mark.parametrize("engine", ENGINES)
also_offloaded = pytest.mark.parametrize("engine", [*ENGINES, *OFFLOADED])


@also_offloaded
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_follow_the_curve_of_one(double, single, engine, kind):
    assert double[f"{engine}-{kind}"] == pytest.approx(single[kind], rel=2e-5)


def test_parameters_may_rest_in_some_steps_or_in_all(tmp_path):
    both = run_ranks(2, learn_while_parts_rest, tmp_path / "two", 1, launched=True, timeout_s=600)
    for mine, other in zip(learn_while_parts_rest(tmp_path / "one", 2), both[0], strict=True):
        torch.testing.assert_close(torch.tensor(mine), torch.tensor(other))


@each_engine
def test_a_bad_step_is_skipped_by_all_ranks(double, single, folder, engine):
    assert double[f"{engine}-poison"] == pytest.approx(single["poison"], rel=2e-5, nan_ok=True)
    lines = [json.loads(line) for line in (folder / f"{engine}-poison" / "curve.jsonl").open()]
    [event] = [line for line in lines if "event" in line]
    assert event["event"] == "skip"
    assert len(event["files"]) == 2  # one of each rank


def test_ranks_that_share_samples_follow_the_curve_of_one(single, folder):
    shared = run_ranks(2, on_two_that_share, folder, launched=True, timeout_s=600)[0]
    for name, curve in shared.items():
        assert curve == pytest.approx(single["shared"], rel=2e-5), name


def test_frozen_bfloat16_weights_stay_so_under_zero_3(double, single):
    assert double["bf16"] == pytest.approx(single["bf16"], rel=2e-2)


@also_offloaded
@pytest.mark.parametrize("kind", KINDS)
def test_averages_are_whole_in_every_checkpoint(double, single, folder, engine, kind):
    del double
    mine = load_averages(folder / f"{engine}-{kind}", "transformer")
    right = load_averages(folder / f"ddp-{kind}", "transformer")
    trained = [name for name in right if kind == "full" or "lora_" in name]
    assert trained
    for name in trained:
        torch.testing.assert_close(mine[name], right[name], rtol=1e-4, atol=1e-5)
    del single


@each_engine
def test_resumed_is_straight_bit_for_bit(double, folder, engine):
    assert double[f"{engine}-resumed"] == double[f"{engine}-straight"][:6]
    a, b = (load_averages(folder / f"{engine}-{which}", "transformer")
            for which in ("straight", "resumed"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_zero_3_reads_a_share_and_one_tensor_more(double):
    shares = double["shares"]
    filling = 8 * shares["count"]  # odd numbers of elements are filled up
    assert shares["peak"] <= shares["total"] / 2 + shares["largest"] + filling
    assert shares["right"]


def test_muon_is_refused_under_zero(double):
    assert "optim.muon_lr" in double["muon"]


def test_a_checkpoint_of_two_ranks_continues_on_one(double, folder):
    [found] = run_ranks(1, on_one_rank, folder, launched=True, timeout_s=600)
    for name, curve in found.items():  # steps 4, 5, 6: losses, norms, the score in the end
        straight = double[f"{name}-full"]
        assert curve[:3] == pytest.approx(straight[3:6], rel=1e-4), name
        assert curve[-1] == pytest.approx(straight[-1], rel=1e-4), name


def test_a_changed_pickle_is_not_read(double, folder, tmp_path):
    del double
    shutil.copytree(folder / "zero2-half", tmp_path / "run")
    target = next(latest_checkpoint(tmp_path / "run").rglob("*optim_states.pt"))
    target.write_bytes(target.read_bytes() + b"\0")
    with pytest.raises(ModelError, match="could run code"):
        check_manifest(latest_checkpoint(tmp_path / "run"))
