"""The gallery: what the model makes of the first prompts and the first seeds, good and bad.

    python -m eval.toybox.gallery -o docs/lab/gallery [--prompts 6] [--seeds 2]

Makes the first prompts of the dev split with seeds 0, 1, ..., has the judge say what it sees, and
writes the clips with a page, README.md, of prompts, commands and verdicts. Nothing is chosen. Clips
that are there and of the same model are kept. About 10 s a clip on one core without AVX512.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from eval.toybox.judge import Judge, embedded_judge
from eval.toybox.suite.judging import TASKS, answers, grade
from train.toybox.world.captions import prompts
from train.toybox.world.scenes import Scene
from vidgen.core.errors import InputError, OutputError, exit_code
from vidgen.core.runtime import atomic_write
from vidgen.media.clip import Clip
from vidgen.media.probe import read_recipe
from vidgen.media.write import write_clip
from vidgen.pipeline.codec import as_video
from vidgen.pipeline.engine import Engine, load

LIMIT = 1_500_000
"""Bytes of all clips together: they travel with every checkout."""
QUALITY = 80
"""Of the clips as WebP, where `vidgen generate` writes 90: two thirds of the bytes."""


@dataclass(frozen=True)
class Shown:
    """A clip of the gallery.

    Attributes:
        name: of its file.
        text: the prompt.
        seed: of its noise.
        right: which of `TASKS` the judge sees as they were asked for.
        seen: what it sees.
    """

    name: str
    text: str
    seed: int
    right: dict[str, bool]
    seen: dict[str, str]


def make(engine: Engine, folder: Path, number: int, text: str, seed: int) -> Path:
    """A clip of the gallery; one that is there is kept if the same model made it."""
    path = folder / f"{number:02d}-{seed}.webp"
    if path.exists():
        recipe = read_recipe(path) or {}
        plan, model = recipe.get("plan", {}), recipe.get("model", {})
        asked = (text, seed, engine.folder.content_hash)
        if (plan.get("prompt"), plan.get("seed"), model.get("sha256")) == asked:
            return path
        path.unlink()
    clip = engine.generate(text, seed=seed)
    assert not isinstance(clip, list)
    frames = clip.frames
    recipe = {k: v for k, v in (clip.info.recipe or {}).items() if k != "tail"}  # half of the file
    write_clip(path, [frames], replace(clip.info, recipe=recipe, quality=QUALITY))
    return path


def look(judge: Judge, path: Path, scene: Scene, text: str, seed: int) -> Shown:
    """What the judge sees in a file."""
    (verdict,) = judge.verdicts(as_video(Clip.from_file(path).frames))
    return Shown(path.name, text, seed, grade(verdict, scene), answers(verdict))


def page(clips: Sequence[Shown], model: str, command: str) -> str:
    """The gallery as Markdown."""
    whole = sum(all(clip.right.values()) for clip in clips)
    lines = [
        "# Gallery", "",
        f"The first {len({c.text for c in clips})} prompts of `python -m eval.toybox`'s dev split "
        f"with the first seeds, by `{model}` at its default settings; nothing is chosen, good and "
        f"bad stand as they came. Of {len(clips)} clips {whole} show all that was asked for, by "
        "the [judge](../toybox.md#the-judge). It is easier to please than the eye: it also names "
        "patches of the right colours.", "",
        f"Made by `{command}`, as WebP of quality {QUALITY}. `vidgen inspect` tells each clip's "
        "recipe; the latents by which a clip goes on are left out of it.", "",
    ]  # fmt: skip
    for text in dict.fromkeys(clip.text for clip in clips):
        mine = [clip for clip in clips if clip.text == text]
        lines += [f"**{text}**", "", "```bash"]
        lines += [f'vidgen generate "{c.text}" --seed {c.seed} -o {c.name}' for c in mine]
        lines += ["```", ""]
        rows = [f"seed {c.seed}" for c in mine], ["---"] * len(mine), [
            f"![seed {c.seed}]({c.name})" for c in mine], map(_verdict, mine)  # fmt: skip
        lines += [*(f"| {' | '.join(row)} |" for row in rows), ""]
    return "\n".join(lines)


def _verdict(clip: Shown) -> str:
    wrong = [f"{task}: {clip.seen[task]}" for task in TASKS if not clip.right[task]]
    return "as asked for" if not wrong else f"seen instead: {', '.join(wrong)}"


def main() -> int:
    """Make what is missing, write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--model", default="toybox", metavar="NAME|FOLDER")
    parser.add_argument("--prompts", type=int, default=6, metavar="N")
    parser.add_argument("--seeds", type=int, default=2, metavar="N")
    args = parser.parse_args()

    def work() -> None:
        if min(args.prompts, args.seeds) < 1:
            raise InputError(f"prompts is {args.prompts} and seeds {args.seeds}; give 1 or more")
        args.output.mkdir(parents=True, exist_ok=True)
        engine, judge, clips = load(args.model), embedded_judge().load(), []
        for number, (scene, text) in enumerate(prompts("dev", args.prompts), 1):
            for seed in range(args.seeds):
                path = make(engine, args.output, number, text, seed)
                clips.append(look(judge, path, scene, text, seed))
                print(path, _verdict(clips[-1]), file=sys.stderr, flush=True)
        size = sum((args.output / clip.name).stat().st_size for clip in clips)
        if size > LIMIT:
            raise OutputError(f"the clips have {size} bytes; {LIMIT} is the most that every "
                              "checkout should carry: give fewer --prompts or --seeds")
        command = (f"python -m eval.toybox.gallery -o {args.output} --prompts {args.prompts} "
                   f"--seeds {args.seeds}")
        atomic_write(args.output / "README.md", page(clips, engine.folder.name, command).encode())

    return exit_code(work)


if __name__ == "__main__":
    raise SystemExit(main())
