"""LoRA files: every dialect read and written, what has no place refused."""

import json
import logging
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.lora_models import (
    I2V,
    SOUND,
    TINY,
    WHOLE,
    linear_paths,
    make_adapter,
    make_dit,
    write_kohya,
)
from vidgen.core.errors import InputError, ModelError
from vidgen.models.dit import SpacetimeDiT
from vidgen.models.dit_types import DiTConfig
from vidgen.models.lora import Adapter, LowRank
from vidgen.weights.lora import LoraChoice, parse_option, read_choices, read_lora, write_lora
from vidgen.weights.lora_dialects import DIALECTS


def assert_same(given: Adapter, expected: Adapter) -> None:
    """The same change of weights, the same parts; scales may lie elsewhere."""
    assert given.low_rank.keys() == expected.low_rank.keys()
    for path, part in expected.low_rank.items():
        other = given.low_rank[path]
        assert other.down.shape == part.down.shape
        ours = other.scale * other.up.double() @ other.down.flatten(1).double()
        theirs = part.scale * part.up.double() @ part.down.flatten(1).double()
        assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()
    assert given.deltas.keys() == expected.deltas.keys()
    assert all(torch.equal(given.deltas[name], d) for name, d in expected.deltas.items())


def write_read(adapter: Adapter, config: DiTConfig, folder: Path, dialect: str) -> Adapter:
    path = folder / f"{dialect}.safetensors"
    write_kohya(adapter, path) if dialect == "kohya" else write_lora(adapter, path, dialect)
    return read_lora(path, config)


