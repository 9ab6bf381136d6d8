"""What a generation will take, against what it does take, on tiny models."""

from __future__ import annotations

import json
import re
import shutil
import time
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.lora_models import make_adapter
from tests.models import build_tiny_model
from tests.tiny.test_timing import RATES
from train.toybox.model_files import write_few_step
from vidgen.cli.main import main
from vidgen.cli.report import Report, long_text
from vidgen.core.errors import InputError, ModelError
from vidgen.core.request import Loading, Request
from vidgen.core.runtime import time_text
from vidgen.diffusion.guidance import Guidance
from vidgen.media.clip import Clip
from vidgen.media.types import ClipInfo
from vidgen.pipeline import timing
from vidgen.pipeline.engine import load
from vidgen.pipeline.inputs import Inputs
from vidgen.pipeline.loader import EXPERTS
from vidgen.pipeline.memory import KERNELS_BYTES, count_passes, estimate
from vidgen.pipeline.plan import make_plan, require_own_model, settle
from vidgen.pipeline.setups import choose, preflight
from vidgen.pipeline.types import Setup
from vidgen.weights.folder import DiffusersFolder, FewStepConfig
from vidgen.weights.layouts import open_model

CPU = torch.device("cpu")
FP32 = Setup(CPU, "fp32")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def planned(tiny_model, **options):
    folder = open_model(str(tiny_model))
    request = Request.of("a cat", {"seed": 1, **options})
    return folder, settle(folder, request), request


def test_sound_is_a_stage_where_the_model_makes_it(tmp_path):
    model = build_tiny_model(tmp_path / "model", sound=True)

    def stages(**options):
        return {stage.name: stage for stage in estimate(*planned(model, **options), FP32).stages}

    own, silent = stages(), stages(audio="none")
    assert [*own] == ["load", "text", "prepare", "denoise", "sound", "decode"]
    assert "sound" not in silent
    assert own["denoise"] == silent["denoise"], "the picture knows nothing of it"
    assert own["sound"].seconds > stages(steps=1)["sound"].seconds > 0
    assert own["sound"].seconds > stages(guidance=1.0)["sound"].seconds
    (tmp_path / "tune.wav").touch()
    followed = stages(audio=tmp_path / "tune.wav", follow_audio=True)
    assert "sound" not in followed
    assert followed["denoise"].seconds > own["denoise"].seconds, "its tokens take part"
    assert followed["denoise"].bytes > own["denoise"].bytes
    assert stages(seconds=5)["sound"].seconds > 2 * own["sound"].seconds


def test_work_and_memory_grow_as_they_should(tiny_model):
    folder, plan, request = planned(tiny_model)
    made = estimate(folder, plan, request, FP32)
    of = {stage.name: stage for stage in made.stages}
    assert [*of] == ["load", "text", "prepare", "denoise", "decode"]
    assert made.total_s == sum(stage.seconds for stage in made.stages)
    assert made.peak_bytes >= KERNELS_BYTES + folder.components["transformer"].tensors.num_bytes
    longer = estimate(*planned(tiny_model, frames=17), FP32)
    assert longer.stages[4].seconds > 1.5 * of["decode"].seconds
    twice = estimate(*planned(tiny_model, steps=4), FP32)
    assert twice.stages[3].seconds == pytest.approx(2 * of["denoise"].seconds)
    plain = estimate(*planned(tiny_model, guidance=1.0), FP32)
    assert plain.stages[3].seconds == pytest.approx(of["denoise"].seconds / 2)
    pair = estimate(*planned(tiny_model), FP32, count=2)
    assert pair.stages[3].seconds == pytest.approx(2 * of["denoise"].seconds)


def test_a_long_clip_is_counted_by_its_windows(tiny_model):
    whole = {s.name: s for s in estimate(*planned(tiny_model, frames=17), FP32).stages}
    long, longer = (
        {s.name: s for s in estimate(
            *planned(tiny_model, frames=n, settings={"overlap": 2}), FP32).stages}
        for n in (41, 65)  # windows of 5 latent frames, 3 and 5 of them
    )
    assert long["denoise"].bytes == longer["denoise"].bytes == whole["denoise"].bytes
    assert long["decode"].bytes == longer["decode"].bytes, "a stream's memory knows no length"
    assert long["denoise"].seconds == pytest.approx(3 * whole["denoise"].seconds)
    assert longer["denoise"].seconds == pytest.approx(5 * whole["denoise"].seconds)


