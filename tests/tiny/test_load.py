"""Modules from files: names, dtypes, refusals, and the memory that loading takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from train.toybox.initial import init_dit
from train.toybox.model_files import save_module
from vidgen.core.errors import ModelError
from vidgen.models.dit import SpacetimeDiT
from vidgen.models.presets import DIT_PRESETS
from vidgen.weights.component import assemble
from vidgen.weights.load import load_module, read_tensors
from vidgen.weights.store import open_tensors
from vidgen.weights.tensors import Tensors

TINY = DIT_PRESETS["tiny"]


@pytest.fixture
def saved(tmp_path) -> tuple[SpacetimeDiT, Path]:
    dit = SpacetimeDiT(TINY)
    init_dit(dit, torch.Generator().manual_seed(0))
    save_module(dit.state_dict(), TINY, tmp_path / "transformer", torch.float32)
    return dit, tmp_path / "transformer"


def load(source, dtype=torch.float32, **options):
    return load_module(lambda: SpacetimeDiT(TINY), source, dtype, "cpu", **options)


def test_what_was_saved_is_loaded(saved):
    dit, folder = saved
    loaded = load(folder)
    assert not loaded.training
    for name, value in loaded.state_dict(keep_vars=True).items():
        assert torch.equal(value, dit.state_dict()[name])
        assert not value.requires_grad


def test_a_published_pth_and_other_names_load_the_same(saved, tmp_path):
    dit, folder = saved
    torch.save({f"theirs.{name}": v for name, v in dit.state_dict().items()}, tmp_path / "w.pth")
    stored = open_tensors([tmp_path / "w.pth"])
    loaded = load(Tensors({name.removeprefix("theirs."): stored[name] for name in stored}))
    assert all(torch.equal(v, load(folder).state_dict()[n]) for n, v in loaded.state_dict().items())


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_norms_modulation_and_time_stay_float32(saved, tmp_path, stored):
    """What diffusers keeps in float32 (`_keep_in_fp32_modules`) is float32 here, too."""
    dit, _ = saved
    save_module(dit.state_dict(), TINY, tmp_path / "stored", stored)
    loaded = load(tmp_path / "stored", torch.bfloat16, keep_fp32=SpacetimeDiT.fp32_weights)
    wide = {n for n, value in loaded.state_dict().items() if value.dtype == torch.float32}
    narrow = {n for n, value in loaded.state_dict().items() if value.dtype == torch.bfloat16}
    assert wide | narrow == set(dit.state_dict())
    reference = ("time_embed.up", "time_embed.down", "modulation", "norm_cross")
    assert {n for n in dit.state_dict() if any(part in n for part in reference)} <= wide
    assert {"blocks.0.ffn.up.weight", "head.proj.weight", "patch_embed.weight"} <= narrow


def test_missing_surplus_and_misshapen_tensors_are_named(saved):
    _, folder = saved
    tensors = read_tensors(folder / "model.safetensors")
    tensors["blocks.0.ffn.odd"] = tensors.pop("blocks.0.ffn.up.bias")
    tensors["head.proj.bias"] = torch.zeros(3)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError) as error:
        load(folder)
    for part in ("1 missing (blocks.0.ffn.up.bias)", "1 surplus (blocks.0.ffn.odd)",
                 "1 of wrong shape (head.proj.bias: [3] for [16])", "same model"):
        assert part in str(error.value)


def test_int8_that_has_lost_its_scales_is_refused(saved):
    dit, folder = saved
    save_module(dit.state_dict(), TINY, folder, torch.bfloat16, int8_from=1)
    assert load(folder).head.proj.weight.is_floating_point()
    tensors = read_tensors(folder / "model.safetensors")
    del tensors["head.proj.weight_scale"]
    save_file(tensors, folder / "model.safetensors")
    lost = r"1 of whole numbers without a scale for each row \(head\.proj\.weight\)"
    with pytest.raises(ModelError, match=lost):
        load(folder)


def test_two_tensors_for_one_weight_are_refused(saved):
    stored = open_tensors([saved[1] / "model.safetensors"])
    stored["proj_out.bias"] = stored["head.proj.bias"]
    with pytest.raises(ModelError, match=r"two tensors for head\.proj\.bias"):
        assemble("transformer", TINY, stored, "diffusers")


def test_a_weight_made_outside_the_files_is_an_error(saved):
    class Forgetful(SpacetimeDiT):
        def __init__(self, config):
            super().__init__(config)
            self.register_buffer("table", torch.ones(3), persistent=False)

    with pytest.raises(AssertionError, match="table"):
        load_module(lambda: Forgetful(TINY), saved[1], torch.float32, "cpu")


def test_building_imports_nothing_large(tmp_path):
    """Drawing weights on the meta device would import torch's decompositions, a second of work."""
    code = """
import sys
from pathlib import Path
import torch
from vidgen.models.presets import TEXT_PRESETS
from vidgen.models.text import UMT5Encoder
from train.toybox.model_files import save_module
from vidgen.weights.load import load_module
config, folder = TEXT_PRESETS["tiny"], Path(sys.argv[1])
save_module(UMT5Encoder(config).state_dict(), {}, folder, torch.float32)
before = len(sys.modules)
load_module(lambda: UMT5Encoder(config), folder, torch.bfloat16, "cpu")
print(len(sys.modules) - before)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True,
                          text=True, check=True)
    assert int(done.stdout) < 30


LAYERS, WIDTH = 24, 1600  # 246 MB in float32
MEASURE = """
import json, re, sys
from pathlib import Path
import torch
from torch import nn
from vidgen.weights.load import load_module, trim_memory

