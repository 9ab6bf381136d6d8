"""LoRA: files of every dialect, and adapters on a module that keeps its weights."""

import json
import logging
import re
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from vidgen.core.errors import InputError, ModelError
from vidgen.models.dit import AudioConfig, DiTConfig, SpacetimeDiT
from vidgen.models.lora import Adapter, LowRank, attached, linear_paths
from vidgen.models.presets import DIT_PRESETS
from vidgen.weights.load import load_module, save_module
from vidgen.weights.lora import (
    DIALECTS,
    LoraChoice,
    parse_option,
    read_choices,
    read_lora,
    write_lora,
)

TINY = DIT_PRESETS["tiny"]
I2V = replace(TINY, image_dim=20, image_positions=10)
WHOLE = replace(I2V, control_layers=(0,), control_channels=6)
SOUND = replace(TINY, audio=AudioConfig(channels=3, ffn_dim=16, tokens_per_s=5.0))
DIFFS = ("blocks.0.norm_cross.weight", "blocks.0.norm_cross.bias", "blocks.1.modulation",
         "blocks.1.cross_attn.norm_k.weight", "head.modulation", "blocks.0.ffn.up.weight",
         "time_embed.up.bias", "patch_embed.bias")  # fmt: skip


def make_dit(config: DiTConfig = TINY, dtype: torch.dtype = torch.float32) -> SpacetimeDiT:
    torch.manual_seed(0)
    dit = SpacetimeDiT(config)
    dit.init_weights()
    for parameter in dit.parameters():  # fresh gates are zero: a model that does nothing
        parameter.data += 0.1 * torch.randn_like(parameter)
    return dit.eval().requires_grad_(requires_grad=False).to(dtype)


def make_adapter(
    dit: SpacetimeDiT, *, seed: int = 1, rank: int = 3, scale: float = 0.5, diffs: tuple = ()
) -> Adapter:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return 0.3 * torch.randn(shape, generator=generator)

    low_rank = {}
    for path in linear_paths(dit):
        weight = dit.get_submodule(path).weight
        down, up = draw(rank, *weight.shape[1:]), draw(weight.shape[0], rank)
        low_rank[path] = LowRank(down, up, scale)
    parameters = dict(dit.named_parameters())
    return Adapter(f"a{seed}", low_rank, {name: draw(*parameters[name].shape) for name in diffs})


