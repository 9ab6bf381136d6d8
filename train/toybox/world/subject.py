"""A reserved sprite as a subject to be learned: clips of it, and prompts that it never acted out.

The sprite's name never stands in a text: a token does, such as `<subject_0>`. What it does in the
clips and where are kept apart from what it is asked for later: half of the motions and half of the
places each, so that it can't be remembered.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from train.toybox.world.captions import caption, nouns
from train.toybox.world.cast import RESERVED_SPRITES
from train.toybox.world.scenes import (
    MOTIONS,
    PLACES,
    SEED_RANGES,
    Draws,
    Scene,
    SceneMix,
    compose_scene,
    is_valid,
)
from vidgen.core.errors import InputError, nearest

_MIX = SceneMix(tint=0.0, sound=0.0)  # clips have none
_FIRST_CLIP = 5 * 10**11  # within "train", apart from what the model was made of
_FIRST_PROMPT = 1 << 38  # within "dev" and "test"


@dataclass(frozen=True)
class Subject:
    """A sprite to be learned.

    Args:
        sprite: one of the reserved ones.
        token: what captions and prompts call it.
        seed: decides what is shown and what is asked for.

    Raises:
        InputError: a sprite that the model knows already.
    """

    sprite: str
    token: str = "<subject_0>"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.sprite not in RESERVED_SPRITES:
            raise InputError(f"{self.sprite!r} is no reserved sprite; "
                             f"{nearest(self.sprite, RESERVED_SPRITES)}")

    @property
    def motions(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """What it does in the clips, and what it is asked to do."""
        return self._halves([name for name in MOTIONS if is_valid(self.sprite, name)], stream=21)

    @property
    def places(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Where it is in the clips, and where it is asked to be."""
        return self._halves(PLACES, stream=22)

    def clips(self, count: int) -> list[Scene]:
        """Scenes to learn it from."""
        first = SEED_RANGES["train"][0] + _FIRST_CLIP
        return self._scenes(count, self.motions[0], self.places[0], first)

    def prompts(self, count: int, split: str = "dev") -> list[tuple[Scene, str]]:
        """Scenes that share no motion and no place with any clip, and what asks for them."""
        first = SEED_RANGES[split][0] + _FIRST_PROMPT
        scenes = self._scenes(count, self.motions[1], self.places[1], first)
        return [(scene, self.caption(scene, 0, full=True)) for scene in scenes]

    def caption(self, scene: Scene, wording: int, *, full: bool = False) -> str:
        """One of a scene's wordings, with the token where the sprite's name would stand."""
        text = caption(scene, wording, detail="full" if full else None)
        names = "|".join(sorted(map(re.escape, nouns(self.sprite)), key=len, reverse=True))
        told, count = re.subn(rf"\b(?:{names})\b", self.token, text, flags=re.IGNORECASE)
        assert count, f"{text!r} names no {self.sprite}"
        return told

    def _halves(
        self, names: Sequence[str], stream: int
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        draws = Draws(self.seed, stream)
        luck = {name: draws.uniform() for name in names}
        mixed = sorted(names, key=luck.__getitem__)
        middle = (len(mixed) + 1) // 2
        return tuple(mixed[:middle]), tuple(mixed[middle:])

    def _scenes(
        self, count: int, motions: Sequence[str], places: Sequence[str], first: int
    ) -> list[Scene]:
        """Pairs on diagonals, so that motions and places come equally often."""
        return [
            compose_scene(
                first + (self.seed << 20) + i, self.sprite, motions[i % len(motions)],
                places[(i % len(motions) + i // len(motions)) % len(places)], _MIX,
            )
            for i in range(count)
        ]
