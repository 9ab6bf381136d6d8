"""Speech: sentences with their times, voices that are there and those that aren't."""

import shutil

import numpy as np
import pytest

from tests.sounds import RATE, save, tone
from vidgen.core.errors import InputError
from vidgen.media.speech import PAUSE_S, Voice, sentences_of, speak

spoken = [
    pytest.mark.system,
    pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not here"),
]


def with_espeak(test):
    for mark in spoken:
        test = mark(test)
    return test


@pytest.mark.parametrize(("text", "sentences"), [
    ("One. Two! Three?", ["One.", "Two!", "Three?"]),
    ("It costs 2.50 today. Really?!", ["It costs 2.50 today.", "Really?!"]),
    ('He said "Go." Then left', ['He said "Go."', "Then left"]),
    ("你好。再见！", ["你好。", "再见！"]),
    ("no mark\nat all", ["no mark\nat all"]),
    ("  ", []),
])  # fmt: skip
def test_a_text_is_parted_into_sentences(text, sentences):
    assert sentences_of(text) == sentences


@with_espeak
def test_sentences_sound_exactly_at_their_times():
    said = speak([(1.0, "Good morning. How are you?"), (None, "Fine.")], "en-gb", 8 * RATE)
    assert [each.text for each in said.sentences] == ["Good morning.", "How are you?", "Fine."]
    assert said.sentences[0].start_s == 1.0
    loud = np.abs(said.samples[:, 0]) > 0.004
    edge = 0
    for before, after in zip(said.sentences, said.sentences[1:], strict=False):
        assert after.start_s == pytest.approx(before.end_s + PAUSE_S, abs=0.002)
    for each in said.sentences:
        first, last = round(each.start_s * RATE), round(each.end_s * RATE)
        assert not loud[edge : first - 1].any()
        places = np.flatnonzero(loud[first:last])
        assert places[0] < 0.01 * RATE
        assert places[-1] > last - first - 0.01 * RATE
        edge = last + 1
    assert not loud[edge:].any()
    assert said.voice["voice"] == "en-gb"
    assert said.voice["engine"].startswith("espeak-ng 1")


@with_espeak
def test_the_same_text_sounds_the_same():
    one, other = (speak([(None, "A cat.")], None, 2 * RATE).samples for _ in range(2))
    assert np.array_equal(one, other)
    assert not np.array_equal(one, speak([(None, "A cat.")], "de", 2 * RATE).samples)
    assert not np.array_equal(one, speak([(None, "A cat.")], "en+f3", 2 * RATE).samples)


@with_espeak
def test_what_is_too_long_is_refused_with_by_how_much():
    fits = speak([(0.5, "A rather long sentence.")], None, 8 * RATE)
    end = fits.sentences[-1].end_s
    told = rf"ends {end - 1:.2f} s after the clip, which has 1\.00 s.*--seconds {end:.2f}"
    with pytest.raises(InputError, match=told):
        speak([(0.5, "A rather long sentence.")], None, RATE)


@with_espeak
def test_two_texts_at_once_are_refused_and_any_order_is_taken():
    with pytest.raises(InputError, match="before the previous text ends; place it at"):
        speak([(0.0, "A rather long sentence."), (0.5, "Another.")], None, 8 * RATE)
    turned = speak([(4.0, "Last."), (0.0, "First.")], None, 8 * RATE)
    assert [each.text for each in turned.sentences] == ["First.", "Last."]


@with_espeak
@pytest.mark.parametrize(("voice", "near"), [
    ("en-uk", "similar: .*en-gb"), ("german2", "similar: .*german"), ("qqqq", "espeak-ng --voices"),
    ("en+nobody", "unknown variant 'nobody'"),
])  # fmt: skip
def test_unknown_voices_are_refused_with_those_near_them(voice, near):
    with pytest.raises(InputError, match=near):
        Voice(voice)


@with_espeak
def test_a_text_without_words_is_refused():
    with pytest.raises(InputError, match="no words"):
        speak([(None, "...")], None, RATE)


def test_without_espeak_its_installation_is_explained(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="install it with apt"):
        Voice("en")


def test_speech_of_ones_own_comes_from_a_file(tmp_path):
    path = save(tmp_path / "own.wav", tone(0.5, channels=2))
    said = speak([(1.0, f"@{path}")], None, 2 * RATE)
    (sentence,) = said.sentences
    assert (sentence.text, sentence.start_s, sentence.end_s) == (None, 1.0, 1.5)
    assert np.allclose(said.samples[RATE : RATE + 24_000], tone(0.5), atol=1e-6)
    assert not said.samples[:RATE].any()
    with pytest.raises(InputError, match="does not exist"):
        speak([(1.0, f"@{path}.no")], None, 2 * RATE)
    with pytest.raises(InputError, match=r"0\.50 s after the clip"):
        speak([(2.0, f"@{path}")], None, 2 * RATE)
