"""Tiles of the VAE give what the whole picture gives, in as little memory as is told."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.live import Live
from tests.tiny.test_vae import CONFIGS
from vidgen.core.errors import InputError
from vidgen.core.shapes import Tiles
from vidgen.models import vae_tiles
from vidgen.models.presets import VAE_PRESETS
from vidgen.models.vae import CausalVAE, VAEConfig
from vidgen.models.vae_tiles import cut_tiles, decode_in_tiles, encode_in_tiles
from vidgen.ops import native
from vidgen.pipeline.memory import vae_bytes
from vidgen.pipeline.timing import vae_flops

WAN = {
    "wan21": replace(VAE_PRESETS["wan21"], encoder_dim=8, decoder_dim=8),
    "wan22": replace(VAE_PRESETS["wan22"], encoder_dim=8, decoder_dim=8),
}
GRIDS = [Tiles(1, 2), Tiles(3, 1), Tiles(2, 3)]


def make(config: VAEConfig, dtype: torch.dtype = torch.float32) -> CausalVAE:
    torch.manual_seed(0)
    return CausalVAE(config).eval().to(dtype)


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def room(num_bytes: int) -> torch.Tensor:
    """What `Live` doesn't count."""
    return torch.from_numpy(np.zeros(num_bytes, np.uint8))


def psnr(made: torch.Tensor, whole: torch.Tensor) -> float:
    """Of pictures in [-1, 1], in dB."""
    return float(10 * torch.log10(4 / (made.double() - whole.double()).square().mean()))


def test_a_tile_reads_as_far_as_its_convolutions_reach() -> None:
    (tile, *_) = cut_tiles(VAE_PRESETS["wan21"], 90, 160, Tiles(2, 4), decode=True)
    assert tile.rows == [(0, 58), (0, 102), (0, 190), (0, 367), (0, 361), (0, 360)]
    assert tile.columns[0] == (0, 40 + 13)
    inner = cut_tiles(VAE_PRESETS["wan21"], 90, 160, Tiles(1, 4), decode=True)[1]
    assert inner.columns[0] == (40 - 13, 80 + 13)
    assert inner.columns[-1] == (320, 640)
    edge = cut_tiles(VAE_PRESETS["wan21"], 90, 160, Tiles(1, 2), decode=False)[1]
    assert edge.columns[-1] == (80, 160)
    assert edge.columns[0][1] == 160 * 8
    assert all(first % 2 == 0 for first, _ in edge.columns[1:4]), "pairs stay together"


@torch.no_grad()
@pytest.mark.parametrize("tiles", GRIDS, ids=str)
@pytest.mark.parametrize(("name", "rate"), [*((name, 1) for name in CONFIGS), ("tiny", 2)])
def test_tiles_give_the_whole_picture(name: str, tiles: Tiles, rate: int) -> None:
    coarse = make(CONFIGS[name])
    vae = coarse.at_rate(rate)
    latents = drawn(2, 4, 6, 12, 18)  # more frames than pass at once
    whole = torch.cat([*vae.stream_decode(latents)], 2)
    parts = [*decode_in_tiles(vae, latents.split([2, 4], dim=2), tiles, room)]
    assert [part.shape[2] for part in parts] == [1] + [coarse.strides.t // rate] * 5
    made = torch.cat(parts, 2)
    assert (made - whole).abs().max() < 1e-5
    assert psnr(made, whole) > 120
    video = whole.clamp(-1, 1)
    expected = vae.encode(video)
    found = [*encode_in_tiles(vae, video.split(3, dim=2), tiles, room)]
    assert [latent.shape[2] for latent in found] == [1] * 6
    assert (torch.cat(found, 2) - expected).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", WAN)
def test_tiles_of_wan_give_the_whole_picture(name: str) -> None:
    """At Wan's depth and channels of latents; the tile on the left ends amid the picture."""
    vae = make(WAN[name])
    latents = drawn(1, vae.config.latent_channels, 2, 2, 34)
    whole = torch.cat([*vae.stream_decode(latents)], 2)
    (left, *_) = cut_tiles(vae.config, 2, 34, Tiles(1, 2), decode=True)
    assert left.columns[0] == (0, 17 + 13)
    made = torch.cat([*decode_in_tiles(vae, [latents], Tiles(1, 2), room)], 2)
    assert (made - whole).abs().max() < 1e-5 * max(1.0, float(whole.abs().max()))
    assert psnr(made, whole) > 100
    video = drawn(*whole.shape).clamp(-1, 1)
    found = torch.cat([*encode_in_tiles(vae, [video], Tiles(1, 2), room)], 2)
    expected = torch.cat([*vae.stream_encode([video])], 2)
    assert (found - expected).abs().max() < 1e-5 * max(1.0, float(expected.abs().max()))


@torch.no_grad()
def test_a_narrower_reach_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    vae, latents = make(CONFIGS["tiny"]), drawn(1, 4, 3, 4, 24)
    whole = torch.cat([*vae.stream_decode(latents)], 2)
    widened = vae_tiles._widened
    monkeypatch.setattr(
        vae_tiles, "_widened", lambda span, reach, length: widened(span, reach - 1, length)
    )
    made = torch.cat([*decode_in_tiles(vae, [latents], Tiles(1, 2), room)], 2)
    assert (made - whole).abs().max() > 1e-4


@torch.no_grad()
def test_bfloat16_tiles_differ_by_rounding_alone() -> None:
    vae = make(CONFIGS["patched"], torch.bfloat16)
    latents = drawn(1, 4, 4, 12, 16).bfloat16()
    whole = torch.cat([*vae.stream_decode(latents)], 2)
    made = torch.cat([*decode_in_tiles(vae, [latents], Tiles(2, 2), room)], 2)
    assert psnr(made, whole) > 50


@torch.no_grad()
def test_frames_that_are_left_over_are_refused() -> None:
    vae = make(CONFIGS["tiny"])
    with pytest.raises(InputError, match="left over"):
        [*encode_in_tiles(vae, [drawn(1, 3, 3, 32, 64)], Tiles(1, 2), room)]


@pytest.mark.parametrize("decode", [True, False])
def test_tiles_hold_what_is_predicted_however_long_the_clip(decode: bool) -> None:
    config = replace(CONFIGS["patched"], encoder_dim=16, decoder_dim=16, channel_mults=(1, 1),
                     temporal_downsample=(True,), patch_size=1)
    vae, strides, tiles = make(config), config.strides, Tiles(3, 3)

    def peak(num_latents: int) -> int:
        pieces = (drawn(1, 4, 1, 48, 48) for _ in range(num_latents))
        video = (drawn(1, 3, t, 96, 96) for t in [1] + [strides.t] * (num_latents - 1))
        with torch.no_grad(), Live() as live:
            for part in (decode_in_tiles(vae, pieces, tiles, room) if decode
                         else encode_in_tiles(vae, video, tiles, room)):
                del part
        return live.peak

    fused = torch.float32 in native.known_dtypes()
    predicted = vae_bytes(config, 48, 48, 4, decode=decode, fused=fused, tiles=tiles)
    held = peak(9)
    assert predicted == pytest.approx(held, rel=0.3)
    assert peak(17) < 1.02 * held
    assert predicted < 0.7 * vae_bytes(config, 48, 48, 4, decode=decode, fused=fused)
    work, more = (
        vae_flops(config, 5, 48, 48, decode=decode, tiles=cut).conv
        for cut in (None, tiles)
    )
    assert 1 < more / work < 1.8
