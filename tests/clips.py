"""Small films of every kind that people train on, written by libav."""

from __future__ import annotations

import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from tests import faults
from tests.textures import texture


def moving(num_frames: int, seed: int = 0, size: tuple[int, int] = (64, 48)) -> list[np.ndarray]:
    """Pictures uint8 [H, W, 3] of a texture that a camera pans over."""
    width, height = size
    big = texture(height + num_frames, width + num_frames, seed, steepest=0.15)
    return [big[i : i + height, i : i + width].copy() for i in range(num_frames)]


def flat(num_frames: int, level: int, size: tuple[int, int] = (64, 48)) -> list[np.ndarray]:
    """Pictures of one grey."""
    return [np.full((size[1], size[0], 3), level, np.uint8)] * num_frames


def film(
    path: Path, pictures: Sequence[np.ndarray], fps: Fraction | int = 12, *,
    times_ms: Sequence[int] | None = None, codec: str = "libx264", pix_fmt: str = "yuv420p",
    transfer: int | None = None, primaries: int | None = None, crf: int = 12,
    pixel_aspect: Fraction | None = None, caption: str | None = None,
) -> Path:
    """A film of pictures, at one rate or shown at given times; with a caption beside it.

    Without Matroska's random marks, so that lossless films have the same bytes each time;
    those by x264, which isn't exact at such small sizes, don't always.
    """
    height, width, _ = pictures[0].shape
    with av.open(str(path), "w", container_options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream(codec, rate=1000 if times_ms else fps)
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        stream.options = {"crf": str(crf), "preset": "veryfast"} if "x264" in codec else {}
        context = stream.codec_context
        if transfer is not None:
            context.color_trc = transfer
        if primaries is not None:
            context.color_primaries = primaries
        if pixel_aspect is not None:
            context.sample_aspect_ratio = pixel_aspect
        for index, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if times_ms is not None:
                frame.pts, frame.time_base = times_ms[index], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)
    return path


def at_event(records: Path, number: int, argv: list[str]) -> tuple[int, int]:
    """`faults.at_event` with a folder of its own for what is found out about files."""
    os.environ["XDG_CACHE_HOME"] = str(records)
    return faults.at_event(number, argv)


def when_full(
    records: Path, disk: Path, room: int, argv: list[str]
) -> tuple[int, list[str], int, dict[str, Any]]:
    """A command line that fills a disk of `room` bytes, and again once the disk has grown.

    Returns:
        Exit code and files left; exit code and sizes of files after the second time.
    """
    os.environ["XDG_CACHE_HOME"] = str(records)
    faults.mount(disk, room)
    first = faults.command(argv)
    left = [path.name for path in disk.rglob("*") if path.is_file()]
    faults.mount(disk, 1 << 30, again=True)
    second = faults.command(argv)
    sizes = {str(p.relative_to(disk)): p.stat().st_size for p in disk.rglob("*") if p.is_file()}
    return first, left, second, sizes


def encode(model: str, path: Path, num_frames: int) -> list[int]:
    """Encode the first frames of a film as an item of 256x192; the shape of its latents."""
    import torch

    from vidgen.training.config import Bucket
    from vidgen.training.data.cache import ItemEncoder, open_frames
    from vidgen.training.data.files import Item
    from vidgen.weights.layouts import open_model

    bucket = Bucket(256, 192, num_frames)
    item = Item(0, path.name, path, "", bucket, 0, num_frames, ("",), "")
    encoder = ItemEncoder(open_model(model), torch.device("cpu"))
    with open_frames(path) as frame_at:
        made = encoder.item(item, range(num_frames), frame_at)
    return list(made["clip"].shape)
