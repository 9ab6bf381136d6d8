"""LoRA in training: which layers, PEFT's factors in them, and back to our adapters.

While it trains a layer is PEFT's `Linear`, whose factors are modules of their own, so that
DeepSpeed and DDP see them as they see any other; what is written is an `Adapter` as `--lora` reads.

Axes: r rank.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from vidgen.core.errors import InputError, nearest
from vidgen.models.lora import Adapter, LowRank, name_some
from vidgen.training.finetune.config import LoraSettings

_ADAPTER = "default"  # PEFT's name of a first adapter
_GROUPS = {
    "attention": (".self_attn.", ".cross_attn."),
    "all": (".self_attn.", ".cross_attn.", ".ffn."),
}


def target_paths(dit: nn.Module, targets: str | tuple[str, ...]) -> tuple[str, ...]:
    """Paths of the linear layers that get a delta; none that makes sound, as clips bring none.

    Raises:
        InputError: a part of a name that no linear layer has; names the nearest.
    """
    linear = [path for path, layer in dit.named_modules()
              if isinstance(layer, nn.Linear) and "audio" not in path]
    blocks = [path for path in linear if path.startswith(("blocks.", "control_blocks."))]
    if isinstance(targets, str):
        return tuple(path for path in blocks if any(part in path for part in _GROUPS[targets]))
    chosen = set()
    for part in targets:
        found = {path for path in linear if f".{part}." in f".{path}."}
        if not found:
            ends = {path.partition(".")[2].partition(".")[2] or path for path in linear}
            raise InputError(f"lora.targets: no linear layer is called {part!r}; give attention, "
                             f"all, or parts of layers' names: {nearest(part, ends)}")
        chosen |= found
    return tuple(path for path in linear if path in chosen)


def inject(dit: nn.Module, settings: LoraSettings) -> int:
    """Give layers a delta to learn, zero at first; all other weights are frozen.

    The first factors are drawn from torch's global generator; both are float32 whatever the
    layers' dtype is.

    Returns:
        How many layers.

    Raises:
        InputError: PEFT isn't installed, or see `target_paths`.
    """
    try:
        with _quiet():
            from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise InputError(
            "LoRA training needs the package peft; install it: pip install 'vidgen[train]'"
        ) from None
    paths = target_paths(dit, settings.targets)
    dit.requires_grad_(requires_grad=False)
    alpha = settings.rank if settings.alpha is None else settings.alpha
    config = LoraConfig(
        r=settings.rank, lora_alpha=alpha, lora_dropout=settings.dropout,
        target_modules=list(paths),
    )
    with _quiet():
        inject_adapter_in_model(config, dit)
    for parameter in dit.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    missed = {path for path in paths if not hasattr(dit.get_submodule(path), "lora_A")}
    assert not missed, f"PEFT left out {name_some(sorted(missed))}"
    return len(paths)


@contextmanager
def without_delta(dit: nn.Module) -> Iterator[None]:
    """Within the block a transformer that `inject` was called for is as it was before."""
    from peft.tuners.lora import LoraLayer

    layers = [layer for layer in dit.modules() if isinstance(layer, LoraLayer)]
    scales = [layer.scaling[_ADAPTER] for layer in layers]
    for layer in layers:
        layer.scaling[_ADAPTER] = 0.0
    try:
        yield
    finally:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scaling[_ADAPTER] = scale


def adapter_of(
    weights: Mapping[str, Tensor], settings: LoraSettings, name: str,
    tokens: Mapping[str, Tensor] | None = None,
) -> Adapter:
    """What a transformer that `inject` was called for learned, as `write_lora` takes it.

    Its weights, or its factors alone, are by name; `tokens` are embeddings learned along.
    """
    first, second = (f".lora_{side}.{_ADAPTER}.weight" for side in "AB")
    scale = (settings.rank if settings.alpha is None else settings.alpha) / settings.rank
    low_rank = {
        path: LowRank(weights[path + first], weights[path + second], scale)
        for path in (name.removesuffix(first) for name in weights if name.endswith(first))
    }
    return Adapter(name, low_rank, tokens=tokens or {})


def delta_norm(adapter: Adapter) -> float:
    """Frobenius norm of all that an adapter changes of a transformer's weights.

    |scale * up @ down|^2 is the sum of (up^T up) * (down down^T), so no product is formed.
    """
    total = 0.0
    for part in adapter.low_rank.values():
        up, down = part.up.double(), part.down.flatten(1).double()
        total += part.scale**2 * float(((up.T @ up) * (down @ down.T)).sum().clamp(min=0))
    total += sum(float(delta.double().square().sum()) for delta in adapter.deltas.values())
    return math.sqrt(total)


@contextmanager
def _quiet() -> Iterator[None]:
    """PEFT's optional back ends complain on import of what isn't used here."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
