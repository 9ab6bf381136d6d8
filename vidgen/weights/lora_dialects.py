"""Dialects of LoRA files: names of tensors, and scales of the low-rank products.

A name consists of a prefix, a layer's path in one of `keymap`'s spellings (with dots or
underscores), and the tensor's kind: `lora_A` or `lora_down`, `lora_B` or `lora_up`, `alpha`, or
`diff` for a full difference.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import nn

from vidgen.core.errors import ModelError
from vidgen.models.dit import SpacetimeDiT
from vidgen.models.dit_types import DiTConfig
from vidgen.weights.keymap import DIT_KEYS, Spelling, rename

Kind = Literal["down", "up", "up_bias", "alpha", "diff", "diff_b"]

_PREFIX = re.compile(
    r"(?:base_model\.model\.|(?:model\.)?diffusion_model\.|(?:pipe\.)?dit\.|transformer(?P<low>_2)?\."
    r"|lora_unet__?|lora_transformer_|lycoris_)+"
)
_TEXT_ENCODER = re.compile(r"(lora_te\d?_|text_(encoders?|model)(_\d)?[._])")
_TENSOR = re.compile(
    r"(?P<layer>.+?)\.(?:lora[._](?P<side>A|B|down|up)(?:\.[\w-]+)?\.(?P<of>weight|bias)"
    r"|(?P<other>alpha|diff|diff_b|diff_m))"
)
_KINDS: Mapping[str, Kind] = {
    "A": "down", "down": "down", "B": "up", "up": "up",
    "alpha": "alpha", "diff": "diff", "diff_b": "diff_b",
}
TOKEN = "text_encoder.token."
"""Prefix of the name of a token's embedding; the rest is the token as written in prompts."""
_OTHER_METHODS = {
    "DoRA": ("dora_scale", "lora_magnitude_vector"),
    "LoKr": (".lokr_",),
    "LoHa": (".hada_",),
    "OFT": (".oft_", ".boft_"),
    "Tucker LoCon": (".lora_mid",),
}


DIALECTS = {"vidgen": "", "diffusers": "transformer.", "wan": "diffusion_model."}
"""Dialects that `write_lora` can write, each with the prefix of all names."""


class TensorName(NamedTuple):
    """Parts of a LoRA tensor's name: its layer in the file's spelling, kind and expert."""

    layer: str
    kind: Kind
    low_noise: bool


def parse_name(name: str) -> TensorName | None:
    """Split a tensor's name into its parts; return None if it isn't a LoRA tensor's."""
    prefix = _PREFIX.match(name)
    low_noise = prefix is not None and prefix["low"] is not None
    match = _TENSOR.fullmatch(name, 0 if prefix is None else prefix.end())
    if match is None:
        return None
    layer, side, other = match["layer"], match["side"], match["other"]
    if other == "diff_m":  # lightx2v's differences of a block's modulation
        return TensorName(f"{layer}.modulation", "diff", low_noise)
    kind = _KINDS[side or other]
    if match["of"] == "bias":
        return TensorName(layer, "up_bias", low_noise) if kind == "up" else None
    return TensorName(layer, kind, low_noise)


def is_of_text_encoder(name: str) -> bool:
    """Return True for a tensor of a text encoder, False for one of the DiT."""
    return _TEXT_ENCODER.match(name) is not None


def other_method(names: Collection[str]) -> str | None:
    """Return the name of the method that made the tensors, or None for LoRA."""
    for method, marks in _OTHER_METHODS.items():
        if any(mark in name for name in names for mark in marks):
            return method
    return None


@lru_cache(maxsize=8)
def layer_paths(config: DiTConfig) -> tuple[nn.Module, Mapping[str, str]]:
    """Return a model on the meta device, and its layers' paths by `flat` path in any spelling.

    Underscores are ambiguous (`a_b.c`, `a.b_c`), so that kohya's names must be looked up.
    """
    with torch.device("meta"):
        module = SpacetimeDiT(config)
    paths: dict[str, str] = {}
    for name, _ in module.named_parameters():
        path = re.sub(r"\.(weight|bias)$", "", name)
        spellings = (rename(path, DIT_KEYS, "vidgen", other) for other in get_args(Spelling))
        for spelled in (path, *spellings):
            if spelled is not None:
                known = paths.setdefault(flat(spelled), path)
                assert known == path, f"{spelled} is {known} and {path}"
    return module, paths


def flat(path: str) -> str:
    """Replace the dots of a path by underscores, as kohya's training scripts do."""
    return path.replace(".", "_")


class Scaling:
    """Scales of layers that have no alpha in the file: from PEFT's config, or 1 without one.

    Args:
        config: PEFT's, from `adapter_config.json` or a safetensors header; may be empty.
        source: name of the LoRA, for messages.

    Raises:
        ModelError: the config isn't that of a plain LoRA.
    """

    def __init__(self, config: Mapping[str, Any], source: str) -> None:
        self.config = config
        kind = config.get("peft_type") or "LORA"
        refused = [key for key in ("use_dora", "modules_to_save", "use_qalora") if config.get(key)]
        if kind != "LORA" or refused:
            what = kind if kind != "LORA" else ", ".join(refused)
            raise ModelError(
                f"{source} is not a plain LoRA ({what}); merge it with the program that trained it"
            )
        try:
            self.alpha = None if config.get("lora_alpha") is None else float(config["lora_alpha"])
            self.alphas = [
                (re.compile(rf"(.*\.)?({pattern})"), float(alpha))
                for pattern, alpha in (config.get("alpha_pattern") or {}).items()
            ]
        except (ValueError, TypeError, AttributeError, re.error) as error:
            raise ModelError(f"{source} has an unreadable lora_alpha: {error}") from error

    def __call__(self, layer: str, rank: int) -> float:
        """Return the scale of a layer of this rank; `layer` is its path in the file's spelling."""
        if self.alpha is None:
            return 1.0
        alpha = next((a for pattern, a in self.alphas if pattern.fullmatch(layer)), self.alpha)
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


def config_in_header(header: Mapping[str, str], *, low_noise: bool) -> dict[str, Any]:
    """Return PEFT's config that diffusers stores in a safetensors header, or {}."""
    try:
        stored = json.loads(header.get("lora_adapter_metadata", "{}"))
    except (ValueError, RecursionError):
        return {}
    if not isinstance(stored, dict):
        return {}
    prefix = "transformer_2." if low_noise else "transformer."
    return {key.removeprefix(prefix): v for key, v in stored.items() if key.startswith(prefix)}
