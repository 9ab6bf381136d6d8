"""Measures in time on features, flows and pictures whose answers are known."""

import math
import sys
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest

from eval.faults import spearman
from tests.textures import texture
from vidgen.core.errors import InputError
from vidgen.evaluation.metrics.clip import (
    IdentityDrift,
    color_feature,
    gradient_feature,
    measure_clip,
    sharpness,
)
from vidgen.evaluation.metrics.flow import (
    FlowEstimator,
    check_flow_size,
    occluded,
    sample_flow,
    warp_error,
)
from vidgen.evaluation.metrics.motion import (
    MotionMeter,
    Tracks,
    interpolate,
)
from vidgen.evaluation.metrics.vbench import (
    Consistency,
    Dimensions,
    is_dynamic,
    is_static,
    normalise,
    sampling_step,
    stillness,
    temporal_subtotal,
    top_speed,
)
from vidgen.evaluation.temporal.comparison import frechet_distance, kernel_distance


def at_angle(degrees):
    return np.array([math.cos(math.radians(degrees)), math.sin(math.radians(degrees))])


def consistency(angles, image=None):
    meter = Consistency(lambda frame: frame, None if image is None else at_angle(image))
    for angle in angles:
        meter.feed(at_angle(angle))
    return meter


def test_consistency_is_the_mean_cosine_to_the_one_before_and_to_the_first():
    wanted = ((0.5 + 0.5) + (0.5 + 0.0)) / 2 / 2  # cos 120 is below 0 and counts as 0
    assert consistency([0, 60, 120]).score == pytest.approx(wanted)
    assert consistency([30] * 5).score == pytest.approx(1)
    assert consistency([0]).score is None


def test_blank_frames_have_nothing_that_is_consistent():
    blank = np.zeros(2)
    meter = Consistency(lambda frame: frame, at_angle(0))
    for feature in (blank, blank):
        meter.feed(feature)
    assert meter.is_blank
    assert meter.score is None
    assert meter.image_score == 0  # nothing of it is kept
    for feature in (at_angle(0), at_angle(0)):
        meter.feed(feature)
    assert meter.score == pytest.approx((0 + 0 + (1 + 0) / 2) / 3)
    meter.image = blank
    assert meter.image_score is None


@pytest.mark.parametrize("size", [(96, 176), (100, 150), (128, 128), (480, 832)])
def test_pictures_of_a_single_colour_have_no_shape(size):
    flows = FlowEstimator()
    for color in ((0, 0, 0), (200, 30, 77), (255, 255, 255)):
        picture = np.full((*size, 3), color, np.uint8)
        assert not gradient_feature(flows.working(picture)).any()
        picture[40:44, 60:64] ^= 4
        assert gradient_feature(flows.working(picture)).any()


def test_the_image_score_weighs_the_nearest_the_mean_and_the_least():
    meter = consistency([0, 60, 60], image=30)
    nearest = math.cos(math.radians(30))
    assert meter.image_score == pytest.approx(0.4 * nearest + 0.3 * 0.75 + 0.3 * 0.5)
    assert consistency([0, 60]).image_score is None


def test_stillness():
    assert stillness([0, 51]) == pytest.approx(0.9)
    assert stillness([]) is None


def test_top_speed_is_the_mean_of_the_longest_share():
    flow = np.zeros((10, 10, 2), np.float32)
    flow[0, :5] = 3, 4
    assert top_speed(flow, 0.05) == pytest.approx(5)
    assert top_speed(flow, 0.10) == pytest.approx(2.5)
    assert top_speed(flow, 0.001) == 0


def test_dynamic_degree_counts_pairs_above_six_of_256_pixels():
    # 17 frames looked at: round(4 * 17 / 16) = 4 pairs
    assert is_dynamic([6.1] * 4 + [0.0] * 12, 256)
    assert not is_dynamic([6.1] * 3 + [0.0] * 13, 256)
    assert is_dynamic([3.1] * 16, 128)
    assert not is_dynamic([3.1] * 16, 256)
    assert not is_dynamic([0.0], 256), "two frames that don't move"
    assert [sampling_step(fps) for fps in (4, 8, 12, 24, 25, 30)] == [1, 1, 2, 3, 3, 4]


def test_the_static_filter_looks_at_neighbours_and_at_both_ends():
    # 16 frames: 2 pairs may exceed 3 pixels, the ends 3 * 2 * 2
    assert is_static([3.1] * 2 + [0.0] * 13, [11.0, 0.0], 256)
    assert not is_static([3.1] * 3 + [0.0] * 12, [0.0, 0.0], 256)
    assert not is_static([0.0] * 15, [12.1, 0.0], 256)


