"""Sequence parallelism: over any number of ranks a transformer gives what one process gives."""

from __future__ import annotations

import importlib.util
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_ranks
from tests.tiny.test_dit import TINY, WITH_AUDIO, WITH_CONTROL, make_inputs, make_model, make_stills
from vidgen.models.dit_types import AudioTokens
from vidgen.ops.attention import attention
from vidgen.ops.parallel import Ranks, Spread, ulysses_attention

CONFIGS = {
    "full": TINY, "control": WITH_CONTROL, "audio": WITH_AUDIO, "audio-alone": WITH_AUDIO,
    "audio-behind": WITH_AUDIO,
}
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def furthest(mine: Any, other: Any) -> float:
    """The largest difference of two tensors, or of two tuples of them."""
    pairs = zip(mine, other, strict=True) if isinstance(mine, tuple) else [(mine, other)]
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


def everything() -> dict[str, float]:
    """On a rank of four: the differences to a single process, by what was compared."""
    groups = {3: dist.new_group([0, 1, 2]), 4: None}
    found: dict[str, float] = {}
    for size, group in groups.items():
        if dist.get_rank() >= size:
            continue
        ranks = Ranks(group)
        x = drawn(size, 2, 5).to(torch.bfloat16) + ranks.rank
        assert torch.equal(ranks.exchange(x), ranks.gather(x[None], 0)[:, ranks.rank])
        found[f"gradients of attention on {size}"] = attention_gradients(ranks)
        found[f"gradients of weights on {size}"] = weight_gradients(ranks)
        for name in CONFIGS:
            found[f"{name} on {size}"] = transformer(ranks, name)
    if HAS_DEEPSPEED:
        found["deepspeed"] = against_deepspeed(Ranks())
    return found


def transformer(ranks: Ranks, name: str) -> float:
    """With times of samples, frames and tokens, and all that may join; 18 tokens or 24, 6, 7."""
    config = CONFIGS[name]
    model = make_model(config)
    latents, timestep, context = make_inputs()
    options: dict[str, Any] = {"context_lengths": [5, 2]}
    if config.audio:
        options["audio"] = AudioTokens(
            drawn(2, 3, 7), timestep, 3.0, sees_video=name != "audio-alone",
            is_seen=name != "audio-behind",
        )
    if config.control_layers:
        options |= {"control": drawn(2, 5, 3, 4, 6), "control_scale": 0.7}
    else:
        valid = torch.tensor([[True], [False]])
        options["extra"] = make_stills([[1.5], [2.5]], valid)
    frames = timestep[:, None].expand(-1, 3).clone()
    frames[0, 0] = 0
    tokens = frames[:, :, None, None].expand(-1, -1, 2, 3).clone()
    tokens[1, 2, 1, 1] = 0
    with torch.no_grad():
        return max(
            furthest(model(latents, times, context, **options, ranks=ranks),
                     model(latents, times, context, **options))
            for times in (timestep, frames, tokens)
        )


def attention_gradients(ranks: Ranks) -> float:
    """5 heads and two runs of 7 and 4 tokens, neither of which divides."""
    lengths = (7, 4)
    whole = [drawn(2, 5, sum(lengths), 6, seed=i).requires_grad_() for i in range(3)]
    bias = drawn(2, 1, 1, sum(lengths), seed=4)
    weight = drawn(2, 5, sum(lengths), 6, seed=5)
    expected = attention(*whole, bias=bias)
    (expected * weight).sum().backward()
    spread = Spread(ranks, lengths)
    mine = [part.detach().clone().requires_grad_() for part in whole]

    def own(x: torch.Tensor) -> torch.Tensor:  # [B, H, L, d] to this rank's [B, H, l, d]
        runs = x.transpose(1, 2).split(lengths, dim=1)
        return torch.cat([spread.split(run) for run in runs], dim=1).transpose(1, 2)

    out = ulysses_attention(partial(attention, bias=bias), *map(own, mine), spread)
    runs = out.transpose(1, 2).split(spread.shares, dim=1)
    joined = torch.cat([spread.gather(run, i) for i, run in enumerate(runs)], dim=1).transpose(1, 2)
    (joined * weight).sum().backward()
    grads = [(a.grad, b.grad) for a, b in zip(mine, whole, strict=True)]
    return max(furthest(joined, expected), *(furthest(*pair) for pair in grads))


def weight_gradients(ranks: Ranks) -> float:
    """Of every weight, wherever it works, the ranks' mean is the gradient; also recomputed."""
    latents, timestep, context = make_inputs()
    grads = []
    for given in (None, ranks):
        model = make_model().requires_grad_()
        model.gradient_checkpointing = given is not None
        loss = model(latents, timestep, context, ranks=given, context_lengths=[5, 2])
        loss.square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for grad in grads[1]:
        dist.all_reduce(grad, group=ranks.group)
    return max(furthest(a / ranks.size, b) / max(1.0, float(b.abs().max()))
               for b, a in zip(*grads, strict=True))


def against_deepspeed(ranks: Ranks) -> float:
    """Its DistributedAttention takes tokens and heads that divide, [B, l, H, d]."""
    import deepspeed.ops
    from deepspeed.comm import init_distributed
    from deepspeed.sequence.layer import DistributedAttention

    deepspeed.ops.__compatible_ops__.clear()  # or it compiles operators for minutes
    init_distributed("gloo", auto_mpi_discovery=False, verbose=False)

    def local(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        mixed = attention(*(part.transpose(1, 2) for part in (q, k, v)))
        return mixed.transpose(1, 2).contiguous()

    theirs = DistributedAttention(local, dist.group.WORLD, scatter_idx=2, gather_idx=1)
    spread = Spread(ranks, [8 * ranks.size])
    own = [drawn(2, 8, 8, 6, seed=10 * ranks.rank + i) for i in range(3)]  # [B, H, l, d]
    expected = theirs(*(part.transpose(1, 2).contiguous() for part in own), 0)
    return furthest(ulysses_attention(attention, *own, spread), expected.transpose(1, 2))


@pytest.fixture(scope="module")
def differences() -> dict[str, float]:
    """Of all ranks the largest, from one launch."""
    answers = run_ranks(4, everything)
    return {name: max(a.get(name, 0.0) for a in answers) for name in answers[0]}


@pytest.mark.parametrize("size", [3, 4])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_transformer_over_ranks_gives_what_one_process_gives(differences, name, size):
    assert differences[f"{name} on {size}"] < 1e-5


@pytest.mark.parametrize("size", [3, 4])
@pytest.mark.parametrize("what", ["attention", "weights"])
def test_gradients_pass_through_the_exchange(differences, what, size):
    assert differences[f"gradients of {what} on {size}"] < 1e-5


@pytest.mark.skipif(not HAS_DEEPSPEED, reason="deepspeed is not installed (extra: train)")
def test_ulysses_is_deepspeeds_distributed_attention(differences):
    assert differences["deepspeed"] < 1e-6
