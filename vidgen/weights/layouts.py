"""Open a model by its name, hub id or folder, in vidgen's, diffusers' or Wan's own layout.

Folders that vidgen converted to another layout have a `vidgen.json` with the contents of
`model.json` and vidgen's configs, which take precedence over the layout's own.
"""

from __future__ import annotations

import copyreg
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

from vidgen.core.config import build
from vidgen.core.errors import ModelError
from vidgen.models.onset_detector import OnsetDetectorConfig
from vidgen.models.verifier import VerifierConfig
from vidgen.weights.component import (
    CONFIG_TYPES,
    OWN_ROLES,
    Components,
    Config,
    Role,
    assemble,
)
from vidgen.weights.configs import (
    config_from,
    config_of,
    dit_from_diffusers,
    dit_from_wan,
    image_from_transformers,
    infer_dit,
    infer_image,
    infer_text,
    infer_vae,
    read_config,
    read_json,
    text_from_transformers,
    vae_from_diffusers,
)
from vidgen.weights.family import LICENSE, ModelDefaults, Variant, recognise
from vidgen.weights.folder import (
    FEW_STEP,
    FORMAT_VERSION,
    DiffusersFolder,
    FewStepConfig,
    ModelFolder,
    embedded_folder,
    list_embedded,
)
from vidgen.weights.keymap import (
    DIT_KEYS,
    IMAGE_KEYS,
    TEXT_KEYS,
    Names,
    Spelling,
    renamed,
    split_clip,
)
from vidgen.weights.store import find_files, open_tensors
from vidgen.weights.tensors import Tensors

ROLES: tuple[Role, ...] = get_args(Role)
WAN_PIPELINES = (
    "WanPipeline", "WanImageToVideoPipeline", "WanVACEPipeline", "WanVideoToVideoPipeline",
)
EXPERTS: dict[Role, str] = {"transformer": "high_noise_model", "transformer_2": "low_noise_model"}
VAE_FILES = {16: "Wan2.1_VAE", 48: "Wan2.2_VAE"}
TEXT_FILE = "models_t5_umt5-xxl-enc-bf16"
CLIP_FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14"
CLIP_TOKENIZER = "xlm-roberta-large"
WAN_TOKENIZER = Path("google/umt5-xxl")
NOTE = "vidgen.json"
_INFER: dict[Role, tuple[tuple[Names, ...], Callable[..., Config]]] = {
    "transformer": (DIT_KEYS, infer_dit), "transformer_2": (DIT_KEYS, infer_dit),
    "text_encoder": (TEXT_KEYS, infer_text), "image_encoder": (IMAGE_KEYS, infer_image),
}
_SAMPLERS = {"UniPCMultistepScheduler": "unipc", "FlowMatchEulerDiscreteScheduler": "euler"}


def open_model(model: str) -> ModelFolder | DiffusersFolder:
    """Open a model.

    Args:
        model: an embedded model's name; a folder in vidgen's, diffusers' or Wan's own layout; or
            an id on the Hugging Face hub, which is downloaded if necessary.

    Returns:
        The model; for pipelines of other families a `DiffusersFolder`.

    Raises:
        ModelError: no such model, or files that are missing, damaged or unknown.
    """
    known = list_embedded()
    if model in known:
        return open_folder(embedded_folder(model))
    from vidgen.weights.published import is_hub_id

    if not Path(model).is_dir() and is_hub_id(model):
        return _open_from_hub(model)
    if not Path(model).is_dir():
        raise ModelError(
            f"model {model!r} is neither an embedded model ({', '.join(known) or 'none'}) "
            "nor a folder; give an embedded model's name, the path of a model folder, or an id on "
            "the Hugging Face hub such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
        )
    return open_folder(Path(model))


def _reopened(model: str, given: str | None) -> ModelFolder | DiffusersFolder:
    return replace(open_model(model), given=given)


def _reduced(folder: ModelFolder) -> tuple[Any, ...]:
    is_embedded = folder.path == embedded_folder(folder.name)
    place = folder.name if is_embedded else str(folder.path.resolve())
    return _reopened, (place, folder.given)


copyreg.pickle(ModelFolder, _reduced)  # mapped files can't be pickled: another process opens them


def _open_from_hub(hub_id: str) -> ModelFolder | DiffusersFolder:
    """Open an earlier download; download missing files if it can't be opened."""
    from vidgen.weights.published import cached_model, fetch_model

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


