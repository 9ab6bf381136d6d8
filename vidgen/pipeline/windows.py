"""Sample a clip in windows of the model's trained length; a short clip is one window.

Each window gets the clip's last latent frames, known at sigma 0, and generates the next ones;
pixels are encoded only if no latents exist. All windows' latents are decoded in one stream. A file
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
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vidgen.core.errors import InputError
from vidgen.core.request import Request
from vidgen.core.shapes import LatentShape
from vidgen.diffusion import condition
from vidgen.diffusion.flow import add_noise, draw_noise
from vidgen.diffusion.state import LatentState, UpsampledKnown
from vidgen.media.clip import Clip
from vidgen.media.join import ContinuedClip
from vidgen.media.read import fit
from vidgen.media.types import ClipInfo, Frames, SegmentStore
from vidgen.pipeline import tail
from vidgen.pipeline.codec import first_frames, room_for
from vidgen.pipeline.inputs import Inputs, pixels_of, video_frames
from vidgen.pipeline.settings import settled_value
from vidgen.pipeline.tail import Beginning
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


class WindowedClip:
    """A clip that is sampled window by window, after the end of the file that it continues, if any.

    Attributes:
        begun: that end, from the latents of the file's recipe, else its last frames, encoded.
        windows: [start, stop) of each, in latent frames from the first of `begun`.
        latents: those of `begun` and of the windows sampled so far, [1, C, F, h, w] on the CPU.

    Raises:
        InputError: the model, an option or the overlap doesn't permit several windows; the
            latents in the file's recipe are damaged, or hold frames that are also given as stills.
    """

    def __init__(
        self, engine: OpenedModel, plan: Plan, request: Request, inputs: Inputs,
        begun: Beginning | None = None,
    ) -> None:
        self.engine, self.plan, self.request, self.inputs = engine, plan, request, inputs
        self._stride_t = engine.vae_config.strides.t
        size = tail.window_size(engine.folder)
        if request.prefix is not None or plan.latents.num_frames > size:
            _check(plan, request, engine.folder, size)
        self.latents, self._count = torch.zeros(0), 0  # latent frames so far
        self.begun = begun or self._beginning()  # given: latents of any other origin
        self.windows = tail.windows_after(self.begun, plan, request, engine.folder)

    def states(
        self, done: Tensor | None = None,
        add_sound: Callable[[LatentState, int, int], LatentState] | None = None,
    ) -> Iterator[tuple[Plan, LatentState]]:
        """Yield the plan and the state of each window; `add` its result before the next one.

        A window depends on the seed, its place and the latents that it continues, never on the
        number of windows; so a longer clip begins as the shorter one did, up to its last window.

        Args:
            done: the last result of `add` in an earlier run, to resume after it.
            add_sound: adds a given sound to a window's state, given its first latent frame and
                their number.
        """
        begun, upsampled = self.begun, self.begun.rate.num_upsampled
        made = begun.latents if done is None else done
        self._count = begun.rate.num_shown(made.shape[2])
        end = self.windows[-1][1] if self.windows else self._count
        self.latents = _room_for(replace(self.plan.latents, num_frames=upsampled(end)))
        self.latents[:, :, : made.shape[2]] = made
        for start, stop in self.windows:
            if stop <= (count := self._count):
                continue
            own, state = self._prepare(start, stop, num_known=count - start)
            if count > start:
                state = self._show(state, self.latents[:, :, : upsampled(count)], start, count)
            if add_sound is not None:
                state = add_sound(state, start + begun.num_dropped, stop - start)
            yield own, state

    def add(self, state: LatentState, sampled: Tensor) -> Tensor:
        """Add the samplers' result for the last of `states` to `latents`; return all so far."""
        count, upsampled = self._count, self.begun.rate.num_upsampled
        start, self._count = next(span for span in self.windows if span[1] > count)
        new = state.unpack(sampled)[0][:, :, upsampled(count) - upsampled(start) :]
        if count:
            hold = settled_value("colour_hold", self.request, self.engine.folder)
            new = hold_colours(new, self._colours(self.latents), hold)
        self.latents[:, :, upsampled(count) : upsampled(self._count)] = new.cpu()
        return self.latents[:, :, : upsampled(self._count)]

    def clip(
        self, latents: Tensor, recipe: dict[str, Any], journal: SegmentStore | None = None
    ) -> Clip:
        """Return a lazy clip of all latents; add the last of them to the recipe."""
        plan, begun, engine, t = self.plan, self.begun, self.engine, self._stride_t
        factor = begun.rate.factor
        made = begun.rate.num_shown(latents.shape[2]) - begun.num_given
        total = begun.num_reached + made * t if begun.num_latents else plan.num_frames
        recipe["tail"] = tail.make_tail(
            latents, begun.num_latents + made, total - plan.kept_frames, self._colours(latents),
            self._first(latents) if tail.ANCHOR_TASK in engine.folder.tasks else None, factor)
        info = ClipInfo(fps=plan.fps, size=(plan.width, plan.height), num_frames=plan.kept_frames,
                        recipe=recipe, stride_t=max(t // factor, 1))
        skipped = 1 + (begun.latents.shape[2] - 1) * t // factor - begun.frames_ahead

        def added(start: int = 0) -> Iterator[Frames]:
            begin = start + (skipped if begun.num_latents else 0)
            videos = engine.decode_video(latents, begin, plan.tiles, plan.temporal_upsampling)
            return first_frames(videos, plan.kept_frames - begun.num_frames - start)

        def whole(start: int = 0) -> Iterator[Frames]:
            if start < begun.num_frames:
                yield from (frame[None] for frame in islice(self._earlier_frames(), start, None))
            yield from added(max(0, start - begun.num_frames))

        ending, path = self.inputs.ending, self.request.prefix
        if ending is None or path is None:
            return Clip(added, info, latents, journal)
        recipe["hand_over"] = begun.hand_over
        if (ending.fps, ending.size) == (plan.fps, info.size) and ending.is_plain:
            return ContinuedClip(whole, added, Path(os.fspath(path)), begun.num_frames, info,
                                 journal)
        log.warning("%s: its frames are encoded again, for another size, rate or timing", path)
        return Clip(whole, info, journal=journal)

    def _colours(self, latents: Tensor) -> Tensor:
        if self.begun.colours is not None:
            return self.begun.colours
        return tail.colours_of(latents[:, :, : self.begun.rate.num_upsampled(self.windows[0][1])])

    def _first(self, latents: Tensor) -> Tensor | None:
        """Return the clip's first latent frame, [1, C, 1, h, w], if known."""
        return self.begun.anchor if self.begun.num_latents else latents[:, :, :1]

    def _prepare(self, start: int, stop: int, num_known: int) -> tuple[Plan, LatentState]:
        """Return a window's plan, and its state with the conditions that fall into it."""
        plan, request, begun, t = self.plan, self.request, self.begun, self._stride_t
        is_last = (start, stop) == self.windows[-1]
        start, stop = start + begun.num_dropped, stop + begun.num_dropped
        first_frame = start * t
        if begun.num_latents:
            first_frame += begun.num_reached - 1 - (begun.num_latents - 1) * t
        shape = replace(plan.latents, num_frames=stop - start)
        own = replace(plan, latents=shape, num_frames=1 + (stop - start - 1) * t,
                      kept_frames=plan.kept_frames - first_frame)
        noise = (draw_noise(plan.seed, shape, first_frame=start) if request.latents is None
                 else request.latents[:, :, start : None if is_last else stop])
        new = range(1 + (num_known - 1) * t if num_known else 0, own.num_frames)
        stills = []
        images = dict(self.inputs.images, frame=[])
        for (seconds, still), picture in zip(
            request.frame, self.inputs.images.get("frame", ()), strict=True
        ):
            moment = round(seconds * plan.fps) - first_frame
            if moment in new:
                stills.append((float(moment / plan.fps), still))
                images["frame"].append(picture)
        if num_known:
            images["image"] = []
        if own.kept_frames - 1 not in new:
            images["last_image"] = []
        window_request = request.replace(latents=noise, prefix=None, frame=tuple(stills))
        return own, self.engine.prepare(own, window_request, Inputs(images=images))

    def _show(self, state: LatentState, made: Tensor, start: int, count: int) -> LatentState:
        """Write the clip's latent frames `start` to `count` into the state of a window at `start`.

        VACE reads known frames as a separate clip: its first latent frame is encoded alone, the
        others are the latents themselves. A model trained on noisy known frames gets them with the
        noise of their places; otherwise faults grow from window to window.
        """
        engine, rate, t = self.engine, self.begun.rate, self._stride_t
        num_known, first, factor = count - start, start + self.begun.num_dropped, rate.factor
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
            past = self._at_rate(past, factor, 1)
            known = past[:, :, -num_known:].to(state.latents)
        if engine.folder.conditioning == "control":
            video = self._decoded(past)[:, :, -(1 + (num_known - 1) * t) :]
            num_frames = 1 + (state.latents.shape[2] - state.num_references - 1) * t
            grey = video.new_zeros(1, 3, num_frames - video.shape[2], *video.shape[3:])
            kept = engine.encode_video(torch.cat([video, grey], dim=2), self.plan.tiles)
            kept[:, :, 1:num_known] = known[:, :, 1:]
            state = condition.keep_beginning(state, kept, num_known)
        else:
            state = condition.prefix(state, known)
            if level:
                sigma = torch.tensor([level]).to(state.latents)
                noise = self._noise(state.latents, "history", first)
                state = condition.noise_known(state, sigma, noise)
        anchor = self._first(made)
        if anchor is None or not tail.keeps_to_start(engine.folder, self.request):
            return state
        return condition.reference(state, anchor.to(state.latents))

    def _noise(self, like: Tensor, stream: str, first: int) -> Tensor:
        shape = replace(self.plan.latents, num_frames=like.shape[2])
        return draw_noise(self.plan.seed, shape, stream=stream, first_frame=first).to(like)

    def _beginning(self) -> Beginning:
        plan, request, folder = self.plan, self.request, self.engine.folder
        if self.inputs.ending is None:
            return tail.no_beginning(plan)
        begun = tail.tail_of(self.inputs.ending, folder, plan)
        if isinstance(begun, str):
            log.warning("%s %s; its last frames are encoded, which costs some sharpness",
                        request.prefix, begun)
            return self._encode_end()
        reached, ahead = begun.num_reached, begun.frames_ahead
        given = {f"frame {seconds}": round(seconds * plan.fps) for seconds, _ in request.frame}
        if request.last_image is not None:
            given["last_image"] = plan.kept_frames - 1
        for name, moment in given.items():
            if moment < reached:
                raise InputError(f"{name} falls on one of the {ahead} frames after the clip's end "
                                 "that its latents already hold; give a later time, or more "
                                 "seconds")
        if plan.kept_frames <= reached:
            log.warning("%s: its latents hold %d frames after its end; all new frames come from "
                        "these, so the prompt has no effect", request.prefix, ahead)
        if begun.rate.factor == plan.temporal_upsampling:
            return begun
        latents = self._at_rate(begun.latents, begun.rate.factor, plan.temporal_upsampling)
        return replace(begun, latents=latents, rate=plan.rate)

    def _encode_end(self) -> Beginning:
        plan, t, total = self.plan, self._stride_t, 0
        ending: deque[Frames] = deque(maxlen=1 + (tail.TAIL_FRAMES - 1) * t)
        for frame in self._earlier_frames():
            ending.append(frame)
            total += 1
        count = 1 + (len(ending) - 1) // t * t
        video = pixels_of(list(ending)[-count:], plan.width, plan.height, plan.fit)
        latents = self.engine.encode_video(
            video, plan.tiles, plan.encode_passes, plan.temporal_upsampling).cpu()
        return Beginning(
            latents, total, 1 + math.ceil((total - 1) / t), colours=tail.colours_of(latents),
            hand_over="pixels", anchor=latents[:, :, :1], rate=plan.rate)

    def _earlier_frames(self) -> Iterator[Frames]:
        """Yield the continued clip's frames uint8 [H, W, 3] at the plan's size and rate."""
        plan, ending, path = self.plan, self.inputs.ending, self.request.prefix
        assert ending is not None
        assert path is not None
        for frame in video_frames(path, ending.frames_at(plan.fps), plan.fps):
            yield fit(frame, plan.height, plan.width, plan.fit)

    def _at_rate(self, latents: Tensor, old: int, new: int) -> Tensor:
        """Convert the end of latents [B, C, F, h, w] from temporal upsampling `old` to `new`.

        The frames are decoded and encoded again, since no network converts latents directly; the
        clip itself keeps the generated latents. The first result is a single frame; earlier frames
        that don't fill a latent frame are dropped.
        """
        shown, plan = self._decoded(latents, old), self.plan
        whole = 1 + (shown.shape[2] - 1) // self._stride_t * self._stride_t
        return self.engine.encode_video(
            shown[:, :, -whole:], plan.tiles, plan.encode_passes, new).cpu()

    def _decoded(self, latents: Tensor, rate: int = 1) -> Tensor:
        """Return video [B, 3, T, H, W] in [-1, 1] of latents, on the CPU."""
        decoded = self.engine.decode_video(latents, tiles=self.plan.tiles, rate=rate)
        return torch.cat([part.float().clamp(-1, 1).cpu() for part in decoded], dim=2)


def _check(plan: Plan, request: Request, folder: ModelFolder, size: int) -> None:
    longest = folder.defaults.max_frames
    if "extend" not in folder.tasks:
        raise InputError(f"{plan.num_frames} frames are more than {folder.name!r} makes at once; "
                         f"give --frames {longest} or fewer, or a model that continues from its "
                         f"own latents: toybox, {', '.join(models_with('extend'))}")
    for option in filter(request.has, ("video", "mask", "control")):
        if request.prefix is not None:
            raise InputError(f"{option} can't be combined with prefix, the clip to continue; leave "
                             "one of them out")
        raise InputError(f"{option} works within one window of the model, at most {longest} "
                         f"frames; this clip has {plan.num_frames}: shorten it or leave "
                         f"{option} out")
    if (overlap := request.settings.get("overlap", 0)) >= size:
        raise InputError(f"overlap is {overlap}; a window of this model has {size} latent "
                         f"frames, give {size - 1} or fewer")


def _room_for(shape: LatentShape) -> Tensor:
    """Return zeros [1, C, F, h, w] on the CPU; in an unnamed file if they are large."""
    _, C, F, h, w = shape.dims
    flat = room_for(4 * F * C * h * w).view(torch.float32)
    return flat.view(F, C, h, w).transpose(0, 1)[None]