def run(dit: SpacetimeDiT, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(2, dit.config.in_channels, 3, 4, 6, generator=generator).to(dtype)
    context = torch.randn(2, 9, dit.config.text_dim, generator=generator).to(dtype)
    return dit(latents, torch.tensor([800.0, 20.0]), context, context_lengths=[9, 4])


def merged(dit: SpacetimeDiT, adapters: list[tuple[Adapter, float]]) -> SpacetimeDiT:
    """A model with the deltas in its weights, as plainly as can be."""
    other = SpacetimeDiT(dit.config).eval().requires_grad_(requires_grad=False)
    other.load_state_dict(dit.state_dict())
    for adapter, weight in adapters:
        for path, part in adapter.low_rank.items():
            delta = part.scale * part.up @ part.down.flatten(1)
            base = other.get_submodule(path).weight
            base += weight * delta.view_as(base)
        for name, delta in adapter.deltas.items():
            other.get_parameter(name).add_(weight * delta)
    return other


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture(scope="module")
def dit() -> SpacetimeDiT:
    return make_dit()


@torch.no_grad()
def test_several_adapters_equal_merged_weights(dit):
    adapters = [
        (make_adapter(dit, diffs=DIFFS), 0.8),
        (make_adapter(dit, seed=2, rank=1, scale=3.0), -0.3),
        (make_adapter(dit, seed=3, diffs=DIFFS[:3]), 0.5),
    ]
    plain = run(dit)
    with attached(dit, adapters):
        together = run(dit)
    with attached(dit, adapters[:1]), attached(dit, adapters[1:]):
        nested = run(dit)
    expected = run(merged(dit, adapters))
    assert error(plain, expected) > 0.1
    assert error(together, expected) < 1e-5
    assert torch.equal(nested, together)
    assert torch.equal(run(dit), plain)


@torch.no_grad()
def test_bf16_is_as_good_as_merging(dit):
    half = make_dit(dtype=torch.bfloat16)
    adapters = [(make_adapter(dit, diffs=DIFFS), 0.7)]
    exact = run(merged(make_dit(dtype=torch.bfloat16).float(), adapters))
    with attached(half, adapters):
        ours = run(half, torch.bfloat16).float()
    folded = run(merged(make_dit(dtype=torch.bfloat16), adapters).bfloat16(), torch.bfloat16)
    assert error(ours, exact) < 1.2 * error(folded.float(), exact) < 0.1


@torch.no_grad()
def test_weights_stay_the_tensors_they_are(dit):
    adapter = make_adapter(dit, diffs=DIFFS)
    before = {name: (p, p.clone(), p._version) for name, p in dit.named_parameters()}
    attributes = {path: (type(m), set(vars(m))) for path, m in dit.named_modules()}

    def fail_inside():
        with attached(dit, [(adapter, 1.0)]):
            run(dit)
            assert dict(dit.named_parameters()).keys() == before.keys()
            with attached(dit, [(adapter, 1.0)]):
                run(dit)
                assert all(p is before[name][0] for name, p in dit.named_parameters())
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_inside()
    for name, parameter in dit.named_parameters():
        old, copy, version = before[name]
        assert parameter is old
        assert parameter._version == version
        assert torch.equal(parameter, copy)
    assert {path: (type(m), set(vars(m))) for path, m in dit.named_modules()} == attributes
    assert not dit._forward_pre_hooks


@torch.no_grad()
def test_weight_zero_changes_no_bit(dit):
    plain = run(dit)
    with attached(dit, [(make_adapter(dit, diffs=DIFFS), 0.0)]), attached(dit, []):
        assert torch.equal(run(dit), plain)


def test_gradients_reach_the_factors():
    dit, config = make_dit(), TINY
    adapter = make_adapter(dit)
    for part in adapter.low_rank.values():
        part.down.requires_grad_()
        part.up.requires_grad_()
    dit.gradient_checkpointing = True
    grads = []
    for _ in range(2):  # a second backward pass finds no freed graph
        with attached(dit, [(adapter, 1.0)]):
            run(dit).square().sum().backward()
        parts = adapter.low_rank.values()
        grads.append([g for part in parts for g in (part.down.grad, part.up.grad)])
        for part in parts:
            part.down.grad = part.up.grad = None
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    path = "blocks.1.ffn.up"
    part = adapter.low_rank[path]
    rest = Adapter("rest", {p: v for p, v in adapter.low_rank.items() if p != path})
    other = SpacetimeDiT(config)
    other.load_state_dict(merged(dit, [(rest, 1.0)]).state_dict())
    weight = other.get_submodule(path).weight
    weight.data += part.scale * (part.up @ part.down).detach()
    run(other).square().sum().backward()
    index = 2 * list(adapter.low_rank).index(path)
    expected = part.scale * weight.grad @ part.down.detach().T
    assert error(grads[1][index + 1], expected) < 1e-4


@torch.no_grad()
def test_compiled_blocks_take_adapters_and_drop_them():
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    dit, counter = make_dit(), CompileCounter()
    first = [(make_adapter(dit, diffs=DIFFS[:4]), 0.6)]
    second = [(make_adapter(dit, seed=2, diffs=DIFFS[:4]), -1.0)]
    plain, changed = run(dit), []
    for adapters in (first, second):
        with attached(dit, adapters):
            changed.append(run(dit))
    for block in dit.blocks:
        block.compile(backend=counter)
    frames = []
    for _ in range(2):
        assert error(run(dit), plain) < 1e-5
        for adapters, expected in zip((first, second), changed, strict=True):
            with attached(dit, adapters):
                assert error(run(dit), expected) < 1e-5
        frames.append(counter.frame_count)
    assert frames[0] == frames[1], "the second round is served from the first's cache"


@torch.no_grad()
def test_threads_never_share_adapters_silently(dit):
    adapter = make_adapter(dit)
    found: dict[str, Exception | None] = {}
    go, attached_there, done = threading.Event(), threading.Event(), threading.Event()

    def attempt(name, action):
        try:
            action()
            found[name] = None
        except InputError as problem:
            found[name] = problem

    def attach():
        with attached(dit, [(adapter, 1.0)]):
            pass

    def other():
        with torch.no_grad():
            attempt("run", lambda: run(dit))
            attempt("layer", lambda: dit.blocks[0].ffn(torch.zeros(1, TINY.hidden_dim)))
            attempt("attach", attach)
            attached_there.set()
            go.wait()
            attempt("after", lambda: (run(dit), attach()))
        done.set()

    thread = threading.Thread(target=other)
    with attached(dit, [(adapter, 1.0)]):
        thread.start()
        assert attached_there.wait(10)
    go.set()
    thread.join(10)
    assert done.is_set()
    assert found.pop("after") is None
    assert len(found) == 3
    assert all("another thread" in str(problem) for problem in found.values())


@torch.no_grad()
def test_streamed_blocks_take_adapters(dit, tmp_path):
    adapters = [(make_adapter(dit, diffs=DIFFS), 0.7)]
    plain = run(dit)
    with attached(dit, adapters):
        expected = run(dit)
    save_module(dit.state_dict(), {}, tmp_path, torch.float32)
    streamed = load_module(lambda: SpacetimeDiT(TINY), tmp_path, torch.float32, "cpu", stream=True)
    with attached(streamed, adapters):
        assert torch.equal(run(streamed), expected)
    assert torch.equal(run(streamed), plain)


@torch.no_grad()
def test_quantised_weights_take_products_and_refuse_full_deltas():
    quantisation = pytest.importorskip("torchao.quantization")
    dit = make_dit()
    quantisation.quantize_(dit, quantisation.Int8WeightOnlyConfig())
    products = make_adapter(dit, diffs=("blocks.0.norm_cross.weight", "blocks.0.ffn.up.bias"))
    plain = run(dit)
    with attached(dit, [(products, 0.5)]):
        assert error(run(dit), run(merged(make_dit(), [(products, 0.5)]))) < 0.05
    assert torch.equal(run(dit), plain)
    full = make_adapter(dit, diffs=("blocks.0.ffn.up.weight",))
    with pytest.raises(ModelError, match="quantised"), attached(dit, [(full, 1.0)]):
        pass


def test_an_adapter_of_another_model_is_refused(dit):
    wide = make_dit(replace(TINY, num_heads=4, num_layers=3))
    with (
        pytest.raises(ModelError, match=r"'a1' doesn't fit .*48x16 for 24x16.* and \d+ more"),
        attached(dit, [(make_adapter(wide), 1.0)]),
    ):
        pass


# files


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
    path = folder / (dialect if dialect == "peft" else f"{dialect}.safetensors")
    write_lora(adapter, path, dialect)
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
@given(adapter=drawn_adapters(), chain=st.permutations(list(DIALECTS)))
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


@pytest.mark.parametrize("dialect", ["diffusers", "peft"])
def test_what_a_dialect_cannot_say_is_refused_before_a_file_is_there(dialect, dit, tmp_path):
    adapter = make_adapter(dit, diffs=("blocks.0.norm_cross.weight", "blocks.1.modulation"))
    with pytest.raises(ModelError, match=r"no names for 2 parts .*norm_cross.*'vidgen'"):
        write_lora(adapter, tmp_path / "out.safetensors", dialect)
    assert list(tmp_path.iterdir()) == []


def test_parts_without_a_name_elsewhere_have_one_in_ours(tmp_path):
    adapter = make_adapter(make_dit(SOUND))
    assert any("audio" in path for path in adapter.low_rank)
    assert_same(write_read(adapter, SOUND, tmp_path, "vidgen"), adapter)
    with pytest.raises(ModelError, match="audio"):
        write_lora(adapter, tmp_path / "x.safetensors", "kohya")
    with pytest.raises(InputError, match="did you mean 'kohya'"):
        write_lora(adapter, tmp_path / "x.safetensors", "koyha")


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


def test_plain_tensors_in_a_pth(dit, tmp_path):
    adapter = make_adapter(dit)
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
         r"2 of 2 tensors have no place in it \(transformer.single_transformer_blocks.0"),
        ({"diffusion_model.blocks.2.self_attn.q.lora_A.weight": torch.ones(2, 24)},
         r"model of 2 blocks, 24 wide: 1 of 1 tensors have no place"),
        ({Q.format("A"): torch.ones(2, 48), Q.format("B"): torch.ones(48, 2)},
         r"1 of 2 don't fit \(blocks.0.self_attn.q: 48x48 for 24x24\)"),
        ({Q.format("A"): torch.ones(2, 24), Q.format("B"): torch.ones(24, 3)}, "ranks of"),
        ({Q.format("A"): torch.ones(0, 24), Q.format("B"): torch.ones(24, 0)}, "ranks of"),
        ({Q.format("A"): torch.ones(()), Q.format("B"): torch.ones(24)}, "ranks of"),
        ({Q.format("A"): torch.ones(2, 24)}, r"lack .*\(blocks.0.attn1.to_q\)"),
        ({Q.format("A"): torch.ones(2, 24), Q.format("B"): torch.full((24, 2), torch.nan)},
         r"1 of 2 tensors are not finite \(.*lora_B"),
        ({Q.format("A"): torch.ones(2, 24), Q.format("B"): torch.ones(24, 2),
          "blocks.0.self_attn.q.lora_A.weight": torch.ones(2, 24)}, "1 of 3 tensors come twice"),
        ({"transformer.blocks.0.norm2.diff": torch.ones(25)}, r"weight: \[25\] for \[24\]"),
        ({"blocks.0.attn1.to_q.weight": torch.ones(24, 24)}, "no place"),
        ({Q.format("A"): torch.ones(2, 24), "transformer.blocks.0.attn1.to_q.dora_scale":
          torch.ones(24)}, "is a DoRA, and only LoRA"),
        ({"lora_unet_blocks_0_self_attn_q.lokr_w1": torch.ones(2, 2)}, "is a LoKr"),
        ({"lora_te_encoder_block_0.lora_down.weight": torch.ones(2, 2)}, "holds no LoRA tensors"),
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
    assert re.search(r"20 of \d+ tensors have no place .*blocks\.2\.", text)
    assert re.search(r"\d+ of \d+ don't fit \(.*48x\d+ for 24x\d+.*, and \d+ more\)", text)


