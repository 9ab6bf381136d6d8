"""Docs, help, messages, docstrings and comments are plain technical English.

Turns that read as translated are not in them. The lab's pages and the project's README are left
out. Headings, code, links and the world's own phrases in docs/reference/what_can_i_ask_for.md
aren't read.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(page for page in DOCS.rglob("*.md") if "lab" not in page.relative_to(DOCS).parts)
FILES = sorted((ROOT / "vidgen").rglob("*.py"))
STUDIO = sorted((ROOT / "vidgen" / "server" / "studio").glob("*.js"))
START = r"(?:^|(?<=[.!?:|] ))"
FORBIDDEN = {
    r"\b(?:told|tells?|telling)\b": "print, report, say, show",
    r"\banew\b": "again",
    r"\bbesides?\b": "with, next to, in addition to",
    r"\bbehind\b": "after",
    r"\bapart\b": "separately",
    r"\bas good as\b": "almost",
    r"\bthe ones? who\b": "the noun itself",
    r"\bhears?\b": "audio",
    r"\b(?:crews?|seats?|foreman|staff)\b": "workers",
    r"(?<!the )(?<!The )(?<!to )\brests?\b(?! of\b)": "requests; remaining",
    r"\b(?:go|goes|went|going) on\b": "continue",
    r"\b(?:lie|lies|lay|lying) (?:in|at|on|there|next)\b": "is in",
    r"\b(?:is|are|was|were) there\b(?! (?:a|an|any)\b)": "exists",
    r"\bin the midst\b": "during",
    r"\b(?:is|are|what is) to be seen\b": "the prompt; visible",
    r"\b(?:can|can't|to) be had\b": "available",
    r"\b(?:nobody|somebody|whoever)\b": "a noun",
    r"\bthan that is\b": "two sentences",
    r"\bin its own words\b": "the message",
    r"\bseen to\b": "the verb",
    START + r"There (?:is|are|was|were)\b": "exist, or another subject",
    START + r"(?:What|Which|How|Who|Whose|Whatever|Of)\b(?![^.!?|]*\?)": "begin with a noun",
}
ALLOWED = {
    ("docs/reference/recipe.md", "nobody"),  # nobody trusts a test certificate
    # distances in time
    ("vidgen/media/onsets.py", "apart"), ("vidgen/media/trackers.py", "apart"),
    ("vidgen/media/video_reader.py", "apart"),
}


def prose(page: Path) -> str:
    """Return a page's text without headings, code, links' targets, and the model's phrases."""
    text = page.read_text()
    text = re.sub(r"<!-- words -->.*?<!-- /words -->", "", text, flags=re.DOTALL)
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^#.*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"`[^`]*`|\]\([^)]*\)", "``", text)
    paragraphs = re.split(r"\n\s*\n|\n(?=[|>]|\s*[-*] )", text)
    lines = (" ".join(paragraph.split()) for paragraph in paragraphs)
    return "\n".join(re.sub(r"^(?:[-*>|]+|\*\*)\s*", "", line) for line in lines)


def texts_of(code: str) -> Iterator[str]:
    """Yield a module's docstrings, comments, and texts of several words."""
    tree = ast.parse(code)
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)
              for part in ast.walk(node) if part is not node}
    for node in ast.walk(tree):
        text = None
        if isinstance(node, ast.JoinedStr):
            text = "".join(str(part.value) if isinstance(part, ast.Constant) else "`value`"
                           for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = None if id(node) in inside else node.value
        if text and text.count(" ") > 1:
            yield from re.split(r"\n\s*\n", text)
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if token.type == tokenize.COMMENT:
            yield token.string.strip("# ")


def comments_of(script: str) -> Iterator[str]:
    """Yield the comments of a JavaScript file."""
    for found in re.finditer(r"/\*\*?(.*?)\*/|(?:^|\s)//(.*?)$", script, re.DOTALL | re.MULTILINE):
        yield re.sub(r"^\s*\*", "", found[1] or found[2] or "", flags=re.MULTILINE)


def turns_in(name: str, text: str) -> list[str]:
    """Return the forbidden turns in a text, each with its surroundings and a better word."""
    found = []
    for pattern, better in FORBIDDEN.items():
        for match in re.finditer(pattern, text, re.MULTILINE):
            if (name, match[0]) not in ALLOWED:
                shown = text[max(0, match.start() - 40):match.end() + 40].replace("\n", " ")
                found.append(f"{match[0]!r} ({better}): ...{shown}...")
    return found


def test_the_pages_are_found() -> None:
    assert len(PAGES) > 10
    assert len(PAGES) <= 25


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_a_page_is_plain_english(page: Path) -> None:
    assert turns_in(str(page.relative_to(ROOT)), prose(page)) == []


@pytest.mark.parametrize("file", [*FILES, *STUDIO], ids=lambda file: str(file.relative_to(ROOT)))
def test_code_is_written_in_plain_english(file: Path) -> None:
    read = texts_of if file.suffix == ".py" else comments_of
    texts = (" ".join(re.sub(r"`[^`]*`", "``", text).split()) for text in read(file.read_text()))
    assert turns_in(str(file.relative_to(ROOT)), "\n".join(texts)) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_a_page_is_short(page: Path) -> None:
    assert len(page.read_text().split()) <= 2000