def layout_of(path: Path) -> Spelling | None:
    """Return a folder's layout; None if it isn't a model folder."""
    if (path / "model.json").is_file():
        return "vidgen"
    if (path / "model_index.json").is_file():
        return "diffusers"
    if any((path / name).is_dir() for name in EXPERTS.values()) or any(path.glob("Wan2.*_VAE.*")):
        return "wan"
    config = path / "config.json"
    is_wan = config.is_file() and re.search(r'"(Vace)?WanModel', config.read_text("utf-8"))
    return "wan" if is_wan else None


def open_folder(path: Path, given: str | None = None) -> ModelFolder | DiffusersFolder:
    """Open a model folder in any layout; `given` is its name as the user gave it, such as a hub id.

    Raises:
        ModelError: not a model, or an incomplete, damaged or unsupported one.
    """
    try:
        layout = layout_of(path)
        if layout is None:
            raise ModelError(
                f"{path} is not a model folder: it has no model.json (vidgen's layout), no "
                "model_index.json (diffusers') and no files of a Wan release (Wan2.1_VAE.pth, ...)"
            )
        index = read_json(path / "model_index.json") if layout == "diffusers" else {}
        class_name = str(index.get("_class_name"))
        if index and class_name not in WAN_PIPELINES:
            every = (
                file for file in path.rglob("*") if file.is_file()
                and not any(part.startswith(".") for part in file.relative_to(path).parts)
            )
            return DiffusersFolder(path, _unhashed(path, every), class_name, given)
        return _open(path, layout, index, given)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, OSError,
            RecursionError) as error:
        raise ModelError(  # valid JSON with other contents than expected
            f"{path} is damaged ({type(error).__name__}: {str(error)[:200]}); copy the whole "
            "folder again"
        ) from error


def _open(
    path: Path, layout: Spelling, index: Mapping[str, Any], given: str | None
) -> ModelFolder:
    """Open a Wan or toybox model; `index` is diffusers' `model_index.json`, else empty."""
    where = path / ("model.json" if layout == "vidgen" else NOTE)
    info = read_json(where) if where.is_file() else {}
    if layout == "vidgen":
        _check_info(path, info)
    parts = [name for name, value in index.items() if isinstance(value, list) and any(value)]
    missing = [name for name in parts if not (path / name).is_dir()]
    if missing:
        raise ModelError(
            f"{path} is incomplete: its model_index.json lists {', '.join(missing)}, which "
            f"{'is' if len(missing) == 1 else 'are'} missing; copy the whole folder again"
        )
    components = Components()
    for role, folder, stored in _files(path, layout, parts, components):
        noted = info.get("configs", {}).get(role)
        spelling = "vidgen" if role in OWN_ROLES else layout
        if noted is not None:
            config = config_from(CONFIG_TYPES[role], noted, NOTE)
        else:
            config = _config(role, spelling, folder, stored)
        components[role] = assemble(role, config, stored, spelling)
    if layout != "vidgen":
        _require(path, components)
    _check_readers(path, components)
    if info:
        facts = _facts(info, where)
    else:
        facts = _recognised(path, given, components, index)
    tokenizer = path / (WAN_TOKENIZER if layout == "wan" else "tokenizer")
    if layout != "vidgen" and not (tokenizer / "tokenizer.json").is_file():
        raise ModelError(
            f"{tokenizer / 'tokenizer.json'} is missing; copy it from the model's release or from "
            "google/umt5-xxl"
        )
    few_step = path / FEW_STEP
    return ModelFolder(
        path=path, layout=layout, components=components, tokenizer=tokenizer,
        image_processor=_processor(path), given=given, **facts,
        few_step=open_few_step(path),
        files=info["files"] if layout == "vidgen" else _unhashed(path, [
            path / "model_index.json", *few_step.glob("*"), *tokenizer.iterdir(),
            *(file for part in parts for file in (path / part).iterdir()
              if file.suffix != ".safetensors"),
            *(file for folder in _expert_folders(path).values() if layout == "wan"
              for file in (folder / "config.json", *folder.glob("*.index.json"))),
        ], components),
    )


def open_few_step(model: Path) -> FewStepConfig | None:
    """Return the config of a model's few-step adapter, or None; ModelError: it is damaged."""
    folder = model / FEW_STEP
    return config_of(FewStepConfig, folder) if (folder / "config.json").is_file() else None


