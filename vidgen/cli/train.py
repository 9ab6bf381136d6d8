"""`vidgen train`: fine-tune a model on your own clips."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from vidgen.cli.report import Report

DESCRIPTION = "Fine-tune toybox or a Wan model, by LoRA or all weights; see docs/howto/finetune.md."


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the verb's options."""
    add = parser.add_argument
    add("-c", "--config", required=True, metavar="RUN.yaml", help="settings of the run")
    add("--set", action="append", default=[], metavar="KEY=VALUE",
        help="a key of the config, such as run.optim.lr=1e-4; may be repeated")
    add("--resume", action="store_true", help="continue from the run's newest checkpoint")
    add("--accept-changes", action="store_true",
        help="with --resume: continue although the config, the model or the clips changed")
    add("--plan", action="store_true",
        help="estimate memory and time per rank, without weights or clips, and exit")
    add("--ranks", type=int, metavar="N",
        help="with --plan: number of processes; default those started")


def run(args: Namespace, report: Report) -> int:
    """Train or estimate; return 1 without effect or out of time, 130 if interrupted."""
    from vidgen.core.errors import InputError
    from vidgen.training.finetune.run import finetune, read_config

    if args.accept_changes and not args.resume:
        raise InputError("--accept-changes goes with --resume")
    if args.ranks is not None and (args.ranks < 1 or not args.plan):
        raise InputError(f"--ranks {args.ranks} goes with --plan, from 1; launchers start ranks")
    config = read_config(args.config, args.set)
    if args.plan:
        from dataclasses import asdict

        from vidgen.training.finetune.plan import plan

        planned = plan(config, args.ranks)
        report.result(asdict(planned), "\n".join(planned.lines()))
        return 0
    summary = finetune(config, resume=args.resume, accept_changes=args.accept_changes,
                       on_event=report)
    if summary is None:  # only one rank reports
        return 0
    report.result(summary, "\n".join(summary.get("use", [f"stopped at step {summary['step']}"])))
    if summary["finished"]:
        return 0
    return 130 if summary["interrupted"] else 1
