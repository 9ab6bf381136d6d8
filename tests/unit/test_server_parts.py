"""Parts of the service that need no server: keys, paces, addresses, kinds of files, errors."""

from __future__ import annotations

import asyncio
import hashlib
import http.server
import json
import logging
import os
import threading
import time
from contextlib import suppress
from pathlib import Path

import certifi
import httpx
import pytest

from vidgen.core.errors import InputError, OptionError
from vidgen.core.request import Request
from vidgen.server.app import JsonFormatter
from vidgen.server.body import MAX_FIELD_BYTES, _Form, _nested
from vidgen.server.keys import Keys, Pace
from vidgen.server.layout import sniff
from vidgen.server.making import marks_of
from vidgen.server.requests import Draft, fetch, is_public, options_of, parse
from vidgen.server.routes import JobFile
from vidgen.server.schema import EditRequest, ExtraParams, RemixRequest, VideoRequest
from vidgen.server.service import fingerprint
from vidgen.server.settings import Settings
from vidgen.server.types import ApiError, Call, Upload, from_vidgen


def test_keys_are_kept_as_hashes(tmp_path):
    keys = Keys(tmp_path / "keys.json")
    assert keys.all() == []
    key = keys.draw("ann")
    assert key.startswith("vg-")
    assert key not in keys.path.read_text()
    assert keys.path.stat().st_mode & 0o077 == 0
    assert keys.owner(key) == "ann"
    assert keys.owner(key + "x") is None
    with pytest.raises(InputError, match="already"):
        keys.draw("ann")
    other = Keys(keys.path)  # another process changes them
    second = other.draw("bob")
    assert keys.owner(second) == "bob"
    other.revoke("ann")
    assert keys.owner(key) is None
    with pytest.raises(InputError, match="known keys: bob"):
        keys.revoke("ann")
    assert keys.are_used
    keys.revoke("bob")
    assert keys.are_used, "the last key gone, nobody is let in"
    for name in ("", "a b", "local", "x" * 65):
        with pytest.raises(InputError, match="a valid key name"):
            keys.draw(name)
    keys.path.write_text("{}")
    with pytest.raises(InputError, match="damaged"):
        keys.all()


def test_a_pace_lets_bursts_through_and_fills_up_again():
    now = [0.0]
    pace = Pace(3, now=lambda: now[0])
    assert [pace.take("ann") for _ in range(3)] == [0, 0, 0]
    assert pace.take("ann") == pytest.approx(20)
    assert pace.take("bob") == 0
    now[0] = 20.0
    assert pace.take("ann") == 0
    assert pace.take("ann") > 0


@pytest.mark.parametrize("address", [
    "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
    "0.0.0.0", "224.0.0.1", "255.255.255.255", "::1", "::", "fe80::1", "fc00::1", "ff02::1",
    "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "2001::1",
])
def test_addresses_inside_a_network(address):
    assert not is_public(address)


def test_addresses_outside():
    assert is_public("93.184.216.34")
    assert is_public("2606:2800:220:1::1")


class _Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "http://localhost:1/inside")
        elif self.path == "/round":
            self.send_response(302)
            self.send_header("Location", "/round")
        else:
            self.send_response(200 if self.path in ("/a.png", "/cut", "/slow") else 404)
        if self.path == "/cut":
            self.send_header("Content-Length", "1000")
        self.end_headers()
        if self.path == "/cut":
            self.wfile.write(b"x" * 999)
        if self.path == "/slow":
            with suppress(OSError):
                while True:
                    self.wfile.write(b"x")
                    time.sleep(0.05)
        if self.path == "/a.png":
            self.wfile.write(b"x" * 1000)

    def log_message(self, *_):
        pass


