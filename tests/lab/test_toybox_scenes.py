import math

import numpy as np
import pytest

from train.toybox.world.cast import RESERVED_SPRITES, SPRITE_NAMES, SPRITES
from train.toybox.world.motion import Clock, actor_tracks, camera_track, frame_sides
from train.toybox.world.scenes import (
    MOTIONS,
    PLACES,
    SEED_RANGES,
    Actor,
    Scene,
    SceneMix,
    compose_scene,
    is_held_out,
    is_valid,
    sample_scenes,
    sounds_for,
)
from vidgen.core.errors import InputError

SCENES = sample_scenes(0, 300, SceneMix(two_actors=0.3))


def actors_and_scenes(scenes):
    return [(actor, scene) for scene in scenes for actor in scene.actors]


def on_screen(scene, size, num_frames=33):
    """Centre and longer side of each actor in shares of the frame: x [T], y [T], side [T]."""
    sides = frame_sides(*size)
    clock = Clock(num_frames, 12)
    progress = clock.progress(np.arange(num_frames, dtype=float))
    camera = camera_track(scene, sides, progress)
    ways = []
    for track in actor_tracks(scene, sides, clock, progress):
        x = (track.x - camera.x) * camera.zoom / sides[0] + 0.5
        y = (track.y - camera.y) * camera.zoom / sides[1] + 0.5
        ways.append((x, y, np.maximum(track.width, track.height) * camera.zoom / sides[1]))
    return ways


def test_a_scene_depends_on_its_own_seed_alone():
    assert sample_scenes(5, 20) == [sample_scenes(5 + i, 1)[0] for i in range(20)]
    assert sample_scenes(5, 20) != sample_scenes(6, 20)


def test_every_name_turns_up_and_reserved_ones_never_do():
    cast = actors_and_scenes(sample_scenes(0, 2000))
    assert {actor.sprite for actor, _ in cast} == set(SPRITE_NAMES)
    assert {actor.motion for actor, _ in cast} == set(MOTIONS)
    assert {scene.place for _, scene in cast} == set(PLACES)
    assert len(RESERVED_SPRITES) == 3
    assert not set(RESERVED_SPRITES) & set(SPRITE_NAMES)


def test_a_reserved_sprite_comes_on_request():
    scene = compose_scene(1, "unicorn", "rises", "city")
    assert (scene.actors[0].sprite, scene.actors[0].motion, scene.place) == (
        "unicorn",
        "rises",
        "city",
    )


def test_a_tenth_of_the_triples_is_held_out():
    triples = [(s, m, p) for s in SPRITE_NAMES for m in MOTIONS for p in PLACES if is_valid(s, m)]
    share = sum(is_held_out(*triple) for triple in triples) / len(triples)
    assert 0.09 < share < 0.11


HELD_OUT_OF_FOUR = [
    "car|bounces|ocean",
    "car|shrinks|ocean",
    "car|stays|ocean",
    "bus|moves right|meadow",
    "bus|falls|desert",
    "bus|spins|meadow",
    "bus|stays|meadow",
    "tractor|rises|desert",
    "tractor|circles|desert",
    "tractor|drives past|ocean",
    "tractor|stays|meadow",
    "bicycle|falls|meadow",
    "bicycle|bounces|meadow",
    "bicycle|circles|meadow",
    "bicycle|drives past|meadow",
    "bicycle|stays|meadow",
]


def test_the_held_out_triples_are_for_ever_the_same():
    names = ((s, m, p) for s in SPRITE_NAMES[:4] for m in MOTIONS for p in PLACES[:3])
    held = ["|".join(triple) for triple in names if is_held_out(*triple)]
    assert held == HELD_OUT_OF_FOUR


def test_training_scenes_hold_no_held_out_triple():
    for actor, scene in actors_and_scenes(sample_scenes(0, 500, split="train")):
        assert not is_held_out(actor.sprite, actor.motion, scene.place)
    for scene in sample_scenes(0, 50, split="held_out"):
        assert is_held_out(scene.actors[0].sprite, scene.actors[0].motion, scene.place)


def test_seed_ranges_are_disjoint():
    ends = [bound for span in SEED_RANGES.values() for bound in span]
    assert ends == sorted(ends)


def test_the_mix_is_kept():
    scenes = sample_scenes(0, 2000)
    singles = [s for s in scenes if s.relation is None]
    assert 0.82 < len(singles) / 2000 < 0.88
    assert 0.45 < sum(s.camera == "still" for s in scenes) / 2000 < 0.55
    assert 0.11 < sum(s.actors[0].tint is not None for s in scenes) / 2000 < 0.19
    plain = SceneMix(0, 0, 0, 0, 0, 0, sizes={"large": 1.0}, speeds={"fast": 1.0})
    for scene in sample_scenes(0, 50, plain):
        assert scene.relation is None
        assert scene.camera == "still"
        assert scene.weather == "clear"
        assert scene.sound == ()


