"""The studio in a real browser, over a real service: what a person does, and what they see."""

from __future__ import annotations

import io
import json
import re
import shutil
import time
import wave
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.services import Served, png
from vidgen.media.clip import Clip
from vidgen.media.probe import read_recipe
from vidgen.server.keys import Keys

playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed"),
]
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--autoplay-policy=no-user-gesture-required",
]
PATIENCE_MS = 90_000
PHONE = {"width": 360, "height": 740}
expect.set_options(timeout=PATIENCE_MS)


@pytest.fixture(scope="module")
def served(tiny_model, tmp_path_factory):
    data = tmp_path_factory.mktemp("studio") / "data"
    with Served(tiny_model, data, "--per-minute", "6000") as served:
        yield served


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=CHROMIUM, args=FLAGS,
            downloads_path=tmp_path_factory.mktemp("downloads"))
        yield browser
        browser.close()


def watched(context, served):
    """A page, and what it complains of or asks of others."""
    context.set_default_timeout(PATIENCE_MS)
    page, wrong = context.new_page(), []
    page.on("console", lambda told: told.type == "error" and wrong.append(told.text)
            if not told.text.startswith("Failed to load resource") else None)
    page.on("response", lambda told: told.status == 404 and wrong.append(f"missing: {told.url}"))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda asked: asked.url.startswith((served.url, "data:", "blob:"))
            or wrong.append(f"an outside request: {asked.url}"))
    return page, wrong


@contextmanager
def opened(browser, served, **options):
    """A page of its own; whatever it complains of or asks of others fails the test."""
    context = browser.new_context(**options)
    page, wrong = watched(context, served)
    page.goto(served.url)
    page.locator(".composer").wait_for()
    yield page
    context.close()
    assert wrong == []


@pytest.fixture(scope="module")
def window(browser, served):
    """One page for most tests: a new one for each is most of their time."""
    context = browser.new_context()
    yield watched(context, served)
    context.close()


@pytest.fixture
def page(window, served):
    page, wrong = window
    wrong.clear()
    page.goto(served.url)
    page.locator(".composer").wait_for()
    yield page
    page.unroute_all()
    page.evaluate("localStorage.clear(), sessionStorage.clear()")
    page.goto("about:blank")  # where nothing acts any more
    page.context.clear_cookies()
    assert wrong == []


def make(page, prompt, **fields):
    """Fill the form and make a clip by the keyboard; the video once it is there."""
    page.get_by_label("Prompt", exact=True).fill(prompt)
    if "num_inference_steps" in fields:
        page.locator(".composer summary").click()
    for name, value in fields.items():
        page.locator(f".composer [name={name}]").fill(str(value))
    before = page.url
    page.keyboard.press("Control+Enter")
    page.wait_for_url(lambda url: "#/clip/" in url and url != before, timeout=PATIENCE_MS)
    video = page.get_by_label(f"Clip: {prompt}", exact=True)  # not one of before
    expect(video).to_be_visible()
    expect(page.locator("#stage [aria-keyshortcuts=e]")).to_be_visible()  # drawn after the video
    return video


def press(page, key):
    """A key of the page's own, which acts outside of fields."""
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press(key)


def assert_focused(page, name):
    """The focus is where it is to be, or gets there as soon as the page has drawn itself."""
    until = time.monotonic() + PATIENCE_MS / 1000
    named = "document.activeElement.name || document.activeElement.textContent"
    while page.evaluate(named) != name:
        assert time.monotonic() < until, f"{page.evaluate(named)!r} has the focus, not {name!r}"
        page.wait_for_timeout(20)


def newest(served):
    return served.http.get("/v1/videos?limit=1").json()["data"][0]


