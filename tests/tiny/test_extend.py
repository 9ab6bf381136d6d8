"""Clips longer than a window, and clips that go on from files, on a tiny model."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.wan_models import build_diffusers
from vidgen.core.errors import InputError
from vidgen.core.request import Request
from vidgen.diffusion.flow import draw_noise
from vidgen.media.clip import Clip
from vidgen.media.probe import read_recipe
from vidgen.media.video_reader import VideoReader
from vidgen.pipeline import codec, windows
from vidgen.pipeline.engine import Engine, load
from vidgen.pipeline.recipe import make_recipe
from vidgen.pipeline.tail import colours_of, make_tail, read_tail, split_windows, windows_after
from vidgen.pipeline.windows import WindowedClip, hold_colours

PROMPT = "a red car bounces across the desert"
FIRST = 5  # latent frames of the tiny model's window


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Engine:
    return load(str(tiny_model), device="cpu", dtype="fp32")


def begin(engine: Engine, **options: object) -> WindowedClip:
    request, inputs = engine.read(Request.of(PROMPT, {"seed": 1, "guidance": 1.0, **options}))
    return WindowedClip(engine, engine.plan(request, inputs), request, inputs)


def denoise(
    engine: Engine, long: WindowedClip, done: Tensor | None = None,
    keep: Callable[[Tensor], None] = lambda _: None,
) -> tuple[Tensor, list[dict]]:
    """The clip's latents, and what each window was given."""
    contexts, seen = engine.encode_prompt(long.plan), []
    for plan, state in long.states(done):
        made = engine.sample(plan, state, contexts)
        seen.append({"plan": plan, "state": state, "made": made})
        keep(long.add(state, made))
    return long.latents, seen


def make(engine: Engine, **options: object) -> Clip:
    long = begin(engine, **options)
    recipe = make_recipe(engine, long.plan, long.request, long.inputs)
    return long.clip(denoise(engine, long)[0], recipe)


