"""The causal VAE at tiny sizes: causality, streams, inflation, gradients, bad configs."""

import itertools
from dataclasses import replace

import pytest
import torch

from train.toybox.tasks.channel_weights import channel_weights
from train.toybox.vae import inflate
from vidgen.core.errors import InputError
from vidgen.models.presets import VAE_PRESETS
from vidgen.models.vae import CausalVAE, VAEConfig
from vidgen.models.vae_blocks import Downsample, Upsample
from vidgen.ops import conv
from vidgen.ops.conv import CausalConv3d, StreamCache
from vidgen.ops.latents import patchify_pixels, unpatchify_pixels
from vidgen.ops.norm import ChannelRMSNorm

STATISTICS = {"latents_mean": (0.5, -0.2, 0.1, 0.0), "latents_std": (2.0, 0.7, 1.0, 1.3)}
CONFIGS = {
    "tiny": replace(VAE_PRESETS["tiny"], **STATISTICS),
    "shortcuts": VAEConfig(
        latent_channels=4,
        encoder_dim=4,
        decoder_dim=4,
        channel_mults=(1, 2, 2),
        num_blocks=1,
        temporal_downsample=(True, True),
        patch_size=2,
        stage_shortcuts=True,
        **STATISTICS,
    ),
    "patched": VAEConfig(
        latent_channels=4,
        encoder_dim=4,
        decoder_dim=4,
        channel_mults=(2, 2),
        num_blocks=1,
        temporal_downsample=(True,),
        patch_size=4,
    ),
}


def make(name: str) -> CausalVAE:
    torch.manual_seed(0)
    vae = CausalVAE(CONFIGS[name]).eval()
    for module in vae.modules():
        if isinstance(module, ChannelRMSNorm):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    return vae


def random_video(num_frames: int, batch: int = 1) -> torch.Tensor:
    return torch.rand(batch, 3, num_frames, 32, 32) * 2 - 1


@pytest.fixture(params=CONFIGS)
def vae(request: pytest.FixtureRequest) -> CausalVAE:
    return make(request.param)


@pytest.fixture(params=["tiny 1", "tiny 2", "tiny 4", "patched 1", "patched 2", "shortcuts 1"])
def rated(request: pytest.FixtureRequest) -> tuple[CausalVAE, int]:
    """A VAE, and a temporal upsampling that it can take."""
    name, rate = request.param.split()
    return make(name), int(rate)


@torch.no_grad()
def test_a_still_is_the_first_latent_of_a_clip(vae):
    video = random_video(17)
    clip = vae.encode(video)
    assert clip.shape[2] == 1 + 16 // vae.strides.t
    torch.testing.assert_close(vae.encode(video[:, :, :1]), clip[:, :, :1], rtol=0, atol=1e-5)


