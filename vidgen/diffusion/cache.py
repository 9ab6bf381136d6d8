"""Step caches: predict the addition of a transformer's blocks to its tokens from earlier steps.

The addition changes little from step to step, so the blocks need not run at many of them. Three
methods decide whether a prediction is good enough, each with a threshold of which 0 means never:

    first-block   the first block always runs; if it adds about the same as when the others last
                  ran, they are assumed to add the same, too (after TeaCache, Liu et al. 2024)
    magnitude     the addition is assumed to be the same where its size, measured once for the
                  model, hardly changes (MagCache, Ma et al. 2025)
    forecast      the addition is a polynomial in log-SNR through the last computed ones (after
                  TaylorSeer, Liu et al. 2025), used as far as its own past errors allow

The caches know no model: they see tokens, noise levels and branches of guidance. Over several
processes each keeps its own part of the tokens, and one decides for all.

Axes: B batch, L tokens, D width.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from vidgen.core.protocols import StepCache
from vidgen.diffusion.flow import half_log_snr
from vidgen.diffusion.guidance import PROMPT
from vidgen.ops.parallel import Spread

RETAINED = 0.2
"""Share of first steps that are always computed: they settle the composition."""
MAX_SKIPS = 3
"""Most consecutive steps that are skipped."""
ORDER = 1
MAX_SIGMA = 1 - 1e-4
"""Stands for pure noise, whose log-SNR is infinite."""


class Memory(ABC):
    """Memory of a cache for one branch of guidance: its `StepCache`, one pass after the other.

    Attributes:
        tensors: [B, L, D] each, in the tokens' dtype; none before the first computed step.
        numbers: the noise level of the last computed step, then the method's own.
        sigma: the noise level of the current step.
        spread: layout of the tokens over several processes; None: this one has all.
    """

    lead = 0

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.tensors: list[Tensor] = []
        self.numbers: list[float] = []
        self.sigma = 1.0
        self.spread: Spread | None = None
        self._restored: Sequence[Tensor] = ()

    def begin(
        self, sigma: float, spread: Spread | None, spares: Callable[[], bool], *, is_used: bool
    ) -> None:
        """Begin a pass at `sigma`, before any block runs.

        `spares` returns whether the pass uses the prediction. An unused pass, of a process that
        only shares its weights, remembers nothing.
        """
        self.sigma, self.spread, self._spares, self._is_used = sigma, spread, spares, is_used
        if self._restored:
            whole, self._restored = self._restored, ()
            self.tensors = [each if spread is None else spread.split_runs(each) for each in whole]

    def recall(self, start: Tensor, tokens: Tensor) -> Tensor | None:
        """See `StepCache`."""
        if self._is_used:
            self._start, self._tokens = start, tokens
        if not self._spares():
            return None
        if not self._is_used:
            return tokens
        return (tokens.float() + self._added().float()).to(tokens.dtype) if self.tensors else None

    def keep(self, tokens: Tensor) -> None:
        """See `StepCache`."""
        if self._is_used:
            self._keep(tokens)

    @abstractmethod
    def is_near(self) -> bool:
        """Return whether the prediction is good enough for this step."""

    @abstractmethod
    def _keep(self, tokens: Tensor) -> None: ...

    def _added(self) -> Tensor:
        """Return the predicted addition of the blocks after the first `lead`."""
        return self.tensors[0]

    def forget(self) -> None:
        """Clear the memory, before steps of another model."""
        self.tensors, self.numbers, self._restored = [], [], ()

    def whole(self) -> Sequence[Tensor]:
        """Return `tensors` of all processes, which call it at the same time."""
        if self._restored or self.spread is None:
            return self._restored or self.tensors
        return [self.spread.gather_runs(each) for each in self.tensors]

    def restore(self, numbers: Sequence[float], whole: Sequence[Tensor]) -> None:
        """Restore `numbers`, and the result of `whole`."""
        self.numbers, self._restored = [*numbers], whole

    def change(self, now: Tensor, before: Tensor) -> float:
        """Return `relative_change` over the tokens of all processes."""
        spread = self.spread
        if spread is None:
            return relative_change(now, before)
        now, before = (spread.without_padding(each).double() for each in (now, before))
        sums = torch.stack([(now - before).abs().sum(), before.abs().sum()])
        change, size = spread.ranks.gather(sums[None], 0).sum(0)
        return float(change / size)


class FirstBlock(Memory):
    """Compares the first block's addition with that when all blocks last ran.

    `tensors` are the additions of the first block and of the others then. The threshold is of the
    mean absolute change over the mean absolute value.
    """

    lead = 1

    def is_near(self) -> bool:
        """See `Memory`."""
        added = _difference(self._tokens, self._start)
        return self.change(added, self.tensors[0]) < self.threshold

    def _added(self) -> Tensor:
        return self.tensors[1]

    def _keep(self, tokens: Tensor) -> None:
        added = _difference(self._tokens, self._start)
        self.tensors, self.numbers = [added, _difference(tokens, self._tokens)], [self.sigma]


@dataclass(frozen=True)
class Magnitudes:
    """Size of the addition of a model's blocks, by noise level.

    Attributes:
        sigmas: falling.
        logs: for each branch of guidance the logarithm of the size at each sigma, up to a constant;
            other branches use the prompt's.
    """

    sigmas: tuple[float, ...]
    logs: Mapping[str, tuple[float, ...]]

    def ratio(self, branch: str, sigma: float, sigma_next: float) -> float:
        """Return the size at `sigma_next` over that at `sigma`, interpolated between levels."""
        return math.exp(self._log(branch, sigma_next) - self._log(branch, sigma))

    def _log(self, branch: str, sigma: float) -> float:
        logs = self.logs.get(branch, self.logs[PROMPT])
        return float(np.interp(sigma, self.sigmas[::-1], logs[::-1]))


class Magnitude(Memory):
    """Repeats the last addition while measured magnitudes hardly change.

    The error of a skipped step is estimated as |1 - ratio of magnitudes| to the last computed one;
    those of consecutive steps add up (Ma et al. 2025, eq. 7-8), and the threshold is of the sum.
    `numbers` are the computed step's noise level and the sum. `ratio` is of the magnitude at its
    second noise level over that at its first.
    """

    def __init__(self, threshold: float, ratio: Callable[[float, float], float]) -> None:
        super().__init__(threshold)
        self.ratio = ratio

    def is_near(self) -> bool:
        """See `Memory`."""
        computed, error = self.numbers
        error += abs(1 - self.ratio(computed, self.sigma))
        self.numbers = [computed, error]
        return error < self.threshold

    def _keep(self, tokens: Tensor) -> None:
        self.tensors, self.numbers = [_difference(tokens, self._start)], [self.sigma, 0.0]


class Forecast(Memory):
    """Extrapolates the last additions by a polynomial in log-SNR u of `ORDER`.

    Its error with nodes u_j is f'(order+1) / (order+1)! * prod(u - u_j); every computed step, which
    is predicted, too, gives the first factor. The threshold is of the expected mean absolute error
    over the mean absolute value. `numbers` are the nodes' noise levels, the latest first, and the
    factor over that value, infinite before it is known.
    """

    def is_near(self) -> bool:
        """See `Memory`."""
        return self.numbers[-1] * self._node_product() < self.threshold

    def _keep(self, tokens: Tensor) -> None:
        added, nodes, factor = _difference(tokens, self._start), self.numbers[:-1], math.inf
        if len(nodes) > ORDER:
            factor = self.change(self._added(), added) / self._node_product()
        self.tensors = [added, *self.tensors][: ORDER + 1]
        self.numbers = [*[self.sigma, *nodes][: ORDER + 1], factor]

    def _added(self) -> Tensor:
        """Return Lagrange's polynomial through the nodes, float32."""
        u, nodes = _log_snr(self.sigma), [_log_snr(sigma) for sigma in self.numbers[:-1]]
        total = torch.zeros_like(self.tensors[0], dtype=torch.float32)
        for i, (node, tensor) in enumerate(zip(nodes, self.tensors, strict=True)):
            others = [other for j, other in enumerate(nodes) if j != i]
            weight = math.prod((u - other) / (node - other) for other in others)
            total.add_(tensor, alpha=weight)
        return total

    def _node_product(self) -> float:
        u = _log_snr(self.sigma)
        return math.prod(abs(u - _log_snr(sigma)) for sigma in self.numbers[:-1])


