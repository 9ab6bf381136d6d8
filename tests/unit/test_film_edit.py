"""A film's edit: exact places, transitions in pixels, texts with their times, pieces."""

from __future__ import annotations

import random
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vidgen.core.errors import InputError
from vidgen.media.subtitles import Cue, as_srt, as_webvtt, one_at_a_time
from vidgen.media.write import CONTAINERS
from vidgen.story.assemble import Piece, blended, faded, pieces_of
from vidgen.story.captions import Burner, Burnt, as_frames, captions_of, titles_of
from vidgen.story.edit import CODECS, picture_settings
from vidgen.story.elements import Caption, Defaults, Finish, Project, Scene, TimedPrompt, Transition
from vidgen.story.script import Script, Shot
from vidgen.story.timeline import Section, lay_out

FPS = Fraction(12)
KINDS = ["cut", "dissolve", "fade-black", "fade-white", "wipe-left", "wipe-right", "slide-left",
         "slide-right"]
RED = np.full((6, 10, 3), (200, 0, 0), np.uint8)
BLUE = np.full((6, 10, 3), (0, 0, 100), np.uint8)


@dataclass
class Planned:
    shot: Shot
    num_frames: int


def shot(name, transition=None, **keys):
    how = transition if transition is None or isinstance(transition, Transition) else Transition(
        *transition)
    return Shot((TimedPrompt("x"),), id=name, transition=how, **keys)


def placed(shots, lengths, fps=FPS, **project):
    script = Script(tuple(shots), project=Project(**project), scenes=SCENES)
    planned = [Planned(each, n) for each, n in zip(shots, lengths, strict=True)]
    return lay_out(script, planned, fps)


SCENES = {"a": Scene("One"), "b": Scene("Two"), "c": Scene()}


def test_twelve_shots_with_transitions_keep_every_time_to_half_a_frame():
    drawn = random.Random(3)
    shots = [shot(f"s{i}", (drawn.choice(KINDS), round(drawn.uniform(0.1, 0.9), 3)))
             for i in range(12)]
    lengths = [drawn.randint(25, 60) for _ in shots]
    timeline = placed(shots, lengths)
    ideal = Fraction(0)
    for number, (each, length) in enumerate(zip(shots, lengths, strict=True)):
        if number and each.transition.type != "cut":
            ideal -= Fraction(str(each.transition.duration))
        assert abs(timeline.shots[number].start - ideal * FPS) <= Fraction(1, 2)
        ideal += length / FPS
        assert abs(timeline.shots[number].end - ideal * FPS) <= Fraction(1, 2)
    assert timeline.ideal_s == ideal
    assert abs(timeline.num_frames / FPS - ideal) <= 1 / FPS / 2


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 900), st.integers(24, 80)),
                min_size=1, max_size=12),
       st.sampled_from([Fraction(12), Fraction(24000, 1001), Fraction(30)]))
def test_sections_tile_the_film_and_shots_of_its_rate_keep_all_their_frames(drawn, fps):
    shots = [shot(f"s{i}", (kind, ms / 1000)) for i, (kind, ms, _) in enumerate(drawn)]
    lengths = [length + 60 for *_, length in drawn]
    timeline = placed(shots, lengths, fps=fps)
    assert [each.num_frames for each in timeline.shots] == lengths
    sections = list(timeline.sections())
    assert (sections[0].first, sections[-1].last) == (0, timeline.num_frames)
    assert all(a.last == b.first for a, b in pairwise(sections))
    assert all(s.first < s.last for s in sections)
    together = sum(each.overlap for each in timeline.shots)
    assert timeline.num_frames == sum(lengths) - together


def test_cuts_share_nothing_and_a_dissolve_does():
    timeline = placed([shot("a"), shot("b"), shot("c", ("dissolve", 0.5))], [12, 12, 12])
    assert list(timeline.sections()) == [
        Section(0, 12, (0,)), Section(12, 18, (1,)), Section(18, 24, (1, 2), "dissolve"),
        Section(24, 30, (2,)),
    ]


