"""Run files of the embedded model's programs."""

import pytest

from train.toybox.runs import load_run
from vidgen.core.errors import InputError


def test_a_run_continues_from_another_file(tmp_path):
    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return path

    write("all.yaml", "seed: 1\noptim: {lr: 1, betas: [0.9, 0.99]}\nname: all\n")
    write("one/middle.yaml", "base: ../all.yaml\noptim: {decay: 2}\n")
    top = write("one/top.yaml", "\nbase: middle.yaml\noptim: {betas: [0.5]}\nname: top\n")
    run = load_run(top, ["optim.lr=3"])
    assert run == {"seed": 1, "optim": {"lr": 3, "betas": [0.5], "decay": 2}, "name": "top"}
    assert run.lines.keys() == {"base", "optim", "name"}, "of its own file alone"
    assert run["optim"].lines.keys() == {"betas"}
    for text, told in (
        ("base: top.yaml", "leads back to it"), ("base: none.yaml", "does not exist"),
        ("base: [a]", "must be a file's name, not a list of 1"),
    ):  # fmt: skip
        write("one/middle.yaml", text)
        with pytest.raises(InputError, match=told):
            load_run(top)
