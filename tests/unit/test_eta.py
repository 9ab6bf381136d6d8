"""The share that is done and the seconds that are left, from an estimate and a clock by hand."""

from types import SimpleNamespace

import pytest

from vidgen.pipeline.types import Clock

STAGES = {"load": 5.0, "text": 10.0, "prepare": 0.0, "denoise": 80.0, "decode": 30.0}


def estimated(measured=True):
    stages = [SimpleNamespace(name=name, seconds=seconds) for name, seconds in STAGES.items()]
    return SimpleNamespace(stages=stages, measured=measured)


class Hand:
    now = 0.0

    def __call__(self):
        return self.now


def tell(clock, *stages, clip=1):
    """The start of each stage, (name, total), as it is reported."""
    for stage, total in stages:
        clock(stage, 0, total, clip)


@pytest.mark.parametrize("one_by_one", [False, True])
def test_the_share_rises_from_0_to_1(one_by_one):
    clock = Clock(2 * [estimated()] if one_by_one else estimated(), 2)
    sampling = [[(s, d, 2, c) for s in ("prepare", "sample") for d in (0, 1, 2)] for c in (1, 2)]
    writing = [[("write a.mp4", done, 9, c) for done in range(10)] for c in (1, 2)]
    if one_by_one:
        told = [entry for c in (0, 1)
                for entry in [("prompt", 0, 1, c + 1), *sampling[c], *writing[c]]]
    else:
        told = [("prompt", 0, 1, 1), *sampling[0], *sampling[1], *writing[0], *writing[1]]
    shares = [clock(*entry)["fraction"] for entry in told]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0, 1)


def test_clips_of_their_own_estimates_have_their_own_shares():
    short = SimpleNamespace(measured=True, stages=[
        SimpleNamespace(name=name, seconds=seconds / 10) for name, seconds in STAGES.items()])
    hand = Hand()
    clock = Clock([estimated(), short], 2, now=hand)
    assert clock("prompt", 0, 1)["eta_s"] == 120 + 12
    clock("prompt", 0, 1, 2)
    tell(clock, ("prepare", 1), ("sample", 8))
    clock("sample", 8, 8)
    tell(clock, ("write", 9))
    hand.now = 60
    assert clock("write", 9, 9) == {"fraction": round(120 / 132, 4), "eta_s": 60 * 12 / 120}


def test_what_is_left_is_as_estimated_until_much_is_done():
    hand = Hand()
    clock = Clock(estimated(), now=hand)
    assert clock("prompt", 0, 1) == {"fraction": 0, "eta_s": 120}
    hand.now = 30  # instead of 10: three times slower, and so will be the rest
    tell(clock, ("prepare", 1))
    assert clock("sample", 0, 8)["eta_s"] == 3 * (80 + 30)
    hand.now = 60
    assert clock("sample", 4, 8)["eta_s"] == pytest.approx(60 / 50 * 70)
    clock("sample", 8, 8)
    tell(clock, ("write x.mp4", 10))
    assert clock("write x.mp4", 10, 10) == {"fraction": 1, "eta_s": 0}


def test_few_steps_are_counted_from_the_first():
    hand = Hand()
    stages = [SimpleNamespace(name="denoise", seconds=100.0)]
    clock = Clock(SimpleNamespace(stages=stages, measured=True), now=hand)
    tell(clock, ("prompt", 1), ("prepare", 1), ("sample", 4))
    hand.now = 25
    assert clock("sample", 1, 4)["eta_s"] == 75


def test_sound_lies_between_the_picture_and_the_writing():
    hand = Hand()
    heard = estimated()
    heard.stages.insert(4, SimpleNamespace(name="sound", seconds=40.0))
    clock = Clock(heard, now=hand)
    tell(clock, ("prompt", 1), ("prepare", 1), ("sample", 8))
    hand.now = 90
    assert clock("sample", 8, 8)["eta_s"] == 40 + 30
    clock("sound", 0, 8)
    hand.now = 110
    assert clock("sound", 4, 8)["eta_s"] == 20 + 30
    unknown = Clock(estimated(), now=hand)  # another model's
    tell(unknown, ("prompt", 1), ("prepare", 1), ("sample", 8))
    assert unknown("sample", 8, 8) == unknown("sound", 4, 8)


