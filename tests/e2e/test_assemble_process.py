"""`vidgen script` puts films together: files beside, changes, kills, memory that stays flat."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.commands import vidgen
from tests.films import film, render
from tests.sounds import save, tone
from vidgen.cli.main import main
from vidgen.media.clip import Clip
from vidgen.media.probe import read_recipe
from vidgen.story.assemble import assemble
from vidgen.story.edit import make_edit

ROOT = Path(__file__).parents[2]
FILM = """\
version: 1
project:
  title: A film
  dtype: fp32
  defaults: {duration: 1, steps: 1, transition: {type: dissolve, duration: 0.25}}
scenes: {day: {title: Day}}
shots:
  - {id: one, scene: day, prompt: a red car, caption: hello, music: m.wav}
  - {id: two, scene: day, prompt: a cat}
  - {id: three, prompt: a dog, transition: cut}
"""


@pytest.fixture(scope="module")
def made(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("assembled")
    save(folder / "m.wav", tone(1.0), codec="pcm_s16le")
    (folder / "film.yaml").write_text(FILM)
    return folder, make(folder, tiny_model, "--storyboard", "--otio")


def make(folder: Path, model: Path, *words: str) -> dict[str, Any]:
    return vidgen("script", folder / "film.yaml", "-o", folder / "film.mp4", "--model", model,
                  *words)


@pytest.fixture
def copy(made, tmp_path) -> Path:
    return Path(shutil.copytree(made[0], tmp_path / "copy"))


def test_the_command_makes_the_film_and_its_other_files(made):
    folder, told = made
    assert {path.name for path in folder.iterdir()} == {
        "film.yaml", "m.wav", "film.shots", "film.mp4", "film.srt", "film.vtt", "film.otio",
        "film.html"}
    assert [Path(each).name for each in told["files"]] == [
        "film.srt", "film.vtt", "film.otio", "film.html"]
    clip = Clip.from_file(folder / "film.mp4")
    assert (clip.num_frames, clip.fps) == (33, 12)
    assert len(clip.sound) == round(33 / 12 * 48_000)
    assert [shot["made"] for shot in told["shots"]] == [True] * 3
    assert set(json.loads((folder / "film.shots/sums.json").read_text())) == {
        Path(shot["path"]).name for shot in told["shots"]}


def test_the_plan_tells_the_length_with_its_transitions(copy, tiny_model):
    assert make(copy, tiny_model, "--check")["film"]["duration_s"] == pytest.approx(33 / 12)


def test_a_film_that_is_there_gets_its_files_again_without_a_new_one(copy, tiny_model, capsys):
    before = (copy / "film.mp4").stat().st_mtime_ns
    for name in ("film.srt", "film.html"):
        (copy / name).unlink()
    make(copy, tiny_model, "--storyboard")
    assert "film.mp4 is done already" in capsys.readouterr().err
    assert (copy / "film.srt").is_file()
    assert (copy / "film.html").is_file()
    assert (copy / "film.mp4").stat().st_mtime_ns == before


@pytest.mark.parametrize("edit", [
    ("caption: hello", "caption: bye"), ("duration: 0.25", "duration: 0.5"),
    ("  title: A film", "  title: A film\n  finish: {ending: fade-black}"), None,
])
def test_a_changed_script_or_sound_makes_another_film_of_the_same_shots(
    copy, tiny_model, capsys, edit
):
    if edit is None:
        save(copy / "m.wav", tone(1.0, 300), codec="pcm_s16le")
    else:
        (copy / "film.yaml").write_text(FILM.replace(*edit))
    words = ["script", str(copy / "film.yaml"), "-o", str(copy / "film.mp4"), "--model",
             str(tiny_model)]
    assert main(words) == 2
    assert "film.mp4 exists; give --overwrite" in capsys.readouterr().err
    told = make(copy, tiny_model, "--overwrite")
    assert not any(shot["made"] for shot in told["shots"])


def test_a_transition_that_is_too_long_costs_no_rendering(tmp_path, tiny_model, capsys):
    save(tmp_path / "m.wav", tone(1.0), codec="pcm_s16le")
    (tmp_path / "film.yaml").write_text(FILM.replace("duration: 0.25", "duration: 3"))
    words = ["script", str(tmp_path / "film.yaml"), "-o", str(tmp_path / "film.mp4"), "--model",
             str(tiny_model)]
    for more in ([], ["--check"]):
        assert main([*words, *more]) == 2
        assert "line 9: shot 'two': dissolve of 3 s is longer than" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"film.yaml", "m.wav"}


def test_a_file_in_the_way_is_not_replaced_unasked(tmp_path, tiny_model, capsys):
    save(tmp_path / "m.wav", tone(1.0), codec="pcm_s16le")
    (tmp_path / "film.yaml").write_text(FILM)
    (tmp_path / "film.srt").write_text("mine")
    assert main(["script", str(tmp_path / "film.yaml"), "-o", str(tmp_path / "film.mp4"),
                 "--model", str(tiny_model)]) == 2
    assert "film.srt exists" in capsys.readouterr().err
    assert not (tmp_path / "film.shots").exists()


def test_a_changed_shot_is_reported_and_rendered_again_once_it_is_removed(copy, tiny_model, capsys):
    told = make(copy, tiny_model)
    one, three = (Path(told["shots"][n]["path"]) for n in (0, 2))
    kept = one.read_bytes()
    shutil.copy(three, one)
    words = ["script", str(copy / "film.yaml"), "-o", str(copy / "film.mp4"), "--model",
             str(tiny_model), "--overwrite"]
    (copy / "film.mp4").unlink()
    assert main(words) == 2
    assert "was changed since it was rendered; remove it" in capsys.readouterr().err
    assert not (copy / "film.mp4").exists()
    one.unlink()
    assert main(words) == 0
    assert (Clip.from_file(one).frames == _frames(kept, copy)).all()


def _frames(content: bytes, folder: Path) -> np.ndarray:
    path = folder / "kept.mp4"
    path.write_bytes(content)
    return Clip.from_file(path).frames


def test_killed_at_work_an_assembly_leaves_no_film_and_the_next_one_is_whole(
    copy, tiny_model, monkeypatch
):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (copy / "film.mp4").unlink()
    make(copy, tiny_model, "--overwrite")
    whole = (copy / "film.mp4").read_bytes()
    (copy / "film.mp4").unlink()
    words = [sys.executable, "-m", "vidgen", "script", copy / "film.yaml", "-o", copy / "film.mp4",
             "--model", tiny_model, "--overwrite"]
    run = subprocess.Popen([*map(str, words), "--events", "-"], stdout=subprocess.PIPE, text=True,
                           stderr=subprocess.DEVNULL)
    for line in run.stdout:
        if json.loads(line).get("stage") == "assemble":
            break
    run.kill()
    run.communicate()
    assert run.returncode == -9
    assert not (copy / "film.mp4").exists()
    assert list(copy.glob(".film.mp4.*.tmp"))
    make(copy, tiny_model, "--overwrite")
    assert (copy / "film.mp4").read_bytes() == whole
    assert not list(copy.glob(".*.tmp"))


MEMORY = """
import sys, threading, time
from pathlib import Path
from tests.commands import vidgen
from tests.films import film, render
from vidgen.story.assemble import assemble
from vidgen.story.edit import make_edit
folder, model, count = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
keys = "music: m.wav, caption: text, transition: dissolve, scene: a"
text = "scenes: {a: A}\\nshots:\\n" + "".join(
    f"  - {{id: s{n}, prompt: x{', ' + keys if n % 2 == 0 else ', scene: a'}}}\\n"
    for n in range(count))
