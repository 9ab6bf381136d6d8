"""A model opened to be fine-tuned: transformers that learn, and a spare token's embedding.

Axes: D width of the text encoder.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vidgen.core.errors import InputError, ModelError
from vidgen.models.dit import SpacetimeDiT
from vidgen.models.text import UMT5Encoder
from vidgen.models.tokenizer import PromptTokenizer
from vidgen.pipeline.experts import upsampling_of
from vidgen.pipeline.loader import DTYPES, EXPERTS
from vidgen.training.engines.deepspeed import share_out
from vidgen.training.finetune.config import FinetuneConfig, SubjectSettings
from vidgen.training.finetune.lora import inject
from vidgen.weights.component import ExpertRole
from vidgen.weights.folder import DiffusersFolder, ModelFolder
from vidgen.weights.layouts import open_model


class LearnedToken(nn.Module):
    """The embedding of one spare token.

    Args:
        token: as it is written in prompts.
        index: the tokenizer's id of it.
        row: [D], what it starts from.
    """

    def __init__(self, token: str, index: int, row: Tensor) -> None:
        super().__init__()
        self.token, self.index = token, index
        self.row = nn.Parameter(row.detach().float().clone())

    def forward(self) -> dict[int, Tensor]:
        """What `encode_tokens` takes for learned tokens."""
        return {self.index: self.row}


@dataclass(frozen=True)
class Subject:
    """What reads captions while a token is learned: a frozen text encoder and its tokenizer."""

    token: LearnedToken
    encoder: UMT5Encoder
    tokenizer: PromptTokenizer


def open_trainable(model: str) -> ModelFolder:
    """Open a model's folder.

    Raises:
        ModelError: no such model, or one of a family that vidgen doesn't train.
    """
    folder = open_model(model)
    if isinstance(folder, DiffusersFolder):
        raise ModelError(
            f"{folder.name} is a {folder.class_name}; vidgen fine-tunes toybox and the Wan family"
        )
    return folder


def trained_roles(config: FinetuneConfig, folder: ModelFolder) -> tuple[ExpertRole, ...]:
    """The transformers that learn, by their role.

    Raises:
        InputError: an expert of a model that has only one transformer, or two at once by DeepSpeed.
    """
    if EXPERTS[1] not in folder.components:
        if config.experts != "both":
            raise InputError(f"experts is {config.experts!r}, but {folder.name} has one "
                             "transformer; leave it out")
        return EXPERTS[:1]
    if config.experts == "both" and config.run.engine.deepspeed:
        raise InputError(
            f"{folder.name} has two experts, which take turns; DeepSpeed would change the one that "
            "rests. Train one after the other: --set experts=high, then --set experts=low with "
            "another run.folder; or leave run.engine.deepspeed out"
        )
    return {"high": EXPERTS[:1], "low": EXPERTS[1:], "both": EXPERTS}[config.experts]


def rate_of(folder: ModelFolder, role: str) -> int:
    """Return how many latent frames a transformer draws for each of a clip's."""
    return upsampling_of(folder) if role == EXPERTS[1] else 1


def open_transformers(
    config: FinetuneConfig, folder: ModelFolder, device: torch.device
) -> dict[str, nn.Module]:
    """The transformers that learn, ready to be trained.

    LoRA: frozen weights in the run's dtype, float32 factors drawn from torch's global generator.
    Full: float32 weights, of which autocast makes bf16 where the run says so.

    Raises:
        InputError: see `inject`.
        ModelError: damaged files.
    """
    dtype = torch.float32 if config.method == "full" else DTYPES[config.run.dtype]
    return {
        role: prepare_module(config, folder.components[role].load(
            dtype, device, each=share_out(config.run)))
        for role in trained_roles(config, folder)
    }


def prepare_module(config: FinetuneConfig, module: nn.Module) -> nn.Module:
    """A loaded transformer, or one on the meta device, as the run trains it."""
    assert isinstance(module, SpacetimeDiT)
    module.gradient_checkpointing = config.checkpointing
    if config.method == "lora":
        inject(module, config.lora)
        return module
    for name, parameter in module.named_parameters():
        if not (parameter.is_meta or hasattr(parameter, "ds_id")):  # which ZeRO-3 has copied
            parameter.data = parameter.data.clone()  # as loaded it may be the mapped file
        parameter.requires_grad_("audio" not in name)  # clips have no sound: nothing would reach it
    return module


def open_subject(settings: SubjectSettings, folder: ModelFolder, device: torch.device) -> Subject:
    """The spare token, its embedding beginning as the mean of `like`'s.

    Raises:
        InputError: a token that this model doesn't have.
    """
    tokenizer = PromptTokenizer(folder.tokenizer, folder.components["transformer"].config.text_len)
    try:
        index = tokenizer.token_id(settings.token)
    except ModelError:
        raise InputError(
            f"subject.token {settings.token!r} is no token of {folder.name}; toybox has "
            "<subject_0> to <subject_63>, other models none: leave subject out"
        ) from None
    encoder = folder.components["text_encoder"].load(torch.float32, device)
    assert isinstance(encoder, UMT5Encoder)
    ids, _ = tokenizer.encode([settings.like])
    start = encoder.shared.weight[ids[0, :-1].to(device)].mean(0)  # the last one ends the text
    return Subject(LearnedToken(settings.token, index, start), encoder, tokenizer)
