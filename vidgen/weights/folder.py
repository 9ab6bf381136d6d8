"""Models on disk, opened but not loaded: types of folders, their files and hashes.

vidgen's layout has `model.json`, `tokenizer/` and a folder for each component: `vae/`,
`transformer/`, `text_encoder/` and optionally `transformer_2/`, `image_encoder/`, `sound_vae/`,
`verifier/` and `onset_detector/`. Each contains `config.json` (the component's config dataclass, or
transformers' config for the encoders) and `model.safetensors`, or shards with an index. `layouts`
opens folders in this layout, in diffusers' and in Wan's.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidgen.core.errors import ModelError
from vidgen.core.runtime import atomic_write, sha256_file
from vidgen.core.store import read_cache, write_cache
from vidgen.diffusion.samplers import SAMPLERS
from vidgen.weights.family import Conditioning, ModelDefaults

if TYPE_CHECKING:
    from vidgen.weights.component import Components, ExpertRole
    from vidgen.weights.keymap import Spelling

FORMAT_VERSION = 1
HASHES = "hashes"
MIN_BYTES = 1_000_000
"""Smaller files are hashed each time instead of cached."""
FEW_STEP = "few_step"
"""Folder of a model's few-step adapter."""
FEW_STEP_WEIGHTS: dict[ExpertRole, str] = {
    "transformer": "model.safetensors", "transformer_2": "model_2.safetensors",
}
"""Files of a few-step adapter's weights, by transformer; the second is optional."""
_SETTLED_S = 2.0  # a file changed more recently may change again within its time stamp's precision


@dataclass(frozen=True)
class FewStepConfig:
    """Sampling settings of a few-step adapter with distilled guidance (Meng et al. 2023).

    Args:
        sampler: sampler of its training, one of `SAMPLERS`.
        sigmas: noise levels of its training, from 1 down to 0.
        guidance_scale: the teacher's, distilled into the adapter.
        boundary: sigma below which the model's low-noise expert denoises, with its delta if one
            exists; None: that expert isn't used.

    Raises:
        ValueError: an unknown sampler, or sigmas that don't fall from 1 to 0.
    """

    sampler: str
    sigmas: tuple[float, ...]
    guidance_scale: float
    boundary: float | None = None

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler is {self.sampler!r}; give one of {', '.join(SAMPLERS)}")
        falls = all(low < high for high, low in zip(self.sigmas, self.sigmas[1:], strict=False))
        if len(self.sigmas) < 2 or not falls or self.sigmas[0] != 1 or self.sigmas[-1] != 0:
            raise ValueError(f"sigmas are {list(self.sigmas)}; they must fall from 1 to 0")

    @property
    def num_steps(self) -> int:
        """Denoising steps of a clip."""
        return len(self.sigmas) - 1