def test_a_prompt_becomes_a_clip_that_plays(page, served):
    video = make(page, "a red car bounces", seed=7)
    facts = "v => new Promise(done => { const told = () => v.readyState >= 3 && v.currentTime > 0 "
    facts += "? done([v.duration, v.videoWidth, v.error]) : setTimeout(told, 50); told(); })"
    duration, width, error = video.evaluate(facts)
    assert (round(duration, 2), width, error) == (0.75, 32, None)
    assert_focused(page, "seed")
    expect(page.locator(".stage .facts")).to_contain_text("seed 7 · 32x32 · 0.75 s · 12 fps")
    assert newest(served)["seed"] == 7
    expect(page.locator("#announcer")).to_have_text("“a red car bounces”: done")


def test_a_clip_is_seen_while_it_forms_and_can_be_cancelled(page, served):
    page.get_by_label("Prompt", exact=True).fill("a cat moves")
    page.locator(".composer summary").click()
    page.locator("[name=num_inference_steps]").fill("200")
    page.get_by_role("button", name="Make clip").click()
    expect(page.locator(".stage .media[data-state=preview] img")).to_be_visible()
    expect(page.locator(".stage .progress .state")).to_contain_text("of 200")
    expect(page.locator("#job-count")).to_have_text("1")
    press(page, "x")
    expect(page.locator(".stage .media")).to_contain_text("Cancelled")
    expect(page.locator("#job-count")).to_be_hidden()
    assert newest(served)["error"]["code"] == "cancelled"
    page.get_by_role("button", name="Delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(page.get_by_role("dialog")).to_have_count(0)
    assert page.evaluate("document.activeElement !== document.body"), "the focus is lost"


def test_one_word_changes_and_both_clips_play_side_by_side(page, served):
    make(page, "a red car bounces", seed=3)
    page.get_by_role("button", name="red", exact=True).click()
    page.keyboard.type("blue")
    page.keyboard.press("Enter")
    expect(page.locator(".compare video")).to_have_count(2)
    expect(page.locator("mark")).to_have_text(["red", "blue"])
    expect(page.locator(".compare .facts")).to_have_text("Both grow from seed 3.")
    assert_focused(page, "Side by side")
    made = newest(served)
    assert (made["prompt"], made["seed"], made["kind"]) == ("a blue car bounces", 3, "remix")
    times = "() => [...document.querySelectorAll('.compare video')].map(v => v.currentTime)"
    page.get_by_label("Time in both clips").fill("0.5")
    page.get_by_role("button", name="Pause both").click()
    before, after = page.evaluate(times)
    assert abs(before - after) < 0.1
    page.keyboard.press(".")
    assert max(page.evaluate(times)) <= 0.75


def test_a_word_is_left_as_it_was(page):
    make(page, "a red car bounces")
    press(page, "c")
    assert_focused(page, "a")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.keyboard.type("green")
    page.keyboard.press("Escape")
    assert_focused(page, "red")
    expect(page.locator(".stage .prompt")).to_have_text("a red car bounces")


def test_a_clip_continues_and_is_downloaded(page, served, tmp_path):
    make(page, "a red car bounces", seed=5)
    press(page, "e")
    dialog = page.get_by_role("dialog")
    assert_focused(page, "seconds")
    page.keyboard.press("Control+A")
    page.keyboard.type("0.5")
    dialog.get_by_label("What happens then").fill("a red car moves")
    dialog.get_by_role("button", name="Extend").click()
    expect(page.get_by_label("Clip: a red car moves", exact=True)).to_be_visible()
    expect(page.locator(".stage .origin")).to_contain_text("Goes on from another clip")
    made = newest(served)
    assert (made["kind"], made["seconds"]) == ("extension", "1.25")
    with page.expect_download() as told:
        page.get_by_role("link", name="Download").click()
    told.value.save_as(tmp_path / "clip.mp4")
    assert told.value.suggested_filename == f"{made['id']}.mp4"
    clip = Clip.from_file(tmp_path / "clip.mp4")
    assert clip.num_frames == 15
    assert read_recipe(tmp_path / "clip.mp4")["plan"]["prompt"] == "a red car moves"


def test_a_recipe_is_read_and_a_clip_replayed(page, served):
    make(page, "a cat bounces", seed=11)
    press(page, "i")
    recipe = page.get_by_role("region", name="Recipe")
    expect(recipe).to_contain_text("a cat bounces")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Replay").click()
    expect(page.locator(".compare video")).to_have_count(2)
    expect(page.locator(".compare .facts")).to_contain_text("so the same frames")
    made = newest(served)
    frames = [Clip.from_file(served.data / "videos" / each / "video.mp4").frames
              for each in (made["id"], made["source_video_id"])]
    assert (frames[0] == frames[1]).all()


def test_pictures_are_chosen_and_dropped(page, served):
    page.locator("[name=image_reference]").set_input_files(
        {"name": "first.png", "mimeType": "image/png", "buffer": png(32, 32)})
    dropped = page.evaluate_handle("""bytes => {
        const data = new DataTransfer();
        data.items.add(new File([new Uint8Array(bytes)], "last.png", { type: "image/png" }));
        return data;
    }""", list(png(32, 32, (20, 20, 200))))
    page.locator(".drop", has_text="Last frame").dispatch_event("drop", {"dataTransfer": dropped})
    expect(page.locator(".composer .filename")).to_have_text(["first.png", "last.png"])
    make(page, "a red car turns blue")
    folder = served.data / "videos" / newest(served)["id"] / "inputs"
    assert {path.stem for path in folder.iterdir()} == {"image_reference", "last_image_reference"}
    page.get_by_role("button", name="Remove last frame").click()
    expect(page.locator(".composer .filename")).to_have_text(["first.png"])
    assert_focused(page, "last_image_reference")


def test_a_clip_has_the_sound_of_a_file(page, served):
    sound = io.BytesIO()
    with wave.open(sound, "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", "not compressed"))
        file.writeframes(bytes(range(256)) * 125)
    page.get_by_label("Sound", exact=True).select_option("A sound file")
    page.locator("[name=audio_reference]").set_input_files(
        {"name": "hum.wav", "mimeType": "audio/wav", "buffer": sound.getvalue()})
    video = make(page, "a red car hums")
    video.evaluate("v => v.play()")
    heard = "v => new Promise(done => { const told = () => v.webkitAudioDecodedByteCount > 0 "
    heard += "? done(true) : setTimeout(told, 50); told(); })"
    assert video.evaluate(heard)
    assert newest(served)["sound"] is True


