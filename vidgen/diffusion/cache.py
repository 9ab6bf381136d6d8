"""Step caches: what a transformer's blocks add to its tokens changes little from step to step.

So at many steps it is predicted from earlier ones, and the blocks needn't run. Three methods say
whether the prediction is good enough, each with a threshold of which 0 means never:

    first-block   the first block runs always; where it adds about the same as when the others last
                  ran, they are taken to add the same, too (after TeaCache, Liu et al. 2024)
    magnitude     how fast the addition grows or shrinks was measured once for the model; where it
                  hardly does, it is taken for the same (MagCache, Ma et al. 2025)
    forecast      the addition is a polynomial in log-SNR through those computed last (after
                  TaylorSeer, Liu et al. 2025), trusted as far as its own past errors allow

The caches know no model: they see tokens, noise levels, and which branch of guidance asks. Over
several processes each remembers its own part of the tokens, and one decides for all.

Axes: B batch, L tokens of all processes, l tokens of this one with what fills them up, D width.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vidgen.core.protocols import StepCache
from vidgen.diffusion.flow import half_log_snr
from vidgen.diffusion.guidance import PROMPT
from vidgen.ops.parallel import Spread

RETAINED = 0.2
"""Share of the steps that are always computed, the first ones: they settle the composition."""
MAX_SKIPS = 3
"""Steps left out one after the other, at most."""
ORDER = 1
MAX_SIGMA = 1 - 1e-4
"""Pure noise counts as this level: its log-SNR is infinite."""


class TokenPart:
    """The part [B, l, D] of all tokens [B, L, D] that one of several processes holds.

    Args:
        spread: how the runs of tokens lie; all its processes call a method at the same time.
    """

    def __init__(self, spread: Spread) -> None:
        self._spread = spread

    def own(self, whole: Tensor) -> Tensor:
        """This process's tokens of all, filled up with zeros."""
        runs = torch.split(whole, list(self._spread.lengths), dim=1)
        return torch.cat([self._spread.split(run) for run in runs], dim=1)

    def whole(self, own: Tensor) -> Tensor:
        """All tokens."""
        runs = torch.split(own, list(self._spread.shares), dim=1)
        return torch.cat([self._spread.gather(run, i) for i, run in enumerate(runs)], dim=1)

    def relative_change(self, now: Tensor, before: Tensor) -> float:
        """`relative_change` over all tokens: the same number in every process."""
        now, before = self._unfilled(now).double(), self._unfilled(before).double()
        sums = torch.stack([(now - before).abs().sum(), before.abs().sum()])
        change, size = self._spread.ranks.gather(sums[None], 0).sum(0)
        return float(change / size)

    def _unfilled(self, own: Tensor) -> Tensor:
        """Without the zeros that fill it up, of which blocks make something else."""
        spread, parts = self._spread, []
        runs = torch.split(own, list(self._spread.shares), dim=1)
        for run, length, share in zip(runs, spread.lengths, spread.shares, strict=True):
            parts.append(run[:, : max(0, length - spread.ranks.rank * share)])
        return torch.cat(parts, dim=1)


class Memory(ABC):
    """Memory of a cache for one branch of guidance.

    Attributes:
        tensors: [B, L, D] each, in the tokens' dtype; none before the first computed step.
        numbers: the noise level of the last computed step, then the method's own.
        sigma: the noise level of the step at hand.
        part: this process's part of the tokens; None: it holds all.
    """

    lead = 0

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.tensors: list[Tensor] = []
        self.numbers: list[float] = []
        self.sigma = 1.0
        self.part: TokenPart | None = None
        self._restored: Sequence[Tensor] = ()

    def begin(self, sigma: float, part: TokenPart | None) -> None:
        """Begin a pass at `sigma`, before any block runs."""
        self.sigma, self.part = sigma, part
        if self._restored:
            whole, self._restored = self._restored, ()
            self.tensors = [each if part is None else part.own(each) for each in whole]

    def enter(self, start: Tensor, tokens: Tensor) -> None:
        """Note what entered the stack, and what left its first `lead` blocks, at `sigma`."""
        self._start, self._tokens = start, tokens

    @abstractmethod
    def is_near(self) -> bool:
        """Whether the memory is good enough for this step; asked of the branch that decides."""

    def reuse(self) -> Tensor:
        """Return the predicted result of the last block [B, L, D]."""
        return _sum(self._tokens, self._added())

    def _added(self) -> Tensor:
        """Return what the blocks after the first `lead` are taken to add."""
        return self.tensors[0]

    @abstractmethod
    def keep(self, tokens: Tensor) -> None:
        """Note the result of the last block."""

    def forget(self) -> None:
        """Remember nothing: what comes is another model's."""
        self.tensors, self.numbers, self._restored = [], [], ()

    def whole(self) -> Sequence[Tensor]:
        """`tensors` of all processes; those of a sequence call it at the same time."""
        if self._restored or self.part is None:
            return self._restored or self.tensors
        return [self.part.whole(each) for each in self.tensors]

    def restore(self, numbers: Sequence[float], whole: Sequence[Tensor]) -> None:
        """Take back `numbers` and what `whole` gave."""
        self.numbers, self._restored = [*numbers], whole

    def change(self, now: Tensor, before: Tensor) -> float:
        """`relative_change` over the tokens of all processes."""
        measure = relative_change if self.part is None else self.part.relative_change
        return measure(now, before)


