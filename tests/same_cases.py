"""What `scripts/same_clips make` makes: a table of command lines, and what needs a function.

Whoever renames an option edits its word here; whoever adds a feature adds a line.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from tests.same_materials import Materials

Case = Callable[[Materials], None]
"""Makes its things in the current folder."""

CAR = "'a red car bounces across the desert'"
TWO = "'a red car and a blue ball move left'"
FEW = "--frames 13 --steps 4 --seed 7 -o clip.mp4"
WAN = "--frames 9 --size 32x32 --steps 3 --seed 7 -o clip.mp4"
FOREIGN = "--frames 9 --size 64x32 --steps 3 --seed 7 -o clip.mp4 --tiles auto --attention auto"
WINDOWS = "--set overlap=2 --set colour_hold=0.5"
LOADED = "--dtype fp32 --offload none"
PINNED = {
    "generate": f"{LOADED} --tiles none --attention native",
    "extend": f"{LOADED} --tiles none",
    "sweep": f"{LOADED} --tiles none --attention native",
    "script": f"{LOADED} --tiles none",
    "eval": "--dtype fp32",
}
"""Options that each command line of a verb has at its end, but for those that it gives itself."""

COMMANDS: dict[str, str] = {
    "text": f"generate {CAR} --frames 13 --seed 7 -o clip.mp4",
    "four-steps": f"generate {CAR} {FEW}",
    "euler": f"generate {CAR} --frames 13 --steps 6 --sampler euler --shift 4 --guidance 3 "
             "--guidance-interval 0.2 0.9 --guidance-rescale 0.3 --negative 'a cat' --seed 7 "
             "--fps 10 --size 96x96 -o clip.mp4",
    "unipc": f"generate {CAR} --frames 13 --steps 6 --sampler unipc --set temporal_upsampling=1 "
             "--set candidates=1 --set regional_prompts=0 --seed 7 -o clip.mp4",
    "unknown-words": f"generate 'a crimson automobile hops in the sahara' {FEW}",
    "first-frame": f"generate {CAR} {FEW} --image %first.png",
    "first-and-last": f"generate {CAR} {FEW} --image %first.png --last-image %last.png",
    "middle-frame": f"generate {CAR} {FEW} --frame 0.5=%middle.png",
    "guided-frame": f"generate {CAR} --frames 13 --steps 6 --seed 7 --image %first.png "
                    "--set refine=2 --set encode_passes=2 --set image_guidance=2 "
                    "--set image_guidance_reach=2 -o clip.mp4",
    "reference": f"generate {CAR} {FEW} --reference %reference.png "
                 "--set reference_guidance=2",
    "mask": f"generate {CAR} {FEW} --video %clip.mkv --mask %mask.png",
    "re-imagined": f"generate {CAR} {FEW} --video %clip.mkv --strength 0.6",
    "extended": f"generate {CAR} {FEW}\n"
                f"extend clip.mp4 --seconds 2 --steps 4 {WINDOWS} -o longer.mp4",
    "goes-on": f"extend %clip.mkv --prompt {CAR} --seconds 1 --seed 7 --steps 4 "
               "--set anchor=false -o longer.mp4",
    "windows": f"generate {CAR} --frames 49 --steps 4 --seed 7 -o clip.mp4",
    "two-subjects": f"generate {TWO} --frames 13 --steps 6 --set candidates=2 --seed 7 "
                    "-o clip.mp4",
    "no-sound": f"generate {CAR} {FEW} --audio none",
    "own-sound": f"generate {CAR} {FEW} --audio generate --set audio_steps=3 "
                 "--set audio_candidates=2 --set audio_delay=0.05",
    "given-sound": f"generate {CAR} --frames 33 --steps 4 --seed 7 --audio %knocks.wav "
                   "--audio-loop -o clip.mp4",
    "sound-followed": f"generate {CAR} {FEW} --audio %knocks.wav --follow-audio",
    "narration": f"generate {CAR} {FEW} --say '0.1=hello there' --voice en-gb",
    "spoken-file": f"generate {CAR} --frames 33 --steps 4 --seed 7 --say 0.2=@%knocks.wav "
                   "-o clip.mp4",
    "wan-t2v": f"generate {CAR} --model %wan-t2v {WAN}",
    "wan-i2v": f"generate {CAR} --model %wan-i2v {WAN} --image %first.png",
    "wan-ti2v": f"generate {CAR} --model %wan-ti2v-5b {WAN} --image %first.png",
    "wan-vace": f"generate {CAR} --model %wan-vace {WAN} --control %clip.mkv --control-scale 0.8",
    "wan-vace-mask": f"generate {CAR} --model %wan-vace {WAN} --video %clip.mkv --mask %mask.png "
                     "--reference %reference.png",
    "wan-experts": f"generate {CAR} --model %wan-t2v-a14b {WAN} --steps 6 --guidance 4 "
                   "--guidance-low 2",
    "wan-converted": "convert %wan-t2v wan.model --to wan\n"
                     f"generate {CAR} --model wan.model {WAN} --shift 3\n"
                     "convert wan.model own.model --to vidgen\n"
                     f"generate {CAR} --model own.model {WAN} --shift 3 -o ours.mp4",
    "lora": f"generate {CAR} --model %wan-t2v {WAN} --lora %lora.safetensors:0.8",
    "lora-of-an-expert": f"generate {CAR} --model %wan-t2v-a14b {WAN} --steps 6 "
                         "--lora %lora.safetensors@low",
    "int8": f"generate {CAR} {FEW} --quantize int8",
    "bf16": f"generate {CAR} {FEW} --dtype bf16",
    "sdpa": f"generate {CAR} {FEW} --attention sdpa",
    "cache-first-block": f"generate {CAR} --frames 13 --seed 7 --cache first-block -o clip.mp4",
    "cache-magnitude": f"generate {CAR} --frames 13 --seed 7 --cache magnitude -o clip.mp4",
    "cache-forecast": f"generate {CAR} --frames 13 --seed 7 --cache forecast -o clip.mp4",
    "wan-cache": f"generate {CAR} --model %wan-t2v {WAN} --steps 12 --cache first-block:0.3",
    "offload-stage": f"generate {CAR} {FEW} --offload stage",
    "offload-block": f"generate {CAR} {FEW} --offload block",
    "wan-offload-block": f"generate {CAR} --model %wan-i2v {WAN} --image %first.png "
                         "--offload block",
    "tiles": f"generate {CAR} {FEW} --tiles 2x2",
    "two-devices": f"generate {CAR} {FEW} --devices 2",
    "two-devices-sharded": f"generate {CAR} --model %wan-t2v {WAN} --devices 2 --shard",
    "count": f"generate {CAR} {FEW} --count 3",
    "drawn-first-frame": f"generate {CAR} {FEW} --first-frame-model %sdxl",
    "ltx": f"generate {CAR} --model %ltx {FOREIGN}",
    "ltx-first-frame": f"generate {CAR} --model %ltx {FOREIGN} --image %first.png",
    "ltx2-sound": f"generate {CAR} --model %ltx2 {FOREIGN} --size 64x64",
    "replayed": f"generate {CAR} {FEW} --image %first.png\n"
                "replay clip.mp4 -o again.mp4\n"
                "replay clip.mp4 -o other.mp4 --set seed=8",
    "webm": f"generate {CAR} {FEW} -o clip.webm",
    "mkv": f"generate {CAR} {FEW} -o clip.mkv",
    "gif": f"generate {CAR} {FEW} -o clip.gif",
    "webp": f"generate {CAR} {FEW} -o clip.webp",
    "pictures": f"generate {CAR} {FEW} -o pictures/",
    "still": f"generate {CAR} --frames 1 --steps 4 --seed 7 -o still.png",
    "label": f"generate {CAR} {FEW} --label visible",
    "sweep": f"sweep {CAR} --over steps=2,4 --frames 13 --seed 7 -o sheet.png",
}
"""By name: one command line or several, with %name for a thing of `MATERIALS`."""

FILM = """\
version: 1
project: {size: 128x128, dtype: fp32, seed: 7, style: by day, defaults: {duration: 1, steps: 4}}
characters: {car: {description: a red car, seed: 3}}
places: {desert: the desert}
shots:
  - {id: one, place: desert, prompt: '{car} drives to the right through {place}', takes: TAKES,
     narration: One morning., caption: {text: Meanwhile, at: 0.2, duration: 0.5}}
  - {id: two, prompt: a cat spins in a room, takes: TAKES,
     transition: {type: dissolve, duration: 0.4}}
