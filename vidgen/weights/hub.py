"""Models on the Hugging Face hub, and those of them that are on this machine."""

from __future__ import annotations

import re
from pathlib import Path

from vidgen.core.errors import ModelError

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_NOT_THE_MODEL = ["*.mp4", "*.gif", "*.jpg", "*.jpeg", "*.png", "assets/*", "examples/*"]


def is_hub_id(model: str) -> bool:
    """Whether a text has the form OWNER/NAME."""
    return _ID.fullmatch(model) is not None


def cached_model(hub_id: str) -> Path | None:
    """The folder of a model that was downloaded before, perhaps in part; the hub isn't asked."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def fetch_model(hub_id: str) -> Path:
    """Download a model, or what is missing of it, and give its folder.

    Raises:
        ModelError: it can't be had; says how to provide it.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, ignore_patterns=_NOT_THE_MODEL))
    except Exception as error:  # network, rights, names: each client version has its own
        reason = re.split(r"\n|\. ", str(error).strip() or type(error).__name__)[0][:200]
        name = hub_id.split("/")[1]
        raise ModelError(
            f"model {hub_id!r} is no folder here, and can't be fetched from the Hugging Face hub "
            f"({reason}); where there is a network, run `hf download {hub_id} --local-dir {name}`, "
            "bring that folder here, and give its path as the model"
        ) from error


def list_cached() -> list[tuple[str, Path]]:
    """Hub ids and folders of the models in the hub's cache."""
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
