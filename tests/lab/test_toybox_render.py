import numpy as np
import pytest
import torch

from train.toybox.world.cast import SPRITES
from train.toybox.world.render import render
from train.toybox.world.scenes import (
    PLACES,
    Actor,
    Scene,
    SceneMix,
    sample_scenes,
    times_in,
    weathers_in,
)
from vidgen.core.errors import InputError

SCENES = sample_scenes(100, 12, SceneMix(two_actors=0.5, other_weather=0.6))
SMALL = {"num_frames": 9, "height": 64, "width": 64}


def test_shapes_and_range():
    video, masks = render(SCENES[:3], 5, 48, 80)
    assert video.shape == (3, 3, 5, 48, 80)
    assert masks.shape == (3, 2, 5, 48, 80)
    assert video.dtype == masks.dtype == torch.float32
    assert video.min() >= -1
    assert video.max() <= 1
    assert masks.min() >= 0
    assert masks.max() <= 1


def test_rendering_again_gives_the_same_bits():
    first, second = (render(SCENES, **SMALL) for _ in range(2))
    assert torch.equal(first.video, second.video)
    assert torch.equal(first.masks, second.masks)


@pytest.mark.long
@pytest.mark.parametrize("size", [(128, 128), (48, 80)])
def test_a_scene_in_a_batch_equals_the_scene_alone(size):
    together = render(SCENES, 5, *size)
    for i, scene in enumerate(SCENES):
        alone = render([scene], 5, *size)
        assert torch.equal(alone.video[0], together.video[i])
        assert torch.equal(alone.masks[0], together.masks[i])


def test_some_frames_equal_those_of_the_clip():
    whole = render(SCENES, **SMALL).video
    wanted = np.array([[i % 9, (5 * i + 2) % 9] for i in range(len(SCENES))])
    some = render(SCENES, **SMALL, frames=wanted).video
    for i, pair in enumerate(wanted):
        assert torch.equal(some[i], whole[i, :, torch.from_numpy(pair)])
    assert torch.equal(render(SCENES, **SMALL, frames=[3]).video, whole[:, :, 3:4])


def test_masks_tell_where_actors_are():
    """Recolouring an actor changes the picture inside its mask and nowhere else."""
    for actor in range(2):
        base = Scene(
            3,
            (Actor("car", "moves right", size="small"), Actor("cat", "moves left")),
            relation="passes",
        )
        cast = list(base.actors)
        cast[actor] = Actor(**{**vars(cast[actor]), "tint": "blue"})
        tinted = Scene(3, tuple(cast), relation="passes")
        plain, other = render([base], **SMALL), render([tinted], **SMALL)
        changed = (plain.video - other.video).abs().amax(1)[0] > 1e-6
        mask = plain.masks[0, actor]
        assert torch.equal(plain.masks, other.masks)
        assert not changed[mask == 0].any()
        assert changed[mask > 0.5].float().mean() > 0.5


@pytest.mark.long
def test_the_front_actor_covers_the_one_behind():
    masks = render(sample_scenes(0, 40, SceneMix(two_actors=1.0)), **SMALL).masks
    assert (masks.sum(1) <= 1 + 1e-5).all()
    assert (masks.amax((2, 3, 4)) > 0.5).all()


def test_an_absent_actor_has_an_empty_mask():
    single = next(s for s in SCENES if s.relation is None)
    assert render([single], **SMALL).masks[0, 1].count_nonzero() == 0


@pytest.mark.long
def test_every_sprite_can_be_seen_against_every_place():
    """Against each place, in each light, the sprite's pixels differ from the place's own."""
    names = list(SPRITES)
    for index, place in enumerate(PLACES):
        for time in times_in(place):
            sprites = names[index::14][:4]
            scenes = [Scene(9, (Actor(name),), place, time) for name in sprites]
            with_sprite = render(scenes, **SMALL, frames=[4])
            far = [Scene(9, (Actor(name, "drives past", direction="left"),), place, time)
                   for name in sprites]  # fmt: skip
            without = render(far, **SMALL, frames=[0])
            apart = (with_sprite.video - without.video).abs().mean(1)
            for i in range(len(sprites)):
                mask = with_sprite.masks[i, 0] > 0.9
                assert apart[i][mask].mean() > 0.12, (sprites[i], place, time)


def test_weathers_and_times_look_different():
    for place in PLACES:
        scenes = [
            Scene(1, (Actor("car"),), place, time, weather)
            for time in times_in(place)
            for weather in weathers_in(place)
        ]
        video = render(scenes, **SMALL, frames=[0]).video.flatten(1)
        gaps = torch.cdist(video, video, p=1) / video.shape[1]
        gaps.fill_diagonal_(1)
        assert gaps.min() > 0.02, place


def test_seeds_vary_a_place():
    scenes = [Scene(seed, (Actor("car"),), place) if place != "space" else
              Scene(seed, (Actor("car"),), place, "night")
              for place in PLACES for seed in (1, 2)]  # fmt: skip
    video = render(scenes, **SMALL, frames=[0]).video.flatten(1)
    assert ((video[::2] - video[1::2]).abs().mean(1) > 0.02).all()


def test_a_still_is_a_clip_of_one_frame():
    assert render(SCENES[:2], 1, 64, 64).video.shape == (2, 3, 1, 64, 64)


def test_bad_arguments_are_refused():
    with pytest.raises(InputError, match="needs a scene"):
        render([])
    with pytest.raises(InputError, match=r"9\.\.9 of a clip of 9"):
        render(SCENES[:1], **SMALL, frames=[9])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_with_the_cpu():
    here, there = render(SCENES), render(SCENES, device="cuda")
    assert (here.video - there.video.cpu()).abs().max() <= 2 / 255
    assert (here.masks - there.masks.cpu()).abs().max() <= 1 / 255
