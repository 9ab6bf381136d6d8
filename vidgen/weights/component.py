"""Components of a model: each has an architecture and its files' tensors under vidgen's names."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar, get_args, overload

import torch
from torch import nn

from vidgen.core.errors import ModelError
from vidgen.models.audio import AudioVAE
from vidgen.models.audio_spectra import AudioVAEConfig
from vidgen.models.dit import SpacetimeDiT
from vidgen.models.dit_types import DiTConfig
from vidgen.models.image import ImageConfig, image_encoder
from vidgen.models.onset_detector import OnsetDetector, OnsetDetectorConfig
from vidgen.models.text import TextConfig, UMT5Encoder
from vidgen.models.vae import CausalVAE, VAEConfig
from vidgen.models.verifier import Verifier, VerifierConfig
from vidgen.weights.keymap import (
    DIT_KEYS,
    IMAGE_KEYS,
    TEXT_KEYS,
    Names,
    Spelling,
    rename,
    vae_keys,
)
from vidgen.weights.load import check_fit, load_module
from vidgen.weights.tensors import Tensors, Weights

ExpertRole = Literal["transformer", "transformer_2"]
"""A model's only transformer, or one of two experts for high and low noise."""
OwnRole = Literal["sound_vae", "verifier", "onset_detector"]
"""Components that only vidgen has; stored in vidgen's layout in every folder."""
Role = Literal["vae", "transformer", "transformer_2", "text_encoder", "image_encoder", OwnRole]
OWN_ROLES: tuple[OwnRole, ...] = get_args(OwnRole)
Config = (VAEConfig | DiTConfig | TextConfig | ImageConfig | AudioVAEConfig | VerifierConfig
          | OnsetDetectorConfig)
Config_co = TypeVar("Config_co", bound=Config, covariant=True)

CLASSES: dict[Role, Callable[[Any], nn.Module]] = {
    "vae": CausalVAE, "transformer": SpacetimeDiT, "transformer_2": SpacetimeDiT,
    "text_encoder": UMT5Encoder, "image_encoder": image_encoder, "sound_vae": AudioVAE,
    "verifier": Verifier, "onset_detector": OnsetDetector,
}
CONFIG_TYPES: dict[Role, type[Config]] = {
    "vae": VAEConfig, "transformer": DiTConfig, "transformer_2": DiTConfig,
    "text_encoder": TextConfig, "image_encoder": ImageConfig, "sound_vae": AudioVAEConfig,
    "verifier": VerifierConfig, "onset_detector": OnsetDetectorConfig,
}
_EXTRA: dict[str, Spelling] = {
    "visual.head": "wan", "textual.": "wan", "log_scale": "wan",
    "visual_projection.": "diffusers", "encoder.embed_tokens.": "diffusers",
}
"""Name prefixes of encoder tensors that vidgen's modules don't have, and the layout that has them.

transformers may save a tied embedding twice, the second time as `encoder.embed_tokens`.
"""
_PREFIX = "vision_model."
"""Name prefix of CLIP's vision tower in files written by transformers up to version 4."""
_ANY_SIZE = 1 << 20
"""Numbers in a config up to this one are accepted whatever the size of the files."""


