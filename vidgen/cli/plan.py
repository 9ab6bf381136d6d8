"""`vidgen plan PROMPT`: estimate the time and memory of each stage of a generation."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING, Any

from vidgen.cli import generate
from vidgen.cli.options import Parser, given_options
from vidgen.cli.report import LONG_S, Report

if TYPE_CHECKING:
    from vidgen.pipeline.types import Estimate

DESCRIPTION = (
    "Estimate the time and memory that `vidgen generate` takes with the same options. The first "
    "call with a model measures the machine for some seconds. A clip that doesn't fit is refused, "
    "and the message names one that does."
)


def add_arguments(parser: Parser) -> None:
    """Declare generate's options."""
    generate.add_arguments(parser)


def run(args: Namespace, report: Report) -> int:
    """Estimate time and memory, after measuring the machine once, and print a table."""
    from vidgen.core.request import Loading, Request
    from vidgen.core.runtime import available_memory, best_dtype, choose_device
    from vidgen.pipeline.loader import DTYPES
    from vidgen.pipeline.plan import require_models, require_own_model, settle
    from vidgen.pipeline.policy import enforce, policy_from_environment
    from vidgen.pipeline.setups import choose
    from vidgen.pipeline.timing import known_rates, measure_rates
    from vidgen.weights.layouts import open_model
    from vidgen.weights.published import is_here, published

    request = Request(**given_options(args))
    enforce(policy_from_environment(), request)
    folder = None if is_here(args.model) else published(args.model)
    device = choose_device()
    if folder is None:
        folder = require_own_model(open_model(args.model))
    else:
        report.note(f"{folder.name} is not downloaded; the estimate is of the published model")
    require_models(request, folder)
    loading = Loading(**given_options(args, Loading))
    plan, dtype = settle(folder, request, loading.devices), loading.dtype or best_dtype(device)
    if known_rates(folder, device, DTYPES[dtype]) is None:
        report.note(f"measuring this machine with {folder.name} in {dtype}, once")
        measure_rates(folder, device, DTYPES[dtype])
    have = available_memory(device)
    made = choose(folder, plan, request, loading, device, have)
    if (args.devices or 1) > 1:
        report.note("time and memory are estimated for one device")
    report.result({**made.as_data(), "available_bytes": have, "model": folder.name,
                   "width": plan.width, "height": plan.height, "num_frames": plan.num_frames,
                   "num_steps": plan.num_steps}, _table(made, have))
    return 0


def _table(made: Estimate, have: int | None) -> str:
    from vidgen.core.runtime import size_text, time_text

    rows: list[tuple[str, float, Any]] = [(s.name, s.seconds, s.bytes) for s in made.stages]
    rows.append(("whole", made.total_s, made.peak_bytes))
    lines = [f"{name:<8} {seconds:>9.1f} s {size_text(size):>10}" for name, seconds, size in rows]
    if made.total_s > LONG_S:
        lines[-1] += f"  ({time_text(made.total_s)})"
    free = "" if have is None else f", {size_text(have)} free"
    lines.append(f"{made.kept_frames} frames with {made.setup.words}{free}")
    lines += [made.choice] if made.choice else []
    return "\n".join([*lines, *made.notes])