@pytest.fixture
def site():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_what_is_fetched_and_what_is_not(site, monkeypatch):
    def here(address: str) -> bool:
        return address == "127.0.0.1"

    assert fetch(f"{site}/a.png", 1000, allowed=here) == b"x" * 1000
    for path, told in (("/a.png", "larger than 999"), ("/none", "404"), ("/round", "redirects"),
                       ("/moved", "doesn't answer|doesn't access")):
        with pytest.raises(InputError, match=told):
            fetch(site + path, 999, allowed=here)
    with pytest.raises(InputError, match="can't be read"):
        fetch(f"{site}/cut", 1000, allowed=here)
    monkeypatch.setattr("vidgen.server.requests.WHOLE_S", 0.5)
    with pytest.raises(InputError, match=r"more than 0\.5 s"):
        fetch(f"{site}/slow", 1000, allowed=here)
    with pytest.raises(InputError, match="doesn't access"):
        fetch(f"{site}/a.png", 1000)
    for url in ("file:///etc/passwd", "ftp://example.org/", "http://", "http://[", "gopher://x",
                "http://user:key@example.org/", "http://127.1:80/a", "http://0x7f000001/",
                "http://localhost/", "http://[::1]/", f"http://{'a' * 70}/"):
        with pytest.raises(InputError):
            fetch(url, 1000)


def test_an_international_host_and_the_authorities_of_the_system(tmp_path, monkeypatch):
    seen, begin = {}, httpx.AsyncClient.__init__

    def answer(request):
        seen.update(url=request.url, sni=request.extensions["sni_hostname"])
        return httpx.Response(200, stream=httpx.ByteStream(b"x"))

    async def address(host, _):
        seen["host"] = host
        return "127.0.0.1"

    def start(client, *, verify=True, **options):
        seen["verify"] = verify
        begin(client, transport=httpx.MockTransport(answer), **options)

    end = "-----END CERTIFICATE-----\n"
    one = Path(certifi.where()).read_text().partition(end)[0] + end
    (tmp_path / "one.pem").write_text(one)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "one.pem"))
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))
    monkeypatch.setattr(httpx.AsyncClient, "__init__", start)
    monkeypatch.setattr("vidgen.server.requests._address", address)
    assert fetch("https://b\u00fccher.example/a.png", 10) == b"x"
    assert (seen["host"], seen["sni"]) == ("xn--bcher-kva.example",) * 2
    assert seen["url"].host == "127.0.0.1"
    assert len(seen["verify"].get_ca_certs()) == 1


def part(disposition: str) -> bytes:
    return f"--b\r\nContent-Disposition: {disposition}\r\n\r\n".encode()


def test_a_file_is_hashed_and_closed_as_it_comes(tmp_path):
    form, pieces = _Form(b"b", tmp_path), [b"one", b"two" * 1000]
    form.feed(part('form-data; name="image"; filename="a.png"'))
    for piece in pieces:
        form.feed(piece)
    form.feed(b"\r\n--b--\r\n")
    content, upload = b"".join(pieces), form.finish()["image"]
    assert upload == Upload(upload.path, "a.png", hashlib.sha256(content).hexdigest(), len(content))
    assert upload.path.read_bytes() == content

    cut = _Form(b"b", tmp_path)
    cut.feed(part('form-data; name="image"; filename="a.png"') + b"begun")
    assert not cut._file.closed
    cut.close()
    assert cut._file.closed


def test_a_field_is_refused_as_soon_as_it_is_too_large(tmp_path):
    form = _Form(b"b", tmp_path)
    form.feed(part('form-data; name="prompt"') + b"x" * MAX_FIELD_BYTES)
    with pytest.raises(ApiError, match="the field 'prompt' is larger than"):
        form.feed(b"x" * 100)  # and more would follow


@pytest.mark.parametrize("disposition", ['attachment; name="a"', "form-data"])
def test_parts_that_are_no_fields_are_refused(tmp_path, disposition):
    with pytest.raises(ApiError, match="a part of the body has no name"):
        _Form(b"b", tmp_path).feed(part(disposition))


@pytest.mark.parametrize(("head", "found"), [
    (b"\x89PNG\r\n\x1a\n", ("picture", ".png")), (b"\xff\xd8\xff\xe0", ("picture", ".jpg")),
    (b"RIFF\0\0\0\0WEBPVP8 ", ("picture", ".webp")), (b"GIF89a", ("picture", ".gif")),
    (b"\0\0\0\x20ftypisom", ("video", ".mp4")), (b"\x1a\x45\xdf\xa3..webm", ("video", ".webm")),
])
def test_files_are_known_by_their_first_bytes(tmp_path, head, found):
    path = tmp_path / "x.exe"
    path.write_bytes(head)
    assert sniff(path, "image", "picture", "video") == found


