"""`vidgen extend CLIP`: a clip goes on; its own frames stay as they are."""

from __future__ import annotations

import math
import secrets
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidgen.cli.generate import add_sound, judged
from vidgen.cli.options import add_devices, add_settings, add_tiles, choose_devices, share_threads
from vidgen.cli.outputs import (
    add_resume,
    as_it_began,
    journals_of_outputs,
    seed_of,
    told_how_to_go_on,
)
from vidgen.cli.report import Report
from vidgen.core.errors import InputError
from vidgen.core.request import LOADING, Request, silenced
from vidgen.core.values import parse_settings

if TYPE_CHECKING:
    from vidgen.cli.journals import OutputJournal
    from vidgen.media.clip import Clip

DESCRIPTION = "Let a clip go on. What is left out is as the clip's recipe has it."
_NOT_OF_REQUEST = {
    "clip", "output", "overwrite", "resume", "json", "events", "seconds", *LOADING
}


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the verb's options."""
    add = parser.add_argument
    add("clip", metavar="CLIP", help="what goes on: a film of vidgen's, or any other")
    add("--seconds", type=float, required=True, metavar="S", help="how much longer")
    add("-o", "--output", metavar="FILE", help="default CLIP-longer beside it")
    add_resume(parser)
    add("--prompt", metavar="TEXT", help="what is to be seen from here on")
    add("--negative", metavar="TEXT", help="what is not to be seen")
    add("--seed", type=int, metavar="N", help="default the clip's own, whose noise goes on")
    add("--steps", type=int, metavar="N", help="denoising steps")
    add("--guidance", type=float, metavar="G", help="how strongly the prompt is followed; 1 is off")
    add("--sampler", metavar="NAME", help="euler, unipc or ancestral")
    add("--shift", type=float, metavar="X", help="of the noise schedule towards high noise")
    add("--cache", metavar="METHOD[:THRESHOLD]", help="as in generate; default the clip's")
    add("--last-image", metavar="IMAGE", help="the last frame")
    add("--reference", action="append", default=[], metavar="IMAGE",
        help="a picture of a subject that is to appear; may be repeated")
    add("--fit", choices=("crop", "pad"), default="crop", help="for pictures of another aspect")
    add("--overlap", type=int, metavar="N", help="latent frames that windows share; default 3")
    add("--colour-hold", type=float, metavar="X",
        help="0 to 1, how far colours are brought back to the clip's; default 0.5")
    add("--lora", action="append", default=[], metavar="PATH[:WEIGHT]",
        help="an adapter; default the clip's; may be repeated")
    add_sound(add, goes_on=True)
    add("--model", metavar="NAME|FOLDER|HUB_ID", help="default the clip's, else toybox")
    add_settings(parser)
    add("--offload", choices=("auto", "none", "stage", "block"), default="auto",
        help="as in generate")
    add("--quantize", choices=("int8",), help="weights in 8 bits, for half the memory")
    add_tiles(parser)
    add("--dtype", choices=("fp32", "bf16", "fp16"), help="of the computation")
    add_devices(parser)
    add("--label", choices=("none", "visible"),
        help="visible burns a label into the first 2 seconds; default as the clip has it")
    add("--aigc", metavar="PRODUCER",
        help="write the AIGC field of GB 45438-2025 for PRODUCER; default as the clip has it")


