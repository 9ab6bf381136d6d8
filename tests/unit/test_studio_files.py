"""The studio's files: nothing inline or from elsewhere, contrasts, lists that match the engine."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

import vidgen
from vidgen.story.elements import CAMERA_MOVES, Transition

STUDIO = Path(vidgen.__file__).parent / "server" / "studio"
FILES = {path.name: path.read_text("utf-8") for path in sorted(STUDIO.iterdir())}
TEXT_CONTRAST, EDGE_CONTRAST = 4.5, 3.0


def luminance(colour):
    """Relative luminance (WCAG 2.2)."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    levels = [int(digits[place : place + 2], 16) / 255 for place in (0, 2, 4)]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in levels]
    return sum(weight * v for weight, v in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    bright, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def colours(theme):
    found = re.findall(r"--([\w-]+): light-dark\((#\w+), (#\w+)\)", FILES["base.css"])
    return {name: (light, dark)[theme] for name, light, dark in found}


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_texts_and_edges_stand_out(theme):
    known = colours(theme)
    grounds = ("ground", "surface", "sunken")
    for text, ground in product(("text", "soft", "accent", "good", "warn", "bad"), grounds):
        assert contrast(known[text], known[ground]) >= TEXT_CONTRAST, (text, ground)
    assert contrast(known["on-accent"], known["accent"]) >= TEXT_CONTRAST
    assert contrast(known["accent"], known["tint"]) >= TEXT_CONTRAST
    for ground in grounds:
        assert contrast(known["edge"], known[ground]) >= EDGE_CONTRAST, ground


def test_nothing_is_inline_and_nothing_comes_from_elsewhere():
    page = FILES["index.html"]
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\bstyle=|\bon\w+=", page)
    for name, text in FILES.items():
        addresses = set(re.findall(r"https?://[^\"'\s)]+", text))
        assert addresses <= {"http://www.w3.org/2000/svg"}, name
        assert not re.search(r"\beval\(|new Function|setAttribute\(\"style\"", text), name


def test_every_file_is_used_and_every_name_is_there():
    named = set()
    for text in FILES.values():
        named |= set(re.findall(r"from \"\./([\w.]+)\"", text))
        named |= set(re.findall(r"/studio/([\w.]+)", text))
    assert named == FILES.keys() - {"index.html"}
    imports = re.compile(r"import \{([^}]+)\} from \"\./([\w.]+)\"")
    for name, text in FILES.items():
        for names, source in imports.findall(text):
            for each in filter(None, map(str.strip, names.split(","))):
                assert re.search(rf"export [\w ]*\b{each}\b", FILES[source]), (name, each)
                assert len(re.findall(rf"\b{each}\b", text)) > 1, f"{name} doesn't use {each}"


def test_every_icon_is_drawn():
    drawn = set(re.findall(r'<symbol id="(\w+)"', FILES["icons.svg"]))
    used = {"auto", "light", "dark"}  # of the button for colours
    for text in FILES.values():
        used |= set(re.findall(r'symbol: "(\w+)"', text))
        for call in re.findall(r"\b(?:icon|act)\(([^)]*)\)", text):
            used |= drawn & set(re.findall(r'"(\w+)"', call))
            assert set(re.findall(r'^"(\w+)"', call)) <= drawn, call
    assert used == drawn


def test_scripts_may_say_what_the_engine_knows():
    def listed(name):
        return re.findall(r'"([\w-]+)"', re.search(rf"{name} = \[(.*?)\]", FILES["script.js"],
                                                   re.DOTALL)[1])

    assert listed("CAMERA_MOVES") == list(CAMERA_MOVES)
    assert listed("TRANSITIONS") == list(get_args(get_type_hints(Transition)["type"]))


def test_the_page_of_keys_lists_the_studios_shortcuts():
    page = (Path(__file__).parents[2] / "docs/howto/serve.md").read_text()
    table = page.partition("### Keys\n")[2].partition("## ")[0]
    for keys in re.findall(r"\{ keys: \[(.*?)\]", FILES["main.js"]):
        for key in re.findall(r'"([^"]+)"', keys):
            assert re.search(rf"(?<!\w){re.escape(key.replace(' ', 'Space'))}(?!\w)", table), key
