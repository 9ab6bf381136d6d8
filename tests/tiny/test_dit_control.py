"""VACE's control branch of the DiT."""

from dataclasses import replace

import pytest
import torch

from train.toybox.initial import init_dit
from vidgen.core.errors import InputError
from vidgen.core.protocols import KeyTokens
from vidgen.models.dit import SpacetimeDiT
from vidgen.models.dit_types import AudioConfig, DiTConfig
from vidgen.models.presets import DIT_PRESETS

TINY = DIT_PRESETS["tiny"]
WITH_CONTROL = replace(TINY, num_layers=4, control_layers=(0, 1, 3), control_channels=5)


def make_model(config: DiTConfig = WITH_CONTROL) -> SpacetimeDiT:
    """A model with random weights everywhere: those of a fresh one hide the control."""
    torch.manual_seed(0)
    model = SpacetimeDiT(config)
    init_dit(model)
    for name, parameter in model.named_parameters():
        parameter.data += torch.randn_like(parameter) * (0.3 if "norm" in name else 0.1)
    return model.requires_grad_(False)


def make_inputs():
    """Latents, timesteps, context, control."""
    torch.manual_seed(1)
    latents, control = torch.randn(2, 4, 3, 4, 6), torch.randn(2, 5, 3, 4, 6)
    return latents, torch.tensor([700.0, 150.0]), torch.randn(2, 5, 16), control


def assert_equal(a: torch.Tensor, b: torch.Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def test_control_changes_the_velocity_by_its_scale():
    model = make_model()
    *inputs, control = make_inputs()
    plain = model(*inputs)
    steered = model(*inputs, control=control)
    assert (steered - plain).abs().max() > 1e-2
    assert torch.equal(model(*inputs, control=control, control_scale=0.0), plain)
    assert torch.equal(model(*inputs, control=control, control_scale=1.0), steered)
    faint = [model(*inputs, control=control, control_scale=scale) for scale in (-1e-3, 1e-3)]
    assert (faint[0] - faint[1]).abs().max() > 1e-6
    assert_equal((faint[0] + faint[1]) / 2, plain, 1e-5)  # a small hint acts linearly
    changed = control.clone()
    changed[1] += 1
    other = model(*inputs, control=changed)
    assert torch.equal(other[0], steered[0])
    assert (other[1] - steered[1]).abs().max() > 1e-3


def test_control_takes_timesteps_of_tokens_and_lengths_of_texts():
    model = make_model()
    latents, timestep, context, control = make_inputs()
    steered = model(latents, timestep, context, control=control)
    tokens = timestep[:, None, None, None].repeat(1, 3, 2, 3)
    assert_equal(model(latents, tokens, context, control=control), steered)
    tokens[1, 0, 0, 0] = 0
    mixed = model(latents, tokens, context, control=control)
    assert_equal(mixed[0], steered[0])
    assert (mixed[1] - steered[1]).abs().max() > 1e-3
    padded = torch.cat([context, context.new_zeros(2, 507, 16)], dim=1)
    assert_equal(
        model(latents, timestep, context, context_lengths=[5, 5], control=control),
        model(latents, timestep, padded, control=control),
    )


def test_a_fresh_control_branch_changes_nothing_yet_learns():
    torch.manual_seed(0)
    model = SpacetimeDiT(WITH_CONTROL)
    init_dit(model)
    model.head.proj.weight.data.normal_()
    *inputs, control = make_inputs()
    velocity = model(*inputs, control=control)
    assert torch.equal(velocity, model(*inputs))
    velocity.square().mean().backward()
    for block in model.control_blocks:
        assert block.proj_out.weight.grad.abs().max() > 0


def test_control_in_bfloat16_stays_close():
    model = make_model()
    *inputs, control = make_inputs()
    expected = model(*inputs, control=control)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = model(*inputs, control=control)
    for name, parameter in model.named_parameters():
        if not any(part in name for part in SpacetimeDiT.fp32_weights):
            parameter.data = parameter.data.to(torch.bfloat16)
    for velocity in (autocast, model(*inputs, control=control)):
        assert velocity.dtype == torch.float32
        assert ((velocity - expected).norm() / expected.norm()).item() < 0.03


def test_control_that_does_not_fit_is_refused():
    model = make_model()
    *inputs, control = make_inputs()
    stills = KeyTokens(inputs[0][:, :, :1], torch.ones(2, 1))
    bad = [
        ({"control": control[:, :4]}, r"shape \(2, 4, 3, 4, 6\), not \(2, 5, 3, 4, 6\)"),
        ({"control": control[:1]}, r"shape \(1, 5, 3, 4, 6\)"),
        ({"control": control, "extra": stills}, "stills can't be combined"),
    ]
    for options, message in bad:
        with pytest.raises(InputError, match=message):
            model(*inputs, **options)
    with pytest.raises(InputError, match="without control_layers"):
        make_model(TINY)(*inputs, control=control)
    for change, message in [
        ({"control_channels": None}, "together"),
        ({"control_layers": ()}, "together"),
        ({"control_layers": (1, 3)}, r"rise from 0 to at most 3, not \(1, 3\)"),
        ({"control_layers": (0, 3, 2)}, "rise from 0"),
        ({"control_layers": (0, 4)}, "at most 3"),
        ({"audio": AudioConfig(channels=3, ffn_dim=8, tokens_per_s=20.0)},
         "control can't be combined with audio"),
    ]:
        with pytest.raises(ValueError, match=message):
            replace(WITH_CONTROL, **change)
