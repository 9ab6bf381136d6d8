"""Every Wan variant opened in both published layouts, tiny and at true size; what is refused."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.wan_models import (
    VARIANTS,
    build_diffusers,
    build_original,
    make_pipeline,
    original_config,
)
from vidgen.core.errors import InputError, ModelError
from vidgen.models.image import ImageConfig
from vidgen.models.presets import DIT_PRESETS, TEXT_PRESETS, VAE_PRESETS
from vidgen.weights.component import CLASSES, Role, table_of
from vidgen.weights.configs import (
    dit_from_diffusers,
    dit_from_wan,
    dit_to_diffusers,
    dit_to_wan,
    infer_dit,
    infer_image,
    infer_text,
    infer_vae,
    vae_from_diffusers,
    vae_to_diffusers,
)
from vidgen.weights.family import VARIANTS as FAMILY
from vidgen.weights.family import recognise
from vidgen.weights.folder import DiffusersFolder, ModelFolder
from vidgen.weights.keymap import fuse_clip, renamed, split_clip
from vidgen.weights.layouts import open_model
from vidgen.weights.tensors import Tensors, held

CLIP = ImageConfig(
    image_size=224, patch_size=14, hidden_dim=1280, ffn_dim=5120, num_layers=32, num_heads=16
)
EXPECTED = {  # variant, family, conditioning at the tiny sizes
    "t2v": ("t2v-1.3b", "wan2.1", "none"),
    "i2v": ("i2v-14b-480p", "wan2.1", "channels"),
    "flf2v": ("flf2v-14b", "wan2.1", "channels"),
    "vace": ("vace-1.3b", "wan2.1", "control"),
    "t2v-a14b": ("t2v-a14b", "wan2.2", "none"),
    "i2v-a14b": ("i2v-a14b", "wan2.2", "channels"),
    "ti2v-5b": ("ti2v-5b", "wan2.2", "tokens"),
}
WANS_OWN = {  # tensors of Wan's own classes: how many, SHA-256 of the lines "name [shape]", sorted
    "t2v-1.3b": (825, "83f3237464a545f01585d3aab2efa8ec4333b7b9d73d329aa5aaa4d1a861e223"),
    "t2v-14b": (1095, "7ca52b13faf083dcb17dd2de5b34a0ec72db782ec816192b9c40543a40ae3186"),
    "i2v-14b-480p": (1303, "129391da486fe9b9cf085b86a46ba3a9114acaa92a5499197e37af2574774d67"),
    "flf2v-14b": (1304, "bd8c9f752e19444a316959621fd6bda7547017a578b55938aa4c76e1d5505e7c"),
    "vace-1.3b": (1264, "65f14b15c8dccb0d320505c993b9eb0d03f3e15b81b68a77b0b9bb177af2519d"),
    "vace-14b": (1331, "b03b89179ef0f6c1076e6482f9da2b84ee99fc645ca2bd0730c3a0f57e797c56"),
    "i2v-a14b": (1095, "9dc5a4e7268a050f3708609791596e50ae93d7324592636d21090c51cb71baec"),
    "ti2v-5b": (825, "e6aa5b3ad491053717cbb3af607b9d9e6e22e91bb0ae32a0c41eaeccba85787b"),
    "vae 2.1": (194, "6d12bd5199d9dcd5b316dbc98c72a68be03e0ac320eb14a4ccd3b5a7bac04ca8"),
    "vae 2.2": (196, "d6eb318580d7756b4a0e2187642cbff278616b7e3d4580d041014a424ab0911e"),
    "umt5-xxl": (242, "d6379851fe159f731ef389ae07835eb08fa89ec5d66c040b0d37ac466279d11b"),
    "clip": (391, "9504e81272db4bfec2c0895c316d43a3a8fea30bdfe2c7c95f772f1fa0c620c5"),
}
TRUE: dict[str, tuple[Role, object]] = {
    "t2v-1.3b": ("transformer", DIT_PRESETS["wan-1.3b"]),
    "t2v-14b": ("transformer", DIT_PRESETS["wan-14b"]),
    "i2v-14b-480p": ("transformer", DIT_PRESETS["wan-14b-i2v"]),
    "flf2v-14b": ("transformer", DIT_PRESETS["wan-14b-flf2v"]),
    "vace-1.3b": ("transformer", DIT_PRESETS["wan-vace-1.3b"]),
    "vace-14b": ("transformer", DIT_PRESETS["wan-vace-14b"]),
    "i2v-a14b": ("transformer", DIT_PRESETS["wan22-14b-i2v"]),
    "ti2v-5b": ("transformer", DIT_PRESETS["wan22-5b"]),
    "vae 2.1": ("vae", VAE_PRESETS["wan21"]),
    "vae 2.2": ("vae", VAE_PRESETS["wan22"]),
    "umt5-xxl": ("text_encoder", TEXT_PRESETS["umt5-xxl"]),
    "clip": ("image_encoder", CLIP),
}
DITS = [name for name, (role, _) in TRUE.items() if role == "transformer"]


def original(name: str) -> Tensors:
    """A published component's tensors by Wan's own names, at true size on the meta device."""
    role, config = TRUE[name]
    with torch.device("meta"):
        state = CLASSES[role](config).state_dict()
    names = renamed(state, table_of(role, config), "vidgen", "wan")
    assert names.keys() == state.keys()
    tensors = Tensors({names[key]: held(value) for key, value in state.items()})
    return Tensors(fuse_clip(tensors)) if role == "image_encoder" else tensors


@pytest.mark.parametrize("name", TRUE)
def test_original_names_and_shapes_are_those_of_wans_own_classes(name: str) -> None:
    lines = sorted(f"{key} {list(lazy.likeness.shape)}" for key, lazy in original(name).items())
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert (len(lines), digest) == WANS_OWN[name]


@pytest.mark.parametrize("name", TRUE)
def test_architectures_are_inferred_from_the_published_shapes(name: str) -> None:
    (role, config), split = TRUE[name], split_clip(original(name))
    shapes = {key: tuple(lazy.likeness.shape) for key, lazy in split.items()}
    if role == "vae":
        assert infer_vae(shapes) == config
        return
    names = renamed(split, table_of(role, config), "wan", "vidgen")
    shapes = {ours: shapes[key] for key, ours in names.items()}
    infer = {"transformer": infer_dit, "text_encoder": infer_text, "image_encoder": infer_image}
    assert infer[role](shapes) == config


@pytest.mark.parametrize("name", DITS)
def test_true_sizes_are_recognised(name: str) -> None:
    config = TRUE[name][1]
    experts = 2 if name == "i2v-a14b" else 1
    assert recognise(config, num_experts=experts, name="folder").name == name
    if name == "t2v-14b":
        assert recognise(config, num_experts=2, name="folder").name == "t2v-a14b"
    if name == "i2v-14b-480p":
        for folder in ("Wan2.1-I2V-14B-720P", "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers"):
            assert recognise(config, num_experts=1, name=folder).name == "i2v-14b-720p"


def test_what_no_variant_has_is_refused_by_name() -> None:
    odd = replace(DIT_PRESETS["wan-14b"], in_channels=52)
    with pytest.raises(ModelError, match=r"52 input and 16 output channels.*t2v-1\.3b"):
        recognise(odd, num_experts=1, name="folder")


@pytest.mark.parametrize("name", DITS)
def test_configs_go_to_other_layouts_and_back(name: str) -> None:
    config = TRUE[name][1]
    assert replace(config, **dit_from_diffusers(dit_to_diffusers(config))) == config
    assert replace(config, **dit_from_wan(dit_to_wan(config, "t2v"))) == config


@pytest.mark.parametrize("name", ["wan21", "wan22"])
def test_vae_configs_go_to_diffusers_and_back(name: str) -> None:
    config = VAE_PRESETS[name]
    assert vae_from_diffusers(json.loads(json.dumps(vae_to_diffusers(config)))) == config


def test_defaults_are_those_of_the_releases() -> None:
    def facts(name: str) -> tuple:
        d = FAMILY[name].defaults
        return (d.num_steps, d.shift, d.guidance_scale, d.guidance_scale_2, d.boundary, d.fps,
                d.num_frames, d.width, d.height)

    assert facts("t2v-1.3b") == (50, 5.0, 5.0, None, None, 16.0, 81, 832, 480)
    assert facts("i2v-14b-480p") == (40, 3.0, 5.0, None, None, 16.0, 81, 832, 480)
    assert facts("i2v-14b-720p") == (40, 5.0, 5.0, None, None, 16.0, 81, 1280, 720)
    assert facts("flf2v-14b") == (50, 16.0, 5.0, None, None, 16.0, 81, 1280, 720)
    assert facts("vace-14b") == (50, 16.0, 5.0, None, None, 16.0, 81, 1280, 720)
    assert facts("t2v-a14b") == (40, 12.0, 4.0, 3.0, 0.875, 16.0, 81, 1280, 720)
    assert facts("i2v-a14b") == (40, 5.0, 3.5, 3.5, 0.9, 16.0, 81, 1280, 720)
    assert facts("ti2v-5b") == (50, 5.0, 5.0, None, None, 24.0, 121, 1280, 704)
    assert FAMILY["i2v-14b-480p"].defaults.negative_prompt.startswith("镜头晃动，色调艳丽")


Build = Callable[..., Path]
BUILDERS: list[Build] = [build_diffusers, build_original]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("build", BUILDERS)
def test_every_variant_is_opened_with_its_weights(
    build: Build, variant: str, tmp_path: Path
) -> None:
    model = open_model(str(build(tmp_path / "model", variant)))
    assert isinstance(model, ModelFolder)
    assert (model.variant, model.family, model.conditioning) == EXPECTED[variant]
    assert model.license == "Apache-2.0"
    pipe = make_pipeline(variant)
    expected = {
        "vae": pipe.vae, "text_encoder": pipe.text_encoder, "transformer": pipe.transformer,
        "transformer_2": getattr(pipe, "transformer_2", None),
        "image_encoder": getattr(pipe, "image_encoder", None),
    }
    assert model.components.keys() == {role for role, module in expected.items() if module}
    for role, part in model.components.items():
        part.require_complete()
        state = part.load(torch.float32, "cpu").state_dict()
        theirs = expected[role].state_dict()
        theirs.pop("encoder.embed_tokens.weight", None)
        names = renamed(state, table_of(role, part.config), "vidgen", "diffusers")
        assert names.keys() == state.keys()
        assert set(names.values()) == theirs.keys()
        assert all(torch.equal(state[key], theirs[name]) for key, name in names.items())


@pytest.mark.parametrize("build", BUILDERS)
def test_experts_and_boundary(build: Build, tmp_path: Path) -> None:
    model = open_model(str(build(tmp_path / "model", "t2v-a14b")))
    pipe = make_pipeline("t2v-a14b")
    assert model.defaults.boundary == 0.875
    for role in ("transformer", "transformer_2"):
        state = model.components[role].load(torch.float32, "cpu").state_dict()
        assert torch.equal(state["head.proj.weight"], getattr(pipe, role).proj_out.weight)


def test_a_diffusers_folder_gives_its_schedulers_shift_and_its_boundary(tmp_path: Path) -> None:
    path = build_diffusers(tmp_path / "model", "flf2v")
    assert open_model(str(path)).defaults.shift == 16.0
    (path / "scheduler" / "scheduler_config.json").write_text(
        json.dumps({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 7.5})
    )
    defaults = open_model(str(path)).defaults
    assert (defaults.shift, defaults.sampler) == (7.5, "euler")


def test_shards_are_opened_as_one(tmp_path: Path) -> None:
    whole = open_model(str(build_original(tmp_path / "whole", "i2v-a14b")))
    split = open_model(str(build_original(tmp_path / "split", "i2v-a14b", num_shards=3)))
    theirs = open_model(str(build_diffusers(tmp_path / "theirs", "i2v-a14b", max_shard_size="9KB")))
    for role in ("transformer", "transformer_2"):
        states = [m.components[role].load(torch.float32, "cpu").state_dict()
                  for m in (whole, split, theirs)]
        assert len(theirs.components[role].tensors.files) > 1
        for key, value in states[0].items():
            assert torch.equal(value, states[1][key])
            assert torch.equal(value, states[2][key])


@pytest.mark.parametrize("build", BUILDERS)
def test_positions_missing_from_the_config_are_seen_in_the_tensors(
    build: Build, tmp_path: Path
) -> None:
    path = build(tmp_path / "model", "flf2v")
    if build is build_diffusers:
        config = json.loads((path / "transformer" / "config.json").read_text())
        del config["pos_embed_seq_len"]
        (path / "transformer" / "config.json").write_text(json.dumps(config))
    model = open_model(str(path))
    assert model.components["transformer"].config.image_positions == 10
    assert model.variant == "flf2v-14b"


def test_without_a_config_tiny_heads_are_asked_for(tmp_path: Path) -> None:
    path = build_original(tmp_path / "model", "t2v", with_config=False)
    with pytest.raises(ModelError, match=r"config\.json.*is missing"):
        open_model(str(path))


def test_without_a_config_published_widths_are_enough(tmp_path: Path) -> None:
    """Heads of 128, as all published transformers have them."""
    path = build_original(tmp_path / "model", "t2v")
    state = load_file(path / "diffusion_pytorch_model.safetensors")
    wide = {
        key: torch.zeros([128 if n == 24 else 768 if n == 144 else n for n in value.shape])
        for key, value in state.items()
    }
    save_file(wide, path / "diffusion_pytorch_model.safetensors")
    (path / "config.json").unlink()
    model = open_model(str(path))
    config = model.components["transformer"].config
    assert (config.num_heads, config.head_dim, config.num_layers) == (1, 128, 2)
    model.components["transformer"].require_complete()


def test_the_card_gives_another_licence(tmp_path: Path) -> None:
    path = build_diffusers(tmp_path / "model", "t2v")
    (path / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n# A fine-tune\n")
    assert open_model(str(path)).license == "cc-by-nc-4.0"


def test_another_familys_folder_is_foreign(tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text("{}")
    (tmp_path / "model_index.json").write_text('{"_class_name": "LTXPipeline"}')
    model = open_model(str(tmp_path))
    assert isinstance(model, DiffusersFolder)
    assert (model.path, model.class_name) == (tmp_path, "LTXPipeline")
    assert len(model.content_hash) == 64
    assert model.num_bytes > 30


def test_a_published_state_dict_may_be_safetensors(tmp_path: Path) -> None:
    path = build_original(tmp_path / "model", "t2v")
    for pickled in path.glob("*.pth"):
        save_file(torch.load(pickled, weights_only=True), pickled.with_suffix(".safetensors"))
        pickled.unlink()
    open_model(str(path)).components["vae"].load(torch.float32, "cpu")


# Bad folders: (layout, variant, what is done to it, what the message says)
def _cut(name: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        file = path / name
        file.write_bytes(file.read_bytes()[:-1000])

    return damage


def _drop(name: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        target = path / name
        shutil.rmtree(target) if target.is_dir() else target.unlink()

    return damage


def _swap_shards(path: Path) -> None:
    """A shard of another download under the right name."""
    folder = path / "high_noise_model"
    shard = sorted(folder.glob("*-of-*.safetensors"))[1]
    state = load_file(shard)
    state.pop(sorted(state)[0])
    save_file(state, shard)


BAD = [
    (build_diffusers, "t2v", _drop("text_encoder"), "text_encoder.*copy the whole folder again"),
    (build_diffusers, "t2v", _drop("vae/diffusion_pytorch_model.safetensors"), "vae has no weight"),
    (build_diffusers, "t2v", _drop("vae/config.json"), r"vae/config\.json can't be read"),
    (build_diffusers, "t2v", _drop("tokenizer/tokenizer.json"), r"tokenizer\.json is missing"),
    (build_diffusers, "i2v", _drop("image_encoder"), "image_encoder"),
    (build_diffusers, "t2v", _cut("transformer/diffusion_pytorch_model.safetensors"), "truncated"),
    (build_original, "t2v", _cut("Wan2.1_VAE.pth"), r"Wan2\.1_VAE\.pth.*copy it again"),
    (build_original, "t2v", _drop("Wan2.1_VAE.pth"), r"Wan2\.1_VAE\.pth.*missing"),
    (build_original, "t2v", _drop("models_t5_umt5-xxl-enc-bf16.pth"), "models_t5.*missing"),
    (build_original, "ti2v-5b", _drop("Wan2.2_VAE.pth"), r"Wan2\.2_VAE\.pth.*missing"),
    (build_original, "i2v", _drop("models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"),
     "models_clip.*missing"),
    (build_original, "t2v-a14b", _drop("low_noise_model"), "low_noise_model is missing"),
    (build_original, "t2v-a14b",
     _drop("high_noise_model/diffusion_pytorch_model-00002-of-00003.safetensors"),
     r"lacks 1 of 3 shards: diffusion_pytorch_model-00002-of-00003\.safetensors"),
    (build_original, "t2v-a14b", _swap_shards, "copy these files again"),
]  # fmt: skip


@pytest.mark.parametrize(("build", "variant", "damage", "message"), BAD)
def test_what_is_missing_or_damaged_is_named(
    build: Build, variant: str, damage: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    options = {"num_shards": 3} if variant == "t2v-a14b" else {}
    path = build(tmp_path / "model", variant, **options)
    open_model(str(path))
    damage(path)
    with pytest.raises(ModelError, match=message):
        open_model(str(path))


def test_a_pickle_that_holds_code_is_refused(tmp_path: Path) -> None:
    path = build_original(tmp_path / "model", "t2v")
    torch.save({"conv1.weight": Path("/")}, path / "Wan2.1_VAE.pth")
    with pytest.raises(ModelError, match=r"Wan2\.1_VAE\.pth contains more than tensors"):
        open_model(str(path))


@pytest.mark.parametrize("class_name", ["WanAnimateTransformer3DModel", "UNet3DConditionModel"])
def test_another_transformer_is_refused(class_name: str, tmp_path: Path) -> None:
    path = build_diffusers(tmp_path / "model", "t2v")
    config = json.loads((path / "transformer" / "config.json").read_text())
    config["_class_name"] = class_name
    (path / "transformer" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=class_name):
        open_model(str(path))


NONSENSE = [
    ("transformer/config.json", {"num_layers": "2"}, "num_layers must be a whole number"),
    ("image_encoder/config.json", {"patch_size": None}, "patch_size must be a whole number"),
    ("image_encoder/config.json", {"patch_size": -1}, "patch_size must be 1 or more, not -1"),
    ("scheduler/scheduler_config.json", {"flow_shift": "high"}, "shift must be a number"),
    ("model_index.json", {"vae": []}, "no vae"),
]


@pytest.mark.parametrize(("file", "settings", "message"), NONSENSE)
def test_settings_that_mean_nothing_are_named(
    file: str, settings: dict[str, object], message: str, tmp_path: Path
) -> None:
    path = build_diffusers(tmp_path / "model", "i2v") / file
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises((InputError, ModelError), match=message):
        open_model(str(tmp_path / "model"))


def test_shards_of_a_config_with_more_layers_are_refused_on_loading(tmp_path: Path) -> None:
    path = build_original(tmp_path / "model", "t2v")
    (path / "config.json").write_text(json.dumps(original_config("t2v") | {"num_layers": 3}))
    with pytest.raises(ModelError, match="missing"):
        open_model(str(path)).components["transformer"].load(torch.float32, "cpu")


def test_an_empty_folder_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no model\.json.*model_index\.json"):
        open_model(str(tmp_path))
