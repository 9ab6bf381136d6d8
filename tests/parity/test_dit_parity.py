"""The same random weights in `SpacetimeDiT` and in diffusers' Wan transformer, float32."""

from dataclasses import replace

import pytest
import torch
from diffusers import WanTransformer3DModel

from vidgen.models.dit import SpacetimeDiT
from vidgen.models.dit_types import DiTConfig
from vidgen.models.presets import DIT_PRESETS
from vidgen.weights.keymap import DIT_KEYS, renamed

TINY = DIT_PRESETS["tiny"]
VARIANTS = {
    "t2v": TINY,
    "toybox": replace(DIT_PRESETS["toybox"], num_layers=3, audio=None),
    "i2v": replace(TINY, in_channels=12, image_dim=20),
    "flf2v": replace(TINY, in_channels=12, image_dim=20, image_positions=514),
    "wan22-i2v": replace(TINY, in_channels=12),
    "ti2v": TINY,
}
PUBLISHED = {  # what the config.json of diffusers' folders say; the rest are its defaults
    "wan-1.3b": {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960},
    "wan-14b": {},
    "wan-14b-i2v": {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120},
    "wan-14b-flf2v": {
        "in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120, "pos_embed_seq_len": 514,
    },
    "wan22-14b-i2v": {"in_channels": 36},
    "wan22-5b": {
        "in_channels": 48, "out_channels": 48, "num_attention_heads": 24, "num_layers": 30,
        "ffn_dim": 14336,
    },
}
NUM_PARAMETERS = {
    "wan-1.3b": 1_418_996_800,
    "wan-14b": 14_288_491_584,
    "wan-14b-i2v": 16_394_878_784,
    "wan-14b-flf2v": 16_395_536_704,
    "wan22-14b-i2v": 14_288_901_184,
    "wan22-5b": 4_999_787_712,
}


def make_pair(config: DiTConfig) -> tuple[SpacetimeDiT, WanTransformer3DModel]:
    torch.manual_seed(0)
    theirs = WanTransformer3DModel(
        patch_size=(1, config.patch_size, config.patch_size),
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
        image_dim=config.image_dim,
        added_kv_proj_dim=config.hidden_dim if config.image_dim else None,
        pos_embed_seq_len=config.image_positions,
    ).eval()
    for name, parameter in theirs.named_parameters():
        if "norm" in name or "pos_embed" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    ours = SpacetimeDiT(config).eval()
    state = theirs.state_dict()
    names = renamed(state, DIT_KEYS, "diffusers", "vidgen")
    ours.load_state_dict({names[key]: value for key, value in state.items()})
    return ours, theirs


