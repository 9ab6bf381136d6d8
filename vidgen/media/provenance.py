"""Marks of a file's origin, written by default and read from any file.

Marks are stored in an XMP packet (PNG, JPEG, WebP, GIF, MP4, MOV) and in plain tags (MP4, MOV,
WebM, MKV). `manifest` adds a signed manifest.

Sources: IPTC NewsCodes digitalsourcetype; IPTC Photo Metadata 2025.1 (AISystemUsed); XMP
specification part 3 (places in files); GB 45438-2025 and TC260-PG-20258A (the AIGC field).
"""

from __future__ import annotations

import json
import mmap
import os
import re
import uuid
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.sax.saxutils import escape

import av
from PIL import Image

from vidgen import __version__
from vidgen.core.errors import InputError

GENERATED = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
XMP_BOX = uuid.UUID("be7acfcb-97a9-42e8-9c71-999491e3afac").bytes
_MAX_PACKET, _PACKET_END = 4_000_000, b"</x:xmpmeta>"
_GIF_HEAD = b"!\xff\x0bXMP DataXMP"
_GIF_TAIL = bytes([1, *range(255, -1, -1), 0])  # lets a reader of blocks skip to the end
_TIME = "%Y-%m-%dT%H:%M:%SZ"
_NAMESPACES = {
    "rdf": "http://www.w3.org/1999/02/22-rdf-syntax-ns#",
    "Iptc4xmpExt": "http://iptc.org/std/Iptc4xmpExt/2008-02-29/",
    "xmp": "http://ns.adobe.com/xap/1.0/",
    "xmpMM": "http://ns.adobe.com/xap/1.0/mm/",
    "stRef": "http://ns.adobe.com/xap/1.0/sType/ResourceRef#",
    "TC260": "http://www.tc260.org.cn/ns/AIGC/1.0/",
}
_PROPERTIES = {  # of Marks, in XMP and in a film container's tags
    "digital_source_type": ("Iptc4xmpExt:DigitalSourceType", "digital_source_type"),
    "generator": ("xmp:CreatorTool", "generator"),
    "model": ("Iptc4xmpExt:AISystemUsed", "ai_system"),
    "time": ("xmp:CreateDate", "creation_time"),
    "id": ("xmpMM:DocumentID", "content_id"),
    "aigc": ("TC260:AIGC", "AIGC"),
}
_REFERENCE = {  # of an ingredient, in XMP
    "title": "stRef:filePath", "id": "stRef:documentID",
    "digital_source_type": "Iptc4xmpExt:DigitalSourceType",
}


@dataclass(frozen=True)
class Marks:
    """Origin of a file as stated in it; None for what it doesn't state.

    Attributes:
        digital_source_type: IPTC's URI; `GENERATED` for a model's output.
        generator: program and version.
        time: of creation, ISO 8601 in UTC.
        id: unique, a URN.
        aigc: fields of the Chinese labelling rule, by their names there.
        c2pa: the signed manifest is "absent", "valid", "untrusted" (intact, but its signer
            isn't trusted), "tampered", or "unverified" without the extra c2pa.
        signer: name in the certificate.
        problems: codes of problems in the manifest.
        ingredients: inputs: title, and id, digital_source_type and c2pa where known.
    """

    digital_source_type: str | None = None
    generator: str | None = None
    model: str | None = None
    time: str | None = None
    id: str | None = None
    aigc: dict[str, Any] | None = None
    c2pa: str = "absent"
    signer: str | None = None
    problems: tuple[str, ...] = ()
    ingredients: tuple[dict[str, Any], ...] = ()

    def facts(self) -> dict[str, Any]:
        """Return the known fields as JSON data; empty for a file without marks."""
        known = {name: value for name, value in asdict(self).items() if value}
        return {} if known == {"c2pa": "absent"} else known


