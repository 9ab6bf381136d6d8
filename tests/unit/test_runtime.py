import hashlib
import resource
import subprocess
import sys

import pytest
import torch

from vidgen.core.errors import InputError, OutputError
from vidgen.core.runtime import (
    LONGEST_NAME,
    atomic_path,
    atomic_write,
    best_dtype,
    check_output,
    choose_device,
    fingerprint,
    sha256_file,
    size_text,
)


def names(folder):
    return [path.name for path in folder.iterdir()]


def test_atomic_write_replaces_whole_files(tmp_path):
    path = tmp_path / "a"
    atomic_write(path, b"old")
    atomic_write(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["a"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a"
    atomic_write(path, b"old")

    def fail(file):
        file.write(b"half")
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        atomic_write(path, fail)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with atomic_path(tmp_path / "out") as folder:
        folder.mkdir()
        (folder / "x").write_text("1")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "x").read_text() == "1"

    def fail():
        with atomic_path(tmp_path / "out") as folder:
            folder.mkdir()
            (folder / "none" / "y").touch()

    with pytest.raises(OutputError, match="No such file"):
        fail()
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["x"]


KILLED = """
import ctypes, os, signal, sys
from pathlib import Path
from vidgen.core.runtime import atomic_path

class Old:
    pass

left, folder, exchanges = [0], Path(sys.argv[1]), sys.argv[2] == "True"

def hear(event, _arguments):
    if event.startswith(("os.", "shutil.", "open", "ctypes.dlsym")):
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

def write():
    if not exchanges:
        ctypes.CDLL = lambda _name: Old()
    with atomic_path(folder / "out") as new:
        (new / "sub").mkdir(parents=True)
        for name in ("a", "sub/b"):
            (new / name).write_text("new")

for moment in range(1, 1000):
    place = folder / "out"
    (place / "sub").mkdir(parents=True)
    for name in ("a", "sub/b"):
        (place / name).write_text("old")
    if not (child := os.fork()):
        left[0] = moment
        sys.addaudithook(hear)
        write()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    wholes = {p.name: [(p / n).read_text() for n in ("a", "sub/b") if (p / n).is_file()]
              for p in folder.iterdir()}
    assert any(set(w) in ({"old"}, {"new"}) and len(w) == 2 for w in wholes.values()), wholes
    if exchanges or not status:
        assert wholes["out"] in (["old"] * 2, ["new"] * 2), wholes
    if not status:
        assert wholes == {"out": ["new"] * 2}
        break
    for path in folder.iterdir():
        path.rename(folder.with_name(f"{moment}{path.name}"))
print(moment)
"""


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_folder_that_is_replaced_is_whole_at_any_moment(tmp_path, exchanges):
    folder = tmp_path / "place"
    folder.mkdir()
    told = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(exchanges)],
                          capture_output=True, text=True, timeout=60, check=False)
    assert told.returncode == 0, told.stderr
    assert int(told.stdout) > 10


def test_an_existing_output_is_refused_without_overwrite(tmp_path):
    path = tmp_path / "a.mp4"
    check_output(path)
    path.touch()
    with pytest.raises(OutputError, match="exists; give --overwrite"):
        check_output(path)
    check_output(path, overwrite=True)
    assert names(tmp_path) == ["a.mp4"]


@pytest.mark.parametrize("place", ["none/a.mp4", "/proc/a.mp4"])
def test_a_place_that_cannot_be_written_is_refused(tmp_path, place):
    with pytest.raises(OutputError, match="can't be written"):
        check_output(tmp_path / place)
    assert names(tmp_path) == []


def test_a_name_leaves_room_for_what_is_not_finished(tmp_path):
    longest = f"{'n' * (LONGEST_NAME - 4)}.mp4"
    check_output(tmp_path / longest)
    with atomic_path(tmp_path / longest) as place:
        place.touch()
    with pytest.raises(OutputError, match="has 241 bytes; shorten it to 240"):
        check_output(tmp_path / f"n{longest}")


def test_a_folder_with_other_things_is_never_replaced(tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").touch()
    with pytest.raises(OutputError, match="other files"):
        check_output(tmp_path / "work", overwrite=True)


def test_lack_of_space_is_found_before_the_work(tmp_path):
    with pytest.raises(OutputError, match=r"may need .* GB, but only .* [MG]B are free"):
        check_output(tmp_path / "a.mp4", num_bytes=10**18)


def test_a_full_disk_says_what_was_written_and_what_is_free(tmp_path):
    program = (
        "import resource, sys; from vidgen.core.runtime import atomic_write\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, {resource.RLIM_INFINITY}))\n"
        "atomic_write(sys.argv[1], bytes(2 << 20))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "a.bin")],
        capture_output=True, text=True, check=False,
    )
    assert "OutputError: no space left for" in done.stderr
    assert "1.0 MB written" in done.stderr
    assert names(tmp_path) == []


def test_hash_and_sizes(tmp_path):
    (tmp_path / "a").write_bytes(b"abc" * 1000)
    assert sha256_file(tmp_path / "a") == hashlib.sha256(b"abc" * 1000).hexdigest()
    assert size_text(1_250_000) == "1.2 MB"
    assert size_text(999) == "999 bytes"


def test_devices_are_checked_by_name():
    assert choose_device("cpu").type == "cpu"
    with pytest.raises(InputError, match="unknown device 'gpu'"):
        choose_device("gpu")
    with pytest.raises(InputError, match="doesn't exist"):
        choose_device("cuda:99")


@pytest.mark.parametrize(
    ("machine", "avx512_bf16", "amx", "best"),
    [("x86_64", True, False, "bf16"), ("AMD64", False, True, "bf16"),
     ("x86_64", False, False, "fp32"), ("aarch64", False, False, "bf16")],
)
def test_bf16_is_for_processors_that_multiply_in_it(monkeypatch, machine, avx512_bf16, amx, best):
    """oneDNN takes bf16 on AVX512 alone, too, and imitates it at a fifth of float32's speed."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert best_dtype(torch.device("cpu")) == best
    assert best_dtype(torch.device("cuda")) == "bf16"


def test_the_fingerprint_names_what_bits_depend_on():
    print_ = fingerprint()
    assert {"vidgen", "torch", "libavcodec", "cpu", "threads"} <= print_.keys()
    assert all(value for key, value in print_.items() if key != "gpu")
