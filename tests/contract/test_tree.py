"""The tree keeps its own rules: layers, lint, types, tests that are really run, size."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
needs_git = pytest.mark.skipif(
    shutil.which("git") is None or not (ROOT / ".git").exists(), reason="needs a git checkout"
)


def run(*command):
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def tool(name):
    return str(Path(sys.executable).with_name(name))


def tracked(*patterns):
    return run("git", "ls-files", *patterns)[1].split()


def test_the_arrows_between_the_rooms_point_down():
    code, output = run(tool("lint-imports"), "--no-cache")
    assert code == 0, output


@needs_git
def test_lint():
    code, output = run(tool("ruff"), "check", *tracked("*.py"))
    assert code == 0, output


def test_types_of_core_diffusion_and_media():
    code, output = run(tool("mypy"))
    assert code == 0, output


@needs_git
def test_every_test_file_is_collected():
    import tomllib

    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert options["testpaths"] == ["tests"]
    assert not {"python_files", "norecursedirs", "collect_ignore"} & options.keys()
    assert "--ignore" not in options["addopts"]
    home = re.compile(r"tests/(unit|tiny|parity|e2e|contract|gpu|lab|lab/distil)/test_\w+\.py")
    for name in tracked("*.py"):
        text = (ROOT / name).read_text()
        if re.search(r"^(async )?def test_|^class Test", text, re.MULTILINE):
            assert home.fullmatch(name), name
        assert "collect_ignore" not in text or name == "tests/contract/test_tree.py"


@needs_git
def test_no_two_test_files_share_a_name():
    names = [Path(f).name for f in tracked("tests/**/test_*.py")]
    assert len(names) == len(set(names))


@needs_git
def test_no_file_is_a_drawer_for_odds_and_ends():
    drawers = {"utils.py", "helpers.py", "common.py", "misc.py"}
    assert [f for f in tracked("*.py") if Path(f).name in drawers] == []


def test_scripts_are_valid_bash_and_runnable():
    for name in ("scripts/demo", "scripts/test", "scripts/quiet", ".ci/run"):
        assert (ROOT / name).stat().st_mode & 0o111, name
        assert run("bash", "-n", name) == (0, "")


def test_constraints_pin_every_direct_dependency():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    direct = project["dependencies"] + project["optional-dependencies"]["dev"]
    names = {re.split(r"[><=\[]", line)[0].lower() for line in direct}
    pins = dict(
        line.lower().split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    )
    assert names <= pins.keys()
    assert pins["torch"] == "2.13.0"
