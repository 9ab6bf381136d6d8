"""How near `vidgen plan` comes: predicted against real memory and time, a process for each clip.

    python -m eval.preflight [-o results.json] [--only NAME]...   some minutes on one core
    bash scripts/quiet python -m eval.preflight --threads 2       in wall time, on a quiet machine

Memory is the peak of the resident size above that after the imports. Without --threads, time is
that which the process's threads were given, with one thread for torch, so that other programs on
the machine weigh little. With it, all times are those on the wall. Clips are in the processor's
best dtype where none is named.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from vidgen.core.errors import exit_code

ROOT = Path(__file__).parents[1]
SPAN = {"bytes": (0.95, 1.40), "seconds": (1 / 1.5, 1.5)}
"""Predicted by real, at least and at most."""
# as many are drawn as are counted: how many more it takes is chance
SILENT = {"model": "toybox", "settings": {"candidates": 1}, "audio": "none"}
EMBEDDED = {"model": "toybox", "settings": {"candidates": 1, "audio_candidates": 4}}
CLIPS: dict[str, dict[str, Any]] = {
    "embedded": EMBEDDED,
    "embedded, large": {**SILENT, "size": "256x256", "steps": 4},
    "embedded, fp32": {**EMBEDDED, "dtype": "fp32", "steps": 8},
    "embedded, first frame": {**EMBEDDED, "dtype": "fp32", "steps": 8, "image": True},
    "embedded, 3 windows": {**EMBEDDED, "seconds": 8, "steps": 4},
    "wide": {"model": "wide", "frames": 5},
    "wide, first frame": {"model": "wide", "frames": 5, "image": True},
    "wide, offloaded": {"model": "wide", "frames": 5, "offload": "block"},
}
PROMPT = "a red car drives through the desert"
CHILD = """
import json, sys, time
import vidgen, vidgen.media.write, vidgen.pipeline.setups, vidgen.weights.layouts

def status(key):
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(key))

clip = json.loads(sys.argv[1])
clock, spent = time.perf_counter if clip.pop("wall") else time.process_time, {}
out, loading = clip.pop("out"), {k: clip.pop(k) for k in ("model", "dtype", "offload") if k in clip}
base, made, now = status("VmRSS"), [], ["load", clock()]

def begin(stage):
    spent[now[0]] = spent.get(now[0], 0.0) + clock() - now[1]
    now[:] = stage, clock()

engine = vidgen.load(**loading)
begin("text")
names = {"prompt": "text", "sample": "denoise"}
film = engine.generate(clip.pop("prompt"), seed=1, **clip, on_estimate=made.append,
                       on_event=lambda event: begin(names.get(event.stage, event.stage)))
