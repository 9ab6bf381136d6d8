"""`vidgen generate` as a process: interrupted, without room, seen by foreign programs."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest

from vidgen.pipeline.journal.job import job_facts


def start(folder, tiny_model, *options, **settings):
    return subprocess.Popen(
        [sys.executable, "-m", "vidgen", "generate", "a red car", "--model", str(tiny_model),
         "--seed", "1", "-o", "x.mp4", *options],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, **settings,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_130_and_its_journal(tmp_path, tiny_model, number):
    run = start(tmp_path, tiny_model, "--steps", "1000", "--events", "-")
    for line in run.stdout:
        event = json.loads(line)
        if event["stage"] == "sample" and event["done"]:
            break
    run.send_signal(number)
    _, err = run.communicate(timeout=30)
    assert run.returncode == 130
    assert "Stopped. No incomplete files were left." in err
    assert "x.mp4 is not finished; run the same command with --resume to continue" in err
    assert "Traceback" not in err
    assert {path.name for path in tmp_path.iterdir()} == {"x.mp4.vidgen-job"}
    facts = job_facts(tmp_path / "x.mp4.vidgen-job")
    assert 0 < facts["done"] < 1000
    assert not facts["running"]


def test_a_run_without_room_leaves_2_and_its_journal_at_most(tmp_path, tiny_model):
    def little_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))

    run = start(tmp_path, tiny_model, preexec_fn=little_room)
    out, err = run.communicate(timeout=120)
    assert run.returncode == 2
    assert "error: no space left for x.mp4" in err
    assert "Traceback" not in err
    assert out == ""
    assert {path.name for path in tmp_path.iterdir()} <= {"x.mp4.vidgen-job"}


@pytest.mark.skipif(shutil.which("ffprobe") is None, reason="needs ffprobe (Debian: ffmpeg)")
def test_ffprobe_finds_what_was_promised(tmp_path, tiny_model):
    run = start(tmp_path, tiny_model, "--fps", "24000/1001", "--json")
    out, err = run.communicate(timeout=120)
    assert run.returncode == 0, err
    promised = json.loads(out)["clips"][0]
    done = subprocess.run(
        ["ffprobe", "-v", "error", "-count_frames", "-show_streams", "-show_format", "-of", "json",
         tmp_path / "x.mp4"],
        capture_output=True, text=True, check=True,
    )
    facts = json.loads(done.stdout)
    (stream,) = facts["streams"]
    assert (stream["codec_name"], stream["pix_fmt"]) == ("h264", "yuv420p")
    assert stream["avg_frame_rate"] == stream["r_frame_rate"] == promised["fps"] == "24000/1001"
    assert int(stream["nb_read_frames"]) == int(stream["nb_frames"]) == promised["num_frames"]
    assert (stream["width"], stream["height"]) == (promised["width"], promised["height"])
    assert float(stream["start_time"]) == 0
    assert abs(float(stream["duration"]) - promised["seconds"]) < 0.002
    assert {stream[f"color_{key}"] for key in ("space", "transfer", "primaries")} == {"bt709"}
    assert json.loads(facts["format"]["tags"]["vidgen"])["plan"]["seed"] == 1


def test_a_closed_pipe_is_no_traceback(tmp_path, tiny_model):
    run = start(tmp_path, tiny_model, "--events", "-", "--steps", "50")
    run.stdout.readline()
    run.stdout.close()
    deadline = time.monotonic() + 60
    while run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert run.returncode == 1
    assert "Traceback" not in run.stderr.read()
    run.stderr.close()
    assert {path.name for path in tmp_path.iterdir()} <= {"x.mp4.vidgen-job"}
