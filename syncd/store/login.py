"""What a connection proves itself with: the files of passwords, keys and certificates.

They are read anew for every connection, so that rotated ones take effect. All of it blocks: call it in a thread.
"""

from __future__ import annotations

import base64
import re
import ssl
from dataclasses import dataclass
from typing import TYPE_CHECKING

import nkeys

from syncd.errors import ConfigError
from syncd.store.address import ConnectionOptions, Server, wants_tls

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, slots=True, repr=False)
class Secrets:
    """What was read; ``None`` and "" for what is not used. Its repr shows nothing.

    :ivar seed: the nkey's, of the creds file or alone.
    """

    password: str | None = None
    token: str | None = None
    jwt: str = ""
    seed: str = ""
    tls: ssl.SSLContext | None = None


def _read(path: str | Path, what: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:  # noqa: PTH123 - the path is a plain string
            return file.read()
    except UnicodeDecodeError:
        raise ConfigError(f"nats: {what} {path} is not a text file") from None
    except OSError as exc:
        raise ConfigError(f"nats: cannot read {what} {path}: {exc.strerror}") from None


def load(options: ConnectionOptions, server: Server) -> Secrets:
    """Read all files that one connection needs. Blocking.

    :raises ConfigError: one is missing, unreadable, or not what it should be. Rotation may have written
        only half of it, so the supervisor tries again. (nats-py blocks for ever on half a creds file.)
    """
    password: str | None = options.password if options.user else None
    if options.password_file:
        password = _read(options.password_file, "password_file").rstrip("\r\n")
    token = _read(options.token_file, "token_file").strip() if options.token_file else None
    jwt = seed = ""
    if options.creds_file:
        text = _read(options.creds_file, "creds_file")
        jwt = _armoured(text, "NATS USER JWT", options.creds_file)
        seed = _armoured(text, "USER NKEY SEED", options.creds_file)
        _check_seed(seed, options.creds_file)
    elif options.nkey_seed_file:
        lines = _read(options.nkey_seed_file, "nkey_seed_file").split()
        seed = next((line for line in lines if line.startswith("SU")), "")
        _check_seed(seed, options.nkey_seed_file)
    return Secrets(password=password, token=token, jwt=jwt, seed=seed, tls=_tls_context(options, server))


def _armoured(text: str, label: str, path: str) -> str:
    """Return what a creds file holds between the BEGIN and END lines of ``label`` (the format of nsc)."""
    match = re.search(rf"-+BEGIN {label}-+\s+(\S+)\s+-+END {label}-+", text)
    if match is None:
        raise ConfigError(f"nats: creds_file {path} holds no complete {label}")
    return match[1]


def _check_seed(seed: str, path: str) -> None:
    try:
        nkeys.from_seed(bytearray(seed.encode())).wipe()
    except (nkeys.NkeysError, ValueError):
        raise ConfigError(f"nats: {path} holds no nkey seed of a user") from None


def sign_nonce(seed: str, nonce: str) -> bytes:
    """Return the signature of the server's challenge, base64."""
    pair = nkeys.from_seed(bytearray(seed.encode()))
    signature = base64.b64encode(pair.sign(nonce.encode()))
    pair.wipe()
    return signature


def _tls_context(options: ConnectionOptions, server: Server) -> ssl.SSLContext | None:
    """Build a fresh context, so that rotated certificates take effect; ``None``: we do not ask for TLS."""
    if not wants_tls(options, server):
        return None
    for what in ("ca", "cert", "key"):  # ssl's own errors do not name the file
        if path := getattr(options, f"tls_{what}_file"):
            _read(path, f"tls.{what}_file")
    try:
        context = ssl.create_default_context(cafile=options.tls_ca_file or None)
    except ssl.SSLError:
        raise ConfigError(f"nats: tls.ca_file {options.tls_ca_file} holds no certificate") from None

    def no_passphrase() -> str:  # without it OpenSSL would ask on the terminal
        raise ConfigError(f"nats: the key of {options.tls_cert_file} is encrypted", hint="use a key without passphrase")

    if options.tls_cert_file:
        try:
            context.load_cert_chain(options.tls_cert_file, options.tls_key_file or None, no_passphrase)
        except ssl.SSLError as exc:
            reason = (exc.reason or "no certificate and key").replace("_", " ").lower()
            raise ConfigError(f"nats: tls.cert_file {options.tls_cert_file} is not usable: {reason}") from None
    return context
