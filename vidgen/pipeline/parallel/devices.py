"""Several devices for one clip: processes that share the denoising and decoding.

This process, rank 0, runs the whole pipeline: it reads, plans, samples, keeps the journal and
writes. The others, workers that have this one job, hold the transformers and the VAE and wait for
orders; `worker` is their program. So every task, window, sampler and journal works with any number
of devices.

Axes: B batch, C latent channels, F latent frames, h w latent rows and columns.
"""

from __future__ import annotations

import logging
import os
import pickle
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from vidgen.core.errors import DeviceError, InputError
from vidgen.core.runtime import given_rank
from vidgen.diffusion.guidance import guidance_share, guided
from vidgen.diffusion.state import LatentState, moved
from vidgen.pipeline.codec import decode_latents, room_for
from vidgen.pipeline.parallel import ipc
from vidgen.pipeline.parallel.worker import FAILURE, LOST, join_local
from vidgen.pipeline.workers.pool import LocalPool

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from vidgen.core.protocols import Denoise
    from vidgen.core.shapes import Tiles
    from vidgen.diffusion.cache import StepCaches
    from vidgen.pipeline.loader import ModelLoader
    from vidgen.pipeline.types import Contexts, Loras, Plan
    from vidgen.weights.folder import ModelFolder
    from vidgen.weights.quantize import Quantization

log = logging.getLogger(__name__)

GRACE_S = 5.0
"""Time to wait for a rank that is to leave, or whose end is suspected."""


