"""The pipeline: from a request to a clip, in five verbs.

    encode the prompt -> prepare the latent state -> sample -> decode -> write

A task (a first frame, a mask, a clip to re-imagine) is a condition written into the state by
`prepare`; nothing else knows of it.

Axes: B batch, C latent channels, F latent frames, h w latent rows and columns, T frames, H W
pixel rows and columns.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from vidgen import __version__
from vidgen.core.errors import InputError
from vidgen.core.protocols import Denoise, OnStep, StepInfo
from vidgen.core.request import Request
from vidgen.core.runtime import choose_device, fingerprint
from vidgen.diffusion import condition
from vidgen.diffusion.condition import LatentState, denoise_inputs
from vidgen.diffusion.flow import to_timestep
from vidgen.diffusion.guidance import guided
from vidgen.diffusion.noise import draw_noise
from vidgen.diffusion.samplers import SAMPLERS, sample_with_scheduler, scheduler_sigmas
from vidgen.diffusion.schedule import make_sigmas
from vidgen.media.clip import Clip
from vidgen.media.write import ClipInfo
from vidgen.models.dit import DiTConfig, SpacetimeDiT
from vidgen.models.text import PromptTokenizer, TextConfig, TextEncoder, UMT5Encoder
from vidgen.models.vae import CausalVAE, VAEConfig
from vidgen.ops.attention import used_backend
from vidgen.pipeline.inputs import Inputs, pixels_of, read_inputs
from vidgen.pipeline.plan import Plan, make_plan
from vidgen.pipeline.prepare import Encoder, write_conditions
from vidgen.weights.folder import ModelFolder, config_of, open_model, read_config
from vidgen.weights.load import load_module

log = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Progress:
    """What `on_event` is told: `done` of `total` in a stage of clip `clip` of `num_clips`."""

    stage: Literal["prompt", "prepare", "sample"]
    done: int
    total: int
    clip: int = 1
    num_clips: int = 1


def load(model: str = "toybox", *, device: str = "auto", dtype: str | None = None) -> Engine:
    """Open a model and bring it into memory.

    Args:
        model: an embedded model's name, or a model folder.
        device: "auto", "cpu", "cuda", ...
        dtype: "fp32", "bf16" or "fp16"; None: bf16 where the processor has it, else fp32.

    Raises:
        ModelError: no such model, or files that are missing, damaged or don't fit together.
    """
    return Engine(open_model(model), choose_device(device), dtype)


class Engine:
    """A model in memory, ready to generate."""

    def __init__(self, folder: ModelFolder, device: torch.device, dtype: str | None) -> None:
        self.folder, self.device = folder, device
        self.dtype = dtype or _best_dtype(device)
        weights, path = DTYPES[self.dtype], folder.path
        vae = config_of(VAEConfig, path / "vae")
        dit = config_of(DiTConfig, path / "transformer")
        text = TextConfig.from_transformers(read_config(path / "text_encoder"))
        self.vae = load_module(lambda: CausalVAE(vae), path / "vae", weights, device)
        self.dit = load_module(
            lambda: SpacetimeDiT(dit), path / "transformer", weights, device,
            keep_fp32=SpacetimeDiT.fp32_weights,
        )
        encoder = load_module(lambda: UMT5Encoder(text), path / "text_encoder", weights, device)
        tokenizer = PromptTokenizer(path / "tokenizer", self.dit.config.text_len)
        self.text = TextEncoder(encoder, tokenizer)

    def generate(
        self,
        prompt: str | Request,
        /,
        *,
        on_event: Callable[[Progress], None] | None = None,
        **options: Any,
    ) -> Clip | list[Clip]:
        """Make a clip, or a list of them where `count` is over 1.

        Args:
            prompt: what is to be seen, or a whole request.
            on_event: told of progress; raising `Cancelled` stops cleanly between two steps.
            options: fields of `Request`, which are the command line's long options.

        Returns:
            A lazy clip, or a list of them: pixels are decoded while they are saved or asked for.

        Raises:
            InputError: what can't be honoured, with value, limit and remedy.
        """
        request = prompt if isinstance(prompt, Request) else Request.of(prompt, options)
        tell = on_event or (lambda _progress: None)
        inputs = read_inputs(request)
        first = self.plan(request, inputs)
        clips = []
        for index in range(request.count):
            plan = replace(first, seed=first.seed + index)
            told = {"clip": index + 1, "num_clips": request.count}

            def on_step(info: StepInfo, told: dict[str, int] = told) -> None:
                tell(Progress("sample", info.step, info.num_steps, **told))

            tell(Progress("prompt", 0, 1, **told))
            contexts = self.encode_prompt(plan)
            tell(Progress("prepare", 0, 1, **told))
            state = self.prepare(plan, request, inputs)
            latents = self.sample(plan, state, contexts, on_step, request.scheduler)
            clips.append(self.decode(plan, latents, self.recipe(plan, request, inputs)))
        return clips if request.count > 1 else clips[0]

    def plan(self, request: Request, inputs: Inputs) -> Plan:
        """Settle all that the request left open; refuse what this model can't do."""
        for option in ("model", "dtype"):
            asked, own = getattr(request, option), {"model": self.folder.name, "dtype": self.dtype}
            if asked not in (None, own[option], str(self.folder.path)):
                raise InputError(f"this engine was loaded with {option} {own[option]!r}, not "
                                 f"{asked!r}; load another one")
        plan = make_plan(
            request, self.folder.defaults, self.vae.strides, self.vae.config.latent_channels,
            patch=self.dit.config.patch_size, picture_size=inputs.picture_size,
            video_seconds=inputs.video_seconds,
        )
        for name, text in (("prompt", plan.prompt), ("negative", plan.negative)):
            count, limit = self.text.tokenizer.count(text), self.text.tokenizer.max_length
            if count > limit:
                raise InputError(f"the {name} has {count} tokens; this model reads {limit}: "
                                 "shorten it")
            for word, near in self.text.tokenizer.unknown_words(text):
                hint = f"; near it: {', '.join(near)}" if near else ""
                log.warning("the model doesn't know the word %r%s", word, hint)
        return plan

    def encode_prompt(self, plan: Plan) -> list[tuple[Tensor, Tensor]]:
        """(context [1, S, D], lengths [1]) of the prompt and, under guidance, of the negative."""
        prompts = [plan.prompt] if plan.guidance.scale == 1 else [plan.prompt, plan.negative]
        return [self.text.encode([prompt]) for prompt in prompts]

    @torch.no_grad()
    def prepare(self, plan: Plan, request: Request, inputs: Inputs) -> LatentState:
        """Noise of the seed, and every condition of the request written beside it."""
        noise = draw_noise(plan.seed, plan.latents) if request.latents is None else request.latents
        if tuple(noise.shape) != plan.latents.dims:
            raise InputError(f"latents are {list(noise.shape)}; this clip needs "
                             f"{list(plan.latents.dims)}")
        state = condition.new_state(noise.float().to(self.device))
        model = Encoder(
            lambda pictures: self._encode(plan, pictures), self.vae.strides,
            self.dit.config.patch_size,
        )
        start_sigma = float(self.sigmas(plan, request.scheduler)[0])
        return write_conditions(state, plan, request, inputs, model, start_sigma)

    def sigmas(self, plan: Plan, scheduler: Any = None) -> Tensor:
        """The noise levels of a plan, those of diffusers' scheduler of the same name."""
        if scheduler is not None:
            return scheduler_sigmas(scheduler, plan.num_steps, strength=plan.strength)
        lowest = 1e-3
        if plan.sampler == "euler":
            lowest = plan.shift * lowest / (1 + (plan.shift - 1) * lowest)
        return make_sigmas(
            plan.num_steps, plan.shift, strength=plan.strength, sigma_min=lowest,
            reach_min=plan.sampler == "euler",
        )

    @torch.no_grad()
    def sample(
        self,
        plan: Plan,
        state: LatentState,
        contexts: list[tuple[Tensor, Tensor]],
        on_step: OnStep | None = None,
        scheduler: Any = None,
    ) -> Tensor:
        """Clean latents [1, C, F, h, w], float32, by our sampler or a diffusers scheduler."""
        denoise = self._denoiser(plan, state, *contexts[0])
        if len(contexts) > 1:
            other = self._denoiser(plan, state, *contexts[1])
            denoise = guided(denoise, other, plan.guidance, denoise_mask=state.denoise_mask)
        start, told = state.impose(state.latents), {"on_step": on_step, "project": state.impose}
        if scheduler is not None:
            return sample_with_scheduler(
                denoise, start, scheduler, plan.num_steps, strength=plan.strength, **told
            )
        return SAMPLERS[plan.sampler](denoise, start, self.sigmas(plan), **told)

    def decode(self, plan: Plan, latents: Tensor, recipe: dict[str, Any]) -> Clip:
        """A lazy clip whose chunks come out of the VAE while it is written."""
        def chunks() -> Iterator[Any]:
            left = plan.kept_frames
            for video in self.vae.stream_decode(latents.to(self.vae_dtype)):
                frames = to_frames(video[0])[:left]
                left -= len(frames)
                if len(frames):
                    yield frames.numpy()

        info = ClipInfo(
            fps=plan.fps, size=(plan.width, plan.height), num_frames=plan.kept_frames,
            recipe=recipe, stride_t=self.vae.strides.t,
        )
        return Clip(chunks, info, latents)

    def recipe(self, plan: Plan, request: Request, inputs: Inputs) -> dict[str, Any]:
        """All that shapes the clip, as JSON data."""
        settled = asdict(plan)
        settled["fps"] = str(plan.fps)
        return {
            "vidgen": __version__,
            "model": {
                "name": self.folder.name, "sha256": self.folder.content_hash,
                "world_version": self.folder.world_version,
            },
            "plan": settled,
            "scheduler": dict(getattr(request.scheduler, "config", {})) or None,
            "frame_times_s": [float(seconds) for seconds, _ in request.frame],
            "inputs": inputs.records,
            "custom_noise": request.latents is not None,
            "dtype": self.dtype,
            "attention": used_backend(self.dit.attention_backend, self.device, DTYPES[self.dtype]),
            "device": self.device.type,
            "machine": fingerprint(),
        }

    @property
    def vae_dtype(self) -> torch.dtype:
        """Dtype of the VAE's weights."""
        return next(self.vae.parameters()).dtype

    def _denoiser(
        self, plan: Plan, state: LatentState, context: Tensor, lengths: Tensor
    ) -> Denoise:
        whole = plan.sampler in ("unipc", "UniPCMultistepScheduler")  # as diffusers has it

        def denoise(latents: Tensor, sigma: Tensor) -> Tensor:
            seen, levels = denoise_inputs(
                state, sigma, latents, patch=self.dit.config.patch_size
            )
            velocity = self.dit(
                seen, to_timestep(levels, whole=whole), context,
                context_lengths=lengths, extra=state.keys,
            )
            assert isinstance(velocity, Tensor)
            return velocity

        return denoise

    def _encode(self, plan: Plan, pictures: Sequence[Any]) -> Tensor:
        """Pictures uint8 [H, W, 3] as one clip's normalised latents, float32."""
        video = pixels_of(pictures, plan.width, plan.height, plan.fit)
        parts = self.vae.stream_encode([video.to(self.device, self.vae_dtype)])
        return torch.cat(list(parts), dim=2).float()


def to_frames(video: Tensor) -> Tensor:
    """[3, T, H, W] in [-1, 1] as uint8 [T, H, W, 3] on the CPU."""
    scaled = (video.float().clamp(-1, 1) + 1) * 127.5
    return scaled.round().to(torch.uint8).permute(1, 2, 3, 0).cpu()


def _best_dtype(device: torch.device) -> str:
    if device.type == "cuda":
        return "bf16"
    return "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32"