def stamped(recipe: dict[str, Any], earlier: dict[str, Any] | None = None) -> dict[str, Any]:
    """Add `created`, the time in UTC, and `id` to a recipe; return one that has them unchanged.

    An extended clip keeps the stamp of its beginning, from the `earlier` recipe. With
    SOURCE_DATE_EPOCH in the environment (reproducible-builds.org) the time is that value, and
    the id is derived from the recipe, so that the same request gives the same file, bit for bit.

    Raises:
        InputError: SOURCE_DATE_EPOCH is not a time.
    """
    known = {
        name: text for source in (earlier or {}, recipe) for name in ("created", "id")
        if isinstance(text := source.get(name), str)
    }
    if len(known) == 2:
        return recipe | known
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    if epoch is None:
        moment, name = datetime.now(UTC), uuid.uuid4()
    else:
        try:
            moment = datetime.fromtimestamp(int(epoch), UTC)
        except (ValueError, OverflowError, OSError):
            raise InputError(f"SOURCE_DATE_EPOCH is {epoch!r}; give whole seconds since 1970, or "
                             "unset it") from None
        text = json.dumps(recipe, sort_keys=True) + epoch
        name = uuid.uuid5(uuid.NAMESPACE_URL, text)
    return recipe | {"created": moment.strftime(_TIME), "id": name.urn} | known


def marks_of(recipe: dict[str, Any]) -> Marks:
    """Return the marks of a stamped recipe's file; its entry `aigc` names the producer."""
    model, inputs = recipe.get("model"), recipe.get("inputs")
    producer, name = recipe.get("aigc"), recipe["id"]
    aigc = {"Label": "1", "ContentProducer": producer, "ProduceID": name, "ReservedCode1": "",
            "ContentPropagator": "", "PropagateID": "", "ReservedCode2": ""}
    return Marks(digital_source_type=GENERATED,
                 generator=f"vidgen {recipe.get('vidgen', __version__)}",
                 model=str(model.get("name")) if isinstance(model, dict) else None,
                 time=recipe["created"], id=name, aigc=aigc if producer else None,
                 ingredients=tuple(ingredient(r) for r in inputs or () if isinstance(r, dict)))


def ingredient(record: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe's record of an input as an entry of `Marks.ingredients`."""
    marks = record.get("marks", {})
    title = Path(record["path"]).name if "path" in record else str(record.get("option"))
    content = f"sha256:{record['sha256']}" if "sha256" in record else None
    facts = {"title": title, "id": marks.get("id") or content,
             "digital_source_type": marks.get("digital_source_type"), "c2pa": marks.get("c2pa")}
    return {key: value for key, value in facts.items() if value}


def _texts(marks: Marks) -> dict[str, str]:
    given = {name: value for name in _PROPERTIES if (value := getattr(marks, name))}
    return {n: json.dumps(v) if isinstance(v, dict) else v for n, v in given.items()}


def tags(marks: Marks) -> dict[str, str]:
    """Return marks as a film container's tags."""
    return {_PROPERTIES[name][1]: text for name, text in _texts(marks).items()}


def xmp(marks: Marks) -> str:
    """Return marks as an XMP packet."""
    lines = [_element(_PROPERTIES[name][0], text) for name, text in _texts(marks).items()]
    items = []
    for part in marks.ingredients:
        fields = "".join(_element(_REFERENCE[key], part[key]) for key in _REFERENCE if key in part)
        items.append(f'<rdf:li rdf:parseType="Resource">{fields}</rdf:li>')
    if items:
        bag = "".join(items)
        lines.append(f"<xmpMM:Ingredients><rdf:Bag>{bag}</rdf:Bag></xmpMM:Ingredients>")
    spaces = " ".join(f'xmlns:{prefix}="{uri}"' for prefix, uri in _NAMESPACES.items())
    body = "\n".join(lines)
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>\n'
        f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF {spaces}><rdf:Description rdf:about="">\n'
        f'{body}\n</rdf:Description></rdf:RDF></x:xmpmeta>\n<?xpacket end="r"?>'
    )


def _element(name: str, text: str) -> str:
    printable = re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "?", text)
    return f"<{name}>{escape(printable)}</{name}>"


def append_xmp(path: Path, packet: str) -> None:
    """Append a packet to an MP4 or MOV file as its last box, which shifts no offsets."""
    data = XMP_BOX + packet.encode()
    with path.open("ab") as file:
        file.write((8 + len(data)).to_bytes(4, "big") + b"uuid" + data)


def gif_xmp(packet: str) -> bytes:
    """Return a packet as GIF's application extension."""
    return _GIF_HEAD + packet.encode() + _GIF_TAIL


def media_type(head: bytes) -> str | None:
    """Return the media type of a file that can hold marks by its first 16 bytes, else None."""
    if head[4:8] == b"ftyp":
        return "video/quicktime" if head[8:12] == b"qt  " else "video/mp4"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "image/webp"
    kinds = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"GIF8": "image/gif",
             b"\x1a\x45\xdf\xa3": "video/x-matroska"}
    return next((kind for magic, kind in kinds.items() if head.startswith(magic)), None)


