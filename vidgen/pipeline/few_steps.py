"""Few steps: when one of a model's students denoises instead of the model itself."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from vidgen.core.errors import InputError
from vidgen.core.request import OWN_AUDIO
from vidgen.diffusion.guidance import Guidance
from vidgen.pipeline.settings import asked_about

if TYPE_CHECKING:
    from vidgen.core.request import Request
    from vidgen.pipeline.types import Plan
    from vidgen.weights.folder import ModelFolder, StudentConfig

SAMPLING = ("sampler", "shift", "guidance", "guidance_low", "guidance_interval",
            "guidance_rescale")
"""Options that say how to sample, which a student knows one answer to; settings do so, too."""
NOT_ROLLED = (
    *SAMPLING, "strength", "video", "mask", "last_image", "frame", "reference",
    "prefix", "control", "follow_audio", "latents", "overlap", "colour_hold",
)
"""Options that a clip can't have that is rolled out."""


def with_student(plan: Plan, request: Request, folder: ModelFolder) -> Plan:
    """The plan by the model's student, where it has one for these steps; else as it is.

    A student is taken for the step count that it was taught, when nothing else is asked of
    sampling: no option of `SAMPLING` and no such setting, no negative prompt, no step cache, no
    `strength`, which begins between its noise levels, and no sound to follow. The roller is taken
    where the request asks for it.

    Raises:
        InputError: a roller that isn't there, or what it can't do.
    """
    if request.roll:
        return _rolled(plan, request, folder)
    student = folder.student
    if student is None or request.steps != student.num_steps:
        return plan
    asked = [option for option in SAMPLING if request.has(option)]
    asked += asked_about(request, "sampling")
    if asked or plan.negative != folder.defaults.negative_prompt or request.cache != "none":
        return plan
    if plan.strength < 1 or request.follow_audio:
        return plan
    return _taken(plan, student)


def _rolled(plan: Plan, request: Request, folder: ModelFolder) -> Plan:
    roller = folder.roller
    if roller is None:
        raise InputError(f"model {folder.name!r} has no roller, which roll needs; leave it out, or "
                         "teach it one (docs/lab/training.md)")
    negative = ("negative",) * (plan.negative != folder.defaults.negative_prompt)
    given = [*negative, *(option for option in NOT_ROLLED if request.has(option)),
             *asked_about(request, "sampling", "windows")]
    if given:
        raise InputError(f"{given[0]} doesn't go with roll, by which a clip follows from its "
                         "prompt and first frame; leave one of them out")
    if request.cache != "none":
        raise InputError(f"cache is {request.cache!r}; a roller has no steps to spare, leave it "
                         "out")
    if request.audio == OWN_AUDIO:
        raise InputError("audio is 'generate', but a roller makes no sound; give --audio FILE or "
                         "leave it out")
    if request.steps not in (None, roller.num_steps):
        raise InputError(f"steps is {request.steps}; the roller of {folder.name!r} takes "
                         f"{roller.num_steps}, leave it out")
    return _taken(plan, roller)


def _taken(plan: Plan, student: StudentConfig) -> Plan:
    """The plan with all that a student settles."""
    return replace(
        plan, sampler=student.sampler, num_steps=student.num_steps, guidance=Guidance(),
        student=student,
    )
