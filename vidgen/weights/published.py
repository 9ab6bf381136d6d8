"""Published models: downloads from the Hugging Face hub, and Wan models by name for planning."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from vidgen.core.errors import ModelError
from vidgen.models.presets import DIT_PRESETS, IMAGE_PRESETS, TEXT_PRESETS, VAE_PRESETS
from vidgen.weights.component import Component, Components, Config, Role
from vidgen.weights.family import VARIANTS
from vidgen.weights.folder import ModelFolder, list_embedded
from vidgen.weights.tensors import Lazy, Tensors

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_NOT_THE_MODEL = ["*.mp4", "*.gif", "*.jpg", "*.jpeg", "*.png", "assets/*", "examples/*"]
_NAME = re.compile(
    r"wan2\.[12]-(?P<kind>t2v|i2v|flf2v|vace|ti2v)-(?P<size>1\.3b|14b|a14b|5b)"
)
_DITS = {
    "t2v-1.3b": "wan-1.3b", "t2v-14b": "wan-14b", "t2v-a14b": "wan-14b", "i2v-14b": "wan-14b-i2v",
    "flf2v-14b": "wan-14b-flf2v", "vace-1.3b": "wan-vace-1.3b", "vace-14b": "wan-vace-14b",
    "i2v-a14b": "wan22-14b-i2v", "ti2v-5b": "wan22-5b",
}


def is_hub_id(model: str) -> bool:
    """Return True if a text has the form OWNER/NAME."""
    return _ID.fullmatch(model) is not None


def cached_model(hub_id: str) -> Path | None:
    """Return the folder of an earlier, perhaps incomplete download, without network access."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def fetch_model(hub_id: str) -> Path:
    """Download a model, or its missing files, and return its folder.

    Raises:
        ModelError: the download failed; the message explains how to copy the model by hand.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, ignore_patterns=_NOT_THE_MODEL))
    except Exception as error:  # versions of the client differ in the errors that they raise
        reason = re.split(r"\n|\. ", str(error).strip() or type(error).__name__)[0][:200]
        name = hub_id.split("/")[1]
        raise ModelError(
            f"model {hub_id!r} is not a local folder and can't be downloaded from the Hugging Face "
            f"hub ({reason}); on a machine with network access run `hf download {hub_id} "
            f"--local-dir {name}`, copy that folder to this machine, and give its path as the model"
        ) from error


def list_cached() -> list[tuple[str, Path]]:
    """List the models in the hub's local cache: (hub id, folder)."""
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return []
    found = []
    for repo in repos:
        revisions = sorted(repo.revisions, key=lambda each: each.last_modified)
        if repo.repo_type == "model" and revisions:
            found.append((repo.repo_id, Path(revisions[-1].snapshot_path)))
    return sorted(found)


def is_here(model: str) -> bool:
    """Return True if `open_model` can open the model without a download."""
    if model in list_embedded() or Path(model).is_dir():
        return True
    return is_hub_id(model) and cached_model(model) is not None


def published(model: str) -> ModelFolder | None:
    """Return the published Wan model whose name a text contains, for planning; else None.

    Its components have architectures but no weights, so it can't be loaded; `files` is empty.
    """
    found = _NAME.search(model.lower())
    name = f"{found['kind']}-{found['size']}" if found else ""
    if name not in _DITS:
        return None
    variant = VARIANTS[
        name if name in VARIANTS else f"{name}-{'720p' if '720' in model else '480p'}"
    ]
    dit = DIT_PRESETS[_DITS[name]]
    configs: dict[Role, Config] = {
        "vae": VAE_PRESETS["wan22" if name == "ti2v-5b" else "wan21"], "transformer": dit,
        "text_encoder": TEXT_PRESETS["umt5-xxl"],
    }
    if "a14b" in name:
        configs["transformer_2"] = dit
    if dit.image_dim:
        configs["image_encoder"] = IMAGE_PRESETS["clip-vit-h"]
    return ModelFolder(
        path=Path(model), files={}, name=Path(model).name, family=variant.family,
        license="Apache-2.0", tasks=variant.tasks, defaults=variant.defaults,
        layout="diffusers", tokenizer=Path(), variant=variant.name, given=model,
        components=Components({role: _component(role, config) for role, config in configs.items()}),
    )


def _component(role: Role, config: Config) -> Component[Config]:
    # text encoders are published in bfloat16, all other components in float32
    dtype = torch.bfloat16 if role == "text_encoder" else torch.float32
    with torch.device("meta"):
        state = Component(role, config, Tensors()).build().to(dtype).state_dict()
    return Component(role, config, Tensors(
        {name: Lazy(value, partial(_refuse, name)) for name, value in state.items()}))


def _refuse(name: str) -> Tensor:
    raise ModelError(f"the tensor {name} is not on this machine; download the model first")
