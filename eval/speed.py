"""How fast we are beside diffusers, on the same weights, in turns, on this machine.

    bash scripts/quiet python eval/speed.py -o results.json [--only NAME]... [--chart chart.png]
        [--readme README.md]                                     about 40 minutes on two cores

Each side has a process of its own; they take turns, and the table holds medians. Diffusers is taken
at its best: the faster of eager and compiled. `of peak` is the share of what matrix products, or
convolutions, reach here by themselves. Errors are those against diffusers in float64 on the same
weights, at attention scores of deviation 1 and 3. The run goes on where it was stopped.
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
from pathlib import Path
from typing import Any

import speed_cases as cases
import torch
from rich.console import Console
from torch import Tensor

from vidgen.core.runtime import atomic_write, fingerprint
from vidgen.ops import native
from vidgen.ops.attention import used_backend
from vidgen.ops.linear import packs

ERRORS = ("dit-1.5k", "dit-fp32", "decode-bf16", "decode-fp32", "encode-bf16", "encode-fp32")
SMALL = {"size": 128, "frames": 9}
"""Of a VAE's errors: float64 convolutions take minutes, and errors don't grow with the picture."""
NO_COMPILE = ("decode-bf16", "decode-fp32", "encode-bf16", "encode-fp32")
"""Diffusers' VAE keeps caches in lists of changing length, which compile anew at every chunk."""
MARKS = ("<!-- speed -->", "<!-- /speed -->")
PEAKS = {f"{kind}{dtype}" for kind in ("", "conv ") for dtype in cases.DTYPES}
console = Console(stderr=True)