def read_plain_marks(path: str | os.PathLike[str]) -> tuple[Path, str | None, Marks]:
    """Return the marks in a file's XMP packet and tags, without its signed manifest.

    Returns:
        (path of the file or of a folder's first picture, its `media_type`, its marks).

    Raises:
        InputError: missing or unreadable.
    """
    found = Path(path)
    try:
        if found.is_dir():
            first = min(found.glob("*.png"), default=None)
            return (found, None, Marks()) if first is None else read_plain_marks(first)
        with found.open("rb") as file:
            kind = media_type(file.read(16))
    except OSError as error:
        raise InputError(f"file {path} can't be read: {error.strerror}") from None
    texts: dict[str, Any] = {}
    if kind is not None and kind.startswith("video/"):
        texts = _read_tags(found)
    texts |= _parse(b"" if kind is None else _read_packet(found, kind))
    return found, kind, replace(Marks(), **texts)


def _read_tags(path: Path) -> dict[str, Any]:
    try:
        with av.open(str(path)) as container:
            given = {key.lower(): value for key, value in container.metadata.items()}
    except (av.FFmpegError, UnicodeDecodeError):
        return {}
    found = {name: given.get(tag.lower()) for name, (_, tag) in _PROPERTIES.items()}
    return _typed({name: text for name, text in found.items() if text})


def _typed(texts: dict[str, str]) -> dict[str, Any]:
    """Parse the AIGC field, drop it if damaged, and drop zero fractions of the time."""
    found: dict[str, Any] = dict(texts)
    if "time" in found:
        found["time"] = re.sub(r"\.0+Z$", "Z", found["time"])
    if "aigc" in found:
        try:
            fields = json.loads(found.pop("aigc"))
        except (ValueError, RecursionError):
            fields = None
        if isinstance(fields, dict):
            found["aigc"] = fields
    return found


def _read_packet(path: Path, kind: str) -> bytes:
    if kind == "video/x-matroska":
        return b""
    if kind.startswith("video/") or kind == "image/gif":
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            head = _GIF_HEAD if kind == "image/gif" else XMP_BOX
            start = data.find(head)
            end = data.find(_PACKET_END, start)
            return data[start + len(head) : end + len(_PACKET_END)] if 0 <= start < end else b""
    try:
        with Image.open(path) as image:
            packet = image.info.get("xmp", b"")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return b""
    return packet.encode() if isinstance(packet, str) else packet


def _parse(packet: bytes) -> dict[str, Any]:
    """Read fields of `Marks` from an XMP packet; a damaged one has none."""
    start, end = packet.find(b"<x:xmpmeta"), packet.rfind(_PACKET_END)
    packet = packet[max(start, 0) : end + len(_PACKET_END) if end >= 0 else len(packet)]
    if not packet or len(packet) > _MAX_PACKET or b"<!" in packet:  # refuse entity declarations
        return {}
    try:
        root = ElementTree.fromstring(packet)
    except (ElementTree.ParseError, ValueError):
        return {}
    descriptions = root.findall(".//rdf:RDF/rdf:Description", _NAMESPACES)
    texts = {}
    for name, (qualified, _) in _PROPERTIES.items():
        text = next(filter(None, (_property(d, qualified) for d in descriptions)), None)
        if text:
            texts[name] = text
    found = _typed(texts)
    ingredients = []
    for item in root.iterfind(".//xmpMM:Ingredients/rdf:Bag/rdf:li", _NAMESPACES):
        nested = item.find("rdf:Description", _NAMESPACES)
        item = item if nested is None else nested  # noqa: PLW2901 - the two ways RDF writes it
        fields = {key: _property(item, name) for key, name in _REFERENCE.items()}
        ingredients.append({key: value for key, value in fields.items() if value})
    return found | ({"ingredients": tuple(ingredients)} if ingredients else {})


def _property(node: ElementTree.Element, qualified: str) -> str | None:
    """Return a property's text: an attribute, element, resource or first item of a list."""
    prefix, _, local = qualified.partition(":")
    name, rdf = f"{{{_NAMESPACES[prefix]}}}{local}", f"{{{_NAMESPACES['rdf']}}}"
    if name in node.attrib:
        return node.attrib[name]
    child = node.find(name)
    if child is None:
        return None
    item = child.find(f".//{rdf}li")
    return child.get(f"{rdf}resource") or (child if item is None else item).text
