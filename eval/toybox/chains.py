"""Clips made of windows, each way of chaining them, and what workers that measure them do.

Axes: B clips, C latent channels, F latent frames, T H W frames, pixel rows and columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from eval.toybox.generation import read_prompts, sampled, text_contexts
from eval.toybox.judge import Judge, embedded_judge
from eval.toybox.metrics.drift import Windows, looks, measure_drift
from train.toybox.world.render import render
from train.toybox.world.scenes import Scene
from vidgen.core.errors import InputError
from vidgen.core.protocols import OnEvent
from vidgen.core.request import Request
from vidgen.diffusion.state import LatentState
from vidgen.diffusion.temporal_upsampling import LatentRate
from vidgen.pipeline.codec import to_frames
from vidgen.pipeline.engine import Engine, load
from vidgen.pipeline.inputs import Inputs
from vidgen.pipeline.tail import TAIL_FRAMES, Beginning, colours_of, no_beginning, window_size
from vidgen.pipeline.types import Plan
from vidgen.pipeline.windows import WindowedClip

WAYS = ("pixels", "latents", "held", "anchored")
TRUTH = "truth"


@dataclass(frozen=True)
class ChainSettings:
    """How clips are chained.

    Attributes:
        model: name or folder, of toybox's kind.
        windows: of a clip.
        start: "text", the first window is made from the prompt, or "render".
        steps: of denoising; None: the model's.
        overlap: latent frames that windows share.
        hold: colour hold of the ways that have one.
        dtype: of the computation; None: the device's best.
    """

    model: str
    windows: int
    start: str
    steps: int | None
    overlap: int
    hold: float
    dtype: str | None


def windows_of(engine: Engine, settings: ChainSettings) -> Windows:
    """Where the windows of a model's clips begin and end."""
    strides = engine.vae_config.strides
    size = window_size(engine.folder)
    return Windows(size, settings.overlap, settings.windows, strides.t)


class Chain:
    """Makes one seed's clip in each way.

    Args:
        engine: that makes it.
        settings: how.
        seed: of the noise.
        scene: what the prompt says.
        prompt: of all windows.
    """

    def __init__(
        self, engine: Engine, settings: ChainSettings, seed: int, scene: Scene, prompt: str
    ) -> None:
        self.engine, self.settings, self.scene = engine, settings, scene
        self.windows = windows_of(engine, settings)
        self.request = Request.of(prompt, {
            "seed": seed, "steps": settings.steps, "frames": self.windows.num_frames,
            "settings": {"overlap": settings.overlap},
        })  # fmt: skip
        self.plan = engine.plan(self.request, Inputs())
        self.read = read_prompts(engine, [prompt])
        self.contexts = text_contexts(engine, self.plan, self.read)

    @cached_property
    def first(self) -> Tensor:
        """Latents [1, C, F, h, w] of the first window."""
        if self.settings.start == "render":
            return self._encode(self._truth(self.windows.length))
        span = replace(self.plan.latents, num_frames=self.windows.size)
        plan = replace(self.plan, latents=span, num_frames=self.windows.length)
        return self._sample(plan, self.engine.prepare(plan, self.request, Inputs())).cpu()

    def make(self, way: str) -> Tensor:
        """The whole clip [1, 3, T, H, W] in [-1, 1] on the CPU, by one of `WAYS` or `TRUTH`."""
        if way == TRUTH:
            return self._truth(self.plan.num_frames)
        if way == "pixels":
            return self._by_pixels()
        hold = 0.0 if way == "latents" else self.settings.hold
        request = self._with(colour_hold=hold, anchor=way == "anchored")
        long = WindowedClip(self.engine, self.plan, request, Inputs(), no_beginning(self.plan))
        return self._decode(self._latents(long, self.first))

    def _latents(self, clip: WindowedClip, done: Tensor | None = None) -> Tensor:
        for plan, state in clip.states(done):
            clip.add(state, self._sample(plan, state))
        return clip.latents

    def _with(self, **settings: float) -> Request:
        return self.request.replace(settings={**self.request.settings, **settings})

    def _sample(self, plan: Plan, state: LatentState) -> Tensor:
        return sampled(self.engine, plan, state, self.read, self.contexts)

    def _by_pixels(self) -> Tensor:
        """Chain as most programs do: the last frames, as a file holds them, are encoded again."""
        video = self._decode(self.first)
        request = self._with(colour_hold=0.0, anchor=False)
        size, t = self.windows.size, self.windows.stride_t
        while video.shape[2] < self.plan.num_frames:
            count = 1 + (min(TAIL_FRAMES, size) - 1) * t
            ending = (((video[:, :, -count:] + 1) * 127.5).round() / 127.5) - 1
            latents = self._encode(ending)
            shown = video.shape[2]
            begun = Beginning(
                latents, shown, 1 + (shown - 1) // t, colours=colours_of(latents),
                hand_over="pixels", rate=LatentRate(self.plan.temporal_upsampling),
            )
            stop = shown + (size - self.settings.overlap) * t
            long = WindowedClip(
                self.engine, replace(self.plan, kept_frames=stop), request, Inputs(), begun
            )
            video = torch.cat([video, self._decode(self._latents(long))[:, :, count:]], dim=2)
        return video

    def _encode(self, video: Tensor) -> Tensor:
        """Latents at the rate that clips are drawn at, on the CPU."""
        return self.engine.encode_video(video, rate=self.plan.temporal_upsampling).cpu()

    def _decode(self, latents: Tensor) -> Tensor:
        parts = self.engine.decode_video(latents, rate=self.plan.temporal_upsampling)
        return torch.cat([part.float().clamp(-1, 1).cpu() for part in parts], dim=2)

    def _truth(self, num_frames: int) -> Tensor:
        """The prompt's scene, rendered."""
        size = self.plan.height, self.plan.width
        return render([self.scene], num_frames, *size, fps=float(self.plan.fps)).video.cpu()


