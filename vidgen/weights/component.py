"""Components of a model: an architecture each, with the files' tensors under our names."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar, get_args, overload

import torch
from torch import nn

from vidgen.core.errors import ModelError
from vidgen.models.audio import AudioVAE
from vidgen.models.audio_spectra import AudioVAEConfig
from vidgen.models.dit import SpacetimeDiT
from vidgen.models.dit_types import DiTConfig
from vidgen.models.image import ImageConfig, ImageEncoder
from vidgen.models.onset_detector import OnsetDetector, OnsetDetectorConfig
from vidgen.models.text import TextConfig, UMT5Encoder
from vidgen.models.vae import CausalVAE, VAEConfig
from vidgen.models.verifier import Verifier, VerifierConfig
from vidgen.weights.keymap import (
    DIT_KEYS,
    TEXT_KEYS,
    Names,
    Spelling,
    image_keys,
    is_known,
    rename,
    vae_keys,
)
from vidgen.weights.load import check_fit, load_module
from vidgen.weights.store import TensorStore, Weights
from vidgen.weights.view import Source, View

ExpertRole = Literal["transformer", "transformer_2"]
"""Transformers: a single one, or two that share the noise levels."""
OwnRole = Literal["sound_vae", "verifier", "onset_detector"]
"""Components that no other program has; they have vidgen's layout in every folder."""
Role = Literal["vae", "transformer", "transformer_2", "text_encoder", "image_encoder", OwnRole]
OWN_ROLES: tuple[OwnRole, ...] = get_args(OwnRole)
Config = (VAEConfig | DiTConfig | TextConfig | ImageConfig | AudioVAEConfig | VerifierConfig
          | OnsetDetectorConfig)
Config_co = TypeVar("Config_co", bound=Config, covariant=True)

CLASSES: dict[Role, type[nn.Module]] = {
    "vae": CausalVAE, "transformer": SpacetimeDiT, "transformer_2": SpacetimeDiT,
    "text_encoder": UMT5Encoder, "image_encoder": ImageEncoder, "sound_vae": AudioVAE,
    "verifier": Verifier, "onset_detector": OnsetDetector,
}
_ANY_SIZE = 1 << 20
"""Largest number in a config that is accepted with any size of files."""


@dataclass(frozen=True)
class Component(Generic[Config_co]):
    """A component of a model, opened but not loaded.

    Attributes:
        store: its tensors by the files' names, without those that our module doesn't have.
        names: stored name -> our parameter's. Unknown names stay, so that loading refuses them.
        rest: tensors that our module doesn't have, which converting keeps: CLIP's text tower, an
            embedding that is stored twice.
        spellings: of the names in `store` and `rest`.
    """

    role: Role
    config: Config_co
    store: View
    names: Mapping[str, str]
    rest: View
    spellings: Mapping[str, Spelling] = field(repr=False)

    def load(
        self, dtype: torch.dtype, device: torch.device | str, quantize: Any = None, **options: Any
    ) -> nn.Module:
        """Build the module and load its weights; options and errors are `load_module`'s."""
        self._check_depth()
        return load_module(
            self.build, self.store, dtype, device,
            keep_fp32=fp32_parts(self.role, dtype), names=self.names, quantize=quantize, **options,
        )

    def build(self) -> nn.Module:
        """Build the module without its weights."""
        return CLASSES[self.role](self.config)

    def _check_depth(self) -> None:
        """Refuse a config of more layers than tensors, before they are built."""
        count = len(self.store.names)
        for name in ("num_layers", "num_blocks"):
            if getattr(self.config, name, 0) > count:
                raise ModelError(
                    f"the {self.role}'s config has {name} {getattr(self.config, name)}, but its "
                    f"files hold {count} tensors; the two must come from the same model"
                )

    def check_sizes(self) -> None:
        """Raise ModelError for a config with a size that no network of these files can have."""
        held = sum(math.prod(self.store.shape(name)) for name in self.store.names)
        for name, value in vars(self.config).items():
            sizes = value if isinstance(value, tuple) else (value,)
            largest = max((size for size in sizes if isinstance(size, int)), default=0)
            if largest > max(held, _ANY_SIZE):
                raise ModelError(
                    f"the {self.role}'s config has {name} {str(largest)[:40]}, but its files hold "
                    f"{held} numbers; the two must come from the same model"
                )

    def require_complete(self) -> None:
        """Raise ModelError for missing, surplus or misshapen tensors, without reading them."""
        self._check_depth()
        with torch.device("meta"):
            module = self.build()
        check_fit(module, Weights(self.store, torch.float32, names=self.names))


class Components(dict[Role, Component[Config]]):
    """A model's components by their roles, each with its role's type of config."""

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
    """Return parts of the names of weights that stay float32 where others are `dtype`."""
    always = getattr(CLASSES[role], "fp32_weights", ())
    beside = getattr(CLASSES[role], "fp32_beside_fp16", ()) if dtype == torch.float16 else ()
    return (*always, *beside)


def table_of(role: Role, config: Config, keys: Sequence[str]) -> tuple[Names, ...]:
    """Return the names of a component's tensors in all spellings; `keys` are some of them."""
    if isinstance(config, VAEConfig):
        return vae_keys(config)
    if role in OWN_ROLES:
        return ()
    if role == "image_encoder":
        return image_keys(keys)
    return TEXT_KEYS if role == "text_encoder" else DIT_KEYS


def assemble(
    role: Role, config: Config, sources: Sequence[tuple[Spelling, TensorStore]]
) -> Component[Config]:
    """Assemble a component from its files, and those that a conversion set aside."""
    names: dict[str, str] = {}
    taken: dict[str, Source] = {}
    rest: dict[str, Source] = {}
    spellings: dict[str, Spelling] = {}
    for spelling, store in sources:
        table = table_of(role, config, store.names)
        for name in store.names:
            ours = name if spelling == "vidgen" else rename(name, table, spelling, "vidgen")
            source = store.source(name) if isinstance(store, View) else Source(store, name)
            spellings[name] = spelling
            if ours is None and is_known(name, table, spelling):
                rest[name] = source
            else:
                taken[name], names[name] = source, ours or name
    component = Component(role, config, View(taken), names, View(rest), spellings)
    component.check_sizes()
    return component
