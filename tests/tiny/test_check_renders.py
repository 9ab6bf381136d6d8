"""The checks on rendered Toybox clips: clean ones are clean, planted faults are found."""

import numpy as np
import pytest

from tests.unit.test_checks import planted


def alarms(count, **sizes):
    """Findings of clean renders, but for those in which indeed nothing moves."""
    for prompt, frames in planted.rendered(count, **sizes):
        for finding in planted.check(frames, frames[0]):
            if finding.kind != "still" or np.any(frames != frames[0]):
                yield prompt, finding


def test_no_alarm_on_renders():
    assert list(alarms(24)) == []


@pytest.mark.long
def test_no_alarm_on_200_renders_nor_on_wide_ones():
    assert list(alarms(200)) == []
    assert list(alarms(20, num_frames=81, side=192)) == []


def test_planted_faults_are_found_in_renders():
    for _, frames in planted.rendered(3):
        for kind, (plant, strengths) in planted.PLANTS.items():
            mildly, badly = (
                {f.kind for f in planted.check(plant(frames, strength), frames[0])}
                for strength in (strengths[0], strengths[-1])
            )
            assert kind.split()[0] in badly - mildly