def test_what_is_filled_in_is_asked_for(page, served):
    make(page, "a red car bounces", seed=4, seconds=0.5, size="48x32", num_inference_steps=3,
         guidance_scale=2, fps=10, negative_prompt="a cat")
    recipe = served.http.get(f"/v1/videos/{newest(served)['id']}/recipe").json()
    assert recipe["request"].items() >= {
        "seed": 4, "seconds": 0.5, "size": [48, 32], "steps": 3, "guidance": 2, "fps": "10",
        "negative": "a cat",
    }.items()


def test_a_clip_is_re_imagined_and_words_are_spoken(page, served):
    make(page, "a red car bounces", seconds=1.25)
    page.get_by_role("button", name="Re-imagine").click()
    page.locator("[name=strength]").fill("0.4")
    page.get_by_label("Sound", exact=True).select_option("Spoken words")
    page.get_by_label("Words to speak").fill("Hi.")
    make(page, "a blue car bounces", seconds=1.25)
    recipe = served.http.get(f"/v1/videos/{newest(served)['id']}/recipe").json()
    assert recipe["request"]["say"] == [[None, "Hi."]]
    assert (recipe["plan"]["strength"], recipe["inputs"][0]["option"]) == (0.4, "video")


def test_what_is_wrong_stands_at_its_field(page):
    page.get_by_label("Prompt", exact=True).fill("a red car")
    size = page.locator(".composer [name=size]")
    size.fill("wide")
    with page.expect_response("**/v1/videos") as told:
        page.keyboard.press("Control+Enter")
    expect(page.locator(".composer .wrong")).to_have_text(told.value.json()["error"]["message"])
    assert size.get_attribute("aria-invalid") == "true"
    assert_focused(page, "size")
    size.fill("32x32")
    page.keyboard.press("Control+Enter")
    expect(page.locator(".composer .wrong")).to_have_count(0)