def test_scores_are_normalised_by_the_published_ranges():
    assert normalise("subject_consistency", 0.1462) == pytest.approx(0)
    assert normalise("motion_smoothness", 0.9975) == pytest.approx(1)
    # the row that VBench publishes of CogVideoX-5B, by hand
    row = {"subject_consistency": 0.9623, "background_consistency": 0.9652,
           "temporal_flickering": 0.9866, "motion_smoothness": 0.9692, "dynamic_degree": 0.71}
    wanted = ((0.9623 - 0.1462) / 0.8538 + (0.9652 - 0.2615) / 0.7385
              + (0.9866 - 0.6293) / 0.3707 + (0.9692 - 0.706) / 0.2915 + 0.5 * 0.71) / 4.5
    assert temporal_subtotal(row) == pytest.approx(wanted)
    assert temporal_subtotal({**row, "dynamic_degree": None}) is None


def test_flow_finds_a_shift_and_warping_takes_it_back():
    flows, wide = FlowEstimator(), texture(96, 140)
    one, other = wide[:, 6:134], wide[:, 2:130]  # content moves right by 4
    one, other = np.ascontiguousarray(one), np.ascontiguousarray(other)
    flow = flows.flow(flows.grey(one), flows.grey(other))
    assert np.median(flow[..., 0]) == pytest.approx(4, abs=0.1)
    back = flows.flow(flows.grey(other), flows.grey(one))
    hidden = occluded(flow, flows.warp(back, flow))
    assert hidden[:, -3:].all(), "what leaves the picture is hidden"
    assert hidden[10:-10, 10:-10].mean() < 0.05
    assert warp_error(one, flows.warp(other, flow), hidden) < 1e-4
    assert warp_error(one, other, np.zeros_like(hidden)) > 1e-3
    assert warp_error(one, other, np.ones_like(hidden)) is None


def test_flow_is_sampled_between_pixels():
    ramp = np.stack(np.meshgrid(np.arange(8.0), np.arange(6.0)), -1).astype(np.float32)
    assert sample_flow(ramp, np.array([[2.5, 3.25]])).tolist() == [[2.5, 3.25]]


def test_small_frames_are_refused():
    with pytest.raises(InputError, match="8x64"):
        check_flow_size(64, 8)


def follow(steps, size=64):
    tracks, hidden = Tracks(size, size), np.zeros((size, size), bool)
    for step in steps:
        tracks.advance(np.full((size, size, 2), step, np.float32), hidden)
    return tracks


def test_steady_motion_has_no_jerk_and_a_zigzag_has():
    assert follow([(0.5, 0.0)] * 10).jerk == pytest.approx(0, abs=1e-6)
    # x goes +1, -1, +1, ...: third differences are 4 pixels of 64
    assert follow([((-1.0) ** n, 0.0) for n in range(10)]).jerk == pytest.approx(100 * 4 / 64)


def test_frechet_distance_of_known_gaussians():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(400, 16))
    assert frechet_distance(rows, rows) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(rows, rows + 0.5) == pytest.approx(0.5 * 8)
    spread = float(np.trace(np.cov(rows, rowvar=False)))  # (2 - 1)^2 tr C, and the means
    means = float(np.square(rows.mean(0)).sum())
    assert frechet_distance(rows, 2 * rows) == pytest.approx(spread + means)
    few = rows[:6]  # fewer than values: the covariance has gaps, the distance has not
    assert frechet_distance(few, few + 0.5) == pytest.approx(0.5 * 8)
    assert frechet_distance([], []) is None


def test_kernel_distance_of_known_sets():
    # D = 1: k(x, y) = (x y + 1)^3; within {0, 2}: 1; within {1, 3}: 64; across: mean(1, 1, 27, 343)
    assert kernel_distance([[0.0], [2.0]], [[1.0], [3.0]]) == pytest.approx(1 + 64 - 2 * 93)
    draws = np.random.default_rng(0)
    ones, others = draws.normal(size=(2, 400, 4))
    assert abs(kernel_distance(ones, others)) < 0.05 < kernel_distance(ones, others + 0.5)
    assert kernel_distance(ones[:1], others) is None


def test_smoothness_knows_motion_from_trembling():
    flows, wide = FlowEstimator(), texture(64, 120)
    steady = [np.ascontiguousarray(wide[:, 2 * t : 2 * t + 64]) for t in range(9)]
    shaky = [np.ascontiguousarray(wide[:, t : t + 64])
             for t in (0, 5, 4, 9, 8, 13, 12, 17, 16)]

    def score(frames):
        meter = Dimensions(12, {}, {}, between=lambda a, b: interpolate(flows, a, b))
        for frame in frames:
            meter.feed(frame)
        return meter.figures([])["motion_smoothness"]

    assert score(steady) > 0.99
    assert score(shaky) < score(steady) - 0.02
    assert score(steady[:2]) is None