@st.composite
def drawn_adapters(draw, config: DiTConfig = WHOLE) -> Adapter:
    with torch.device("meta"):
        module = SpacetimeDiT(config)
    torch.manual_seed(draw(st.integers(0, 999)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    low_rank, deltas = {}, {}
    for path in draw(st.lists(st.sampled_from(linear_paths(module)), min_size=1, unique=True)):
        weight, rank = module.get_submodule(path).weight, draw(st.integers(1, 4))
        down = torch.randn(rank, *weight.shape[1:], dtype=dtype)
        up = torch.randn(weight.shape[0], rank, dtype=dtype)
        low_rank[path] = LowRank(down, up, draw(st.sampled_from([1.0, 0.25, 2.0, 0.3, 1.7, -1])))
        if draw(st.booleans()):
            deltas[f"{path}.bias"] = torch.randn(weight.shape[0], dtype=dtype)
    return Adapter("drawn", low_rank, deltas)


@settings(max_examples=25, deadline=None)
@given(adapter=drawn_adapters(), chain=st.permutations([*DIALECTS, "kohya"]))
def test_a_chain_of_dialects_keeps_the_change(adapter, chain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chain")
    now = adapter
    for dialect in chain:
        now = write_read(now, WHOLE, folder, dialect)
        assert_same(now, adapter)


@pytest.mark.parametrize("dialect", ["vidgen", "wan", "kohya"])
def test_differences_of_every_parameter_come_back(dialect, tmp_path):
    dit = make_dit(WHOLE)
    names = tuple(name for name, _ in dit.named_parameters())
    adapter = make_adapter(dit, diffs=names)
    assert_same(write_read(adapter, WHOLE, tmp_path, dialect), adapter)


def test_what_a_dialect_cannot_say_is_refused_before_a_file_is_there(tmp_path):
    adapter = make_adapter(make_dit(), diffs=("blocks.0.norm_cross.weight", "blocks.1.modulation"))
    with pytest.raises(ModelError, match=r"no names for 2 parts .*norm_cross.*'vidgen'"):
        write_lora(adapter, tmp_path / "out.safetensors", "diffusers")
    assert list(tmp_path.iterdir()) == []


def test_parts_without_a_name_elsewhere_have_one_in_ours(tmp_path):
    adapter = make_adapter(make_dit(SOUND))
    assert any("audio" in path for path in adapter.low_rank)
    assert_same(write_read(adapter, SOUND, tmp_path, "vidgen"), adapter)
    with pytest.raises(ModelError, match="audio"):
        write_lora(adapter, tmp_path / "x.safetensors", "wan")
    with pytest.raises(InputError, match="did you mean 'diffusers'"):
        write_lora(adapter, tmp_path / "x.safetensors", "difusers")


def test_scales_of_power_two_keep_every_bit(tmp_path):
    part = LowRank(torch.randn(4, 24).bfloat16(), torch.randn(24, 4).bfloat16(), 0.5)
    adapter = Adapter("x", {"blocks.0.self_attn.q": part})
    for dialect in DIALECTS:
        back = write_read(adapter, TINY, tmp_path, dialect).low_rank["blocks.0.self_attn.q"]
        assert back.down.dtype == back.up.dtype == torch.bfloat16
        assert torch.equal(back.down, part.down)
        assert torch.equal(back.scale * back.up, part.scale * part.up)


def save(path: Path, names: list[str], *, rank: int = 2, width: int = 24, **extra) -> Path:
    """A LoRA of square layers under given names, `{}` standing for the side."""
    tensors = {}
    for name in names:
        down, up = ("down", "up") if "lora_down" in name or "_{}" not in name else ("A", "B")
        tensors[name.format(down)] = torch.ones(rank, width)
        tensors[name.format(up)] = torch.ones(width, rank)
    save_file(tensors | extra.pop("tensors", {}), path, **extra)
    return path


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("transformer.blocks.1.attn1.to_out.0.lora_{}.weight", "blocks.1.self_attn.out"),
        ("transformer.blocks.1.attn2.to_k.lora_{}.default.weight", "blocks.1.cross_attn.k"),
        ("base_model.model.blocks.0.attn2.to_v.lora_{}.weight", "blocks.0.cross_attn.v"),
        ("blocks.0.attn2.add_v_proj.lora_{}.my-own_name.weight", "blocks.0.cross_attn.v_image"),
        ("diffusion_model.blocks.1.self_attn.o.lora_{}.weight", "blocks.1.self_attn.out"),
        ("model.diffusion_model.blocks.0.self_attn.v.lora_{}.weight", "blocks.0.self_attn.v"),
        ("diffusion_model.blocks.0.cross_attn.k_img.lora_{}.weight", "blocks.0.cross_attn.k_image"),
        ("blocks.0.self_attn.q.lora_{}.default.weight", "blocks.0.self_attn.q"),
        ("pipe.dit.blocks.0.self_attn.q.lora_{}.default.weight", "blocks.0.self_attn.q"),
        ("time_embedding.2.lora_{}.weight", "time_embed.down"),
    ],
)
def test_names_of_tools_find_their_layer(name, path, tmp_path):
    file = save(tmp_path / "l.safetensors", [name])
    adapter = read_lora(file, I2V)
    assert list(adapter.low_rank) == [path]
    assert adapter.low_rank[path].scale == 1.0


@pytest.mark.parametrize(
    "prefix", ["lora_unet_blocks_0_", "lora_unet__blocks_0_", "lycoris_blocks_0_",
               "lora_unet_blocks_0.", "diffusion_model.blocks.0."],
)  # fmt: skip
def test_down_up_alpha(prefix, tmp_path):
    base = f"{prefix}cross_attn_k_img"
    tensors = {
        f"{base}.lora_down.weight": torch.ones(4, 24), f"{base}.lora_up.weight": torch.ones(24, 4),
        f"{base}.alpha": torch.tensor(2.0),
    }
    save_file(tensors, tmp_path / "l.safetensors")
    (part,) = read_lora(tmp_path / "l.safetensors", I2V).low_rank.values()
    assert part.scale == 0.5


def test_differences_by_other_tools_names(tmp_path):
    names = {
        "diffusion_model.blocks.0.norm3.diff": ("blocks.0.norm_cross.weight", 24),
        "diffusion_model.blocks.0.norm3.diff_b": ("blocks.0.norm_cross.bias", 24),
        "diffusion_model.blocks.1.self_attn.q.diff_b": ("blocks.1.self_attn.q.bias", 24),
        "diffusion_model.blocks.1.self_attn.norm_k.diff": ("blocks.1.self_attn.norm_k.weight", 24),
        "diffusion_model.blocks.0.diff_m": ("blocks.0.modulation", (1, 6, 24)),
        "diffusion_model.blocks.1.modulation.diff": ("blocks.1.modulation", (1, 6, 24)),
        "diffusion_model.head.head.diff": ("head.proj.weight", (16, 24)),
    }
    tensors = {name: torch.randn(shape) for name, (_, shape) in names.items()}
    save_file(tensors, tmp_path / "l.safetensors")
    deltas = read_lora(tmp_path / "l.safetensors", TINY).deltas
    assert deltas.keys() == {path for path, _ in names.values()}
    assert all(torch.equal(deltas[path], tensors[name]) for name, (path, _) in names.items())


def test_plain_tensors_in_a_pth(tmp_path):
    adapter = make_adapter(make_dit())
    write_lora(adapter, tmp_path / "l.safetensors", "wan")
    torch.save(load_file(tmp_path / "l.safetensors"), tmp_path / "l.pth")
    assert_same(read_lora(tmp_path / "l.pth", TINY), adapter)


def test_eight_bit_floats_are_read(tmp_path):
    up = torch.randn(24, 2).to(torch.float8_e4m3fn)
    name = "blocks.0.self_attn.q.lora_"
    tensors = {f"{name}A.weight": torch.ones(2, 24), f"{name}B.weight": up}
    save_file(tensors, tmp_path / "l.safetensors")
    (part,) = read_lora(tmp_path / "l.safetensors", TINY).low_rank.values()
    assert torch.equal(part.up.float(), up.float())


Q = "transformer.blocks.0.attn1.to_q.lora_{}.weight"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(2, 24),
          "transformer.single_transformer_blocks.0.attn.to_q.lora_B.weight": torch.ones(24, 2)},
         r"2 of 2 tensors match no layer \(transformer.single_transformer_blocks.0"),
        ({"diffusion_model.blocks.2.self_attn.q.lora_A.weight": torch.ones(2, 24)},
         r"model \(2 blocks of width 24\): 1 of 1 tensors match no layer"),
        ({Q.format("A"): torch.ones(2, 48), Q.format("B"): torch.ones(48, 2)},
         r"1 of 2 don't fit \(blocks.0.self_attn.q: 48x48 for 24x24\)"),
        ({Q.format("A"): torch.ones(2, 24), Q.format("B"): torch.ones(24, 3)}, "ranks of"),
        ({Q.format("A"): torch.ones(0, 24), Q.format("B"): torch.ones(24, 0)}, "ranks of"),
        ({Q.format("A"): torch.ones(()), Q.format("B"): torch.ones(24)}, "ranks of"),
        ({Q.format("A"): torch.ones(2, 24)}, r"lack .*\(blocks.0.attn1.to_q\)"),
        ({Q.format("A"): torch.ones(2, 24), Q.format("B"): torch.full((24, 2), torch.nan)},
         r"1 of 2 tensors are not finite \(.*lora_B"),
        ({Q.format("A"): torch.ones(2, 24), Q.format("B"): torch.ones(24, 2),
          "blocks.0.self_attn.q.lora_A.weight": torch.ones(2, 24)},
         "1 of 3 tensors are duplicates"),
        ({"transformer.blocks.0.norm2.diff": torch.ones(25)}, r"weight: \[25\] for \[24\]"),
        ({"blocks.0.attn1.to_q.weight": torch.ones(24, 24)}, "match no layer"),
        ({Q.format("A"): torch.ones(2, 24), "transformer.blocks.0.attn1.to_q.dora_scale":
          torch.ones(24)}, "is a DoRA; vidgen reads only LoRA"),
        ({"lora_unet_blocks_0_self_attn_q.lokr_w1": torch.ones(2, 2)}, "is a LoKr"),
        ({"lora_te_encoder_block_0.lora_down.weight": torch.ones(2, 2)}, "has no LoRA tensors"),
    ],
)  # fmt: skip
def test_what_has_no_place_is_refused_with_a_list(tensors, message, tmp_path):
    save_file(tensors, tmp_path / "l.safetensors")
    with pytest.raises(ModelError, match=message):
        read_lora(tmp_path / "l.safetensors", TINY)