def _check_info(path: Path, info: Mapping[str, Any]) -> None:
    """Raise ModelError for a `model.json` of another format version, or for missing files."""
    if info.get("format_version") != FORMAT_VERSION:
        raise ModelError(
            f"{path} is of format version {info.get('format_version')!r}; "
            f"this vidgen reads version {FORMAT_VERSION}"
        )
    hashes = info.get("files")
    if not (isinstance(hashes, dict) and all(isinstance(each, str) for each in hashes.values())):
        raise ModelError(f"{path / 'model.json'} has no hashes of its files; copy it again")
    missing = [name for name in hashes if not (path / name).is_file()]
    if missing:
        raise ModelError(
            f"{path} is incomplete: {', '.join(missing)} missing; copy the whole folder again"
        )


def _files(
    path: Path, layout: Spelling, parts: Collection[str], components: Components
) -> Iterator[tuple[Role, Path, Tensors]]:
    """Yield each component's role, the folder of its config, and its tensors as stored.

    The caller adds each to `components` before it asks for the next: in Wan's layout the files of
    the VAE and encoders depend on the transformer's config.
    """
    if layout == "wan":
        folders = _expert_folders(path)
        missing = [folder.name for folder in folders.values() if not folder.is_dir()]
        if missing:
            raise ModelError(f"{path} is incomplete: {missing[0]} is missing; copy it again")
        for role, folder in folders.items():
            yield role, folder, _shards(folder)
        dit = components["transformer"].config
        vae = VAE_FILES.get(dit.out_channels, "Wan2.*_VAE")
        yield "vae", path, _published(path, vae, "the VAE")
        yield "text_encoder", path, _published(
            path, "models_t5_umt5-*", "the text encoder", TEXT_FILE)
        if dit.image_dim is not None:
            clip = _published(path, "models_clip_*", "the image encoder", CLIP_FILE)
            yield "image_encoder", path, split_clip(clip)
    for role in ROLES:
        is_ours = layout == "vidgen" or role in OWN_ROLES
        if role in parts or (is_ours and (path / role / "config.json").is_file()):
            yield role, path / role, _shards(path / role)


def _expert_folders(path: Path) -> dict[Role, Path]:
    """Return the folder of each transformer of a Wan release."""
    if any((path / name).is_dir() for name in EXPERTS.values()):
        return {role: path / name for role, name in EXPERTS.items()}
    return {"transformer": path}


def _config(role: Role, spelling: Spelling, folder: Path, stored: Tensors) -> Config:
    """Return a component's architecture, from its config or its tensors' shapes."""
    if role == "text_encoder" and spelling != "wan":
        return text_from_transformers(read_config(folder))
    if role == "image_encoder" and spelling != "wan":
        return image_from_transformers(read_config(folder))
    if spelling == "vidgen":
        config: Config = config_of(CONFIG_TYPES[role], folder)
        return config
    if role == "vae" and spelling == "diffusers":
        return vae_from_diffusers(read_config(folder))
    shapes = {name: tuple(lazy.likeness.shape) for name, lazy in stored.items()}
    if role == "vae":
        return infer_vae(shapes)
    table, infer = _INFER[role]
    names, known = renamed(stored, table, spelling, "vidgen"), {}
    if role in EXPERTS and (folder / "config.json").is_file():
        read = dit_from_wan if spelling == "wan" else dit_from_diffusers
        known = read(read_config(folder))
    return infer({ours: shapes[name] for name, ours in names.items()}, **known)


def _shards(folder: Path) -> Tensors:
    """Open the tensors of a component's folder; raise ModelError if its index lists others."""
    paths = find_files(folder)
    stored = open_tensors(paths)
    if len(paths) == 1:
        return stored
    for index in folder.glob("*.safetensors.index.json"):
        weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
        if {folder / name for name in weight_map.values()} == set(paths):
            wrong = sorted(weight_map.keys() ^ stored.keys())
            if wrong:
                files = sorted({weight_map.get(name, "an unnamed shard") for name in wrong})
                raise ModelError(
                    f"{folder}: {index.name} and the shards disagree on {len(wrong)} tensors "
                    f"({', '.join(wrong[:3])}; in {', '.join(files[:3])}); copy these files again"
                )
    return stored


