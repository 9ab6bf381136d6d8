"""`vidgen train --plan`: what a run will take on each rank, before weights or clips are there."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from vidgen.core.errors import InputError
from vidgen.core.values import parse_size
from vidgen.diffusion.oversampling import Pace
from vidgen.models.dit import SpacetimeDiT
from vidgen.pipeline.loader import DTYPES, EXPERTS
from vidgen.training.engines.distributed import check_sharing, current_place
from vidgen.training.finetune.config import FinetuneConfig
from vidgen.training.finetune.model import choose_roles, open_trainable, prepare_module
from vidgen.training.plan import Sample, TrainingPlan, plan_training
from vidgen.weights.folder import ModelFolder
from vidgen.weights.published import is_here, published


def plan(config: FinetuneConfig, ranks: int | None = None) -> TrainingPlan:
    """Memory and time of a run; its model needs to be here only if nobody published it.

    Args:
        config: the run.
        ranks: processes; None: those that a launcher started, else 1.

    Raises:
        InputError: a model that is neither here nor a published one of the Wan family, experts
            that can't be trained so, or ranks that can't share samples as the run asks.
    """
    ranks = ranks or current_place().size
    check_sharing(config.run, ranks)
    known = known_model(config.model)
    experts = [role for role in EXPERTS if role in known.components]
    roles = choose_roles(config, config.model, len(experts))
    modules: dict[str, nn.Module] = {}
    for role in roles:
        with torch.device("meta"):
            module = SpacetimeDiT(known.components[role].config)
            dtype = torch.float32 if config.method == "full" else DTYPES[config.run.dtype]
            modules[role] = prepare_module(config, module.to(dtype))
    sample = largest_sample(config, known, finer=EXPERTS[1] in roles)
    return plan_training(modules, config.run, sample, ranks=ranks)


def known_model(model: str) -> ModelFolder:
    """A folder that can be trained, or what the name of a published one tells of it.

    Raises:
        InputError: it is neither.
    """
    if is_here(model):
        return open_trainable(model)
    folder = published(model)
    if folder is None:
        raise InputError(
            f"model {model!r} is neither here nor a published one of the Wan family, so nothing "
            "can be planned; give a model's folder"
        )
    return folder


def largest_sample(config: FinetuneConfig, known: ModelFolder, *, finer: bool) -> Sample:
    """The sample of most tokens that the data's buckets can hold, at the finer rate if need be."""
    data, strides = config.data, known.components["vae"].config.strides
    dit = known.components["transformer"].config
    side = strides.hw * dit.patch_size
    sizes = [parse_size(size) for size in data.sizes] or list(known.defaults.sizes)
    area = data.area or max(width * height for width, height in sizes)
    num_frames = max(data.frames, default=known.defaults.num_frames)
    frames = 1 + (num_frames - 1) // strides.t
    if finer:
        frames = Pace(known.defaults.oversampling).finer(frames)
    sample = Sample(frames, -(-area // side**2))
    return replace(sample, text_tokens=min(sample.text_tokens, dit.text_len))
