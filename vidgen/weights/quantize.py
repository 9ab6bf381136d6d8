"""Quantise weights to int8 with torchao, one scale per row: half the memory of bfloat16.

Only linear layers inside blocks are quantised; they have nearly all weights of a large transformer.
Matrix products run in the original dtype: a layer's weight is converted while it is used.
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
    """Return the linear layers inside blocks, by path."""
    found = {name: part for name, part in module.named_modules() if isinstance(part, nn.Linear)}
    return {name: part for name, part in found.items() if block_of(f"{name}.weight")}


def quantize_layer(layer: nn.Linear, kind: Quantization = "int8") -> None:
    """Quantise one layer's weight in place; see `require_torchao` for errors."""
    if kind != "int8":
        raise InputError(f"quantize is {kind!r}; give 'int8'")
    transform, config = require_torchao(layer.weight.dtype)
    try:
        transform(layer, config)
    except Exception as error:  # mismatched versions of torch and torchao raise various errors
        raise InputError(f"{_versions()} can't quantise here ({error}); {_REMEDY}") from error


_REMEDY = "run pip install 'vidgen[quant]' for a version that works, or don't use int8"


def require_torchao(dtype: torch.dtype) -> tuple[Callable[[nn.Module, Any], None], Any]:
    """Return torchao's transform and its settings: symmetric, one scale per output row.

    Raises:
        InputError: torchao is missing or can't be imported, or the weights are float16.
    """
    if dtype == torch.float16:
        # torchao sums products before it scales them, which exceeds float16's range
        raise InputError("int8 weights overflow in fp16 products; give --dtype bf16 or fp32")
    try:
        with quiet_torchao():
            from torchao.quantization import Int8WeightOnlyConfig, quantize_
        # set_inductor_config would change torch.compile's settings for the whole process
        return quantize_, Int8WeightOnlyConfig(set_inductor_config=False)
    except ModuleNotFoundError as error:
        if error.name != "torchao":
            raise InputError(f"{_versions()} can't be imported ({error}); {_REMEDY}") from error
        raise InputError(f"int8 weights need torchao, which is not installed; {_REMEDY}") from None
    except Exception as error:
        raise InputError(f"{_versions()} can't be imported ({error}); {_REMEDY}") from error


@contextmanager
def quiet_torchao() -> Iterator[None]:
    """Silence messages about unsupported hardware and deprecations while torchao is imported.

    Importing diffusers also imports torchao, if it is installed.
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
