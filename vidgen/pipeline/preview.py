"""Previews of a forming clip: a linear map from latents to small pictures.

Each latent frame becomes one picture. The embedded model has its map in its folder; Wan's VAEs have
published ones, in `assets/wan/previews.json`.

Axes: B batch, C latent channels, F latent frames, h w latent rows and columns, k side of the map.
"""

from __future__ import annotations

import io
import json
import logging
import time
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from vidgen.core.errors import OutputError
from vidgen.core.runtime import atomic_write
from vidgen.pipeline.types import OnPreview, Preview
from vidgen.weights.folder import ModelFolder, embedded_folder

if TYPE_CHECKING:
    from vidgen.core.protocols import StepInfo
    from vidgen.media.types import Frames

log = logging.getLogger(__name__)

FILE = "preview/model.safetensors"
PATIENCE = 50
"""Pause after a preview, in multiples of its duration: previews take at most 2% of the time."""


@dataclass(frozen=True)
class PreviewDecoder:
    """Maps latents to pictures of side x side pixels for each latent."""

    weight: Tensor  # float32 [3 * side * side, C, k, k]
    bias: Tensor  # [3 * side * side]

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Frames:
        """Map normalised latents [1, C, F, h, w] to frames uint8 [F, side * h, side * w, 3]."""
        side, margin = round((len(self.bias) / 3) ** 0.5), self.weight.shape[-1] // 2
        rows = latents[0].float().transpose(0, 1)
        weight, bias = self.weight.to(rows.device), self.bias.to(rows.device)
        flat = F.conv2d(F.pad(rows, 4 * (margin,), mode="replicate"), weight, bias)
        pictures = (F.pixel_shuffle(flat, side).clamp(-1, 1) + 1) * 127.5
        frames: Frames = pictures.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        return frames


def open_preview(folder: ModelFolder) -> PreviewDecoder | None:
    """Return the decoder in a model's folder, or that of Wan's VAE; None for other VAEs."""
    with suppress(OSError, SafetensorError, TypeError):  # missing or damaged
        return PreviewDecoder(**load_file(folder.path / FILE))
    channels = folder.components["vae"].config.latent_channels
    known = json.loads((embedded_folder("wan") / "previews.json").read_text("utf-8"))
    if folder.family == "toybox" or str(channels) not in known:
        log.warning("no previews: %s has no readable %s, and its VAE isn't one of Wan's",
                    folder.name, FILE)
        return None
    weight, bias = map(torch.tensor, known[str(channels)].values())
    return PreviewDecoder(weight.T[..., None, None], bias)


class Glimpses:
    """Calls `on_preview`, if any, with previews of a clip's steps, as often as costs little time.

    `clip` is the number of the clip, from 1, and `fps` its frame rate.
    """

    def __init__(
        self, folder: ModelFolder, on_preview: OnPreview | None, fps: Fraction, clip: int
    ) -> None:
        self._on_preview, self._clip = on_preview, clip
        self._fps = fps / folder.components["vae"].config.strides.t
        self._decoder = None if on_preview is None else open_preview(folder)
        self._due_s = 0.0

    def on_step(self, info: StepInfo, num_references: int = 0) -> None:
        """Show a step if a preview is due, without its first `num_references` latent frames."""
        start = time.monotonic()
        if self._on_preview is None or self._decoder is None or start < self._due_s:
            return
        frames = self._decoder(info.denoised[:, :, num_references:])
        self._on_preview(Preview(frames, self._fps, self._clip, info.step))
        end = time.monotonic()
        self._due_s = end + PATIENCE * (end - start)


def preview_path(output: str | Path) -> Path:
    """Return the path of a clip's preview, in the folder of the output."""
    path = Path(output)
    return path.with_name(path.name + ".preview.webp")


def as_webp(preview: Preview) -> bytes:
    """Return a preview as a looping WebP animation."""
    first, *others = map(Image.fromarray, preview.frames)
    file = io.BytesIO()
    first.save(file, "WEBP", save_all=True, append_images=others, quality=80, method=0, loop=0,
               duration=round(1000 / preview.fps))
    return file.getvalue()


def write_preview(preview: Preview, output: str | Path) -> None:
    """Write a preview in the folder of the output; log a warning if that fails."""
    try:
        atomic_write(preview_path(output), as_webp(preview))
    except (OSError, OutputError) as error:
        log.warning("no preview: %s", error)