@pytest.mark.parametrize("content", [
    b"", b"#EXTM3U\n", b"ffconcat version 1.0", b"<svg/>", b"%PDF-1.4", b"\x7fELF", b"RIFF",
])
def test_files_that_are_let_in_nowhere(tmp_path, content):
    path = tmp_path / "x.png"
    path.write_bytes(content)
    with pytest.raises(InputError, match="image is"):
        sniff(path, "image", "picture", "video", "sound")


def test_values_may_be_strings_and_errors_name_the_field():
    ask = parse(VideoRequest, {"prompt": "x", "seconds": "4", "seed": "7", "generate_sound": "true",
                           "lora": '["a:0.5"]', "extra_params": '{"fit": "pad"}'})
    assert (ask.seconds, ask.seed, ask.generate_sound, ask.lora) == (4.0, 7, True, ["a:0.5"])
    assert ask.extra_params.fit == "pad"
    with pytest.raises(ApiError, match="did you mean 'seconds'") as error:
        parse(VideoRequest, {"prompt": "x", "secnods": 1})
    assert error.value.body()["error"]["param"] == "secnods"
    with pytest.raises(ApiError, match="such as 128x96"):
        parse(VideoRequest, {"prompt": "x", "size": "wide"})
    assert from_vidgen(OptionError("steps is 0", "steps")).param == "num_inference_steps"
    assert from_vidgen(OptionError("seconds is 0", "seconds")).param == "seconds"
    assert from_vidgen(InputError("8 frames can't be made")).param is None


def test_fields_are_options_of_a_request(tmp_path):
    (tmp_path / "style.safetensors").touch()
    extra = {
        "sampler": "euler", "cache": "forecast", "fit": "pad", "guidance_low": 2.0,
        "guidance_rescale": 0.3, "label": "visible", "aigc": "ACME",
        "word_normalisation": "crimson=red", "settings": {
            "image_guidance": 1.5, "image_guidance_reach": 2, "reference_guidance": 0.5,
            "refine": 3, "encode_passes": 2, "temporal_upsampling": 2, "candidates": 3,
            "regional_prompts": 0.5,
            "audio_steps": 4, "audio_candidates": 2, "audio_delay": 0.1, "anchor": False,
        },
    }
    assert extra.keys() == ExtraParams.model_fields.keys()
    places = ("image_reference", "last_image_reference", "video_reference", "audio_reference")
    own = {
        "prompt": "x", "negative_prompt": "y", "seed": 7, "num_frames": 9, "fps": 24,
        "width": 64, "height": 32, "num_inference_steps": 4, "guidance_scale": 2, "flow_shift": 3,
        "strength": 0.6, "lora": ["style:0.5"], "say": ["Hi", [1.5, "ho"]], "voice": "en-gb",
    }
    others = {"input_reference", "seconds", "size", "model", "generate_sound", "extra_params"}
    assert {*own, *places} | others == VideoRequest.model_fields.keys()
    draft = Draft("video_1", "video", Call("ann"), Settings(data=tmp_path), None)
    draft.put = lambda _reference, name, *_: f"inputs/{name}"
    ask = parse(VideoRequest, {**own, **dict.fromkeys(places, "data:,"), "extra_params": extra})
    options = options_of(ask, tmp_path) | draft.put_inputs(ask)
    assert options == extra | {
        "prompt": "x", "negative": "y", "seed": 7, "frames": 9, "fps": "24", "size": (64, 32),
        "steps": 4, "guidance": 2, "shift": 3, "strength": 0.6,
        "say": ((None, "Hi"), (1.5, "ho")),
        "lora": [f"{tmp_path.resolve() / 'style.safetensors'}:0.5"], "voice": "en-gb",
        "image": "inputs/image_reference", "last_image": "inputs/last_image_reference",
        "video": "inputs/video_reference", "audio": "inputs/audio_reference",
    }
    for asked, audio in ((True, "generate"), (False, "none")):
        ask = parse(VideoRequest, {"prompt": "x", "generate_sound": asked, "seconds": 1})
        assert options_of(ask, None).items() >= {"audio": audio, "seconds": 1}.items()
    assert marks_of({"options": options}) == {"label": "visible", "aigc": "ACME"}
    options = {name: options[name] for name in options.keys() - {"label", "aigc"}}
    request = Request.of(options.pop("prompt"), options)
    assert request.settings == extra["settings"]
    assert (request.size, request.say) == ((64, 32), ((None, "Hi"), (1.5, "ho")))