"""
SHOTS = """\
version: 1
project: {dtype: fp32, seed: 7, defaults: {duration: 1, steps: 4}}
shots:
  - {id: one, prompt: [a red car bounces, {at: 0.5, prompt: a red car moves left}]}
  - {id: two, prompt: a red car bounces, continue_from: one, camera: {move: pan-left},
     transition: cut}
  - {id: still, prompt: a cat, frames: 1, in_film: false}
  - {id: three, prompt: a cat bounces, first_frame: {shot: still}, last_frame: {shot: one},
     transition: {type: wipe-left, duration: 0.3}}
"""
RUN = """\
model: MODEL
method: lora
lora: {rank: 2}
data: {folders: CLIPS, cache: clips.data, sizes: [64x64], frames: [9]}
run: {folder: lora.run, steps: 4, batch_size: 2, device: cpu, dtype: fp32, log_every: 1,
      validate_every: 4, optim: {lr: 1.0e-3, warmup_steps: 1}}
validation: {sigmas: [0.3, 0.95], steps: 1, guidance: 1}
output: {name: fine, ab_clips: 1}
"""


def run(materials: Materials, words: str) -> None:
    """Run one command line in this process; RuntimeError if it fails."""
    from vidgen.cli.main import main

    if code := main(_arguments(materials, words)):
        raise RuntimeError(f"exit code {code} of: vidgen {words}")


def _arguments(materials: Materials, words: str) -> list[str]:
    given = shlex.split(materials.filled_in(words))
    pins = shlex.split(PINNED.get(given[0], ""))
    for option, value in zip(pins[::2], pins[1::2], strict=True):
        if option not in given:
            given += [option, value]
    return given


def _start(materials: Materials, words: str, **options: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "vidgen", *_arguments(materials, words)]
    return subprocess.Popen(command, stderr=sys.stderr.fileno(), **options)


def _keep(**found: Any) -> None:
    """Write what is compared besides frames and samples."""
    Path("told.json").write_text(json.dumps(found, indent=1))


def _stages(events: Iterable[Any]) -> list[list[Any]]:
    """Reduce events to what of them doesn't depend on time."""
    return [[event.get(key) for key in ("clip", "shot", "stage", "done", "total")]
            for event in events if event.get("event", "progress") == "progress"]


