"""Signed manifests by C2PA's specification 2.x, with the extra `c2pa`.

A manifest binds the marks to every byte of the file, so it is written last; any later change is
detected. The environment names the certificate that signs:

    VIDGEN_C2PA_CERTIFICATE  PEM file, the signer's certificate first, then its issuers
    VIDGEN_C2PA_KEY          PEM file of its private key (PKCS #8)
    VIDGEN_C2PA_TIME_STAMP   URL of a time-stamping authority (RFC 3161), optional
    VIDGEN_C2PA_TRUST        PEM file of certificates whose signatures `read_marks` trusts
"""

from __future__ import annotations

import base64
import io
import logging
import mmap
import os
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

from vidgen.core.errors import InputError, OutputError
from vidgen.core.runtime import atomic_path, sha256_file
from vidgen.media.provenance import (
    GENERATED,
    Marks,
    append_xmp,
    ingredient,
    marks_of,
    media_type,
    read_plain_marks,
    xmp,
)

log = logging.getLogger(__name__)

_STORE = b"jumdc2pa\x00\x11\x00\x10"  # how a manifest store begins in every format
_OFFLINE: dict[str, Any] = {
    "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False},
    "builder": {"thumbnail": {"enabled": False}},
}
_MEDIA_TYPES = {
    ".mp4": "video/mp4", ".mov": "video/quicktime", ".png": "image/png", ".apng": "image/png",
    ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp", ".gif": "image/gif",
}
_CURVES = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}


def signer_info() -> Any:
    """Return the signer that the environment names, as c2pa's `C2paSignerInfo`, or None.

    Raises:
        InputError: a file is missing or not PEM, only one of both is set, or c2pa isn't installed.
    """
    place, key = (os.environ.get(f"VIDGEN_C2PA_{n}") for n in ("CERTIFICATE", "KEY"))
    if not place and not key:
        return None
    if not (place and key):
        raise InputError("one of VIDGEN_C2PA_CERTIFICATE and VIDGEN_C2PA_KEY is set without the "
                         "other; set both")
    c2pa, secret = _load_c2pa(), _read(key, "VIDGEN_C2PA_KEY")
    return c2pa.C2paSignerInfo(_algorithm(secret, key), _read(place, "VIDGEN_C2PA_CERTIFICATE"),
                               secret, os.environ.get("VIDGEN_C2PA_TIME_STAMP") or None)


def _load_c2pa() -> ModuleType:
    try:
        import c2pa
    except ImportError:
        raise InputError("signing and verifying manifests needs the extra c2pa; install it with "
                         "pip install 'vidgen[c2pa]'") from None
    module: ModuleType = c2pa
    return module


def _read(path: str | os.PathLike[str], name: str) -> bytes:
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{name} is {path}, which can't be read: {error.strerror}") from None
    if b"-----BEGIN" not in data:
        raise InputError(f"{name} is {path}, which is not a PEM file")
    return data


def _algorithm(key: bytes, path: str) -> str:
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        private = load_pem_private_key(key, None)
    except (ValueError, TypeError) as error:
        raise InputError(f"VIDGEN_C2PA_KEY is {path}, not an unencrypted PKCS #8 key: "
                         f"{error}") from None
    if isinstance(private, ec.EllipticCurvePrivateKey) and private.curve.name in _CURVES:
        return _CURVES[private.curve.name]
    if isinstance(private, rsa.RSAPrivateKey):
        return "ps256"
    if isinstance(private, ed25519.Ed25519PrivateKey):
        return "ed25519"
    raise InputError(f"VIDGEN_C2PA_KEY is {path}, a key type that C2PA doesn't support; create "
                     "one on the curve P-256")


def seal(path: Path, suffix: str, recipe: dict[str, Any]) -> None:
    """Add XMP to MP4 and MOV, and sign the file if the environment names a signer.

    XMP is appended; signing rewrites the file. `suffix` is its format. The inputs of a stamped
    `recipe` become ingredients, with their own manifests.

    Raises:
        InputError: the signer can't be used, see `signer_info`.
        OutputError: the certificate can't sign it, or the time-stamping authority didn't answer.
    """
    if suffix in (".mp4", ".mov"):
        append_xmp(path, xmp(marks_of(recipe)))
    info = signer_info()
    if info is None:
        return
    if suffix in _MEDIA_TYPES:
        _sign(path, _MEDIA_TYPES[suffix], recipe, info)
    else:
        log.warning("%s can't hold a signed manifest and stays unsigned; use .mp4 to sign", suffix)


def _sign(path: Path, kind: str, recipe: dict[str, Any], info: Any) -> None:
    c2pa = _load_c2pa()
    marks = marks_of(recipe)
    program, _, version = (marks.generator or "").partition(" ")
    agent = {"name": program, "version": version}
    definition = {"claim_generator_info": [agent], "title": marks.id}
    try:
        with (atomic_path(path) as signed, _context(c2pa, None) as context,
              c2pa.Signer.from_info(info) as signer,
              c2pa.Builder(definition, context=context) as builder):
            builder.add_action({
                "action": "c2pa.created", "digitalSourceType": GENERATED, "softwareAgent": agent,
                "when": marks.time, "description": f"generated by the model {marks.model}",
                "parameters": {"ingredientIds": _add_ingredients(c2pa, builder, recipe)},
            })
            with path.open("rb") as source, signed.open("w+b") as target:
                builder.sign(signer, kind, source, target)
    except c2pa.C2paError as error:
        raise OutputError(f"the output can't be signed: {error}; check "
                          "VIDGEN_C2PA_CERTIFICATE and VIDGEN_C2PA_KEY") from error


