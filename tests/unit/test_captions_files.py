"""Captions as people write them, next to files and in tables."""

from __future__ import annotations

import csv
import json

import pytest

from vidgen.core.errors import InputError
from vidgen.training.config import DataConfig, FolderConfig
from vidgen.training.data.files import Unreadable, scan, sidecar, table


@pytest.mark.parametrize(
    ("text", "encoding", "given"),
    [
        ("un été à Paris, déjà vu", "utf-8", "auto"), ("a red car", "utf-8-sig", "auto"),
        ("une voiture à Nîmes", "utf-16", "auto"), ("猫", "shift_jis", "shift_jis"),
    ],
)
def test_captions_are_read_by_their_mark_or_a_given_encoding(tmp_path, text, encoding, given):
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode(encoding))
    assert sidecar(path, given) == (text,)


@pytest.mark.parametrize(
    ("content", "given", "message"),
    [
        ("un été".encode("cp1252"), "auto", "is not text in utf-8: .*; save it as UTF-8, or set "),
        (b"\xff\xfea", "auto", "is not text in utf-16: .*; save it as UTF-8, or set data.caption"),
        ("é".encode(), "ascii", "is not text in ascii"),
        ("a car".encode("utf-16-le"), "auto", "has zero bytes.*save it as UTF-8"),
        ("a car".encode("utf-32"), "auto", "has zero bytes.*save it as UTF-8"),
        (bytes(11_000_000), "auto", "over 10 MB"),
    ],
)
def test_text_that_cannot_be_read_is_reported_with_the_remedy(tmp_path, content, given, message):
    path = tmp_path / "x.txt"
    path.write_bytes(content)
    with pytest.raises(Unreadable, match=message):
        sidecar(path, given)


def test_an_unknown_encoding_is_refused():
    with pytest.raises(InputError, match="caption_encoding is 'shiftjiss'"):
        DataConfig(folders=(FolderConfig("x"),), caption_encoding="shiftjiss")


@pytest.mark.parametrize(
    ("row", "captions"),
    [
        ({"text": "a car"}, ("a car",)), ({"caption": "a", "text": "b"}, ("a",)),
        ({"caption": ["a  car\n", "a car", "the car", ""]}, ("a car", "the car")),
        ({"title": "x"}, ()), ({"caption": ""}, ()),
    ],
)
def test_captions_of_a_row(tmp_path, row, captions):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"file": "a.mp4", **row}))
    assert table(path)[0] == {"a.mp4": captions}


@pytest.mark.parametrize(
    ("line", "message"),
    [("{", "line 1 is not valid JSON"), ("[1]", "line 1 is not a JSON object"),
     ('{"file": "a.mp4", "text": 3}', "line 1 has a caption that is not text"),
     (r'{"file": "a.mp4", "text": "\ud83d"}', "half of a character"),
     ("[" * 100_000, "is not valid JSON")],
)
def test_lines_without_a_caption_are_reported(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text(line)
    with pytest.raises(Unreadable, match=message):
        table(path)


def test_tables(tmp_path):
    lines = tmp_path / "metadata.jsonl"
    lines.write_text('{"file_name": "a.mp4", "text": "a"}\n\n{"file_name": "./b.mp4", '
                     '"text": ["b", "c"]}\n{"file_name": "a.mp4", "text": "again"}\n{"text": "x"}')
    found, notes = table(lines)
    assert found == {
        "a.mp4": ("a", "again"), "b.mp4": ("b", "c")}
    assert len(notes) == 2
    sheet = tmp_path / "list.csv"
    sheet.write_bytes('Video;Caption;Rating\r\nsub\\a.mp4;"a car; été";5\r\n'.encode())
    assert table(sheet) == ({"sub/a.mp4": ("a car; été",)}, [])
    sheet.write_text("day,sales\n1,2\n")
    assert table(sheet) is None


@pytest.mark.parametrize("sign", [",", ";", "\t"])
def test_a_csv_keeps_every_caption_whole(tmp_path, sign):
    captions = ["it's a car, 'red'; fast", 'a "big" cat', "a\tb, c; d", "don't, can't", '"', "x"]
    sheet = tmp_path / "list.csv"
    with sheet.open("w", newline="") as file:
        writer = csv.writer(file, delimiter=sign)
        writer.writerow(["File", "Caption"])
        writer.writerows([f"{n}.mp4", text] for n, text in enumerate(captions))
    found, notes = table(sheet)
    assert list(found.values()) == [
        (" ".join(text.split()),) for text in captions]
    assert not notes


def test_what_a_csv_has_no_column_for_is_reported(tmp_path):
    sheet = tmp_path / "list.csv"
    sheet.write_text("file,caption\na.mp4,a car,\nb.mp4,a cat, red\n")
    with pytest.raises(Unreadable, match=r"line 3 has more values than .* double quotes"):
        table(sheet)
    sheet.write_text('file,caption\na.mp4,"a car\nb.mp4,a cat\n')
    with pytest.raises(Unreadable, match="is not valid CSV"):
        table(sheet)
    sheet.write_text("day,sales\n1,2,3\n")
    assert table(sheet) is None
    sheet.write_text("file,title,rating\na.mp4,a car,5\n,a cat,4\n")
    _, notes = table(sheet)
    assert notes[0] == "list.csv, line 3, has an empty file"
    assert "its columns are file, title, rating; captions are in caption, text, prompt" in notes[1]


def test_only_ends_of_lines_part_rows(tmp_path):
    """Other signs that Python would part lines at stand within captions at times."""
    lines, sheet = tmp_path / "a.jsonl", tmp_path / "a.csv"
    lines.write_bytes('{"file": "a.mp4", "text": "one\u2028two"}\r\n'
                      '{"file": "b.mp4", "text": "three\x85"}\n'.encode())
    sheet.write_bytes("file,text\r\na.mp4,one\u2028two\r\nb.mp4,three\x85\r\n".encode())
    for path in (lines, sheet):
        found, notes = table(path)
        assert found == {
            "a.mp4": ("one two",), "b.mp4": ("three",)}
        assert not notes


def test_a_folder_is_searched_and_what_is_odd_is_reported(tmp_path):
    root = tmp_path / "data"
    (root / "sub" / ".hidden").mkdir(parents=True)
    for name in ("a.mp4", "B.MOV", "sub/c.png", "sub/.d.mp4", "sub/.hidden/e.mp4", "f.webm"):
        (root / name).write_bytes(b"x")
    (root / "loop").symlink_to(root)
    (root / "gone.mp4").symlink_to(root / "nowhere.mp4")
    (root / "a.txt").write_text("beside")
    (root / "b.TXT").write_text("another case")
    (root / "sub/c.png.txt").write_text("by its whole name")
    (root / "f.txt").write_text("  \n")
    (root / "notes.pdf").write_bytes(b"x")
    (root / "list.csv").write_text("file,caption\na.mp4,in the table\nlost.mp4,x\n")
    files, notes = scan(DataConfig(folders=(FolderConfig(str(root)),)))
    told = {file.name: file for file in files}
    assert {name: file.captions for name, file in told.items()} == {
        "a.mp4": ("in the table",), "B.MOV": ("another case",), "f.webm": (), "gone.mp4": (),
        "sub/c.png": ("by its whole name",)}
    assert told["f.webm"].notes == ["f.txt is empty"]
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
