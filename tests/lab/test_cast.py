"""`eval/toybox/cast.py`: its script is one, and its rates count what the judge sees."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from tests.programs import load_program
from vidgen.story.script import Script


@pytest.fixture(scope="module")
def cast() -> ModuleType:
    return load_program("eval/toybox/cast.py")


def test_each_character_has_six_shots_in_three_ways(cast: ModuleType, tmp_path: Path) -> None:
    script = Script.read(cast.write_script(["octopus", "cat"], 4, tmp_path))
    assert len(script.shots) == 2 * 3 * 6
    shown = {shot.id: script.words(shot, shot.prompt[0].prompt) for shot in script.shots}
    assert shown["c0-both-0"] == "an octopus bounces in the desert"
    assert shown["c1-reference-1"] == "it spins on a meadow"
    assert script.characters["c1-words"].reference == ()
    (picture,) = script.characters["c1-both"].reference
    assert script.file(picture).is_file()
    seeds = {shot.id.removeprefix("c1-words"): shot.seed for shot in script.shots
             if shot.id.startswith("c1-words")}
    assert all(shot.seed == seeds[shot.id.removeprefix("c1-both")] for shot in script.shots
               if shot.id.startswith("c1-both"))


def test_reserved_sprites_are_shown_by_several_pictures_alone(
    cast: ModuleType, tmp_path: Path
) -> None:
    sprites = ["unicorn", "trumpet", "unicorn"]
    script = Script.read(cast.write_script(sprites, 4, tmp_path, cast.UNNAMED))
    assert [shot.id for shot in script.shots[5:7]] == ["c0-reference-5", "c1-reference-0"]
    assert len(script.shots) == 3 * 6
    pictures = [script.file(each.reference[0]).read_bytes() for each in script.characters.values()]
    assert len(set(pictures)) == 3
    seen = {shot.id: "unicorn" for shot in script.shots}
    found = dict(cast.summarise(sprites, seen, cast.UNNAMED))
    assert [*found] == ["reference"]
    assert found["reference"]["shots"]["rate"] == found["reference"]["films"]["rate"] == 2 / 3


def test_a_character_counts_where_all_six_shots_show_it(cast: ModuleType) -> None:
    sprites = ["octopus", "cat"]
    seen = {f"c{n}-{way}-{i}": sprites[n] for n in (0, 1) for way in cast.WAYS for i in range(6)}
    seen["c1-words-3"] = "dog"
    found = dict(cast.summarise(sprites, seen))
    assert (found["words"]["shots"]["rate"], found["words"]["films"]["rate"]) == (11 / 12, 0.5)
    assert found["both"]["films"]["rate"] == 1.0
    assert "| words | 92% (65 .. 99) | 50% (9 .. 91) |" in cast.table(found)
