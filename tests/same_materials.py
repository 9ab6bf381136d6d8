"""What `scripts/same_clips` is given: pictures, clips, sounds and tiny models, the same each time.

Nothing here is made by the engine, so that a change of it can't change what it is given.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image, ImageDraw

SIDE, FRAMES, RATE = 128, 13, 48_000
MARK = re.compile(r"%([\w.-]+)")
"""Names a thing of `MATERIALS` in a command line: %first.png."""


class Materials:
    """A folder of things by name, each made when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, name: str) -> Path:
        """Return the path of a thing of `MATERIALS`."""
        path = self._folder / name
        if not path.exists():
            self._folder.mkdir(parents=True, exist_ok=True)
            MATERIALS[name](path)
        return path

    def filled_in(self, words: str) -> str:
        """Return a text in which each %name is the path of that thing."""
        return MARK.sub(lambda match: str(self(match[1])), words)


def scene(colour: str, x: int, ground: str = "#c8a878") -> Image.Image:
    """Return a picture of a coloured disc over a ground, under a blue sky."""
    picture = Image.new("RGB", (SIDE, SIDE), "#78b4e6")
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, 84, SIDE, SIDE), ground)
    draw.ellipse((x, 52, x + 36, 88), colour)
    return picture


def _picture(colour: str, x: int) -> Callable[[Path], None]:
    return lambda path: scene(colour, x).save(path)


def _mask(path: Path) -> None:
    mask = Image.new("L", (SIDE, SIDE), 0)
    ImageDraw.Draw(mask).rectangle((64, 0, SIDE, SIDE), 255)
    mask.save(path)


def _reference(path: Path) -> None:
    picture = Image.new("RGB", (SIDE, SIDE), "white")
    ImageDraw.Draw(picture).polygon([(64, 20), (108, 100), (20, 100)], "#d03030")
    picture.save(path)


def _clips(folder: Path) -> None:
    """Write clips of two colours with captions, to learn from."""
    folder.mkdir()
    for name, colour in (("red", "#d03030"), ("blue", "#3040d0")):
        for index in range(2):
            _clip(folder / f"{name}{index}.mkv", colour, 40 * index)
            (folder / f"{name}{index}.txt").write_text(f"a {name} ball moves right")


def _clip(path: Path, colour: str = "#d03030", start: int = 0) -> None:
    """Write a lossless clip of a disc that moves to the right."""
    with av.open(str(path), "w", container_options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("ffv1", rate=Fraction(12))
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "yuv420p"
        for index in range(FRAMES):
            frame = av.VideoFrame.from_image(scene(colour, start + 6 * index))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _knocks(path: Path) -> None:
    """Write two seconds of stereo sound that knocks three times a second."""
    t = np.arange(2 * RATE) / RATE
    decay = np.exp(-30 * (t % (1 / 3)))
    left, right = (decay * np.sin(2 * np.pi * hertz * t) for hertz in (220, 330))
    samples = (0.4 * np.stack([left, right], axis=1)).astype(np.float32)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_f32le", rate=RATE, layout="stereo")
        frame = av.AudioFrame.from_ndarray(samples.reshape(1, -1), format="flt", layout="stereo")
        frame.sample_rate, frame.pts, frame.time_base = RATE, 0, Fraction(1, RATE)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _lora(path: Path) -> None:
    """Write an adapter of the tiny Wan models' first block, as diffusers names it."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(5)
    state = {}
    for layer in ("attn1.to_q", "attn1.to_v", "attn2.to_k"):
        for part, shape in (("lora_A", (2, 24)), ("lora_B", (24, 2))):
            values = 0.5 * torch.randn(shape, generator=generator)
            state[f"transformer.blocks.0.{layer}.{part}.weight"] = values
    save_file(state, path)


def _wan(variant: str) -> Callable[[Path], None]:
    def build(path: Path) -> None:
        from tests import wan_models

        wan_models._trained_tokenizer = _wan_tokenizer  # a trained one isn't the same twice
        wan_models.build_diffusers(path, variant)

    return build


def _wan_tokenizer() -> str:
    """Return a Unigram tokenizer of letters and some words, as `tests.wan_models` trains one."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,;&!AT"
    words = ("▁", "▁a", "▁red", "▁car", "▁cat", "▁the", "▁blue", "▁ball", "▁moves", "▁left")
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(word, -2.0 - 0.01 * index) for index, word in enumerate(words)]
    pieces += [(letter, -4.0 - 0.01 * index) for index, letter in enumerate(letters)]
    tokenizer = Tokenizer(models.Unigram(pieces, 2, byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace("  ", " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return tokenizer.to_str()


def _foreign(family: str) -> Callable[[Path], None]:
    def build(path: Path) -> None:
        from tests.tiny.diffusers_models import build_diffusers_model

        build_diffusers_model(family, path)

    return build


def _text(text: str) -> Callable[[Path], Any]:
    return lambda path: path.write_text(text)


MATERIALS: dict[str, Callable[[Path], Any]] = {
    "first.png": _picture("#d03030", 6),
    "middle.png": _picture("#d03030", 42),
    "last.png": _picture("#d03030", 78),
    "reference.png": _reference,
    "mask.png": _mask,
    "clip.mkv": _clip,
    "clips": _clips,
    "knocks.wav": _knocks,
    "lora.safetensors": _lora,
    "prompts.txt": _text("a red car bounces\na cat moves left\n"),
    **{f"wan-{variant}": _wan(variant) for variant in
       ("t2v", "i2v", "ti2v-5b", "vace", "t2v-a14b")},
    **{family: _foreign(family) for family in ("sdxl", "ltx", "ltx2")},
}
"""Makers by name; each writes one file or folder."""
