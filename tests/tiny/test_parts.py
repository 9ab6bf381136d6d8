"""Networks in memory only while they are needed, and refused before they are read if too large."""

from __future__ import annotations

import gc
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.models import build_tiny_model
from train.toybox.initial import init_dit
from train.toybox.model_files import save_module
from vidgen.core.errors import InputError, ModelError
from vidgen.core.runtime import available_memory
from vidgen.models.dit import SpacetimeDiT
from vidgen.models.presets import DIT_PRESETS
from vidgen.pipeline.loader import EXPERTS, ModelLoader
from vidgen.weights.folder import ModelFolder
from vidgen.weights.layouts import open_model
from vidgen.weights.stream import block_of

CPU = torch.device("cpu")
WIDE = replace(DIT_PRESETS["tiny"], num_layers=6, num_heads=8, ffn_dim=384)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> ModelFolder:
    """A tiny model whose transformer has six larger blocks, with a second expert like it."""
    path = build_tiny_model(tmp_path_factory.mktemp("model") / "tiny")
    dit = SpacetimeDiT(WIDE)
    init_dit(dit)
    save_module(dit.state_dict(), WIDE, path / "transformer", torch.float32)
    found = open_model(str(path))
    parts = dict(found.components)
    parts["transformer_2"] = replace(parts["transformer"], role="transformer_2")
    return replace(found, components=parts)


@pytest.fixture
def live_bytes():
    """Counts the bytes of all tensors in memory that came into being after the test began."""
    gc.collect()
    gc.freeze()  # hides what is there already

    def count() -> int:
        values = [value for value in gc.get_objects() if issubclass(type(value), Tensor)]
        values = [value for value in values if value.device.type == "cpu"]
        packed = sum(value.nbytes for value in values if value.is_mkldnn)  # they have no storage
        places = [value.untyped_storage() for value in values if not value.is_mkldnn]
        return packed + sum({place.data_ptr(): place.nbytes() for place in places}.values())

    yield count
    gc.unfreeze()


def size_of(module: torch.nn.Module) -> int:
    return sum(value.nbytes for value in module.state_dict().values())


def parts_of(folder: ModelFolder, offload: str, dtype=torch.bfloat16, **more) -> ModelLoader:
    return ModelLoader(folder, CPU, dtype, offload, **more)


def test_none_keeps_what_was_used(folder, live_bytes):
    parts, total = parts_of(folder, "none"), 0
    for role in ("text_encoder", "vae", "transformer", "transformer_2"):
        with parts.use(role) as module:
            total += size_of(module)
        assert live_bytes() == total
        with parts.use(role) as again:
            assert again is module
    assert total == parts.needed_bytes()
    parts.close()
    assert live_bytes() == 0


@pytest.mark.parametrize("offload", ["stage", "block"])
def test_each_network_leaves_before_the_next_arrives(folder, live_bytes, offload):
    """Even where a caller still holds the module."""
    parts, held = parts_of(folder, offload), []
    for role in ("text_encoder", "vae", "transformer", "vae", "text_encoder"):
        with parts.use(role) as module:
            held.append(module)
            assert parts.resident == (role,)
            assert 0 < live_bytes() <= 1.05 * parts.needed_bytes(role)
        assert parts.resident == ()
        assert live_bytes() == 0
        assert all(value.is_meta for value in module.state_dict().values())


def test_stage_takes_what_the_largest_takes_and_block_less(folder):
    none, stage, block = (parts_of(folder, offload) for offload in ("none", "stage", "block"))
    sizes = {}
    for role in folder.components:
        with none.use(role) as module:
            sizes[role] = size_of(module)
            if role in EXPERTS:
                blocks = [size_of(part) for part in module.blocks]
                rest = sizes[role] - sum(blocks)
                assert block.needed_bytes(role) == rest + 2 * max(blocks)
    assert none.needed_bytes() == sum(sizes.values())
    assert stage.needed_bytes() == max(sizes.values())
    assert {role: stage.needed_bytes(role) for role in sizes} == sizes
    assert block.needed_bytes("vae") == sizes["vae"]
    assert block.needed_bytes("transformer") < 0.5 * stage.needed_bytes("transformer")


@pytest.mark.parametrize("offload", ["none", "stage", "block"])
def test_experts_are_swapped(folder, live_bytes, offload):
    parts, before = parts_of(folder, offload), {}
    with parts.use("transformer") as first:
        assert parts.expert("transformer") is first
        before["transformer"] = live_bytes()
        second = parts.expert("transformer_2")
        assert parts.expert("transformer_2") is second is not first
        assert parts.resident == (EXPERTS if offload == "none" else EXPERTS[1:])
        live = live_bytes()
        assert live == before["transformer"] * (2 if offload == "none" else 1)
        assert not any(v.is_meta for n, v in second.state_dict().items() if not block_of(n))
    assert live_bytes() == (live if offload == "none" else 0)
    parts.close()


def test_blocks_of_use_may_nest(folder):
    parts = parts_of(folder, "stage")
    with parts.use("vae") as outer:
        with parts.use("vae") as inner:
            assert inner is outer
        assert parts.resident == ("vae",)
        assert not next(outer.parameters()).is_meta
        with parts.use("text_encoder"):
            assert set(parts.resident) == {"vae", "text_encoder"}
    assert parts.resident == ()


def test_a_network_leaves_after_an_error(folder, live_bytes):
    parts = parts_of(folder, "stage")
    with pytest.raises(RuntimeError), parts.use("vae"):
        raise RuntimeError
    assert live_bytes() == 0


