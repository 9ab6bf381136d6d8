"""Several devices give what one gives: real worker processes, tiny models."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.models import build_tiny_model
from tests.stopping import stop_at
from vidgen.core.errors import Cancelled, DeviceError, InputError
from vidgen.core.request import Loading
from vidgen.diffusion import cache
from vidgen.diffusion.cache import Magnitudes, StepCaches, make_caches
from vidgen.models.dit import SpacetimeDiT
from vidgen.models.presets import DIT_PRESETS
from vidgen.pipeline.codec import room_in_file
from vidgen.pipeline.engine import Engine, load
from vidgen.pipeline.journal import journal
from vidgen.pipeline.journal.journal import Journal
from vidgen.pipeline.parallel import devices as devices_module
from vidgen.pipeline.parallel.devices import Devices, start_devices
from vidgen.pipeline.plan import write_magnitudes
from vidgen.pipeline.replay import loading_from_recipe
from vidgen.weights.layouts import open_model

PROMPT = "a red car bounces across the desert"
CPU = torch.device("cpu")
LONG = torch.randn(1, 4, 64, 4, 4, generator=torch.Generator().manual_seed(0))
"""Latents of 253 frames, twice as many as the decoder looks back on."""


def open_engine(folder: Path, devices: Devices | None = None) -> Engine:
    asked = Loading(offload="none", dtype="fp32")
    return Engine(open_model(str(folder)), CPU, asked, devices=devices)


@pytest.fixture(scope="module")
def two() -> Iterator[Devices]:
    devices = start_devices(2, CPU)
    yield devices
    devices.close()


@pytest.fixture(scope="module")
def one(tiny_model: Path) -> Engine:
    return open_engine(tiny_model)


@pytest.fixture(scope="module")
def heard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("models") / "heard", sound=True)


@pytest.fixture
def both(tiny_model: Path, two: Devices) -> Engine:
    return open_engine(tiny_model, two)


@pytest.mark.parametrize("options", [
    {}, {"guidance": 1.0}, {"guidance_interval": (0.0, 0.8), "steps": 3}, {"frames": 37},
    {"sampler": "unipc", "steps": 4, "size": "48x32"}, {"frames": 1, "guidance": 1.0},
    {"last_image": np.full((32, 48, 3), 90, np.uint8), "size": "48x48", "guidance": 1.0},
], ids=str)  # fmt: skip
@pytest.mark.usefixtures("one_thread")  # several share products of other sizes out otherwise
def test_two_devices_give_the_frames_of_one(one: Engine, both: Engine, options: dict) -> None:
    alone, shared = (engine.generate(PROMPT, seed=3, **options) for engine in (one, both))
    assert (alone.latents - shared.latents).abs().max() < 1e-5
    assert np.array_equal(alone.frames, shared.frames)
    guided = options.get("guidance") != 1.0
    assert shared.recipe["devices"] == {
        "count": 2, "guidance": 1 + guided, "sequence": 2 - guided, "shard": False,
    }
    assert "devices" not in alone.recipe


@pytest.mark.parametrize(
    "options", [{}, {"guidance": 1.0}, {"frames": 33, "cache": "forecast:0.2"}], ids=str
)
def test_two_devices_make_the_sound_of_one(
    heard: Path, two: Devices, options: dict[str, object]
) -> None:
    engines = open_engine(heard), open_engine(heard, two)
    alone, shared = (engine.generate(PROMPT, seed=3, steps=4, **options) for engine in engines)
    assert (alone.latents - shared.latents).abs().max() < 1e-5
    assert np.abs(alone.sound - shared.sound).max() < 1e-4
    assert np.abs(alone.sound).max() > 0


def test_decoding_is_bit_equal_from_any_frame(
    one: Engine, both: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent, send = [], both.devices._send
    monkeypatch.setattr(both.devices, "_send", lambda *order: sent.append(order) or send(*order))
    for start in (0, 1, 150):
        alone, shared = (list(engine.decode_video(LONG, start)) for engine in (one, both))
        assert sent.pop()[1] == "decode", "too short to be shared"
        assert len(alone) == len(shared)
        assert all(map(torch.equal, alone, shared))


def test_a_half_decoded_clip_waits_while_another_is_made(one: Engine, both: Engine) -> None:
    chunks = both.decode_video(LONG)
    first = next(chunks)
    other = both.generate(PROMPT, seed=4)
    assert np.array_equal(other.frames, one.generate(PROMPT, seed=4).frames)
    shared = [first, *chunks]
    assert all(map(torch.equal, one.decode_video(LONG), shared))
    assert len(shared) == LONG.shape[2]


def test_an_abandoned_clip_is_not_waited_for(
    one: Engine, both: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks = both.decode_video(LONG)
    next(chunks)
    with monkeypatch.context() as patch:
        patch.setattr(Devices, "_take_messages", None)  # it would fail
        chunks.close()
    shared = both.decode_video(LONG[:, :, :40].contiguous())
    assert all(map(torch.equal, one.decode_video(LONG[:, :, :40].contiguous()), shared))


def test_frames_that_a_device_could_not_write_are_never_black(
    both: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def gone(num_bytes: int) -> Iterator[tuple[str, torch.Tensor]]:
        with room_in_file(num_bytes) as (name, room):
            yield f"{name}-gone", room

    with monkeypatch.context() as patch:
        patch.setattr(devices_module, "room_in_file", gone)
        with pytest.raises(DeviceError, match="of the frames was removed"):
            list(both.decode_video(LONG))


@pytest.mark.parametrize(("guidance", "rank", "is_sent"), [
    (1, 1, False), (2, 1, False), (2, 2, True), (2, 3, False)])  # fmt: skip
def test_one_rank_alone_sends_the_memory_of_step_caches(
    guidance: int, rank: int, is_sent: bool
) -> None:
    worker = devices_module.DeviceWorker()
    calls = []
    worker._caches = SimpleNamespace(state=lambda: calls.append(1) or {"skips": torch.ones(1)})
    worker._division = devices_module.ipc.Division(guidance, 2)
    worker._channel = SimpleNamespace(rank=rank)
    assert (worker.remember() is not None) == is_sent
    assert calls == [1], "ranks that share a sequence join its parts"


def test_a_clip_that_is_stopped_goes_on(both: Engine, tmp_path: Path) -> None:
    output, options = tmp_path / "clip.mkv", {"seed": 3, "steps": 4}
    with pytest.raises(Cancelled):
        both.generate(PROMPT, journal=Journal(output), on_event=stop_at(2), **options)
    clip = both.generate(PROMPT, journal=Journal(output, resume=True), **options)
    assert torch.equal(clip.latents, both.generate(PROMPT, **options).latents)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[StepCaches | None]:
    """The caches of each run of the sampler, as rank 0 has them."""
    made: list[StepCaches | None] = []

    def noted(*args: object) -> StepCaches | None:
        made.append(make_caches(*args))
        return made[-1]

    monkeypatch.setattr(cache, "make_caches", noted)
    return made


def computed(caches: StepCaches) -> list[bool]:
    """Which steps of a run were computed."""
    return [was_computed for _, was_computed in caches.taken]


CACHED = {"seed": 3, "steps": 12, "size": "48x48", "frames": 9}
"""27 tokens, which two ranks can't share evenly."""


