import io
import json
import logging
import sys

import pytest

from vidgen.cli.main import Printed
from vidgen.cli.report import Report, elapsed_text
from vidgen.core.errors import InputError


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("of_film", [False, True])
def test_further_candidates_are_counted_in_the_line(monkeypatch, of_film):
    shot = {"shot_number": 5, "num_shots": 7, "take": 2, "num_takes": 2} if of_film else {}
    told = []
    for candidate in (1, 2):
        monkeypatch.setattr(sys, "stderr", Terminal())
        with Report(as_json=False, events=None) as report:
            report({"event": "progress", "stage": "sample", "done": 3, "total": 3 * candidate,
                    "candidate": candidate, "num_candidates": 4, "fraction": 0.25, **shot})
            report.result({}, "")
        told.append(sys.stderr.getvalue())
    line = "shot 5/7, take 2/2" if of_film else "sample"
    assert line in told[0]
    assert "candidate" not in told[0]
    assert f"{line}, candidate 2/4" in told[1]


@pytest.mark.parametrize("num_clips", [1, 2])
def test_a_terminal_shows_how_far_each_stage_is(monkeypatch, capsys, num_clips):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Report(as_json=False, events=None) as report:
        for clip in range(1, num_clips + 1):
            for done in (1, 2, 3):
                report({"event": "progress", "stage": "sample", "done": done, "total": 3,
                        "clip": clip, "num_clips": num_clips})
        report({"event": "note", "text": "[bold] words stay as they are"})
        report.result({"a": 1}, "finished")
    shown = terminal.getvalue()
    assert "note: [bold] words stay as they are" in shown
    assert "3/3" in shown
    assert ("sample 2" in shown) == (num_clips == 2)
    assert capsys.readouterr().out == "finished\n"


def test_a_log_file_gets_notes_but_no_bars(capsys):
    with Report(as_json=True, events=None) as report:
        report({"event": "progress", "stage": "sample", "done": 1, "total": 3})
        report({"event": "note", "text": "seed 7"})
        report.result({"a": 1}, "finished")
    out, err = capsys.readouterr()
    assert json.loads(out) == {"a": 1}
    assert err == "note: seed 7\n"


def test_events_are_lines_of_json_with_their_time(tmp_path):
    path = tmp_path / "e.jsonl"
    with Report(as_json=True, events=str(path)) as report:
        report({"event": "written", "path": "x.mp4"})
        assert json.loads(path.read_text())["path"] == "x.mp4"


@pytest.mark.parametrize(
    ("seconds", "text"), [(1.25, "1.2 s"), (59.8, "59.8 s"), (330, "6 min"), (4321, "1 h 12 min")])
def test_long_times_are_in_hours_and_minutes(seconds, text):
    assert elapsed_text(seconds) == text


def test_two_claims_on_stdout_are_refused():
    with pytest.raises(InputError, match="both claim stdout"):
        Report(as_json=True, events="-")


def test_each_worker_has_a_line_that_says_what_it_is_at(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Report(as_json=False, events=None) as report:
        for worker, shot in ((1, "one [red]"), (2, "two"), (1, "three")):
            report({"event": "progress", "stage": "sample", "done": 2, "total": 3, "shot": shot,
                    "worker": worker, "fraction": 0.25, "eta_s": 60.0})
        report.result({}, "")
    shown = terminal.getvalue()
    for text in ("worker 1: three sample", "worker 2: two sample", "all", "25%"):
        assert text in shown


def test_a_film_has_one_line_with_its_shot_take_and_time_left(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Report(as_json=False, events=None) as report:
        for stage, done in (("prompt", 1), ("sample", 3), ("write", 9)):
            report({"event": "progress", "stage": stage, "done": done, "total": done, "shot": "a",
                    "shot_number": 5, "num_shots": 7, "take": 2, "num_takes": 2,
                    "fraction": 0.25, "eta_s": 39.6})
        report.result({}, "")
    shown = terminal.getvalue()
    for text in ("shot 5/7, take 2/2", "25%", "40 s left"):
        assert text in shown
    assert "sample" not in shown
    assert shown.count("\n") == 1


def test_a_note_that_comes_again_is_shown_once_with_its_count(capsys, tmp_path):
    path = tmp_path / "e.jsonl"
    with Report(as_json=False, events=str(path)) as report:
        for text in ("few colours", "seed 7", "few colours", "few colours"):
            report.note(text)
    lines = ["note: few colours", "note: seed 7", "note: few colours (3 times)"]
    assert capsys.readouterr().err.splitlines() == lines
    assert len(path.read_text().splitlines()) == 4


def test_a_warning_stands_in_a_line_above_the_bars(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    handler = Printed()
    with Report(as_json=False, events=None) as report:
        report({"event": "progress", "stage": "sample", "done": 1, "total": 3})
        before = len(terminal.getvalue())
        assert sys.stderr is not terminal
        handler.emit(logging.LogRecord("x", logging.WARNING, "", 0, "odd", (), None))
    shown = terminal.getvalue()[before:]
    cleared = "\x1b[2K"
    assert 0 <= shown.index(cleared) < shown.index("odd\n") < shown.index("sample")
