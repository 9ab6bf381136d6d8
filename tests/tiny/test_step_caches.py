"""Step caches on a tiny model: threshold 0 is no cache, bit for bit, and resuming changes none."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.stopping import stop_at
from train.toybox.initial import init_dit
from vidgen.core.errors import Cancelled, InputError, ModelError
from vidgen.core.protocols import SamplerState, StepInfo
from vidgen.diffusion.cache import (
    CacheChoice,
    FirstBlock,
    Forecast,
    Magnitudes,
    Probe,
    StepCaches,
    carrying,
    magnitudes_of,
    make_caches,
    relative_change,
)
from vidgen.diffusion.guidance import Guidance
from vidgen.models.dit import SpacetimeDiT
from vidgen.models.dit_types import AudioConfig, AudioTokens, DiTConfig, KVCache
from vidgen.models.presets import DIT_PRESETS
from vidgen.pipeline.engine import Engine, load, measure_magnitudes
from vidgen.pipeline.journal import journal
from vidgen.pipeline.journal.journal import Journal
from vidgen.pipeline.plan import MAGNITUDES, read_magnitudes, write_magnitudes

PROMPT = "a red car bounces across the desert"
WITH_CONTROL = replace(
    DIT_PRESETS["tiny"], num_layers=4, control_layers=(0, 1, 3), control_channels=5
)
METHODS = ("first-block", "magnitude", "forecast")
STEPS = {"seed": 7, "steps": 8}


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Engine:
    return load(str(tiny_model), device="cpu", dtype="fp32")


@pytest.fixture(autouse=True)
def measured(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Magnitudes of the tiny model in a cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    levels = (1.0, 0.5, 0.1)
    logs = (0.0, 0.05, 0.1)
    write_magnitudes(Magnitudes(levels, {"prompt": logs, "negative": logs}), engine.folder)


@pytest.fixture
def passes(engine: Engine) -> Iterator[list[int]]:
    """Numbers of the blocks that run."""
    seen: list[int] = []
    with engine.loader.use("transformer") as model:
        hooks = [
            block.register_forward_hook(lambda *_, i=i: seen.append(i))
            for i, block in enumerate(model.blocks)
        ]
    yield seen
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("method", METHODS)
def test_a_threshold_of_0_is_no_cache(engine: Engine, method: str) -> None:
    plain = engine.generate(PROMPT, **STEPS).latents
    assert torch.equal(engine.generate(PROMPT, **STEPS, cache=f"{method}:0").latents, plain)


@pytest.mark.parametrize("method", METHODS)
def test_a_high_threshold_spares_what_may_be_spared(
    engine: Engine, passes: list[int], method: str
) -> None:
    plain = engine.generate(PROMPT, **STEPS).latents
    count, last = len(passes), max(passes)
    assert passes.count(last) == 2 * 8
    clip = engine.generate(PROMPT, **STEPS, cache=f"{method}:100")
    # of 8 steps the first 2 run, then 1 of 4; a forecast needs 3 to learn how far it errs
    ran = 2 * (4 if method == "forecast" else 3)
    assert passes[count:].count(last) == ran
    assert passes[count:].count(0) == (2 * 8 if method == "first-block" else ran)
    assert 0 < float((clip.latents - plain).norm() / plain.norm()) < 0.5


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_equals_a_whole_one(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, dtype: str
) -> None:
    monkeypatch.setattr(journal, "PATIENCE", 0)
    engine = load(str(tiny_model), device="cpu", dtype=dtype)
    options = {**STEPS, "cache": f"{method}:100"}
    expected = engine.generate(PROMPT, **options).latents
    for step in (3, 4, 6):
        out = tmp_path / f"{step}.mp4"

        with pytest.raises(Cancelled):
            engine.generate(PROMPT, journal=Journal(out), on_event=stop_at(step), **options)
        clip = engine.generate(PROMPT, journal=Journal(out, resume=True), **options)
        assert torch.equal(clip.latents, expected)


def test_each_window_begins_its_cache_again_and_continues_inside(
    engine: Engine, passes: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "PATIENCE", 0)
    options = {**STEPS, "frames": 37, "guidance": 1.0, "cache": "first-block:100"}
    out = tmp_path / "x.mp4"

    straight = engine.generate(PROMPT, **options).latents
    assert passes.count(max(passes)) == 4 * 3  # windows, and steps computed in each
    with pytest.raises(Cancelled):
        engine.generate(PROMPT, journal=Journal(out), on_event=stop_at(8 + 4), **options)
    passes.clear()
    clip = engine.generate(PROMPT, journal=Journal(out, resume=True), **options)
    assert torch.equal(clip.latents, straight)
    assert passes.count(max(passes)) == 1 + 2 * 3  # no more than was left


def test_a_job_continues_with_its_own_cache(engine: Engine, tmp_path: Path) -> None:
    out = tmp_path / "x.mp4"

    with pytest.raises(Cancelled):
        engine.generate(PROMPT, journal=Journal(out), on_event=stop_at(3), **STEPS,
                        cache="forecast")
    with pytest.raises(InputError, match=r"plan\.cache.*was"):
        engine.generate(PROMPT, journal=Journal(out, resume=True), **STEPS)


def test_the_branch_that_comes_first_decides() -> None:
    caches = StepCaches(lambda _: FirstBlock(0.5), max_skips=1)
    taken = []
    for sigma, change in ((0.9, 0.0), (0.8, 0.0), (0.7, 0.0), (0.6, 9.0)):
        for branch, sign in (("prompt", 1.0), ("negative", -1.0)):
            cache, start = caches.at(branch, sigma), torch.zeros(1, 2, 3)
            # the second branch would decide otherwise at 0.8: all it adds has changed
            now = start + 1 + change + (2.0 if sign < 0 and sigma == 0.8 else 0.0)
            known = cache.recall(start, now)
            taken.append(known is None)
            if known is None:
                cache.keep(now + sign)
            else:
                assert torch.equal(known, now + sign)
    assert taken == [True, True, False, False, True, True, True, True]
    assert caches.taken == [(0.9, True), (0.8, False), (0.7, True), (0.6, True)]


def test_values_are_freed_with_the_run_and_not_by_the_collector() -> None:
    caches = StepCaches(lambda _: FirstBlock(0.5))
    cache, tokens = caches.at("prompt", 0.9), torch.ones(1, 2, 3)
    cache.recall(torch.zeros(1, 2, 3), tokens)
    cache.keep(tokens)
    kept = weakref.ref(caches.memories["prompt"])
    gc.disable()
    try:
        del caches, cache
        assert kept() is None
    finally:
        gc.enable()


def test_a_branch_that_knows_nothing_computes() -> None:
    caches = StepCaches(lambda _: FirstBlock(0.5))
    tokens = torch.ones(1, 2, 3)
    for sigma in (0.9, 0.8):
        cache = caches.at("prompt", sigma)
        if cache.recall(torch.zeros(1, 2, 3), tokens) is None:
            cache.keep(tokens)
    assert caches.taken[-1] == (0.8, False)
    assert caches.at("negative", 0.8).recall(torch.zeros(1, 2, 3), tokens) is None


def test_a_step_is_spared_in_all_its_passes_or_in_none() -> None:
    guidance = Guidance(3.0, interval=(0.0, 0.7))
    caches = StepCaches(lambda _: FirstBlock(0.5), branches_at=guidance.branches_at)
    taken = []
    for sigma in (0.9, 0.8, 0.7, 0.6):  # the negative prompt comes in at the third
        for branch in guidance.branches_at(sigma):
            cache = caches.at(branch, sigma)
            known = cache.recall(torch.zeros(1, 2, 3), torch.ones(1, 2, 3))
            taken.append((branch, sigma, known is None))
            if known is None:
                cache.keep(torch.ones(1, 2, 3))
    assert taken == [
        ("prompt", 0.9, True), ("prompt", 0.8, False), ("prompt", 0.7, True),
        ("negative", 0.7, True), ("prompt", 0.6, False), ("negative", 0.6, False),
    ]


def test_another_expert_gets_nothing() -> None:
    caches = StepCaches(lambda _: FirstBlock(0.5), boundary=0.5)
    computed = []
    for sigma in (0.9, 0.5, 0.4, 0.3):
        cache = caches.at("prompt", sigma)
        known = cache.recall(torch.zeros(1, 2, 3), torch.ones(1, 2, 3))
        computed.append(known is None)
        if known is None:
            cache.keep(torch.ones(1, 2, 3))
    assert computed == [True, False, True, False]


def test_a_forecast_is_exact_where_nothing_bends() -> None:
    caches = StepCaches(lambda _: Forecast(1e-4))
    direction, start = torch.randn(1, 4, 6), torch.randn(1, 4, 6)

    def added(sigma: float) -> torch.Tensor:
        return 3 + direction * torch.tensor((1 - sigma) / sigma).log()

    computed = []
    for sigma in (0.95, 0.9, 0.8, 0.7, 0.5, 0.2):
        cache = caches.at("prompt", sigma)
        known = cache.recall(start, start)
        computed.append(known is None)
        if known is None:
            cache.keep(start + added(sigma))
        else:
            assert relative_change(known, start + added(sigma)) < 1e-5
    assert computed == [True, True, True, False, False, False]


def test_magnitudes_are_measured_kept_and_read_between_levels(
    engine: Engine, tmp_path: Path
) -> None:
    found = measure_magnitudes(engine)
    assert list(found.sigmas) == sorted(found.sigmas, reverse=True)
    assert found.logs.keys() == {"prompt", "negative"}
    write_magnitudes(found, engine.folder)
    assert read_magnitudes(engine.folder) == found
    curve = Magnitudes((1.0, 0.5, 0.1), {"prompt": (0.0, 0.2, 0.4)})
    assert curve.ratio("prompt", 0.75, 0.3) == pytest.approx(2.718281828 ** (0.3 - 0.1))
    assert curve.ratio("prompt", 0.05, 0.1) == 1
    elsewhere = replace(engine.folder, path=tmp_path)
    write_magnitudes(curve, engine.folder, tmp_path)
    assert read_magnitudes(elsewhere) == curve
    (tmp_path / MAGNITUDES).write_text('{"sigmas": [1], "logs": {}}')
    with pytest.raises(ModelError, match="damaged"):
        read_magnitudes(elsewhere)


def test_a_branch_that_was_left_out_changes_as_the_other_one_there() -> None:
    caches = StepCaches(lambda _: Probe())
    levels = {"prompt": ((0.9, 0.0), (0.7, 0.3), (0.5, 0.4), (0.2, 0.9)),
              "negative": ((0.7, 0.0), (0.5, 0.2))}
    for branch, logs in levels.items():
        caches.at(branch, 0.9)
        memory = caches.memories[branch]
        assert isinstance(memory, Probe)
        memory.logs = list(logs)
    found = magnitudes_of(caches)
    assert found.sigmas == (0.9, 0.7, 0.5, 0.2)
    assert found.logs["prompt"] == pytest.approx((0.0, 0.3, 0.4, 0.9))
    assert found.logs["negative"] == pytest.approx((0.0, 0.3, 0.5, 1.0))


def test_magnitudes_that_nobody_measured_are_asked_for(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    with pytest.raises(InputError, match="vidgen models --measure"):
        engine.generate(PROMPT, **STEPS, cache="magnitude")


def test_what_a_cache_is_called(engine: Engine) -> None:
    for bad in ("fast", "forecast:", "forecast:x", "forecast:-1", "forecast:nan", "none:1", ""):
        with pytest.raises(InputError, match=r"cache is"):
            engine.generate(PROMPT, cache=bad)


def test_steps_carry_what_caches_hold() -> None:
    sigmas = torch.linspace(1, 0, 11)
    caches = make_caches(CacheChoice("forecast", 1.0), sigmas, Guidance(3.0))
    assert caches is not None
    assert caches.retained == pytest.approx(0.8)
    cache = caches.at("prompt", 0.7)
    cache.recall(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3))
    cache.keep(torch.ones(1, 2, 3))
    told: list[StepInfo] = []
    on_step = carrying(caches.state, told.append)
    state = SamplerState(1, torch.zeros(1))
    on_step(StepInfo(10, 0.7, 0.6, torch.zeros(1), state))
    other = make_caches(CacheChoice("forecast", 1.0), sigmas, Guidance(3.0))
    assert other is not None
    other.restore(told[0].state.cache)
    assert torch.equal(other.state()["prompt.0"], torch.ones(1, 2, 3))
    other.at("prompt", 0.6)
    assert other.memories["prompt"].numbers == [0.7, float("inf")]
    assert torch.equal(other.memories["prompt"].tensors[0], torch.ones(1, 2, 3))


def run_twice(config: DiTConfig, options: dict[str, object]) -> list[torch.Tensor]:
    """A plain pass, one that a forecast learns from, and one that recalls."""
    torch.manual_seed(0)
    model = SpacetimeDiT(config).eval()
    init_dit(model)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    latents, context = torch.randn(1, config.in_channels, 2, 4, 4), torch.randn(
        1, 5, config.text_dim)  # fmt: skip
    caches, found = StepCaches(lambda _: FirstBlock(0.5)), []
    for cache in (None, caches.at("prompt", 0.9), caches.at("prompt", 0.8)):
        with torch.no_grad():
            out = model(latents, torch.tensor([900.0]), context, step_cache=cache, **options)
        found.append(torch.cat([part.flatten() for part in (
            out if isinstance(out, tuple) else (out,))]))
    assert [computed for _, computed in caches.taken] == [True, False]
    return found


def test_control_and_sound_go_with_a_cache() -> None:
    control = {"control": torch.randn(1, 5, 2, 4, 4)}
    sound = replace(DIT_PRESETS["tiny"], audio=AudioConfig(4, 8, 5.0))
    audio = {"audio": AudioTokens(torch.randn(1, 4, 6), torch.tensor([900.0]), 3.0)}
    for config, options in ((WITH_CONTROL, control), (sound, audio)):
        plain, learnt, recalled = run_twice(config, options)
        assert torch.equal(plain, learnt)
        assert torch.allclose(recalled, plain, atol=1e-5)


def test_a_recorded_pass_needs_every_block() -> None:
    model = SpacetimeDiT(replace(DIT_PRESETS["tiny"], audio=AudioConfig(4, 8, 5.0)))
    cache = StepCaches(lambda _: FirstBlock(0.5)).at("prompt", 0.9)
    latents = torch.randn(1, model.config.in_channels, 1, 4, 4)
    with pytest.raises(InputError, match="skips blocks"):
        model(latents, torch.tensor([900.0]), torch.randn(1, 5, model.config.text_dim),
              cache=KVCache(), step_cache=cache)
