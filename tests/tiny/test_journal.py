"""The journal on a tiny model: stopped at each stage and resumed equals straight through."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.stopping import interrupt_behind, noting, stop_at
from vidgen.core.errors import Cancelled, InputError, OutputError
from vidgen.core.protocols import SamplerState, StepInfo
from vidgen.media import write
from vidgen.media.clip import Clip
from vidgen.media.probe import read_recipe
from vidgen.models.vae import CausalVAE
from vidgen.pipeline.engine import Engine, load
from vidgen.pipeline.journal import job, journal
from vidgen.pipeline.journal.job import (
    SEGMENTS,
    job_facts,
    job_folder,
    part_name,
    progress_text,
    read_job,
    read_segment,
)
from vidgen.pipeline.journal.journal import Journal
from vidgen.pipeline.types import Progress

PROMPT = "a red car bounces across the desert"
LONG = {"seed": 7, "frames": 33, "steps": 3}


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Engine:
    return one_window(load(str(tiny_model), device="cpu", dtype="fp32"))


def one_window(engine: Engine) -> Engine:
    """The engine, which makes clips of 33 frames at once."""
    defaults = replace(engine.folder.defaults, max_frames=65)
    engine.folder = replace(engine.folder, defaults=defaults)
    return engine


@pytest.fixture(scope="module")
def straight_file(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The clip made without a stop, in segments of 16 frames."""
    path = tmp_path_factory.mktemp("straight") / "x.mp4"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write, "SEGMENT", 16)
        engine.generate(PROMPT, **LONG).save(path)
    return path


@pytest.fixture(scope="module")
def straight(straight_file: Path) -> bytes:
    """Its frames."""
    return content(straight_file)


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save after every step and every segment, of 16 frames."""
    monkeypatch.setattr(journal, "PATIENCE", 0)
    monkeypatch.setattr(write, "SEGMENT", 16)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "x.mp4"


def content(path: Path) -> bytes:
    clip = Clip.from_file(path)
    assert clip.num_frames == 33
    return clip.frames.tobytes()


def go(
    engine: Engine, out: Path, resume: bool = True, on_event: Any = None, **options: Any
) -> Clip:
    kept = Journal(out, resume=resume)
    clip = engine.generate(PROMPT, journal=kept, on_event=on_event, **(LONG | options))
    assert isinstance(clip, Clip)
    return clip


def counted(monkeypatch: pytest.MonkeyPatch, engine: Engine, name: str) -> list[Any]:
    """Calls of one of the engine's verbs, as (args, kwargs)."""
    calls: list[Any] = []
    method = getattr(engine, name)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        return method(*args, **kwargs)

    monkeypatch.setattr(engine, name, wrapper)
    return calls


@pytest.mark.parametrize("sampler", ["euler", "unipc", "ancestral"])
@pytest.mark.parametrize("step", [1, 2])
def test_stopped_between_steps(engine, out, sampler, step):
    expected = engine.generate(PROMPT, **LONG, sampler=sampler).latents
    with pytest.raises(Cancelled):
        go(engine, out, False, stop_at(step), sampler=sampler)
    assert job_facts(job_folder(out))["done"] == step
    seen: list[int] = []
    clip = go(engine, out, on_event=lambda p: seen.append(p.done), sampler=sampler)
    assert seen == [0, 0, *range(step, 4)]
    assert torch.equal(clip.latents, expected)


@pytest.mark.parametrize(("step", "told"), [
    (2, "sample, step 2 of 3"), (3, "sample, step 3 of 3"), (5, "sample, window 2, step 2 of 3"),
])
def test_a_long_clip_continues_in_its_window(tiny_model, out, step, told):
    engine = load(str(tiny_model), device="cpu", dtype="fp32")
    expected = engine.generate(PROMPT, **LONG).latents
    with pytest.raises(Cancelled):
        go(engine, out, False, stop_at(step))
    assert progress_text(job_facts(job_folder(out))) == told
    seen: list[int] = []
    clip = go(engine, out, on_event=noting(seen))
    assert seen[0] == step + 1
    assert torch.equal(clip.latents, expected)


