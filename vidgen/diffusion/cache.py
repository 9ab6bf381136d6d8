"""Step caches: what a transformer's blocks add to its tokens changes little from step to step.

So at many steps it can be told from earlier ones, and the blocks needn't run. Three ways of telling
whether that is good enough, each with a threshold of which 0 means never:

    first-block   the first block runs always; where it adds about the same as when the others last
                  ran, they are taken to add the same, too (after TeaCache, Liu et al. 2024)
    magnitude     how fast the addition grows or shrinks was measured once for the model; where it
                  hardly does, it is taken for the same (MagCache, Ma et al. 2025)
    forecast      the addition is a polynomial in sigma through those computed last (after
                  TaylorSeer, Liu et al. 2025), trusted as far as its own past errors allow

The caches know no model: they see tokens, noise levels, and which branch of guidance asks.

Axes: B batch, L tokens, D width.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vidgen.core.protocols import StepCache

MAX_SKIPS = 3
RETAINED = 0.2
"""MagCache computes this share of the steps, the first ones, whatever their magnitudes."""
ORDER = 2


@dataclass(frozen=True)
class Magnitudes:
    """How the size of what a model's blocks add depends on the noise level.

    Attributes:
        sigmas: falling.
        logs: for each branch of guidance the logarithm of the size at each sigma, up to a constant.
    """

    sigmas: tuple[float, ...]
    logs: Mapping[str, tuple[float, ...]]

    def ratio(self, branch: str, sigma: float, sigma_next: float) -> float:
        """Size at `sigma_next` over that at `sigma`, interpolated between measured levels."""
        return math.exp(self._log(branch, sigma_next) - self._log(branch, sigma))

    def _log(self, branch: str, sigma: float) -> float:
        rising, logs = self.sigmas[::-1], self.logs[branch][::-1]
        sigma = min(max(sigma, rising[0]), rising[-1])
        i = max(bisect_left(rising, sigma), 1)
        share = (sigma - rising[i - 1]) / (rising[i] - rising[i - 1])
        return logs[i - 1] + share * (logs[i] - logs[i - 1])


class Memory(ABC):
    """What a cache remembers of one branch of guidance.

    Attributes:
        tensors: [B, L, D] each, in the tokens' dtype.
        numbers: the noise level of the last computed step, then the method's own.
        sigma: the noise level of the step at hand.
    """

    lead = 0

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.numbers: list[float] = []
        self.sigma = 1.0

    @abstractmethod
    def recall(self, start: Tensor, tokens: Tensor) -> Tensor | None:
        """See `StepCache`."""

    @abstractmethod
    def keep(self, tokens: Tensor) -> None:
        """See `StepCache`."""

    def forget(self) -> None:
        """Remember nothing: what comes is another model's or another clip's."""
        self.tensors, self.numbers = [], []


class FirstBlock(Memory):
    """Compares what the first block adds with what it added when all blocks last ran.

    `tensors` are what the first block added then, and what the others did.

    Args:
        threshold: mean absolute change over mean absolute value below which the others don't run.
    """

    lead = 1

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold
        self._pending: tuple[Tensor, Tensor] | None = None

    def recall(self, start: Tensor, tokens: Tensor) -> Tensor | None:
        """See `StepCache`."""
        added = _difference(tokens, start)
        if self.tensors and relative_change(added, self.tensors[0]) < self.threshold:
            return _sum(tokens, self.tensors[1])
        self._pending = (added, tokens)
        return None

    def keep(self, tokens: Tensor) -> None:
        """See `StepCache`."""
        assert self._pending is not None
        added, behind_first = self._pending
        self.tensors, self.numbers = [added, _difference(tokens, behind_first)], [self.sigma]
        self._pending = None


class WholeStack(Memory):
    """A memory of what all blocks together add."""

    def __init__(self) -> None:
        super().__init__()
        self._start: Tensor | None = None

    def recall(self, start: Tensor, tokens: Tensor) -> Tensor | None:
        """See `StepCache`."""
        added = self.expected()
        if added is not None:
            return _sum(tokens, added)
        self._start = start
        return None

    def keep(self, tokens: Tensor) -> None:
        """See `StepCache`."""
        assert self._start is not None
        self.learn(_difference(tokens, self._start))
        self._start = None

    @abstractmethod
    def expected(self) -> Tensor | None:
        """What the blocks will add at `sigma` [B, L, D]; None: they have to be asked."""

    @abstractmethod
    def learn(self, added: Tensor) -> None:
        """Hear what they added at `sigma`, [B, L, D]."""


class Magnitude(WholeStack):
    """Adds the same again while measured magnitudes say that it is nearly the same.

    The error of a step left out is taken to be |1 - ratio of magnitudes| to the last computed one;
    those of consecutive steps add up (Ma et al. 2025, eq. 7-8). `numbers` are the computed step's
    noise level, the error so far, and how many steps were left out since.

    Args:
        threshold: of the error so far.
        ratio: of magnitudes between two noise levels.
        retained: the noise level above which every step is computed.
    """

    def __init__(
        self, threshold: float, ratio: Callable[[float, float], float], retained: float
    ) -> None:
        super().__init__()
        self.threshold, self.ratio, self.retained = threshold, ratio, retained

    def expected(self) -> Tensor | None:
        """See `WholeStack`."""
        if not self.tensors or self.sigma > self.retained:
            return None
        computed, error, skips = self.numbers
        error += abs(1 - self.ratio(computed, self.sigma))
        if error >= self.threshold or skips >= MAX_SKIPS:
            return None
        self.numbers = [computed, error, skips + 1]
        return self.tensors[0]

    def learn(self, added: Tensor) -> None:
        """See `WholeStack`."""
        self.tensors, self.numbers = [added], [self.sigma, 0.0, 0.0]


class Forecast(WholeStack):
    """Lays a polynomial in sigma through the last computed additions.

    Through nodes s_j it errs by f'(order+1) / (order+1)! * prod(sigma - s_j); the first factor is
    learnt at every computed step by foretelling that, too. `numbers` are the nodes, the latest
    first, and that factor, relative to the addition; infinity before it is known.

    Args:
        threshold: expected mean absolute error over mean absolute value.
    """

    def __init__(self, threshold: float, order: int = ORDER) -> None:
        super().__init__()
        self.threshold, self.order = threshold, order

    def expected(self) -> Tensor | None:
        """See `WholeStack`."""
        *nodes, factor = self.numbers or (math.inf,)
        if factor * _node_product(self.sigma, nodes) >= self.threshold:
            return None
        return self._extrapolate(nodes)

    def learn(self, added: Tensor) -> None:
        """See `WholeStack`."""
        nodes, factor = self.numbers[:-1], math.inf
        if len(nodes) > self.order:
            error = relative_change(self._extrapolate(nodes), added)
            factor = error / _node_product(self.sigma, nodes)
        self.tensors = [added, *self.tensors][: self.order + 1]
        self.numbers = [*[self.sigma, *nodes][: self.order + 1], factor]

    def _extrapolate(self, nodes: Sequence[float]) -> Tensor:
        """Lagrange's polynomial through the nodes, at `sigma`; float32."""
        total = torch.zeros_like(self.tensors[0], dtype=torch.float32)
        for i, (node, tensor) in enumerate(zip(nodes, self.tensors, strict=True)):
            others = [other for j, other in enumerate(nodes) if j != i]
            weight = math.prod((self.sigma - other) / (node - other) for other in others)
            total.add_(tensor, alpha=weight)
        return total