@pytest.mark.parametrize(("fields", "param", "told"), [
    ({"seconds": 1, "num_frames": 9}, "seconds", "seconds and num_frames are both given"),
    ({"width": 64}, "width", "width and height go together"),
    ({"size": "64x64", "width": 64, "height": 64}, "size", "size and width are both given"),
    ({"voice": "@x"}, "voice", "voice is '@x'"),
    ({"say": ["@x"]}, "say", "say has '@x'"),
    ({"generate_sound": False, "audio_reference": "data:,"}, "audio_reference", "both given"),
    ({"generate_sound": True, "audio_reference": "data:,"}, "audio_reference", "both given"),
])
def test_fields_that_do_not_go_together_are_reported_without_the_body(fields, param, told):
    with pytest.raises(ApiError) as error:
        parse(VideoRequest, {"prompt": "a secret", **fields})
    assert (error.value.code, error.value.param) == ("invalid_value", param)
    assert told in error.value.message
    assert error.value.message.startswith(param)
    assert "secret" not in error.value.message


def test_unknown_fields_within_others_are_named_with_the_nearest():
    for fields, told in (({"extra_params": {"smapler": "x"}}, "did you mean 'sampler'"),
                         ({"extra_params": {"q": 1}},
                          "known: aigc, cache, fit, guidance_low, guidance_rescale"),
                         ({"lora": [{"name": "a", "scael": 1}]}, "did you mean 'scale'")):
        with pytest.raises(ApiError, match=told) as error:
            parse(VideoRequest, {"prompt": "x", **fields})
        assert error.value.code == "unknown_parameter"


def test_a_file_in_the_wrong_place_is_reported_without_its_path(tmp_path):
    upload = Upload(tmp_path / "secret", "a.png", "5ec2e7", 7)
    for fields in ({"image_reference": [upload]}, {"prompt": upload}, {"seed": [upload]}):
        with pytest.raises(ApiError, match=r"the file 'a\.png'") as error:
            parse(VideoRequest, {"prompt": "x", **fields})
        assert not any(word in error.value.message for word in ("secret", "5ec2e7"))


@pytest.mark.parametrize(("given", "kept"), [
    (24, "24"), ("24", "24"), (12.5, "25/2"), ("23.976", "24000/1001"),
    ("24000/1001", "24000/1001"), ("1001/1000", "1001/1000"),
])
def test_a_rate_is_taken_as_clips_tell_theirs(given, kept):
    for ask in (VideoRequest, RemixRequest, EditRequest):
        source = {"video": {"id": "v"}} if ask is EditRequest else {}
        fields = {"prompt": "x", "fps": given} | source
        assert str(parse(ask, fields).fps) == kept


@pytest.mark.parametrize("wrong", [
    True, 0, -1, 241, 0.9, "1/1000", "0/1", "1/0", "500/2", "1e999999999", "1/2/3", "nan", "fast",
    [24], "²⁴/1",
])
def test_rates_that_are_none(wrong):
    with pytest.raises(ApiError, match=r"fps is .*; give a number") as error:
        parse(VideoRequest, {"prompt": "x", "fps": wrong})
    assert error.value.param == "fps"


@pytest.fixture
def ask_file(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"0123456789")
    os.utime(path, (1_000_000_000.7,) * 2)  # within 01:46:40

    def ask(**headers):
        async def answer():
            transport = httpx.ASGITransport(JobFile(path, "a.mp4"))
            async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
                named = {name.replace("_", "-"): value for name, value in headers.items()}
                return await client.get("/", headers=named)

        return asyncio.run(answer())

    return ask


WRITTEN, BEFORE = "Sun, 09 Sep 2001 01:46:40 GMT", "Sun, 09 Sep 2001 01:46:39 GMT"


def test_a_file_that_the_client_has_is_not_sent_again(ask_file):
    whole = ask_file()
    tag = whole.headers["etag"]
    assert (whole.content, whole.headers["last-modified"]) == (b"0123456789", WRITTEN)
    for has in ({"if_none_match": tag}, {"if_none_match": f'"x", W/{tag}'}, {"if_none_match": "*"},
                {"if_modified_since": WRITTEN}, {"if_none_match": tag, "range": "bytes=0-1"}):
        answer = ask_file(**has)
        assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", tag)
    for lacks in ({"if_none_match": '"x"'}, {"if_none_match": "x"}, {"if_modified_since": BEFORE},
                  {"if_modified_since": "yesterday"}, {"if_modified_since": ""},
                  {"if_none_match": '"x"', "if_modified_since": WRITTEN}):
        assert ask_file(**lacks).content == whole.content


