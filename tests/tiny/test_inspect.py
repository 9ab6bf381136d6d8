"""What `vidgen inspect` tells of files: colour, rates, marks, a recipe without blobs."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from vidgen.cli.main import main
from vidgen.media.types import ClipInfo
from vidgen.media.write import write_clip
from vidgen.pipeline.engine import load

PICTURE = np.random.default_rng(0).integers(0, 255, (40, 48, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def film(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    engine = load(str(tiny_model), device="cpu", dtype="fp32")
    clip = engine.generate("a red car", seed=5, image=PICTURE, fps="24000/1001")
    return clip.save(tmp_path_factory.mktemp("films") / "a.mp4", label="visible")


def test_streams_colour_rate_and_marks(film: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(film), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    (stream,) = facts["streams"]
    colour = {name: stream[name] for name in ("primaries", "transfer", "matrix", "range")}
    assert colour == {
        "primaries": "bt709", "transfer": "bt709", "matrix": "bt709", "range": "limited"
    }
    assert stream["fps"] == "24000/1001"
    assert stream["num_frames"] == 9
    assert facts["duration_s"] == pytest.approx(9 * 1001 / 24000, abs=1e-3)
    assert facts["bits_per_s"] == pytest.approx(8 * facts["bytes"] / facts["duration_s"], rel=0.01)
    assert facts["marks"]["digital_source_type"].endswith("trainedAlgorithmicMedia")
    assert len(facts["recipe"]["inputs"][0]["content"]) > 1000


def test_the_text_has_all_but_blobs(film: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(film)]) == 0
    out = capsys.readouterr().out
    assert "  prompt: a red car\n" in out
    assert "fps: 24000/1001" in out
    assert "trainedAlgorithmicMedia" in out
    assert "label: visible" in out or '"label": "visible"' in out
    assert "content: (" in out
    assert max(map(len, out.splitlines())) < 250


def test_a_file_of_others_has_neither(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    info = ClipInfo(Fraction(12), (48, 40), 1)
    path = write_clip(tmp_path / "a.mkv", [PICTURE[None]], info)
    assert main(["inspect", str(path)]) == 0
    out = capsys.readouterr().out
    assert "no recipe" in out
    assert "no marks of origin" in out
    assert "matrix: rgb" in out
