"""Clips of any length: windows of the model's trained length, each begun with the end of the last.

A window gets the clip's last latent frames, known at sigma 0, and generates the next ones; pixels
are encoded only if no latents exist. All windows' latents are decoded in one stream. A file
continues from the latents in its recipe, and its own frames stay unchanged.

Axes: B batch, C latent channels, F latent frames, h w latent rows and columns, T frames, H W pixel
rows and columns.
"""

from __future__ import annotations

import logging
import math
import os
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vidgen.core.errors import InputError
from vidgen.core.request import Request
from vidgen.core.shapes import LatentShape
from vidgen.diffusion import condition
from vidgen.diffusion.flow import add_noise
from vidgen.diffusion.noise import draw_noise
from vidgen.diffusion.state import LatentState, UpsampledKnown
from vidgen.media.clip import Clip
from vidgen.media.join import ContinuedClip
from vidgen.media.read import fit
from vidgen.media.types import ClipInfo, Frames, SegmentStore
from vidgen.pipeline.codec import first_frames, room_for
from vidgen.pipeline.inputs import Inputs, pixels_of, video_frames
from vidgen.pipeline.long import tail
from vidgen.pipeline.long.tail import Beginning
from vidgen.pipeline.settings import settled_value
from vidgen.weights.family import models_with

if TYPE_CHECKING:
    from vidgen.pipeline.model import OpenedModel
    from vidgen.pipeline.types import Plan
    from vidgen.weights.folder import ModelFolder

log = logging.getLogger(__name__)

MAX_SHIFT, MAX_GAIN = 0.15, 1.1
"""Bounds of one window's correction, per latent channel: of its mean in standard deviations, and of
its standard deviation as a factor.
"""

Sample = Callable[["Plan", "LatentState"], Tensor]
"""Denoise a window from its plan and state; return latents [1, C, F, h, w]."""


def long_clip(engine: OpenedModel, plan: Plan, request: Request, inputs: Inputs) -> LongClip | None:
    """Return the windows of a clip that needs several or continues a file; otherwise None.

    Raises:
        InputError: the model, an option or the overlap doesn't permit several windows.
    """
    size = tail.window_size(engine.folder, engine.vae_config.strides)
    if request.prefix is None and plan.latents.num_frames <= size:
        return None
    _check(plan, request, engine.folder)
    if (overlap := request.settings.get("overlap", 0)) >= size:
        raise InputError(f"overlap is {overlap}; a window of this model has {size} latent "
                         f"frames, give {size - 1} or fewer")
    begun = read_beginning(engine, plan, request, inputs)
    return LongClip(engine, plan, request, inputs, begun)


def hold_colours(latents: Tensor, colours: Tensor, strength: float) -> Tensor:
    """Pull a window's new latents [1, C, F, h, w] towards the clip's colours, up to its end.

    Each channel's mean and deviation are matched as in adaptive instance normalisation (Huang &
    Belongie 2017, eq. 8) to `colours` [2, C], within bounds, and not at all at the seam. With
    `strength` 0 nothing changes, 1 matches fully.
    """
    if strength == 0:
        return latents
    mean, deviation = tail.colours_of(latents).to(latents.device)
    wanted_mean, wanted_deviation = colours.to(latents.device)
    limit = MAX_SHIFT * wanted_deviation
    shift = torch.clamp(strength * (wanted_mean - mean), -limit, limit)
    gain = (wanted_deviation / deviation).pow(strength).clamp(1 / MAX_GAIN, MAX_GAIN)
    mean, shift, gain = (values.view(1, -1, 1, 1, 1) for values in (mean, shift, gain))
    ramp = torch.linspace(0, 1, latents.shape[2] + 1, device=latents.device)[1:]
    return torch.lerp(latents, (latents - mean) * gain + mean + shift, ramp.view(1, 1, -1, 1, 1))