class Probe(Memory):
    """Lets every step be computed, and measures the size of its addition.

    `logs` are (sigma, logarithm of the size relative to the first) of each step (Ma et al. 2025,
    eq. 5: the ratio of a step is the mean over tokens).
    """

    def __init__(self) -> None:
        super().__init__(0.0)
        self.logs: list[tuple[float, float]] = []

    def is_near(self) -> bool:
        """See `Memory`."""
        return False

    def _keep(self, tokens: Tensor) -> None:
        added, log = _difference(tokens, self._start), 0.0
        if self.tensors:
            before = self.tensors[0].float().norm(dim=-1).clamp(min=1e-8)
            ratio = (added.float().norm(dim=-1) / before).mean()
            log = self.logs[-1][1] + math.log(float(ratio))
        self.logs.append((self.sigma, log))
        self.tensors, self.numbers = [added], [self.sigma]


@dataclass
class StepCaches:
    """The caches of one run of a sampler, one for each branch of guidance.

    At a step the first branch decides for all: guidance multiplies the difference of the branches,
    in which errors of both cancel out. So a step is skipped only if all its branches remember
    something.

    Args:
        retained: the noise level above which every step is computed.
        max_skips: most consecutive steps that are skipped.
        boundary: the noise level where another expert takes over, of whose blocks nothing is known.
        branches_at: returns the branches at a noise level, the deciding one first; None: the first
            that passes decides.
        agree: maps this process's decision at a noise level to that of all processes; a process
            without the deciding branch passes False. None: each decides.

    Attributes:
        taken: the noise level of each step, and whether it was computed.
    """

    make: Callable[[str], Memory]
    retained: float = 1.0
    max_skips: float = math.inf
    boundary: float | None = None
    branches_at: Callable[[float], Sequence[str]] | None = None
    agree: Callable[[float, bool], bool] | None = None
    taken: list[tuple[float, bool]] = field(default_factory=list)
    memories: dict[str, Memory] = field(default_factory=dict)
    _computed: dict[str, float] = field(default_factory=dict)  # the last level, of all processes
    _decided_by: str = ""
    _skips: int = 0

    def at(self, branch: str, sigma: float, spread: Spread | None = None) -> StepCache:
        """Return the cache for a branch's pass at `sigma`, of tokens over several processes."""
        memory = self._memory(branch)
        is_used = self.branches_at is None or branch in self.branches_at(sigma)
        memory.begin(sigma, spread, partial(self._spares, branch, memory), is_used=is_used)
        if memory.numbers and not self._is_one_expert(memory.numbers[0], sigma):
            memory.forget()
        return memory

    def _spares(self, branch: str, memory: Memory) -> bool:
        sigma = memory.sigma
        if not (self.taken and self.taken[-1][0] == sigma and self._decided_by != branch):
            asked = (branch,) if self.branches_at is None else self.branches_at(sigma)
            self._decided_by = branch
            near = branch == asked[0] and self._may_spare(asked, sigma) and memory.is_near()
            if self.agree is not None:
                near = self.agree(sigma, near)
            self._skips = self._skips + 1 if near else 0
            self.taken.append((sigma, not near))
            if not near:
                self._computed |= dict.fromkeys(asked, sigma)
        return not self.taken[-1][1]

    def state(self, *, numbers_only: bool = False) -> dict[str, Tensor]:
        """Return the memory of this process's branches by name, for `restore`.

        Processes that share a sequence call it at the same time, unless it is for numbers only.
        """
        found = {"skips": torch.tensor(self._skips, dtype=torch.float64)}
        for branch, memory in self.memories.items():
            found[f"{branch}.numbers"] = torch.tensor(memory.numbers, dtype=torch.float64)
            if not numbers_only:
                found |= {f"{branch}.{i}": each for i, each in enumerate(memory.whole())}
        return found

    def restore(self, state: Mapping[str, Tensor], branches: Collection[str] | None = None) -> None:
        """Restore a `state`, for some branches or for all."""
        self._skips = int(state["skips"])
        for branch in {name.rpartition(".")[0] for name in state if name != "skips"}:
            numbers = state[f"{branch}.numbers"].tolist()
            self._computed |= {branch: numbers[0]} if numbers else {}
            if branches is None or branch in branches:
                count = sum(name.rpartition(".")[0] == branch for name in state) - 1
                whole = [state[f"{branch}.{i}"] for i in range(count)]
                self._memory(branch).restore(numbers, whole)

    def _may_spare(self, asked: Sequence[str], sigma: float) -> bool:
        """Return whether enough steps were computed, for all branches that are asked."""
        return sigma <= self.retained and self._skips < self.max_skips and all(
            branch in self._computed and self._is_one_expert(self._computed[branch], sigma)
            for branch in asked
        )

    def _is_one_expert(self, sigma: float, other: float) -> bool:
        return self.boundary is None or (sigma < self.boundary) == (other < self.boundary)

    def _memory(self, branch: str) -> Memory:
        if branch not in self.memories:
            self.memories[branch] = self.make(branch)
        return self.memories[branch]


