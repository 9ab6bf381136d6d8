"""Tensors of items and captions on disk, under names that follow from all that shapes them.

`manifest.json` says what shaped them; a config that would shape them otherwise is refused.
`latents/`, `texts/` and `grey/` hold safetensors files.

Axes: C latent channels, F latent frames, h w latent rows and columns.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vidgen.core.config import dump
from vidgen.core.errors import InputError
from vidgen.core.runtime import atomic_path, atomic_write, write_error
from vidgen.models.tokenizer import clean_prompt
from vidgen.pipeline.loader import DTYPES
from vidgen.training.data.config import Bucket, DataConfig, Geometry
from vidgen.training.data.encode import Extras, component_hash
from vidgen.weights.folder import ModelFolder

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Store:
    """The tensors of a cache, by what shaped them.

    Attributes:
        folder: of the cache.
        pixels: identifies VAE, image encoder, rate and rule.
        texts: identifies the text encoder as it computes here.
        dtype: in which tensors are kept: "fp16", "bf16" or "fp32".
    """

    folder: Path
    pixels: str
    texts: str
    dtype: str

    def path(self, kind: str, of: str) -> Path:
        """Where the tensors of an item's key, a bucket's label or a caption lie."""
        by = self.texts if kind == "texts" else self.pixels
        name = hashlib.sha256(f"{by} {kind} {of}".encode()).hexdigest()
        return self.folder / kind / name[:2] / f"{name}.safetensors"

    def text_path(self, caption: str) -> Path:
        """Where the context of a caption lies."""
        return self.path("texts", clean_prompt(caption))

    def grey(self, bucket: Bucket) -> Tensor:
        """Latents [C, F, h, w] of grey, for a bucket's clips."""
        return self.load(self.path("grey", bucket.label))["grey"]

    def save(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors atomically.

        Raises:
            OutputError: the disk is full, or can't be written.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        narrow = {k: v.to(DTYPES[self.dtype]).contiguous() for k, v in tensors.items()}
        with atomic_path(path) as temporary:
            try:
                save_file(narrow, temporary)
            except SafetensorError as error:  # a full disk comes as text alone
                raise _as_os_error(error) from error

    def load(self, path: Path) -> dict[str, Tensor]:
        """Tensors in float32.

        Raises:
            InputError: missing or damaged.
        """
        try:
            return {name: value.float() for name, value in load_file(path).items()}
        except FileNotFoundError:
            raise InputError(f"{path} is missing from the cache; run vidgen data cache again, "
                             "which adds what is missing") from None
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path} is damaged: {error}; delete it and run vidgen data cache "
                             "again") from None


def _as_os_error(error: SafetensorError) -> OSError:
    found = re.search(r"os error (\d+)", str(error))
    number = int(found[1]) if found else errno.EIO
    return OSError(number, os.strerror(number))


@dataclass(frozen=True)
class Identity:
    """What shapes a cache's tensors."""

    manifest: dict[str, Any]
    store: Store

    @classmethod
    def of(
        cls, config: DataConfig, geometry: Geometry, folder: ModelFolder, text_dtype: str | None
    ) -> Identity:
        """Of a config and a model whose text encoder computes in `text_dtype`."""
        extras = dump(Extras.of(folder))
        if extras["oversampling"] == 1:  # so that caches which never heard of it stay valid
            del extras["oversampling"]
        pixels = {
            "format": FORMAT_VERSION, "vae": component_hash(folder, "vae"),
            "image_encoder": component_hash(folder, "image_encoder"),
            "extras": extras, "fps": str(geometry.fps),
            "fps_rule": config.fps_rule, "store_dtype": config.store_dtype,
        }
        texts = {"text_encoder": component_hash(folder, "text_encoder"), "text_dtype": text_dtype}
        shapes = {
            "sizes": ["{}x{}".format(*size) for size in geometry.sizes],
            "frames": list(geometry.frames), "crop": config.crop,
            "crop_seed": config.seed if config.crop == "random" else None,
        }
        store = Store(Path(config.cache), _digest(pixels), _digest(texts), config.store_dtype)
        return cls({**pixels, **texts, **shapes}, store)


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def require_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write what shapes a folder's latents, or make sure that it was the same before.

    Raises:
        InputError: latents there were made otherwise, which tells in what; or their manifest is
            damaged.
        OutputError: the folder can't be made.
    """
    path = folder / "manifest.json"
    if not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(folder, error) from None
        atomic_write(path, json.dumps(manifest, indent=1).encode())
        return
    try:
        found = json.loads(path.read_text("utf-8"))
        if not isinstance(found, dict):
            raise TypeError("it is no object")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path}, which says what made the latents there, is damaged ({error}); "
                         "name another folder or delete this one") from None
    differing = sorted(k for k in manifest | found if manifest.get(k) != found.get(k))
    if differing:
        told = "; ".join(
            f"{k} is {found.get(k)!r} there, {manifest.get(k)!r} here" for k in differing
        )
        raise InputError(f"the latents in {folder} were made otherwise ({told}); "
                         "name another folder or delete this one")
