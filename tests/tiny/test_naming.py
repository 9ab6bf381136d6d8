"""A namer, and what transformers learn from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vidgen.core.errors import InputError, ModelError
from vidgen.toybox.render import render
from vidgen.toybox.scenes import SPRITE_NAMES, Scene, SceneMix, sample_scenes
from vidgen.training.config import Phase, RunConfig
from vidgen.training.embedded.dit_config import DiTData
from vidgen.training.embedded.dit_data import Batch, ClipDraws
from vidgen.training.embedded.namer import (
    COVERED,
    NONE,
    UNSURE,
    Namer,
    NamerConfig,
    load_namer,
    named_frames,
    names_shown,
)
from vidgen.training.embedded.naming import Naming, NamingConfig
from vidgen.training.embedded.toybox_data import CacheConfig, ToyboxCache, load_vae
from vidgen.weights.load import save_module

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def cache(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> ToyboxCache:
    config = CacheConfig(str(tmp_path_factory.mktemp("named") / "latents"),
                         str(tiny_model / "vae"), 1, shard_size=8, height=64, width=64,
                         mix=SceneMix(two_actors=0.5))
    made = ToyboxCache(config)
    made.make(0, load_vae(config.vae, CPU), CPU)
    return made


@pytest.fixture(scope="module")
def batch(cache: ToyboxCache, tiny_model: Path) -> Batch:
    phase = Phase(steps=1, num_frames=33, batch_size=6)
    data = DiTData(run=RunConfig("run", (phase,)), caches=(cache.config,), shifts=(1.0,),
                   tokenizer=str(tiny_model / "tokenizer"), validation_clips=2)
    return ClipDraws(data, CPU, patch=2).batch(phase, 0, 0)


@pytest.fixture(scope="module")
def naming(cache: ToyboxCache, tmp_path_factory: pytest.TempPathFactory) -> Naming:
    torch.manual_seed(0)
    config = NamerConfig(latent_channels=cache.load().clips.shape[1], dim=16, blocks=1)
    folder = tmp_path_factory.mktemp("namer")
    save_module(Namer(config).state_dict(), config, folder, torch.float32)
    return Naming(NamingConfig(str(folder), noise=0.0), CPU)


def _pairs(count: int) -> list[Scene]:
    scenes = sample_scenes(900, 4 * count, SceneMix(two_actors=0.9))
    return [scene for scene in scenes if len(scene.actors) > 1][:count]


def test_each_of_two_sprites_is_named_where_it_is() -> None:
    right, seen = 0, 0
    for scene in _pairs(6):
        size = 33, 128, 128, 12
        masks = render([scene], *size).masks[0]  # [2, T, H, W]
        covers = F.avg_pool2d(masks[:, 3::4], 8)
        names = names_shown(scene, covers.amax(0), range(3, 33, 4), *size)
        sure = (names != UNSURE) & (names != NONE)
        own = torch.tensor([SPRITE_NAMES.index(actor.sprite) for actor in scene.actors])
        right += int((own[covers.argmax(0)] == names)[sure].sum())
        seen += int(sure.sum())
        assert ((names == NONE) == (covers.amax(0) <= 0.05)).all()
    assert seen > 300
    assert right / seen > 0.98


def test_all_kept_frames_are_named(cache: ToyboxCache) -> None:
    frames, clips = named_frames(cache), cache.load()
    assert len(frames.latents) == len(frames.names) == 8 * (9 / 2 + 3)
    assert torch.equal(frames.latents[0], clips.clips[0, :, 0])
    first = cache.scene(0)
    alone = frames.names[7]  # the first clip's reference, behind five frames and two stills
    told = alone[(alone != NONE) & (alone != UNSURE)].unique().tolist()
    assert told == [SPRITE_NAMES.index(first.actors[0].sprite)]


def test_the_truth_is_named_as_itself(batch: Batch, naming: Naming) -> None:
    clean, draw = batch.state.clean, torch.Generator().manual_seed(0)
    same = naming.losses(batch, clean, draw)
    other = naming.losses(batch, torch.randn_like(clean), draw)
    assert float(same["unlike"]) < 1e-5 < float(other["unlike"])
    assert float(same["named"]) < float(other["named"])


def test_nothing_is_learned_from_what_is_given(batch: Batch, naming: Naming) -> None:
    def touched(batch: Batch) -> Tensor:
        clean = torch.randn_like(batch.state.clean).requires_grad_()
        losses = naming.losses(batch, clean, torch.Generator().manual_seed(0))
        (gradient,) = torch.autograd.grad(naming.weighed(losses), clean)
        return gradient.abs().amax((1, 3, 4)) > 0  # [B, F]

    wanted = ((batch.cover >= COVERED) & batch.state.denoise_mask).any(4).any(3)[:, 0]
    assert torch.equal(touched(batch), wanted)
    given = replace(batch.state, denoise_mask=torch.zeros_like(batch.state.denoise_mask))
    assert not touched(replace(batch, state=given)).any()


def test_so_many_frames_are_looked_at(batch: Batch, naming: Naming) -> None:
    few = Naming(replace(naming.config, frames=3), CPU)
    clean = torch.randn_like(batch.state.clean).requires_grad_()
    loss = few.losses(batch, clean, torch.Generator().manual_seed(0))["unlike"]
    (gradient,) = torch.autograd.grad(loss, clean)
    assert (gradient.abs().amax((1, 3, 4)) > 0).sum() == 3


@pytest.mark.parametrize(("setting", "value"), [("noise", 1.0), ("frames", 0)])
def test_settings_that_cannot_be_are_refused(setting: str, value: float) -> None:
    with pytest.raises(InputError, match=f"{setting} is {value}"):
        NamingConfig("namer", **{setting: value})  # type: ignore[arg-type]


def test_a_namer_of_another_world_is_refused(tmp_path: Path) -> None:
    config = NamerConfig(dim=8, blocks=0, world_version=0)
    save_module(Namer(config).state_dict(), config, tmp_path, torch.float32)
    with pytest.raises(ModelError, match=r"train it again with train/namer.py"):
        load_namer(tmp_path, CPU)