@pytest.mark.parametrize("missing", [0, 1])
def test_a_window_that_is_missing_is_made_again(tiny_model, out, missing):
    """Those behind it are never taken for it, although they lie there whole."""
    engine = load(str(tiny_model), device="cpu", dtype="fp32")
    expected = engine.generate(PROMPT, **LONG).latents
    with pytest.raises(Cancelled):
        go(engine, out, False, stop_at(7))
    windows = sorted((job_folder(out) / "windows").iterdir())
    assert len(windows) == 2
    windows[missing].unlink()
    told = ("sample, from the start", "sample, window 2, step 0 of 3")[missing]
    assert progress_text(job_facts(job_folder(out))) == told
    seen: list[int] = []
    clip = go(engine, out, on_event=noting(seen))
    assert seen[0] == 3 * missing + 1
    assert torch.equal(clip.latents, expected)


def test_a_damaged_window_is_refused_by_file(tiny_model, out):
    engine = load(str(tiny_model), device="cpu", dtype="fp32")
    with pytest.raises(Cancelled):
        go(engine, out, False, stop_at(7))
    for name in ("00000", "00001"):
        path = job_folder(out) / f"windows/{name}.safetensors"
        content = path.read_bytes()
        path.write_bytes(content[:-1])
        with pytest.raises(InputError, match=rf"{name}\.safetensors is damaged"):
            go(engine, out)
        path.write_bytes(content)
    shutil.copy(job_folder(out) / "windows/00000.safetensors", path)
    with pytest.raises(InputError, match=r"00001\..* is damaged \(it is a copy of 00000\."):
        go(engine, out)


def test_conditions_are_the_same_after_a_stop(engine, out):
    picture = np.tile(np.linspace(0, 255, 32, dtype=np.uint8)[:, None, None], (1, 32, 3))
    options = {"image": picture, "reference": [picture], "strength": None}
    expected = engine.generate(PROMPT, **LONG, **options).latents
    with pytest.raises(Cancelled):
        go(engine, out, False, stop_at(1), **options)
    assert torch.equal(go(engine, out, **options).latents, expected)
    with pytest.raises(InputError, match=r"inputs.* was .* is"):
        go(engine, out, image=255 - picture, reference=[picture])


@pytest.mark.parametrize("frames", [0, 10, 14, 32])
def test_stopped_while_it_is_written(engine, out, straight, straight_file, monkeypatch, frames):
    """Kept segments are neither decoded nor encoded again, and the sampler doesn't run."""
    clip = go(engine, out, resume=False)

    with pytest.raises(KeyboardInterrupt):
        clip.save(out, on_frames=interrupt_behind(frames))
    paths = sorted((job_folder(out) / "segments").iterdir())
    kept = [read_segment(path).num_frames for path in paths]
    assert kept == [13, 16][: len(kept)]
    assert len(kept) >= (frames >= 32)
    sampled, decoded = (counted(monkeypatch, engine, name) for name in ("sample", "decode_video"))
    first: list[int] = []
    go(engine, out).save(out, on_frames=first.append)
    assert content(out) == straight
    assert read_recipe(out)["checks"] == read_recipe(straight_file)["checks"]
    assert sampled == []
    assert decoded[0][0][1] == sum(kept)
    assert first[0] == sum(kept) < first[1] <= sum(kept) + 4
    assert not job_folder(out).exists()


def test_stopped_at_the_mux(engine, out, straight, straight_file, monkeypatch):
    clip = go(engine, out, resume=False)
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "close", Journal.pause)
        clip.save(out)
    out.unlink()
    assert job_facts(job_folder(out))["done"] == 33
    decoded: list[int] = []
    go(engine, out).save(out, on_frames=decoded.append)
    assert decoded == [33], "where it begins"
    assert content(out) == straight
    assert read_recipe(out)["checks"] == read_recipe(straight_file)["checks"]


def test_killed_after_the_file_and_before_the_end_is_done(engine, out, monkeypatch):
    clip = go(engine, out, resume=False)
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "close", Journal.pause)
        clip.save(out)
    assert job_folder(out).is_dir()
    sampled = counted(monkeypatch, engine, "sample")
    before = out.read_bytes()
    assert go(engine, out).num_frames == 33
    assert (sampled, out.read_bytes()) == ([], before)
    assert not job_folder(out).exists()


@pytest.mark.parametrize("suffix", [".webm", ".mkv", ".gif"])
def test_other_formats_continue_too(engine, tmp_path, suffix):
    out, whole = tmp_path / f"x{suffix}", tmp_path / f"whole{suffix}"
    engine.generate(PROMPT, **LONG).save(whole)
    with pytest.raises(KeyboardInterrupt):
        go(engine, out, resume=False).save(out, on_frames=interrupt_behind(20))
    go(engine, out).save(out)
    assert content(out) == content(whole)


