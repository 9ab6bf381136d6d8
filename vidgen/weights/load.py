"""Model folders: what they hold, and modules built from them on the meta device.

Layout: `model.json` beside `vae/`, `transformer/`, `text_encoder/` (each `config.json` and
`model.safetensors`) and `tokenizer/`. `config.json` of our own modules is their frozen dataclass;
the text encoder's is an ordinary transformers one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from vidgen.core.config import build, dump
from vidgen.core.errors import ModelError
from vidgen.core.runtime import atomic_path, atomic_write, sha256_file

FORMAT_VERSION = 1
Module = TypeVar("Module", bound=nn.Module)


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


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, mapped.

    Raises:
        ModelError: missing, truncated or not safetensors.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise ModelError(
            f"{path} can't be read as safetensors ({error}); it may be truncated: copy it again"
        ) from error


def load_module(
    make: Callable[[], Module],
    folder: Path,
    dtype: torch.dtype,
    device: torch.device | str,
    keep_fp32: tuple[str, ...] = (),
) -> Module:
    """Build a module without memory, then give it the file's tensors.

    Args:
        make: builds the module; called on the meta device.
        folder: of the component, with `model.safetensors`.
        dtype: of floating-point weights.
        device: where they end up.
        keep_fp32: parts of names of weights that stay float32.

    Raises:
        ModelError: missing or surplus keys, wrong shapes, unreadable file; names them.
    """
    path = folder / "model.safetensors"
    with torch.device("meta"):
        module = make()
    tensors = read_tensors(path)
    expected = {name: value.shape for name, value in module.state_dict().items()}
    missing = sorted(expected.keys() - tensors.keys())
    surplus = sorted(tensors.keys() - expected.keys())
    shapes = [
        f"{name}: {list(tensors[name].shape)} for {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    problems = [
        f"{len(found)} {what} ({', '.join(found[:5])}{', ...' if len(found) > 5 else ''})"
        for what, found in (("missing", missing), ("surplus", surplus), ("of wrong shape", shapes))
        if found
    ]
    if problems:
        raise ModelError(
            f"{path} doesn't fit its config.json: tensors {'; '.join(problems)}; "
            "the two files must come from the same model"
        )
    for name, value in tensors.items():
        kept = torch.float32 if any(part in name for part in keep_fp32) else dtype
        tensors[name] = value.to(device, kept if value.is_floating_point() else value.dtype)
    module.load_state_dict(tensors, assign=True)
    return module.eval().requires_grad_(requires_grad=False)


def save_module(
    state: dict[str, torch.Tensor], config: Any, folder: Path, dtype: torch.dtype
) -> None:
    """Write a component folder: `config.json` (dataclass or mapping) and `model.safetensors`."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = config if isinstance(config, dict) else dump(config)
    tensors = {
        name: value.detach().to("cpu", dtype if value.is_floating_point() else value.dtype)
        .contiguous()
        for name, value in state.items()
    }
    atomic_write(folder / "config.json", (json.dumps(settings, indent=1) + "\n").encode())
    with atomic_path(folder / "model.safetensors") as temporary:
        save_file(tensors, temporary)
        temporary.chmod(0o644)


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
