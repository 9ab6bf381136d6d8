"""Fine-tuning at tiny sizes with real classes: what is learned, what comes out, what is refused."""

from __future__ import annotations

import json
import math
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.finetuning import build_clips, make_config
from tests.lora_models import linear_paths
from tests.models import build_tiny_model
from tests.textures import texture
from tests.tiny.diffusers_models import build_diffusers_model
from tests.wan_models import build_diffusers
from vidgen.core.errors import InputError, ModelError
from vidgen.core.runtime import sha256_file
from vidgen.models.dit import SpacetimeDiT
from vidgen.models.presets import DIT_PRESETS
from vidgen.pipeline.engine import load
from vidgen.training.checkpoint import load_averages
from vidgen.training.finetune import output as finetune_output
from vidgen.training.finetune.output import Export, NoEffect, choose_checkpoint, export
from vidgen.training.finetune.run import finetune
from vidgen.weights.layouts import open_model
from vidgen.weights.lora import read_lora

WAN = ("t2v", "i2v", "flf2v", "vace", "t2v-a14b", "i2v-a14b", "ti2v-5b")
LEARN = {"steps": 12, "validate_every": 6, "optim": {"lr": 0.02, "warmup_steps": 1},
         "ema_decay": 0.5}  # fmt: skip


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    return build_clips(tmp_path_factory.mktemp("data") / "clips")


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    made: dict[str, Path] = {}

    def of(variant: str) -> Path:
        if variant not in made:
            made[variant] = build_diffusers(tmp_path_factory.mktemp("wan") / variant, variant)
        return made[variant]

    return of


def curve(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "curve.jsonl").read_text().splitlines()]


def scores(run: Path) -> list[float]:
    return [line["validation"]["velocity_mean"] for line in curve(run) if "validation" in line]


@pytest.mark.parametrize("variant", WAN)
def test_every_wan_variant_learns_and_generate_loads_what_came_out(variant, wan, clips, tmp_path):
    events = []
    config = make_config(wan(variant), clips, tmp_path / "run", run=LEARN)
    summary = finetune(config, on_event=events.append)
    assert summary["finished"]
    first, *_, last = scores(tmp_path / "run")
    assert last < first
    assert all(norm > 1e-4 for norm in summary["delta_norm"].values())
    assert summary["ab_difference"] > 0
    two = variant.endswith("a14b")
    assert [path.rpartition("@")[2] for path in summary["use"]] == ["high", "low"] if two else True
    assert len(summary["use"]) == 1 + two
    assert {event["path"] for event in events if event["event"] == "written"} >= {
        path.partition("@")[0] for path in summary["use"]
    }


def test_a_lora_of_toybox_learns_a_spare_token_along(tiny_model, clips, tmp_path, caplog):
    config = make_config(
        tiny_model, clips, tmp_path / "run", run=LEARN | {"dtype": "bf16"},
        subject={"token": "<subject_7>", "like": "red car"},
        data={"caption_dropout": 0.0, "prefix": "<subject_7>"},
        output={"dialects": ["diffusers", "wan"]},
        lora={"targets": "all", "rank": 3, "alpha": 6.0},
        validation={"sheet_every": 6, "prompts": ["<subject_7> in the xylem"]}, tensorboard=True,
    )
    summary = finetune(config)
    told = [text for text in caplog.messages if "xylem" in text]
    assert told == ["the model doesn't know the word 'xylem'"] * 2, "of four: sheets, comparison"
    first, *_, last = scores(tmp_path / "run")
    assert last < first
    [path] = summary["use"]
    architecture = open_model(str(tiny_model)).components["transformer"].config
    main = read_lora(path, architecture)
    assert len(main.low_rank) == 2 * 10  # two blocks of eight projections and a feed-forward
    assert main.tokens["<subject_7>"].shape == (16,)
    for other in summary["files"][1:]:
        adapter = read_lora(other, architecture)
        assert torch.equal(adapter.tokens["<subject_7>"], main.tokens["<subject_7>"])
        for name, part in main.low_rank.items():
            same = adapter.low_rank[name]
            torch.testing.assert_close(
                same.up.float() @ same.down.float() * same.scale,
                part.up.float() @ part.down.float() * part.scale, rtol=0.02, atol=1e-4,
            )
    engine = load(str(tiny_model), device="cpu", dtype="fp32")
    made = [engine.generate("<subject_7> in the rain", seed=1, frames=5, lora=lora).frames
            for lora in ([], [path])]  # fmt: skip
    assert not np.array_equal(*made)
    assert (tmp_path / "run" / "sheet-00000006.png").stat().st_size > 500
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    line = next(each for each in curve(tmp_path / "run") if "tokens_per_s" in each)
    assert line["tokens_per_s"] > 0
    card = (tmp_path / "run" / "output" / "README.md").read_text()
    assert "Write `<subject_7>`" in card
    assert "Consent of people in the clips: not stated" in card
    assert "--lora tiny.safetensors" in card