@pytest.mark.parametrize("start", [1, 2, 5, 20, 21, 28, 32])
def test_decoding_from_the_middle_is_bit_equal(engine, start):
    latents = torch.randn(1, engine.vae_config.latent_channels, 9, 4, 4)
    whole = torch.cat(list(engine.decode_video(latents)), dim=2)
    part = torch.cat(list(engine.decode_video(latents, start)), dim=2)
    assert torch.equal(part, whole[:, :, start:])


def test_decoding_from_the_middle_begins_no_earlier_than_it_must(engine, monkeypatch):
    latents = torch.randn(1, engine.vae_config.latent_channels, 40, 4, 4)
    with engine.loader.use("vae") as vae:
        sizes: list[int] = []
        stream = type(vae).stream_decode

        def counting(
            vae: CausalVAE, pieces: Iterator[torch.Tensor]
        ) -> Iterator[torch.Tensor]:
            kept = list(pieces)
            sizes.append(sum(piece.shape[2] for piece in kept))
            return stream(vae, iter(kept))

        monkeypatch.setattr(type(vae), "stream_decode", counting)
        for rate in (1, 2):
            t, last = vae.strides.t // rate, 39
            next(engine.decode_video(latents, 1 + (last - 1) * t, rate=rate))
        assert sizes == [vae.receptive_frames(), vae.at_rate(2).receptive_frames()]
        assert sizes[0] < sizes[1] < 40


DIFFERENT = {
    "seed": ({"seed": 8}, "plan.seed was 7, is 8"),
    "steps": ({"steps": 4}, "plan.num_steps was 3, is 4"),
    "prompt": ({"negative": "a cat"}, 'plan.negative was "", is "a cat"'),
    "guidance": ({"guidance": 2.0}, "plan.guidance.scale was 3.0, is 2.0"),
}


@pytest.mark.parametrize(("options", "message"), DIFFERENT.values(), ids=DIFFERENT.keys())
def test_another_request_is_refused_with_what_differs(engine, out, options, message):
    with pytest.raises(Cancelled):
        go(engine, out, False, stop_at(1))
    with pytest.raises(InputError, match="another clip") as refused:
        go(engine, out, **options)
    assert message in str(refused.value)
    assert str(job_folder(out)) in str(refused.value)


def test_another_version_or_model_is_refused(engine, out, monkeypatch):
    with pytest.raises(Cancelled):
        go(engine, out, False, stop_at(1))
    recipe = read_job(job_folder(out))["recipe"]
    for key, value in (("vidgen", "9.9"), ("model", {"sha256": "abc"})):
        job.write_job(job_folder(out), recipe | {key: value}, overwrite=False)
        with pytest.raises(InputError, match=f"{key}.* was"):
            go(engine, out)
    monkeypatch.setattr(job, "FORMAT_VERSION", 0)
    with pytest.raises(InputError, match="another version"):
        go(engine, out)


