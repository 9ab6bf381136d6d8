"""Previews of a forming clip: a linear map from latents to small pictures.

Each latent frame becomes one picture: 4x4 pixels of each latent, from the 3x3 latents around it.
The map is a file in the model's folder. For a folder without one it is fitted once, by least
squares on drifting patterns that the model's VAE encodes, and cached.

Axes: B batch, C latent channels, F latent frames, h w latent rows and columns, T H W frames, pixel
rows and columns, N latent positions, K features.
"""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn import functional as F

from vidgen.core.errors import OutputError
from vidgen.core.runtime import atomic_write, cache_folder
from vidgen.pipeline.types import OnPreview, Preview

if TYPE_CHECKING:
    from vidgen.core.protocols import StepInfo
    from vidgen.media.types import Frames
    from vidgen.pipeline.model import OpenedModel

log = logging.getLogger(__name__)

FILE = "preview/model.safetensors"
SIDE = 4
"""Side in pixels of one latent, unless the VAE's stride is smaller."""
CLIPS, CLIP_FRAMES, CLIP_SIZE = 24, 9, 128
_GRIDS = (2, 4, 8, 16, 32)
"""Cells along a side of the patterns' noise, the coarsest first."""
RIDGE = 1e-3
PATIENCE = 50
"""Pause after a preview, in multiples of its duration: previews take at most 2% of the time."""


@dataclass(frozen=True)
class PreviewDecoder:
    """Maps latents to small pictures."""

    weight: Tensor  # float32 [3 * side * side, C, 3, 3]
    bias: Tensor  # [3 * side * side]

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Frames:
        """Map normalised latents [1, C, F, h, w] to frames uint8 [F, side * h, side * w, 3]."""
        side = round((len(self.bias) / 3) ** 0.5)
        rows = latents[0].float().transpose(0, 1)
        weight, bias = self.weight.to(rows.device), self.bias.to(rows.device)
        flat = F.conv2d(F.pad(rows, (1, 1, 1, 1), mode="replicate"), weight, bias)
        pictures = (F.pixel_shuffle(flat, side).clamp(-1, 1) + 1) * 127.5
        frames: Frames = pictures.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        return frames


class Glimpses:
    """Calls `on_preview`, if any, with previews of a clip's steps, as often as costs little time.

    `clip` is the number of the clip, from 1, and `fps` its frame rate.
    """

    def __init__(
        self, engine: OpenedModel, on_preview: OnPreview | None, fps: Fraction, clip: int
    ) -> None:
        self._on_preview, self._clip = on_preview, clip
        self._fps = fps / engine.vae_config.strides.t
        self._due_s = 0.0
        if on_preview is not None:
            self._decoder = open_preview(engine)

    def on_step(self, info: StepInfo, num_references: int = 0) -> None:
        """Show a step if a preview is due, without its first `num_references` latent frames."""
        start = time.monotonic()
        if self._on_preview is None or start < self._due_s:
            return
        frames = self._decoder(info.denoised[:, :, num_references:])
        self._on_preview(Preview(frames, self._fps, self._clip, info.step))
        end = time.monotonic()
        self._due_s = end + PATIENCE * (end - start)


def open_preview(engine: OpenedModel) -> PreviewDecoder:
    """Return a model's decoder from its folder or the cache; otherwise fit one."""
    found = _read(engine.folder.path / FILE)
    if found is not None:
        return found
    path = cache_folder() / "preview" / f"{engine.folder.content_hash}.safetensors"
    found = _read(path)
    if found is None:
        log.info("fitting the preview decoder of %s, once", engine.folder.name)
        found = fit_preview(engine, drifting_patterns())
        write_decoder(found, path)
    return found


def _read(path: Path) -> PreviewDecoder | None:
    try:
        return PreviewDecoder(**load_file(path))
    except (OSError, SafetensorError, TypeError):
        return None  # missing or damaged: it is fitted again


def write_decoder(decoder: PreviewDecoder, path: Path) -> None:
    """Write a decoder as a safetensors file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, save({"weight": decoder.weight, "bias": decoder.bias}))


@torch.no_grad()
def fit_preview(engine: OpenedModel, clips: Iterable[Tensor]) -> PreviewDecoder:
    """Fit a model's decoder by ridge regression of pixels on latents, in float64.

    The videos [1, 3, T, H, W] in [-1, 1] must cover all colours to show.
    """
    side = min(SIDE, engine.vae_config.strides.hw)
    width = 9 * engine.vae_config.latent_channels + 1
    products = torch.zeros(width, width, dtype=torch.float64)
    targets = torch.zeros(width, 3 * side * side, dtype=torch.float64)
    for video in clips:
        features, wanted = _pairs(engine.encode_video(video).cpu(), video, side)
        products += features.T @ features
        targets += features.T @ wanted
    ridge = RIDGE * products.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    solved = torch.linalg.solve(products + ridge, targets).T.float()
    weight = solved[:, :-1].reshape(-1, engine.vae_config.latent_channels, 3, 3)
    return PreviewDecoder(weight.contiguous(), solved[:, -1].contiguous())


def drifting_patterns() -> Iterator[Tensor]:
    """Yield clips [1, 3, T, H, W] in [-1, 1] of drifting coloured noise at several scales.

    Amplitudes fall as one over frequency, as in photographs (Field 1987). Every second clip has two
    colours with hard edges.
    """
    generator = torch.Generator().manual_seed(0)
    wide = CLIP_SIZE + 8 * CLIP_FRAMES
    for number in range(CLIPS):
        canvas = torch.zeros(1, 3, CLIP_SIZE, wide)
        for cells in _GRIDS:
            noise = torch.randn(1, 3, cells, cells * wide // CLIP_SIZE, generator=generator)
            canvas += F.interpolate(noise, size=canvas.shape[2:], mode="bilinear") / cells
        colours = torch.rand(2, 1, 3, 1, 1, generator=generator) * 2 - 1
        if number % 2:
            canvas = torch.where(canvas[:, :1] > 0, colours[0], colours[1]) + 0.1 * canvas
        else:
            canvas = canvas + colours[0]
        frames = [canvas[..., 8 * t : 8 * t + CLIP_SIZE] for t in range(CLIP_FRAMES)]
        yield torch.stack(frames, dim=2).clamp(-1, 1)


def _pairs(latents: Tensor, video: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Return features [N, K] and target pixels [N, 3 * side * side] of a clip, float64."""
    rows = F.pad(latents[0].double().transpose(0, 1), (1, 1, 1, 1), mode="replicate")
    features = F.unfold(rows, 3).transpose(1, 2).flatten(0, 1)
    features = torch.cat([features, features.new_ones(len(features), 1)], dim=1)
    count, h, w = latents.shape[2:]
    stride = (video.shape[2] - 1) // max(count - 1, 1)
    last = video[0, :, ::stride].double().transpose(0, 1)  # each latent frame's last picture
    small = F.interpolate(last, size=(h * side, w * side), mode="area")
    return features, F.pixel_unshuffle(small, side).flatten(2).transpose(1, 2).flatten(0, 1)


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
