"""A hook that checks every prompt before any work is done.

The engine calls it, so it applies to the command line, films and the service. A policy is any
callable; `WordList` refuses the words of a file, by default the one that `VIDGEN_POLICY` names.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path

from vidgen.core.errors import InputError
from vidgen.core.request import OWN_FILE, Request

# Scripts that write words without spaces between them, or with particles joined to them.
_JOINED = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")

Policy = Callable[[str, Request], str | None]
"""Returns the reason to refuse a text (a prompt, a sound's prompt, or speech), or None."""


class WordList:
    """Refuses texts that contain a word or phrase of a list, or of a UTF-8 file, one per line.

    Whole words match, regardless of case, width, ligatures and punctuation (Unicode NFKC, case
    folded, invisible characters removed); in scripts without spaces, parts of words match, too.
    Comments in a file start with #.

    Raises:
        InputError: the file can't be read, or the list is empty.
    """

    def __init__(self, words: str | os.PathLike[str] | Iterable[str]) -> None:
        name = "the policy's list of words"
        if isinstance(words, str | os.PathLike):
            name = f"policy {os.fspath(words)}"
            try:
                lines = Path(words).read_text(encoding="utf-8-sig").splitlines()
            except OSError as error:
                raise InputError(f"{name} can't be read: {error.strerror}") from None
            except UnicodeDecodeError:
                raise InputError(f"{name} isn't UTF-8 text; give one word or phrase per "
                                 "line") from None
            words = (line.partition("#")[0] for line in lines)
        self.words = {word: _key(word) for given in words if (word := given.strip())}
        self.words = {word: key for word, key in self.words.items() if key.strip()}
        if not self.words:
            raise InputError(f"{name} has no words; give one word or phrase per line")

    def __call__(self, prompt: str, request: Request) -> str | None:  # noqa: ARG002
        """Return a reason with the first word of the list that the prompt contains, or None."""
        text = _spaced(prompt)
        found = next((word for word, key in self.words.items() if key in text), None)
        return None if found is None else f"the word list refuses {found!r}"


def policy_from_environment() -> Policy | None:
    """Return the word list that VIDGEN_POLICY names, or None.

    Raises:
        InputError: the file can't be read, or is empty.
    """
    path = os.environ.get("VIDGEN_POLICY")
    return WordList(path) if path else None


def enforce(policy: Policy | None, request: Request) -> None:
    """Check the texts of a request, except its negative prompt.

    Raises:
        InputError: the policy refuses one.
    """
    if policy is None:
        return
    require_allowed(policy, "prompt", request.prompt, request)
    require_allowed(policy, "audio prompt", request.audio_prompt, request)
    for _, text in request.say:
        require_allowed(policy, "speech", text, request)


def require_allowed(policy: Policy, what: str, text: str | None, request: Request) -> None:
    """Check one text; `what` names it in the message. Recorded speech is exempt.

    Raises:
        InputError: the policy refuses it.
    """
    if text is None or (what == "speech" and text.startswith(OWN_FILE)):
        return
    if reason := policy(text, request):
        raise InputError(f"the policy refuses the {what}: {reason}; change it")


def _key(word: str) -> str:
    """Return a word's normal form, with spaces where a word boundary must be."""
    text = _spaced(word)
    if _is_joined(text[1:2]):
        text = text[1:]
    return text[:-1] if _is_joined(text[-2:-1]) else text


def _is_joined(char: str) -> bool:
    return bool(char) and unicodedata.name(char, "").startswith(_JOINED)


def _spaced(text: str) -> str:
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    shown = (char for char in folded if unicodedata.category(char) != "Cf")
    spaced = "".join(char if unicodedata.category(char)[0] in "LMN" else " " for char in shown)
    return f" {' '.join(spaced.split())} "