@pytest.mark.parametrize(("name", "value"), [("tint", 1.5), ("sound", -0.1)])
def test_a_mix_of_more_than_all_is_refused(name, value):
    with pytest.raises(InputError, match=f"{name} is {value}; a probability lies in 0..1"):
        SceneMix(**{name: value})


def test_named_sounds_belong_to_the_scene():
    scenes = sample_scenes(0, 300, SceneMix(sound=1.0))
    assert all(set(scene.sound) <= set(sounds_for(scene)) for scene in scenes)
    assert sum(bool(scene.sound) for scene in scenes) > 250


@pytest.mark.parametrize("size", [(128, 128), (96, 160), (160, 96)])
def test_actors_go_a_quarter_of_the_frame_and_stay_visible(size):
    for scene in SCENES:
        for actor, (x, y, side) in zip(scene.actors, on_screen(scene, size), strict=True):
            if actor.motion not in ("stays", "spins", "grows", "shrinks"):
                assert max(np.ptp(x), np.ptp(y)) >= 0.25, scene
            inside = (abs(x - 0.5) < 0.5) & (abs(y - 0.5) < 0.5) & (side >= 0.2)
            assert inside.mean() >= 0.6, scene


@pytest.mark.parametrize("num_frames", [17, 33, 65])
def test_periodic_motions_show_one_and_a_half_periods(num_frames):
    sides = frame_sides(128, 128)
    clock = Clock(num_frames, 12)
    progress = np.linspace(0, 1, 999)
    for scene in SCENES:
        tracks = actor_tracks(scene, sides, clock, progress)
        for actor, track in zip(scene.actors, tracks, strict=True):
            if actor.motion == "spins":
                assert abs(track.angle[-1] - track.angle[0]) >= 1.499 * math.tau
            if actor.motion == "circles":
                turned = np.unwrap(np.arctan2(*_about_middle(track)))
                assert abs(turned[-1] - turned[0]) >= 1.499 * math.tau
            if actor.motion == "bounces":
                assert len(track.contacts) >= 1
            if actor.motion == "swings":
                assert np.count_nonzero(np.diff(np.sign(track.angle))) >= 3 - 1


def _about_middle(track):
    middle_x = (track.x.max() + track.x.min()) / 2
    return track.y - (track.y.max() + track.y.min()) / 2, track.x - middle_x


def test_growth_is_threefold():
    for scene in SCENES:
        for actor, (_, _, side) in zip(scene.actors, on_screen(scene, (128, 128)), strict=True):
            if actor.motion == "grows":
                assert side[-1] / side[0] > 3
            if actor.motion == "shrinks":
                assert side[0] / side[-1] > 3


def test_camera_never_moves_along_with_the_actor():
    across, upright = ("pan left", "pan right"), ("pan up", "pan down")
    for actor, scene in actors_and_scenes(SCENES):
        if actor.motion in ("moves left", "moves right", "drives past"):
            assert scene.camera not in across
        if actor.motion in ("rises", "falls"):
            assert scene.camera not in upright
        if actor.motion in ("grows", "shrinks"):
            assert not scene.camera.startswith("zoom")


def test_nothing_round_spins_and_nothing_is_tinted_its_own_colour():
    for actor, _ in actors_and_scenes(SCENES):
        assert is_valid(actor.sprite, actor.motion)
        assert actor.tint is None or actor.tint != SPRITES[actor.sprite].color
    with pytest.raises(InputError, match="round"):
        compose_scene(0, "soccer ball", "spins", "city")


@pytest.mark.parametrize(
    "make",
    [
        lambda: Actor("kar"),
        lambda: Actor("car", "drives past"),
        lambda: Actor("car", tint="mauve"),
        lambda: Scene(0, (Actor("car"),), place="space", weather="rain"),
        lambda: Scene(0, (Actor("car"), Actor("cat"))),
        lambda: Scene(0, (Actor("car"),), sound=("meow",)),
        lambda: sample_scenes(0, 1, split="training"),
    ],
)
def test_what_makes_no_sense_is_refused(make):
    with pytest.raises(InputError, match="can't be here"):
        make()


def test_a_wrong_name_is_met_with_the_nearest():
    with pytest.raises(InputError, match=r"'kar'.*'car'"):
        Actor("kar")
