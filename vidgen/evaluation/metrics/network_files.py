"""Files of VBench's feature networks, which users provide.

dino       folder of a transformers ViT (facebook/dino-vitb16)
clip       folder of a transformers CLIP (openai/clip-vit-base-patch32)
dreamsim   TorchScript: pictures [1, 3, 224, 224] in [0, 1] -> features [1, D]
raft       TorchScript: two pictures [1, 3, H, W], 0 to 255, sides divisible by 8 -> flow
           [1, 2, H, W] in pixels (x, y)
amt        TorchScript: two pictures [1, 3, H, W] in [0, 1], sides divisible by 16 -> the
           picture between them, the same shape
i3d        TorchScript: video [1, 3, 16, 224, 224] in [-1, 1] -> features [1, D]
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

from vidgen.core.errors import InputError, nearest
from vidgen.core.runtime import sha256_file


class Network(NamedTuple):
    """Measures that use a network, and the description of its files."""

    measures: tuple[str, ...]
    given: str = "a TorchScript file"


NETWORKS: dict[str, Network] = {
    "dino": Network(("subject_consistency", "i2v_subject"), "the folder of facebook/dino-vitb16"),
    "clip": Network(("background_consistency",), "the folder of openai/clip-vit-base-patch32"),
    "dreamsim": Network(("i2v_background",)),
    "raft": Network(("temporal_flickering", "dynamic_degree")),
    "amt": Network(("motion_smoothness",)),
    "i3d": Network(("fvd", "kvd")),
}
FOLDERS = ("dino", "clip")
SCRIPT_SUFFIXES = (".pt", ".pth", ".jit", ".ts", ".torchscript")


def parse_networks(given: list[str]) -> dict[str, Path]:
    """Return {name: path} of texts NAME=PATH; a folder may stand for the TorchScript in it.

    Raises:
        InputError: the network is unknown or given twice, or its files are missing.
    """
    found = {}
    for text in given:
        name, mark, place = text.partition("=")
        path = Path(place)
        if not mark or name not in NETWORKS:
            raise InputError(f"network {text!r} isn't NAME=PATH; {nearest(name, NETWORKS)}")
        if name in found:
            raise InputError(f"network {name} is given twice; give one path")
        if name in FOLDERS and not (path / "config.json").is_file():
            raise InputError(
                f"{name} must be a folder of transformers; {path}/config.json is missing")
        found[name] = path if name in FOLDERS else _script(name, path)
    return found


def _script(name: str, path: Path) -> Path:
    if path.is_file():
        return path
    scripts = sorted(p for p in path.glob("*") if p.suffix in SCRIPT_SUFFIXES and p.is_file())
    if len(scripts) != 1:
        raise InputError(
            f"{name} must be a TorchScript file, or a folder that holds one; {path} "
            + (f"holds {len(scripts)}: name one" if scripts else "is none and holds none"))
    return scripts[0]


def network_hash(path: Path) -> str:
    """Return the SHA-256 of a file, or of all files of a folder with their names."""
    if path.is_file():
        return sha256_file(path)
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(f"{file.relative_to(path)}\0{sha256_file(file)}\n".encode())
    return digest.hexdigest()
