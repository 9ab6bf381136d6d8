"""The program of all ranks but 0: open the model and follow orders."""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from vidgen.core.protocols import OnEvent
from vidgen.diffusion.state import moved
from vidgen.pipeline.codec import decode_latents, room_for
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


CPU = torch.device("cpu")
FAILURE = "failure"
"""Key of the rendezvous store at which a rank leaves the reason why it failed."""
LOST = 3
"""Exit code of a rank that stops because another one is gone."""


class DeviceWorker:
    """A rank's answers to orders; each order is a method of the same name."""

    loader: ModelLoader | None = None
    _caches: StepCaches | None = None

    def __init__(self, channel: ipc.Channel) -> None:
        self._channel = channel
        self._sampling = ExitStack()

    def open(self, model: str, quantize: Quantization | None, shard: bool) -> None:
        """Open the networks that the ranks share; they are loaded when they are used."""
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
        """Compute this rank's part of a velocity; the first of a group sends it."""
        device, rank, division = self._channel.device, self._channel.rank, self._division
        latents = torch.empty(shape, dtype=dtype, device=device)
        dist.broadcast(latents, src=0)
        for which in division.turns(wanted, rank, shard=self._mesh is not None):
            velocity = self._denoisers[which](latents, sigma.to(device))
            if division.guidance == 2 and 1 in wanted and rank == division.sequence:
                dist.send(velocity.contiguous(), dst=0)

    @torch.no_grad()
    def remember(self) -> None:
        """Send rank 0 the memory of this rank's step caches."""
        assert self._caches is not None
        ipc.collect(self._caches, self._channel, self._division)

    def end(self) -> None:
        """Finish denoising."""
        self._sampling.close()
        self._caches = None

    def decode(
        self, dtype: torch.dtype, offload: Offload, slices: list[tuple[Tensor, int]],
        tiles: Tiles | None, rate: int,
    ) -> None:
        """Decode this rank's slice of latents [B, C, F, h, w] but its first frames, and send it."""
        if self._channel.rank > len(slices):
            return
        loader = self._set_up(dtype, offload)
        latents, skipped = slices[self._channel.rank - 1]
        room, sent = None, []
        videos = decode_latents(loader, latents, skipped, tiles=tiles, rate=rate)
        for index, video in enumerate(videos):
            made = video.contiguous().view(-1).view(torch.uint8)
            if room is None:  # rank 0 may be long in coming to it
                room = room_for((latents.shape[2] - skipped) * made.numel()).split(made.numel())
            work = dist.isend(room[index].copy_(made), dst=0)
            assert work is not None, "all ranks are of the group"
            sent.append(work)
        for work in sent:
            work.wait()

    def _set_up(self, dtype: torch.dtype, offload: Offload) -> ModelLoader:
        old = self.loader
        if old is not None and (old.dtype, old.offload) == (dtype, offload):
            return old
        if old is not None:
            old.close()
        self.loader = ModelLoader(self._folder, self._channel.device, dtype, offload,
                                  self._quantize, self._mesh)
        return self.loader


def serve(channel: ipc.Channel) -> int:
    """Follow rank 0's orders until it closes; return the exit code."""
    worker = DeviceWorker(channel)
    try:
        while True:
            order, *details = channel.await_order()
            if order == "close":
                break
            getattr(worker, order)(*details)
    except BaseException as error:  # rank 0 reports all of them
        if ipc.is_loss(error):
            return LOST
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        channel.store.set(FAILURE, f"device {channel.rank} of {channel.size} failed: {text}")
        raise
    dist.destroy_process_group()
    return 0


def _device(index: int) -> torch.device:
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def join_torchrun() -> None:
    """Serve as a rank of torchrun until the end."""
    store, rank, size = ipc.torchrun_place()
    device = _device(int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else CPU
    if code := serve(ipc.Channel(store, rank, size, device, local=False)):
        sys.exit(code)


def join_local(place: tuple[int, int, int, str], _tell: OnEvent) -> None:
    """Serve as a rank of `start_devices`: rank, number of ranks, store's port, kind of device.

    The process ends with it, so that the others notice a rank that they wait for in vain.
    """
    rank, size, port, kind = place
    logging.getLogger().setLevel(logging.ERROR)
    warnings.simplefilter("ignore")  # rank 0 gives the same
    store = dist.TCPStore("127.0.0.1", port, size, is_master=False, timeout=ipc.TIMEOUT)
    device = _device(rank) if kind == "cuda" else CPU
    try:
        code = serve(ipc.Channel(store, rank, size, device, local=True))
    except Exception:
        traceback.print_exc()  # its last line is quoted
        code = 1
    os._exit(code)  # without the seconds it takes to take down what was imported
