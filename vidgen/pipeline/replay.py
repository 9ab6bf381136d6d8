"""Replay: restore the request, the model and the machine's settings from a recipe.

`compare` then compares the new file with the old one frame by frame.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load

from vidgen.core.errors import InputError, ModelError, nearest
from vidgen.core.request import MAX_DEVICES, OWN_FILE, Loading, Request
from vidgen.core.runtime import sha256_file
from vidgen.media.cells import psnr_of
from vidgen.media.read import PICTURE_SUFFIXES, load_image
from vidgen.media.sound import read_sound
from vidgen.media.video_reader import read_frames
from vidgen.pipeline.denoise import hashes_of
from vidgen.pipeline.inputs import noise_file
from vidgen.pipeline.recipe import RECIPE_VERSION
from vidgen.pipeline.recorded import lora_option, reading, recorded_tiles, settled_options
from vidgen.pipeline.settings import SETTINGS
from vidgen.weights.layouts import open_model

log = logging.getLogger(__name__)

Given: TypeAlias = Sequence[tuple[str, str]]
"""(option or start of a SHA-256, path) pairs: new places of inputs."""
Record: TypeAlias = Mapping[str, Any]
_MIN_HASH = 6
_MANY = ("frame", "reference", "lora", "say")
_REPLACES = {
    # it replaces words of the recorded texts
    "prompt": ("word_normalisation",), "negative": ("word_normalisation",),
    "guidance": ("guidance_low",), "seconds": ("frames",), "frames": ("seconds",),
    "image": ("first_frame_model",), "first_frame_model": ("image",), "audio": ("audio_model",),
    "audio_model": ("audio",),
}
"""Options whose change drops others: those that conflict, and those that follow it."""


def request_from_recipe(
    recipe: Mapping[str, Any], folder: Path, given: Given = (),
    changes: Mapping[str, Any] | None = None,
) -> Request:
    """Return the request of a recipe's clip.

    Args:
        recipe: as `read_recipe` returns it.
        folder: for embedded inputs; it must exist until the clip is made.
        given: new places of inputs.
        changes: options of `Request` that replace the recorded ones. Its `settings` replace only
            the settings that they name; None drops one.

    Raises:
        InputError: inputs missing or changed, named by option and SHA-256; invalid changes; a
            damaged recipe.
    """
    model = (changes or {}).get("model")
    changes = {name: v for name, v in (changes or {}).items() if name in Request.model_fields}
    changed = changes.pop("settings", {})
    replaced = set(changes).union(*(_REPLACES.get(name, ()) for name in changes))
    with reading():
        if (number := recipe["format_version"]) != RECIPE_VERSION:
            raise InputError(f"the recipe has format {number!r}, this vidgen reads "
                             f"{RECIPE_VERSION}; install a newer one")
        options = {**recipe["request"], **{n: recipe["plan"][n] for n in ("prompt", "seed")}}
        options.pop("first_frame_model", None)  # it is one of the inputs
        if model is None or open_model(model).content_hash == recipe["model"]["sha256"]:
            options |= _settled(recipe, options.get("settings", {}))
        options |= restore_inputs(recipe, folder, given, replaced)
        settings = {name: value for name, value in options.pop("settings", {}).items()
                    if name not in SETTINGS or SETTINGS[name].follows not in replaced}
        options = {name: v for name, v in options.items() if name not in replaced} | changes
        return Request.of(options.pop("prompt"), options | {"settings": settings | changed})


def _settled(recipe: Mapping[str, Any], requested: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that the same model needs to make a clip again, without its inputs."""
    options, plan = settled_options(recipe), recipe["plan"]
    if "settings" in options:  # not a pipeline of diffusers, whose length is as requested
        kept, is_whole = plan["kept_frames"], plan["kept_frames"] == plan["num_frames"]
        options["frames"] = kept if is_whole else None
        options["seconds"] = None if is_whole else float(kept / Fraction(plan["fps"]))  # trimmed
        inputs = {record["option"] for record in recipe["inputs"]}
        options["settings"] = {
            name: value for name, value in requested.items()
            if name not in SETTINGS or not SETTINGS[name].recorded
        } | {name: value for name, value in options["settings"].items()
             if not SETTINGS[name].needs or inputs.intersection(SETTINGS[name].needs)}
    if recipe["scheduler"]:
        import diffusers

        options["sampler"] = getattr(diffusers, plan["sampler"]).from_config(recipe["scheduler"])
    return options


