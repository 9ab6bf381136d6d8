"""One pass over memory for what surrounds matrix products, where no kernels of ours are: by torch.

`torch.compile` makes a kernel of such a function in seconds. Whole blocks would take it a minute
for each of the many shapes that batches of training have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made")

_is_on: ContextVar[bool] = ContextVar("fusing", default=False)


@contextmanager
def fusing(*, on: bool = True) -> Iterator[None]:
    """Inside the block fusible functions, and their gradients, are compiled at their first call.

    Needs Triton on a GPU, a C++ compiler on a CPU.
    """
    token = _is_on.set(on)
    try:
        yield
    finally:
        _is_on.reset(token)


def is_fusing() -> bool:
    """Whether this is such a block."""
    return _is_on.get()


class Fusible(Generic[Made]):
    """A function of tokens [B, L, ...] or [N, D] that is compiled once for any number of them.

    Attributes:
        plain: the function as it stands.
    """

    def __init__(self, function: Callable[..., Made]) -> None:
        self.plain = function
        self._compiled: Callable[..., Made] | None = None

    def __call__(self, *args: Any) -> Made:
        """The function's result."""
        if not is_fusing():
            return self.plain(*args)
        if self._compiled is None:
            self._compiled = torch.compile(self.plain)
        tensors = [value for value in args if isinstance(value, Tensor)]
        for value in tensors:
            for axis in range(min(2, value.ndim - 1)):
                torch._dynamo.maybe_mark_dynamic(value, axis)
        with torch.autocast(tensors[0].device.type, enabled=False):  # one case less to compile
            return self._compiled(*args)


def fusible(function: Callable[..., Made]) -> Fusible[Made]:
    """Make a function fusible."""
    return Fusible(function)
