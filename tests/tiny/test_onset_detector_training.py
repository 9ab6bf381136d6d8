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
from vidgen.core.config import dump
from vidgen.models.onset_detector import part_times
from vidgen.pipeline.video import Engine, load
from vidgen.toybox.cues import sound_cues
from vidgen.training.draws import generator_of
from vidgen.training.embedded.onset_data import impacts_in, varied
from vidgen.training.embedded.toybox_data import CacheConfig, ToyboxCache, load_vae

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
    impacts = impacts_in(cache, range(8), 8)
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
    latents, impacts = cache.load().clips.float(), impacts_in(cache, range(8), 8)
    lengths = set()
    for seed in range(12):
        made, hit = varied(latents, impacts, 0.6, generator_of(seed))
        again, _ = varied(latents, impacts, 0.6, generator_of(seed))
        assert torch.equal(made, again)
        gone = latents.shape[2] - made.shape[2]
        assert made.shape[3:] == latents.shape[3:]
        assert torch.equal(hit, impacts[:, gone:])
        assert not torch.allclose(made, latents[:, :, gone:], atol=0.1)
        lengths.add(made.shape[2])
    assert len(lengths) > 1
    assert min(lengths) >= latents.shape[2] / 2


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
    taught = run_program(server, "train/onset_detector.py", "-c", str(file))
    assert taught.returncode == 0, taught.stderr
    assert json.loads(taught.stdout)["bounces"] > 0
    out = Path(shutil.copytree(sounding, tmp_path / "model"))
    release = "train/release.py", "onset_detector", "--run", str(tmp_path / "run"), "--out"
    released = run_program(server, *release, str(out))
    assert released.returncode == 0, released.stderr
    engine = load(str(out), device="cpu", dtype="fp32")
    assert isinstance(engine, Engine)
    assert engine.folder.components["onset_detector"].config.time_dim == 16
    clip = engine.generate("a cat bounces", seed=1, frames=9, size="32x32", steps=2,
                           audio_candidates=3)
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
    refused = run_program(server, "train/onset_detector.py", "-c", str(file))
    assert refused.returncode == 2
    with pytest.raises(AssertionError, match=told):
        raise AssertionError(refused.stderr)
