"""The image encoder of Wan 2.1's image-to-video models: CLIP's vision tower.

It is a vision transformer (Dosovitskiy et al. 2021) trained as CLIP (Radford et al. 2021). Modules
have the names of transformers' `CLIPVisionModel`, so that its weights load without renaming. The
DiT uses the states before the last layer; that layer and the norm after it never run, but keep
their weights so that a model folder is loaded and saved completely.

Axes: B batch, S side of the square input in pixels, P patches, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vidgen.core.errors import InputError, ModelError
from vidgen.ops.attention import attention

Activation = Literal["gelu", "quick_gelu"]


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
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

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

    @property
    def num_tokens(self) -> int:
        """Rows of the output: one for the whole image and one for each patch."""
        return 1 + (self.image_size // self.patch_size) ** 2


class _Embeddings(nn.Module):
    def __init__(self, config: ImageConfig) -> None:
        super().__init__()
        width, patch = config.hidden_dim, config.patch_size
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.patch_embedding = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding(config.num_tokens, width)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        whole = self.class_embedding.expand(len(pixels), 1, -1)
        return torch.cat([whole, patches], dim=1) + self.position_embedding.weight


class _Attention(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(width, width) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(attention(q, k, v).transpose(1, 2).flatten(2))


class _FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int, activation: Activation) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        # quick_gelu: x * sigmoid(1.702 x) (Hendrycks & Gimpel 2016, section 2)
        return self.fc2(F.gelu(x) if self.activation == "gelu" else x * (1.702 * x).sigmoid())


class _Layer(nn.Module):
    def __init__(self, config: ImageConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_dim, config.eps)
        self.self_attn = _Attention(config.hidden_dim, config.num_heads)
        self.layer_norm2 = nn.LayerNorm(config.hidden_dim, config.eps)
        self.mlp = _FeedForward(config.hidden_dim, config.ffn_dim, config.activation)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class ImageEncoder(nn.Module):
    """CLIP's vision tower up to the states before its last layer."""

    def __init__(self, config: ImageConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = _Embeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_dim, config.eps)  # transformers' spelling
        layers = nn.ModuleList(_Layer(config) for _ in range(config.num_layers))
        self.encoder = nn.ModuleDict({"layers": layers})
        self.post_layernorm = nn.LayerNorm(config.hidden_dim, config.eps)

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode images [B, 3, S, S] of `prepare_image` to features [B, 1 + P, D].

        They are `hidden_states[-2]` of transformers' model, in the weights' dtype.

        Raises:
            InputError: the images don't have the encoder's size.
        """
        size = self.config.image_size
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != (3, size, size):
            raise InputError(
                f"the image encoder takes [B, 3, {size}, {size}], not {list(pixels.shape)}; "
                "use prepare_image"
            )
        pixels = pixels.to(self.embeddings.patch_embedding.weight.dtype)
        x = self.pre_layrnorm(self.embeddings(pixels))
        *layers, _ = self.encoder["layers"].children()
        for layer in layers:
            x = layer(x)
        return x


def prepare_image(pixels: Tensor, config: ImageConfig) -> Tensor:
    """Convert a picture, uint8 [H, W, 3], to the encoder's input, float32 [1, 3, S, S] on the CPU.

    As in transformers' `CLIPImageProcessor`, the shorter side is resized to S (bicubic), the centre
    square is cropped, and channels are normalised.
    """
    import numpy as np
    from PIL import Image

    size = config.image_size
    height, width, _ = pixels.shape
    longer = int(size * max(height, width) / min(height, width))
    new_width, new_height = (size, longer) if width <= height else (longer, size)
    picture = Image.fromarray(pixels.cpu().numpy()).resize(
        (new_width, new_height), Image.Resampling.BICUBIC
    )
    top, left = (new_height - size) // 2, (new_width - size) // 2
    square = torch.from_numpy(np.array(picture)[top : top + size, left : left + size])
    normal = (square / 255 - torch.tensor(config.mean)) / torch.tensor(config.std)
    return normal.permute(2, 0, 1)[None].contiguous()
