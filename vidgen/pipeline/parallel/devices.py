"""Several devices for one clip: processes that share the denoising and decoding.

This process, rank 0, runs the whole pipeline: it reads, plans, samples, keeps the journal and
writes. The other ranks are workers that hold the transformers and the VAE; rank 0 sends them
orders as jobs. So every task, window, sampler and journal works with any number of devices.

Axes: B batch, C latent channels, F latent frames, h w latent rows and columns.
"""

from __future__ import annotations

import logging
import pickle
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from vidgen.core.errors import DeviceError, InputError
from vidgen.diffusion.guidance import guidance_share, guided
from vidgen.diffusion.state import LatentState, moved
from vidgen.pipeline.codec import decode_latents, room_in_file
from vidgen.pipeline.parallel import ipc
from vidgen.pipeline.parallel.worker import LOST, DeviceWorker
from vidgen.pipeline.workers.pool import LocalPool, LocalWorker

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
"""Time to wait for a failed rank's error message."""


class Devices:
    """Rank 0's side of the devices; `start_devices` creates it.

    If a device fails, methods raise DeviceError, and the engine can't be used afterwards. `pool`
    holds the other ranks; `shard` spreads the transformers' weights over all ranks.
    """

    def __init__(self, channel: ipc.Channel, pool: LocalPool, *, shard: bool) -> None:
        self.channel, self.size, self.shard = channel, channel.size, shard
        self._pool, self._num_heads = pool, 0
        self._sent, self._done = Counter[int](), Counter[int]()  # orders, by rank
        self._sampling: ipc.Share | None = None
        self._remembered: Mapping[str, Tensor] = {}
        self._end = weakref.finalize(self, _dissolve, pool)

    @property
    def mesh(self) -> DeviceMesh | None:
        """Devices over which the transformers' weights are spread, or None."""
        return self.channel.mesh if self.shard else None

    def open(self, folder: ModelFolder, quantize: Quantization | None) -> None:
        """Open a model on all devices."""
        self._num_heads = folder.components["transformer"].config.num_heads
        self.order("open", str(folder.path), quantize, self.shard)
        with self.together():
            assert (self.mesh is not None) == self.shard  # created by all ranks now

    def facts(self, *, guided: bool) -> dict[str, Any]:
        """Return the recipe's entry `devices`; raise InputError if they can't share the model."""
        division = ipc.divide(self.size, self._num_heads, guided=guided)
        return {"count": self.size, **asdict(division), "shard": self.shard}

    @contextmanager
    def denoising(
        self, loader: ModelLoader, plan: Plan, state: LatentState, contexts: Contexts, loras: Loras,
        level: float, caches: StepCaches | None = None,
    ) -> Iterator[Denoise]:
        """Yield the guided model over all devices; arguments as in `denoise.denoising`.

        This process keeps its own part of `caches`. InputError: another clip is being sampled.
        """
        self._require_alive()
        if self._sampling is not None:
            raise InputError("these devices are busy with another clip; generate one at a time")
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
                if self._end.alive:
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

        It is collected after computed steps alone; skipped steps change only numbers.
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
        """Yield the result of `codec.decode_latents`; each device decodes one stretch."""
        with ExitStack() as stack:
            vae = stack.enter_context(loader.use("vae")).at_rate(rate)
            t, hw, dtype = vae.strides.t, vae.strides.hw, loader.dtype_of("vae")
            shape = torch.Size((len(latents), 3, t, *(side * hw for side in latents.shape[3:])))
            num_bytes, back = shape.numel() * dtype.itemsize, vae.receptive_frames() - 1
            mine, *others = ipc.stretches(begin, latents.shape[2], self.size, back)
            theirs = [(worker, first, end) for worker, (first, end)
                      in zip(self._pool.workers, others, strict=True) if end > first]
            if theirs:
                total = num_bytes * (latents.shape[2] - mine[1])
                name, room = stack.enter_context(room_in_file(total))
                stack.callback(self._finish)  # the others open the file by name
            for worker, first, end in theirs:
                given = latents[:, :, max(0, first - back) : end].cpu()
                place = (name, total, num_bytes * (first - mine[1]))
                self._send(worker, "decode", loader.dtype, loader.offload, place, given,
                           min(first, back), tiles, rate)
            with self._stopping():
                yield from decode_latents(loader, latents, *mine, tiles, rate)
            if theirs:
                self._finish()
                self._require_alive()
                for chunk in room.split(num_bytes):
                    yield chunk.view(dtype).view(shape)

    def close(self) -> None:
        """Stop the other ranks; an engine with these devices can't be used afterwards."""
        self._end()

    def order(self, *what: Any) -> None:
        """Send all other ranks an order: a method of `DeviceWorker` and its arguments."""
        self._send(None, *what)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run work of all ranks inside the block; if it fails, stop all of them."""
        try:
            yield
        except BaseException as error:
            lost = ipc.is_loss(error)
            reason = self._failure() or f"the devices were disconnected: {error}" if lost else None
            self._end()
            if reason is not None:
                raise DeviceError(reason) from error
            raise

    @contextmanager
    def _stopping(self) -> Iterator[None]:
        """On a failure inside the block stop the other ranks, whose work nobody waits for."""
        try:
            yield
        except GeneratorExit:
            raise
        except BaseException:
            self._end()
            raise

    def _require_alive(self) -> None:
        if not self._end.alive:
            raise DeviceError("the other devices have stopped; load the model again")

    def _send(self, worker: LocalWorker | None, *what: Any) -> None:
        """Send an order to one worker, or to all."""
        self._require_alive()
        with self.together():
            self._take_messages()
        order = pickle.dumps(what)
        for each in self._pool.workers if worker is None else [worker]:
            self._sent[each.number] += 1
            each.send("job", order)

    def _finish(self) -> None:
        """Wait until all orders are done."""
        with self.together():
            while self._end.alive and self._done != self._sent:
                if self._take_messages(1.0):
                    raise DeviceError("the devices were disconnected")

    def _take_messages(self, seconds: float = 0.0) -> bool:
        """Take the other ranks' messages; return whether one lost its connection.

        Raises:
            DeviceError: a rank failed.
        """
        lost = False
        while not lost and (messages := self._pool.listen(seconds)):
            seconds = 0.0
            for worker, (kind, *details) in messages:
                lost |= kind == "lost"
                self._done[worker.number] += kind == "done"
                if kind == "event" or (kind == "lost" and worker.process.returncode != LOST):
                    text = details[0] if kind == "lost" else details[0]["text"]
                    raise DeviceError(f"device {worker.number} of {self.size} failed: {text}")
        return lost

    def _failure(self) -> str | None:
        until = time.monotonic() + GRACE_S
        while time.monotonic() < until:
            try:
                self._take_messages(0.05)
            except DeviceError as error:
                return str(error)
        return None


def start_devices(
    devices: int | None, device: torch.device, *, shard: bool | None = False,
    offload: str | None = None, quantize: Quantization | None = None,
) -> Devices | None:
    """Start the other processes; return None for one device.

    Raises:
        InputError: more devices than exist; options that conflict.
        DeviceError: a device failed to start.
    """
    if devices is None or devices == 1:
        if shard:
            raise InputError("shard spreads weights over devices; give --devices 2 or more")
        return None
    if shard and (quantize or offload == "block"):
        raise InputError("weights that are spread over devices can be neither int8 nor offloaded "
                         "by block; leave out --shard, or --quantize and --offload block")
    count = torch.cuda.device_count()
    if device.type == "cuda" and devices > count:
        raise InputError(f"devices is {devices}, but torch sees {count}; give {count} or "
                         "fewer")
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"several devices can be CPUs or CUDA devices, not {device.type}")
    if dist.is_initialized():
        raise InputError("torch.distributed is already in use in this process; close the other "
                         "engine, or load with devices=1")
    if device.type == "cpu":
        log.warning("%d devices on a CPU are processes that share its cores", devices)
    store = dist.TCPStore("127.0.0.1", 0, devices, is_master=True, wait_for_workers=False)
    pool = LocalPool(pickle.dumps(DeviceWorker()), devices - 1, None)
    try:
        pool.start()
        waiting = devices - 1
        while waiting:
            for worker, (kind, *details) in pool.listen(1.0):
                if kind == "lost":
                    raise DeviceError(f"device {worker.number} of {devices} failed: {details[0]}")
                waiting -= kind == "ready"
        for worker in pool.workers:
            place = (worker.number, devices, store.port, device.type)
            worker.send("job", pickle.dumps(("join", *place)))
        made = Devices(ipc.Channel(store, 0, devices, device), pool, shard=bool(shard))
        made._sent.update(worker.number for worker in pool.workers)
        return made
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


def _dissolve(pool: LocalPool) -> None:
    pool.end()
    with suppress(RuntimeError):
        dist.destroy_process_group()