@dataclass(frozen=True)
class ChainJob:
    """One clip to be made and measured.

    Attributes:
        seed: of the noise.
        scene: what the prompt says.
        prompt: of all windows.
        way: one of `WAYS`, or `TRUTH`.
        shown: whether its frames around the joins are wanted.
    """

    seed: int
    scene: Scene
    prompt: str
    way: str
    shown: bool = False


class ChainWork:
    """Makes and measures chained clips; each worker opens model and judge once.

    Args:
        settings: how clips are chained.
        sha256: that the model's files and the judge's must have, wherever a worker runs.
    """

    def __init__(self, settings: ChainSettings, sha256: tuple[str, str] | None = None) -> None:
        self.settings, self._sha256 = settings, sha256
        self._chain: tuple[int, Chain] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """What is opened isn't sent."""
        return ChainWork, (self.settings, self._sha256)

    @cached_property
    def engine(self) -> Engine:
        """The model.

        Raises:
            InputError: it is of another family, or it or the judge is another one than the
                scheduler's.
        """
        engine = load(self.settings.model, dtype=self.settings.dtype)
        if not isinstance(engine, Engine):
            raise InputError(f"{self.settings.model} is of a family whose windows this doesn't "
                             "make; give a folder of toybox's kind")
        if self._sha256 not in (None, _hashes(engine)):
            raise InputError(f"model {self.settings.model} or the judge is another one here than "
                             "where the command was given; copy them again")
        return engine

    def settled(self) -> ChainWork:
        """The same for other workers, which are to have what this one has opened."""
        settings = replace(self.settings, dtype=self.engine.dtype)
        work = ChainWork(settings, _hashes(self.engine))
        work.engine = self.engine
        return work

    @cached_property
    def judge(self) -> Judge:
        """The embedded one."""
        return embedded_judge().load(self.engine.device)

    def __call__(self, job: ChainJob, _tell: OnEvent) -> tuple[Mapping[str, Any], list[Any]]:
        """Make and measure one clip.

        Returns:
            What `measure_drift` tells, and under `curves` the looks by frame; the frames
            [H, W, 3], uint8, of the clip's start, behind each join and at its end, if `shown`.
        """
        chain = self._chain_of(job)
        video = chain.make(job.way)
        figures = measure_drift(video, chain.windows, chain.scene, self.judge)
        curves = {name: [round(v, 4) for v in told.tolist()] for name, told in looks(video).items()}
        at = [0, *(join + 1 for join in chain.windows.joins), video.shape[2] - 1]
        frames = [*to_frames(video[0][:, at]).numpy()] if job.shown else []
        return {**figures, "curves": curves}, frames

    def _chain_of(self, job: ChainJob) -> Chain:
        """All ways of a seed share its first window, where one worker makes them."""
        if self._chain is None or self._chain[0] != job.seed:
            chain = Chain(self.engine, self.settings, job.seed, job.scene, job.prompt)
            self._chain = job.seed, chain
        return self._chain[1]


def _hashes(engine: Engine) -> tuple[str, str]:
    return engine.folder.content_hash, embedded_judge().sha256
