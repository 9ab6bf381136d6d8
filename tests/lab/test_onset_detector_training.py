"""What an onset detector learns from, and the programs that teach and release one."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from tests.faults import ForkServer
from tests.models import build_tiny_model
from tests.programs import run_program
from train.toybox.tasks.onset_data import followed, places_in, varied
from train.toybox.tasks.toybox_data import CacheConfig, ToyboxCache, load_vae
from train.toybox.world.cues import sound_cues
from train.toybox.world.scenes import SceneMix
from vidgen.core.config import dump
from vidgen.models.onset_detector import part_times
from vidgen.pipeline.engine import Engine, load
from vidgen.training.task import generator_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sounding(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("models") / "heard", sound=True)


@pytest.fixture(scope="module")
def cache(sounding: Path, tmp_path_factory: pytest.TempPathFactory) -> ToyboxCache:
    config = CacheConfig(str(tmp_path_factory.mktemp("hit") / "bounces"), str(sounding / "vae"), 1,
                         shard_size=8, height=32, width=32, motion="bounces")
    made = ToyboxCache(config)
    made.make(0, load_vae(config.vae, CPU), CPU)
    return made


def test_impacts_lie_in_the_part_of_a_latent_frame_whose_time_is_theirs(cache: ToyboxCache) -> None:
    impacts = followed(cache, 8).impacts
    assert impacts.shape == (8, 9, 8)
    times = part_times(0, 9, 8, stride_t=4, fps=12)
    for row in range(8):
        cues = sound_cues(cache.scene(row), 33, 32, 32, 12)
        true = sorted(cue.seconds for cue in cues if cue.kind == "impact")
        inside = [at for at in true if 1 / 12 <= at < 33 / 12]
        found = times[impacts[row] > 0].numpy()
        assert len(found) == len(inside)
        assert np.abs(found - inside).max(initial=0) <= 1 / 12 / 4 + 1e-6  # half a part
    assert float(impacts.sum()) > 8
    assert float(impacts[:, 0].sum()) == 0


def test_clips_are_varied_and_their_impacts_stay_where_they_are(cache: ToyboxCache) -> None:
    clips, lengths = followed(cache, 8), set()
    for seed in range(12):
        made = varied(clips, 0.6, generator_of(seed))
        assert torch.equal(made.latents, varied(clips, 0.6, generator_of(seed)).latents)
        gone = clips.latents.shape[2] - made.latents.shape[2]
        assert made.latents.shape[3:] == clips.latents.shape[3:]
        assert torch.equal(made.impacts, clips.impacts[:, gone:])
        assert not torch.allclose(made.latents, clips.latents[:, :, gone:].float(), atol=0.1)
        lengths.add(made.latents.shape[2])
    assert len(lengths) > 1
    assert min(lengths) >= clips.latents.shape[2] / 2


def test_places_move_with_what_is_seen_of_clips(cache: ToyboxCache) -> None:
    """A clip that shows in one channel where its sprite is, moved and mirrored."""
    clips = followed(cache, 8)
    assert not clips.places.isnan().any()
    side = 16
    at = (clips.places.mean(2) * side).clamp(3, side - 4)  # well inside
    grid = torch.arange(side) + 0.5
    shown = torch.exp(-((grid - at[..., :1])[:, :, None, :].square()
                        + (grid - at[..., 1:])[..., None].square()))  # [B, F, h, w]
    marked = clips._replace(
        latents=shown[:, None].repeat(1, 2, 1, 1, 1), places=(at / side)[:, :, None]
    )
    for seed in range(8):
        made = varied(marked, 0.0, generator_of(seed))
        seen = made.latents[:, 0].flatten(2).argmax(2)
        found = torch.stack([seen % side, seen // side], dim=2) + 0.5
        steady = (made.places[:, 1:-1, 0] - made.places[:, :-2, 0]).abs().amax(2) < 1 / side
        off = (found / side - made.places[:, :, 0]).abs().amax(2)[:, 1:-1]
        assert float((off <= 1.5 / side)[steady].float().mean()) > 0.95


def test_where_two_are_none_is_followed(sounding: Path, tmp_path: Path) -> None:
    config = CacheConfig(str(tmp_path), str(sounding / "vae"), 1, shard_size=4, height=32, width=32,
                         mix=SceneMix(two_actors=1.0))
    pairs = ToyboxCache(config)
    assert places_in(pairs, 0).isnan().all()


@pytest.mark.long
def test_a_detector_is_taught_released_and_listens(
    cache: ToyboxCache, sounding: Path, tmp_path: Path, server: ForkServer
) -> None:
    small = {"dim": 8, "num_blocks": 1, "time_dim": 16, "num_time_blocks": 1}
    settings: dict[str, Any] = {
        "caches": [dump(cache.config)], "validation_clips": 2,
        "model": {"latent_channels": cache.load().clips.shape[1], **small},
        "run": {"folder": str(tmp_path / "run"), "device": "cpu", "validate_every": 3,
                "phases": [{"steps": 3, "num_frames": 33, "batch_size": 4}]},
    }
    file = tmp_path / "detector.yaml"
    file.write_text(yaml.safe_dump(settings))
    taught = run_program(server, "train/toybox/onset_detector.py", "-c", str(file))
    assert taught.returncode == 0, taught.stderr
    assert json.loads(taught.stdout)["bounces"] > 0
    out = Path(shutil.copytree(sounding, tmp_path / "model"))
    release = "train/toybox/release.py", "onset_detector", "--run", str(tmp_path / "run"), "--out"
    released = run_program(server, *release, str(out))
    assert released.returncode == 0, released.stderr
    engine = load(str(out), device="cpu", dtype="fp32")
    assert isinstance(engine, Engine)
    assert engine.folder.components["onset_detector"].config.time_dim == 16
    clip = engine.generate("a cat bounces", seed=1, frames=9, size="32x32", steps=2,
                           settings={"audio_candidates": 3})
    assert not isinstance(clip, list)
    assert clip.sound is not None


@pytest.mark.parametrize(("changed", "told"), [
    ({"noise": 1.0}, "noise is 1.0; a noise level lies in 0..1, below 1"),
    ({"validation_clips": 8}, "validation_clips is 8, but .* has 8"),
    ({"caches": {"stills_only": True}}, "has stills_only, where nothing happens"),
])
def test_runs_that_teach_nothing_are_refused(
    cache: ToyboxCache, tmp_path: Path, server: ForkServer, changed: dict[str, Any], told: str
) -> None:
    own = replace(cache.config, **changed.pop("caches", {}))
    run = {"folder": str(tmp_path / "run"), "device": "cpu",
           "phases": [{"steps": 1, "num_frames": 33, "batch_size": 2}]}
    file = tmp_path / "detector.yaml"
    settings = {"caches": [dump(own)], "validation_clips": 2, "run": run} | changed
    file.write_text(yaml.safe_dump(settings))
    refused = run_program(server, "train/toybox/onset_detector.py", "-c", str(file))
    assert refused.returncode == 2
    with pytest.raises(AssertionError, match=told):
        raise AssertionError(refused.stderr)