def test_a_film_comes_out_of_a_colour_and_goes_into_one():
    ending = Finish(ending=Transition("fade-white", 0.25))
    timeline = placed([shot("a", ("fade-black", 0.5))], [12], finish=ending)
    assert list(timeline.sections()) == [
        Section(0, 6, (0,), "fade-black-in"), Section(6, 9, (0,)),
        Section(9, 12, (0,), "fade-white-out"),
    ]
    plain = placed([shot("a", ("dissolve", 0.5))], [12])
    assert list(plain.sections()) == [Section(0, 12, (0,))]


def test_the_films_default_transition_counts_where_a_shot_has_none():
    defaults = Defaults(transition=Transition("wipe-left", 0.25))
    timeline = placed([shot("a"), shot("b"), shot("c", ("cut",))], [12] * 3, defaults=defaults)
    assert [each.overlap for each in timeline.shots] == [0, 3, 0]


@pytest.mark.parametrize(("shots", "lengths", "message"), [
    ([shot("a"), shot("b", ("dissolve", 2))], [12, 48],
     "shot 'b': dissolve of 2 s is longer than the previous shot, which lasts 1 s"),
    ([shot("a"), shot("b", ("dissolve", 1)), shot("c", ("dissolve", 1))], [24, 18, 24],
     r"shot 'b' has 18 frames, fewer than the transitions at its beginning \(12\) and end \(12\)"),
    ([shot("a", ("fade-black", 3))], [12], "shot 'a' has 12 frames, fewer than"),
])
def test_a_transition_longer_than_its_shots_is_refused(shots, lengths, message):
    with pytest.raises(InputError, match=message):
        placed(shots, lengths)


def test_a_transition_as_long_as_the_shot_before_fits_wherever_that_is_rounded():
    shots, lengths = [shot("a"), shot("x", ("dissolve", 0.1)), shot("b")], [24, 20, 13]
    timeline = placed([*shots, shot("c", ("dissolve", 0.52))], [*lengths, 25], Fraction(25))
    before, last = timeline.shots[2:]
    assert last.overlap == before.num_frames == 13
    with pytest.raises(InputError, match=r"0\.53 s is longer than .* which lasts 0\.52 s"):
        placed([*shots, shot("c", ("dissolve", 0.53))], [*lengths, 25], Fraction(25))


def test_an_ending_that_needs_another_shot_is_refused():
    with pytest.raises(InputError, match="needs a shot after it"):
        Finish(ending=Transition("dissolve"))


def test_transitions_in_pixels():
    assert (blended("dissolve", RED, BLUE, 0.25) == np.array([150, 0, 25])).all()
    assert (blended("fade-black", RED, BLUE, 0.25) == np.array([100, 0, 0])).all()
    assert (blended("fade-black", RED, BLUE, 0.5) == 0).all()
    assert (blended("fade-white", RED, BLUE, 0.75) == np.array([128, 128, 178])).all()
    assert (faded("fade-white", RED, 0.0) == 255).all()
    assert (faded("fade-black", RED, 1.0) == RED).all()
    for kind, columns in (("wipe-left", slice(7, 10)), ("wipe-right", slice(0, 3))):
        made = blended(kind, RED, BLUE, 0.3)
        assert (made[:, columns] == BLUE[:, columns]).all()
        assert (made == RED).all(2).sum() == 6 * 7


def test_slides_move_both_shots():
    first = np.arange(6 * 10 * 3, dtype=np.uint8).reshape(6, 10, 3)
    second = first[::-1].copy()
    left = blended("slide-left", first, second, 0.4)
    assert (left[:, :6] == first[:, 4:]).all()
    assert (left[:, 6:] == second[:, :4]).all()
    right = blended("slide-right", first, second, 0.4)
    assert (right[:, 4:] == first[:, :6]).all()
    assert (right[:, :4] == second[:, 6:]).all()


