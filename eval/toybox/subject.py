"""Score a subject LoRA: is the sprite there when it is asked for, and are the others unharmed?

    python -m eval.toybox.subject -o results.json --clips runs/subject --lora unicorn.safetensors

The sprite is asked for in motions and places that are in none of the clips, other sprites as in
`python -m eval.toybox`; each prompt is made with and without the LoRA, of the same seed. The share
in which the judge names the sprite is given with its 95% interval, the change of the others with
that of a paired bootstrap. A run that was killed goes on where it was, by `RESULTS.json.jsonl`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from eval.toybox.judge import JudgeFolder, embedded_judge
from eval.toybox.suite.subject import SubjectTest, measure
from train.toybox.world.subject import Subject
from vidgen.core.errors import InputError, ModelError, exit_code
from vidgen.core.runtime import atomic_write, fingerprint
from vidgen.core.store import ScoreLog
from vidgen.core.values import check_number
from vidgen.pipeline.engine import Engine, load


def main() -> int:
    """Measure, write the figures and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("-o", "--output", type=Path, required=True, metavar="RESULTS.json")
    add("--clips", type=Path, required=True, metavar="FOLDER",
        help="what train/toybox/subject_clips.py made")
    add("--lora", action="append", required=True, metavar="PATH[:WEIGHT][@high|@low]",
        help="what was learned; may be repeated, as for two experts")
    add("--model", default="toybox")
    add("--count", type=int, default=120, help="prompts of the subject")
    add("--others", type=int, default=240, help="prompts of other sprites")
    add("--split", choices=("dev", "test"), default="dev")
    add("--seed", type=int, default=0)
    add("--steps", type=int)
    add("--frames", type=int)
    add("--size", metavar="WxH")
    add("--judge", type=Path, metavar="FOLDER", help="another judge than the embedded one")
    options = parser.parse_args()

    def work() -> None:
        for name in ("count", "others"):
            check_number(f"--{name}", getattr(options, name), 1, whole=True)
        subject = _subject(options.clips)
        engine = load(options.model)
        if not isinstance(engine, Engine):
            raise ModelError(f"{options.model} is run by diffusers; a subject is toybox's")
        folder = JudgeFolder(options.judge) if options.judge else embedded_judge()
        test = SubjectTest(
            subject, tuple(options.lora), options.count, options.others, options.split,
            options.seed, options.steps, options.frames, options.size,
        )
        log = ScoreLog(options.output.with_name(options.output.name + ".jsonl"))
        bars = Progress("{task.description}", BarColumn(), MofNCompleteColumn(),
                        TimeRemainingColumn(), console=Console(stderr=True))  # fmt: skip
        with bars:
            tasks = {}

            def show(event: dict) -> None:
                stage = event["stage"]
                if stage not in tasks:
                    tasks[stage] = bars.add_task(stage, total=event["total"])
                bars.update(tasks[stage], completed=event["done"])

            judge = folder.load(engine.device)
            scores = measure(test, engine, judge, folder.sha256, log, show)
        results = {
            "subject": subject.sprite, "token": subject.token, "lora": options.lora,
            "model": engine.folder.content_hash, "judge": folder.sha256, "split": options.split,
            "seed": options.seed, "machine": fingerprint(), "scores": scores,
        }
        atomic_write(options.output, (json.dumps(results, indent=1) + "\n").encode())
        print(json.dumps(scores, indent=1))

    return exit_code(work)


def _subject(folder: Path) -> Subject:
    """The subject that a folder's clips show."""
    path = folder / "subject.json"
    try:
        facts = json.loads(path.read_text())
        return Subject(facts["sprite"], facts["token"], facts["seed"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} can't be read ({error}); make it by train/toybox/subject_clips.py"
                         ) from None


if __name__ == "__main__":
    raise SystemExit(main())
