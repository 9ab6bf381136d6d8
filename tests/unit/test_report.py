import io
import json
import sys

import pytest

from vidgen.cli.report import Report
from vidgen.core.errors import InputError


class Terminal(io.StringIO):
    def isatty(self):
        return True


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
    for text in ("worker 1: three sample", "worker 2: two sample", "all, %", "25/100"):
        assert text in shown
