"""Open a model for fine-tuning: its transformers, with LoRA, and a spare token's embedding.

During training LoRA layers are PEFT's, whose factors are modules, as DeepSpeed and DDP require.
Results are written as an `Adapter`, which `--lora` reads.

Axes: D width of the text encoder.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vidgen.core.errors import InputError, ModelError, nearest
from vidgen.models.dit import SpacetimeDiT
from vidgen.models.lora import Adapter, LowRank, name_some
from vidgen.models.text import UMT5Encoder
from vidgen.models.tokenizer import PromptTokenizer
from vidgen.pipeline.denoise import upsampling_of
from vidgen.pipeline.loader import DTYPES, EXPERTS
from vidgen.training.config import FinetuneConfig, LoraSettings, SubjectSettings
from vidgen.training.engines.deepspeed import shard_weights
from vidgen.weights.component import ExpertRole
from vidgen.weights.folder import ModelFolder

_ADAPTER = "default"  # PEFT's name of a first adapter
_GROUPS = {
    "attention": (".self_attn.", ".cross_attn."),
    "all": (".self_attn.", ".cross_attn.", ".ffn."),
}


class LearnedToken(nn.Module):
    """The trained embedding of a spare token, whose id is `index`; initially `row` [D]."""

    def __init__(self, token: str, index: int, row: Tensor) -> None:
        super().__init__()
        self.token, self.index = token, index
        self.row = nn.Parameter(row.detach().float().clone())

    def forward(self) -> dict[int, Tensor]:
        """Return {token id: embedding [D]}, as `encode_tokens` takes it."""
        return {self.index: self.row}


@dataclass(frozen=True)
class Subject:
    """Hold a trained token, with the frozen text encoder and tokenizer for captions."""

    token: LearnedToken
    encoder: UMT5Encoder
    tokenizer: PromptTokenizer


def trained_roles(config: FinetuneConfig, folder: ModelFolder) -> tuple[ExpertRole, ...]:
    """Return the roles of the transformers to train; InputError for those that can't be."""
    if EXPERTS[1] not in folder.components:
        if config.experts != "both":
            raise InputError(f"experts is {config.experts!r}, but {folder.name} has one "
                             "transformer; leave it out")
        return EXPERTS[:1]
    if config.experts == "both" and config.run.engine.deepspeed:
        raise InputError(
            f"{folder.name} has two experts, which take turns; DeepSpeed would also change the "
            "unused one. Train one after the other: --set experts=high, then --set experts=low "
            "with another run.folder; or leave run.engine.deepspeed out")
    return {"high": EXPERTS[:1], "low": EXPERTS[1:], "both": EXPERTS}[config.experts]


def rate_of(folder: ModelFolder, role: str) -> int:
    """Return the number of latent frames that a transformer denoises per latent frame of a clip."""
    return upsampling_of(folder) if role == EXPERTS[1] else 1


def open_transformers(
    config: FinetuneConfig, folder: ModelFolder, device: torch.device
) -> dict[str, nn.Module]:
    """Load the transformers to train and prepare them.

    LoRA: frozen weights in the run's dtype, and float32 factors from torch's global generator.
    Full: float32 weights; a run in bf16 uses autocast.
    """
    dtype = torch.float32 if config.method == "full" else DTYPES[config.run.dtype]
    return {role: prepare_module(config, folder.components[role].load(
                dtype, device, each=shard_weights(config.run)))
            for role in trained_roles(config, folder)}


def prepare_module(config: FinetuneConfig, module: nn.Module) -> nn.Module:
    """Prepare a transformer, loaded or on the meta device, for training; return it."""
    assert isinstance(module, SpacetimeDiT)
    module.gradient_checkpointing = config.checkpointing
    if config.method == "lora":
        inject(module, config.lora)
        return module
    for name, parameter in module.named_parameters():
        if not (parameter.is_meta or hasattr(parameter, "ds_id")):  # ZeRO-3 has copied it
            parameter.data = parameter.data.clone()  # it may be a read-only map of the file
        parameter.requires_grad_("audio" not in name)  # data have no audio, so no gradients
    return module