def run(args: Namespace, report: Report) -> int:
    """Check everything that can be checked, then generate and write."""
    from vidgen.core.runtime import check_output
    from vidgen.media.ending import read_ending
    from vidgen.media.write import CONTAINERS, check_format, require_sound
    from vidgen.pipeline.long.continuation import (
        lengthened,
        made_of_clips,
        own_options,
        rate_of_still,
        with_own_options,
    )
    from vidgen.weights.folder import ModelFolder
    from vidgen.weights.layouts import open_model

    if not 0 < args.seconds < math.inf:
        raise InputError(f"seconds is {args.seconds}; give how much longer, above 0")
    if Path(args.clip).is_dir():
        film = Path(args.clip).with_suffix(".mp4")
        raise InputError(f"{args.clip} is a folder of pictures, which can't go on; give a film: "
                         f"vidgen replay {args.clip} -o {film} makes one of what vidgen wrote")
    ending = read_ending(args.clip)
    fps, size, num_frames = ending.fps, ending.size, ending.num_frames
    output = args.output or _longer(args.clip)
    suffix = check_format(output, num_frames + max(1, round(args.seconds * fps)), fps)
    if args.audio not in (None, "none") or args.say:
        require_sound(output, suffix)
    if Path(output).resolve() == Path(args.clip).resolve():
        raise InputError(f"output {output} is the clip itself; choose another name")
    check_output(output, overwrite=args.overwrite or args.resume)
    (journal,) = journals_of_outputs([output], args, report)
    recipe = ending.recipe
    if recipe is not None and made_of_clips(recipe) is not None:
        recipe = None  # it goes on as any other clip does
    options = {k: v for k, v in vars(args).items() if k not in _NOT_OF_REQUEST}
    given = {name: value for name, value in options.items() if value not in (None, [])}
    given["settings"] = parse_settings(args.settings)
    loading = {name: getattr(args, name) for name in LOADING}
    loading |= choose_devices(args.devices, args.shard, [journal])
    if recipe is not None:
        try:
            given = with_own_options(given, own_options(recipe, args.model, args.audio))
            model = recipe["model"].get("source") or recipe["model"]["name"]
        except InputError as error:
            raise InputError(f"{args.clip}: {error}") from None
        loading["model"] = args.model or model
        loading["quantize"] = args.quantize or recipe.get("quantize")
        loading["dtype"] = args.dtype or recipe.get("dtype")
    loading["model"] = loading["model"] or "toybox"
    if suffix not in CONTAINERS:
        given |= silenced(given["settings"])  # none is made for nobody to hear
    if "prompt" not in given:
        raise InputError(f"{args.clip} doesn't tell its prompt; give --prompt")
    if "seed" not in given:
        earlier = seed_of(journal)
        given["seed"] = secrets.randbelow(2**31) if earlier is None else earlier
        report({"event": "note", "text": f"seed {given['seed']}"})
    if num_frames == 1 and isinstance(folder := open_model(loading["model"]), ModelFolder):
        fps = rate_of_still(recipe, folder)
    length = lengthened(args.clip, num_frames, fps, args.seconds)
    with told_how_to_go_on([journal], report), as_it_began([journal]):
        return _make(given | length, size, loading, output, journal, report)


def _make(
    options: dict[str, Any], size: tuple[int, int], loading: dict[str, Any], output: str,
    journal: OutputJournal, report: Report,
) -> int:
    import torch

    from vidgen.pipeline.engine import load_own
    from vidgen.pipeline.long.continuation import at_own_size
    from vidgen.weights.family import models_with

    request = Request.of(options.pop("prompt"), options)
    start = time.monotonic()
    share_threads(loading["devices"], torch.get_num_threads())
    able = f"models that go on from a clip: toybox, {', '.join(models_with('extend'))}"
    engine = load_own(loading.pop("model"), able, **loading)
    request = at_own_size(request, size, engine.folder)
    clip = engine.generate(request, on_event=lambda p: report({"event": "progress", **vars(p)}),
                           on_estimate=report.expect, journal=journal)
    assert not isinstance(clip, list)
    if not journal.is_done:
        report.save(clip, output, overwrite=journal.overwrite)
    _tell(clip, output, request, round(time.monotonic() - start, 3), report)
    return 0


def _tell(clip: Clip, output: str, request: Request, elapsed: float, report: Report) -> None:
    recipe = clip.recipe or {}
    facts = {
        "path": output, "seed": request.seed, "num_frames": clip.num_frames, "fps": str(clip.fps),
        "width": clip.size[0], "height": clip.size[1],
        "seconds": float(clip.num_frames / clip.fps), "hand_over": recipe.get("hand_over"),
        "sound": clip.sound is not None, "captions": clip.captions, "elapsed_s": elapsed,
    }
    facts = judged(facts, clip, report, strict=False)
    report.result(facts, "{path}: {num_frames} frames of {width}x{height} at {fps} fps, seed "
                         "{seed}, from {hand_over}\n{elapsed_s:.1f} s".format(**facts))


def _longer(clip: str) -> str:
    path = Path(clip)
    return str(path.with_name(f"{path.stem}-longer{path.suffix}"))
