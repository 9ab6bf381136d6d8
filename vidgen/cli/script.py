"""`vidgen script FILM.yaml`: render the shots of a script and join them into a film."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from vidgen.cli.options import Parser, add_request_options, add_workers
from vidgen.cli.report import Report, elapsed_text
from vidgen.core.errors import InputError, VidgenError

if TYPE_CHECKING:
    from vidgen.pipeline.workers.types import WorkerOptions
    from vidgen.story.edit import Edit
    from vidgen.story.film import ShotPlan
    from vidgen.story.script import Script
    from vidgen.story.store import RenderedShot, ShotStore

DESCRIPTION = (
    "Render a script's shots and join them. Finished shots are not rendered again; one that was "
    "stopped continues."
)
EXAMPLE = "scripts/start.yaml"
OFFLOADS = ("none", "stage", "block")
"""From the most memory to the least."""


def add_arguments(parser: Parser) -> None:
    """Declare the verb's options."""
    add = parser.add_argument
    add("script", metavar="FILM", nargs="?",
        help="a script: .yaml, .json, or a list .txt of one prompt a line")
    add("-o", "--output", metavar="FILE",
        help=".mp4 .mov .webm or .mkv; default FILM.mp4; its shots are kept in FILM.shots")
    add("--check", action="store_true",
        help="check the script and estimate its time and memory; render nothing")
    add("--init", action="store_true", help="write a commented example to FILM")
    add("--only", action="append", default=[], metavar="SHOT",
        help="render this shot and those that it needs, but no film; may be repeated")
    add("--draft", action="store_true",
        help="render small shots with few steps and one take, to FILM-draft.mp4")
    add("--overwrite", action="store_true",
        help="replace an existing film; restart shots that were stopped")
    add("--storyboard", action="store_true", help="also write a page of all shots, FILM.html")
    add("--otio", action="store_true", help="also write the edit for editing programs, FILM.otio")
    add("--audio-model", metavar="FOLDER",
        help="text-to-audio model for sound and music that the script describes in words")
    add_request_options(parser, ("model", "offload", "quantize", "tiles", "dtype"))
    add_workers(parser, "shots")


def run(args: Namespace, report: Report) -> int:
    """Read and plan the script, then check or make the film."""
    from vidgen.story.script import Script

    if args.script is None:
        raise InputError("no script was named; give one, or make one with --init FILM.yaml")
    if args.init:
        return _write_example(Path(args.script), report, overwrite=args.overwrite)

    from vidgen.core.runtime import check_output
    from vidgen.media.write import CONTAINERS, check_format
    from vidgen.pipeline.policy import policy_from_environment
    from vidgen.pipeline.workers.types import WorkerOptions
    from vidgen.story.edit import make_edit
    from vidgen.story.export import check_export, export_film
    from vidgen.story.plan import enforce_film, plan_film
    from vidgen.story.sounds import describe_sounds
    from vidgen.story.store import ShotStore
    from vidgen.weights.layouts import open_model

    _check_exports(args)
    args.offload = None if args.offload == "auto" else args.offload
    workers = WorkerOptions(args.workers, args.ray, args.threads)
    script = Script.read(args.script)
    output = Path(args.output or f"{Path(args.script).stem}{'-draft' if args.draft else ''}.mp4")
    if check_format(output) not in CONTAINERS:
        raise InputError(f"output {output} must be a film: {', '.join(CONTAINERS)}")
    folder = open_model(_model(args.model, script))
    place = output.with_suffix(".shots")
    film = plan_film(script, folder, suffix=output.suffix.lower(), draft=args.draft,
                     dtype=args.dtype, quantize=args.quantize, tiles=args.tiles)
    enforce_film(policy_from_environment(), film)
    store = ShotStore(place, film)
    plans = film.needed(args.only)
    if not (args.only or film.in_film):
        raise InputError(f"{script.path}: every shot has in_film: false; a film needs one")
    describe = None if args.audio_model is None else partial(
        describe_sounds, film, model=args.audio_model, folder=place,
        offload=args.offload or "none")
    edit = None if args.only else make_edit(film, film.in_film, output, describe=describe)
    if args.check:
        return _report_plan(store, plans, workers, args, report, edit)
    wanted = [".otio"] * args.otio + [".html"] * args.storyboard
    is_done = edit is not None and check_export(edit, store, wanted, overwrite=args.overwrite)
    check_output(output, overwrite=True)  # its folder must exist for the shots, too
    start = time.monotonic()
    shots = _render(store, plans, workers, args, report)
    made = list[str]()
    if edit is not None:
        report.expect_nothing()
        made = [str(output), *map(str, export_film(
            edit, shots, wanted, report, is_done=is_done, overwrite=args.overwrite))]
    elapsed = round(time.monotonic() - start, 3)
    data = {
        "film": made[0] if made else None, "files": made[1:],
        "shots": [each.as_data() for each in shots], "elapsed_s": elapsed}
    lines = [f"{each.shot.id}: {each.path}, {each.num_frames} frames, seed {each.seed}, "
             f"{'rendered now' if each.made else 'rendered before'}" for each in shots]
    report.result(data, "\n".join([*lines, *made, elapsed_text(elapsed)]))
    return 0


