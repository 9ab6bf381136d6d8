"""The order of batches: every item once an epoch, the same for any ranks, from any step on."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vidgen.core.errors import InputError
from vidgen.training.config import Bucket
from vidgen.training.data.dataset import Schedule, order_of
from vidgen.training.task import drawn

CLIP, LONG, PICTURE = Bucket(64, 48, 9), Bucket(48, 64, 17), Bucket(64, 48, 1)


@given(st.integers(1, 300), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_an_order_holds_everything_once(count, key):
    assert sorted(order_of(count, str(key))) == list(range(count))


def test_orders_differ_by_key_and_look_drawn():
    orders = {tuple(order_of(12, f"epoch {e}")) for e in range(200)}
    assert len(orders) == 200
    # each thing comes to each place about as often
    places = Counter(order_of(5, f"key {k}")[0] for k in range(2000))
    assert set(places) == set(range(5))
    assert all(330 < n < 470 for n in places.values())


def test_draws_are_even():
    values = [drawn("x", i) for i in range(4000)]
    assert all(0 <= v < 1 for v in values)
    assert abs(sum(values) / 4000 - 0.5) < 0.02


def taken(schedule, steps, size):
    return [(draw.bucket, slot) for step in steps for draw in [schedule.draw(step, size)]
            for slot in draw.slots]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_an_epoch_goes_through_every_item_and_says_what_it_repeats(size):
    counts = {CLIP: 7, LONG: 4, PICTURE: 5}
    schedule = Schedule(counts, seed=3)
    steps = schedule.steps_per_epoch(size)
    first, second = (taken(schedule, range(e * steps, (e + 1) * steps), size) for e in (0, 1))
    everything = {(bucket, slot) for bucket, n in counts.items() for slot in range(n)}
    assert set(first) == set(second) == everything
    assert first != second
    twice = {b: sum(n - 1 for (of, _), n in Counter(first).items() if of == b) for b in counts}
    assert {b: n for b, n in twice.items() if n} == schedule.remainders(size)


def test_a_step_depends_on_nothing_before_it():
    schedule = Schedule({CLIP: 70, LONG: 31}, seed=1)
    straight = [schedule.draw(step, 4) for step in range(60)]
    assert [Schedule({LONG: 31, CLIP: 70}, seed=1).draw(s, 4) for s in (59, 7, 23)] == [
        straight[s] for s in (59, 7, 23)]
    assert [Schedule({CLIP: 70, LONG: 31}, seed=2).draw(s, 4) for s in range(60)] != straight


@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_a_share_of_pictures_is_spread_evenly(share):
    schedule = Schedule({CLIP: 10, PICTURE: 40}, image_share=share)
    kinds = [schedule.draw(step, 2).bucket == PICTURE for step in range(200)]
    assert abs(sum(kinds) / 200 - share) < 0.01
    windows = [sum(kinds[i : i + 20]) for i in range(180)]
    assert max(windows) - min(windows) <= 1
    steps = schedule.steps_per_epoch(2)
    clips = [item for item in taken(schedule, range(steps), 2) if item[0] == CLIP]
    assert len(clips) == len(set(clips)) == 10


def test_epochs_are_counted():
    schedule = Schedule({CLIP: 10, LONG: 3})
    assert schedule.steps_per_epoch(2) == 5 + 2


@pytest.mark.parametrize(("counts", "what"), [({CLIP: 3}, "picture"), ({PICTURE: 3}, "clip")])
def test_a_share_of_what_isnt_there_is_refused(counts, what):
    with pytest.raises(InputError, match=f"the data have no {what}"):
        Schedule(counts, image_share=0.5)
