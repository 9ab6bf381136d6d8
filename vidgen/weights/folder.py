"""Models on disk: what a folder holds, whatever layout it is in, opened but not loaded.

Our own layout: `model.json` beside `vae/`, `transformer/`, `text_encoder/` and, where a model has
them, `transformer_2/`, `image_encoder/`, `sound_vae/`, `verifier/` and `onset_detector/` (each
`config.json` and `model.safetensors`, or shards with an index) and `tokenizer/`. `config.json` of
our own modules is their frozen dataclass; the encoders' are ordinary transformers ones. Diffusers'
folders and Wan's own are opened in `layouts`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidgen.core.config import build
from vidgen.core.errors import ModelError
from vidgen.core.runtime import atomic_write, sha256_file
from vidgen.weights.family import Conditioning, ModelDefaults
from vidgen.weights.hashes import hash_files

if TYPE_CHECKING:
    from vidgen.weights.component import Components
    from vidgen.weights.keymap import Spelling
    from vidgen.weights.student import StudentConfig

__all__ = [
    "FORMAT_VERSION", "ForeignFolder", "ModelDefaults", "ModelFolder", "config_of",
    "embedded_folder", "list_embedded", "open_model", "read_config", "read_json", "record_files",
    "write_model_info",
]

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Files:
    """A folder's files, by their names in it.

    Attributes:
        files: name -> SHA-256 that it should have, or "" where nobody said.
    """

    path: Path
    files: Mapping[str, str] = field(repr=False)

    @cached_property
    def content_hash(self) -> str:
        """One SHA-256 over the names and hashes of all the model's files, as they are now.

        A card (`.md`) tells of the model and isn't part of it.

        Raises:
            ModelError: a file is not the one that was recorded.
        """
        names = sorted(name for name in self.files if not name.endswith(".md"))
        hashes = hash_files(self.path / name for name in names)
        digest = hashlib.sha256()
        for name in names:
            now = hashes[self.path / name]
            if self.files[name] not in ("", now):
                raise ModelError(
                    f"{self.path / name} is damaged or was changed: its SHA-256 is {now[:12]}..., "
                    f"recorded is {self.files[name][:12]}...; copy it again"
                )
            digest.update(f"{name} {now}\n".encode())
        return digest.hexdigest()

    @property
    def num_bytes(self) -> int:
        """Size of the model's files on disk."""
        return sum((self.path / name).stat().st_size for name in self.files)


