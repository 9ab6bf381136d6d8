"""Several devices for one clip: processes that share the denoising and decoding.

This process, rank 0, runs the whole pipeline: it reads, plans, samples, keeps the journal and
writes. The other ranks are workers that hold the transformers and the VAE; rank 0 sends them
orders as jobs. So every task, window, sampler and journal works with any number of devices.

Axes: B batch, C latent channels, F latent frames, h w latent rows and columns.
"""

from __future__ import annotations

import logging
import os
import pickle
import sys
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from vidgen.core.errors import DeviceError, InputError
from vidgen.core.protocols import OnEvent
from vidgen.diffusion.guidance import guidance_share, guided
from vidgen.diffusion.state import LatentState, moved
from vidgen.pipeline.codec import decode_latents, room_in_file
from vidgen.pipeline.loader import EXPERTS, ModelLoader
from vidgen.pipeline.parallel import ipc
from vidgen.pipeline.types import Offload
from vidgen.pipeline.workers.pool import LocalPool, LocalWorker
from vidgen.weights.component import Components
from vidgen.weights.folder import ModelFolder
from vidgen.weights.layouts import open_model

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from vidgen.core.protocols import Denoise
    from vidgen.core.shapes import Tiles
    from vidgen.diffusion.cache import StepCaches
    from vidgen.ops.quantized import Quantization
    from vidgen.pipeline.types import Contexts, Loras, Plan

log = logging.getLogger(__name__)

GRACE_S = 5.0
"""Time to wait for a failed rank's error message."""
LOST = 3
"""Exit code of a rank that stops because it lost another one."""


class Devices:
    """Rank 0's side of the devices, whose other ranks it starts; DeviceError if one fails to start.

    If a device fails later, methods raise DeviceError, and the engine can't be used afterwards.
    `shard` spreads the transformers' weights over all ranks.
    """

    def __init__(self, size: int, device: torch.device, *, shard: bool) -> None:
        self.size, self.shard = size, shard
        self._num_heads = 0
        self._sampling: ipc.Share | None = None
        self._remembered: Mapping[str, Tensor] = {}
        self._pool = LocalPool(pickle.dumps(DeviceWorker()), size - 1, None)
        self._num_open = size - 1  # ranks that aren't ready, later orders that aren't done
        self._answers: dict[Any, Any] = {}  # results of orders that return a key and a value
        self._end = weakref.finalize(self, _dissolve, self._pool)
        store = dist.TCPStore("127.0.0.1", 0, size, is_master=True, wait_for_workers=False)
        self._finish()
        for worker in self._pool.workers:
            self._send(worker, "join", worker.number, size, store.port, device.type)
        with self.together():
            self.channel = ipc.Channel(store, 0, size, device)

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
        caches_state = {} if caches is None else caches.state()
        self._remembered = {name: each.cpu() for name, each in caches_state.items()}
        own = ipc.Share(plan, state, contexts, loras, level, division, torch.get_num_threads(),
                        caches, self._remembered)
        theirs = own
        if caches is not None:
            theirs = replace(own, caches=replace(caches, memories={}, taken=[]))
        with ipc.shared_denoisers(loader, own, self.channel, shard=self.shard) as made:
            self.order("begin", loader.dtype, loader.offload, moved(theirs, "cpu"))
            self._sampling = own
            try:
                yield _guided(partial(self._velocities, made, division), own)
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
            with self.together():  # ranks that share a sequence join its parts
                own = caches.state()
            self._finish()
            theirs = pickle.loads(self._answers.pop("memory")) if division.guidance == 2 else {}
            self._remembered = {**theirs, **{name: each.cpu() for name, each in own.items()}}
        return {**self._remembered, **caches.state(numbers_only=True)}

    def decode(
        self, loader: ModelLoader, latents: Tensor, begin: int = 0, tiles: Tiles | None = None,
        rate: int = 1,
    ) -> Iterator[Tensor]:
        """Yield the result of `codec.decode_latents`; each device decodes one stretch.

        The others write theirs to a file, and stop when an abandoned clip's file is removed.
        """
        with loader.use("vae") as network:
            vae = network.at_rate(rate)
            t, hw, dtype = vae.strides.t, vae.strides.hw, loader.dtype_of("vae")
            shape = torch.Size((len(latents), 3, t, *(side * hw for side in latents.shape[3:])))
            num_bytes, back = shape.numel() * dtype.itemsize, vae.receptive_frames() - 1
            mine, *others = ipc.stretches(begin, latents.shape[2], self.size, back)
            theirs = [(worker, first, end) for worker, (first, end)
                      in zip(self._pool.workers, others, strict=True) if end > first]
            if not theirs:
                yield from decode_latents(loader, latents, *mine, tiles, rate)
                return
            with room_in_file(num_bytes * (latents.shape[2] - mine[1])) as (name, room):
                places = []
                for worker, first, end in theirs:
                    given = latents[:, :, max(0, first - back) : end].cpu()
                    place = (name, num_bytes * (first - mine[1]))
                    places.append(place)
                    self._send(worker, "decode", loader.dtype, loader.offload, place, given,
                               min(first, back), tiles, rate)
                yield from decode_latents(loader, latents, *mine, tiles, rate)
                self._finish()
                if not all(self._answers.pop(place, False) for place in places):
                    raise DeviceError(f"the file {name} of the frames was removed; generate again")
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
            self._num_open += 1
            each.send("job", order)

    def _finish(self) -> None:
        """Wait until all orders are done."""
        self._require_alive()
        with self.together():
            while self._num_open:
                self._take_messages(1.0)

    def _take_messages(self, seconds: float = 0.0) -> None:
        """Take the other ranks' messages.

        Raises:
            DeviceError: a rank failed.
            dist.DistError: a rank lost another one.
        """
        while messages := self._pool.listen(seconds):
            seconds, is_cut = 0.0, False
            for worker, (kind, *details) in messages:
                is_cut |= kind == "lost"
                if kind == "lost" and worker.process.returncode != LOST:
                    raise DeviceError(f"device {worker.number} of {self.size} failed: {details[0]}")
                if kind == "done" and details[0] is not None:
                    self._answers.update([details[0]])
                self._num_open -= kind in ("ready", "done")
            if is_cut:
                raise dist.DistError("a device lost another one")

    def _failure(self) -> str | None:
        until = time.monotonic() + GRACE_S
        while time.monotonic() < until:
            try:
                self._take_messages(0.05)
            except DeviceError as error:
                return str(error)
            except dist.DistError:
                time.sleep(0.05)
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
    return Devices(devices, device, shard=bool(shard))


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


