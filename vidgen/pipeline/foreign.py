"""Other families (LTX-Video, HunyuanVideo, CogVideoX, ...) behind our own request and clip.

One adapter over the pipelines of diffusers, led by the signature of their call, so that a family
nobody has heard of mostly works:

    read the pictures -> settle the request -> call the pipeline -> decode when frames are wanted
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image

from vidgen.core.errors import InputError
from vidgen.core.request import Request
from vidgen.core.runtime import megabytes
from vidgen.media.clip import Clip
from vidgen.media.encode import Frames, Samples
from vidgen.media.label import with_label
from vidgen.media.provenance import stamped
from vidgen.media.read import fit
from vidgen.media.write import ClipInfo
from vidgen.pipeline.foreign_decode import Decode, peak_bytes, stream_decode
from vidgen.pipeline.foreign_pipe import ForeignPipe, lent
from vidgen.pipeline.foreign_plan import (
    Abilities,
    ForeignPlan,
    make_foreign_plan,
    make_scheduler,
    settle,
)
from vidgen.pipeline.inputs import Inputs, read_inputs, video_frames
from vidgen.pipeline.parts import DTYPES
from vidgen.pipeline.policy import Policy, enforce
from vidgen.pipeline.recipe import make_recipe
from vidgen.pipeline.soundtrack import Soundtrack, make_soundtrack
from vidgen.pipeline.video import Progress, to_frames
from vidgen.weights.folder import ForeignFolder

log = logging.getLogger(__name__)


class ForeignEngine:
    """Another family's model, ready to generate.

    Args:
        folder: with the name of its pipeline's class.
        device: where it computes.
        dtype: "fp32", "bf16" or "fp16".
        offload: "none" keeps all of it on the device, "stage" one component and "block" one layer
            at a time; on the CPU all three are the same.
        loader: class of diffusers that loads the folder, instead of the one the folder names.
        policy: refuses prompts.

    Raises:
        ModelError: a class that this diffusers doesn't have, or files missing or damaged.
    """

    def __init__(
        self, folder: ForeignFolder, device: torch.device, dtype: str, offload: str = "none",
        *, loader: Any = None, policy: Policy | None = None,
    ) -> None:
        self.folder, self.device, self.dtype, self.offload = folder, device, dtype, offload
        self.policy = policy
        self.pipe = ForeignPipe(folder, device, DTYPES[dtype], offload, loader)

    def generate(
        self,
        prompt: str | Request,
        /,
        *,
        on_event: Callable[[Progress], None] | None = None,
        **options: Any,
    ) -> Clip | list[Clip]:
        """Make a clip, or a list of them where `count` is over 1; see `Engine.generate`.

        Raises:
            InputError: what this family can't honour, with what it can.
        """
        request = prompt if isinstance(prompt, Request) else Request.of(prompt, options)
        enforce(self.policy, request)
        tell = on_event or (lambda _progress: None)
        request, inputs = self._read(request)
        shown = (option for option in ("video", "image") if getattr(request, option) is not None)
        pipe = self.pipe.taking(next(shown, None))
        able = Abilities(pipe)
        scheduler = make_scheduler(pipe.scheduler, request)
        first = make_foreign_plan(request, inputs, able, scheduler)
        self._warn_of_peak(first)
        def heard(done: int, total: int, **told: int) -> None:
            tell(Progress("sound", done, total, **told))

        clips, track = [], None
        if first.kept_frames is not None:  # else its length shows only when it is made
            track = self._soundtrack(request, first.kept_frames, first.fps, able)
        for index in range(request.count):
            plan = replace(first, seed=first.seed + index)
            told = {"clip": index + 1, "num_clips": request.count}

            def on_step(done: int, total: int, told: dict[str, int] = told) -> None:
                tell(Progress("sample", done, total, **told))

            tell(Progress("prompt", 0, 1, **told))
            arguments = self._arguments(plan, request, inputs, able)
            with lent(pipe, able, plan, scheduler, on_step):
                output, noted, cut = self.pipe.call(pipe, plan, arguments)
            clip = self._clip(plan, request, inputs, able, output, noted, cut)
            clips.append(self._with_sound(clip, plan, request, able, track, partial(heard, **told)))
        return clips if request.count > 1 else clips[0]

    def _soundtrack(
        self, request: Request, num_frames: int, fps: Fraction, able: Abilities
    ) -> Soundtrack:
        return make_soundtrack(request, num_frames, fps, self, has_sound=able.has_sound)

    def _with_sound(
        self, clip: Clip, plan: ForeignPlan, request: Request, able: Abilities,
        track: Soundtrack | None, tell: Callable[[int, int], None],
    ) -> Clip:
        """A clip with its sound, which the recipe tells of."""
        if track is None or clip.num_frames != plan.kept_frames:
            track = self._soundtrack(request, clip.num_frames, clip.fps, able)
        assert clip.recipe is not None
        clip.info = replace(clip.info, recipe=stamped(clip.recipe | track.facts))
        return track.under(clip, plan.seed, tell)

    def _read(self, request: Request) -> tuple[Request, Inputs]:
        """The request's pictures; a first frame that a model is to draw is drawn here."""
        own = {"model": self.folder.name, "dtype": self.dtype, "offload": self.offload}
        for option, value in own.items():
            asked = getattr(request, option)
            is_own = asked in (None, value) or (option == "model" and self.folder.is_called(asked))
            if not is_own:
                raise InputError(f"this engine was loaded with {option} {value!r}, not "
                                 f"{asked!r}; load another one")
        able = Abilities(self.pipe.own)
        able.refuse(request)
        if request.first_frame_model is None:
            return request, read_inputs(request)
        from vidgen.pipeline.first_frame import draw_first_frame

        seed = secrets.randbelow(2**32) if request.seed is None else request.seed
        width, height = request.size or able.default_size() or (512, 512)
        picture, record = draw_first_frame(
            request.first_frame_model, request.prompt, request.negative, seed, width, height,
            device=self.device, dtype=self.dtype,
        )
        request = replace(request, image=picture, first_frame_model=None, seed=seed)
        inputs = read_inputs(request)
        inputs.records.append(record)
        return request, inputs

    def _warn_of_peak(self, plan: ForeignPlan) -> None:
        if self.pipe.puts_off and plan.width and plan.height and (plan.num_frames or 1) > 1:
            vae = self.pipe.own.vae
            peak = peak_bytes(vae, plan.num_frames or 1, plan.height, plan.width)
            if peak is not None:
                log.warning(
                    "%s has no temporal tiles: %d frames of %dx%d are decoded at once, in about "
                    "%s beside the model", type(vae).__name__, plan.num_frames, plan.width,
                    plan.height, megabytes(peak),
                )

    def _arguments(
        self, plan: ForeignPlan, request: Request, inputs: Inputs, able: Abilities
    ) -> dict[str, Any]:
        """Arguments of the pipeline's call; a parameter left out takes its own default."""

        def picture(pixels: Frames) -> Image.Image:
            if plan.width and plan.height:
                pixels = fit(pixels, plan.height, plan.width, plan.fit)  # type: ignore[arg-type]
            return Image.fromarray(pixels)

        wanted: dict[str, Any] = {
            "prompt": plan.prompt, "negative_prompt": plan.negative,
            "num_inference_steps": plan.num_steps, "guidance_rescale": plan.guidance_rescale,
            "width": plan.width, "height": plan.height, "strength": plan.strength,
            "latents": request.latents, able.guidance: plan.guidance_scale,
            able.length: plan.num_frames,
            able.rate: int(plan.fps) if plan.fps.denominator == 1 else float(plan.fps),
        }
        for option in ("image", "last_image"):
            for pixels in inputs.images.get(option, ()):
                wanted[option] = picture(pixels)
        if request.video is not None:
            assert inputs.video_fps is not None
            assert plan.num_frames is not None
            frames = video_frames(request.video, plan.num_frames, plan.fps, inputs.video_fps)
            wanted["video"] = [picture(frame) for frame in frames]
        given = {
            name: value for name, value in wanted.items()
            if name in able.defaults and value is not None
        }
        # Noise comes from the CPU, as ours does: the same on every device, alone or in a batch.
        given["generator"] = torch.Generator("cpu").manual_seed(plan.seed)
        return given | {"output_type": "np"}

    def _clip(
        self, plan: ForeignPlan, request: Request, inputs: Inputs, able: Abilities, output: Any,
        noted: list[Decode], cut: int,
    ) -> Clip:
        """A lazy clip over the noted decodings, or the frames that the pipeline gave."""
        latents, frames = None, output[0] if able.is_image else output[0][0]
        num_frames, size = len(frames), (frames.shape[2], frames.shape[1])
        if noted:
            latents = torch.cat([part.latents for part in noted])
            size = latents.shape[-1] * able.strides.hw, latents.shape[-2] * able.strides.hw
        plan = settle(plan, *size, num_frames)
        kept = plan.kept_frames or num_frames
        if request.frames is not None and kept < request.frames:
            log.warning("%s gave %d frames of the %d asked for", plan.pipeline, kept,
                        request.frames)

        def chunks() -> Iterator[Frames]:
            if not noted:
                yield _pixels(frames[:kept])
            done = -cut
            for part in noted:
                for video in stream_decode(self.pipe.own.vae, part, self.device):
                    first, last = max(-done, 0), max(kept - done, 0)
                    done += video.shape[2]
                    if first < min(last, video.shape[2]):
                        yield to_frames(video[0, :, first:last]).numpy()

        sound, rate = _sound(self.pipe.own, output, float(kept / plan.fps))
        info = ClipInfo(
            fps=plan.fps, size=size, num_frames=kept, sound=sound, sound_rate=rate,
            recipe=make_recipe(self, plan, request, inputs), stride_t=able.strides.t,
        )
        source = with_label(chunks, size, plan.fps) if request.label == "visible" else chunks
        return Clip(source, info, latents)


def _pixels(frames: Any) -> Frames:
    """Pictures in [0, 1], array [T, H, W, 3], as uint8."""
    scaled = np.asarray(frames, dtype=np.float32).clip(0, 1) * 255
    return scaled.round().astype(np.uint8)


def _sound(pipe: Any, output: Any, seconds: float) -> tuple[Samples | None, int]:
    """The sound that came along, cut to the clip: float32 [N, channels], and its rate."""
    waves = getattr(output, "audio", None)
    if waves is None:
        return None, 48_000
    config = getattr(getattr(pipe, "vocoder", None), "config", {})
    names = ("output_sampling_rate", "sampling_rate", "sample_rate")
    rate = int(next((config[name] for name in names if config.get(name)), 48_000))
    wave = torch.as_tensor(waves)[0].float().cpu().clamp(-1, 1)
    wave = wave[None] if wave.ndim == 1 else wave
    return wave.T[: round(seconds * rate)].contiguous().numpy(), rate
