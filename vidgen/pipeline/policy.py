"""A hook that checks every prompt before any work is done.

The engine calls it, so the command line, films and the service share it. A policy is any callable;
`WordList` is one for a file of words, by default the one that `VIDGEN_POLICY` names.
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
"""Returns the reason why a text is refused (a prompt, one for sound, or speech), or None."""


class WordList:
    """Refuses prompts that hold a word or phrase of a list, or of a UTF-8 file with one per line.

    Whole words count, whatever their case, width, ligatures and punctuation (Unicode NFKC, case
    folded, invisible characters removed); in scripts without spaces any place counts. A file's
    comments start with #.

    Raises:
        InputError: a file that can't be read, or no words.
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
                raise InputError(f"{name} is no UTF-8 text; give one word or phrase a "
                                 "line") from None
            words = (line.partition("#")[0] for line in lines)
        self.words = {word: _key(word) for given in words if (word := given.strip())}
        self.words = {word: key for word, key in self.words.items() if key.strip()}
        if not self.words:
            raise InputError(f"{name} holds no words; give one word or phrase a line")

    def __call__(self, prompt: str, request: Request) -> str | None:  # noqa: ARG002
        """Name the first word of the list that the prompt holds."""
        text = _spaced(prompt)
        found = next((word for word, key in self.words.items() if key in text), None)
        return None if found is None else f"the word list refuses {found!r}"


def policy_from_environment() -> Policy | None:
    """Return the word list that VIDGEN_POLICY names, or None; raise InputError if unreadable."""
    path = os.environ.get("VIDGEN_POLICY")
    return WordList(path) if path else None


def enforce(policy: Policy | None, request: Request) -> None:
    """Raise InputError if the policy refuses a text of a request; negatives are exempt."""
    if policy is None:
        return
    require_allowed(policy, "prompt", request.prompt, request)
    require_allowed(policy, "audio prompt", request.audio_prompt, request)
    for _, text in request.say:
        require_allowed(policy, "speech", text, request)


def require_allowed(policy: Policy, what: str, text: str | None, request: Request) -> None:
    """Raise InputError if a policy refuses a text; files of speech are exempt."""
    if text is None or (what == "speech" and text.startswith(OWN_FILE)):
        return
    if reason := policy(text, request):
        raise InputError(f"the {what} is refused by the policy: {reason}; ask for something else")


def _key(word: str) -> str:
    """Return a word in the form to search for, with the spaces that must surround it."""
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
