"""Read and write LoRA files in the dialects of several training programs."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vidgen.core.errors import InputError, ModelError, nearest
from vidgen.core.runtime import atomic_path
from vidgen.models.dit_types import DiTConfig
from vidgen.models.lora import Adapter, LowRank, find_misfits, name_some
from vidgen.weights.component import ExpertRole
from vidgen.weights.folder import FEW_STEP, FEW_STEP_WEIGHTS
from vidgen.weights.keymap import DIT_KEYS, Spelling, rename
from vidgen.weights.lora_dialects import (
    DIALECTS,
    TOKEN,
    Kind,
    Scaling,
    TensorName,
    config_in_header,
    flat,
    is_of_text_encoder,
    layer_paths,
    other_method,
    parse_name,
)
from vidgen.weights.store import open_tensors
from vidgen.weights.tensors import Tensors

log = logging.getLogger(__name__)

Expert = Literal["high", "low"]
EXPERTS: tuple[Expert, ...] = get_args(Expert)

_OPTION = re.compile(
    r"(?P<path>.+?)(?::(?P<weight>[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?))?(?:@(?P<expert>high|low))?",
    re.ASCII | re.IGNORECASE | re.DOTALL,
)
EXPERT_HEADER = "vidgen.expert"
"""Key of the expert in a file's header."""
_TEXTS = (".yaml", ".yml", ".json", ".txt", ".md")
MAX_WEIGHT = 100
"""Largest absolute weight of a LoRA; a larger one yields only noise."""
_GRAMMAR = "--lora takes PATH[:WEIGHT][@high|@low]"


@dataclass(frozen=True)
class LoraChoice:
    """A LoRA that a request uses.

    Args:
        path: a file, or a folder with `adapter_config.json`.
        weight: factor of all its changes, of either sign.
        expert: the expert of a model with two that uses it; None: the one that its file names, or
            else all transformers.

    Raises:
        InputError: `weight` exceeds `MAX_WEIGHT`.
    """

    path: Path
    weight: float = 1.0
    expert: Expert | None = None

    def __post_init__(self) -> None:
        if not abs(self.weight) <= MAX_WEIGHT:
            raise InputError(f"the weight of LoRA {self.path} is {self.weight:g}; give one from "
                             f"-{MAX_WEIGHT} to {MAX_WEIGHT}")


def parse_option(text: str) -> LoraChoice:
    """Parse `PATH[:WEIGHT][@high|@low]`; a colon without a number after it belongs to the path.

    Raises:
        InputError: the path is missing.
    """
    match = _OPTION.fullmatch(text)
    if match is None:
        raise InputError(f"{text!r} names no file; {_GRAMMAR}")
    named = (match["expert"] or "").lower()
    expert = next((each for each in EXPERTS if each == named), None)
    return LoraChoice(Path(match["path"]), float(match["weight"] or 1), expert)


def read_choices(
    choices: Sequence[LoraChoice], config: DiTConfig, expert: Expert | None = None
) -> list[tuple[Adapter, float]]:
    """Read one transformer's adapters, each with its weight, for `attached`.

    Args:
        expert: the transformer's role in a model with two experts; None: the only transformer.

    Raises:
        InputError: a choice names an expert, but the model has only one transformer.
        ModelError: see `read_lora`.
    """
    adapters = []
    for choice in choices:
        if choice.expert is not None and expert is None:
            raise InputError(
                f"{choice.path}@{choice.expert}: this model has one transformer, not a high-noise "
                f"and a low-noise one; remove @{choice.expert}"
            )
        own = None if expert is None else expert_of(choice.path)
        wanted = choice.expert or own
        if wanted not in (None, expert):
            continue
        if own != wanted and own is not None:
            log.warning("%s was trained for the %s-noise expert, but @%s applies it to the other",
                        choice.path, own, wanted)
        adapter = read_lora(choice.path, config, expert)
        if adapter.low_rank or adapter.deltas or adapter.tokens:
            adapters.append((adapter, choice.weight))
    return adapters