@torch.no_grad()
def test_nothing_sees_the_future(vae):
    t = vae.strides.t
    video = random_video(1 + 3 * t)
    changed = torch.cat([video[:, :, : 1 + 2 * t], random_video(t)], 2)
    before, after = vae.encode(video), vae.encode(changed)
    torch.testing.assert_close(before[:, :, :3], after[:, :, :3], rtol=0, atol=1e-6)
    assert not torch.allclose(before[:, :, 3:], after[:, :, 3:], atol=1e-3)
    decoded = vae.decode(before)
    torch.testing.assert_close(vae.decode(after)[:, :, :-t], decoded[:, :, :-t], rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("chunks", [[1] * 17, [17], [3, 7, 7], [2, 0, 15]])
def test_stream_encoding_equals_whole_encoding(rated, chunks):
    vae, rate = rated
    video = random_video(17, batch=2)
    stream = list(vae.at_rate(rate).stream_encode(video.split(chunks, dim=2)))
    assert [latent.shape[2] for latent in stream] == [1] * (1 + 16 * rate // vae.strides.t)
    whole = vae.at_rate(rate).encode(video)
    torch.testing.assert_close(torch.cat(stream, 2), whole, rtol=0, atol=1e-5)


@torch.no_grad()
def test_stream_decoding_equals_whole_decoding(rated):
    vae, rate = rated
    latents = torch.randn(2, 4, 5, 4, 4)
    whole = vae.at_rate(rate).decode(latents)
    pieces = list(vae.at_rate(rate).stream_decode(latents))
    assert [piece.shape[2] for piece in pieces] == [1] + [vae.strides.t // rate] * 4
    torch.testing.assert_close(torch.cat(pieces, 2), whole, rtol=0, atol=1e-5)
    pieces = list(vae.at_rate(rate).stream_decode(iter(latents.split([2, 3], dim=2))))
    torch.testing.assert_close(torch.cat(pieces, 2), whole, rtol=0, atol=1e-5)


@torch.no_grad()
def test_streams_continue_from_a_kept_cache(vae):
    video = random_video(1 + 4 * vae.strides.t)
    whole = vae.encode(video)
    cache = StreamCache()
    head = list(vae.stream_encode([video[:, :, : 1 + vae.strides.t]], cache))
    tail = list(vae.stream_encode([video[:, :, 1 + vae.strides.t :]], cache))
    torch.testing.assert_close(torch.cat(head + tail, 2), whole, rtol=0, atol=1e-5)

    cache = StreamCache()
    decoded = list(vae.stream_decode(whole))
    list(itertools.islice(vae.stream_decode(whole, cache), 2))
    kept = cache.copy()
    for _ in range(2):
        assert kept.position == 2
        again = list(vae.stream_decode(whole[:, :, 2:], kept.copy()))
        torch.testing.assert_close(again, decoded[2:], rtol=0, atol=0)


@torch.no_grad()
def test_stream_caches_do_not_grow(vae):
    def run(num_latents: int) -> int:
        cache = StreamCache()
        latents = (torch.randn(1, 4, 1, 4, 4) for _ in range(num_latents))
        for _ in vae.stream_decode(latents, cache):
            pass
        return sum(tensor.untyped_storage().nbytes() for tensor in cache.tensors.values())

    assert run(4) == run(12)


@torch.no_grad()
def test_receptive_frames_are_exact(rated):
    vae, rate = rated
    reach = vae.at_rate(rate).receptive_frames()
    latents = torch.randn(1, 4, reach + 3, 2, 2, dtype=torch.float64)
    finer = vae.double().at_rate(rate)
    changed = latents.clone()
    changed[:, :, 2] += 10
    differs = (finer.decode(latents) != finer.decode(changed)).any(1).any(-1).any(-1)[0]
    t = vae.strides.t // rate
    groups = [differs[:1], *differs[1:].split(t)]
    assert [bool(group.any()) for group in groups] == [2 <= i < 2 + reach for i in range(reach + 3)]


@torch.no_grad()
@pytest.mark.parametrize("rate", [2, 4])
def test_latent_frames_lie_closer_at_a_finer_rate(rate):
    """What stands still is encoded as a longer clip of it; of repeated frames fewer are shown."""
    vae = make("tiny")
    still = random_video(1).expand(-1, -1, 129, -1, -1)  # past what stands before the clip
    finer, longer = vae.at_rate(rate).encode(still), vae.encode(still)
    assert finer.shape[2] == 1 + 32 * rate
    torch.testing.assert_close(finer[:, :, -1], longer[:, :, -1], rtol=0, atol=1e-5)
    inflate(vae)
    latents = torch.randn(1, 4, 3, 4, 4)
    torch.testing.assert_close(
        vae.at_rate(rate).decode(latents), vae.decode(latents)[:, :, ::rate], rtol=0, atol=1e-5
    )


@torch.no_grad()
def test_frames_in_motion_are_distinguished_at_a_finer_rate():
    vae, video = make("tiny"), random_video(9)
    finer = vae.at_rate(2).encode(video)
    assert finer.shape[2] == 5
    changed = torch.cat([video[:, :, :3], random_video(6)], 2)
    same = vae.at_rate(2).encode(changed)
    torch.testing.assert_close(same[:, :, :2], finer[:, :, :2], rtol=0, atol=1e-6)
    assert not torch.allclose(same[:, :, 2:], finer[:, :, 2:], atol=1e-3)


@pytest.mark.parametrize(("name", "rate", "why"), [
    ("tiny", 3, "temporal_upsampling is 3; a VAE of 4 frames a latent frame can take 1, 2, 4"),
    ("patched", 4, "a VAE of 2 frames a latent frame can take 1, 2"),
    ("shortcuts", 2, "temporal_upsampling is 2, but a VAE with stage shortcuts has one rate; "
                     "give 1"),
])  # fmt: skip
def test_a_rate_that_a_vae_cannot_take_is_refused(name, rate, why):
    with pytest.raises(InputError, match=why):
        make(name).at_rate(rate)


def test_a_finer_rate_has_the_weights_whatever_becomes_of_them():
    vae, latents = make("tiny"), torch.randn(1, 4, 3, 4, 4)
    finer = vae.at_rate(2)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.mul_(1.1)
        vae.decoder.conv_out.bias = torch.nn.Parameter(torch.ones(3))
        again = vae.double().at_rate(2)
        assert torch.equal(finer.decode(latents.double()), again.decode(latents.double()))
    assert vae.strides.t == 2 * finer.strides.t == 2 * again.strides.t


def test_one_clip_decodes_alike_with_and_without_gradients(vae):
    latents = torch.randn(1, 4, 3, 4, 4)
    with torch.no_grad():
        expected = vae.decode(latents)
    torch.testing.assert_close(vae.decode(latents), expected, rtol=0, atol=1e-5)


def test_stream_encoding_refuses_left_over_frames(vae):
    stream = vae.stream_encode([random_video(vae.strides.t)])
    with pytest.raises(InputError, match="left over"):
        list(stream)


@pytest.mark.parametrize(("frames", "size"), [(4, 32), (5, 33)])
def test_clips_off_the_strides_are_refused(frames, size):
    with pytest.raises(InputError):
        make("tiny").encode(torch.zeros(1, 3, frames, size, 32))


def test_latents_are_normalised_by_the_config():
    vae, video = make("tiny"), random_video(5)
    raw, _ = vae.encode_moments(video)
    mean, std = (
        torch.tensor(STATISTICS[f"latents_{k}"]).view(-1, 1, 1, 1) for k in ("mean", "std")
    )
    torch.testing.assert_close(vae.encode(video), (raw - mean) / std)
    torch.testing.assert_close(vae.decode(vae.encode(video)), vae.decode_raw(raw))


@torch.no_grad()
@pytest.mark.parametrize("name", ["tiny", "patched"])
def test_inflated_weights_treat_each_frame_of_a_still_clip_alike(name):
    vae, still = make(name), random_video(1)
    picture = vae.decode(vae.encode(still))
    inflate(vae)
    clip = vae.encode(still.expand(-1, -1, 9, -1, -1))
    torch.testing.assert_close(clip, vae.encode(still).expand_as(clip), rtol=0, atol=1e-5)
    decoded = vae.decode(clip)
    torch.testing.assert_close(decoded, picture.expand_as(decoded), rtol=0, atol=1e-5)


def test_inflated_weights_still_learn():
    vae = make("shortcuts")
    inflate(vae)
    video = random_video(17)
    (vae.decode_raw(vae.encode_moments(video)[0]) - video).square().mean().backward()
    for module in vae.modules():
        if isinstance(module, CausalConv3d) and module.num_history:
            assert module.weight.grad[:, :, 0].abs().max() > 0
        elif isinstance(module, Downsample):
            assert module.time_conv.weight.grad.abs().amax((0, 1, 3, 4)).min() > 0


def test_training_lowers_the_error():
    vae = make("patched")
    optimizer = torch.optim.AdamW(vae.parameters(), lr=3e-3)
    video = torch.nn.functional.interpolate(torch.rand(2, 3, 5, 4, 4), (5, 32, 32)) * 2 - 1
    losses = []
    for _ in range(30):
        with torch.autocast("cpu", torch.bfloat16):
            decoded = vae.decode_raw(vae.encode_moments(video)[0])
        loss = (decoded.float() - video).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_stills_have_the_right_gradients_in_bf16():
    torch.manual_seed(0)
    vae = CausalVAE(VAE_PRESETS["toybox"])
    stills = torch.rand(4, 3, 1, 64, 64) * 2 - 1

    def gradients() -> list[torch.Tensor]:
        vae.zero_grad()
        mean, logvar = vae.encode_moments(stills.contiguous(memory_format=torch.channels_last_3d))
        (vae.decode_raw(mean.float()) - stills).square().mean().add(logvar.mean()).backward()
        return [p.grad for p in vae.parameters() if p.grad is not None]

    exact = gradients()
    with torch.autocast("cpu", torch.bfloat16):
        narrow = gradients()
    mine, right = (torch.cat([part.flatten() for part in parts]) for parts in (narrow, exact))
    assert torch.nn.functional.cosine_similarity(mine, right, dim=0) > 0.99


def test_norm_and_silu_have_the_right_gradients():
    torch.manual_seed(0)
    norm = ChannelRMSNorm(5).double()
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    x = torch.randn(2, 5, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    expected = torch.nn.functional.silu(norm(x))
    torch.testing.assert_close(norm.silu(x), expected)
    assert torch.autograd.gradcheck(lambda x, _: norm.silu(x), (x, norm.weight))
    assert torch.isfinite(norm.silu(torch.zeros(1, 5, 1, 1, 1, dtype=torch.float64))).all()


def test_folded_upsampling_equals_repeating_pixels_first():
    upsample = Upsample(3, 5, temporal=False)
    x = torch.randn(2, 3, 2, 4, 6)
    repeated = torch.nn.functional.interpolate(x, scale_factor=(1, 2, 2), mode="nearest")
    expected = torch.nn.functional.conv3d(
        repeated, upsample.conv.weight[:, :, None], upsample.conv.bias, padding=(0, 1, 1)
    )
    torch.testing.assert_close(upsample(x), expected, rtol=0, atol=1e-5)


def test_patches_return_to_their_pixels():
    video = torch.randn(2, 3, 5, 8, 12)
    patches = patchify_pixels(video, 4)
    assert patches.shape == (2, 48, 5, 2, 3)
    assert torch.equal(unpatchify_pixels(patches, 4), video)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latent_channels": 0}, "latent_channels must be 1 or more, not 0"),
        ({"channel_mults": ()}, "channel_mults"),
        ({"channel_mults": (1, 2, 0, 2)}, "channel_mults"),
        ({"temporal_downsample": (True,)}, "1 entries, but 4 stages"),
        ({"latents_mean": (0.0,)}, "latents_mean has 1 values for 4"),
        ({"latents_std": (1.0, 0.0, 1.0, 1.0)}, "latents_std must be positive"),
        ({"decoder_dim": 7, "channel_mults": (1, 1, 1, 1)}, "halves the width"),
        ({"channel_mults": (1, 2, 3, 4), "stage_shortcuts": True}, "shortcut"),
    ],
)
def test_impossible_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(VAE_PRESETS["tiny"], **change)


def test_bfloat16_works_on_processors_without_instructions_for_it(monkeypatch):
    monkeypatch.setattr(conv, "_dtypes", lambda: (torch.float32,))
    torch.manual_seed(0)
    layer, x = CausalConv3d(8, 8, (3, 3, 3)), torch.randn(1, 8, 3, 6, 6)
    with torch.no_grad():
        exact = layer(x)
        near = layer.bfloat16()(x.bfloat16())
    torch.testing.assert_close(near.float(), exact, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("channels", [16, 256])
@torch.no_grad()
def test_long_sums_in_float32_err_no_more_than_in_blocks(channels):
    torch.manual_seed(0)
    layer = CausalConv3d(channels, 32, (3, 3, 3))
    x = torch.randn(1, channels, 6, 16, 16)
    exact = torch.nn.functional.conv3d(
        x.double(), layer.weight.double(), layer.bias.double(), padding=layer.padding
    )
    blocks = torch.mkldnn_convolution(
        x, layer.weight, layer.bias, layer.padding, layer.stride, (1, 1, 1), 1
    )
    ours = conv.convolve(layer, conv.channels_last(x))
    assert ours.is_contiguous(memory_format=torch.channels_last_3d)
    assert (ours - exact).norm() <= 1.2 * (blocks - exact).norm()


def test_a_channel_counts_as_much_as_the_decoder_makes_of_it(vae, monkeypatch):
    latents = torch.randn(2, 4, 3, 4, 4)
    with torch.no_grad():
        vae.decoder.from_latents.weight[:, 1] = 0
    weights = channel_weights(vae, latents)
    assert weights.mean().item() == pytest.approx(1)
    assert weights.argmin() == 1
    assert 0 < weights[1] < 0.1, "it is denoised along"
    scales = torch.tensor([1.0, 2.0, 3.0, 2.0]).view(-1, 1, 1, 1)
    monkeypatch.setattr(vae, "decode", lambda given: (given * scales).sum(1))
    assert channel_weights(vae, latents).tolist() == pytest.approx([4 / 18, 16 / 18, 2, 16 / 18])