def loading_from_recipe(
    recipe: Mapping[str, Any], given: Given = (), changes: Mapping[str, Any] | None = None,
    *, anyway: bool = False,
) -> dict[str, Any]:
    """Return the arguments of `load` for a recipe's model, after a check of its SHA-256.

    `given` may hold the model's new place; `changes` replace recorded options. A missing or
    different model raises InputError; with `anyway` a different one logs a warning.
    """
    changes = {n: v for n, v in (changes or {}).items() if n in Loading.model_fields}
    with reading():
        model = dict(given).get("model", recipe["model"]["source"])
        known = {"model": model, "device": recipe["device"]}
        known |= {name: recipe.get(name) for name in ("dtype", "offload", "quantize")}
        known |= _devices(recipe.get("devices") or {})
        if "class" not in recipe["model"] and "model" not in changes:
            known["tiles"] = recorded_tiles(recipe["plan"])
        wanted = recipe["model"]["sha256"]
    known |= changes
    if known["device"] != "cpu" and not torch.cuda.is_available():
        log.warning("the clip was made on %r, which this machine lacks; it is made on the CPU",
                    known["device"])
        known |= {"device": "cpu", "devices": 1, "shard": False}
    if "model" not in changes:
        _check_model(model, wanted, anyway)
    return known


def _devices(recorded: Mapping[str, Any]) -> dict[str, Any]:
    count, available = recorded.get("count", 1), torch.cuda.device_count() or os.cpu_count() or 1
    if not isinstance(count, int) or not 1 <= count <= MAX_DEVICES:
        raise ValueError(f"{count!r} devices")
    if count > available:
        log.warning("the clip was made on %d devices, this machine has %d; it is made on one, "
                    "and may differ in the last bits", count, available)
        count = 1
    return {"devices": count, "shard": count > 1 and bool(recorded.get("shard"))}


def _check_model(model: str, wanted: str, anyway: bool) -> None:
    remedy = "give its folder with --input model=FOLDER, or another model with --set model=NAME"
    try:
        found = open_model(model).content_hash
    except ModelError as error:
        raise InputError(f"the recipe's model, of SHA-256 {wanted}, can't be opened: {error}; "
                         f"{remedy}") from error
    if found == wanted:
        return
    text = f"model {model} is not the recipe's: its SHA-256 is {found}, not {wanted}"
    if not anyway:
        raise InputError(f"{text}; {remedy}, or accept it with --anyway")
    log.warning("%s", text)


@contextmanager
def recorded_threads(recipe: Mapping[str, Any]) -> Iterator[None]:
    """Compute with a recipe's number of threads inside the block; results depend on it."""
    with reading():
        threads, now = int(recipe["machine"]["threads"]), torch.get_num_threads()
        if threads < 1:
            raise ValueError(f"{threads} threads")
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(now)


def keep_origin(recipe: Any, old: Mapping[str, Any]) -> None:
    """Copy to a recipe the old record of the model that drew its first frame, if still in use."""
    is_kept = any(each["option"] == "image" and each in old["inputs"] for each in recipe["inputs"])
    recipe["inputs"] += [
        record for record in old["inputs"]
        if record["option"] == "first_frame_model" and is_kept and record not in recipe["inputs"]]


@dataclass(frozen=True)
class Comparison:
    """Hold the result of comparing two files' frames and sound."""

    identical: bool
    psnr_db: float | None  # of all frames; None if they are identical or not comparable
    text: str  # the result as a sentence


def compare(path: str | Path, other: str | Path) -> Comparison:
    """Compare the decoded frames and sound of two files; raise InputError for unreadable ones."""
    error, pixels, count = 0.0, 0, 0
    for frame, other_frame in zip_longest(read_frames(path), read_frames(other)):
        if frame is None or other_frame is None:
            return Comparison(False, None, "different number of frames")
        if frame.shape != other_frame.shape:
            return Comparison(False, None, "different size")
        if not np.array_equal(frame, other_frame):
            error += float(np.square(frame.astype(np.float64) - other_frame).sum())
        pixels, count = pixels + frame.size, count + 1
    if error:
        psnr = psnr_of(error / pixels)
        return Comparison(False, psnr, f"different frames, PSNR {psnr:.1f} dB")
    if not _same_sound(path, other):
        return Comparison(False, None, "same frames, different sound")
    return Comparison(True, None, f"identical, {count} frames")


def _same_sound(path: str | Path, other: str | Path) -> bool:
    silent = any(Path(p).is_dir() or Path(p).suffix.lower() in PICTURE_SUFFIXES
                 for p in (path, other))
    first, second = (None, None) if silent else (read_sound(path), read_sound(other))
    if first is None or second is None:
        return first is second
    return first[1] == second[1] and np.array_equal(first[0], second[0])