def read_lora(path: str | Path, config: DiTConfig, expert: Expert | None = None) -> Adapter:
    """Read a LoRA in any dialect; its tensors are mapped from the file, in the file's dtype.

    Tensors of text encoders are ignored with a warning. A warning also names deltas that are zero.

    Args:
        path: a safetensors file or a pickle of plain tensors; or a folder with one such file, or
            one for each expert, and optionally PEFT's `adapter_config.json`.
        expert: the transformer's role in a model with two experts: of a file for both, "high" reads
            the tensors `transformer.*` and "low" `transformer_2.*`. None: the only transformer.

    Raises:
        InputError: no such file.
        ModelError: an unreadable file, another method than LoRA, or tensors that match no layer,
            have a wrong rank or shape, or aren't finite; the message counts and names them.
    """
    source = Path(path)
    file, peft = _locate(source, expert)
    stored = open_tensors([file])
    method = other_method(stored)
    if method is not None:
        raise ModelError(
            f"{source} is a {method}; vidgen reads only LoRA and plain weight differences: extract "
            "a LoRA with the program that trained it"
        )
    texts = {name for name in stored if is_of_text_encoder(name)}
    tokens = {name.removeprefix(TOKEN): stored[name].get()
              for name in texts if name.startswith(TOKEN)}
    if len(texts) > len(tokens):
        log.warning(
            "%s: %d tensors for a text encoder are ignored", source, len(texts) - len(tokens)
        )
    names = {name: parse_name(name) for name in stored if name not in texts}
    if any(parsed is not None and parsed.low_noise for parsed in names.values()):
        if expert is None:
            raise ModelError(
                f"{source} has transformer_2 tensors for a model with two experts, but this model "
                "has one transformer"
            )
        wanted = expert == "low"
        names = {n: p for n, p in names.items() if p is None or p.low_noise == wanted}
    elif not names and not tokens:
        raise ModelError(f"{source} has no LoRA tensors for a transformer")
    settings = peft or config_in_header(_header(file), low_noise=expert == "low")
    scaling = Scaling(settings, str(source))
    adapter, problems = _assemble(source, stored, names, config, scaling)
    if problems:
        raise ModelError(
            f"{source} doesn't fit this model ({config.num_layers} blocks of width "
            f"{config.hidden_dim}): {'; '.join(problems)}; use a LoRA trained for this model"
        )
    _check_tokens(source, tokens)
    adapter = replace(adapter, tokens=tokens)
    _report_zeros(source, adapter)
    return adapter


def read_few_step(model: Path, config: DiTConfig, part: ExpertRole = "transformer") -> Adapter:
    """Read the few-step adapter's weights for one transformer from a model's folder.

    Raises:
        ModelError: the file is missing, damaged, or made for another transformer.
    """
    return read_lora(model / FEW_STEP / FEW_STEP_WEIGHTS[part], config)


def expert_of(path: Path) -> Expert | None:
    """Return the expert that the header of a LoRA's file names, or None."""
    named = _header(path).get(EXPERT_HEADER) if path.is_file() else None
    return next((each for each in EXPERTS if each == named), None)


def _locate(source: Path, expert: Expert | None) -> tuple[Path, dict[str, Any]]:
    """Return the file of an expert's tensors, and the folder's PEFT config, or {}."""
    if not source.exists():
        raise InputError(f"LoRA {source} doesn't exist; {_GRAMMAR}")
    if source.suffix.lower() in _TEXTS:
        raise InputError(f"{source} is a text file, not a LoRA; {_GRAMMAR}, where PATH is a "
                         "safetensors file or a folder with one")
    if not source.is_dir():
        return source, {}
    files = sorted(source.glob("*.safetensors")) or sorted(source.glob("*.bin"))
    own = {expert_of(file): file for file in files} if len(files) == len(EXPERTS) else {}
    if expert is not None and own.keys() == set(EXPERTS):
        files = [own[expert]]
    if len(files) != 1:
        found = name_some([file.name for file in files]) or "no *.safetensors"
        raise ModelError(f"LoRA folder {source} has {found}; give the path of one file")
    try:
        config = source / "adapter_config.json"
        return files[0], dict(json.loads(config.read_text("utf-8"))) if config.is_file() else {}
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ModelError(f"{source / 'adapter_config.json'} can't be read: {error}") from error


