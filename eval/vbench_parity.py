"""Hold `vidgen eval temporal` to VBench's own functions, clip by clip.

    python -m eval.vbench_parity -o vbench.json --environment FOLDER [--dino FOLDER]

Makes an environment of its own in FOLDER (once; VBench's package and what its temporal dimensions
import, without its old pins), renders clips of odd sizes and rates, and writes networks at random
weights. VBench's functions run there (`vbench_reference.py`), ours here, with the same networks on
the same files; both values of every clip and their difference are written down. --dino is a
checkout of facebookresearch/dino, which VBench clones when it runs; without it two dimensions are
left out.

Clips marked "exact" hold RGB as it is, so all decoders give the same pixels. The others are
ordinary H.264 in YUV: what VBench's two decoders (decord, OpenCV) and ours make of them differs by
rounding, and that shows.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import venv
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image

from train.toybox.world.render import render
from train.toybox.world.scenes import SEED_RANGES, compose_scene
from vidgen.core.errors import VidgenError, exit_code
from vidgen.core.runtime import atomic_write, check_output, fingerprint
from vidgen.evaluation.temporal.run import TemporalRun, run_temporal
from vidgen.media.clip import Clip
from vidgen.media.types import ClipInfo
from vidgen.media.write import write_clip
from vidgen.pipeline.codec import to_frames

PACKAGES = (
    "torch==2.13.0", "torchvision==0.28.0", "numpy==1.26.4", "opencv-python-headless==4.11.0.86",
    "decord==0.6.0", "openai-clip==1.0.1", "omegaconf==2.4.0", "easydict==1.14", "scipy==1.17.1",
    "timm==1.0.12", "imageio==2.38.1", "safetensors", "setuptools<81",
)  # fmt: skip
VBENCH = "vbench==0.1.5"
TOLERANCE = 1e-4
HEIGHT, WIDTH = 132, 140  # no multiples of 8 or 16
#: name -> (sprite, motion, place, frames, fps, held still but for its brightness)
CLIPS = {
    "a cat bounces, camera pans right": ("cat", "bounces", "meadow", 17, 8, False),
    "a robot that stays, camera static": ("robot", "stays", "room", 13, 25, True),
    "a car moves left, camera pans right": ("car", "moves left", "city", 16, 24, False),
    "a fish circles, camera zooms in": ("fish", "circles", "underwater", 9, 12, False),
    "a star that spins, camera tilts down": ("star", "spins", "space", 13, 30, False),
}
YUV_TOO = 2  # of these also as ordinary H.264
FLICKER = 5  # levels
EXACT, YUV = "exact", "yuv"


def make_environment(folder: Path) -> Path:
    """VBench's environment; returns its Python."""
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        venv.create(folder, with_pip=True, clear=True)
        for packages in (("--no-deps", VBENCH), PACKAGES):
            subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
        (folder / "ready").touch()
    return python


def write_clips(work: Path) -> None:
    """Render the clips, in RGB and as ordinary H.264, and a larger first picture of each."""
    clips, pictures = work / "clips", work / "pictures"
    for folder in (clips, pictures):
        folder.mkdir(parents=True, exist_ok=True)
    seed = SEED_RANGES["dev"][0] + 77
    for index, (name, (sprite, motion, place, count, fps, still)) in enumerate(CLIPS.items()):
        scene = compose_scene(seed + index, sprite, motion, place)
        frames = to_frames(render([scene], count, HEIGHT, WIDTH, float(fps)).video[0]).numpy()
        if still:
            dark = frames[:1].clip(0, 255 - FLICKER)
            frames = np.concatenate([dark + FLICKER * np.uint8(t % 2) for t in range(count)])
        large = 3 * HEIGHT // 2, 2 * WIDTH
        drawn = render([scene], count, *large, float(fps), frames=[0]).video[0]
        picture = to_frames(drawn)[0].numpy()
        for kind, number in ((EXACT, 0), (YUV, 1)):
            stem = f"{name}-{number}"
            if kind == YUV and index >= YUV_TOO:
                continue
            Image.fromarray(picture).save(pictures / f"{stem}.png")
            if kind == EXACT:
                write_rgb(clips / f"{stem}.mp4", frames, fps)
            else:
                info = ClipInfo(Fraction(fps), (WIDTH, HEIGHT), count)
                write_clip(clips / f"{stem}.mp4", [frames], info)


def write_rgb(path: Path, frames: Any, fps: int) -> None:
    """Lossless RGB in an mp4, and a check that it comes back as it went in."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264rgb", rate=fps, options={"qp": "0", "bf": "0"})
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "rgb24"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode())
    if not np.array_equal(Clip.from_file(path).frames, frames):
        raise VidgenError(f"{path} doesn't hold its pixels exactly; libx264rgb is another one here")


class Embed(torch.nn.Module):
    """A picture's features as DreamSim's interface has them, at random weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(3, 16, 7, 4)
        self.second = torch.nn.Conv2d(16, 32, 5, 4)

    def forward(self, picture: torch.Tensor) -> torch.Tensor:
        """Features [B, D] of pictures [B, 3, 224, 224]."""
        return self.second(torch.relu(self.first(picture - 0.5))).mean((2, 3))


