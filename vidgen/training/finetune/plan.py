"""`vidgen train --plan`: what a run will take on each rank, before weights or clips are there."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from vidgen.core.errors import InputError
from vidgen.core.values import parse_size
from vidgen.diffusion.oversampling import Pace
from vidgen.models.dit import DiTConfig, SpacetimeDiT
from vidgen.models.presets import DIT_PRESETS, VAE_PRESETS
from vidgen.models.vae import VAEConfig
from vidgen.pipeline.parts import DTYPES, EXPERTS
from vidgen.training.engines.distributed import check_sharing, current_place
from vidgen.training.finetune.config import FinetuneConfig
from vidgen.training.finetune.model import choose_roles, open_trainable, prepare_module
from vidgen.training.plan import Sample, TrainingPlan, plan_training
from vidgen.weights.family import VARIANTS, ModelDefaults
from vidgen.weights.folder import list_embedded

_PUBLISHED = re.compile(
    r"wan2\.[12]-(?P<kind>t2v|i2v|flf2v|vace|ti2v)-(?P<size>1\.3b|14b|a14b|5b)"
)
_PRESETS = {
    "t2v-1.3b": "wan-1.3b", "t2v-14b": "wan-14b", "t2v-a14b": "wan-14b", "i2v-14b": "wan-14b-i2v",
    "flf2v-14b": "wan-14b-flf2v", "vace-1.3b": "wan-vace-1.3b", "vace-14b": "wan-vace-14b",
    "i2v-a14b": "wan22-14b-i2v", "ti2v-5b": "wan22-5b",
}


@dataclass(frozen=True)
class Architecture:
    """What a plan needs to know of a model.

    Attributes:
        dits: of its transformer, or of its two experts.
        vae: of its VAE.
        defaults: of its clips.
    """

    dits: tuple[DiTConfig, ...]
    vae: VAEConfig
    defaults: ModelDefaults


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
    known = architecture(config.model)
    roles = choose_roles(config, config.model, len(known.dits))
    modules: dict[str, nn.Module] = {}
    for role in roles:
        with torch.device("meta"):
            module = SpacetimeDiT(known.dits[EXPERTS.index(role)])
            dtype = torch.float32 if config.method == "full" else DTYPES[config.run.dtype]
            modules[role] = prepare_module(config, module.to(dtype))
    sample = largest_sample(config, known, finer=EXPERTS[1] in roles)
    return plan_training(modules, config.run, sample, ranks=ranks)


def architecture(model: str) -> Architecture:
    """A model's architecture: of a folder, or of a published one by its name."""
    if model in list_embedded() or Path(model).is_dir():
        folder = open_trainable(model)
        parts = folder.components
        dits = tuple(parts[role].config for role in EXPERTS if role in parts)
        return Architecture(dits, parts["vae"].config, folder.defaults)
    found = _PUBLISHED.search(model.lower())
    name = f"{found['kind']}-{found['size']}" if found else ""
    if name not in _PRESETS:
        raise InputError(
            f"model {model!r} is neither here nor a published one of the Wan family, so nothing "
            "can be planned; give a model's folder"
        )
    variant = name if name in VARIANTS else f"{name}-{'720p' if '720' in model else '480p'}"
    return Architecture(
        (DIT_PRESETS[_PRESETS[name]],) * (2 if "a14b" in name else 1),
        VAE_PRESETS["wan22" if name == "ti2v-5b" else "wan21"], VARIANTS[variant].defaults,
    )


def largest_sample(config: FinetuneConfig, known: Architecture, *, finer: bool) -> Sample:
    """The sample of most tokens that the data's buckets can hold, at the finer rate if need be."""
    data, strides = config.data, known.vae.strides
    dit, *_ = known.dits
    side = strides.hw * dit.patch_size
    sizes = [parse_size(size) for size in data.sizes] or list(known.defaults.sizes)
    area = data.area or max(width * height for width, height in sizes)
    num_frames = max(data.frames, default=known.defaults.num_frames)
    frames = 1 + (num_frames - 1) // strides.t
    if finer:
        frames = Pace(known.defaults.oversampling).finer(frames)
    sample = Sample(frames, -(-area // side**2))
    return replace(sample, text_tokens=min(sample.text_tokens, dit.text_len))
