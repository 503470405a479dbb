"""The one supervised connection of a daemon to NATS.

Rules this module keeps:

* One nats-py client per connection: whenever a connection ends, for whatever reason, its client is thrown
  away and a new one is made (``epoch`` grows). nats-py's own reconnecting is switched off, because in 2.16 it
  can stop for ever: it waits for the old socket to take its buffered bytes (a frozen server never does), any
  exception of an unforeseen type ends the reconnecting task silently, an expired JWT or an unknown ``-ERR``
  closes the client for good, and TLS files and nkeys are read only once. Subscriptions therefore belong to a
  client: make them anew when ``epoch`` has grown.
* Credentials and TLS files are read anew, in a thread, for every connection.
* Nothing waits without a deadline, and a lost connection fails its waiting requests at once.
* The log tells changes of state: the first failure of each kind and the recovery, not the middle.
* No secret in a log event, an error message or a repr (user info in server addresses included).
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import ipaddress
import itertools
import json
import os
import random
import re
import ssl
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import SplitResult, urlsplit

import nats.aio.client
import nats.errors
import nkeys
import structlog
from nats.aio.client import Client, ServerVersion

from syncd.errors import ConfigError, NotPermitted, StoreRejected, StoreTimeout, SyncdError, Unavailable
from syncd.retry import backoff

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from nats.aio.msg import Msg
    from nats.aio.subscription import Subscription

MIN_SERVER: Final = (2, 12, 0)
"""The oldest nats-server that has all that the store uses (atomic batches)."""

RETRY_FIRST: Final = 0.25
RETRY_CAP: Final = 4.0
"""Seconds between attempts, before jitter: a large fleet spreads over two seconds, and is back soon."""

STEADY_SECONDS: Final = 10.0
"""A connection that lived that long was a good one: the next attempt begins with the short wait again."""

MAX_OUTSTANDING_PINGS: Final = 2
ROOM_FOR_HEADERS: Final = 64 * 1024
PENDING_BYTES: Final = 16 << 20
FLUSH_SECONDS: Final = 10
CLOSE_SECONDS: Final = 1.5
CANCEL_SECONDS: Final = 2.0
"""More than ending a connection takes, which a second cancellation would cut short."""
MAX_CONTROL_LINE: Final = 4096
"""The server's default; a longer line makes it close the connection under everybody who uses it."""

_CONTROL_LINE_REST: Final = 64  # verb, blanks and lengths beside subject and reply
_MAX_DISCOVERED: Final = 64
_MAX_REMEMBERED_DENIALS: Final = 256
_JETSTREAM_NOT_ENABLED: Final = frozenset({10039, 10076})  # for the account; on the server
_NO_RESPONDERS: Final = "503"

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


class _CertificateProblem(Unavailable):
    """The server's TLS certificate is not one we accept: waiting will not mend it, a person has to."""


@dataclass(frozen=True, slots=True)
class ConnectionOptions:
    """How to reach and to convince a NATS server. All times in seconds, all files as paths, "" for "not set".

    :ivar servers: addresses ``nats://host:4222``, ``tls://host:4222`` or ``host``.
    :ivar name: shown in the server's monitoring.
    :ivar tls_server_name: the name the server's certificate must have, where it is not the address's host.
    :ivar tls_handshake_first: TLS before the server's first word (the server must be set up so too).
    :ivar domain: JetStream domain; ``api_prefix``: another JetStream API prefix than ``$JS.API``.
    :ivar connect_seconds: bound of every step of connecting (TCP, TLS, first answer).
    :ivar ping_seconds: a silent server is given up after three of these.
    """

    servers: tuple[str, ...]
    name: str
    creds_file: str = ""
    nkey_seed_file: str = ""
    user: str = ""
    password: str = field(default="", repr=False)
    password_file: str = ""
    token_file: str = ""
    tls_ca_file: str = ""
    tls_cert_file: str = ""
    tls_key_file: str = ""
    tls_server_name: str = ""
    tls_handshake_first: bool = False
    domain: str = ""
    api_prefix: str = ""
    inbox_prefix: str = "_INBOX"
    connect_seconds: float = 5
    ping_seconds: float = 10
    request_seconds: float = 5

    def __repr__(self) -> str:
        shown = [
            f"{f.name}={_without_userinfo(self.servers) if f.name == 'servers' else getattr(self, f.name)!r}"
            for f in dataclasses.fields(self)
            if f.repr
        ]
        return f"ConnectionOptions({', '.join(shown)})"


