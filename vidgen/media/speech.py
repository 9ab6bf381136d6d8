"""Speech of espeak-ng or from sound files, placed in time. No person's voice is cloned.

Axes: N samples at `RATE`.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from vidgen.core.errors import InputError
from vidgen.core.request import OWN_FILE
from vidgen.media.sound import RATE, SoundReader, gather, room
from vidgen.media.types import Samples

PAUSE_S = 0.25
"""Pause between two sentences, and before a text without a time of its own."""
DEFAULT_VOICE = "en-us"
_SILENCE = 10 ** (-50 / 20)
_SENTENCE = re.compile(r".+?(?:[.!?…]+[\"'”’)\]]*(?=\s|$)|[。！？]+|$)", re.DOTALL)


@dataclass(frozen=True)
class Sentence:
    """A spoken sentence with start and end in seconds of the clip; `text` is None for a file."""

    text: str | None
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Speech:
    """A clip's speech.

    Attributes:
        samples: float32 [N, 1] at `RATE`, as long as the clip.
        voice: engine and name of the voice, for the recipe.
    """

    samples: Samples
    sentences: tuple[Sentence, ...]
    voice: dict[str, Any]


class Voice:
    """A voice of espeak-ng.

    `name` is a language or voice as `espeak-ng --voices` lists it, with an optional variant such as
    `+f3`; None is English.

    Raises:
        InputError: espeak-ng isn't installed, or the voice is unknown; names similar ones.
    """

    def __init__(self, name: str | None) -> None:
        name = name or DEFAULT_VOICE
        program = shutil.which("espeak-ng")
        if program is None:
            raise InputError("speech needs espeak-ng, which is not installed; install it with "
                             "apt, brew, dnf or winget, or give a sound file: --say 1=@FILE")
        self._program, self.name = program, name
        base, _, variant = name.partition("+")
        known = {word.lower(): word for word in self._listed("--voices")}
        if base.lower() not in known:
            raise InputError(f"voice {name!r} is unknown to espeak-ng; {_near(base, known)}")
        variants = {word.rpartition("/")[2] for word in self._listed("--voices=variant")}
        if variant and variant not in variants:
            raise InputError(f"voice {name!r} has the unknown variant {variant!r}; "
                             f"{_near(variant, variants)}")

    def _listed(self, option: str) -> Iterator[str]:
        """Yield languages, names and files of the voices that an option lists."""
        text = self._run(option).decode("utf-8", "replace")
        for line in text.splitlines()[1:]:
            yield from (word for word in line.split()[1:5] if not re.fullmatch(r"--/\w", word))
            yield from re.findall(r"\((\S+) \d+\)", line)

    def _run(self, *options: str, text: str = "") -> bytes:
        made = subprocess.run([self._program, *options], input=text.encode(), capture_output=True,
                              check=False)
        if made.returncode:
            why = made.stderr.decode("utf-8", "replace").strip()
            raise InputError(f"espeak-ng can't speak with the voice {self.name!r}: {why}; choose "
                             "another with --voice")
        return made.stdout

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Engine with version, and voice, for the recipe."""
        found = re.search(r"\d+(?:\.\d+)+", self._run("--version").decode("utf-8", "replace"))
        return {"engine": f"espeak-ng {found[0] if found else ''}".strip(), "voice": self.name}

    def say(self, text: str) -> Samples:
        """Return the sound of a sentence, float32 [N, 1] at `RATE`."""
        with TemporaryDirectory() as folder:
            file = Path(folder, "said.wav")
            self._run("-v", self.name, "-b", "1", "--stdin", "-w", str(file), text=text)
            if not file.is_file():  # no speakable text
                return np.zeros((0, 1), np.float32)
            return gather(SoundReader(file, RATE), 1)


def sentences_of(text: str) -> list[str]:
    """Split a text into sentences at their closing punctuation."""
    return [part.strip() for part in _SENTENCE.findall(text) if part.strip()]


