"""Tensors where they lie: single files, shards and published `.pth`; what is broken is named."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from train.toybox.model_files import in_int8
from vidgen.core.errors import ModelError
from vidgen.weights.store import find_files, open_tensors
from vidgen.weights.tensors import Tensors, Weights

TENSORS = {
    "a.weight": torch.arange(12.0).reshape(3, 4).bfloat16(),
    "b": torch.tensor([1.5, -2.0]),
    "c.bias": torch.randn(5).half(),
    "count": torch.tensor(7),
}


def shard(folder: Path) -> Path:
    names = list(TENSORS)
    halves = {"m-1-of-2.safetensors": names[:2], "m-2-of-2.safetensors": names[2:]}
    for file, inside in halves.items():
        save_file({name: TENSORS[name] for name in inside}, folder / file)
    weight_map = {name: file for file, inside in halves.items() for name in inside}
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def single(folder: Path, name: str = "model.safetensors") -> Path:
    save_file(TENSORS, folder / name)
    return folder / name


def published(folder: Path) -> Path:
    torch.save(TENSORS, folder / "weights.pth")
    return folder / "weights.pth"


@pytest.mark.parametrize("layout", ["single", "shards", "pth"])
def test_every_layout_gives_the_same_tensors(tmp_path, layout):
    if layout == "pth":
        files = (published(tmp_path),)
    else:
        single(tmp_path) if layout == "single" else shard(tmp_path)
        files = find_files(tmp_path)
    stored = open_tensors(files)
    assert stored.keys() == TENSORS.keys()
    assert stored.num_bytes == sum(tensor.nbytes for tensor in TENSORS.values())
    for _ in range(2):  # before and after the files were closed
        for name, tensor in TENSORS.items():
            like, value = stored[name].likeness, stored[name].get()
            assert like.is_meta
            assert like.shape == tensor.shape
            assert like.dtype == tensor.dtype == value.dtype
            assert torch.equal(value, tensor)
        stored.release()


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_nothing_is_read_before_it_is_used(tmp_path, suffix):
    """Opening, shapes and one small tensor of a 200 MB file bring in less than 1 MB of it."""
    tensors = {"large": torch.zeros(50_000_000), "small": torch.ones(1000)}
    path = tmp_path / f"model.{suffix}"
    save_file(tensors, path) if suffix == "safetensors" else torch.save(tensors, path)
    del tensors
    stored = open_tensors([path])
    before = mapped_bytes(path)
    assert stored["large"].likeness.shape == (50_000_000,)
    assert stored["small"].get().sum() == 1000
    large = stored["large"].get()
    assert mapped_bytes(path) - before < 1e6
    large.sum()
    assert mapped_bytes(path) > 200e6
    del large
    stored.release()
    assert mapped_bytes(path) == 0


def mapped_bytes(path: Path) -> int:
    """Bytes of a file that lie in this process' memory."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            total += 1024 * int(line.split()[1])
    return total


def test_a_matrix_in_int8_is_one_of_bfloat16(tmp_path):
    """Off by half of a 127th of its row's largest number at most; smaller ones lie there as are."""
    torch.manual_seed(0)
    rows = torch.tensor([[1e-3], [1.0], [50.0], [0.0]])
    tensors = {"a.weight": torch.randn(4, 64) * rows, "a.bias": torch.randn(256),
               "small": torch.randn(4, 8)}  # fmt: skip
    written = in_int8(tensors, 256)
    assert written["a.weight"].dtype == torch.int8
    save_file(written, tmp_path / "model.safetensors")
    stored = open_tensors(find_files(tmp_path))
    assert stored.keys() == tensors.keys()
    assert stored.num_bytes == 2 * 256 + 4 * (256 + 32)
    made, like = stored["a.weight"].get(), stored["a.weight"].likeness
    assert like.dtype == made.dtype == torch.bfloat16
    assert like.shape == made.shape == (4, 64)
    off = (made.float() - tensors["a.weight"]).square().mean(1).sqrt()
    assert (off <= 0.02 * rows[:, 0]).all()
    assert not stored["a.weight"].is_mapped
    assert stored["a.bias"].is_mapped
    assert torch.equal(stored["small"].get(), tensors["small"])
    for dtype in (torch.bfloat16, torch.float32):  # made anew, so the file isn't its memory
        assert not Weights(Tensors({"w": stored["a.weight"]}), dtype).stay_mapped