@dataclass(frozen=True)
class Component(Generic[Config_co]):
    """A component of a model, opened but not loaded.

    Attributes:
        tensors: by vidgen's names; unknown ones keep the file's name, so that loading refuses them.
        extra: tensors that vidgen's module doesn't have (CLIP's text tower), by the file's names.
    """

    role: Role
    config: Config_co
    tensors: Tensors = field(repr=False)
    extra: Tensors = field(default_factory=Tensors, repr=False)

    def load(
        self, dtype: torch.dtype, device: torch.device | str, quantize: Any = None, **options: Any
    ) -> nn.Module:
        """Build the module and load its weights; see `load_module` for options and errors."""
        return load_module(
            self.build, self.tensors, dtype, device, fp32_parts(self.role, dtype), quantize,
            **options,
        )

    def build(self) -> nn.Module:
        """Build the module with untrained weights."""
        with quiet_torchao():  # transformers, which has the image encoder, imports it
            return CLASSES[self.role](self.config)

    def check_sizes(self) -> None:
        """Raise ModelError if the config has a size that is too large for the files' tensors.

        Checked before the module is built, since a damaged config could ask for terabytes.
        """
        count = len(self.tensors)
        num_weights = sum(lazy.likeness.numel() for lazy in self.tensors.values())
        for name, value in vars(self.config).items():
            sizes = value if isinstance(value, tuple) else (value,)
            largest = max((size for size in sizes if isinstance(size, int)), default=0)
            is_depth = name in ("num_layers", "num_blocks")
            if largest > (count if is_depth else max(num_weights, _ANY_SIZE)):
                files = f"{count} tensors" if is_depth else f"{num_weights} numbers"
                raise ModelError(
                    f"the {self.role}'s config has {name} {str(largest)[:40]}, but its files hold "
                    f"{files}; the two must come from the same model"
                )

    def require_complete(self) -> None:
        """Raise ModelError for missing, unexpected or misshapen tensors, without reading them."""
        with torch.device("meta"):
            module = self.build()
        check_fit(module, Weights(self.tensors, torch.float32))


@contextmanager
def quiet_torchao() -> Iterator[None]:
    """Silence torchao's messages about unsupported hardware and deprecations.

    Importing diffusers also imports torchao, if it is installed.
    """
    names = ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class Components(dict[Role, Component[Config]]):
    """A model's components by role; the role determines the config's type."""

    @overload
    def __getitem__(self, role: Literal["vae"], /) -> Component[VAEConfig]: ...
    @overload
    def __getitem__(self, role: ExpertRole, /) -> Component[DiTConfig]: ...
    @overload
    def __getitem__(self, role: Literal["text_encoder"], /) -> Component[TextConfig]: ...
    @overload
    def __getitem__(self, role: Literal["image_encoder"], /) -> Component[ImageConfig]: ...
    @overload
    def __getitem__(self, role: Literal["sound_vae"], /) -> Component[AudioVAEConfig]: ...
    @overload
    def __getitem__(self, role: Literal["verifier"], /) -> Component[VerifierConfig]: ...
    @overload
    def __getitem__(self, role: Literal["onset_detector"], /) -> Component[OnsetDetectorConfig]: ...
    @overload
    def __getitem__(self, role: Role, /) -> Component[Config]: ...

    def __getitem__(self, role: Role, /) -> Component[Config]:
        return super().__getitem__(role)


def fp32_parts(role: Role, dtype: torch.dtype) -> tuple[str, ...]:
    """Return name parts of the weights that stay float32 when the others are cast to `dtype`."""
    always = getattr(CLASSES[role], "fp32_weights", ())
    in_fp16 = getattr(CLASSES[role], "fp32_in_fp16", ()) if dtype == torch.float16 else ()
    return (*always, *in_fp16)


def table_of(role: Role, config: Config) -> tuple[Names, ...]:
    """Return the table of a component's tensor names in all spellings."""
    if isinstance(config, VAEConfig):
        return vae_keys(config)
    if role in OWN_ROLES:
        return ()
    if role == "image_encoder":
        return IMAGE_KEYS
    return TEXT_KEYS if role == "text_encoder" else DIT_KEYS


def extra_in(name: str) -> Spelling | None:
    """Return the layout of a tensor that vidgen's modules don't have; None for all others."""
    return next((layout for start, layout in _EXTRA.items() if name.startswith(start)), None)


def assemble(role: Role, config: Config, stored: Tensors, spelling: Spelling) -> Component[Config]:
    """Assemble a component from its files' tensors; raise ModelError for duplicate names."""
    table, component = table_of(role, config), Component(role, config, Tensors())
    for name, lazy in stored.items():
        if extra_in(name):
            component.extra[name] = lazy
            continue
        bare = name.removeprefix(_PREFIX)
        ours = bare if spelling == "vidgen" else rename(bare, table, spelling, "vidgen") or bare
        if ours in component.tensors:
            raise ModelError(f"{lazy.files[0].path.parent} has two tensors for {ours}; keep only "
                             "one model in the folder")
        component.tensors[ours] = lazy
    component.check_sizes()
    return component
