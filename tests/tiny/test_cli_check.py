"""`vidgen check`: exit codes, text and JSON."""

import json

import pytest

from tests.unit.test_checks import FPS, clip, planted, texture
from vidgen.cli.main import main
from vidgen.media.types import ClipInfo
from vidgen.media.write import write_clip


@pytest.fixture
def write(tmp_path):
    def to(name, frames):
        return str(write_clip(tmp_path / name, [frames], ClipInfo(FPS, (96, 72), len(frames))))

    return to


def test_a_clean_file_exits_with_0_and_a_faulty_one_with_1(write, capsys):
    frames = clip("disc")
    good, bad = write("good.mp4", frames), write("bad.mp4", planted.flash(frames, 0.8))
    assert main(["check", good]) == 0
    assert capsys.readouterr().out == f"{good}: clean\n"
    assert main(["check", bad]) == 1
    assert "fault: flash: 6 flashes in a second" in capsys.readouterr().out


def test_a_warning_is_no_failure_and_json_tells_all(write, capsys):
    assert main(["check", write("still.mkv", clip("still")), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["verdict"] == "warning"
    (finding,) = told["findings"]
    assert finding.keys() == {"kind", "severity", "time_s", "value", "limit", "text"}


def test_the_first_frame_is_compared_and_bad_input_refused(write, tmp_path, capsys):
    from PIL import Image

    frames = clip("disc")
    good = write("good.mp4", frames)
    for name, picture in (("same", frames[0]), ("other", texture(seed=3))):
        Image.fromarray(picture).save(tmp_path / f"{name}.png")
    assert main(["check", good, "--image", str(tmp_path / "same.png")]) == 0
    assert main(["check", good, "--image", str(tmp_path / "other.png")]) == 1
    assert main(["check", str(tmp_path / "none.mp4")]) == 2
    assert main(["check", good, "--image", good]) == 2
    assert "error: image" in capsys.readouterr().err