def test_files_that_cannot_be_read_say_so(tmp_path):
    with pytest.raises(InputError, match=r"doesn't exist; --lora takes PATH"):
        read_lora(tmp_path / "no.safetensors", TINY)
    (tmp_path / "half.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{}")
    with pytest.raises(ModelError, match="copy it again"):
        read_lora(tmp_path / "half.safetensors", TINY)
    with pytest.raises(ModelError, match=r"no \*.safetensors"):
        read_lora(make_folder(tmp_path / "empty"), TINY)
    folder = make_folder(tmp_path / "two")
    for name in "ab":
        save(folder / f"{name}.safetensors", [Q])
    with pytest.raises(ModelError, match=r"a.safetensors, b.safetensors; name one"):
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
    assert "2 tensors for a text encoder are left out" in first
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
    ],
)
def test_an_option_is_path_weight_expert(text, path, weight, expert):
    assert parse_option(text) == LoraChoice(Path(path), weight, expert)


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


class NewTensors(TorchDispatchMode):
    """Sizes of all tensors that operations make, but for views of those given."""

    def __init__(self, known):
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if out.untyped_storage().data_ptr() not in self.known:
            self.sizes.append(out.numel())
        return out


@torch.no_grad()
def test_low_rank_parts_copy_no_weight(dit):
    adapter = make_adapter(dit, rank=2)
    layer, part = dit.blocks[0].ffn.up, adapter.low_rank["blocks.0.ffn.up"]
    x = torch.randn(5, layer.in_features)
    known = [x, *dit.parameters()]
    known += [factor for part in adapter.low_rank.values() for factor in (part.down, part.up)]
    with NewTensors(known) as new, attached(dit, [(adapter, 1.0)]):
        out = layer(x)
    assert max(new.sizes) == out.numel() < layer.weight.numel() / 4
    expected = F.linear(x, layer.weight + part.scale * part.up @ part.down, layer.bias)
    assert error(out, expected) < 1e-5