def status(field):
    return 1024 * int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

layers, width, dtype, quantize = json.loads(sys.argv[2])
make = lambda: nn.ModuleDict({"blocks": nn.ModuleList(
    nn.Linear(width, width) for _ in range(layers))})
dtype = getattr(torch, dtype)
torch.zeros(10_000).to(torch.bfloat16).sum()
trim_memory()
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
held = "RssAnon" if quantize else "VmRSS"  # pages of libraries may leave memory meanwhile
before, whole = status(held), status("VmRSS")
module = load_module(make, Path(sys.argv[1]), dtype, "cpu", quantize=quantize)
total = 0.0
for value in module.parameters():  # mapped pages count once they are used
    total += float(value.view(-1)[::512].sum())
print(json.dumps({"after": status(held) - before, "peak": status("VmHWM") - whole}))
"""


def measure(folder: Path, dtype: str, quantize: str | None = None) -> dict[str, int]:
    """Memory of a fresh process, in bytes above its state before loading: anonymous and mapped."""
    options = json.dumps([LAYERS, WIDTH, dtype, quantize])
    done = subprocess.run([sys.executable, "-c", MEASURE, str(folder), options],
                          capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A model of 24 layers, 246 MB, in two shards of safetensors."""
    folder = tmp_path_factory.mktemp("large")
    weight_map = {}
    for part in range(2):
        layers = range(part * LAYERS // 2, (part + 1) * LAYERS // 2)
        tensors = {f"blocks.{i}.weight": torch.randn(WIDTH, WIDTH) for i in layers}
        tensors |= {f"blocks.{i}.bias": torch.randn(WIDTH) for i in layers}
        save_file(tensors, folder / f"m-{part}.safetensors")
        weight_map |= dict.fromkeys(tensors, f"m-{part}.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_loading_takes_the_weights_and_one_layer(large, dtype, size):
    layer = 4 * WIDTH * (WIDTH + 1)
    weights = size * LAYERS * WIDTH * (WIDTH + 1)
    taken = measure(large, dtype)
    assert 0.9 * weights < taken["after"] <= taken["peak"] + (1 << 20), taken  # counted by turns
    assert taken["peak"] <= 1.1 * weights + layer, taken


def test_int8_is_made_layer_by_layer(large):
    """The peak is int8 weights and what one layer takes on its way, eight times its float32."""
    layer = 4 * WIDTH * (WIDTH + 1)
    weights = LAYERS * WIDTH * (WIDTH + 2 + 4)
    taken = measure(large, "bfloat16", "int8")
    assert 0.9 * weights < taken["after"] <= 1.1 * weights, taken
    assert taken["peak"] <= 1.1 * weights + 8 * layer, taken
    assert 1.1 * weights + 8 * layer < 2 * LAYERS * WIDTH * WIDTH + 4 * layer, "not bfloat16 first"
