"""The command line on a tiny model, in this process; what needs processes of its own is in e2e."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from vidgen.cli.main import main
from vidgen.core.runtime import ATTENTION_VARIABLE
from vidgen.media.clip import Clip
from vidgen.media.probe import read_recipe
from vidgen.ops import attention


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys, tiny_model):
    """Run a command line in an empty folder; gives (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        words = [str(a) for a in arguments]
        if words[0] == "generate" and "--model" not in words:
            words += ["--model", str(tiny_model)]
        code = main(words)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def files():
    return sorted(str(path) for path in Path().rglob("*"))


def test_a_sentence_becomes_a_file_named_after_it(cli):
    code, out, err = cli("generate", "A red car, at NIGHT!", "--seed", 7)
    assert (code, err) == (0, "")
    assert "a-red-car-at-night-7.mp4: 9 frames of 32x32 at 12 fps, seed 7" in out
    assert Clip.from_file("a-red-car-at-night-7.mp4").recipe["plan"]["seed"] == 7


def test_a_drawn_seed_is_printed_and_recorded(cli):
    _, out, err = cli("generate", "a cat", "--json")
    (clip,) = json.loads(out)["clips"]
    assert f"note: seed {clip['seed']}\n" in err
    assert Clip.from_file(clip["path"]).recipe["plan"]["seed"] == clip["seed"]


def test_the_same_seed_gives_the_same_file_at_the_same_time(cli, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1790000000")
    cli("generate", "a cat", "--seed", 5, "-o", "a.mkv")
    cli("generate", "a cat", "--seed", 5, "-o", "b.mkv")
    assert Path("a.mkv").read_bytes() == Path("b.mkv").read_bytes()


def test_a_link_stays_a_link_and_is_not_replaced_silently(cli):
    Path("real").mkdir()
    Path("x.mp4").symlink_to("real/y.mp4")
    command = ("generate", "a cat", "--frames", "5", "--steps", "1", "-o", "x.mp4")
    code, _, err = cli(*command)
    assert (code, "x.mp4 exists; give --overwrite" in err) == (2, True)
    assert cli(*command, "--overwrite")[0] == 0
    assert Path("x.mp4").is_symlink()
    assert Clip.from_file("real/y.mp4").num_frames == 5
    Path("round.mp4").symlink_to("round.mp4")
    code, _, err = cli(*command[:-1], "round.mp4", "--overwrite")
    assert (code, "a link to itself" in err) == (2, True)


def test_what_is_given_is_not_written_over(cli):
    assert cli("generate", "a cat", "--frames", "5", "--steps", "1", "-o", "v.mp4")[0] == 0
    before = Path("v.mp4").read_bytes()
    code, _, err = cli("generate", "a cat", "--steps", "1", "--video", "./v.mp4", "--strength",
                       "0.5", "-o", "v.mp4", "--overwrite")  # fmt: skip
    assert (code, "v.mp4 is the video that was given" in err) == (2, True)
    code, _, err = cli("check", "v.mp4", "--json")
    assert code == 0
    code, _, err = cli("replay", "v.mp4", "--events", "v.mp4", "-o", "w.mp4")
    assert (code, "v.mp4 exists and holds no events" in err) == (2, True)
    assert Path("v.mp4").read_bytes() == before


def test_a_still_has_no_rate_to_be_wrong(cli):
    code, out, _ = cli("generate", "a cat", "--frames", "1", "--steps", "1", "-o", "x.jpg")
    assert (code, out.split(",")[0]) == (0, "x.jpg: a still of 32x32")
    assert "fps" not in cli("check", "x.jpg")[1]


def test_closed_streams_and_names_that_cannot_be_spelt(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, "-m", "vidgen", "generate", "a cat", "--model", str(tiny_model),
               "--frames", "5", "--steps", "1", "-o"]  # fmt: skip
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "☃.mp4"], env=ascii_only, capture_output=True, check=True)
    assert b"\\u2603.mp4" in done.stdout
    closed = " ".join(map(shlex.quote, [*command, "x.mp4", "--json"])) + " 2>&-"
    done = subprocess.run(closed, shell=True, capture_output=True, check=True)
    assert json.loads(done.stdout)
    assert Clip.from_file("x.mp4").num_frames == 5


