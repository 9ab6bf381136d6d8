"""Step caches: predict the residual of a transformer's blocks from earlier steps.

The residual, output minus input of the blocks, changes little from step to step, so the blocks can
be skipped at many steps. Three methods decide when, each with a threshold; 0 never skips:

    first-block   the first block always runs; if its residual is close to that of the last
                  computed step, the others' residual is reused (after TeaCache, Liu et al. 2024)
    magnitude     the residual is reused while its size, measured once for each model, hardly
                  changes (MagCache, Ma et al. 2025)
    forecast      the residual is extrapolated by a polynomial in log-SNR (after TaylorSeer, Liu et
                  al. 2025), as far as the measured error of earlier extrapolations allows

Caches are independent of the model: their inputs are tokens, noise levels and branches of guidance.
With several processes each caches its own part of the tokens, and one process decides for all.

Axes: B batch, L tokens, D width.
"""

from __future__ import annotations

import math
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from vidgen.core.protocols import OnStep, StepCache, StepInfo
from vidgen.diffusion.flow import half_log_snr
from vidgen.diffusion.guidance import PROMPT, Guidance
from vidgen.ops.parallel import Spread

RETAINED = 0.2
"""Share of the first steps that are always computed, since they determine the composition."""
MAX_SKIPS = 3
"""Largest number of consecutive skipped steps."""
ORDER = 1
MAX_SIGMA = 1 - 1e-4
"""Noise level used for pure noise, whose log-SNR is infinite."""
TENSORS_HELD = {"none": 0, "first-block": 2, "magnitude": 1, "forecast": 1 + ORDER}
"""Number of tensors of the tokens' size that each method keeps for each branch of guidance."""


class Memory(ABC):
    """Cached values of one branch of guidance; implements `StepCache` for each of its passes."""

    lead = 0

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.tensors: list[Tensor] = []  # [B, L, D], in the tokens' dtype, after a computed step
        self.numbers: list[float] = []  # sigma of the last computed step, then the method's own
        self.sigma = 1.0  # of the current step
        self.spread: Spread | None = None  # layout of the tokens over processes; None: one has all
        self._restored: Sequence[Tensor] = ()

    def begin(
        self, sigma: float, spread: Spread | None, spares: Callable[[], bool], *, is_used: bool
    ) -> None:
        """Begin a pass at `sigma`; `spares` returns whether it uses the prediction.

        `is_used` is False for a process that only shares its weights; it caches nothing.
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
        """Return whether the prediction is accurate enough for this step."""

    @abstractmethod
    def _keep(self, tokens: Tensor) -> None: ...

    def _added(self) -> Tensor:
        """Return the predicted residual of the blocks after the first `lead`."""
        return self.tensors[0]

    def forget(self) -> None:
        """Clear all values, before steps of another expert."""
        self.tensors, self.numbers, self._restored = [], [], ()

    def whole(self) -> Sequence[Tensor]:
        """Return `tensors` joined from all processes, which must call this together."""
        if self._restored or self.spread is None:
            return self._restored or self.tensors
        return [self.spread.gather_runs(each) for each in self.tensors]

    def restore(self, numbers: Sequence[float], whole: Sequence[Tensor]) -> None:
        """Restore `numbers`, and the result of `whole`."""
        self.numbers, self._restored = [*numbers], whole

    def change(self, now: Tensor, before: Tensor) -> float:
        """Return `relative_change` over all processes' tokens; all must call it together."""
        spread = self.spread
        if spread is None:
            return relative_change(now, before)
        now, before = (spread.without_padding(each).double() for each in (now, before))
        sums = torch.stack([(now - before).abs().sum(), before.abs().sum()])
        change, size = spread.ranks.gather(sums[None], 0).sum(0)
        return float(change / size)


class FirstBlock(Memory):
    """Cache that skips blocks while the residual of the first block hardly changes.

    `tensors` are the residuals of the first block and of the others at the last computed step. The
    threshold applies to the first one's mean absolute change over its mean absolute value.
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
    """Measured size of the residual of a model's blocks, by noise level."""

    sigmas: tuple[float, ...]  # decreasing
    # logarithm of the size at each sigma, up to a constant, by branch of guidance; other branches
    # use that of the prompt
    logs: Mapping[str, tuple[float, ...]]

    def ratio(self, branch: str, sigma: float, sigma_next: float) -> float:
        """Return the interpolated size at `sigma_next` divided by that at `sigma`."""
        return math.exp(self._log(branch, sigma_next) - self._log(branch, sigma))

    def _log(self, branch: str, sigma: float) -> float:
        logs = self.logs.get(branch, self.logs[PROMPT])
        return float(np.interp(sigma, self.sigmas[::-1], logs[::-1]))


