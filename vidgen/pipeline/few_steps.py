"""Few steps: when a model's student denoises instead of the model itself."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from vidgen.core.request import NO_AUDIO
from vidgen.diffusion.guidance import Guidance
from vidgen.pipeline.own_sound import TASK

if TYPE_CHECKING:
    from vidgen.core.request import Request
    from vidgen.pipeline.plan import Plan
    from vidgen.weights.folder import ModelFolder

SAMPLING = ("sampler", "shift", "guidance", "guidance_low", "image_guidance", "guidance_interval",
            "guidance_rescale")
"""Options that say how to sample, which a student knows one answer to."""


def with_student(plan: Plan, request: Request, folder: ModelFolder) -> Plan:
    """The plan by the model's student, where it has one for these steps; else as it is.

    A student is taken for the step count that it was taught, when nothing else is asked of
    sampling: no option of `SAMPLING`, no negative prompt, no step cache, no `strength`, which
    begins between its noise levels, and no sound made along, where it knows nothing of it.
    """
    student = folder.student
    if student is None or request.steps != student.num_steps:
        return plan
    asked = any(getattr(request, option) is not None for option in SAMPLING)
    if asked or plan.negative != folder.defaults.negative_prompt or request.cache != "none":
        return plan
    if plan.strength < 1 or (_makes_sound(request, folder) and not student.hears):
        return plan
    return replace(plan, sampler="euler", guidance=Guidance(), student=student)


def _makes_sound(request: Request, folder: ModelFolder) -> bool:
    """Whether sound is denoised beside the picture."""
    if TASK not in folder.tasks:
        return False
    other = request.audio == NO_AUDIO or request.audio_file or request.audio_model
    return not other or bool(request.follow_audio)
