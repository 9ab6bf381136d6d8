"""Marks in every format: written by default, read back, the same for the same request."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vidgen.core.errors import InputError
from vidgen.media.clip import Clip
from vidgen.media.manifest import read_marks
from vidgen.media.probe import read_recipe
from vidgen.media.provenance import GENERATED, Marks, marks_of, stamped, xmp
from vidgen.media.types import ClipInfo
from vidgen.media.write import write_clip

SUFFIXES = [".mp4", ".mov", ".webm", ".mkv", ".gif", ".webp", ".apng", ".png", ".jpg", "/"]
RECIPE = {
    "vidgen": "9.8.7", "model": {"name": 'tiny "<&>" é'}, "plan": {"seed": 7},
    "aigc": "ACME & 匠",
    "inputs": [
        {"option": "image", "path": "in/cat <1>.png", "sha256": "ab",
         "marks": {"id": "urn:x:1", "digital_source_type": "http://example.org/photo"}},
        {"option": "reference", "shape": [1, 2, 3], "sha256": "cd"},
    ],
}
EPOCH = 1_790_000_000


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("SOURCE_DATE_EPOCH", "VIDGEN_C2PA_CERTIFICATE", "VIDGEN_C2PA_KEY",
                 "VIDGEN_C2PA_TIME_STAMP", "VIDGEN_C2PA_TRUST"):
        monkeypatch.delenv(name, raising=False)


def write(path: Path | str, recipe=None, num_frames=3, **options) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 6, 8, 3), dtype=np.uint8)
    frames = pixels.repeat(8, 1).repeat(8, 2)[:num_frames]
    num_frames = 1 if str(path).endswith((".png", ".jpg")) else num_frames
    info = ClipInfo(Fraction(12), (64, 48), num_frames, recipe=recipe)
    return write_clip(path, [frames[:num_frames]], info, **options)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_format_says_what_made_it(tmp_path, suffix):
    recipe = stamped(RECIPE)
    path = write(f"{tmp_path}/clip{suffix}", recipe)
    marks = read_marks(path)
    assert marks.digital_source_type == GENERATED
    assert (marks.generator, marks.model) == ("vidgen 9.8.7", 'tiny "<&>" é')
    assert (marks.time, marks.id) == (recipe["created"], recipe["id"])
    assert marks.aigc == {
        "Label": "1", "ContentProducer": "ACME & 匠", "ProduceID": recipe["id"],
        "ReservedCode1": "", "ContentPropagator": "", "PropagateID": "", "ReservedCode2": "",
    }
    assert marks.c2pa == "absent"
    found = read_recipe(path)
    assert found is not None
    assert found | recipe == found
    if suffix not in (".webm", ".mkv"):  # their tags hold no lists
        assert marks.ingredients == (
            {"title": "cat <1>.png", "id": "urn:x:1",
             "digital_source_type": "http://example.org/photo"},
            {"title": "reference", "id": "sha256:cd"},
        )


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_no_model_made_carries_no_marks(tmp_path, suffix):
    assert read_marks(write(f"{tmp_path}/clip{suffix}")).facts() == {}


@pytest.mark.parametrize("suffix", SUFFIXES[:7])
def test_marks_leave_the_frames_as_they_are(tmp_path, suffix):
    marked, plain = (
        Clip.from_file(write(f"{tmp_path}/{name}{suffix}", recipe)).frames
        for name, recipe in (("marked", RECIPE), ("plain", None))
    )
    assert np.array_equal(marked, plain)


@pytest.mark.parametrize("suffix", SUFFIXES[:-1])
def test_with_a_given_time_the_same_recipe_gives_the_same_file(tmp_path, suffix, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", str(EPOCH))
    first, second = (write(tmp_path / f"{n}{suffix}", RECIPE).read_bytes() for n in "ab")
    assert first == second
    assert read_marks(tmp_path / f"a{suffix}").time == "2026-09-21T14:13:20Z"


def test_ids_are_unique_and_follow_from_the_recipe_where_time_is_given(monkeypatch):
    before = datetime.now(UTC).replace(microsecond=0)
    first, second = stamped(RECIPE), stamped(RECIPE)
    assert before <= datetime.fromisoformat(first["created"]) <= datetime.now(UTC)
    assert first["id"] != second["id"]
    monkeypatch.setenv("SOURCE_DATE_EPOCH", str(EPOCH))
    assert stamped(RECIPE) == stamped(dict(reversed(RECIPE.items())))
    ids = {stamped(RECIPE | {"plan": {"seed": seed}})["id"] for seed in range(20)}
    assert len(ids) == 20
    assert all(re.fullmatch(r"urn:uuid:[0-9a-f-]{36}", each) for each in ids)


def test_a_stamp_stays_and_is_handed_on():
    first = stamped(RECIPE)
    assert stamped(first) == first
    assert stamped(first, earlier=stamped(RECIPE)) == first
    assert stamped(RECIPE, earlier=first) == first
    assert stamped(RECIPE, earlier={"plan": 1})["id"] != first["id"]


@pytest.mark.parametrize("epoch", ["soon", "", "1e9", "99999999999999999"])
def test_a_time_that_is_none_is_refused(monkeypatch, epoch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", epoch)
    with pytest.raises(InputError, match="SOURCE_DATE_EPOCH"):
        stamped(RECIPE)


def boxes(data: bytes) -> list[bytes]:
    kinds, place = [], 0
    while place < len(data):
        kinds.append(data[place + 4 : place + 8])
        place += int.from_bytes(data[place : place + 4], "big")
    return kinds


def test_packets_lie_where_other_readers_look(tmp_path):
    recipe = stamped(RECIPE)
    packet = xmp(marks_of(recipe)).encode()
    film = write(tmp_path / "a.mp4", recipe).read_bytes()
    assert boxes(film) == [b"ftyp", b"moov", b"free", b"mdat", b"uuid"]
    assert film.endswith(bytes.fromhex("be7acfcb97a942e89c71999491e3afac") + packet)
    jpeg = write(tmp_path / "a.jpg", recipe).read_bytes()
    head = b"http://ns.adobe.com/xap/1.0/\0" + packet
    assert jpeg[2:].startswith(b"\xff\xe1" + (len(head) + 2).to_bytes(2, "big") + head)
    png = write(tmp_path / "a.png", recipe).read_bytes()
    assert 0 < png.find(b"iTXtXML:com.adobe.xmp\0\0\0\0\0" + packet) < png.find(b"IDAT")
    gif = write(tmp_path / "a.gif", recipe).read_bytes()
    tail = bytes([1, *range(255, -1, -1), 0])
    assert gif.endswith(b"!\xff\x0bXMP DataXMP" + packet + tail + b";")
    for name in ("a.jpg", "a.png", "a.gif"):
        with Image.open(tmp_path / name) as image:
            image.load()
    with Image.open(write(tmp_path / "a.webp", recipe)) as image:
        assert image.info["xmp"] == packet


FOREIGN = """<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF
 xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#" xmlns:xmp="http://ns.adobe.com/xap/1.0/"
 xmlns:e="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
 xmlns:mm="http://ns.adobe.com/xap/1.0/mm/" xmlns:r="http://ns.adobe.com/xap/1.0/sType/ResourceRef#">
 <rdf:Description rdf:about="" xmp:CreatorTool="Lens 2"/>
 <rdf:Description rdf:about=""><e:DigitalSourceType rdf:resource="http://example.org/drawn"/>
 <e:AISystemUsed><rdf:Alt><rdf:li xml:lang="x-default">Other</rdf:li></rdf:Alt></e:AISystemUsed>
 <mm:Ingredients><rdf:Bag><rdf:li><rdf:Description r:filePath="a.png" r:documentID="x:1"/></rdf:li>
 </rdf:Bag></mm:Ingredients></rdf:Description></rdf:RDF></x:xmpmeta>"""


def picture_with(path: Path, packet: str) -> Path:
    Image.new("RGB", (16, 16)).save(path, xmp=packet.encode())
    return path


def test_other_programs_ways_to_write_xmp_are_read(tmp_path):
    marks = read_marks(picture_with(tmp_path / "a.webp", FOREIGN))
    assert marks.facts() == {
        "generator": "Lens 2", "digital_source_type": "http://example.org/drawn",
        "model": "Other", "c2pa": "absent", "ingredients": ({"title": "a.png", "id": "x:1"},),
    }


@pytest.mark.parametrize(
    "packet",
    ["", "<x:xmpmeta", FOREIGN[:-30], "\0" * 50,
     '<!DOCTYPE a [<!ENTITY b "c">]>' + FOREIGN.replace("Lens 2", "&b;")],
)
def test_a_packet_that_cannot_be_read_says_nothing(tmp_path, packet):
    marks = read_marks(picture_with(tmp_path / "a.webp", packet))
    assert marks == Marks() or "DOCTYPE" in packet
    assert marks.generator in (None, "Lens 2")


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".gif", ".webp", ".png", ".jpg"])
def test_damaged_files_give_marks_or_none_but_no_traceback(tmp_path, suffix):
    data = write(tmp_path / f"a{suffix}", RECIPE).read_bytes()
    broken, random = tmp_path / f"b{suffix}", np.random.default_rng(0)
    for _ in range(60):
        changed = np.frombuffer(data, np.uint8).copy()
        changed[random.integers(0, len(data), 20)] = random.integers(0, 256, 20)
        broken.write_bytes(changed[: random.integers(1, 2 * len(data))].tobytes())
        assert isinstance(read_marks(broken), Marks)


@pytest.mark.parametrize("content", [b"", b"x", b"no media at all, only text", b"\0" * 100])
def test_any_other_file_has_no_marks(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    assert read_marks(tmp_path / "a") == Marks()


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="can't be read"):
        read_marks(tmp_path / "none.mp4")


@pytest.mark.parametrize(
    "recipe",
    [{"model": "x"}, {"inputs": ["x"], "request": [1]}, {"created": 5, "id": None},
     {"inputs": [{"path": "p"}], "model": None}],
)
def test_recipes_that_others_wrote_do_no_harm(tmp_path, recipe):
    marks = read_marks(write(tmp_path / "a.mp4", recipe))
    assert marks.digital_source_type == GENERATED
    assert json.loads(json.dumps(marks.facts()))