class Probe(WholeStack):
    """Lets every step be computed and notes how much larger each token's addition became.

    Attributes:
        logs: (sigma, logarithm of the size, that of the first being 0) of each step
            (Ma et al. 2025, eq. 5: the ratio of a step is the mean over tokens).
    """

    def __init__(self) -> None:
        super().__init__()
        self.logs: list[tuple[float, float]] = []

    def expected(self) -> Tensor | None:
        """See `WholeStack`."""
        return None

    def learn(self, added: Tensor) -> None:
        """See `WholeStack`."""
        size, log = added.float().norm(dim=-1), 0.0
        if self.tensors:
            before = self.tensors[0].float().norm(dim=-1).clamp(min=1e-8)
            log = self.logs[-1][1] + math.log(float((size / before).mean()))
        self.logs.append((self.sigma, log))
        self.tensors = [added]


@dataclass
class StepCaches:
    """The caches of one run of a sampler, one for each branch of guidance.

    Args:
        make: a fresh one for a branch.
        boundary: the noise level where another expert takes over, of whose blocks nothing is known.

    Attributes:
        taken: for each branch the noise levels of its passes, and whether each was computed.
    """

    make: Callable[[str], Memory]
    boundary: float | None = None
    taken: dict[str, list[tuple[float, bool]]] = field(default_factory=dict)
    _memories: dict[str, Memory] = field(default_factory=dict)

    def at(self, branch: str, sigma: float) -> StepCache:
        """The cache for a branch's pass at `sigma`."""
        memory = self._memory(branch)
        before, memory.sigma = memory.numbers[:1], sigma
        if self.boundary is not None and any((s < self.boundary) != (sigma < self.boundary)
                                             for s in before):
            memory.forget()
        return _Noted(memory, self.taken.setdefault(branch, []))

    def state(self) -> dict[str, Tensor]:
        """All that is remembered, by name; `restore` takes it."""
        found = {}
        for branch, memory in self._memories.items():
            found[f"{branch}.numbers"] = torch.tensor(memory.numbers, dtype=torch.float64)
            found |= {f"{branch}.{i}": tensor for i, tensor in enumerate(memory.tensors)}
        return found

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        for branch in {name.rpartition(".")[0] for name in state}:
            memory = self._memory(branch)
            memory.numbers = state[f"{branch}.numbers"].tolist()
            count = sum(name.rpartition(".")[0] == branch for name in state) - 1
            memory.tensors = [state[f"{branch}.{i}"] for i in range(count)]

    def _memory(self, branch: str) -> Memory:
        if branch not in self._memories:
            self._memories[branch] = self.make(branch)
        return self._memories[branch]


@dataclass
class _Noted:
    """A memory for one pass, which notes what becomes of that."""

    memory: Memory
    taken: list[tuple[float, bool]]

    @property
    def lead(self) -> int:
        return self.memory.lead

    def recall(self, start: Tensor, tokens: Tensor) -> Tensor | None:
        known = self.memory.recall(start, tokens)
        self.taken.append((self.memory.sigma, known is None))
        return known

    def keep(self, tokens: Tensor) -> None:
        self.memory.keep(tokens)


def relative_change(now: Tensor, before: Tensor) -> float:
    """Mean absolute difference over the mean absolute value of `before`; infinite from zero."""
    size = before.float().abs().mean()
    return float((now.float() - before.float()).abs().mean() / size)


def _difference(tokens: Tensor, start: Tensor) -> Tensor:
    return (tokens.float() - start.float()).to(tokens.dtype)


def _sum(tokens: Tensor, added: Tensor) -> Tensor:
    return (tokens.float() + added.float()).to(tokens.dtype)


def _node_product(sigma: float, nodes: Sequence[float]) -> float:
    return math.prod(abs(sigma - node) for node in nodes)