def test_windows_are_those_that_are_made(tiny_model, tmp_path, monkeypatch):
    engine = load(str(tiny_model), dtype="fp32")
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    picture = str(tmp_path / "a.png")
    half = np.zeros((32, 32, 3), np.uint8)
    half[:, 16:] = 255
    given = tmp_path / "given.mp4"
    engine.generate("a cat", seed=1, frames=25).save(given)
    bare = tmp_path / "bare.mkv"  # without latents
    Clip(lambda: iter([np.zeros((30, 32, 32, 3), np.uint8)]), ClipInfo(Fraction(12), (32, 32), 30)
         ).save(bare)
    encoded, seen, has_given = [], [], []
    encode, sample = engine.encode_video, engine.sample

    def count_encoded(video, tiles=None, passes=1, rate=1):
        encoded.append((video.shape[2], rate))
        return encode(video, tiles, passes, rate)

    def count_seen(plan, state, *rest, **told):
        tokens = 0 if state.keys is None else state.keys.latents.shape[2]
        seen.append(state.latents.shape[2] + tokens)
        has_given.append(bool(state.has_given.all()))
        return sample(plan, state, *rest, **told)

    monkeypatch.setattr(engine, "encode_video", count_encoded)
    monkeypatch.setattr(engine, "sample", count_seen)
    for options in (
        {"frames": 9}, {"frames": 41, "settings": {"overlap": 2}, "image": picture,
         "reference": [picture]},
        {"frames": 41, "last_image": picture, "frame": [(2.0, picture)]},
        {"prefix": str(given), "seconds": 5}, {"prefix": str(bare), "seconds": 5},
        {"frames": 9, "image": picture, "mask": half},
    ):
        encoded.clear()
        seen.clear()
        has_given.clear()
        request, inputs = engine.read(Request.of("a cat", {"seed": 1, "steps": 1, **options}))
        counted = count_passes(engine.folder, engine.plan(request, inputs), request)
        clip = engine.generate(request)
        made = sum(len(chunk) for chunk in clip.chunks())
        assert [window.frames for window in counted.windows] == seen
        assert [window.has_given for window in counted.windows] == has_given
        assert sorted(counted.encoded) == sorted(encoded)
        assert counted.kept == made - (inputs.ending.num_frames if "prefix" in options else 0)


