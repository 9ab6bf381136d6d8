"""One generation taken apart: what its seconds and its bytes are both counted from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from vidgen.diffusion.oversampling import Pace
from vidgen.diffusion.sound import sound_span
from vidgen.ops.linear import packs
from vidgen.pipeline.budget.calibration import NOMINAL, Calibration, cached_calibration
from vidgen.pipeline.budget.passes import Encoded, count_passes
from vidgen.pipeline.budget.stages import Setup
from vidgen.pipeline.experts import boundary_of
from vidgen.pipeline.loader import DTYPES, EXPERTS, Parts
from vidgen.pipeline.sound.candidates import drawn_at_once
from vidgen.pipeline.tasks import makes_sound
from vidgen.pipeline.types import Plan
from vidgen.weights.component import fp32_parts
from vidgen.weights.store import Weights

if TYPE_CHECKING:
    from vidgen.core.request import Request
    from vidgen.models.image import ImageConfig
    from vidgen.weights.component import ExpertRole, Role
    from vidgen.weights.folder import ModelFolder

Rates = Mapping[torch.dtype, Calibration]
"""By the dtype that they were measured in."""


class Job:
    """One generation: its networks, the machine's rates, and how many tokens there are of what.

    Args:
        folder: the model.
        plan: of the clip.
        request: whose conditions and count are meant.
        setup: where and how it runs.
        rates: the machine's; where one is missing, what the cache has, else an ordinary machine's.
        suffix: of the output.
    """

    def __init__(
        self, folder: ModelFolder, plan: Plan, request: Request, setup: Setup,
        rates: Rates, suffix: str,
    ) -> None:
        self.folder, self.plan, self.request, self.setup = folder, plan, request, setup
        self.suffix, self.dtype = suffix, DTYPES[setup.dtype]
        # quantised sizes are asked for below; torchao isn't needed to know them
        self.parts = Parts(folder, setup.device, self.dtype, setup.offload)
        self.vae = folder.components["vae"].config
        self.vae_dtype = self.parts.dtype_of("vae")
        self.rates, self.vae_rates = (
            rates.get(dtype) or cached_calibration(setup.device, dtype) or NOMINAL
            for dtype in (self.dtype, self.vae_dtype)
        )
        self.dit = folder.components["transformer"].config
        self.on_cpu = setup.device.type == "cpu"
        self.rows, self.columns = plan.latents.height, plan.latents.width
        self.passes = count_passes(folder, plan, request)

    @property
    def makes_sound(self) -> bool:
        """Whether the model's own sound follows the picture."""
        return makes_sound(self.request, self.folder.tasks) and self.plan.roll is None

    @property
    def image(self) -> ImageConfig | None:
        """Of the image encoder, where the model has one."""
        parts = self.folder.components
        return parts["image_encoder"].config if "image_encoder" in parts else None

    @property
    def experts(self) -> tuple[ExpertRole, ...]:
        """The transformers that denoise the picture."""
        hears = bool(self.request.follow_audio)
        alone = boundary_of(self.folder, self.plan, hears=hears) is None
        return EXPERTS[:1] if alone else EXPERTS

    @property
    def num_refined(self) -> int:
        """First frames that gradients go back to; none in tiles."""
        taken = self.plan.refine_steps and self.setup.tiles is None
        return self.passes.refined if taken else 0

    @property
    def encoded(self) -> list[tuple[Encoded, int]]:
        """Each video or still that the VAE encodes, and in how many passes.

        Refined first frames take one.
        """
        passes, refined = self.plan.encode_passes, self.num_refined
        each = list[tuple[Encoded, int]]()
        for video in self.passes.encoded:
            once = video.frames == 1 and refined > 0
            refined -= once
            each.append((video, 1 if once else passes))
        return each

    @property
    def text_tokens(self) -> int:
        """About how many tokens a prompt has: four bytes each."""
        longest = max(len(text.encode()) for text in (self.plan.prompt, self.plan.negative))
        return min(longest // 4 + 2, self.dit.text_len)

    @property
    def frame_tokens(self) -> int:
        """Tokens of a latent frame."""
        return self.rows * self.columns // self.dit.patch_size**2

    def finer(self, frames: int) -> int:
        """Latent frames that so many of the clip become below the boundary."""
        return Pace(self.plan.oversampling).finer(frames)

    @property
    def tokens(self) -> int:
        """Tokens of the largest window."""
        frames = max(self.passes.windows, default=0)
        followed = self.sound_latents(frames) if frames and self.request.follow_audio else 0
        return max(self.passes.drawn, default=0) * self.frame_tokens + followed

    @property
    def window_sound_latents(self) -> int:
        """Sound latents beside the longest window; none where the clip's own latents reach on."""
        return self.sound_latents(max(self.passes.windows)) if self.passes.windows else 0

    @property
    def sounds_at_once(self) -> int:
        """Takes of its own sound that are made in one batch."""
        return drawn_at_once(self.folder, self.plan.sound_candidates)

    def sound_latents(self, frames: int) -> int:
        """Sound latents beside so many latent frames of the picture."""
        rate = self.folder.components["sound_vae"].config.tokens_per_s
        begin, end, _ = sound_span(0, frames, self.vae.strides.t, self.plan.fps, rate)
        return end - begin

    def size(self, role: Role) -> int:
        """Bytes of a network's weights in memory."""
        quantize = self.setup.quantize or "none"
        return self.parts.needed_bytes(role, offload="stage", quantize=quantize)

    def mapped(self, role: Role) -> bool:
        """Whether a network's weights stay in the file, and come page by page."""
        component = self.folder.components[role]
        dtype = self.parts.dtype_of(role, self.dtype)
        weights = Weights(component.store, dtype, fp32_parts(role, dtype), component.names)
        changed = self.setup.quantize or self.packed(role)
        return self.on_cpu and not changed and weights.stay_mapped

    def packed(self, role: Role) -> bool:
        """Whether a network's weights are laid out anew while it is loaded, see `Parts`."""
        return role in EXPERTS and self.on_cpu and not self.setup.quantize and packs(self.dtype)
