"""Wan's variants at the engine's door: tasks, experts, memory, adapters, long prompts."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.wan_models import build_diffusers, build_original
from vidgen.core.errors import InputError
from vidgen.models.lora import Adapter, LowRank
from vidgen.pipeline.engine import Engine, load
from vidgen.weights.layouts import open_model
from vidgen.weights.lora import write_lora

PROMPT = "a red car bounces"
SMALL = {"seed": 3, "frames": 5, "size": (32, 32), "steps": 2}
PICTURE = np.full((32, 32, 3), 90, np.uint8)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("wan")
    return {name: build_diffusers(root / name, name) for name in ("t2v", "i2v", "t2v-a14b")}


def engine(folder: Path, **options: str) -> Engine:
    made = load(str(folder), device="cpu", dtype="fp32", **options)
    assert isinstance(made, Engine)
    return made


@pytest.mark.parametrize("variant", ["i2v", "t2v-a14b"])
def test_what_is_in_memory_changes_nothing(folders: dict[str, Path], variant: str) -> None:
    options = SMALL | ({"image": PICTURE} if variant == "i2v" else {})
    whole = engine(folders[variant]).generate(PROMPT, **options)
    for offload in ("stage", "block"):
        part = engine(folders[variant], offload=offload)
        latents = part.generate(PROMPT, **options).latents
        # weights that come block by block are not packed, which rounds otherwise
        tolerance = 1e-4 if offload == "block" else 0
        torch.testing.assert_close(latents, whole.latents, atol=tolerance, rtol=tolerance)
        assert part.loader.resident == ()


def test_both_layouts_make_the_same_clip(folders: dict[str, Path], tmp_path: Path) -> None:
    original = build_original(tmp_path / "Wan2.1-T2V-1.3B", "t2v")
    ours, theirs = (
        engine(folder).generate(PROMPT, shift=3.0, **SMALL) for folder in (folders["t2v"], original)
    )
    # mapped weights lie elsewhere in memory than read ones, and so do sums' roundings
    torch.testing.assert_close(ours.latents, theirs.latents, rtol=0, atol=1e-5)


def test_a_lora_goes_to_the_experts_it_is_for_and_leaves_no_trace(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = open_model(str(folders["t2v-a14b"]))
    width = folder.components["transformer"].config.hidden_dim
    parts = {"blocks.0.self_attn.q": LowRank(torch.randn(2, width), torch.randn(width, 2))}
    path = tmp_path / "q.safetensors"
    write_lora(Adapter("q", parts), path, "wan")
    made = engine(folders["t2v-a14b"])

    def latents(*lora: str) -> torch.Tensor:
        return made.generate(PROMPT, lora=lora, **SMALL).latents

    plain = latents()
    high, low, both = latents(f"{path}@high"), latents(f"{path}@low"), latents(str(path))
    different = [plain, high, low, both]
    assert all(
        not torch.equal(a, b) for i, a in enumerate(different) for b in different[i + 1 :]
    )
    assert torch.equal(latents(f"{path}:0"), plain)
    assert torch.equal(latents(), plain)
    recipe = made.generate(PROMPT, lora=[f"{path}:0.5@low"], **SMALL).recipe
    assert recipe["loras"][0]["weight"] == 0.5
    assert recipe["loras"][0]["expert"] == "low"


def test_each_expert_has_its_guidance(folders: dict[str, Path]) -> None:
    made = engine(folders["t2v-a14b"])
    pair, same = (
        made.generate(PROMPT, guidance=4.0, **more, **SMALL).latents
        for more in ({"guidance_low": 1.0}, {})
    )
    assert not torch.equal(pair, same)


@pytest.mark.parametrize(
    ("variant", "options", "message"),
    [
        ("t2v", {"image": PICTURE}, "but text, video; models that do: i2v"),
        ("t2v", {"control": "clip.mp4"}, "models that do: vace-1.3b, vace-14b"),
        ("t2v", {"guidance_low": 2.0}, "no low-noise expert"),
        ("t2v", {"size": (40, 32)}, "multiple of 16"),
        ("t2v", {"frames": 6}, "5 and 9"),
        ("i2v", {}, "needs a picture or clip; give one of --image"),
        ("t2v", {"lora": ["nowhere.safetensors"]}, "doesn't exist"),
    ],
)
def test_what_a_variant_cant_do_is_refused(
    folders: dict[str, Path], variant: str, options: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        engine(folders[variant], offload="stage").generate(PROMPT, **(SMALL | options))


def test_a_prompt_too_long_is_cut_as_wan_does(
    folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        engine(folders["t2v"]).generate("red car " * 600, **SMALL)
    assert "are cut" in caplog.text