@torch.no_grad()
@pytest.mark.parametrize("offload", ["stage", "block"])
def test_offloading_changes_nothing(folder, offload):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 3, 4, 4, generator=generator)
    context = torch.randn(1, 5, 16, generator=generator)
    results = []
    for parts in (parts_of(folder, "none"), parts_of(folder, offload)):
        with parts.use("transformer"):
            for role in (*EXPERTS, "transformer_2", "transformer"):
                velocity = parts.expert(role)(latents, torch.tensor([500.0]), context)
                results.append(velocity)
    assert all(torch.equal(a, b) for a, b in zip(results[:4], results[4:], strict=True))


def test_int8_counts_what_it_saves(folder):
    parts = parts_of(folder, "none", quantize="int8")
    for role in ("text_encoder", "transformer"):
        with parts.use(role) as module:
            real = sum(value.nbytes for value in module.state_dict().values())
        small = parts.needed_bytes(role, offload="stage")
        assert small == pytest.approx(real, rel=0.01)
        plain = parts.needed_bytes(role, offload="stage", quantize="none")
        assert small < plain


def test_too_little_memory_is_said_before_loading_with_what_would_fit(folder, monkeypatch):
    sizes = {offload: parts_of(folder, offload).needed_bytes() for offload in ("none", "stage")}
    have = (sizes["none"] + sizes["stage"]) // 2
    monkeypatch.setattr("vidgen.pipeline.loader.available_memory", lambda _device: have)
    loaded = []
    monkeypatch.setattr("vidgen.weights.component.load_module", lambda *_a, **_k: loaded.append(1))
    with pytest.raises(ModelError) as error, parts_of(folder, "none").use("vae"):
        pass
    message = str(error.value)
    assert not loaded
    assert re.search(r"tiny's weights need [\d.]+ MB on cpu \(--dtype bf16 --offload none\), "
                     r"[\d.]+ MB are free; these fit: --dtype bf16 --offload stage \(", message)
    assert "--offload block" in message


def test_only_what_does_fit_is_named(folder, monkeypatch):
    block = parts_of(folder, "block", torch.float32)
    have = block.needed_bytes(dtype=torch.bfloat16)
    monkeypatch.setattr("vidgen.pipeline.loader.available_memory", lambda _device: have)
    with pytest.raises(ModelError, match=r"fit: --dtype bf16 --offload block \([^)]*\)$"):
        block.check()
    with pytest.raises(ModelError, match=r"fit: --dtype bf16 --offload block \([^)]*\)$"):
        parts_of(folder, "stage").check()
    monkeypatch.setattr("vidgen.pipeline.loader.available_memory", lambda _device: 1000)
    with pytest.raises(ModelError, match=r"no other setting fits"):
        parts_of(folder, "none").check()
    monkeypatch.setattr("vidgen.pipeline.loader.available_memory", lambda _device: None)
    parts_of(folder, "none").check()


def test_what_is_loaded_is_not_needed_again(folder, monkeypatch):
    parts = parts_of(folder, "none")
    need = parts.needed_bytes()
    free = need
    monkeypatch.setattr("vidgen.pipeline.loader.available_memory", lambda _device: free)
    for role in folder.components:
        with parts.use(role) as module:
            free -= size_of(module)
    assert free == 0


def test_choices_that_do_not_go_together_are_refused(folder):
    with pytest.raises(InputError, match=r"offload is 'blocks'; did you mean 'block'"):
        parts_of(folder, "blocks")
    with pytest.raises(InputError, match=r"quantize is 'int4'; .*int8"):
        parts_of(folder, "block", quantize="int4")


def test_a_network_the_model_lacks_is_named(folder):
    with pytest.raises(ModelError, match=r"tiny has no image_encoder; it has .*vae"), \
            parts_of(folder, "none").use("image_encoder"):
        pass


def test_available_memory_heeds_the_limit_of_a_container(tmp_path):
    (tmp_path / "proc").mkdir()
    assert available_memory(CPU, tmp_path) is None
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    8000 kB\n")
    assert available_memory(CPU, tmp_path) == 8000 * 1024
    group = tmp_path / "sys/fs/cgroup"
    write(group / "memory.stat", "anon 5\nactive_file 100000\ninactive_file 200000\n")
    write(group / "memory.current", "1000000\n")
    write(group / "memory.max", "max\n")
    assert available_memory(CPU, tmp_path) == 8000 * 1024
    write(group / "memory.max", "3000000\n")
    assert available_memory(CPU, tmp_path) == 2_300_000
    for name in ("memory.max", "memory.current", "memory.stat"):
        (group / name).unlink()
    write(group / "memory/memory.stat", "active_file 0\n")
    write(group / "memory/memory.usage_in_bytes", "1000000\n")
    write(group / "memory/memory.limit_in_bytes", "1500000\n")
    assert available_memory(CPU, tmp_path) == 500_000


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(("part", "key"), [
    ("text_encoder", "d_ff"), ("transformer", "ffn_dim"), ("vae", "decoder_dim"),
])
def test_a_size_that_no_network_of_the_files_has_is_refused(tmp_path, tiny_model, part, key):
    shutil.copytree(tiny_model, tmp_path / "model")
    path = tmp_path / "model" / part / "config.json"
    config = json.loads(path.read_text())
    assert key in config
    path.write_text(json.dumps(config | {key: 10**30}))
    with pytest.raises(ModelError, match=rf"the {part}'s config has \w+ 1000.*but its files hold"):
        open_model(str(tmp_path / "model"))
