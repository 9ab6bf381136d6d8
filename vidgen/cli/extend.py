"""`vidgen extend CLIP`: continue a clip; its own frames stay unchanged."""

from __future__ import annotations

import math
import secrets
import time
from argparse import Namespace
from pathlib import Path

from vidgen.cli import options
from vidgen.cli.generate import one_clip
from vidgen.cli.options import Parser
from vidgen.cli.report import Report, elapsed_text
from vidgen.core.errors import InputError
from vidgen.core.request import OUTPUT, Loading, Saving, silenced
from vidgen.core.values import parse_settings

DESCRIPTION = "Continue a clip. Options that are not given are those of the clip's recipe."
OPTIONS = (
    "prompt", "negative", "seed", "steps", "guidance", "sampler", "shift", "cache", "lora",
    "settings", "last_image", "reference", "fit", "audio", "audio_loop", "say", "voice", "model",
    "dtype", "offload", "quantize", "tiles", "devices", "shard", "label", "aigc",
)


def add_arguments(parser: Parser) -> None:
    """Declare the verb's options; a request's option has no default, so the clip's value stays."""
    add = parser.add_argument
    add("clip", metavar="CLIP", help="the clip to continue, made by vidgen or not")
    add("--seconds", type=float, required=True, metavar="S", help="seconds to add")
    options.add_request_options(parser, OPTIONS, are_optional=True)
    parser.group(OUTPUT).add_argument(
        "-o", "--output", metavar="FILE", help="default CLIP-longer, in the same folder")
    options.add_resume(parser)


def run(args: Namespace, report: Report) -> int:
    """Check everything that can be checked, then generate and write."""
    from vidgen.cli.outputs import clip_facts, journals_of_outputs, resumable, seed_of
    from vidgen.core.runtime import check_output
    from vidgen.media.ending import read_ending
    from vidgen.media.write import CONTAINERS, check_format, require_sound
    from vidgen.pipeline import recorded
    from vidgen.weights.family import models_with
    from vidgen.weights.folder import ModelFolder
    from vidgen.weights.layouts import open_model

    if not 0 < args.seconds < math.inf:
        raise InputError(f"seconds is {args.seconds}; give the seconds to add, above 0")
    path = Path(args.clip)
    if path.is_dir():
        film = path.with_suffix(".mp4")
        raise InputError(f"{args.clip} is a folder of pictures, which can't be continued; give "
                         f"a film: if vidgen wrote it, vidgen replay {args.clip} -o {film}")
    ending = read_ending(args.clip)
    fps, num_frames = ending.fps, ending.num_frames
    output = args.output or str(path.with_name(f"{path.stem}-longer{path.suffix}"))
    suffix = check_format(output, num_frames + max(1, round(args.seconds * fps)), fps)
    if args.audio not in (None, "none") or args.say:
        require_sound(output, suffix)
    if Path(output).resolve() == path.resolve():
        raise InputError(f"output {output} is the clip itself; choose another name")
    check_output(output, overwrite=args.overwrite or args.resume)
    marks = Saving(**options.given_options(args, Saving)).marks
    (journal,) = journals_of_outputs([output], args, report, marks)
    given = options.given_options(args)
    del given["seconds"]  # the length of the added part, passed separately
    given["settings"] = parse_settings(args.settings or [])
    recorded_loading = {} if ending.recipe is None else recorded.own_loading(ending.recipe)
    loading = options.choose_devices(
        Loading(**recorded_loading | options.given_options(args, Loading)), [journal])
    folder = open_model(loading.model)
    if not isinstance(folder, ModelFolder):
        raise InputError(f"{loading.model} is run by diffusers; models that continue a clip: "
                         f"toybox, {', '.join(models_with('extend'))}")
    request = recorded.lengthened(args.clip, ending, given, args.seconds, folder)
    if suffix not in CONTAINERS:
        request = request.replace(**silenced(request.settings))  # the file can't hold it
    if request.seed is None:
        earlier = seed_of(journal)
        request = request.replace(seed=secrets.randbelow(2**31) if earlier is None else earlier)
        report.note(f"seed {request.seed}")

    import torch

    from vidgen.pipeline.engine import load

    start = time.monotonic()
    with resumable([journal], report):
        options.share_threads(loading.devices, torch.get_num_threads())
        engine = load(**loading.model_dump())
        clip = one_clip(engine.generate(request, on_event=report.progress,
                                        on_estimate=report.expect, journal=journal))
        if not journal.is_done:
            report.save(clip, output, overwrite=journal.overwrite)
    facts = clip_facts(clip, output, request.seed, report) | {
        "hand_over": (clip.recipe or {}).get("hand_over"),
        "elapsed_s": round(time.monotonic() - start, 3)}
    report.result(facts, "{path}: {num_frames} frames of {width}x{height} at {fps} fps, seed "
                         "{seed}, from {hand_over}\n{took}".format(
                             took=elapsed_text(facts["elapsed_s"]), **facts))
    return 0