def _read_events(path: str) -> list[Any]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def events(materials: Materials) -> None:
    """Note the events that the command line writes."""
    run(materials, f"generate {CAR} {FEW} --events events.jsonl")
    _keep(stages=_stages(_read_events("events.jsonl")))


def python(_materials: Materials) -> None:
    """Make clips by the Python API, of which a caller is told, and see the first preview."""
    import vidgen

    engine = vidgen.load("toybox", device="cpu", dtype="fp32", offload="none", tiles="none")
    told: list[Any] = []
    previews: list[Any] = []
    request = vidgen.Request(
        prompt="a red car bounces across the desert", frames=13, steps=6, seed=7,
        settings={"candidates": 2},
        image=np.asarray(_first_picture()),
    )
    clip = engine.generate(request, on_event=lambda event: told.append(vars(event)),
                           on_preview=previews.append)
    np.save("frames.npy", clip.frames)
    np.save("sound.npy", clip.sound)
    np.save("latents.npy", clip.latents.cpu().numpy())
    np.save("preview.npy", previews[0].frames)
    clip.save("clip.mp4")
    several = engine.generate("a cat moves left", frames=9, steps=4, seed=7, count=2)
    for index, each in enumerate(several):
        np.save(f"cat-{index}.npy", each.frames)
    _keep(stages=_stages(told), first_preview=previews[0].step)


def _first_picture() -> Any:
    from tests.same_materials import scene

    return scene("#d03030", 6)


