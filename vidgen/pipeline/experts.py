"""The transformer of a noise level: a model's only one, or one of two experts (Wan 2.2)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from vidgen.core.errors import InputError
from vidgen.models.lora import attached
from vidgen.pipeline.types import Loras, Plan
from vidgen.weights.folder import ModelFolder, hash_files
from vidgen.weights.lora import EXPERTS, Expert, parse_option, read_choices

if TYPE_CHECKING:
    from vidgen.models.dit import SpacetimeDiT
    from vidgen.models.dit_types import DiTConfig
    from vidgen.pipeline.loader import ModelLoader
    from vidgen.weights.component import ExpertRole, Role


def read_loras(options: Sequence[str], folder: ModelFolder) -> Loras:
    """Read the adapters that `--lora` names.

    Raises:
        InputError: no such file, or an expert that the model doesn't have.
        ModelError: a file that is no LoRA for this model.
    """
    choices = [parse_option(option) for option in options]
    configs: dict[Role, DiTConfig] = {
        role: folder.components[role].config
        for role in ("transformer", "transformer_2") if role in folder.components
    }
    names: tuple[Expert | None, ...] = EXPERTS if len(configs) == 2 else (None,)
    adapters = {
        role: read_choices(choices, config, name)
        for (role, config), name in zip(configs.items(), names, strict=True)
    }
    records = [
        {"path": str(choice.path.resolve()), "weight": choice.weight, "expert": choice.expert,
         "sha256": hashes_of(choice.path)}
        for choice in choices
    ]
    return Loras(adapters, records)


def hashes_of(path: Path) -> list[str]:
    """Return the sorted SHA-256 of a LoRA's files; raise InputError if the path doesn't exist."""
    if not path.exists():
        raise InputError(f"LoRA {path} does not exist; give a file or folder")
    files = [path] if path.is_file() else [file for file in path.iterdir() if file.is_file()]
    return sorted(hash_files(files).values())


class Experts:
    """Gives the transformer of a noise level, with its adapters attached, inside `experts`."""

    def __init__(
        self, loader: ModelLoader, boundary: float | None, loras: Loras, attached: ExitStack
    ) -> None:
        self._loader, self._boundary, self._loras = loader, boundary, loras
        self._attached = attached
        self._role: ExpertRole | None = None

    def at(self, sigma: float) -> SpacetimeDiT:
        """Return the transformer at `sigma`: the low-noise expert below the boundary."""
        role = self.role_at(sigma)
        if role != self._role:
            self._attached.close()  # before the other one may take this one's memory
            self._module = self._loader.expert(role)
            own = self._loras.adapters.get(role, ())
            self._attached.enter_context(attached(self._module, own))
            self._role = role
        return self._module

    def role_at(self, sigma: float) -> ExpertRole:
        """Return the role of the transformer at `sigma`."""
        low = self._boundary is not None and sigma < self._boundary
        return "transformer_2" if low else "transformer"


def boundary_of(folder: ModelFolder, plan: Plan, *, has_audio: bool) -> float | None:
    """Return the level below which the low-noise expert denoises; None if the first always does.

    A distilled model is a delta of the first expert and has a boundary of its own. For sound
    (`has_audio`) a low-noise expert without sound layers is left out.
    """
    if "transformer_2" not in folder.components:
        return None
    if has_audio and folder.components["transformer_2"].config.audio is None:
        return None
    return folder.defaults.boundary if plan.student is None else plan.student.boundary


@contextmanager
def experts(
    loader: ModelLoader, boundary: float | None, loras: Loras, start_sigma: float
) -> Iterator[Experts]:
    """Yield the transformers from `start_sigma` on; detach their adapters at the end."""
    adapters = ExitStack()
    given = Experts(loader, boundary, loras, adapters)
    with loader.use(given.role_at(start_sigma)), adapters:
        yield given
