"""The judge's networks and rules, what it learns from, and a few steps of its training."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import avg_pool3d, max_pool2d

from eval.toybox.judge import (
    NOTHING,
    Judge,
    JudgeConfig,
    JudgeFolder,
    Verdict,
    coarse_flow,
    sample_frames,
    to_frame_size,
)
from eval.toybox.quality import psnr
from eval.toybox.suite.judging import gibberish, grade, judge_renders
from tests.programs import load_program
from train.toybox.model_files import save_module
from train.toybox.phases import PhasedRun, train
from train.toybox.tasks.judge_data import (
    Batch,
    PoolConfig,
    RenderPool,
    Transforms,
    block_code,
    blur,
    judge_scene,
    labelled,
    mash,
    to_bytes,
)
from train.toybox.world.cast import RESERVED_SPRITES
from train.toybox.world.render import render
from train.toybox.world.scenes import Actor, Scene
from vidgen.core.config import build, dump
from vidgen.core.errors import InputError, ModelError

TINY = JudgeConfig(
    frame_dims=(8, 8, 16), motion_dims=(8, 8, 16), look_dim=4, mixed_dim=8, temporal_dim=16
)


@pytest.fixture(scope="module")
def judge() -> Judge:
    torch.manual_seed(0)
    return Judge(TINY).eval()


@pytest.fixture
def batch() -> Batch:
    scenes = [
        Scene(1, (Actor("cat", "moves left"),), place="city", camera="zoom in"),
        Scene(2, (Actor("car", "grows"),), place="farm", camera="pan left"),
    ]
    shown = render(scenes, 9, 64, 64)
    cover = avg_pool3d(shown.masks, (1, 16, 16))
    return labelled(scenes, shown.video, cover, TINY)


@pytest.mark.parametrize("num_frames", [1, 5, 9, 17, 33, 65])
def test_the_looks_span_the_clip_closely_enough(num_frames: int) -> None:
    looks = sample_frames(num_frames)
    assert looks[0] == 0
    assert looks[-1] == num_frames - 1
    assert len(looks) >= 9
    assert max(b - a for a, b in pairwise(looks)) <= 4


@pytest.mark.parametrize("shape", [(1, 128, 128), (9, 96, 160), (33, 70, 50)])
def test_any_length_and_size_gets_a_verdict(judge: Judge, shape: tuple[int, int, int]) -> None:
    first, _ = judge.verdicts(torch.zeros(2, 3, *shape))
    assert len(first.sprites) == 63
    assert sum(first.places.values()) == pytest.approx(1)
    assert list(first.cameras)[-1] == NOTHING


def test_coarse_flow_finds_a_shift_and_trusts_no_flat_picture() -> None:
    waves = torch.randn(1, 3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    ground = torch.nn.functional.interpolate(waves, (1, 96, 96), mode="trilinear")[:, :, 0]
    looks = torch.stack([ground[..., 16 : 80, 16 - 2 * t : 80 - 2 * t] for t in range(3)], dim=2)
    flow = coarse_flow(looks)
    assert flow.shape == (1, 4, 3, 8, 8)
    assert flow[:, 0, :2].median() == pytest.approx(1.0, abs=0.15)  # 2 pixels at half resolution
    assert flow[:, 1, :2].abs().median() < 0.1
    assert not flow[:, :, 2].any()
    flat = coarse_flow(torch.zeros(1, 3, 2, 64, 64))
    assert not flat[:, :2].any()
    assert flat[:, 2, 0].max() < 0.1 < flow[:, 2, 0].min()


def test_the_frame_size_keeps_area_and_aspect() -> None:
    assert to_frame_size(torch.zeros(1, 3, 96, 160)).shape[-2:] == (96, 160)
    assert to_frame_size(torch.zeros(1, 3, 256, 256)).shape[-2:] == (128, 128)


def test_a_verdict_names_what_is_sure_and_nothing_else() -> None:
    places = {"city": 0.9, NOTHING: 0.1}
    motions = {"rises": 0.4, "spins": 0.1, NOTHING: 0.5}
    seen = Verdict({"cat": 0.9, "car": 0.6, "bus": 0.1}, motions, places, {"still": 1.0})
    assert (seen.sprite, seen.motion, seen.place) == ("cat", NOTHING, "city")
    assert seen.shows(["cat"])
    assert seen.shows(["car", "cat"])
    assert not seen.shows(["cat", "bus"])
    scene = Scene(0, (Actor("cat", "rises"),), place="city")
    assert grade(seen, scene) == {"sprite": True, "motion": False, "place": True, "camera": True}


def test_some_of_its_scenes_are_empty_and_some_reserved() -> None:
    scenes = [judge_scene(i, empty=0.2) for i in range(400)]
    empty = sum(not scene.actors for scene in scenes)
    reserved = sum(s.actors[0].sprite in RESERVED_SPRITES for s in scenes if s.actors)
    assert 50 < empty < 110
    assert 4 < reserved < 40
    assert not render([s for s in scenes if not s.actors][:2], 1, 32, 32).masks.any()


def test_a_pools_scenes_can_be_of_some_motions_where_they_can_be_seen() -> None:
    scenes = [judge_scene(i, empty=0.1, motions=("spins", "grows")) for i in range(60)]
    acting = [scene for scene in scenes if scene.actors]
    assert len(acting) < 60
    assert all(len(scene.actors) == 1 for scene in acting)
    assert {scene.actors[0].motion for scene in acting} == {"spins", "grows"}
    with pytest.raises(InputError, match=r"'flies' is none of moves left"):
        PoolConfig(motions=("flies",))


def test_a_pool_holds_at_a_step_what_a_straight_run_would() -> None:
    config = PoolConfig(num_frames=9, height=32, width=32, clips=6, first=4, fresh=0.5)
    straight, resumed = (RenderPool(config, TINY, 10**6) for _ in range(2))
    for step in range(9):
        straight.advance(step)
    resumed.advance(8)
    drawn = [pool.draw(8, 5, torch.Generator().manual_seed(3)) for pool in (straight, resumed)]
    assert torch.equal(drawn[0].video, drawn[1].video)
    assert torch.equal(drawn[0].coverage, drawn[1].coverage)
    assert torch.equal(drawn[0].sprites, drawn[1].sprites)
    assert straight.window(8) == range(2, 8)


def test_mirror_and_reversal_change_labels_as_they_change_pictures(batch: Batch) -> None:
    change = Transforms(TINY, torch.Generator())
    before = batch.video.clone()
    change._turn(batch, [0, 1], 4, change.mirrored)
    assert torch.equal(batch.video, before.flip(4))
    assert batch.motions[0].argmax() == TINY.motions.index("moves right")
    assert TINY.cameras[batch.cameras[1]] == "pan right"
    change._turn(batch, [0, 1], 2, change.reversed)
    assert TINY.motions[int(batch.motions[1].argmax())] == "shrinks"
    assert TINY.cameras[batch.cameras[0]] == "zoom out"
    assert TINY.cameras[batch.cameras[1]] == "pan left"


def test_a_frozen_clip_stays(batch: Batch) -> None:
    change = Transforms(TINY, torch.Generator())
    change._freeze(batch, 0)
    assert not batch.video[0].diff(dim=1).any()
    assert batch.motions[0].nonzero().tolist() == [[TINY.motions.index("stays")]]
    assert TINY.cameras[batch.cameras[0]] == "still"


def test_a_mashed_actor_is_no_sprite_but_the_place_is_left() -> None:
    shown = render([Scene(3, (Actor("cat", size="small"),), place="city")], 9)
    cover = avg_pool3d(shown.masks, (1, 16, 16))
    batch = labelled([Scene(3, (Actor("cat"),), place="city")], shown.video.clone(), cover, TINY)
    Transforms(TINY, torch.Generator().manual_seed(1))._mash(batch, 0, everywhere=False)
    assert (batch.sprites[0] == -1).all()
    assert not batch.motions[0].any()
    assert batch.places[0] == TINY.places.index("city")
    changed = (batch.video - shown.video)[0].abs().amax((0, 1))
    near = max_pool2d(cover[0].sum((0, 1))[None, None], 5, 1, 2)[0, 0]  # the edge of mush is soft
    assert changed[shown.masks[0, 0].amax(0) > 0.5].mean() > 0.05
    assert not changed[near.repeat_interleave(16, 0).repeat_interleave(16, 1) == 0].any()


def test_changes_depend_on_the_generator_alone(batch: Batch) -> None:
    results = []
    for _ in range(2):
        copy = Batch(*(value.clone() for value in vars(batch).values()))
        change = Transforms(TINY, torch.Generator().manual_seed(5))
        results.append(change.apply(copy, nothing=0.5, frozen=0.2).video)
    assert torch.equal(*results)
    assert results[0].abs().max() <= 1


def test_damage_is_of_the_kind_it_says() -> None:
    frames = render([Scene(1, (Actor("cat"),))], 1, 64, 64).video[:, :, 0]
    assert torch.allclose(block_code(frames, 1e-6), frames, atol=1e-4)
    blurred = blur(frames, 2.0)
    assert blurred.shape == frames.shape
    assert blurred.diff(dim=-1).abs().sum() < 0.6 * frames.diff(dim=-1).abs().sum()
    assert to_bytes(torch.tensor([-1.0, 0.0, 1.0])).tolist() == [0, 128, 255]


@pytest.mark.parametrize("seed", range(6))
def test_mash_keeps_colours_and_shape(seed: int) -> None:
    clip = render([Scene(1, (Actor("cat"),))], 3, 64, 96).video[0]
    mush = mash(clip, 24.0, torch.Generator().manual_seed(seed))
    assert mush.shape == clip.shape
    assert (mush.mean((1, 2, 3)) - clip.mean((1, 2, 3))).abs().max() < 0.1
    assert (mush - clip).abs().mean() > 0.01


def test_gibberish_is_noise_and_blobs_in_range() -> None:
    clips = gibberish(4, 5, (32, 48), torch.Generator().manual_seed(0))
    assert clips.shape == (4, 3, 5, 32, 48)
    assert clips.abs().max() <= 1
    rough = clips.diff(dim=-1).abs().mean((1, 2, 3, 4))
    assert rough[0] > 5 * rough[1]


def test_judging_renders_counts_every_clip_once(judge: Judge) -> None:
    rates = judge_renders(judge, 1 << 41, 10, 9, (32, 32))
    assert rates["place"].total == rates["nothing"].total == 10
    assert rates["sprite"].total + rates["two_sprites"].total == 10


def test_psnr_of_a_known_error() -> None:
    clean = torch.zeros(2, 3, 2, 4, 4)
    noisy = clean + torch.tensor([0.2, 0.02]).view(2, 1, 1, 1, 1)
    assert psnr(noisy, clean).tolist() == pytest.approx([20.0, 40.0], abs=1e-3)
    noisy[0, :, :, :2] = 0
    mask = torch.zeros(2, 1, 2, 4, 4)
    mask[:, :, :, 2:] = 1
    assert psnr(noisy, clean, mask).tolist() == pytest.approx([20.0, 40.0], abs=1e-3)
    assert psnr(noisy, clean, torch.zeros_like(mask)).isnan().all()


def test_a_judge_of_another_world_is_refused(judge: Judge, tmp_path: Path) -> None:
    save_module(judge.state_dict(), TINY, tmp_path, torch.bfloat16)
    assert JudgeFolder(tmp_path).load().config == TINY
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"world_version": 99}))
    with pytest.raises(ModelError, match="world 99"):
        JudgeFolder(tmp_path).load()


def make_task(folder: Path, **more: object) -> tuple[Any, PhasedRun]:
    """The program's task, from settings as YAML would give them."""
    program = load_program("train/toybox/judge.py")
    pool = {"num_frames": 9, "height": 64, "width": 64, "clips": 12, "first": 8, "fresh": 0.5}
    run = {
        "folder": str(folder), "phases": [{"steps": 12, "num_frames": 9, "batch_size": 4}],
        "optim": {"lr": 1e-2, "warmup_steps": 1}, "dtype": "fp32", "log_every": 1,
    }
    settings = {"run": run, "pools": [pool], "model": dump(TINY), "validation_clips": 4, **more}
    config = build(program.JudgeRun, settings, "test")
    return program.JudgeTask(config), config.run


