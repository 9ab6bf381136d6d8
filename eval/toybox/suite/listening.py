"""What the sound judge hears against the truth, and how far it can be trusted."""

from __future__ import annotations

import torch
from torch import Tensor

from eval.toybox.judge import NOTHING
from eval.toybox.rates import Rate
from eval.toybox.sound_judge import Heard, SoundJudge
from train.toybox.world.ambience import ambience_of
from train.toybox.world.scenes import Scene, sample_scenes
from train.toybox.world.sound import synthesize

BATCH = 16


def grade_sound(heard: Heard, scene: Scene) -> dict[str, bool]:
    """Which of voice and ambience a clip's sound gets right; of two actors both, in any order."""
    return {
        "voice": heard.hears([actor.sprite for actor in scene.actors]),
        "ambience": heard.ambience == ambience_of(scene.place),
    }


def judge_sounds(
    judge: SoundJudge, first_seed: int, count: int, num_frames: int = 33
) -> dict[str, Rate]:
    """Measure the judge on fresh sounds of the default mix, and on what holds nothing.

    Args:
        judge: the sound judge.
        first_seed: of `count` scenes.
        count: of scenes, and of sounds of nothing.
        num_frames: of each clip, at 12 a second.

    Returns:
        "voice" of scenes of one actor, "two_voices" of those of two, "ambience", and "nothing": how
        often silence, noise and single tones are called nothing.
    """
    outcomes: dict[str, list[bool]] = {
        name: [] for name in ("voice", "two_voices", "ambience", "nothing")
    }
    scenes, device = sample_scenes(first_seed, count), next(judge.parameters()).device
    generator = torch.Generator().manual_seed(first_seed)
    for start in range(0, count, BATCH):
        part = scenes[start : start + BATCH]
        sound = synthesize(part, num_frames).to(device)
        for scene, heard in zip(part, judge.verdicts(sound), strict=True):
            right = grade_sound(heard, scene)
            outcomes["voice" if len(scene.actors) == 1 else "two_voices"].append(right["voice"])
            outcomes["ambience"].append(right["ambience"])
        empty = hollow_sound(len(part), sound.shape[1], generator).to(device)
        outcomes["nothing"] += [heard.voice == NOTHING for heard in judge.verdicts(empty)]
    return {name: Rate.of(known) for name, known in outcomes.items()}


def hollow_sound(count: int, num_samples: int, generator: torch.Generator) -> Tensor:
    """Sound [B, N] that holds nothing: silence, white and coloured noise, single tones by turns."""
    sounds = []
    for index in range(count):
        luck = torch.rand(3, generator=generator).tolist()
        noise = torch.randn(num_samples, generator=generator)
        if index % 4 == 0:
            sounds.append(noise * 1e-5)
        elif index % 4 == 1:
            sounds.append(noise * 0.3 * luck[0])
        elif index % 4 == 2:
            spectrum = torch.fft.rfft(noise)
            tilt = torch.linspace(0.01, 1, len(spectrum)) ** (-1.5 * luck[1])
            coloured = torch.fft.irfft(spectrum * tilt, num_samples)
            sounds.append(0.2 * luck[0] * coloured / coloured.std())
        else:
            angle = torch.arange(num_samples) * (0.02 + 1.5 * luck[1])
            sounds.append(0.3 * luck[0] * torch.sin(angle) + noise * 0.01 * luck[2])
    return torch.stack(sounds).clamp(-1, 1)
