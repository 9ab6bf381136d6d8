"""The feature networks of VBench, from folders and files that the user has; nothing is fetched.

dino       folder of a transformers ViT (facebook/dino-vitb16)
clip       folder of a transformers CLIP (openai/clip-vit-base-patch32)
dreamsim   TorchScript: pictures [1, 3, 224, 224] in [0, 1] -> features [1, D]
raft       TorchScript: two pictures [1, 3, H, W], 0 to 255, sides divisible by 8 -> flow
[1, 2, H, W] in pixels (x, y)
amt        TorchScript: two pictures [1, 3, H, W] in [0, 1], sides divisible by 16 -> the
picture between them, the same shape
cotracker  TorchScript: video [1, T, 3, H, W], 0 to 255 -> tracks [1, T, 100, 2] in pixels
(x, y) of a 10x10 grid on the first frame, row by row
i3d        TorchScript: video [1, 3, 16, 224, 224] in [-1, 1] -> features [1, D]
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from vidgen.core.errors import InputError, nearest
from vidgen.core.runtime import sha256_file

#: network -> what it is good for
NETWORKS: dict[str, tuple[str, ...]] = {
    "dino": ("subject_consistency", "i2v_subject"),
    "clip": ("background_consistency",),
    "dreamsim": ("i2v_background",),
    "raft": ("temporal_flickering", "dynamic_degree"),
    "amt": ("motion_smoothness",),
    "cotracker": ("camera_motion",),
    "i3d": ("fvd", "kvd"),
}
FOLDERS = ("dino", "clip")


def parse_networks(given: list[str]) -> dict[str, Path]:
    """NAME=PATH as on the command line.

    Raises:
        InputError: no such network, or nothing at its path.
    """
    found = {}
    for text in given:
        name, mark, place = text.partition("=")
        path = Path(place)
        if not mark or name not in NETWORKS:
            raise InputError(f"network {text!r} isn't NAME=PATH; {nearest(name, NETWORKS)}")
        if name in FOLDERS and not (path / "config.json").is_file():
            raise InputError(
                f"{name} is to be a folder of transformers; {path}/config.json is missing"
            )
        if name not in FOLDERS and not path.is_file():
            raise InputError(f"{name} is to be a TorchScript file; {path} is none")
        found[name] = path
    return found


def network_hash(path: Path) -> str:
    """SHA-256 of a file, or of all files of a folder with their names."""
    if path.is_file():
        return sha256_file(path)
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(f"{file.relative_to(path)}\0{sha256_file(file)}\n".encode())
    return digest.hexdigest()
