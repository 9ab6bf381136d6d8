"""Measures that take a network: VBench's by name, distances of sets by an extractor."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.pans import pan, quiet, save
from vidgen.core.errors import InputError, ModelError
from vidgen.evaluation.metrics.networks import (
    Networks,
    _positions,
    centre,
    normalised,
    resized,
    smoothed,
)
from vidgen.evaluation.temporal.run import TemporalRun, run_temporal


class Embed(torch.nn.Module):
    def forward(self, picture: torch.Tensor) -> torch.Tensor:
        return picture.mean((2, 3))


class Shift(torch.nn.Module):
    """A flow of (9, 0) wherever anything moved."""

    def forward(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        moved = ((one - other).abs().mean() > 1).float()
        flow = torch.zeros(1, 2, one.shape[2], one.shape[3])
        flow[:, 0] = 9 * moved
        return flow


class Middle(torch.nn.Module):
    def forward(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return (one + other) / 2


class Summarise(torch.nn.Module):
    """Colours of a video, and how much it changes."""

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        change = (video[:, :, 1:] - video[:, :, :-1]).abs().mean((2, 3, 4))
        return torch.cat([video.mean((2, 3, 4)), change], dim=1)


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, ViTConfig, ViTModel

    root = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
             "intermediate_size": 32}  # fmt: skip
    ViTModel(ViTConfig(**sizes), add_pooling_layer=False).save_pretrained(root / "dino")
    clip = CLIPVisionConfig(**sizes, projection_dim=16, patch_size=32)
    CLIPVisionModelWithProjection(clip).save_pretrained(root / "clip")
    scripts = {"dreamsim": Embed(), "raft": Shift(), "amt": Middle()}
    for name, module in scripts.items():
        torch.jit.script(module).save(str(root / f"{name}.pt"))
    return {n: root / n for n in ("dino", "clip")} | {n: root / f"{n}.pt" for n in scripts}


def test_with_networks_the_dimensions_bear_vbenchs_names(
    networks: dict[str, Path], tmp_path: Path
) -> None:
    clips, pictures = tmp_path / "clips", tmp_path / "pictures"
    clips.mkdir()
    pictures.mkdir()
    moving = pan(3)
    save(clips / "a pan, camera pans right-0.mp4", moving)
    save(clips / "a still-0.mp4", np.repeat(moving[:1], 9, axis=0))
    Image.fromarray(moving[0]).save(pictures / "a still.png")
    run = TemporalRun([str(clips)], [f"{n}={p}" for n, p in networks.items()], str(pictures))
    told = run_temporal(run, tmp_path / "r.json", quiet)
    (folder,) = told["folders"]
    moves, still = (clip["figures"] for clip in folder["clips"])
    assert still["subject_consistency"] > 0.99
    assert 0 < moves["subject_consistency"] < still["subject_consistency"]
    assert 0 < moves["background_consistency"] <= still["background_consistency"]
    assert (moves["dynamic_degree"], still["dynamic_degree"]) == (1.0, 0.0)
    assert moves["temporal_flickering"] is None, "it fails the static filter"
    assert still["temporal_flickering"] > 0.99
    assert still["motion_smoothness"] > moves["motion_smoothness"]
    assert still["i2v_subject"] > 0.99
    assert still["i2v_background"] > 0.99
    assert folder["temporal_subtotal"] is not None
    assert set(told["networks"]) == set(networks)
    assert all(len(digest) == 64 for digest in told["networks"].values())


def test_sets_of_clips_have_a_distance_by_an_extractor(tmp_path: Path) -> None:
    torch.jit.script(Summarise()).save(str(tmp_path / "i3d.pt"))
    frames = [pan(seed, count=16) for seed in range(3)]
    for name, shade in (("one", 0), ("alike", 0), ("bright", 60)):
        (tmp_path / name).mkdir()
        for seed, clip in enumerate(frames):
            lit = np.clip(clip.astype(int) + shade, 0, 255).astype(np.uint8)
            save(tmp_path / name / f"p{seed}-0.mp4", lit)
    run = TemporalRun([str(tmp_path / name) for name in ("one", "alike", "bright")],
                      [f"i3d={tmp_path}"])  # fmt: skip
    told = run_temporal(run, tmp_path / "r.json", quiet)
    alike, bright, _ = told["comparisons"]
    assert alike["fvd"] == pytest.approx(0, abs=1e-6)
    assert bright["fvd"] > 0.1
    assert bright["kvd"] > alike["kvd"]
    assert bright["fvd_segments"] == [3, 3]


def test_sets_without_pairs_have_a_distance_only_by_an_extractor(tmp_path: Path) -> None:
    real, made, scripts = (tmp_path / name for name in ("real", "made", "i3d"))
    for folder in (real, made, scripts):
        folder.mkdir()
    torch.jit.script(Summarise()).save(str(scripts / "i3d.pt"))
    for seed in range(3):
        save(real / f"film {seed}.mp4", pan(seed, count=16))
        save(made / f"prompt {seed}-0.mp4", pan(seed, count=16))
    paths = [str(real), str(made)]
    with pytest.raises(InputError, match=r"no clip of the same name in common.*i3d=PATH"):
        run_temporal(TemporalRun(paths), tmp_path / "r.json", quiet)
    run = TemporalRun(paths, [f"i3d={scripts}"])
    notes = list[str]()
    told = run_temporal(run, tmp_path / "r.json", lambda e: notes.append(e.get("text", "")))
    (found,) = told["comparisons"]
    assert (found["pairs"], found["unpaired"], found["fvd_segments"]) == (0, [3, 3], [3, 3])
    assert any("only 3 segments of 16 frames" in text and "6 values" in text for text in notes)
    assert found["fvd"] == pytest.approx(0, abs=1e-6)


def test_frames_are_prepared_as_vbench_does() -> None:
    frame = np.random.default_rng(0).integers(0, 256, (30, 47, 3), dtype=np.uint8)
    small = resized(frame, 24, "bilinear")
    assert small.shape == (1, 3, 24, 37), "the long side is cut down to whole pixels"
    assert centre(small, 24).shape == (1, 3, 24, 24)
    assert torch.equal(centre(small, 24), small[..., 6:30])
    white = normalised(torch.full((1, 3, 1, 1), 255.0), (0.5, 0.5, 0.5), (0.25, 0.5, 1.0))
    assert white.flatten().tolist() == pytest.approx([2.0, 1.0, 0.5])
    # without smoothing: halving a checkerboard of 2x2 blocks keeps its two levels
    board = (np.indices((8, 8)) // 2).sum(0) % 2 * 255
    halved = resized(np.repeat(board[..., None], 3, 2).astype(np.uint8), 4, "bilinear")
    assert set(halved.unique().tolist()) == {0.0, 255.0}


def test_dinos_positions_are_stretched_as_its_own_code_does() -> None:
    known = torch.randn(1, 1 + 14 * 14, 4, generator=torch.Generator().manual_seed(0))
    vit = SimpleNamespace(
        position_embeddings=known, patch_embeddings=SimpleNamespace(patch_size=(16, 16))
    )
    assert _positions(vit, known, 224, 224) is known
    wide = _positions(vit, known, 224, 320)
    assert wide.shape == (1, 1 + 14 * 20, 4)
    assert torch.equal(wide[:, 0], known[:, 0])
    same = _positions(vit, known, 224, 237)  # as many patches, and sampled a little off, as there
    assert same.shape == known.shape
    assert 1e-4 < (same - known)[:, 1:].abs().mean() < 0.2


def test_a_given_picture_is_resized_in_bytes() -> None:
    frame = np.random.default_rng(0).integers(0, 256, (30, 47, 3), dtype=np.uint8)
    given, shown = (smoothed(frame, (24, 37), given) for given in (True, False))
    assert torch.equal(given, given.round())
    assert not torch.equal(shown, shown.round())
    assert (given - shown).abs().mean() < 1


def test_a_network_of_the_wrong_shape_is_reported(networks: dict[str, Path]) -> None:
    frame = pan(0)[0]
    with pytest.raises(ModelError, match="raft gave"):
        Networks({"raft": networks["amt"]}).raft(frame[:30], frame[:30])
    with pytest.raises(ModelError, match="can't be loaded"):
        Networks({"amt": networks["dino"] / "config.json"})


def test_padding_stays_on_flows_and_is_taken_off_pictures(networks: dict[str, Path]) -> None:
    found = Networks(networks)
    one, other = pan(0)[0][:50, :41], pan(0)[8][:50, :41]
    assert found.raft(one, other).shape == (56, 48, 2)
    middle = found.amt(one, other)
    wanted = (one.astype(np.float32) + other) / 2
    assert np.abs(middle - wanted).max() <= 1
