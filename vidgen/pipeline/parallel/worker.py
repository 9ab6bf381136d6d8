"""Work of all ranks but 0: open the model and follow orders."""

from __future__ import annotations

import logging
import os
import pickle
import sys
import warnings
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from vidgen.core.protocols import OnEvent
from vidgen.diffusion.state import moved
from vidgen.pipeline.codec import decode_latents
from vidgen.pipeline.loader import EXPERTS, ModelLoader
from vidgen.pipeline.parallel import ipc
from vidgen.pipeline.types import Offload
from vidgen.weights.component import Components
from vidgen.weights.folder import ModelFolder
from vidgen.weights.layouts import open_model

if TYPE_CHECKING:
    from vidgen.core.shapes import Tiles
    from vidgen.diffusion.cache import StepCaches
    from vidgen.weights.quantize import Quantization


LOST = 3
"""Exit code of a rank that stops because it lost another one."""


class DeviceWorker:
    """A rank that follows orders; each order is a method of the same name.

    A failure ends the process, so that the other ranks don't wait for it.
    """

    loader: ModelLoader | None = None
    _caches: StepCaches | None = None

    def __call__(self, order: bytes, _on_event: OnEvent) -> Any:
        """Follow an order: its name and arguments, pickled."""
        name, *details = pickle.loads(order)
        try:
            return getattr(self, name)(*details)
        except BaseException as error:
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            print(text, file=sys.stderr, flush=True)
            os._exit(LOST if ipc.is_loss(error) else 1)

    def join(self, rank: int, size: int, port: int, kind: str) -> None:
        """Join the group whose store has this port, as `rank` of `size`, on a kind of device."""
        logging.getLogger().setLevel(logging.ERROR)
        warnings.simplefilter("ignore")  # rank 0 shows the same ones
        device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
        if kind == "cuda":
            torch.cuda.set_device(device)
        store = dist.TCPStore("127.0.0.1", port, size, is_master=False, timeout=ipc.TIMEOUT)
        self._channel, self._sampling = ipc.Channel(store, rank, size, device), ExitStack()

    def open(self, model: str, quantize: Quantization | None, shard: bool) -> None:
        """Open the networks that the ranks share; each is loaded at its first use."""
        if self.loader is not None:
            self.loader.close()
            self.loader = None
        folder = open_model(model)
        assert isinstance(folder, ModelFolder)
        helping = Components({role: part for role, part in folder.components.items()
                              if role in (*EXPERTS, "vae")})
        self._folder, self._quantize = replace(folder, components=helping), quantize
        self._mesh = self._channel.mesh if shard else None

    def begin(self, dtype: torch.dtype, offload: Offload, share: ipc.Share) -> None:
        """Prepare to denoise a clip."""
        torch.set_num_threads(share.threads)
        loader = self._set_up(dtype, offload)
        own = moved(share, self._channel.device)
        self._division, self._caches = own.division, own.caches
        shared = ipc.shared_denoisers(loader, own, self._channel, shard=self._mesh is not None)
        self._denoisers = self._sampling.enter_context(shared)

    @torch.no_grad()
    def denoise(
        self, shape: torch.Size, dtype: torch.dtype, sigma: Tensor, wanted: tuple[int, ...]
    ) -> None:
        """Compute this rank's part of a velocity; the negative group's first rank sends it."""
        device, rank, division = self._channel.device, self._channel.rank, self._division
        latents = torch.empty(shape, dtype=dtype, device=device)
        dist.broadcast(latents, src=0)
        for which in division.turns(wanted, rank, shard=self._mesh is not None):
            velocity = self._denoisers[which](latents, sigma.to(device))
            if division.guidance == 2 and 1 in wanted and rank == division.sequence:
                dist.send(velocity.contiguous(), dst=0)

    @torch.no_grad()
    def remember(self) -> bytes:
        """Return the memory of this rank's step caches, pickled."""
        assert self._caches is not None
        return pickle.dumps({name: each.cpu() for name, each in self._caches.state().items()})

    def end(self) -> None:
        """Finish denoising."""
        self._sampling.close()
        self._caches = None

    def decode(
        self, dtype: torch.dtype, offload: Offload, place: tuple[str, int],
        latents: Tensor, skipped: int, tiles: Tiles | None, rate: int,
    ) -> None:
        """Decode latents [B, C, F, h, w], except the first `skipped` latent frames, to a file.

        `place` holds the file's name and the first frame's offset, in bytes. An abandoned clip's
        file is removed, which ends the work.
        """
        name, start = place
        loader = self._set_up(dtype, offload)
        with suppress(FileNotFoundError):
            for video in decode_latents(loader, latents, skipped, tiles=tiles, rate=rate):
                made = video.contiguous().view(-1).view(torch.uint8).cpu()
                with Path(name).open("r+b") as file:
                    file.seek(start)
                    start += file.write(made.numpy().data)

    def _set_up(self, dtype: torch.dtype, offload: Offload) -> ModelLoader:
        old = self.loader
        if old is not None and (old.dtype, old.offload) == (dtype, offload):
            return old
        if old is not None:
            old.close()
        self.loader = ModelLoader(self._folder, self._channel.device, dtype, offload,
                                  self._quantize, self._mesh)
        return self.loader
