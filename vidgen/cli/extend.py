"""`vidgen extend CLIP`: a clip goes on; its own frames stay as they are."""

from __future__ import annotations

import math
import secrets
import time
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidgen.cli import options
from vidgen.cli.options import Parser
from vidgen.cli.report import Report
from vidgen.core.errors import InputError
from vidgen.core.request import OUTPUT, Loading, Request, Saving, silenced
from vidgen.core.values import parse_settings

if TYPE_CHECKING:
    from vidgen.cli.outputs import OutputJournal

DESCRIPTION = "Continue a clip. Options that are left out are those of the clip's recipe."
OPTIONS = (
    "prompt", "negative", "seed", "steps", "guidance", "sampler", "shift", "cache", "lora",
    "settings", "last_image", "reference", "fit", "audio", "audio_loop", "say", "voice", "model",
    "dtype", "offload", "quantize", "tiles", "devices", "shard", "label", "aigc",
)


def add_arguments(parser: Parser) -> None:
    """Declare the verb's options; those of the request are the clip's own if left out."""
    add = parser.add_argument
    add("clip", metavar="CLIP", help="the clip to continue: one of vidgen's, or any other")
    add("--seconds", type=float, required=True, metavar="S", help="seconds to add")
    options.add_request_options(parser, OPTIONS, are_optional=True)
    parser.group(OUTPUT).add_argument(
        "-o", "--output", metavar="FILE", help="default CLIP-longer, in the same folder")
    options.add_resume(parser)


def run(args: Namespace, report: Report) -> int:
    """Check everything that can be checked, then generate and write."""
    from vidgen.cli.outputs import journals_of_outputs, resumable, seed_of
    from vidgen.core.runtime import check_output
    from vidgen.media.ending import read_ending
    from vidgen.media.write import CONTAINERS, check_format, require_sound
    from vidgen.pipeline import recorded
    from vidgen.weights.folder import ModelFolder
    from vidgen.weights.layouts import open_model

    if not 0 < args.seconds < math.inf:
        raise InputError(f"seconds is {args.seconds}; give how much longer, above 0")
    path = Path(args.clip)
    if path.is_dir():
        film = path.with_suffix(".mp4")
        raise InputError(f"{args.clip} is a folder of pictures, which can't go on; give a film: "
                         f"vidgen replay {args.clip} -o {film} makes one of what vidgen wrote")
    ending = read_ending(args.clip)
    fps, size, num_frames = ending.fps, ending.size, ending.num_frames
    output = args.output or str(path.with_name(f"{path.stem}-longer{path.suffix}"))
    suffix = check_format(output, num_frames + max(1, round(args.seconds * fps)), fps)
    if args.audio not in (None, "none") or args.say:
        require_sound(output, suffix)
    if Path(output).resolve() == path.resolve():
        raise InputError(f"output {output} is the clip itself; choose another name")
    check_output(output, overwrite=args.overwrite or args.resume)
    marks = Saving(**options.given_options(args, Saving)).marks
    (journal,) = journals_of_outputs([output], args, report, marks)
    recipe = ending.recipe
    if recipe is not None and recorded.is_of_clips(recipe):
        recipe = None  # it goes on as any other clip does
    given = options.given_options(args)
    del given["seconds"]  # of the added part
    given["settings"] = parse_settings(args.settings or [])
    loading = options.given_options(args, Loading)
    if recipe is not None:
        try:
            own = recorded.own_options(recipe, args.model, args.audio)
            given = recorded.with_own_options(given, own)
            model = recipe["model"].get("source") or recipe["model"]["name"]
        except InputError as error:
            raise InputError(f"{args.clip}: {error}") from None
        began = {"model": model, "quantize": recipe.get("quantize"), "dtype": recipe.get("dtype")}
        loading = began | loading
    chosen = options.choose_devices(Loading(**loading), [journal])
    if suffix not in CONTAINERS:
        given |= silenced(given["settings"])  # none is made for nobody to hear
    if "prompt" not in given:
        raise InputError(f"{args.clip} doesn't tell its prompt; give --prompt")
    if "seed" not in given:
        earlier = seed_of(journal)
        given["seed"] = secrets.randbelow(2**31) if earlier is None else earlier
        report.note(f"seed {given['seed']}")
    if num_frames == 1 and isinstance(folder := open_model(chosen.model), ModelFolder):
        fps = recorded.rate_of_still(recipe, folder)
    length = recorded.lengthened(args.clip, num_frames, fps, args.seconds)
    with resumable([journal], report):
        return _make(given | length, size, chosen, output, journal, report)


def _make(
    asked: dict[str, Any], size: tuple[int, int], loading: Loading, output: str,
    journal: OutputJournal, report: Report,
) -> int:
    import torch

    from vidgen.cli.outputs import clip_facts
    from vidgen.pipeline.engine import load_own
    from vidgen.pipeline.recorded import at_own_size
    from vidgen.weights.family import models_with

    request = Request.of(asked.pop("prompt"), asked)
    start = time.monotonic()
    options.share_threads(loading.devices, torch.get_num_threads())
    able = f"models that go on from a clip: toybox, {', '.join(models_with('extend'))}"
    engine = load_own(loading.model, able, **loading.model_dump(exclude={"model"}))
    request = at_own_size(request, size, engine.folder)
    clip = engine.generate(request, on_event=report.progress, on_estimate=report.expect,
                           journal=journal)
    assert not isinstance(clip, list)
    if not journal.is_done:
        report.save(clip, output, overwrite=journal.overwrite)
    facts = clip_facts(clip, output, request.seed, report) | {
        "hand_over": (clip.recipe or {}).get("hand_over"),
        "elapsed_s": round(time.monotonic() - start, 3)}
    report.result(facts, "{path}: {num_frames} frames of {width}x{height} at {fps} fps, seed "
                         "{seed}, from {hand_over}\n{elapsed_s:.1f} s".format(**facts))
    return 0
