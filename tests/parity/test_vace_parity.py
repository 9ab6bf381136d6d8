"""The same random weights in a `SpacetimeDiT` with control and in diffusers' VACE transformer."""

from dataclasses import replace

import pytest
import torch
from diffusers import WanVACETransformer3DModel

from vidgen.models.dit import SpacetimeDiT
from vidgen.models.dit_types import DiTConfig
from vidgen.models.presets import DIT_PRESETS
from vidgen.weights.keymap import DIT_KEYS, renamed

TINY = replace(
    DIT_PRESETS["tiny"], num_layers=5, control_layers=(0, 2, 4), control_channels=7
)
PUBLISHED = {  # what the config.json of diffusers' folders say; the rest are its defaults
    "wan-vace-1.3b": {
        "num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960,
        "vace_layers": list(range(0, 30, 2)),
    },
    "wan-vace-14b": {"vace_layers": [0, 5, 10, 15, 20, 25, 30, 35]},
}
NUM_PARAMETERS = {"wan-vace-1.3b": 2_153_972_032, "wan-vace-14b": 17_337_592_896}


def make_pair(config: DiTConfig) -> tuple[SpacetimeDiT, WanVACETransformer3DModel]:
    torch.manual_seed(0)
    theirs = WanVACETransformer3DModel(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        text_dim=config.text_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
        vace_layers=list(config.control_layers),
        vace_in_channels=config.control_channels,
    ).eval()
    for name, parameter in theirs.named_parameters():
        if "norm" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    ours = SpacetimeDiT(config).eval()
    state = theirs.state_dict()
    names = renamed(state, DIT_KEYS, "diffusers", "vidgen")
    ours.load_state_dict({names[key]: value for key, value in state.items()})
    return ours, theirs


def make_inputs(config: DiTConfig):
    latents = torch.randn(2, config.in_channels, 3, 4, 6)
    control = torch.randn(2, config.control_channels, 3, 4, 6)
    return latents, torch.tensor([937.5, 20.0]), torch.randn(2, 512, config.text_dim), control


def watch(blocks) -> list:
    """What each block gives in the passes to come."""
    outputs = []
    for block in blocks:
        block.register_forward_hook(lambda *a: outputs.append(a[2]))
    return outputs


def run_both(scale) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Ours and theirs, of the whole model and of each block; `scale` None: theirs by default."""
    ours, theirs = make_pair(TINY)
    our_blocks, their_blocks = watch(ours.blocks), watch(theirs.blocks)
    our_controls, their_controls = watch(ours.control_blocks), watch(theirs.vace_blocks)
    latents, timestep, context, control = make_inputs(TINY)
    options = {} if scale is None else {"control_scale": scale}
    velocity = ours(latents, timestep, context, control=control, **options)
    scales = None if scale is None else torch.tensor(scale).expand(len(TINY.control_layers))
    expected = theirs(
        latents, timestep, context, control_hidden_states=control,
        control_hidden_states_scale=scales,
    ).sample
    results = {"whole": (velocity, expected)}
    for i, (our, their) in enumerate(zip(our_blocks, their_blocks, strict=True)):
        results[f"block {i}"] = our[0].tokens, their
    for i, (our, their) in enumerate(zip(our_controls, their_controls, strict=True)):
        results[f"hint {i}"], results[f"control {i}"] = zip(our, their, strict=True)
    return results


@pytest.mark.parametrize("scale", [None, 0.7, -1.3])
@torch.no_grad()
def test_each_block_and_the_whole_equal_diffusers(scale):
    results = run_both(scale)
    assert len(results) == 1 + TINY.num_layers + 2 * len(TINY.control_layers)
    for name, (value, expected) in results.items():
        limit = 1e-4 if name == "whole" else 1e-5
        assert (value - expected).norm() < limit * expected.norm(), name
        torch.testing.assert_close(value, expected, rtol=0, atol=limit)


def test_gradients_equal_those_of_diffusers():
    ours, theirs = make_pair(TINY)
    ours.gradient_checkpointing = True
    latents, timestep, context, control = make_inputs(TINY)
    velocity = ours(latents, timestep, context, control=control, control_scale=-1.3)
    velocity.square().mean().backward()
    theirs(
        latents, timestep, context, control_hidden_states=control,
        control_hidden_states_scale=torch.tensor([-1.3] * 3),
    ).sample.square().mean().backward()
    names = renamed(theirs.state_dict(), DIT_KEYS, "diffusers", "vidgen")
    gradients = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        error = gradients[names[name]].grad - parameter.grad
        assert error.norm() <= 1e-4 * parameter.grad.norm() + 1e-9, name


def test_original_names_are_wans():
    keys = SpacetimeDiT(TINY).state_dict()
    names = renamed(keys, DIT_KEYS, "vidgen", "wan")
    assert names.keys() == keys.keys()
    back = renamed(names.values(), DIT_KEYS, "wan", "vidgen")
    assert {back[name]: name for name in back} == names
    by_hand = {
        "control_embed.weight": "vace_patch_embedding.weight",
        "control_blocks.0.proj_in.weight": "vace_blocks.0.before_proj.weight",
        "control_blocks.2.proj_out.bias": "vace_blocks.2.after_proj.bias",
        "control_blocks.1.modulation": "vace_blocks.1.modulation",
        "control_blocks.1.norm_cross.weight": "vace_blocks.1.norm3.weight",
        "control_blocks.1.self_attn.out.weight": "vace_blocks.1.self_attn.o.weight",
    }
    assert {name: names[name] for name in by_hand} == by_hand


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_shapes(name: str):
    with torch.device("meta"):
        ours = SpacetimeDiT(DIT_PRESETS[name]).state_dict()
        theirs = WanVACETransformer3DModel(**PUBLISHED[name]).state_dict()
    names = renamed(ours, DIT_KEYS, "vidgen", "diffusers")
    assert {names[key]: value.shape for key, value in ours.items()} == {
        key: value.shape for key, value in theirs.items()
    }
    assert sum(value.numel() for value in ours.values()) == NUM_PARAMETERS[name]
