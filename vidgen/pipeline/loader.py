"""Load a model's networks when they are needed, and free them as `offload` requires.

A generation uses them in order: text encoder, image encoder, VAE, one transformer after the other,
VAE. "none" keeps every network, "stage" frees one before the next is loaded, and "block" also
streams the large ones from their files, with two blocks in memory at a time.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any, Literal, cast, get_args, overload

import torch
from torch import nn

from vidgen.core.errors import InputError, ModelError, nearest
from vidgen.core.runtime import available_memory, reuse_freed_memory, size_text
from vidgen.ops.quantized import Quantization, check_quantization, quantized_bytes
from vidgen.pipeline.types import Offload, Setup
from vidgen.weights.component import ExpertRole, Role, fp32_parts
from vidgen.weights.folder import few_step_parts
from vidgen.weights.load import trim_memory
from vidgen.weights.lora import read_few_step
from vidgen.weights.packed import Packed
from vidgen.weights.stream import BlockStream, block_of, blocks_of
from vidgen.weights.tensors import Weights

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from vidgen.models.audio import AudioVAE
    from vidgen.models.dit import SpacetimeDiT
    from vidgen.models.lora import Adapter
    from vidgen.models.onset_detector import OnsetDetector
    from vidgen.models.text import UMT5Encoder
    from vidgen.models.vae import CausalVAE
    from vidgen.models.verifier import Verifier
    from vidgen.weights.folder import ModelFolder

EXPERTS: tuple[ExpertRole, ...] = ("transformer", "transformer_2")
STREAMED: tuple[Role, ...] = (*EXPERTS, "text_encoder")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class ModelLoader:
    """Loads and frees a model's networks; refuses those that don't fit the memory.

    The transformers' blocks are sharded over the devices of `mesh`.

    Raises:
        InputError: an unknown option.
    """

    def __init__(
        self, folder: ModelFolder, device: torch.device, dtype: torch.dtype,
        offload: Offload = "none", quantize: Quantization | None = None,
        mesh: DeviceMesh | None = None,
    ) -> None:
        if offload not in get_args(Offload):
            raise InputError(f"offload is {offload!r}; {nearest(offload, get_args(Offload))}")
        check_quantization(quantize)
        assert mesh is None or not (quantize or offload == "block"), "refused by start_devices"
        if device.type == "cpu":
            reuse_freed_memory()
        self.folder, self.device, self.dtype = folder, device, dtype
        self.offload, self.quantize, self.mesh = offload, quantize, mesh
        self._loaded: dict[Role, nn.Module] = {}
        self._lent: dict[Role, nn.Module] = {}
        self._deltas: dict[ExpertRole, Adapter] | None = None
        self._users: Counter[Role] = Counter()
        self._lock = threading.RLock()
        self.turn = threading.RLock()  # held while a thread has adapters attached

    @overload
    def use(self, role: Literal["vae"]) -> AbstractContextManager[CausalVAE]: ...
    @overload
    def use(self, role: ExpertRole) -> AbstractContextManager[SpacetimeDiT]: ...
    @overload
    def use(self, role: Literal["text_encoder"]) -> AbstractContextManager[UMT5Encoder]: ...
    @overload
    def use(self, role: Literal["sound_vae"]) -> AbstractContextManager[AudioVAE]: ...
    @overload
    def use(self, role: Literal["verifier"]) -> AbstractContextManager[Verifier]: ...
    @overload
    def use(self, role: Literal["onset_detector"]) -> AbstractContextManager[OnsetDetector]: ...
    @overload
    def use(self, role: Role) -> AbstractContextManager[nn.Module]: ...

    @contextmanager
    def use(self, role: Role) -> Iterator[Any]:
        """Yield a network for a `with` block; load it if it isn't in memory.

        Unless `offload` is "none", the network is freed after the last block that uses it; a
        reference kept longer is an empty module. Both experts count as one role; see `expert`.

        Raises:
            ModelError: the model has no such network, its files are damaged, or it doesn't fit.
        """
        roles = EXPERTS if role in EXPERTS else (role,)
        with self._lock:
            module = self._get(role)
            self._users[roles[0]] += 1
        try:
            yield module
        finally:
            with self._lock:
                self._users[roles[0]] -= 1
                if self.offload != "none" and not self._users[roles[0]]:
                    self._drop(*roles)

    def expert(self, role: ExpertRole) -> SpacetimeDiT:
        """Return an expert inside a block of `use("transformer")`; free the other one first."""
        assert self._users[EXPERTS[0]], "call expert inside `with loader.use('transformer')`"
        with self._lock:
            return cast("SpacetimeDiT", self._get(role))

    def deltas(self) -> Mapping[ExpertRole, Adapter]:
        """Return the distilled model's weight deltas, read once; ModelError: damaged files."""
        with self._lock:
            if self._deltas is None:
                path, networks = self.folder.path, self.folder.components
                self._deltas = {part: read_few_step(path, networks[part].config, part)
                                for part in few_step_parts(path) if part in networks}
            return self._deltas

    def lend(self, role: Role, module: nn.Module) -> None:
        """Use the caller's `module`, such as one in training; the loader never frees it."""
        self._lent[role] = module

    def close(self) -> None:
        """Free every network that isn't lent."""
        with self._lock:
            self._drop(*self._loaded)

    @property
    def resident(self) -> tuple[Role, ...]:
        """Roles of the networks in memory."""
        return tuple(self._loaded)

    def dtype_of(self, role: Role, dtype: torch.dtype | None = None) -> torch.dtype:
        """Return the dtype of a network's weights: `dtype`, or else the loader's own.

        Wan's VAE has float32, as in its releases, and the sound VAE, whose spectra need it.
        """
        if role == "sound_vae" or (role == "vae" and self.folder.family != "toybox"):
            return torch.float32
        return dtype or self.dtype

    def needed_bytes(
        self, role: Role | None = None, *, offload: Offload | None = None,
        dtype: torch.dtype | None = None, quantize: Quantization | Literal["none"] | None = None,
    ) -> int:
        """Return the bytes of weights in memory while a network runs; None: the largest one."""
        offload, dtype = offload or self.offload, dtype or self.dtype
        quantize = quantize or self.quantize or "none"
        if offload != "none" and role is not None:
            return self._size(role, offload, dtype, quantize)
        sizes = [self._size(one, offload, dtype, quantize) for one in self.folder.components]
        return sum(sizes) if offload == "none" else max(sizes)

    @property
    def elsewhere_bytes(self) -> int:
        """Bytes of weights that sharding moves to other devices."""
        if self.mesh is None:
            return 0
        sizes = [self._elsewhere(self.weights(role, self.dtype))
                 for role in EXPERTS if role in self.folder.components]
        return sum(sizes) if self.offload == "none" else max(sizes)

    def check(self, role: Role | None = None) -> None:
        """Raise ModelError, with settings that fit, if a network (None: all) doesn't fit memory."""
        have = available_memory(self.device)
        if have is None:
            return
        quantize = self.quantize or "none"
        present = sum(self._size(each, self.offload, self.dtype, quantize) for each in self._loaded)
        need = self.needed_bytes(role) - (present if self.offload == "none" else 0)
        if need <= have:
            return
        setup = Setup(self.device, _NAMES[self.dtype], self.offload, self.quantize)
        fits = []
        for other in other_setups(setup):
            size = self.needed_bytes(offload=other.offload, dtype=DTYPES[other.dtype],
                                     quantize=other.quantize or "none")
            if size <= have + present:
                fits.append(f"{other.words} ({size_text(size)})")
        raise ModelError(f"{self.folder.name}'s weights need {size_text(need)} on {self.device} "
                         f"({setup.words}), {size_text(have)} are free; {remedy(fits)}")

    def _get(self, role: Role) -> Any:
        if role not in self.folder.components:
            known = ", ".join(self.folder.components)
            raise ModelError(f"{self.folder.name} has no {role}; it has {known}")
        if role in self._lent:
            return self._lent[role]
        if role not in self._loaded:
            if self.offload != "none" and role in EXPERTS:
                self._drop(*EXPERTS)
            self.check(role)
            module = self.folder.components[role].load(
                self.dtype_of(role), self.device, self.quantize,
                stream=self.offload == "block" and role in STREAMED,
                packed=role in EXPERTS and self.mesh is None,
                mesh=self.mesh if role in EXPERTS else None,
            )
            self._loaded[role] = module
        return self._loaded[role]

    def _drop(self, *roles: Role) -> None:
        for role in roles:
            module = self._loaded.pop(role, None)
            if module is not None:
                _empty(module)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        trim_memory()

    def _size(self, role: Role, offload: str, dtype: torch.dtype, quantize: str) -> int:
        weights = self.weights(role, dtype)
        if self.mesh is not None and role in EXPERTS:
            return weights.num_bytes() - self._elsewhere(weights)
        sizes = {name: weights.num_bytes([name]) for name in weights.tensors}
        if quantize != "none":
            sizes |= {name: quantized_bytes(shape) for name in sizes
                      if block_of(name) and name.endswith(".weight")
                      and len(shape := weights.shape(name)) == 2
                      and not isinstance(weights.tensors[name], Packed)}
        if offload != "block" or role not in STREAMED:
            return sum(sizes.values())
        blocks = [sum(sizes[name] for name in names) for names in blocks_of(sizes).values()]
        resident = sum(size for name, size in sizes.items() if not block_of(name))
        # plain weights are quantised once and stay in the CPU's memory
        kept = sum(blocks) if quantize != "none" and self.device.type == "cpu" else 0
        return resident + 2 * max(blocks, default=0) + kept

    def weights(self, role: Role, dtype: torch.dtype) -> Weights:
        """Return a network's weights as stored, in the dtype in which they are used."""
        component, dtype = self.folder.components[role], self.dtype_of(role, dtype)
        return Weights(component.tensors, dtype, fp32_parts(role, dtype))

    def _elsewhere(self, weights: Weights) -> int:
        """Return the bytes that other devices hold, except for the two blocks gathered here."""
        assert self.mesh is not None
        sizes = [weights.num_bytes(names) for names in blocks_of(weights.tensors).values()]
        return max(0, sum(sizes) * (self.mesh.size() - 1) // self.mesh.size() - 2 * max(sizes))


def other_setups(setup: Setup) -> Iterator[Setup]:
    """Yield the setups that need as much memory or less; those that change results come last."""
    kinds: tuple[Quantization | None, ...] = (None, "int8")
    dtypes = ["fp32", "bf16"] if setup.dtype == "fp32" else [setup.dtype]
    for quantize, dtype, offload in product(kinds, dtypes, get_args(Offload)):
        yield replace(setup, dtype=dtype, offload=offload, quantize=quantize)


def remedy(fits: Sequence[str]) -> str:
    """Return the end of a message that names settings that fit the memory."""
    if fits:
        return f"these fit: {', or '.join(fits)}"
    return "no other setting fits: free memory or use a smaller model"


def _empty(module: nn.Module) -> None:
    """Free a module's weights, even if references to the module remain."""
    stream = getattr(module, "block_stream", None)
    if isinstance(stream, BlockStream):
        stream.close()
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    away = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
                    tensors[name] = nn.Parameter(away, requires_grad=False)