def _add_ingredients(c2pa: ModuleType, builder: Any, recipe: dict[str, Any]) -> list[str]:
    names: list[str] = []
    for record in recipe.get("inputs") or ():
        content = _content(record)
        if content is None:
            continue
        kind, file = content
        part = ingredient(record)
        name, title = part["id"], part["title"]
        try:
            with file:
                facts = {"title": title, "relationship": "inputTo", "instance_id": name}
                if name not in names:  # one picture may be given twice
                    builder.add_ingredient(facts, kind, file)
                    names.append(name)
        except c2pa.C2paError as error:
            log.warning("%s can't be kept as an ingredient: %s", title, error)
    return names


def _content(record: dict[str, Any]) -> tuple[str, BinaryIO] | None:
    """Return the media type and bytes of an input file, if it is unchanged."""
    if not {"path", "sha256"} <= set(record):  # an array in memory
        return None
    file: BinaryIO
    if "content" in record:
        file = io.BytesIO(base64.b64decode(record["content"]))
    elif Path(record["path"]).is_file() and sha256_file(record["path"]) == record["sha256"]:
        file = Path(record["path"]).open("rb")  # noqa: SIM115 - the caller closes it
    else:
        return None
    kind = media_type(file.read(16))
    file.seek(0)
    return (kind, file) if kind and kind in _MEDIA_TYPES.values() else None


def read_marks(path: str | os.PathLike[str], trust: str | os.PathLike[str] | None = None) -> Marks:
    """Return a file's marks, by vidgen or other programs, and verify its signed manifest.

    A folder has the marks of its first picture. `trust` is a PEM file of the certificates whose
    signatures are trusted; None: the one that VIDGEN_C2PA_TRUST names.

    Raises:
        InputError: the file is missing or unreadable, or `trust` is invalid.
    """
    found, kind, marks = read_plain_marks(path)
    if kind not in _MEDIA_TYPES.values() or not _has_store(found):
        return marks
    try:
        c2pa = _load_c2pa()
    except InputError:
        return replace(marks, c2pa="unverified")
    try:
        with (found.open("rb") as file, _context(c2pa, trust) as context,
              c2pa.Reader(kind, file, context=context) as reader):
            manifest, results = reader.get_active_manifest(), reader.get_validation_results()
    except c2pa.C2paError as error:
        return replace(marks, c2pa="tampered", problems=(str(error),))
    manifest = manifest or {}
    state, problems = _judge(results)
    known = {part.get("id"): part for part in marks.ingredients}
    ingredients = [_signed_ingredient(entry, known) for entry in manifest.get("ingredients", ())]
    signature = manifest.get("signature_info") or {}
    return replace(_filled(marks, manifest), c2pa=state, problems=problems,
                   signer=signature.get("common_name") or signature.get("issuer"),
                   ingredients=tuple(ingredients) or marks.ingredients)


def _context(c2pa: ModuleType, trust: str | os.PathLike[str] | None) -> Any:
    anchors = trust or os.environ.get("VIDGEN_C2PA_TRUST")
    if not anchors:
        return c2pa.Context(c2pa.Settings.from_dict(_OFFLINE))
    roots = _read(anchors, "VIDGEN_C2PA_TRUST").decode("ascii", "replace")
    try:
        settings = _OFFLINE | {"trust": {"trust_anchors": roots}}
        return c2pa.Context(c2pa.Settings.from_dict(settings))
    except c2pa.C2paError as error:
        raise InputError(f"VIDGEN_C2PA_TRUST is {anchors}, which holds no valid "
                         f"certificates: {error}") from None


def _has_store(path: Path) -> bool:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return data.find(_STORE) >= 0


def _judge(results: dict[str, Any] | None) -> tuple[str, tuple[str, ...]]:
    """Return state and failure codes; an invalid credential alone makes it "untrusted"."""
    active = (results or {}).get("activeManifest") or {}
    codes = tuple(dict.fromkeys(failure["code"] for failure in active.get("failure", ())))
    if any(not code.startswith("signingCredential.") for code in codes):
        return "tampered", codes
    done = {success["code"] for success in active.get("success", ())}
    if "claimSignature.validated" not in done:
        return "tampered", (*codes, "claimSignature.missing")
    return ("untrusted", codes) if codes else ("valid", codes)


def _signed_ingredient(entry: dict[str, Any], known: dict[Any, dict[str, Any]]) -> dict[str, Any]:
    name = entry.get("instance_id")
    found = {"title": entry.get("title", "unnamed"), "id": name, **known.get(name, {})}
    if "active_manifest" in entry:
        found["c2pa"] = _judge(entry.get("validation_results"))[0]
    return {key: value for key, value in found.items() if value}


def _filled(marks: Marks, manifest: dict[str, Any]) -> Marks:
    """Fill in missing marks from the manifest."""
    generator = (manifest.get("claim_generator_info") or [{}])[0]
    words = filter(None, (generator.get("name"), generator.get("version")))
    known: dict[str, Any] = {"generator": " ".join(words)}
    for assertion in manifest.get("assertions", ()):
        if assertion.get("label", "").startswith("c2pa.actions"):
            for action in assertion["data"].get("actions", ()):
                known.setdefault("digital_source_type", action.get("digitalSourceType"))
                known.setdefault("time", action.get("when"))
    known["time"] = known.get("time") or (manifest.get("signature_info") or {}).get("time")
    return replace(marks, **{k: v for k, v in known.items() if v and not getattr(marks, k)})