@pytest.mark.parametrize("guidance", [
    {"guidance": 1.0}, {}, {"guidance_interval": (0.0, 0.8)},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("cache", ["first-block:0.3", "magnitude:0.01", "forecast:0.3"])
def test_two_devices_spare_the_steps_of_one(
    one: Engine, both: Engine, runs: list, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, cache: str, guidance: dict,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    logs = (0.0, 0.05, 0.1)
    write_magnitudes(Magnitudes((1.0, 0.5, 0.1), {"prompt": logs, "negative": logs}), one.folder)
    options = {**CACHED, **guidance}
    for choice in (cache, f"{cache.partition(':')[0]}:0"):
        alone, shared = (
            engine.generate(PROMPT, **options, cache=choice).latents for engine in (one, both)
        )
        assert (alone - shared).abs().max() < 1e-5
        taken, same = map(computed, runs)
        assert taken == same
        assert len(taken) == 12
        assert all(taken) == choice.endswith(":0")
        runs.clear()
    assert torch.equal(shared, both.generate(PROMPT, **options).latents)


@pytest.mark.parametrize("guidance", [3.0, 1.0])
@pytest.mark.parametrize("cache", ["first-block:100", "forecast:100"])
def test_a_clip_with_a_cache_continues_in_the_middle_of_a_window(
    both: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: str, guidance: float
) -> None:
    monkeypatch.setattr(journal, "PATIENCE", 0)
    options = {"seed": 3, "steps": 8, "frames": 37, "cache": cache, "guidance": guidance}
    straight = both.generate(PROMPT, **options).latents
    for step in (4, 8 + 4, 8 + 6):  # after a spared step and a computed one, of two windows
        out = tmp_path / f"{step}.mkv"
        with pytest.raises(Cancelled):
            both.generate(PROMPT, journal=Journal(out), on_event=stop_at(step), **options)
        clip = both.generate(PROMPT, journal=Journal(out, resume=True), **options)
        assert torch.equal(clip.latents, straight)


def test_a_job_that_began_on_two_devices_is_not_mixed_with_one(
    one: Engine, both: Engine, tmp_path: Path
) -> None:
    output = tmp_path / "clip.mkv"
    journal = Journal(output)
    with journal.running(both.generate(PROMPT, seed=3).recipe):
        journal.keep_latents(torch.zeros(1, 4, 3, 4, 4))
        journal.pause()
    with pytest.raises(InputError, match="devices"):
        one.generate(PROMPT, seed=3, journal=Journal(output, resume=True))


def test_a_replay_takes_as_many_devices_if_they_are_here(
    both: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = both.generate(PROMPT, seed=3).recipe
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert loading_from_recipe(recipe)["devices"] == 2
    assert loading_from_recipe(recipe, changes={"devices": 1})["devices"] == 1
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    assert loading_from_recipe(recipe)["devices"] == 1
    assert "made on 2 devices, this machine has 1" in caplog.text
    with pytest.raises(InputError, match="10000 devices"):
        loading_from_recipe({**recipe, "devices": {"count": 10000}})


def test_both_experts_of_wan_are_shared(two: Devices, tmp_path: Path) -> None:
    from tests.wan_models import build_diffusers

    folder = build_diffusers(tmp_path / "wan", "i2v-a14b")
    picture = np.full((32, 32, 3), 90, np.uint8)
    options = {"seed": 1, "frames": 5, "size": "32x32", "steps": 3, "image": picture}
    for guidance in (3.5, 1.0):
        alone, shared = (
            open_engine(folder, devices).generate(PROMPT, guidance=guidance, **options)
            for devices in (None, two)
        )
        assert (alone.latents - shared.latents).abs().max() < 1e-5
        assert np.array_equal(alone.frames, shared.frames)


def test_four_devices_share_guidance_tokens_and_weights(
    tiny_model: Path, one: Engine, two: Devices, runs: list
) -> None:
    two.close()  # a process belongs to one group at a time
    with pytest.raises(DeviceError, match="have stopped"):
        two.order("end")
    engine = load(str(tiny_model), device="cpu", dtype="fp32", devices=4, shard=True)
    options = {"seed": 3, "guidance_interval": (0.0, 0.8), "steps": 3}
    clip = engine.generate(PROMPT, **options)
    assert (clip.latents - one.generate(PROMPT, **options).latents).abs().max() < 1e-5
    assert clip.recipe["devices"] == {"count": 4, "guidance": 2, "sequence": 2, "shard": True}
    assert engine.offload == "stage"
    cached = {**options, "steps": 12, "cache": "first-block:0.3"}
    shared, alone = (made.generate(PROMPT, **cached).latents for made in (engine, one))
    assert (shared - alone).abs().max() < 1e-5
    taken, same = map(computed, runs[-2:])
    assert taken == same
    assert not all(taken)
    with engine.loader.use("transformer") as dit:
        whole = SpacetimeDiT(DIT_PRESETS["tiny"])
        here = sum(p.to_local().numel() for p in dit.blocks.parameters())
        assert here < 0.4 * sum(p.numel() for p in whole.blocks.parameters())
    with pytest.raises(InputError, match="2 attention heads; give at most 2 devices"):
        engine.generate(PROMPT, seed=3, guidance=1.0)
    with pytest.raises(InputError, match="in use in this process"):
        load(str(tiny_model), device="cpu", devices=2)
    os.kill(engine.devices._pool.workers[1].process.pid, signal.SIGKILL)
    with pytest.raises(DeviceError, match="device 2 of 4 failed: killed by SIGKILL"):
        engine.generate(PROMPT, seed=3)
    assert all(worker.process.poll() is not None for worker in engine.devices._pool.workers)
    with pytest.raises(DeviceError, match="have stopped"):
        engine.generate(PROMPT, seed=3)


def test_frames_of_devices_that_have_stopped_are_never_grey(tiny_model: Path, two: Devices) -> None:
    two.close()
    devices = start_devices(2, CPU)
    engine = open_engine(tiny_model, devices)
    chunks = engine.decode_video(LONG)
    next(chunks)
    devices.close()
    with pytest.raises(DeviceError, match="have stopped"):
        list(chunks)


@pytest.mark.parametrize(("options", "message"), [
    ({"shard": True}, "--devices 2 or more"), ({"devices": 0}, "from 1 to 1024"),
    ({"devices": 2, "shard": True, "quantize": "int8"}, "neither int8"),
    ({"devices": 2, "shard": True, "offload": "block"}, "offloaded by block"),
], ids=str)  # fmt: skip
def test_what_does_not_go_together_is_refused(
    tiny_model: Path, options: dict, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        load(str(tiny_model), device="cpu", **options)


def test_more_devices_than_the_machine_has_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="devices is 2, but torch sees 1; give 1 or fewer"):
        start_devices(2, torch.device("cuda"))
