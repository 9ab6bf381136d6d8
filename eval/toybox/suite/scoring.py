"""Clips of `python -m eval.toybox` to scores, one row a clip.

A row has `right` (what it got right), `answers` (what was seen instead), figures under their own
names (`summary.NUMBERS`), and what figures of all clips together need.

Axes: B clips, T frames, H W pixel rows and columns, N samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from eval.toybox.metrics.bounces import bounce_times
from eval.toybox.metrics.drift import LOOKS, Windows, measure_drift
from eval.toybox.metrics.identity import identity_over_time, mean_answer
from eval.toybox.metrics.paths import fit_path, path_of
from eval.toybox.metrics.physics import measure_fall
from eval.toybox.metrics.shape import drawings_of, shape_fit, stranger
from eval.toybox.metrics.tint import shows_tints
from eval.toybox.metrics.tracking import sightings
from eval.toybox.quality import psnr
from eval.toybox.suite.items import SOURCES, Item
from eval.toybox.suite.judging import answers, grade
from eval.toybox.suite.listening import grade_sound
from train.toybox.world.cues import SAMPLE_RATE
from vidgen.media.cells import psnr as frame_psnr
from vidgen.media.cells import ssim
from vidgen.media.onsets import find_onsets
from vidgen.pipeline.codec import to_frames

if TYPE_CHECKING:
    from eval.toybox.judge import Judge
    from eval.toybox.sound_judge import SoundJudge
    from eval.toybox.suite.clips import Made
    from train.toybox.world.scenes import Scene

Row = dict[str, Any]
TRACKED = ("text", "held_out", "image")  # whose one sprite is followed from frame to frame
TINTED = (*TRACKED, "two")  # in which some sprites have another colour


class Scorer:
    """Scores clips.

    Args:
        judge: of pictures.
        ear: of sound, or None: voices and ambience are then left out.
        windows: how long clips are chained.
        fps: frames a second.
        device: where the judges compute.
    """

    def __init__(
        self, judge: Judge, ear: SoundJudge | None, windows: Windows, fps: float,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.judge, self.ear, self.windows, self.fps = judge, ear, windows, fps
        self.device = device

    def score(self, source: str, items: Sequence[Item], made: Made) -> list[Row]:
        """A row for each clip."""
        material, way = SOURCES[source]
        scenes = [item.scene for item in items]
        if material == "extend":
            return [self._drifted(clip[None], scene)
                    for clip, scene in zip(made.video, scenes, strict=True)]  # fmt: skip
        if material == "sound":
            assert made.sound is not None
            return self._heard(made.video, made.sound, scenes)
        rows = self._judged(made.video, scenes)
        if material in TINTED:
            self._see_tints(rows, made.video, scenes)
        if material in TRACKED:
            self._track(rows, made.video, scenes)
        if material == "image":
            self._see_ends(rows, made, scenes, way)
        elif way == "vae":
            self._compare(rows, made)
        return rows

    def _judged(self, video: Tensor, scenes: Sequence[Scene]) -> list[Row]:
        verdicts = self.judge.verdicts(video.to(self.device))
        return [{"right": grade(verdict, scene), "answers": answers(verdict)}
                for scene, verdict in zip(scenes, verdicts, strict=True)]  # fmt: skip

    def _see_tints(self, rows: Sequence[Row], video: Tensor, scenes: Sequence[Scene]) -> None:
        """Add whether sprites that were given another colour have it."""
        for row, clip, scene in zip(rows, video, scenes, strict=True):
            right = shows_tints(clip.cpu(), scene)
            if right is not None:
                row["right"]["tint"] = right

    def _track(self, rows: Sequence[Row], video: Tensor, scenes: Sequence[Scene]) -> None:
        """Add the sprite's path, its identity over time, its shape, and of a bounce its fall."""
        seen = sightings(self.judge, video.to(self.device))
        size = (video.shape[3], video.shape[4], self.fps)
        sprites = self.judge.config.sprites
        for row, sighting, scene, clip in zip(rows, seen, scenes, video, strict=True):
            (actor,) = scene.actors
            fit = fit_path(sighting, scene, *size)
            row["right"]["path"] = fit.path == path_of(actor.motion)
            row["answers"]["path"] = fit.path or "unseen"
            row.update(identity_over_time(sighting))
            row.update(path_off=fit.off, shows=mean_answer(sighting, sprites))
            for name, drawn in (("shape", scene), ("stranger_shape", stranger(scene))):
                row[name] = shape_fit(clip.cpu(), drawings_of(drawn, *clip.shape[1:]))
            if actor.motion == "bounces":
                fall = measure_fall(self.judge, clip.to(self.device), scene, self.fps)
                row["right"]["lands"] = fall.arcs > 0
                row.update(fall_off=fall.residual, gravity_spread=fall.spread)

    def _see_ends(
        self, rows: Sequence[Row], made: Made, scenes: Sequence[Scene], way: str
    ) -> None:
        """Add the sprite of the first and the last frame, the first jump, the first's likeness."""
        video, named = made.video, {"first": slice(0, 1), "last": slice(-1, None)}
        for end, frames in named.items():
            verdicts = self.judge.verdicts(video[:, :, frames].to(self.device))
            for row, verdict, scene in zip(rows, verdicts, scenes, strict=True):
                row["right"][f"{end}_sprite"] = verdict.shows([a.sprite for a in scene.actors])
                row["answers"][f"{end}_sprite"] = verdict.sprite
        for row, jump in zip(rows, first_jump(video), strict=True):
            row["jump"] = jump
        if way == "render":
            return
        assert made.shown is not None
        for row, clip, given in zip(rows, video, made.shown.video, strict=True):
            one, other = (to_frames(part[:, :1])[0].numpy() for part in (clip, given))
            row.update(first_psnr=frame_psnr(one, other), first_ssim=ssim(one, other))

    def _compare(self, rows: Sequence[Row], made: Made) -> None:
        """Add how near the VAE's pictures are to what went in."""
        assert made.shown is not None
        mask = made.shown.masks.amax(1, keepdim=True)
        whole = psnr(made.video, made.shown.video).tolist()
        inside = psnr(made.video, made.shown.video, mask).tolist()
        for row, ratio, ratio_inside in zip(rows, whole, inside, strict=True):
            row.update(psnr=ratio, mask_psnr=ratio_inside)

    def _drifted(self, video: Tensor, scene: Scene) -> Row:
        figures = measure_drift(video, self.windows, scene, self.judge)
        right = {"same_sprite": figures["same"], "last_sprite": figures["right"]}
        drifts = {f"{name}_drift": abs(figures[name]) for name in LOOKS}
        return {"right": right, "answers": {}, **drifts, "joins": figures["joins"]}

    def _heard(self, video: Tensor, sound: Tensor, scenes: Sequence[Scene]) -> list[Row]:
        seen = bounce_times(self.judge, video.to(self.device), self.fps)
        onsets = find_onsets(sound, SAMPLE_RATE)
        rows: list[Row] = [
            {"right": {}, "answers": {}, "seen_s": s.tolist(), "heard_s": h.tolist(),
             "duration_s": (video.shape[2] - 1) / self.fps}
            for s, h in zip(seen, onsets, strict=True)
        ]  # fmt: skip
        if self.ear is not None:
            verdicts = self.ear.verdicts(sound.to(self.device))
            for row, heard, scene in zip(rows, verdicts, scenes, strict=True):
                row["right"] = grade_sound(heard, scene)
                row["answers"] = {"voice": heard.voice, "ambience": heard.ambience}
        return rows


def first_jump(video: Tensor) -> list[float]:
    """How much the first step of each clip [B, 3, T, H, W] exceeds its usual step.

    |f1 - f0| / median over k >= 1 of |f(k+1) - f(k)|, each a mean over pixels. A first frame that
    was given and not taken up shows as a jump.
    """
    steps = video.float().diff(dim=2).abs().mean((1, 3, 4))
    usual = steps[:, 1:].median(dim=1).values.clamp(min=1e-6)
    return [float(ratio) for ratio in steps[:, 0] / usual]
