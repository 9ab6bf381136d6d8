"""The image encoder of Wan 2.1's image-to-video models: CLIP's vision tower, by transformers.

The DiT uses the states before the last layer; that layer and the norm after it keep their weights
so that a model folder is loaded and saved completely.

Axes: B batch, S side of the square input in pixels, P patches, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from vidgen.core.errors import ModelError

Activation = Literal["gelu", "quick_gelu"]
IMAGE_NAMES = {
    "image_size": "image_size", "patch_size": "patch_size", "hidden_dim": "hidden_size",
    "ffn_dim": "intermediate_size", "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads", "activation": "hidden_act", "eps": "layer_norm_eps",
}
"""transformers' names of the fields of `ImageConfig`."""


@dataclass(frozen=True)
class ImageConfig:
    """Architecture of an image encoder."""

    image_size: int
    patch_size: int
    hidden_dim: int
    ffn_dim: int
    num_layers: int
    num_heads: int
    activation: Activation = "gelu"
    eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("patch_size", "hidden_dim", "ffn_dim", "num_heads"):
            value = getattr(self, name)
            if value < 1:
                raise ModelError(f"the image encoder's {name} must be 1 or more, not {value}")
        if self.image_size < self.patch_size or self.hidden_dim % self.num_heads:
            raise ModelError(
                f"an image encoder of {self.image_size} pixels in patches of {self.patch_size}, "
                f"{self.hidden_dim} wide with {self.num_heads} heads: patches must fit the image "
                "and heads divide the width"
            )
        if self.num_layers < 2 or self.activation not in get_args(Activation):
            raise ModelError(
                f"an image encoder of {self.num_layers} layers with {self.activation!r}: it needs "
                f"2 layers or more and one of {get_args(Activation)}"
            )


def image_encoder(config: ImageConfig) -> nn.Module:
    """Build transformers' `CLIPVisionModel` (Radford et al. 2021), with untrained weights."""
    from transformers import CLIPVisionConfig, CLIPVisionModel  # takes seconds

    settings = {theirs: getattr(config, ours) for ours, theirs in IMAGE_NAMES.items()}
    encoder: nn.Module = CLIPVisionModel(CLIPVisionConfig(**settings))
    # no file holds these indices, so they must not be on the meta device
    num_tokens = 1 + (config.image_size // config.patch_size) ** 2
    indices = torch.arange(num_tokens, device="cpu")[None]
    encoder.get_submodule("embeddings").register_buffer("position_ids", indices, persistent=False)
    return encoder


def image_processor(size: int, folder: Path | None = None) -> Any:
    """Return the `CLIPImageProcessor` of a folder; None: CLIP's own, for pictures of a size."""
    from transformers import CLIPImageProcessorPil  # the same pixels with torchvision or without

    if folder is not None:
        return CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
    square = {"height": size, "width": size}
    return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=square)


def encode_image(
    encoder: Any, picture: Any, folder: Path | None, device: torch.device
) -> Tensor:
    """Encode a picture, uint8 [H, W, 3], to features [1, 1 + P, D] in the weights' dtype.

    `folder` is that of its processor, as in `image_processor`.

    Raises:
        ModelError: the processor's settings are invalid, or give another size than the encoder's.
    """
    embeddings, size = encoder.embeddings, encoder.config.image_size
    try:
        prepared = image_processor(size, folder)(
            picture, input_data_format="channels_last", return_tensors="pt")
    except (ValueError, TypeError, OSError) as error:
        raise ModelError(f"the image processor in {folder} can't be used: {error}") from error
    pixels = prepared.pixel_values.to(device, embeddings.patch_embedding.weight.dtype)
    if pixels.shape != (1, 3, size, size):
        raise ModelError(f"the image processor in {folder} gives {list(pixels.shape)}, but this "
                         f"image encoder takes [1, 3, {size}, {size}]")
    embeddings.position_ids = embeddings.position_ids.to(device)
    states: Tensor = encoder(pixels, output_hidden_states=True).hidden_states[-2]
    return states