def test_another_size_is_refused_with_numbers(tmp_path):
    wide = make_dit(replace(TINY, num_heads=4, num_layers=3))
    write_lora(make_adapter(wide), tmp_path / "big.safetensors", "wan")
    with pytest.raises(ModelError) as refused:
        read_lora(tmp_path / "big.safetensors", TINY)
    text = str(refused.value)
    assert re.search(r"20 of \d+ tensors match no layer .*blocks\.2\.", text)
    assert re.search(r"\d+ of \d+ don't fit \(.*48x\d+ for 24x\d+.*, and \d+ more\)", text)


def test_files_that_cannot_be_read_say_so(tmp_path):
    with pytest.raises(InputError, match=r"doesn't exist; --lora takes PATH"):
        read_lora(tmp_path / "no.safetensors", TINY)
    (tmp_path / "film.yaml").write_text("a: 1")
    with pytest.raises(InputError, match=r"text file, not a LoRA; --lora takes PATH.*safetensors"):
        read_lora(tmp_path / "film.yaml", TINY)
    (tmp_path / "half.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{}")
    with pytest.raises(ModelError, match="copy it again"):
        read_lora(tmp_path / "half.safetensors", TINY)
    with pytest.raises(ModelError, match=r"no \*.safetensors"):
        read_lora(make_folder(tmp_path / "empty"), TINY)
    folder = make_folder(tmp_path / "two")
    for name in "ab":
        save(folder / f"{name}.safetensors", [Q])
    with pytest.raises(ModelError, match=r"a.safetensors, b.safetensors; give the path of one"):
        read_lora(folder, TINY)


