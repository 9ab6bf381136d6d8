"""A plan's noise levels, and the transformer and the frame rate of each.

A model has one transformer, or two experts (Wan 2.2) above and below a boundary noise level. With
temporal upsampling the frame rate changes at that level, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vidgen.core.errors import InputError
from vidgen.diffusion.samplers import scheduler_sigmas
from vidgen.diffusion.schedule import make_sigmas
from vidgen.models.lora import attached
from vidgen.pipeline.settings import own_value
from vidgen.pipeline.types import Loras, Plan
from vidgen.weights.folder import ModelFolder, hash_files
from vidgen.weights.lora import EXPERTS, Expert, parse_option, read_choices

if TYPE_CHECKING:
    from vidgen.models.dit import SpacetimeDiT
    from vidgen.models.dit_types import DiTConfig
    from vidgen.pipeline.loader import ModelLoader
    from vidgen.weights.component import ExpertRole, Role

TransformerAt = Callable[[float], "SpacetimeDiT"]
"""Maps a noise level to its transformer."""


def read_loras(options: Sequence[str], folder: ModelFolder) -> Loras:
    """Read the adapters that `--lora` names.

    Raises:
        InputError: a file doesn't exist, or the model has no such expert.
        ModelError: a file isn't a LoRA of this model.
    """
    choices = [parse_option(option) for option in options]
    configs: dict[Role, DiTConfig] = {
        role: folder.components[role].config
        for role in ("transformer", "transformer_2") if role in folder.components}
    names: tuple[Expert | None, ...] = EXPERTS if len(configs) == 2 else (None,)
    adapters = {role: read_choices(choices, config, name)
                for (role, config), name in zip(configs.items(), names, strict=True)}
    records = [{"path": str(choice.path.resolve()), "weight": choice.weight,
                "expert": choice.expert, "sha256": hashes_of(choice.path)} for choice in choices]
    return Loras(adapters, records)


def hashes_of(path: Path) -> list[str]:
    """Return the sorted SHA-256 of a LoRA's files; raise InputError if the path doesn't exist."""
    if not path.exists():
        raise InputError(f"LoRA {path} does not exist; give a file or folder")
    files = [path] if path.is_file() else [file for file in path.iterdir() if file.is_file()]
    return sorted(hash_files(files).values())


def boundary_of(folder: ModelFolder, plan: Plan, *, has_audio: bool) -> float | None:
    """Return the noise level below which the low-noise expert denoises; None if it never does.

    A distilled model has a boundary of its own. With sound (`has_audio`) a low-noise expert without
    sound layers isn't used.
    """
    if "transformer_2" not in folder.components:
        return None
    if has_audio and folder.components["transformer_2"].config.audio is None:
        return None
    return folder.defaults.boundary if plan.student is None else plan.student.boundary


@contextmanager
def experts(
    loader: ModelLoader, boundary: float | None, loras: Loras, start_sigma: float
) -> Iterator[TransformerAt]:
    """Yield the map from noise levels to transformers, with their adapters attached.

    Sampling starts at `start_sigma`; levels below `boundary` belong to the low-noise expert.
    Threads that share a model wait for each other.
    """
    now: tuple[ExpertRole, SpacetimeDiT] | None = None

    def role_at(sigma: float) -> ExpertRole:
        return "transformer_2" if boundary is not None and sigma < boundary else "transformer"

    def transformer_at(sigma: float) -> SpacetimeDiT:
        nonlocal now
        role = role_at(sigma)
        if now is None or now[0] != role:
            adapters.close()  # before this expert is freed for the other one
            now = role, loader.expert(role)
            adapters.enter_context(attached(now[1], loras.adapters.get(role, ())))
        return now[1]

    with loader.turn, loader.use(role_at(start_sigma)), ExitStack() as adapters:
        yield transformer_at


def sigmas_of(plan: Plan, scheduler: Any = None) -> Tensor:
    """Return the noise levels [num_steps + 1] of a plan, or of its diffusers scheduler."""
    if scheduler is not None:
        return scheduler_sigmas(scheduler, plan.num_steps, strength=plan.strength)
    if plan.student is not None:
        return torch.tensor(plan.student.sigmas)
    lowest = 1e-3
    if plan.sampler == "euler":
        lowest = plan.shift * lowest / (1 + (plan.shift - 1) * lowest)
    return make_sigmas(plan.num_steps, plan.shift, strength=plan.strength, sigma_min=lowest,
                       reach_min=plan.sampler == "euler")


def sigma_split(plan: Plan, sigmas: Tensor, folder: ModelFolder) -> int:
    """Return the number of steps at or above the boundary, those at the clip's frame rate."""
    levels, boundary = sigmas.tolist()[:-1], boundary_of(folder, plan, has_audio=False)
    return len(levels) if boundary is None else sum(level >= boundary for level in levels)


def settles(plan: Plan, sigmas: Tensor, folder: ModelFolder) -> bool:
    """Return whether any step has the clip's frame rate; none has below the boundary."""
    return plan.oversampling == 1 or sigma_split(plan, sigmas, folder) > 0


def upsampling_of(folder: ModelFolder) -> int:
    """Return a model's factor of temporal upsampling, 1 if it has none."""
    return int(own_value("oversampling", folder))
