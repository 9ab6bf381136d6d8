"""The prompt policy: whole words in every script, before any work."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vidgen.core.errors import InputError
from vidgen.core.request import Request
from vidgen.pipeline.policy import WordList, enforce, policy_from_environment

LIST = WordList(["gun", "Straße", "blood bath", "炸弹", "ปืน", "폭탄", "बम", "co-op", "file"])


def reason(prompt: str) -> str | None:
    return LIST(prompt, Request(prompt=prompt))


@pytest.mark.parametrize(
    "prompt",
    [
        "a gun", "Gun!", "a GUN-like toy", "gun", "a_gun_", "(gun)", "ｇｕｎ", "𝗴𝘂𝗻", "g\u200bun",
        "gu\u00adn", "eine STRASSE", "blood   bath", "Blood-bath", "一个炸弹在桌上", "เขามีปืนอยู่",
        "폭탄이", "एक बम है", "the co op", "a ﬁle",
    ],
)
def test_a_word_is_found_in_any_dress(prompt):
    assert reason(prompt)


@pytest.mark.parametrize(
    "prompt",
    ["begun", "gunwale", "a g u n", "bath of blood", "bloodbath", "strassen", "बमबारी", "炸 弹",
     "profile", "co", "gün"],
)
def test_a_part_of_another_word_is_none(prompt):
    assert reason(prompt) is None


def test_the_reason_names_the_word_as_the_list_has_it():
    message = "policy refuses the prompt: the word list refuses 'Straße'; change"
    with pytest.raises(InputError, match=message):
        enforce(LIST, Request(prompt="die STRASSE"))


def test_a_negative_prompt_may_say_what_is_not_to_be_seen():
    enforce(LIST, Request(prompt="a cat", negative="gun"))
    enforce(None, Request(prompt="gun"))


@pytest.mark.parametrize(("options", "message"), [
    ({"audio_model": "m", "audio_prompt": "shots of a gun"}, "the policy refuses the audio prompt"),
    ({"say": ["all is well", (2.0, "he has a gun")]}, "the policy refuses the speech"),
    ({"say": "@gun.wav"}, None),
])
def test_what_is_to_be_heard_is_judged_as_well(options, message):
    request = Request.of("a cat", options)
    if message is None:
        enforce(LIST, request)
    else:
        with pytest.raises(InputError, match=message):
            enforce(LIST, request)


def test_any_callable_is_a_policy_and_sees_the_request():
    def only_short(_prompt: str, request: Request) -> str | None:
        return "too long a clip" if (request.seconds or 0) > 3 else None

    enforce(only_short, Request(prompt="a cat", seconds=2))
    with pytest.raises(InputError, match="too long a clip"):
        enforce(only_short, Request(prompt="a cat", seconds=4))


def test_a_file_holds_a_word_a_line_and_comments(tmp_path, monkeypatch):
    path = tmp_path / "words.txt"
    path.write_text("\ufeff# not here\n gun # nor there\n\nblood bath\n!!\n", encoding="utf-8")
    words = WordList(path)
    assert list(words.words) == ["gun", "blood bath"]
    monkeypatch.delenv("VIDGEN_POLICY", raising=False)
    assert policy_from_environment() is None
    monkeypatch.setenv("VIDGEN_POLICY", str(path))
    policy = policy_from_environment()
    assert policy is not None
    assert policy("a gun", Request(prompt="a gun"))


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "can't be read"), (b"# only\n\n...\n", "has no words"), (b"\xff\xfe\x00", "UTF-8")],
)
def test_a_list_that_cannot_be_used_is_refused(tmp_path: Path, content, message):
    path = tmp_path / "words.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        WordList(path)


@given(st.text(), st.text(), st.sampled_from(["NFC", "NFD", "NFKC", "NFKD"]))
def test_normal_forms_and_case_never_hide_a_word(before, after, form):
    prompt = f"{before} gun {after}"
    for text in (prompt, unicodedata.normalize(form, prompt), prompt.upper()):
        assert LIST(text, Request(prompt="x"))