def make_folder(path: Path) -> Path:
    path.mkdir()
    return path


def test_zero_deltas_and_text_encoders_are_reported(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    file = save(tmp_path / "l.safetensors", [Q], tensors={
        "lora_te_x.lora_down.weight": torch.ones(2, 2),
        "text_encoder.x.lora_A.weight": torch.ones(2, 2),
        "diffusion_model.blocks.0.norm3.diff": torch.zeros(24),
    })  # fmt: skip
    read_lora(file, TINY)
    first, second = (record.getMessage() for record in caplog.records)
    assert "2 tensors for a text encoder are ignored" in first
    assert "1 of its 2 deltas are zero (blocks.0.norm_cross.weight)" in second
    caplog.clear()
    save_file({Q.format("A"): torch.ones(2, 24), Q.format("B"): torch.zeros(24, 2)},
              tmp_path / "z.safetensors")  # fmt: skip
    read_lora(tmp_path / "z.safetensors", TINY)
    assert "changes nothing: all of its 1 deltas are zero" in caplog.text


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"r": 4, "lora_alpha": 2}, 0.5),
        ({"r": 4, "lora_alpha": 2, "use_rslora": True}, 1.0),
        ({"r": 4, "lora_alpha": 2, "alpha_pattern": {"to_k": 3, "attn1.to_q": 8}}, 2.0),
        ({"r": 4, "lora_alpha": 2, "alpha_pattern": {"^blocks.0.attn1.to_q": 12}}, 3.0),
        ({"r": 4, "lora_alpha": 2, "alpha_pattern": {"o_q": 12}}, 0.5),
    ],
)
def test_scales_of_pefts_config(config, scale, tmp_path):
    save(tmp_path / "adapter_model.safetensors", [Q], rank=4)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"} | config))
    assert read_lora(tmp_path, TINY).low_rank["blocks.0.self_attn.q"].scale == scale
    header = {f"transformer.{key}": value for key, value in config.items()}
    file = save(tmp_path / "l.safetensors", [Q], rank=4,
                metadata={"lora_adapter_metadata": json.dumps(header)})  # fmt: skip
    assert read_lora(file, TINY).low_rank["blocks.0.self_attn.q"].scale == scale


@pytest.mark.parametrize(
    ("config", "message"),
    [({"use_dora": True}, "use_dora"), ({"peft_type": "LOHA"}, "LOHA"),
     ({"modules_to_save": ["proj_out"]}, "modules_to_save"), ({"lora_alpha": "x"}, "lora_alpha"),
     ({"lora_alpha": 1, "alpha_pattern": {"(": 1}}, "lora_alpha")],
)  # fmt: skip
def test_pefts_other_methods_are_refused(config, message, tmp_path):
    save(tmp_path / "adapter_model.safetensors", [Q])
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=message):
        read_lora(tmp_path, TINY)


@pytest.mark.parametrize(
    ("text", "path", "weight", "expert"),
    [
        ("a.safetensors", "a.safetensors", 1.0, None),
        ("a.safetensors:0.8", "a.safetensors", 0.8, None),
        ("a.safetensors:-.5@high", "a.safetensors", -0.5, "high"),
        ("a.safetensors@LOW", "a.safetensors", 1.0, "low"),
        (r"C:\loras\a.safetensors", r"C:\loras\a.safetensors", 1.0, None),
        (r"C:\loras\a.safetensors:2", r"C:\loras\a.safetensors", 2.0, None),
        ("a:b.safetensors:1e-1", "a:b.safetensors", 0.1, None),
        ("a:1.5:2", "a:1.5", 2.0, None),
        ("me@home/a:nan", "me@home/a:nan", 1.0, None),
        ("a:0.5@mid", "a:0.5@mid", 1.0, None),
        ("a@h\u0131gh", "a@h\u0131gh", 1.0, None),  # which ignoring case takes for an i
    ],
)
def test_an_option_is_path_weight_expert(text, path, weight, expert):
    assert parse_option(text) == LoraChoice(Path(path), weight, expert)


