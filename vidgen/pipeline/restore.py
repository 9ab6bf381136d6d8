"""A recipe's inputs: pictures, clips, adapters and noise, embedded or found by their hash."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load

from vidgen.core.errors import InputError, nearest
from vidgen.core.request import OWN_FILE
from vidgen.core.runtime import sha256_file
from vidgen.media.read import load_image
from vidgen.media.types import Frames
from vidgen.pipeline.experts import hashes_of
from vidgen.pipeline.inputs import noise_file

Given: TypeAlias = Sequence[tuple[str, str]]
"""(option or start of a SHA-256, path) pairs: new places of inputs."""
Record: TypeAlias = Mapping[str, Any]

_MIN_HASH = 6
_MANY = ("frame", "reference", "lora", "say")


def restore_inputs(
    recipe: Mapping[str, Any], folder: Path, given: Given = (), replaced: Collection[str] = ()
) -> dict[str, Any]:
    """Return a recipe's inputs as options of a request.

    Args:
        recipe: as a file holds it.
        folder: for embedded files.
        given: new places of inputs.
        replaced: options whose inputs aren't needed.

    Raises:
        InputError: inputs that are missing or changed, by option and SHA-256.
    """
    records = _records(recipe, replaced)
    _check_given(given, records)
    found: dict[str, list[Any]] = {}
    missing = []
    for index, record in enumerate(records):
        value = _restore(record, folder / str(index), given)
        if value is None:
            missing.append(_describe(record, given))
        else:
            found.setdefault(record["option"], []).append(value)
    if missing:
        raise InputError("; ".join(missing))
    options = {name: list(v) if name in _MANY else v[-1] for name, v in found.items()}
    if "frame" in found:
        options["frame"] = list(zip(recipe["frame_times_s"], found["frame"], strict=True))
    if "say" in found:
        files = (f"{OWN_FILE}{path}" for path in found["say"])
        options["say"] = [(start, next(files) if text.startswith(OWN_FILE) else text)
                          for start, text in recipe["request"]["say"]]
    return options


def _records(recipe: Mapping[str, Any], replaced: Collection[str]) -> list[Record]:
    """Return the needed inputs; an embedded first frame replaces the model that drew it."""
    records: list[Record] = [*recipe["inputs"]]
    records += [{"option": "lora", **record} for record in recipe.get("loras", ())]
    noise = recipe.get("custom_noise")
    if isinstance(noise, str):  # the hash decides, whatever lies beside it
        wanted = {"option": "latents", "sha256": noise}
        if not any(wanted.items() <= record.items() for record in records):
            records = [*(each for each in records if each["option"] != "latents"), wanted]
    by_option = {record["option"]: record for record in records}
    if "first_frame_model" in by_option:
        embedded = "content" in by_option["image"]
        records.remove(by_option["first_frame_model" if embedded else "image"])
    return [record for record in records if record["option"] not in replaced]


def _check_given(given: Given, records: Sequence[Record]) -> None:
    known = {"model", *(record["option"] for record in records)}
    for key, path in given:
        wanted = [record for record in records if _is_meant(key, record)]
        if not wanted and key != "model":
            raise InputError(f"the recipe needs no input {key!r}; {nearest(key, known)}")
        if not Path(path).exists():
            raise InputError(f"input {path} does not exist")
        embedded = [record for record in wanted if "content" in record]
        if embedded and len(embedded) == len(wanted) and not any(
            _find([Path(path)], record["sha256"], _hash_of(record)) for record in embedded
        ):
            raise InputError(_describe(embedded[0], given))


def _is_meant(key: str, record: Record) -> bool:
    is_hash = len(key) >= _MIN_HASH and str(record.get("sha256", "")).startswith(key)
    return key == record["option"] or is_hash


def _restore(record: Record, place: Path, given: Given) -> Any:
    """Return a picture, path, noise or text for `--lora`; None if it isn't found."""
    option, digest = record["option"], record.get("sha256")
    given_here = [Path(path) for key, path in given if _is_meant(key, record)]
    if option == "first_frame_model":
        return str([record["path"], *given_here][-1])
    if "content" in record:
        content = base64.b64decode(record["content"], validate=True)
        return _embedded(record, content, place)
    places = [*given_here, *([Path(record["path"])] if "path" in record else [])]
    if option == "lora":
        path = _find(places, digest, hashes_of)
        expert = f"@{record['expert']}" if record["expert"] else ""
        return path and f"{path}:{record['weight']}{expert}"
    path = _find(places, digest, _hash_of(record))
    return path and (load(path.read_bytes())["latents"] if option == "latents" else str(path))


def _hash_of(record: Record) -> Callable[[Path], Any]:
    if "shape" in record:
        return _pixel_hash
    return _noise_hash if record["option"] == "latents" else sha256_file


def _find(places: Sequence[Path], digest: Any, hash_of: Callable[[Path], Any]) -> Path | None:
    there = (path for path in places if path.exists())
    return next((path for path in there if hash_of(path) == digest), None)


def _embedded(record: Record, content: bytes, place: Path) -> Any:
    kept: Any = str(place)
    digest = hashlib.sha256(content).hexdigest()
    if "shape" in record:
        kept = _pixels(content)
        digest = hashlib.sha256(kept.tobytes()).hexdigest()
    elif "path" in record:
        place = place.with_suffix(Path(record["path"]).suffix)
        place.write_bytes(content)
        kept = str(place)
    else:
        kept = load(content)["latents"]
    if digest != record["sha256"]:
        raise InputError(f"the recipe is damaged: its {record['option']} has the SHA-256 {digest}, "
                         f"recorded is {record['sha256']}")
    return kept


def _noise_hash(path: Path) -> str | None:
    """Return the hash of the latents in a file, or None without any."""
    try:
        return hashlib.sha256(noise_file(load(path.read_bytes())["latents"])).hexdigest()
    except (OSError, SafetensorError, KeyError):
        return None


def _pixel_hash(path: Path) -> str:
    return hashlib.sha256(load_image(path)[0].tobytes()).hexdigest()


def _pixels(content: bytes) -> Frames:
    with Image.open(io.BytesIO(content)) as image:
        return np.array(image.convert("RGB"))


def _describe(record: Record, given: Given) -> str:
    option, path = record["option"], record.get("path", "")
    state = "is not in the recipe"
    if path:
        state = "was changed" if Path(path).exists() else "is missing"
    meant = [place for name, place in given if _is_meant(name, record)]
    if meant:
        path, state = meant[-1], "is another one"
    key = option.replace("_", "-")
    change = "" if option == "latents" else f", or another with --set {key}=PATH"
    return (f"{option} {path} {state}: the recipe's has the SHA-256 {record['sha256']}; give that "
            f"with --input {option}=PATH{change}").replace("  ", " ")