def test_several_clips_are_numbered_and_each_is_what_it_would_be_alone(cli):
    code, out, _ = cli("generate", "a cat", "--seed", 5, "--count", 2, "-o", "x.mkv", "--json")
    assert code == 0
    assert [(c["path"], c["seed"]) for c in json.loads(out)["clips"]] == [
        ("x-1.mkv", 5), ("x-2.mkv", 6),
    ]
    cli("generate", "a cat", "--seed", 6, "-o", "alone.mkv")
    assert (Clip.from_file("x-2.mkv").frames == Clip.from_file("alone.mkv").frames).all()


def test_events_tell_how_far_it_is(cli):
    code, out, _ = cli("generate", "a cat", "--seed", 5, "--events", "e.jsonl", "-o", "x.mp4")
    assert (code, out[:6]) == (0, "x.mp4:")
    events = [json.loads(line) for line in Path("e.jsonl").read_text().splitlines()]
    steps = [(e["done"], e["total"]) for e in events if e.get("stage") == "sample"]
    assert steps == [(0, 2), (1, 2), (2, 2)]
    told = [e for e in events if e["event"] == "progress"]
    shares = [e["fraction"] for e in told]
    assert shares == sorted(shares)
    assert (told[-1]["stage"], shares[-1], told[-1]["eta_s"]) == ("write x.mp4", 1, 0)
    written = [e for e in events if e["event"] == "written"]
    assert written == [{"time": written[0]["time"], "event": "written", "path": "x.mp4"}]
    assert [e["time"] for e in events] == sorted(e["time"] for e in events)


def test_events_may_go_to_stdout_but_not_with_json(cli):
    code, out, _ = cli("generate", "a cat", "--seed", 5, "--events", "-", "-o", "x.mp4")
    assert code == 0
    assert json.loads(out.splitlines()[0])["event"] == "progress"
    code, _, err = cli("generate", "a cat", "--events", "-", "--json")
    assert (code, err[:6]) == (2, "error:")


