"""Between all three layouts and back: every key, every bit."""

import json
import tracemalloc
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from safetensors.torch import save as to_bytes

from tests.models import build_tiny_model
from tests.wan_models import VARIANTS, build_diffusers, build_original
from train.toybox.initial import init_dit
from train.toybox.model_files import record_files, save_module
from vidgen.core.errors import InputError, ModelError
from vidgen.models.dit import SpacetimeDiT
from vidgen.models.dit_types import AudioConfig
from vidgen.models.presets import DIT_PRESETS
from vidgen.weights.convert import convert
from vidgen.weights.layouts import open_model
from vidgen.weights.store import open_tensors
from vidgen.weights.tensors import Lazy, derived, held
from vidgen.weights.write import write_safetensors, write_shards

LAYOUTS = ("vidgen", "diffusers", "wan")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder by file's place and name, shards taken together."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".safetensors", ".pth"):
            place = path.parent.relative_to(folder) / path.name.split("-0")[0].split(".")[0]
            found |= {f"{place}: {name}": lazy.get().clone()
                      for name, lazy in open_tensors([path]).items()}
    return found


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype, name
        assert ours[name].shape == value.shape, name
        assert torch.equal(ours[name], value), name


def through(source: Path, target: Path, *layouts: str) -> Path:
    """Convert step by step; returns the last folder."""
    for index, layout in enumerate(layouts):
        source = step(source, target / f"{index}-{layout}", layout)
    return source


def step(source: Path, target: Path, layout: str) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    convert(open_model(str(source)), target, layout)
    return target


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_wan_release_comes_back_from_a_round(variant: str, tmp_path: Path) -> None:
    source = build_original(tmp_path / "source", variant)
    result = through(source, tmp_path, "diffusers", "vidgen", "wan", "vidgen", "diffusers", "wan")
    assert_same(tensors(result), tensors(source))


def test_what_only_wans_own_programs_load_is_kept_or_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = build_original(tmp_path / "source", "i2v")
    (source / "xlm-roberta-large").mkdir()
    (source / "xlm-roberta-large" / "tokenizer.json").write_text("{}")
    result = through(source, tmp_path / "whole", "vidgen", "diffusers", "wan")
    assert (result / "xlm-roberta-large" / "tokenizer.json").read_text() == "{}"
    assert not caplog.records
    through(build_diffusers(tmp_path / "theirs", "i2v"), tmp_path / "part", "wan")
    assert "has no text tower of CLIP" in caplog.text


