"""The same random weights in `SpacetimeDiT` and in diffusers' Wan transformer, float32."""

from dataclasses import replace

import pytest
import torch
from diffusers import WanTransformer3DModel

from vidgen.models.dit import DiTConfig, SpacetimeDiT
from vidgen.models.presets import DIT_PRESETS
from vidgen.weights.keymap import DIT_KEYS, renamed

TINY = DIT_PRESETS["tiny"]


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


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        replace(DIT_PRESETS["toybox"], audio=None),
        replace(TINY, in_channels=12, image_dim=20),
        replace(TINY, in_channels=12, image_dim=20, image_positions=10),
    ],
    ids=["t2v", "toybox", "i2v", "flf2v"],
)
@torch.no_grad()
def test_whole_model_equals_diffusers(config: DiTConfig):
    ours, theirs = make_pair(config)
    latents, timestep, context = make_inputs(config)
    image, their_image = None, None
    if config.image_dim:
        image = torch.randn(2, config.image_positions or 5, config.image_dim)
        # diffusers takes the two images of a sample as rows of the batch
        their_image = image.unflatten(1, (2, -1)).flatten(0, 1) if config.image_positions else image
    expected = theirs(latents, timestep, context, their_image).sample
    velocity = ours(latents, timestep, context, image_context=image)
    assert relative_error(velocity, expected) < 1e-4
    assert (velocity - expected).abs().max() < 1e-4


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
def test_one_block_equals_diffusers():
    ours, theirs = make_pair(replace(TINY, num_layers=1))
    inside: dict[str, torch.Tensor] = {}
    theirs.blocks[0].register_forward_hook(lambda *a: inside.update(theirs=a[2]))
    ours.blocks[0].register_forward_hook(lambda *a: inside.update(ours=a[2][0].tokens))
    latents, timestep, context = make_inputs(TINY)
    theirs(latents, timestep, context)
    ours(latents, timestep, context)
    assert relative_error(inside["ours"], inside["theirs"]) < 1e-5


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
