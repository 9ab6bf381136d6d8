"""The service as its users meet it: a real process, the official client, browsers' requests."""

from __future__ import annotations

import base64
import json
import os
import socket
import time

import numpy as np
import openai
import pytest
from openai.types import Video

from tests.lora_models import make_adapter, make_dit
from tests.services import Served, png, wait_for
from vidgen.media.clip import Clip
from vidgen.models.presets import DIT_PRESETS
from vidgen.weights.lora import write_lora

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")


@pytest.fixture(scope="module")
def served(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    (folder / "loras").mkdir()
    adapter = make_adapter(make_dit(DIT_PRESETS["tiny"]))
    write_lora(adapter, folder / "loras" / "style.safetensors", "wan")
    options = ("--per-minute", "6000", "--upload-mb", "1", "--loras", str(folder / "loras"))
    with Served(tiny_model, folder / "data", *options) as served:
        yield served


@pytest.fixture(scope="module")
def client(served):
    return served.client(max_retries=0)


@pytest.fixture(scope="module")
def made(client):
    return client.videos.create_and_poll(
        prompt="a red car", model="tiny", seconds="0.75", size="32x32", poll_interval_ms=50,
        extra_body={"seed": 7, "num_inference_steps": 4, "guidance_scale": 2.5,
                    "negative_prompt": "a cat", "extra_params": {"label": "visible"}},
    )


def refused(served, status, code, param=None, **request):
    answer = served.http.post(request.pop("path", "/v1/videos"), **request)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["code"] == code, error
    assert set(error) == {"message", "type", "param", "code"}
    assert "Traceback" not in answer.text
    assert param is None or error["param"] == param, error
    return error["message"]


def test_the_official_client_makes_a_clip(made, client, tmp_path):
    assert (made.status, made.progress, made.seconds, made.size) == ("completed", 100, "0.75",
                                                                     "32x32")
    assert made.completed_at >= made.created_at
    assert made.expires_at > made.completed_at
    more = made.model_extra
    assert (more["seed"], more["num_inference_steps"], more["num_frames"]) == (7, 4, 9)
    assert {"prompt", "sample", "write"} <= more["stage_durations"].keys()
    assert more["peak_memory_mb"] > 50
    content = client.videos.download_content(made.id).content
    (tmp_path / "made.mp4").write_bytes(content)
    clip = Clip.from_file(tmp_path / "made.mp4")
    assert clip.num_frames == 9
    plan = clip.recipe["plan"]
    assert (plan["prompt"], plan["negative"], plan["seed"]) == ("a red car", "a cat", 7)
    assert plan["guidance"]["scale"] == 2.5
    assert clip.recipe["request"]["label"] == "visible"


def test_lists_pages_and_unknown_ids(made, served, client):
    second = client.videos.create(prompt="a cat", extra_body={"num_frames": 5})
    served.finished(second.id)
    ids = [each.id for each in client.videos.list()]
    assert ids.index(second.id) < ids.index(made.id), "the newest comes first"
    assert [each.id for each in client.videos.list(limit=1)] == ids, "pages follow each other"
    assert client.videos.delete(second.id).deleted
    assert second.id not in [each.id for each in client.videos.list()]
    first = client.videos.list(limit=1, order="asc")
    assert (len(first.data), first.first_id) == (1, first.data[0].id)
    with pytest.raises(openai.NotFoundError) as missing:
        client.videos.retrieve("video_nowhere")
    assert missing.value.code == "not_found"
    bad = served.http.get("/v1/videos", params={"after": "video_nowhere"})
    assert (bad.status_code, bad.json()["error"]["param"]) == (400, "after")
    bad = served.http.get("/v1/videos", params={"limit": "-1"})
    assert (bad.status_code, bad.json()["error"]["param"]) == (400, "limit")


def test_ranges_stills_and_names(made, served):
    path = f"/v1/videos/{made.id}/content"
    whole = served.http.get(path)
    assert whole.headers["content-type"] == "video/mp4"
    part = served.http.get(path, headers={"Range": "bytes=4-7"})
    assert (part.status_code, part.content) == (206, b"ftyp")
    assert part.headers["content-range"] == f"bytes 4-7/{len(whole.content)}"
    beyond = served.http.get(path, headers={"Range": "bytes=99999999-"})
    assert (beyond.status_code, beyond.json()["error"]["code"]) == (416, "range_not_satisfiable")
    assert beyond.headers["content-range"] == f"bytes */{len(whole.content)}"
    assert served.http.get(path, headers={"Range": "bytes=x"}).content == whole.content
    known = {"If-None-Match": whole.headers["etag"]}
    assert served.http.get(path, headers=known).status_code == 304
    changed = served.http.get(path, headers={"If-Match": '"x"'})
    assert (changed.status_code, changed.json()["error"]["code"]) == (412, "precondition_failed")
    thumbnail = served.http.get(path, params={"variant": "thumbnail"})
    assert thumbnail.content[8:12] == b"WEBP"
    assert served.http.get(path, params={"variant": "spritesheet"}).content[:2] == b"\xff\xd8"
    named = served.http.get(path, params={"download": "1"}).headers["content-disposition"]
    assert named == f'attachment; filename="{made.id}.mp4"'
    assert served.http.get(path, params={"variant": "raw"}).status_code == 400
    recipe = served.http.get(f"/v1/videos/{made.id}/recipe").json()
    assert recipe["plan"]["seed"] == 7


def test_head_tells_what_get_would(made, served):
    own = ("date", "x-request-id")
    path = f"/v1/videos/{made.id}"
    for place in (f"{path}/content", f"{path}/content?variant=thumbnail", path, f"{path}/recipe",
                  f"{path}/content?variant=spritesheet&download=1", "/v1/videos", "/v1/models",
                  "/v1/limits", "/health", "/", "/studio/main.js"):
        got, head = served.http.get(place), served.http.head(place)
        assert (head.status_code, head.content) == (200, b""), place
        kept = [{name: value for name, value in each.headers.items() if name not in own}
                for each in (got, head)]
        assert kept[0] == kept[1], place
    for place, status in ((f"{path}/events", 405), (f"{path}/remix", 405), ("/v1/videos/x", 404)):
        head = served.http.head(place)
        assert (head.status_code, head.content) == (status, b""), place
    paths = served.http.get("/openapi.json").json()["paths"]
    assert not any("head" in methods for methods in paths.values())


def test_remix_changes_a_word_and_replay_nothing(made, served, client, tmp_path):
    remix = client.videos.remix(made.id, prompt="a blue car")
    replay = served.http.post(f"/v1/videos/{made.id}/replay").json()
    assert (remix.remixed_from_video_id, remix.model_extra["seed"]) == (made.id, 7)
    assert served.finished(remix.id)["num_inference_steps"] == 4
    assert served.finished(replay["id"])["status"] == "completed"
    frames = []
    for video_id in (made.id, remix.id, replay["id"]):
        (tmp_path / "x.mp4").write_bytes(served.http.get(f"/v1/videos/{video_id}/content").content)
        frames.append(Clip.from_file(tmp_path / "x.mp4").frames)
    assert np.array_equal(frames[0], frames[2])
    assert not np.array_equal(frames[0], frames[1])


def test_a_clip_goes_on_from_itself_and_from_a_file(made, served, client, tmp_path):
    body = {"prompt": "it goes on", "seconds": "0.5", "video": {"id": made.id}}
    own = client.post("/videos/extensions", body=body, cast_to=Video)
    content = client.videos.download_content(made.id).content
    sent = client.videos.extend(prompt="on", seconds="0.5", video=("x.mp4", content, "video/mp4"))
    for video in (own, sent):
        done = served.finished(video.id)
        assert (done["status"], done["seconds"], done["kind"]) == ("completed", "1.25",
                                                                   "extension"), done
    assert own.model_extra["source_video_id"] == made.id
    (tmp_path / "x.mp4").write_bytes(served.http.get(f"/v1/videos/{own.id}/content").content)
    (tmp_path / "made.mp4").write_bytes(content)
    longer = Clip.from_file(tmp_path / "x.mp4")
    assert np.array_equal(longer.frames[:9], Clip.from_file(tmp_path / "made.mp4").frames)


def test_a_first_frame_by_file_and_by_data_url(served, client):
    picture = png(32, 32)
    sent = client.videos.create(prompt="a car", input_reference=("a.png", picture, "image/png"))
    url = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
    named = served.create("a car", input_reference={"image_url": url}, seed=1)
    flat = served.http.post("/v1/videos", files={  # as the client sends objects in multipart
        "prompt": (None, "a car"), "input_reference[image_url]": (None, url)}).json()
    for video in (sent.id, named["id"], flat["id"]):
        assert served.finished(video)["status"] == "completed"
        recipe = served.http.get(f"/v1/videos/{video}/recipe").json()
        assert recipe["inputs"][0]["option"] == "image"


def test_an_adapter_is_for_its_own_request_alone(served, client, tmp_path):
    assert served.http.get("/v1/models/tiny").json()["loras"] == ["style"]
    style, frames = {"lora": [{"name": "style", "scale": 2}]}, []
    ids = [served.create("a red car", seed=4, **fields)["id"] for fields in ({}, style, {})]
    ids.append(client.videos.create(prompt="a red car", extra_body={"seed": 4, **style}).id)
    for video_id, count in zip(ids, (0, 1, 0, 1), strict=True):
        made = served.finished(video_id)
        assert made["status"] == "completed", made
        path = f"/v1/videos/{video_id}"
        (tmp_path / "x.mp4").write_bytes(served.http.get(f"{path}/content").content)
        frames.append(Clip.from_file(tmp_path / "x.mp4").frames)
        assert len(served.http.get(f"{path}/recipe").json()["loras"]) == count
    assert np.array_equal(frames[0], frames[2])
    assert np.array_equal(frames[1], frames[3]), "as the client sends it in multipart"
    assert not np.array_equal(frames[0], frames[1])


def test_a_clip_re_imagined(made, served, client):
    content = client.videos.download_content(made.id).content
    edited = client.videos.edit(prompt="a cat", video=("x.mp4", content, "video/mp4"))
    assert served.finished(edited.id)["status"] == "completed"
    recipe = served.http.get(f"/v1/videos/{edited.id}/recipe").json()
    assert (recipe["plan"]["strength"], recipe["inputs"][0]["option"]) == (0.7, "video")


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
    (400, "invalid_value", "num_inference_steps", {"prompt": "x", "num_inference_steps": 201}),
    (400, "invalid_value", "guidance_scale", {"prompt": "x", "guidance_scale": -1}),
    (404, "model_not_found", "model", {"prompt": "x", "model": "sora-2"}),
    (400, "invalid_value", "lora", {"prompt": "x", "lora": "../../etc/passwd"}),
    (400, "invalid_value", None, {"prompt": "x", "say": "@/etc/passwd"}),
    (400, "invalid_value", None, {"prompt": "x", "voice": "/tmp/voice.pt"}),
    (400, "invalid_value", "image_reference", {"prompt": "x", "image_reference": "/etc/pass"}),
    (400, "urls_disabled", "image_reference", {
        "prompt": "x", "image_reference": "http://127.0.0.1/a.png"}),
    (404, "not_found", "video_reference", {"prompt": "x", "video_reference": {"id": "video_a"}}),
    (400, "invalid_request", "generate_sound", {"prompt": "x", "generate_sound": True}),
    (400, "invalid_value", None, {"prompt": "x", "width": 32}),
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
    assert "takes 16,777,216: send it smaller" in told
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
    refused(served, 403, "wrong_host", json=body, headers={"Host": "evil.example"})
    own = served.http.get("/v1/videos", headers={"Origin": served.url})
    assert own.headers["x-content-type-options"] == "nosniff"
    assert "default-src 'self'" in own.headers["content-security-policy"]
    assert "server" not in own.headers


def test_idempotency_and_the_clients_own_retries(served):
    def ask(seed=None, **headers):
        body = {"prompt": "a cat", **({} if seed is None else {"seed": seed})}
        return served.http.post("/v1/videos", json=body, headers=headers)

    first = ask(**{"Idempotency-Key": "k1"}).json()
    assert ask(**{"Idempotency-Key": "k1"}).json()["id"] == first["id"]
    other = ask(5, **{"Idempotency-Key": "k1"})
    assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_conflict")
    plain = ask(11).json()["id"]
    assert ask(11).json()["id"] != plain  # asked twice on purpose
    retried = ask(12, **{"x-stainless-retry-count": "0"}).json()["id"]
    assert ask(12, **{"x-stainless-retry-count": "1"}).json()["id"] == retried


def test_progress_previews_and_the_end_as_events(served):
    job = served.create("a red car", num_inference_steps=20, num_frames=9)
    names, steps, left, last = [], [], [], {}
    for name, data in served.events(f"/v1/videos/{job['id']}/events"):
        names.append(name)
        last = data
        assert data["id"] == job["id"]
        if name == "progress" and data["step"]:
            steps.append(data["step"])
            left += [data["eta_s"]] * (data["eta_s"] is not None)
        if name == "preview":
            assert base64.b64decode(data["image"].partition(",")[2])[8:12] == b"WEBP"
    assert names[0] == "status"
    assert names[-1] == "status"
    assert "preview" in names
    assert steps == sorted(steps)
    assert len(steps) >= 15
    assert len(left) >= 10
    assert left[0] >= left[-1] >= 0
    assert last["status"] == "completed"
    again = list(served.events(f"/v1/videos/{job['id']}/events"))
    assert [name for name, _ in again] == ["status"]


def test_cancel_and_delete_free_the_process(served):
    long = served.create("a red car", num_inference_steps=200, num_frames=17)
    behind = served.create("a cat")
    assert served.video(behind["id"])["status"] == "queued"
    wait_for(lambda: (served.video(long["id"])["step"] or 0) > 3)
    assert served.video(behind["id"])["queue_position"] == 1
    start = time.monotonic()
    gone = served.http.delete(f"/v1/videos/{long['id']}").json()
    assert gone == {"id": long["id"], "object": "video.deleted", "deleted": True}
    assert served.finished(behind["id"])["status"] == "completed"
    assert time.monotonic() - start < 20
    assert served.http.get(f"/v1/videos/{long['id']}").status_code == 404
    wait_for(lambda: not (served.data / "videos" / long["id"]).exists())

    long = served.create("a red car", num_inference_steps=200, num_frames=17)
    wait_for(lambda: (served.video(long["id"])["step"] or 0) > 3)
    cancelled = served.http.post(f"/v1/videos/{long['id']}/cancel").json()
    assert (cancelled["status"], cancelled["error"]["code"]) == ("failed", "cancelled")
    again = served.http.post(f"/v1/videos/{long['id']}/cancel")
    assert (again.status_code, again.json()["error"]["code"]) == (409, "already_finished")
    content = served.http.get(f"/v1/videos/{long['id']}/content")
    assert (content.status_code, content.json()["error"]["code"]) == (409, "not_completed")
    assert served.finished(served.create("a cat")["id"])["status"] == "completed"


SCRIPT = """
version: 1
shots:
  - {id: one, prompt: a red car, frames: 9}
  - {id: two, prompt: a cat moves left, frames: 9, transition: cut}
"""


def test_a_film_and_one_of_its_shots_again(served):
    answer = served.http.post("/v1/films", json={"script": SCRIPT})
    assert answer.status_code == 200, answer.text
    film = answer.json()
    assert [shot["status"] for shot in film["shots"]] == ["queued", "queued"]
    done = served.finished(film["id"])
    assert (done["status"], done["seconds"]) == ("completed", "1.5"), done
    assert [shot["made"] for shot in done["shots"]] == [True, True]
    path = f"/v1/films/{film['id']}"
    assert served.http.get(f"{path}/content").content[4:8] == b"ftyp"
    assert served.http.get(f"{path}/shots/one/content").content[4:8] == b"ftyp"
    assert served.http.get(f"{path}/shots/none/content").status_code == 404
    for take, status in ((done["shots"][0]["seed"], 200), (7, 404)):
        answer = served.http.get(f"{path}/shots/one/content", params={"take": take})
        assert answer.status_code == status
    board = served.http.get(f"{path}/content", params={"variant": "storyboard"})
    assert "sandbox" in board.headers["content-security-policy"]

    script = done["script"]
    script["shots"][1]["seed"] = 99
    again = served.http.post("/v1/films", json={
        "script": script, "previous_film_id": film["id"]}).json()
    done = served.finished(again["id"])
    assert done["status"] == "completed", done
    assert [shot["made"] for shot in done["shots"]] == [False, True]


def test_takes_of_a_shot_and_all_my_events(served):
    script = {"shots": [{"id": "one", "prompt": "a red car", "frames": 9, "takes": 2, "seed": 5}]}
    film = served.http.post("/v1/films", json={"script": script}).json()
    seen = []
    for name, data in served.events("/v1/events"):
        seen.append((name, data["id"]))
        if name == "status" and data["status"] == "completed" and data["id"] == film["id"]:
            break
    assert seen[0] == ("status", film["id"])
    done = served.finished(film["id"])
    assert [take["seed"] for take in done["shots"][0]["choice"]["takes"]] == [5, 6]
    assert "shot one, 1 of 1" not in done["warnings"]
    path = f"/v1/films/{film['id']}/shots/one/content"
    for seed in (5, 6):
        assert served.http.get(path, params={"take": seed}).content[4:8] == b"ftyp"
    assert served.http.get(path, params={"take": 7}).status_code == 404
    thumbnail = served.http.get(path, params={"take": 6, "variant": "thumbnail"})
    assert thumbnail.headers["content-type"] == "image/webp"


def test_a_film_cancelled_and_taken_over(served):
    shots = [{"id": f"s{n}", "prompt": "a red car", "frames": 17, "steps": 60} for n in range(3)]
    film = served.http.post("/v1/films", json={"script": {"shots": shots}}).json()
    path, shown = f"/v1/films/{film['id']}", []
    for name, data in served.events(f"{path}/events"):
        if name == "preview" and not shown:
            shown.append(data["shot"])
            assert served.http.get(f"{path}/preview").content[8:12] == b"WEBP"
            now = served.events(f"{path}/events")  # one who comes later sees it, too
            assert [next(now)[1]["shot"], next(now)[0]] == ["s0", "preview"]
        if name == "progress" and data["shot"] == "s1" and data["step"]:
            break
    assert shown == ["s0"]
    cancelled = served.http.post(f"{path}/cancel").json()
    assert (cancelled["status"], cancelled["error"]["code"]) == ("failed", "cancelled")
    assert [shot["status"] for shot in cancelled["shots"]] == ["completed", "failed", "failed"]
    shots = [{**shot, "steps": 60 if shot["id"] == "s0" else 2} for shot in shots]
    again = served.http.post("/v1/films", json={
        "script": {"shots": shots}, "previous_film_id": film["id"]}).json()
    done = served.finished(again["id"])
    assert [shot["made"] for shot in done["shots"]] == [False, True, True]
    assert served.http.delete(f"/v1/films/{film['id']}").json()["object"] == "film.deleted"


@pytest.mark.parametrize(("script", "told"), [
    ("shots: []", "no shots"),
    ("shots: [{prompt: x, first_frame: /etc/passwd}]", "send it along"),
    ("shots: [{prompt: x, first_frame: ../../jobs.sqlite3}]", "send it along"),
    ("shots: [{prompt: x, narration: [{text: '@/etc/passwd', at: 0}]}]", "send it along"),
    ("shots: [{prompt: x, lora: [/tmp/a.safetensors]}]", "send it along"),
    ("project: {model: /models/other}\nshots: [{prompt: x}]", "leave it"),
    ("shots: [{prompt: x, sead: 1}]", "sead"),
    ("[", "YAML"),
])
def test_scripts_that_reach_too_far(served, script, told):
    message = refused(served, 400, "invalid_request", json={"script": script}, path="/v1/films")
    assert told in message
    assert str(served.data) not in message


def test_films_keep_to_the_limits_of_clips(served):
    def told(script, *files):
        sent = [("script", ("film.yaml", script.encode())), *(("files", each) for each in files)]
        return refused(served, 400, "invalid_request", path="/v1/films/check", files=sent)

    assert "steps of shot one" in told("shots: [{id: one, prompt: x, frames: 9, steps: 201}]")
    assert "frames of shot one" in told("shots: [{id: one, prompt: x, frames: 1009}]")
    assert "pixels of file a.png" in told(
        "shots: [{prompt: x, frames: 9, first_frame: a.png}]", ("a.png", png(30_000, 1_000)))
    assert "shots, takes counted" in told(
        "shots: [{prompt: x, takes: 100}, {prompt: y, takes: 100}, {prompt: z}]")


def test_a_script_is_checked_without_a_film(served):
    answer = served.http.post("/v1/films/check", json={"script": SCRIPT, "draft": True})
    assert answer.status_code == 200, answer.text
    assert [shot["id"] for shot in answer.json()["shots"]] == ["one", "two"]
    sent = served.http.post("/v1/films/check", data={"draft": "true"}, files=[
        ("script", ("film.yaml", b"shots: [{prompt: x, frames: 9, first_frame: a.png}]")),
        ("files", ("a.png", png(32, 32)))])
    assert sent.status_code == 200, sent.text
    folders = list((served.data / "films").iterdir())
    assert len(folders) == len(served.http.get("/v1/films").json()["data"])


def test_the_page_is_asked_for_anew_so_that_an_upgrade_shows(served):
    for path in ("/", "/studio/main.js"):
        page = served.http.get(path)
        assert page.headers["cache-control"] == "no-cache"
    known = {"If-None-Match": page.headers["etag"]}
    assert served.http.get(path, headers=known).status_code == 304


def test_paths_lead_nowhere_else(made, served):
    for path in ("/studio/%2e%2e/service.py", "/studio/..%2fservice.py", "/studio//etc/passwd",
                 "/v1/videos/..%2f..%2fkeys.json/content", "/v1/videos/%2e%2e/content",
                 f"/v1/videos/{made.id}%2f..%2f{made.id}/content", "/v1/models/../../etc/passwd"):
        assert served.http.get(path).status_code == 404, path


def test_models_metrics_and_readiness(made, served, client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert "defaults" in client.models.retrieve("tiny").model_extra
    wait_for(lambda: served.http.get("/ready").json()["ready"])
    text = served.http.get("/metrics").text
    assert 'vidgen_jobs{status="completed"}' in text
    assert 'vidgen_stage_seconds_count{stage="sample"}' in text
    assert "vidgen_step_seconds_bucket" in text
    assert "process_resident_memory_bytes" in text
    assert 'route="/v1/videos/{video_id}"' in text
    assert made.id not in text
    document = served.http.get("/openapi.json").json()
    body = document["paths"]["/v1/videos"]["post"]["requestBody"]
    assert "multipart/form-data" in body["content"]


def test_the_audit_log_tells_who_did_what(made, served):
    lines = served.http.get("/v1/audit", params={"limit": 1000}).json()["data"]
    actions = [line["action"] for line in reversed(lines) if line["job"] == made.id]
    assert actions == ["created", "started", "completed"]
    done = next(line for line in lines if (line["job"], line["action"]) == (made.id, "completed"))
    assert (done["owner"], done["detail"]["recipe_sha256"]) == (
        "local", made.model_extra["recipe_sha256"])
    logs = [json.loads(line) for line in served.data.with_suffix(".log").read_text().splitlines()
            if line.startswith("{")]
    assert any(line.get("job") == made.id and line["text"] == "completed" for line in logs)
