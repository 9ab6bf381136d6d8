"""The service as its users meet it: a real process, the official client, browsers' requests."""

from __future__ import annotations

import base64
import json
import time

import numpy as np
import openai
import pytest
from openai.types import Video

from tests.services import png, wait_for
from vidgen.media.clip import Clip

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")


def test_the_official_client_makes_a_clip(made, client, tmp_path):
    assert (made.status, made.progress, made.seconds, made.size) == ("completed", 100, "0.75",
                                                                     "32x32")
    assert made.completed_at >= made.created_at
    assert made.expires_at > made.completed_at
    more = made.model_extra
    assert (more["seed"], more["num_inference_steps"], more["num_frames"]) == (7, 4, 9)
    assert more["inference_time_s"] > 0
    assert more["peak_memory_mb"] > 50
    content = client.videos.download_content(made.id).content
    (tmp_path / "made.mp4").write_bytes(content)
    clip = Clip.from_file(tmp_path / "made.mp4")
    assert clip.num_frames == 9
    plan = clip.recipe["plan"]
    assert (plan["prompt"], plan["negative"], plan["seed"]) == ("a red car", "a cat", 7)
    assert plan["guidance"]["scale"] == 2.5
    assert (clip.recipe["label"], clip.recipe["aigc"]) == ("visible", "ACME")


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
    thumbnail = served.http.get(path, params={"variant": "thumbnail"})
    assert thumbnail.content[8:12] == b"WEBP"
    named = served.http.get(path, params={"download": "1"}).headers["content-disposition"]
    assert named == f'attachment; filename="{made.id}.mp4"'
    assert served.http.get(path, params={"variant": "raw"}).status_code == 400
    recipe = served.http.get(f"/v1/videos/{made.id}/recipe").json()
    assert recipe["plan"]["seed"] == 7


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


def test_a_clip_continues_from_itself_and_from_a_file(made, served, client, tmp_path):
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


def test_the_page_is_asked_for_again_so_that_an_upgrade_shows(served):
    for path in ("/", "/studio/main.js"):
        page = served.http.get(path)
        assert page.headers["cache-control"] == "no-cache"
    known = {"If-None-Match": page.headers["etag"]}
    assert served.http.get(path, headers=known).status_code == 304


def test_models_metrics_and_readiness(made, served, client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert "defaults" in client.models.retrieve("tiny").model_extra
    wait_for(lambda: served.http.get("/ready").json()["ready"])
    text = served.http.get("/metrics").text
    assert 'vidgen_jobs{status="completed"}' in text
    assert 'vidgen_job_seconds_count{kind="video"}' in text
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