def test_the_seed_is_locked_and_settings_are_taken_over(page, served):
    make(page, "a red car bounces", seconds="0.75")
    seed = str(newest(served)["seed"])
    page.get_by_role("button", name="Lock").click()
    expect(page.locator("[name=seed]")).to_have_value(seed)
    make(page, "a cat bounces")
    assert str(newest(served)["seed"]) == seed
    page.get_by_role("button", name="Locked").click()
    expect(page.locator("[name=seed]")).to_have_value("")
    page.get_by_role("button", name="Use settings").click()
    expect(page.locator("[name=seed]")).to_have_value(seed)
    assert_focused(page, "prompt")


def test_the_gallery_is_walked_by_keys_and_searched(page, served):
    for prompt in ("a red car", "a cat"):
        served.finished(served.create(prompt, num_frames=5)["id"])
    page.reload()
    expect(page.locator(".gallery li").first).to_contain_text("a cat")
    press(page, "j")
    expect(page.locator(".stage .prompt")).to_have_text("a red car")
    assert_focused(page, "Clip: a red car")
    page.keyboard.press("k")
    expect(page.locator(".stage .prompt")).to_have_text("a cat")
    page.get_by_label("Find a clip by its words").fill("red CAR")
    expect(page.locator(".gallery li", has_text="a cat")).to_have_count(0)
    expect(page.locator(".gallery li", has_text="a red car").first).to_be_visible()


def test_jobs_wait_in_order_and_end_by_a_click(page, served):
    slow = {"num_inference_steps": 200, "num_frames": 33, "size": "192x192"}
    first = served.create("a red car", **slow)
    served.create("a cat", **slow)
    page.reload()
    page.get_by_role("link", name="Jobs").click()
    assert_focused(page, "Jobs")
    rows = page.locator("#jobs ul").first.locator("li")
    expect(rows).to_have_count(2)
    expect(rows.nth(1)).to_contain_text("queued, next")
    page.get_by_role("button", name="Cancel a cat").click()
    expect(rows).to_have_count(1)
    page.get_by_role("button", name="Cancel a red car").click()
    expect(page.get_by_text("Nothing waits.")).to_be_visible()
    assert served.video(first["id"])["error"]["code"] == "cancelled"


def test_a_link_followed_while_the_page_begins_takes_the_focus_along(page):
    held = []

    def hold(asked):
        held.append(asked)

    page.route("**/v1/models*", hold)
    with page.expect_request("**/v1/models*"):  # in time, or the test fails
        page.reload()
    page.get_by_role("link", name="Jobs").click()
    held[0].continue_()
    assert_focused(page, "Jobs")