@dataclass(frozen=True)
class LongClip:
    """A clip that is generated window by window after its beginning `begun`."""

    engine: OpenedModel
    plan: Plan
    request: Request
    inputs: Inputs
    begun: Beginning

    @cached_property
    def windows(self) -> list[tuple[int, int]]:
        """[start, stop) of each window, in latent frames from the first of `begun`."""
        return tail.windows_after(self.begun, self.plan, self.request, self.engine.folder)

    def sample(
        self, sample: Sample, done: Tensor | None = None,
        keep: Callable[[Tensor], None] | None = None,
        add_sound: Callable[[LatentState, int, int], LatentState] | None = None,
    ) -> Tensor:
        """Return the latents of the beginning and of all windows, [1, C, F, h, w] on the CPU.

        A window depends on the seed, its place and the latents that it continues, never on the
        number of windows; so a longer clip begins as the shorter one did, up to its last window.

        Args:
            sample: denoises one window.
            done: the last argument of `keep` in an earlier run, to resume after it.
            keep: called with all latents so far after each window.
            add_sound: adds a given sound to a window's state, given its first latent frame and
                their number.
        """
        rate = self.begun.rate
        hold = settled_value("colour_hold", self.request, self.engine.folder)
        made = self.begun.latents if done is None else done
        count, upsampled = rate.num_shown(made.shape[2]), rate.num_upsampled
        end = self.windows[-1][1] if self.windows else count
        latents = _room_for(replace(self.plan.latents, num_frames=upsampled(end)))
        latents[:, :, : made.shape[2]] = made
        for start, stop in self.windows:
            if stop <= count:
                continue
            own, state = self._prepare(start, stop, num_known=count - start)
            first = start + self.begun.num_gone
            if count > start:
                state = self._show(state, latents[:, :, : upsampled(count)], start, count)
                if (anchor := self._anchor(latents)) is not None:
                    state = condition.reference(state, anchor.to(state.latents))
            if add_sound is not None:
                state = add_sound(state, first, stop - start)
            picture, _ = state.unpack(sample(own, state))
            new = picture[:, :, upsampled(count) - upsampled(start) :]
            if count:
                new = hold_colours(new, self._colours(latents), hold)
            latents[:, :, upsampled(count) : upsampled(stop)] = new.cpu()
            count = stop
            if keep is not None:
                keep(latents[:, :, : upsampled(count)])
        return latents

    def clip(
        self, latents: Tensor, recipe: dict[str, Any], journal: SegmentStore | None = None
    ) -> Clip:
        """Return a lazy clip of the latents of `sample`; add the last of them to the recipe."""
        plan, begun, t, factor = self.plan, self.begun, self._stride_t, self.begun.rate.factor
        made = begun.rate.num_shown(latents.shape[2]) - begun.num_given
        total = begun.num_reached + made * t if begun.num_latents else plan.num_frames
        recipe["tail"] = tail.make_tail(latents, begun.num_latents + made, total - plan.kept_frames,
                                        self._colours(latents), self._anchor(latents), factor)
        if not begun.num_latents:
            return self.engine.decode(plan, latents, recipe, journal)
        recipe["hand_over"] = begun.hand_over
        info = ClipInfo(fps=plan.fps, size=(plan.width, plan.height), num_frames=plan.kept_frames,
                        recipe=recipe, stride_t=max(t // factor, 1))
        skipped = 1 + (begun.latents.shape[2] - 1) * t // factor - begun.frames_ahead

        def added(start: int) -> Iterator[Frames]:
            videos = self.engine.decode_video(
                latents, skipped + start, plan.tiles, plan.oversampling)
            return first_frames(videos, plan.kept_frames - begun.num_frames - start)

        def whole(start: int = 0) -> Iterator[Frames]:
            earlier = earlier_frames(plan, self.request, self.inputs)
            yield from islice(earlier, start, None)
            yield from added(max(0, start - begun.num_frames))

        ending = self.inputs.ending
        assert ending is not None
        path = Path(os.fspath(self.request.prefix))  # type: ignore[arg-type]
        if (ending.fps, ending.size) == (plan.fps, info.size) and ending.is_plain:
            return ContinuedClip(path, begun.num_frames, added, info, journal)
        log.warning("%s: its frames are encoded again, for another size, rate or timing",
                    self.request.prefix)
        return Clip(whole, info, journal=journal)

    @property
    def _stride_t(self) -> int:
        return self.engine.vae_config.strides.t

    def _colours(self, latents: Tensor) -> Tensor:
        if self.begun.colours is not None:
            return self.begun.colours
        return tail.colours_of(latents[:, :, : self.begun.rate.num_upsampled(self.windows[0][1])])

    def _anchor(self, latents: Tensor) -> Tensor | None:
        """Return the clip's first latent frame, [1, C, 1, h, w], if later windows get it."""
        if not tail.keeps_to_start(self.engine.folder, self.request):
            return None
        return self.begun.anchor if self.begun.num_latents else latents[:, :, :1]

    def _prepare(self, start: int, stop: int, num_known: int) -> tuple[Plan, LatentState]:
        plan, request, begun, t = self.plan, self.request, self.begun, self._stride_t
        images = self.inputs.images
        start, stop = start + begun.num_gone, stop + begun.num_gone
        first_frame = start * t
        if begun.num_latents:
            first_frame += begun.num_reached - 1 - (begun.num_latents - 1) * t
        shape = replace(plan.latents, num_frames=stop - start)
        own = replace(plan, latents=shape, num_frames=1 + (stop - start - 1) * t,
                      kept_frames=plan.kept_frames - first_frame)
        noise = (draw_noise(plan.seed, shape, first_frame=start) if request.latents is None
                 else request.latents[:, :, start:stop])
        new_from = 1 + (num_known - 1) * t if num_known else 0
        mine: dict[str, list[Any]] = {"reference": images.get("reference", []), "frame": []}
        if num_known == 0:
            mine["image"] = images.get("image", [])
        if new_from < own.kept_frames <= own.num_frames:
            mine["last_image"] = images.get("last_image", [])
        stills = []
        for (seconds, still), picture in zip(request.frame, images.get("frame", ()), strict=True):
            moment = round(seconds * plan.fps)
            condition.require_frame(moment, plan.num_frames)
            if new_from <= moment - first_frame < own.num_frames:
                stills.append((float((moment - first_frame) / plan.fps), still))
                mine["frame"].append(picture)
        window_request = request.replace(latents=noise, prefix=None, frame=tuple(stills))
        return own, self.engine.prepare(own, window_request, Inputs(images=mine))

    def _show(self, state: LatentState, made: Tensor, start: int, count: int) -> LatentState:
        """Write the clip's latent frames `start` to `count` into the state of a window at `start`.

        VACE reads known frames as a separate clip: its first latent frame is encoded alone, the
        others are the latents themselves. A model trained on noisy known frames gets them with the
        noise of their places; otherwise faults grow from window to window.
        """
        engine, rate, t = self.engine, self.begun.rate, self._stride_t
        num_known, first, factor = count - start, start + self.begun.num_gone, rate.factor
        known, level = made[:, :, rate.num_upsampled(start) :], engine.folder.defaults.history_noise
        known = known.to(state.latents)
        past = made[:, :, -max(tail.TAIL_FRAMES, (num_known + 1) * factor) :]
        if factor > 1:
            shown = known
            if level:
                begin = self.plan.rate.num_upsampled(first)
                shown = add_noise(known, self._noise(known, "history finer", begin), level)
            mask = torch.zeros_like(known[:, :1], dtype=torch.bool)
            state = replace(state, known_upsampled=UpsampledKnown(
                shown, mask, rate.after(start).alone))
            past = at_rate(engine, past, factor, 1, self.plan)
            known = past[:, :, -num_known:].to(state.latents)
        if engine.folder.conditioning != "control":
            state = condition.prefix(state, known)
            if not level:
                return state
            sigma = torch.tensor([level]).to(state.latents)
            return condition.noise_known(state, sigma, self._noise(state.latents, "history", first))
        video = _decoded(engine, past, self.plan)[:, :, -(1 + (num_known - 1) * t) :]
        num_frames = 1 + (state.latents.shape[2] - state.num_references - 1) * t
        grey = video.new_zeros(1, 3, num_frames - video.shape[2], *video.shape[3:])
        kept = engine.encode_video(torch.cat([video, grey], dim=2), self.plan.tiles)
        kept[:, :, 1:num_known] = known[:, :, 1:]
        return condition.keep_beginning(state, kept, num_known)

    def _noise(self, like: Tensor, stream: str, first: int) -> Tensor:
        shape = replace(self.plan.latents, num_frames=like.shape[2])
        return draw_noise(self.plan.seed, shape, stream=stream, first_frame=first).to(like)


def _check(plan: Plan, request: Request, folder: ModelFolder) -> None:
    longest = folder.defaults.max_frames
    if "extend" not in folder.tasks:
        raise InputError(f"{plan.num_frames} frames are more than {folder.name!r} makes at once; "
                         f"give --frames {longest} or fewer, or a model that continues from its "
                         f"own latents: toybox, {', '.join(models_with('extend'))}")
    for option in ("video", "mask", "control"):
        if request.has(option) and request.has("prefix"):
            raise InputError(f"{option} can't be combined with prefix, the clip to continue; leave "
                             "one of them out")
        if request.has(option):
            raise InputError(f"{option} works within one window of the model, at most {longest} "
                             f"frames; this clip has {plan.num_frames}: shorten it or leave "
                             f"{option} out")


def _room_for(shape: LatentShape) -> Tensor:
    """Return zeros [1, C, F, h, w] on the CPU; in an unnamed file if they are large."""
    _, C, F, h, w = shape.dims
    flat = room_for(4 * F * C * h * w).view(torch.float32)
    return flat.view(F, C, h, w).transpose(0, 1)[None]


def read_beginning(engine: OpenedModel, plan: Plan, request: Request, inputs: Inputs) -> Beginning:
    """Return the beginning of a clip: latents of its recipe, else its last frames, encoded.

    Raises:
        InputError: the recipe's latents are damaged, or hold frames that are also given as stills.
    """
    if request.prefix is None:
        return tail.no_beginning(plan)
    assert inputs.ending is not None
    begun = tail.tail_of(inputs.ending, engine.folder, plan)
    if isinstance(begun, str):
        log.warning("%s %s; its last frames are encoded, which costs some sharpness",
                    request.prefix, begun)
        begun = _encode_end(engine, plan, request, inputs)
    elif begun.frames_ahead:
        _check_ahead(begun, plan, request)
    if begun.rate.factor == plan.oversampling:
        return begun
    latents = at_rate(engine, begun.latents, begun.rate.factor, plan.oversampling, plan)
    return replace(begun, latents=latents, rate=plan.rate)


def _check_ahead(begun: Beginning, plan: Plan, request: Request) -> None:
    """Refuse stills in frames that exist as latents; warn if no new latents are generated."""
    reached, ahead = begun.num_reached, begun.frames_ahead
    given = {f"frame {seconds}": round(seconds * plan.fps) for seconds, _ in request.frame}
    if request.last_image is not None:
        given["last_image"] = plan.kept_frames - 1
    for name, moment in given.items():
        if moment < reached:
            raise InputError(f"{name} falls on one of the {ahead} frames after the clip's end that "
                             "its latents already hold; give a later time, or more seconds")
    if plan.kept_frames <= reached:
        log.warning("%s: its latents hold %d frames after its end; all new frames come from these, "
                    "so the prompt has no effect", request.prefix, ahead)


def _encode_end(engine: OpenedModel, plan: Plan, request: Request, inputs: Inputs) -> Beginning:
    t, total = engine.vae_config.strides.t, 0
    ending: deque[Frames] = deque(maxlen=1 + (tail.TAIL_FRAMES - 1) * t)
    for frame in earlier_frames(plan, request, inputs):
        ending.append(frame[0])
        total += 1
    count = 1 + (len(ending) - 1) // t * t
    video = pixels_of(list(ending)[-count:], plan.width, plan.height, plan.fit)
    latents = engine.encode_video(video, plan.tiles, plan.encode_passes, plan.oversampling).cpu()
    return Beginning(latents, total, 1 + math.ceil((total - 1) / t),
                     colours=tail.colours_of(latents), hand_over="pixels", anchor=latents[:, :, :1],
                     rate=plan.rate)


def earlier_frames(plan: Plan, request: Request, inputs: Inputs) -> Iterator[Frames]:
    """Yield the continued clip's frames uint8 [1, H, W, 3] at the plan's size and rate."""
    assert request.prefix is not None
    assert inputs.ending is not None
    count = inputs.ending.frames_at(plan.fps)
    for frame in video_frames(request.prefix, count, plan.fps):
        yield fit(frame, plan.height, plan.width, plan.fit)[None]


def at_rate(engine: OpenedModel, latents: Tensor, old: int, new: int, plan: Plan) -> Tensor:
    """Convert the end of latents [B, C, F, h, w] from temporal upsampling `old` to `new`.

    The frames are decoded and encoded again, since no network converts latents directly; the clip
    itself keeps the generated latents. The first result is a single frame; earlier frames that
    don't fill a latent frame are dropped.
    """
    shown, t = _decoded(engine, latents, plan, old), engine.vae_config.strides.t
    whole = 1 + (shown.shape[2] - 1) // t * t
    return engine.encode_video(shown[:, :, -whole:], plan.tiles, plan.encode_passes, new).cpu()


def _decoded(engine: OpenedModel, latents: Tensor, plan: Plan, rate: int = 1) -> Tensor:
    """Return video [B, 3, T, H, W] in [-1, 1] of latents, on the CPU."""
    decoded = engine.decode_video(latents, tiles=plan.tiles, rate=rate)
    return torch.cat([part.float().clamp(-1, 1).cpu() for part in decoded], dim=2)
