"""Signed manifests: whole files verify, changed ones tell, inputs keep theirs."""

from __future__ import annotations

import hashlib
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.signing import TEST_NAME, Signing, make_signing
from tests.tiny.test_provenance import RECIPE, plain_environment, write  # noqa: F401
from vidgen.core.errors import InputError, OutputError
from vidgen.media.clip import Clip
from vidgen.media.manifest import read_marks, signer_info
from vidgen.media.probe import read_recipe
from vidgen.media.provenance import GENERATED

SIGNED = [".mp4", ".mov", ".gif", ".webp", ".apng", ".png", ".jpg"]


@pytest.fixture(scope="module")
def signing(tmp_path_factory) -> Signing:
    pytest.importorskip("c2pa")
    return make_signing(tmp_path_factory.mktemp("signing"))


@pytest.fixture
def trust(signing, tmp_path) -> Path:
    """The root that the test certificate descends from."""
    path = tmp_path / "roots.pem"
    path.write_bytes(b"-----BEGIN" + signing.certificates.read_bytes().split(b"-----BEGIN")[2])
    return path


def write_signed(signing: Signing, path: Path | str, recipe=RECIPE) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        signing.environment(patch)
        return write(path, recipe)


def record(path: Path) -> dict[str, str]:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"option": "image", "path": str(path), "sha256": digest,
            "marks": read_marks(path).facts()}  # fmt: skip


@pytest.mark.parametrize("suffix", SIGNED)
def test_a_signed_file_is_whole_and_names_its_signer(tmp_path, signing, trust, suffix):
    path = write_signed(signing, tmp_path / f"a{suffix}")
    marks = read_marks(path)
    assert (marks.c2pa, marks.problems) == ("untrusted", ("signingCredential.untrusted",))
    assert marks.signer == TEST_NAME
    assert "TEST" in marks.signer
    assert (marks.digital_source_type, marks.generator) == (GENERATED, "vidgen 9.8.7")
    trusted = read_marks(path, trust)
    assert (trusted.c2pa, trusted.problems) == ("valid", ())
    plain = write(tmp_path / f"b{suffix}", RECIPE)
    assert np.array_equal(Clip.from_file(path).frames, Clip.from_file(plain).frames)
    assert read_recipe(path)["id"] == marks.id
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"a{suffix}", f"b{suffix}", "roots.pem"]


@pytest.mark.parametrize("suffix", SIGNED)
def test_a_change_anywhere_shows(tmp_path, signing, trust, suffix):
    data = write_signed(signing, tmp_path / f"a{suffix}").read_bytes()
    changed = tmp_path / f"b{suffix}"
    picture = {".mp4": b"mdat", ".mov": b"mdat", ".webp": b"VP8 ", ".gif": b"\x21\xf9\x04",
               ".jpg": b"\xff\xda", ".png": b"IDAT", ".apng": b"IDAT"}[suffix]  # fmt: skip
    name, end = data.find(GENERATED.encode()), data.find(picture) + 40
    edits = {
        "picture": data[:end] + bytes([data[end] ^ 1]) + data[end + 1 :],
        "marks": data[:name] + b"H" + data[name + 1 :],
        "model": data.replace(b"tiny", b"huge"),
    }
    for what, edit in edits.items():
        assert edit != data
        changed.write_bytes(edit)
        assert read_marks(changed, trust).c2pa == "tampered", what
    assert read_marks(tmp_path / f"a{suffix}", trust).c2pa == "valid"


def test_a_damaged_manifest_is_tampering_too(tmp_path, signing):
    data = bytearray(write_signed(signing, tmp_path / "a.png").read_bytes())
    place = data.find(b"jumdc2pa")
    data[place + 60 : place + 200] = bytes(140)
    (tmp_path / "b.png").write_bytes(data)
    marks = read_marks(tmp_path / "b.png")
    assert marks.c2pa == "tampered"
    assert marks.problems


@pytest.mark.parametrize("suffix", [".mp4", ".jpg"])
def test_an_inputs_manifest_is_kept_as_an_ingredient(
    tmp_path, signing, trust, suffix, monkeypatch
):
    monkeypatch.setenv("VIDGEN_C2PA_TRUST", str(trust))
    photo = write_signed(signing, tmp_path / "in.png")
    recipe = {**RECIPE, "inputs": [record(photo), record(photo), {"option": "mask", "shape": [1]}]}
    marks = read_marks(write_signed(signing, tmp_path / f"out{suffix}", recipe))
    assert marks.c2pa == "valid"
    (kept,) = marks.ingredients
    assert (kept["title"], kept["id"]) == ("in.png", read_marks(photo).id)
    assert (kept["digital_source_type"], kept["c2pa"]) == (GENERATED, "valid")


def test_a_tampered_input_stays_tampered_and_a_broken_one_is_reported(tmp_path, signing, caplog):
    data = bytearray(write_signed(signing, tmp_path / "in.png").read_bytes())
    data[-40] ^= 1
    (tmp_path / "in.png").write_bytes(data)
    recipe = {**RECIPE, "inputs": [record(tmp_path / "in.png")]}
    marks = read_marks(write_signed(signing, tmp_path / "a.mp4", recipe))
    assert marks.ingredients[0]["c2pa"] == "tampered"
    assert marks.c2pa == "untrusted"
    place = data.find(b"jumdc2pa")
    data[place + 60 : place + 200] = bytes(140)
    (tmp_path / "in.png").write_bytes(data)
    recipe = {**RECIPE, "inputs": [record(tmp_path / "in.png")]}
    marks = read_marks(write_signed(signing, tmp_path / "b.mp4", recipe))
    assert "in.png can't be kept as an ingredient" in caplog.text
    assert marks.ingredients[0]["title"] == "in.png"  # the marks still tell


