"""A diffusers pipeline's result for a clip, and its place in the clip's journal.

Between two steps such a pipeline holds state of its own, which can't be read or set from outside;
so a journal keeps only its result, and denoising that was killed starts again.

Axes: B batch, C latent channels, F latent frames, h w latent rows and columns, T frames, H W pixel
rows and columns, N samples of sound.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vidgen.media.types import Frames, Samples
from vidgen.pipeline.diffusers_backend.decode import Decode
from vidgen.pipeline.diffusers_backend.plan import Abilities
from vidgen.pipeline.journal.job import MADE, as_array
from vidgen.pipeline.journal.journal import Journal

_ASKED = ("size", "frames", "seconds")
"""Options that determine size and length."""
_SETTLED = ("width", "height", "num_frames", "kept_frames")
"""Entries of a plan that are known only after the pipeline has run."""


@dataclass(frozen=True)
class Made:
    """A pipeline's result for one clip."""

    num_frames: int  # that it shows
    decodings: Sequence[Decode] = ()  # deferred, in order; empty if that was impossible
    cut: int = 0  # frames that it leaves out before those it shows
    frames: Frames | None = None  # uint8 [T, H, W, 3] if decoding couldn't be deferred
    sound: Samples | None = None  # float32 [N, channels] of the same pipeline
    sound_rate: int = 48_000  # samples per second

    @classmethod
    def of(
        cls, able: Abilities, output: Any, decodings: Sequence[Decode] = (), cut: int = 0
    ) -> Made:
        """Make it from a pipeline's output and the deferred decodings."""
        shown = output[0] if able.is_image else output[0][0]
        sound, rate = _sound(able.pipe, output)
        return cls(len(shown), decodings, cut, None if decodings else _pixels(shown), sound, rate)

    @property
    def latents(self) -> torch.Tensor | None:
        """Undecoded latents, [B, C, F, h, w] or pictures [T, C, h, w]; None if decoded."""
        return torch.cat([each.latents for each in self.decodings]) if self.decodings else None


def keep_made(journal: Journal, made: Made) -> None:
    """Save a pipeline's result; if it can't be serialised the journal ends with a warning."""
    if not journal.keeps:
        return
    arrays: dict[str, Any] = {}
    try:
        decodings = [_packed([d.latents, d.arguments, d.options], arrays) for d in made.decodings]
    except TypeError as error:
        journal.give_up(error)
        return
    given = {"frames": made.frames, "sound": made.sound}
    arrays |= {name: array for name, array in given.items() if array is not None}
    facts = {"num_frames": made.num_frames, "cut": made.cut, "sound_rate": made.sound_rate,
             "decodings": decodings, "finished": True}
    journal.keep_arrays(MADE, arrays, facts)


def kept_made(journal: Journal) -> Made | None:
    """Return the result of `keep_made`, or None; raise InputError if damaged."""
    kept = journal.kept_arrays(MADE)
    if kept is None:
        return None
    arrays, facts = kept
    decodings = []
    for each in facts["decodings"]:
        latents, arguments, options = _unpacked(each, arrays)
        decodings.append(Decode(latents, tuple(arguments), options))
    return Made(facts["num_frames"], decodings, facts["cut"], arrays.get("frames"),
                arrays.get("sound"), facts["sound_rate"])


def as_settled(recipe: dict[str, Any], earlier: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a recipe with the size and length of an `earlier` one of the same wishes, if any."""
    if earlier is None or not isinstance(plan := earlier.get("plan"), dict):
        return recipe
    wishes = [[each.get("request", {}).get(name) for name in _ASKED] for each in (recipe, earlier)]
    if json.loads(json.dumps(wishes[0])) != wishes[1]:
        return recipe
    known = {name: plan[name] for name in _SETTLED if plan.get(name) is not None}
    return recipe | {"plan": recipe["plan"] | known}


def _packed(value: Any, arrays: dict[str, Any]) -> Any:
    """Return a VAE's argument as JSON data, its tensors among the arrays; raise TypeError."""
    if value is None or isinstance(value, bool | int | float | str):
        return {"plain": value}
    if isinstance(value, list | tuple):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_packed(each, arrays) for each in value]}
    if isinstance(value, dict):
        return {"dict": {name: _packed(each, arrays) for name, each in value.items()}}
    is_generator = isinstance(value, torch.Generator)
    if not (is_generator or isinstance(value, torch.Tensor)):
        raise TypeError(f"decoding takes a {type(value).__name__}, which can't be written down")
    tensor = value.get_state() if is_generator else value
    name = f"decoding.{len(arrays)}"
    arrays[name] = as_array(tensor)
    kind = "generator" if is_generator else str(tensor.dtype).removeprefix("torch.")
    return {"tensor": name, "kind": kind, "device": str(value.device)}


def _unpacked(data: Mapping[str, Any], arrays: Mapping[str, Any]) -> Any:
    if "plain" in data:
        return data["plain"]
    if "dict" in data:
        return {name: _unpacked(each, arrays) for name, each in data["dict"].items()}
    if "tensor" not in data:
        kind, items = next(iter(data.items()))
        values = [_unpacked(each, arrays) for each in items]
        return tuple(values) if kind == "tuple" else values
    tensor = torch.from_numpy(arrays[data["tensor"]])
    if data["kind"] != "generator":
        return tensor.to(data["device"], getattr(torch, data["kind"]))
    generator = torch.Generator(data["device"])
    generator.set_state(tensor.to(torch.uint8))
    return generator


def _pixels(frames: Any) -> Frames:
    """Convert pictures in [0, 1], array [T, H, W, 3], to uint8."""
    scaled = np.asarray(frames, dtype=np.float32).clip(0, 1) * 255
    return scaled.round().astype(np.uint8)


def _sound(pipe: Any, output: Any) -> tuple[Samples | None, int]:
    """Return the sound in the output, float32 [N, channels], and its rate."""
    waves = getattr(output, "audio", None)
    if waves is None:
        return None, 48_000
    config = getattr(getattr(pipe, "vocoder", None), "config", {})
    names = ("output_sampling_rate", "sampling_rate", "sample_rate")
    rate = int(next((config[name] for name in names if config.get(name)), 48_000))
    wave = torch.as_tensor(waves)[0].float().cpu().clamp(-1, 1)
    wave = wave[None] if wave.ndim == 1 else wave
    return wave.T.contiguous().numpy(), rate
