"""Architectures by name, as Python literals.

"tiny" is for tests; "wan..." are the published ones, whose weights are loaded, not trained here.
"""

from __future__ import annotations

from vidgen.models.vae import VAEConfig

VAE_PRESETS: dict[str, VAEConfig] = {
    "toybox": VAEConfig(
        latent_channels=32,
        encoder_dim=24,
        decoder_dim=32,
        channel_mults=(2, 3, 3),
        num_blocks=1,
        temporal_downsample=(True, True),
        patch_size=4,
    ),
    "tiny": VAEConfig(
        latent_channels=4,
        encoder_dim=8,
        decoder_dim=8,
        channel_mults=(1, 2, 2, 2),
        num_blocks=1,
        temporal_downsample=(False, True, True),
    ),
}
