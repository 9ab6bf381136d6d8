"""The ruler of shapes: a sprite's own drawing against what a clip shows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from eval.toybox.metrics.shape import ANGLES, drawings_of, shape_fit, stranger
from train.toybox.world.cast import RESERVED_SPRITES, SPRITE_NAMES, SPRITES
from train.toybox.world.render import render
from train.toybox.world.scenes import DIRECTIONS_FOR, MOTIONS, Actor, Scene, sample_scenes

SIZE = (17, 96, 96)


def shown(scene: Scene) -> torch.Tensor:
    return render([scene], *SIZE).video[0]


def fit(video: torch.Tensor, scene: Scene) -> float:
    found = shape_fit(video, drawings_of(scene, *SIZE))
    assert found is not None
    return found


def shuffled(scene: Scene, side: int = 4) -> torch.Tensor:
    """The clip with the small squares of its sprite in another order: colours, texture, outline."""
    shot = render([scene], *SIZE)
    video, masks = shot.video[0].clone(), shot.masks[0, 0]
    draw = torch.Generator().manual_seed(0)
    for t in range(SIZE[0]):
        inside = F.avg_pool2d(masks[t][None, None], side)[0, 0] > 0.8
        rows, columns = inside.nonzero(as_tuple=True)
        order = torch.randperm(len(rows), generator=draw).tolist()
        before = video[:, t].clone()
        for at, other in enumerate(order):
            (r, c), (s, d) = ((side * int(rows[i]), side * int(columns[i])) for i in (at, other))
            video[:, t, r : r + side, c : c + side] = before[:, s : s + side, d : d + side]
    return video


@pytest.mark.long
@pytest.mark.parametrize("sprite", ["airplane", "cow", "robot"])
def test_a_drawing_is_found_wherever_it_stands(sprite: str) -> None:
    asked = Scene(3, (Actor(sprite, "moves right"),), "desert")
    elsewhere = Scene(8, (Actor(sprite, "moves right", size="large"),), "desert")
    clip = shown(elsewhere)
    own, other = fit(clip, asked), fit(clip, stranger(asked))
    assert own > 0.7
    assert own > other + 0.3
    assert own > fit(shuffled(elsewhere), asked) + 0.3, "colours and texture make no shape"
    blurred = F.avg_pool3d(clip, (1, 7, 7), 1, (0, 3, 3))
    assert other < fit(blurred, asked) < own


def test_what_turns_is_found_at_any_angle() -> None:
    swinging = Scene(3, (Actor("car", "swings"),), "desert")
    assert len(drawings_of(swinging, *SIZE)) == ANGLES
    assert len(drawings_of(Scene(3, (Actor("car", "stays"),)), *SIZE)) == 1
    assert fit(shown(Scene(9, swinging.actors, "desert")), swinging) > 0.8


def test_light_and_contrast_of_a_clip_change_little() -> None:
    scene = Scene(3, (Actor("duck", "bounces"),), "meadow")
    clip = shown(scene)
    assert fit(0.6 * clip + 0.2, scene) == pytest.approx(fit(clip, scene), abs=0.01)
    assert fit(clip, scene) <= 1 + 1e-4
    assert -1 <= fit(torch.zeros_like(clip), scene) < 0.1


def test_what_is_never_seen_has_no_shape() -> None:
    assert shape_fit(torch.zeros(3, 5, 32, 32), []) is None
    still = Scene(3, (Actor("car", "stays"),))
    assert drawings_of(still, 1, 16, 16) == []
    assert fit(shown(still)[:, :1], still) > 0.9, "one frame will do"


@pytest.mark.parametrize("motion", MOTIONS)
def test_there_is_a_stranger_for_everyone(motion: str) -> None:
    for sprite in SPRITE_NAMES + RESERVED_SPRITES:
        if motion == "spins" and SPRITES[sprite].is_round:
            continue
        scene = Scene(1, (Actor(sprite, motion, direction=DIRECTIONS_FOR.get(motion, (None,))[0]),))
        (other,) = stranger(scene).actors
        assert other.sprite != sprite
        assert other.motion == motion
    (scene,) = sample_scenes(5, 1)
    assert stranger(scene) == stranger(scene)