def test_more_passes_of_the_encoder_cost_time_and_memory(tiny_model, tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    folder, plan, request = planned(tiny_model, image=str(tmp_path / "a.png"))
    one, two, three = (
        {stage.name: stage for stage in estimate(
            folder, replace(plan, encode_passes=passes), request, FP32).stages}["prepare"]
        for passes in (1, 2, 3)
    )  # fmt: skip
    assert one.bytes < two.bytes == three.bytes
    assert one.seconds < two.seconds
    assert three.seconds - two.seconds == pytest.approx(two.seconds - one.seconds)
    bare = request.replace(image=None)
    again = estimate(folder, replace(plan, encode_passes=3), bare, FP32).stages
    assert again == estimate(folder, plan, bare, FP32).stages


def test_conditions_cost_encoding_and_tokens(tiny_model, tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    picture = str(tmp_path / "a.png")
    plain, image, last = (
        {stage.name: stage for stage in estimate(*planned(tiny_model, **options), FP32).stages}
        for options in ({}, {"image": picture}, {"last_image": picture})
    )
    assert plain["prepare"].seconds == 0 < image["prepare"].seconds == last["prepare"].seconds
    assert image["denoise"].seconds == plain["denoise"].seconds < last["denoise"].seconds
    towards = Guidance(1.0, known_scale=3.0)  # what is given, where something is
    guided, alone = (
        {stage.name: stage for stage in estimate(
            folder, replace(plan, guidance=towards), request, FP32).stages}
        for folder, plan, request in (
            planned(tiny_model, **options) for options in ({"image": picture}, {}))
    )
    assert guided["denoise"].seconds == image["denoise"].seconds == 2 * alone["denoise"].seconds


def test_guidance_towards_references_is_a_pass_more(tiny_model, tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")

    def denoising(scale, **options):
        given = {"reference": (str(tmp_path / "a.png"),)} | options
        folder, plan, request = planned(tiny_model, **given)
        guidance = replace(plan.guidance, reference_scale=scale)
        made = estimate(folder, replace(plan, guidance=guidance), request, FP32)
        return {stage.name: stage for stage in made.stages}["denoise"]

    assert denoising(2.0).seconds == pytest.approx(1.5 * denoising(0.0).seconds)
    remembers = {"cache": "first-block"}
    assert denoising(2.0, **remembers).bytes > denoising(0.0, **remembers).bytes


@pytest.mark.parametrize(("kind", "options", "experts"), [
    ("tiny_model", {}, EXPERTS[:1]), ("tiny_experts", {}, EXPERTS),
    ("tiny_experts", {"steps": 3}, EXPERTS[:1]),
    ("tiny_experts", {"audio": "a.wav", "follow_audio": True}, EXPERTS[:1]),
])  # fmt: skip
def test_an_expert_that_rests_is_not_counted(kind, options, experts, tmp_path, request):
    folder = open_model(shutil.copytree(request.getfixturevalue(kind), tmp_path / "model"))
    write_few_step(make_adapter(folder.components["transformer"].build()),
                  FewStepConfig("euler", (1.0, 0.7, 0.4, 0.0), 3.0), folder.path)
    asked = Request.of("a cat", {"seed": 1, **options})
    folder = open_model(str(folder.path))
    plan = make_plan(asked, folder)
    kept, loaded = (
        {stage.name: stage.seconds for stage in
         estimate(folder, plan, asked, Setup(CPU, "fp32", offload)).stages}["denoise"]
        for offload in ("none", "stage")
    )
    read = sum(folder.components[role].tensors.num_bytes for role in experts)
    assert loaded - kept == pytest.approx(read / timing.LOAD_BYTES_PER_S)


def test_an_engine_is_estimated_quickly_and_measures_nothing(tiny_model, monkeypatch):
    monkeypatch.setattr(timing, "_measure", lambda *_: pytest.fail("measured"))
    engine = load(str(tiny_model), dtype="fp32")
    request = Request.of("a cat", {"seed": 1})
    plan = engine.plan(*engine.read(request))
    times = []
    for _ in range(3):
        start = time.process_time()
        made = preflight(engine.loader, plan, request, engine.loading)
        times.append(time.process_time() - start)
    assert min(times) < 0.05
    assert not made.measured


def test_what_cannot_fit_is_refused_naming_what_would(tiny_model, monkeypatch):
    engine = load(str(tiny_model), dtype="fp32")
    request = Request.of("a cat", {"seed": 1, "size": "512x512", "frames": 33})
    asked = engine.loading.replace(tiles="none")
    plan = engine.plan(*engine.read(request))
    have = estimate(*planned(tiny_model, size="128x128", frames=33), FP32).peak_bytes
    monkeypatch.setattr("vidgen.pipeline.setups.available_memory", lambda _: have)
    with pytest.raises(ModelError, match=r"33 frames of 512x512 needs .* are free; these fit"
                                         r".*--size 1\d\dx1\d\d") as refused:
        preflight(engine.loader, plan, request, asked)
    size = re.search(r"--size (\d+x\d+)", str(refused.value))[1]
    smaller = Request.of("a cat", {"seed": 1, "size": size, "frames": 33})
    preflight(engine.loader, engine.plan(*engine.read(smaller)), smaller, asked)


def test_memory_is_that_of_the_attention_that_is_asked_for(tiny_model):
    folder, plan, request = planned(tiny_model, size="256x256", frames=33)

    def made(attention):
        asked = Loading(attention=attention, offload="none")
        made = choose(folder, plan, request, asked, CPU, None, dtype="fp32")
        return {stage.name: stage.bytes for stage in made.stages}

    assert made("blocked")["denoise"] > made("sdpa")["denoise"]


def test_the_setup_is_chosen_to_fit(tiny_model):
    folder, plan, request = planned(tiny_model)
    needs = {offload: estimate(folder, plan, request, Setup(CPU, "fp32", offload)).peak_bytes
             for offload in ("none", "stage", "block")}
    assert needs["none"] > needs["stage"]

    def chosen(have, **options):
        return choose(folder, plan, request, Loading(**options), CPU, have, dtype="fp32").setup

    assert chosen(None).offload == chosen(needs["none"]).offload == "none"
    assert chosen(needs["none"] - 1).offload == "stage"
    with pytest.raises(ModelError, match=r"these fit: --dtype fp32 --offload stage"):
        chosen(needs["none"] - 1, offload="none", dtype="fp32")
    with pytest.raises(ModelError, match="free memory or use a smaller model"):
        chosen(1)


def test_an_engine_left_to_choose_takes_what_fits_each_clip(tiny_model, monkeypatch):
    need = estimate(*planned(tiny_model, size="96x96", steps=1), FP32).peak_bytes
    loaded = load(str(tiny_model), dtype="fp32")
    held = sum(loaded.loader.needed_bytes(role, offload="stage") for role in loaded.loader.resident)
    monkeypatch.setattr("vidgen.pipeline.setups.available_memory",
                        lambda _: need - 1 - held)
    told = []
    clip = loaded.generate("a cat", seed=1, size="96x96", steps=1, on_estimate=told.append)
    assert loaded.offload == told[0].setup.offload == clip.recipe["offload"] == "stage"
    assert "--offload stage: --dtype fp32 --offload none needs" in told[0].choice
    assert len(clip.frames) == clip.num_frames
    monkeypatch.setattr("vidgen.pipeline.setups.available_memory", lambda _: 1 << 40)
    loaded.generate("a cat", seed=1, steps=1, on_estimate=told.append)
    assert loaded.offload == "none"
    assert not told[1].choice
    fixed = load(str(tiny_model), dtype="fp32", offload="none")
    monkeypatch.setattr("vidgen.pipeline.setups.available_memory",
                        lambda _: need - 1 - held)
    with pytest.raises(ModelError, match="these fit: --dtype fp32 --offload stage"):
        fixed.generate("a cat", seed=1, size="96x96", steps=1)


def test_the_command_prints_all(tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(timing, "_measure", lambda *_: RATES)
    words = ["plan", "a cat", "--model", str(tiny_model)]
    assert main([*words, "--json"]) == 0
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert "note: measuring this machine" in err
    assert [stage["name"] for stage in told["stages"]][3] == "denoise"
    assert told["measured"] is True
    assert told["offload"] == "none"
    assert told["peak_bytes"] == max(stage["bytes"] for stage in told["stages"])
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert "measuring" not in err
    assert "denoise" in out
    assert "whole" in out
    assert "9 frames with --dtype" in out
    assert main([*words, "--size", "8192x8192"]) == 2
    assert "these fit" in capsys.readouterr().err
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".mp4"]


@pytest.mark.parametrize(("options", "message"), [
    ({"prompt": "a cat " * 300}, "the prompt has 601 tokens, this model reads 512; shorten it"),
    ({"negative": "a cat " * 300}, "the negative has"),
    ({"cache": "magnitude"}, "magnitudes of .* were never measured"),
])
def test_a_plan_refuses_what_the_engine_does(tiny_model, options, message):
    request = Request(**{"prompt": "a cat", **options})
    engine = load(str(tiny_model), device="cpu", dtype="fp32")
    for plan in (partial(settle, engine.folder, request),
                 partial(engine.plan, request, Inputs())):
        with pytest.raises(InputError, match=message):
            plan()


def test_a_long_run_is_reported_before_it_begins_and_not_refused(tiny_model, capsys):
    def told(count=1, **options):
        made = [estimate(*planned(tiny_model, **options), FP32, count=count)]
        with Report(as_json=True, events=None) as report:
            report.expect(made[0], num_clips=count)
            report.expect(made, done=[1])
        return made[0], capsys.readouterr().err

    short, err = told()
    assert (short.kept_frames, err) == (9, "")
    long, err = told(seconds=3600, fps=240, steps=100)
    (line,) = err.splitlines()  # and none where all is done
    assert "for 864000 frames (estimate for a typical" in line
    assert f"about {time_text(long.total_s)} for" in line
    measured = replace(long, measured=True)
    assert long_text([measured, measured], parallel=True) == (
        f"this takes about {time_text(2 * long.total_s)} of work, shared by the workers, for "
        "1728000 frames"
    )
    assert [*map(time_text, (59, 601, 7199, 4321, 1e6))] == [
        "59 s", "10 min", "2 h 0 min", "1 h 12 min", "11 d 13 h"]


def test_only_own_models_are_planned():
    with pytest.raises(InputError, match="LTXPipeline"):
        require_own_model(DiffusersFolder(Path("ltx"), {}, "LTXPipeline"))