def test_packets_are_copied_from_key_frame_to_key_frame():
    timeline = placed([shot("a"), shot("b", ("dissolve", 0.5)), shot("c")], [30, 100, 20])
    parts = [[0, 30], [0, 64, 100], [0, 20]]
    assert pieces_of(timeline, [], parts) == [
        Piece(0, 88), Piece(88, 124, 1), Piece(124, 144, 2),
    ]
    assert pieces_of(timeline, [], [[0, 24, 30], None, [0, 20]]) == [
        Piece(0, 24, 0), Piece(24, 124), Piece(124, 144, 2),
    ]
    assert pieces_of(timeline, [(90, 95), (124, 130)], parts) == [Piece(0, 144)]
    assert pieces_of(timeline, [(125, 126)], [None, None, [0, 4, 10, 20]]) == [
        Piece(0, 128), Piece(128, 144, 2),
    ]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_pieces_hold_every_frame_once_and_copy_no_marked_one(data):
    lengths = data.draw(st.lists(st.integers(20, 90), min_size=1, max_size=5))
    shots = [shot(f"s{i}", (data.draw(st.sampled_from(KINDS)), 0.4)) for i in range(len(lengths))]
    timeline = placed(shots, lengths)
    parts = [sorted({0, n, *data.draw(st.lists(st.integers(1, n - 1), max_size=4))})
             for n in lengths]
    texts = [Burnt("x", a, min(a + 9, timeline.num_frames)) for a in sorted(data.draw(
        st.lists(st.integers(0, timeline.num_frames - 1), max_size=4)))]
    burnt = Burner(texts, (64, 48), None).ranges
    pieces = pieces_of(timeline, burnt, parts)
    assert (pieces[0].first, pieces[-1].last) == (0, timeline.num_frames)
    assert all(a.last == b.first for a, b in pairwise(pieces))
    lone = {n: s.shots[0] for s in timeline.sections() if s.kind == "cut"
            for n in range(s.first, s.last)}
    for piece in pieces:
        for number in range(piece.first, piece.last) if piece.shot is not None else ():
            assert lone[number] == piece.shot
            assert not any(first <= number < last for first, last in burnt)
        if piece.shot is not None:
            start = timeline.shots[piece.shot].start
            assert {piece.first - start, piece.last - start} <= set(parts[piece.shot])


def test_captions_stay_until_the_next_one_or_the_next_shot():
    shots = [
        shot("a", caption=(Caption("one"), Caption("two", 0.5))),
        shot("b", ("dissolve", 0.5), caption=(Caption("three", 0.25, 5.0),)),
        shot("c", caption=(Caption("four"),)),
    ]
    timeline = placed(shots, [24, 24, 24])
    assert captions_of(timeline) == [
        Cue("one", 0, 0.5), Cue("two", 0.5, 1.5), Cue("three", 1.75, 5.5), Cue("four", 3.5, 5.5),
    ]
    assert as_frames([Cue("x", 1.0, 1.01)], timeline) == [Burnt("x", 12, 13)]


def test_a_caption_after_its_shot_is_refused():
    timeline = placed([shot("a", caption=(Caption("late", 1.0),))], [12])
    with pytest.raises(InputError, match=r"shot 'a': caption 'late' begins at 1 s, but the shot"):
        captions_of(timeline)


def test_titles_open_the_film_and_every_scene():
    shots = [shot("a", scene="a"), shot("b", scene="a"), shot("c", scene="b"), shot("d", scene="c")]
    timeline = placed(shots, [24, 60, 60, 60], title="Film", finish=Finish(titles=True))
    assert titles_of(timeline) == [
        Burnt("Film\nOne", 0, 24, "title"), Burnt("Two", 84, 120, "title")]
    assert titles_of(placed(shots, [24] * 4, title="Film")) == []


def test_overlapping_cues_stand_below_each_other_one_at_a_time():
    cues = [Cue("a", 0, 2), Cue("b", 1, 3), Cue("c", 3, 4), Cue("d", 5, 6)]
    assert one_at_a_time(cues) == [
        Cue("a", 0, 1), Cue("a\nb", 1, 2), Cue("b", 2, 3), Cue("c", 3, 4), Cue("d", 5, 6)]
    assert one_at_a_time([Cue("same", 0, 1), Cue("same", 1, 2)]) == [Cue("same", 0, 2)]


