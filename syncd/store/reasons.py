"""Why a connection or a request failed: what nats-py, TLS and the server say, in our words. Pure decisions."""

from __future__ import annotations

import os
import re
import ssl
from typing import TYPE_CHECKING, Final

import nats.errors

from syncd.errors import NotPermitted, StoreRejected, StoreTimeout, SyncdError, Unavailable

if TYPE_CHECKING:
    from nats.aio.client import ServerVersion

    from syncd.store.address import ConnectionOptions, Server

MIN_SERVER: Final = (2, 12, 0)
"""The oldest nats-server that has all that the store uses (atomic batches)."""

_DENIED = re.compile(r'permissions violation for (publish|subscription) to "((?:[^"\\]|\\.)*)"')
_VERSION = re.compile(r"(\d+)\.(\d+)\.(\d+)")
_REFUSED_TEXTS: Final = (
    "authorization",
    "authentication expired",
    "authentication revoked",
    "user not found",
    "account not found",
)
_CERT_EXPIRED: Final = 10  # OpenSSL's X509_V_ERR_* numbers (openssl-verification-options)
_CERT_NOT_YET_VALID: Final = 9
_CERT_WRONG_NAME: Final = frozenset({62, 64})  # host name, IP address
_CERT_UNKNOWN_CA: Final = frozenset({2, 18, 19, 20, 21})


class NoResponders(Unavailable):
    """Nobody listens on the subject of a request: no such stream, no direct get, or no JetStream."""


class CertificateProblem(Unavailable):
    """The server's TLS certificate is not one we accept: waiting will not mend it, a person has to."""


def check_version(version: tuple[int, int, int], host: str) -> None:
    """Refuse a server that lacks what the store needs.

    :raises Unavailable: it is older than :data:`MIN_SERVER`.
    """
    if version < MIN_SERVER:
        have, want = ".".join(map(str, version)), ".".join(map(str, MIN_SERVER[:2]))
        raise Unavailable(f"nats-server {have} at {host} is too old: syncd needs {want} or newer")


def parse_version(version: ServerVersion) -> tuple[int, int, int]:
    """Return what nats-py read from the server's INFO as numbers; zeros where it is none."""
    match = _VERSION.search(repr(version))  # its own parser refuses what is not strictly semantic
    return (int(match[1]), int(match[2]), int(match[3])) if match else (0, 0, 0)


def as_syncd_error(exc: BaseException, doing: str) -> SyncdError:
    """Translate what nats-py raises while ``doing`` ("request to $JS.API.INFO") into our words."""
    if isinstance(exc, SyncdError):
        return exc
    if isinstance(exc, nats.errors.NoRespondersError):
        return NoResponders(f"{doing}: nobody answers there")
    if isinstance(exc, TimeoutError):  # nats-py's and asyncio's; before OSError, which it is one of
        return StoreTimeout(f"{doing}: no answer in time")
    if isinstance(
        exc,
        nats.errors.MaxPayloadError | nats.errors.BadSubjectError | nats.errors.BadHeaderError,
    ):
        return StoreRejected(f"{doing}: {_text(exc)}")
    if _is_refusal(exc) or "permissions violation" in str(exc).lower():
        return NotPermitted(f"{doing}: {_text(exc)}")
    return Unavailable(f"{doing}: {_text(exc)}")


def _text(exc: BaseException) -> str:
    """One line on an exception, without nats-py's prefix and the server's quotes."""
    text = str(exc)
    if isinstance(exc, OSError):  # asyncio's own text names the address, twice for two, but not the reason
        number = re.search(r"\[Errno (\d+)\]", text)
        text = os.strerror(int(number[1])) if number else (exc.strerror or text)
    return " ".join((text or type(exc).__name__).split()).removeprefix("nats: ").strip("'")


def _is_refusal(exc: BaseException) -> bool:
    if isinstance(exc, nats.errors.AuthorizationError):
        return True
    text = str(exc).lower()
    return isinstance(exc, nats.errors.Error) and any(part in text for part in _REFUSED_TEXTS)


def explain(exc: BaseException, server: Server, options: ConnectionOptions) -> SyncdError:
    """Say why a connection to ``server`` could not be made, or ended."""
    host = server.host
    if isinstance(exc, SyncdError):
        return exc
    if isinstance(exc, ssl.SSLCertVerificationError):
        return _explain_certificate(exc, server, options)
    if isinstance(exc, ssl.SSLError):
        reason = (exc.reason or str(exc)).replace("_", " ").lower()
        if "alert" in reason and ("certificate" in reason or "unknown ca" in reason):
            return certificate_refused(server, reason)
        return Unavailable(f"TLS with nats server at {host} failed: {reason}")
    if isinstance(exc, nats.errors.SecureConnWantedError):
        return CertificateProblem(
            f"nats server at {host} offers no TLS, but our configuration asks for it",
            hint="nothing was sent; switch TLS on in the server",
        )
    if _is_refusal(exc):
        return NotPermitted(
            f"nats server refused our credentials at {host}: {_text(exc)}",
            hint="check the user, its files and their expiry",
        )
    if isinstance(exc, TimeoutError):
        return Unavailable(f"nats server at {host} does not answer")
    if "expecting INFO" in str(exc):
        return Unavailable(f"nats server at {host} closed the connection, or does not speak NATS")
    return Unavailable(f"cannot reach nats server at {host}: {_text(exc)}")


def certificate_refused(server: Server, reason: str) -> NotPermitted:
    """Return what to raise where the server does not take our certificate."""
    return NotPermitted(
        f"nats server at {server.host} refused our TLS certificate: {reason}",
        hint="check tls.cert_file and tls.key_file",
    )


def _explain_certificate(exc: ssl.SSLCertVerificationError, server: Server, options: ConnectionOptions) -> SyncdError:
    whose = f"the TLS certificate of nats server at {server.host}"
    code = exc.verify_code
    if code == _CERT_EXPIRED:
        return CertificateProblem(f"{whose} has expired")
    if code == _CERT_NOT_YET_VALID:
        return CertificateProblem(f"{whose} is not valid yet", hint="compare the clocks of both hosts")
    if code in _CERT_WRONG_NAME:
        name = options.tls_server_name or server.tls_name or server.url.hostname
        return CertificateProblem(
            f"{whose} is not valid for the name {name!r} (hostname mismatch)", hint="see tls.server_name"
        )
    if code in _CERT_UNKNOWN_CA:
        ca = options.tls_ca_file or "of this system"
        return CertificateProblem(
            f"{whose} is signed by an unknown CA: {exc.verify_message}", hint=f"trusted CAs are those {ca}"
        )
    return CertificateProblem(f"{whose} is not acceptable: {exc.verify_message}")


def denied_subject(text: str) -> tuple[str, str] | None:
    """Read ("publish" | "subscription", lower-cased subject) from the text of a permission violation."""
    match = _DENIED.search(text)
    return (match[1], re.sub(r"\\(.)", r"\1", match[2])) if match else None


def not_permitted(kind: str, subject: str) -> NotPermitted:
    """Return what to raise for a permission violation that the server told us of.

    :param kind: "publish" or "subscription".
    """
    verb = "publish" if kind == "publish" else "subscribe"
    return NotPermitted(
        f'the nats server does not permit us to {verb} to "{subject}"',
        hint=f"grant the user {verb} on it",
    )
