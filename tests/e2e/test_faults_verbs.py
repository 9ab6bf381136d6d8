"""Extending, replaying, sweeping and retrying: killed anywhere, they end as if nothing happened."""

from __future__ import annotations

import json
import random
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.faults import ForkServer, Job
from vidgen.media.clip import Clip
from vidgen.media.probe import read_recipe
from vidgen.media.read import load_image

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="children are watched as on Linux")
MAKE = ["generate", "a red car bounces across the desert", "--steps", "2", "--frames", "17",
        "--seed", "7", "--dtype", "fp32"]  # fmt: skip
VERBS = {
    "extend": ["extend", "source.mp4", "--seconds", "2", "-o", "x.mp4"],
    "extend with a label": ["extend", "source.mp4", "--seconds", "1", "--label", "visible", "-o",
                            "x.mkv"],
    "replay": ["replay", "source.mp4", "--set", "steps=3", "-o", "x.mp4"],
    "sweep": ["sweep", *MAKE[1:], "--over", "guidance=1,3", "-o", "x.png", "--model"],
    # no picture of this model is like the one given, so both further seeds are tried
    "retry": [*MAKE, "--image", "in.png", "--retry", "2", "-o", "x.mp4", "--model"],
}


@pytest.fixture(scope="module")
def source(server: ForkServer, tiny_model: Path, tmp_path_factory: Any) -> Path:
    """A folder with a clip and a picture."""
    folder = tmp_path_factory.mktemp("source")
    Image.radial_gradient("L").resize((32, 32)).convert("RGB").save(folder / "in.png")
    argv = [*MAKE, "--model", str(tiny_model), "-o", "source.mp4"]
    assert server.run(Job("tests.faults:command", (argv,), folder)).result == 0
    return folder


def content(folder: Path) -> dict[str, Any]:
    """What lies in a folder: the frames of each clip, and what its checks found."""
    found: dict[str, Any] = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.is_dir():
            found[name] = ""
        elif path.suffix == ".png":
            found[name] = load_image(path)[0].tobytes()
        else:
            recipe = read_recipe(path)
            assert recipe is not None
            found[name] = Clip.from_file(path).frames.tobytes(), recipe.get("checks")
    return found


@pytest.mark.parametrize("count", [
    pytest.param(2, id="short"), pytest.param(40, id="full", marks=pytest.mark.long)
])
@pytest.mark.parametrize("verb", VERBS)
def test_killed_and_resumed_it_ends_the_same(
    server: ForkServer, tiny_model: Path, source: Path, tmp_path: Path, verb: str, count: int
) -> None:
    argv, rng = VERBS[verb], random.Random(count)
    argv = [*argv, str(tiny_model)] if argv[-1] == "--model" else argv

    def run(folder: Path, *more: str, kill_at: int = 0) -> Any:
        return server.run(Job("tests.faults:at_event", (kill_at, [*argv, *more]), folder))

    shutil.copytree(source, tmp_path / "straight")
    straight = run(tmp_path / "straight")
    assert straight.result is not None, straight.output
    code, changes = straight.result
    assert code == 0
    expected = content(tmp_path / "straight")
    for index in range(count):
        folder = tmp_path / str(index)
        shutil.copytree(source, folder)
        at = 1 + (2 * index + 1) * changes // (2 * count)
        assert run(folder, kill_at=at).signal == signal.SIGKILL
        jobs = server.run(Job("tests.faults:command", (["jobs", "--json"],), folder))
        left = folder.rglob("*.vidgen-job")
        assert {f"{job['output']}.vidgen-job" for job in json.loads(jobs.output)} == {
            str(path.relative_to(folder)) for path in left
        }
        if index % 2:
            run(folder, "--resume", kill_at=rng.randint(1, changes))
        done = run(folder, "--resume")
        assert done.result is not None, done.failure
        assert done.result[0] == 0, done.output
        assert content(folder) == expected
    if verb == "retry":
        recipe = read_recipe(folder / "x.mp4")
        assert recipe is not None
        assert (recipe["plan"]["seed"], recipe["checks"]["verdict"]) == (9, "fault")