@pytest.mark.parametrize("layout", ["diffusers", "wan"])
def test_an_expert_in_int8_comes_back_as_every_reader_has_it(
    layout: str, tiny_experts: Path, tmp_path: Path
) -> None:
    before, there = open_model(str(tiny_experts)), through(tiny_experts, tmp_path, layout)
    for folder in (there, through(there, tmp_path / "back", "vidgen")):
        made = open_model(str(folder))
        assert (made.family, made.defaults) == (before.family, before.defaults)
        assert made.components.keys() == before.components.keys()
        for role in ("transformer", "transformer_2"):
            ours, theirs = before.components[role], made.components[role]
            assert_same(*({name: lazy.get() for name, lazy in part.tensors.items()}
                          for part in (theirs, ours)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_diffusers_folder_comes_back_from_a_round(variant: str, tmp_path: Path) -> None:
    source = build_diffusers(tmp_path / "source", variant)
    result = through(source, tmp_path, "vidgen", "wan", "diffusers")
    assert_same(tensors(result), tensors(source))
    index, original = (json.loads((p / "model_index.json").read_text()) for p in (result, source))
    del original["_diffusers_version"]
    same = {key for key in original if key not in ("tokenizer", "image_processor")}
    assert {key: index.get(key) for key in same} == {key: original[key] for key in same}


@pytest.mark.parametrize(("first", "second"), list(permutations(LAYOUTS, 2)))
def test_facts_come_back_through_any_layout(first: str, second: str, tmp_path: Path) -> None:
    source = build_tiny_model(tmp_path / "tiny")
    measured = {"preview/model.safetensors": to_bytes({"map": torch.ones(2)}),
                "magnitudes.json": b"{}"}
    for name, content in measured.items():
        (source / name).write_bytes(content)
    record_files(source, measured)
    ours = open_model(str(source))
    steps = [layout for layout in (first, second) if layout != "vidgen"]
    back = open_model(str(through(source, tmp_path, *steps, "vidgen")))
    facts = ("name", "family", "license", "tasks", "defaults", "variant")
    assert [getattr(back, f) for f in facts] == [getattr(ours, f) for f in facts]
    for role, part in ours.components.items():
        assert back.components[role].config == part.config
    assert {name: (back.path / name).read_bytes() for name in measured} == measured
    assert back.content_hash
    assert_same(tensors(back.path), tensors(source))


def test_measures_of_other_weights_are_left_out(tmp_path: Path, caplog) -> None:
    source = build_tiny_model(tmp_path / "tiny")
    (source / "magnitudes.json").write_text("{}")
    record_files(source, ["magnitudes.json"])
    ours = open_model(str(source))
    name, lazy = next(iter(ours.components["transformer"].tensors.items()))
    changed = {"transformer": {name: lazy.get() + 1}}
    convert(ours, tmp_path / "new", "vidgen", changed=changed)
    assert not (tmp_path / "new" / "magnitudes.json").exists()
    assert "magnitudes.json of tiny belongs to the old weights" in caplog.text


def test_sound_keeps_its_names_and_comes_back(tmp_path: Path) -> None:
    source = build_tiny_model(tmp_path / "tiny")
    dit = SpacetimeDiT(replace(DIT_PRESETS["tiny"], audio=AudioConfig(4, 8, 31.25)))
    init_dit(dit)  # fresh memory may hold NaN, which equals nothing
    for parameter in dit.parameters():
        parameter.data += torch.randn_like(parameter)
    save_module(dit.state_dict(), dit.config, source / "transformer", torch.bfloat16)
    info = json.loads((source / "model.json").read_text())
    info["files"] = dict.fromkeys(info["files"], "")
    (source / "model.json").write_text(json.dumps(info))
    left = convert(open_model(str(source)), tmp_path / "theirs", "diffusers")
    assert left
    assert all("audio" in name for name in left)
    loaded = open_model(str(tmp_path / "theirs")).components["transformer"]
    state = loaded.load(torch.bfloat16, "cpu").state_dict()
    assert torch.equal(state["audio_embed.weight"], dit.audio_embed.weight.bfloat16())
    assert_same(tensors(step(tmp_path / "theirs", tmp_path / "back", "vidgen")), tensors(source))


def test_what_the_hub_publishes_of_clip_is_kept_whole(tmp_path: Path) -> None:
    """Older files have a prefix and a projection, Wan's a text tower."""
    source = build_diffusers(tmp_path / "source", "i2v")
    path = source / "image_encoder" / "model.safetensors"
    state = {f"vision_model.{name}": value for name, value in load_file(path).items()}
    state["visual_projection.weight"] = torch.randn(16, 32)
    save_file(state, path)
    before = open_model(str(source)).components["image_encoder"]
    assert before.load(torch.float32, "cpu")
    through(source, tmp_path, "wan", "diffusers")
    back = load_file(tmp_path / "1-diffusers" / "image_encoder" / "model.safetensors")
    assert {k.removeprefix("vision_model.") for k in state} == back.keys()
    assert torch.equal(back["visual_projection.weight"], state["visual_projection.weight"])


def test_a_tied_embedding_saved_twice_is_taken_once(tmp_path: Path) -> None:
    source = build_diffusers(tmp_path / "source", "t2v")
    path = source / "text_encoder" / "model.safetensors"
    state = load_file(path)
    state["encoder.embed_tokens.weight"] = state["shared.weight"].clone()
    save_file(state, path)
    assert open_model(str(source)).components["text_encoder"].load(torch.float32, "cpu")
    result = through(source, tmp_path, "wan", "vidgen", "diffusers")
    expected = tensors(source)
    del expected["text_encoder/model: encoder.embed_tokens.weight"]
    assert_same(tensors(result), expected)


@pytest.mark.parametrize("layout", ["diffusers", "wan"])
def test_an_unknown_tensor_is_an_error_and_nothing_is_left(layout: str, tmp_path: Path) -> None:
    build = build_original if layout == "diffusers" else build_diffusers
    source = build(tmp_path / "source", "t2v")
    path = next(source.rglob("diffusion_pytorch_model.safetensors"))
    save_file(load_file(path) | {"blocks.0.surprise.weight": torch.zeros(2)}, path)
    with pytest.raises(ModelError, match=r"blocks\.0\.surprise\.weight"):
        convert(open_model(str(source)), tmp_path / "target", layout)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_a_missing_tensor_is_an_error(tmp_path: Path) -> None:
    source = build_original(tmp_path / "source", "t2v")
    path = source / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    del state["blocks.1.cross_attn.norm_q.weight"]
    save_file(state, path)
    with pytest.raises(ModelError, match=r"blocks\.1\.cross_attn\.norm_q\.weight"):
        convert(open_model(str(source)), tmp_path / "target", "vidgen")


def test_an_existing_target_and_the_same_layout_are_refused(tmp_path: Path) -> None:
    model = open_model(str(build_tiny_model(tmp_path / "tiny")))
    with pytest.raises(ModelError, match="exists"):
        convert(model, tmp_path, "wan")
    with pytest.raises(InputError, match="already"):
        convert(model, tmp_path / "new", "vidgen")


def test_damage_is_found_before_it_is_passed_on(tmp_path: Path) -> None:
    source = build_tiny_model(tmp_path / "tiny")
    path = source / "vae" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ModelError, match=r"vae/model\.safetensors.*copy it again"):
        convert(open_model(str(source)), tmp_path / "new", "wan")


def test_shards_keep_to_their_limit_and_are_read_by_others(tmp_path: Path) -> None:
    source = build_original(tmp_path / "source", "t2v", num_shards=3)
    model = open_model(str(source))
    convert(model, tmp_path / "shards", "diffusers", max_shard_bytes=30_000)
    files = list((tmp_path / "shards" / "transformer").glob("*.safetensors"))
    assert len(files) > 2
    assert all(sum(v.nbytes for v in load_file(f).values()) <= 30_000 for f in files)
    from diffusers import WanTransformer3DModel

    theirs = WanTransformer3DModel.from_pretrained(tmp_path / "shards", subfolder="transformer")
    expected = WanTransformer3DModel.from_pretrained(
        build_diffusers(tmp_path / "expected", "t2v"), subfolder="transformer"
    )
    assert_same(theirs.state_dict(), expected.state_dict())
    result = step(tmp_path / "shards", tmp_path / "back", "wan")
    assert_same(tensors(result), tensors(source))


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8,
          torch.bool, torch.float8_e4m3fn]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=8),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=8, max_size=8),
    limit=st.integers(1, 2000), seed=st.integers(0, 99),
)
def test_what_is_written_in_shards_is_what_is_read(
    tmp_path_factory: pytest.TempPathFactory, shapes, dtypes, limit, seed
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    generator = torch.Generator().manual_seed(seed)
    state = {
        f"tensor.{i}": (torch.randn(shape, generator=generator) * 3).to(dtype)
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=False))
    }
    write_shards(folder, "model", {k: held(v) for k, v in state.items()}, limit)
    read = {}
    for path in folder.glob("*.safetensors"):
        read |= load_file(path)
    assert read.keys() == state.keys()
    for name, value in state.items():
        assert read[name].dtype == value.dtype
        assert read[name].shape == value.shape
        assert torch.equal(read[name], value)


def test_writing_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    made = Lazy(torch.empty(1_000_000, dtype=torch.float64, device="meta"),
                lambda: torch.from_numpy(np.ones(1_000_000)))  # numpy's memory is traced
    tracemalloc.start()
    write_safetensors(tmp_path / "x.safetensors", {str(i): made for i in range(6)})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.2 * made.likeness.nbytes
    assert len(load_file(tmp_path / "x.safetensors")) == 6


def test_parts_of_a_fused_tensor_are_put_together_again(tmp_path: Path) -> None:
    whole = torch.randn(12, 5)
    save_file({"whole": whole}, tmp_path / "model.safetensors")
    stored = open_tensors([tmp_path / "model.safetensors"])["whole"]
    parts = [derived(lambda t, i=i: t.chunk(3)[i], stored) for i in range(3)]
    joined = derived(lambda *each: torch.cat(each), *parts)
    assert joined.likeness.shape == whole.shape
    assert torch.equal(joined.get(), whole)
