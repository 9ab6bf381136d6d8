"""A diffusers scheduler in our pipeline, and our sampler of the same name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from vidgen.core.errors import InputError
from vidgen.pipeline.engine import load

PROMPT = "a red car bounces across the desert"


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        ("unipc", UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)),
        ("euler", FlowMatchEulerDiscreteScheduler(shift=3.0)),
    ],
)
def test_a_scheduler_of_diffusers_gives_what_our_sampler_gives(
    tiny_model: Path, name: str, scheduler: object
) -> None:
    engine = load(str(tiny_model), device="cpu", dtype="fp32")
    own = engine.generate(PROMPT, seed=1, sampler=name, steps=4)
    given = engine.generate(PROMPT, seed=1, sampler=scheduler, steps=4)
    assert torch.allclose(own.latents, given.latents, atol=1e-4)
    assert given.recipe["plan"]["sampler"] == type(scheduler).__name__
    json.dumps(given.recipe)
    with pytest.raises(InputError, match="has its own"):
        engine.generate(PROMPT, seed=1, sampler=scheduler, shift=2.0)
