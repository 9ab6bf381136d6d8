"""Render clips of a reserved sprite, and of others beside it, to fine-tune a model on.

    python -m train.toybox.subject_clips --sprite unicorn --out runs/subject
        [--clips 12] [--others 288]

Writes `clips/` of the sprite, whose captions call it `<subject_0>`, and `others/` of sprites that
the model knows, which keep it from forgetting them (Ruiz et al. 2023, prior preservation). Their
`captions.jsonl` has several wordings a clip, of which training draws one. `subject.json` says what
was shown, for `eval/toybox/subject.py`, which asks for other motions in other places.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path

from train.toybox.world.captions import caption
from train.toybox.world.render import render
from train.toybox.world.scenes import SEED_RANGES, Scene, sample_scenes
from train.toybox.world.subject import Subject
from vidgen.core.errors import OutputError, exit_code
from vidgen.core.runtime import atomic_write
from vidgen.core.values import check_number
from vidgen.media.clip import Clip
from vidgen.media.types import ClipInfo
from vidgen.pipeline.codec import to_frames

WORDINGS = 8
FPS = 12
_FIRST_OTHER = 6 * 10**11  # within "train"


def write_clips(
    scenes: Sequence[Scene], worded: Callable[[Scene, int], str], folder: Path, num_frames: int,
    size: int,
) -> None:
    """Lossless clips with captions beside them; those that are there already are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    info, rows = ClipInfo(Fraction(FPS), (size, size), num_frames), list[str]()
    for index, scene in enumerate(scenes):
        path = folder / f"{index:03d}.mkv"
        texts = [worded(scene, wording) for wording in range(WORDINGS)]
        rows.append(json.dumps({"file": path.name, "caption": texts}) + "\n")
        if not path.exists():
            frames = to_frames(render([scene], num_frames, size, size, FPS).video[0]).numpy()
            Clip(lambda frames=frames: iter([frames]), info).save(path)
    atomic_write(folder / "captions.jsonl", "".join(rows).encode())


def main() -> int:
    """Render the clips and say where they are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sprite", required=True, help="unicorn, scooter or trumpet")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--token", default="<subject_0>")
    parser.add_argument("--clips", type=int, default=12, help="of the sprite")
    parser.add_argument("--others", type=int, default=288, help="clips of other sprites")
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    def work() -> None:
        for name in ("clips", "frames", "size"):
            check_number(f"--{name}", getattr(options, name), 1, whole=True)
        subject = Subject(options.sprite, options.token, options.seed)
        facts = asdict(subject) | {
            "clips": options.clips, "motions": subject.motions[0],
            "places": subject.places[0],
        }
        record = options.out / "subject.json"
        text = json.dumps(facts, indent=1) + "\n"
        if record.exists() and record.read_text() != text:
            raise OutputError(f"{options.out} holds clips of another subject; name another folder")
        options.out.mkdir(parents=True, exist_ok=True)
        atomic_write(record, text.encode())
        shape = (options.frames, options.size)
        write_clips(subject.clips(options.clips), subject.caption, options.out / "clips", *shape)
        first = SEED_RANGES["train"][0] + _FIRST_OTHER + (options.seed << 20)
        scenes = sample_scenes(first, options.others, split="train")
        write_clips(scenes, caption, options.out / "others", *shape)
        print(f"{options.clips} clips of the {options.sprite} and {options.others} others: "
              f"{options.out}")

    return exit_code(work)


if __name__ == "__main__":
    raise SystemExit(main())
