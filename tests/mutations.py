"""Damage to files: what a disk, a download or a hostile hand makes of them. Drawn from a seed."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from random import Random
from typing import Any

LIES = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FFFFFFFFFFFFFFF, 1 << 63)
SIDES = (0, 1, 15, 8001, 16384, 32767, 65535)
JUNK: tuple[Any, ...] = (
    None, True, -1, 0, 1, 3, 10**9, 10**30, 1.5, 1e308, "", "x", "\0", "../../etc/passwd",
    "é" * 999, "1e999", [], {}, [[]], {"": 0}, [None] * 3, ["x"] * 1000, [-1, 1 << 40], "NaN",
    "fp32",
)  # fmt: skip
WORDS = (
    b"&a [*a, *a]", b"*a", b"!!python/object:os.system x", b"{", b"]", b"\t", b"''", b"? ",
    b"%YAML 9", b"---", b"9" * 5000, b"1e999", b"-", b"\xff\xfe", b"<<: 1", b"!!binary x",
    b"!!timestamp 9999-99-99", b"!!int x", b"!!set {1}",
)  # fmt: skip
DEPTH = 100_000


def mutate(data: bytes, name: str, other: bytes, rng: Random) -> bytes:
    """Damage a file.

    Args:
        data: its content.
        name: its name, whose suffix tells what it is.
        other: content of another file, to be mistaken for it or spliced in.
        rng: draws what happens and where.
    """
    kinds: list[Callable[[bytes, Random], bytes]] = [
        _flip, _flip, _lie, _lie, _truncate, _insert, _delete, _repeat, _scatter,
    ]
    suffix = name.rpartition(".")[2]
    if suffix == "json":
        kinds += [_json] * 6 + [_nest, _text]
    elif suffix == "yaml":
        kinds += [_text] * 6 + [_nest]
    elif suffix == "safetensors":
        kinds += [_header] * 6
    elif len(data) > 64:
        kinds += [_sides] * 3
    if rng.random() < 0.06:
        cut = rng.randrange(len(data) + 1)
        return other if rng.random() < 0.5 else data[:cut] + other[cut:]
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        data = rng.choice(kinds)(data, rng)
    return _checksummed(data) if suffix in ("png", "apng") and rng.random() < 0.6 else data


def _place(data: bytes, rng: Random) -> int:
    """A position, half of the time among the headers."""
    limit = min(len(data), 256) if rng.random() < 0.5 else len(data)
    return rng.randrange(max(limit, 1))


def _flip(data: bytes, rng: Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        if changed:
            changed[_place(data, rng)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _scatter(data: bytes, rng: Random) -> bytes:
    at, count = _place(data, rng), rng.choice((1, 4, 16, 256))
    return data[:at] + rng.randbytes(count) + data[at + count :]


def _lie(data: bytes, rng: Random) -> bytes:
    """A number, such as a length, that isn't true."""
    at, size = _place(data, rng), rng.choice((1, 2, 4, 8))
    number, order = rng.choice(LIES) & ((1 << 8 * size) - 1), rng.choice(("big", "little"))
    return data[:at] + number.to_bytes(size, order) + data[at + size :]


def _truncate(data: bytes, rng: Random) -> bytes:
    return data[: rng.choice((_place(data, rng), len(data) - 1, len(data) // 2, 0))]


def _insert(data: bytes, rng: Random) -> bytes:
    at, new = _place(data, rng), rng.choice((b"\0", b"\xff", rng.randbytes(4)))
    return data[:at] + new * rng.choice((1, 7)) + data[at:]


def _delete(data: bytes, rng: Random) -> bytes:
    at = _place(data, rng)
    return data[:at] + data[at + rng.choice((1, 2, 4, 100)) :]


def _repeat(data: bytes, rng: Random) -> bytes:
    at = _place(data, rng)
    return data[:at] + data[at : at + rng.choice((4, 64, 1000))] * rng.choice((2, 50)) + data[at:]


def _sides(data: bytes, rng: Random) -> bytes:
    """A width or height (samples are 48x32 and 64x48) that isn't true."""
    codes = [struct.pack(form, side) for form in ("<H", ">H", "<I", ">I") for side in (48, 32, 64)]
    places = [(at, code) for code in codes for at in _find(data, code)]
    if not places:
        return _lie(data, rng)
    changed = bytearray(data)
    for at, code in rng.sample(places, min(len(places), rng.choice((1, 2, 8)))):
        order = "little" if code[0] else "big"
        changed[at : at + len(code)] = rng.choice(SIDES).to_bytes(len(code), order)
    return bytes(changed)


def _find(data: bytes, code: bytes) -> list[int]:
    head = data[:1024]
    return [at for at in range(len(head)) if head.startswith(code, at)]


def _checksummed(data: bytes) -> bytes:
    """A PNG's chunks with sums that are right again, so that the damage gets past them."""
    changed, at = bytearray(data), 8
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        if end + 4 > len(data):
            break
        changed[end : end + 4] = zlib.crc32(data[at + 4 : end]).to_bytes(4, "big")
        at = end + 4
    return bytes(changed)


def _json(data: bytes, rng: Random) -> bytes:
    """Another value, of another kind, somewhere in a JSON document; or a key gone."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return _flip(data, rng)
    target, steps = value, []
    while isinstance(target, (dict, list)) and target and (not steps or rng.random() < 0.75):
        key = rng.choice(list(target)) if isinstance(target, dict) else rng.randrange(len(target))
        steps.append((target, key))
        target = target[key]
    if not steps or rng.random() < 0.03:
        return json.dumps(rng.choice(JUNK)).encode()
    holder, key = steps[-1]
    if rng.random() < 0.15:
        del holder[key]
    else:
        holder[key] = rng.choice(JUNK)
    return json.dumps(value).encode()


def _nest(data: bytes, rng: Random) -> bytes:
    opening = rng.choice((b"[", b'{"a":', b"- ", b"[{a: "))
    nested = opening * rng.choice((50, 2000, DEPTH))
    at = data.find(b":") + 1
    return nested if rng.random() < 0.5 else data[:at] + b" " + nested + data[at:]


def _text(data: bytes, rng: Random) -> bytes:
    """A word or a sign of a text exchanged."""
    words = data.split(b" ")
    words[rng.randrange(len(words))] = rng.choice(WORDS)
    return b" ".join(words)


def _header(data: bytes, rng: Random) -> bytes:
    """A safetensors file whose header says something else, in a header of the right length."""
    size = int.from_bytes(data[:8], "little")
    header = rng.choice((_json, _json, _json, _nest, _flip))(data[8 : 8 + size], rng)
    if rng.random() < 0.5:
        header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]