def _check_exports(args: Namespace) -> None:
    named = [option for option in ("storyboard", "otio") if getattr(args, option)]
    without = [option for option in ("check", "only") if getattr(args, option)]
    if named and without:
        raise InputError(f"--{named[0]} needs a film, and --{without[0]} makes none; leave one of "
                         "them out")
    if args.otio and find_spec("opentimelineio") is None:
        raise InputError("--otio needs OpenTimelineIO; pip install 'vidgen[otio]'")


def _model(given: str | None, script: Script) -> str:
    """Return the given model, or the script's, which may be a folder relative to the script."""
    if given is not None:
        return given
    folder = script.file(Path(script.project.model))
    return str(folder) if folder.is_dir() else script.project.model


def _write_example(path: Path, report: Report, *, overwrite: bool) -> int:
    from vidgen.core.config_file import packaged_config
    from vidgen.core.runtime import atomic_write, check_output

    if path.suffix.lower() not in (".yaml", ".yml"):
        raise InputError(f"the example is YAML; call it {path.with_suffix('.yaml')}")
    check_output(path, overwrite=overwrite)
    atomic_write(path, packaged_config(EXAMPLE).read_bytes())
    report.written(path)
    report.result({"path": str(path)}, f"{path}; vidgen script {path} makes the film")
    return 0


def _render(
    store: ShotStore, plans: Sequence[ShotPlan], workers: WorkerOptions, args: Namespace,
    report: Report,
) -> list[RenderedShot]:
    from vidgen.core.runtime import choose_device
    from vidgen.pipeline.engine import load
    from vidgen.story.plan import estimates
    from vidgen.story.render import ShotWork, render_film

    film, offload, device = store.film, args.offload, choose_device()
    if parts := store.left(plans):
        made = [*estimates(film, parts, device, workers.memory(device), args.offload)]
        report.expect(made, num_clips=len(parts), parallel=not workers.is_here)
        # a worker can't see the memory of the others
        if not workers.is_here and workers.ray is None:
            offload = max((one.setup.offload for one in made), key=OFFLOADS.index)
    engine = partial(load, _model(args.model, film.script), offload=offload, **film.loading)
    try:
        with closing(ShotWork(engine, store)) as work:
            return [*render_film(work, plans, report, overwrite=args.overwrite, workers=workers)]
    except BaseException as error:
        if not isinstance(error, VidgenError) or error.exit_code != 2:
            report.note(_stopped_text(store, plans))
        raise


def _stopped_text(store: ShotStore, plans: Sequence[ShotPlan]) -> str:
    """Return the progress of a film that was stopped, with that of its unfinished clips."""
    from vidgen.pipeline.journal.job import job_facts, job_folder, progress_text

    finished = sum(store.is_done(plan) for plan in plans)
    jobs = [(plan.shot.id, job_folder(store.path(take.parts[index].key)))
            for plan, take, index in store.left(plans)]
    saved = [f"shot {name}: {progress_text(job_facts(folder))}"
             for name, folder in jobs if folder.is_dir()]
    more = f" ({'; '.join(saved)})" if saved else ""
    return f"{finished} of {len(plans)} shots finished{more}. Run the same command to continue."


def _report_plan(
    store: ShotStore, plans: Sequence[ShotPlan], workers: WorkerOptions, args: Namespace,
    report: Report, edit: Edit | None,
) -> int:
    from vidgen.core.runtime import choose_device, size_text
    from vidgen.story.plan import film_facts

    device = choose_device()
    data = film_facts(store, plans, device, have := workers.memory(device), args.offload)
    whole, (width, height) = data["film"], data["size"]
    if edit is not None:
        whole["duration_s"] = edit.facts()["duration_s"]
    lines = [
        "{id:<24} {duration_s:>7.2f} s {num_frames:>5} frames {takes:>3} takes  {status}".format(
            **row, status="finished" if row["rendered"] else
            f"{elapsed_text(row['seconds'])}, {size_text(row['peak_bytes'])}")
        for row in data["shots"]]
    free = "" if have is None else f", {size_text(have)} free"
    lines.append(
        f"{whole['duration_s']:.2f} s of {width}x{height} at {data['fps']} fps; "
        f"{whole['rendered']} of {whole['shots']} shots finished, the others take "
        f"{elapsed_text(whole['seconds'])} and {size_text(whole['peak_bytes'])}{free}")
    if not whole["measured"]:
        lines.append("estimate for a typical machine; run vidgen plan to calibrate")
    report.result(data, "\n".join([*lines, *data["notes"]]))
    return 0