def test_sampled_motion_looks_eight_times_a_second():
    seen = []

    def flow(one, other):
        seen.append((int(one[0, 0, 0]), int(other[0, 0, 0])))
        return np.full((256, 256, 2), 9.0, np.float32)

    meter = Dimensions(24, {}, {}, flow)
    for index in range(10):
        meter.feed(np.full((256, 256, 3), index, np.uint8), np.zeros((256, 256, 2), np.float32))
    assert seen == [(0, 3), (3, 6), (6, 9)]
    assert meter.figures([])["dynamic_degree"] == 1.0


def motion(frames, fps=12):
    meter = MotionMeter(FlowEstimator(), fps)
    for frame in frames:
        meter.feed(np.ascontiguousarray(frame))
    return meter


def test_flicker_is_seen_on_what_stands_still():
    still = texture()
    flat = motion([still] * 8).figures()
    assert flat["flicker"] == 0
    bright = np.clip(still.astype(int) + 10, 0, 255).astype(np.uint8)
    assert motion([still, bright] * 4).figures()["flicker"] == pytest.approx(10, abs=0.2)


def is_still(frames):
    frames = [np.ascontiguousarray(frame) for frame in frames]
    figures = measure_clip(frames, Fraction(12)).figures
    return figures["proxy_temporal_flickering"] is not None


def test_speed_is_in_short_sides_a_second():
    wide = texture(96, 160)
    pan = [wide[:, t : t + 96] for t in range(13)]
    assert motion(pan).figures()["motion_speed"] == pytest.approx(12 / 96, rel=0.1)
    assert not is_still(pan)
    assert motion([wide[:, :96]] * 5).figures()["motion_speed"] == 0
    assert is_still([wide[:, :96]] * 5)
    shifted = motion([wide[:, :96], wide[:, 4:100]]).figures()
    assert shifted["motion_speed"] == pytest.approx(4 * 12 / 96, rel=0.1)


def test_a_long_clip_takes_no_more_memory():
    wide = texture(64, 96)

    def peak(count):
        frames = (np.ascontiguousarray(wide[:, t % 32 : t % 32 + 64]) for t in range(count))
        tracemalloc.start()
        measure_clip(frames, Fraction(12))
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(4)
    assert peak(150) - peak(30) < 150_000, "120 frames are 1.5 MB"


def test_identity_drift_grows_with_the_distance():
    drift = IdentityDrift()
    for level in range(20):
        drift.feed(color_feature(np.full((32, 32, 3), 40 + 4 * level, np.uint8)))
    found = drift.figures()
    values = [found[f"identity_drift_{d}"] for d in (1, 2, 4, 8, 16)]
    assert values == sorted(values)
    assert values[0] < values[-1]
    short = IdentityDrift()
    short.feed(np.ones(3))
    assert set(short.figures().values()) == {None}


def test_features_know_shapes_from_colours():
    picture = texture()
    turned = np.ascontiguousarray(np.roll(picture, 1, axis=-1))
    mirrored = np.ascontiguousarray(picture[:, ::-1])

    def like(feature, other):
        a, b = feature(picture), feature(other)
        return a @ b / math.sqrt((a @ a) * (b @ b))

    assert like(color_feature, mirrored) > 0.999 > like(color_feature, turned)
    assert like(gradient_feature, mirrored) < 0.95
    assert sharpness(picture) > sharpness(np.full_like(picture, 90)) == 0


def test_spearman():
    assert spearman([1, 2, 3, 4], [1, 8, 27, 64]) == pytest.approx(1)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.9486833)
    assert spearman([1, 2, 3], [5, 5, 5]) is None


@pytest.mark.parametrize(("steps", "moves"), [
    ([t // 12 for t in range(25)], False),  # a pixel of 96 a second
    ([t % 2 for t in range(25)], False),  # trembling gets nowhere
    (list(range(25)), True),
])
def test_the_gate_is_shut_for_what_hardly_moves(steps, moves):
    wide = texture(96, 130)
    frames = [np.ascontiguousarray(wide[:, step : step + 96]) for step in steps]
    measured = measure_clip(frames, Fraction(12))
    assert measured.dynamic is moves
    assert (measured.figures["steadiness"] > 0) is moves


def test_without_opencv_the_package_to_install_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(InputError, match=r"vidgen\[eval\]"):
        FlowEstimator()
