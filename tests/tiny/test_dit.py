import copy
from dataclasses import replace

import pytest
import torch

from train.toybox.initial import init_dit
from vidgen.core.errors import InputError
from vidgen.core.protocols import KeyTokens
from vidgen.core.runtime import ATTENTION_VARIABLE
from vidgen.models import dit_blocks
from vidgen.models.dit import SpacetimeDiT
from vidgen.models.dit_types import AudioConfig, AudioTokens, DiTConfig, KVCache
from vidgen.models.presets import DIT_PRESETS
from vidgen.ops import attention, native

TINY = DIT_PRESETS["tiny"]
WITH_CONTROL = replace(TINY, num_layers=4, control_layers=(0, 1, 3), control_channels=5)
WITH_AUDIO = replace(TINY, audio=AudioConfig(channels=3, ffn_dim=8, tokens_per_s=20.0))


def make_model(config: DiTConfig = TINY) -> SpacetimeDiT:
    """A model with random weights everywhere: those of a fresh one hide most of its parts."""
    torch.manual_seed(0)
    model = SpacetimeDiT(config)
    init_dit(model)
    for name, parameter in model.named_parameters():
        parameter.data += torch.randn_like(parameter) * (0.3 if "norm" in name else 0.1)
    return model.requires_grad_(False)


def make_inputs(frames: int = 3, batch: int = 2):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, 4, frames, 4, 6, generator=generator)
    context = torch.randn(batch, 5, 16, generator=generator)
    return latents, torch.tensor([700.0, 150.0])[:batch], context


def make_stills(positions, valid=None) -> KeyTokens:
    positions = torch.tensor(positions)
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(2, 4, positions.shape[1], 4, 6, generator=generator)
    return KeyTokens(latents, positions, valid)


