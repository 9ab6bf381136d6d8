"""What may be imported when, and how long help may take."""

import os
import resource
import subprocess
import sys

import pytest

from tests.warm import cold

HEAVY = ("torch", "numpy", "PIL", "av", "yaml", "rich", "diffusers", "transformers", "tokenizers")


def loaded(statement):
    """Which heavy packages a fresh interpreter has loaded after a statement."""
    program = (
        f"import sys\n{statement}\n"
        f"print(*(name for name in {HEAVY} if name in sys.modules), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return set(done.stderr.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import vidgen",
        "from vidgen.cli.main import main; main(['--help'])",
        "from vidgen.cli.main import main; main(['generate', '--help'])",
        "from vidgen.cli.main import main; main(['generate', '', '-o', 'x.mp4'])",
        "import vidgen.core.shapes",
    ],
)
def test_light_doors_load_nothing_heavy(statement):
    assert loaded(f"import contextlib, io\nwith contextlib.redirect_stderr(io.StringIO()):\n"
                  f"    {statement}") == set()


@pytest.mark.parametrize(("given", "count"), [
    ({}, "20000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, "None"),
])
def test_threads_of_a_command_wait_briefly_unless_somebody_said_how_long(given, count):
    clean = {name: value for name, value in os.environ.items()
             if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    program = ("import os; from vidgen.cli.main import main; main(['--version'])\n"
               "print(os.environ.get('GOMP_SPINCOUNT'))")
    done = subprocess.run([sys.executable, "-c", program], env=clean | given, capture_output=True,
                          text=True, check=True)
    assert done.stdout.split()[-1] == count


def test_the_public_names_load_on_first_use():
    assert "torch" not in loaded("import vidgen; vidgen.Request(prompt='a cat')")
    assert "torch" not in loaded("import vidgen; vidgen.Clip")
    assert "torch" in loaded("import vidgen; vidgen.load")


def test_the_embedded_models_path_loads_neither_diffusers_nor_transformers():
    assert loaded("import vidgen.pipeline.engine") & {"diffusers", "transformers"} == set()


def test_an_unknown_public_name_is_an_attribute_error():
    import vidgen

    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = vidgen.lode
    assert set(vidgen.__all__) <= set(dir(vidgen))


def test_help_takes_less_than_three_tenths_of_a_second_of_cpu():
    def cpu_seconds():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        with cold():
            subprocess.run(
                [sys.executable, "-m", "vidgen", "--help"], stdout=subprocess.DEVNULL, check=True
            )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(cpu_seconds() for _ in range(3)) < 0.3


def test_importing_changes_nothing_outside_the_package():
    program = (
        "import logging, os, signal, warnings\n"
        "def state():\n"
        "    return (dict(os.environ), logging.root.handlers[:], warnings.showwarning,\n"
        "            [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)])\n"
        "before = state()\n"
        "import vidgen.cli.main, vidgen.media.clip, vidgen.media.grid, vidgen.core.config\n"
        "assert state() == before\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
