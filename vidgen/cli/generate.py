"""`vidgen generate PROMPT`: make one clip or several from the options of a request."""

from __future__ import annotations

import shlex
import time
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidgen.cli import options
from vidgen.cli.options import Parser
from vidgen.cli.report import Report, elapsed_text
from vidgen.core.errors import InputError
from vidgen.core.request import OUTPUT, Loading, Request, Saving, silenced

if TYPE_CHECKING:
    from vidgen.media.clip import Clip
    from vidgen.pipeline.types import Estimate

DESCRIPTION = "Make a clip from a prompt. Options that are not given take the model's defaults."
ONLY_PYTHON = ("latents", "prefix")
"""Options that only the Python API has."""
OPTIONS = [name for name in options.FIELDS if name not in ONLY_PYTHON]


def add_arguments(parser: Parser) -> None:
    """Declare the verb's options: those of the request, the model and the output."""
    options.add_request_options(parser, OPTIONS)
    output = parser.group(OUTPUT)
    output.add_argument("-o", "--output", metavar="FILE", help=(
        ".mp4 .mov .webm .mkv .gif .webp .apng, .png or .jpg with --frames 1, or a folder/; "
        "default prompt-slug-seed.mp4"))
    options.add_resume(parser)
    output.add_argument("--preview", action="store_true", help=parser.advanced(
        "show the clip while it is made, in OUTPUT.preview.webp, which is removed at the end"))


def run(args: Namespace, report: Report) -> int:
    """Check everything that can be checked, then generate and write."""
    request = Request(**options.given_options(args))
    saving = Saving(**options.given_options(args, Saving))

    from vidgen.cli import outputs

    remedy = outputs.SAME_COMMAND
    if request.seed is None:
        request = request.replace(seed=outputs.choose_seed(args, request, saving, report))
        words = [word for word in args.words if word != "--resume"]
        remedy = "to continue: " + shlex.join(
            ["vidgen", "generate", *words, "--seed", str(request.seed), "--resume"])
    paths = outputs.output_names(args.output, request, saving.count)
    if not _check_outputs(paths, request, overwrite=args.overwrite or args.resume):
        request = request.replace(**silenced(request.settings))  # the files can't hold it
    journals = outputs.journals_of_outputs(paths, args, report, saving.marks, request.prompt)

    import torch

    from vidgen.ops.attention import asked_backend, require_backend
    from vidgen.pipeline.engine import load
    from vidgen.pipeline.loader import DTYPES
    from vidgen.pipeline.preview import preview_path, write_preview

    start = time.monotonic()
    loading = options.choose_devices(Loading(**options.given_options(args, Loading)), journals)
    options.share_threads(loading.devices, torch.get_num_threads())
    if all(journal.finished for journal in journals) and not args.overwrite:
        loading = loading.replace(offload="stage")  # no work is left for a network
    with outputs.resumable(journals, report, remedy=remedy):
        engine = load(**loading.model_dump())

        def expect(made: Estimate, **how: Any) -> None:
            if saving.strict:
                require_backend(asked_backend(), made.setup.device, DTYPES[made.setup.dtype])
            report.expect(made, **how)

        def hooks(kept: list[outputs.OutputJournal]) -> dict[str, Any]:
            finished = [n for n, journal in enumerate(kept, 1) if journal.finished]
            shown = (lambda p: write_preview(p, kept[p.clip - 1].output)) if args.preview else None
            return {
                "on_event": report.progress, "journal": kept, "count": len(kept),
                "on_estimate": partial(expect, num_clips=len(kept), done=finished),
                "on_preview": shown}

        seeds, spare = outputs.clip_seeds(request, journals, saving.retry)
        if seeds == [(request.seed or 0) + index for index in range(len(seeds))]:
            made = engine.generate(request, **hooks(journals))
            clips = made if isinstance(made, list) else [made]
        else:  # --retry gave some another seed
            own = [request.replace(seed=seed) for seed in seeds]
            clips = [one_clip(engine.generate(each, **hooks([kept])))
                     for each, kept in zip(own, journals, strict=True)]
        results, further = [], iter(spare)
        for index, path in enumerate(paths):
            clip, number = clips[index], (index + 1, len(paths))
            if not journals[index].is_done:
                report.save(clip, path, number, overwrite=journals[index].overwrite)
            while outputs.is_faulty(clip) and (seed := next(further, None)) is not None:
                report.note(f"{path} has a fault; trying seed {seed}")
                seeds[index] = seed
                journals[index] = outputs.OutputJournal(
                    path, report, overwrite=True, marks=saving.marks)
                again = request.replace(seed=seed)
                clip = one_clip(engine.generate(again, **hooks(journals[index : index + 1])))
                report.save(clip, path, overwrite=True)
            preview_path(path).unlink(missing_ok=True)
            results.append(outputs.clip_facts(clip, path, seeds[index], report,
                                              strict=saving.strict))
    elapsed = round(time.monotonic() - start, 3)
    text = "\n".join(_line(facts) for facts in results) + f"\n{elapsed_text(elapsed)}"
    report.result({"clips": results, "elapsed_s": elapsed}, text)
    return int(any(facts["path"] != path for facts, path in zip(results, paths, strict=True)))


def one_clip(made: Clip | list[Clip]) -> Clip:
    """Return the clip of a generation whose `count` is 1."""
    assert not isinstance(made, list)
    return made


def _check_outputs(paths: list[str], request: Request, *, overwrite: bool) -> bool:
    """Refuse outputs that can't be written; return whether they can hold sound."""
    from vidgen.core.runtime import check_output
    from vidgen.media.write import CONTAINERS, check_format, require_sound

    suffix = ""
    for path in paths:
        suffix = check_format(path, request.frames, request.fps)
        if request.wants_sound:
            require_sound(path, suffix)
        if suffix in (".png", ".jpg", ".jpeg") and request.frames is None:
            raise InputError(f"output {path} holds one picture; add --frames 1 or use .mp4")
        check_output(path, overwrite=overwrite)
        for option, file in request.files:
            if Path(file).resolve() == Path(path).resolve():
                raise InputError(f"output {path} is the {option} that was given; choose another "
                                 "name")
    return suffix in CONTAINERS


def _line(facts: dict[str, Any]) -> str:
    moving = "{num_frames} frames of {width}x{height} at {fps} fps"
    kind = "a still of {width}x{height}" if facts["num_frames"] == 1 else moving
    return ("{path}: " + kind + ", seed {seed}").format(**facts)
