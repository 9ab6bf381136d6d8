"""Journals of other families' clips: stopped at each stage and resumed equals straight through."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.sounds import save, tone
from tests.stopping import interrupt_behind, stop_at
from tests.tiny.diffusers_models import build_diffusers_model, open_diffusers_model
from vidgen.core.errors import Cancelled, InputError
from vidgen.media import write
from vidgen.media.clip import Clip
from vidgen.pipeline.diffusers_backend.engine import DiffusersEngine
from vidgen.pipeline.journal import job, journal
from vidgen.pipeline.journal.job import MADE, job_facts, job_folder, progress_text, read_job
from vidgen.pipeline.journal.journal import Journal
from vidgen.pipeline.types import Progress

PROMPT = "a red car bounces across the desert"
CASES: dict[str, dict[str, Any]] = {
    "ltx": {"size": "64x32", "frames": 81},  # tiles
    "ltx2": {"size": "64x64", "frames": 17},  # sound
    "hunyuan": {"size": "32x32", "frames": 33},  # tiles of its own
    "cogvideox": {"size": "32x32", "frames": 17},  # slices, length by its own rule
    "mochi": {"size": "32x32"},  # its own length
    "animatediff": {"size": "32x32", "frames": 19},  # picture by picture, 16 at a time
}
Open = Callable[[str], DiffusersEngine]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Open:
    root, opened = tmp_path_factory.mktemp("foreign"), {}

    def get(family: str) -> DiffusersEngine:
        if family not in opened:
            opened[family] = open_diffusers_model(build_diffusers_model(family, root / family))
        return opened[family]

    return get


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save every segment, of 16 frames."""
    monkeypatch.setattr(journal, "PATIENCE", 0)
    monkeypatch.setattr(write, "SEGMENT", 16)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "x.mkv"


def make(engine: DiffusersEngine, family: str, kept: Any = None, **options: Any) -> Clip:
    wanted = {"seed": 3, "steps": 2, **CASES.get(family, {}), **options}
    clip = engine.generate(PROMPT, journal=kept, **wanted)
    assert isinstance(clip, Clip)
    return clip