def restore_inputs(
    recipe: Mapping[str, Any], folder: Path, given: Given = (), replaced: Collection[str] = ()
) -> dict[str, Any]:
    """Return a recipe's inputs as options of a request, without those named in `replaced`.

    Embedded files are written to `folder`; `given` holds new places of inputs.

    Raises:
        InputError: inputs that are missing or changed, named by option and SHA-256.
    """
    records: list[Record] = [*recipe["inputs"]]
    records += [{"option": "lora", **record} for record in recipe.get("loras", ())]
    by_option = {record["option"]: record for record in records}
    if "first_frame_model" in by_option:  # needed unless the picture that it drew is embedded
        embedded = "content" in by_option["image"]
        records.remove(by_option["first_frame_model" if embedded else "image"])
    records = [record for record in records if record["option"] not in replaced]
    for key, path in given:
        known = {"model", *(record["option"] for record in records)}
        if key != "model" and not any(_matches(key, record) for record in records):
            raise InputError(f"the recipe has no input {key!r}; {nearest(key, known)}")
        if not Path(path).exists():
            raise InputError(f"input {path} does not exist")
    found: dict[str, list[Any]] = {}
    used, missing = set[Path](), list[str]()
    for index, record in enumerate(records):
        places = [Path(path) for key, path in given if _matches(key, record)]
        value, place = _restore(record, places, folder / str(index))
        used.add(place)
        if value is None:
            missing.append(_describe(record, places))
        found.setdefault(record["option"], []).append(value)
    for key, path in given:
        if Path(path) not in used and key != "model":
            record = next(record for record in records if _matches(key, record))
            missing.append(_describe(record, [Path(path)]))
    if missing:
        raise InputError("; ".join(dict.fromkeys(missing)))
    options = {name: values if name in _MANY else values[-1] for name, values in found.items()}
    if "frame" in found:
        options["frame"] = list(zip(recipe["frame_times_s"], found["frame"], strict=True))
    if "say" in found:
        files = (f"{OWN_FILE}{path}" for path in found["say"])
        options["say"] = [(start, next(files) if text.startswith(OWN_FILE) else text)
                          for start, text in recipe["request"]["say"]]
    return options


def _matches(key: str, record: Record) -> bool:
    is_hash = len(key) >= _MIN_HASH and str(record.get("sha256", "")).startswith(key)
    return key == record["option"] or is_hash


def _restore(record: Record, places: Sequence[Path], embedded: Path) -> tuple[Any, Path]:
    """Return an input's value and the place of its file; None if no place has the recorded one."""
    if record["option"] == "first_frame_model":
        place = [Path(record["path"]), *places][-1]
        return str(place), place
    own = [Path(record["path"])] if "path" in record else []
    if "content" in record:
        own = [embedded.with_suffix(Path(record.get("path", "")).suffix)]
        own[0].write_bytes(base64.b64decode(record["content"], validate=True))
    digest = None
    for place in (*places, *own):
        value, digest = _read(place, record)
        if digest is not None and digest == record.get("sha256"):
            return value, place
    if "content" in record:
        raise InputError(f"the recipe is damaged: its {record['option']} has the SHA-256 "
                         f"{digest}, not {record['sha256']}")
    return None, embedded


def _read(path: Path, record: Record) -> tuple[Any, Any]:
    """Return the option's value for a file, and its SHA-256; None for both if unusable."""
    if not path.exists():
        return None, None
    if record["option"] == "lora":
        return lora_option(path, record), hashes_of(path)
    if "shape" in record:
        pixels = load_image(path)[0]
        return pixels, hashlib.sha256(pixels.tobytes()).hexdigest()
    if record["option"] == "latents":
        with suppress(OSError, SafetensorError, KeyError):
            latents = load(path.read_bytes())["latents"]
            return latents, hashlib.sha256(noise_file(latents)).hexdigest()
        return None, None
    return str(path), sha256_file(path)


def _describe(record: Record, places: Sequence[Path]) -> str:
    option, path, state = record["option"], record.get("path", ""), "is not in the recipe"
    if path:
        state = "was changed" if Path(path).exists() else "is missing"
    if places:
        path, state = places[-1], "is a different file"
    other = f", or another with --set {option.replace('_', '-')}=PATH"
    change = "" if option == "latents" else other
    return (f"{option} {path} {state}: the recipe's has the SHA-256 {record['sha256']}; give it "
            f"with --input {option}=PATH{change}").replace("  ", " ")