plan = film(folder, model, text)
shots = render(plan, folder / "film.shots", [30] * count)
peak, stop = 0, threading.Event()

def watch():
    global peak
    while not stop.is_set():
        lines = Path("/proc/self/status").read_text().splitlines()
        peak = max(peak, next(int(l.split()[1]) for l in lines if l.startswith("RssAnon")))
        time.sleep(0.02)

thread = threading.Thread(target=watch)
thread.start()
assemble(make_edit(plan, shots, folder / "film.mp4"), shots)
stop.set()
thread.join()
print(peak)
"""


def test_a_film_ten_times_as_long_takes_no_more_memory(tmp_path, tiny_model):
    peaks = []
    for count in (4, 41):
        folder = tmp_path / str(count)
        folder.mkdir()
        save(folder / "m.wav", tone(3.0, channels=2), codec="pcm_s16le")
        run = subprocess.run(
            [sys.executable, "-c", MEMORY, str(folder), str(tiny_model), str(count)],
            capture_output=True, text=True, check=True, cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )
        peaks.append(int(run.stdout) / 1024)
        told = read_recipe(folder / "film.mp4")["film"]["timeline"]
        assert told["duration_s"] == pytest.approx(10 if count == 4 else 102, abs=10)
    print(f"peaks of {peaks[0]:.0f} and {peaks[1]:.0f} MiB")
    assert peaks[1] < peaks[0] + 24, peaks


def test_hundreds_of_shots_are_put_together(tmp_path, tiny_model):
    """Nothing is quadratic, and no more files are open than the system allows."""
    text = "shots:\n" + "".join(
        f"  - {{id: s{n}, prompt: x, caption: c{n}, transition: "
        f"{{type: {'dissolve' if n % 50 == 0 else 'cut'}, duration: 0.1}}}}\n" for n in range(300))
    plan = film(tmp_path, tiny_model, text)
    (one,) = render(film(tmp_path, tiny_model, "shots: [{id: s0, prompt: x}]"),
                    tmp_path / "film.shots", [8])
    shots = []
    for each in plan.script.shots:
        path = one.path.with_name(f"{each.id}.mp4")
        if path != one.path:
            os.link(one.path, path)
        shots.append(type(one)(each, path, 8, one.fps, one.size, 1))
    plan = film(tmp_path, tiny_model, text)
    start = time.process_time()
    told = assemble(make_edit(plan, shots, tmp_path / "film.mp4"), shots)
    assert time.process_time() - start < 60
    assert told.recipe["film"]["timeline"]["num_frames"] == 2400 - 6