class Flow(torch.nn.Module):
    """A flow as RAFT's interface has it, at random weights; none where nothing changes."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = torch.nn.Conv2d(3, 2, 7, padding=3, bias=False)
        self.mix.weight.data = 0.004 * torch.randn_like(self.mix.weight)

    def forward(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """The flow [1, 2, H, W] between pictures [1, 3, H, W], 0 to 255."""
        return self.mix(other - one)


def write_networks(folder: Path) -> None:
    """Networks at random weights in the form that `--network` takes."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, ViTConfig, ViTModel

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 256}
    dino = ViTModel(ViTConfig(**sizes, num_attention_heads=4), add_pooling_layer=False)
    clip = CLIPVisionModelWithProjection(CLIPVisionConfig(
        **sizes, num_attention_heads=1, projection_dim=32, patch_size=32
    ))  # fmt: skip
    for parameter in (*dino.parameters(), *clip.parameters()):  # fresh positions and biases are 0
        parameter.data += 0.2 * torch.randn_like(parameter)
    dino.save_pretrained(folder / "dino")
    clip.save_pretrained(folder / "clip")
    for name, module in (("dreamsim", Embed()), ("raft", Flow())):
        torch.jit.script(module.eval()).save(str(folder / f"{name}.pt"))


def measure_ours(work: Path) -> dict[str, dict[str, Any]]:
    """{dimension: {clip: value}} by `vidgen eval temporal`, None where it takes none."""
    folder = work / "networks"
    networks = {"dino": folder / "dino", "clip": folder / "clip"}
    networks |= {name: folder / f"{name}.pt" for name in ("dreamsim", "raft", "amt")}
    run = TemporalRun(
        (str(work / "clips"),), tuple(f"{n}={p}" for n, p in networks.items()),
        str(work / "pictures"),
    )  # fmt: skip
    (measured,) = run_temporal(run, work / "ours.json", lambda _event: None)["folders"]
    clips = {f"{clip['name']}.mp4": clip["figures"] for clip in measured["clips"]}
    dimensions = [name for name in next(iter(clips.values())) if not name.startswith("proxy_")]
    found = {d: {name: figures[d] for name, figures in clips.items()} for d in dimensions}
    flicker = found["temporal_flickering"]
    return {**found, "static_filter": {name: flicker[name] is not None for name in clips}}


def compare(
    ours: dict[str, dict[str, Any]], theirs: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """By dimension: each clip's two values, and the largest difference of exact and YUV clips."""
    table: dict[str, dict[str, Any]] = {}
    for dimension, values in theirs.items():
        rows = {
            clip: {"vbench": float(value), "vidgen": float(ours[dimension][clip])}
            for clip, value in values.items() if ours[dimension][clip] is not None
        }  # fmt: skip
        largest = {}
        for kind, ending in ((EXACT, "-0.mp4"), (YUV, "-1.mp4")):
            gaps = [abs(r["vbench"] - r["vidgen"]) for c, r in rows.items() if c.endswith(ending)]
            largest[kind] = max(gaps, default=None)
        agrees = largest[EXACT] is not None and largest[EXACT] <= TOLERANCE
        table[dimension] = {"largest": largest, "agrees": agrees, "clips": rows}
    return table


def versions(python: Path) -> dict[str, str]:
    """Of the packages in VBench's environment."""
    told = subprocess.run([python, "-m", "pip", "list", "--format", "json"], check=True,
                          capture_output=True)  # fmt: skip
    names = [package.split("=")[0].split("<")[0] for package in (VBENCH, *PACKAGES)]
    return {p["name"]: p["version"] for p in json.loads(told.stdout) if p["name"] in names}


def main() -> int:
    """Make the environment, run both, write the comparison and print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("-o", "--output", type=Path, required=True, metavar="JSON")
    add("--environment", type=Path, required=True, metavar="FOLDER", help="made if it isn't there")
    add("--dino", type=Path, metavar="FOLDER", help="a checkout of facebookresearch/dino")
    add("--overwrite", action="store_true")
    args = parser.parse_args()

    def work() -> None:
        check_output(args.output, overwrite=args.overwrite)
        python = make_environment(args.environment.resolve())
        place = args.environment / "work"
        shutil.rmtree(place, ignore_errors=True)
        write_clips(place)
        write_networks(place / "networks")
        dino = [] if args.dino is None else ["--dino", str(args.dino.resolve())]
        reference = Path(__file__).with_name("vbench_reference.py")
        if subprocess.run([python, reference, place.resolve(), *dino], check=False).returncode:
            raise VidgenError("VBench's functions failed; what they said stands above")
        told = json.loads((place / "theirs.json").read_text())
        table = compare(measure_ours(place), told["results"])
        result = {"tolerance": TOLERANCE, "dimensions": table, "left_out": told["left_out"],
                  "vbench": versions(python), "machine": fingerprint()}  # fmt: skip
        atomic_write(args.output, (json.dumps(result, indent=1) + "\n").encode())
        for dimension, row in table.items():
            print(dimension, row["largest"], "agrees" if row["agrees"] else "DIFFERS")
        for dimension, why in told["left_out"].items():
            print(f"{dimension} left out: {why}", file=sys.stderr)
        off = [dimension for dimension, row in table.items() if not row["agrees"]]
        if off:
            raise VidgenError(f"{', '.join(off)} differ by more than {TOLERANCE}")

    return exit_code(work)


if __name__ == "__main__":
    raise SystemExit(main())