class Devices:
    """Rank 0's side of the devices; `start_devices` creates it.

    If a device fails, methods raise DeviceError, and the engine can't be used afterwards. `pool`
    holds the processes started here, and `shard` spreads the transformers' weights over all.
    """

    def __init__(self, channel: ipc.Channel, pool: LocalPool, *, shard: bool) -> None:
        self.channel, self.size, self.shard = channel, channel.size, shard
        self._pool, self._num_heads = pool, 0
        self._coming: _Coming | None = None
        self._sampling: ipc.Share | None = None
        self._remembered: Mapping[str, Tensor] = {}
        self._end = weakref.finalize(self, _dissolve, channel, pool)

    @property
    def mesh(self) -> DeviceMesh | None:
        """Devices over which the transformers' weights are spread, or None."""
        return self.channel.mesh if self.shard else None

    def open(self, folder: ModelFolder, quantize: Quantization | None) -> None:
        """Open a model on all devices."""
        self._num_heads = folder.components["transformer"].config.num_heads
        self.order("open", str(folder.path), quantize, self.shard)
        with self.together():
            assert (self.mesh is not None) == self.shard  # all make it now

    def facts(self, *, guided: bool) -> dict[str, Any]:
        """Return the recipe's entry; raise InputError if more devices than can share the model."""
        division = ipc.divide(self.size, self._num_heads, guided=guided)
        return {"count": self.size, **asdict(division), "shard": self.shard}

    @contextmanager
    def denoising(
        self, loader: ModelLoader, plan: Plan, state: LatentState, contexts: Contexts, loras: Loras,
        level: float, caches: StepCaches | None = None,
    ) -> Iterator[Denoise]:
        """Yield the guided model over all devices; arguments as in `denoise.denoising`.

        This process keeps its own part of `caches`; InputError if another clip is being sampled.
        """
        self._require_alive()
        if self._sampling is not None:
            raise InputError("these devices are at another clip; generate in turns")
        division = ipc.divide(self.size, self._num_heads, guided=len(contexts) > 1)
        share = ipc.Share(plan, state, contexts, loras, level, division, torch.get_num_threads())
        theirs, own = share, replace(share, caches=caches)
        if caches is not None:
            self._remembered = {name: each.cpu() for name, each in caches.state().items()}
            own = replace(own, remembered=self._remembered)
            theirs = replace(own, caches=replace(caches, memories={}, taken=[]))
        with ipc.shared_denoisers(loader, own, self.channel, shard=self.shard) as made:
            self.order("begin", loader.dtype, loader.offload, moved(theirs, "cpu"))
            self._sampling = own
            try:
                yield _guided(partial(self._velocities, made, division), share)
            finally:
                self._sampling, self._remembered = None, {}
                if not self.channel.broken:
                    self.order("end")

    def _velocities(
        self, own: list[Denoise], division: ipc.Division, latents: Tensor, sigma: Tensor,
        *wanted: int,
    ) -> tuple[Tensor, ...]:
        """Return velocities [B, C, F, h, w] under the wanted contexts, computed by all devices."""
        self.order("denoise", latents.shape, latents.dtype, sigma.cpu(), wanted)
        with self.together():
            dist.broadcast(latents.contiguous(), src=0)
            found = {which: own[which](latents, sigma)
                     for which in division.turns(wanted, 0, shard=self.shard)}
            if division.guidance == 2 and 1 in wanted:
                found[1] = torch.empty_like(latents)
                dist.recv(found[1], src=division.sequence)
        return tuple(found[which] for which in wanted)

    def remembered(self) -> Mapping[str, Tensor]:
        """Return the memory of all ranks' step caches, on the CPU, inside `denoising` after a step.

        Only a step that was computed changes more than numbers.
        """
        assert self._sampling is not None
        caches, division = self._sampling.caches, self._sampling.division
        assert caches is not None
        if caches.taken[-1][1]:
            self.order("remember")
            with self.together():
                self._remembered = ipc.collect(caches, self.channel, division)
        return {**self._remembered, **caches.state(numbers_only=True)}

    def decode(
        self, loader: ModelLoader, latents: Tensor, begin: int = 0, tiles: Tiles | None = None,
        rate: int = 1,
    ) -> Iterator[Tensor]:
        """Yield the result of `codec.decode_latents`, a stretch decoded by each device."""
        self._require_alive()
        with loader.use("vae") as network:
            vae = network.at_rate(rate)
            t, hw = vae.strides.t, vae.strides.hw
            shape = (latents.shape[0], 3, t, *(side * hw for side in latents.shape[3:]))
            back = vae.receptive_frames() - 1
            mine, *others = ipc.stretches(begin, latents.shape[2], self.size, back)
            theirs = [(first, end) for first, end in others if end > first]
            slices = [(latents[:, :, max(0, first - back) : end].cpu(), min(first, back))
                      for first, end in theirs]
            coming: Iterable[Tensor] = ()
            if slices:
                self.order("decode", loader.dtype, loader.offload, slices, tiles, rate)
                sizes = [end - first for first, end in theirs]
                coming = self._coming = _Coming(self, sizes, shape, loader.dtype_of("vae"))
            yield from decode_latents(loader, latents, *mine, tiles, rate)
            yield from coming

    def close(self) -> None:
        """Dismiss the others; an engine with these devices can't be used afterwards."""
        if self._end.alive and self._coming is not None and not self.channel.broken:
            self._coming.take_all()
        self._end()

    def order(self, *what: Any) -> None:
        """Send the others an order."""
        self._require_alive()
        if self._coming is not None:  # a clip that is half decoded: receive its frames first
            self._coming.take_all()
            self._coming = None
        with self.together():
            self.channel.order(*what)

    def _require_alive(self) -> None:
        if not self._end.alive:
            raise DeviceError("the other devices are gone; load the model again")

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run work of all ranks; if it fails, none of them can continue."""
        try:
            yield
        except BaseException as error:
            reason = None
            if ipc.is_loss(error):
                reason = self._failure() or f"the devices lost each other: {error}"
            self.channel.broken = True
            self._end()
            if reason is not None:
                raise DeviceError(reason) from error
            raise

    def _failure(self) -> str | None:
        until = time.monotonic() + GRACE_S
        while time.monotonic() < until:
            with suppress(RuntimeError):
                if self.channel.store.check([FAILURE]):
                    return self.channel.store.get(FAILURE).decode()
            for worker, (kind, *details) in self._pool.listen(0):
                if kind == "lost" and worker.process.returncode != LOST:
                    return f"device {worker.number} of {self.size} failed: {details[0]}"
            time.sleep(0.05)
        return None


def start_devices(
    devices: int | None, device: torch.device, *, shard: bool | None = False,
    offload: str | None = None, quantize: Quantization | None = None,
) -> Devices | None:
    """Start the other processes, or join torchrun's; None for one device.

    Raises:
        InputError: more devices than exist, or than torchrun started; options that conflict.
        DeviceError: one failed while it started.
    """
    if devices is None or devices == 1:
        if shard:
            raise InputError("shard spreads weights over devices; give --devices 2 or more")
        return None
    shard = bool(shard)
    if shard and (quantize or offload == "block"):
        raise InputError("weights that are spread over devices can be neither int8 nor read block "
                         "by block; leave --shard out, or the other")
    given = given_rank()
    here = devices if given is None else int(os.environ.get("LOCAL_WORLD_SIZE", devices))
    count = torch.cuda.device_count()
    if device.type == "cuda" and here > count:
        raise InputError(f"devices is {devices}, but torch sees {count} here; give {count} or "
                         "fewer")
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"several devices can be CPUs or CUDA devices, not {device.type}")
    if dist.is_initialized():
        raise InputError("torch.distributed is in use in this process already; close the other "
                         "engine, or load with devices=1")
    if given is None:
        return _start_local(devices, device, shard=shard)
    if given[1] != devices:
        raise InputError(f"torchrun started {given[1]} processes, devices is {devices}; the two "
                         "must be the same")
    channel = ipc.Channel(*ipc.torchrun_place(), device, local=False)
    return Devices(channel, LocalPool(b"", 0, None), shard=shard)


def _start_local(devices: int, device: torch.device, *, shard: bool) -> Devices:
    if device.type == "cpu":
        log.warning("%d devices on a CPU are processes that share its cores", devices)
    store = dist.TCPStore("127.0.0.1", 0, devices, is_master=True, wait_for_workers=False)
    pool = LocalPool(pickle.dumps(join_local), devices - 1, None)
    try:
        pool.start()
        waiting = devices - 1
        while waiting:
            for worker, (kind, *details) in pool.listen(1.0):
                if kind == "lost":
                    raise DeviceError(f"device {worker.number} of {devices} failed: {details[0]}")
                if kind == "ready":
                    worker.send("job", (worker.number, devices, store.port, device.type))
                    waiting -= 1
        return Devices(ipc.Channel(store, 0, devices, device, local=True), pool, shard=shard)
    except BaseException:
        pool.end()
        raise


def _guided(call: Callable[..., tuple[Tensor, ...]], share: ipc.Share) -> Denoise:
    def conditional(latents: Tensor, sigma: Tensor) -> Tensor:
        return call(latents, sigma, 0)[0]

    if len(share.contexts) == 1:
        return conditional
    return guided(conditional, lambda latents, sigma: call(latents, sigma, 1)[0],
                  share.plan.guidance, denoise_mask=share.state.generated,
                  share=guidance_share(share.state, share.plan.guidance.reach),
                  both=lambda latents, sigma: call(latents, sigma, 0, 1))


class _Coming:
    """Chunks of `shape` that ranks 1, 2, ... decode meanwhile, in order, `sizes` of each."""

    def __init__(
        self, devices: Devices, sizes: list[int], shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        self._devices, self._shape, self._dtype = devices, shape, dtype
        self._senders = deque(rank for rank, size in enumerate(sizes, 1) for _ in range(size))
        self._taken: deque[Tensor] = deque()
        devices.channel.owed = bool(self._senders)

    def __iter__(self) -> Iterator[Tensor]:
        while self._taken or self._senders:
            yield self._taken.popleft() if self._taken else self._receive(self._room(1)[0])

    def take_all(self) -> None:
        """Receive the remaining chunks, so that the ranks are free for other work."""
        for room in self._room(len(self._senders)):
            self._taken.append(self._receive(room))

    def _room(self, count: int) -> Sequence[Tensor]:
        each = torch.Size(self._shape).numel() * self._dtype.itemsize
        return room_for(count * each).split(each) if count else ()

    def _receive(self, room: Tensor) -> Tensor:
        with self._devices.together():
            dist.recv(room, src=self._senders.popleft())
        self._devices.channel.owed = bool(self._senders)
        return room.view(self._dtype).view(self._shape)


def _dissolve(channel: ipc.Channel, pool: LocalPool) -> None:
    grace_s = 0.0
    if not (channel.broken or channel.owed):
        with suppress(RuntimeError):
            channel.order("close")
            grace_s = GRACE_S
    pool.end(grace_s)
    with suppress(RuntimeError):
        dist.destroy_process_group()