def test_an_unknown_machine_tells_nothing_before_it_has_worked():
    hand = Hand()
    clock = Clock(estimated(measured=False), now=hand)
    assert clock("prompt", 0, 1)["eta_s"] is None
    tell(clock, ("prepare", 1))
    assert clock("sample", 0, 1000)["eta_s"] == 0, "the prompt took no time"
    hand.now = 40
    assert clock("sample", 1, 8)["eta_s"] == 40 / 20 * (70 + 30)


@pytest.mark.parametrize("kept", ["picture", "sound"])
def test_stages_that_an_earlier_run_did_take_no_time(kept):
    hand = Hand()
    heard = estimated()
    heard.stages.insert(4, SimpleNamespace(name="sound", seconds=40.0))
    clock = Clock(heard, now=hand)
    if kept == "picture":
        tell(clock, ("prompt", 1), ("sound", 8))
        hand.now = 100  # of 50 s: twice as slow
        clock("sound", 8, 8)
        assert clock("write", 0, 10)["eta_s"] == 60
    else:
        assert clock("write", 0, 10)["eta_s"] == 30
        hand.now = 30  # as half of it was to take 15
        assert clock("write", 5, 10)["eta_s"] == 30


def test_clips_that_share_a_prompt_go_on_in_any_stage():
    hand = Hand()
    clock = Clock(estimated(), 2, now=hand)  # 60 s each: 5 for the prompt, 40 and 15
    tell(clock, ("prompt", 1))  # for the second: the first is sampled
    hand.now = 10
    tell(clock, ("prepare", 1), ("sample", 8), clip=2)
    hand.now = 50
    clock("sample", 8, 8, 2)
    assert clock("write a.mp4", 0, 10, 1)["eta_s"] == 30
    hand.now = 65
    assert clock("write a.mp4", 10, 10, 1) == {"fraction": round(105 / 120, 4), "eta_s": 15}
    assert clock("write b.mp4", 0, 10, 2)["eta_s"] == 15


def test_what_an_earlier_run_did_takes_no_time():
    hand = Hand()
    clock = Clock(estimated(), 2, done=[1], now=hand)
    tell(clock, ("prompt", 1))
    tell(clock, ("prepare", 1), clip=2)
    hand.now = 5  # as long as the prompt's half was to take
    assert clock("sample", 7, 8, 2)["eta_s"] == 5 + 15  # goes on
    hand.now = 15  # twice as slow
    assert clock("sample", 8, 8, 2)["eta_s"] == pytest.approx(15 / 10 * 15)
    tell(clock, ("write b.mp4", 5), clip=2)
    assert clock("write b.mp4", 5, 5, 2) == {"fraction": 1, "eta_s": 0}


def test_clips_in_parallel_count_by_what_they_take():
    hand = Hand()
    clock = Clock([estimated(), estimated(), estimated()], now=hand)
    assert clock("prompt", 0, 1, 1) == {"fraction": 0.0, "eta_s": 360}
    for clip in (1, 2, 3):
        tell(clock, ("prompt", 1), ("prepare", 1), ("sample", 80), clip=clip)
    hand.now = 60.0
    half = clock("sample", 40, 80, 1)  # 50 of 120 seconds, and twice 10
    assert half["fraction"] == pytest.approx(70 / 360, abs=1e-4)
    assert half["eta_s"] == pytest.approx(60 * 290 / 70, abs=0.2)
    clock("write", 9, 9, 2)
    assert clock("write", 9, 9, 1)["fraction"] == pytest.approx(250 / 360, abs=1e-4)
    again = clock("prompt", 0, 1, 3)
    clock("sample", 80, 80, 3)
    assert clock("prompt", 0, 1, 3)["fraction"] == again["fraction"], "its worker died"
    assert clock("write", 9, 9, 3)["fraction"] == 1.0