def test_both_experts_of_toybox_learn_a_subject(tiny_experts, clips, tmp_path):
    config = make_config(
        tiny_experts, clips, tmp_path / "run", run=LEARN, lora={"targets": "all"},
        subject={"token": "<subject_7>", "like": "red car"}, data={"prefix": "<subject_7>"},
    )
    summary = finetune(config)
    assert [path.rpartition("@")[2] for path in summary["use"]] == ["high", "low"]
    assert set(summary["delta_norm"]) == {"transformer", "transformer_2"}
    card = (tmp_path / "run" / "output" / "README.md").read_text()
    assert "--lora tiny-high.safetensors@high --lora tiny-low.safetensors@low" in card
    engine = load(str(tiny_experts), device="cpu", dtype="fp32")
    made = [engine.generate("<subject_7> in the rain", seed=1, frames=5, lora=lora).frames
            for lora in (summary["use"], summary["use"][:1], summary["use"][1:])]  # fmt: skip
    assert not np.array_equal(made[0], made[1])
    assert not np.array_equal(made[0], made[2])


@pytest.mark.parametrize("kind", ["toybox", "t2v-a14b"])
def test_all_weights_learn_and_a_whole_model_comes_out(kind, tiny_model, wan, clips, tmp_path):
    base = tiny_model if kind == "toybox" else wan(kind)
    optim = {"lr": 2e-3, "muon_lr": 2e-3, "warmup_steps": 1}
    config = make_config(
        base, clips, tmp_path / "run", method="full", run=LEARN | {"optim": optim},
        experts="both" if kind == "toybox" else "low", checkpointing=True,
        validation={"steps": 3},  # so that the sheet's clips reach the low-noise expert
    )
    summary = finetune(config)
    first, *_, last = scores(tmp_path / "run")
    assert last < first
    [made] = (open_model(path) for path in summary["use"])
    assert made.name == "tiny"
    assert made.content_hash
    before = open_model(str(base))
    for role, part in made.components.items():
        old = before.components[role]
        theirs = {name: lazy.get() for name, lazy in old.tensors.items()}
        changed = [name for name, lazy in part.tensors.items()
                   if not torch.equal(lazy.get(), theirs[name])]
        trained = "transformer" if kind == "toybox" else "transformer_2"
        assert (len(changed) > 0.9 * len(theirs)) == (role == trained), role
        assert bool(changed) == (role == trained), role


