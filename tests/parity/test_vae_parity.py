"""The same random weights in `CausalVAE` and in diffusers' Wan VAE, float32."""

from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanImageToVideoPipeline
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

from vidgen.models.presets import VAE_PRESETS
from vidgen.models.vae import CausalVAE, VAEConfig
from vidgen.weights.keymap import renamed, vae_keys

CONFIGS = {
    "wan21": VAE_PRESETS["tiny"],
    "wan22": replace(
        VAE_PRESETS["wan22"],
        latent_channels=6,
        encoder_dim=4,
        decoder_dim=8,
        latents_mean=None,
        latents_std=None,
    ),
    "toybox": replace(VAE_PRESETS["toybox"], encoder_dim=8, decoder_dim=8),
}


def reference(config: VAEConfig) -> AutoencoderKLWan:
    channels = 3 * config.patch_size**2
    statistics = {}
    if config.latents_mean and config.latents_std:
        statistics = {
            "latents_mean": list(config.latents_mean),
            "latents_std": list(config.latents_std),
        }
    return AutoencoderKLWan(
        base_dim=config.encoder_dim,
        decoder_base_dim=config.decoder_dim,
        z_dim=config.latent_channels,
        dim_mult=list(config.channel_mults),
        num_res_blocks=config.num_blocks,
        temperal_downsample=list(config.temporal_downsample),
        is_residual=config.stage_shortcuts,
        in_channels=channels,
        out_channels=channels,
        patch_size=config.patch_size if config.patch_size > 1 else None,
        scale_factor_spatial=config.strides.hw,
        **statistics,
    ).eval()


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request: pytest.FixtureRequest) -> tuple[CausalVAE, AutoencoderKLWan]:
    config = CONFIGS[request.param]
    torch.manual_seed(0)
    theirs = reference(config)
    for name, parameter in theirs.named_parameters():
        if "gamma" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    theirs.decoder.conv_out.weight.data *= 0.1  # diffusers clamps to [-1, 1], we don't
    ours = CausalVAE(config).eval()
    names = renamed(ours.state_dict(), vae_keys(config), "vidgen", "diffusers")
    state = theirs.state_dict()
    assert sorted(names.values()) == sorted(state)
    ours.load_state_dict({name: state[names[name]] for name in names})
    return ours, theirs


@pytest.mark.parametrize("num_frames", [1, 5, 17])
def test_encoding_equals_diffusers(pair, num_frames):
    ours, theirs = pair
    video = torch.rand(2, 3, num_frames, 32, 48) * 2 - 1
    with torch.no_grad():
        posterior = theirs.encode(video).latent_dist
        mean, logvar = ours.encode_moments(video)
        torch.testing.assert_close(ours.encode(video), posterior.mode(), rtol=0, atol=1e-5)
    torch.testing.assert_close(mean, posterior.mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(logvar.clamp(-30, 20), posterior.logvar, rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_frames", [1, 2, 5])
def test_decoding_equals_diffusers(pair, num_frames):
    ours, theirs = pair
    latents = torch.randn(2, ours.config.latent_channels, num_frames, 2, 3)
    with torch.no_grad():
        expected = theirs.decode(latents).sample
        torch.testing.assert_close(ours.decode(latents).clamp(-1, 1), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("num_frames", [1, 9])
def test_gradients_equal_those_of_diffusers(pair, num_frames):
    ours, theirs = pair
    video = torch.rand(1, 3, num_frames, 32, 32) * 2 - 1
    latents = theirs.encode(video).latent_dist.mode()
    (theirs.decode(latents).sample * video).mean().backward()
    (ours.decode(ours.encode(video)) * video).mean().backward()
    names = renamed(ours.state_dict(), vae_keys(ours.config), "vidgen", "diffusers")
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if parameter.grad is not None:
            grad = expected[names[name]].grad
            assert (parameter.grad - grad).norm() <= 1e-4 * grad.norm() + 1e-9, name
        parameter.grad = expected[names[name]].grad = None


@pytest.mark.parametrize("family", ["wan21", "wan22"])
@torch.no_grad()
def test_normalised_latents_equal_those_of_wan_pipelines(family):
    config = CONFIGS[family]
    channels = config.latent_channels
    published = VAE_PRESETS[family]
    config = replace(
        config, latents_mean=published.latents_mean[:channels],
        latents_std=published.latents_std[:channels],
    )
    torch.manual_seed(0)
    theirs = reference(config)
    ours = CausalVAE(config).eval()
    names = renamed(ours.state_dict(), vae_keys(config), "vidgen", "diffusers")
    ours.load_state_dict({name: theirs.state_dict()[names[name]] for name in names})
    pipeline = WanImageToVideoPipeline(
        tokenizer=None, text_encoder=None, vae=theirs, scheduler=UniPCMultistepScheduler()
    )
    image, last = torch.rand(2, 1, 3, 32, 48) * 2 - 1
    _, condition = pipeline.prepare_latents(
        image, 1, channels, 32, 48, 9, torch.float32, "cpu", last_image=last
    )
    video = torch.zeros(1, 3, 9, 32, 48)
    video[:, :, 0], video[:, :, -1] = image, last
    torch.testing.assert_close(ours.encode(video), condition[:, 4:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["toybox", "wan21", "wan22"])
def test_presets_have_the_published_shapes(name):
    config = VAE_PRESETS[name]
    with torch.device("meta"):
        ours, theirs = CausalVAE(config).state_dict(), reference(config).state_dict()
    names = renamed(ours, vae_keys(config), "vidgen", "diffusers")
    assert {names[key]: value.shape for key, value in ours.items()} == {
        key: value.shape for key, value in theirs.items()
    }


@pytest.mark.parametrize(
    ("name", "num_parameters"),
    [("toybox", 4_500_508), ("wan21", 126_892_531), ("wan22", 704_688_668)],
)
def test_presets_have_the_published_parameter_counts(name, num_parameters):
    with torch.device("meta"):
        vae = CausalVAE(VAE_PRESETS[name])
    assert sum(parameter.numel() for parameter in vae.parameters()) == num_parameters


def test_wan21_statistics_are_those_of_diffusers():
    defaults = AutoencoderKLWan(base_dim=4).config
    assert VAE_PRESETS["wan21"].latents_mean == tuple(defaults.latents_mean)
    assert VAE_PRESETS["wan21"].latents_std == tuple(defaults.latents_std)


def test_original_wan21_names_agree_with_the_converter_of_diffusers():
    config = VAE_PRESETS["wan21"]
    with torch.device("meta"):
        keys = list(CausalVAE(config).state_dict())
    original = renamed(keys, vae_keys(config), "vidgen", "wan")
    converted = convert_wan_vae_to_diffusers({original[key]: key for key in keys})
    assert {key: name for name, key in converted.items()} == renamed(
        keys, vae_keys(config), "vidgen", "diffusers"
    )
