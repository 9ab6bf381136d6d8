"""What the service refuses, and clients that leave: each told by name, and nothing is left."""

from __future__ import annotations

import os
import socket

import pytest

from tests.services import SCRIPT, png, refused, wait_for

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")


@pytest.mark.parametrize(("status", "code", "param", "body"), [
    (400, "missing_parameter", "prompt", {}),
    (400, "invalid_value", "prompt", {"prompt": ""}),
    (400, "invalid_value", "prompt", {"prompt": 7}),
    (400, "unknown_parameter", "sead", {"prompt": "x", "sead": 1}),
    (400, "unknown_parameter", "smapler", {"prompt": "x", "extra_params": {"smapler": "x"}}),
    (400, "invalid_value", "seed", {"prompt": "x", "seed": "-1"}),
    (400, "invalid_value", "seed", {"prompt": "x", "seed": True}),
    (400, "invalid_value", "seed", {"prompt": "x", "seed": 10**30}),
    (400, "invalid_value", "seconds", {"prompt": "x", "seconds": "NaN"}),
    (400, "invalid_value", "seconds", {"prompt": "x", "seconds": "4s"}),
    (400, "invalid_value", "num_frames", {"prompt": "x", "num_frames": 1e9}),
    (400, "invalid_request", None, {"prompt": "x", "num_frames": 8}),
    (400, "invalid_value", "size", {"prompt": "x", "size": "0x32"}),
    (400, "invalid_request", None, {"prompt": "x", "size": "4096x4096"}),
    (400, "invalid_request", None, {"prompt": "x", "size": "33x32"}),
    (400, "invalid_request", "num_inference_steps", {"prompt": "x", "num_inference_steps": 201}),
    (400, "invalid_value", "num_inference_steps", {"prompt": "x", "num_inference_steps": 1001}),
    (400, "invalid_value", "guidance_scale", {"prompt": "x", "guidance_scale": 101}),
    (400, "invalid_request", "sampler", {"prompt": "x", "extra_params": {"sampler": "x"}}),
    (400, "invalid_value", "guidance_scale", {"prompt": "x", "guidance_scale": -1}),
    (404, "model_not_found", "model", {"prompt": "x", "model": "sora-2"}),
    (400, "invalid_value", "lora", {"prompt": "x", "lora": "../../etc/passwd"}),
    (400, "invalid_value", "say", {"prompt": "x", "say": "@/etc/passwd"}),
    (400, "invalid_value", "voice", {"prompt": "x", "voice": "/tmp/voice.pt"}),
    (400, "invalid_value", "image_reference", {"prompt": "x", "image_reference": "/etc/pass"}),
    (400, "urls_disabled", "image_reference", {
        "prompt": "x", "image_reference": "http://127.0.0.1/a.png"}),
    (404, "not_found", "video_reference", {"prompt": "x", "video_reference": {"id": "video_a"}}),
    (400, "invalid_request", "generate_sound", {"prompt": "x", "generate_sound": True}),
    (400, "invalid_value", "width", {"prompt": "x", "width": 32}),
])
def test_bad_values_are_named(served, status, code, param, body):
    refused(served, status, code, param, json=body)


def test_unknown_fields_are_named_wherever_they_stand(made, served):
    for path, body in (
        ("/v1/videos/edits", {"prompt": "x", "video": {"id": made.id}}),
        ("/v1/videos/extensions", {"prompt": "x", "seconds": 1, "video": {"id": made.id}}),
        (f"/v1/videos/{made.id}/remix", {"prompt": "x"}),
        ("/v1/films", {"script": SCRIPT}), ("/v1/films/check", {"script": SCRIPT}),
    ):
        told = refused(served, 400, "unknown_parameter", "modle", path=path,
                       json={**body, "modle": "tiny"})
        assert "did you mean 'model'" in told
    told = refused(served, 400, "unknown_parameter", "modle", data={"prompt": "x", "modle": "tiny"},
                   files={"input_reference": ("a.png", png(32, 32))})
    assert "did you mean 'model'" in told
    assert not any((served.data / "uploads").iterdir())


def test_addresses_that_are_no_utf_8(served):
    assert served.http.get("/v1/videos/%ff").json()["error"]["code"] == "not_found"
    assert served.http.get("/v1/videos?after=%ff").json()["error"]["param"] == "after"
    key = served.http.post("/v1/videos", json={}, headers={"Idempotency-Key": b"\xff"})
    assert key.json()["error"]["code"] == "missing_parameter"
    file = {"script": ("film.yaml", b"shots: [{prompt: \xff}]")}
    told = refused(served, 400, "invalid_request", path="/v1/films", files=file)
    assert told.startswith("script script.yaml can't be read as text")


