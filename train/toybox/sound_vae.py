"""The VAE for sound beside a model's other parts: the folder `sound_vae`, in any layout."""

from __future__ import annotations

from pathlib import Path

import torch

from vidgen.models.audio import AudioVAE
from vidgen.models.audio_spectra import AudioVAEConfig
from vidgen.weights.configs import config_of
from vidgen.weights.load import load_module

SOUND_VAE = "sound_vae"


def load_sound_vae(
    folder: Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> AudioVAE:
    """Load a component folder: `config.json` and `model.safetensors`.

    Raises:
        ModelError: files missing or damaged, or that don't fit each other.
    """
    config: AudioVAEConfig = config_of(AudioVAEConfig, folder)
    return load_module(lambda: AudioVAE(config), folder, dtype, device)