def test_a_killed_or_stopped_run_continues_to_the_same_bits(tiny_model, clips, tmp_path):
    """Killed with -9 it is in the tests of the command line; here by its minutes."""
    straight = make_config(tiny_model, clips, tmp_path / "straight", run={"steps": 5})
    finetune(straight)
    stopped = make_config(tiny_model, clips, tmp_path / "run", run={"steps": 5, "minutes": 1e-9})
    for step in range(1, 5):
        summary = finetune(stopped, resume=step > 1)
        assert (summary["step"], summary["finished"]) == (step, False)
        assert "files" not in summary
    assert finetune(stopped, resume=True)["finished"]
    one, other = (
        load_file(tmp_path / name / "output" / "tiny.safetensors") for name in ("straight", "run")
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def check_replacing(config, made: str, monkeypatch) -> None:
    """A model folder that is exported anew is whole all the while, and nothing else is left."""
    place, real = Path(made), finetune_output.convert
    before, content = names(place.parent), open_model(made).content_hash
    killed = place.with_name(".tiny.01234567.tmp")
    killed.mkdir()

    def watched(*arguments, **options) -> None:
        assert not killed.exists()
        real(*arguments, **options)
        assert open_model(made).content_hash == content
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(finetune_output, "convert", watched)
        with pytest.raises(KeyboardInterrupt):
            export(config, open_model(config.model))
    assert names(place.parent) == before
    (place / "old.txt").touch()
    export(config, open_model(config.model))
    assert names(place.parent) == before
    assert not (place / "old.txt").exists()
    assert open_model(made).content_hash == content


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("method", ["lora", "full"])
def test_what_comes_out_is_of_the_best_step(tiny_model, clips, tmp_path, method, monkeypatch):
    """A rate that ruins the model: the first validations are better than the last."""
    run = {"steps": 6, "validate_every": 1, "best": "velocity_0.95", "keep": 1,
           "optim": {"lr": 0.3, "warmup_steps": 1}, "ema_decay": 0.1}  # fmt: skip
    notes: list[dict] = []
    config = make_config(tiny_model, clips, tmp_path / "run", run=run, method=method,
                         output={"dtype": "fp32"})
    summary = finetune(config, on_event=notes.append)
    found = {line["step"]: line["validation"]["velocity_0.95"]
             for line in curve(tmp_path / "run") if "validation" in line}
    best = min(found, key=found.__getitem__)
    assert best < 6, found
    assert (summary["step"], summary["exported_step"]) == (6, best)
    told = f"exported weights of step {best} (lowest velocity_0.95, "
    assert any(told in note.get("text", "") for note in notes)
    assert f"weights of step: {best}" in (tmp_path / "run/output/README.md").read_text()
    averages = load_averages(tmp_path / "run", "transformer", tmp_path / f"run/step-{best:08d}")
    other = replace(config.run, best="velocity_mean")
    assert choose_checkpoint(other).checkpoint.name == "step-00000006", "another score"
    if method == "full":
        part = open_model(summary["use"][0]).components["transformer"]
        written = {name: lazy.get() for name, lazy in part.tensors.items()}
        name = "blocks.0.ffn.up.weight"
        torch.testing.assert_close(written[name], averages[name].to(written[name].dtype))
        check_replacing(config, summary["use"][0], monkeypatch)
    else:
        made = load_file(summary["use"][0])
        first = next(name for name in made if name.endswith("lora_A.weight"))
        assert torch.equal(made[first], averages[first.replace("_A.", "_A.default.")])


def test_the_last_step_is_validated_once(tiny_model, clips, tmp_path):
    config = make_config(tiny_model, clips, tmp_path / "run", run={"steps": 2, "validate_every": 2})
    first = finetune(config)
    again = finetune(config, resume=True)
    assert len(scores(tmp_path / "run")) == 1
    assert again["validation"] == first["validation"]


def test_a_changed_run_is_refused_by_name_unless_that_is_accepted(tiny_model, clips, tmp_path):
    run = tmp_path / "run"
    finetune(make_config(tiny_model, clips, run, run={"steps": 1}))
    changed = make_config(
        tiny_model, clips, run, run={"steps": 2, "log_every": 2}, lora={"alpha": 3.0},
        validation={"seed": 5}, output={"author": "somebody"},
    )
    with pytest.raises(InputError, match=r"lora\.alpha") as told:
        finetune(changed, resume=True)
    assert "steps" not in str(told.value)
    assert "author" not in str(told.value)
    assert finetune(changed, resume=True, accept_changes=True)["step"] == 2


def test_what_fills_a_batch_up_is_reported(tiny_model, clips, tmp_path):
    notes: list[dict] = []
    config = make_config(tiny_model, clips, tmp_path / "run", run={"steps": 1, "batch_size": 3})
    finetune(config, on_event=notes.append)
    told = [note["text"] for note in notes if note["event"] == "note"]
    assert any("bucket 32x32x9: 2 clips repeat per epoch" in text for text in told)


def test_no_effect_fails_the_run(tiny_model, clips, tmp_path):
    config = make_config(
        tiny_model, clips, tmp_path / "run", run={"steps": 2, "optim": {"lr": 0.0}}
    )
    with pytest.raises(NoEffect, match="has no effect: no exported weight differs") as told:
        finetune(config)
    assert told.value.exit_code == 1


def test_unusable_steps_name_their_files(tiny_model, clips, tmp_path):
    damaged = tmp_path / "model"
    shutil.copytree(tiny_model, damaged)
    path = damaged / "transformer" / "model.safetensors"
    weights = load_file(path)
    weights["head.proj.bias"][0] = math.nan
    save_file(weights, path)
    info = json.loads((damaged / "model.json").read_text())
    info["files"]["transformer/model.safetensors"] = sha256_file(path)
    (damaged / "model.json").write_text(json.dumps(info))
    config = make_config(damaged, clips, tmp_path / "run", run={"on_bad": "stop"})
    with pytest.raises(InputError, match=r"loss nan.* of clip\d\.mkv, clip\d\.mkv"):
        finetune(config)


def test_a_spike_is_skipped_and_names_its_files(tiny_model, clips, tmp_path):
    """Some loss is 1% over the mean before long: then that counts as a spike."""
    run = {"steps": 30, "spike_factor": 1.01, "batch_size": 1}
    notes = []
    config = make_config(tiny_model, clips, tmp_path / "run", run=run)
    with suppress(InputError):  # ten in a row
        finetune(config, on_event=notes.append)
    lines = [line for line in curve(tmp_path / "run") if line.get("event") == "skip"]
    assert lines
    assert all(line["files"][0].startswith("clip") for line in lines)
    assert any("skip" in n.get("text", "") for n in notes if n["event"] == "note")


REFUSED = {
    "two experts by DeepSpeed": (
        {"model": "t2v-a14b", "run": {"engine": {"deepspeed": "zero2"}}},
        "two experts, which take turns.*--set experts=low with another run.folder"),
    "an expert that isn't there": ({"experts": "low"}, "has one transformer"),
    "a layer that isn't there": ({"lora": {"targets": ["slf_attn.q"]}}, "self_attn.q"),
    "a condition that can't be": (
        {"conditions": {"reference": 1.0}}, "unknown condition 'reference'"),
    "no condition": ({"conditions": {"text": 0}}, "give at least one a weight above 0"),
    "a token that isn't there": (
        {"subject": {"token": "<subject_99>", "like": "a car"}}, "is no token of"),
    "a sheet's size": ({"validation": {"size": "33x32"}}, "validation: .*33"),
    "a sheet's prompt": ({"validation": {"prompts": [" "]}}, "validation: the prompt is empty"),
    "a sheet's steps": ({"validation": {"steps": 0}}, "validation: steps is 0"),
    "a score that isn't there": (
        {"run": {"best": "velocity_men"}}, "doesn't score; did you mean 'velocity_mean'"),
    "no level of an expert": (
        {"model": "t2v-a14b", "experts": "low", "validation": {"sigmas": [0.97]}},
        "none at which the low-noise expert denoises; give some below 0.875"),
    "a group that isn't there": (
        {"lora": {"targets": "foo"}}, "no linear layer is called 'foo'; give attention, all, or"),
    "a layer that makes sound": (
        {"model": "sound", "lora": {"targets": ["audio_ffn"]}}, "no linear layer is called"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cant_be_is_refused_before_it_begins(case, tiny_model, wan, clips, tmp_path):
    changes, told = REFUSED[case]
    model = tiny_model
    if changes.get("model") == "sound":
        model = build_tiny_model(tmp_path / "sound", sound=True)
    elif "model" in changes:
        model = wan(changes["model"])
    config = make_config(model, clips, tmp_path / "run", **{**changes, "model": str(model)})
    with pytest.raises(InputError, match=told):
        finetune(config)
    assert not (tmp_path / "run").exists()


def test_what_lies_where_results_go_is_found_before_anything_is_learned(
    tiny_model, clips, tmp_path
):
    (tmp_path / "run" / "output" / "tiny").mkdir(parents=True)
    config = make_config(tiny_model, clips, tmp_path / "run", method="full")
    with pytest.raises(ModelError, match="tiny"):
        finetune(config)
    shutil.rmtree(tmp_path / "run" / "output")
    (tmp_path / "run" / "output").write_text("x")
    with pytest.raises(InputError, match="output, the folder for the results, is a file"):
        finetune(config)


def test_an_expert_that_learned_nothing_fails_the_run_by_name(wan, clips, tmp_path, monkeypatch):
    config = make_config(wan("t2v-a14b"), clips, tmp_path / "run", run={"steps": 2})
    folder = open_model(config.model)
    made = Export(tmp_path, "", delta={"transformer": 0.5, "transformer_2": 0.0})
    monkeypatch.setattr(finetune_output, "choose_checkpoint", lambda _: made)
    monkeypatch.setattr(finetune_output, "_export_lora", lambda *_: None)
    (tmp_path / "run").mkdir()
    with pytest.raises(NoEffect, match=r"the low-noise expert learned nothing.*experts: high"):
        export(config, folder)


def test_a_share_that_keeps_no_clip_is_reported(tiny_model, clips, tmp_path):
    notes: list[dict] = []
    config = make_config(tiny_model, clips, tmp_path / "run", run={"steps": 1})
    finetune(replace(config, data=replace(config.data, held_out=1e-9)), on_event=notes.append)
    assert any("data.held_out 1e-09 holds out none" in each.get("text", "") for each in notes)


def test_configs_that_contradict_themselves_are_refused(tiny_model, clips, tmp_path):
    def refused(told: str, **changes) -> None:
        with pytest.raises(InputError, match=told):
            make_config(tiny_model, clips, tmp_path, **changes)

    refused("Muon", run={"optim": {"muon_lr": 1e-3}})
    refused("multiple of run.validate_every", validation={"sheet_every": 3})
    refused("method lora", method="full", subject={"token": "<subject_0>", "like": "car"})
    refused("steps is 0", run={"steps": 0})
    refused("rank is 0", lora={"rank": 0})
    refused("rank is 5000; give a whole number from 1 to 1024", lora={"rank": 5000})
    refused("alpha is -1", lora={"alpha": -1.0})
    refused("like is empty", subject={"token": "<subject_0>", "like": " "})
    refused("between 0 and 1", validation={"sigmas": [1.5]})
    refused("dialects.*is 'wann'; did you mean 'wan'", output={"dialects": "wann"})
    refused("unknown key 'phases'", run={"phases": []})
    for name in ("a/b", ".", "..", ".hidden", "a\0b"):
        refused("a file name", output={"name": name})
    refused("decay_from is 5 and optim.decay_steps 0; give both", run={"optim": {"decay_from": 5}})
    refused("decay_from is None and optim.decay", run={"optim": {"decay_steps": 5}})
    refused("mean is nan", noise={"mean": math.nan})
    refused("subject.lr is -1; give", subject={"token": "<subject_0>", "like": "car", "lr": -1.0})
    refused("ab_clips is -1", output={"ab_clips": -1})
    refused("validate_every is 0", run={"validate_every": 0})


def test_pictures_cant_teach_a_model_that_begins_with_them(wan, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.fromarray(texture(32, 32)).save(folder / "a.png")
    (folder / "a.txt").write_text("a picture")
    with pytest.raises(InputError, match="can't be trained on pictures"):
        finetune(make_config(wan("i2v"), folder, tmp_path / "run"))


def test_other_families_are_refused(tmp_path, clips):
    folder = build_diffusers_model("ltx", tmp_path / "ltx")
    with pytest.raises(ModelError, match="fine-tunes toybox and the Wan family"):
        finetune(make_config(folder, clips, tmp_path / "run"))


def test_targets_cover_what_they_say(tiny_model):
    from vidgen.training.finetune.model import target_paths

    dit = open_model(str(tiny_model)).components["transformer"].build()
    attention, every = target_paths(dit, "attention"), target_paths(dit, "all")
    assert len(attention) == 2 * 8
    assert set(attention) < set(every) < set(linear_paths(dit))
    with torch.device("meta"):
        heard = SpacetimeDiT(DIT_PRESETS["tiny-sound"])
    assert not any("audio" in path for path in target_paths(heard, "all"))
    assert target_paths(dit, ("cross_attn.k",)) == (
        "blocks.0.cross_attn.k", "blocks.1.cross_attn.k")
