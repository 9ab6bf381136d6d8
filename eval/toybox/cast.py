"""Measure whether a character stays itself across six shots of a film.

    python -m eval.toybox.cast --characters 20 -o cast.json
    python -m eval.toybox.cast --characters 20 --reserved -o reserved.json
    python -m eval.toybox.cast --characters 4 --steps 8 --workers 2 --threads 1 -o small.json

Each character is a sprite of the Toybox world, with a rendered picture of it in another place. Six
shots show it in six places, in six motions, with a seed each, in three ways:
    words      the prompt names it
    both       the prompt names it, and the model is given the picture (`reference`)
    reference  the prompt says "it", so that the picture alone tells what to show
With --reserved characters are the world's three sprites that no part of the model ever saw, each
in several pictures, and a picture alone tells of them: nobody has a word for them.
Figures with 95% intervals: `shots`, how many show the character by the judge, and `films`, of how
many characters all six do. All of it is one script, rendered as `vidgen script` does: shots that
are there are not made again, and a run that was killed goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from PIL import Image

from eval.toybox.judge import Judge, embedded_judge
from eval.toybox.rates import Rate
from train.toybox.world.cast import RESERVED_SPRITES, SPRITE_NAMES
from train.toybox.world.render import render
from train.toybox.world.scenes import Actor, Scene, is_held_out, times_in
from vidgen.core.errors import exit_code
from vidgen.core.runtime import atomic_path, atomic_write, fingerprint
from vidgen.media.clip import Clip
from vidgen.pipeline.codec import as_video, to_frames
from vidgen.pipeline.engine import load
from vidgen.pipeline.workers.types import WorkerOptions
from vidgen.story.plan import plan_film
from vidgen.story.render import ShotWork, render_film
from vidgen.story.script import Script
from vidgen.story.store import ShotStore
from vidgen.weights.layouts import open_model

WAYS = ("words", "both", "reference")
UNNAMED = ("reference",)
"""Ways to show what the model has no word for."""
SHOTS = (
    "bounces in the desert", "spins on a meadow", "stays still on the beach",
    "swings in the forest", "rises over the city", "moves to the left in the snow",
)
PICTURE_PLACES = ("room", "farm", "road")


def write_script(
    sprites: list[str], steps: int | None, folder: Path, ways: tuple[str, ...] = WAYS
) -> Path:
    """The script of all characters in some ways, with their pictures beside it."""
    characters, shots = dict[str, Any](), list[dict[str, Any]]()
    for number, sprite in enumerate(sprites):
        turn = sprites[:number].count(sprite)
        picture = folder / f"{sprite.replace(' ', '-')}-{turn}.png"
        draw(sprite, number, turn, picture)
        for way in ways:
            name = f"c{number}-{way}"
            article = "an" if sprite[0] in "aeiou" else "a"
            words = "it" if way == "reference" else f"{article} {sprite}"
            shown = [] if way == "words" else [picture.name]
            characters[name] = {"description": words, "reference": shown}
            shots += [{"id": f"{name}-{index}", "prompt": f"{{{name}}} {what}",
                       "seed": 100 * number + index} for index, what in enumerate(SHOTS)]
    defaults = {} if steps is None else {"steps": steps}
    data = {"version": 1, "project": {"defaults": defaults}, "characters": characters,
            "shots": shots}
    path = folder / "cast.json"
    atomic_write(path, json.dumps(data, indent=1).encode())
    return path


def draw(sprite: str, seed: int, turn: int, path: Path) -> None:
    """A still of a sprite at rest, where none of the shots play, each turn in another place."""
    places = [p for p in PICTURE_PLACES if not is_held_out(sprite, "stays", p)]
    place = places[turn % len(places)]
    time = times_in(place)[turn // len(places) % len(times_in(place))]
    scene = Scene(seed, (Actor(sprite, "stays", size="large"),), place, time)
    frame = to_frames(render([scene], num_frames=1).video[0])[0].numpy()
    with atomic_path(path) as temporary:
        Image.fromarray(frame).save(temporary, "PNG")


def sees(judge: Judge, path: Path) -> str:
    """The sprite that the judge sees in a file."""
    return judge.verdicts(as_video(Clip.from_file(path).frames))[0].sprite


def summarise(
    sprites: list[str], seen: dict[str, str], ways: tuple[str, ...] = WAYS
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each way's rates: of shots, and of characters who are themselves in all of theirs."""
    for way in ways:
        right = [[seen[f"c{number}-{way}-{index}"] == sprite for index in range(len(SHOTS))]
                 for number, sprite in enumerate(sprites)]
        rates = {"shots": Rate.of(each for film in right for each in film),
                 "films": Rate.of(map(all, right))}
        yield way, {name: {"rate": rate.rate, "interval": rate.interval, "total": rate.total}
                    for name, rate in rates.items()}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Render and judge all shots; the result as JSON data."""
    output: Path = options.output
    folder = output.with_suffix(".cast")
    folder.mkdir(exist_ok=True)
    if options.reserved:
        sprites = [*islice(cycle(RESERVED_SPRITES), options.characters)]
    else:
        sprites = [*SPRITE_NAMES[:: len(SPRITE_NAMES) // options.characters][: options.characters]]
    ways = UNNAMED if options.reserved else WAYS
    script = Script.read(write_script(sprites, options.steps, folder, ways))
    model = open_model(options.model)
    film = plan_film(script, model, dtype=options.dtype)
    store = ShotStore(folder / "shots", film)
    workers = WorkerOptions(options.workers, threads=options.threads)
    engine = partial(load, options.model, dtype=options.dtype)
    judges = embedded_judge()
    judge = judges.load()
    with closing(ShotWork(engine, store)) as work:
        seen = {each.shot.id: sees(judge, each.path)
                for each in render_film(work, film.needed([]), tell, workers=workers)}
    return {
        "model": {"name": model.name, "sha256": model.content_hash}, "judge": judges.sha256,
        "sprites": sprites, "shots": SHOTS, "steps": options.steps, "threads": workers.num_threads,
        "results": dict(summarise(sprites, seen, ways)), "seen": seen, "machine": fingerprint(),
    }


def tell(event: dict[str, Any]) -> None:
    """Show notes on stderr."""
    if event["event"] == "note":
        print(event["text"], file=sys.stderr)


def table(results: dict[str, Any]) -> str:
    """The rates as Markdown."""
    lines = ["| way | shots | characters in all six |", "|---|---|---|"]
    for way, rates in results.items():
        cells = ("{:.0f}% ({:.0f} .. {:.0f})".format(
            100 * rates[name]["rate"], *(100 * end for end in rates[name]["interval"]))
            for name in ("shots", "films"))
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Read the command line, measure, write, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="toybox", help="name or folder; default %(default)s")
    add("--characters", type=int, default=20, help="default %(default)s")
    add("--reserved", action="store_true", help="of the sprites that no network has learned")
    add("--steps", type=int, help="denoising steps; default the model's")
    add("--dtype", choices=("fp32", "bf16", "fp16"))
    add("--workers", type=int, help="shots beside each other")
    add("--threads", type=int, help="that each worker computes on")
    add("-o", "--output", type=Path, required=True, help="results as JSON")
    options = parser.parse_args()
    result = measure(options)
    atomic_write(options.output, (json.dumps(result, indent=1) + "\n").encode())
    print(table(result["results"]))


if __name__ == "__main__":
    sys.exit(exit_code(main))
