"""How far the ruler for sound and picture can be trusted, and what a sound VAE leaves of sync.

    python -m eval.toybox.sync -o sync.json [--clips 300] [--sound-vae FOLDER] [--judge FOLDER]
        [--strength X] [--model toybox]

Bouncing clips are rendered with their sound; bounces are found in the pictures and onsets in the
sound, without a look at the truth, then set beside it and beside each other. With `--sound-vae` the
sound goes through that VAE first: the ceiling of any generator behind it. With `--strength` the
pictures are noised and drawn anew by a model first, which leaves the time of each bounce and draws
sprites with that model's faults: whether the ruler can be trusted on pictures that aren't rendered.
300 clips take two minutes of one core, drawn anew some two seconds each beside them.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.toybox.judge import JudgeFolder, embedded_judge
from eval.toybox.metrics.sync import measure_ruler
from train.toybox.redrawing import Redrawer
from train.toybox.sound_vae import load_sound_vae
from train.toybox.world.captions import caption
from train.toybox.world.scenes import SEED_RANGES, Scene
from vidgen.core.errors import InputError, exit_code
from vidgen.core.runtime import atomic_write, fingerprint
from vidgen.models.audio import AudioVAE


def main() -> int:
    """Measure, write the figures and print the ones that matter."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="RESULTS.json")
    parser.add_argument("--clips", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1 << 36, help="first scene within `dev`")
    parser.add_argument("--sound-vae", type=Path, metavar="FOLDER")
    parser.add_argument("--judge", type=Path, metavar="FOLDER")
    parser.add_argument("--strength", type=float, metavar="X", help="above 0, up to 1")
    parser.add_argument("--model", default="toybox", metavar="FOLDER")
    options = parser.parse_args()

    def work() -> None:
        if options.clips < 2:
            raise InputError(f"--clips {options.clips}: at least 2 are needed, to shuffle them")
        folder = JudgeFolder(options.judge) if options.judge else embedded_judge()
        vae = load_sound_vae(options.sound_vae) if options.sound_vae else None
        scores = measure_ruler(
            folder.load(), SEED_RANGES["dev"][0] + options.seed, options.clips,
            through=None if vae is None else lambda sound: round_trip(vae, sound),
            redrawn=None if options.strength is None else drawn_by(options.model, options.strength),
        )
        results = {
            "clips": options.clips, "seed": options.seed, "judge": folder.sha256,
            "sound_vae": options.sound_vae and str(options.sound_vae),
            "strength": options.strength, "model": options.model if options.strength else None,
            "machine": fingerprint(),
            "scores": without_nan(asdict(scores)),
        }
        atomic_write(options.output, (json.dumps(results, indent=1) + "\n").encode())
        print(json.dumps(results["scores"], indent=1))

    return exit_code(work)


def without_nan(scores: dict[str, Any]) -> dict[str, Any]:
    """Scores with None, which JSON knows, where nothing was found to measure."""
    return {
        name: without_nan(value) if isinstance(value, dict)
        else None if isinstance(value, float) and math.isnan(value) else value
        for name, value in scores.items()
    }  # fmt: skip


def drawn_by(model: str, strength: float) -> Callable[[Sequence[Scene], Tensor], Tensor]:
    """How a model draws clips [B, 3, T, H, W] of some scenes anew, noised as far as `strength`."""
    if not 0 < strength <= 1:
        raise InputError(f"--strength {strength}: give more than 0, up to 1")
    redrawer = Redrawer(model)

    def drawn(scenes: Sequence[Scene], video: Tensor) -> Tensor:
        told = [caption(scene, seed=0, detail="full") for scene in scenes]
        return redrawer.video(video, told, [scene.seed for scene in scenes], strength)

    return drawn


@torch.no_grad()
def round_trip(vae: AudioVAE, sound: Tensor) -> Tensor:
    """Sound [B, N] encoded and decoded, clamped."""
    return vae.decode(vae.encode(sound), sound.shape[1]).clamp(-1, 1)


if __name__ == "__main__":
    raise SystemExit(main())
