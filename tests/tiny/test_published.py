"""Models of the Wan family that are planned with before their files are here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from vidgen.cli.main import main
from vidgen.core.errors import ModelError
from vidgen.weights.family import VARIANTS, recognise
from vidgen.weights.published import is_here, published

NAMES = {
    "Wan-AI/Wan2.1-T2V-1.3B": "t2v-1.3b", "Wan-AI/Wan2.1-T2V-14B-Diffusers": "t2v-14b",
    "Wan2.1-I2V-14B-480P": "i2v-14b-480p", "wan2.1-i2v-14b-720p": "i2v-14b-720p",
    "Wan2.1-FLF2V-14B-720P-diffusers": "flf2v-14b", "Wan2.1-VACE-1.3B": "vace-1.3b",
    "models/Wan2.1-VACE-14B": "vace-14b", "Wan-AI/Wan2.2-T2V-A14B": "t2v-a14b",
    "Wan2.2-I2V-A14B": "i2v-a14b", "Wan-AI/Wan2.2-TI2V-5B-Diffusers": "ti2v-5b",
}


@pytest.mark.parametrize("model", NAMES)
def test_a_name_tells_what_its_folder_would(model: str) -> None:
    folder = published(model)
    assert (folder.variant, folder.family) == (
        NAMES[model], VARIANTS[NAMES[model]].family)
    experts = [role for role in folder.components if role.startswith("transformer")]
    config = folder.components["transformer"].config
    assert recognise(
        config, num_experts=len(experts), name=folder.name).name == folder.variant
    for component in folder.components.values():
        component.require_complete()
    assert not folder.files


def test_every_variant_has_a_name() -> None:
    assert set(NAMES.values()) == set(VARIANTS)
    for name in ("Wan2.1-T2V-3B", "toybox", "LTX-Video", "/models/mine"):
        assert published(name) is None


def test_sizes_are_the_published_ones_and_nothing_can_be_loaded() -> None:
    parts = published("Wan2.1-T2V-1.3B").components
    count = sum(lazy.likeness.numel() for lazy in parts["transformer"].tensors.values())
    assert count == 1_418_996_800
    assert parts["text_encoder"].tensors.num_bytes == pytest.approx(11.36e9, rel=0.01)
    with pytest.raises(ModelError, match="is not on this machine"):
        parts["vae"].load(torch.float32, "cpu")


def test_what_is_here_is_read(tiny_model: Path) -> None:
    assert is_here("toybox")
    assert is_here(str(tiny_model))
    assert not is_here("Wan-AI/Wan2.1-T2V-1.3B")


def test_a_clip_is_planned_before_its_model_is_fetched(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vidgen.pipeline.timing.measure_rates", lambda *_: None)
    monkeypatch.setattr("vidgen.core.runtime.available_memory", lambda *_: 16 << 30)
    words = ["plan", "a heron", "--dtype", "bf16", "--frames", "17", "--size", "480x256", "--json"]
    assert main([*words, "--model", "Wan-AI/Wan2.2-TI2V-5B"]) == 0
    told = capsys.readouterr()
    assert "is not downloaded; the estimate is of the published model" in told.err
    made = json.loads(told.out)
    assert made["offload"] == "stage"
    assert 9e9 < made["peak_bytes"] < 16 << 30
    assert main([*words, "--model", "Wan2.1-T2V-14B", "--offload", "none"]) == 2
    assert "these fit: --dtype bf16 --offload block" in capsys.readouterr().err
    assert main([*words[:-1], "--model", "Wan2.2-TI2V-5B"]) == 0
    (whole,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("whole")]
    assert whole.endswith(" min)")
    assert main([*words, "--model", "no-model"]) == 2
    assert "neither an embedded model" in capsys.readouterr().err
