"""The first-block cache leaves out the passes that diffusers' leaves out, with the same result."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache

from tests.parity.test_dit_parity import make_pair, relative_error
from vidgen.diffusion.cache import FirstBlock, StepCaches
from vidgen.models.presets import DIT_PRESETS


@pytest.mark.parametrize("threshold", [0.1, 0.2, 0.4])
@torch.no_grad()
def test_the_same_passes_are_left_out(threshold: float) -> None:
    config = replace(DIT_PRESETS["tiny"], num_layers=3)
    ours, theirs = make_pair(config)
    apply_first_block_cache(theirs, FirstBlockCacheConfig(threshold=threshold))
    ran: list[int] = []
    theirs.blocks[2].ffn.register_forward_hook(lambda *_: ran.append(1))
    caches = StepCaches(lambda _: FirstBlock(threshold))
    clean, noise = torch.randn(2, 1, config.in_channels, 3, 4, 6)
    context = torch.randn(1, 512, config.text_dim)
    with theirs.cache_context("prompt"):
        for sigma in torch.linspace(1, 0.05, 20):
            latents = (1 - sigma) * clean + sigma * noise
            timestep, count = (1000 * sigma)[None], len(ran)
            expected = theirs(latents, timestep, context).sample
            velocity = ours(
                latents, timestep, context, step_cache=caches.at("prompt", float(sigma))
            )
            assert caches.taken[-1][1] == (len(ran) > count)
            assert relative_error(velocity, expected) < 1e-5
    assert 1 < len(ran) < 20
