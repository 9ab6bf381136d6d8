"""The image encoder against transformers' CLIP vision tower and image processor, float32."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from vidgen.core.errors import InputError, ModelError
from vidgen.models.image import ImageConfig, ImageEncoder, prepare_image
from vidgen.models.presets import IMAGE_PRESETS
from vidgen.weights.configs import encoder_to_transformers, image_from_transformers

TINY = IMAGE_PRESETS["tiny"]
VIT_H = IMAGE_PRESETS["clip-vit-h"]


def reference(config: ImageConfig) -> CLIPVisionModel:
    settings = encoder_to_transformers(config)
    return CLIPVisionModel(CLIPVisionConfig(**settings)).eval()


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@torch.no_grad()
def test_states_equal_those_before_the_last_layer_of_transformers(activation):
    torch.manual_seed(0)
    config = replace(TINY, activation=activation)
    theirs = reference(config)
    for parameter in theirs.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    ours = ImageEncoder(config).eval()
    ours.load_state_dict(theirs.state_dict())
    pixels = torch.randn(3, 3, 28, 28)
    states = theirs(pixels, output_hidden_states=True).hidden_states
    assert len(states) == config.num_layers + 1
    torch.testing.assert_close(ours(pixels), states[-2], rtol=0, atol=1e-5)
    assert ours(pixels).shape == (3, config.num_tokens, config.hidden_dim)
    assert (ours(pixels) - states[-1]).abs().max() > 0.1


def test_the_last_layer_and_norm_change_nothing():
    encoder = ImageEncoder(TINY).requires_grad_(False)
    pixels = torch.randn(1, 3, 28, 28)
    expected = encoder(pixels)
    for name, parameter in encoder.named_parameters():
        if name.startswith(("encoder.layers.2.", "post_layernorm.")):
            parameter.fill_(torch.nan)
    assert torch.equal(encoder(pixels), expected)


def test_vit_h_has_the_published_shapes():
    with torch.device("meta"):
        ours, theirs = ImageEncoder(VIT_H).state_dict(), reference(VIT_H).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    assert sum(value.numel() for value in ours.values()) == 630_766_080
    assert VIT_H.num_tokens == 257


@pytest.mark.parametrize("size", [28, 224])
def test_a_prepared_image_equals_the_image_processor(size):
    processor = CLIPImageProcessor(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    config = replace(VIT_H, image_size=size)
    generator = torch.Generator().manual_seed(0)
    for height, width in [*product((13, size, 225), (17, size, 301)), (224, 225), (480, 832)]:
        pixels = torch.randint(
            0, 256, (height, width, 3), dtype=torch.uint8, generator=generator
        )
        expected = processor(images=Image.fromarray(pixels.numpy()), return_tensors="pt")
        prepared = prepare_image(pixels, config)
        assert prepared.shape == (1, 3, size, size)
        torch.testing.assert_close(prepared, expected.pixel_values, rtol=0, atol=1e-6)


def test_the_config_of_transformers_is_read_and_written():
    assert image_from_transformers(encoder_to_transformers(VIT_H)) == VIT_H
    settings = reference(TINY).config.to_dict()
    processor = CLIPImageProcessor(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28},
        image_mean=[0.5, 0.4, 0.3],
    ).to_dict()
    config = image_from_transformers(settings, processor)
    assert config == replace(TINY, mean=(0.5, 0.4, 0.3))
    for bad, message in [
        ({"do_center_crop": False}, "do_center_crop is False"),
        ({"resample": 2}, "resample is 2; only 3"),
        ({"size": {"shortest_edge": 32}}, "size is .*32"),
    ]:
        with pytest.raises(ModelError, match=message):
            image_from_transformers(settings, processor | bad)
    with pytest.raises(ModelError, match="of type 'siglip'"):
        image_from_transformers(settings | {"model_type": "siglip"})
    with pytest.raises(ModelError, match="'relu'"):
        image_from_transformers(settings | {"hidden_act": "relu"})
    del settings["hidden_size"]
    with pytest.raises(ModelError, match="lacks the field 'hidden_size'"):
        image_from_transformers(settings)


def test_another_size_is_refused():
    with pytest.raises(InputError, match=r"takes \[B, 3, 28, 28\], not \[1, 3, 28, 30\]"):
        ImageEncoder(TINY)(torch.zeros(1, 3, 28, 30))
