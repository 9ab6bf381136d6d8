"""Fine-tuning an expert that draws at a finer frame rate: it learns what it will be asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.finetuning import build_clips, make_config
from tests.models import add_low_expert, build_tiny_model
from tests.wan_models import build_diffusers
from vidgen.core.errors import InputError
from vidgen.core.request import Request
from vidgen.diffusion.temporal_upsampling import upsampled_state
from vidgen.media.video_reader import VideoReader
from vidgen.pipeline.engine import Engine, load
from vidgen.pipeline.inputs import Inputs, pixels_of
from vidgen.pipeline.loader import EXPERTS
from vidgen.training.data.cache import make_cache
from vidgen.training.data.dataset import open_dataset
from vidgen.training.data.survey import survey
from vidgen.training.finetune import task as finetuning
from vidgen.training.finetune.plan import plan
from vidgen.training.finetune.run import finetune
from vidgen.training.finetune.task import Conditions, FinetuneTask
from vidgen.weights.layouts import open_model

HIGH, LOW = EXPERTS


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = build_tiny_model(tmp_path_factory.mktemp("models") / "finer")
    return add_low_expert(folder, 0.8, temporal_upsampling=2)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_clips(tmp_path_factory.mktemp("data") / "clips", count=2)


def test_clips_are_encoded_at_both_rates(model: Path, clips: Path, tmp_path: Path) -> None:
    data = open_dataset(make_config(model, clips, tmp_path).data, str(model))
    batch = data.item_batch([0])
    assert batch["latents"].shape == (1, 4, 3, 4, 4)
    assert batch["finer"].shape == (1, 4, 5, 4, 4)
    engine = load(str(model), device="cpu", dtype="fp32")
    assert isinstance(engine, Engine)
    with VideoReader(clips / batch["files"][0]) as video:
        pixels = pixels_of(list(video), 32, 32, "crop")
    expected = engine.encode_video(pixels, passes=1, rate=2)
    torch.testing.assert_close(batch["finer"], expected, rtol=1e-4, atol=1e-4)


def test_each_expert_learns_at_the_rate_it_draws_at(
    model: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, folder = make_config(model, clips, tmp_path), open_model(str(model))
    task = FinetuneTask(config, folder, open_dataset(config.data, folder, batch_size=2))
    shapes: dict[str, set[tuple[int, float]]] = {HIGH: set(), LOW: set()}
    for step in range(60):
        batch = task.batch(step, 0)
        state = batch.state
        assert batch.noise.shape == state.clean.shape
        shapes[batch.role].add((state.clean.shape[2], state.spacing))
    assert shapes == {HIGH: {(3, 1.0)}, LOW: {(3, 1.0), (5, 0.5)}}
    monkeypatch.setattr(finetuning, "SHOWN_SHARE", 0.0)
    low = [batch for step in range(12)
           if (batch := task.batch(step, 0)).role == LOW]
    assert {batch.state.clean.shape[2] for batch in low} == {5}
    held = [task._held_out(0, sigma, role) for sigma, role in ((0.95, HIGH), (0.3, LOW))]
    assert [batch.state.spacing for batch in held] == [1.0, 0.5]
    elsewhere = replace(low[0], state=replace(low[0].state, spacing=1.0))
    with torch.no_grad():
        asked_for, other = (float(task._error(batch)) for batch in (low[0], elsewhere))
    assert other != pytest.approx(asked_for, rel=1e-4)


@pytest.mark.parametrize("kind", ["last", "both"])
def test_stills_lie_where_generation_puts_them(
    kind: str, model: Path, clips: Path, tmp_path: Path
) -> None:
    data = open_dataset(make_config(model, clips, tmp_path).data, str(model))
    draw = torch.Generator().manual_seed(0)
    learned = Conditions(open_model(str(model)), {kind: 1.0}).write(data.item_batch([0]), draw, 2)
    engine = load(str(model), device="cpu", dtype="fp32")
    assert isinstance(engine, Engine)
    with VideoReader(clips / "clip0.mkv") as video:
        picture = next(iter(video))
    images = {"last_image": [picture], **({"image": [picture]} if kind == "both" else {})}
    request = Request.of("a red car", dict.fromkeys(images, "clip0.mkv"))
    given = Inputs(images=images)
    asked = upsampled_state(
        engine.prepare(engine.plan(request, given), request, given), torch.zeros(1, 4, 3, 4, 4),
        0.5, 2, 4,
    )
    assert learned.timed_keys is not None
    assert asked.timed_keys is not None
    assert torch.equal(learned.timed_keys.positions, asked.timed_keys.positions)
    assert learned.times is not None
    assert asked.times is not None
    assert torch.equal(learned.times, asked.times)
    assert torch.equal(learned.denoise_mask, asked.denoise_mask)


def test_it_learns_and_is_planned_for_as_many_frames(
    model: Path, clips: Path, tmp_path: Path
) -> None:
    learn = {"steps": 12, "validate_every": 6, "optim": {"lr": 0.02, "warmup_steps": 1},
             "ema_decay": 0.5}  # fmt: skip
    low = make_config(model, clips, tmp_path / "low", experts="low", run=learn,
                      validation={"steps": 4})
    told = finetune(low)
    assert told["finished"]
    assert told["delta_norm"][LOW] > 1e-4
    assert told["ab_difference"] > 0
    high = make_config(model, clips, tmp_path / "high", experts="high")
    kept = [plan(config).device["activations"] for config in (low, high)]
    assert 3 * kept[0] == pytest.approx(5 * kept[1], rel=1e-3)


def test_caches_know_their_rates(model: Path, clips: Path, tmp_path: Path) -> None:
    config = replace(make_config(model, clips, tmp_path).data, cache=str(tmp_path / "cache"))
    folder = open_model(str(model))
    make_cache(config, folder, str(model), survey(config, folder, lambda _: None), lambda _: None)
    cached, anew = (open_dataset(each, folder).item_batch([1])
                    for each in (config, replace(config, cache="none")))
    torch.testing.assert_close(cached["finer"], anew["finer"], rtol=1e-2, atol=1e-2)
    one_rate = replace(folder, defaults=replace(folder.defaults, settings={}))
    with pytest.raises(InputError, match=r"extras was .*rate': 2"):
        open_dataset(config, one_rate)


def test_models_of_one_rate_have_no_finer_latents(clips: Path, tmp_path: Path) -> None:
    wan = build_diffusers(tmp_path / "wan", "ti2v-5b")
    config = replace(make_config(wan, clips, tmp_path).data, cache=str(tmp_path / "cache"))
    folder = open_model(str(wan))
    make_cache(config, folder, str(wan), survey(config, folder, lambda _: None), lambda _: None)
    assert "finer" not in open_dataset(config, folder).item_batch([0])