def test_an_input_that_changed_since_is_no_ingredient(tmp_path, signing):
    photo = write(tmp_path / "in.png")
    entry = record(photo)
    photo.write_bytes(photo.read_bytes() + b"more")
    marks = read_marks(write_signed(signing, tmp_path / "a.mp4", {"inputs": [entry]}))
    assert marks.ingredients == ({"title": "in.png", "id": f"sha256:{entry['sha256']}"},)


@pytest.mark.parametrize("suffix", [".mkv", ".webm"])
def test_a_format_without_manifests_stays_unsigned_with_a_warning(
    tmp_path, signing, suffix, caplog
):
    marks = read_marks(write_signed(signing, tmp_path / f"a{suffix}"))
    assert (marks.c2pa, marks.digital_source_type) == ("absent", GENERATED)
    assert f"{suffix} can't hold a signed manifest" in caplog.text


def test_the_environment_names_the_certificate(tmp_path, signing, trust, monkeypatch):
    assert signer_info() is None
    signing.environment(monkeypatch)
    monkeypatch.setenv("VIDGEN_C2PA_TRUST", str(trust))
    info = signer_info()
    assert (info.alg, info.private_key) == (b"es256", signing.key.read_bytes())
    assert info.sign_cert == signing.certificates.read_bytes()
    assert read_marks(write(tmp_path / "a.mp4", RECIPE)).c2pa == "valid"
    assert read_marks(write(tmp_path / "b.mp4")).c2pa == "absent"  # what no model made


@pytest.mark.parametrize(
    ("certificate", "key", "message"),
    [
        ("C", None, "without the other"), (None, "K", "without the other"),
        ("none", "K", "can't be read"), ("text", "K", "not a PEM"),
        ("C", "C", "not an unencrypted PKCS #8 key"),
    ],
)
def test_a_certificate_that_cannot_be_used_is_refused(
    tmp_path, signing, monkeypatch, certificate, key, message
):
    shutil.copy(signing.certificates, tmp_path / "C")
    shutil.copy(signing.key, tmp_path / "K")
    (tmp_path / "text").write_bytes(b"hello")
    for name, value in (("CERTIFICATE", certificate), ("KEY", key)):
        if value:
            monkeypatch.setenv(f"VIDGEN_C2PA_{name}", str(tmp_path / value))
    with pytest.raises(InputError, match=message):
        signer_info()


def new_key(kind: str) -> bytes:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa, x25519

    if kind == "RSA":
        key = rsa.generate_private_key(65537, 2048)
    elif kind in ("Ed25519", "X25519"):
        kinds = {"Ed25519": ed25519.Ed25519PrivateKey, "X25519": x25519.X25519PrivateKey}
        key = kinds[kind].generate()
    else:
        key = ec.generate_private_key(getattr(ec, kind)())
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


@pytest.mark.parametrize(
    ("kind", "algorithm"),
    [("SECP256R1", "es256"), ("SECP384R1", "es384"), ("SECP521R1", "es512"), ("RSA", "ps256"),
     ("Ed25519", "ed25519"), ("SECP256K1", None), ("X25519", None)],
)
def test_the_key_tells_the_algorithm(tmp_path, signing, monkeypatch, kind, algorithm):
    (tmp_path / "key.pem").write_bytes(new_key(kind))
    Signing(signing.certificates, tmp_path / "key.pem").environment(monkeypatch)
    if algorithm is None:
        with pytest.raises(InputError, match="a key type that C2PA doesn't support"):
            signer_info()
    else:
        assert signer_info().alg == algorithm.encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "can't be read"), (b"hello", "not a PEM"),
     (b"-----BEGIN CERTIFICATE-----\n!!\n-----END CERTIFICATE-----\n", "no valid cert")],
)
def test_a_bad_list_of_trusted_certificates_is_no_tampering(tmp_path, signing, content, message):
    path = write_signed(signing, tmp_path / "a.mp4")
    if content is not None:
        (tmp_path / "roots.pem").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_marks(path, tmp_path / "roots.pem")


def test_a_key_of_another_certificate_leaves_nothing(tmp_path, signing):
    (tmp_path / "other").mkdir()
    other = Signing(signing.certificates, make_signing(tmp_path / "other").key)
    with pytest.raises(OutputError, match="can't be signed"):
        write_signed(other, tmp_path / "a.mp4", RECIPE)
    assert [p.name for p in tmp_path.iterdir()] == ["other"]


def test_without_the_extra_signing_is_refused_and_a_manifest_unverified(
    tmp_path, signing, monkeypatch
):
    path = write_signed(signing, tmp_path / "a.mp4")
    monkeypatch.setitem(sys.modules, "c2pa", None)
    marks = read_marks(path)
    assert (marks.c2pa, marks.digital_source_type) == ("unverified", GENERATED)
    with pytest.raises(InputError, match=r"vidgen\[c2pa\]"):
        write_signed(signing, tmp_path / "b.mp4")
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]
