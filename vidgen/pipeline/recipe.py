"""The recipe: everything that determines a clip, as JSON data in its file."""

from __future__ import annotations

import json
from dataclasses import asdict
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidgen import __version__
from vidgen.core.request import DEFAULTS, Request
from vidgen.core.runtime import fingerprint
from vidgen.core.store import address_of
from vidgen.ops import native
from vidgen.ops.attention import asked_backend, used_backend
from vidgen.pipeline.denoise import hashes_of
from vidgen.pipeline.inputs import Inputs, read_inputs
from vidgen.pipeline.loader import DTYPES
from vidgen.pipeline.recorded import recorded_marks
from vidgen.pipeline.types import NO_LORAS, Loras, Opened, Plan
from vidgen.weights.folder import DiffusersFolder, ModelFolder, embedded_folder
from vidgen.weights.layouts import open_model
from vidgen.weights.lora import parse_option

if TYPE_CHECKING:
    from vidgen.pipeline.diffusers_backend.plan import DiffusersPlan
    from vidgen.pipeline.model import OpenedModel

RECIPE_VERSION = 1
_ELSEWHERE = {"prompt", "image", "last_image", "frame", "reference", "mask", "video", "prefix",
              "control", "latents", "lora", "audio"}  # fmt: skip


def make_recipe(
    engine: OpenedModel, plan: Plan, request: Request, inputs: Inputs, loras: Loras = NO_LORAS
) -> dict[str, Any]:
    """Return the recipe of a clip made by vidgen's own networks."""
    recipe = _common(engine, plan, request, inputs, loras)
    recipe["attention"] = used_backend("auto", engine.device, DTYPES[engine.dtype])
    if engine.device.type == "cpu":
        recipe["kernels"] = "compiled" if native.why_not() is None else "none"
    recipe["quantize"] = engine.quantize
    if engine.devices is not None:
        recipe["devices"] = engine.devices.facts(guided=not plan.guidance.is_off)
    return recipe


def make_diffusers_recipe(
    engine: Opened, plan: DiffusersPlan, request: Request, inputs: Inputs
) -> dict[str, Any]:
    """Return the recipe of a clip made by a diffusers pipeline."""
    assert isinstance(engine.folder, DiffusersFolder)
    recipe = _common(engine, plan, request, inputs, NO_LORAS)
    recipe["model"]["class"] = engine.folder.class_name
    return recipe | {name: version(name) for name in ("diffusers", "transformers")}


def _common(
    engine: Opened, plan: Plan | DiffusersPlan, request: Request, inputs: Inputs, loras: Loras
) -> dict[str, Any]:
    folder, scheduler = engine.folder, dict(getattr(request.scheduler, "config", {}))
    return {
        "format_version": RECIPE_VERSION, "vidgen": __version__,
        "model": {"name": folder.name, "source": _source(folder), "sha256": folder.content_hash},
        "request": asked_options(request), "plan": plan_facts(plan),
        "scheduler": json.loads(json.dumps(scheduler, default=lambda v: v.tolist())) or None,
        "frame_times_s": [float(seconds) for seconds, _ in request.frame],
        "inputs": inputs.records, "loras": list(loras.records),
        "dtype": engine.dtype, "offload": engine.offload, "device": engine.device.type,
        "machine": fingerprint(),
        **recorded_marks(inputs.ending.recipe if inputs.ending else None),
    }


def plan_facts(plan: Plan | DiffusersPlan) -> dict[str, Any]:
    """Return a recipe's entry `plan`."""
    return asdict(plan) | {"fps": str(plan.fps)}


def identity(request: Request, **loading: Any) -> str:
    """Return the address of one clip of a given seed: a hash of everything that determines it.

    `loading` holds the engine's loading options, with the model's content hash as `model`.
    """
    facts = {
        "vidgen": __version__, "loading": loading,
        "prompt": request.prompt, "request": asked_options(request),
        "frame_times_s": [float(seconds) for seconds, _ in request.frame],
        "inputs": [[r["option"], r["sha256"]] for r in read_inputs(request).records],
        "loras": [[hashes_of(choice.path), choice.weight, choice.expert]
                  for choice in map(parse_option, request.lora)],
    }
    if asked_backend() != "auto":
        facts["attention"] = asked_backend()
    for option in ("first_frame_model", "audio_model"):
        if (model := getattr(request, option)) is not None:
            facts[option] = open_model(model).content_hash
    return address_of(facts)


def _source(folder: ModelFolder | DiffusersFolder) -> str:
    """Return the name that opens a model again: hub id, embedded model's name, or path."""
    if folder.given is not None:
        return folder.given
    is_embedded = folder.path == embedded_folder(folder.name)
    return folder.name if is_embedded else str(folder.path.resolve())


def asked_options(request: Request) -> dict[str, Any]:
    """Return the options that differ from their defaults, without files and prompt."""
    given = {name: getattr(request, name) for name in Request.model_fields
             if name not in _ELSEWHERE}
    if request.audio_file is None:
        given["audio"] = request.audio
    if request.audio_model is not None and Path(request.audio_model).is_dir():
        given["audio_model"] = str(Path(request.audio_model).resolve())
    return {
        name: str(value) if isinstance(value, Fraction) else value for name, value in given.items()
        if value != DEFAULTS[name] and not (name == "sampler" and request.scheduler is not None)
    }
