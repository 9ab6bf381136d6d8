"""The image encoder against transformers' CLIP vision tower and image processor, float32."""

import json
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from vidgen.core.errors import ModelError
from vidgen.models.image import ImageConfig, encode_image, image_encoder
from vidgen.models.presets import IMAGE_PRESETS
from vidgen.weights.configs import encoder_to_transformers, image_from_transformers
from vidgen.weights.load import load_module
from vidgen.weights.tensors import Tensors, held

TINY = IMAGE_PRESETS["tiny"]
VIT_H = IMAGE_PRESETS["clip-vit-h"]
CPU = torch.device("cpu")


def reference(config: ImageConfig) -> CLIPVisionModel:
    settings = encoder_to_transformers(config)
    theirs = CLIPVisionModel(CLIPVisionConfig(**settings)).eval()
    torch.manual_seed(0)
    for parameter in theirs.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return theirs


def loaded(config: ImageConfig, theirs: CLIPVisionModel, **options):
    """The encoder built on the meta device and filled by vidgen's loader."""
    tensors = Tensors({name: held(value) for name, value in theirs.state_dict().items()})
    return load_module(lambda: image_encoder(config), tensors, torch.float32, "cpu", **options)


def pictures(size):
    draw = np.random.default_rng(0)
    for height, width in [*product((13, size, 225), (17, size, 301)), (224, 225), (480, 832)]:
        yield draw.integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(("activation", "options"), [
    ("gelu", {}), ("quick_gelu", {}), ("gelu", {"stream": True})])
@torch.no_grad()
def test_features_equal_the_states_before_the_last_layer_of_transformers(activation, options):
    config = replace(TINY, activation=activation)
    theirs = reference(config)
    ours = loaded(config, theirs, **options)
    processor = CLIPImageProcessor(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    for picture in pictures(28):
        pixels = processor(images=Image.fromarray(picture), return_tensors="pt").pixel_values
        states = theirs(pixels, output_hidden_states=True).hidden_states
        assert len(states) == config.num_layers + 1
        features = encode_image(ours, picture, None, CPU)
        assert torch.equal(features, states[-2])
        assert features.shape == (1, 5, config.hidden_dim)
        assert (features - states[-1]).abs().max() > 0.1


@torch.no_grad()
def test_the_last_layer_and_norm_change_nothing():
    encoder, (picture, *_) = loaded(TINY, reference(TINY)), pictures(28)
    expected = encode_image(encoder, picture, None, CPU)
    for name, parameter in encoder.named_parameters():
        if name.startswith(("encoder.layers.2.", "post_layernorm.")):
            parameter.fill_(torch.nan)
    assert torch.equal(encode_image(encoder, picture, None, CPU), expected)


def test_vit_h_has_the_published_shapes():
    with torch.device("meta"):
        ours = image_encoder(VIT_H).state_dict()
    assert sum(value.numel() for value in ours.values()) == 630_766_080
    assert ours["embeddings.position_embedding.weight"].shape == (257, 1280)


def test_the_config_of_transformers_is_read_and_written():
    assert image_from_transformers(encoder_to_transformers(VIT_H)) == VIT_H
    settings = reference(TINY).config.to_dict()
    assert image_from_transformers(settings) == TINY
    with pytest.raises(ModelError, match="of type 'siglip'"):
        image_from_transformers(settings | {"model_type": "siglip"})
    with pytest.raises(ModelError, match="'relu'"):
        image_from_transformers(settings | {"hidden_act": "relu"})
    del settings["hidden_size"]
    with pytest.raises(ModelError, match="lacks the field 'hidden_size'"):
        image_from_transformers(settings)


@torch.no_grad()
def test_a_folders_own_processor_is_used_and_an_unfit_one_refused(tmp_path):
    theirs, (picture, *_) = reference(TINY), pictures(28)
    encoder = loaded(TINY, theirs)
    processor = CLIPImageProcessor(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28},
        image_mean=[0.5, 0.4, 0.3], resample=2)
    processor.save_pretrained(tmp_path)
    pixels = processor(images=Image.fromarray(picture), return_tensors="pt").pixel_values
    expected = theirs(pixels, output_hidden_states=True).hidden_states[-2]
    assert torch.equal(encode_image(encoder, picture, tmp_path, CPU), expected)
    file = tmp_path / "preprocessor_config.json"
    settings = json.loads(file.read_text())
    for bad, message in [
        ({"do_center_crop": False}, r"gives \[1, 3, 28, \d+\], but .* takes \[1, 3, 28, 28\]"),
        ({"crop_size": {"height": 32, "width": 32}}, r"gives \[1, 3, 32, 32\]"),
        ({"image_mean": [0.5]}, "can't be used: mean must have 3 elements"),
    ]:
        file.write_text(json.dumps(settings | bad))
        with pytest.raises(ModelError, match=message):
            encode_image(encoder, picture, tmp_path, CPU)