def make_inputs(config: DiTConfig, frames: int = 3, rows: int = 4, columns: int = 6):
    latents = torch.randn(2, config.in_channels, frames, rows, columns)
    context = torch.randn(2, 512, config.text_dim)
    return latents, torch.tensor([937.5, 20.0]), context


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def run_both(variant: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Ours and theirs, of the whole model and of each block."""
    config = VARIANTS[variant]
    ours, theirs = make_pair(config)
    blocks: dict[str, list[torch.Tensor]] = {}
    for i, (our_block, their_block) in enumerate(zip(ours.blocks, theirs.blocks, strict=True)):
        seen = blocks.setdefault(f"block {i}", [])
        our_block.register_forward_hook(lambda *a, seen=seen: seen.append(a[2][0].tokens))
        their_block.register_forward_hook(lambda *a, seen=seen: seen.append(a[2]))
    latents, timestep, context = make_inputs(config)
    their_timestep = timestep
    if variant == "ti2v":  # the first frame is known: its tokens carry 0
        timestep = timestep[:, None, None, None].repeat(1, 3, 2, 3)
        timestep[:, 0] = 0
        their_timestep = timestep.flatten(1)
    image, their_image = None, None
    if config.image_dim:
        image = torch.randn(2, config.image_positions or 257, config.image_dim)
        # diffusers takes the two images of a sample as rows of the batch
        their_image = image.unflatten(1, (2, -1)).flatten(0, 1) if config.image_positions else image
    velocity = ours(latents, timestep, context, image_context=image)
    expected = theirs(latents, their_timestep, context, their_image).sample
    return {"whole": (velocity, expected)} | {name: (a, b) for name, (a, b) in blocks.items()}


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_each_block_and_the_whole_equal_diffusers(variant: str):
    results = run_both(variant)
    assert len(results) == 1 + VARIANTS[variant].num_layers
    for name, (value, expected) in results.items():
        limit = 1e-4 if name == "whole" else 1e-5
        assert relative_error(value, expected) < limit, name
        torch.testing.assert_close(value, expected, rtol=0, atol=limit)


@torch.no_grad()
def test_timesteps_of_single_tokens_equal_diffusers():
    ours, theirs = make_pair(TINY)
    latents, _, context = make_inputs(TINY)
    by_frame = torch.tensor([[0.0, 800.0, 800.0], [300.0, 300.0, 300.0]])
    mixed = by_frame[:, :, None, None].repeat(1, 1, 2, 3)
    mixed[1, :, 0, 1] = 0
    whole = by_frame[:, :, None, None].expand(-1, -1, 2, 3)
    for timestep, given in ((mixed, mixed), (whole, whole), (whole, by_frame)):
        expected = theirs(latents, timestep.flatten(1), context).sample
        assert relative_error(ours(latents, given, context), expected) < 1e-5


@torch.no_grad()
def test_collapsed_padding_equals_zero_rows():
    ours, theirs = make_pair(TINY)
    latents, timestep, context = make_inputs(TINY)
    lengths = [7, 512]
    context[0, 7:] = 0
    expected = theirs(latents, timestep, context).sample
    noisy_rest = context.clone()
    noisy_rest[0, 7:] = 5.0
    velocity = ours(latents, timestep, noisy_rest, context_lengths=lengths)
    assert relative_error(velocity, expected) < 1e-5
    short = ours(latents[:1], timestep[:1], context[:1, :7], context_lengths=[7])
    assert relative_error(short, expected[:1]) < 1e-5


def test_original_names_are_wans():
    config = replace(TINY, image_dim=20, image_positions=10, num_layers=1)
    keys = SpacetimeDiT(config).state_dict()
    names = renamed(keys, DIT_KEYS, "vidgen", "wan")
    assert renamed(names.values(), DIT_KEYS, "wan", "vidgen").keys() == set(names.values())
    assert names.keys() == keys.keys()
    by_hand = {
        "patch_embed.weight": "patch_embedding.weight",
        "time_embed.up.bias": "time_embedding.0.bias",
        "time_embed.proj.weight": "time_projection.1.weight",
        "text_embed.down.weight": "text_embedding.2.weight",
        "image_embed.positions": "img_emb.emb_pos",
        "image_embed.ffn.down.weight": "img_emb.proj.3.weight",
        "image_embed.norm_out.bias": "img_emb.proj.4.bias",
        "blocks.0.modulation": "blocks.0.modulation",
        "blocks.0.self_attn.norm_q.weight": "blocks.0.self_attn.norm_q.weight",
        "blocks.0.cross_attn.out.bias": "blocks.0.cross_attn.o.bias",
        "blocks.0.cross_attn.v_image.weight": "blocks.0.cross_attn.v_img.weight",
        "blocks.0.cross_attn.norm_k_image.weight": "blocks.0.cross_attn.norm_k_img.weight",
        "blocks.0.norm_cross.weight": "blocks.0.norm3.weight",
        "blocks.0.ffn.up.weight": "blocks.0.ffn.0.weight",
        "head.modulation": "head.modulation",
        "head.proj.bias": "head.head.bias",
    }
    assert {name: names[name] for name in by_hand} == by_hand


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_shapes(name: str):
    with torch.device("meta"):
        ours = SpacetimeDiT(DIT_PRESETS[name]).state_dict()
        theirs = WanTransformer3DModel(**PUBLISHED[name]).state_dict()
    names = renamed(ours, DIT_KEYS, "vidgen", "diffusers")
    assert {names[key]: value.shape for key, value in ours.items()} == {
        key: value.shape for key, value in theirs.items()
    }
    assert sum(value.numel() for value in ours.values()) == NUM_PARAMETERS[name]