class Magnitude(Memory):
    """Cache that reuses the last residual while its measured magnitude hardly changes.

    The error of a skipped step is estimated as |1 - ratio of magnitudes| to the last computed step;
    the threshold applies to the sum over consecutive skipped steps (Ma et al. 2025, eq. 7-8), the
    second of `numbers`. `ratio` divides the magnitude at its second noise level by that at its
    first.
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
    """Cache that extrapolates residuals by a polynomial in log-SNR u, of order `ORDER`.

    The error with nodes u_j is f'(order+1) / (order+1)! * prod(u - u_j). Computed steps are
    predicted as well, which measures the first factor. The threshold applies to the expected mean
    absolute error over the mean absolute value. `numbers` are the noise levels of the nodes, the
    latest first, and the relative first factor, infinite until it is measured.
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
        """Evaluate the Lagrange polynomial through the nodes, in float32."""
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
    """Cache that skips nothing and measures the size of each step's residual.

    `logs` are pairs (sigma, logarithm of the size relative to the first step); the ratio between
    steps is the mean over tokens (Ma et al. 2025, eq. 5).
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
    """Step caches of one sampling run, one for each branch of guidance.

    The first branch of a step decides for all: guidance multiplies the difference of the branches,
    where equal errors cancel. A step is skipped only if all its branches have cached values.
    """

    make: Callable[[str], Memory]  # creates the cache of a branch
    retained: float = 1.0  # noise level above which every step is computed
    max_skips: float = math.inf  # largest number of consecutive skipped steps
    boundary: float | None = None  # below it another expert runs, with residuals of its own
    # branches at a noise level, the deciding one first; None: the first one that runs decides
    branches_at: Callable[[float], Sequence[str]] | None = None
    # maps this process's decision at a noise level to that of all processes; a process without the
    # deciding branch passes False; None: this process decides alone
    agree: Callable[[float, bool], bool] | None = None
    taken: list[tuple[float, bool]] = field(default_factory=list)  # sigma, whether computed
    memories: dict[str, Memory] = field(default_factory=dict)
    _computed: dict[str, float] = field(default_factory=dict)  # last computed level by branch
    _decided_by: str = ""
    _skips: int = 0

    def at(self, branch: str, sigma: float, spread: Spread | None = None) -> StepCache:
        """Return the cache for a branch's pass at `sigma`; `spread` is its token layout."""
        memory = self._memory(branch)
        is_used = self.branches_at is None or branch in self.branches_at(sigma)
        # without a reference back, so that tensors are freed with the run, not by the collector
        spares = partial(StepCaches._spares, weakref.proxy(self), branch)
        memory.begin(sigma, spread, spares, is_used=is_used)
        if memory.numbers and not self._is_one_expert(memory.numbers[0], sigma):
            memory.forget()
        return memory

    def _spares(self, branch: str) -> bool:
        memory = self.memories[branch]
        sigma = memory.sigma
        if not (self.taken and self.taken[-1][0] == sigma and self._decided_by != branch):
            branches = (branch,) if self.branches_at is None else self.branches_at(sigma)
            self._decided_by = branch
            near = branch == branches[0] and self._may_skip(branches, sigma) and memory.is_near()
            if self.agree is not None:
                near = self.agree(sigma, near)
            self._skips = self._skips + 1 if near else 0
            self.taken.append((sigma, not near))
            if not near:
                self._computed |= dict.fromkeys(branches, sigma)
        return not self.taken[-1][1]

    def state(self, *, numbers_only: bool = False) -> dict[str, Tensor]:
        """Return the values of this process's branches by name, for `restore`.

        Processes that share a sequence must call this together, unless with `numbers_only`.
        """
        found = {"skips": torch.tensor(self._skips, dtype=torch.float64)}
        for branch, memory in self.memories.items():
            found[f"{branch}.numbers"] = torch.tensor(memory.numbers, dtype=torch.float64)
            if not numbers_only:
                found |= {f"{branch}.{i}": each for i, each in enumerate(memory.whole())}
        return found

    def restore(self, state: Mapping[str, Tensor], branches: Collection[str] | None = None) -> None:
        """Restore a `state` for the given branches; None: all."""
        self._skips = int(state["skips"])
        for branch in {name.rpartition(".")[0] for name in state if name != "skips"}:
            numbers = state[f"{branch}.numbers"].tolist()
            self._computed |= {branch: numbers[0]} if numbers else {}
            if branches is None or branch in branches:
                count = sum(name.rpartition(".")[0] == branch for name in state) - 1
                whole = [state[f"{branch}.{i}"] for i in range(count)]
                self._memory(branch).restore(numbers, whole)

    def _may_skip(self, branches: Sequence[str], sigma: float) -> bool:
        """Return whether enough steps were computed for all these branches."""
        return sigma <= self.retained and self._skips < self.max_skips and all(
            branch in self._computed and self._is_one_expert(self._computed[branch], sigma)
            for branch in branches
        )

    def _is_one_expert(self, sigma: float, other: float) -> bool:
        return self.boundary is None or (sigma < self.boundary) == (other < self.boundary)

    def _memory(self, branch: str) -> Memory:
        if branch not in self.memories:
            self.memories[branch] = self.make(branch)
        return self.memories[branch]