@pytest.fixture(scope="module")
def short(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip of one window and 8 more latent frames, of which 2 frames were not kept."""
    path = tmp_path_factory.mktemp("clips") / "short.mp4"
    return make(engine, seconds=47 / 12).save(path)


@pytest.mark.parametrize(("first", "total", "size", "overlap"), [
    (0, 5, 5, 2), (0, 6, 5, 2), (0, 30, 5, 4), (3, 9, 5, 3), (1, 2, 5, 1), (0, 17, 9, 3),
])
def test_windows_cover_the_clip_and_share_the_overlap(first, total, size, overlap):
    windows = split_windows(first, total, size, overlap)
    assert windows[0][0] == max(first - overlap, 0)
    assert windows[-1][1] == total
    assert all(stop - start <= size for start, stop in windows)
    assert all(later[0] == earlier[1] - overlap for earlier, later in pairwise(windows))
    assert all(stop - start == size for start, stop in windows[:-1])


def test_a_window_begins_with_the_clips_last_latents_and_its_own_share_of_the_noise(engine):
    long = begin(engine, frames=41, settings={"overlap": 2, "colour_hold": 0})
    latents, seen = denoise(engine, long)
    assert [w["plan"].latents.num_frames for w in seen] == [5, 5, 5]
    noise = draw_noise(1, long.plan.latents)
    for (start, stop), window in zip(long.windows, seen, strict=True):
        state, known = window["state"], 2 if start else 0
        assert torch.equal(state.latents, noise[:, :, start:stop])
        assert not state.denoise_mask[:, :, :known].any()
        assert state.denoise_mask[:, :, known:].all()
        assert torch.equal(state.clean[:, :, :known], latents[:, :, start : start + known])
        assert torch.equal(window["made"], latents[:, :, start:stop])


def test_a_longer_clip_begins_as_the_shorter_one(engine):
    one, two = (denoise(engine, begin(engine, frames=n, settings={"overlap": 2}))[0]
                for n in (29, 41))
    assert torch.equal(one, two[:, :, : one.shape[2]])


def test_a_run_continues_after_the_windows_that_are_done(engine):
    long, kept = begin(engine, frames=37, settings={"overlap": 1}), []
    whole, _ = denoise(engine, long, keep=lambda latents: kept.append(latents.clone()))
    assert torch.equal(kept[-1], whole)
    again, seen = denoise(engine, long, done=kept[0])
    assert len(seen) == len(long.windows) - 1
    assert torch.equal(again, whole)


def test_many_latents_lie_in_a_file_and_are_the_same(engine, monkeypatch):
    long = begin(engine, frames=29)
    in_memory, _ = denoise(engine, long)
    monkeypatch.setattr(codec, "IN_MEMORY", 0)
    on_disk, _ = denoise(engine, long)
    assert torch.equal(in_memory, on_disk)


def test_frames_stream_out_as_whole_decoding_gives_them(engine):
    clip = make(engine, seconds=47 / 12)
    with engine.loader.use("vae") as vae:
        whole = vae.decode(clip.latents).clamp(-1, 1)[0, :, :47]
    frames = ((whole + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).numpy()
    assert clip.num_frames == 47
    assert np.abs(frames.astype(int) - clip.frames.astype(int)).max() <= 1


def test_stills_are_met_in_the_window_they_fall_into(engine):
    still = np.full((32, 32, 3), 90, np.uint8)
    long = begin(engine, frames=41, settings={"overlap": 2}, image=still, last_image=still,
                 reference=[still],
                 frame=[(18 / 12, still)])
    _, seen = denoise(engine, long)
    known = [int((~w["state"].denoise_mask[0, 0, :, 0, 0]).sum()) for w in seen]
    assert known == [1, 2, 2]
    positions = [w["state"].keys.positions[0].tolist() for w in seen]
    reference = -4.0
    assert positions[0] == [reference]
    assert positions[1] == [(18 - 3 * 4 + 1.5) / 4, reference]
    assert positions[2] == [(40 - 6 * 4 + 1.5) / 4, reference]


def test_a_file_continues_from_the_latents_in_its_recipe(engine, short, tmp_path):
    long = begin(engine, prefix=str(short), seconds=6, seed=2)
    assert long.begun.hand_over == "latents"
    latents, _ = denoise(engine, long)
    before = make(engine, seconds=47 / 12).latents
    given = long.begun.latents.shape[2]
    assert torch.allclose(latents[:, :, :given], before[:, :, -given:], atol=2e-3)
    recipe = make_recipe(engine, long.plan, long.request, long.inputs)
    out = long.clip(latents, recipe).save(tmp_path / "longer.mp4")
    old, new = ([*VideoReader(path)] for path in (short, out))
    assert len(new) == 72
    assert all(map(np.array_equal, old, new))
    told = read_recipe(out)
    assert told["hand_over"] == "latents"
    again = read_tail(told, engine.folder)
    assert again.num_frames == 72
    assert again.num_latents == 19
    assert again.frames_ahead == 1
    assert torch.equal(again.colours, long.begun.colours.half().float())


def test_frames_added_to_a_file_are_those_of_one_decode_of_all_latents(engine, short):
    long = begin(engine, prefix=str(short), seconds=6, seed=2)
    whole = replace(long.begun, latents=make(engine, seconds=47 / 12).latents)
    long.begun, long.windows = whole, windows_after(whole, long.plan, long.request, engine.folder)
    latents, _ = denoise(engine, long)
    clip = long.clip(latents, {})
    with engine.loader.use("vae") as vae:
        decoded = vae.decode(latents).clamp(-1, 1)[0, :, 47:72]
    frames = ((decoded + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).numpy()
    assert np.abs(frames.astype(int) - clip.frames[47:].astype(int)).max() <= 1


def test_a_file_without_latents_continues_from_its_frames(engine, short, tmp_path, caplog):
    bare = tmp_path / "bare.mkv"
    clip = Clip.from_file(short)
    Clip(clip.chunks, replace(clip.info, recipe=None)).save(bare)
    with caplog.at_level(logging.WARNING):
        long = begin(engine, prefix=str(bare), seconds=5)
    assert "its last frames are encoded" in caplog.text
    assert long.begun.hand_over == "pixels"
    latents, seen = denoise(engine, long)
    assert not seen[0]["state"].denoise_mask[:, :, :3].any()
    made = long.clip(latents, {})
    assert len(made.frames) == 60
    assert np.array_equal(made.frames[:47], clip.frames)


def test_a_clip_of_another_rate_is_encoded_once_more(engine, short, tmp_path, caplog):
    long = begin(engine, prefix=str(short), seconds=5, fps=24)
    latents, _ = denoise(engine, long)
    out = long.clip(latents, {}).save(tmp_path / "faster.mp4")
    assert "encoded again" in caplog.text
    with VideoReader(out) as reader:
        assert (reader.fps, len([*reader])) == (24, 120)


def test_the_tail_survives_its_recipe_and_stays_small(engine, short):
    recipe = read_recipe(short)
    begun = read_tail(recipe, engine.folder)
    assert begun.latents.shape == (1, *recipe["tail"]["shape"])
    assert begun.num_latents == 13
    assert begun.frames_ahead == 2
    recipe["model"]["sha256"] = "0" * 64
    assert read_tail(recipe, engine.folder) is None
    huge = torch.zeros(1, 16, 1, 1, 1).expand(1, 16, 3, 300, 300)
    assert make_tail(huge, 3, 0, colours_of(huge)) is None
    assert make_tail(huge[..., :150], 3, 0, colours_of(huge))["shape"][1] == 1


@pytest.mark.parametrize("change", [
    {"data": "AAAA"}, {"data": "!"}, {"shape": None}, {"num_latents": "x"}, {"shape": [1, -1]},
    {"colours": ""},
])  # fmt: skip
def test_a_damaged_tail_is_refused(engine, short, change):
    recipe = read_recipe(short)
    recipe["tail"] |= change
    with pytest.raises(InputError, match="damaged"):
        read_tail(recipe, engine.folder)


def test_holding_colours_ends_at_them_and_begins_where_it_was():
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 8, 6, 6, generator=generator) * 1.05 + 0.08
    wanted = torch.tensor([[0.0] * 4, [1.0] * 4])
    held = hold_colours(latents, wanted, 1.0)
    moved = (held - latents).abs().mean((0, 1, 3, 4))
    assert torch.all(moved[1:] > moved[:-1])
    assert moved[0] < 0.2 * moved[-1]
    distance = (colours_of(held) - wanted).abs()
    assert torch.all(distance[0] < (colours_of(latents) - wanted).abs()[0])
    assert hold_colours(latents, wanted, 0.0) is latents
    far = hold_colours(latents + 5, wanted, 1.0) - latents - 5
    assert far.mean().abs() < windows.MAX_SHIFT


def test_colours_are_held_to_the_first_windows(engine):
    long = begin(engine, frames=41, settings={"overlap": 2, "colour_hold": 1})
    latents, seen = denoise(engine, long)
    free, _ = denoise(engine, begin(engine, frames=41, settings={"overlap": 2, "colour_hold": 0}))
    assert torch.equal(latents[:, :, :FIRST], free[:, :, :FIRST])
    expected = hold_colours(seen[1]["made"][:, :, 2:], colours_of(latents[:, :, :FIRST]), 1.0)
    assert torch.equal(latents[:, :, FIRST:8], expected)


@pytest.mark.parametrize(("options", "message"), [
    ({"frames": 41, "settings": {"overlap": 5}}, "overlap is 5"),
    ({"frames": 41, "video": "SHORT", "strength": 0.5}, "video works within one window"),
    ({"prefix": "SHORT", "seconds": 2}, "leaves nothing to generate"),
    ({"prefix": "SHORT", "seconds": 6, "image": "STILL"}, "image and prefix"),
    ({"prefix": "SHORT", "seconds": 6, "frame": [(1.0, "STILL")]}, "is within the clip"),
])
def test_what_cannot_be_had_is_refused(engine, short, options, message):
    put = {"SHORT": str(short), "STILL": np.zeros((32, 32, 3), np.uint8)}
    given = {
        name: put.get(value, value) if isinstance(value, str)
        else [(s, put[p]) for s, p in value] if name == "frame" else value
        for name, value in options.items()
    }
    with pytest.raises(InputError, match=message):
        begin(engine, **given)


def test_a_short_clip_is_one_window(engine):
    request, inputs = engine.read(Request.of(PROMPT, {"seed": 1, "frames": 17}))
    clip = WindowedClip(engine, engine.plan(request, inputs), request, inputs)
    assert clip.windows == [(0, FIRST)]


@pytest.fixture
def anchored(tiny_model: Path) -> Engine:
    """A model that was taught to keep to a clip's first frame."""
    taught = load(str(tiny_model), device="cpu", dtype="fp32")
    taught.folder = replace(taught.folder, tasks=(*taught.folder.tasks, "anchor"))
    return taught


def references(state) -> Tensor:
    return torch.zeros(1, 4, 0, 4, 4) if state.keys is None else state.keys.latents


def test_later_windows_are_shown_the_first_frame(anchored, engine):
    long = begin(anchored, frames=41, settings={"overlap": 2})
    latents, seen = denoise(anchored, long)
    first, *later = [w["state"] for w in seen]
    assert first.keys is None
    for state in later:
        assert state.keys.positions.tolist() == [[-4.0]]
        assert torch.equal(state.keys.latents, latents[:, :, :1])
    still = np.full((32, 32, 3), 90, np.uint8)
    for options in ({"settings": {"overlap": 2, "anchor": False}},
                    {"settings": {"overlap": 2}, "reference": [still]}):
        _, seen = denoise(anchored, begin(anchored, frames=41, **options))
        shown = [references(w["state"]).shape[2] for w in seen]
        assert shown == [len(options.get("reference", []))] * 3
    _, seen = denoise(engine, begin(engine, frames=41, settings={"overlap": 2}))  # not taught to
    assert all(w["state"].keys is None for w in seen)


def test_later_windows_look_through_noise_where_the_model_was_taught_to(engine, tiny_model):
    taught = load(str(tiny_model), device="cpu", dtype="fp32")
    defaults = replace(taught.folder.defaults, history_noise=0.25)
    taught.folder = replace(taught.folder, defaults=defaults)
    latents, seen = denoise(taught, begin(taught, frames=41, settings={"overlap": 2}))
    (first, *later), stop = [w["state"] for w in seen], FIRST
    assert first.known_sigma is None
    shape = replace(begin(taught, frames=41, settings={"overlap": 2}).plan.latents, num_frames=2)
    for state in later:
        assert state.known_sigma.tolist() == [0.25]
        noise = draw_noise(1, shape, stream="history", first_frame=stop - 2)
        known = latents[:, :, stop - 2 : stop]
        assert torch.equal(state.clean[:, :, :2], 0.75 * known + 0.25 * noise)
        stop += state.latents.shape[2] - 2
    assert stop == latents.shape[2]
    plain, seen = denoise(engine, begin(engine, frames=41, settings={"overlap": 2}))
    assert all(w["state"].known_sigma is None for w in seen)
    assert torch.equal(plain[:, :, :FIRST], latents[:, :, :FIRST])
    assert not torch.equal(plain, latents)


def test_a_file_carries_its_first_frame_along(anchored, tmp_path):
    first = make(anchored, frames=29)
    path = first.save(tmp_path / "one.mp4")
    anchor = first.latents[:, :, :1].half().float()
    for number, seconds in enumerate((4, 5.5)):
        long = begin(anchored, prefix=str(path), seconds=seconds)
        assert torch.equal(long.begun.anchor, anchor)
        latents, seen = denoise(anchored, long)
        assert all(torch.equal(w["state"].keys.latents, anchor) for w in seen)
        recipe = make_recipe(anchored, long.plan, long.request, long.inputs)
        path = long.clip(latents, recipe).save(tmp_path / f"more{number}.mp4")
    video = Clip.from_file(path)
    Clip(video.chunks, replace(video.info, recipe=None)).save(tmp_path / "bare.mkv")
    bare = begin(anchored, prefix=str(tmp_path / "bare.mkv"), seconds=7).begun
    assert bare.hand_over == "pixels"
    assert torch.equal(bare.anchor, bare.latents[:, :, :1])


def wan(folder: Path, variant: str) -> Engine:
    """A tiny model of Wan's family that learned clips of 9 frames."""
    engine = load(str(build_diffusers(folder / variant, variant)), device="cpu", dtype="fp32")
    assert isinstance(engine, Engine)
    defaults = replace(engine.folder.defaults, max_frames=9)
    engine.folder = replace(engine.folder, defaults=defaults)
    return engine


def test_vace_reads_what_came_before_as_known_frames(tmp_path):
    vace = wan(tmp_path, "vace")
    still = np.full((32, 32, 3), 90, np.uint8)
    long = begin(vace, frames=13, size=(32, 32), steps=2, reference=[still],
                 settings={"overlap": 2, "colour_hold": 0})
    latents, seen = denoise(vace, long)
    assert long.windows == [(0, 3), (1, 4)]
    state, C = seen[1]["state"], latents.shape[1]
    kept, changed, mask = state.control[:, :, state.num_references :].split(
        [C, C, state.control.shape[1] - 2 * C], dim=1)
    assert torch.equal(kept[:, :, 1:2], latents[:, :, 2:3])
    assert not mask[:, :, :2].any()
    assert mask[:, :, 2:].all()
    fresh = seen[0]["state"].control[:, :, state.num_references :]
    assert torch.equal(changed, fresh[:, C : 2 * C])
    with vace.loader.use("vae") as vae:
        frame = vae.decode(latents[:, :, :3]).clamp(-1, 1)[:, :, 4:5]
        torch.testing.assert_close(kept[:, :, :1], vae.encode(frame), rtol=0, atol=1e-4)
    assert torch.equal(latents[:, :, 3:], seen[1]["made"][:, :, 2:])


def test_models_that_know_no_beginning_name_those_that_do(tmp_path):
    t2v = wan(tmp_path, "t2v")
    with pytest.raises(InputError, match=r"--frames 9 or fewer, .* toybox, vace-1.3b, .*ti2v-5b"):
        begin(t2v, frames=13, size=(32, 32))