def assert_equal(a: torch.Tensor, b: torch.Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def test_timesteps_of_samples_frames_and_tokens_agree():
    model = make_model()
    latents, timestep, context = make_inputs()
    velocity = model(latents, timestep, context)
    frames = timestep[:, None].expand(-1, 3)
    tokens = frames[:, :, None, None].expand(-1, -1, 2, 3)
    assert_equal(model(latents, frames, context), velocity)
    assert_equal(model(latents, tokens, context), velocity)
    mixed = tokens.clone()
    mixed[1, 2] = 0
    assert_equal(model(latents, mixed[:, :, 0, 0], context), model(latents, mixed, context))
    one_token = tokens.clone()
    one_token[0, 1, 1, 2] = 0
    assert (model(latents, one_token, context) - velocity).abs().max() > 1e-3


def test_a_time_is_embedded_once():
    model = make_model()
    latents, _, context = make_inputs()
    seen = []
    model.time_embed.register_forward_pre_hook(lambda _, args: seen.append(args[0].numel()))
    tokens = torch.tensor([700.0, 150.0])[:, None, None, None].repeat(1, 3, 2, 3)
    tokens[:, 0, 0] = 0
    model(latents, tokens, context)
    assert seen == [3]


def test_a_still_is_a_frame_that_is_known_and_not_returned():
    model = make_model()
    latents, timestep, context = make_inputs()
    stills = make_stills([[3.0], [3.0]])
    longer = torch.cat([latents, stills.latents], dim=2)
    times = torch.cat([timestep[:, None].expand(-1, 3), torch.zeros(2, 1)], dim=1)
    expected = model(longer, times, context)[:, :, :3]
    assert_equal(model(latents, timestep, context, extra=stills), expected)
    tokens = timestep[:, None, None, None].repeat(1, 3, 2, 3)
    tokens[0, 0, 0, 0] = 0
    with_tokens = model(latents, tokens, context, extra=stills)
    times = torch.cat([tokens, torch.zeros(2, 1, 2, 3)], dim=1)
    assert_equal(with_tokens, model(longer, times, context)[:, :, :3])


def test_a_stills_place_is_its_real_position():
    model = make_model()
    latents, timestep, context = make_inputs()
    near = model(latents, timestep, context, extra=make_stills([[1.5], [1.5]]))
    far = model(latents, timestep, context, extra=make_stills([[-8.0], [1.5]]))
    assert (near[0] - far[0]).abs().max() > 1e-4
    assert_equal(near[1], far[1])
    moved = model(
        latents, timestep, context, positions=torch.arange(3) + 40.25,
        extra=make_stills([[41.75], [41.75]]),
    )
    assert_equal(moved, near, 1e-4)


def test_a_still_that_is_not_valid_changes_nothing():
    model = make_model()
    latents, timestep, context = make_inputs()
    alone = model(latents, timestep, context)
    valid = torch.tensor([[False, False], [True, False]])
    both = model(latents, timestep, context, extra=make_stills([[5.0, 6.0], [5.0, 6.0]], valid))
    assert_equal(both[0], alone[0])
    assert (both[1] - alone[1]).abs().max() > 1e-4
    one = make_stills([[5.0, 6.0], [5.0, 6.0]])
    one = KeyTokens(one.latents[:, :, :1], one.positions[:, :1])
    assert_equal(both[1], model(latents, timestep, context, extra=one)[1])


def reach(model: SpacetimeDiT, frames: int) -> torch.Tensor:
    """[frames, frames]: whether changing the column's frame changes the row's velocity."""
    latents, timestep, context = make_inputs(frames, batch=1)
    before = model(latents, timestep, context)
    rows = []
    for frame in range(frames):
        changed = latents.clone()
        changed[:, :, frame] += 1
        difference = (model(changed, timestep, context) - before).abs().amax((0, 1, 3, 4))
        rows.append(difference > 1e-6)
    return torch.stack(rows, dim=1)


def test_every_frame_reaches_every_other():
    assert reach(make_model(), 4).all()


def test_what_cannot_be_recorded_is_refused():
    model, (latents, timestep, context) = make_model(WITH_AUDIO), make_inputs()
    with pytest.raises(InputError, match="empty one, to a model with the audio modality"):
        make_model()(latents, timestep, context, cache=KVCache())
    hidden = make_stills([[5.0], [5.0]], torch.tensor([[True], [False]]))
    with pytest.raises(InputError, match="can't record stills"):
        model(latents, timestep, context, extra=hidden, cache=KVCache())


def test_shapes_and_options_that_do_not_fit_are_refused():
    model = make_model()
    latents, timestep, context = make_inputs()
    bad = [
        ((latents[:, :3], timestep, context), {}, "3 channels, not 4"),
        ((latents[..., :5], timestep, context), {}, "4x5 can't be divided"),
        ((latents, timestep[:1], context), {}, "timestep has shape"),
        ((latents, timestep, context), {"context_lengths": [5, 6]}, r"in 0\.\.5"),
        ((latents, timestep, context), {"context_lengths": [5]}, "must be 2 values"),
        ((latents, timestep, context), {"image_context": context}, "without image_dim"),
        ((latents, timestep, context), {"audio": make_sound()}, "without the audio"),
    ]
    for args, options, message in bad:
        with pytest.raises(InputError, match=message):
            model(*args, **options)
    two_images = make_model(replace(TINY, image_dim=6, image_positions=10))
    with pytest.raises(InputError, match="has 5 rows; this model takes 10"):
        two_images(latents, timestep, context, image_context=torch.zeros(2, 5, 6))
    with pytest.raises(ValueError, match="head_dim must be even"):
        replace(TINY, head_dim=13)


def make_sound(timestep=None) -> AudioTokens:
    latents = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(3))
    return AudioTokens(latents, torch.full((2,), 300.0) if timestep is None else timestep, 3.0)


def test_a_model_with_audio_equals_one_without_while_there_is_no_sound():
    model = make_model(WITH_AUDIO)
    silent = SpacetimeDiT(TINY)
    silent.load_state_dict({k: v for k, v in model.state_dict().items() if "audio" not in k})
    inputs = make_inputs()
    assert torch.equal(model(*inputs), silent(*inputs))


def test_video_and_audio_see_each_other():
    model = make_model(WITH_AUDIO)
    inputs = make_inputs()
    video, sound = model(*inputs, audio=make_sound())
    assert (video.shape, sound.shape) == (inputs[0].shape, (2, 3, 7))
    assert (video - model(*inputs)).abs().max() > 1e-4
    known = torch.full((2, 7), 300.0)
    assert_equal(model(*inputs, audio=make_sound(known)).audio, sound)
    known[:, :3] = 0
    assert (model(*inputs, audio=make_sound(known)).video - video).abs().max() > 1e-4
    other = model(inputs[0] + 1, *inputs[1:], audio=make_sound())
    assert (other.audio - sound).abs().max() > 1e-4
    stills = make_stills([[5.0], [5.0]], torch.tensor([[False], [False]]))
    hidden = model(*inputs, audio=make_sound(), extra=stills)
    assert_equal(hidden.video, video)
    assert_equal(hidden.audio, sound)


