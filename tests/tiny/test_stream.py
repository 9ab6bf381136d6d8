"""Blocks that stay in their files until they are used: same results, memory for two."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from train.toybox.model_files import save_module
from vidgen.core.errors import Cancelled, ModelError
from vidgen.models.dit import SpacetimeDiT
from vidgen.models.dit_types import DiTConfig
from vidgen.models.presets import TEXT_PRESETS
from vidgen.models.text import UMT5Encoder
from vidgen.weights.load import load_module
from vidgen.weights.stream import block_of

CONFIG = DiTConfig(in_channels=4, out_channels=4, num_heads=2, head_dim=24, num_layers=6,
                   ffn_dim=96, text_dim=16, control_layers=(0, 2, 4), control_channels=6)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A DiT of six blocks and three of control, in two shards."""
    folder = tmp_path_factory.mktemp("dit")
    dit = SpacetimeDiT(CONFIG)
    generator = torch.Generator().manual_seed(0)
    for value in dit.state_dict().values():
        value.copy_(0.2 * torch.randn(value.shape, generator=generator))
    state = list(dit.state_dict().items())
    shards = {"a.safetensors": dict(state[::2]), "b.safetensors": dict(state[1::2])}
    for name, tensors in shards.items():
        save_file(tensors, folder / name)
    weight_map = {key: name for name, tensors in shards.items() for key in tensors}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return folder


def load(folder: Path, dtype: torch.dtype = torch.float32, *, stream: bool = True) -> SpacetimeDiT:
    return load_module(lambda: SpacetimeDiT(CONFIG), folder, dtype, "cpu",
                       keep_fp32=SpacetimeDiT.fp32_weights, stream=stream)


@torch.no_grad()
def run(dit: SpacetimeDiT, seed: int = 0, *, control: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(1, 4, 3, 4, 4, generator=generator)
    context = torch.randn(1, 5, 16, generator=generator)
    steer = torch.randn(1, 6, 3, 4, 4, generator=generator) if control else None
    return dit(latents, torch.tensor([500.0]), context, control=steer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_streamed_module_gives_the_same_bits(saved, dtype):
    whole, streamed = load(saved, dtype, stream=False), load(saved, dtype)
    for seed, control in enumerate((True, False, False, True, True)):
        expected = run(whole, seed, control=control)
        assert torch.equal(run(streamed, seed, control=control), expected)
        assert expected.isfinite().all()


def test_a_text_encoder_streams_as_well(tmp_path):
    config = TEXT_PRESETS["tiny"]
    save_module(UMT5Encoder(config).state_dict(), {}, tmp_path, torch.float32)
    whole, streamed = (
        load_module(lambda: UMT5Encoder(config), tmp_path, torch.float32, "cpu", stream=stream)
        for stream in (False, True)
    )
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        assert torch.equal(whole(ids), streamed(ids))


@pytest.fixture
def live_bytes():
    """Counts the bytes of all tensors in memory that came into being after the test began."""
    gc.collect()
    gc.freeze()  # hides what is there already

    def count() -> int:
        values = [value for value in gc.get_objects() if issubclass(type(value), Tensor)]
        places = [value.untyped_storage() for value in values if value.device.type == "cpu"]
        return sum({place.data_ptr(): place.nbytes() for place in places}.values())

    yield count
    gc.unfreeze()


def test_two_blocks_are_in_memory_at_once(saved, live_bytes):
    """What lives while a block runs, against a module that is in memory whole."""
    most, sizes, on_the_way = {}, {}, 0
    for name, value in load(saved, torch.bfloat16, stream=False).state_dict().items():
        sizes[block_of(name)] = sizes.get(block_of(name), 0) + value.nbytes
        on_the_way = max(on_the_way, 4 * value.numel() + value.nbytes)  # as stored, and as cast
    del value
    for stream in (False, True):
        dit, live = load(saved, torch.bfloat16, stream=stream), []
        note = lambda *_, live=live: live.append(live_bytes())  # noqa: E731
        for part in dit.blocks:
            part.self_attn.register_forward_pre_hook(note)
        run(dit)
        most[stream] = max(live)
        assert len(live) == 6
        del dit
        gc.collect()
    resident = sizes.pop(None)
    largest = max(sizes.values()) + 256 * 40  # weights lie at multiples of 256 bytes
    activations = most[False] - resident - sum(sizes.values())
    assert 0 < activations < largest
    assert resident + 2 * max(sizes.values()) <= most[True]
    assert most[True] <= resident + 2 * largest + activations + on_the_way
    assert 4 * largest < sum(sizes.values())


def test_each_block_is_fetched_once_a_pass_in_the_order_of_use(saved):
    """Control blocks run between the others; the first pass learns where."""
    dit = load(saved)
    stream, asked, order = dit.block_stream, [], []
    fetch = stream._load
    stream._load = lambda index, slot: (asked.append(index), fetch(index, slot))
    for i, block in enumerate((*dit.blocks, *dit.control_blocks)):
        block.register_forward_pre_hook(lambda *_, i=i: order.append(i))
    for _ in range(3):
        stream._ahead is None or stream._ahead[1].result()
        asked.clear()
        order.clear()
        run(dit)
    stream._ahead[1].result()
    assert sorted(order) == list(range(9))
    assert order != list(range(9))
    assert asked == [*order[1:], order[0]]


def test_an_error_of_the_thread_comes_out_of_the_forward_pass(saved, tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in saved.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    dit = load(folder)
    expected = run(dit)
    (folder / "b.safetensors").rename(folder / "away")
    with pytest.raises(ModelError, match=r"b\.safetensors is missing"):
        run(dit)
    (folder / "away").rename(folder / "b.safetensors")
    assert torch.equal(run(dit), expected), "it works again once the file is back"


@pytest.mark.parametrize("kind", [Cancelled, KeyboardInterrupt])
def test_a_pass_that_is_broken_off_can_be_run_again(saved, kind):
    dit = load(saved)
    expected = run(dit)

    def stop(*_: object) -> None:
        raise kind

    hook = dit.blocks[3].cross_attn.register_forward_pre_hook(stop)
    with pytest.raises(kind):
        run(dit)
    hook.remove()
    assert torch.equal(run(dit), expected)
    assert all(v.is_meta for n, v in dit.state_dict().items() if block_of(n))


def test_closing_lets_the_memory_go(saved, live_bytes):
    dit = load(saved)
    run(dit)
    dit.block_stream.close()
    rest = sum(value.nbytes for name, value in dit.state_dict().items() if not block_of(name))
    assert live_bytes() == rest
