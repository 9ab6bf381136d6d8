"""What half-way tokens are asked beside the velocity."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from train.toybox.phases import Phase, PhasedRun
from train.toybox.tasks.dit_config import DiTData
from train.toybox.tasks.dit_data import Batch, ClipDraws
from train.toybox.tasks.toybox_data import CacheConfig, ToyboxCache, load_vae
from train.toybox.tasks.truth_heads import SHOWN, TruthHeads
from vidgen.models.dit import SpacetimeDiT
from vidgen.models.presets import DIT_PRESETS


@pytest.fixture(scope="module")
def batch(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Batch:
    folder = tmp_path_factory.mktemp("heads")
    phase = Phase(steps=1, num_frames=9, batch_size=6)
    cache = CacheConfig(str(folder / "latents"), str(tiny_model / "vae"), 1, shard_size=8,
                        height=64, width=64)
    ToyboxCache(cache).make(0, load_vae(cache.vae, torch.device("cpu")), torch.device("cpu"))
    run = PhasedRun(str(folder / "run"), phases=(phase,))
    data = DiTData(run=run, caches=(cache,), shifts=(1.0,),
                   tokenizer=str(tiny_model / "tokenizer"), validation_clips=2)
    return ClipDraws(data, torch.device("cpu"), patch=2).batch(phase, 0, 0)


@pytest.fixture
def dit() -> SpacetimeDiT:
    torch.manual_seed(0)
    return SpacetimeDiT(DIT_PRESETS["tiny"])


@pytest.mark.long
def test_tokens_of_a_sprite_learn_its_name(dit: SpacetimeDiT, batch: Batch) -> None:
    heads, cover = TruthHeads(dit), F.avg_pool3d(batch.cover, (1, 2, 2))[:, 0].flatten(1)
    tokens = torch.randn(*cover.shape, dit.config.hidden_dim, requires_grad=True)
    heads.tokens["half"] = [tokens]
    optimizer = torch.optim.Adam([*heads.parameters(), tokens], lr=0.1)
    found = []
    for _ in range(60):
        optimizer.zero_grad()
        found.append(heads.losses(batch)["names"])
        found[-1].backward()
        optimizer.step()
    assert float(found[-1].detach()) < 0.1 < float(found[0].detach())
    moved, shown = tokens.grad.abs().amax(2) > 0, (batch.shown >= 0)[:, None]
    assert torch.equal(moved, (cover >= SHOWN) & shown), "none but those that show one"


def test_runs_of_a_seed_begin_with_the_same_heads(dit: SpacetimeDiT) -> None:
    torch.manual_seed(5)
    heads = TruthHeads(dit)
    torch.manual_seed(5)
    width = dit.config.hidden_dim
    for name in ("cover", "names", "marks", "cues", "voices"):  # a new one comes last
        own = getattr(heads, name)
        drawn = torch.nn.Linear(width, own.out_features)
        assert torch.equal(own.weight, drawn.weight), name
        assert torch.equal(own.bias, drawn.bias), name
