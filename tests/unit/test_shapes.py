"""Sizes: strides forth and back, and refusals that name what would work."""

import pytest

from vidgen.core.errors import InputError
from vidgen.core.shapes import (
    Strides,
    check_num_frames,
    latent_shape,
    num_frames_for_seconds,
    size_for_aspect,
)

TOYBOX, WAN = Strides(t=4, hw=16), Strides(t=4, hw=8)


@pytest.mark.parametrize(
    ("video", "strides", "dims"),
    [
        ((33, 128, 128, 1), TOYBOX, (1, 32, 9, 8, 8)),
        ((81, 480, 832, 2), WAN, (2, 32, 21, 60, 104)),
        ((1, 16, 32, 1), TOYBOX, (1, 32, 1, 1, 2)),
        ((7, 16, 16, 1), Strides(t=1, hw=16), (1, 32, 7, 1, 1)),
    ],
)
def test_video_to_latents(video, strides, dims):
    *size, batch = video
    assert latent_shape(*size, strides, 32, batch=batch).dims == dims


@pytest.mark.parametrize(
    ("video", "patch", "named"),
    [
        ((32, 128, 128, 1), 1, ["32 frames", "29 and 33"]),
        ((2, 128, 128, 1), 1, ["2 frames", "1 and 5"]),
        ((33, 120, 128, 1), 1, ["height of 120", "multiple of 16", "112 and 128"]),
        ((33, 128, 8, 1), 1, ["width of 8", "16 and 32"]),
        ((33, 128, 144, 1), 2, ["width of 144", "multiple of 32", "128 and 160"]),
        ((0, 128, 128, 1), 1, ["frames", "at least 1", "is 0"]),
        ((33, -16, 128, 1), 1, ["height", "at least 1", "is -16"]),
        ((33, 128, 128, 0), 1, ["batch", "is 0"]),
        ((33.0, 128, 128, 1), 1, ["frames", "whole number", "33.0"]),
    ],
)
def test_unreachable_sizes_name_the_value_the_limit_and_what_would_work(video, patch, named):
    *size, batch = video
    with pytest.raises(InputError) as error:
        latent_shape(*size, TOYBOX, 32, batch=batch, patch=patch)
    for part in named:
        assert part in str(error.value)


def test_nearest_frame_counts_surround_the_wish():
    for wish in filter(lambda count: count % 4 != 1, range(1, 40)):
        with pytest.raises(InputError, match=f"{wish} frames can't be made") as error:
            check_num_frames(wish, TOYBOX)
        below, above = map(int, str(error.value).split("the nearest are ")[1].split(" and "))
        assert below <= wish < above
        assert below % 4 == above % 4 == 1


@pytest.mark.parametrize(
    ("seconds", "fps", "expected"),
    [(3, 12, (37, 36)), (33 / 12, 12, (33, 33)), (0.01, 12, (1, 1)), (5, 16, (81, 80))],
)
def test_seconds_generate_the_next_count_and_keep_what_was_asked(seconds, fps, expected):
    assert num_frames_for_seconds(seconds, fps, TOYBOX) == expected


@pytest.mark.parametrize(("seconds", "fps"), [(0, 12), (-1, 12), (float("nan"), 12), (2, 0)])
def test_durations_that_make_no_sense_are_refused(seconds, fps):
    with pytest.raises(InputError, match="give a number above 0"):
        num_frames_for_seconds(seconds, fps, TOYBOX)


@pytest.mark.parametrize(
    ("aspect", "area", "multiple", "size"),
    [
        (1, 128 * 128, 16, (128, 128)),
        (16 / 9, 128 * 128, 16, (96, 176)),
        (9 / 16, 128 * 128, 16, (176, 96)),
        (16 / 9, 480 * 832, 16, (480, 832)),
        (4, 128 * 128, 16, (64, 256)),
    ],
)
def test_size_keeps_the_area_at_another_aspect(aspect, area, multiple, size):
    assert size_for_aspect(aspect, area, multiple) == size


@pytest.mark.parametrize("aspect", [0, -1, float("inf"), float("nan")])
def test_aspect_that_makes_no_sense_is_refused(aspect):
    with pytest.raises(InputError, match="aspect"):
        size_for_aspect(aspect, 128 * 128, 16)
