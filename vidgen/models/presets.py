"""Architectures by name.

"tiny" is for tests; "toybox" is the embedded model's; "wan..." are those of the published models.
"""

from __future__ import annotations

from typing import Any

from vidgen.models.audio_spectra import AudioVAEConfig
from vidgen.models.dit_types import AudioConfig, DiTConfig
from vidgen.models.image import ImageConfig
from vidgen.models.text import TextConfig
from vidgen.models.vae import VAEConfig

# fmt: off
_WAN21_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508, 0.4134, -0.0715,
               0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
_WAN21_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743, 3.2687, 2.1526,
              2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.916)
_WAN22_MEAN = (-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542,
               0.2813, 0.0891, 0.157, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109,
               0.2665, -0.2108, -0.2158, 0.2502, -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899,
               -0.2799, -0.123, -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.052, 0.3748,
               0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667)
_WAN22_STD = (0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.499, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894,
              1.0901, 0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833,
              1.4146, 0.8986, 0.5659, 0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866,
              0.4093, 0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.06,
              0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744)
# fmt: on

VAE_PRESETS: dict[str, VAEConfig] = {
    "toybox": VAEConfig(
        latent_channels=16, encoder_dim=24, decoder_dim=32, channel_mults=(1, 3, 3), num_blocks=1,
        temporal_downsample=(True, True), patch_size=2,
    ),
    "tiny": VAEConfig(
        latent_channels=4, encoder_dim=8, decoder_dim=8, channel_mults=(1, 2, 2, 2), num_blocks=1,
        temporal_downsample=(False, True, True),
    ),
    "wan21": VAEConfig(
        latent_channels=16, encoder_dim=96, decoder_dim=96, channel_mults=(1, 2, 4, 4),
        num_blocks=2, temporal_downsample=(False, True, True),
        latents_mean=_WAN21_MEAN, latents_std=_WAN21_STD,
    ),
    "wan22": VAEConfig(
        latent_channels=48, encoder_dim=160, decoder_dim=256, channel_mults=(1, 2, 4, 4),
        num_blocks=2, temporal_downsample=(False, True, True), patch_size=2, stage_shortcuts=True,
        latents_mean=_WAN22_MEAN, latents_std=_WAN22_STD,
    ),
}

_TOYBOX: dict[str, Any] = {"in_channels": 16, "out_channels": 16, "num_heads": 4, "head_dim": 64,
                           "num_layers": 7, "ffn_dim": 896, "text_dim": 128}
_TINY: dict[str, Any] = {"in_channels": 4, "out_channels": 4, "num_heads": 2, "head_dim": 12,
                         "num_layers": 2, "ffn_dim": 32, "text_dim": 16}
_WAN_DIT: dict[str, Any] = {"in_channels": 16, "out_channels": 16, "head_dim": 128,
                            "text_dim": 4096}
_WAN_1B: dict[str, Any] = {"num_heads": 12, "num_layers": 30, "ffn_dim": 8960}
_WAN_14B: dict[str, Any] = {"num_heads": 40, "num_layers": 40, "ffn_dim": 13824}

DIT_PRESETS: dict[str, DiTConfig] = {
    "toybox": DiTConfig(**_TOYBOX, audio=AudioConfig(channels=24, ffn_dim=128, tokens_per_s=62.5)),
    "toybox-low": DiTConfig(**_TOYBOX),  # the expert at low noise, where no sound is made
    "tiny": DiTConfig(**_TINY),
    "tiny-sound": DiTConfig(
        **_TINY, audio=AudioConfig(channels=4, ffn_dim=16, tokens_per_s=31.25)
    ),
    "wan-1.3b": DiTConfig(**_WAN_DIT, **_WAN_1B),
    "wan-14b": DiTConfig(**_WAN_DIT, **_WAN_14B),
    "wan-14b-i2v": DiTConfig(**(_WAN_DIT | {"in_channels": 36}), **_WAN_14B, image_dim=1280),
    "wan-14b-flf2v": DiTConfig(
        **(_WAN_DIT | {"in_channels": 36}), **_WAN_14B, image_dim=1280, image_positions=514
    ),
    "wan-vace-1.3b": DiTConfig(
        **_WAN_DIT, **_WAN_1B, control_layers=tuple(range(0, 30, 2)), control_channels=96
    ),
    "wan-vace-14b": DiTConfig(
        **_WAN_DIT, **_WAN_14B, control_layers=tuple(range(0, 40, 5)), control_channels=96
    ),
    "wan22-14b-i2v": DiTConfig(**(_WAN_DIT | {"in_channels": 36}), **_WAN_14B),
    "wan22-5b": DiTConfig(
        **(_WAN_DIT | {"in_channels": 48, "out_channels": 48}),
        num_heads=24, num_layers=30, ffn_dim=14336,
    ),
}

TEXT_PRESETS: dict[str, TextConfig] = {
    "toybox": TextConfig(
        vocab_size=2048, hidden_dim=128, head_dim=32, ffn_dim=256, num_layers=4, num_heads=4
    ),
    "tiny": TextConfig(
        vocab_size=512, hidden_dim=16, head_dim=8, ffn_dim=32, num_layers=2, num_heads=2
    ),
    "umt5-xxl": TextConfig(
        vocab_size=256384, hidden_dim=4096, head_dim=64, ffn_dim=10240, num_layers=24, num_heads=64
    ),
}

IMAGE_PRESETS: dict[str, ImageConfig] = {
    "tiny": ImageConfig(
        image_size=28, patch_size=14, hidden_dim=20, ffn_dim=40, num_layers=3, num_heads=2
    ),
    "clip-vit-h": ImageConfig(
        image_size=224, patch_size=14, hidden_dim=1280, ffn_dim=5120, num_layers=32, num_heads=16
    ),
}

AUDIO_VAE_PRESETS: dict[str, AudioVAEConfig] = {
    "toybox": AudioVAEConfig(
        latent_channels=24, encoder_dim=128, decoder_dim=176, pitch_window=512,
        frames_per_token=4, gains_per_frame=4,
    ),
    "tiny": AudioVAEConfig(
        latent_channels=4, encoder_dim=16, decoder_dim=16, encoder_layers=(1, 1),
        decoder_layers=(1, 1), kernel_size=3, pitch_window=512, gains_per_frame=4,
    ),
}
