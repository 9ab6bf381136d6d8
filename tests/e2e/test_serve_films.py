"""Films by the service: scripts, their shots and takes, one that is cancelled."""

from __future__ import annotations

import pytest

from tests.services import SCRIPT, png, refused


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
    ("shots: [{prompt: x, first_frame: /etc/passwd}]", "upload it and give"),
    ("shots: [{prompt: x, first_frame: ../../jobs.sqlite3}]", "upload it and give"),
    ("shots: [{prompt: x, narration: [{text: '@/etc/passwd', at: 0}]}]", "upload it and give"),
    ("shots: [{prompt: x, lora: [/tmp/a.safetensors]}]", "upload it and give"),
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
    assert "shots (takes counted)" in told(
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
