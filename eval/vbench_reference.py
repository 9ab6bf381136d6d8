"""VBench's own functions on clips, with random networks; `vbench_parity.py` runs it in their venv.

    ENVIRONMENT/bin/python eval/vbench_reference.py WORK [--dino FOLDER]

Reads WORK/clips, WORK/pictures and the networks that `vbench_parity.py` wrote to WORK/networks;
adds AMT, which is VBench's own code, at random weights and as TorchScript. Writes
WORK/theirs.json: {dimension: {clip: value}}, and why a dimension is left out. Nothing of vidgen is
imported here.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

SIZE = (1, 3, 144, 144)  # clips of 132x140, filled up to a divisor of 16
AMT = {"name": "vbench.third_party.amt.networks.AMT-S.Model",
       "params": {"corr_radius": 3, "corr_lvls": 4, "num_flows": 3}}  # fmt: skip
QKV = ("query", "key", "value")
#: layers of DINO's blocks -> those of transformers' ViT
VIT_LAYER = {
    "norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
}  # fmt: skip
#: layers of OpenAI's CLIP -> those of transformers'
CLIP_LAYER = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
}  # fmt: skip
Results = dict[str, dict[str, Any]]


def mend_torchvision() -> None:
    """Let torchvision be imported beside a torch that its compiled operators weren't built for.

    VBench's temporal dimensions take nothing but its transforms, which are plain Python.
    """
    while True:
        try:
            importlib.import_module("torchvision")
            return
        except RuntimeError as error:
            missing = re.search(r"operator (torchvision::\w+) does not exist", str(error))
            if missing is None:
                raise
            torch.library.define(missing[1], "(Tensor a) -> Tensor")
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]


class Wrapped(torch.nn.Module):
    """A network of VBench's with the one output that is wanted, to be traced."""

    def __init__(self, network: torch.nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.network, self.call = network, call

    def forward(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """The network on two pictures."""
        found: torch.Tensor = self.call(self.network, one, other)
        return found


def trace(network: torch.nn.Module, call: Callable[..., Any], path: Path) -> None:
    """Write a network as TorchScript for pictures of one size."""
    pictures = torch.rand(SIZE), torch.rand(SIZE)
    with torch.no_grad():
        torch.jit.trace(Wrapped(network, call).eval(), pictures, check_trace=False).save(str(path))


class Flow:
    """RAFT's way in, before a network as TorchScript."""

    def __init__(self, path: Path) -> None:
        self.network = torch.jit.load(str(path)).eval()

    def __call__(
        self, one: torch.Tensor, other: torch.Tensor, *, iters: int, test_mode: bool
    ) -> tuple[None, torch.Tensor]:
        """The flow [1, 2, H, W] from one picture to another, filled up to sides of 8."""
        assert test_mode
        assert one.shape[2] % 8 == one.shape[3] % 8 == 0
        assert iters == 20
        return None, self.network(one, other)


def movement_of(path: Path) -> tuple[Any, Any]:
    """VBench's dynamic degree and static filter before a flow network as TorchScript."""
    from vbench import dynamic_degree
    from vbench.cli import static_filter

    static_filter.DEVICE = "cpu"

    def load(meter: Any) -> None:
        meter.model = Flow(path)

    dynamic, static = (
        type("Meter", (kind,), {"load_model": load})({}, "cpu")
        for kind in (dynamic_degree.DynamicDegree, static_filter.StaticFilter)
    )
    return dynamic, static


def random_amt(path: Path) -> Any:
    """VBench's motion smoothness with AMT-S at random weights; the network also as TorchScript."""
    from omegaconf import OmegaConf
    from vbench import motion_smoothness

    config, weights = path.with_suffix(".yaml"), path.with_suffix(".pth")
    OmegaConf.save(OmegaConf.create({"network": AMT}), config)
    torch.manual_seed(2)
    network = motion_smoothness.build_from_cfg(OmegaConf.create(AMT))
    torch.save({"state_dict": network.state_dict()}, weights)
    meter = motion_smoothness.MotionSmoothness(str(config), str(weights), "cpu")
    trace(
        meter.model,
        lambda net, a, b: net(a, b, torch.full((1, 1, 1, 1), 0.5), scale_factor=1, eval=True)[
            "imgt_pred"],
        path,
    )  # fmt: skip
    return meter


def dino_of(folder: Path, repository: Path) -> torch.nn.Module:
    """DINO's own network, which torch.hub would clone, with a transformers folder's weights."""
    sys.path.insert(0, str(repository))
    from vision_transformer import VisionTransformer

    config = json.loads((folder / "config.json").read_text())
    network = VisionTransformer(
        patch_size=config["patch_size"], embed_dim=config["hidden_size"],
        depth=config["num_hidden_layers"], num_heads=config["num_attention_heads"],
        mlp_ratio=config["intermediate_size"] / config["hidden_size"], qkv_bias=True,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
    )  # fmt: skip
    given = load_file(folder / "model.safetensors")
    weights = {
        "cls_token": given["embeddings.cls_token"],
        "pos_embed": given["embeddings.position_embeddings"],
    }
    names = {"patch_embed.proj": "embeddings.patch_embeddings.projection", "norm": "layernorm"}
    for i in range(config["num_hidden_layers"]):
        own, theirs = f"blocks.{i}", f"encoder.layer.{i}"
        names |= {f"{own}.{a}": f"{theirs}.{b}" for a, b in VIT_LAYER.items()}
        for kind in ("weight", "bias"):
            parts = [given[f"{theirs}.attention.attention.{n}.{kind}"] for n in QKV]
            weights[f"{own}.attn.qkv.{kind}"] = torch.cat(parts)
    weights |= renamed(given, names)
    network.load_state_dict(weights)
    return network.eval()


def clip_of(folder: Path) -> Any:
    """OpenAI's CLIP with the pictures' weights of a transformers folder."""
    from clip.model import CLIP

    config = json.loads((folder / "config.json").read_text())
    width, layers = config["hidden_size"], config["num_hidden_layers"]
    network = CLIP(
        config["projection_dim"], config["image_size"], layers, width, config["patch_size"],
        8, 16, 64, 1, 1,
    )  # fmt: skip
    given, root = load_file(folder / "model.safetensors"), "vision_model"
    weights = {
        "conv1.weight": given[f"{root}.embeddings.patch_embedding.weight"],
        "class_embedding": given[f"{root}.embeddings.class_embedding"],
        "positional_embedding": given[f"{root}.embeddings.position_embedding.weight"],
        "proj": given["visual_projection.weight"].T,
    }
    names = {"ln_pre": f"{root}.pre_layrnorm", "ln_post": f"{root}.post_layernorm"}
    for i in range(layers):
        own, theirs = f"transformer.resblocks.{i}", f"{root}.encoder.layers.{i}"
        names |= {f"{own}.{a}": f"{theirs}.{b}" for a, b in CLIP_LAYER.items()}
        for kind in ("weight", "bias"):
            parts = [given[f"{theirs}.self_attn.{n}_proj.{kind}"] for n in "qkv"]
            weights[f"{own}.attn.in_proj_{kind}"] = torch.cat(parts)
    network.visual.load_state_dict(weights | renamed(given, names))
    return network.eval().requires_grad_(requires_grad=False)


def renamed(given: dict[str, torch.Tensor], names: dict[str, str]) -> dict[str, torch.Tensor]:
    """Weights and biases of layers under VBench's networks' names."""
    return {f"{own}.{kind}": given[f"{theirs}.{kind}"]
            for own, theirs in names.items() for kind in ("weight", "bias")}  # fmt: skip


class Embedder:
    """DreamSim's way in, before a network as TorchScript."""

    def __init__(self, path: Path) -> None:
        self.network = torch.jit.load(str(path)).eval()

    @torch.no_grad()
    def embed(self, pictures: torch.Tensor) -> torch.Tensor:
        """Features [B, D] of pictures [B, 3, 224, 224] in [0, 1]."""
        found: torch.Tensor = self.network(pictures)
        return found


def by_clip(results: Any) -> dict[str, Any]:
    """{clip's file name: value} of what a VBench function returns; its last part is by video."""
    return {Path(one["video_path"]).name: one["video_results"] for one in results[-1]}


def measure(work: Path, dino: Path | None) -> tuple[Results, dict[str, str]]:
    """All dimensions by VBench's functions, and why one couldn't be taken."""
    networks = work / "networks"
    clips = sorted(str(path) for path in (work / "clips").glob("*.mp4"))
    pairs = [(str(work / "pictures" / f"{Path(clip).stem}.png"), clip) for clip in clips]
    dynamic, static = movement_of(networks / "raft.pt")
    smooth = random_amt(networks / "amt.pt")
    network = None if dino is None else dino_of(networks / "dino", dino)
    sys.modules.setdefault("dreamsim", types.ModuleType("dreamsim"))
    sys.modules["dreamsim"].dreamsim = None  # type: ignore[attr-defined]
    takes: dict[str, Callable[[], Any]] = {
        "subject_consistency": lambda: needs(network) and call(
            "vbench.subject_consistency", network, clips, "cpu", False),
        "background_consistency": lambda: call(
            "vbench.background_consistency", clip_of(networks / "clip"), None, clips, "cpu", False),
        "temporal_flickering": lambda: call("vbench.temporal_flickering", clips),
        "motion_smoothness": lambda: call("vbench.motion_smoothness", smooth, clips),
        "dynamic_degree": lambda: call("vbench.dynamic_degree", dynamic, clips),
        "i2v_subject": lambda: needs(network) and call(
            "vbench2_beta_i2v.i2v_subject", network, pairs, "cpu"),
        "i2v_background": lambda: call(
            "vbench2_beta_i2v.i2v_background", Embedder(networks / "dreamsim.pt"), pairs, "cpu"),
    }  # fmt: skip
    results: Results = {
        "static_filter": {Path(clip).name: bool(static.infer(clip)) for clip in clips}
    }
    left_out = {}
    for dimension, take in takes.items():
        try:
            results[dimension] = by_clip(take())
        except (ImportError, LookupError) as error:
            left_out[dimension] = f"{type(error).__name__}: {error}"
    return results, left_out


def needs(network: Any) -> bool:
    """Refuse a dimension without DINO's code."""
    if network is None:
        raise LookupError("DINO's code isn't part of the package; give --dino FOLDER")
    return True


def call(module: str, *args: Any) -> Any:
    """VBench's function of a dimension; it bears its module's last name."""
    return getattr(importlib.import_module(module), module.rpartition(".")[2])(*args)


def main() -> None:
    """Measure, and write what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--dino", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    mend_torchvision()
    results, left_out = measure(args.work, args.dino)
    (args.work / "theirs.json").write_text(json.dumps({"results": results, "left_out": left_out}))


if __name__ == "__main__":
    main()
