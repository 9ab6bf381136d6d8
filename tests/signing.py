"""A signer for tests: a fresh key under a name that says so, below a root of its own."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

TEST_NAME = "vidgen TEST certificate, trusted by nobody"


@dataclass(frozen=True)
class Signing:
    """Files that the environment names while something is written."""

    certificates: Path
    key: Path

    def environment(self, patch: pytest.MonkeyPatch) -> None:
        patch.setenv("VIDGEN_C2PA_CERTIFICATE", str(self.certificates))
        patch.setenv("VIDGEN_C2PA_KEY", str(self.key))


def make_signing(folder: Path) -> Signing:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    root_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    start = datetime.now(UTC) - timedelta(minutes=5)
    usages = dict.fromkeys((
        "digital_signature", "content_commitment", "key_encipherment", "data_encipherment",
        "key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only"), False)

    def certificate(name: str, public: Any, *, is_root: bool) -> x509.Certificate:
        subject, issuer = (
            x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "vidgen tests"),
                       x509.NameAttribute(NameOID.COMMON_NAME, common)])
            for common in (name, f"{TEST_NAME}: root")
        )
        usage = {"key_cert_sign": True} if is_root else {"digital_signature": True}
        issued_by = x509.AuthorityKeyIdentifier.from_issuer_public_key(root_key.public_key())
        purpose = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION])  # as C2PA asks
        built = (
            x509.CertificateBuilder(issuer, subject, public, x509.random_serial_number())
            .not_valid_before(start)
            .not_valid_after(start + timedelta(days=365))
            .add_extension(x509.BasicConstraints(ca=is_root, path_length=None), critical=True)
            .add_extension(x509.KeyUsage(**(usages | usage)), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(issued_by, critical=False)
        )
        built = built if is_root else built.add_extension(purpose, critical=False)
        return built.sign(root_key, hashes.SHA256())

    chain = [certificate(TEST_NAME, key.public_key(), is_root=False),
             certificate(f"{TEST_NAME}: root", root_key.public_key(), is_root=True)]
    pem = serialization.Encoding.PEM
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "chain.pem").write_bytes(b"".join(c.public_bytes(pem) for c in chain))
    (folder / "key.pem").write_bytes(secret)
    return Signing(folder / "chain.pem", folder / "key.pem")
