"""Every reader of files, fed with damaged ones from a fixed seed.

    python -m tests.fuzzing [--count 10000] [--seed 0] [--first 0]

A case is refused with a `VidgenError` or read; anything else is a failure: another exception, a
crash, 5 s of processor time, `MEMORY` beyond what the process is born with, a file left behind.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from fractions import Fraction
from io import StringIO
from pathlib import Path
from random import Random
from typing import Any

import av
import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.faults import ForkServer, Job, Outcome
from tests.lora_models import I2V, make_adapter, make_dit
from tests.models import build_tiny_model
from tests.mutations import mutate
from vidgen.cli.main import main
from vidgen.core.config import build, load_yaml
from vidgen.core.errors import InputError, VidgenError
from vidgen.media.clip import Clip
from vidgen.media.encode import Segment
from vidgen.media.read import VideoReader, load_image, probe, read_recipe
from vidgen.media.sound import read_sound
from vidgen.media.write import ClipInfo, write_clip
from vidgen.models.text import PromptTokenizer
from vidgen.pipeline.inputs import read_mask
from vidgen.pipeline.job import job_facts, read_arrays, read_job, read_segment, segment_path
from vidgen.pipeline.journal import Journal
from vidgen.pipeline.video import load
from vidgen.toybox.judge import Judge, JudgeConfig, JudgeFolder
from vidgen.training.config import RunConfig
from vidgen.weights.load import read_tensors, save_module
from vidgen.weights.lora import DIALECTS, read_lora, write_lora
from vidgen.weights.store import TensorStore, find_files

CPU_S = 5
WALL_S = 30.0  # threads that wait for each other take no processor time
MEMORY = 1 << 30
SPACE = 3 << 30
"""Address space: of mapped files and unused stacks, more than memory."""
MESSAGE = 2000
VIDEOS = ("a.mp4", "b.mov", "c.webm", "d.mkv", "e.avi", "f.ts", "g.flv")
SOUNDS = ("s.wav", "t.mp3", "u.flac", "v.ogg", "w.m4a")
PICTURES = ("a.png", "b.png", "c.png", "d.apng", "e.gif", "f.webp", "g.webp", "h.jpg", "i.jpg",
            "j.bmp", "k.tif", "l.tif")  # fmt: skip
OTHERS = (*PICTURES, *VIDEOS, "tensors.pth", "old.pth", "run.yaml", "lora-peft/adapter_config.json")
FILE_VERBS = {
    "check": (), "replay": ("-o", "out.mp4"), "extend": ("--seconds", "1", "-o", "out.mp4"),
}
JOB = "x.mp4.vidgen-job"
RECIPE = {"vidgen": "0", "plan": {"prompt": "a cat", "seed": 1}, "inputs": []}


def make_samples(folder: Path) -> None:
    """Write a file or folder for each reader."""
    torch.manual_seed(0)
    _media(folder)
    _pictures(folder)
    for name in (f"{kind}.safetensors" for kind in DIALECTS if kind != "peft"):
        write_lora(make_adapter(make_dit(I2V)), folder / f"lora-{name}", name.split(".")[0])
    write_lora(make_adapter(make_dit(I2V)), folder / "lora-peft", "peft")
    model = build_tiny_model(folder / "model")
    tensors = {"a": torch.randn(4, 5), "b.half": torch.randn(7).half(), "n": torch.tensor(3)}
    (folder / "shards").mkdir()
    save_file({"a": tensors["a"]}, folder / "shards" / "x-1.safetensors")
    save_file({"n": tensors["n"]}, folder / "shards" / "x-2.safetensors")
    index = {"metadata": {}, "weight_map": {"a": "x-1.safetensors", "n": "x-2.safetensors"}}
    (folder / "shards" / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file(tensors, folder / "tensors.safetensors", metadata={"format": "pt"})
    torch.save(tensors, folder / "tensors.pth")
    torch.save(tensors, folder / "old.pth", _use_new_zipfile_serialization=False)
    judge = JudgeConfig(
        frame_dims=(8, 8, 16), motion_dims=(8, 8, 16), look_dim=4, mixed_dim=8, temporal_dim=16
    )
    save_module(Judge(judge).state_dict(), judge, folder / "judge", torch.bfloat16)
    shutil.copytree(model / "tokenizer", folder / "tokenizer")
    _job(folder / "job", load(str(model), device="cpu", dtype="fp32"))
    (folder / "run.yaml").write_text(
        "# a run\nfolder: runs/x\nphases:\n  - {steps: 10, num_frames: 1, batch_size: 4}\n"
        "optim: {lr: 1.0e-3, betas: [0.9, 0.98]}\ndtype: bf16\nminutes: null\n"
    )


def _job(folder: Path, engine: Any) -> None:
    """A clip that was stopped when all of it was encoded."""
    folder.mkdir()
    journal = Journal(folder / "x.mp4")
    clip = engine.generate("a red car", seed=1, frames=9, journal=journal)
    clip.save(folder / "x.mp4")
    with journal.running(clip.recipe):
        journal.keep_latents(clip.latents)
        journal.keep(Segment(9, ((b"packet", 0, 0, True),)))
        journal.pause()


def _media(folder: Path) -> None:
    """Videos of 6 frames of 64x48 with sound, ours and those of other programs; sounds alone."""
    y, x = np.mgrid[0:48, 0:64]
    frames = np.stack([np.stack([x * 3 + t, y * 4, x + y], -1) for t in range(6)]).astype(np.uint8)
    sound = np.sin(np.arange(24_000)[:, None] / 20).astype(np.float32) / 2
    info = ClipInfo(Fraction(12), (64, 48), 6, sound, 48_000, RECIPE)
    for name in VIDEOS[:4]:
        write_clip(folder / name, iter([frames]), info)
    for name, codec, tone in (
        ("e.avi", "mpeg4", "pcm_s16le"), ("f.ts", "mpeg2video", "mp2"), ("g.flv", "flv1", "aac"),
        ("s.wav", None, "pcm_s16le"), ("t.mp3", None, "libmp3lame"), ("u.flac", None, "flac"),
        ("v.ogg", None, "libopus"), ("w.m4a", None, "aac"),
    ):  # fmt: skip
        with av.open(str(folder / name), "w") as container:
            picture = codec and container.add_stream(
                codec, rate=25, width=64, height=48, pix_fmt="yuv420p"
            )
            track: Any = container.add_stream(tone, rate=48_000, layout="mono")
            for frame in frames if picture else ():
                container.mux(picture.encode(av.VideoFrame.from_ndarray(frame)))
            heard = av.AudioFrame.from_ndarray((sound.T * 32767).astype(np.int16), "s16", "mono")
            heard.sample_rate = 48_000
            container.mux(track.encode(heard))
            for stream in filter(None, (picture, track)):
                container.mux(stream.encode(None))


def _pictures(folder: Path) -> None:
    """Pictures of 48x32 in the modes and formats people have."""
    y, x = np.mgrid[0:32, 0:48]
    plain = Image.fromarray(np.stack([x * 5, y * 7, x + y], -1).astype(np.uint8))
    others = [plain.rotate(180), plain.convert("L").convert("RGB")]
    deep = Image.fromarray((x * y * 40).astype(np.uint16))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, json.dumps(RECIPE)
    animated: dict[str, Any] = {"save_all": True, "append_images": others, "duration": 80}
    info = ClipInfo(Fraction(12), plain.size, 1, recipe=RECIPE)
    write_clip(folder / "a.png", iter([np.asarray(plain)[None]]), info)
    write_clip(folder / "h.jpg", iter([np.asarray(plain)[None]]), info)
    deep.save(folder / "b.png")
    plain.quantize(16).save(folder / "c.png", transparency=3)
    plain.save(folder / "d.apng", format="PNG", **animated)
    plain.save(folder / "e.gif", comment=json.dumps(RECIPE), **animated)
    plain.save(folder / "f.webp", exif=exif)
    plain.convert("RGBA").save(folder / "g.webp", **animated)
    plain.convert("CMYK").save(folder / "i.jpg", exif=exif)
    plain.save(folder / "j.bmp")
    plain.save(folder / "k.tif", compression="tiff_lzw")
    deep.save(folder / "l.tif")


def _walk(path: Path) -> None:
    with VideoReader(path) as reader:
        for _ in zip(range(1000), reader, strict=False):
            pass


def _job_in(folder: Path) -> None:
    problem = job_facts(folder / JOB).get("problem")
    read_job(folder / JOB)
    read_arrays(folder / JOB / "state.safetensors")
    read_segment(segment_path(folder / JOB, 0))
    assert not problem, "what is read has no problem"


def _touch(store: TensorStore) -> None:
    for name in store.names:
        store.get(name).clone()


def _words(folder: Path) -> None:
    tokenizer = PromptTokenizer(folder, 64)
    tokenizer.encode(["a red car bounces", ""])
    tokenizer.unknown_words("a red elephant")


def _model(folder: Path) -> None:
    engine = load(str(folder), device="cpu", dtype="fp32")
    engine.folder.content_hash  # noqa: B018 - reads every file


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
    yield Target("read_mask", lambda p: read_mask(p, 3, 32, 32, "crop"), (*PICTURES, *VIDEOS))
    yield Target("Clip.from_file", Clip.from_file, media)
    yield Target("vidgen inspect", lambda p: _command("inspect", str(p)), media)
    for verb, options in FILE_VERBS.items():
        yield Target(f"vidgen {verb}", lambda p, v=verb, o=options: _command(v, str(p), *o), VIDEOS)
    job = (f"{JOB}/job.json", f"{JOB}/state.safetensors", f"{JOB}/segments/00000.safetensors")
    yield Target("job", _job_in, job, "job")
    yield Target("TensorStore", lambda p: _touch(TensorStore([p])),
                 ("tensors.safetensors", "tensors.pth"))
    yield Target("read_tensors", read_tensors, ("tensors.safetensors",))
    yield Target("find_files", lambda p: _touch(TensorStore(find_files(p))),
                 ("model.safetensors.index.json", "x-1.safetensors"), "shards")
    yield Target("read_lora", lambda p: read_lora(p, I2V),
                 tuple(f"lora-{kind}.safetensors" for kind in DIALECTS if kind != "peft"))
    yield Target("read_lora", lambda p: read_lora(p, I2V),
                 ("adapter_config.json", "adapter_model.safetensors"), "lora-peft")
    parts = ("transformer", "vae", "text_encoder")
    configs = ("model.json", *(f"{part}/config.json" for part in parts))
    yield Target("model folder", _model, configs, "model")
    yield Target("model folder", _model, configs, "model")
    weights = (*(f"{part}/model.safetensors" for part in parts), "tokenizer/tokenizer.json")
    yield Target("model folder", _model, weights, "model")
    yield Target("tokenizer", _words, ("tokenizer.json", "words.txt"), "tokenizer")
    judge = ("config.json", "model.safetensors")
    yield Target("judge", lambda p: JudgeFolder(p).load(), judge, "judge")
    yield Target("load_yaml", lambda p: build(RunConfig, load_yaml(p), str(p)), ("run.yaml",))
    yield Target("load_yaml", lambda p: build(RunConfig, load_yaml(p), str(p)), ("run.yaml",))


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


@contextmanager
def samples_in(folder: Path) -> Iterator[tuple[ForkServer, Path]]:
    """A server, and the samples it made in a folder."""
    samples = folder / "samples"
    samples.mkdir()
    with ForkServer() as server:
        made = server.run(Job("tests.fuzzing:make_samples", (samples,), timeout_s=120))
        assert not made.failure, made.failure
        yield server, samples


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
    with tempfile.TemporaryDirectory() as folder, samples_in(Path(folder)) as (server, samples):
        report = run_cases(server, samples, numbers, options.seed, print)
    print(report.text)
    return bool(report.failures)


if __name__ == "__main__":
    sys.exit(program())