@dataclass(frozen=True)
class ModelFolder(Files):
    """A model of the toybox or Wan family, opened but not loaded.

    Attributes:
        family: "toybox", "wan2.1" or "wan2.2".
        tasks: what a clip can be made from; without "text" it needs one of the others.
        layout: whose way of laying out files it is.
        tokenizer: the folder with `tokenizer.json`.
        image_processor: the folder of the image encoder's processor, where there is one.
        variant: which of the family it is, as `family.VARIANTS` names them.
        given: what else the model may be called by: what `open_model` was given.
        student: how the delta beside the weights makes clips in few steps, where there is one.
        roller: the same of one that makes them turn by turn.
    """

    name: str
    family: str
    license: str
    tasks: tuple[str, ...]
    defaults: ModelDefaults
    world_version: int | None
    layout: Spelling
    components: Components = field(repr=False)
    tokenizer: Path
    image_processor: Path | None = None
    variant: str | None = None
    given: str | None = None
    student: StudentConfig | None = None
    roller: StudentConfig | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Sent to another process, a folder is opened there anew: its files stay where they are."""
        is_embedded = self.path == embedded_folder(self.name)
        return _reopened, (self.name if is_embedded else str(self.path.resolve()), self.given)

    @property
    def conditioning(self) -> Conditioning:
        """How known frames get into the transformer.

        "tokens": in place, their tokens at time 0. "channels": beside the noisy latents, with a
        mask. "control": through VACE's control blocks. "none": not at all.
        """
        dit = self.components["transformer"].config
        if dit.control_layers:
            return "control"
        if dit.in_channels > dit.out_channels:
            return "channels"
        return "tokens" if self.family == "toybox" or "image" in self.tasks else "none"

    def is_called(self, model: str) -> bool:
        """Whether `open_model(model)` means this model."""
        return model in (self.name, self.given) or Path(model).resolve() == self.path.resolve()


@dataclass(frozen=True)
class ForeignFolder(Files):
    """A diffusers folder of another family's pipeline.

    Attributes:
        class_name: of the pipeline.
    """

    class_name: str
    given: str | None = None

    @property
    def name(self) -> str:
        """What it is called by: the hub's id, or the folder's name."""
        return self.given or self.path.name

    def is_called(self, model: str) -> bool:
        """Whether `open_model(model)` means this model."""
        return model == self.name or Path(model).resolve() == self.path.resolve()


def embedded_folder(name: str) -> Path:
    """Where a model shipped inside the package lies."""
    return Path(str(files("vidgen") / "assets" / name))


def list_embedded() -> list[str]:
    """Names of the models shipped inside the package."""
    root = Path(str(files("vidgen") / "assets"))
    return sorted(p.parent.name for p in root.glob("*/model.json"))


def open_model(model: str) -> ModelFolder | ForeignFolder:
    """Open a model.

    Args:
        model: an embedded model's name; a folder in vidgen's, diffusers' or Wan's own layout; or
            an id on the Hugging Face hub, which is downloaded where it isn't yet.

    Returns:
        The model, or a `ForeignFolder` where diffusers' own pipeline has to run it.

    Raises:
        ModelError: no such model, or files missing, damaged or unknown; says what to do.
    """
    from vidgen.weights.hub import is_hub_id
    from vidgen.weights.layouts import open_folder

    known = list_embedded()
    if model in known:
        return open_folder(embedded_folder(model))
    if not Path(model).is_dir() and is_hub_id(model):
        return _open_from_hub(model)
    if not Path(model).is_dir():
        raise ModelError(
            f"model {model!r} is neither an embedded model ({', '.join(known) or 'none'}) "
            "nor a folder; give one of these names, the path of a model folder, or an id on the "
            "Hugging Face hub such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
        )
    return open_folder(Path(model))


def _reopened(model: str, given: str | None) -> ModelFolder | ForeignFolder:
    return replace(open_model(model), given=given)


def _open_from_hub(hub_id: str) -> ModelFolder | ForeignFolder:
    """Open what was downloaded before; where it isn't whole, have the rest downloaded."""
    from vidgen.weights.hub import cached_model, fetch_model
    from vidgen.weights.layouts import open_folder

    cached = cached_model(hub_id)
    if cached is None:
        return open_folder(fetch_model(hub_id), hub_id)
    try:
        return open_folder(cached, hub_id)
    except ModelError as error:
        try:
            fetched = fetch_model(hub_id)
        except ModelError:
            raise error from None
        return open_folder(fetched, hub_id)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file whose top is an object.

    Raises:
        ModelError: missing or not that.
    """
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ModelError(f"{path} can't be read: {error}; copy it again") from error


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a component folder.

    Raises:
        ModelError: missing or not JSON.
    """
    return read_json(folder / "config.json")


def write_model_info(
    path: Path, *, name: str, family: str, license_name: str, tasks: tuple[str, ...],
    defaults: ModelDefaults, world_version: int | None, variant: str | None = None,
) -> None:
    """Write `model.json` over whatever component files lie in `path` now."""
    names = sorted(
        str(file.relative_to(path))
        for file in path.rglob("*")
        if file.is_file() and file.name != "model.json" and not file.name.startswith(".")
    )
    info = {
        "format": "vidgen", "format_version": FORMAT_VERSION, "name": name, "family": family,
        "variant": variant, "license": license_name, "tasks": list(tasks),
        "world_version": world_version, "defaults": asdict(defaults),
    }
    _write_info(path, info, names)


def record_files(path: Path, names: Iterable[str]) -> None:
    """Have `model.json` in `path` tell what these files hold now, as after they were written.

    What it tells of the others stays, so that damage to one of them still shows.

    Raises:
        ModelError: there is no `model.json`, or it can't be read.
    """
    _write_info(path, read_json(path / "model.json"), names)


def _write_info(path: Path, info: Mapping[str, Any], names: Iterable[str]) -> None:
    """Write `model.json` with hashes of these files beside those that `info` has."""
    files = {**info.get("files", {}), **{name: sha256_file(path / name) for name in names}}
    told = {**info, "files": dict(sorted(files.items()))}
    atomic_write(path / "model.json", (json.dumps(told, indent=1) + "\n").encode())


def config_of(config_type: type[Any], folder: Path) -> Any:
    """A component's frozen dataclass from its `config.json`; other keys are refused by name."""
    return config_from(config_type, read_config(folder), str(folder / "config.json"))


def config_from(config_type: type[Any], settings: Mapping[str, Any], where: str) -> Any:
    """A frozen dataclass from its settings; other keys are refused by name."""
    known = {each.name for each in fields(config_type)}
    own = {name: value for name, value in settings.items() if name != "class"}
    unknown = sorted(own.keys() - known)
    if unknown:
        raise ModelError(
            f"{where} has unknown settings {', '.join(unknown)}; was it written by a newer vidgen?"
        )
    try:
        return build(config_type, own, where)
    except ValueError as error:  # values that don't go together
        raise ModelError(f"{where} describes no network: {error}; copy it again") from error