@dataclass(frozen=True)
class CacheChoice:
    """A step cache's method and threshold."""

    method: str  # "first-block", "magnitude" or "forecast"
    threshold: float  # 0 computes every step
    magnitudes: Magnitudes | None = None  # the model's, for "magnitude"


def make_caches(
    choice: CacheChoice | None, sigmas: Tensor, guidance: Guidance
) -> StepCaches | None:
    """Return the caches of one run of a sampler over `sigmas` [num_steps + 1]."""
    if choice is None:
        return None
    count = len(sigmas) - 1
    retained = float(sigmas[min(round(RETAINED * count), count)])
    return StepCaches(partial(_memory, choice), retained, MAX_SKIPS, guidance.boundary or None,
                      guidance.branches_at)


def _memory(choice: CacheChoice, branch: str) -> Memory:
    if choice.method == "first-block":
        return FirstBlock(choice.threshold)
    if choice.method == "forecast":
        return Forecast(choice.threshold)
    assert choice.magnitudes is not None
    return Magnitude(choice.threshold, partial(choice.magnitudes.ratio, branch))


def carrying(remember: Callable[[], Mapping[str, Tensor]], on_step: OnStep) -> OnStep:
    """Wrap `on_step` so that each step's state includes the caches' memory."""
    def with_memory(info: StepInfo) -> None:
        on_step(replace(info, state=replace(info.state, cache=remember())))

    return with_memory


def relative_change(now: Tensor, before: Tensor) -> float:
    """Return the mean absolute difference divided by the mean absolute value of `before`."""
    size = before.float().abs().mean()
    return float((now.float() - before.float()).abs().mean() / size)


def _difference(tokens: Tensor, start: Tensor) -> Tensor:
    return (tokens.float() - start.float()).to(tokens.dtype)


def _log_snr(sigma: float) -> float:
    return half_log_snr(min(sigma, MAX_SIGMA))


def magnitudes_of(caches: StepCaches) -> Magnitudes:
    """Return the measurements of the probes of a complete run.

    A branch is assumed to change like the longest one at steps where guidance didn't run it.
    """
    probes = {b: m for b, m in caches.memories.items() if isinstance(m, Probe)}
    whole = max(probes.values(), key=lambda probe: len(probe.logs)).logs
    logs = {branch: _filled(probe.logs, whole) for branch, probe in probes.items()}
    rounded = {branch: tuple(round(log, 5) for log in each) for branch, each in logs.items()}
    return Magnitudes(tuple(round(sigma, 6) for sigma, _ in whole), rounded)


def _filled(
    logs: Sequence[tuple[float, float]], whole: Sequence[tuple[float, float]]
) -> list[float]:
    """Return logarithms at all levels of `whole`; missing ones follow the changes of `whole`."""
    begins = dict(whole)[logs[0][0]]
    own, made = {sigma: begins + log for sigma, log in logs}, list[float]()
    for index, (sigma, log) in enumerate(whole):
        ahead = made[-1] - whole[index - 1][1] if made else 0.0
        made.append(own.get(sigma, log + ahead))
    return made