def test_a_film_is_written_made_and_one_shot_of_it_made_again(page, served):
    press(page, "2")
    page.get_by_label("Title").fill("A red car")
    page.get_by_label("What is seen").fill("a red car bounces")
    page.get_by_role("button", name="Add a shot").click()
    page.keyboard.type("a cat moves")
    page.locator(".shot").nth(1).get_by_label("Takes").fill("2")
    page.get_by_role("button", name="Check").click()
    expect(page.locator(".messages")).to_contain_text("2 shots, 1.5 s at 32x32")
    page.keyboard.press("Control+Enter")
    expect(page.locator(".result video")).to_be_visible()
    expect(page.locator(".badge")).to_have_text(["made", "made"])
    expect(page.locator(".side .cover img")).to_have_count(2)
    expect(page.locator("legend")).to_have_text("Best of 2 takes")
    page.locator(".takes .cover").last.click()
    take = page.locator(".shot").nth(1).locator(".side video")
    expect(take).to_have_js_property("readyState", 4)
    assert "&take=" in take.get_attribute("src")
    kept = served.http.get("/v1/films?limit=1").json()["data"][0]["shots"][1]["seed"]

    page.get_by_role("button", name="Keep this one").click()
    expect(page.locator(".badge")).to_have_text(["made", "made"])
    expect(page.locator("legend")).to_have_count(0)
    film = served.finished(served.http.get("/v1/films?limit=1").json()["data"][0]["id"])
    assert film["shots"][1]["seed"] != kept

    before = page.url
    page.locator(".shot").first.get_by_role("button", name="New take").click()
    page.wait_for_url(lambda url: url != before, timeout=PATIENCE_MS)
    expect(page.locator(".result video")).to_be_visible()
    again = served.finished(page.url.rpartition("/")[2])
    assert [shot["made"] for shot in again["shots"]] == [True, False]
    assert again["previous_film_id"] == film["id"]

    page.locator(".shot").nth(1).get_by_label("What is seen").fill("a cat bounces")
    expect(page.get_by_role("button", name="Make 1 changed shot")).to_be_visible()
    page.reload()
    expect(page.locator(".badge")).to_have_text(["made", "changed"])


def test_a_film_is_seen_while_it_forms_and_can_be_cancelled(page):
    press(page, "2")
    page.get_by_label("What is seen").fill("a red car bounces")
    page.get_by_label("Size", exact=True).last.fill("192x192")
    shot = page.locator(".shot")
    shot.get_by_label("Seconds").fill("2.75")
    shot.locator("summary").click()
    shot.get_by_label("Steps").fill("200")
    page.keyboard.press("Control+Enter")
    expect(page.locator(".result .media[data-state=preview] img")).to_be_visible()
    expect(page.locator(".result .progress .state")).to_have_text(re.compile("^shot-1: denoising"))
    expect(shot.locator(".side .media img")).to_be_visible()
    page.get_by_label("Size", exact=True).last.fill("wide")
    page.get_by_role("button", name="Check").click()
    wrong = page.locator(".film-editor .wrong")
    expect(wrong).to_be_visible()
    told = page.locator(".result .progress .state").text_content()
    expect(page.locator(".result .progress .state")).not_to_have_text(told)
    expect(wrong).to_be_visible()  # it goes when something is edited, not when a step is made
    page.get_by_label("Size", exact=True).last.fill("192x192")
    expect(wrong).to_have_count(0)
    page.locator(".result").get_by_role("button", name="Cancel").click()
    expect(page.locator(".result .media")).to_contain_text("Cancelled")
    expect(page.locator(".badge")).to_have_text("not made")
    expect(page.get_by_role("button", name="Make film")).to_be_visible()


def test_a_script_is_ordered_saved_and_opened(page, tmp_path):
    page.goto(page.url.split("#")[0] + "#/films")
    page.get_by_role("button", name="New film").click()
    for prompt in ("first", "second"):
        page.locator(".shot textarea").last.fill(prompt)
        page.get_by_role("button", name="Add a shot").click()
    page.locator(".shot textarea").last.fill("third")
    page.get_by_role("button", name="Move up shot shot-3").click()
    assert page.evaluate("document.activeElement.title") == "Move up shot shot-3"
    page.locator(".shot").nth(2).get_by_label("Goes on from").select_option("shot-3")
    page.locator("summary", has_text="As text").click()
    first = page.locator(".shot").first
    first.locator("summary").click()
    first.locator("[name=first_frame]").set_input_files(
        {"name": "a.png", "mimeType": "image/png", "buffer": png(32, 32)})
    source = page.get_by_label("The script as JSON")
    expect(source).to_have_value(re.compile('"first_frame": "a.png"'))
    page.reload()
    first.locator("summary").click()
    expect(first.locator(".filename")).to_have_text("a.png")
    first.get_by_role("button", name="Remove first frame").click()
    page.locator("summary", has_text="As text").click()
    expect(source).not_to_have_value(re.compile("first_frame"))
    with page.expect_download() as told:
        page.get_by_role("button", name="Save script").click()
    told.value.save_as(tmp_path / "script.json")
    script = json.loads(Path(tmp_path / "script.json").read_text())
    assert [shot["prompt"] for shot in script["shots"]] == ["first", "third", "second"]
    assert script["shots"][2]["continue_from"] == "shot-3"
    page.get_by_role("button", name="Remove shot shot-3").click()
    expect(page.locator(".shot")).to_have_count(2)
    assert page.evaluate("document.activeElement.closest('.shot') !== null")
    page.locator("#script-file").set_input_files(tmp_path / "script.json")
    page.get_by_role("dialog").get_by_role("button", name="Leave it").click()
    expect(page.locator(".shot")).to_have_count(3)


