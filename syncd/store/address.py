"""Where the nats-servers are, and how to reach and convince them: the options of a connection, as plain values."""

from __future__ import annotations

import dataclasses
import ipaddress
import re
from dataclasses import dataclass, field
from urllib.parse import SplitResult, urlsplit

from syncd.errors import ConfigError


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
            f"{f.name}={without_userinfo(self.servers) if f.name == 'servers' else getattr(self, f.name)!r}"
            for f in dataclasses.fields(self)
            if f.repr
        ]
        return f"ConnectionOptions({', '.join(shown)})"


def without_userinfo(servers: tuple[str, ...]) -> tuple[str, ...]:
    """Return the addresses without names and passwords, for logs."""
    return tuple(re.sub(r"^(\w+://)?.*@", r"\1***@", server) for server in servers)


@dataclass(frozen=True, slots=True)
class Server:
    """One address of the pool. ``tls_name``: expected in the certificate where a cluster told us an IP."""

    url: SplitResult = field(repr=False)
    tls_name: str = ""
    discovered: bool = False

    @property
    def host(self) -> str:
        """``host:port``, for people."""
        name = self.url.hostname or ""
        return f"{f'[{name}]' if ':' in name else name}:{self.url.port}"

    def sibling(self, url: str) -> Server | None:
        """Another server of this one's cluster, reached with the same user info; ``None``: not an address."""
        try:
            found = parse_server(url)
        except ConfigError:
            return None
        userinfo, at, _ = self.url.netloc.rpartition("@")
        teller = self.tls_name or self.url.hostname or ""
        by_name = _is_ip(found.url.hostname or "") and not _is_ip(teller)
        return Server(
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


def parse_server(address: str) -> Server:
    """Read a server's address; nats-py's rules, but for websockets (they need a package we do not have).

    :raises ConfigError: it is not one.
    """
    try:
        url = urlsplit(address if "://" in address else f"nats://{address}")
        port = url.port or 4222
    except ValueError:
        url, port = SplitResult("", "", "", "", ""), 0
    if url.scheme not in ("nats", "tls") or not url.hostname or url.path not in ("", "/"):
        [shown] = without_userinfo((address,))
        raise ConfigError(f"{shown!r} is not the address of a nats-server", hint="write nats://host:4222 or tls://…")
    userinfo, at, _ = url.netloc.rpartition("@")
    host = f"[{url.hostname}]" if ":" in url.hostname else url.hostname
    return Server(url=SplitResult(url.scheme, f"{userinfo}{at}{host}:{port}", "", "", ""))


def check_options(options: ConnectionOptions) -> list[Server]:
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
    return [parse_server(address) for address in options.servers]


def wants_tls(options: ConnectionOptions, server: Server) -> bool:
    """Tell whether we insist on TLS, whatever the server says."""
    return bool(
        server.url.scheme == "tls"
        or options.tls_ca_file
        or options.tls_cert_file
        or options.tls_server_name
        or options.tls_handshake_first
    )
