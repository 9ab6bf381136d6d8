"""What a few-step student is: a low-rank delta of its teacher's network."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from train.toybox.distillation.config import DeltaConfig
from vidgen.core.errors import InputError
from vidgen.models.dit import SpacetimeDiT
from vidgen.models.dit_types import DiTConfig
from vidgen.models.lora import Adapter, LowRank
from vidgen.training.finetune.model import target_paths
from vidgen.weights.component import ExpertRole
from vidgen.weights.folder import ModelFolder, few_step_parts
from vidgen.weights.lora import read_few_step


class Delta(nn.Module):
    """The student's change of some layers, of low rank and nothing at first (Hu et al. 2021).

    Args:
        dit: whose layers they are.
        config: which layers, and the rank. First factors come from torch's global generator.

    Raises:
        InputError: a part of a name that no linear layer has; names the nearest.
    """

    def __init__(self, dit: SpacetimeDiT, config: DeltaConfig) -> None:
        super().__init__()
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        for path in target_paths(dit, config.targets):
            weight = dit.get_submodule(path).weight
            assert isinstance(weight, Tensor)
            bound = 1 / math.sqrt(weight.shape[1])
            first = torch.empty(config.rank, weight.shape[1]).uniform_(-bound, bound)
            self.down[_key(path)] = nn.Parameter(first.to(weight.device))
            self.up[_key(path)] = nn.Parameter(weight.new_zeros(weight.shape[0], config.rank))

    def begin_as(self, adapter: Adapter) -> None:
        """Take over the factors of another delta.

        Raises:
            InputError: it has other layers, or another rank.
        """
        factors = {_key(path): part for path, part in adapter.low_rank.items()}
        own = {key: len(down) for key, down in self.down.items()}
        other = {key: len(part.down) for key, part in factors.items()}
        if own != other:
            raise InputError(f"delta changes {_told(own)}, the student that it is to begin as "
                             f"{_told(other)}; give it the same rank and targets")
        with torch.no_grad():
            for key, part in factors.items():
                self.down[key].copy_(part.down.flatten(1))
                self.up[key].copy_(part.up * part.scale)

    def adapter(self) -> Adapter:
        """What `attached` takes; gradients reach the factors."""
        return adapter_of(dict(self.named_parameters()))


def _told(ranks: Mapping[str, int]) -> str:
    each = ", ".join(map(str, sorted(set(ranks.values()))))
    return f"{len(ranks)} layers by rank {each}"


def adapter_of(factors: Mapping[str, Tensor]) -> Adapter:
    """The adapter of a `Delta`'s parameters by name."""
    keys = [name.removeprefix("down.") for name in factors if name.startswith("down.")]
    return Adapter("student", {
        key.replace("/", "."): LowRank(factors[f"down.{key}"], factors[f"up.{key}"])
        for key in keys
    })


def _key(path: str) -> str:
    """A layer's path as a parameter's name, which can't hold dots."""
    return path.replace(".", "/")


def delta_of(folder: ModelFolder, config: DiTConfig, part: ExpertRole) -> Adapter:
    """The delta of a model's own student, to begin as.

    Raises:
        InputError: it has none for that transformer.
    """
    if part not in few_step_parts(folder.path):
        whose = "" if part == "transformer" else f" of its {part}"
        raise InputError(f"delta.begin_as is 'student', but {folder.name!r} has no student{whose}; "
                         "release one first, or leave it out")
    return read_few_step(folder.path, config, part)
