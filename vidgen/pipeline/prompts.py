"""Encode prompts to context, cached on disk so that a large text encoder runs once per prompt.

UMT5-XXL takes 11 GB and most of a minute to load; the context of a prompt takes a few hundred
kilobytes.

Axes: B batch, S text tokens, D width.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vidgen.core.errors import OutputError
from vidgen.core.runtime import atomic_path, cache_folder, fingerprint
from vidgen.models.text import NOTHING, TextEncoder
from vidgen.models.tokenizer import PromptTokenizer, clean_prompt
from vidgen.pipeline.loader import ModelLoader
from vidgen.weights.folder import hash_files

log = logging.getLogger(__name__)

WORTHWHILE_BYTES = 100_000_000
"""Smaller text encoders run faster than their hash is looked up."""
LIMIT_BYTES = 1_000_000_000
"""The cache drops its least recently used entries above this size."""


@dataclass(frozen=True)
class PromptCache:
    """Contexts of prompts in a folder."""

    folder: Path
    made_by: str  # identifies the text encoder, the tokenizer, dtype and machine
    limit: int = LIMIT_BYTES

    @classmethod
    def of(cls, loader: ModelLoader, tokenizer: PromptTokenizer) -> PromptCache:
        """Return the cache of a model's text encoder, in the user's cache folder."""
        component = loader.folder.components["text_encoder"]
        words = sorted(loader.folder.tokenizer.glob("*.json"))
        hashes = hash_files((*component.tensors.files, *words))
        facts = [sorted(hashes.values()), repr(component.config), tokenizer.max_length,
                 str(loader.dtype), loader.quantize, loader.device.type, fingerprint()]
        made_by = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        return cls(cache_folder() / "prompts", made_by)

    def get(self, prompt: str) -> Tensor | None:
        """Return the context [S, D] of a prompt, or None; a damaged entry is removed."""
        path = self._path(prompt)
        try:
            context = load_file(path)["context"].clone()
            os.utime(path)
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, KeyError):
            path.unlink(missing_ok=True)
            return None
        return context

    def put(self, prompt: str, context: Tensor) -> None:
        """Save the context [S, D] of a prompt; a failure is only logged."""
        path = self._path(prompt)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as temporary:
                save_file({"context": context.cpu().contiguous()}, temporary)
            self._trim()
        except (OSError, OutputError, SafetensorError) as error:
            log.warning("the prompt's encoding can't be kept for next time: %s", error)

    def _path(self, prompt: str) -> Path:
        key = hashlib.sha256(f"{self.made_by} {clean_prompt(prompt)}".encode()).hexdigest()
        return self.folder / f"{key}.safetensors"

    def _trim(self) -> None:
        entries = [(path.stat(), path) for path in self.folder.glob("*.safetensors")]
        entries.sort(key=lambda entry: entry[0].st_mtime_ns)
        surplus = sum(facts.st_size for facts, _ in entries) - self.limit
        for facts, path in entries:
            if surplus <= 0:
                return
            path.unlink(missing_ok=True)
            surplus -= facts.st_size


class PromptEncoder:
    """Encodes a model's prompts; a large text encoder is loaded only if the cache lacks one."""

    def __init__(self, loader: ModelLoader, tokenizer: PromptTokenizer) -> None:
        self._loader, self._tokenizer = loader, tokenizer

    @cached_property
    def _cache(self) -> PromptCache | None:
        small = self._loader.folder.components["text_encoder"].tensors.num_bytes <= WORTHWHILE_BYTES
        return None if small else PromptCache.of(self._loader, self._tokenizer)

    def encode(
        self, prompts: Sequence[str], learned: Mapping[str, Tensor] = NOTHING
    ) -> tuple[Tensor, Tensor]:
        """Return (context [B, S, D] on the device, lengths [B] int64) of prompts.

        Rows after a prompt's length are zero. With `learned` embeddings [D] of tokens nothing is
        cached.
        """
        if self._cache is None or learned:
            return self._run(prompts, learned)
        asked = {prompt: self._cache.get(prompt) for prompt in prompts}
        known = {prompt: context for prompt, context in asked.items() if context is not None}
        unknown = [prompt for prompt in asked if prompt not in known]
        if unknown:
            with self._loader.use("text_encoder"):
                for prompt in unknown:  # each alone, so that its context depends on nothing else
                    known[prompt] = self._run([prompt], NOTHING)[0][0]
                    self._cache.put(prompt, known[prompt])
        rows = [known[prompt].to(self._loader.device) for prompt in prompts]
        return pad_sequence(rows, batch_first=True), torch.tensor([len(row) for row in rows])

    def _run(self, prompts: Sequence[str], learned: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        with self._loader.use("text_encoder") as encoder:
            return TextEncoder(encoder, self._tokenizer).encode(prompts, learned)
