"""Samples a second of our training loop beside a plain diffusers and accelerate one, in turns.

    bash scripts/quiet python eval/training.py -o training.json [--rounds 5] [--steps 12]
                                                                 about 30 minutes on two cores

The same architecture, batch, optimiser and clipping on both sides, and bf16 autocast where the
processor has bf16, else float32; ours also keeps averages. `plain` and `ours` have all threads;
`one` and `two` are ours on one rank and on two, a core each, the batch of a rank the same. Each
measurement is a process of its own, and times the second half of its steps; the table holds
medians. The run goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from train.toybox.initial import init_dit
from vidgen.core.runtime import atomic_write, best_dtype, fingerprint
from vidgen.diffusion.flow import add_noise, to_timestep, velocity_loss
from vidgen.models.dit import SpacetimeDiT
from vidgen.models.dit_types import DiTConfig
from vidgen.models.presets import DIT_PRESETS
from vidgen.training.config import OptimConfig, RunConfig
from vidgen.training.engines.distributed import join_ranks
from vidgen.training.loop import train
from vidgen.training.optim import build_optimizers
from vidgen.training.task import Task

SIDES = ("plain", "ours", "one", "two")
SIZES: dict[str, tuple[DiTConfig, tuple[int, int, int]]] = {
    # Wan 1.3B's width, two of its blocks, 1,560 tokens; and one to rehearse with
    "wan": (replace(DIT_PRESETS["wan-1.3b"], num_layers=2), (5, 24, 52)),
    "tiny": (replace(DIT_PRESETS["tiny"], text_dim=16), (2, 4, 4)),
}
OPTIM = OptimConfig(lr=1e-4, warmup_steps=1, weight_decay=0.01, betas=(0.9, 0.99))
DTYPE = best_dtype(torch.device("cpu"))
console = Console(stderr=True)


def batch_of(config: DiTConfig, shape: tuple[int, int, int], step: int) -> tuple[Tensor, ...]:
    """Clean latents, noise [1, C, F, h, w], levels [1] and text [1, 64, text_dim] of a step."""
    draw = torch.Generator().manual_seed(step)
    clean, noise = torch.randn(2, 1, config.in_channels, *shape, generator=draw)
    return clean, noise, torch.rand(1, generator=draw), torch.randn(
        1, 64, config.text_dim, generator=draw)


class Random(Task):
    """Our task: velocities of random latents."""

    def __init__(self, config: DiTConfig, shape: tuple[int, int, int]) -> None:
        torch.manual_seed(0)
        self.config, self.shape = config, shape
        self.dit = SpacetimeDiT(config)
        init_dit(self.dit)
        self.modules: dict[str, nn.Module] = {"transformer": self.dit}

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """AdamW, as on the other side."""
        return build_optimizers(self.modules, OPTIM)

    def batch(self, step: int, micro: int) -> tuple[Tensor, ...]:
        """The same numbers on both sides."""
        return batch_of(self.config, self.shape, 2 * step + micro)

    def loss(self, batch: tuple[Tensor, ...], _step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared error of the velocity."""
        clean, noise, sigma, context = batch
        velocity = self.dit(add_noise(clean, noise, sigma), to_timestep(sigma), context)
        return velocity_loss(velocity, clean, noise).mean(), {}

    def validate(self, _step: int, _folder: Path) -> dict[str, float]:
        """Not what is timed."""
        return {}


def ours(config: DiTConfig, shape: tuple[int, int, int], steps: int) -> float:
    """Samples a second of our loop, of all ranks together."""
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        run = RunConfig(
            folder=folder, steps=steps, optim=OPTIM, device="cpu", dtype=DTYPE,
            log_every=steps // 2, validate_every=10 * steps,
        )
        with join_ranks(run) as place:
            shared = place.from_main(folder)
            run = replace(run, folder=str(Path(shared) / "run"))
            train(Random(config, shape), run, on_record=records.append)
            place.barrier()
    speeds = [record["samples_per_s"] for record in records if "samples_per_s" in record]
    return speeds[-1] if speeds else 0.0


def plain(config: DiTConfig, shape: tuple[int, int, int], steps: int) -> float:
    """Samples a second of the loop that diffusers' examples write."""
    from accelerate import Accelerator
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=config.num_heads, attention_head_dim=config.head_dim,
        in_channels=config.in_channels, out_channels=config.out_channels,
        text_dim=config.text_dim, ffn_dim=config.ffn_dim, num_layers=config.num_layers,
    )
    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if DTYPE == "bf16" else "no")
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=OPTIM.lr, betas=OPTIM.betas, weight_decay=OPTIM.weight_decay
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    model.train()
    begun = time.perf_counter()
    for step in range(steps):
        if step == steps // 2:
            begun = time.perf_counter()
        with accelerator.accumulate(model):
            clean, noise, sigma, context = batch_of(config, shape, 2 * step)
            noisy = add_noise(clean, noise, sigma)
            velocity = model(
                hidden_states=noisy, timestep=to_timestep(sigma), encoder_hidden_states=context,
                return_dict=False,
            )[0]
            loss = nn.functional.mse_loss(velocity.float(), noise - clean)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), OPTIM.grad_clip)
            optimizer.step()
            optimizer.zero_grad()
    return (steps - steps // 2) / (time.perf_counter() - begun)


def measure(side: str, size: str, steps: int) -> float:
    """Samples a second of a side, in processes of its own."""
    program = [str(Path(__file__)), "--side", side, "--size", size, "--steps", str(steps)]
    start = [sys.executable]
    if side == "two":
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    environment["OMP_NUM_THREADS"] = "1" if side in ("one", "two") else str(
        torch.get_num_threads())
    done = subprocess.run(
        [*start, *program], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    [line] = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return float(json.loads(line)["samples_per_s"])


def run_side(side: str, size: str, steps: int) -> None:
    """Inside a process of `measure`: print what was measured."""
    config, shape = SIZES[size]
    if side in ("one", "two"):  # a core each
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(os.environ.get("LOCAL_RANK", "0"))]})
    call: Callable[..., float] = plain if side == "plain" else ours
    speed = call(config, shape, steps)
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps({"samples_per_s": speed}))


def table(found: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, and the two ratios."""
    middle = {side: statistics.median(values) for side, values in found.items()}
    return {
        "samples_per_s": middle, "rounds": found, "fingerprint": fingerprint(),
        "dtype": DTYPE, "ours_against_plain": middle["ours"] / middle["plain"],
        "two_ranks_against_one": middle["two"] / middle["one"],
    }


def main() -> int:
    """Measure in turns, keep what was measured after each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, help="results, JSON")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12, help="of a measurement; at least 2")
    parser.add_argument("--size", choices=SIZES, default="wan")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        run_side(options.side, options.size, options.steps)
        return 0
    if options.output is None or options.steps < 2 or options.rounds < 1:
        parser.error("give -o, 2 steps or more and 1 round or more")
    partial = options.output.with_suffix(".partial.json")
    found: dict[str, list[float]] = {side: [] for side in SIDES}
    if partial.exists():
        found = json.loads(partial.read_text())
    turns = [side for index in range(options.rounds) for side in SIDES if len(found[side]) <= index]
    for side in track(turns, "training", console=console):
        found[side].append(measure(side, options.size, options.steps))
        atomic_write(partial, json.dumps(found).encode())
    results = table(found)
    atomic_write(options.output, json.dumps(results, indent=1).encode())
    partial.unlink(missing_ok=True)
    console.print(f"ours {results['ours_against_plain']:.2f} times plain, "
                  f"two ranks {results['two_ranks_against_one']:.2f} times one")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