def open_subject(settings: SubjectSettings, folder: ModelFolder, device: torch.device) -> Subject:
    """Open a spare token; its embedding starts as the mean of those of `settings.like`."""
    tokenizer = PromptTokenizer(folder.tokenizer, folder.components["transformer"].config.text_len)
    try:
        index = tokenizer.token_id(settings.token)
    except ModelError:
        raise InputError(
            f"subject.token {settings.token!r} is no token of {folder.name}; toybox has "
            "<subject_0> to <subject_63>, other models have none: leave subject out") from None
    encoder = folder.components["text_encoder"].load(torch.float32, device)
    assert isinstance(encoder, UMT5Encoder)
    ids, _ = tokenizer.encode([settings.like])
    start = encoder.shared.weight[ids[0, :-1].to(device)].mean(0)  # without the end-of-text token
    return Subject(LearnedToken(settings.token, index, start), encoder, tokenizer)


def target_paths(dit: nn.Module, targets: str | tuple[str, ...]) -> tuple[str, ...]:
    """Return the paths of layers that get a delta, none of audio; InputError for unknown parts."""
    linear = [path for path, layer in dit.named_modules()
              if isinstance(layer, nn.Linear) and "audio" not in path]
    blocks = [path for path in linear if path.startswith(("blocks.", "control_blocks."))]
    if isinstance(targets, str):
        return tuple(path for path in blocks if any(part in path for part in _GROUPS[targets]))
    for part in targets:
        if not any(f".{part}." in f".{path}." for path in linear):
            ends = {path.partition(".")[2].partition(".")[2] or path for path in linear}
            raise InputError(f"lora.targets: no linear layer is called {part!r}; give attention, "
                             f"all, or parts of layers' names: {nearest(part, ends)}")
    return tuple(path for path in linear if any(f".{part}." in f".{path}." for part in targets))


def inject(dit: nn.Module, settings: LoraSettings) -> int:
    """Add trainable deltas to layers, freeze all else, and return the number of layers.

    Factors are float32. The first is drawn from torch's global generator; the second is zero.
    """
    try:
        with _quiet():
            from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise InputError(
            "LoRA training needs the package peft; install it: pip install 'vidgen[train]'"
        ) from None
    paths = target_paths(dit, settings.targets)
    dit.requires_grad_(requires_grad=False)
    alpha = settings.rank if settings.alpha is None else settings.alpha
    config = LoraConfig(r=settings.rank, lora_alpha=alpha, lora_dropout=settings.dropout,
                        target_modules=list(paths))
    with _quiet():
        inject_adapter_in_model(config, dit)
    for parameter in dit.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    missed = {path for path in paths if not hasattr(dit.get_submodule(path), "lora_A")}
    assert not missed, f"PEFT left out {name_some(sorted(missed))}"
    return len(paths)


@contextmanager
def without_delta(dit: nn.Module) -> Iterator[None]:
    """Switch off the deltas of `inject` inside the block."""
    from peft.tuners.lora import LoraLayer

    layers = [layer for layer in dit.modules() if isinstance(layer, LoraLayer)]
    scales = [layer.scaling[_ADAPTER] for layer in layers]
    for layer in layers:
        layer.scaling[_ADAPTER] = 0.0
    try:
        yield
    finally:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scaling[_ADAPTER] = scale


def adapter_of(
    weights: Mapping[str, Tensor], settings: LoraSettings, name: str,
    tokens: Mapping[str, Tensor] | None = None,
) -> Adapter:
    """Return an adapter of the weights of a transformer after `inject`.

    Args:
        weights: state of the transformer, of which only the factors are used.
        tokens: trained embeddings [D] by token.
    """
    first, second = (f".lora_{side}.{_ADAPTER}.weight" for side in "AB")
    scale = (settings.rank if settings.alpha is None else settings.alpha) / settings.rank
    low_rank = {path: LowRank(weights[path + first], weights[path + second], scale)
                for path in (name.removesuffix(first) for name in weights if name.endswith(first))}
    return Adapter(name, low_rank, tokens=tokens or {})


def delta_norm(adapter: Adapter) -> float:
    """Return the Frobenius norm of an adapter's changes to a transformer's weights.

    |scale * up @ down|^2 is scale^2 times the sum of (up^T up) * (down down^T), so no matrix of a
    layer's size is computed.
    """
    total = 0.0
    for part in adapter.low_rank.values():
        up, down = part.up.double(), part.down.flatten(1).double()
        total += part.scale**2 * float(((up.T @ up) * (down @ down.T)).sum().clamp(min=0))
    total += sum(float(delta.double().square().sum()) for delta in adapter.deltas.values())
    return math.sqrt(total)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide warnings of PEFT's optional back ends, which aren't used here."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