def test_bad_bodies(served):
    kind = {"content-type": "multipart/form-data; boundary=b"}
    part = b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n'
    assert "ends before" in refused(served, 400, "malformed_body", headers=kind,
                                    content=part + b"a car\r\n--b\r\n")
    assert "UTF-8" in refused(served, 400, "malformed_body", headers=kind,
                              content=part + b"a \xff car\r\n--b--\r\n")
    assert "twice" in refused(served, 400, "malformed_body", headers=kind,
                              content=2 * (part + b"a\r\n") + b"--b--\r\n")
    assert "more than 100 parts" in refused(
        served, 400, "malformed_body", headers=kind, content=101 * (part + b"a\r\n") + b"--b--\r\n")
    for head in (b'name="\xff"', b'name="video"; filename="\xff"', b'name="a]b"', b"", b"nam"):
        named = part.replace(b'name="prompt"', head)
        refused(served, 400, "malformed_body", headers=kind, content=named + b"a\r\n--b--\r\n")
    refused(served, 400, "malformed_body", headers=kind, content=b"nothing of the kind")
    refused(served, 400, "malformed_body", headers={"content-type": "multipart/form-data"},
            content=b"x")
    refused(served, 413, "too_large", json={"prompt": "x" * 1_100_000})
    refused(served, 415, "unsupported_media_type", data={"prompt": "x"})
    for text in (b'{"prompt": "x", "prompt": "y"}', b'{"prompt": NaN}', b"[" * 100_000, b'["x"]',
                 b'{"prompt": "\\ud800"}', b'{"prompt": "x"', b'{"prompt": "\xff"}'):
        refused(served, 400, "malformed_body", content=text,
                headers={"content-type": "application/json"})
    file = b'--b\r\nContent-Disposition: form-data; name="video"; filename="x"\r\n\r\n'
    chunks = iter([file, *[b"x" * 100_000] * 20])  # a body that doesn't tell its size
    refused(served, 413, "too_large", content=chunks, headers=kind)
    assert not any((served.data / "uploads").iterdir())


def test_files_of_another_kind(served):
    for name, content in (("a.png", b"hello"), ("a.png", b""), ("a.mp4", b"#EXTM3U\nfile:///etc"),
                          ("../../a.png", b"\x89PNG\r\n\x1a\nbroken")):
        refused(served, 400, "invalid_request", data={"prompt": "x"},
                files={"input_reference": (name, content)})
    bomb = png(30_000, 1_000)
    told = refused(served, 400, "invalid_request", data={"prompt": "x"},
                   files={"input_reference": ("a.png", bomb)})
    assert "30,000,000 pixels of image" in told
    assert "allows 16,777,216; send a smaller file" in told
    assert not any((served.data / "uploads").iterdir())


def raw_request(served, head):
    host, port = served.url.removeprefix("http://").split(":")
    raw = socket.create_connection((host, int(port)))
    raw.sendall(f"{head}\r\nHost: {host}:{port}\r\n".encode())
    return raw


def test_a_client_that_leaves_while_it_sends(served):
    before = len(served.http.get("/v1/videos", params={"limit": 100}).json()["data"])
    uploads = served.data / "uploads"
    with raw_request(served, "POST /v1/videos HTTP/1.1") as raw:
        raw.sendall(
            b"Content-Length: 999\r\nContent-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n"
            b'Content-Disposition: form-data; name="video"; filename="x"\r\n\r\nhalf of it')
        wait_for(lambda: any(uploads.glob("*/*")))
    wait_for(lambda: not any(uploads.iterdir()))
    after = served.http.get("/v1/videos", params={"limit": 100}).json()["data"]
    assert len(after) == before
    with served.http.stream("GET", "/v1/events"):  # and one that stops listening
        pass
    assert served.http.get("/health").json() == {"status": "ok"}


def test_a_client_that_leaves_while_it_receives(served):
    job = served.finished(served.create("a red car", num_frames=5)["id"])
    file = served.data / "videos" / job["id"] / "video.mp4"
    os.truncate(file, 100 << 20)  # more than lies in the buffers between
    log = served.data.with_suffix(".log")
    before = len(log.read_text())
    with raw_request(served, f"GET /v1/videos/{job['id']}/content HTTP/1.1") as raw:
        raw.sendall(b"\r\n")
        assert b"200 OK" in raw.recv(1000)
    assert served.http.delete(f"/v1/videos/{job['id']}").json()["deleted"]
    wait_for(lambda: f"{job['id']}/content" in log.read_text()[before:])
    assert '"level": "error"' not in log.read_text()[before:]
    assert served.http.get("/health").json() == {"status": "ok"}


def test_where_requests_come_from(served):
    body = {"prompt": "x"}
    refused(served, 403, "wrong_origin", json=body, headers={"Origin": "https://evil.example"})
    refused(served, 403, "wrong_origin", json=body, headers={"Sec-Fetch-Site": "cross-site"})
    refused(served, 403, "wrong_origin", json=body, headers={"Origin": "http://["})
    for host in ("evil.example", "[::1].evil.example", "localhost:80@evil.example"):
        refused(served, 403, "wrong_host", json=body, headers={"Host": host})
    own = served.http.get("/v1/videos", headers={"Origin": served.url})
    assert own.headers["x-content-type-options"] == "nosniff"
    assert "default-src 'self'" in own.headers["content-security-policy"]
    assert "server" not in own.headers


def test_paths_lead_nowhere_else(made, served):
    for path in ("/studio/%2e%2e/service.py", "/studio/..%2fservice.py", "/studio//etc/passwd",
                 "/v1/videos/..%2f..%2fkeys.json/content", "/v1/videos/%2e%2e/content",
                 f"/v1/videos/{made.id}%2f..%2f{made.id}/content", "/v1/models/../../etc/passwd"):
        assert served.http.get(path).status_code == 404, path