@pytest.mark.parametrize("name", ["job.json", "state.safetensors", "segments/00000.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "bit", "empty"])
def test_a_damaged_journal_is_refused_by_file(engine, out, name, damage):
    with pytest.raises(KeyboardInterrupt):
        go(engine, out, False).save(out, on_frames=interrupt_behind(32))
    path = job_folder(out) / name
    data = bytearray(path.read_bytes())
    data[len(data) * 3 // 4] ^= 4
    path.write_bytes({"cut": data[: len(data) // 2], "bit": data, "empty": b""}[damage])
    with pytest.raises(InputError, match=f"{path.name} is damaged"):
        go(engine, out)
    assert "problem" in job_facts(job_folder(out)) or damage == "bit"


def test_a_segment_in_another_ones_place_is_refused(engine, out):
    with pytest.raises(KeyboardInterrupt):
        go(engine, out, False).save(out, on_frames=interrupt_behind(32))
    shutil.copy(job_folder(out) / part_name(SEGMENTS, 0), job_folder(out) / part_name(SEGMENTS, 1))
    with pytest.raises(InputError, match=r"00001\..* is damaged \(it is a copy of 00000\."):
        go(engine, out)


def test_a_removed_segment_is_made_again(engine, out, straight):
    with pytest.raises(KeyboardInterrupt):
        go(engine, out, False).save(out, on_frames=interrupt_behind(32))
    first = job_folder(out) / part_name(SEGMENTS, 0)
    shutil.copy(first, job_folder(out) / part_name(SEGMENTS, 3))
    first.unlink()
    go(engine, out).save(out)
    assert content(out) == straight


def test_an_unfinished_clip_is_reported_and_can_start_again(engine, out):
    with pytest.raises(Cancelled):
        go(engine, out, False, stop_at(2))
    with pytest.raises(OutputError, match=r"step 2 of 3.*--resume .*--overwrite starts again"):
        Journal(out)
    kept = Journal(out, overwrite=True)
    seen: list[int] = []
    engine.generate(PROMPT, journal=kept, on_event=lambda p: seen.append(p.done), **LONG)
    assert seen == [0, 0, 0, 1, 2, 3]


def test_a_file_that_came_in_between_is_not_replaced(engine, out):
    with pytest.raises(Cancelled):
        go(engine, out, False, stop_at(2))
    engine.generate(PROMPT, **(LONG | {"seed": 99})).save(out)
    with pytest.raises(OutputError, match="isn't the clip of"):
        go(engine, out)


def test_an_old_file_that_was_to_be_replaced_still_is(engine, out, straight):
    engine.generate(PROMPT, **(LONG | {"seed": 99})).save(out)
    with pytest.raises(Cancelled):
        engine.generate(PROMPT, journal=Journal(out, overwrite=True), on_event=stop_at(2), **LONG)
    kept = Journal(out, resume=True)
    engine.generate(PROMPT, journal=kept, **LONG).save(out, overwrite=kept.overwrite)
    assert content(out) == straight


def test_a_clip_that_two_processes_make_is_refused(engine, out):
    with pytest.raises(Cancelled):
        go(engine, out, False, stop_at(2))
    with job.lock_job(job_folder(out)):
        assert job_facts(job_folder(out))["running"]
        for resume in (True, False):
            with pytest.raises(OutputError, match="being made by another process"):
                go(engine, out, resume)
    go(engine, out).save(out)


def test_a_drawn_seed_and_the_thread_count_come_back(engine, out):
    options = {"frames": 33, "steps": 3}
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with pytest.raises(Cancelled):
            engine.generate(PROMPT, journal=Journal(out), on_event=stop_at(1), **options)
        recipe = read_job(job_folder(out))["recipe"]
        torch.set_num_threads(1)
        clip = engine.generate(PROMPT, journal=Journal(out, resume=True), **options)
        assert torch.get_num_threads() == 2
        assert clip.recipe["plan"]["seed"] == recipe["plan"]["seed"]
    finally:
        torch.set_num_threads(before)


def test_another_offload_may_go_on(engine, tiny_model, out, straight):
    with pytest.raises(Cancelled):
        go(engine, out, False, stop_at(2))
    other = load(str(tiny_model), device="cpu", dtype="fp32", offload="stage")
    go(one_window(other), out).save(out)
    assert content(out) == straight


@pytest.mark.parametrize("after", [0, 1, 3, 5])
def test_a_full_disk_costs_the_journal_and_not_the_clip(
    engine, out, straight, monkeypatch, caplog, after
):
    writes = iter(range(100))

    def little_room(path: Path, content: bytes) -> None:
        if next(writes) >= after:
            raise OutputError(f"no space left for {path}") from OSError(errno.ENOSPC, "full")
        atomic_write(path, content)

    atomic_write = job.atomic_write
    monkeypatch.setattr(job, "atomic_write", little_room)
    go(engine, out, False).save(out)
    assert content(out) == straight
    assert [r.message for r in caplog.records if "no space left" in r.message][1:] == []
    assert "no space left" in caplog.text
    assert not job_folder(out).exists()


def test_saves_wait_until_they_are_cheap(engine, out, monkeypatch):
    """Each save costs a second here, so none comes before 50 have gone by."""
    clock = [0.0]
    saves: list[float] = []
    write_arrays = job.write_arrays

    def slow(*args: Any) -> None:
        clock[0] += 1
        saves.append(clock[0])
        write_arrays(*args)

    monkeypatch.setattr(journal, "PATIENCE", 50)
    monkeypatch.setattr(job, "write_arrays", slow)
    monkeypatch.setattr(journal.time, "monotonic", lambda: clock[0])

    def on_event(_: Progress) -> None:
        clock[0] += 10

    go(engine, out, False, on_event, steps=40)
    *regular, _ = saves
    assert (np.diff(regular) >= 50).all()
    assert 5 < len(regular) <= 1 + 0.02 * clock[0]


def test_a_failure_before_the_first_step_leaves_nothing(engine, out, monkeypatch):
    monkeypatch.setattr(engine, "prepare", lambda *_: (_ for _ in ()).throw(InputError("no")))
    with pytest.raises(InputError):
        go(engine, out, False)
    assert list(out.parent.iterdir()) == []


def test_several_clips_have_a_journal_each(engine, tmp_path):
    paths = [tmp_path / f"x-{n}.mkv" for n in (1, 2, 3)]
    options = {"seed": 5, "count": 3, "steps": 2}

    with pytest.raises(Cancelled):
        engine.generate(PROMPT, journal=[*map(Journal, paths)], on_event=stop_at(1, clip=2),
                        **options)
    seen: list[tuple[int, int]] = []
    clips = engine.generate(
        PROMPT, journal=[Journal(path, resume=True) for path in paths],
        on_event=lambda p: seen.append((p.clip, p.done)) if p.stage == "sample" else None,
        **options,
    )
    assert seen == [(2, 1), (2, 2), (3, 0), (3, 1), (3, 2)]
    for index, clip in enumerate(clips):
        assert torch.equal(clip.latents, engine.generate(PROMPT, seed=5 + index, steps=2).latents)
    with pytest.raises(InputError, match="1 journals for 2 clips"):
        engine.generate(PROMPT, journal=Journal(paths[0], overwrite=True), count=2)


def test_windows_of_a_long_clip_are_kept_separate(out):
    recipe = {"plan": {"num_steps": 3, "kept_frames": 33}}
    done = torch.randn(1, 4, 7, 2, 2)
    state = SamplerState(2, torch.randn(1, 4, 3, 2, 2), (torch.randn(1, 4, 3, 2, 2),))
    info = StepInfo(3, 0.5, 0.2, state.latents, state)
    for step, windows in enumerate((3, 5, 7)):
        kept = Journal(out, resume=True)
        with kept.running(recipe):
            assert (kept.done is None) == (step == 0)
            assert (kept.state is None) == (step < 2)
            kept.keep_window(done[:, :, :windows])
            if step:
                kept.on_step(info)
        kept.pause()
    kept = Journal(out, resume=True)
    with kept.running(recipe):
        assert torch.equal(kept.done, done)
        assert torch.equal(kept.state.latents, state.latents)
        assert torch.equal(kept.state.history[0], state.history[0])
        kept.keep_latents(done)
    kept.pause()
    kept = Journal(out, resume=True)
    with kept.running(recipe):
        assert torch.equal(kept.latents, done)
    kept.close()


def test_a_step_of_a_window_that_is_finished_counts_no_more(out):
    recipe = {"plan": {"num_steps": 3, "kept_frames": 33}}
    state = SamplerState(2, torch.randn(1, 4, 3, 2, 2))
    kept = Journal(out)
    with kept.running(recipe):
        kept.on_step(StepInfo(3, 0.5, 0.2, state.latents, state))
        kept.keep_window(torch.randn(1, 4, 5, 2, 2))
    kept.pause()
    kept = Journal(out, resume=True)
    with kept.running(recipe):
        assert kept.state is None
        assert kept.done.shape[2] == 5
    kept.pause()


def test_segments_come_back_as_they_were(tmp_path):
    from vidgen.media.types import Segment

    segment = Segment(3, ((b"abc", 0, -1, True), (b"", 2, 0, False), (b"\0", 1, 1, False)))
    job.write_arrays(tmp_path / "s", *job.segment_arrays(segment))
    assert read_segment(tmp_path / "s") == segment


def test_a_clip_of_changing_rate_is_json(tmp_path):
    folder = tmp_path / "x.mp4.vidgen-job"
    folder.mkdir()
    job.write_job(folder, {"plan": {"fps": str(Fraction(24000, 1001)), "x": 0.1}}, overwrite=True)
    assert read_job(folder)["recipe"]["plan"] == {"fps": "24000/1001", "x": 0.1}
    assert json.loads((folder / "job.json").read_text())["job"]["overwrite"] is True
