"""How fast this machine is: measured, kept, and near to what networks take."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from vidgen.models.dit import SpacetimeDiT
from vidgen.models.presets import DIT_PRESETS, VAE_PRESETS
from vidgen.models.vae import CausalVAE
from vidgen.pipeline.budget import calibration
from vidgen.pipeline.budget.calibration import NOMINAL, Calibration, cached_calibration
from vidgen.pipeline.budget.workload import transformer_ops, vae_ops

CPU = torch.device("cpu")
RATES = {kind: [[1, 2e9], [1000, 4e9]] for kind in NOMINAL.rates}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_rates_are_interpolated_and_kept(monkeypatch, tmp_path):
    rates = Calibration(RATES)
    assert rates.rate("gemm", 1) == 2e9
    assert rates.rate("gemm", 1000**0.5) == pytest.approx(2e9 * 2**0.5)
    assert rates.rate("gemm", 0.1) == 2e9
    assert rates.rate("gemm", 1e6) == 4e9
    monkeypatch.setattr(calibration, "_measure", lambda *_: RATES)
    assert cached_calibration(CPU, torch.float32) is None
    calibration.calibrate(CPU, torch.float32)
    assert cached_calibration(CPU, torch.float32).rate("conv", 1) == 2e9
    assert cached_calibration(CPU, torch.bfloat16) is None
    place = tmp_path / "cache/vidgen/calibration.json"
    for damage in ("", "[1]", place.read_text().replace("2000000000.0", '"x"', 1)):
        place.write_text(damage)
        assert cached_calibration(CPU, torch.float32) is None


@pytest.fixture
def small(monkeypatch):
    """What is measured is small."""
    sizes = {"_BUDGET_S": 0.005, "_SIDE": 4, "_GEMMS": (64, 256), "_CONVS": ((16, 16, 4),),
             "_ATTENTIONS": ((4, 64), (4, 256)), "_RESIDUALS": ((16, 16),),
             "_BLOCKS": ((128, 2, 448, 128),)}
    for name, value in sizes.items():
        monkeypatch.setattr(calibration, name, value)
    monkeypatch.setattr(calibration, "_write_rate", lambda _, side: (side**2, 1e7))
    monkeypatch.setattr(calibration, "_load_rate", lambda: 1e9)


@pytest.mark.usefixtures("small")
def test_predictions_hold_on_this_machine():
    rates = calibration.calibrate(CPU, torch.float32)
    assert cached_calibration(CPU, torch.float32).rates.keys() == rates.rates.keys()
    config = replace(DIT_PRESETS["toybox"], num_heads=2, ffn_dim=448, num_layers=2)
    dit, latents = SpacetimeDiT(config).eval(), torch.randn(1, 16, 3, 16, 16)
    vae, context = CausalVAE(VAE_PRESETS["tiny"]).eval(), torch.randn(1, 9, config.text_dim)
    known = torch.randn(1, 4, 3, 6, 6)
    with torch.no_grad():
        passed = calibration._seconds(lambda: dit(latents, torch.tensor([500.0]), context), CPU)
        decoded = calibration._seconds(lambda: [*vae.stream_decode(known)], CPU)
    assert 1 / 3 < rates.seconds(transformer_ops(config, 3, 64, 8)) / passed < 3
    assert 1 / 3 < rates.seconds(vae_ops(vae.config, 3, 6, 6, decode=True)) / decoded < 3


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("rate", "sizes"), [(1e8, 1), (1e11, 2)])
def test_of_a_dtype_that_is_imitated_little_is_measured(monkeypatch, rate, sizes):
    monkeypatch.setattr(calibration, "_conv_rate", lambda channels, *_: (channels, rate))
    for name, larger in (("_CONVS", (32, 16, 4)), ("_RESIDUALS", (32, 16)),
                         ("_BLOCKS", (128, 2, 448, 256))):
        monkeypatch.setattr(calibration, name, (*getattr(calibration, name), larger))
    whole = []
    monkeypatch.setattr(calibration, "_fit_networks", lambda *_: whole.append(1))
    rates = calibration._measure(CPU, torch.float32)
    assert [len(rates[kind]) for kind in ("conv", "pixels", "tokens")] == 3 * [sizes]
    assert len(whole) == sizes - 1, "whole networks are run"


def test_what_takes_long_is_measured_once(monkeypatch):
    calls = []
    monkeypatch.setattr(calibration, "_LONG_S", 0.0)
    assert calibration._seconds(lambda: calls.append(sum(range(10_000))), CPU) > 0
    assert len(calls) == 1
