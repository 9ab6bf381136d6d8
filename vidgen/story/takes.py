"""Several takes of a shot, and which is the best: by the checks of each output, and by a judge.

The judge knows the Toybox world alone, so it is asked where the embedded model's family made the
clip, about what the prompt names in that world's words.

Axes: B clips, T frames, H W pixels.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eval.toybox.judge import JudgeFolder, embedded_judge, sample_frames
from train.toybox.world.captions import nouns, phrases
from train.toybox.world.cast import SPRITE_NAMES
from train.toybox.world.scenes import CAMERAS, MOTIONS, PLACES, WORLD_VERSION
from vidgen.media.checks import Finding
from vidgen.media.video_reader import VideoReader
from vidgen.pipeline.inputs import as_video

if TYPE_CHECKING:
    from eval.toybox.judge import Judge, Verdict
    from vidgen.weights.folder import ModelFolder

_SHOWN_FRAMES = 9
"""From which on the judge can tell motions and cameras."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a prompt names of the Toybox world; empty where it names nothing."""

    sprites: tuple[str, ...] = ()
    motions: tuple[str, ...] = ()
    place: str = ""
    camera: str = ""


@dataclass(frozen=True, slots=True)
class TakeScore:
    """How good a take is.

    Attributes:
        seed: of the take.
        path: of its file.
        faults: kinds of findings that are faults.
        warnings: kinds of findings that may be meant.
        right: what the judge was asked, and whether the clip shows it.
        shares: sum of the judge's shares for what was asked, which parts takes that are alike.
        reasons: the same in sentences.
    """

    seed: int
    path: str
    faults: tuple[str, ...]
    warnings: tuple[str, ...]
    right: dict[str, bool]
    shares: float
    reasons: tuple[str, ...]

    @property
    def rank(self) -> tuple[int, int, int, float, int]:
        """Smaller is better: faults, what isn't shown, warnings, the judge's shares, the seed."""
        missing = sum(not shown for shown in self.right.values())
        return len(self.faults), missing, len(self.warnings), -round(self.shares, 3), self.seed


def judge_for(folder: ModelFolder) -> JudgeFolder | None:
    """The judge that knows what a model makes, or None."""
    judge = embedded_judge()
    knows = folder.family == "toybox" and folder.world_version == WORLD_VERSION
    return judge if knows and (judge.path / "model.safetensors").is_file() else None


def best_take(scores: Sequence[TakeScore]) -> dict[str, Any]:
    """The choice among takes, as JSON data: the seed, why, and every take's score."""
    ranked = sorted(scores, key=lambda score: score.rank)
    best = ranked[0]
    why = "; ".join(best.reasons)
    if len(ranked) > 1:
        why += f"; next was seed {ranked[1].seed}: {'; '.join(ranked[1].reasons)}"
    return {"seed": best.seed, "why": why, "takes": [asdict(score) for score in scores]}


def score_take(
    seed: int, path: Path, findings: Sequence[Finding], prompts: Sequence[str],
    judge: Judge | None = None,
) -> TakeScore:
    """Judge a take.

    Args:
        seed: of the take.
        path: its file.
        findings: of its checks.
        prompts: what it was asked to show, one after the other.
        judge: of the Toybox world; None: the checks alone decide.
    """
    faults = tuple(each.kind for each in findings if each.severity == "fault")
    warnings = tuple(each.kind for each in findings if each.severity == "warning")
    reasons = [each.text for each in findings] or ["the checks found nothing"]
    right: dict[str, bool] = {}
    shares = 0.0
    if judge is not None:
        wanted = wanted_by(prompts[0])
        told, num_frames = _verdict(judge, path)
        asked = _asked(wanted, told)
        if len(prompts) > 1 or num_frames < _SHOWN_FRAMES:  # one answer for all of it means little
            asked = {name: each for name, each in asked.items() if name in ("sprite", "place")}
        right = {name: shown for name, (shown, _, _) in asked.items()}
        shares = sum(share for _, share, _ in asked.values())
        reasons += [text for _, _, text in asked.values()]
    return TakeScore(seed, path.name, faults, warnings, right, shares, tuple(reasons))


def wanted_by(prompt: str) -> Wanted:
    """What a prompt names, in the Toybox world's words."""
    text = " ".join(re.findall(r"[a-z'-]+", prompt.lower()))
    text, cameras = _cut(text, _cameras())
    text, _ = _cut(text, _weathers())  # of which snow is also a place, and falls
    names = _names()
    motions = [name for name, pattern in _motions() if re.search(pattern, text)]
    if "drives past" in motions:  # its phrases hold those of moving to one side
        motions = [m for m in motions if not m.startswith("moves")]
    sprites = dict.fromkeys(names[word] for word in re.findall(_any(names), text))
    places = _places()
    found = max(re.findall(_any(places), text), key=len, default="")
    camera = cameras[0] if cameras else ""
    return Wanted(tuple(sprites)[:2], tuple(motions[:1]), places.get(found, ""), camera)


