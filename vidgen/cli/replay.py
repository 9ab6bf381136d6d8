"""`vidgen replay FILE`: make a file's clip again from its recipe, or with one change."""

from __future__ import annotations

from argparse import ArgumentTypeError, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from vidgen.cli.generate import one_clip
from vidgen.cli.options import FIELDS, Parser, add_request_options, add_resume
from vidgen.cli.report import Report
from vidgen.core.errors import InputError, nearest
from vidgen.core.request import Saving

DESCRIPTION = "Make a clip again from the recipe in its file, and compare the two."
_NOT_SET = ("count", "retry", "strict", "settings", "latents")


def add_arguments(parser: Parser) -> None:
    """Declare the verb's options."""
    add = parser.add_argument
    add("file", metavar="FILE", help="a film, picture or folder of pictures written by vidgen")
    add("-o", "--output", metavar="FILE", help="default FILE-again, in the same folder")
    add_resume(parser)
    add("--set", dest="changes", type=key_and_value, action="append", default=[],
        metavar="KEY=VALUE", help="an option of generate to change, seed and others locked; an "
        "empty value drops it; may be repeated")
    add("--input", dest="given", type=key_and_value, action="append", default=[],
        metavar="OPTION|HASH=PATH", help="new path of an input, a LoRA or the model")
    add("--anyway", action="store_true", help="continue with a model that isn't the recorded one")


def run(args: Namespace, report: Report) -> int:
    """Restore, check, generate, write, compare."""
    from vidgen.cli.outputs import journals_of_outputs, resumable
    from vidgen.core.runtime import check_output
    from vidgen.media.probe import read_recipe
    from vidgen.media.write import check_format
    from vidgen.pipeline.recorded import is_of_clips, recorded_marks

    recipe = read_recipe(args.file)
    if recipe is not None and is_of_clips(recipe):
        raise InputError(f"{args.file} is made of several clips; make it again with vidgen script "
                         "or vidgen sweep, or replay one of its clips")
    if recipe is None:
        raise InputError(f"{args.file} holds no recipe; give a clip that vidgen wrote")
    changes = typed_options(args.changes)
    output = args.output or _again(args.file)
    if Path(output).resolve() == Path(args.file).resolve():
        raise InputError(f"output {output} is the file to replay; choose another name")
    plan = recipe.get("plan")
    kept = plan.get("kept_frames") if isinstance(plan, dict) else None
    is_length_kept = not {"frames", "seconds", "fps", "prefix"} & changes.keys()
    check_format(output, kept if is_length_kept and isinstance(kept, int) else None)
    check_output(output, overwrite=args.overwrite or args.resume)
    asked = {name: changes[name] for name in Saving.model_fields if name in changes}
    marks = Saving(**recorded_marks(recipe) | asked).marks
    (journal,) = journals_of_outputs([output], args, report, marks)

    from vidgen.media.join import ContinuedClip
    from vidgen.pipeline import replay
    from vidgen.pipeline.engine import load

    attention = str(recipe.get("attention") or "auto")
    with (resumable([journal], report, attention), TemporaryDirectory() as folder,
          replay.recorded_threads(recipe)):
        request = replay.request_from_recipe(recipe, Path(folder), args.given, changes)
        loading = replay.loading_from_recipe(recipe, args.given, changes, anyway=args.anyway)
        clip = one_clip(load(**loading).generate(
            request, on_event=report.progress, on_estimate=report.expect, journal=journal))
        if not journal.is_done:
            if "head_frames" in recipe and isinstance(clip, ContinuedClip):
                clip = clip.added()
            replay.keep_origin(clip.recipe, recipe)
            report.save(clip, output, overwrite=journal.overwrite)
    _report_comparison(output, args.file, changes, report)
    return 0


def key_and_value(text: str) -> tuple[str, str]:
    """Read KEY=VALUE."""
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise ArgumentTypeError(f"{text!r} is no KEY=VALUE, such as prompt=\"a cat\" or steps=20")
    return key, value


def typed_options(pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Return options of generate from (key, value) pairs, parsed as its command line.

    A repeated key makes a list, a comma a pair of numbers; an empty value leaves the option out.
    Settings of a model are collected in `settings`, with None for one that is left out.

    Raises:
        InputError: an unknown option, with the nearest known one; an invalid value.
    """
    from vidgen.core.request import CALLED
    from vidgen.core.values import parse_settings
    from vidgen.pipeline.settings import SETTINGS

    parser, known = Parser("vidgen generate", ""), [n for n in FIELDS if n not in _NOT_SET]
    add_request_options(parser, known, are_optional=True)
    options, settings, words = dict[str, Any](), dict[str, Any](), dict[str, list[str]]()
    for key, value in pairs:
        name = key.replace("-", "_")
        flag = f"--{name.replace('_', '-')}"
        if name in SETTINGS:
            settings |= parse_settings(f"{name}={value}") if value else {name: None}
        elif name not in known:
            hint = nearest(name, (*known, *SETTINGS), CALLED)
            raise InputError(f"unknown option {key!r}; {hint}")
        elif not value:
            options[name], words[name] = "" if name == "prompt" else FIELDS[name].default, []
        elif name == "guidance_interval":
            words[name] = [flag, *value.split(",")]
        else:
            words[name] = [*words.get(name, ()), f"{flag}={value}"]
    parsed = vars(parser.parse([word for own in words.values() for word in own]))
    options |= {name: parsed[name] for name, own in words.items() if own}
    return options | ({"settings": settings} if settings else {})


def _again(file: str) -> str:
    path = Path(file)
    return str(path.with_name(f"{path.stem}-again")) + ("/" if path.is_dir() else path.suffix)


def _report_comparison(
    output: str, file: str, changes: Mapping[str, Any], report: Report
) -> None:
    from vidgen.media.probe import read_recipe
    from vidgen.pipeline.recorded import differences
    from vidgen.pipeline.replay import compare

    made = compare(output, file)
    changed = sorted({*changes, *changes.get("settings", {})} - {"settings"})
    differing = differences(read_recipe(file) or {}, read_recipe(output) or {})
    data = {
        "path": output, "changed": changed, "identical": made.identical,
        "psnr_db": made.psnr_db,
        "differences": {k: {"recorded": old, "now": new} for k, (old, new) in differing.items()}}
    lines = [f"{output}: {made.text}"]
    lines += [f"  {name}: {new}, recorded {old}" for name, (old, new) in differing.items()]
    if changes:
        lines.append(f"  changed by --set: {', '.join(changed)}")
    elif not (made.identical or differing):
        lines.append(f"  no recorded fact differs; {file} may have been changed since it was made")
    report.result(data, "\n".join(lines))