def test_audio_can_be_kept_from_seeing_the_video():
    model, inputs = make_model(WITH_AUDIO), make_inputs()
    stills = make_stills([[5.0], [5.0]], torch.tensor([[True], [False]]))

    def run(latents, sound, **options):
        alone = replace(sound, sees_video=False)
        return model(latents, *inputs[1:], audio=alone, **options)

    video, sound = run(inputs[0], make_sound())
    assert (sound - model(*inputs, audio=make_sound()).audio).abs().max() > 1e-4
    assert_equal(run(inputs[0] + 1, make_sound()).audio, sound)
    assert_equal(run(inputs[0], make_sound(), extra=stills).audio, sound)
    louder = replace(make_sound(), latents=make_sound().latents + 1)
    assert (run(inputs[0], louder).video - video).abs().max() > 1e-4


def test_the_video_can_be_kept_from_seeing_audio_which_is_then_made_after_it():
    model, (latents, timestep, context) = make_model(WITH_AUDIO), make_inputs()
    behind = replace(make_sound(), is_seen=False)
    stills = make_stills([[5.0], [5.0]])
    told = {"context_lengths": [5, 2]}
    both = model(latents, timestep, context, audio=behind, extra=stills, **told)
    cache = KVCache()
    alone = model(latents, timestep, context, extra=stills, cache=cache, **told)
    assert_equal(both.video, alone)
    for _ in range(2):  # it doesn't grow by what has listened
        assert_equal(model.listen(behind, context, cache=cache, **told), both.audio)
    deaf = model(latents, timestep, context, audio=replace(behind, sees_video=False), **told)
    assert_equal(model.listen(behind, context, **told), deaf.audio)
    assert (deaf.audio - both.audio).abs().max() > 1e-4
    with pytest.raises(InputError, match="without the audio modality"):
        make_model().listen(behind, context)
    with pytest.raises(InputError, match="pass an empty one"):
        model(latents, timestep, context, cache=cache)


def test_sound_lies_on_the_videos_clock():
    model = make_model(WITH_AUDIO)
    latents, timestep, context = make_inputs()
    sound = make_sound()
    here = model(latents, timestep, context, audio=sound)
    late = AudioTokens(sound.latents, sound.timestep, sound.frames_per_s, start_s=2.0)
    moved = torch.arange(3) + 2.0 * sound.frames_per_s
    there = model(latents, timestep, context, audio=late, positions=moved)
    assert_equal(there.audio, here.audio, 1e-4)
    assert (model(latents, timestep, context, audio=late).audio - here.audio).abs().max() > 1e-4


