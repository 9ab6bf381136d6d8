"""Give a model folder what it does well to carry: a preview decoder and its magnitudes.

    python -m train.toybox.preview --model vidgen/assets/toybox

Writes `preview/model.safetensors`, the linear map behind `--preview`, fitted by least squares to
what the folder's VAE encodes, and `magnitudes.json`, how its transformer's steps differ, behind
`--cache magnitude`, and records both in the folder's `model.json`, where it has one. Without them
both are made on first use or asked for, and kept for the user. To be called anew when the weights
change; a minute on two cores for the embedded model.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor

from eval.toybox.quality import psnr
from train.toybox.model_files import record_files
from train.toybox.world.render import render
from train.toybox.world.scenes import SEED_RANGES, sample_scenes
from vidgen.core.errors import ModelError, exit_code
from vidgen.pipeline.engine import Engine, load, measure_magnitudes
from vidgen.pipeline.preview import FILE, PreviewDecoder, fit_preview, write_decoder
from vidgen.pipeline.step_caches import write_magnitudes

NUM_FITTED, NUM_CHECKED = 24, 8


@torch.no_grad()
def quality(engine: Engine, decoder: PreviewDecoder) -> float:
    """PSNR in dB of previews of unseen renders against the renders, made as small."""
    ratios = []
    for scene in sample_scenes(SEED_RANGES["dev"][0], NUM_CHECKED):
        video = render([scene], 9).video
        shown = torch.from_numpy(decoder(engine.encode_video(video)))
        wanted = torch.nn.functional.interpolate(
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
        write_decoder(decoder, folder / FILE)
        print(f"previews: {quality(engine, decoder):.1f} dB")
        found = write_magnitudes(measure_magnitudes(engine), engine.folder, folder)
        print(f"magnitudes: {found}")
        if engine.folder.layout == "vidgen":
            record_files(folder, (FILE, found.name))

    return exit_code(work)


if __name__ == "__main__":
    raise SystemExit(main())
