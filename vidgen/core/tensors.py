"""Plain data that holds tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor


def moved(value: Any, device: torch.device | str) -> Any:
    """Plain data with its tensors on a device."""
    return mapped(value, lambda tensor: tensor.to(device))


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Plain data with its tensors changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple | list):
        items = [mapped(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, Mapping):
        return {key: mapped(item, change) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(
            value, **{f.name: mapped(getattr(value, f.name), change) for f in fields(value)}
        )
    return value
