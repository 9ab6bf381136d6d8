"""What the service allows: keys, paces, quotas, hosts, policies; and a disk that is full."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests import faults
from tests.services import Served, png, wait_for
from tests.warm import cold
from vidgen.cli.main import main


def drawn(data, name, capsys):
    assert main(["serve", "--data", str(data), "--new-key", name]) == 0
    return capsys.readouterr().out.strip()


def test_keys_paces_quotas_and_policies(tiny_model, tmp_path, capsys, monkeypatch):
    data, words = tmp_path / "data", tmp_path / "words.txt"
    words.write_text("dragon\n")
    monkeypatch.setenv("VIDGEN_POLICY", str(words))
    ann, bob = drawn(data, "ann", capsys), drawn(data, "bob", capsys)
    options = ("--per-minute", "5", "--pending", "1")
    with Served(tiny_model, data, *options, key=ann) as served:
        first = served.create("a red car")
        missing = served.http.get(f"/v1/videos/{first['id']}",
                                  headers={"Authorization": f"Bearer {bob}"})
        assert missing.status_code == 404
        for wrong in ("", "Bearer", "Bearer vg-wrong", f"Basic {ann}", "Bearer " + "x" * 10_000):
            answer = served.http.get("/v1/videos", headers={"Authorization": wrong})
            assert (answer.status_code, answer.json()["error"]["type"]) == (
                401, "authentication_error")
        for path in ("/metrics", "/v1/models", "/v1/audit", f"/v1/videos/{first['id']}/content"):
            assert served.http.get(path, headers={"Authorization": ""}).status_code == 401
        assert served.http.get("/health", headers={"Authorization": ""}).status_code == 200
        counted = 'route="/v1/videos",status="401"} 5.0'
        assert counted in served.http.get("/metrics").text

        pending = served.http.post("/v1/videos", json={"prompt": "x"})
        if pending.status_code == 200:  # the first was done already
            first = pending.json()
        else:
            assert (pending.status_code, pending.json()["error"]["code"]) == (429, "queue_full")
        served.finished(first["id"])
        banned = served.http.post("/v1/videos", json={"prompt": "a Dragon!"})
        assert (banned.status_code, banned.json()["error"]["code"]) == (
            400, "content_policy_violation")
        film = served.http.post("/v1/films", json={"script": {"shots": [
            {"prompt": "a car", "duration": 3, "narration": "A dragon!"}]}})
        assert film.json()["error"]["code"] == "content_policy_violation"
        answers = (served.http.post("/v1/videos", json={}) for _ in range(20))
        early = next(answer for answer in answers if answer.status_code == 429)
        assert early.json()["error"]["code"] == "rate_limit_exceeded"
        assert int(early.headers["retry-after"]) > 0

        session = served.http.post("/v1/session")
        cookie = session.headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "samesite=strict" in cookie.lower()
        served.http.headers.pop("Authorization")
        assert served.http.get("/v1/session").json() == {
            "object": "session", "key_required": True, "authenticated": True, "owner": "ann"}
        assert served.http.get("/v1/videos").status_code == 200
        assert main(["serve", "--data", str(data), "--revoke-key", "ann"]) == 0
        assert served.http.get("/v1/videos").status_code == 401
        log = served.data.with_suffix(".log").read_text()
    assert ann not in log
    assert ann not in "".join(p.read_text(errors="ignore") for p in data.rglob("*") if p.is_file())
    capsys.readouterr()
    assert main(["serve", "--data", str(data), "--audit", "--json"]) == 0
    lines = json.loads(capsys.readouterr().out)
    assert {line["owner"] for line in lines} == {"ann"}
    assert lines[0]["action"] == "created"


def test_old_clips_go_and_addresses_are_judged(tiny_model, tmp_path):
    with Served(tiny_model, tmp_path / "data", "--keep-hours", "0.001", "--fetch") as served:
        job = served.finished(served.create()["id"])
        folder = served.data / "videos" / job["id"]
        assert folder.is_dir()
        for url in ("http://127.0.0.1:1/a.png", "http://localhost/a.png", "http://[::1]/a.png",
                    "http://169.254.169.254/latest/meta-data", f"{served.url}/v1/videos"):
            answer = served.http.post("/v1/videos", json={"prompt": "x", "image_reference": url})
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_url")
        wait_for(lambda: not folder.exists())
        assert served.http.get(f"/v1/videos/{job['id']}").status_code == 404


def test_a_key_has_so_many_requests_under_way(tiny_model, tmp_path, capsys):
    data = tmp_path / "data"
    ann, bob = drawn(data, "ann", capsys), drawn(data, "bob", capsys)
    with Served(tiny_model, data, "--at-once", "3", key=ann) as served, ExitStack() as streams:
        heard = []  # kept, as a stream that nobody reads from is closed
        for _ in range(3):
            opened = streams.enter_context(served.http.stream("GET", "/v1/events"))
            heard.append(opened.iter_lines())
            assert next(heard[-1]).startswith("retry")
        more = served.http.get("/v1/videos")
        assert (more.status_code, more.json()["error"]["code"]) == (429, "too_many_requests")
        assert more.headers["retry-after"] == "1"
        other = {"Authorization": f"Bearer {bob}"}
        assert served.http.get("/v1/videos", headers=other).status_code == 200
        streams.close()
        wait_for(lambda: served.http.get("/v1/videos").status_code == 200)


def test_the_embedded_model_is_served_with_its_page(tmp_path):
    with cold(), Served(Path("toybox"), tmp_path / "data") as served:  # as users start it
        assert "<title>vidgen studio</title>" in served.http.get("/").text
        made = served.finished(served.create(num_frames=5, num_inference_steps=2)["id"])
        assert (made["status"], made["model"], made["size"]) == ("completed", "toybox", "128x128")


@pytest.mark.skipif(not faults.can_mount(), reason="needs a mount of its own")
def test_a_full_disk_is_reported_and_gets_over(tiny_model, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    with Served(tiny_model, data, "--reserve-mb", "0.1",
                prepare=lambda: faults.mount(data, 4 << 20)) as served:
        seen = Path(f"/proc/{served.process.pid}/root{data}")
        long = served.create(num_inference_steps=150, num_frames=17)
        wait_for(lambda: (served.video(long["id"])["step"] or 0) > 2)
        filler = seen / "filler"
        with pytest.raises(OSError, match="No space"):
            filler.write_bytes(b"x" * (8 << 20))
        refused = served.http.post("/v1/videos", json={"prompt": "x"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (
            507, "insufficient_storage")
        os.kill(served.children()["vidgen.pipeline.workers.process"], signal.SIGKILL)
        log = served.data.with_suffix(".log")
        wait_for(lambda: "no space is left" in log.read_text())  # to put the job back
        assert served.http.get("/health").status_code == 200
        filler.unlink()
        done = served.finished(long["id"])
        assert done["status"] == "completed" or done["error"]["code"] == "storage_error"
        files = {"input_reference": ("a.png", png(32, 32))}
        sent = served.http.post("/v1/videos", data={"prompt": "x"}, files=files)
        assert served.finished(sent.json()["id"])["status"] == "completed"


@pytest.mark.parametrize(("options", "told"), [
    (["--host", "0.0.0.0"], "--new-key"),
    (["--port", "99999"], "65535"),
    (["--model", "nowhere"], "nowhere"),
    (["--keep-hours", "-1"], "above 0"),
    (["--quota-gb", "inf"], "quota_gb is inf"),
    (["--upload-mb", "nan"], "upload_mb is nan"),
    (["--drain-seconds", "-1"], "from 0"),
    (["--loras", "nowhere"], "a folder"),
])
def test_wrong_usage_leaves_with_2(tmp_path, options, told):
    done = subprocess.run(
        [sys.executable, "-m", "vidgen", "serve", "--data", str(tmp_path / "data"), *options],
        capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert told in done.stderr
    assert "Traceback" not in done.stderr