def test_files_of_texts():
    cues = [Cue("one\n\ntwo", 0.0, 1.5), Cue("<b> & c", 3599.9996, 3661.25, "Ann")]
    assert as_srt(cues) == ("1\n00:00:00,000 --> 00:00:01,500\none\ntwo\n\n"
                            "2\n01:00:00,000 --> 01:01:01,250\n<b> & c\n")
    assert as_webvtt(cues) == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:01.500\none\ntwo\n\n"
        "01:00:00.000 --> 01:01:01.250\n<v Ann>&lt;b&gt; &amp; c\n")


def test_texts_are_burnt_into_their_frames_alone_and_can_be_seen_on_any_ground():
    size = (160, 96)
    burner = Burner([Burnt("Hello", 3, 6), Burnt("World", 5, 8), Burnt("Title", 20, 21, "title")],
                    size, None)
    assert burner.ranges == [(3, 8), (20, 21)]
    for level in (0, 128, 255):
        frame = np.full((96, 160, 3), level, np.uint8)
        assert burner.burn(frame, 2) is frame
        assert burner.burn(frame, 8) is frame
        made = burner.burn(frame, 3)
        rows = np.flatnonzero((made != frame).any((1, 2)))
        assert rows.min() > 70
        patch = made[rows.min() : rows.max()]
        assert patch.max() > 230
        if level:
            assert patch.min() < 60
        assert (frame == level).all()
    two = burner.burn(frame, 5)
    assert np.flatnonzero((two != frame).any((1, 2))).min() < rows.min()
    middle = np.flatnonzero((burner.burn(frame, 20) != frame).any((1, 2)))
    assert 30 < middle.min() < middle.max() < 66


def test_long_texts_are_wrapped_within_the_picture():
    burner = Burner([Burnt("word " * 5 + "x" * 20, 0, 1)], (96, 64), None)
    made = burner.burn(np.zeros((64, 96, 3), np.uint8), 0)
    assert made.any()
    assert not made[:, :2].any()
    assert not made[:, -2:].any()


@pytest.mark.parametrize(("first", "second", "message"), [
    ("word " * 30, "", r"shot 'a': the caption 'word .*' takes \d+ lines, but a picture of 96x64 "
     r"has room for 5; shorten it, make the picture larger, or give captions: track"),
    ("one two three four five " * 2 + "six", "one two three four five " * 2 + "seven",
     r"shot 'b': the caption 'one .* six' and 'one .* seven' takes \d lines"),
])
def test_texts_that_do_not_fit_together_are_refused(first, second, message):
    texts = Caption(first, duration=3), Caption(second or "x")
    shots = [shot("a", caption=texts[:1]), shot("b", caption=texts[1:])]
    timeline = placed(shots, [24, 24])
    burnt = as_frames(captions_of(timeline), timeline)
    with pytest.raises(InputError, match=message):
        Burner(burnt, (96, 64), None).check_room(timeline)
    Burner(burnt, (1280, 720), None).check_room(timeline)


def test_a_title_that_does_not_fit_is_refused():
    timeline = placed([shot("a")], [24], title="A long title " * 9,
                              finish=Finish(titles=True))
    burner = Burner(titles_of(timeline), (96, 64), None)
    with pytest.raises(InputError, match=r"shot 'a': the title .* or leave titles out"):
        burner.check_room(timeline)


def test_a_font_without_a_sign_is_reported(tmp_path):
    with pytest.raises(InputError, match=r"no font here has the sign '\\U0010fffd'"):
        Burner([Burnt("a \U0010fffd", 0, 1)], (64, 48), None)
    (tmp_path / "x.ttf").write_bytes(b"no font")
    with pytest.raises(InputError, match=r"x\.ttf can't be read"):
        Burner([Burnt("a", 0, 1)], (64, 48), tmp_path / "x.ttf")


def test_codecs_by_name():
    for suffix, container in CONTAINERS.items():
        assert picture_settings(None, f"x{suffix}") == container.picture
    assert picture_settings("h265", "x.mp4").codec == "libx265"
    with pytest.raises(InputError, match="codec 'h266' is unknown; did you mean"):
        picture_settings("h266", "x.mp4")
    with pytest.raises(InputError, match=r"x\.webm can't hold codec 'h264'; give a name that ends"):
        picture_settings("h264", "x.webm")
    assert all(suffixes and {*suffixes} <= set(CONTAINERS) for _, suffixes in CODECS.values())
