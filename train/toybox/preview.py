"""Give a model folder its preview decoder and its magnitudes.

    python -m train.toybox.preview --model vidgen/assets/toybox

Writes `preview/model.safetensors`, the linear map behind `--preview`, fitted by least squares to
what the folder's VAE encodes, and `magnitudes.json`, how its transformer's steps differ, behind
`--cache magnitude`, and records both in the folder's `model.json`, if it has one. Run it again
when the weights change; it takes a minute on two cores for the embedded model.

Axes: C latent channels, F latent frames, h w latent rows and columns, T H W frames, pixel rows and
columns, N latent positions, K features.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator

import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

from eval.toybox.quality import psnr
from train.toybox.model_files import record_files
from train.toybox.world.render import render
from train.toybox.world.scenes import SEED_RANGES, sample_scenes
from vidgen.core.errors import ModelError, exit_code
from vidgen.core.runtime import atomic_write
from vidgen.pipeline.engine import Engine, load, measure_magnitudes
from vidgen.pipeline.plan import write_magnitudes
from vidgen.pipeline.preview import FILE, PreviewDecoder

NUM_FITTED, NUM_CHECKED = 24, 8
SIDE = 4
"""Side in pixels of one latent, unless the VAE's stride is smaller."""
RIDGE = 1e-3


@torch.no_grad()
def fit_preview(engine: Engine, clips: Iterable[Tensor]) -> PreviewDecoder:
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


@torch.no_grad()
def quality(engine: Engine, decoder: PreviewDecoder) -> float:
    """PSNR in dB of previews of unseen renders against the renders, made as small."""
    ratios = []
    for scene in sample_scenes(SEED_RANGES["dev"][0], NUM_CHECKED):
        video = render([scene], 9).video
        shown = torch.from_numpy(decoder(engine.encode_video(video)))
        wanted = F.interpolate(
            video[0, :, :: engine.vae_config.strides.t].transpose(0, 1), size=shown.shape[1:3],
            mode="area",
        )
        pictures = shown.permute(3, 0, 1, 2)[None] / 127.5 - 1
        ratios.append(float(psnr(pictures, wanted.transpose(0, 1)[None])))
    return sum(ratios) / len(ratios)


def mixed_renders() -> Iterator[Tensor]:
    """Clips [1, 3, T, H, W] of the world, with colours mixed so that all of them come up."""
    generator = torch.Generator().manual_seed(0)
    for scene in sample_scenes(SEED_RANGES["judge"][0], NUM_FITTED):
        order = torch.randperm(3, generator=generator)
        signs = 1 - 2 * torch.randint(0, 2, (3, 1), generator=generator).float()
        mixing = torch.eye(3)[order] * signs  # channels in any order, some inverted
        yield torch.einsum("ij,bjthw->bithw", mixing, render([scene], 9).video.float())


def main() -> int:
    """Make both and say how good the previews are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="model folder, into which both are written")
    options = parser.parse_args()

    def work() -> None:
        engine = load(options.model)
        if not isinstance(engine, Engine):
            raise ModelError(f"{options.model} is run by diffusers; it takes neither")
        decoder = fit_preview(engine, mixed_renders())
        folder = engine.folder.path
        (folder / FILE).parent.mkdir(exist_ok=True)
        atomic_write(folder / FILE, save({"weight": decoder.weight, "bias": decoder.bias}))
        print(f"previews: {quality(engine, decoder):.1f} dB")
        found = write_magnitudes(measure_magnitudes(engine), engine.folder, folder)
        print(f"magnitudes: {found}")
        if engine.folder.layout == "vidgen":
            record_files(folder, (FILE, found.name))

    return exit_code(work)


if __name__ == "__main__":
    raise SystemExit(main())
