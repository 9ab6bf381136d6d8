"""Resuming from the command line, and `vidgen jobs`, on a tiny model."""

import json
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
from PIL import Image
from safetensors.numpy import save_file

from tests.stopping import interrupt_in_journal
from vidgen.cli.main import main
from vidgen.media import write
from vidgen.media.clip import Clip
from vidgen.ops import native
from vidgen.pipeline.journal import job, journal


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys, tiny_model):
    """Run a command line in an empty folder; gives (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(journal, "PATIENCE", 0)
    monkeypatch.setattr(write, "SEGMENT", 16)

    def run(*arguments):
        words = [str(a) for a in arguments]
        if words[0] == "generate":
            words += ["--model", str(tiny_model)]
        code = main(words)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def stopped(cli, monkeypatch):
    """Run a command line that is interrupted at the n-th call of a journal's method."""

    def run(method, calls, *arguments):
        with monkeypatch.context() as patch:
            interrupt_in_journal(patch, method, calls)
            return cli(*arguments)

    return run


def files():
    return sorted(path.name for path in Path().iterdir())


COMMAND = ["generate", "a cat", "--seed", 5, "--frames", 33, "--steps", 3]


@pytest.mark.parametrize(("method", "calls", "where"), [
    ("on_step", 2, "sample, step 2 of 3"), ("keep_latents", 1, "write, frame 0 of 33"),
    ("keep", 1, "write, frame 13 of 33"),
])
def test_an_interrupted_clip_continues_by_the_same_command(cli, stopped, method, calls, where):
    assert cli(*COMMAND, "-o", "straight.mkv")[0] == 0
    code, _, err = stopped(method, calls, *COMMAND, "-o", "x.mkv")
    assert code == 130
    assert "x.mkv is not finished; run the same command with --resume to continue" in err
    assert files() == ["straight.mkv", "x.mkv.vidgen-job"]
    code, _, err = cli(*COMMAND, "-o", "x.mkv")
    assert code == 2
    assert where in err
    assert "--resume continues it, --overwrite starts again" in err
    code, out, err = cli(*COMMAND, "-o", "x.mkv", "--resume", "--json")
    assert code == 0
    assert f"x.mkv resumes: {where}" in err
    assert files() == ["straight.mkv", "x.mkv"]
    assert (Clip.from_file("x.mkv").frames == Clip.from_file("straight.mkv").frames).all()
    before = Path("x.mkv").stat().st_mtime_ns
    code, again, err = cli(*COMMAND, "-o", "x.mkv", "--resume", "--json")
    assert (code, Path("x.mkv").stat().st_mtime_ns) == (0, before)
    assert "x.mkv is done already" in err
    assert json.loads(again)["clips"] == json.loads(out)["clips"]


def test_a_clip_continues_with_the_attention_that_it_began_with(cli, stopped):
    other = ("--attention", "reference")
    assert cli(*COMMAND, *other, "-o", "straight.mkv")[0] == 0
    assert stopped("on_step", 2, *COMMAND, *other, "-o", "x.mkv")[0] == 130
    assert cli(*COMMAND, "-o", "x.mkv", "--resume")[0] == 0
    resumed, straight = Clip.from_file("x.mkv"), Clip.from_file("straight.mkv")
    assert resumed.recipe["attention"] == straight.recipe["attention"] == "reference"
    assert (resumed.frames == straight.frames).all()
    stopped("on_step", 2, *COMMAND, *other, "-o", "y.mkv")
    code, _, err = cli(*COMMAND, "--attention", "sdpa", "-o", "y.mkv", "--resume")
    assert code == 2
    assert 'attention was "reference", is "sdpa"' in err


