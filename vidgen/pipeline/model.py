"""An opened model: its networks, their setup, and each one's work for a clip.

Axes: B batch, C latent channels, F latent frames, h w latent rows and columns, T frames, H W pixel
rows and columns, S text or image tokens, D width.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vidgen.core.errors import InputError
from vidgen.core.protocols import OnStep, SamplerState
from vidgen.core.request import Loading, Request
from vidgen.core.runtime import attention_by
from vidgen.diffusion.flow import draw_noise
from vidgen.diffusion.samplers import sample, sample_with_scheduler
from vidgen.diffusion.state import LatentState, new_state
from vidgen.models.dit_types import DiTConfig
from vidgen.models.image import encode_image
from vidgen.models.text import NOTHING, TextEncoder
from vidgen.models.tokenizer import PromptTokenizer, normalise_words
from vidgen.models.vae import VAEConfig
from vidgen.pipeline import codec
from vidgen.pipeline.denoise import (
    RegionalPrompts,
    can_be_regional,
    denoising,
    regional_prompts,
    settles,
    sigma_split,
    sigmas_of,
)
from vidgen.pipeline.inputs import Conditions, Inputs
from vidgen.pipeline.loader import DTYPES, ModelLoader
from vidgen.pipeline.policy import Policy
from vidgen.pipeline.types import NO_LORAS, Contexts, Loras, Plan
from vidgen.weights.folder import ModelFolder

if TYPE_CHECKING:
    from vidgen.core.shapes import Tiles
    from vidgen.diffusion.cache import StepCaches
    from vidgen.pipeline.parallel.devices import Devices
    from vidgen.pipeline.types import Setup

log = logging.getLogger(__name__)

REMEMBERED = 32
"""Number of latest texts, or batches of texts, whose encodings an opened model keeps."""


class OpenedModel:
    """A model's networks on a device; options of `loading` that are None are chosen to fit.

    Raises:
        ModelError: files are damaged, or the weights don't fit the memory.
    """

    def __init__(
        self, folder: ModelFolder, device: torch.device, loading: Loading,
        policy: Policy | None = None, devices: Devices | None = None,
    ) -> None:
        from vidgen.pipeline.setups import first_setup

        self.folder, self.device, self.policy, self.devices = folder, device, policy, devices
        self.loading, self.quantize = loading, loading.quantize
        self.vae_config: VAEConfig = folder.components["vae"].config
        self.dit_config: DiTConfig = folder.components["transformer"].config
        self.tokenizer = PromptTokenizer(folder.tokenizer, self.dit_config.text_len)
        if devices is not None:
            devices.open(folder, loading.quantize)
        self._open(first_setup(folder, device, loading))
        self.loader.check()
        if self.offload == "none":  # report damaged files now
            for role in folder.components:
                with self.loader.use(role):
                    pass

    def _open(self, setup: Setup) -> None:
        self.dtype, self.offload = setup.dtype, setup.offload
        self.loader = ModelLoader(self.folder, self.device, DTYPES[setup.dtype], setup.offload,
                                  self.quantize,
                                  None if self.devices is None else self.devices.mesh)
        self._encoded: dict[tuple[str, ...], tuple[Tensor, Tensor]] = {}

    def adopt(self, setup: Setup) -> None:
        """Switch to another setup; free the networks loaded for the old one."""
        if (setup.dtype, setup.offload) != (self.dtype, self.offload):
            self.loader.close()
            self._open(setup)

    def close(self) -> None:
        """Free the networks and other devices; the model can't be used afterwards."""
        self.loader.close()
        if self.devices is not None:
            self.devices.close()

    def plan(self, request: Request, inputs: Inputs) -> Plan:
        """Return the request's plan; raise InputError if the model doesn't support it."""
        from vidgen.pipeline.plan import make_plan

        devices = 1 if self.devices is None else self.devices.size
        plan = make_plan(request, self.folder, inputs, self.tokenizer, devices)
        for text in (plan.prompt, plan.negative):
            for remark in self.tokenizer.remarks(text, dict(plan.word_normalisation)):
                log.warning("%s", remark)
        return plan

    def encode_video(
        self, video: Tensor, tiles: Tiles | None = None, passes: int = 1, rate: int = 1
    ) -> Tensor:
        """See `codec.encode_pixels`."""
        return codec.encode_pixels(self.loader, video, tiles, passes, rate)

    def encode_first(
        self, picture: Tensor, num_steps: int, tiles: Tiles | None = None, passes: int = 1
    ) -> Tensor:
        """Encode a first frame [B, 3, 1, H, W] in [-1, 1] to normalised latents [B, C, 1, h, w].

        `refine_first` refines them in `num_steps`, except with tiles.
        """
        if num_steps and tiles is None:
            return codec.refine_first(self.loader, picture, self.encode_video(picture), num_steps)
        if num_steps:
            log.warning("refine has no effect on a first frame encoded in tiles; leave it out, or "
                        "give --tiles none")
        return self.encode_video(picture, tiles, passes)

    @torch.no_grad()
    def decode_video(
        self, latents: Tensor, start: int = 0, tiles: Tiles | None = None, rate: int = 1
    ) -> Iterator[Tensor]:
        """Decode normalised latents [B, C, F, h, w] from frame `start` on; yield [B, 3, n, H, W].

        The frames depend neither on `start` nor on the number of devices.
        """
        t = self.vae_config.strides.t // rate
        decode = codec.decode_latents if self.devices is None else self.devices.decode
        made = decode(self.loader, latents, codec.latent_of(start, t), tiles=tiles, rate=rate)
        return self._with_attention(codec.from_frame(made, start, t))

    def _with_attention(self, made: Iterator[Tensor]) -> Iterator[Tensor]:
        """Advance an iterator under the attention back end that the model was loaded with."""
        while True:
            with attention_by(self.loading.attention):
                if (next_one := next(made, None)) is None:
                    return
            yield next_one

    @torch.no_grad()
    def describe(self, pictures: Sequence[Any]) -> Tensor:
        """Return image features [1, S, D] of one picture, or of two if the model reads two."""
        count = 1 if self.dit_config.image_positions is None else 2
        with self.loader.use("image_encoder") as encoder:
            features = [encode_image(encoder, picture, self.folder.image_processor, self.device)
                        for picture in pictures[:count]]
        return torch.cat(features, dim=1)

    def encode_prompt(self, plan: Plan, loras: Loras = NO_LORAS) -> list[tuple[Tensor, Tensor]]:
        """Return (context [1, S, D], lengths [1]) of the prompt and, if guided, the negative."""
        prompts = [plan.prompt] if plan.guidance.is_off else [plan.prompt, plan.negative]
        texts = [normalise_words(prompt, dict(plan.word_normalisation)) for prompt in prompts]
        with ExitStack() as stack:
            if loras.tokens or any((text,) not in self._encoded for text in texts):
                stack.enter_context(self.loader.use("text_encoder"))  # once for both
            return [self.encode_texts([text], loras.tokens) for text in texts]

    def encode_texts(
        self, texts: Sequence[str], learned: Mapping[str, Tensor] = NOTHING
    ) -> tuple[Tensor, Tensor]:
        """Return (context [B, S, D] on the device, zero after each length, lengths [B] int64).

        The latest results are cached, except with `learned` embeddings [D] of tokens.
        """
        known, key = self._encoded, tuple(texts)
        if key in known and not learned:
            return known[key]
        with self.loader.use("text_encoder") as encoder:
            made = TextEncoder(encoder, self.tokenizer).encode(texts, learned)
        if not learned:
            known[key] = made
            if len(known) > REMEMBERED:
                del known[next(iter(known))]
        return made

    def regional_prompts(
        self, plan: Plan, state: LatentState, read: Sequence[str], loras: Loras = NO_LORAS
    ) -> RegionalPrompts | None:
        """Return the regional prompts of the things that a state's normalised prompts name.

        None where they name too few, or frames of the state are known.
        """
        if plan.regional_prompts == 0 or not can_be_regional(state):
            return None
        config, encode = self.folder.components["verifier"].config, self.encode_texts
        return regional_prompts(config, read, plan.regional_prompts,
                                partial(encode, learned=loras.tokens))

    @torch.no_grad()
    def prepare(self, plan: Plan, request: Request, inputs: Inputs) -> LatentState:
        """Draw the seed's noise and write every condition of the request into a state.

        The request's own noise raises InputError if it has another shape.
        """
        noise = draw_noise(plan.seed, plan.latents) if request.latents is None else request.latents
        if tuple(noise.shape) != plan.latents.dims:
            raise InputError(f"latents are {list(noise.shape)}; this clip needs "
                             f"{list(plan.latents.dims)}")
        state = new_state(noise.float().to(self.device))
        describe = None if self.dit_config.image_dim is None else self.describe
        conditions = Conditions(
            plan, request, inputs,
            partial(self.encode_video, tiles=plan.tiles, passes=plan.encode_passes),
            partial(self.encode_first, num_steps=plan.refine_steps, tiles=plan.tiles,
                    passes=plan.encode_passes),
            describe, self.folder.conditioning, self.vae_config.strides, self.dit_config.patch_size,
        )
        sigmas = sigmas_of(plan, request.scheduler)
        return conditions.write(state, float(sigmas[0]),
                                settles=settles(plan, sigmas, self.folder))

    @torch.no_grad()
    def sample(
        self, plan: Plan, state: LatentState, contexts: Contexts, on_step: OnStep | None = None,
        scheduler: Any = None, loras: Loras = NO_LORAS, resume: SamplerState | None = None, *,
        remember: bool = True, regional: RegionalPrompts | None = None,
        sigmas: Tensor | None = None, caches: StepCaches | None = None,
    ) -> Tensor:
        """Sample clean latents [1, C, F, h, w], float32, with our sampler or a diffusers scheduler.

        With sound in the state the result is packed; see `LatentState.unpack`. With temporal
        upsampling it has the higher rate. `resume` is the saved state of an interrupted run; with
        `remember` those passed to `on_step` include the step cache's memory. `sigmas` are the noise
        levels of a part of the run; None: all of it. `caches` None: those of the plan.
        """
        from vidgen.diffusion.cache import carrying, make_caches
        from vidgen.diffusion.temporal_upsampling import sample_upsampled

        if sigmas is None:
            contexts = contexts[:1] if plan.guidance.is_off else contexts
            has_given = plan.strength == 1 and bool(state.has_given.all())
            plan = replace(plan, guidance=plan.guidance.of_clip(has_given=has_given))
            sigmas = sigmas_of(plan, scheduler)
            if plan.temporal_upsampling > 1:
                run = partial(OpenedModel.sample, self, plan, contexts=contexts,
                              scheduler=scheduler, loras=loras, remember=remember,
                              regional=regional)
                return sample_upsampled(run, state, sigmas, sigma_split(plan, sigmas, self.folder),
                                        plan.temporal_upsampling, self.vae_config.strides.t,
                                        on_step=on_step, resume=resume)
        devices, caches = self.devices, caches or make_caches(plan.cache, sigmas, plan.guidance)
        if caches is not None and resume is not None and resume.cache:
            caches.restore(resume.cache)
        if caches is not None and on_step is not None and remember:
            on_step = carrying(caches.state if devices is None else devices.remembered, on_step)
        level = float(sigmas[resume.step if resume else 0])
        assert devices is None or regional is None, "devices share no regional prompts"
        model = devices.denoising if devices else partial(denoising, regional=regional)
        with model(self.loader, plan, state, contexts, loras, level, caches) as denoise:
            if scheduler is None:
                latents = sample(plan.sampler, denoise, state.begin(), sigmas, fresh=state.fresh,
                                 on_step=on_step, project=state.project, resume=resume)
            else:
                latents = sample_with_scheduler(
                    denoise, state.begin(), scheduler, plan.num_steps, strength=plan.strength,
                    on_step=on_step, project=state.project, resume=resume)
        return latents if state.sound is not None else latents[:, :, state.num_references :]
