"""Sound and music that a script describes in words, made by a text-to-audio model, each once.

They are stored as WAV with the shots, and used like files that the script names.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av

from vidgen.core.protocols import OnEvent
from vidgen.core.runtime import atomic_path, best_dtype, choose_device
from vidgen.core.store import Store, address_of
from vidgen.media.sound import sound_frame
from vidgen.pipeline.sound.audio_model import AudioModel, open_audio_model
from vidgen.story.mixdown import MUSIC_FADE_S, music_spans
from vidgen.story.timeline import Placed, Timeline
from vidgen.weights.load import trim_memory

if TYPE_CHECKING:
    from vidgen.media.types import Samples
    from vidgen.story.film import FilmPlan

SOUNDS_VERSION = 1
"""Version of the rules for making sounds; another one makes all again."""
_BLOCK = 1 << 16


@dataclass(frozen=True)
class DescribedSound:
    """Sound or music that a shot describes in words, to be made by a model."""

    shot: str  # its id
    key: str  # "sound" or "music"
    model: AudioModel  # with the words and the length
    seed: int  # of its noise
    path: Path  # of the file to be made

    def facts(self) -> dict[str, Any]:
        """Return the recipe's entry."""
        return {"shot": self.shot, "key": self.key, "seed": self.seed, "address": self.path.stem,
                "model": self.model.facts()}


def describe_sounds(
    film: FilmPlan, timeline: Timeline, model: str, folder: Path, offload: str = "none"
) -> tuple[list[DescribedSound], Timeline]:
    """Plan the described sound and music of a film, with the seeds of the shots; make nothing yet.

    `model` is the folder of a text-to-audio model of diffusers, `folder` that of the film's shots.

    Returns:
        (the sounds, the timeline with their files in place of the words).

    Raises:
        ModelError: no such model.
    """
    device = choose_device()
    opened = open_audio_model(model, "", 0.0, device=device, dtype=best_dtype(device),
                              offload=offload)
    found = list[DescribedSound]()
    for placed, key, words, seconds in _words(timeline):
        seed = film.shots[placed.shot.id].takes[0].seed
        made = replace(opened, prompt=words, seconds=round(seconds, 6))
        shaping = {name: value for name, value in made.facts().items() if name != "path"}
        address = address_of({"version": SOUNDS_VERSION, "seed": seed, **shaping})
        path = Store(folder, ".wav").path(address).resolve()
        found.append(DescribedSound(placed.shot.id, key, made, seed, path))
    paths = {(each.shot, each.key): each.path for each in found}
    shots = tuple(_with_files(placed, paths) for placed in timeline.shots)
    return found, replace(timeline, shots=shots)


def make_sounds(sounds: Sequence[DescribedSound], on_event: OnEvent) -> None:
    """Make missing sounds with one model, which is loaded once.

    Raises:
        InputError: words that the model refuses.
        ModelError: it can't be loaded, or is out of memory.
        OutputError: the disk is full, or can't be written.
    """
    missing = {each.path: each for each in sounds if not each.path.is_file()}
    place = next(iter(missing.values())).model.load() if missing else None
    for path, each in missing.items():
        event = {"event": "progress", "stage": f"{each.key} of {each.shot}"}

        def report(done: int, total: int, facts: dict[str, str] = event) -> None:
            on_event({**facts, "done": done, "total": total})

        samples, rate = each.model.make(each.seed, report, place)
        _write(path, samples, rate)
    del place
    gc.collect()  # with offloading, hooks and networks hold each other
    trim_memory()


def _words(timeline: Timeline) -> Iterator[tuple[Placed, str, str, float]]:
    """Yield (shot, key, words, seconds) of each description, in the film's order."""
    ends = {placed.shot.id: end for placed, end in music_spans(timeline)}
    for placed in timeline.shots:
        sound, music = placed.shot.sound, placed.shot.music
        if sound is not None and sound.effects is not None:
            yield placed, "sound", sound.effects, timeline.seconds(placed.num_frames)
        if music is not None and music.prompt is not None:
            length = timeline.seconds(ends[placed.shot.id] - placed.start)
            yield placed, "music", music.prompt, length + MUSIC_FADE_S


def _with_files(placed: Placed, paths: dict[tuple[str, str], Path]) -> Placed:
    shot = placed.shot
    sound, music = (paths.get((shot.id, key)) for key in ("sound", "music"))
    if shot.sound is not None and sound is not None:
        shot = replace(shot, sound=replace(shot.sound, effects=None, file=sound))
    if shot.music is not None and music is not None:
        shot = replace(shot, music=replace(shot.music, prompt=None, file=music))
    return replace(placed, shot=shot)


def _write(path: Path, samples: Samples, rate: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    layout = "mono" if samples.shape[1] == 1 else "stereo"
    with atomic_path(path) as temporary, av.open(str(temporary), "w", format="wav") as container:
        stream = container.add_stream("pcm_f32le", rate=rate, layout=layout)
        for start in range(0, len(samples), _BLOCK):
            container.mux(stream.encode(sound_frame(samples[start : start + _BLOCK], rate, start)))
        container.mux(stream.encode(None))
