"""Keys, certificates and JWTs of the tests' own: a TLS authority, and NATS operator, account and users."""

from __future__ import annotations

import base64
import datetime as dt
import hashlib
import ipaddress
import json
import os
import time
from typing import TYPE_CHECKING

import nkeys
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

if TYPE_CHECKING:
    from pathlib import Path

DAY = dt.timedelta(days=1)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


class Authority:
    """A certificate authority that writes its certificates as PEM files into a directory."""

    def __init__(self, directory: Path, name: str = "ca") -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.name = name
        self._key = ec.generate_private_key(ec.SECP256R1())
        now = dt.datetime.now(dt.UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(_name(name))
            .issuer_name(_name(name))
            .public_key(self._key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - 30 * DAY)
            .not_valid_after(now + 30 * DAY)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self._key.public_key()), critical=False)
            .add_extension(_key_usage(signs_certificates=True), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.file = directory / f"{name}.pem"
        self.file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    def issue(
        self, name: str, *, hosts: tuple[str, ...] = ("localhost", "127.0.0.1"), expired: bool = False
    ) -> tuple[Path, Path]:
        """Write a certificate for server and client use; return the paths of certificate and key."""
        key = ec.generate_private_key(ec.SECP256R1())
        now = dt.datetime.now(dt.UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(_name(name))
            .issuer_name(_name(self.name))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - 10 * DAY)
            .not_valid_after(now - DAY if expired else now + 10 * DAY)
            .add_extension(x509.SubjectAlternativeName([_host(host) for host in hosts]), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        cert_file, key_file = self.directory / f"{name}.pem", self.directory / f"{name}.key"
        cert_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        key_file.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return cert_file, key_file


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def new_seed(prefix: int = nkeys.PREFIX_BYTE_USER) -> str:
    return bytes(nkeys.encode_seed(os.urandom(32), prefix)).decode()


def public_key(seed: str) -> str:
    return bytes(nkeys.from_seed(bytearray(seed.encode())).public_key).decode()


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _jwt(issuer_seed: str, subject: str, name: str, claims: dict[str, object], expires: float | None) -> str:
    """A NATS JWT, version 2 (github.com/nats-io/jwt)."""
    pair = nkeys.from_seed(bytearray(issuer_seed.encode()))
    body: dict[str, object] = {
        "iat": int(time.time()),
        "iss": bytes(pair.public_key).decode(),
        "sub": subject,
        "name": name,
        "nats": {**claims, "version": 2},
    }
    if expires is not None:
        body["exp"] = int(expires)
    digest = hashlib.sha512_256 if hasattr(hashlib, "sha512_256") else hashlib.sha256
    body["jti"] = base64.b32encode(digest(json.dumps(body).encode()).digest()).decode().rstrip("=")
    signed = _b64(json.dumps({"typ": "JWT", "alg": "ed25519-nkey"}).encode()) + "." + _b64(json.dumps(body).encode())
    return f"{signed}.{_b64(pair.sign(signed.encode()))}"


class Operator:
    """A NATS operator with one account (JetStream enabled), for servers with ``resolver: MEMORY``."""

    def __init__(self) -> None:
        self._seed = new_seed(nkeys.PREFIX_BYTE_OPERATOR)
        self._account_seed = new_seed(nkeys.PREFIX_BYTE_ACCOUNT)
        self.account = public_key(self._account_seed)

    def server_config(self) -> str:
        operator = _jwt(self._seed, public_key(self._seed), "operator", {"type": "operator"}, None)
        unlimited = ("subs", "data", "payload", "imports", "exports", "conn", "leaf")
        jetstream = ("mem_storage", "disk_storage", "streams", "consumer")
        limits = {**dict.fromkeys(unlimited + jetstream, -1), "wildcards": True}
        account = _jwt(self._seed, self.account, "account", {"type": "account", "limits": limits}, None)
        return f"operator: {operator}\nresolver: MEMORY\nresolver_preload: {{ {self.account}: {account} }}\n"

    def creds(self, name: str = "user", *, valid_seconds: float | None = None) -> str:
        """The text of a creds file of a new user."""
        seed = new_seed()
        claims: dict[str, object] = {
            "type": "user",
            "pub": {},
            "sub": {},
            "subs": -1,
            "data": -1,
            "payload": -1,
        }
        expires = None if valid_seconds is None else time.time() + valid_seconds
        jwt = _jwt(self._account_seed, public_key(seed), name, claims, expires)
        return (
            f"-----BEGIN NATS USER JWT-----\n{jwt}\n------END NATS USER JWT------\n\n"
            f"-----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n"
        )
