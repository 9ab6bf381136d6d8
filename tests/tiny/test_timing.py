"""How fast this machine is: measured, kept, and near to what networks take."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from vidgen.models.dit import SpacetimeDiT
from vidgen.models.presets import DIT_PRESETS, VAE_PRESETS
from vidgen.models.vae import CausalVAE
from vidgen.pipeline import timing
from vidgen.pipeline.timing import NOMINAL, Rates, known_rates, transformer_ops, vae_ops

CPU = torch.device("cpu")
RATES = {kind: [[1, 2e9], [1000, 4e9]] for kind in NOMINAL.points}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_rates_are_interpolated_and_kept(monkeypatch, tmp_path):
    rates = Rates(RATES)
    assert rates.rate("linear", 1) == 2e9
    assert rates.rate("linear", 1000**0.5) == pytest.approx(2e9 * 2**0.5)
    assert rates.rate("linear", 0.1) == 2e9
    assert rates.rate("linear", 1e6) == 4e9
    monkeypatch.setattr(timing, "_measure", lambda *_: RATES)
    assert known_rates(CPU, torch.float32) is None
    timing.measure_rates(CPU, torch.float32)
    assert known_rates(CPU, torch.float32).rate("conv", 1) == 2e9
    assert known_rates(CPU, torch.bfloat16) is None
    place = tmp_path / "cache/vidgen/calibration.json"
    for damage in ("", "[1]", place.read_text().replace("2000000000.0", '"x"', 1)):
        place.write_text(damage)
        assert known_rates(CPU, torch.float32) is None


SMALL = {
    "_BUDGET_S": 0.005, "_ATTENTION": (4, 128),
    "_TRANSFORMERS": ((replace(DIT_PRESETS["toybox"], num_layers=1), 3, 8),
                      (replace(DIT_PRESETS["toybox"], num_layers=1, num_heads=6), 3, 8)),
    "_VAES": ((VAE_PRESETS["tiny"], 2, 6), (replace(VAE_PRESETS["tiny"], decoder_dim=16), 2, 6)),
}


@pytest.fixture
def small(monkeypatch):
    """What is measured is small."""
    for name, value in SMALL.items():
        monkeypatch.setattr(timing, name, value)


@pytest.mark.usefixtures("small")
def test_predictions_hold_on_this_machine():
    rates = timing.measure_rates(CPU, torch.float32)
    assert known_rates(CPU, torch.float32).points.keys() == rates.points.keys()
    config = replace(DIT_PRESETS["toybox"], num_heads=2, ffn_dim=448, num_layers=2)
    dit, latents = SpacetimeDiT(config).eval(), torch.randn(1, 16, 3, 16, 16)
    vae, context = CausalVAE(VAE_PRESETS["tiny"]).eval(), torch.randn(1, 9, config.text_dim)
    known = torch.randn(1, 4, 3, 6, 6)
    with torch.no_grad():
        passed = timing._seconds(lambda: dit(latents, torch.tensor([500.0]), context), CPU)
        decoded = timing._seconds(lambda: [*vae.stream_decode(known)], CPU)
    assert 1 / 3 < rates.seconds(transformer_ops(config, 3, 64, 8)) / passed < 3
    assert 1 / 3 < rates.seconds(vae_ops(vae.config, 3, 6, 6, decode=True)) / decoded < 3


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("long_s", "sizes"), [(1e-9, 1), (1.0, 2)])
def test_of_a_dtype_that_is_imitated_little_is_measured(monkeypatch, long_s, sizes):
    monkeypatch.setattr(timing, "_LONG_S", long_s)
    rates = timing._measure(CPU, torch.float32)
    assert [len(rates[kind]) for kind in ("linear", "conv")] == 2 * [sizes]


def test_what_takes_long_is_measured_once(monkeypatch):
    calls = []
    monkeypatch.setattr(timing, "_LONG_S", 0.0)
    assert timing._seconds(lambda: calls.append(sum(range(10_000))), CPU) > 0
    assert len(calls) == 1