class FirstBlock(Memory):
    """Compares what the first block adds with what it added when all blocks last ran.

    `tensors` are what the first block added then, and what the others did. The threshold is of the
    mean absolute change over the mean absolute value.
    """

    lead = 1

    def is_near(self) -> bool:
        """See `Memory`."""
        added = _difference(self._tokens, self._start)
        return self.change(added, self.tensors[0]) < self.threshold

    def _added(self) -> Tensor:
        return self.tensors[1]

    def keep(self, tokens: Tensor) -> None:
        """See `Memory`."""
        added = _difference(self._tokens, self._start)
        self.tensors, self.numbers = [added, _difference(tokens, self._tokens)], [self.sigma]


@dataclass(frozen=True)
class Magnitudes:
    """Size of what a model's blocks add, by noise level.

    Attributes:
        sigmas: falling.
        logs: for each branch of guidance the logarithm of the size at each sigma, up to a constant;
            other branches are taken to be like the prompt's.
    """

    sigmas: tuple[float, ...]
    logs: Mapping[str, tuple[float, ...]]

    def ratio(self, branch: str, sigma: float, sigma_next: float) -> float:
        """Size at `sigma_next` over that at `sigma`, interpolated between measured levels."""
        return math.exp(self._log(branch, sigma_next) - self._log(branch, sigma))

    def _log(self, branch: str, sigma: float) -> float:
        rising = self.sigmas[::-1]
        logs = self.logs.get(branch, self.logs[PROMPT])[::-1]
        sigma = min(max(sigma, rising[0]), rising[-1])
        i = max(bisect_left(rising, sigma), 1)
        share = (sigma - rising[i - 1]) / (rising[i] - rising[i - 1])
        return logs[i - 1] + share * (logs[i] - logs[i - 1])


