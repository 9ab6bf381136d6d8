"""Verdicts against the truth: what of a scene a clip shows, and how far the judge can be trusted.

Axes: B clips, T frames, H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from eval.toybox.judge import NOTHING, Judge, Verdict, sample_frames
from eval.toybox.rates import Rate
from train.toybox.world.render import render
from train.toybox.world.scenes import Scene, sample_scenes

TASKS = ("sprite", "motion", "place", "camera")
BATCH = 8


def answers(verdict: Verdict) -> dict[str, str]:
    """The judge's answer to each of `TASKS`."""
    return {task: getattr(verdict, task) for task in TASKS}


def grade(verdict: Verdict, scene: Scene) -> dict[str, bool]:
    """Which of `TASKS` the clip gets right; of two actors both must be, in any order."""
    return {
        "sprite": verdict.shows([actor.sprite for actor in scene.actors]),
        "motion": verdict.moves([actor.motion for actor in scene.actors]),
        "place": verdict.place == scene.place,
        "camera": verdict.camera == scene.camera,
    }


def judge_renders(
    judge: Judge,
    first_seed: int,
    count: int,
    num_frames: int = 33,
    size: tuple[int, int] = (128, 128),
) -> dict[str, Rate]:
    """Measure the judge on fresh renders of the default mix, and on what shows nothing.

    Args:
        judge: the judge.
        first_seed: of `count` scenes.
        count: of scenes, and of clips of noise and blobs.
        num_frames: of each clip.
        size: (height, width).

    Returns:
        `TASKS` on scenes of one actor, "two_sprites" and "two_motions" on those of two, "nothing":
        how often noise and blobs are called nothing.
    """
    outcomes: dict[str, list[bool]] = {task: [] for task in (*TASKS, "two_sprites", "two_motions")}
    scenes, device = sample_scenes(first_seed, count), next(judge.parameters()).device
    for start in range(0, count, BATCH):
        part = scenes[start : start + BATCH]
        looks = render(part, num_frames, *size, frames=sample_frames(num_frames), device=device)
        for scene, verdict in zip(part, judge.verdicts_of_samples(looks.video), strict=True):
            _collect(outcomes, grade(verdict, scene), len(scene.actors))
    generator = torch.Generator().manual_seed(first_seed)
    outcomes["nothing"] = []
    for start in range(0, count, BATCH):
        video = gibberish(min(BATCH, count - start), num_frames, size, generator)
        outcomes["nothing"] += [v.sprite == NOTHING for v in judge.verdicts(video.to(device))]
    return {name: Rate.of(known) for name, known in outcomes.items()}


def _collect(outcomes: Mapping[str, list[bool]], right: Mapping[str, bool], actors: int) -> None:
    for task in TASKS:
        two = actors > 1 and task in ("sprite", "motion")
        outcomes[f"two_{task}s" if two else task].append(right[task])


def gibberish(
    count: int, num_frames: int, size: tuple[int, int], generator: torch.Generator
) -> Tensor:
    """Clips [B, 3, T, H, W] in [-1, 1] that show nothing: white noise and blobs by turns."""
    clips = []
    for index in range(count):
        if index % 2:
            clips.append(_blobs(num_frames, size, generator))
        else:
            strength = float(torch.rand((), generator=generator))
            noise = torch.randn((3, num_frames, *size), generator=generator)
            clips.append(noise * (0.2 + 0.8 * strength))
    return torch.stack(clips).clamp(-1, 1)


def _blobs(num_frames: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Two to seven soft discs [3, T, H, W] of random colours that drift over a flat ground."""
    height, width = size
    number = int(torch.randint(2, 8, (), generator=generator))
    luck = torch.rand((number, 8), generator=generator)
    progress = torch.linspace(0, 1, num_frames)[:, None, None]
    y, x = torch.linspace(0, 1, height)[:, None], torch.linspace(0, 1, width)
    picture = (torch.rand((3, 1, 1, 1), generator=generator) * 2 - 1).expand(
        3, num_frames, height, width
    )
    for disc in luck:
        row, column = disc[0] + (disc[1] - 0.5) * progress, disc[2] + (disc[3] - 0.5) * progress
        radius = 0.06 + 0.2 * disc[4]
        alpha = torch.exp(-((y - row) ** 2 + (x - column) ** 2) / radius**2)
        picture = torch.lerp(picture, (disc[5:8] * 2 - 1)[:, None, None, None], alpha)
    return picture


def answer_counts(given: Sequence[tuple[str, str]]) -> dict[str, dict[str, int]]:
    """How often each truth got each wrong answer, {truth: {answer: times}}, of (truth, answer)."""
    table: dict[str, dict[str, int]] = {}
    for truth, answer in given:
        if truth != answer:
            row = table.setdefault(truth, {})
            row[answer] = row.get(answer, 0) + 1
    return table