def _without_userinfo(servers: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(re.sub(r"^(\w+://)?.*@", r"\1***@", server) for server in servers)


# --- pure decisions -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Server:
    """One address of the pool. ``tls_name``: expected in the certificate where a cluster told us an IP."""

    url: SplitResult = field(repr=False)
    tls_name: str = ""
    discovered: bool = False

    @property
    def host(self) -> str:
        name = self.url.hostname or ""
        return f"{f'[{name}]' if ':' in name else name}:{self.url.port}"

    def sibling(self, url: str) -> _Server | None:
        """Another server of this one's cluster, reached with the same user info; ``None``: not an address."""
        try:
            found = _parse_server(url)
        except ConfigError:
            return None
        userinfo, at, _ = self.url.netloc.rpartition("@")
        teller = self.tls_name or self.url.hostname or ""
        by_name = _is_ip(found.url.hostname or "") and not _is_ip(teller)
        return _Server(
            url=found.url._replace(netloc=f"{userinfo}{at}{found.host}"),
            tls_name=teller if by_name else "",
            discovered=True,
        )


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _parse_server(address: str) -> _Server:
    """Read a server's address; nats-py's rules, but for websockets (they need a package we do not have).

    :raises ConfigError: it is not one.
    """
    try:
        url = urlsplit(address if "://" in address else f"nats://{address}")
        port = url.port or 4222
    except ValueError:
        url, port = SplitResult("", "", "", "", ""), 0
    if url.scheme not in ("nats", "tls") or not url.hostname or url.path not in ("", "/"):
        [shown] = _without_userinfo((address,))
        raise ConfigError(f"{shown!r} is not the address of a nats-server", hint="write nats://host:4222 or tls://…")
    userinfo, at, _ = url.netloc.rpartition("@")
    host = f"[{url.hostname}]" if ":" in url.hostname else url.hostname
    return _Server(url=SplitResult(url.scheme, f"{userinfo}{at}{host}:{port}", "", "", ""))


def _check_options(options: ConnectionOptions) -> list[_Server]:
    """Return the servers.

    :raises ConfigError: the options cannot ever work.
    """
    if not options.servers:
        raise ConfigError("no nats server is configured", hint="set nats.servers")
    kinds = {
        "creds_file": options.creds_file,
        "nkey_seed_file": options.nkey_seed_file,
        "user": options.user,
        "token_file": options.token_file,
    }
    chosen = [kind for kind, value in kinds.items() if value]
    if len(chosen) > 1:
        raise ConfigError(f"nats: {' and '.join(chosen)} exclude each other", hint="keep one way to log in")
    if (options.password or options.password_file) and not options.user:
        raise ConfigError("nats: a password without a user")
    if options.password and options.password_file:
        raise ConfigError("nats: password and password_file exclude each other")
    if options.tls_key_file and not options.tls_cert_file:
        raise ConfigError("nats: tls.key_file without tls.cert_file")
    if options.domain and options.api_prefix:
        raise ConfigError("nats: domain and prefix exclude each other")
    return [_parse_server(address) for address in options.servers]


def check_version(version: tuple[int, int, int], host: str) -> None:
    """Refuse a server that lacks what the store needs.

    :raises Unavailable: it is older than :data:`MIN_SERVER`.
    """
    if version < MIN_SERVER:
        have, want = ".".join(map(str, version)), ".".join(map(str, MIN_SERVER[:2]))
        raise Unavailable(f"nats-server {have} at {host} is too old: syncd needs {want} or newer")


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


def _explain(exc: BaseException, server: _Server, options: ConnectionOptions) -> SyncdError:
    """Say why a connection to ``server`` could not be made, or ended."""
    host = server.host
    if isinstance(exc, SyncdError):
        return exc
    if isinstance(exc, ssl.SSLCertVerificationError):
        return _explain_certificate(exc, server, options)
    if isinstance(exc, ssl.SSLError):
        reason = (exc.reason or str(exc)).replace("_", " ").lower()
        if "alert" in reason and ("certificate" in reason or "unknown ca" in reason):
            return _certificate_refused(server, reason)
        return Unavailable(f"TLS with nats server at {host} failed: {reason}")
    if isinstance(exc, nats.errors.SecureConnWantedError):
        return _CertificateProblem(
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


def _certificate_refused(server: _Server, reason: str) -> NotPermitted:
    return NotPermitted(
        f"nats server at {server.host} refused our TLS certificate: {reason}",
        hint="check tls.cert_file and tls.key_file",
    )


def _explain_certificate(exc: ssl.SSLCertVerificationError, server: _Server, options: ConnectionOptions) -> SyncdError:
    whose = f"the TLS certificate of nats server at {server.host}"
    code = exc.verify_code
    if code == _CERT_EXPIRED:
        return _CertificateProblem(f"{whose} has expired")
    if code == _CERT_NOT_YET_VALID:
        return _CertificateProblem(f"{whose} is not valid yet", hint="compare the clocks of both hosts")
    if code in _CERT_WRONG_NAME:
        name = options.tls_server_name or server.tls_name or server.url.hostname
        return _CertificateProblem(
            f"{whose} is not valid for the name {name!r} (hostname mismatch)", hint="see tls.server_name"
        )
    if code in _CERT_UNKNOWN_CA:
        ca = options.tls_ca_file or "of this system"
        return _CertificateProblem(
            f"{whose} is signed by an unknown CA: {exc.verify_message}", hint=f"trusted CAs are those {ca}"
        )
    return _CertificateProblem(f"{whose} is not acceptable: {exc.verify_message}")


def _wants_tls(options: ConnectionOptions, server: _Server) -> bool:
    return bool(
        server.url.scheme == "tls"
        or options.tls_ca_file
        or options.tls_cert_file
        or options.tls_server_name
        or options.tls_handshake_first
    )


def _denied_subject(text: str) -> tuple[str, str] | None:
    """Read ("publish" | "subscription", lower-cased subject) from the text of a permission violation."""
    match = _DENIED.search(text)
    return (match[1], re.sub(r"\\(.)", r"\1", match[2])) if match else None


# --- files, blocking ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, repr=False)
class _Secrets:
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


def _load(options: ConnectionOptions, server: _Server) -> _Secrets:
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
    return _Secrets(password=password, token=token, jwt=jwt, seed=seed, tls=_tls_context(options, server))


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


def _sign(seed: str, nonce: str) -> bytes:
    pair = nkeys.from_seed(bytearray(seed.encode()))
    signature = base64.b64encode(pair.sign(nonce.encode()))
    pair.wipe()
    return signature


def _tls_context(options: ConnectionOptions, server: _Server) -> ssl.SSLContext | None:
    """Build a fresh context, so that rotated certificates take effect; ``None``: we do not ask for TLS."""
    if not _wants_tls(options, server):
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


# --- one connection -----------------------------------------------------------------------------------------


READ_BYTES: Final = 256 * 1024
"""What is read from the socket at once; nats-py's own 32 KiB cost a large download a tenth of its time."""

nats.aio.client.DEFAULT_BUFFER_SIZE = READ_BYTES


class _Client(Client):
    """nats-py's client for exactly one connection to exactly one server.

    The overrides are of nats-py 2.16; a test notices when a newer one has other inner names.
    """

    def __init__(self, *, must_tls: bool) -> None:
        super().__init__()
        self._must_tls = must_tls
        self._tasks: set[asyncio.Task[Any]] = set()
        self.wants_certificate = False
        self.on_lost: Callable[[], None] | None = None

    async def _select_next_server(self) -> None:
        # The original retries a server that does not answer at least once, and for ever with -1.
        server = self._server_pool[0]
        await self._connect_to_server(server)
        self._current_server = server

    async def _process_info(
        self,
        info: dict[str, Any],
        initial_connection: bool = False,  # noqa: FBT001, FBT002 - nats-py's signature
    ) -> None:
        # The original talks (and sends the password) in clear text where INFO, which anybody on the way may
        # have written, does not require TLS.
        self.wants_certificate = bool(info.get("tls_verify"))
        if initial_connection and self._must_tls and not self.options["tls_handshake_first"]:
            info["tls_required"] = bool(info.get("tls_required") or info.get("tls_available"))
            if not info["tls_required"]:
                raise nats.errors.SecureConnWantedError
        await super()._process_info(info, initial_connection)

    async def _process_pong(self) -> None:
        # The original dies (its read loop ends) on the late answer to a flush that has timed out.
        if self._pongs and self._pongs[0].done():
            self._pongs[0] = asyncio.get_running_loop().create_future()
        await super()._process_pong()

    async def _close(
        self,
        status: int,
        do_cbs: bool = True,  # noqa: FBT001, FBT002 - nats-py's signature
    ) -> None:
        # The original waits until the socket has taken all that is buffered (never, if the server is frozen), and
        # for the end of a transport that a failed TLS handshake has taken over (never).
        self.abort()
        self._transport = None
        for sub in self._subs.values():
            if isinstance(sub._wait_for_msgs_task, asyncio.Task):  # noqa: SLF001
                self._tasks.add(sub._wait_for_msgs_task)  # noqa: SLF001
        if current := asyncio.current_task():
            self._tasks.add(current)
        await super()._close(status, do_cbs)

    def abort(self) -> None:
        """Drop the socket now, with all that is buffered for it."""
        self._pending.clear()
        self._pending_data_size = 0
        writer = getattr(self._transport, "_io_writer", None)
        if writer is not None:
            writer.transport.abort()
        if self.on_lost is not None:
            self.on_lost()

    def loops(self) -> set[asyncio.Task[Any]]:
        """The tasks without which the client is dead, whatever its status says."""
        names = ("_reading_task", "_ping_interval_task", "_flusher_task")
        return {task for name in names if (task := getattr(self, name)) is not None}

    async def dispose(self) -> None:
        """Drop the socket and end all tasks, within a second; never raises but on cancellation."""
        self.on_lost = None
        self.abort()
        if self._flush_queue is not None:  # else connect() never began, and there is nothing to close
            await self.close()
        tasks = {t for t in self._tasks | self.loops() if not t.done()} - {asyncio.current_task()}
        if tasks:  # close() has cancelled them
            await asyncio.wait(tasks, timeout=1)
        await asyncio.sleep(0)  # the aborted transport closes its socket in the next turn of the loop


@dataclass(slots=True, eq=False)
class _Waiting:
    subject: str
    future: asyncio.Future[Msg]


@dataclass(slots=True, eq=False)
class _Link:
    """A living connection and the requests that wait on it, by the last token of their reply subjects."""

    client: _Client
    server: _Server
    lost: asyncio.Future[None]
    inbox: str = ""
    subscription: Subscription | None = None
    waiting: dict[str, _Waiting] = field(default_factory=dict)

    def fail(self, error: SyncdError, subject: str | None = None) -> None:
        """Fail all waiting requests, or those to one (lower-cased) subject."""
        for waiting in list(self.waiting.values()):
            if not waiting.future.done() and (subject is None or waiting.subject.lower() == subject):
                waiting.future.set_exception(error)


@dataclass(slots=True, eq=False)
class _DenialWatch:
    subject: str
    callback: Callable[[NotPermitted], None]

    def takes(self, lowered: str) -> bool:
        mine = self.subject.lower()
        return lowered == mine or (mine.endswith((">", ".")) and lowered.startswith(mine.removesuffix(">")))


def _not_permitted(kind: str, subject: str) -> NotPermitted:
    verb = "publish" if kind == "publish" else "subscribe"
    return NotPermitted(
        f'the nats server does not permit us to {verb} to "{subject}"',
        hint=f"grant the user {verb} on it",
    )


def _cancelling() -> int:
    task = asyncio.current_task()
    return task.cancelling() if task is not None else 0


async def send(
    client: Client,
    subject: str,
    payload: bytes,
    *,
    reply: str = "",
    headers: Mapping[str, str] | None = None,
    deadline: float,
) -> None:
    """Publish, with back-pressure, until ``deadline`` (the loop's clock).

    ``Client.publish`` swallows a cancellation that hits it while it waits for a full buffer; this does not.

    :raises TimeoutError: the buffer stayed full; the message may still be sent.
    :raises nats.errors.Error: see :func:`as_syncd_error`.
    """
    fields = dict(headers) if headers else None
    if client.is_connected and client.pending_data_size + len(payload) < PENDING_BYTES - ROOM_FOR_HEADERS:
        # Below its limit nats-py (2.16) only appends to its buffer: no wait to bound, or to be cancelled in.
        await client.publish(subject, payload, reply=reply, headers=fields)
        return
    cancelled = _cancelling()
    async with asyncio.timeout_at(deadline) as limit:
        await client.publish(subject, payload, reply=reply, headers=fields)
    if _cancelling() > cancelled:
        raise asyncio.CancelledError
    if limit.expired():
        raise TimeoutError


class Connection:
    """The supervised connection. Use it from one event loop.

    :param options: see there.
    :param log: a structlog logger; default: the global one.
    :param rng: uniform numbers in [0, 1) for the jitter.
    :raises ConfigError: the options can never work.
    """

    def __init__(
        self, options: ConnectionOptions, *, log: Any = None, rng: Callable[[], float] = random.random
    ) -> None:
        self._options = options
        self._pool = _check_options(options)
        random.shuffle(self._pool)
        self._log = log if log is not None else structlog.get_logger()
        self._rng = rng
        self._task: asyncio.Task[None] | None = None
        self._link: _Link | None = None
        self._closed = False
        self._changed = asyncio.Event()
        self._error: SyncdError | None = None
        self._refusals = 0
        self._told: set[type[SyncdError]] = set()
        self._denials_told: set[str] = set()
        self._watches: list[_DenialWatch] = []
        self._tokens = itertools.count(1)
        self.epoch = 0

    def __repr__(self) -> str:
        return f"<Connection {self._options.name!r} {self.state} epoch {self.epoch}>"

    # --- state ---

    @property
    def state(self) -> str:
        """One of connecting (never connected yet) | connected | disconnected | closed (or not started)."""
        if self._closed or self._task is None:
            return "closed"
        if self._link is not None:
            return "connected"
        return "disconnected" if self.epoch else "connecting"

    @property
    def last_error(self) -> str:
        """Why the last attempt failed or the last connection ended, "" if none did; one line, no secrets."""
        return str(self._error) if self._error else ""

    @property
    def api(self) -> str:
        """The prefix of JetStream's API subjects, without a dot at its end."""
        if self._options.api_prefix:
            return self._options.api_prefix.rstrip(".")
        return f"$JS.{self._options.domain}.API" if self._options.domain else "$JS.API"

    @property
    def host(self) -> str:
        """The connected server's ``host:port``; all configured ones where there is none."""
        return self._link.server.host if self._link else ", ".join(s.host for s in self._pool if not s.discovered)

    async def server_version(self) -> tuple[int, int, int]:
        """Return the version of the connected server (not of other servers of its cluster).

        :raises Unavailable, NotPermitted: not connected, see :meth:`client`.
        """
        return _parse_version((await self.client()).connected_server_version)

    # --- life ---

    async def start(self, max_seconds: float | None = None) -> None:
        """Begin to connect, and stay connected until :meth:`close`.

        :param max_seconds: wait that long for the first connection; ``None``: return at once, try for ever.
        :raises ConfigError, NotPermitted, Unavailable: (with ``max_seconds``) no connection; nothing is left
            running. What waiting does not mend is raised once each server was tried, the rest at the end.
        """
        if self._task is not None:
            raise RuntimeError("a Connection is started once")
        self._task = asyncio.create_task(self._supervise(), name=f"nats-connection-{self._options.name}")
        if max_seconds is None:
            return
        try:
            await self._first(max_seconds)
        except BaseException:
            await self.close()
            raise

    async def _first(self, max_seconds: float) -> None:
        try:
            async with asyncio.timeout(max_seconds):
                while not self.epoch:
                    if self._error is not None and self._refusals >= len(self._pool):
                        raise self._error
                    await self._changed.wait()
        except TimeoutError:
            raise self._error or self._silent(max_seconds) from None

    def _silent(self, max_seconds: float) -> Unavailable:
        return Unavailable(f"no connection to nats server at {self.host} within {max_seconds:g} s")

    async def close(self) -> None:
        """Let the server take what was published (for CLOSE_SECONDS at most), then close; no task is left."""
        if self._closed or self._task is None:
            self._closed = True
            return
        self._closed = True
        flush = asyncio.create_task(self._link.client.flush()) if self._link else None
        try:
            if flush is not None:
                await asyncio.wait({flush}, timeout=CLOSE_SECONDS)
        finally:
            while not self._task.done():  # bounded: _supervise sees that it is closed, and waits only for dispose()
                self._task.cancel()
                await asyncio.wait({self._task}, timeout=CANCEL_SECONDS)
            self._notify()
            if flush is not None:
                await _end(flush)

    async def _supervise(self) -> None:
        loop = asyncio.get_running_loop()
        waits = backoff(RETRY_FIRST, RETRY_CAP, rng=self._rng)
        while True:
            server = self._pool.pop(0)
            self._pool.append(server)
            try:
                link = await self._connect(server)
            except SyncdError as error:
                self._note_failure(server, error)
            else:
                began = loop.time()
                self._note_connected(link)
                try:
                    await asyncio.wait({link.lost, *link.client.loops()}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    self._drop(link)
                    await link.client.dispose()
                self._note_disconnected(link)
                if loop.time() - began >= STEADY_SECONDS:
                    waits = backoff(RETRY_FIRST, RETRY_CAP, rng=self._rng)
            if self._closed:  # connect() of nats-py can take the cancellation by close() for a failure
                return
            await asyncio.sleep(next(waits))

    async def _connect(self, server: _Server) -> _Link:
        """Make one connection to one server.

        :raises SyncdError: why not; nothing is left open.
        """
        options = self._options
        secrets = await asyncio.to_thread(_load, options, server)
        client = _Client(must_tls=_wants_tls(options, server))
        link = _Link(client, server, lost=asyncio.get_running_loop().create_future())

        async def on_error(exc: Exception) -> None:
            self._on_error(link, exc)

        try:
            async with asyncio.timeout(3 * options.connect_seconds):
                await client.connect(
                    servers=[server.url.geturl()],
                    name=options.name,
                    error_cb=on_error,
                    allow_reconnect=False,
                    connect_timeout=options.connect_seconds,  # type: ignore[arg-type]  # any number works
                    ping_interval=options.ping_seconds,  # type: ignore[arg-type]
                    max_outstanding_pings=MAX_OUTSTANDING_PINGS,
                    pending_size=PENDING_BYTES,
                    flush_timeout=FLUSH_SECONDS,
                    inbox_prefix=options.inbox_prefix,
                    tls=secrets.tls,
                    tls_hostname=(options.tls_server_name or server.tls_name) or None,
                    tls_handshake_first=options.tls_handshake_first,
                    user=options.user or None,
                    password=secrets.password,
                    token=secrets.token,
                    user_jwt_cb=secrets.jwt.encode if secrets.jwt else None,
                    signature_cb=(lambda nonce: _sign(secrets.seed, nonce)) if secrets.jwt else None,
                    nkeys_seed_str=secrets.seed if not secrets.jwt and secrets.seed else None,
                )
            # nats-py 2.16 takes a closed socket for a PONG, and stays "connecting".
            if not client.is_connected:
                raise client.last_error or nats.errors.UnexpectedEOF()
        except Exception as exc:  # a border: whatever nats-py raises, the daemon goes on trying
            error = _explain(exc, server, options)
            # RACE: with TLS 1.3 the server judges our certificate after the handshake; its alert gets lost where it
            # closes the socket on bytes of ours it has not read. Then only the loss is seen.
            if client.wants_certificate and isinstance(exc, ConnectionError | nats.errors.UnexpectedEOF):
                error = _certificate_refused(server, "it wants one that it trusts")
            await client.dispose()
            raise error from exc
        except BaseException:
            await client.dispose()
            raise
        client.on_lost = lambda: self._drop(link)
        return link

    # --- changes of state ---

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _note_connected(self, link: _Link) -> None:
        self.epoch += 1
        self._link = link
        self._refusals = 0
        self._told.clear()
        self._learn(link)
        version = ".".join(map(str, _parse_version(link.client.connected_server_version)))
        self._log.info("nats_connected", server=link.server.host, epoch=self.epoch, version=version)
        self._notify()

    def _learn(self, link: _Link) -> None:
        """Take the other servers of the cluster into the pool, before the one we have."""
        known = {server.host for server in self._pool}
        for url in link.client.discovered_servers:
            sibling = link.server.sibling(url.geturl())
            if sibling is not None and sibling.host not in known and len(self._pool) < _MAX_DISCOVERED:
                known.add(sibling.host)
                self._pool.insert(0, sibling)

    def _note_failure(self, server: _Server, error: SyncdError) -> None:
        refused = isinstance(error, ConfigError | NotPermitted | _CertificateProblem)
        self._refusals = self._refusals + 1 if refused else 0
        self._error = error
        if server.discovered:
            self._pool.remove(server)  # its cluster tells us again when it is back
        if type(error) not in self._told:
            self._told.add(type(error))
            self._log.warning("nats_refused", server=server.host, error=str(error))
        self._notify()

    def _drop(self, link: _Link) -> None:
        """Take a connection out of use; called at the moment it ends, and again when it is cleaned up."""
        if not link.lost.done():
            link.lost.set_result(None)
        if self._link is link:
            self._link = None
            self._notify()
        link.fail(Unavailable(f"the connection to nats server at {link.server.host} ended before the answer came"))

    def _note_disconnected(self, link: _Link) -> None:
        self._learn(link)  # those that joined since
        reason = link.client.last_error or nats.errors.UnexpectedEOF()
        error = as_syncd_error(reason, f"nats server at {link.server.host} ended the connection")
        if isinstance(reason, nats.errors.StaleConnectionError) and not isinstance(reason, nats.errors.UnexpectedEOF):
            error = Unavailable(f"nats server at {link.server.host} fell silent")
        self._error = error
        self._log.warning("nats_disconnected", server=link.server.host, epoch=self.epoch, error=str(error))

    def _on_error(self, link: _Link, exc: Exception) -> None:
        """nats-py's error callback: runs inside its read loop, so it must be quick and must not raise."""
        if (denied := _denied_subject(str(exc))) is not None and isinstance(exc, nats.errors.Error):
            self._on_denial(link, *denied)
        elif isinstance(exc, nats.errors.SlowConsumerError):
            self._log.warning("nats_slow_consumer", subject=exc.subject)
        elif not isinstance(exc, nats.errors.Error | OSError):
            self._log.error("nats_callback_failed", error=repr(exc), exc_info=exc)
        # The rest (no connection, end of file) ends the client, and is told by the supervisor.

    def _on_denial(self, link: _Link, kind: str, lowered: str) -> None:
        watches = [watch for watch in self._watches if watch.takes(lowered)]
        names = [w.subject for w in link.waiting.values()] + [w.subject for w in watches]
        subject = next((name for name in names if name.lower() == lowered), lowered)
        error = _not_permitted(kind, subject)
        if lowered not in self._denials_told and len(self._denials_told) < _MAX_REMEMBERED_DENIALS:
            self._denials_told.add(lowered)
            self._log.warning("nats_permission_denied", action=kind, subject=subject)
        if kind == "publish":
            link.fail(error, lowered)
        elif link.inbox and lowered == f"{link.inbox}.*".lower():
            link.inbox = ""  # the next request subscribes anew: the right may have been granted meanwhile
            link.fail(error)
        for watch in watches:
            try:
                watch.callback(error)
            except Exception as exc:  # noqa: BLE001 - nats-py's read loop must not end by a bug elsewhere
                self._log.error("nats_callback_failed", error=repr(exc), exc_info=exc)

    # --- use ---

    async def client(self, max_seconds: float = 10) -> Client:
        """Return the connected client; it belongs to the current ``epoch``.

        :raises Unavailable, NotPermitted: none within ``max_seconds``; names the last error.
        """
        return (await self._connected(max_seconds)).client

    async def _connected(self, max_seconds: float) -> _Link:
        try:
            async with asyncio.timeout(max_seconds):
                while self._link is None:
                    if self.state == "closed":
                        raise Unavailable("the connection to the nats server is closed")
                    await self._changed.wait()
                return self._link
        except TimeoutError:
            error = self._error or self._silent(max_seconds)
            kind = NotPermitted if isinstance(error, NotPermitted) else Unavailable
            raise kind(error.message, hint=error.hint) from None

    async def wait_epoch(self, seen: int, max_seconds: float) -> int:
        """Return the epoch as soon as it is greater than ``seen``, or when ``max_seconds`` have passed."""
        try:
            async with asyncio.timeout(max_seconds):
                while self.epoch <= seen:
                    await self._changed.wait()
        except TimeoutError:
            pass
        return self.epoch

    def on_denied(self, subject: str, callback: Callable[[NotPermitted], None]) -> Callable[[], None]:
        """Call back when the server denies us to publish or to subscribe to a subject.

        The server's message reaches us in lower case: subjects that differ in case only are not told apart.

        :param subject: ending in ">" or ".": every subject that begins so.
        :param callback: quick; runs in the event loop.
        :returns: call it to end the interest.
        """
        watch = _DenialWatch(subject, callback)
        self._watches.append(watch)

        def unregister() -> None:
            if watch in self._watches:
                self._watches.remove(watch)

        return unregister

    async def request(
        self,
        subject: str,
        payload: bytes = b"",
        *,
        headers: Mapping[str, str] | None = None,
        max_seconds: float | None = None,
    ) -> Msg:
        """Send a request and return its (first) answer.

        A request that failed with Unavailable or StoreTimeout may have been carried out all the same.

        :param max_seconds: for everything: waiting for a connection, sending, the answer.
        :raises NoResponders: nobody listens on ``subject``.
        :raises Unavailable: not connected, or the connection ended.
        :raises StoreTimeout: no answer.
        :raises NotPermitted: told at once, with the subject; also where our inbox is not permitted.
        :raises StoreRejected: larger than the server takes.
        """
        seconds = self._options.request_seconds if max_seconds is None else max_seconds
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        link = await self._connected(seconds)
        token = f"{next(self._tokens):x}"
        waiting = _Waiting(subject, loop.create_future())
        link.waiting[token] = waiting
        try:
            inbox = await self._inbox(link, deadline)
            reply = f"{inbox}.{token}"
            _check_size(link.client, subject, reply, payload, headers)
            await send(link.client, subject, payload, reply=reply, headers=headers, deadline=deadline)
            async with asyncio.timeout_at(deadline):
                answer = await waiting.future
        except TimeoutError:
            raise StoreTimeout(f"no answer on {subject} within {seconds:g} s") from None
        except nats.errors.Error as exc:
            raise as_syncd_error(exc, f"request to {subject}") from exc
        finally:
            del link.waiting[token]
            if waiting.future.done() and not waiting.future.cancelled():
                waiting.future.exception()  # it counts as seen, also if something else was raised first
        if answer.headers and answer.headers.get("Status") == _NO_RESPONDERS:
            raise NoResponders(f"nobody answers on {subject}")
        return answer

    async def _inbox(self, link: _Link, deadline: float) -> str:
        if not link.inbox:
            link.inbox = link.client.new_inbox()

            async def on_answer(message: Msg) -> None:
                waiting = link.waiting.get(message.subject.rpartition(".")[2])
                if waiting is not None and not waiting.future.done():
                    waiting.future.set_result(message)

            dead, link.subscription = link.subscription, None
            try:
                async with asyncio.timeout_at(deadline):
                    # Concurrent requests go on with the new inbox: their PUB is queued after this SUB.
                    link.subscription = await link.client.subscribe(f"{link.inbox}.*", cb=on_answer)
                    if dead is not None:
                        await dead.unsubscribe()
            except BaseException:
                link.inbox = ""
                raise
        return link.inbox


async def _end(task: asyncio.Task[Any]) -> None:
    """Cancel until it has ended: parts of nats-py swallow a first cancellation."""
    while not task.done():
        task.cancel()
        await asyncio.wait({task}, timeout=0.1)
    if not task.cancelled():
        task.exception()


def _parse_version(version: ServerVersion) -> tuple[int, int, int]:
    match = _VERSION.search(repr(version))  # its own parser refuses what is not strictly semantic
    return (int(match[1]), int(match[2]), int(match[3])) if match else (0, 0, 0)


def _check_size(client: Client, subject: str, reply: str, payload: bytes, headers: Mapping[str, str] | None) -> None:
    """Refuse what makes the server close the connection under everybody (nats-py looks at the payload)."""
    size = len(payload)
    if headers:
        size += len("NATS/1.0\r\n\r\n") + sum(len(k.encode()) + len(v.encode()) + 4 for k, v in headers.items())
    if size > client.max_payload:
        raise StoreRejected(f"a message of {size} bytes to {subject}: the server takes {client.max_payload}")
    if len(subject.encode()) + len(reply.encode()) + _CONTROL_LINE_REST > MAX_CONTROL_LINE:
        raise StoreRejected(f"a subject of {len(subject.encode())} bytes is too long: {subject[:64]}…")


async def require_jetstream(conn: Connection) -> None:
    """Check that the connected server is new enough and gives our account JetStream.

    Not for subscribers: their account may rightly have none (it imports the few services they need).

    :raises Unavailable: too old a server, or no JetStream here.
    :raises NotPermitted, StoreTimeout: we could not ask.
    """
    check_version(await conn.server_version(), conn.host)
    try:
        answer = await conn.request(f"{conn.api}.INFO")
    except NoResponders:
        hint = "enable jetstream in the server's configuration; for a leaf node see nats.domain"
        raise Unavailable(f"JetStream is not enabled on nats server at {conn.host}", hint=hint) from None
    try:
        error = json.loads(answer.data).get("error") or {}
        code, text = error.get("err_code", 0), str(error.get("description", ""))
    except (ValueError, AttributeError):
        raise Unavailable(f"nats server at {conn.host} gave no readable answer on {conn.api}.INFO") from None
    if code in _JETSTREAM_NOT_ENABLED:
        raise Unavailable(
            f"JetStream is not enabled for our account on nats server at {conn.host}",
            hint="enable jetstream for the account",
        )
    if error:
        raise Unavailable(f"JetStream on nats server at {conn.host} is not available: {text}")
