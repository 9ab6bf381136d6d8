"""Every reader of files, fed with damaged ones from a fixed seed.

    python -m tests.fuzzing [--count 10000] [--seed 0] [--first 0]

A case is refused with a `VidgenError` or read; anything else is a failure: another exception, a
crash, 5 s of processor time, `MEMORY` beyond what the process is born with, a file left behind.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from fractions import Fraction
from io import StringIO
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import torch

from eval.toybox.judge import JudgeFolder
from tests.faults import ForkServer, Job, Outcome
from tests.fuzz_samples import CAPTIONS, NOISE, PICTURES, SCRIPTS, SOUNDS, VIDEOS
from tests.lora_models import I2V
from tests.mutations import mutate
from vidgen.cli.main import main
from vidgen.core.config import build
from vidgen.core.config_file import load_yaml
from vidgen.core.errors import InputError, VidgenError
from vidgen.evaluation.suite import PromptSuite
from vidgen.media.clip import Clip
from vidgen.media.probe import probe, read_recipe
from vidgen.media.read import load_image
from vidgen.media.sound import read_sound
from vidgen.media.video_reader import VideoReader
from vidgen.models.tokenizer import PromptTokenizer
from vidgen.pipeline.engine import load
from vidgen.pipeline.inputs import noise_file, read_mask
from vidgen.pipeline.journal.job import (
    SEGMENTS,
    job_facts,
    part_name,
    read_arrays,
    read_job,
    read_segment,
)
from vidgen.pipeline.policy import WordList
from vidgen.pipeline.replay import restore_inputs
from vidgen.training.config import RunConfig
from vidgen.training.data import files as data_files
from vidgen.training.data.probe import probe_file
from vidgen.weights.load import read_tensors
from vidgen.weights.lora import read_lora
from vidgen.weights.lora_dialects import DIALECTS
from vidgen.weights.store import find_files, open_tensors
from vidgen.weights.tensors import Tensors

CPU_S = 5
WALL_S = 30.0  # threads that wait for each other take no processor time
MEMORY = 1 << 30
SPACE = 3 << 30
"""Address space: of mapped files and unused stacks, more than memory."""
MESSAGE = 2000
OTHERS = (*PICTURES, *VIDEOS, "tensors.pth", "old.pth", "run.yaml", "lora-peft/adapter_config.json")
FILE_VERBS = {
    "check": (), "replay": ("-o", "out.mp4"), "extend": ("--seconds", "1", "-o", "out.mp4"),
}
JOB = "x.mp4.vidgen-job"
MASKED = SimpleNamespace(
    num_frames=3, kept_frames=3, fps=Fraction(12), width=32, height=32, fit="crop"
)
"""What a mask is brought to."""


def _walk(path: Path) -> None:
    with VideoReader(path) as reader:
        for _ in zip(range(1000), reader, strict=False):
            pass


def _job_in(folder: Path) -> None:
    problem = job_facts(folder / JOB).get("problem")
    read_job(folder / JOB)
    read_arrays(folder / JOB / "state.safetensors")
    read_segment(folder / JOB / part_name(SEGMENTS, 0))
    assert not problem, "what is read has no problem"


def _touch(stored: Tensors) -> None:
    for lazy in stored.values():
        lazy.get().clone()


def _words(folder: Path) -> None:
    tokenizer = PromptTokenizer(folder, 64)
    tokenizer.encode(["a red car bounces", ""])
    tokenizer.unknown_words("a red elephant")


def _model(folder: Path) -> None:
    engine = load(str(folder), device="cpu", dtype="fp32")
    engine.folder.content_hash  # noqa: B018 - reads every file


def _script(path: Path) -> None:
    _command("script", str(path), "--check")


def _noise(path: Path) -> None:
    digest = hashlib.sha256(noise_file(NOISE)).hexdigest()
    recipe = {"inputs": [{"option": "latents", "sha256": digest}]}
    restore_inputs(recipe, Path(), [("latents", str(path))])


def _captions(path: Path) -> None:
    is_table = path.suffix in data_files.TABLES
    read = data_files.table if is_table else data_files.sidecar
    try:
        read(path)
    except data_files.Unreadable as error:
        raise InputError(str(error)) from None


def _probe(path: Path) -> None:
    problem = probe_file(path).problem
    if problem:
        raise InputError(problem)


def _command(*argv: str) -> None:
    """A command line: told errors are refusals, a traceback or another exit code is a failure."""
    told = StringIO()
    with redirect_stderr(told), redirect_stdout(StringIO()):
        code = main(argv)
    if code == 2 and "error: " in told.getvalue():
        raise InputError(told.getvalue())
    assert code in (0, 1), f"exit code {code}: {told.getvalue()}"
    assert code == 0 or argv[0] == "check", told.getvalue()


@dataclass(frozen=True)
class Target:
    """A reader and what it reads.

    Args:
        name: in the report.
        read: the reader.
        samples: files, each damaged in turn.
        inside: the samples lie in this folder, which the reader is given; else it gets the file.
    """

    name: str
    read: Callable[[Path], Any]
    samples: tuple[str, ...]
    inside: str = field(default="")


def targets() -> Iterator[Target]:
    """All readers, those of every verb included."""
    media = (*VIDEOS, *PICTURES, *SOUNDS)
    yield Target("load_image", load_image, PICTURES)
    yield Target("load_image", load_image, PICTURES)
    yield Target("VideoReader", _walk, (*VIDEOS, *PICTURES))
    yield Target("VideoReader", _walk, VIDEOS)
    yield Target("read_sound", read_sound, (*SOUNDS, *VIDEOS))
    yield Target("probe", probe, media)
    yield Target("read_recipe", read_recipe, media)
    yield Target("read_mask", lambda p: read_mask(p, MASKED), (*PICTURES, *VIDEOS))
    yield Target("Clip.from_file", Clip.from_file, media)
    yield Target("vidgen inspect", lambda p: _command("inspect", str(p)), media)
    for verb, options in FILE_VERBS.items():
        yield Target(f"vidgen {verb}", lambda p, v=verb, o=options: _command(v, str(p), *o), VIDEOS)
    job = (f"{JOB}/job.json", f"{JOB}/state.safetensors", f"{JOB}/segments/00000.safetensors")
    yield Target("job", _job_in, job, "job")
    yield Target("open_tensors", lambda p: _touch(open_tensors([p])),
                 ("tensors.safetensors", "tensors.pth"))
    yield Target("read_tensors", read_tensors, ("tensors.safetensors",))
    yield Target("find_files", lambda p: _touch(open_tensors(find_files(p))),
                 ("model.safetensors.index.json", "x-1.safetensors"), "shards")
    yield Target("read_lora", lambda p: read_lora(p, I2V),
                 tuple(f"lora-{kind}.safetensors" for kind in (*DIALECTS, "kohya")))
    yield Target("read_lora", lambda p: read_lora(p, I2V),
                 ("adapter_config.json", "adapter_model.safetensors"), "lora-peft")
    parts = ("transformer", "vae", "text_encoder")
    configs = ("model.json", *(f"{part}/config.json" for part in parts))
    yield Target("model folder", _model, configs, "model")
    yield Target("model folder", _model, configs, "model")
    weights = (*(f"{part}/model.safetensors" for part in parts), "tokenizer/tokenizer.json")
    yield Target("model folder", _model, weights, "model")
    yield Target("diffusers folder", _model,
                 ("model_index.json", *configs[1:], "scheduler/scheduler_config.json"), "diffusers")
    yield Target("Wan folder", _model, ("config.json", "Wan2.1_VAE.pth"), "wan")
    yield Target("tokenizer", _words, ("tokenizer.json", "words.txt", "synonyms.json"),
                 "tokenizer")
    judge = ("config.json", "model.safetensors")
    yield Target("judge", lambda p: JudgeFolder(p).load(), judge, "judge")
    yield Target("load_yaml", lambda p: build(RunConfig, load_yaml(p), str(p)), ("run.yaml",))
    yield Target("load_yaml", lambda p: build(RunConfig, load_yaml(p), str(p)), ("run.yaml",))
    yield Target("vidgen script", _script, SCRIPTS)
    yield Target("vidgen script", _script, SCRIPTS)
    yield Target("noise", _noise, ("noise.safetensors",))
    yield Target("WordList", WordList, ("words.txt",))
    yield Target("PromptSuite", PromptSuite.read, ("suite.txt", "suite.json"))
    yield Target("captions", _captions, CAPTIONS)
    yield Target("probe_file", _probe, (*VIDEOS, *PICTURES))


TARGETS = tuple(targets())


def run_case(samples: Path, seed: int | None, number: int) -> str:
    """One case, in the working directory; returns "read" or why it was refused.

    Args:
        samples: what `make_samples` made.
        seed: draws the damage; None does none.
        number: of the case.

    Raises:
        AssertionError: something was left behind, or the refusal says nothing.
        Exception: whatever a reader lets through.
    """
    logging.disable()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rng = Random(f"{seed} {number}")
    target = TARGETS[number % len(TARGETS)]
    name = rng.choice(target.samples)
    source = samples / target.inside / name
    if target.inside:
        shutil.copytree(samples / target.inside, "case")
        given, victim = Path("case"), Path("case", name)
    else:
        given = victim = Path(name)
    other = samples / rng.choice(OTHERS)
    content = source.read_bytes()
    if seed is not None:
        content = mutate(content, name, other.read_bytes(), rng)
    victim.write_bytes(content)
    before = set(Path().rglob("*"))
    try:
        target.read(given)
        told = "read"
    except VidgenError as error:
        told = str(error)
        assert told, "an error without a word"
        assert len(told) <= MESSAGE, f"an error of {len(told)} signs: {told[:500]}"
        # libav itself refuses more than 2 GB, in the words "Cannot allocate".
        assert not any(word in told for word in ("Unable to allocate", "MemoryError")), told
    made = {Path("out.mp4")} if told == "read" else set()
    left = set(Path().rglob("*")) - before - made
    assert not left, f"left behind: {left}"
    return told


@dataclass
class Report:
    """What became of the cases, by reader."""

    read: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    failures: dict[int, str] = field(default_factory=dict)
    slowest_s: float = 0.0
    largest: int = 0

    def add(self, number: int, outcome: Outcome) -> None:
        """Count a case."""
        name = TARGETS[number % len(TARGETS)].name
        self.slowest_s = max(self.slowest_s, outcome.seconds)
        self.largest = max(self.largest, outcome.grown)
        problem = outcome.failure
        if outcome.hung:
            problem = f"hangs: {outcome.seconds:.0f} s"
        elif outcome.signal:
            problem = f"crashes with signal {outcome.signal}: {outcome.output[-500:]}"
        elif outcome.grown > MEMORY:
            problem = f"takes {outcome.grown / 1e6:.0f} MB"
        if problem:
            self.failures[number] = f"{name}: {problem}"
        else:
            (self.read if outcome.result == "read" else self.refused)[name] += 1

    @property
    def text(self) -> str:
        """A table."""
        names = dict.fromkeys(target.name for target in TARGETS)
        lines = [f"{'reader':<16} {'read':>6} {'refused':>8}"]
        lines += [f"{name:<16} {self.read[name]:>6} {self.refused[name]:>8}" for name in names]
        lines += [f"{'all':<16} {self.read.total():>6} {self.refused.total():>8}",
                  f"failed {len(self.failures)}, slowest {self.slowest_s:.1f} s, most memory "
                  f"{self.largest / 1e6:.0f} MB"]  # fmt: skip
        return "\n".join(lines)


def samples_in(folder: Path, server: ForkServer) -> Path:
    """A new folder of samples."""
    samples = folder / "samples"
    samples.mkdir()
    made = server.run(Job("tests.fuzz_samples:make_samples", (samples,), timeout_s=120))
    assert not made.failure, made.failure
    return samples


def run_cases(
    server: ForkServer, samples: Path, numbers: Iterable[int], seed: int | None = 0,
    tell: Callable[[str], None] | None = None,
) -> Report:
    """Run cases, each in a child of its own."""
    report, work = Report(), samples.with_name("work")
    for number in numbers:
        work.mkdir()
        job = Job("tests.fuzzing:run_case", (samples, seed, number), work,
                  timeout_s=WALL_S, cpu_s=CPU_S, memory=SPACE)
        report.add(number, server.run(job))
        shutil.rmtree(work)
        if tell and number in report.failures:
            tell(f"case {number}: {report.failures[number]}")
    return report


def program() -> int:
    """Run from the command line; 1 if a case failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    numbers = range(options.first, options.first + options.count)
    with tempfile.TemporaryDirectory() as folder, ForkServer() as server:
        report = run_cases(server, samples_in(Path(folder), server), numbers, options.seed, print)
    print(report.text)
    return bool(report.failures)


if __name__ == "__main__":
    sys.exit(program())