def _header(file: Path) -> dict[str, str]:
    if file.suffix != ".safetensors":
        return {}
    try:
        with safe_open(file, framework="pt") as handle:
            return handle.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file} can't be read ({error}); copy it again") from error


class _Layer(NamedTuple):
    """One layer's tensors by kind, and its name in the file's spelling."""

    spelled: str
    tensors: dict[Kind, Tensor]


def _assemble(
    source: Path, stored: Tensors, names: Mapping[str, TensorName | None], config: DiTConfig,
    scaling: Scaling,
) -> tuple[Adapter, list[str]]:
    """Return the adapter, and descriptions of the file's problems."""
    module, paths = layer_paths(config)
    layers: dict[str, _Layer] = {}
    unmatched, duplicates, infinite = [], [], []
    for name, parsed in names.items():
        path = None if parsed is None else paths.get(flat(parsed.layer))
        if path is None or parsed is None:
            unmatched.append(name)
            continue
        tensor = stored[name].get()
        if tensor.is_floating_point() and tensor.itemsize == 1:  # torch can't compute in float8
            tensor = tensor.to(torch.bfloat16)
        tensors = layers.setdefault(path, _Layer(parsed.layer, {})).tensors
        if parsed.kind in tensors:
            duplicates.append(name)
        if tensor.numel() and not torch.isfinite(torch.stack(torch.aminmax(tensor))).all():
            infinite.append(name)
        tensors[parsed.kind] = tensor
    adapter, incomplete = _combine(source.stem, layers, scaling, dict(module.named_parameters()))
    problems = [
        f"{len(found)} of {len(names)} {what} ({name_some(found)})"
        for found, what in (
            (unmatched, "tensors match no layer"), (duplicates, "tensors are duplicates"),
            (infinite, "tensors are not finite"),
            (incomplete, "lack lora_A, lora_B, a single alpha or a single bias"),
            (find_misfits(adapter, module), "don't fit"),
        )
        if found
    ]
    return adapter, problems


def _combine(
    name: str, layers: Mapping[str, _Layer], scaling: Scaling, parameters: Mapping[str, Any]
) -> tuple[Adapter, list[str]]:
    """Return the adapter of all layers, and the names of layers with missing or duplicate parts."""
    low_rank: dict[str, LowRank] = {}
    deltas: dict[str, Tensor] = {}
    incomplete = []
    for path, (spelled, tensors) in layers.items():
        down, up, alpha = (tensors.get(kind) for kind in ("down", "up", "alpha"))
        scale = 1.0
        if down is not None and up is not None and (alpha is None or alpha.numel() == 1):
            rank = max(down.shape[:1].numel(), 1)
            scale = scaling(spelled, rank) if alpha is None else float(alpha.item()) / rank
            low_rank[path] = LowRank(down, up.flatten(1) if up.ndim > 2 else up, scale)
        elif not (down is up is alpha is None):
            incomplete.append(spelled)
        bias, up_bias = tensors.get("diff_b"), tensors.get("up_bias")
        if bias is not None and up_bias is not None:
            incomplete.append(spelled)
        elif up_bias is not None and up_bias.any():  # PEFT writes zeros for layers without a bias
            bias = up_bias * scale
        if bias is not None:
            deltas[f"{path}.bias"] = bias
        if "diff" in tensors:
            deltas[path if path in parameters else f"{path}.weight"] = tensors["diff"]
    return Adapter(name, low_rank, deltas), incomplete


def _check_tokens(source: Path, tokens: Mapping[str, Tensor]) -> None:
    bad = [token for token, row in tokens.items()
           if row.ndim != 1 or not row.is_floating_point() or not torch.isfinite(row).all()]
    if bad:
        raise ModelError(
            f"{source}: the embeddings of {name_some(bad)} aren't finite vectors; copy it again"
        )


