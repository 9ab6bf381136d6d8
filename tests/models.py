"""Tiny model folders of the real classes at random weights, written as any model is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from train.toybox.initial import init_dit
from train.toybox.model_files import record_files, save_module
from train.toybox.tasks.tokenizer import train_tokenizer
from vidgen.models.audio import AudioVAE
from vidgen.models.dit import SpacetimeDiT
from vidgen.models.onset_detector import OnsetDetector, OnsetDetectorConfig
from vidgen.models.presets import AUDIO_VAE_PRESETS, DIT_PRESETS, TEXT_PRESETS, VAE_PRESETS
from vidgen.models.text import UMT5Encoder
from vidgen.models.vae import CausalVAE
from vidgen.models.verifier import Verifier, VerifierConfig
from vidgen.pipeline.preview import FILE as PREVIEW
from vidgen.weights.configs import encoder_to_transformers
from vidgen.weights.family import ModelDefaults
from vidgen.weights.folder import write_model_info
from vidgen.weights.layouts import open_model

if TYPE_CHECKING:
    from vidgen.pipeline.engine import Engine

CAPTIONS = ("a red car bounces across the desert at night", "a cat moves left over the meadow")
TASKS = ("text", "image", "last-image", "frames", "extend", "mask", "video", "reference")
DEFAULTS = ModelDefaults(
    num_steps=2, shift=3.0, guidance_scale=3.0, fps=12.0, num_frames=9, height=32, width=32,
    sizes=((32, 32),), max_frames=17,
)


def build_tiny_model(folder: Path, *, sound: bool = False) -> Path:
    """A model of the tiny presets: 9 frames of 32x32 in 2 steps; with `sound` it makes sound."""
    torch.manual_seed(0)
    vae = CausalVAE(VAE_PRESETS["tiny"])
    dit = _transformer("tiny-sound" if sound else "tiny")
    text = UMT5Encoder(TEXT_PRESETS["tiny"])
    save_module(vae.state_dict(), vae.config, folder / "vae", torch.float32)
    save_module(dit.state_dict(), dit.config, folder / "transformer", torch.float32)
    settings = encoder_to_transformers(text.config)
    save_module(text.state_dict(), settings, folder / "text_encoder", torch.float32)
    if sound:
        heard = AudioVAE(AUDIO_VAE_PRESETS["tiny"])
        save_module(heard.state_dict(), heard.config, folder / "sound_vae", torch.float32)
    train_tokenizer(CAPTIONS, folder / "tokenizer", text.config.vocab_size)
    (folder / "preview").mkdir()
    shown = {"weight": torch.randn(48, vae.config.latent_channels, 3, 3), "bias": torch.zeros(48)}
    save_file(shown, folder / PREVIEW)
    write_model_info(
        folder, name=folder.name, family="toybox", license_name="Apache-2.0",
        tasks=(*TASKS, "sound") if sound else TASKS,
        defaults=DEFAULTS,
    )
    return folder


def add_low_expert(folder: Path, boundary: float = 0.8, temporal_upsampling: int = 1) -> Path:
    """Give a tiny model a second expert, in int8 and deaf, for noise levels below `boundary`."""
    told = open_model(str(folder))
    finer = {"temporal_upsampling": temporal_upsampling} if temporal_upsampling > 1 else {}
    torch.manual_seed(1)
    dit = _transformer("tiny")
    save_module(dit.state_dict(), dit.config, folder / "transformer_2", torch.float32, 256)
    write_model_info(
        folder, name=told.name, family=told.family, license_name=told.license, tasks=told.tasks,
        defaults=replace(
            told.defaults, boundary=boundary,
            settings={**told.defaults.settings, **finer},
        ),
    )
    return folder


def add_verifier(folder: Path) -> Path:
    """Give a tiny model a verifier, which knows cats and cars, or says so."""
    torch.manual_seed(2)
    channels = VAE_PRESETS["tiny"].latent_channels
    known = VerifierConfig((("cat",), ("car",)), latent_channels=channels, dim=8, num_blocks=1)
    verifier = Verifier(known)
    save_module(verifier.state_dict(), verifier.config, folder / "verifier", torch.float32, 256)
    record_files(folder, ("verifier/config.json", "verifier/model.safetensors"))
    return folder


def add_onset_detector(folder: Path) -> Path:
    """Give a tiny model an onset detector, which sees nothing in particular."""
    torch.manual_seed(3)
    channels = VAE_PRESETS["tiny"].latent_channels
    detector = OnsetDetector(OnsetDetectorConfig(channels, dim=8, num_blocks=1, time_dim=16))
    save_module(detector.state_dict(), detector.config, folder / "onset_detector", torch.float32)
    record_files(folder, ("onset_detector/config.json", "onset_detector/model.safetensors"))
    return folder


@contextmanager
def own_defaults(engine: Engine, **changed: Any) -> Iterator[None]:
    """Inside the block the engine's model has other defaults."""
    before = engine.folder
    engine.folder = replace(before, defaults=replace(before.defaults, **changed))
    try:
        yield
    finally:
        engine.folder = before


def _transformer(preset: str) -> SpacetimeDiT:
    dit = SpacetimeDiT(DIT_PRESETS[preset])
    init_dit(dit)
    for parameter in dit.parameters():  # fresh gates are zero: a model that does nothing
        parameter.data += 0.1 * torch.randn_like(parameter)
    return dit