def test_a_kernel_in_int8_is_read_by_its_outputs(tmp_path):
    torch.manual_seed(0)
    kernel = torch.randn(6, 4, 3, 3, 3) * torch.logspace(-3, 2, 6).view(-1, 1, 1, 1, 1)
    tensors = {"weight": kernel, "bias": torch.randn(6)}
    save_file(in_int8(tensors, 256), tmp_path / "model.safetensors")
    stored = open_tensors(find_files(tmp_path))
    made = stored["weight"].get()
    assert stored["weight"].likeness.shape == made.shape == (6, 4, 3, 3, 3)
    off, size = ((each.flatten(1).square().mean(1).sqrt()) for each in (made - kernel, kernel))
    assert (off < 0.02 * size).all()


def test_int8_without_scales_for_its_rows_is_left_as_it_is(tmp_path):
    matrix = torch.ones(3, 4, dtype=torch.int8)
    save_file({"w": matrix, "w_scale": torch.ones(4, 1)}, tmp_path / "model.safetensors")
    stored = open_tensors(find_files(tmp_path))
    assert stored.keys() == {"w", "w_scale"}
    assert torch.equal(stored["w"].get(), matrix)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "diffusion_pytorch_model.safetensors", "other.safetensors"]
)
def test_a_single_file_is_found_by_any_usual_name(tmp_path, name):
    path = single(tmp_path, name)
    assert find_files(tmp_path) == (path,)


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"has no weights.*copy the whole folder"):
        find_files(tmp_path)


def test_shards_without_an_index_are_refused(tmp_path):
    shard(tmp_path).unlink()
    with pytest.raises(ModelError, match=r"m-1-of-2.*index"):
        find_files(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    shard(tmp_path)
    (tmp_path / "m-2-of-2.safetensors").unlink()
    with pytest.raises(ModelError, match=r"lacks 1 of 2 shards: m-2-of-2\.safetensors; copy"):
        find_files(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_a_broken_index_is_named(tmp_path, text):
    index = shard(tmp_path)
    index.write_text(text)
    with pytest.raises(ModelError, match=r"index\.json can't be read as an index"):
        find_files(tmp_path)


@pytest.mark.parametrize("left", [0, 4, 100, -1])
@pytest.mark.parametrize("layout", ["shards", "pth"])
def test_a_truncated_file_is_named(tmp_path, layout, left):
    if layout == "pth":
        files, victim = (published(tmp_path),), tmp_path / "weights.pth"
    else:
        shard(tmp_path)
        files, victim = find_files(tmp_path), tmp_path / "m-2-of-2.safetensors"
    os.truncate(victim, left if left >= 0 else victim.stat().st_size + left)
    with pytest.raises(ModelError, match=rf"{victim.name} .*copy it again"):
        open_tensors(files)


def test_a_file_that_left_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"model\.safetensors is missing"):
        open_tensors([tmp_path / "model.safetensors"])
    stored = open_tensors([single(tmp_path)])
    stored.release()
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors is missing"):
        stored["b"].get()


def test_a_tensor_in_two_files_is_refused(tmp_path):
    files = single(tmp_path), single(tmp_path, "again.safetensors")
    with pytest.raises(ModelError, match=r"is in model\.safetensors and in again\.safetensors"):
        open_tensors(files)


class Payload:
    """Pickled code: unpickling it would make a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return self.mark.touch, ()


def test_a_pth_is_only_ever_read_as_tensors(tmp_path):
    mark, path = tmp_path / "mark", tmp_path / "weights.pth"
    for content, reason in (
        ({"a": Payload(mark)}, "contains more than tensors"),
        ({"a": 1}, "plain state dict"),
        (torch.ones(2), "plain state dict"),
    ):
        torch.save(content, path)
        with pytest.raises(ModelError, match=reason):
            open_tensors([path])
    assert not mark.exists()