@pytest.mark.long
def test_the_program_learns_and_resumes_exactly(tmp_path: Path) -> None:
    task, run = make_task(tmp_path / "straight")
    result = train(task, run)
    assert result.finished
    assert 0 <= result.metrics["place"] <= 1
    lines = (tmp_path / "straight" / "curve.jsonl").read_text().splitlines()
    losses = [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    assert (tmp_path / "straight" / "batch.png").is_file()

    cut, short = make_task(tmp_path / "cut")
    train(cut, replace(short, minutes=1e-9))
    resumed, run = make_task(tmp_path / "cut")
    assert train(resumed, run, resume=True).step == 12
    straight, again = (
        JudgeFolder(tmp_path / name / "judge").load().state_dict() for name in ("straight", "cut")
    )
    assert all(torch.equal(straight[name], again[name]) for name in straight)


@pytest.mark.long
def test_frames_can_continue_alone_from_a_released_judge(tmp_path: Path, judge: Judge) -> None:
    save_module(judge.state_dict(), TINY, tmp_path / "released", torch.bfloat16)
    task, run = make_task(tmp_path / "run", init=str(tmp_path / "released"), part="frames",
                          model=dump(JudgeConfig()))  # fmt: skip
    assert train(task, run).finished
    before, after = (
        JudgeFolder(tmp_path / name).load().state_dict() for name in ("released", "run/judge")
    )
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same >= {name for name in before if name.startswith("motion.")}
    assert not same & {name for name in before if name.startswith("frames.")
                       and name.endswith("weight") and before[name].ndim > 1}  # fmt: skip


def test_frames_with_little_sprite_can_be_looked_at_more_often(tmp_path: Path) -> None:
    area = torch.tensor([0.2, 0.02, 0.2, 0.0, 0.2, 0.2])
    coverage = area[None, None, :, None, None].expand(400, 2, 6, 4, 4) / 2
    seen = {}
    for small in (0.0, 1.0):
        task, _ = make_task(tmp_path, pictures=2, small=small)
        picks = task._picks(coverage, step=3)
        assert picks.shape == (400, 2)
        assert (picks[:, 0] != picks[:, 1]).all()
        seen[small] = picks.flatten().bincount(minlength=6) / 400
    assert 0.23 < float(seen[0.0].min()) <= float(seen[0.0].max()) < 0.43
    assert float(seen[1.0][[1, 3]].min()) > 0.7
