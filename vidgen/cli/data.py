"""`vidgen data check|cache FOLDER`: check clips for fine-tuning, or encode them once."""

from __future__ import annotations

import os
from argparse import ArgumentParser, Namespace
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from vidgen.cli.report import Report
from vidgen.core.errors import InputError, nearest

if TYPE_CHECKING:
    from vidgen.training.config import DataConfig

DESCRIPTION = (
    "Check videos and pictures with captions for fine-tuning, or compute their latents once. The "
    "files are never changed. The same command continues a run that was stopped."
)


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the verb's options."""
    add = parser.add_argument
    add("action", choices=("check", "cache"), metavar="check|cache",
        help="check: report each file's content, and its bucket or the reason why it is left out; "
        "cache: encode the files that check accepts")
    add("folder", nargs="*", metavar="FOLDER", help="videos and pictures, subfolders included")
    add("-c", "--config", metavar="RUN.yaml",
        help="take settings, folders and model from a training run, or from its data part")
    add("--set", action="append", default=[], metavar="KEY=VALUE",
        help="a key of the run, such as data.sizes=832x480 or data.frames=[49, 81]; may be "
        "repeated")
    add("--model", metavar="NAME|FOLDER",
        help="the model to fine-tune; default the run's, else toybox")
    add("--workers", type=int, metavar="N",
        help="parallel processes; default one per core for check, one for cache")
    add("-o", "--output", metavar="FOLDER",
        help="cache: folder of the latents; default the run's, else FOLDER.cache")


def run(args: Namespace, report: Report) -> int:
    """Check all files, then report on them or encode them."""
    from vidgen.core.runtime import choose_device, size_text
    from vidgen.training.data.survey import as_data, as_text, open_trainable, survey

    is_check = args.action == "check"
    if args.workers is not None and args.workers < 1:
        raise InputError(f"--workers is {args.workers}; give 1 or more")
    if args.output and is_check:
        raise InputError("--output has no meaning for data check; leave it out")
    config, model = settings(args)
    folder = open_trainable(model)
    known = survey(config, folder, report, workers=args.workers or os.cpu_count() or 1)
    if is_check:
        data = as_data(known, config)
        report.result(data, as_text(data))
        return int(data["totals"]["dropped"] > 0)
    from vidgen.training.data.cache import make_cache

    for file in known.files:
        if file.dropped is not None:
            report.note(f"{file.name} is left out: {file.dropped}")
    made = make_cache(config, folder, model, known, report, workers=args.workers or 1,
                      device=choose_device().type)
    lines = [f"{name}: {why}" for name, why in made["failed"].items()]
    lines.append(
        f"{made['folder']}: {made['items']} items, {made['encoded']} of them encoded now, "
        f"{made['captions']} captions, {size_text(made['bytes'])}")
    report.result(made, "\n".join(lines))
    return int(bool(made["failed"]))


def settings(args: Namespace) -> tuple[DataConfig, str]:
    """Return the data config, from the options and a run's file, and the model's name.

    Raises:
        InputError: neither names a folder, or a setting is unknown or out of range.
    """
    from vidgen.core.config import build
    from vidgen.core.config_file import apply_overrides, load_yaml
    from vidgen.training.config import NO_CACHE, DataConfig, FinetuneConfig

    source = args.config or "data"
    given: dict[str, Any] = {} if args.config is None else load_yaml(args.config)
    if not isinstance(given.get("data"), dict):
        given = {"data": given}
    run = apply_overrides(given, args.set)
    known = [each.name for each in fields(FinetuneConfig)]
    for key in run:
        if key not in known:
            raise InputError(f"{source}: unknown key {key!r}; {nearest(key, known)}")
    data = run["data"]
    if not isinstance(data, dict):
        raise InputError(f"data is {data!r}; give a mapping, such as data.folders=clips")
    if args.folder:
        if any(each.startswith("data.folders") for each in args.set):
            raise InputError(f"FOLDER {args.folder[0]} and --set data.folders both name the data; "
                             "give one of them")
        data["folders"] = args.folder
    if not data.get("folders"):
        raise InputError("no folder was named; give FOLDER, or --config RUN.yaml that names some")
    if args.action == "cache":
        place = args.output or data.get("cache", NO_CACHE)
        if place == NO_CACHE:
            place = f"{build(DataConfig, data, source).folders[0].path.rstrip('/')}.cache"
        data["cache"] = place
    return build(DataConfig, data, source), args.model or str(run.get("model") or "toybox")