begin("write")
film.save(out)
begin("")
peak = status("VmHWM") - base
print(json.dumps({"made": made[0].as_data(), "spent": spent, "peak": peak}))
"""


def build_wide(folder: Path) -> Path:
    """A model as wide as Wan 2.1's 1.3B, three blocks of it and Wan's VAE, at random weights.

    As in Wan's releases the VAE is float32, the rest bfloat16.
    """
    import torch

    from train.toybox.initial import init_dit
    from train.toybox.model_files import save_module
    from train.toybox.tasks.tokenizer import train_tokenizer
    from vidgen.models.dit import SpacetimeDiT
    from vidgen.models.dit_types import DiTConfig
    from vidgen.models.presets import DIT_PRESETS, VAE_PRESETS
    from vidgen.models.text import TextConfig, UMT5Encoder
    from vidgen.models.vae import CausalVAE
    from vidgen.weights.configs import encoder_to_transformers
    from vidgen.weights.family import ModelDefaults
    from vidgen.weights.folder import write_model_info

    settings = {**vars(DIT_PRESETS["wan-1.3b"]), "num_layers": 3, "text_dim": 256}
    dit, vae = SpacetimeDiT(DiTConfig(**settings)), CausalVAE(VAE_PRESETS["wan21"])
    init_dit(dit)
    text = UMT5Encoder(TextConfig(
        vocab_size=512, hidden_dim=256, head_dim=64, ffn_dim=512, num_layers=2, num_heads=4
    ))  # fmt: skip
    save_module(vae.state_dict(), vae.config, folder / "vae", torch.float32)
    save_module(dit.state_dict(), dit.config, folder / "transformer", torch.bfloat16)
    settings = encoder_to_transformers(text.config)
    save_module(text.state_dict(), settings, folder / "text_encoder", torch.bfloat16)
    train_tokenizer((PROMPT, "a cat"), folder / "tokenizer", 512)
    write_model_info(
        folder, name="wide", family="wan2.1", license_name="Apache-2.0", tasks=("text", "image"),
        defaults=ModelDefaults(num_steps=4, shift=3.0, guidance_scale=3.0, fps=16.0, num_frames=5,
                               height=160, width=160),
    )  # fmt: skip
    return folder


def measure(clip: dict[str, Any], folder: Path, threads: int | None) -> dict[str, Any]:
    """One clip in a process of its own: what was predicted, and what it took."""
    given = {"prompt": PROMPT, **clip, "out": str(folder / "clip.mp4"), "wall": bool(threads)}
    if clip["model"] == "wide":
        given["model"] = str(folder / "wide")
    if clip.get("image"):
        given["image"] = str(folder / "first.png")
    Path(given["out"]).unlink(missing_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads or 1)}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(given)], cwd=ROOT, env=environment, check=True,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    return json.loads(done.stdout)


def compare(result: dict[str, Any]) -> dict[str, Any]:
    """Predicted, real and their ratio, of memory, of time, and of the stages."""
    made, spent = result["made"], result["spent"]
    seconds = {stage["name"]: stage["seconds"] for stage in made["stages"]}
    seconds["write"] = seconds.pop("decode")
    pairs = {"bytes": (made["peak_bytes"], result["peak"]),
             "seconds": (round(sum(seconds.values()), 3), round(sum(spent.values()), 3))}
    compared: dict[str, Any] = {}
    for what, (predicted, real) in pairs.items():
        low, high = SPAN[what]
        compared[what] = {"predicted": predicted, "real": real, "ratio": round(predicted / real, 3),
                          "within": low <= predicted / real <= high}
    stages = {name: [round(seconds.get(name, 0.0), 3), round(spent.get(name, 0.0), 3)]
              for name in dict.fromkeys([*seconds, *spent])}
    return compared | {"stages": stages}


def main() -> None:
    """Calibrate where needed, measure every clip, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", metavar="FILE", help="results as JSON")
    parser.add_argument("--only", choices=CLIPS, action="append", help="may be repeated")
    parser.add_argument("--threads", type=int, metavar="N", help="wall time on N threads")
    args = parser.parse_args()
    import numpy as np
    import torch
    from PIL import Image

    from vidgen.core.runtime import atomic_write, best_dtype, fingerprint
    from vidgen.pipeline.loader import DTYPES
    from vidgen.pipeline.timing import known_rates, measure_rates
    from vidgen.weights.layouts import open_model

    torch.set_num_threads(args.threads or 1)
    device = torch.device("cpu")
    clips = {name: clip for name, clip in CLIPS.items() if name in (args.only or CLIPS)}
    results = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        Image.fromarray(np.full((160, 160, 3), 99, np.uint8)).save(folder / "first.png")
        if any(clip["model"] == "wide" for clip in clips.values()):
            build_wide(folder / "wide")
        for title, clip in clips.items():
            model = open_model(str(folder / "wide") if clip["model"] == "wide" else clip["model"])
            kind = DTYPES[clip.get("dtype", best_dtype(device))]
            if args.threads or known_rates(model, device, kind) is None:  # rates on the wall age
                measure_rates(model, device, kind)
            results[title] = compare(measure(clip, folder, args.threads))
            found = results[title]
            line = "  ".join(
                f"{what} x {found[what]['ratio']:.2f} {'ok ' if found[what]['within'] else 'OFF'}"
                for what in ("bytes", "seconds")
            )
            size = f"{found['bytes']['real'] / 1e6:.0f} MB, {found['seconds']['real']:.1f} s"
            print(f"{title:<21} {line}  ({size})", flush=True)
    if args.output:
        data = {"spans": SPAN, "wall": bool(args.threads), "clips": results,
                "machine": fingerprint()}
        atomic_write(args.output, json.dumps(data, indent=1).encode())


if __name__ == "__main__":
    sys.exit(exit_code(main))
