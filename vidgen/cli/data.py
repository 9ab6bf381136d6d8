"""`vidgen data check|cache FOLDER`: videos and pictures for fine-tuning, and their latents."""

from __future__ import annotations

import os
import re
from argparse import ArgumentParser, Namespace
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from vidgen.cli.report import Report
from vidgen.core.errors import InputError, nearest

if TYPE_CHECKING:
    from vidgen.training.data.config import DataConfig
    from vidgen.training.data.select import Selection
    from vidgen.weights.folder import ModelFolder

DESCRIPTION = (
    "Check videos and pictures with captions for fine-tuning, or compute their latents once. The "
    "files are never written to. A run that was stopped goes on when it is called again."
)


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the verb's options."""
    add = parser.add_argument
    add("action", choices=("check", "cache"), metavar="check|cache",
        help="check: what each file holds, and which bucket it lands in or why in none; "
        "cache: encode all that check lets through")
    add("folder", nargs="*", metavar="FOLDER", help="of videos and pictures, with all below it")
    add("-c", "--config", metavar="RUN.yaml",
        help="take settings, folders and model from a training run, or from its data part alone")
    add("--set", action="append", default=[], metavar="KEY=VALUE",
        help="a key of the run, such as model=FOLDER or data.windows=all, whose data. may be left "
        "out; may be repeated")
    add("--model", metavar="NAME|FOLDER", help="to be fine-tuned; default the run's, else toybox")
    add("--size", action="append", default=[], metavar="WxH",
        help="of a bucket; may be repeated; default the model's own sizes")
    add("--frames", action="append", type=int, default=[], metavar="N",
        help="length of clips; may be repeated: the longest that fits is taken; default the "
        "model's")
    add("--fps", metavar="F", help="at which clips are shown; default the model's")
    add("--workers", type=int, metavar="N",
        help="processes beside each other; default one a core for check, one for cache")
    add("--html", metavar="FILE", help="check: also write a page with thumbnails")
    add("-o", "--output", metavar="FOLDER", help="cache: default the run's, else FOLDER.cache")
    add("--device", metavar="D", help="cache: cpu, cuda or auto; default auto")
    add("--overwrite", action="store_true", help="replace an existing page")


def run(args: Namespace, report: Report) -> int:
    """Look at all files; report on them, or encode them."""
    from vidgen.training.data.survey import open_trainable, survey

    _refuse_others(args)
    config, model = settings(args)
    folder = open_trainable(model)
    if args.html is not None:
        from vidgen.core.runtime import check_output

        check_output(args.html, overwrite=args.overwrite)
    known = survey(config, folder, report, workers=args.workers or os.cpu_count() or 1)
    if args.action == "check":
        return _tell(known, config, args, report)
    return _cache(known, config, folder, model, args, report)


def _refuse_others(args: Namespace) -> None:
    if args.workers is not None and args.workers < 1:
        raise InputError(f"--workers is {args.workers}; give 1 or more")
    foreign = {"check": ("output", "device"), "cache": ("html", "overwrite")}[args.action]
    for name in foreign:
        if getattr(args, name):
            raise InputError(f"--{name} has no meaning for data {args.action}; leave it out")


def settings(args: Namespace) -> tuple[DataConfig, str]:
    """Return the config of options and a run's file together, and the model.

    Raises:
        InputError: neither names a folder, or a setting can't be.
    """
    from vidgen.core.config import build
    from vidgen.core.config_file import load_run
    from vidgen.training.data.config import NO_CACHE, DataConfig

    given: dict[str, Any] = {} if args.config is None else load_run(args.config)
    given = given if isinstance(given.get("data"), dict) else {"data": given}
    run = _overridden(given, args.set, args.config or "data")
    model, told = args.model or str(run.get("model") or "toybox"), run["data"]
    if args.folder and any(re.match(r"(data\.)?folders\b", override) for override in args.set):
        raise InputError(f"FOLDER {args.folder[0]} and --set data.folders both name the data; give "
                         "one of them")
    options = {"folders": args.folder, "sizes": args.size, "frames": args.frames}
    told |= {name: value for name, value in options.items() if value}
    if args.fps is not None:
        told["fps"] = args.fps
    if args.size:
        told.pop("area", None)
    if not told.get("folders"):
        raise InputError("no folder was named; give FOLDER, or --config RUN.yaml that names some")
    if args.action == "cache":
        place = args.output or told.get("cache", NO_CACHE)
        if place == NO_CACHE:
            first = build(DataConfig, told, args.config or "data").folders[0].path
            place = f"{str(first).rstrip('/')}.cache"
        told["cache"] = place
    return build(DataConfig, told, args.config or "data"), model


def _overridden(given: dict[str, Any], overrides: list[str], where: str) -> dict[str, Any]:
    """Return a run with keys overridden, as by `vidgen train`; `data.` may be left out."""
    from vidgen.core.config import build
    from vidgen.core.config_file import apply_overrides
    from vidgen.training.data.config import DataConfig
    from vidgen.training.finetune.config import FinetuneConfig

    own, data = ({each.name for each in fields(kind)} for kind in (FinetuneConfig, DataConfig))
    keys = [re.split("[.=]", override)[0] for override in overrides]
    for key, override in zip(keys, overrides, strict=True):
        if key not in own | data:
            raise InputError(f"override {override!r}: unknown key {key!r}; "
                             f"{nearest(key, own | data)}")
    run = apply_overrides(given, [override if key in own else f"data.{override}"
                                  for key, override in zip(keys, overrides, strict=True)])
    if not isinstance(run["data"], dict):
        raise InputError(f"data is {run['data']!r}; give a mapping, such as data.folders=clips")
    if own.intersection(keys) - {"data", "model"}:  # without effect here, yet checked
        build(FinetuneConfig, run, where)
    return run


def _tell(known: Selection, config: DataConfig, args: Namespace, report: Report) -> int:
    from vidgen.training.data.report import as_data, as_text

    told = as_data(known, config)
    if args.html is not None:
        from vidgen.core.runtime import atomic_write
        from vidgen.training.data.report import page

        atomic_write(args.html, page(told, known.fates).encode())
        report({"event": "written", "path": args.html})
    report.result(told, "" if args.json else as_text(told))
    return int(told["totals"]["dropped"] > 0)


def _cache(
    known: Selection, config: DataConfig, folder: ModelFolder, model: str, args: Namespace,
    report: Report,
) -> int:
    from vidgen.core.runtime import choose_device, size_text
    from vidgen.training.data.cache import make_cache

    for fate in known.fates:
        if fate.dropped is not None:
            report({"event": "note", "text": f"{fate.file.name} is left out: {fate.dropped}"})
    made = make_cache(config, folder, model, known, report, workers=args.workers or 1,
                      device=choose_device(args.device or "auto").type)
    lines = [f"{name}: {why}" for name, why in made["failed"].items()]
    lines.append(
        f"{made['folder']}: {made['items']} items, {made['encoded']} of them encoded now, "
        f"{made['captions']} captions, {size_text(made['bytes'])}")
    report.result(made, "\n".join(lines))
    return int(bool(made["failed"]))