def _report_zeros(source: Path, adapter: Adapter) -> None:
    zeros = [path for path, part in adapter.low_rank.items()
             if not (part.scale and part.up.any() and part.down.any())]
    zeros += [name for name, delta in adapter.deltas.items() if not delta.any()]
    total = len(adapter.low_rank) + len(adapter.deltas)
    if zeros and len(zeros) == total and not adapter.tokens:
        log.warning("%s changes nothing: all of its %d deltas are zero", source, total)
    elif zeros:
        log.warning("%s: %d of its %d deltas are zero (%s)", source, len(zeros), total,
                    name_some(zeros))


def write_lora(
    adapter: Adapter, path: str | Path, dialect: Spelling, expert: Expert | None = None
) -> None:
    """Write an adapter as a safetensors file.

    Tensors keep their dtype. In dialects without alpha, scales are multiplied into the second
    factor, which becomes float32 if its own dtype can't hold the product exactly.

    Args:
        dialect: one of `DIALECTS`.
        expert: the expert that the file's header names, or None.

    Raises:
        InputError: unknown dialect.
        ModelError: parts that have no name in the dialect; the message counts and names them.
        OutputError: the file can't be written.
    """
    tensors = spelled(adapter, dialect)
    header = {"format": "pt"} | ({} if expert is None else {EXPERT_HEADER: expert})
    with atomic_path(Path(path)) as temporary:
        save_file(tensors, temporary, metadata=header)


def spelled(adapter: Adapter, dialect: Spelling) -> dict[str, Tensor]:
    """Return an adapter's tensors by a dialect's names; see `write_lora` for errors.

    Only vidgen's dialect has alphas; diffusers' has no full differences. Embeddings of tokens have
    vidgen's names in all dialects.
    """
    if dialect not in DIALECTS:
        raise InputError(f"unknown LoRA dialect {dialect!r}; {nearest(dialect, DIALECTS)}")
    tensors = {f"{TOKEN}{token}": row.detach().cpu() for token, row in adapter.tokens.items()}
    unnamed: list[str] = []

    def put(path: str, what: str, tensor: Tensor) -> None:
        name = path if dialect == "vidgen" else rename(path, DIT_KEYS, "vidgen", dialect)
        if name is None:
            unnamed.append(path)
        else:
            tensors[f"{DIALECTS[dialect]}{name}.{what}"] = tensor.detach().cpu().contiguous()

    left = dict(adapter.deltas)
    needs_bias = dialect == "diffusers" and any(f"{p}.bias" in left for p in adapter.low_rank)
    for path, part in adapter.low_rank.items():
        down, up = part.down, part.up if dialect == "vidgen" else _scaled(part.up, part.scale)
        put(path, "lora_A.weight", down)
        put(path, "lora_B.weight", up.reshape(*up.shape, *(1,) * (down.ndim - 2)))
        if dialect == "vidgen":
            put(path, "alpha", torch.tensor(part.scale * down.shape[0]))
        if needs_bias:  # PEFT has biases for all layers or for none
            bias = left.pop(f"{path}.bias", up.new_zeros(up.shape[0]))
            put(path, "lora_B.bias", bias)
    for name, delta in left.items():
        path, _, last = name.rpartition(".")
        if dialect == "diffusers":
            unnamed.append(name)
        elif last in ("weight", "bias"):
            put(path, "diff" if last == "weight" else "diff_b", delta)
        else:
            put(name, "diff", delta)
    if unnamed:
        raise ModelError(
            f"the dialect {dialect!r} has no names for {len(unnamed)} parts of LoRA "
            f"{adapter.name!r} ({name_some(unnamed)}); write it as 'vidgen'"
        )
    return tensors


def _scaled(up: Tensor, scale: float) -> Tensor:
    exact = up.double() * scale
    kept = exact.to(up.dtype)
    return kept if torch.equal(kept.double(), exact) else exact.float()