def test_bfloat16_keeps_norms_and_modulation_in_float32(monkeypatch):
    model = make_model()
    inputs = make_inputs()
    expected = model(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = model(*inputs)
    seen = set()
    real = dit_blocks.modulated_norm

    def watch(x, shift, scale, eps, dtype):
        wide = real(x.float(), shift, scale, eps, torch.float32)
        narrow = real(x, shift, scale, eps, dtype)
        torch.testing.assert_close(narrow, wide.to(dtype))  # rounded once, at the end
        seen.update((shift.rows.dtype, scale.rows.dtype))
        return narrow

    monkeypatch.setattr(dit_blocks, "modulated_norm", watch)
    low = model.to(torch.bfloat16)(*inputs)
    assert seen == {torch.float32}
    for velocity in (autocast, low):
        assert velocity.dtype == torch.float32
        assert ((velocity - expected).norm() / expected.norm()).item() < 0.03


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("times", ["one", "frames", "tokens"])
@torch.no_grad()
def test_native_kernels_change_no_more_than_rounding(dtype, times, monkeypatch):
    if dtype not in native.known_dtypes():
        pytest.skip(f"no kernels here: {native.why_not()}")
    model = make_model(replace(TINY, num_heads=2, head_dim=64))
    draw = torch.Generator().manual_seed(1)
    exact = copy.deepcopy(model)
    model = model.to(dtype)
    for name, parameter in model.named_parameters():
        if any(part in name for part in model.fp32_weights):
            parameter.data = parameter.data.float()
    latents = torch.randn(2, 4, 3, 8, 6, generator=draw)
    text = torch.randn(2, 5, 16, generator=draw)
    shape = {"one": (2,), "frames": (2, 3), "tokens": (2, 3, 4, 3)}[times]
    timestep, lengths = 1000 * torch.rand(shape, generator=draw), [5, 3]

    def run(model, dtype=dtype):
        return model(latents.to(dtype), timestep, text.to(dtype), context_lengths=lengths)

    fast = run(model)
    monkeypatch.setattr(native, "kernels", lambda *_: None)
    plain, wanted = run(model), run(exact, torch.float32)
    assert not torch.equal(fast, plain)
    fast, plain = (((out - wanted).norm() / wanted.norm()).item() for out in (fast, plain))
    assert fast < 1.2 * plain + 1e-6


def text_share(model: SpacetimeDiT, monkeypatch: pytest.MonkeyPatch, text: torch.Tensor) -> float:
    """The least share of cross-attention, over blocks, that text has against Wan's zero rows."""
    shares = []
    real = dit_blocks.attention

    def watch(q, k, v, *, bias=None):
        if bias is not None:
            weights = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5 + bias, dim=-1)
            shares.append(weights[..., :-1].sum(-1).mean().item())
        return real(q, k, v, bias=bias)

    monkeypatch.setattr(dit_blocks, "attention", watch)
    latents = torch.randn(2, model.config.in_channels, 2, 4, 4)
    lengths = [text.shape[1]] * 2
    model(latents, torch.tensor([900.0, 300.0]), text, context_lengths=lengths)
    return min(shares)


@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_a_fresh_model_attends_to_text_and_learns_from_it(monkeypatch, scale):
    torch.manual_seed(0)
    model = SpacetimeDiT(replace(DIT_PRESETS["toybox"], num_layers=2))
    init_dit(model)
    text = (scale * torch.randn(2, 16, 128)).requires_grad_()
    assert text_share(model, monkeypatch, text) > 0.8
    latents = torch.randn(2, model.config.in_channels, 2, 4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for step in range(2):
        velocity = model(latents, torch.tensor([900.0, 300.0]), text, context_lengths=[16, 9])
        if step == 0:
            assert not velocity.any()
        (velocity - latents).square().mean().backward()
        optimizer.step()
    assert text.grad[0].abs().sum(-1).min() > 0
    assert text.grad[1, :9].abs().sum(-1).min() > 0
    assert not text.grad[1, 9:].any()
    unused = [name for name, p in model.named_parameters() if p.grad is None]
    assert all("audio" in name for name in unused)


def make_control() -> torch.Tensor:
    return torch.randn(2, 5, 3, 4, 6, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("config", [TINY, WITH_CONTROL], ids=["plain", "control"])
def test_recomputing_blocks_gives_the_same_gradients(config):
    inputs = make_inputs()
    control = make_control() if config.control_layers else None
    gradients = []
    for recompute in (False, True):
        model = make_model(config).requires_grad_(True)
        model.gradient_checkpointing = recompute
        model(*inputs, context_lengths=[5, 2], control=control).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert_equal(a, b)


def test_the_back_end_is_the_callers_choice(monkeypatch):
    model = make_model(WITH_CONTROL)
    inputs, control = make_inputs(), make_control()
    expected = model(*inputs, context_lengths=[5, 2], control=control)
    used, real = set(), attention.used_backend

    def watch(*args):
        used.add(real(*args))
        return real(*args)

    monkeypatch.setattr(attention, "used_backend", watch)
    for backend in ("reference", "sdpa", "blocked"):
        used.clear()
        monkeypatch.setenv(ATTENTION_VARIABLE, backend)
        assert_equal(model(*inputs, context_lengths=[5, 2], control=control), expected)
        assert used == {backend}
    with pytest.raises(InputError, match="unknown; choose one of"):
        attention.require_backend("flash9", torch.device("cpu"), torch.float32)