class DeviceWorker:
    """A rank other than 0: it follows orders; each order is a method of the same name.

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
    def remember(self) -> tuple[str, bytes] | None:
        """Return the step caches' memory, pickled, on the negative group's first rank alone."""
        assert self._caches is not None
        state = self._caches.state()  # ranks that share a sequence join its parts
        if self._division.guidance == 1 or self._channel.rank != self._division.sequence:
            return None
        return "memory", pickle.dumps({name: each.cpu() for name, each in state.items()})

    def end(self) -> None:
        """Finish denoising."""
        self._sampling.close()
        self._caches = None

    def decode(
        self, dtype: torch.dtype, offload: Offload, place: tuple[str, int],
        latents: Tensor, skipped: int, tiles: Tiles | None, rate: int,
    ) -> tuple[tuple[str, int], bool] | None:
        """Decode latents [B, C, F, h, w], except the first `skipped` latent frames, to a file.

        `place` holds the file's name and the first frame's offset, in bytes; it is returned with
        True when all is written. An abandoned clip's file is removed, which ends the work.
        """
        name, start = place
        loader = self._set_up(dtype, offload)
        try:
            file = Path(name).open("r+b")  # noqa: SIM115
        except FileNotFoundError:
            return None
        with file:
            file.seek(start)
            for video in decode_latents(loader, latents, skipped, tiles=tiles, rate=rate):
                if not os.fstat(file.fileno()).st_nlink:
                    return None
                made = video.contiguous().view(-1).view(torch.uint8).cpu()
                file.write(made.numpy().data)
        return place, True

    def _set_up(self, dtype: torch.dtype, offload: Offload) -> ModelLoader:
        old = self.loader
        if old is not None and (old.dtype, old.offload) == (dtype, offload):
            return old
        if old is not None:
            old.close()
        self.loader = ModelLoader(self._folder, self._channel.device, dtype, offload,
                                  self._quantize, self._mesh)
        return self.loader
