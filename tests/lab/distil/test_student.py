"""The few-step student at tiny size: its teacher's trajectories, its training, its clips."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.lab.distilling import as_stored, with_run
from tests.lora_models import make_adapter, make_dit
from tests.programs import load_program
from tests.stopping import stop_at
from tests.wan_models import build_diffusers
from train.toybox.distillation.config import DistilRun
from train.toybox.distillation.data import HELD_OUT, draw_steps, open_shards, take_steps
from train.toybox.distillation.delta import Delta, adapter_of
from train.toybox.distillation.student import DistilTask
from train.toybox.distillation.teacher import Teacher
from train.toybox.model_files import write_few_step
from train.toybox.phases import train
from vidgen.cli.main import main
from vidgen.core.config import build
from vidgen.core.config_file import load_yaml
from vidgen.core.errors import Cancelled, InputError, ModelError
from vidgen.core.request import Request
from vidgen.diffusion.samplers import sample
from vidgen.media.probe import read_recipe
from vidgen.models.dit import SpacetimeDiT
from vidgen.models.lora import attached
from vidgen.models.presets import DIT_PRESETS
from vidgen.models.text import encode_tokens
from vidgen.pipeline.denoise import velocity
from vidgen.pipeline.engine import Engine, load
from vidgen.pipeline.inputs import Inputs
from vidgen.pipeline.journal import journal
from vidgen.pipeline.journal.journal import Journal
from vidgen.pipeline.recorded import own_options
from vidgen.pipeline.sound.own_sound import own_sound, sound_plan
from vidgen.pipeline.tail import no_beginning
from vidgen.training.checkpoint import latest_checkpoint, load_averages, read_meta
from vidgen.weights.convert import convert
from vidgen.weights.folder import FEW_STEP, FEW_STEP_WEIGHTS, FewStepConfig
from vidgen.weights.layouts import open_model
from vidgen.weights.lora import read_few_step, write_lora

ROOT = Path(__file__).parents[3]
PROMPT = "a red car bounces across the desert"


@pytest.fixture(scope="module")
def engine(model: Path) -> Engine:
    return load(str(model), device="cpu", dtype="fp32")


def test_a_student_needs_a_transformer_that_knows_all_noise_levels(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    teacher = build_diffusers(tmp_path / "experts", "t2v-a14b")
    with pytest.raises(InputError, match="experts has two transformers, each for some noise"):
        open_shards(build(DistilRun, {**settings, "teacher": str(teacher)}, "run"))


def test_the_teacher_makes_what_the_pipeline_makes(settings: dict[str, Any]) -> None:
    config = build(DistilRun, settings, "run")
    engine = load(config.teacher, device="cpu", dtype="fp32")
    shards, teacher = open_shards(config), Teacher(engine.folder, engine.device)
    asked = Request(prompt=PROMPT, sampler="unipc", steps=2, shift=5.0, seed=0)
    plan = replace(engine.plan(asked, Inputs()), guidance=config.trajectories.guidance)
    kinds = set()
    for index in (HELD_OUT, 1, 2):
        given = shards.load(index)
        begun = given.state.begin().half()
        torch.testing.assert_close(given.points[:, 0], begun.float(), rtol=1e-3, atol=1e-3)
        assert given.points.shape[1] == given.velocities.shape[1] == 2
        for row in torch.arange(len(given.ids)):
            state = given.state.rows(row[None])
            contexts = [
                (encode_tokens(teacher.text, ids, mask), mask.sum(1))
                for ids, mask in ((given.ids[row, None], given.mask[row, None]), teacher.negative)
            ]
            made = engine.sample(plan, state, contexts)
            expected = given.end[row, None]  # kept as float16
            torch.testing.assert_close(made, expected, atol=4e-3, rtol=4e-3)
            kinds.add(bool(state.has_given))
    assert len(kinds) == 2


def test_conditions_come_as_the_transformers_own_training_draws_them(
    settings: dict[str, Any],
) -> None:
    shards = open_shards(build(DistilRun, settings, "run"))
    each = [shards.load(index) for index in (1, 2)]
    assert any(not one.state.denoise_mask.all() for one in each)
    for one in each:
        known = (~one.state.denoise_mask).expand_as(one.state.clean)
        assert torch.equal(one.end[known], one.state.clean[known])
    rows = torch.tensor([2, 0])
    batch = take_steps(each[0], torch.tensor([1.0, 0.5, 0.0]), rows, torch.tensor([0, 1]))
    assert torch.equal(batch.state.denoise_mask, each[0].state.denoise_mask[rows])
    assert torch.equal(batch.ids, each[0].ids[rows])


def test_steps_of_the_targets_lead_where_the_teacher_does(settings: dict[str, Any]) -> None:
    config = build(DistilRun, settings, "run")
    given, sigmas = open_shards(config).load(1), config.trajectories.sigmas
    targets = iter(
        take_steps(given, sigmas, torch.arange(4), torch.full((4,), at)).target for at in (0, 1)
    )
    made = sample("unipc", lambda *_: next(targets), given.state.begin(), sigmas,
                        project=given.state.project)
    torch.testing.assert_close(made, given.end, atol=4e-3, rtol=4e-3)
    drawn = draw_steps(given, sigmas, 4, 0, 1, 2, own=range(2))
    assert sorted(drawn.sigma.tolist()) == sorted([*sigmas[:2].tolist()] * 2)
    assert torch.equal(drawn.target, draw_steps(given, sigmas, 4, 0, 1, 2, own=range(2)).target)
    assert not torch.equal(drawn.target, draw_steps(given, sigmas, 4, 0, 2, 2, own=range(2)).target)


def test_a_resumed_run_ends_with_the_same_bits(settings: dict[str, Any], tmp_path: Path) -> None:
    short = [{**settings["run"]["phases"][0], "steps": 2}]
    straight = with_run(settings, tmp_path / "straight", phases=short, checkpoint_minutes=9)
    assert train(DistilTask(straight), straight.run).finished
    cut = with_run(settings, tmp_path / "cut", phases=short, checkpoint_minutes=0)
    train(DistilTask(cut), replace(cut.run, minutes=1e-6))
    assert latest_checkpoint(tmp_path / "cut").name == "step-00000001"
    train(DistilTask(cut), cut.run, resume=True)
    one, two = (load_file(latest_checkpoint(tmp_path / name) / "state.safetensors")
                for name in ("straight", "cut"))
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    assert {name.split(".")[1] for name in one if name.startswith("model/")} == {"down", "up"}


def test_it_learns_to_step_and_to_end_where_the_teacher_does(run: DistilRun) -> None:
    fresh = DistilTask(run).validate(0, Path())
    taught = read_meta(latest_checkpoint(Path(run.run.folder)))["metrics"]
    assert taught["velocity_mean"] < 0.9 * fresh["velocity_mean"]
    assert taught["end"] < 0.9 * fresh["end"]
    assert fresh.keys() == {"velocity_1.00", "velocity_0.83", "velocity_mean", "end"}


def test_the_released_delta_is_what_was_learned(run: DistilRun, model: Path) -> None:
    folder = open_model(str(model))
    sigmas = run.trajectories.sigmas
    assert folder.few_step == FewStepConfig("unipc", tuple(sigmas.tolist()), 3.0)
    assert torch.equal(torch.tensor(folder.few_step.sigmas), sigmas)
    assert f"{FEW_STEP}/{FEW_STEP_WEIGHTS['transformer']}" in folder.files
    adapter = read_few_step(model, folder.components["transformer"].config)
    learned = adapter_of(load_averages(Path(run.run.folder), "student"))
    assert adapter.low_rank.keys() == learned.low_rank.keys()
    for path, part in adapter.low_rank.items():
        for kept, taught in ((part.down, learned.low_rank[path].down),
                             (part.up, learned.low_rank[path].up)):
            assert torch.equal(kept, as_stored(taught))
            assert (kept - taught).norm() < 0.01 * taught.norm()
        assert part.scale == 1


def test_a_delta_lies_in_half_of_its_bytes(tmp_path: Path) -> None:
    adapter = make_adapter(make_dit(DIT_PRESETS["toybox-low"]), rank=16)
    write_few_step(adapter, FewStepConfig("euler", (1.0, 0.5, 0.0), 3.0), tmp_path)
    numbers = sum(part.down.numel() + part.up.numel() for part in adapter.low_rank.values())
    assert (tmp_path / FEW_STEP / FEW_STEP_WEIGHTS["transformer"]).stat().st_size < 1.3 * numbers


def test_its_steps_are_the_students_and_the_recipe_says_so(engine: Engine, model: Path) -> None:
    clip = engine.generate(PROMPT, seed=3, steps=2)
    student = engine.folder.few_step
    plan = clip.info.recipe["plan"]
    assert plan["few_step"] == {
        "sampler": "unipc", "sigmas": student.sigmas, "guidance_scale": 3.0,
        "boundary": None,
    }
    assert (plan["sampler"], plan["guidance"]["scale"]) == ("unipc", 1.0)
    plain = engine.generate(PROMPT, seed=3, steps=2, sampler="unipc")
    assert plain.info.recipe["plan"]["few_step"] is None
    assert not torch.equal(plain.latents, clip.latents)
    adapter = read_few_step(model, engine.dit_config)
    made = engine.plan(Request(prompt=PROMPT, seed=3, steps=2), Inputs())
    (context, lengths), = engine.encode_prompt(made)
    state = engine.prepare(made, Request(prompt=PROMPT, seed=3), Inputs())
    with engine.loader.use("transformer") as dit, attached(dit, [(adapter, 1.0)]), torch.no_grad():
        by_hand = sample(
            "unipc",
            lambda noisy, sigma: velocity(
                dit, state, noisy, sigma, (context, lengths), patch=dit.config.patch_size,
                whole=True,
            ),
            state.begin(), torch.tensor(student.sigmas),
        )
    assert torch.equal(by_hand, clip.latents)


@pytest.mark.parametrize("asked", [
    {"steps": 3}, {"steps": None}, {"sampler": "euler"}, {"shift": 5.0}, {"guidance": 3.0},
    {"guidance_interval": (0.2, 1.0)}, {"guidance_rescale": 0.5}, {"negative": "a cat"},
    {"cache": "forecast"}, {"video": "clip.mp4", "strength": 0.5},
    {"audio": "tune.wav", "follow_audio": True},
], ids=lambda asked: next(iter(asked)))  # fmt: skip
def test_what_a_student_does_not_know_is_left_to_the_model(
    engine: Engine, asked: dict[str, Any]
) -> None:
    plan = engine.plan(Request(prompt=PROMPT, seed=1, **({"steps": 2} | asked)), Inputs())
    assert plan.few_step is None
    assert plan.sampler == asked.get("sampler", engine.folder.defaults.sampler)
    assert not plan.guidance.is_off


def test_its_clips_are_heard_by_the_model_itself(engine: Engine) -> None:
    made = engine.generate(PROMPT, seed=3, steps=2)
    plan = sound_plan(engine.plan(Request(prompt=PROMPT, seed=3, steps=2), Inputs()),
                      engine.folder.defaults)
    own = own_sound(engine.loader, plan, Request(prompt=PROMPT, seed=3),
                    [(0, plan.latents.num_frames)], no_beginning(plan))
    contexts = engine.encode_prompt(plan)
    assert len(contexts) == 2, "it is guided"
    own.follow(made.latents, lambda state, _: engine.sample(plan, state, contexts), Journal(None))
    assert np.array_equal(own.decode()[0], made.sound)


def test_a_first_frame_stands_and_adapters_add_up(engine: Engine, tmp_path: Path) -> None:
    picture = torch.randint(0, 255, (32, 32, 3), dtype=torch.uint8).numpy()
    clip = engine.generate(PROMPT, seed=3, steps=2, image=picture)
    assert clip.info.recipe["plan"]["few_step"] is not None
    shown = engine.encode_video(
        torch.from_numpy(picture).permute(2, 0, 1)[None, :, None] / 127.5 - 1)
    torch.testing.assert_close(clip.latents[:, :, :1], shown)
    with engine.loader.use("transformer") as dit:
        write_lora(make_adapter(dit), tmp_path / "own.safetensors", "vidgen")
    plain = engine.generate(PROMPT, seed=3, steps=2)
    both = engine.generate(PROMPT, seed=3, steps=2, lora=[str(tmp_path / "own.safetensors")])
    none = engine.generate(PROMPT, seed=3, steps=2, lora=[f"{tmp_path / 'own.safetensors'}:0"])
    assert not torch.equal(both.latents, plain.latents)
    assert torch.equal(none.latents, plain.latents)
    assert both.info.recipe["plan"]["few_step"] is not None
    assert len(both.info.recipe["loras"]) == 1


def test_a_replay_and_a_resumed_clip_are_the_same(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(journal, "PATIENCE", 0)
    path = tmp_path / "clip.mkv"
    with pytest.raises(Cancelled):
        engine.generate(PROMPT, seed=3, steps=2, journal=Journal(path), on_event=stop_at(1))
    clip = engine.generate(PROMPT, seed=3, steps=2, journal=Journal(path, resume=True))
    assert torch.equal(clip.latents, engine.generate(PROMPT, seed=3, steps=2).latents)
    clip.save(path)
    recipe = read_recipe(path)
    assert recipe["plan"]["few_step"]["guidance_scale"] == 3
    assert own_options(recipe).keys().isdisjoint({"sampler", "shift", "guidance"})
    code = main(["replay", str(path), "-o", str(tmp_path / "again.mkv"), "--json"])
    assert code == 0
    assert json.loads(capsys.readouterr().out)["identical"]
    assert main(["inspect", str(path)]) == 0
    assert "few_step" in capsys.readouterr().out


def test_its_clips_are_compared_with_the_models_own(model: Path, tmp_path: Path) -> None:
    program = load_program("eval/toybox/steps.py")
    output = tmp_path / "few.json"
    arguments = ["steps.py", "few", "-o", str(output), "--model", str(model), "--prompts", "2",
                 "--only", "student", "--dtype", "fp32"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", arguments)
        program.main()
    found = json.loads(output.read_text())
    assert found["options"] == {"default": {}, "student": {"steps": 2}}
    assert found["few"]["default"]["all"]["change"] == 0
    assert set(found["few"]["student"]) == {"sprite", "motion", "place", "camera", "all"}


@pytest.mark.long
@pytest.mark.parametrize("layout", ["diffusers", "wan"])
def test_a_converted_model_takes_its_student_along(
    engine: Engine, layout: str, tmp_path: Path
) -> None:
    there, back = tmp_path / "there", tmp_path / "back"
    convert(engine.folder, there, layout)
    convert(open_model(str(there)), back, "vidgen")
    clip = engine.generate(PROMPT, seed=3, steps=2, audio="none")
    for folder in (there, back):
        other = load(str(folder), device="cpu", dtype="fp32")
        assert other.folder.few_step == engine.folder.few_step
        made = other.generate(PROMPT, seed=3, steps=2, audio="none")
        torch.testing.assert_close(made.latents, clip.latents, atol=1e-5, rtol=1e-4)
        for role in ("transformer", "text_encoder"):
            one, two = (each.folder.components[role].load(torch.float32, torch.device("cpu"))
                        .state_dict() for each in (engine, other))
            assert one.keys() == two.keys()
            assert all(torch.equal(one[name], two[name]) for name in one)
    files = [each.folder.files for each in (other, engine)]
    name = f"{FEW_STEP}/{FEW_STEP_WEIGHTS['transformer']}"
    assert files[0][name] == files[1][name]


def test_a_student_is_left_out_where_weights_change(engine: Engine, tmp_path: Path) -> None:
    view = engine.folder.components["transformer"].load(torch.float32, torch.device("cpu"))
    name, value = next(iter(view.state_dict().items()))
    convert(engine.folder, tmp_path / "tuned", "vidgen", changed={"transformer": {name: value + 1}})
    assert open_model(str(tmp_path / "tuned")).few_step is None


def test_a_student_of_other_weights_is_not_released(
    run: DistilRun, model: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(model, other)
    file = other / "transformer" / "model.safetensors"
    program = load_program("train/toybox/release.py")
    program.save_module(
        {name: value + 1 for name, value in load_file(file).items()},
        json.loads((file.parent / "config.json").read_text()), file.parent, torch.float32,
    )
    with pytest.raises(ModelError, match="name the model it was taught on"):
        program.release_student(Path(run.run.folder), other)


def test_the_recipes_delta_is_small_enough() -> None:
    run = build(DistilRun, load_yaml(ROOT / "train/toybox/configs/student.yaml"), "run")
    with torch.device("meta"):
        delta = Delta(SpacetimeDiT(DIT_PRESETS["toybox"]), run.delta)
    assert 2 * sum(part.numel() for part in delta.parameters()) < 3e6 * 0.98  # and its names
    with pytest.raises(InputError, match=r"no linear layer is called 'ffm'; .*ffn"):
        Delta(SpacetimeDiT(DIT_PRESETS["tiny"]), replace(run.delta, targets=("ffm",)))


def test_bad_settings_and_files_are_refused(
    settings: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"sampler is 'heun'; it is one of euler, unipc"):
        build(DistilRun, {**settings, "trajectories": {**settings["trajectories"],
                                                       "sampler": "heun"}}, "run")
    trajectories = settings["trajectories"]
    for changes, message in (
        ({"match": {"start": "runs/x", "first_step": 2}}, "first_step is 2; .* end with number 1"),
        ({"match": {"start": "runs/x"}, "trajectories": trajectories | {"by_student": True}},
         "both given; .* leave by_student out"),
    ):
        with pytest.raises(InputError, match=message):
            build(DistilRun, settings | changes, "run")
    with pytest.raises(InputError, match=r"between is \[0.9, 0.2\]; give two rising levels"):
        build(DistilRun, settings | {"match": {"start": "runs/x", "between": [0.9, 0.2]}}, "run")
    with pytest.raises(InputError, match="clips of 17 frames, the trajectories 9"):
        with_run(settings, tmp_path, phases=[{"steps": 1, "num_frames": 17, "batch_size": 1}])
    with pytest.raises(InputError, match="were made otherwise"):
        open_shards(build(DistilRun, {**settings, "trajectories": {
            **settings["trajectories"], "guidance_scale": 2.0}}, "run"))
    shutil.copytree(model, tmp_path / "model")
    config = tmp_path / "model" / FEW_STEP / "config.json"
    for changes, message in (({"sigmas": [1.0, 0.5, 0.6, 0.0]}, "must fall from 1 to 0"),
                             ({"sampler": "heun"}, "sampler is 'heun'; give one of euler")):
        known = {"sampler": "unipc", "sigmas": [1.0, 0.5, 0.0], "guidance_scale": 3.0}
        config.write_text(json.dumps(known | changes))
        with pytest.raises(ModelError, match=message):
            open_model(str(tmp_path / "model"))