def test_a_phone_shows_all_of_it(browser, served):
    served.finished(served.create("a red car in a wide desert", num_frames=5)["id"])
    with opened(browser, served, viewport=PHONE, color_scheme="dark") as page:
        expect(page.locator(".stage video")).to_be_visible()
        for view in ("clips", "films", "jobs"):
            page.goto(f"{served.url}/#/{view}")
            page.locator(f"section[data-view={view}]").wait_for()
            assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"], view
            unnamed = page.evaluate("""() => [...document.querySelectorAll(
                "button, a, input, select, textarea")].filter(each => each.checkVisibility()
                && !each.textContent.trim() && !each.labels?.length
                && !each.getAttribute("aria-label")).map(each => each.outerHTML)""")
            assert unnamed == []
        page.goto(f"{served.url}/#/films")
        expect(page.locator("#films-title")).to_be_focused()
        for _ in range(40):  # the bars that stay hide nothing that has the focus
            page.keyboard.press("Tab")
            assert page.evaluate("""() => {
                const each = document.activeElement.labels?.[0] ?? document.activeElement;
                const { x, y, width, height } = each.getBoundingClientRect();
                const top = document.elementFromPoint(x + width / 2, y + height / 2);
                return document.activeElement === document.body || each.contains(top);
            }"""), page.evaluate("document.activeElement.outerHTML")


def test_colours_and_motion_are_as_people_want_them(browser, served):
    with opened(browser, served, color_scheme="dark", reduced_motion="reduce") as page:
        ground = "() => getComputedStyle(document.body).backgroundColor"
        dark = page.evaluate(ground)
        make(page, "a red car bounces")
        assert page.locator(".stage video").evaluate("v => v.paused"), "nothing moves by itself"
        page.get_by_role("button", name="Colours: as the system's").click()
        assert page.evaluate(ground) != dark
        light = page.evaluate(ground)
        page.reload()
        page.get_by_role("button", name="Colours: light").wait_for()
        assert page.evaluate(ground) == light


def test_single_keys_can_be_switched_off(page):
    page.get_by_role("button", name="Keyboard shortcuts").click()
    page.get_by_label("Single keys act").uncheck()
    page.keyboard.press("Escape")
    assert_focused(page, "?")
    page.keyboard.press("2")
    expect(page.locator("section[data-view=films]")).to_be_hidden()


def test_a_key_is_asked_for_and_the_page_outlives_the_service(browser, tiny_model, tmp_path):
    data = tmp_path / "data"
    key = Keys(data / "keys.json").draw("someone")
    with Served(tiny_model, data, key=key) as served:
        context = browser.new_context()
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.goto(served.url)
        page.get_by_label("API key").fill("vg-wrong")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert").filter(has_text="doesn't know")).to_be_visible()
        page.get_by_label("API key").fill(key)
        page.keyboard.press("Enter")
        video = make(page, "a red car bounces")
        expect(video).to_have_js_property("error", None)
        assert page.evaluate("sessionStorage.getItem('vidgen.key')") == key
        assert page.evaluate("document.cookie") == "", "scripts can't read the key"
        served.kill()
        expect(page.locator("#notice")).to_contain_text("can’t be reached")
        context.close()