def speak(said: Sequence[tuple[float | None, str]], voice: str | None, num_samples: int) -> Speech:
    """Return the speech of texts for a clip of `num_samples` at `RATE`.

    `said` are (start in seconds, text) pairs; None: after the previous one. `@FILE` is speech in a
    file. `voice` names a `Voice`.

    Raises:
        InputError: a text doesn't fit in time, or a voice or file is unusable.
    """
    speaker = None if all(_is_file(text) for _, text in said) else Voice(voice)
    samples, sentences, free = room(num_samples, 1), list[Sentence](), 0.0
    if all(start is not None for start, _ in said):
        said = sorted(said, key=lambda pair: pair[0] or 0.0)
    for start, text in said:
        begin = (free + PAUSE_S if sentences else 0.0) if start is None else float(start)
        if sentences and begin < sentences[-1].end_s - 1e-9:
            raise InputError(
                f"say {text!r} at {begin:g} s begins {sentences[-1].end_s - begin:.2f} s before "
                f"the previous text ends; place it at {sentences[-1].end_s:.2f} s or later"
            )
        for words, wave in spoken(text, speaker):
            first = round(begin * RATE)
            free = begin + len(wave) / RATE
            if first + len(wave) <= num_samples:
                samples[first : first + len(wave)] = wave
            sentences.append(Sentence(words, round(begin, 3), round(free, 3)))
            begin = free + PAUSE_S
    seconds, end = num_samples / RATE, max(sentence.end_s for sentence in sentences)
    if end > seconds + 0.001:
        raise InputError(
            f"the speech ends {end - seconds:.2f} s after the clip, which has {seconds:.2f} s; "
            f"shorten the text, place it earlier, or give --seconds {end:.2f}"
        )
    return Speech(samples, tuple(sentences), speaker.facts if speaker else {"engine": "file"})


def speech_files(said: Sequence[tuple[float | None, str]]) -> list[str]:
    """Return the files among spoken texts, in order."""
    return [text.removeprefix(OWN_FILE) for _, text in said if _is_file(text)]


def _is_file(text: str) -> bool:
    return text.startswith(OWN_FILE)


def spoken(text: str, voice: Voice | None) -> Iterator[tuple[str | None, Samples]]:
    """Yield a text's sentences with their sound, float32 [N, 1] at `RATE`.

    `@FILE` needs no voice; it yields the file's sound as it is, in one channel, without a text.

    Raises:
        InputError: no words, or an unusable file.
    """
    if _is_file(text):
        reader = SoundReader(text.removeprefix(OWN_FILE), RATE)
        wave = gather((block.mean(axis=1, keepdims=True) for block in reader), 1)
        if not len(wave) or not np.isfinite(wave).all():
            raise InputError(f"say {text}: the file is empty or has non-finite samples; give "
                             "another one")
        yield None, wave
        return
    assert voice is not None
    found = False
    for sentence in sentences_of(text):
        wave = _trimmed(voice.say(sentence))
        if len(wave):
            found = True
            yield sentence, wave
    if not found:
        raise InputError(f"say {text!r} has no words that the voice can speak; give some")


def _trimmed(wave: Samples) -> Samples:
    """Cut the silence at both ends, except for 5 ms."""
    loud = np.flatnonzero(np.abs(wave[:, 0]) > _SILENCE)
    if not len(loud):
        return wave[:0]
    margin = RATE // 200
    return wave[max(0, loud[0] - margin) : loud[-1] + 1 + margin]


def _near(name: str, known: Sequence[str] | set[str] | dict[str, str]) -> str:
    """Return a hint with voices of the same language or similar spelling."""
    language = name.lower().partition("-")[0]
    same = [word for word in sorted(known) if word.partition("-")[0] == language]
    near = [*same, *get_close_matches(name.lower(), sorted(known), n=5, cutoff=0.5)]
    listed = list(dict.fromkeys(near))[:8]
    return f"similar: {', '.join(listed)}" if listed else "espeak-ng --voices lists all"
