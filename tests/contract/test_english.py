"""The documentation is plain technical English: turns that read as translated are not in it.

The lab's pages and the project's README are left out. Headings, code, links and the world's own
phrases in docs/reference/what_can_i_ask_for.md aren't read.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(page for page in DOCS.rglob("*.md") if "lab" not in page.relative_to(DOCS).parts)
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
    r"\brests?\b(?! of\b)": "requests; remaining",
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


def test_the_pages_are_found() -> None:
    assert len(PAGES) > 10
    assert len(PAGES) <= 25


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_a_page_is_plain_english(page: Path) -> None:
    name, text = str(page.relative_to(ROOT)), prose(page)
    found = []
    for pattern, better in FORBIDDEN.items():
        for match in re.finditer(pattern, text, re.MULTILINE):
            if (name, match[0]) not in ALLOWED:
                shown = text[max(0, match.start() - 40):match.end() + 40].replace("\n", " ")
                found.append(f"{match[0]!r} ({better}): ...{shown}...")
    assert found == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_a_page_is_short(page: Path) -> None:
    assert len(page.read_text().split()) <= 2000
