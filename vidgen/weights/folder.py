"""Model folders: what they hold and how they are opened.

Layout: `model.json` beside `vae/`, `transformer/`, `text_encoder/` (each `config.json` and
`model.safetensors`) and `tokenizer/`. `config.json` of our own modules is their frozen dataclass;
the text encoder's is an ordinary transformers one.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

from vidgen.core.config import build
from vidgen.core.errors import ModelError
from vidgen.core.runtime import atomic_write, sha256_file

FORMAT_VERSION = 1


@dataclass(frozen=True)
class ModelDefaults:
    """What a generation uses where the request is silent.

    Args:
        sizes: (width, height) the model was trained on; others are warned about.
        max_frames: longest clip it was trained on.
    """

    num_steps: int
    shift: float
    guidance_scale: float
    fps: float
    num_frames: int
    height: int
    width: int
    sampler: str = "unipc"
    negative_prompt: str = ""
    sizes: tuple[tuple[int, int], ...] = ()
    max_frames: int = 1_000_000


@dataclass(frozen=True)
class ModelFolder:
    """A model on disk, opened but not loaded."""

    path: Path
    name: str
    family: str
    license: str
    tasks: tuple[str, ...]
    defaults: ModelDefaults
    world_version: int | None
    files: dict[str, str]

    @cached_property
    def content_hash(self) -> str:
        """One SHA-256 over the names and hashes of all the model's files, as they are now."""
        digest = hashlib.sha256()
        for name in sorted(self.files):
            digest.update(f"{name} {sha256_file(self.path / name)}\n".encode())
        return digest.hexdigest()

    @property
    def num_bytes(self) -> int:
        """Size of the model's files on disk."""
        return sum((self.path / name).stat().st_size for name in self.files)


def embedded_folder(name: str) -> Path:
    """Where a model shipped inside the package lies."""
    return Path(str(files("vidgen") / "assets" / name))


def list_embedded() -> list[str]:
    """Names of the models shipped inside the package."""
    root = Path(str(files("vidgen") / "assets"))
    return sorted(p.parent.name for p in root.glob("*/model.json"))


def open_model(model: str) -> ModelFolder:
    """Open a model by the name of an embedded one, or by its folder.

    Raises:
        ModelError: no such model, not a vidgen folder, or files missing.
    """
    known = list_embedded()
    path = embedded_folder(model) if model in known else Path(model)
    if not path.is_dir():
        raise ModelError(
            f"model {model!r} is neither an embedded model ({', '.join(known) or 'none'}) "
            "nor a folder; give one of these names or the path of a model folder"
        )
    try:
        info = json.loads((path / "model.json").read_text())
    except FileNotFoundError:
        raise ModelError(f"{path} has no model.json, so it is no vidgen model folder") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path / 'model.json'} is not readable JSON: {error}") from error
    if info.get("format_version") != FORMAT_VERSION:
        raise ModelError(
            f"{path} is of format version {info.get('format_version')!r}; "
            f"this vidgen reads version {FORMAT_VERSION}"
        )
    try:
        folder = ModelFolder(
            path=path, name=info["name"], family=info["family"], license=info["license"],
            tasks=tuple(info["tasks"]), world_version=info.get("world_version"),
            defaults=build(ModelDefaults, info["defaults"], str(path / "model.json")),
            files=info["files"],
        )
    except KeyError as error:
        raise ModelError(f"{path / 'model.json'} lacks the field {error}") from None
    missing = [name for name in folder.files if not (path / name).is_file()]
    if missing:
        raise ModelError(
            f"{path} is incomplete: {', '.join(missing)} missing; copy the whole folder again"
        )
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a component folder.

    Raises:
        ModelError: missing or not JSON.
    """
    try:
        return dict(json.loads((folder / "config.json").read_text()))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / 'config.json'} can't be read: {error}") from error


def write_model_info(
    path: Path, *, name: str, family: str, license_name: str, tasks: tuple[str, ...],
    defaults: ModelDefaults, world_version: int | None,
) -> None:
    """Write `model.json` over whatever component files lie in `path` now."""
    names = sorted(
        str(file.relative_to(path))
        for file in path.rglob("*")
        if file.is_file() and file.name != "model.json" and not file.name.startswith(".")
    )
    info = {
        "format": "vidgen", "format_version": FORMAT_VERSION, "name": name, "family": family,
        "license": license_name, "tasks": list(tasks), "world_version": world_version,
        "defaults": asdict(defaults),
        "files": {file: sha256_file(path / file) for file in names},
    }
    atomic_write(path / "model.json", (json.dumps(info, indent=1) + "\n").encode())


def config_of(config_type: type[Any], folder: Path) -> Any:
    """A component's frozen dataclass from its `config.json`; other keys are refused by name."""
    settings = read_config(folder)
    known = {field.name for field in fields(config_type)}
    own = {name: value for name, value in settings.items() if name != "class"}
    unknown = sorted(own.keys() - known)
    if unknown:
        raise ModelError(
            f"{folder / 'config.json'} has unknown settings {', '.join(unknown)}; "
            "was it written by a newer vidgen?"
        )
    return build(config_type, own, str(folder / "config.json"))