def python_wan(materials: Materials) -> None:
    """Make a clip of a Wan model from latents and by a scheduler of diffusers."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler

    import vidgen

    engine = vidgen.load(materials("wan-t2v"), device="cpu", dtype="fp32", offload="none",
                         tiles="none")
    noise = torch.randn(1, 16, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    clip = engine.generate("a red car", frames=9, size=(32, 32), steps=3, latents=noise,
                           sampler=FlowMatchEulerDiscreteScheduler(shift=3.0))
    np.save("frames.npy", clip.frames)
    np.save("latents.npy", clip.latents.cpu().numpy())


def http(_materials: Materials) -> None:
    """Make a clip and its continuation by the service, over the loopback interface."""
    from tests.services import Served

    with Served(Path("toybox"), Path("served.data")) as served:
        made = served.create("a red car bounces", seed=7, num_frames=13, num_inference_steps=4)
        _fetch(served, made, "clip.mp4")
        after = {"prompt": "it goes on", "seconds": "1", "video": {"id": made["id"]}}
        longer = served.http.post("/v1/videos/extensions", json=after)
        _fetch(served, longer.json(), "longer.mp4")


def _fetch(served: Any, job: dict[str, Any], name: str) -> None:
    done = served.finished(job["id"])
    if done["status"] != "completed":
        raise RuntimeError(str(done.get("error")))
    Path(name).write_bytes(served.http.get(f"/v1/videos/{job['id']}/content").content)


def _film(text: str) -> Case:
    def make(materials: Materials) -> None:
        Path("film.yaml").write_text(text)
        run(materials, "script film.yaml -o film.mp4 --events events.jsonl")

    return make


def suite(materials: Materials) -> None:
    """Make and measure a suite's clips."""
    run(materials, "eval %prompts.txt --model toybox --seeds 1 --frames 13 --steps 4 "
                   "-o results.json")
    (folder,) = json.loads(Path("results.json").read_text())["folders"]
    _keep(figures=folder["figures"], clips=[each["figures"] for each in folder["clips"]])


def finetuned(materials: Materials) -> None:
    """Teach a tiny Wan model an adapter, and use it."""
    model, clips = materials("wan-t2v"), materials("clips")
    Path("run.yaml").write_text(RUN.replace("MODEL", str(model)).replace("CLIPS", str(clips)))
    run(materials, "data cache -c run.yaml")
    run(materials, "train -c run.yaml")
    shutil.copy("lora.run/output/fine.safetensors", "fine.safetensors")
    run(materials, f"generate {CAR} --model %wan-t2v {WAN} --lora fine.safetensors:20")
    curve = _read_events("lora.run/curve.jsonl")
    _keep(loss=[line["loss"] for line in curve if "loss" in line])


def killed(materials: Materials) -> None:
    """Kill a clip while it is sampled, or behind that where the machine is busy; let it go on."""
    words = f"generate {CAR} --model %wan-t2v --frames 81 --size 32x32 --steps 60 --seed 7 " \
            "-o clip.mp4"
    _kill(materials, f"{words} --events killed.jsonl", "sample", 20)
    run(materials, f"{words} --events went-on.jsonl --resume")
    began_again = any((event.get("stage"), event.get("done")) == ("sample", 1)
                      for event in _read_events("went-on.jsonl"))
    _keep(went_on=not began_again)


def _kill(materials: Materials, words: str, stage: str, done: int) -> None:
    """Start a command line with --events killed.jsonl; kill it in a stage with something kept."""
    process = _start(materials, words, stdout=subprocess.DEVNULL)
    try:
        while process.poll() is None:
            path = Path("killed.jsonl")
            lines = path.read_text().splitlines(keepends=True) if path.exists() else []
            whole = [json.loads(line) for line in lines if line.endswith("\n")]
            is_kept = any(Path().glob("*.vidgen-job/**/*.safetensors"))
            if is_kept and any(event.get("stage") == stage and event["done"] >= done
                               for event in whole):
                break
            time.sleep(0.01)
        else:
            raise RuntimeError(f"it ended before it could be killed, with {process.returncode}")
    finally:
        process.kill()
        process.wait()


CASES: dict[str, Case] = {
    **{name: lambda materials, text=text: [run(materials, words) for words in text.split("\n")]
       for name, text in COMMANDS.items()},
    "events": events,
    "python": python,
    "python-wan": python_wan,
    "http": http,
    "film": _film(FILM.replace("TAKES", "1")),
    "film-of-takes": _film(FILM.replace("TAKES", "2")),
    "film-of-shots": _film(SHOTS),
    "suite": suite,
    "finetuned": finetuned,
    "killed": killed,
}
"""All that is made, by name."""