@pytest.mark.parametrize("weight", ["1e999", "-101", "1e3"])
def test_a_weight_out_of_bounds_is_refused(weight):
    with pytest.raises(InputError, match=r"weight of LoRA a.safetensors is .* from -100 to 100"):
        parse_option(f"a.safetensors:{weight}")


def test_an_option_without_a_path_is_refused():
    with pytest.raises(InputError, match="PATH"):
        parse_option("")


def test_experts_get_their_own(tmp_path):
    tensors = {}
    for prefix, value in (("transformer", 1.0), ("transformer_2", 2.0)):
        for side, shape in (("A", (2, 24)), ("B", (24, 2))):
            tensors[f"{prefix}.blocks.0.attn1.to_q.lora_{side}.weight"] = torch.full(shape, value)
    both, one = tmp_path / "both.safetensors", save(tmp_path / "one.safetensors", [Q])
    save_file(tensors, both)
    choices = [LoraChoice(both, 0.5), LoraChoice(one, 0.7, "low"), LoraChoice(one, 0.9)]
    high, low = (read_choices(choices, TINY, expert) for expert in ("high", "low"))
    assert [weight for _, weight in high] == [0.5, 0.9]
    assert [weight for _, weight in low] == [0.5, 0.7, 0.9]
    assert high[0][0].low_rank["blocks.0.self_attn.q"].up.unique().item() == 1.0
    assert low[0][0].low_rank["blocks.0.self_attn.q"].up.unique().item() == 2.0
    with pytest.raises(ModelError, match="two experts"):
        read_lora(both, TINY)
    with pytest.raises(InputError, match="one transformer"):
        read_choices(choices[1:], TINY)
    only_low = {name: t for name, t in tensors.items() if "_2" in name}
    save_file(only_low, both)
    assert [weight for _, weight in read_choices(choices, TINY, "high")] == [0.9]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_file_says_which_expert_it_was_learned_for(dialect, tmp_path, caplog):
    files = {side: tmp_path / f"{side}.safetensors" for side in ("high", "low")}
    for side, path in files.items():
        low_rank = {"blocks.0.self_attn.q": LowRank(torch.ones(2, 24), torch.ones(24, 2))}
        write_lora(Adapter(side, low_rank), path, dialect, expert=side)
    for side, other in (("high", "low"), ("low", "high")):
        assert len(read_choices([LoraChoice(path) for path in files.values()], TINY, side)) == 1
        assert read_choices([LoraChoice(files[other])], TINY, side) == []
        assert not caplog.messages
        assert read_choices([LoraChoice(files[other], expert=side)], TINY, side)
        assert f"trained for the {other}-noise expert, but @{side} applies it" in caplog.text
        caplog.clear()
    assert len(read_choices([LoraChoice(files["low"])], TINY)) == 1, "the only transformer"


def test_a_folder_with_one_file_for_each_expert_is_both(tmp_path):
    for side, weight in (("high", 1.0), ("low", 2.0)):
        part = LowRank(torch.ones(2, 24), torch.full((24, 2), weight))
        write_lora(Adapter(side, {"blocks.0.self_attn.q": part}),
                   tmp_path / f"mine-{side}.safetensors", "vidgen", expert=side)
    for side, weight in (("high", 1.0), ("low", 2.0)):
        [(adapter, _)] = read_choices([LoraChoice(tmp_path)], TINY, side)
        assert adapter.low_rank["blocks.0.self_attn.q"].up.unique().item() == weight
    with pytest.raises(ModelError, match=r"has mine-high.*, mine-low.*; give the path of one file"):
        read_choices([LoraChoice(tmp_path)], TINY)
    save(tmp_path / "third.safetensors", [Q])
    with pytest.raises(ModelError, match="give the path of one file"):
        read_choices([LoraChoice(tmp_path)], TINY, "low")
