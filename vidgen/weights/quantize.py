"""Quantise weights to int8, one scale a row, by torchao: half the memory of bfloat16.

Only the linear layers inside blocks change, which are nearly all of a large transformer. Products
run in the weights' own dtype: a layer's weight is converted while it is used.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from vidgen.core.errors import InputError
from vidgen.weights.stream import block_of

Quantization = Literal["int8"]


def linears(module: nn.Module) -> dict[str, nn.Linear]:
    """Return the layers to quantise, by path: those inside blocks."""
    found = {name: part for name, part in module.named_modules() if isinstance(part, nn.Linear)}
    return {name: part for name, part in found.items() if block_of(f"{name}.weight")}


def quantize_layer(layer: nn.Linear, kind: Quantization = "int8") -> None:
    """Quantise one layer's weight in place; errors are `require_torchao`'s."""
    if kind != "int8":
        raise InputError(f"quantize is {kind!r}; the only kind is 'int8'")
    transform, config = require_torchao(layer.weight.dtype)
    try:
        transform(layer, config)
    except Exception as error:  # whatever a mismatch of versions raises
        raise InputError(f"{_versions()} can't quantise here ({error}); {_REMEDY}") from error


_REMEDY = "pip install 'vidgen[quant]' brings one that can, or go without int8"


def require_torchao(dtype: torch.dtype) -> tuple[Callable[[nn.Module, Any], None], Any]:
    """Return torchao's transform and its settings: symmetric, one scale an output row.

    Raises:
        InputError: torchao is missing or doesn't work here, or the weights are float16.
    """
    if dtype == torch.float16:
        # torchao sums the unscaled products, which leave float16's range
        raise InputError("int8 weights overflow in fp16 products; give --dtype bf16 or fp32")
    try:
        with quiet_torchao():
            from torchao.quantization import Int8WeightOnlyConfig, quantize_
        # its settings for torch.compile are process-wide
        return quantize_, Int8WeightOnlyConfig(set_inductor_config=False)
    except ModuleNotFoundError as error:
        if error.name != "torchao":
            raise InputError(f"{_versions()} can't be imported ({error}); {_REMEDY}") from error
        raise InputError(f"int8 weights need torchao, which is not installed; {_REMEDY}") from None
    except Exception as error:
        raise InputError(f"{_versions()} can't be imported ({error}); {_REMEDY}") from error


@contextmanager
def quiet_torchao() -> Iterator[None]:
    """Silence messages of torchao's import about other machines and torch's deprecations.

    diffusers imports it, too, wherever it is installed.
    """
    names = ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _versions() -> str:
    from importlib.metadata import version

    return f"torchao {version('torchao')} with torch {torch.__version__}"