def calls_of(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[Any]:
    """First arguments of the calls of a method."""
    calls, method = [], getattr(owner, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[0])
        return method(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    return calls


def assert_same(path: Path, other: Path) -> None:
    clip, its_pair = Clip.from_file(path), Clip.from_file(other)
    assert clip.frames.tobytes() == its_pair.frames.tobytes()
    assert (clip.sound is None) == (its_pair.sound is None)
    if clip.sound is not None:
        assert clip.sound.tobytes() == its_pair.sound.tobytes()
    for name in ("checks", "plan", "sound"):
        assert clip.recipe.get(name) == its_pair.recipe.get(name)
    assert not job_folder(path).exists()


@pytest.mark.parametrize("family", CASES)
def test_stopped_at_each_stage(
    engine: Open, family: str, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, whole = engine(family), out.with_name("whole.mkv")
    make(ours, family).save(whole)
    with pytest.raises(Cancelled):  # while it denoises
        make(ours, family, Journal(out), on_event=stop_at(1))
    facts = job_facts(job_folder(out))
    assert (facts["stage"], facts["done"], facts["total"]) == ("sample", 0, 2)
    assert progress_text(facts) == "sample, from the start"
    told: list[Progress] = []
    clip = make(ours, family, Journal(out, resume=True), on_event=told.append)  # ... is done
    assert [p.done for p in told if p.stage == "sample"] == [1, 2]
    clip.journal.pause()  # type: ignore[union-attr]
    assert progress_text(job_facts(job_folder(out))) == f"write, frame 0 of {clip.num_frames}"
    calls = calls_of(monkeypatch, ours.pipe, "make")
    for frames in (0, clip.num_frames * 2 // 3):  # while it decodes and writes
        with pytest.raises(KeyboardInterrupt):
            make(ours, family, Journal(out, resume=True)).save(
                out, on_frames=interrupt_behind(frames))
    kept = job_facts(job_folder(out))["done"]
    assert 0 < kept <= clip.num_frames
    first: list[int] = []
    with monkeypatch.context() as patch:  # killed behind the file and before the end
        patch.setattr(Journal, "close", Journal.pause)
        make(ours, family, Journal(out, resume=True)).save(out, on_frames=first.append)
    assert first[0] == kept
    assert all(count > kept for count in first[1:])
    assert job_facts(job_folder(out))["done"] == clip.num_frames
    done = out.read_bytes()
    assert make(ours, family, Journal(out, resume=True)).num_frames == clip.num_frames
    assert out.read_bytes() == done
    assert_same(out, whole)
    assert make(ours, family, Journal(out, resume=True)).num_frames == clip.num_frames
    assert calls == []


def test_at_the_mux_nothing_is_decoded(
    engine: Open, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, whole = engine("ltx"), out.with_name("whole.mkv")
    make(ours, "ltx").save(whole)
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "close", Journal.pause)
        make(ours, "ltx", Journal(out)).save(out)
    out.unlink()
    decoded = calls_of(monkeypatch, ours.pipe.own.vae.decoder, "forward")
    make(ours, "ltx", Journal(out, resume=True)).save(out)
    assert decoded == []
    assert_same(out, whole)


def test_a_label_stays_on_the_opening(engine: Open, out: Path) -> None:
    ours, whole = engine("hunyuan"), out.with_name("whole.mkv")
    make(ours, "hunyuan").save(whole, label="visible")
    marks = {"label": "visible"}
    with pytest.raises(KeyboardInterrupt):
        make(ours, "hunyuan", Journal(out, marks=marks)).save(out, on_frames=interrupt_behind(14))
    make(ours, "hunyuan", Journal(out, resume=True, marks=marks)).save(out)
    assert_same(out, whole)


def test_a_picture_continues_too(engine: Open, tmp_path: Path) -> None:
    out, options = tmp_path / "x.png", {"size": "32x32", "frames": 1}
    expected = make(engine("sdxl"), "sdxl", **options).frames
    clip = make(engine("sdxl"), "sdxl", Journal(out), **options)
    clip.journal.pause()  # type: ignore[union-attr]
    told: list[Progress] = []
    kept = Journal(out, resume=True)
    make(engine("sdxl"), "sdxl", kept, on_event=told.append, **options).save(out)
    assert told == []
    assert np.array_equal(Clip.from_file(out).frames, expected)
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


def test_a_given_sound_and_a_length_of_its_own(engine: Open, out: Path) -> None:
    """The sound is cut to a length that shows only when the pipeline has run."""
    bed, whole = save(out.with_name("bed.wav"), tone(0.2)), out.with_name("whole.mkv")
    options = {"audio": bed, "audio_loop": True}
    make(engine("mochi"), "mochi", **options).save(whole)
    kept = Journal(out)
    make(engine("mochi"), "mochi", kept, **options)
    begun = read_job(job_folder(out))["recipe"]
    assert begun["plan"]["kept_frames"] == Clip.from_file(whole).num_frames
    assert begun["sound"] == {"source": "file", "loop": True}
    kept.pause()
    with pytest.raises(InputError, match=r"plan\.kept_frames was"):
        make(engine("mochi"), "mochi", Journal(out, resume=True), frames=7, **options)
    make(engine("mochi"), "mochi", Journal(out, resume=True), **options).save(out)
    assert_same(out, whole)


def test_several_clips_and_a_drawn_seed(engine: Open, tmp_path: Path) -> None:
    paths = [tmp_path / f"x-{n}.mkv" for n in (1, 2)]
    options = {"count": 2, "steps": 2, "size": "32x32", "frames": 17}

    ours = engine("cogvideox")
    with pytest.raises(Cancelled):
        ours.generate(PROMPT, journal=[*map(Journal, paths)], on_event=stop_at(1, clip=2),
                      **options)
    seed = read_job(job_folder(paths[0]))["recipe"]["plan"]["seed"]
    told: list[tuple[int, int]] = []
    clips = ours.generate(
        PROMPT, journal=[Journal(path, resume=True) for path in paths],
        on_event=lambda p: told.append((p.clip, p.done)) if p.stage == "sample" else None,
        **options,
    )
    assert told == [(2, 1), (2, 2)]
    assert [clip.recipe["plan"]["seed"] for clip in clips] == [seed, seed + 1]
    with pytest.raises(InputError, match="1 journals for 2 clips"):
        ours.generate(PROMPT, journal=Journal(paths[0], overwrite=True), count=2)


def test_a_failure_before_the_first_step_leaves_nothing(engine: Open, out: Path) -> None:
    with pytest.raises(InputError, match="own layout"):
        make(engine("hunyuan"), "hunyuan", Journal(out), latents=torch.randn(1, 2, 9, 4, 4))
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize(("options", "message"), [
    ({"seed": 4}, "plan.seed was 3, is 4"), ({"steps": 3}, "plan.num_steps was 2, is 3"),
    ({"frames": 9}, "plan.kept_frames was 17, is 9"), ({"guidance": 2.0}, "plan.guidance_scale"),
])
def test_another_request_is_refused(
    engine: Open, out: Path, options: dict[str, Any], message: str
) -> None:
    make(engine("cogvideox"), "cogvideox", kept := Journal(out))
    kept.pause()
    with pytest.raises(InputError, match="another clip's") as refused:
        make(engine("cogvideox"), "cogvideox", Journal(out, resume=True), **options)
    assert message in str(refused.value)


def test_another_model_or_version_is_refused(engine: Open, out: Path) -> None:
    make(engine("cogvideox"), "cogvideox", kept := Journal(out))
    kept.pause()
    recipe = read_job(job_folder(out))["recipe"]
    changes = {"vidgen": "9.9", "diffusers": "0.1", "transformers": "0.1",
               "model": {"sha256": "abc", "class": "CogVideoXPipeline"}}
    for key, value in changes.items():
        job.write_job(job_folder(out), recipe | {key: value}, overwrite=False)
        with pytest.raises(InputError, match=f"{key}.* was"):
            make(engine("cogvideox"), "cogvideox", Journal(out, resume=True))


@pytest.mark.parametrize("damage", ["cut", "bit", "empty"])
def test_a_damaged_journal_is_refused(engine: Open, out: Path, damage: str) -> None:
    make(engine("cogvideox"), "cogvideox", kept := Journal(out))
    kept.pause()
    path = job_folder(out) / MADE
    data = bytearray(path.read_bytes())
    data[len(data) * 3 // 4] ^= 4
    path.write_bytes({"cut": data[: len(data) // 2], "bit": data, "empty": b""}[damage])
    with pytest.raises(InputError, match=f"{MADE} is damaged"):
        make(engine("cogvideox"), "cogvideox", Journal(out, resume=True))
    assert "problem" in job_facts(job_folder(out)) or damage == "bit"
