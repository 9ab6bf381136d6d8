"""The metrics of `python -m eval.toybox` on renders whose truth is known, and on what is none."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from eval.toybox.judge import Judge, embedded_judge
from eval.toybox.metrics.drift import Windows, looks, measure_drift
from eval.toybox.metrics.identity import identity_over_time, mean_answer, stranger_overlap
from eval.toybox.metrics.paths import fit_path, path_of
from eval.toybox.metrics.physics import fit_arcs, measure_fall
from eval.toybox.metrics.sync import sync_intervals
from eval.toybox.metrics.tracking import Sighting, sightings
from eval.toybox.suite.items import matched_triples
from train.toybox.world.cast import SPRITES
from train.toybox.world.render import render
from train.toybox.world.scenes import SEED_RANGES, Scene, compose_scene, is_held_out
from train.toybox.world.truth import ground_truth

SEED = SEED_RANGES["dev"][0] + 4321
CAST = (("cat", "moves left"), ("car", "bounces"), ("balloon", "circles"), ("fish", "grows"),
        ("rocket", "rises"), ("owl", "stays"))  # fmt: skip


@pytest.fixture(scope="module")
def judge() -> Judge:
    return embedded_judge().load()


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [compose_scene(SEED + i, *names, "meadow") for i, names in enumerate(CAST)]


@pytest.fixture(scope="module")
def video(scenes: list[Scene]) -> torch.Tensor:
    return render(scenes).video


@pytest.fixture(scope="module")
def tracks(judge: Judge, video: torch.Tensor) -> list[Sighting]:
    return sightings(judge, video)


@pytest.mark.long
def test_sprites_are_found_where_they_are(tracks: list[Sighting], scenes: list[Scene]) -> None:
    for sighting, scene in zip(tracks, scenes, strict=True):
        (actor,) = ground_truth(scene).actors
        errors = np.hypot(sighting.x - actor.position[:, 0] / 128,
                          sighting.y - actor.position[:, 1] / 128)  # fmt: skip
        assert np.median(errors) < 0.06, scene.actors[0].motion
        assert sighting.seen.mean() > 0.7


def test_a_path_is_nearest_to_its_own_family(tracks: list[Sighting], scenes: list[Scene]) -> None:
    fits = [fit_path(s, scene) for s, scene in zip(tracks, scenes, strict=True)]
    assert [fit.path for fit in fits] == [path_of(s.actors[0].motion) for s in scenes]
    assert all(fit.off is not None and fit.off < 0.08 for fit in fits)


def test_another_path_is_off_its_family(tracks: list[Sighting], scenes: list[Scene]) -> None:
    for sighting, own, other in zip(tracks, scenes, scenes[1:] + scenes[:1], strict=True):
        right, wrong = (fit_path(sighting, replace(own, actors=s.actors)) for s in (own, other))
        assert wrong.path != path_of(other.actors[0].motion)
        assert right.off is not None
        assert wrong.off is not None
        assert wrong.off > 1.5 * right.off


def test_what_is_hardly_seen_has_no_path(tracks: list[Sighting], scenes: list[Scene]) -> None:
    unseen = replace(tracks[0], seen=np.arange(33) < 4)
    fit = fit_path(unseen, scenes[0])
    assert (fit.path, fit.off) == (None, None)


def test_a_still_of_noise_shows_no_sprite(judge: Judge) -> None:
    noise = torch.randn(1, 3, 5, 128, 128, generator=torch.Generator().manual_seed(0))
    (sighting,) = sightings(judge, noise.clamp(-1, 1))
    assert not sighting.seen.any()
    assert identity_over_time(sighting) == {}
    assert mean_answer(sighting, tuple(SPRITES)) == {}


def course_of(gravities: list[float], fps: float = 12.0) -> np.ndarray:
    """Heights of bounces to a third of the frame, each arc with a gravity of its own."""
    heights, start = [], 0.0
    for gravity in gravities:
        flight = 2 * (2 * 0.33 / gravity) ** 0.5
        times = np.arange(round(start * fps), round((start + flight) * fps)) / fps - start
        heights.append(0.8 - gravity / 2 * times * (flight - times))
        start += flight
    return np.concatenate(heights)


def test_true_bounces_are_parabolas_of_one_gravity() -> None:
    fall = fit_arcs(course_of([2.2, 2.2, 2.2]), 12.0)
    assert fall.arcs == 3
    assert fall.residual == pytest.approx(0, abs=1e-3)
    assert fall.gravity == pytest.approx(2.2, rel=0.01)
    assert fall.spread is not None
    assert fall.spread < 0.02


def test_changing_gravity_and_crooked_arcs_are_reported() -> None:
    changing = fit_arcs(course_of([1.6, 2.2, 3.0]), 12.0)
    assert changing.spread is not None
    assert changing.spread > 0.15
    course = course_of([2.2, 2.2, 2.2])
    peaked = 0.8 - 0.33 * (1 - np.abs(1 - (0.8 - course) / 0.33)) ** 2
    crooked, true = fit_arcs(peaked, 12.0).residual, fit_arcs(course, 12.0).residual
    assert crooked is not None
    assert true is not None
    assert crooked > 5 * true
    assert fit_arcs(np.linspace(0.2, 0.8, 33), 12.0).arcs == 0


@pytest.mark.long
def test_a_rendered_bounce_obeys(judge: Judge, video: torch.Tensor, scenes: list[Scene]) -> None:
    fall = measure_fall(judge, video[1], scenes[1], 12.0)
    assert fall.arcs >= 2
    assert fall.residual is not None
    assert fall.residual < 0.01
    still = measure_fall(judge, video[5], scenes[5], 12.0)
    assert still.arcs == 0


def test_a_sprite_that_changes_loses_its_identity(tracks: list[Sighting]) -> None:
    calm = identity_over_time(tracks[5])
    assert set(calm) == {"identity_1", "identity_2", "identity_4", "identity_8", "identity_16"}
    names = tracks[5].names.copy()
    names[17:] = np.roll(names[17:], 1, axis=1)
    changed = identity_over_time(replace(tracks[5], names=names))
    assert calm["identity_16"] > 0.9
    assert changed["identity_16"] < 0.3
    assert changed["identity_1"] > changed["identity_16"]
    answers = [mean_answer(sighting, tuple(SPRITES)) for sighting in tracks]
    assert max(answers[0], key=answers[0].__getitem__) == "cat"
    assert stranger_overlap(answers) < 0.2


def test_drift_and_joins_are_those_that_are_planted(judge: Judge) -> None:
    windows = Windows(size=3, overlap=1, count=3, stride_t=4)
    assert (windows.length, windows.num_frames, windows.joins) == (9, 25, [9, 17])
    scene = compose_scene(SEED, "cat", "stays", "room")
    clip = render([scene], windows.num_frames).video
    calm = measure_drift(clip, windows, scene, judge)
    lit = clip.clone()
    lit[:, :, 9:] += 0.1
    lit[:, :, 17:] += 0.1
    drifted = measure_drift(lit.clamp(-1, 1), windows, scene, judge)
    assert abs(calm["brightness"]) < 0.01
    assert 0.05 < drifted["brightness"] <= 0.1
    assert drifted["joins"] > 3 * calm["joins"]
    assert calm["same"]
    assert calm["right"]
    assert looks(clip)["contrast"].shape == (25,)


def test_pairs_of_triples_differ_in_the_sprite_alone() -> None:
    pairs = matched_triples("dev", 60)
    triples = [[(s.actors[0].sprite, s.actors[0].motion, s.place) for s in pair] for pair in pairs]
    assert [is_held_out(*held) for _, held in triples] == [True] * 60
    assert not any(is_held_out(*seen) for seen, _ in triples)
    for seen, held in pairs:
        (one,), (other,) = seen.actors, held.actors
        assert (one.motion, one.size, one.speed) == (other.motion, other.size, other.speed)
        assert seen.camera == held.camera
        assert (seen.seed, seen.place, seen.weather) == (held.seed, held.place, held.weather)
    assert len({seen.place for seen, _ in pairs}) == 14


def test_the_interval_of_sync_holds_its_score() -> None:
    draws = np.random.default_rng(0)
    seen = [np.sort(draws.uniform(0.3, 2.3, 3)) for _ in range(30)]
    heard = [times + draws.normal(0.02, 0.005, 3) for times in seen]
    within = sync_intervals(seen, heard, 2.667, draws=100)
    assert within["median_s"][0] < 0.02 < within["median_s"][1]
    assert within["median_s"][1] - within["median_s"][0] < 0.01
    assert within["f1"][1] <= 1
