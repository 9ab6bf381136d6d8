"""The recipe: all that shapes a clip, as JSON data that travels in its file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from vidgen import __version__
from vidgen.core.request import Request
from vidgen.core.runtime import fingerprint
from vidgen.ops.attention import used_backend
from vidgen.pipeline.experts import NO_LORAS, Loras
from vidgen.pipeline.inputs import Inputs
from vidgen.pipeline.parts import DTYPES
from vidgen.weights.folder import ForeignFolder

if TYPE_CHECKING:
    from vidgen.pipeline.foreign import ForeignEngine
    from vidgen.pipeline.foreign_plan import ForeignPlan
    from vidgen.pipeline.plan import Plan
    from vidgen.pipeline.video import Engine

RECIPE_VERSION = 1
_PICTURES = ("image", "last_image", "frame", "reference", "mask", "video", "prefix", "control")
_DEFAULTS = {each.name: each.default for each in fields(Request)}


def make_recipe(
    engine: Engine | ForeignEngine, plan: Plan | ForeignPlan, request: Request, inputs: Inputs,
    loras: Loras = NO_LORAS,
) -> dict[str, Any]:
    """The recipe of the clip that an engine makes to a plan.

    Args:
        engine: with the model, its device, dtype and offload.
        plan: of this one clip.
        request: that the plan settles.
        inputs: the request's pictures and clips.
        loras: its adapters.
    """
    folder = engine.folder
    recipe: dict[str, Any] = {
        "format_version": RECIPE_VERSION,
        "vidgen": __version__,
        "model": {"name": folder.name, "sha256": folder.content_hash},
        "request": _asked(request),
        "plan": asdict(plan) | {"fps": str(plan.fps)},
        "scheduler": _as_json(getattr(request.scheduler, "config", {})) or None,
        "frame_times_s": [float(seconds) for seconds, _ in request.frame],
        "inputs": inputs.records,
        "loras": list(loras.records),
        "custom_noise": request.latents is not None,
        "dtype": engine.dtype, "offload": engine.offload,
        "device": engine.device.type,
        "machine": fingerprint(),
    }
    if isinstance(folder, ForeignFolder):
        recipe["model"]["class"] = folder.class_name
        return recipe | {name: version(name) for name in ("diffusers", "transformers")}
    recipe["model"]["world_version"] = folder.world_version
    attention = used_backend("auto", engine.device, DTYPES[engine.dtype])
    return recipe | {"quantize": getattr(engine, "quantize", None), "attention": attention}


def _asked(request: Request) -> dict[str, Any]:
    """The options that were given, without pictures, which are among the inputs."""
    plain = (str, int, float, bool)
    given = {f.name: getattr(request, f.name) for f in fields(request) if f.name != "prompt"}
    return {
        name: value for name, value in given.items()
        if name not in _PICTURES and isinstance(value, plain) and value != _DEFAULTS[name]
    }


def _as_json(config: Mapping[str, Any]) -> dict[str, Any]:
    plain = (str, int, float, bool, type(None))
    return {name: value for name, value in dict(config).items() if isinstance(value, plain)}
