"""One whole file or folder for each reader of files, to be damaged by `tests.fuzzing`."""

from __future__ import annotations

import json
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from eval.toybox.judge import Judge, JudgeConfig
from tests.lora_models import I2V, make_adapter, make_dit, write_kohya, write_peft
from tests.models import build_tiny_model
from tests.wan_models import build_diffusers, build_original
from train.toybox.model_files import save_module
from vidgen.media.types import ClipInfo, Segment
from vidgen.media.write import write_clip
from vidgen.pipeline.engine import load
from vidgen.pipeline.journal.journal import Journal
from vidgen.weights.lora import write_lora
from vidgen.weights.lora_dialects import DIALECTS

VIDEOS = ("a.mp4", "b.mov", "c.webm", "d.mkv", "e.avi", "f.ts", "g.flv")
SOUNDS = ("s.wav", "t.mp3", "u.flac", "v.ogg", "w.m4a")
PICTURES = ("a.png", "b.png", "c.png", "d.apng", "e.gif", "f.webp", "g.webp", "h.jpg", "i.jpg",
            "j.bmp", "k.tif", "l.tif")  # fmt: skip
SCRIPTS = ("film.yaml", "film.json", "film.txt")
CAPTIONS = ("caption.txt", "table.csv", "table.jsonl")
RECIPE = {"vidgen": "0", "plan": {"prompt": "a cat", "seed": 1}, "inputs": []}
NOISE = torch.linspace(-2, 2, 192).reshape(1, 4, 3, 4, 4)
FILM = {
    "version": 1, "project": {"fps": 12, "size": "128x128", "seed": 7, "style": "by day"},
    "characters": {"car": {"description": "a red car", "seed": 11}},
    "scenes": {"one": {"title": "One"}},
    "shots": [
        {"id": "a", "scene": "one", "prompt": "{car} drives to the right", "frames": 9,
         "caption": {"text": "Meanwhile", "at": 0.1, "duration": 0.5}},
        {"id": "b", "prompt": "{car} bounces", "continue_from": "a", "duration": 1,
         "transition": {"type": "dissolve", "duration": 0.25}},
    ],
}


def make_samples(folder: Path) -> None:
    """Write a file or folder for each reader."""
    torch.manual_seed(0)
    _media(folder)
    _pictures(folder)
    adapter = make_adapter(make_dit(I2V))
    for dialect in DIALECTS:
        write_lora(adapter, folder / f"lora-{dialect}.safetensors", dialect)
    write_kohya(adapter, folder / "lora-kohya.safetensors")
    write_peft(adapter, folder / "lora-peft")
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
    (folder / "tokenizer" / "synonyms.json").write_text('{"car": ["sedan", "jalopy"]}')
    _job(folder / "job", load(str(model), device="cpu", dtype="fp32"))
    build_diffusers(folder / "diffusers", "t2v")
    build_original(folder / "wan", "t2v")
    save_file({"latents": NOISE}, folder / "noise.safetensors")
    _texts(folder)
    (folder / "run.yaml").write_text(
        "# a run\nfolder: runs/x\nsteps: 10\nbatch_size: 4\n"
        "optim: {lr: 1.0e-3, betas: [0.9, 0.98]}\ndtype: bf16\nminutes: null\n"
    )


def _texts(folder: Path) -> None:
    """Scripts, prompts, word lists and captions, as people write them."""
    (folder / "film.yaml").write_text(_YAML)
    (folder / "film.json").write_text(json.dumps(FILM, indent=1))
    (folder / "film.txt").write_text("# two shots\na red car\na cat spins\n")
    (folder / "suite.txt").write_text("a red car\na cat spins\n")
    (folder / "suite.json").write_text(json.dumps([{"prompt_en": "a car"}, "a cat"]))
    (folder / "words.txt").write_text("gun # a word\nblood bath\n")
    (folder / "caption.txt").write_text("ein Auto fährt über die Straße", encoding="utf-16")
    (folder / "table.csv").write_text('file,caption\na.mp4,"a car, red"\nb.mp4,a cat\n')
    (folder / "table.jsonl").write_text('{"file": "a.mp4", "text": "a car"}\n{"file": "b.mp4"}\n')


_YAML = """# a film
version: 1
project: {fps: 12, size: 128x128, seed: 7, defaults: {duration: 1, negative: ""}}
characters:
  car: {description: a red car, voice: en-gb}
places: {desert: the desert}
scenes:
  one: {title: One, place: desert}
shots:
  - id: a
    scene: one
    prompt: "{car} drives through {place}"
    camera: {move: static}
    music: {prompt: a slow guitar, gain_db: -6}
  - id: b
    continue_from: a
    prompt:
      - "{car} drives"
      - {at: 0.5, prompt: "{car} bounces"}
    takes: 2
"""


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
