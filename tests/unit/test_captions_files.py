"""Captions as people write them: any encoding, beside files and in tables."""

from __future__ import annotations

import csv
import json

import pytest

from vidgen.core.errors import InputError
from vidgen.training.data.config import DataConfig, FolderConfig
from vidgen.training.data.files import Unreadable, decode, scan, sidecar, table


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("un été à Paris, déjà vu", "utf-8"), ("a red car", "utf-8-sig"),
        ("une voiture à Nîmes", "utf-16"), ("赤い車", "utf-32"), ("a red car", "utf-16-le"),
        ("a red car", "utf-16-be"), ("un été à Paris, déjà vu, garçon", "cp1252"),
        ("красная машина едет по пустыне ночью", "cp1251"),
        ("一辆红色的汽车在沙漠中行驶", "gb18030"),
        ("Młody chłopiec biegnie przez łąkę, żółty ptak śpiewa", "cp1250"),
    ],
)
def test_captions_in_any_encoding_are_read(text, encoding):
    found, note = decode(text.encode(encoding))
    assert found == text
    marked = encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32")
    assert (note is None) == marked, "what is guessed is told"


def test_a_given_encoding_is_kept_to():
    assert decode("猫".encode("shift_jis"), "shift_jis") == ("猫", None)
    with pytest.raises(Unreadable, match="is not text in ascii"):
        decode("é".encode(), "ascii")
    with pytest.raises(InputError, match="caption_encoding is 'shiftjiss'"):
        DataConfig(folders=(FolderConfig("x"),), caption_encoding="shiftjiss")


def test_damaged_text_is_told(tmp_path):
    with pytest.raises(Unreadable, match="damaged utf-16"):
        decode(b"\xff\xfea")
    big = tmp_path / "x.txt"
    with big.open("wb") as file:
        file.truncate(11_000_000)
    with pytest.raises(Unreadable, match="over 10 MB"):
        sidecar(big, "auto")


@pytest.mark.parametrize(
    ("content", "captions"),
    [
        ({"text": "a car"}, ("a car",)), ({"caption": "a", "text": "b"}, ("a",)),
        ({"caption": ["a  car\n", "a car", "the car", ""]}, ("a car", "the car")),
        ("just text", ("just text",)), (["one", "two"], ("one", "two")),
    ],
)
def test_json_beside_a_file(tmp_path, content, captions):
    path = tmp_path / "clip.json"
    path.write_text(json.dumps(content))
    assert sidecar(path, "auto")[0] == captions


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "is not valid JSON"), ('{"title": "x"}', "none of the keys caption, text, prompt, desc"),
     ('{"text": 3}', "a caption that is not text"), (r'{"text": "\ud83d"}', "half of a character"),
     ("[" * 100_000, "is not valid JSON")],
)
def test_json_without_a_caption_is_told(tmp_path, content, message):
    path = tmp_path / "clip.json"
    path.write_text(content)
    with pytest.raises(Unreadable, match=message):
        sidecar(path, "auto")


def test_tables(tmp_path):
    lines = tmp_path / "metadata.jsonl"
    lines.write_text('{"file_name": "a.mp4", "text": "a"}\n\n{"file_name": "./b.mp4", '
                     '"text": ["b", "c"]}\n{"file_name": "a.mp4", "text": "again"}\n{"text": "x"}')
    found, notes = table(lines, "auto")
    assert found == {
        "a.mp4": ("a", "again"), "b.mp4": ("b", "c")}
    assert len(notes) == 2
    sheet = tmp_path / "list.csv"
    sheet.write_bytes('Video;Caption;Rating\r\nsub\\a.mp4;"a car; été";5\r\n'.encode("cp1252"))
    found, notes = table(sheet, "auto")
    assert found == {"sub/a.mp4": ("a car; été",)}
    assert "guess" in notes[0]
    sheet.write_text("day,sales\n1,2\n")
    assert table(sheet, "auto") is None


@pytest.mark.parametrize("sign", [",", ";", "\t"])
def test_a_csv_keeps_every_caption_whole(tmp_path, sign):
    captions = ["it's a car, 'red'; fast", 'a "big" cat', "a\tb, c; d", "don't, can't", '"', "x"]
    sheet = tmp_path / "list.csv"
    with sheet.open("w", newline="") as file:
        writer = csv.writer(file, delimiter=sign)
        writer.writerow(["File", "Caption"])
        writer.writerows([f"{n}.mp4", text] for n, text in enumerate(captions))
    found, notes = table(sheet, "auto")
    assert list(found.values()) == [
        (" ".join(text.split()),) for text in captions]
    assert not notes


