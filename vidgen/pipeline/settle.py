"""From a request to its plan with nothing left to choose, the model's own choices included."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from vidgen.core.errors import InputError
from vidgen.core.request import Request
from vidgen.core.values import parse_readings
from vidgen.media.speech import open_voice
from vidgen.models.tokenizer import PromptTokenizer, read_as
from vidgen.pipeline.candidates import with_verifier
from vidgen.pipeline.experts import boundary_of, read_loras
from vidgen.pipeline.few_steps import with_student
from vidgen.pipeline.inputs import Inputs, read_inputs
from vidgen.pipeline.levels import with_oversampling
from vidgen.pipeline.plan import Plan, make_plan
from vidgen.pipeline.rewrite import LanguageModel
from vidgen.pipeline.step_caches import settle_cache
from vidgen.pipeline.tasks import check_tasks
from vidgen.weights.folder import ForeignFolder
from vidgen.weights.layouts import open_model
from vidgen.weights.lora import parse_option

if TYPE_CHECKING:
    from vidgen.weights.folder import ModelFolder

log = logging.getLogger(__name__)


def settle(folder: ModelFolder, request: Request) -> Plan:
    """The plan of a request, made without an engine, perhaps of a model that isn't here.

    Raises:
        InputError: what this model can't do, or inputs and texts that can't be read.
    """
    dit = folder.components["transformer"].config
    check_tasks(request, folder.name, folder.tasks, both=dit.image_positions is not None)
    inputs = Inputs() if request.first_frame_model else read_inputs(request)
    tokenizer = PromptTokenizer(folder.tokenizer, dit.text_len) if folder.files else None
    return settled(request, folder, inputs, tokenizer)


def settled(
    request: Request, folder: ModelFolder, inputs: Inputs, tokenizer: PromptTokenizer | None
) -> Plan:
    """The plan of a request whose files were read; without a tokenizer its texts aren't.

    Raises:
        InputError: what this model can't do; a text that a model of few words can't read whole (one
            of all language cuts it).
    """
    plan = replace(make_plan(request, folder, inputs), cache=settle_cache(request, folder))
    plan = with_oversampling(with_student(plan, request, folder), request, folder)
    plan = with_verifier(plan, request, folder)
    _warn_of_idle_loras(plan, request, folder)
    if tokenizer is None:
        return plan
    texts = {"prompt": plan.prompt, "negative": plan.negative}
    asked = parse_readings(request.readings)
    if asked is None and request.lora:
        asked = {}  # a word that only an adapter knows is no slip
    readings = {word: known for text in texts.values()
                for word, known in tokenizer.readings(text, asked).items()}
    for name, text in texts.items():
        require_short(name, read_as(text, readings), tokenizer)
    return replace(plan, readings=tuple(readings.items()))


def _warn_of_idle_loras(plan: Plan, request: Request, folder: ModelFolder) -> None:
    """Tell which adapters are for a low-noise expert that has no part in this clip."""
    two = "transformer_2" in folder.components
    if two and boundary_of(folder, plan, hears=bool(request.follow_audio)) is None:
        for option in request.lora:
            if parse_option(option).expert == "low":
                log.warning("%s changes nothing in this clip, which the first expert makes alone: "
                            "it is a student's, or follows a sound", option)


def require_short(name: str, text: str, tokenizer: PromptTokenizer) -> None:
    """Refuse a text that a model of few words can't read whole.

    Raises:
        InputError: tells how long it is, and how long it may be.
    """
    count, limit = tokenizer.count(text), tokenizer.max_length
    if count > limit and tokenizer.words:
        raise InputError(f"the {name} has {count} tokens; this model reads {limit}: shorten it")


def require_models(request: Request, folder: ModelFolder) -> None:
    """Refuse adapters and models beside the main one that aren't there or don't fit it.

    Raises:
        InputError: an adapter's file is missing.
        ModelError: a folder that holds no such model, or an adapter of another one.
    """
    read_loras(request.lora, folder)
    if request.expand is not None:
        LanguageModel(request.expand)
    for name in (request.first_frame_model, request.audio_model):
        if name is not None:
            open_model(name)
    if request.say:
        open_voice(request.voice)


def require_own_model(folder: ModelFolder | ForeignFolder) -> ModelFolder:
    """The folder, refused if another program's pipeline runs it: its insides aren't known.

    Raises:
        InputError: names the pipeline.
    """
    if isinstance(folder, ForeignFolder):
        raise InputError(f"what {folder.class_name} takes can't be told beforehand; plan knows the "
                         "embedded model and the Wan family")
    return folder
