"""The embedded model's programs at tiny size: cache, train, release, generate."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.faults import ForkServer
from tests.programs import ROOT, Ended, load_program, run_program
from train.toybox.phases import Phase, PhasedRun
from train.toybox.tasks.latents import LatentShards
from train.toybox.tasks.toybox_data import (
    CacheConfig,
    ToyboxCache,
    as_reference,
    cut_around,
    encoder_hash,
    load_vae,
)
from train.toybox.tasks.wider import with_wider_encoder
from train.toybox.world.scenes import is_held_out, sample_scenes
from vidgen.core.errors import InputError, ModelError
from vidgen.models.words import read_synonyms
from vidgen.pipeline.engine import load
from vidgen.weights.folder import FewStepConfig
from vidgen.weights.layouts import open_model

Program = Callable[..., Ended]


@pytest.fixture
def program(server: ForkServer) -> Program:
    """Runs one of the programs in `train/`, by its name."""
    return lambda name, *arguments: run_program(server, f"train/toybox/{name}.py", *arguments)


def on_two_ranks(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A program by torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               "2", "-m", f"train.toybox.{name}", *arguments]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def run_file(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dit")
    config = {
        "preset": "tiny", "text_preset": "tiny", "tokenizer": str(tiny_model / "tokenizer"),
        "shifts": [1.0, 2.0], "validation_clips": 2, "loose_share": 0.5, "anonymous_share": 0.5,
        "window_share": 0.5, "anchor_share": 1.0,
        "caches": [{
            "folder": str(folder / "latents"), "vae": str(tiny_model / "vae"), "shards": 2,
            "shard_size": 4, "height": 32, "width": 32, "num_frames": 33,
        }],
        "run": {
            "folder": str(folder / "run"), "device": "cpu", "validate_every": 100,
            "phases": [
                {"steps": 2, "num_frames": 1, "batch_size": 4},
                {"steps": 4, "num_frames": 17, "batch_size": 4},
            ],
            "optim": {"lr": 1e-3, "muon_lr": 1e-3},
        },
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.mark.long
def test_training_says_what_is_missing_then_learns_and_is_released(
    run_file: Path, tiny_model: Path, tmp_path: Path, program: Program
) -> None:
    early = program("dit", "-c", str(run_file))
    assert early.returncode == 2
    assert "train/toybox/cache.py" in early.stderr
    made = on_two_ranks("cache", "-c", str(run_file))
    assert made.returncode == 0, made.stderr
    trained = program("dit", "-c", str(run_file))
    assert trained.returncode == 0, trained.stderr
    assert json.loads(trained.stdout)["step"] == 6
    out = tmp_path / "model"
    shutil.copytree(tiny_model, out)
    released = program("release", "dit", "--run", str(run_file.parent / "run"), "--out", str(out))
    assert released.returncode == 0, released.stderr
    known, before = (set((folder / "tokenizer" / "words.txt").read_text().split())
                     for folder in (out, tiny_model))
    assert known > before
    assert {"hound", "dollies", "please", "travel"} <= known - before
    assert read_synonyms(out / "tokenizer" / "synonyms.json")["hound"] == "dog"
    assert "tokenizer/synonyms.json" in open_model(str(out)).files
    assert "anchor" in open_model(str(out)).tasks
    mixed = tmp_path / "mixed"
    shutil.copytree(out, mixed)
    release = ("release", "dit", "--run", str(run_file.parent / "run"), "--out", str(mixed))
    student = mixed / "few_step" / "config.json"
    student.parent.mkdir()
    student.write_text("{}")
    kept = program(*release, "--mix", f"{tiny_model}=0.25", "--keep-students")
    assert (kept.returncode, student.exists()) == (0, True), kept.stderr
    assert program(*release, "--mix", f"{tiny_model}=0.25").returncode == 0
    assert not student.parent.exists()
    weights = (load_file(folder / "transformer" / "model.safetensors")
               for folder in (mixed, out, tiny_model))
    for made, new, old in zip(*(each.values() for each in weights), strict=True):
        wanted = 0.75 * new.float() + 0.25 * old.float()
        torch.testing.assert_close(made.float(), wanted, rtol=0.02, atol=1e-3)
    for mix, reason in (("0.5", "FOLDER=SHARE"), (f"{tiny_model}=1", "less than 1"),
                        (f"{tmp_path}=0.5", "same architecture")):
        refused = program(*release, "--mix", mix)
        assert (refused.returncode, reason in refused.stderr) == (2, True), refused.stderr
    for option in (["--mix", f"{tiny_model}=0.5"], ["--keep-students"]):
        refused = program("release", "tokenizer", "--out", str(mixed), *option)
        reason = f"{option[0]} goes with dit"
        assert (refused.returncode, reason in refused.stderr) == (2, True), refused.stderr
    clip = load(str(out)).generate("a red car bounces", seed=1, frames=5, size="32x32", steps=2)
    assert clip.frames.shape == (5, 32, 32, 3)
    told = open_model(str(out))
    low = ("--set", f"init={out}", "--set", "levels=[0.0, 0.9]", "--set", "part=transformer",
           "--set", f"run.folder={tmp_path / 'low'}")
    trained = program("dit", "-c", str(run_file), *low)
    assert trained.returncode == 0, trained.stderr
    release = ("release", "dit", "--run", str(tmp_path / "low"), "--out", str(out))
    (out / "few_step").mkdir()
    for boundary, options, stays in ((None, (), True), (0.9, ("--keep-students",), True),
                                     (0.9, (), False)):
        student = FewStepConfig("unipc", (1.0, 0.0), 3.0, boundary=boundary)
        (out / "few_step" / "config.json").write_text(json.dumps(asdict(student)))
        assert program(*release, *options).returncode == 0
        assert (out / "few_step").exists() == stays, "a student with the old expert's steps goes"
    both = open_model(str(out))
    assert both.components.keys() - told.components.keys() == {"transformer_2"}
    assert (both.tasks, both.defaults) == (told.tasks, replace(told.defaults, boundary=0.9))
    first, second = (load_file(out / part / "model.safetensors")
                     for part in ("transformer", "transformer_2"))
    assert any(not torch.equal(first[name], second[name]) for name in second)
    shared = load(str(out)).generate("a red car bounces", seed=1, frames=5, size="32x32", steps=2)
    assert (shared.frames != clip.frames).any()


@pytest.mark.long
def test_what_is_added_to_a_folder_is_recorded_there_and_nothing_else(
    tiny_model: Path, tmp_path: Path, program: Program
) -> None:
    out = tmp_path / "model"
    shutil.copytree(tiny_model, out)
    damaged = out / "tokenizer" / "words.txt"
    damaged.write_text(damaged.read_text() + "intruder\n")
    with pytest.raises(ModelError, match=r"words\.txt is damaged"):
        assert open_model(str(out)).content_hash
    made = program("preview", "--model", str(out))
    assert made.returncode == 0, made.stderr
    assert {"magnitudes.json", "preview/model.safetensors"} <= open_model(str(out)).files.keys()
    with pytest.raises(ModelError, match=r"words\.txt is damaged"):
        assert open_model(str(out)).content_hash
    shutil.copyfile(tiny_model / "tokenizer" / "words.txt", damaged)
    first = open_model(str(out)).content_hash
    (out / "magnitudes.json").write_text("{}")
    assert program("preview", "--model", str(out)).returncode == 0
    assert open_model(str(out)).content_hash == first != open_model(str(tiny_model)).content_hash


def test_processes_that_torchrun_started_share_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = LatentShards(tmp_path, {})
    shards.write(3, {"clips": torch.zeros(1)})
    assert shards.missing(6) == [0, 1, 2, 4, 5]
    made_by = []
    for rank in range(3):
        for name in ("RANK", "LOCAL_RANK"):
            monkeypatch.setenv(name, str(rank))
        for name, value in (("WORLD_SIZE", "3"), ("MASTER_ADDR", "::1"), ("MASTER_PORT", "1")):
            monkeypatch.setenv(name, value)
        made_by.append(shards.missing(6))
    assert made_by == [[0], [1, 4], [2, 5]]
    shards.write(0, {"clips": torch.zeros(1)})
    assert shards.missing(6) == [2, 5]  # what others have finished moves nothing
    small = [LatentShards(tmp_path / str(n), {}).missing(1, dealt=n) for n in range(5)]
    assert small == [[], [], [0], [], []]  # the third process's turn, of five small folders


def test_shards_are_made_again_just_the_same(tiny_model: Path, tmp_path: Path) -> None:
    caches = [
        ToyboxCache(CacheConfig(str(tmp_path / name), str(tiny_model / "vae"), 1, shard_size=2,
                                height=32, width=32))
        for name in ("a", "b")
    ]
    vae = load_vae(str(tiny_model / "vae"), torch.device("cpu"))
    for cache in caches:
        assert cache.missing() == [0]
        cache.make(0, vae, torch.device("cpu"))
        assert cache.missing() == []
    made, other = (cache.load() for cache in caches)
    assert torch.equal(made.clips, other.clips)
    assert made.clips.shape == (2, 4, 9, 4, 4)
    assert made.cover.shape == (2, 1, 9, 4, 4)
    assert 0 < made.cover.max() <= 1
    assert made.stills.latents.shape == (2, 4, 3, 4, 4)
    assert made.stills.frame_index[0].tolist() == [16, 32, -1]


def test_a_new_decoder_leaves_cached_latents_valid(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model / "vae", tmp_path / "vae")
    path = tmp_path / "vae" / "model.safetensors"
    before = encoder_hash(tmp_path / "vae")
    tensors = load_file(path)
    save_file({n: t + n.startswith("decoder.") for n, t in tensors.items()}, path)
    assert encoder_hash(tmp_path / "vae") == before
    save_file({n: t + n.startswith("encoder.") for n, t in tensors.items()}, path)
    assert encoder_hash(tmp_path / "vae") != before


@pytest.mark.long
@pytest.mark.parametrize(("part", "oversampling"), [("encoder", 1), ("all", 2)])
def test_a_vae_continues_learning_while_latents_keep_their_meaning(
    tiny_model: Path, tmp_path: Path, program: Program, part: str, oversampling: int
) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    config = {
        "preset": "tiny", "init": str(tiny_model / "vae"), "part": part, "crop": 16,
        "height": 32, "width": 32, "loss": {"kl": 0.0, "keep": 0.3}, "oversampling": oversampling,
        "run": {
            "folder": str(tmp_path / "run"), "device": "cpu", "dtype": "fp32",
            "phases": [{"steps": 5, "num_frames": 5, "batch_size": 1}],
            "validate_every": 100, "optim": {"warmup_steps": 0, "muon_lr": 1e-2},
        },
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    done = program("vae", "-c", str(tmp_path / "run.yaml"))
    assert done.returncode == 0, done.stderr
    done = program("release", "vae", "--run", str(tmp_path / "run"), "--out", str(model))
    assert done.returncode == 0, done.stderr
    before, after = (
        load_file(folder / "vae" / "model.safetensors") for folder in (tiny_model, model)
    )
    moved = {n for n, t in before.items() if not torch.equal(t.bfloat16(), after[n].bfloat16())}
    parts = {"encoder", "decoder"} if part == "all" else {part}
    assert {name.partition(".")[0] for name in moved} == parts
    configs = [(folder / "vae" / "config.json").read_text() for folder in (tiny_model, model)]
    assert json.loads(configs[0]) == json.loads(configs[1]), "what a transformer reads by"


@pytest.mark.long
def test_a_wider_encoder_begins_as_the_one_there_is(
    tiny_model: Path, tmp_path: Path, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = load_vae(str(tiny_model / "vae"), torch.device("cpu"))
    video = torch.rand(2, 3, 9, 32, 32) * 2 - 1
    wide = with_wider_encoder(narrow, 3 * narrow.config.encoder_dim)
    torch.testing.assert_close(wide.encode(video), narrow.encode(video), rtol=1e-4, atol=1e-4)
    twins = wide.encoder.conv_out.weight.unflatten(1, (-1, 3))
    assert (twins.std(2) > 0).all(), "or copies would learn alike"
    with pytest.raises(InputError, match=r"encoder_dim is 12; give a multiple of .* 8"):
        with_wider_encoder(narrow, 12)

    model = shutil.copytree(tiny_model, tmp_path / "model")
    config = {
        "preset": "tiny", "init": str(tiny_model / "vae"), "encoder_dim": 16, "height": 32,
        "width": 32, "run": {
            "folder": str(tmp_path / "run"), "device": "cpu", "dtype": "fp32",
            "phases": [{"steps": 1, "num_frames": 5, "batch_size": 1}], "validate_every": 100,
        },
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    done = program("vae", "-c", str(tmp_path / "run.yaml"))
    assert done.returncode == 0, done.stderr
    release = load_program("train/toybox/release.py")
    monkeypatch.setattr(release, "NUM_STATISTICS_CLIPS", 8)  # each is rendered at full size
    release.release_vae(tmp_path / "run", model)
    released = load_vae(str(model / "vae"), torch.device("cpu"))
    assert released.config.encoder_dim == 16
    assert released.config.decoder_dim == narrow.config.decoder_dim


def test_clips_at_a_finer_rate_are_shown_as_any(tiny_model: Path) -> None:
    """Those that are drawn so are rendered with frames between."""
    vae, phase = load_program("train/toybox/vae.py"), Phase(1, 5, 2)
    run = PhasedRun("run", phases=(phase,), device="cpu", dtype="fp32")
    tasks = [
        vae.VAETask(vae.VAERun(run, "tiny", height=32, width=32, oversampling=rate,
                               init=str(tiny_model / "vae")))
        for rate in (1, 2)
    ]  # fmt: skip
    frames = []
    for step in range(1, 6):
        plain, finer = (task.batch(phase, step, 0)["video"] for task in tasks)
        frames.append((step % 4, plain.shape[2], finer.shape[2]))
        rate, _ = tasks[1]._rates(step)
        assert (finer[:, :, ::rate] - plain).abs().mean() < 0.02, (step, rate)
    assert frames == [(1, 5, 9), (2, 5, 5), (3, 1, 1), (0, 5, 5), (1, 5, 5)]
    assert [tasks[1]._rates(step) for step in range(5)] == [(1, 2), (2, 2), (1, 2), (2, 2), (1, 1)]
    drawn = tasks[1].batch(phase, 1, 0)
    assert torch.isfinite(tasks[1].loss(drawn, 1)[0])


def test_latents_that_are_kept_hold_an_encoder_back(tiny_model: Path) -> None:
    vae = load_program("train/toybox/vae.py")
    run = PhasedRun("run", phases=(Phase(1, 5, 1),), device="cpu")

    def drift_loss(keep: float, by: float) -> float:
        loss = vae.VAELoss(kl=0.0, keep=keep, equivariance_share=0.0)
        settings = vae.VAERun(run, "tiny", "encoder", loss=loss, init=str(tiny_model / "vae"))
        task = vae.VAETask(settings)
        C = task.vae.config.latent_channels
        task.vae.encoder.to_moments.bias.data[:C] += by
        generator = torch.Generator().manual_seed(0)
        video = torch.rand((1, 3, 5, 32, 32), generator=generator) * 2 - 1
        torch.manual_seed(0)
        batch = {"video": video, "mask": torch.zeros(1, 1, 5, 32, 32)}
        return float(task.loss(batch, 1)[0].detach())

    assert drift_loss(4.0, 0.0) == pytest.approx(drift_loss(0.0, 0.0), abs=1e-5)
    assert drift_loss(4.0, 0.5) - drift_loss(0.0, 0.5) == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize(
    "settings", [{"part": "encoder"}, {"part": "decoder"}, {"keep": 0.1}, {"encoder_dim": 48}]
)
def test_a_part_that_continues_needs_what_was_released(settings: dict[str, object]) -> None:
    vae = load_program("train/toybox/vae.py")
    run = PhasedRun("run", phases=(Phase(1, 9, 1),))
    loss = vae.VAELoss(keep=settings.pop("keep", 0.0))
    with pytest.raises(InputError, match="needs init: the folder of the released VAE"):
        vae.VAERun(run, loss=loss, **settings)


def test_references_show_the_sprite_elsewhere_and_no_held_out_triple() -> None:
    for scene in sample_scenes(0, 200, split="train"):
        posed = as_reference(scene)
        actor = posed.actors[0]
        assert actor.sprite == scene.actors[0].sprite
        assert posed.place != scene.place
        assert not is_held_out(actor.sprite, actor.motion, posed.place)


def test_squares_are_cut_around_what_moves() -> None:
    video, mask = torch.randn(3, 3, 5, 32, 48), torch.zeros(3, 1, 5, 32, 48)
    mask[0, :, 1, 20:24, 30:34] = 1
    mask[1, :, :, :2, 46:] = 1
    cut, shown = cut_around(video, mask, 16)
    assert cut.shape == (3, 3, 5, 16, 16)
    assert torch.equal(cut[0], video[0, :, :, 14:30, 24:40]), "in the middle"
    assert torch.equal(cut[1], video[1, :, :, :16, 32:]), "within the frame"
    assert shown.sum() == mask.sum()
    assert torch.equal(cut[2], video[2, :, :, :16, :16]), "nobody is there"
    cut, _ = cut_around(video, mask, 12, step=4)
    assert torch.equal(cut[0], video[0, :, :, 16:28, 24:36]), "at multiples of the step"
    assert torch.equal(cut[1], video[1, :, :, :12, 36:])


@pytest.mark.parametrize("crop", [-8, 0, 60, 136])
def test_a_crop_that_cannot_be_is_refused(crop: int) -> None:
    vae = load_program("train/toybox/vae.py")
    run = PhasedRun("run", phases=(Phase(1, 9, 1),))
    with pytest.raises(InputError, match=f"crop is {crop}; give a multiple of 8 up to 128"):
        vae.VAERun(run, crop=crop)
    with pytest.raises(InputError, match="validation_clips is 0"):
        vae.VAERun(run, validation_clips=0)
    assert vae.VAERun(run, crop=64).crop == 64