def test_what_a_csv_has_no_column_for_is_told(tmp_path):
    sheet = tmp_path / "list.csv"
    sheet.write_text("file,caption\na.mp4,a car,\nb.mp4,a cat, red\n")
    with pytest.raises(Unreadable, match=r"line 3 has more values than .* double quotes"):
        table(sheet, "auto")
    sheet.write_text('file,caption\na.mp4,"a car\nb.mp4,a cat\n')
    with pytest.raises(Unreadable, match="is not valid CSV"):
        table(sheet, "auto")
    sheet.write_text("day,sales\n1,2,3\n")
    assert table(sheet, "auto") is None
    sheet.write_text("file,title,rating\na.mp4,a car,5\n,a cat,4\n")
    _, notes = table(sheet, "auto")
    assert notes[0] == "list.csv, line 3, has an empty file"
    assert "its columns are file, title, rating; captions are in caption, text, prompt" in notes[1]


def test_only_ends_of_lines_part_rows(tmp_path):
    """Other signs that Python would part lines at stand within captions at times."""
    lines, sheet = tmp_path / "a.jsonl", tmp_path / "a.csv"
    lines.write_bytes('{"file": "a.mp4", "text": "one\u2028two"}\r\n'
                      '{"file": "b.mp4", "text": "three\x85"}\n'.encode())
    sheet.write_bytes("file,text\r\na.mp4,one\u2028two\r\nb.mp4,three\x85\r\n".encode())
    for path in (lines, sheet):
        found, notes = table(path, "auto")
        assert found == {
            "a.mp4": ("one two",), "b.mp4": ("three",)}
        assert not notes


def test_a_folder_is_searched_and_what_is_odd_is_told(tmp_path):
    root = tmp_path / "data"
    (root / "sub" / ".hidden").mkdir(parents=True)
    for name in ("a.mp4", "B.MOV", "sub/c.png", "sub/.d.mp4", "sub/.hidden/e.mp4", "f.webm"):
        (root / name).write_bytes(b"x")
    (root / "loop").symlink_to(root)
    (root / "gone.mp4").symlink_to(root / "nowhere.mp4")
    (root / "a.txt").write_text("beside")
    (root / "b.TXT").write_text("another case")
    (root / "sub/c.png.json").write_text('{"caption": "by its whole name"}')
    (root / "f.txt").write_text("  \n")
    (root / "notes.pdf").write_bytes(b"x")
    (root / "list.csv").write_text("file,caption\na.mp4,in the table\nlost.mp4,x\n")
    files, notes = scan(DataConfig(folders=(FolderConfig(str(root)),)))
    told = {file.name: file for file in files}
    assert {name: file.captions for name, file in told.items()} == {
        "a.mp4": ("in the table",), "B.MOV": ("another case",), "f.webm": (), "gone.mp4": (),
        "sub/c.png": ("by its whole name",)}
    assert told["f.webm"].notes == ("f.txt is empty",)
    assert "can't be read" in told["gone.mp4"].notes[0]
    assert any("1 .pdf" in note for note in notes)
    assert any("lost.mp4" in note for note in notes)


def test_folders_without_media_and_damaged_tables_are_refused(tmp_path):
    config = DataConfig(folders=(FolderConfig(str(tmp_path)),))
    with pytest.raises(InputError, match="neither videos nor pictures"):
        scan(config)
    (tmp_path / "a.mp4").write_bytes(b"x")
    (tmp_path / "meta.jsonl").write_text(
        r'{"file": "\u0000.mp4", "text": "x"}' + "\n" + r'{"file": "\ud800.mp4", "text": "x"}')
    assert sum("an invalid file name" in note for note in scan(config)[1]) == 2
    (tmp_path / "meta.jsonl").write_text('{"file": "a.mp4"}\n{')
    with pytest.raises(InputError, match=r"meta.jsonl line 2 is not valid JSON.*correct it"):
        scan(config)
    with pytest.raises(InputError, match="is not a folder"):
        scan(DataConfig(folders=(FolderConfig(str(tmp_path / "none")),)))
