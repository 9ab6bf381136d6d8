"""The wheel: what is in it, and that it works outside the checkout."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    shutil.which("git") is None or not (ROOT / ".git").exists(), reason="needs a git checkout"
)


def source_files():
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split("\0")
    return [name for name in listed if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy of the checkout, ignored files left behind."""
    folder = tmp_path_factory.mktemp("build")
    for name in source_files():
        if name.startswith(("vidgen/", "configs/")) or "/" not in name:
            target = folder / "tree" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation",
         "--no-index", "-w", folder, folder / "tree"],
        check=True,
    )
    return next(folder.glob("vidgen-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Python of another environment: the wheel, and this one's packages but not its vidgen."""
    folder = tmp_path_factory.mktemp("env")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    purelib = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps",
         "--no-index", wheel],
        check=True,
    )
    for package in Path(sysconfig.get_path("purelib")).iterdir():
        link = Path(purelib) / package.name
        is_ours = "vidgen" in package.name or package.suffix == ".pth"
        if not is_ours and not link.exists():
            link.symlink_to(package)
    return python


def run(python, *arguments, cwd):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL"))}
    return subprocess.run(
        [python, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def test_the_wheel_holds_the_package_and_the_configs_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {n for n in archive.namelist() if ".dist-info/" not in n}
        metadata = next(n for n in archive.namelist() if n.endswith("METADATA"))
        assert "License-Expression: Apache-2.0" in archive.read(metadata).decode()
    sources = source_files()
    package = {n for n in sources if n.startswith("vidgen/")}
    configs = {f"vidgen/{n}" for n in sources
               if n.startswith("configs/") and n.endswith((".yaml", ".opus"))}
    assert names == package | configs


def test_the_wheel_holds_nothing_of_the_laboratory(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert not {name.split("/")[0] for name in names} & {"eval", "train", "tests"}
    model = ("vidgen/assets/toybox/", "vidgen/configs/train/subject_toybox.yaml")
    assert [name for name in names if "toybox" in name and not name.startswith(model)] == []


def test_the_installed_package_is_the_wheels(installed, tmp_path):
    done = run(installed, "-c", "import vidgen; print(vidgen.__file__)", cwd=tmp_path)
    assert Path(done.stdout.strip()).is_relative_to(installed.parents[1]), done.stderr


def test_the_command_runs_outside_the_checkout(installed, tmp_path):
    done = run(installed.with_name("vidgen"), "models", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert isinstance(json.loads(done.stdout), list)


def test_a_tiny_model_makes_a_clip_outside_the_checkout(installed, tiny_model, tmp_path):
    done = run(
        installed, "-m", "vidgen", "generate", "a red car", "--model", tiny_model, "--seed", "1",
        "--json", cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    (clip,) = json.loads(done.stdout)["clips"]
    assert clip["path"] == "a-red-car-1.mp4"
    assert (tmp_path / "a-red-car-1.mp4").stat().st_size > 1000


def test_the_embedded_model_makes_a_clip_outside_the_checkout(installed, tmp_path):
    if not (ROOT / "vidgen/assets/toybox/model.json").is_file():
        pytest.skip("the embedded model is not in this checkout")
    done = run(
        installed, "-m", "vidgen", "generate", "a red car drives to the right", "--seed", "1",
        "--steps", "2", "--frames", "5", "-o", "x.mp4", cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    inspected = run(installed, "-m", "vidgen", "inspect", "x.mp4", "--json", cwd=tmp_path)
    assert json.loads(inspected.stdout)["recipe"]["model"]["name"] == "toybox"