@dataclass(frozen=True)
class Files:
    """A model folder and its files.

    Attributes:
        files: recorded SHA-256 of each file, by its path in the folder; "" where none is recorded.
    """

    path: Path
    files: Mapping[str, str] = field(repr=False)

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 over the names and hashes of all files except model cards (`.md`).

        Raises:
            ModelError: a file's hash differs from the recorded one.
        """
        names = sorted(name for name in self.files if not name.endswith(".md"))
        hashes = hash_files(self.path / name for name in names)
        digest = hashlib.sha256()
        for name in names:
            now = hashes[self.path / name]
            if self.files[name] not in ("", now):
                raise ModelError(
                    f"{self.path / name} is damaged or was changed: its SHA-256 is {now[:12]}..., "
                    f"model.json records {self.files[name][:12]}...; copy it again"
                )
            digest.update(f"{name} {now}\n".encode())
        return digest.hexdigest()

    @property
    def num_bytes(self) -> int:
        """Total size of the files, in bytes."""
        return sum((self.path / name).stat().st_size for name in self.files)


@dataclass(frozen=True)
class ModelFolder(Files):
    """A model of the toybox or Wan family, opened but not loaded.

    Attributes:
        family: "toybox", "wan2.1" or "wan2.2".
        tasks: see `TASKS`; without "text", a prompt alone is not enough.
        tokenizer: the folder with `tokenizer.json`.
        image_processor: the folder of the image encoder's processor, or None.
        variant: a key of `family.VARIANTS`, or None.
        given: the model's name as the user gave it, if it isn't the folder's.
        few_step: settings of the model's few-step adapter, or None.
    """

    name: str
    family: str
    license: str
    tasks: tuple[str, ...]
    defaults: ModelDefaults
    layout: Spelling
    components: Components = field(repr=False)
    tokenizer: Path
    image_processor: Path | None = None
    variant: str | None = None
    given: str | None = None
    few_step: FewStepConfig | None = None

    @property
    def conditioning(self) -> Conditioning:
        """The way in which known frames enter the transformer.

        "tokens": in place of noisy ones, their tokens at time 0. "channels": in channels after the
        noisy latents, with a mask. "control": through VACE's control blocks. "none": not at all.
        """
        dit = self.components["transformer"].config
        if dit.control_layers:
            return "control"
        if dit.in_channels > dit.out_channels:
            return "channels"
        return "tokens" if self.family == "toybox" or "image" in self.tasks else "none"


@dataclass(frozen=True)
class DiffusersFolder(Files):
    """A folder of a diffusers pipeline of another model family."""

    class_name: str
    given: str | None = None

    @property
    def name(self) -> str:
        """The hub id, or the folder's name."""
        return self.given or self.path.name


def hash_files(paths: Iterable[Path]) -> dict[Path, str]:
    """Return the SHA-256 of each file, cached by path, size and modification time.

    A cache that can't be read or written is ignored.
    """
    known, hashes, computed = read_cache(HASHES), {}, {}
    for path in paths:
        facts = path.stat()
        key = str(path.resolve())
        stamp = [facts.st_size, facts.st_mtime_ns]
        match known.get(key):
            case [*before, str(digest)] if before == stamp:
                hashes[path] = digest
                continue
        hashes[path] = sha256_file(path)
        if facts.st_size >= MIN_BYTES and time.time() - facts.st_mtime > _SETTLED_S:
            computed[key] = [*stamp, hashes[path]]
    if computed:
        # read again: another process may have written the cache in the meantime
        kept = {key: each for key, each in read_cache(HASHES).items() if Path(key).is_file()}
        write_cache(HASHES, kept | computed)
    return hashes


def few_step_parts(model: Path) -> tuple[ExpertRole, ...]:
    """Return the transformers for which a model's few-step adapter has weights."""
    return tuple(part for part, file in FEW_STEP_WEIGHTS.items()
                 if (model / FEW_STEP / file).is_file())


def embedded_folder(name: str) -> Path:
    """Return the folder of a model that is part of the package."""
    return Path(str(files("vidgen") / "assets" / name))


def list_embedded() -> list[str]:
    """List the models that are part of the package."""
    root = Path(str(files("vidgen") / "assets"))
    return sorted(p.parent.name for p in root.glob("*/model.json"))


def write_model_info(
    path: Path, *, name: str, family: str, license_name: str, tasks: tuple[str, ...],
    defaults: ModelDefaults, variant: str | None = None,
) -> None:
    """Write `model.json` for the files in `path`, with their hashes."""
    names = sorted(
        str(file.relative_to(path))
        for file in path.rglob("*")
        if file.is_file() and file.name != "model.json" and not file.name.startswith(".")
    )
    info = {
        "format": "vidgen", "format_version": FORMAT_VERSION, "name": name, "family": family,
        "variant": variant, "license": license_name, "tasks": list(tasks),
        "defaults": asdict(defaults),
    }
    write_info(path, info, names)


def write_info(path: Path, info: Mapping[str, Any], names: Iterable[str]) -> None:
    """Write `info` to `model.json`, after updating its hashes of the files `names`."""
    files = {**info.get("files", {}), **{name: sha256_file(path / name) for name in names}}
    whole = {**info, "files": dict(sorted(files.items()))}
    atomic_write(path / "model.json", (json.dumps(whole, indent=1) + "\n").encode())
