"""What a verifier learns from, and the programs that teach and release one."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml

from tests.faults import ForkServer
from tests.programs import run_program
from train.toybox.model_files import save_module
from train.toybox.tasks.toybox_data import CacheConfig, ToyboxCache, load_vae
from train.toybox.tasks.verifier_data import (
    COLOURS,
    LABELS,
    NONE,
    OWN,
    UNSURE,
    named_frames,
    told_of,
)
from train.toybox.world.cast import SPRITE_NAMES, SPRITES
from train.toybox.world.render import render
from train.toybox.world.scenes import TINTS, Scene, SceneMix, sample_scenes
from vidgen.core.config import dump
from vidgen.models.verifier import Verifier, VerifierConfig
from vidgen.pipeline.engine import Engine, load
from vidgen.training.checkpoint import load_averages

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def cache(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> ToyboxCache:
    config = CacheConfig(str(tmp_path_factory.mktemp("named") / "latents"),
                         str(tiny_model / "vae"), 1, shard_size=8, height=64, width=64,
                         mix=SceneMix(two_actors=0.5))
    made = ToyboxCache(config)
    made.make(0, load_vae(config.vae, CPU), CPU)
    return made


def _pairs(count: int) -> list[Scene]:
    scenes = sample_scenes(900, 4 * count, SceneMix(two_actors=0.9))
    return [scene for scene in scenes if len(scene.actors) > 1][:count]


def test_each_of_two_sprites_is_named_where_it_is() -> None:
    right, seen = 0, 0
    for scene in _pairs(6):
        size = 33, 128, 128, 12
        masks = render([scene], *size).masks[0]  # [2, T, H, W]
        covers = F.avg_pool2d(masks[:, 3::4], 8)
        names, tints = told_of(scene, covers.amax(0), range(3, 33, 4), *size)
        sure = (names != UNSURE) & (names != NONE)
        own = torch.tensor([SPRITE_NAMES.index(actor.sprite) for actor in scene.actors])
        right += int((own[covers.argmax(0)] == names)[sure].sum())
        seen += int(sure.sum())
        assert ((names == NONE) == (covers.amax(0) <= 0.05)).all()
        assert ((tints == UNSURE) == ~sure).all()
        for number, actor in enumerate(scene.actors):
            mine = tints[names == own[number]].unique().tolist()
            colour = actor.tint or SPRITES[actor.sprite].color
            if actor.sprite != scene.actors[1 - number].sprite:
                assert mine in ([], [TINTS.index(colour) if colour in TINTS else OWN])
    assert seen > 300
    assert right / seen > 0.98


def test_all_kept_frames_are_named(cache: ToyboxCache) -> None:
    frames, clips = named_frames(cache), cache.load()
    assert len(frames.latents) == len(frames.names) == len(frames.tints) == 8 * (9 / 2 + 3)
    assert torch.equal(frames.latents[0], clips.clips[0, :, 0])
    first = cache.scene(0)
    alone = frames.names[7]  # the first clip's reference, behind five frames and two stills
    told = alone[(alone != NONE) & (alone != UNSURE)].unique().tolist()
    assert told == [SPRITE_NAMES.index(first.actors[0].sprite)]


def test_a_verifier_is_taught_released_and_chooses(
    cache: ToyboxCache, tiny_model: Path, tmp_path: Path, server: ForkServer
) -> None:
    settings: dict[str, Any] = {
        "caches": [dump(cache.config)], "model": {"dim": 8, "num_blocks": 1, "enough": 2.0},
        "validation_frames": 8,
        "run": {"folder": str(tmp_path / "run"), "device": "cpu", "validate_every": 3,
                "phases": [{"steps": 3, "num_frames": 1, "batch_size": 8}]},
    }
    settings["model"]["latent_channels"] = cache.load().clips.shape[1]
    file = tmp_path / "verifier.yaml"
    file.write_text(yaml.safe_dump(settings))
    taught = run_program(server, "train/toybox/verifier.py", "-c", str(file))
    assert taught.returncode == 0, taught.stderr
    assert 0 <= json.loads(taught.stdout)["right_0.2"] <= 1
    out = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    run = str(tmp_path / "run")
    release = "train/toybox/release.py", "verifier", "--run", run, "--out", str(out)
    released = run_program(server, *release)
    assert released.returncode == 0, released.stderr
    engine = load(str(out), device="cpu", dtype="fp32")
    assert isinstance(engine, Engine)
    assert engine.folder.defaults.settings["candidates"] == 4
    assert engine.folder.defaults.settings["regional_prompts"] == 1.0
    known = engine.folder.components["verifier"].config
    assert [names[0] for names in known.labels] == list(SPRITE_NAMES)
    assert [words[0] for words in known.tints] == list(TINTS)
    told: list[int] = []
    engine.generate("a cat", seed=1, frames=5, size="32x32", steps=2, on_event=lambda p:
                    told.append(p.total) if p.stage == "sample" else None)
    assert told == [2, 2, 2, 4, 4, 4, 6, 6, 6, 8, 8, 8]


def test_tints_are_taught_to_a_verifier_that_stays_as_it_is(
    cache: ToyboxCache, tmp_path: Path, server: ForkServer
) -> None:
    plain = VerifierConfig(LABELS, latent_channels=cache.load().clips.shape[1], dim=8, num_blocks=1)
    torch.manual_seed(3)
    before = Verifier(plain)
    save_module(before.state_dict(), plain, tmp_path / "plain", torch.float32)
    model = {"dim": 8, "num_blocks": 1, "latent_channels": plain.latent_channels}
    run = {"folder": str(tmp_path / "run"), "device": "cpu", "validate_every": 3,
           "phases": [{"steps": 3, "num_frames": 1, "batch_size": 8}]}
    file = tmp_path / "tints.yaml"
    settings = {"caches": [dump(cache.config)], "model": model, "validation_frames": 8,
                "part": "tints", "init": str(tmp_path / "plain"), "run": run}
    file.write_text(yaml.safe_dump(settings))
    taught = run_program(server, "train/toybox/verifier.py", "-c", str(file))
    assert taught.returncode == 0, taught.stderr
    assert 0 <= json.loads(taught.stdout)["right_tint_0.2"] <= 1
    after = Verifier(replace(plain, tints=COLOURS))
    after.load_state_dict(load_averages(tmp_path / "run", "verifier"))
    latents = torch.randn(2, plain.latent_channels, 3, 8, 8)
    assert torch.equal(after.eval().where(latents), before.eval().where(latents))
    settings["model"] = model | {"num_blocks": 2}
    settings["run"] = run | {"folder": str(tmp_path / "other")}
    file.write_text(yaml.safe_dump(settings))
    refused = run_program(server, "train/toybox/verifier.py", "-c", str(file))
    assert refused.returncode == 2
    assert "holds another verifier than model: describes" in refused.stderr


@pytest.mark.parametrize(("changed", "told"), [
    ({"part": "tints"}, "part is tints, of a verifier that there isn't; give its folder as init"),
    ({"noise": 1.0}, "noise is 1.0; a noise level lies in 0..1, below 1"),
    ({"validation_frames": 60}, "validation_frames is 60, but the first cache has 60"),
])
def test_runs_that_teach_nothing_are_refused(
    cache: ToyboxCache, tmp_path: Path, server: ForkServer, changed: dict[str, Any], told: str
) -> None:
    run = {"folder": str(tmp_path / "run"), "device": "cpu",
           "phases": [{"steps": 1, "num_frames": 1, "batch_size": 2}]}
    file = tmp_path / "verifier.yaml"
    file.write_text(yaml.safe_dump({"caches": [dump(cache.config)], "run": run} | changed))
    refused = run_program(server, "train/toybox/verifier.py", "-c", str(file))
    assert (refused.returncode, told in refused.stderr) == (2, True), refused.stderr