def test_ranges_are_of_bytes_and_others_count_for_nothing(ask_file):
    tag = ask_file().headers["etag"]
    for given, content in (("bytes=2-4", b"234"), ("Bytes=-3", b"789"), ("bytes=8-", b"89"),
                           ("bytes=0-999", b"0123456789")):
        part = ask_file(range=given)
        assert (part.status_code, part.content) == (206, content)
    assert ask_file(range="bytes=0-1, 4-5").headers["content-type"].startswith("multipart/byte")
    assert ask_file(range="bytes=0-1,x").content == b"01"
    for wrong in ("items=0-1", "bytes=abc", "bytes", "bytes=", "bytes=5-2", "0-1", "bytes=-",
                  "bytes=0-1,5-2", "bytes=" + "9" * 5000 + "-"):
        whole = ask_file(range=wrong)
        assert (whole.status_code, whole.content) == (200, b"0123456789"), wrong
    for beyond in ("bytes=10-", "bytes=99-100", "bytes=-0"):
        with pytest.raises(ApiError) as error:
            ask_file(range=beyond)
        assert (error.value.status, error.value.headers) == (416, {"Content-Range": "bytes */10"})
    for same, status in ((tag, 206), (WRITTEN, 206), ('"x"', 200), (f"W/{tag}", 200)):
        assert ask_file(range="bytes=0-1", if_range=same).status_code == status


def test_names_in_brackets_say_where_fields_belong():
    pairs = [("video[id]", "v"), ("lora[][name]", "a"), ("lora[][name]", "b"),
             ("lora[][scale]", "1"), ("lora[][scale]", "2"), ("say[]", "one"), ("say[]", "two"),
             ("files", "x"), ("files", "y"), ("prompt", "z")]
    assert _nested(pairs) == {
        "video": {"id": "v"}, "say": ["one", "two"], "files": ["x", "y"], "prompt": "z",
        "lora": [{"name": "a", "scale": "1"}, {"name": "b", "scale": "2"}]}
    mixed = [("lora[]", "style:0.8"), ("lora[][name]", "a"), ("lora[][scale]", "2")]
    assert _nested(mixed) == {"lora": ["style:0.8", {"name": "a", "scale": "2"}]}
    one_by_one = [pairs[index] for index in (1, 3, 2, 4)]
    assert _nested(one_by_one) == {"lora": _nested(pairs)["lora"]}
    for wrong, told in (
        ([("lora[][name]", "a"), ("lora[][name]", "b"), ("lora[][scale]", "2")], "the same"),
        ([("say[][]", "0"), ("say[][]", "hello")], "as JSON"),
        ([("a", "1"), ("a", "2")], "twice"), ([("a", "1"), ("a[]", "2")], "twice"),
        ([("a[b]", "1"), ("a[b]", "2")], "twice"), ([("a[]", "1"), ("a[b]", "2")], "twice"),
        ([("a[]", "1"), ("a", "2")], "twice"), ([("[]", "1")], "isn't a field's name"),
    ):
        with pytest.raises(ApiError, match=told):
            _nested(wrong)


def test_requests_are_equal_by_their_content():
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})


def test_logs_are_json_lines_without_secrets():
    record = logging.LogRecord("vidgen", logging.INFO, "x.py", 1, "made %s", ("it",), None)
    record.job = "video_1"
    line = json.loads(JsonFormatter().format(record))
    assert (line["text"], line["job"], line["level"]) == ("made it", "video_1", "info")


def test_settings_out_of_range(tmp_path):
    for wrong in ({"port": 70_000}, {"keep_hours": 0.0}, {"key_quota_gb": 0},
                  {"loras": Path("nowhere")}):
        with pytest.raises(InputError):
            Settings(data=tmp_path, **wrong)


def test_every_field_that_may_be_left_out_may_be_null():
    for body in (VideoRequest, EditRequest, RemixRequest, ExtraParams):
        schema = body.model_json_schema()
        for name in schema["properties"].keys() - set(schema.get("required", ())):
            assert '"null"' in json.dumps(schema["properties"][name]), name
