"""A service of each file's own, a client of it, and a clip that it made."""

from __future__ import annotations

import pytest

from tests.lora_models import make_adapter, make_dit
from tests.services import Served
from vidgen.models.presets import DIT_PRESETS
from vidgen.weights.lora import write_lora


@pytest.fixture(scope="module")
def served(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    (folder / "loras").mkdir()
    adapter = make_adapter(make_dit(DIT_PRESETS["tiny"]))
    write_lora(adapter, folder / "loras" / "style.safetensors", "wan")
    options = ("--per-minute", "6000", "--upload-mb", "1", "--loras", str(folder / "loras"))
    with Served(tiny_model, folder / "data", *options) as served:
        yield served


@pytest.fixture(scope="module")
def client(served):
    return served.client(max_retries=0)


@pytest.fixture(scope="module")
def made(client):
    return client.videos.create_and_poll(
        prompt="a red car", model="tiny", seconds="0.75", size="32x32", poll_interval_ms=50,
        extra_body={"seed": 7, "num_inference_steps": 4, "guidance_scale": 2.5,
                    "negative_prompt": "a cat",
                    "extra_params": {"label": "visible", "aigc": "ACME"}},
    )