def _published(path: Path, pattern: str, what: str, usual_name: str | None = None) -> Tensors:
    """Open a component that Wan publishes as one file, a pickle or safetensors."""
    found = [p for suffix in (".pth", ".safetensors") for p in sorted(path.glob(pattern + suffix))]
    if not found:
        raise ModelError(
            f"{path} is incomplete: {usual_name or pattern}.pth, {what}, is missing; copy it from "
            "the release"
        )
    return open_tensors(found[:1])


def _processor(path: Path) -> Path | None:
    folder = path / "image_processor"
    return folder if (folder / "preprocessor_config.json").is_file() else None


def _require(path: Path, components: Components) -> None:
    missing = [r for r in ("vae", "transformer", "text_encoder") if r not in components]
    if missing:
        raise ModelError(f"{path} has no {' and no '.join(missing)}; copy the whole folder again")
    dit = components["transformer"].config
    if dit.image_dim is not None and "image_encoder" not in components:
        raise ModelError(f"{path} has no image_encoder, which its transformer needs; copy it again")


def _check_readers(path: Path, components: Components) -> None:
    """Raise ModelError if a verifier or onset detector reads other latents than the VAE's."""
    if "vae" not in components:
        return
    expected = components["vae"].config.latent_channels
    for role, part in components.items():
        if not isinstance(part.config, VerifierConfig | OnsetDetectorConfig):
            continue
        if (channels := part.config.latent_channels) != expected:
            raise ModelError(f"{path}: the {role} reads latents of {channels} channels, but the "
                             f"VAE's have {expected}; the two must come from the same model")


def _facts(info: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """Return fields of a `ModelFolder` from `model.json` or `vidgen.json`."""
    try:
        return {
            "name": info["name"], "family": info["family"], "license": info["license"],
            "tasks": tuple(info["tasks"]), "variant": info.get("variant"),
            "defaults": build(ModelDefaults, info["defaults"], str(where)),
        }
    except KeyError as error:
        raise ModelError(f"{where} lacks the field {error}") from None


def _recognised(
    path: Path, given: str | None, components: Components, index: Mapping[str, Any]
) -> dict[str, Any]:
    """Infer fields of a `ModelFolder` from its transformer and diffusers' index, if any."""
    dit = components["transformer"].config
    name = given or path.resolve().name
    experts = 2 if "transformer_2" in components else 1
    variant: Variant = recognise(
        dit, num_experts=experts, name=name, expand_timesteps=bool(index.get("expand_timesteps"))
    )
    defaults = asdict(variant.defaults) | _scheduling(path, index)
    return {
        "name": name, "family": variant.family, "license": card_license(path) or LICENSE,
        "tasks": variant.tasks, "defaults": build(ModelDefaults, defaults, str(path)),
        "variant": variant.name,
    }


def card_license(path: Path) -> str | None:
    """Return the licence that a folder's model card (`README.md`) gives, or None."""
    card = path / "README.md"
    text = card.read_text("utf-8", errors="replace") if card.is_file() else ""
    head = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    found = re.search(r"^license: *(\S+)", head[1], re.MULTILINE) if head else None
    name = found[1].strip("\"'") if found else None
    return LICENSE if name == "apache-2.0" else name


def _scheduling(path: Path, index: Mapping[str, Any]) -> dict[str, Any]:
    """Return the defaults that a diffusers folder's scheduler and index give."""
    config = path / "scheduler" / "scheduler_config.json"
    settings = read_json(config) if config.is_file() else {}
    found = {
        "shift": settings.get("flow_shift", settings.get("shift")),
        "sampler": _SAMPLERS.get(str(settings.get("_class_name"))),
        "boundary": index.get("boundary_ratio"),
    }
    return {key: value for key, value in found.items() if value is not None}


def _unhashed(
    path: Path, small: Iterable[Path], components: Components | None = None
) -> dict[str, str]:
    """Return `Files.files` of a folder without recorded hashes: its small files and weights."""
    weights = [
        file for part in (components or {}).values()
        for file in (*part.tensors.files, *part.extra.files)
    ]
    noted = [path / NOTE] if (path / NOTE).is_file() else []
    present = {p for p in (*small, *weights, *noted) if p.is_file()}
    return {str(p.relative_to(path)): "" for p in sorted(present)}