def test_inspect_shows_the_recipe(cli):
    cli("generate", "a cat", "--seed", 5, "-o", "x.mp4")
    code, out, _ = cli("inspect", "x.mp4", "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["recipe"]["plan"]["prompt"] == "a cat"
    assert facts["streams"][0]["num_frames"] == 9
    code, out, _ = cli("inspect", "x.mp4")
    assert "prompt: a cat" in out


def test_inspect_takes_pictures_folders_and_files_without_recipe(cli):
    cli("generate", "a cat", "--seed", 5, "--frames", 1, "-o", "x.png")
    cli("generate", "a cat", "--seed", 5, "-o", "shots/")
    for name in ("x.png", "shots/"):
        assert json.loads(cli("inspect", name, "--json")[1])["recipe"]["plan"]["seed"] == 5
    Image.new("RGB", (32, 32)).save("plain.png")
    assert "no recipe" in cli("inspect", "plain.png")[1]


def test_a_folder_of_pictures_is_inspected_and_checked_any_other_is_refused(cli):
    cli("generate", "a cat", "--seed", 5, "-o", "shots/")
    assert json.loads(cli("inspect", "shots", "--json")[1])["num_pictures"] == 9
    assert "shots: " in cli("check", "shots")[1]
    max(Path("shots").glob("*.png")).unlink()
    code, out, _ = cli("check", "shots")
    assert code == 1
    assert "the clip has 8 frames instead of 9" in out
    Path("empty").mkdir()
    for verb in ("inspect", "check"):
        code, _, err = cli(verb, "empty")
        assert code == 2
        assert "holds no PNGs" in err


def test_models_lists_what_is_shipped(cli):
    code, out, _ = cli("models", "--json")
    assert code == 0
    for model in json.loads(out):
        assert {"name", "path", "family", "license", "bytes", "defaults"} <= model.keys()


def test_models_tells_of_a_second_expert(cli, tiny_model, tiny_experts):
    code, out, _ = cli("models", str(tiny_model), str(tiny_experts))
    assert code == 0
    one, two = [line for line in out.splitlines() if not line.startswith(" ")][-2:]
    assert ("two experts" in one, "two experts" in two) == (False, True)
    _, out, _ = cli("models", str(tiny_experts), "--json")
    assert {"transformer", "transformer_2"} <= set(json.loads(out)[-1]["components"])


BAD = {
    "no verb like it": (["generat", "a cat"], "unknown verb 'generat'; did you mean 'generate'"),
    "no prompt": (["generate"], "required: PROMPT"),
    "empty prompt": (["generate", ""], "the prompt is empty"),
    "long prompt": (["generate", "a" * 20_001], "20001 characters; shorten it to 20000"),
    "two prompts": (["generate", "a", "cat"], "put text with spaces in quotes"),
    "misspelt option": (["generate", "a", "--sede", "3"], "--sede; did you mean '--seed'"),
    "another program's option": (["generate", "a", "--num-frames", "9"], "did you mean '--frames'"),
    "address": (["generate", "a", "--image", "https://a.example/b.png"], "is a URL; download"),
    "no number": (["generate", "a", "--seed", "x"], "invalid int value: 'x'"),
    "nan": (["generate", "a", "--guidance", "nan"], "guidance is nan"),
    "no steps": (["generate", "a", "--steps", "0"], "steps is 0"),
    "count": (["generate", "a", "--count", "-1"], "count is -1"),
    "frames": (["generate", "a", "--frames", "8"], "8"),
    "size": (["generate", "a", "--size", "33x32"], "33"),
    "sampler": (["generate", "a", "--sampler", "eular"], "euler"),
    "frame": (["generate", "a", "--frame", "x.png"], "no SECONDS=IMAGE, such as 1.5=car.png"),
    "model": (["generate", "a", "--model", "toyboks"], "toyboks"),
    "image": (["generate", "a", "--image", "none.png"], "none.png does not exist"),
    "video": (["generate", "a", "--video", "none.mp4"], "none.mp4 does not exist"),
    "suffix": (["generate", "a", "-o", "x.mp5"], "unknown suffix '.mp5'; did you mean '.mp4'"),
    "still": (["generate", "a", "-o", "x.png"], "add --frames 1"),
    "quick gif": (["generate", "a", "-o", "x.gif", "--fps", "60"], "limited to 50 fps"),
    "folder": (["generate", "a", "-o", "none/x.mp4"], "the folder none does not exist"),
    "file as folder": (["generate", "a", "-o", "/dev/null/x.mp4"], "/dev/null is not a folder"),
    "dash": (["generate", "a", "--negative", "-rain"], "begins with - as --negative=TEXT"),
    "full events": (["generate", "a", "--events", "/dev/full"], "/dev/full can't be written"),
    "unwritable": (["generate", "a", "-o", "/proc/x.mp4"], "can't be written"),
    "events": (["generate", "a", "--events", "none/e"], "none/e can't be written"),
    "inspect": (["inspect", "none.mp4"], "none.mp4 does not exist"),
    "long name": (["generate", "a", "-o", "x" * 240 + ".mp4"], "has 244 bytes; shorten it to 240"),
    "path too long": (["inspect", "x" * 300], "File name too long; give another path"),
    "no path": (["generate", "a", "--image", "x" * 300], "File name too long; give another path"),
    "no unicode": (["generate", "a \udcff"], "prompt contains '\\udcff', half of a character"),
    "two in one": (["generate", "a", "-o", "x.mp4", "--events", "x.mp4"], "are both x.mp4"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused_with_one_line_and_no_file(cli, arguments, message):
    code, out, err = cli(*arguments)
    assert code == 2
    assert out == ""
    line = err.splitlines()[-1]
    assert line.startswith("error: ")
    assert message in line
    assert "Traceback" not in err
    assert files() == []


@pytest.mark.parametrize("verb", ["generate", "plan"])
def test_a_known_frame_after_the_end_is_refused_by_its_time(cli, tiny_model, verb):
    Image.new("RGB", (32, 32)).save("x.png")
    code, _, err = cli(verb, "a", "--model", tiny_model, "--frame", "9=x.png")
    assert code == 2
    assert "frame is at 9 s, after the clip's last one at 0.667 s" in err
    for words in (["--frame", "0=x.png", "--image", "x.png"],
                  ["--frame", "0.5=x.png", "--frame", "0.52=x.png"]):
        code, _, err = cli(verb, "a", "--model", tiny_model, *words)
        assert code == 2
        assert "two pictures are given for frame" in err


@pytest.mark.parametrize("words", [
    ["--lora", "none.safetensors"], ["--first-frame-model", "none"],
    ["--audio-model", "none"], ["--say", "hi", "--voice", "none.pt"],
])
def test_a_plan_refuses_what_the_generation_would(cli, tiny_model, words):
    code, _, err = cli("plan", "a", "--model", tiny_model, *words)
    assert code == 2
    assert "error: " in err
    assert "none" in err


def test_json_gives_one_object_where_a_verb_fails_too(cli):
    code, out, err = cli("inspect", "none.mp4", "--json")
    told = json.loads(out)
    assert (code, told["exit_code"]) == (2, 2)
    assert err == f"error: {told['error']}\n"
    assert "none.mp4 does not exist" in told["error"]


def test_a_full_device_for_the_result_is_reported(cli, monkeypatch):
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr("sys.stdout", full)
        code, _, err = cli("models")
        monkeypatch.undo()
    assert code == 2
    assert "error: stdout can't be written: No space left on device" in err


def test_an_existing_output_is_kept_without_overwrite(cli):
    Path("x.mp4").write_bytes(b"precious")
    code, _, err = cli("generate", "a cat", "-o", "x.mp4")
    assert code == 2
    assert "x.mp4 exists; give --overwrite" in err
    assert Path("x.mp4").read_bytes() == b"precious"
    assert cli("generate", "a cat", "-o", "x.mp4", "--overwrite")[0] == 0


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["--version"]])
def test_help_goes_to_stdout(cli, arguments):
    code, out, err = cli(*arguments)
    assert (code, err) == (0, "")
    assert "vidgen" in out


def test_no_verb_prints_help_and_fails(capsys):
    assert main([]) == 2
    assert "generate" in capsys.readouterr().out


def test_an_attention_back_end_by_wish_is_in_the_recipe(cli, monkeypatch):
    monkeypatch.delenv(ATTENTION_VARIABLE, raising=False)
    options = ("generate", "a cat", "--seed", 1, "--steps", 2)
    for name, wanted in (("a.mp4", "sdpa"), ("b.mp4", "reference")):
        assert cli(*options, "-o", name, "--attention", wanted)[0] == 0
        assert read_recipe(name)["attention"] == wanted
    assert ATTENTION_VARIABLE not in os.environ
    assert cli(*options, "-o", "c.mp4")[0] == 0
    assert read_recipe("c.mp4")["attention"] not in ("sdpa", "reference")


@pytest.mark.filterwarnings("always:attention back end")
def test_an_attention_back_end_that_cannot_be_used_is_replaced_or_refused(cli, monkeypatch):
    attention._unusable.cache_clear()
    monkeypatch.setattr(attention, "_xformers", _broken)
    try:
        attention._warn_once.cache_clear()
        options = ("generate", "a cat", "--seed", 1, "--steps", 2, "--attention", "xformers")
        code, _, err = cli(*options, "-o", "a.mp4")
        assert code == 0
        assert err.count("attention back end 'xformers' replaced: RuntimeError: no kernel") == 1
        assert read_recipe("a.mp4")["attention"] != "xformers"
        code, _, err = cli(*options, "-o", "b.mp4", "--strict")
        assert code == 2
        assert "attention back end 'xformers' can't be used: RuntimeError: no kernel" in err
        assert not Path("b.mp4").exists()
    finally:
        attention._unusable.cache_clear()


def _broken(*_tensors):
    raise RuntimeError("no kernel")