class Side:
    """A process that runs one side of a case when told."""

    def __init__(self, name: str, side: str, **changes: Any) -> None:
        program = str(Path(cases.__file__))
        arguments = [name, side, str(torch.get_num_threads()), json.dumps(changes)]
        self.process = subprocess.Popen(
            [sys.executable, program, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True,
        )
        self._answer()  # it is ready

    def run(self, path: str = "") -> dict[str, float]:
        """One run: seconds and the peak so far; the result is written to `path`."""
        assert self.process.stdin
        self.process.stdin.write(f"run {path}\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, float]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line.startswith("{"):
            raise RuntimeError(f"a side ended: {self.process.args}")
        answer: dict[str, float] = json.loads(line)
        return answer

    def end(self) -> None:
        """Let the process go."""
        self.process.kill()
        self.process.wait()


def measure(name: str, case: cases.Case, repeats: int) -> dict[str, Any]:
    """Seconds of each side, in turns, and the ratio of diffusers' best to ours."""
    sides = [side for side in cases.SIDES if side != "compiled" or name not in NO_COMPILE]
    running: dict[str, Side] = {}
    try:
        for side in sides:
            running[side] = Side(name, side)
            first = running[side].run()  # compiles, and fills caches
            console.print(f"  {side}: first run {first['seconds']:.2f} s")
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(repeats):
            for side in sides:
                seconds[side].append(running[side].run()["seconds"])
    finally:
        for one in running.values():
            one.end()
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    peer = min((side for side in sides if side != "ours"), key=medians.__getitem__)
    return {
        "title": case.title, "dtype": case.dtype, "wanted": case.wanted, "seconds": seconds,
        "median_s": medians, "peer": peer, "ratio": medians[peer] / medians["ours"],
        "flops": cases.count_flops(case),
    }


def errors(name: str) -> dict[str, Any]:
    """Relative error of both sides against diffusers in float64."""
    case, found = cases.CASES[name], {}
    stds = (1.0, 3.0) if case.kind == "dit" else (None,)
    with tempfile.TemporaryDirectory() as folder:
        for std in stds:
            changes = SMALL if std is None else {"logit_std": std}
            results = {}
            for side, dtype in (("eager", "fp64"), ("ours", None), ("eager", None)):
                path = f"{folder}/{side}-{dtype}.pt"
                extra = changes if dtype is None else changes | {"dtype": dtype}
                one = Side(name, side, **extra)
                try:
                    one.run(path)
                finally:
                    one.end()
                results[side if dtype is None else "exact"] = torch.load(path).double()
            exact = results["exact"]
            found["all" if std is None else f"logit std {std:g}"] = {
                side: float((results[side] - exact).norm() / exact.norm())
                for side in ("ours", "eager")
            }
    return found


def memory() -> dict[str, Any]:
    """Peak memory of decoding 17 and 321 frames, above that before, in MB."""
    found: dict[str, Any] = {}
    for side in ("ours", "eager"):
        for frames in (17, 321):
            one = Side("memory", side, frames=frames)
            try:
                found.setdefault(side, {})[str(frames)] = one.run()["peak_mb"]
            finally:
                one.end()
    return found


def peaks() -> dict[str, float]:
    """GFLOP/s of large products and convolutions here, by dtype: what networks reach at most."""
    found = {}
    for name, dtype in cases.DTYPES.items():
        x, weight = torch.randn(1536, 1536).to(dtype), torch.randn(8960, 1536).to(dtype)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 1536)

        def multiply(x: Tensor = x, packed: Tensor = packed) -> None:
            torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")

        found[name] = 2 * 1536 * 1536 * 8960 / _median_s(multiply) / 1e9
        last = torch.channels_last_3d
        video = torch.randn(1, 192, 6, 66, 66).to(dtype).to(memory_format=last)
        kernel = torch.randn(192, 192, 3, 3, 3).to(dtype).to(memory_format=last)

        def convolve(video: Tensor = video, kernel: Tensor = kernel) -> None:
            torch.nn.functional.conv3d(video, kernel)

        found[f"conv {name}"] = 2 * 4 * 64 * 64 * 27 * 192 * 192 / _median_s(convolve) / 1e9
    return found


@torch.no_grad()
def _median_s(run: Callable[[], None]) -> float:
    times = []
    for _ in range(9):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def of_peak(results: dict[str, Any], name: str) -> dict[str, float]:
    """By side the share of the machine's peak that a case reaches; nothing where none is known."""
    one, kind = results["cases"][name], cases.CASES[name].kind
    peak = f"conv {one['dtype']}" if kind in ("decode", "encode") else one["dtype"]
    if not one["flops"] or peak not in results["peak_gflops"]:
        return {}
    rate = one["flops"] / results["peak_gflops"][peak] / 1e9
    return {side: rate / one["median_s"][side] for side in ("ours", one["peer"])}


def table(results: dict[str, Any]) -> list[str]:
    """The results as lines of Markdown."""
    lines = ["| | dtype | diffusers | vidgen | ratio | of peak |", "|---|---|---|---|---|---|"]
    for name in cases.CASES:
        if name in results["cases"]:
            one = results["cases"][name]
            ours, theirs = one["median_s"]["ours"], one["median_s"][one["peer"]]
            share = one["of_peak"]
            shown = f"{share[one['peer']]:.0%}, {share['ours']:.0%}" if share else ""
            lines.append(f"| {one['title']} | {one['dtype']} | {theirs:.2f} s ({one['peer']}) | "
                         f"{ours:.2f} s | {one['ratio']:.2f} | {shown} |")
    if "memory" in results:
        cells = [
            f"{values['321']:.0f} MB ({values['321'] / values['17']:.2f}x its 17)"
            for values in (results["memory"]["eager"], results["memory"]["ours"])
        ]
        ratio = results["memory"]["eager"]["321"] / results["memory"]["ours"]["321"]
        title = "decode 321 frames, 128x128, peak memory"
        lines.append(f"| {title} | bf16 | {cells[0]} | {cells[1]} | {ratio:.2f} | |")
    return lines


def whole_titles(titles: list[str]) -> list[str]:
    """Titles in which "the same" isn't left to the one above."""
    whole = list[str]()
    for title in titles:
        above = whole[-1] if whole else ""
        if title.startswith("the same, "):  # but for its last part
            above = above.rsplit(", ", 1)[0]
        whole.append(title.replace("the same", above, 1))
    return whole


def draw(results: dict[str, Any], path: Path) -> None:
    """A bar for each case's ratio, with a mark where it has to reach."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = [results["cases"][name] for name in cases.CASES if name in results["cases"]]
    figure, axes = pyplot.subplots(figsize=(9, 0.45 * len(found) + 1.2))
    titles = whole_titles([one["title"] for one in found])
    labels = [f"{title} ({one['dtype']})" for title, one in zip(titles, found, strict=True)]
    axes.barh(range(len(found)), [one["ratio"] for one in found], color="#3b7dd8")
    axes.set_yticks(range(len(found)), labels)
    axes.set_xlim(0, 1.1 * max(one["ratio"] for one in found))
    for row, one in enumerate(found):
        axes.plot([one["wanted"][0]] * 2, [row - 0.4, row + 0.4], color="black")
        axes.text(one["ratio"] + 0.03, row, f"{one['ratio']:.2f}", va="center", fontsize=8)
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel("times as fast as diffusers; black: the goal")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> int:
    """Run what is asked for and not there yet; write after each case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("speed.json"))
    parser.add_argument("--only", action="append", choices=[*cases.CASES, "memory", "errors"])
    parser.add_argument("--chart", type=Path)
    parser.add_argument("--readme", type=Path, help="put the table between its marks there")
    parser.add_argument("--repeats", type=int, metavar="N", help="rounds; default the case's own")
    parser.add_argument("--again", action="store_true", help="measure what is there, too")
    options = parser.parse_args()
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    machine = fingerprint() | {
        "native": native.why_not() or "yes",
        "attention": used_backend("auto", torch.device("cpu"), torch.bfloat16),
        "packed": [name for name, dtype in cases.DTYPES.items() if packs(dtype)],
    }
    results: dict[str, Any] = {"machine": machine, "cases": {}, "errors": {}}
    if options.output.is_file():
        results |= json.loads(options.output.read_text())
    wanted = options.only or [*cases.CASES, "memory", "errors"]
    if options.again or set(results.get("peak_gflops", ())) != PEAKS:
        results["peak_gflops"] = peaks()  # of now: a virtual machine's clock differs by the day

    def keep() -> None:
        atomic_write(options.output, json.dumps(results, indent=1).encode())

    for name, case in cases.CASES.items():
        if name in wanted and (options.again or name not in results["cases"]):
            console.print(f"{name}: {case.title}, {case.dtype}")
            results["cases"][name] = one = measure(
                name, case, options.repeats or case.repeats
            )
            one["of_peak"] = of_peak(results, name)
            shares = ", ".join(f"{side} {share:.0%}" for side, share in one["of_peak"].items())
            console.print(f"  {one['ratio']:.2f} times {one['peer']}, wanted {case.wanted}"
                          f"; of the peak: {shares or 'not counted'}")
            keep()
    if "memory" in wanted and (options.again or "memory" not in results):
        results["memory"] = memory()
        keep()
    for name in ERRORS if "errors" in wanted else ():
        if options.again or name not in results["errors"]:
            console.print(f"errors of {name}")
            results["errors"][name] = errors(name)
            keep()
    lines = table(results)
    print("\n".join(lines))
    if options.readme:
        text = options.readme.read_text()
        (head, rest), mark = text.split(MARKS[0], 1), MARKS[1]
        text = "\n".join([f"{head}{MARKS[0]}", *lines, f"{mark}{rest.split(mark, 1)[1]}"])
        atomic_write(options.readme, text.encode())
    if options.chart:
        draw(results, options.chart)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