def _asked(wanted: Wanted, told: Verdict) -> dict[str, tuple[bool, float, str]]:
    """For each thing that is asked: whether it is shown, with what share, and that in words."""
    answers: dict[str, tuple[bool, float, str]] = {}
    if wanted.sprites:
        share = min(told.sprites[name] for name in wanted.sprites)
        answers["sprite"] = _answer(told.shows(wanted.sprites), share, wanted.sprites, told.sprite)
    if wanted.motions:
        share = min(told.motions[name] for name in wanted.motions)
        answers["motion"] = _answer(told.moves(wanted.motions), share, wanted.motions, told.motion)
    if wanted.place:
        share = told.places[wanted.place]
        answers["place"] = _answer(told.place == wanted.place, share, [wanted.place], told.place)
    if wanted.camera:
        share = told.cameras[wanted.camera]
        answers["camera"] = _answer(told.camera == wanted.camera, share, [wanted.camera],
                                    told.camera)
    return answers


def _answer(
    shown: bool, share: float, wanted: Sequence[str], seen: str
) -> tuple[bool, float, str]:
    what = " and ".join(wanted)
    text = f"the judge sees {what}" if shown else f"the judge misses {what} and sees {seen}"
    return shown, share, text


def _verdict(judge: Judge, path: Path) -> tuple[Verdict, int]:
    """The judge's verdict on a file, of which no more frames are held than it looks at."""
    with VideoReader(path) as reader:
        num_frames = sum(1 for _ in reader)
    places = sample_frames(num_frames)
    wanted, kept = set(places), {}
    with VideoReader(path) as reader:
        for index, frame in enumerate(reader):
            if index in wanted:
                kept[index] = frame
    video = as_video(np.stack([kept[index] for index in places]))
    return judge.verdicts_of_samples(video)[0], num_frames


@cache
def _names() -> dict[str, str]:
    """What sprites are called, and which they are."""
    return {noun: sprite for sprite in SPRITE_NAMES for noun in nouns(sprite)}


@cache
def _cameras() -> tuple[tuple[str, str], ...]:
    listed = phrases()["cameras"]
    return tuple((name, _any(listed[name])) for name in CAMERAS)


@cache
def _weathers() -> tuple[tuple[str, str], ...]:
    return tuple((name, _any(listed)) for name, listed in phrases()["weathers"].items())


@cache
def _places() -> dict[str, str]:
    """What places are called, with and without the words before, and which they are."""
    before = re.compile(r"^(?:in|on|at|by|among|near|under|below|next to)(?: front of)? ")
    named: dict[str, str] = {}
    for place in PLACES:  # "the sea" is the ocean though "under the sea" is underwater
        listed = phrases()["places"][place]
        for words in (*listed, *(before.sub("", phrase) for phrase in listed), f"the {place}"):
            named.setdefault(words, place)
    return {words: place for words, place in named.items() if words not in _names()}


@cache
def _motions() -> tuple[tuple[str, str], ...]:
    """A pattern of each motion's phrases, in both forms of their verbs."""
    go = "|".join(form for verbs in phrases()["go"].values() for verb in verbs
                  for form in verb.split("/"))
    ways = {"{go}": f"(?:{go})", "{direction}": "(?:left|right)", "{opposite}": "(?:left|right)"}
    patterns = []
    for name in MOTIONS:
        keys = (name, "bounces along") if name == "bounces" else (name,)
        listed = [text for key in keys for text in phrases()["motions"][key]]
        joined = "|".join(re.sub(r"(\w+)/(\w+)", r"(?:\1|\2)", text) for text in listed)
        for word, pattern in ways.items():
            joined = joined.replace(word, pattern)
        patterns.append((name, rf"(?<![\w-])(?:{joined})(?![\w-])"))
    return tuple(patterns)


def _cut(text: str, patterns: Sequence[tuple[str, str]]) -> tuple[str, list[str]]:
    """A text without what the patterns match, and the names of those that did."""
    found = []
    for name, pattern in patterns:
        text, count = re.subn(pattern, " ", text)
        found += [name] if count else []
    return text, found


def _any(words: Sequence[str] | dict[str, str]) -> str:
    """A pattern of whole words or phrases, the longest first."""
    listed = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
    return rf"(?<![\w-])(?:{listed})(?![\w-])"
