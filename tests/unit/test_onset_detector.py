"""When something is seen to be hit, and which sound goes with that."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.unit.test_sound_candidates import RATE, clicks
from vidgen.core.shapes import Strides
from vidgen.diffusion.temporal_upsampling import LatentRate
from vidgen.models.onset_detector import (
    OnsetDetector,
    OnsetDetectorConfig,
    part_times,
    smeared,
)
from vidgen.pipeline.sound.own_sound import (
    ONSET_DETECTOR,
    Impacts,
    best_sound,
    impacts_seen,
)

CONFIG = OnsetDetectorConfig(latent_channels=4, dim=8, num_blocks=1, time_dim=16, num_time_blocks=1)
FPS = Fraction(12)


def seen(*moments: float, each: float = 1.0) -> Impacts:
    """So many impacts expected at each of some moments, spread over 40 ms."""
    times = np.sort([at + off for at in moments for off in (-0.02, 0.0, 0.02)])
    return Impacts(times, np.full(len(times), each / 3))


NOTHING = Impacts(np.zeros(0), np.zeros(0))


def kept(sounds: torch.Tensor, impacts: Impacts | None, most: int | None = None) -> tuple[int, int]:
    """The number of the sound that is kept, and how many were drawn."""
    numbers, drawn = torch.arange(float(len(sounds)))[:, None, None], list[int]()

    def draw(takes: range) -> torch.Tensor:
        drawn.extend(takes)
        return numbers[list(takes)]

    most = len(sounds) if most is None else most
    best = best_sound(draw, lambda made: sounds[made.flatten().long()], RATE, most, impacts)
    assert drawn == list(range(len(drawn)))
    return int(best.latents), len(drawn)


def test_it_looks_at_clips_of_any_size_and_length_each_by_itself() -> None:
    torch.manual_seed(0)
    detector = OnsetDetector(CONFIG).eval()
    latents = torch.randn(2, 4, 9, 6, 10)
    expected = detector.expected(latents)
    assert expected.shape == (2, 9, 8)
    assert torch.allclose(expected[1:], detector.expected(latents[1:]), atol=1e-6)
    assert detector.expected(torch.randn(1, 4, 1, 16, 16)).shape == (1, 1, 8)


def test_its_answer_is_the_mean_of_those_for_clips_smeared_over_time() -> None:
    torch.manual_seed(0)
    detector, latents = OnsetDetector(CONFIG).eval(), torch.randn(1, 4, 6, 6, 6)
    wanted = sum(detector(smeared(latents, share)).sigmoid() for share in (0.0, 0.25, 0.5)) / 3
    assert torch.allclose(detector.expected(latents), wanted, atol=1e-6)
    assert not torch.allclose(detector.expected(latents), detector(latents).sigmoid(), atol=1e-5)


def test_smeared_frames_are_drawn_towards_their_neighbours() -> None:
    flash = torch.tensor([0.0, 0, 1, 0, 0]).view(1, 1, 5, 1, 1)
    assert smeared(flash, 0.5).flatten().tolist() == [0, 0.25, 0.5, 0.25, 0]
    assert smeared(flash, 0.0).equal(flash)
    ends = torch.tensor([1.0, 0, 1]).view(1, 1, 3, 1, 1)  # what is before and after is like them
    assert smeared(ends, 1.0).flatten().tolist() == [0.5, 1, 0.5]
    assert smeared(flash[:, :, 2:3], 0.5).item() == 1


def test_it_computes_in_the_precision_of_its_weights() -> None:
    torch.manual_seed(0)
    detector, latents = OnsetDetector(CONFIG).eval(), torch.randn(1, 4, 5, 6, 6)
    exact = detector.expected(latents)
    assert torch.allclose(detector.bfloat16().expected(latents), exact, atol=0.05)


@pytest.mark.parametrize("at", [0, 5])
def test_parts_of_latent_frames_have_their_times(at: int) -> None:
    times = part_times(at, 3, 4, stride_t=4, fps=24)
    assert times.shape == (3, 4)
    assert times[1, 0] == pytest.approx((4 * at + 1 + 0.5) / 24)  # of frames 4 at + 1 to 4 at + 4
    assert torch.allclose(times.flatten().diff(), torch.tensor(1 / 24))


def parts_with(expected: torch.Tensor | None) -> Any:
    """Networks, among them a detector that expects this of any clip, or none."""
    components = {"vae": SimpleNamespace(config=SimpleNamespace(strides=Strides(4, 8)))}
    if expected is not None:
        components[ONSET_DETECTOR] = SimpleNamespace(config=SimpleNamespace(enough=0.75))

    class Used:
        def __enter__(self) -> Any:
            return SimpleNamespace(expected=lambda _latents: expected)

        def __exit__(self, *_: object) -> None:
            pass

    return SimpleNamespace(folder=SimpleNamespace(components=components),
                           device=torch.device("cpu"), use=lambda _role: Used())


@pytest.mark.parametrize(("factor", "first", "alone", "index"), [
    (1, 0, True, 2), (2, 0, True, 5), (1, 3, False, 0), (2, 3, False, 0), (2, 3, False, 3),
])
def test_what_is_seen_has_the_clips_own_time(
    factor: int, first: int, alone: bool, index: int
) -> None:
    expected = torch.zeros(1, 9, 4)
    expected[0, index, 1] = 1
    picture = torch.zeros(1, 4, 9, 2, 2)
    impacts = impacts_seen(parts_with(expected), picture, LatentRate(factor, alone), first, FPS)
    assert impacts is not None
    assert float(impacts.expected.sum()) == 1
    at = impacts.times[impacts.expected.argmax()]
    fine = index - 1 if alone else factor * (first - 1) + index  # latent frames of 4 before it
    assert at == pytest.approx((4 * fine + 1 + 1.5) / (12 * factor))


def test_a_single_picture_shows_nothing_that_happens() -> None:
    picture, expected = torch.zeros(1, 4, 3, 2, 2), torch.ones(1, 3, 4)
    for alone, first, count in ((True, 0, 8), (False, 4, 12)):
        impacts = impacts_seen(parts_with(expected), picture, LatentRate(1, alone), first, FPS)
        assert impacts is not None
        assert float(impacts.expected.sum()) == count
    assert impacts_seen(parts_with(None), picture, LatentRate(1), 0, FPS) is None


def test_a_sound_goes_with_what_is_seen_by_how_much_of_it_meets() -> None:
    impacts = seen(0.5, 1.2)
    assert impacts.fit(np.array([0.52, 1.18])) == pytest.approx(1)
    assert impacts.fit(np.array([0.5])) == pytest.approx(2 / 3)
    assert impacts.fit(np.array([0.5, 0.53, 1.2])) == pytest.approx(4 / 5)  # one of them too many
    assert impacts.fit(np.array([0.8])) == 0
    assert impacts.fit(np.zeros(0)) == 0
    later = replace(impacts, times=impacts.times + 0.3)
    assert later.fit(np.array([0.8, 1.5])) == pytest.approx(1)
    assert NOTHING.fit(np.zeros(0)) == 1
    unsure = seen(0.5, each=0.6)
    assert unsure.fit(np.array([0.5])) == pytest.approx(2 * 0.6 / 1.6)


def test_a_sound_is_late_by_the_mean_of_what_belongs_to_what_is_seen() -> None:
    impacts = seen(0.5, 1.2)
    assert impacts.lateness(np.array([0.52, 1.26])) == pytest.approx((0.08, 2))
    assert impacts.lateness(np.array([0.46])) == pytest.approx((-0.04, 1))
    late = impacts.lateness(np.array([0.52, 0.8, 1.5]))  # two belong to nothing
    assert late == pytest.approx((0.02, 1))
    unsure = Impacts(np.array([0.5, 1.2, 1.9]), np.array([1.0, 0.5, 0.2]))
    assert unsure.lateness(np.array([0.5, 1.26, 1.95])) == pytest.approx((0.03, 1.5))
    assert NOTHING.lateness(np.array([0.5])) == (0, 0)
    new = replace(impacts, new_from_s=1.0)  # what was heard before can't be moved any more
    assert new.lateness(np.array([0.52, 1.26])) == impacts.lateness(np.array([1.26]))


def test_sounds_are_drawn_until_one_goes_with_what_is_seen() -> None:
    others = [clicks(0.3, 1.0), clicks(0.31, 1.01), clicks(0.29, 0.99), clicks(0.55)]
    sounds = torch.stack([*others, clicks(0.9), clicks(0.55, 1.35), *others, *others])
    both, one = replace(seen(0.55, 1.35), enough=0.9), replace(seen(0.55), enough=0.9)
    assert kept(sounds, both) == (5, 8)  # of the second four
    assert kept(sounds, one) == (3, 4)
    assert kept(sounds, replace(both, enough=0.6)) == (3, 4)  # is good enough
    assert kept(sounds, both, most=5) == (3, 5)
    assert kept(sounds, replace(seen(1.8), enough=0.9)) == (0, len(sounds))  # none goes with it


def test_where_nothing_is_seen_sounds_bear_each_other_out() -> None:
    sounds = torch.stack([clicks(1.35), clicks(0.55), clicks(0.3, 1.0), clicks(0.31, 1.01),
                          *[clicks(1.35)] * 4])
    assert kept(sounds, NOTHING) == (2, 4)  # of the first four alone
    assert kept(sounds, seen(0.55, each=0.3)) == (2, 4)  # hardly seen
    assert kept(sounds, None) == (0, 8)  # nobody looks
    assert kept(sounds, None, most=1) == (0, 1)
    assert kept(sounds, seen(0.55), most=1) == (0, 1)