def test_a_clip_that_began_without_kernels_continues_without(cli, stopped, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(native, "why_not", lambda: "no compiler was found")
        stopped("on_step", 2, *COMMAND, "-o", "x.mkv")
    monkeypatch.setattr(native, "why_not", lambda: None)
    code, _, err = cli(*COMMAND, "-o", "x.mkv", "--resume")
    assert code == 2
    assert 'kernels was "none", is "compiled"' in err
    assert "VIDGEN_NATIVE=0" in err


def test_resume_without_anything_there_starts(cli):
    assert cli(*COMMAND, "-o", "x.mkv", "--resume")[0] == 0
    assert files() == ["x.mkv"]


def test_an_output_of_another_request_is_not_done(cli):
    cli(*COMMAND, "-o", "x.mkv")
    code, _, err = cli(*COMMAND, "-o", "x.mkv", "--resume", "--steps", 2)
    assert code == 2
    assert "x.mkv is another clip's: plan.num_steps was 3, is 2" in err


def test_under_overwrite_another_clip_is_replaced_and_the_same_one_stays(cli, stopped):
    cli(*COMMAND, "-o", "x.mkv")
    other = [*COMMAND, "-o", "x.mkv", "--steps", 2]
    code, _, err = cli(*other, "--resume")
    assert (code, "is done already" in err) == (2, False)
    code, _, err = cli(*other, "--resume", "--overwrite")
    assert (code, "is done already" in err) == (0, False)
    assert Clip.from_file("x.mkv").recipe["plan"]["num_steps"] == 2
    before = Path("x.mkv").stat().st_mtime_ns
    code, _, err = cli(*other, "--resume", "--overwrite")
    assert (code, "x.mkv is done already" in err) == (0, True)
    assert Path("x.mkv").stat().st_mtime_ns == before
    stopped("on_step", 2, *COMMAND, "-o", "x.mkv", "--overwrite")
    code, _, err = cli(*COMMAND, "-o", "x.mkv", "--overwrite", "--resume")
    assert (code, "x.mkv resumes: sample, step 2 of 3" in err) == (0, True)
    assert Clip.from_file("x.mkv").recipe["plan"]["num_steps"] == 3
    stopped("on_step", 1, *COMMAND, "-o", "x.mkv", "--overwrite")
    code, _, err = cli(*other, "--overwrite", "--resume")
    assert (code, "resumes" in err, files()) == (0, False, ["x.mkv"])
    assert Clip.from_file("x.mkv").recipe["plan"]["num_steps"] == 2
    stopped("on_step", 1, *COMMAND, "-o", "x.mkv", "--overwrite")
    Path("x.mkv.vidgen-job/job.json").write_text("{")
    assert cli(*COMMAND, "-o", "x.mkv", "--overwrite", "--resume")[0] == 0


def test_what_another_process_is_at_is_not_said_to_be_resumed(cli, stopped):
    stopped("on_step", 1, *COMMAND, "-o", "x.mkv")
    with job.lock_job(Path("x.mkv.vidgen-job")):
        code, _, err = cli(*COMMAND, "-o", "x.mkv", "--resume")
    assert code == 2
    assert "x.mkv is being made by another process" in err
    assert "with --resume to continue" not in err
    assert "x.mkv resumes" not in err


def test_a_drawn_seed_is_in_the_command_that_continues(cli, stopped):
    code, _, err = stopped("on_step", 1, "generate", "a cat")
    seed = err.split("seed ")[1].split()[0]
    assert (code, files()) == (130, [f"a-cat-{seed}.mp4.vidgen-job"])
    (command,) = re.findall("is not finished; to continue: vidgen (.*)", err)
    assert command.endswith(f"--seed {seed} --resume")
    assert cli("generate", "a cat", "--resume")[0] == 2
    assert cli(*shlex.split(command))[0] == 0
    assert files() == [f"a-cat-{seed}.mp4"]
    assert "is done already" in cli("generate", "a cat", "--resume", "-o", files()[0])[2]
    code, _, err = cli("generate", "a cat", "--resume")
    assert (code, "give -o or --seed" in err) == (2, True)


def test_a_drawn_seed_is_found_again_by_the_output(cli, stopped):
    stopped("on_step", 1, "generate", "a dog", "-o", "dog.mp4")
    drawn = job.read_job(Path("dog.mp4.vidgen-job"))["recipe"]["plan"]["seed"]
    assert cli("generate", "a dog", "-o", "dog.mp4", "--resume")[0] == 0
    assert Clip.from_file("dog.mp4").recipe["plan"]["seed"] == drawn


def test_of_several_clips_the_finished_ones_stay(cli, stopped):
    several = ["generate", "a cat", "--count", 3, "-o", "x.mkv"]
    stopped("close", 1, *several)
    assert files() == ["x-1.mkv", "x-2.mkv.vidgen-job", "x-3.mkv.vidgen-job"]
    before = Path("x-1.mkv").stat().st_mtime_ns
    code, out, err = cli(*several, "--resume", "--json")
    assert (code, Path("x-1.mkv").stat().st_mtime_ns) == (0, before)
    assert "x-1.mkv is done already" in err
    assert files() == ["x-1.mkv", "x-2.mkv", "x-3.mkv"]
    seeds = [clip["seed"] for clip in json.loads(out)["clips"]]
    assert seeds == [seeds[0], seeds[0] + 1, seeds[0] + 2]
    assert [Clip.from_file(name).recipe["plan"]["seed"] for name in files()] == seeds


def test_overwrite_starts_again(cli, stopped):
    stopped("on_step", 1, *COMMAND, "-o", "x.mkv")
    code, _, err = cli(*COMMAND, "-o", "x.mkv", "--steps", 2, "--overwrite")
    assert (code, files()) == (0, ["x.mkv"]), err
    assert Clip.from_file("x.mkv").recipe["plan"]["num_steps"] == 2


def test_what_a_killed_writer_left_is_swept(cli, stopped):
    stopped("on_step", 1, *COMMAND, "-o", "x.mkv")
    Path(".x.mkv.0123abcd.tmp").touch()
    Path(".y.mkv.0123abcd.tmp").touch()
    cli(*COMMAND, "-o", "x.mkv", "--resume")
    assert files() == [".y.mkv.0123abcd.tmp", "x.mkv"]


def test_jobs_lists_what_is_unfinished(cli, stopped):
    def listed(*paths):
        return re.sub(r'"age_s": \d+', "", cli("jobs", *paths, "--json")[1])

    assert cli("jobs")[:2] == (0, "no unfinished jobs\n")
    stopped("on_step", 2, *COMMAND, "-o", "x.mp4")
    stopped("keep_latents", 1, *COMMAND, "-o", "y.mp4")
    code, out, _ = cli("jobs", ".", "--json")
    x, y = json.loads(out)
    assert code == 0
    assert (x["output"], x["stage"], x["done"], x["total"]) == ("x.mp4", "sample", 2, 3)
    assert (y["output"], y["stage"], y["done"], y["total"]) == ("y.mp4", "write", 0, 33)
    assert (x["prompt"], x["seed"], x["running"]) == ("a cat", 5, False)
    assert x["bytes"] == sum(p.stat().st_size for p in Path("x.mp4.vidgen-job").rglob("*.*"))
    assert 0 <= x["age_s"] < 60
    assert "x.mp4  sample, step 2 of 3" in cli("jobs")[1]
    assert listed(".", "x.mp4", "./x.mp4.vidgen-job") == listed()
    state = Path("x.mp4.vidgen-job/state.safetensors")
    save_file({}, state, {"facts": "1.5"})
    code, out, _ = cli("jobs", "x.mp4")
    assert code == 0
    assert "state.safetensors is damaged (its facts are a float)" in out
    Path("x.mp4.vidgen-job/job.json").write_text("{")
    code, out, _ = cli("jobs", "x.mp4")
    assert code == 0
    assert "x.mp4  damaged" in out
    assert "job.json is damaged" in out


def test_jobs_of_a_films_shots_are_listed(cli, stopped, tiny_model):
    Path("film.yaml").write_text("shots: [{prompt: a cat, frames: 5}]")
    stopped("on_step", 1, "script", "film.yaml", "--model", tiny_model)
    (facts,) = json.loads(cli("jobs", "--json")[1])
    assert (facts["prompt"], Path(facts["output"]).parent) == ("a cat", Path("film.shots"))


def test_a_job_that_ends_while_it_is_looked_at_is_not_listed(cli, stopped, monkeypatch):
    stopped("on_step", 2, *COMMAND, "-o", "x.mp4")
    facts, walk = job.job_facts, os.walk

    def ends(folder):
        found = facts(folder)
        shutil.rmtree(folder)
        return found

    def outdated(folder):
        for place, inner, names in walk(folder):
            yield place, inner, [*names, ".gone.0123abcd.tmp"]

    monkeypatch.setattr(os, "walk", outdated)
    assert "x.mp4  sample, step 2 of 3" in cli("jobs")[1]
    monkeypatch.setattr(job, "job_facts", ends)
    assert cli("jobs")[:2] == (0, "no unfinished jobs\n")


def test_an_extension_is_counted_by_what_it_adds(cli, stopped):
    assert cli("generate", "a cat", "--seed", 5, "--frames", 9, "-o", "short.mp4")[0] == 0
    stopped("keep_latents", 1, "extend", "short.mp4", "--seconds", 1, "-o", "long.mp4")
    (facts,) = json.loads(cli("jobs", "--json")[1])
    assert (facts["stage"], facts["done"], facts["total"]) == ("write", 0, 12)


def test_jobs_prunes_what_is_named_when_sure(cli, stopped):
    for name in ("x.mp4", "y.mp4"):
        stopped("on_step", 1, *COMMAND, "-o", name)
    code, out, _ = cli("jobs", "x.mp4", "--prune")
    assert "--prune --yes removes" in out
    assert len(files()) == 2
    code, out, _ = cli("jobs", "x.mp4", "--prune", "--yes")
    assert (code, files()) == (0, ["y.mp4.vidgen-job"])
    assert out.startswith("removed x.mp4")
    with job.lock_job(Path("y.mp4.vidgen-job")):
        code, out, _ = cli("jobs", "--prune", "--yes")
    assert (code, files()) == (1, ["y.mp4.vidgen-job"])
    assert "not removed: it is running" in out
    assert cli("jobs", "--prune", "--yes")[0] == 0
    assert files() == []


@pytest.mark.parametrize("arguments", [["none"], ["none.mp4"], ["--yes"]])
def test_jobs_refuses_what_it_does_not_know(cli, arguments):
    code, out, err = cli("jobs", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")


RETRIED = ["generate", "a cat", "--seed", 5, "--frames", 9, "--steps", 3, "--image", "in.png",
           "--retry", 2, "-o", "x.mkv"]  # fmt: skip


@pytest.mark.parametrize(("method", "calls", "tried"), [
    ("on_step", 5, [7]), ("close", 1, [6, 7]), ("keep_latents", 3, []),
])
def test_a_clip_whose_seed_was_rolled_again_goes_on(cli, stopped, method, calls, tried):
    """No picture of this model is like the one given, so all further seeds are tried."""
    Image.radial_gradient("L").resize((32, 32)).convert("RGB").save("in.png")
    assert stopped(method, calls, *RETRIED)[0] == 130
    code, out, err = cli(*RETRIED, "--resume", "--json")
    assert code == 0
    assert [int(seed) for seed in re.findall(r"trying seed (\d)", err)] == tried
    (facts,) = json.loads(out)["clips"]
    assert (facts["seed"], facts["checks"]["verdict"]) == (7, "fault")
    clip = Clip.from_file("x.mkv")
    assert clip.recipe["checks"] == facts["checks"]
    assert cli(*RETRIED[:3], 7, *RETRIED[4:-4], "-o", "straight.mkv")[0] == 0
    assert (clip.frames == Clip.from_file("straight.mkv").frames).all()
    assert files() == ["in.png", "straight.mkv", "x.mkv"]
    assert "trying" not in cli(*RETRIED, "--resume")[2]


def test_a_further_seed_is_announced_and_counted_to_its_end(cli, monkeypatch):
    faulty = iter([False, True, False])  # the second clip
    monkeypatch.setattr("vidgen.cli.outputs.is_faulty", lambda _: next(faulty))
    command = [*RETRIED[:-6], "--retry", 1, "--count", 2, "-o", "x.mkv", "--events", "e.jsonl"]
    assert cli(*command)[0] == 0
    events = [json.loads(line) for line in Path("e.jsonl").read_text().splitlines()]
    texts = [event["text"] for event in events if event["event"] == "note"]
    assert any(text.endswith(" has a fault; trying seed 7") for text in texts)
    assert [e for e in events if e["event"] == "progress"][-1]["fraction"] == 1


def test_a_drawn_seed_that_was_rolled_again_is_found(cli, stopped):
    Image.radial_gradient("L").resize((32, 32)).convert("RGB").save("in.png")
    code, _, err = stopped("on_step", 5, *RETRIED[:2], *RETRIED[4:-2])
    (folder,) = Path().glob("a-cat-*.vidgen-job")
    seed = int(re.search(r"\d+", folder.name)[0])
    command = shlex.split(re.findall("to continue: vidgen (.*)", err)[0])
    code, out, _ = cli(*command, "--json")
    assert (code, json.loads(out)["clips"][0]["seed"]) == (0, seed + 2)


def test_a_finished_folder_of_pictures_is_done(cli):
    command = ["generate", "a cat", "--seed", 5, "--frames", 5, "-o", "x/"]
    first = json.loads(cli(*command, "--json")[1])
    code, out, err = cli(*command, "--resume", "--json")
    assert (code, "x/ is done already" in err) == (0, True)
    assert json.loads(out)["clips"] == first["clips"]
