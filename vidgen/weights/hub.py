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


def fetch_model(hub_id: str) -> Path:
    """The folder of a model on the hub, as it was first downloaded, or downloaded now.

    Raises:
        ModelError: it is not on this machine and can't be had; says how to provide it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(hub_id, local_files_only=True))
        if not list((folder.parents[1] / "blobs").glob("*.incomplete")):
            return folder
    except LocalEntryNotFoundError:
        pass
    try:
        return Path(snapshot_download(hub_id, ignore_patterns=_NOT_THE_MODEL))
    except Exception as error:  # network, rights, names: each client version has its own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        name = hub_id.split("/")[1]
        raise ModelError(
            f"model {hub_id!r} is not on this machine and can't be fetched from the Hugging Face "
            f"hub ({reason[:200]}). Where there is a network, run `hf download {hub_id} "
            f"--local-dir {name}`, bring the folder here, and give its path as the model"
        ) from error


def list_cached() -> list[tuple[str, Path]]:
    """Hub ids and folders of the models in the hub's cache."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir().repos
    except CacheNotFound:
        return []
    found = []
    for repo in repos:
        revisions = sorted(repo.revisions, key=lambda each: each.last_modified)
        if repo.repo_type == "model" and revisions:
            found.append((repo.repo_id, Path(revisions[-1].snapshot_path)))
    return sorted(found)
