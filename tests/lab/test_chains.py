"""`eval/toybox/extension.py`: the same figures by any number of workers, resumed, and drawn."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from PIL import Image

from eval.toybox.chains import ChainSettings, ChainWork
from tests.faults import ForkServer
from tests.programs import Ended, run_program
from vidgen.core.errors import InputError

CALL = ("--windows", "2", "--steps", "1", "--threads", "1", "--way", "pixels", "--way", "anchored",
        "--way", "latents")


@pytest.fixture
def extension(server: ForkServer, tiny_model: Path):
    def call(output: Path, *options: str) -> Ended:
        return run_program(server,
            "eval/toybox/extension.py", "--model", str(tiny_model), *CALL, "-o",
                           str(output), *options)

    return call


@pytest.mark.long
def test_workers_find_what_one_finds_and_a_run_goes_on(extension, tmp_path: Path) -> None:
    alone, shared = tmp_path / "alone.json", tmp_path / "shared.json"
    sheet = tmp_path / "sheet.png"
    done = extension(alone, "--seeds", "2", "--sheet", str(sheet))
    assert done.returncode == 0, done.stderr
    assert "seed 1 latents: 6/6, 0 min left" in done.stdout
    assert extension(shared, "--seeds", "1").returncode == 0
    done = extension(shared, "--seeds", "2", "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert "seed 0" not in done.stdout, "it is in the log"
    one, other = (json.loads(path.read_text()) for path in (alone, shared))
    assert one["results"] == other["results"]
    assert one["results"].keys() == {"truth", "pixels", "latents"}, "it was taught no anchor"
    assert one["results"]["truth"]["right"]["rate"] == 1.0
    assert one["results"]["pixels"]["joins"] != one["results"]["latents"]["joins"]
    for path, rows in (sheet, 6), (tmp_path / "sheet-chart.png", 4):
        assert Image.open(path).height > rows * 32


def test_workers_refuse_another_model_than_the_command_s(tiny_model: Path) -> None:
    settings = ChainSettings(str(tiny_model), 2, "text", 1, 3, 0.5, None)
    work = pickle.loads(pickle.dumps(ChainWork(settings).settled()))
    assert "engine" not in vars(work), "what is opened isn't sent"
    assert work.settings.dtype == work.engine.dtype
    with pytest.raises(InputError, match="is another one here than"):
        _ = ChainWork(settings, ("0" * 64, "0" * 64)).engine
