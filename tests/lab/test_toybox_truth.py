import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from train.toybox.world.render import render
from train.toybox.world.scenes import Actor, Scene, SceneMix, sample_scenes
from train.toybox.world.truth import events, ground_truth

CLEAR = SceneMix(two_actors=0.3, other_weather=0.0)


def follow(video, flow):
    """Fetch each point of frame t from where the flow says it is in frame t + 1."""
    height, width = video.shape[-2:]
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    x = (columns + 0.5 + flow[:, 0]) * 2 / width - 1
    y = (rows + 0.5 + flow[:, 1]) * 2 / height - 1
    return F.grid_sample(video[1:], torch.stack([x, y], -1), align_corners=False)


@pytest.mark.parametrize("seed", range(200, 212))
def test_flow_carries_a_frame_to_the_next(seed):
    scene = sample_scenes(seed, 1, CLEAR)[0]
    truth = ground_truth(scene, 9, 96, 96)
    video = render([scene], 9, 96, 96).video[0].transpose(0, 1)
    error = (follow(video, truth.flow) - video[:-1]).abs().mean(1)
    unmoved = (video[1:] - video[:-1]).abs().mean(1)
    assert truth.tracked.mean() > 0.7
    assert (error * truth.tracked).sum() / truth.tracked.sum() < 0.04
    on_actor = truth.tracked * (truth.masks[:, :-1].amax(0) > 0.9)
    moved = (truth.flow.abs().amax(1) > 2) * on_actor
    if moved.sum() > 100:
        assert (error * moved).sum() < 0.4 * (unmoved * moved).sum()


def test_masks_sit_where_the_actor_is():
    for scene in sample_scenes(300, 12, CLEAR):
        truth = ground_truth(scene, 9, 96, 96)
        rendered = render([scene], 9, 96, 96).masks[0]
        for index, actor in enumerate(truth.actors):
            mask = truth.masks[index]
            assert torch.equal(mask, rendered[index])
            for t in np.flatnonzero(actor.visible > 0.97):
                rows, columns = torch.nonzero(mask[t] > 0.3, as_tuple=True)
                middle = ((columns.min() + columns.max()) / 2, (rows.min() + rows.max()) / 2)
                reach = 0.25 * actor.scale[t].max()
                assert abs(float(middle[0]) + 0.5 - actor.position[t, 0]) < reach
                assert abs(float(middle[1]) + 0.5 - actor.position[t, 1]) < reach


def test_the_outline_has_the_size_of_the_mask():
    scene = Scene(4, (Actor("bus", "moves right"),), camera="pan up")
    truth = ground_truth(scene, 9)
    for t in range(9):
        rows, columns = torch.nonzero(truth.masks[0, t] > 0.5, as_tuple=True)
        assert float(columns.max() - columns.min() + 1) == pytest.approx(
            truth.actors[0].scale[t, 0], abs=2.5
        )
        assert float(rows.max() - rows.min() + 1) == pytest.approx(
            truth.actors[0].scale[t, 1], abs=2.5
        )


@pytest.mark.parametrize("speed", ["slow", "normal", "fast"])
@pytest.mark.parametrize("direction", [None, "left"])
def test_a_contact_is_where_the_bounce_is_lowest(speed, direction):
    """At 40 frames a contact, the lowest frame is the one nearest to the exact time."""
    scene = Scene(8, (Actor("frog", "bounces", speed=speed, direction=direction),))
    frames, fps = 161, 60.0
    truth = ground_truth(scene, frames, 32, 32, fps)
    contacts = [e.seconds for e in truth.events if e.kind == "contact"]
    y = truth.actors[0].position[:, 1]
    lowest = [t for t in range(1, frames - 1) if y[t] >= y[t - 1] and y[t] > y[t + 1]]
    inner = [s for s in contacts if 1 / fps < s < (frames - 2) / fps]
    assert len(inner) == len(lowest) >= 1
    for seconds, t in zip(inner, lowest, strict=True):
        assert abs(seconds - t / fps) <= 1 / fps


def test_what_drives_past_enters_crosses_and_leaves():
    scene = Scene(2, (Actor("car", "drives past", direction="right"),))
    entered, crossed, left = events(scene, 33)
    assert (entered.kind, crossed.kind, left.kind) == ("enter", "cross", "leave")
    assert 0 < entered.seconds < 0.2
    assert crossed.seconds == pytest.approx(16 / 12, abs=1e-5)
    assert left.seconds == pytest.approx(32 / 12 - entered.seconds, abs=1e-5)
    visible = ground_truth(scene, 33).actors[0].visible
    assert visible[0] < 0.01
    assert visible[16] == pytest.approx(1, abs=0.02)
    assert visible[32] < 0.01


def test_passing_happens_when_both_are_abreast():
    cast = (Actor("cat", "moves left"), Actor("dog", "moves right"))
    scene = Scene(3, cast, relation="passes")
    (event,) = (e for e in events(scene, 33) if e.kind == "pass")
    truth = ground_truth(scene, 33)
    gap = truth.actors[0].position[:, 0] - truth.actors[1].position[:, 0]
    t = event.seconds * 12
    assert np.interp(t, np.arange(33), gap) == pytest.approx(0, abs=0.2)


def test_still_clip_has_no_flow_and_zoom_has_radial_flow():
    still = ground_truth(Scene(1, (Actor("cat"),)), 3, 32, 32)
    assert still.flow.abs().max() < 1e-5
    zoom = ground_truth(Scene(1, (Actor("cat"),), camera="zoom in"), 3, 32, 32)
    growth = zoom.camera[1, 2] / zoom.camera[0, 2]
    assert float(zoom.flow[0, 0, 0, 0]) == pytest.approx((growth - 1) * -15.5, abs=1e-3)


def test_camera_truth_of_a_pan():
    truth = ground_truth(Scene(1, (Actor("cat"),), camera="pan right"), 33, 128, 128)
    assert truth.camera[-1, 0] - truth.camera[0, 0] == pytest.approx(0.3 * 128)
    assert np.ptp(truth.camera[:, 1]) == 0
    assert (truth.camera[:, 2] == 1).all()


def test_a_spin_turns_the_angle():
    actor = Actor("star", "spins", direction="counterclockwise")
    angle = ground_truth(Scene(1, (actor,)), 9, 32, 32).actors[0].angle
    assert angle[-1] == pytest.approx(-2 * math.tau)


def test_a_still_picture_has_no_events():
    assert events(Scene(8, (Actor("frog", "bounces"),)), 1) == ()
