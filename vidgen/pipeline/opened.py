"""A model that is opened: its networks, how they lie in memory, and what each does alone.

Axes: B batch, C latent channels, F latent frames, h w latent rows and columns, T frames, H W
pixel rows and columns, S text or image tokens, D width.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vidgen.core.errors import InputError
from vidgen.core.request import Request
from vidgen.models.dit_types import DiTConfig
from vidgen.models.image import prepare_image
from vidgen.models.text import NOTHING
from vidgen.models.tokenizer import PromptTokenizer
from vidgen.models.vae import VAEConfig
from vidgen.pipeline.budget.preflight import Asked, first_setup
from vidgen.pipeline.devices.crew import Crew, devices_of
from vidgen.pipeline.inputs import Inputs
from vidgen.pipeline.networks import (
    decode_latents,
    encode_pixels,
    from_frame,
    latent_of,
    refine_first,
)
from vidgen.pipeline.parts import DTYPES, Parts
from vidgen.pipeline.plan import Plan
from vidgen.pipeline.policy import Policy
from vidgen.pipeline.prompts import PromptEncoder
from vidgen.pipeline.settle import settled
from vidgen.weights.folder import ForeignFolder, ModelFolder

if TYPE_CHECKING:
    from vidgen.core.shapes import Tiles
    from vidgen.pipeline.budget.stages import Setup
    from vidgen.weights.quantize import Quantization

log = logging.getLogger(__name__)


class OpenedModel:
    """A model's networks on a device.

    Args:
        folder: the model.
        device: where its networks compute.
        asked: the offload and dtype that a person chose, if any.
        quantize: "int8" or None.
        policy: refuses prompts, or None.
        crew: other devices that help, or None.

    Raises:
        ModelError: damaged files, or more than the memory holds.
    """

    def __init__(
        self, folder: ModelFolder, device: torch.device, asked: Asked,
        quantize: Quantization | None = None, policy: Policy | None = None,
        crew: Crew | None = None,
    ) -> None:
        self.folder, self.device, self.policy, self.crew = folder, device, policy, crew
        self.asked, self.quantize = asked, quantize
        self.vae_config: VAEConfig = folder.components["vae"].config
        self.dit_config: DiTConfig = folder.components["transformer"].config
        self.tokenizer = PromptTokenizer(folder.tokenizer, self.dit_config.text_len)
        if crew is not None:
            crew.open(folder, quantize)
        self._open(first_setup(folder, device, asked, quantize))
        self.parts.check()
        if self.offload == "none":  # damaged files are told of now
            for role in folder.components:
                with self.parts.use(role):
                    pass

    def _open(self, setup: Setup) -> None:
        self.dtype, self.offload = setup.dtype, setup.offload
        self.parts = Parts(
            self.folder, self.device, DTYPES[setup.dtype], setup.offload, self.quantize,
            None if self.crew is None else self.crew.mesh,
        )
        self.prompts = PromptEncoder(self.parts, self.tokenizer)

    def adopt(self, setup: Setup) -> None:
        """Run in another setup from here on; networks that are in memory for this one leave."""
        if (setup.dtype, setup.offload) != (self.dtype, self.offload):
            self.parts.close()
            self._open(setup)

    def close(self) -> None:
        """Let the networks go, and other devices; this engine can't be used any more."""
        self.parts.close()
        if self.crew is not None:
            self.crew.close()

    def plan(self, request: Request, inputs: Inputs) -> Plan:
        """Settle all that the request left open; refuse what this model can't do."""
        own = {"model": self.folder.name, "dtype": self.dtype, "offload": self.offload,
               "quantize": self.quantize, **devices_of(self.crew)}
        require_own(request, self.folder, own)
        request = replace(request, devices=own["devices"])
        plan = settled(request, self.folder, inputs, self.tokenizer)
        for text in (plan.prompt, plan.negative):
            for remark in self.tokenizer.remarks(text, dict(plan.readings)):
                log.warning("%s", remark)
        return plan

    def encode_texts(
        self, prompts: Sequence[str], learned: Mapping[str, Tensor] = NOTHING
    ) -> tuple[Tensor, Tensor]:
        """(context [B, S, D], lengths [B]) of prompts; `learned` are embeddings of tokens."""
        return self.prompts.encode(prompts, learned)

    def encode_video(
        self, video: Tensor, tiles: Tiles | None = None, passes: int = 1, oversampling: int = 1
    ) -> Tensor:
        """Video [B, 3, T, H, W] in [-1, 1] as normalised latents [B, C, F, h, w], float32.

        They are nearer to it after several `passes`; see `encode_pixels`. For `oversampling` see
        `CausalVAE.encode_moments`.
        """
        return encode_pixels(self.parts, video, tiles, passes, oversampling)

    def encode_first(
        self, picture: Tensor, num_steps: int, tiles: Tiles | None = None, passes: int = 1
    ) -> Tensor:
        """A first frame [B, 3, 1, H, W] in [-1, 1] as normalised latents [B, C, 1, h, w], float32.

        In `num_steps` steps they come nearer to it than `passes` of the encoder bring them, unless
        the picture is taken in tiles, since it doesn't fit the memory.
        """
        if num_steps and tiles is None:
            return refine_first(self.parts, picture, self.encode_video(picture), num_steps)
        if num_steps:
            log.warning("a first frame that is taken in tiles isn't refined; refine 0 says so")
        return self.encode_video(picture, tiles, passes)

    @torch.no_grad()
    def decode_video(
        self, latents: Tensor, start: int = 0, tiles: Tiles | None = None, oversampling: int = 1
    ) -> Iterator[Tensor]:
        """Normalised latents [B, C, F, h, w] as chunks of video [B, 3, n, H, W], from `start` on.

        Frames don't depend on where decoding begins, nor on how many devices decode. Latents of a
        clip with `oversampling` are so many for each of its own.
        """
        t = self.vae_config.strides.t // oversampling
        decode = decode_latents if self.crew is None else self.crew.decode
        made = decode(self.parts, latents, latent_of(start, t), tiles=tiles,
                      oversampling=oversampling)
        return from_frame(made, start, t)

    @torch.no_grad()
    def describe(self, pictures: Sequence[Any]) -> Tensor:
        """Image features [1, S, D] of the first picture, or of two where the model reads two."""
        count = 1 if self.dit_config.image_positions is None else 2
        with self.parts.use("image_encoder") as encoder:
            seen = [prepare_image(torch.from_numpy(p), encoder.config) for p in pictures[:count]]
            features = [encoder(pixels.to(self.device, _dtype_of(encoder))) for pixels in seen]
        return torch.cat(features, dim=1)


def _dtype_of(module: torch.nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def require_own(
    request: Request, folder: ModelFolder | ForeignFolder, own: Mapping[str, Any]
) -> None:
    """Refuse a request that names another model or way of loading than an engine's `own`.

    Raises:
        InputError: names the option.
    """
    for option, value in own.items():
        asked = getattr(request, option)
        is_own = asked in (None, value) or (option == "model" and folder.is_called(asked))
        if not is_own:
            raise InputError(f"this engine was loaded with {option} {value!r}, not {asked!r}; "
                             "load another one")