class Magnitude(Memory):
    """Adds the same again while measured magnitudes say that it is nearly the same.

    The error of a step left out is taken to be |1 - ratio of magnitudes| to the last computed one;
    those of consecutive steps add up (Ma et al. 2025, eq. 7-8), and the threshold is of the sum.
    `numbers` are the computed step's noise level and the sum.

    Args:
        threshold: see above.
        ratio: of the magnitude at the second noise level over that at the first.
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

    def keep(self, tokens: Tensor) -> None:
        """See `Memory`."""
        self.tensors, self.numbers = [_difference(tokens, self._start)], [self.sigma, 0.0]


class Forecast(Memory):
    """Lays a polynomial in log-SNR u through the last computed additions.

    Through nodes u_j it errs by f'(order+1) / (order+1)! * prod(u - u_j); the first factor is
    learnt at every computed step by predicting that, too. The threshold is of the mean absolute
    error that is expected, over the mean absolute value. `numbers` are the nodes' noise levels, the
    latest first, and the factor over that value; infinity before it is known.

    Args:
        threshold: see above.
        order: of the polynomial.
    """

    def __init__(self, threshold: float, order: int = ORDER) -> None:
        super().__init__(threshold)
        self.order = order

    def is_near(self) -> bool:
        """See `Memory`."""
        return self.numbers[-1] * self._node_product() < self.threshold

    def keep(self, tokens: Tensor) -> None:
        """See `Memory`."""
        added, nodes, factor = _difference(tokens, self._start), self.numbers[:-1], math.inf
        if len(nodes) > self.order:
            factor = self.change(self._added(), added) / self._node_product()
        self.tensors = [added, *self.tensors][: self.order + 1]
        self.numbers = [*[self.sigma, *nodes][: self.order + 1], factor]

    def _added(self) -> Tensor:
        """Lagrange's polynomial through the nodes, float32."""
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
    """Has every step computed, and notes how much larger each token's addition became.

    Attributes:
        logs: (sigma, logarithm of the size, that of the first being 0) of each step
            (Ma et al. 2025, eq. 5: the ratio of a step is the mean over tokens).
    """

    def __init__(self) -> None:
        super().__init__(0.0)
        self.logs: list[tuple[float, float]] = []

    def is_near(self) -> bool:
        """See `Memory`."""
        return False

    def keep(self, tokens: Tensor) -> None:
        """See `Memory`."""
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

    At a step the branch that comes first decides, and the others follow: guidance multiplies the
    difference of the branches, in which what is stale in both cancels out. So a step is spared only
    if all its branches remember something.

    Args:
        make: a fresh memory for a branch.
        retained: the noise level above which every step is computed.
        max_skips: how many steps in a row may be left out.
        boundary: the noise level where another expert takes over, of whose blocks nothing is known.
        branches_at: those that ask at a noise level, the one that decides first; None: who asks
            first decides, and nothing is known of the others.
        agree: what comes of this process's decision at a noise level, the same in all processes;
            one where the deciding branch doesn't ask takes part with False. None: it stands.

    Attributes:
        taken: the noise level of each step, and whether it was computed.
        memories: of each branch that has asked.
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

    def at(self, branch: str, sigma: float, part: TokenPart | None = None) -> StepCache:
        """The cache for a branch's pass at `sigma`, with the part of the tokens that it is for."""
        memory = self._memory(branch)
        memory.begin(sigma, part)
        if memory.numbers and not self._is_one_expert(memory.numbers[0], sigma):
            memory.forget()
        is_asked = self.branches_at is None or branch in self.branches_at(sigma)
        return (_Pass if is_asked else _Company)(self, branch, memory)

    def spares(self, branch: str, memory: Memory) -> bool:
        """Whether what `memory` holds is to be used in this pass."""
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
        """All that is remembered of this process's branches, by name; `restore` takes it.

        Processes that share a sequence call it at the same time, unless it is for numbers only.
        """
        found = {"skips": torch.tensor(self._skips, dtype=torch.float64)}
        for branch, memory in self.memories.items():
            found[f"{branch}.numbers"] = torch.tensor(memory.numbers, dtype=torch.float64)
            if not numbers_only:
                found |= {f"{branch}.{i}": each for i, each in enumerate(memory.whole())}
        return found

    def restore(
        self, state: Mapping[str, Tensor], branches: Collection[str] | None = None
    ) -> None:
        """Go on from what `state` gave, with the memory of some branches or of all."""
        self._skips = int(state["skips"])
        for branch in {name.rpartition(".")[0] for name in state if name != "skips"}:
            numbers = state[f"{branch}.numbers"].tolist()
            self._computed |= {branch: numbers[0]} if numbers else {}
            if branches is None or branch in branches:
                count = sum(name.rpartition(".")[0] == branch for name in state) - 1
                whole = [state[f"{branch}.{i}"] for i in range(count)]
                self._memory(branch).restore(numbers, whole)

    def _may_spare(self, asked: Sequence[str], sigma: float) -> bool:
        """Whether enough was computed, and all branches that are asked know something."""
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


@dataclass(frozen=True)
class _Pass:
    """One pass of a branch through the blocks."""

    caches: StepCaches
    branch: str
    memory: Memory

    @property
    def lead(self) -> int:
        return self.memory.lead

    def recall(self, start: Tensor, tokens: Tensor) -> Tensor | None:
        self.memory.enter(start, tokens)
        is_spared = self.caches.spares(self.branch, self.memory)
        return self.memory.reuse() if is_spared and self.memory.tensors else None

    def keep(self, tokens: Tensor) -> None:
        self.memory.keep(tokens)


class _Company(_Pass):
    """A pass that nobody asked for, run along with processes that share this one's weights.

    It runs the blocks that theirs run, and remembers nothing.
    """

    def recall(self, start: Tensor, tokens: Tensor) -> Tensor | None:  # noqa: ARG002
        return tokens if self.caches.spares(self.branch, self.memory) else None

    def keep(self, tokens: Tensor) -> None:
        pass


def relative_change(now: Tensor, before: Tensor) -> float:
    """Mean absolute difference over the mean absolute value of `before`; infinite from zero."""
    size = before.float().abs().mean()
    return float((now.float() - before.float()).abs().mean() / size)


def _difference(tokens: Tensor, start: Tensor) -> Tensor:
    return (tokens.float() - start.float()).to(tokens.dtype)


def _sum(tokens: Tensor, added: Tensor) -> Tensor:
    return (tokens.float() + added.float()).to(tokens.dtype)


def _log_snr(sigma: float) -> float:
    return half_log_snr(min(sigma, MAX_SIGMA))