def relative_change(now: Tensor, before: Tensor) -> float:
    """Return the mean absolute difference over the mean absolute value of `before`."""
    size = before.float().abs().mean()
    return float((now.float() - before.float()).abs().mean() / size)


def _difference(tokens: Tensor, start: Tensor) -> Tensor:
    return (tokens.float() - start.float()).to(tokens.dtype)


def _log_snr(sigma: float) -> float:
    return half_log_snr(min(sigma, MAX_SIGMA))


def magnitudes_of(caches: StepCaches) -> Magnitudes:
    """Return the measurements of the probes of a whole run.

    Where guidance left a branch out, it changes as the one that ran.
    """
    probes = {b: m for b, m in caches.memories.items() if isinstance(m, Probe)}
    whole = max(probes.values(), key=lambda probe: len(probe.logs)).logs
    logs = {branch: _filled(probe.logs, whole) for branch, probe in probes.items()}
    rounded = {branch: tuple(round(log, 5) for log in each) for branch, each in logs.items()}
    return Magnitudes(tuple(round(sigma, 6) for sigma, _ in whole), rounded)


def _filled(
    logs: Sequence[tuple[float, float]], whole: Sequence[tuple[float, float]]
) -> list[float]:
    """Return logarithms at all levels of `whole`; missing ones change as those of `whole`."""
    begins = dict(whole)[logs[0][0]]
    own, made = {sigma: begins + log for sigma, log in logs}, list[float]()
    for index, (sigma, log) in enumerate(whole):
        ahead = made[-1] - whole[index - 1][1] if made else 0.0
        made.append(own.get(sigma, log + ahead))
    return made
