"""The gallery shows the first prompts and seeds as they come, and keeps what is there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.programs import load_program
from train.toybox.world.captions import prompts
from vidgen.media.probe import read_recipe


@pytest.mark.long
def test_first_prompts_and_seeds_stand_on_a_page(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = load_program("eval/toybox/gallery.py")
    words = ["gallery.py", "-o", str(tmp_path / "shown"), "--model", str(tiny_model),
             "--prompts", "2", "--seeds", "2"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", words)
    assert program.main() == 0
    clips = sorted((tmp_path / "shown").glob("*.webp"))
    assert [clip.name for clip in clips] == ["01-0.webp", "01-1.webp", "02-0.webp", "02-1.webp"]
    page = (tmp_path / "shown" / "README.md").read_text()
    texts = [text for _, text in prompts("dev", 2)]
    for clip, text, seed in zip(clips, [texts[0]] * 2 + [texts[1]] * 2, [0, 1, 0, 1], strict=True):
        assert f'vidgen generate "{text}" --seed {seed} -o {clip.name}' in page
        assert f"({clip.name})" in page
        assert read_recipe(clip)["plan"]["seed"] == seed
        assert read_recipe(clip)["encoder"]["options"]["quality"] == program.QUALITY
        with Image.open(clip) as picture:
            assert (picture.n_frames, picture.size) == (9, (32, 32))
            assert b"trainedAlgorithmicMedia" in picture.info["xmp"]
    assert "seen instead: sprite:" in page, "a model of random weights shows no sprite"
    before = [clip.stat().st_mtime_ns for clip in clips]
    assert program.main() == 0
    assert [clip.stat().st_mtime_ns for clip in clips] == before
    monkeypatch.setattr(program, "LIMIT", 10)
    assert program.main() == 2
