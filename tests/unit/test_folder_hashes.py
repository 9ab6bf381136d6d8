"""Hashes of files are remembered, and never believed when the file is another one."""

import json
import os
from pathlib import Path

import pytest

from tests.models import build_tiny_model
from vidgen.core.errors import ModelError
from vidgen.weights import folder
from vidgen.weights.folder import Files
from vidgen.weights.layouts import open_model

OLD = 1_700_000_000 * 10**9


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "vidgen" / "hashes.json"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are really read."""
    seen: list[Path] = []
    real = folder.sha256_file
    monkeypatch.setattr(folder, "sha256_file", lambda path: seen.append(path) or real(path))
    return seen


def write(path: Path, content: bytes, time_ns: int = OLD) -> Path:
    path.write_bytes(content)
    os.utime(path, ns=(time_ns, time_ns))
    return path


def test_a_name_that_is_not_utf8_is_remembered(read, tmp_path) -> None:
    path = write(tmp_path / os.fsdecode(b"weights-\xff"), b"x" * folder.MIN_BYTES)
    assert folder.hash_files([path]) == folder.hash_files([path])
    assert len(read) == 1


def test_a_file_is_read_once_and_again_when_size_or_time_change(read, tmp_path) -> None:
    path = write(tmp_path / "weights", b"x" * folder.MIN_BYTES)
    first = folder.hash_files([path])
    assert folder.hash_files([path]) == first
    assert read == [path]
    write(path, b"y" * folder.MIN_BYTES, OLD + 1)
    changed = folder.hash_files([path])
    assert changed != first
    write(path, b"y" * (folder.MIN_BYTES + 1), OLD + 1)
    assert folder.hash_files([path]) != changed
    assert len(read) == 3


def test_the_same_file_under_another_path_is_read_there(read, tmp_path) -> None:
    path = write(tmp_path / "weights", b"x" * folder.MIN_BYTES)
    link = tmp_path / "link"
    link.symlink_to(path)
    assert folder.hash_files([path])[path] == folder.hash_files([link])[link]
    assert len(read) == 1  # a link is the file
    other = write(tmp_path / "other", b"z" * folder.MIN_BYTES)
    assert folder.hash_files([other])[other] != folder.hash_files([path])[path]


def test_small_and_fresh_files_are_always_read(read, tmp_path) -> None:
    small = write(tmp_path / "small", b"x")
    fresh = tmp_path / "fresh"
    fresh.write_bytes(b"x" * folder.MIN_BYTES)  # may change again within its time stamp's grain
    for _ in range(2):
        folder.hash_files([small, fresh])
    assert read == [small, fresh, small, fresh]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"/x": 3}', b"null"])
def test_a_broken_cache_is_ignored_and_mended(cache, read, tmp_path, content) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_bytes(content)
    path = write(tmp_path / "weights", b"x" * folder.MIN_BYTES)
    for _ in range(2):
        folder.hash_files([path])
    assert read == [path]
    assert list(json.loads(cache.read_text())) == [str(path)]


def test_a_lying_entry_is_not_believed(cache, tmp_path) -> None:
    path = write(tmp_path / "weights", b"x" * folder.MIN_BYTES)
    cache.parent.mkdir(parents=True)
    cache.write_text(json.dumps({str(path): [folder.MIN_BYTES, OLD, 7]}))
    assert len(folder.hash_files([path])[path]) == 64


def test_an_unwritable_cache_does_no_harm(tmp_path, monkeypatch, read) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    path = write(tmp_path / "weights", b"x" * folder.MIN_BYTES)
    assert folder.hash_files([path]) == folder.hash_files([path])
    assert len(read) == 2


def test_entries_of_files_that_are_gone_are_dropped(cache, tmp_path) -> None:
    old = write(tmp_path / "old", b"x" * folder.MIN_BYTES)
    folder.hash_files([old])
    old.unlink()
    new = write(tmp_path / "new", b"x" * folder.MIN_BYTES)
    folder.hash_files([new])
    assert list(json.loads(cache.read_text())) == [str(new)]


def test_a_content_hash_distinguishes_names_and_contents(tmp_path) -> None:
    (tmp_path / "a").write_text("1")
    (tmp_path / "b").write_text("2")
    both = Files(tmp_path, {"a": "", "b": ""}).content_hash
    assert both == Files(tmp_path, {"b": "", "a": ""}).content_hash
    assert both != Files(tmp_path, {"a": ""}).content_hash
    (tmp_path / "a").write_text("2")
    (tmp_path / "b").write_text("1")
    assert both != Files(tmp_path, {"a": "", "b": ""}).content_hash


def test_a_card_is_no_part_of_the_model(tmp_path) -> None:
    (tmp_path / "weights").write_text("1")
    (tmp_path / "README.md").write_text("a card")
    files = {"weights": "", "README.md": "0" * 64}
    before = Files(tmp_path, files).content_hash
    (tmp_path / "README.md").write_text("a better card")
    assert Files(tmp_path, files).content_hash == before


def test_a_wrong_hash_names_the_file_and_the_remedy(tmp_path) -> None:
    folder = build_tiny_model(tmp_path / "model")
    assert len(open_model(str(folder)).content_hash) == 64
    path = folder / "transformer" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 64
    path.write_bytes(data)
    with pytest.raises(ModelError, match=r"transformer/model\.safetensors is damaged.*copy it"):
        assert open_model(str(folder)).content_hash
