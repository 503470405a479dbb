"""The supervised connection against real servers that refuse, die, freeze and come back."""

from __future__ import annotations

import asyncio
import dataclasses
import signal
import time
from typing import TYPE_CHECKING, Any

import nats.errors
import psutil
import pytest
from nats.aio.client import Client
from structlog.testing import capture_logs

from syncd.errors import ConfigError, NotPermitted, StoreRejected, StoreTimeout, SyncdError, Unavailable
from syncd.store import address, reasons
from syncd.store import client as store_client
from syncd.store.address import ConnectionOptions
from syncd.store.connection import Connection, require_jetstream
from syncd.store.reasons import NoResponders, as_syncd_error, check_version
from tests.support.pki import Authority, Operator, new_seed, public_key
from tests.support.server import NatsServer, free_port

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping
    from pathlib import Path

    from nats.aio.msg import Msg

    Serve = Callable[..., NatsServer]
    Connect = Callable[..., Connection]

SECRET = "s3cret-of-this-test"
SOON = 10.0


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    servers: list[NatsServer] = []

    def start(config: str = "", *, jetstream: bool = False, started: bool = True) -> NatsServer:
        server = NatsServer(tmp_path / f"nats{len(servers)}", config, jetstream=jetstream)
        servers.append(server)
        return server.start() if started else server

    yield start
    for server in servers:
        server.stop(kill=True)


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    """Make connections; afterwards close them and require that no task of theirs is left."""
    before = asyncio.all_tasks()
    connections: list[Connection] = []

    def make(server: NatsServer | str, **options: Any) -> Connection:
        url = server if isinstance(server, str) else server.url
        connections.append(Connection(ConnectionOptions(servers=(url,), name="test", **options)))
        return connections[-1]

    yield make
    for conn in connections:
        began = time.monotonic()
        await conn.close()
        assert time.monotonic() - began < 4
        assert conn.state == "closed"
    await asyncio.sleep(0)
    assert asyncio.all_tasks() - before - {asyncio.current_task()} == set()


async def until(condition: Callable[[], bool], what: str, seconds: float = SOON) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        await asyncio.sleep(0.01)


async def echo(conn: Connection) -> None:
    """A round trip through the server: subscribe, request, answer."""
    client = await conn.client()

    async def answer(message: Msg) -> None:
        await message.respond(b"you said " + message.data)

    subscription = await client.subscribe("echo", cb=answer)
    assert (await conn.request("echo", b"hello")).data == b"you said hello"
    await subscription.unsubscribe()


async def raised(awaitable: Awaitable[Any]) -> SyncdError:
    with pytest.raises(SyncdError) as caught:
        await awaitable
    return caught.value


def events(logs: list[MutableMapping[str, Any]]) -> list[str]:
    return [entry["event"] for entry in logs]


# --- pure ---


def test_an_old_server_is_refused_with_its_version() -> None:
    """Anything below 2.12 is too old; the message names version and host."""
    check_version((2, 12, 0), "h:1")
    check_version((3, 0, 0), "h:1")
    with pytest.raises(Unavailable) as caught:
        check_version((2, 9, 10), "h:1")
    assert str(caught.value) == "nats-server 2.9.10 at h:1 is too old: syncd needs 2.12 or newer"


@pytest.mark.fault("K14")
def test_no_secret_is_in_a_repr() -> None:
    """Options with a password, and with secrets in both addresses, and a connection with them go through repr and str.

    No secret is shown, the host is.
    """
    options = ConnectionOptions(servers=(f"nats://u:{SECRET}@h:1", f"{SECRET}@h"), name="n", user="u", password=SECRET)
    assert SECRET not in repr(options) + repr(Connection(options)) + str(options)
    assert "h:1" in repr(options)


@pytest.mark.parametrize(
    "wrong",
    [
        {"servers": ()},
        {"servers": ("ws://h:1",)},
        {"servers": ("nats://h:port",)},
        {"servers": ("nats://",)},
        {"user": "u", "token_file": "t"},
        {"creds_file": "c", "nkey_seed_file": "s"},
        {"password": "p"},
        {"user": "u", "password": "p", "password_file": "f"},
        {"tls_key_file": "k"},
        {"domain": "d", "api_prefix": "p"},
    ],
    ids=str,
)
def test_options_that_can_never_work_are_refused_at_once(wrong: dict[str, Any]) -> None:
    """Contradictions and addresses that are none are configuration errors."""
    with pytest.raises(ConfigError):
        Connection(dataclasses.replace(ConnectionOptions(servers=("h",), name="n"), **wrong))


def test_the_api_prefix_follows_domain_and_prefix() -> None:
    """JetStream's API subjects begin as the options say."""
    options = ConnectionOptions(servers=("h",), name="n")
    assert Connection(options).api == "$JS.API"
    assert Connection(dataclasses.replace(options, domain="hub")).api == "$JS.hub.API"
    assert Connection(dataclasses.replace(options, api_prefix="x.js.")).api == "x.js"


@pytest.mark.parametrize(
    ("exc", "kind"),
    [
        (nats.errors.NoRespondersError(), NoResponders),
        (nats.errors.TimeoutError(), StoreTimeout),
        (nats.errors.FlushTimeoutError(), StoreTimeout),
        (nats.errors.ConnectionClosedError(), Unavailable),
        (nats.errors.ConnectionReconnectingError(), Unavailable),
        (nats.errors.OutboundBufferLimitError(), Unavailable),
        (nats.errors.MaxPayloadError(), StoreRejected),
        (nats.errors.BadSubjectError(), StoreRejected),
        (nats.errors.AuthorizationError(), NotPermitted),
        (nats.errors.Error('nats: permissions violation for publish to "x"'), NotPermitted),
        (ConnectionResetError(104, "Connection reset by peer"), Unavailable),
    ],
    ids=repr,
)
def test_errors_of_the_client_are_told_in_our_words(exc: Exception, kind: type[SyncdError]) -> None:
    """Each kind of failure has one kind of ours."""
    assert type(as_syncd_error(exc, "doing")) is kind


def test_nats_py_still_has_the_inner_names_that_are_overridden() -> None:
    """A newer nats-py that renames them must be noticed here, not in the field."""
    for name in ("_select_next_server", "_process_info", "_process_pong", "_close", "_connect_to_server"):
        assert callable(getattr(Client, name))
    client = Client()
    names = """_current_server _flush_queue _flusher_task _pending _pending_data_size
        _ping_interval_task _pongs _reading_task _server_pool _subs _transport"""
    assert [name for name in names.split() if not hasattr(client, name)] == []


@pytest.mark.parametrize(
    ("told", "tls_name"),
    [("tls://10.0.0.2:4223", "nats.example"), ("tls://b.example:4223", ""), ("tls://[::1]:4223", "nats.example")],
)
def test_a_server_that_the_cluster_tells_keeps_login_and_tls_name(told: str, tls_name: str) -> None:
    """User info is the same in the whole cluster; an IP is checked under the name of who told it."""
    server = address.parse_server("tls://u:p@nats.example:4222").sibling(told)
    assert server is not None
    assert server.url.geturl() == told.replace("//", "//u:p@")
    assert server.tls_name == tls_name
    assert "u:p" not in repr(server)


# --- credentials ---


async def test_a_user_with_a_password_is_let_in(serve: Serve, connect: Connect) -> None:
    """User and password, from the options."""
    server = serve(f'authorization {{ user: "u", password: "{SECRET}" }}')
    conn = connect(server, user="u", password=SECRET)
    await conn.start(SOON)
    assert conn.state == "connected"
    assert conn.epoch == 1
    assert conn.last_error == ""
    assert (await conn.server_version())[0] >= 2
    await echo(conn)


async def test_a_password_from_a_file_is_let_in(serve: Serve, connect: Connect, tmp_path: Path) -> None:
    """The line end of the file is not part of the password."""
    server = serve(f'authorization {{ user: "u", password: "{SECRET}" }}')
    (tmp_path / "pw").write_text(f"{SECRET}\n")
    conn = connect(server, user="u", password_file=str(tmp_path / "pw"))
    await conn.start(SOON)
    await echo(conn)


async def test_user_info_in_the_address_is_let_in(serve: Serve, connect: Connect) -> None:
    """``nats://user:password@host``."""
    server = serve(f'authorization {{ user: "u", password: "{SECRET}" }}')
    with capture_logs() as logs:
        conn = connect(server.url.replace("//", f"//u:{SECRET}@"))
        await conn.start(SOON)
        await echo(conn)
    assert SECRET not in repr(logs)
    assert conn.host == f"127.0.0.1:{server.port}"


async def test_a_token_from_a_file_is_let_in(serve: Serve, connect: Connect, tmp_path: Path) -> None:
    """A token, alone."""
    server = serve(f'authorization {{ token: "{SECRET}" }}')
    (tmp_path / "token").write_text(f"{SECRET}\n")
    conn = connect(server, token_file=str(tmp_path / "token"))
    await conn.start(SOON)
    await echo(conn)


async def test_an_nkey_is_let_in(serve: Serve, connect: Connect, tmp_path: Path) -> None:
    """The server knows the public key, we sign its challenge."""
    seed = new_seed()
    server = serve(f"authorization {{ users: [ {{ nkey: {public_key(seed)} }} ] }}")
    (tmp_path / "seed").write_text(f"# a comment\n{seed}\n")
    conn = connect(server, nkey_seed_file=str(tmp_path / "seed"))
    await conn.start(SOON)
    await echo(conn)


async def test_a_creds_file_is_let_in(serve: Serve, connect: Connect, tmp_path: Path) -> None:
    """A user JWT and its seed, as nsc writes them."""
    operator = Operator()
    server = serve(operator.server_config())
    (tmp_path / "creds").write_text(operator.creds())
    conn = connect(server, creds_file=str(tmp_path / "creds"))
    await conn.start(SOON)
    await echo(conn)


@pytest.mark.fault("N6 K14")
async def test_a_wrong_password_is_refused_at_once_and_never_told(serve: Serve, connect: Connect) -> None:
    """We connect to a real server with another password than it wants.

    NotPermitted within 2 s, one event, and the password in neither log, error nor repr.
    """
    server = serve('authorization { user: "u", password: "right" }')
    conn = connect(server, user="u", password=SECRET)
    began = time.monotonic()
    with capture_logs() as logs:
        error = await raised(conn.start(SOON))
    assert time.monotonic() - began < 2
    assert type(error) is NotPermitted
    assert error.message.startswith(f"nats server refused our credentials at 127.0.0.1:{server.port}")
    assert events(logs) == ["nats_refused"]
    assert SECRET not in repr(logs) + str(error) + repr(conn)
    assert conn.state == "closed"


@pytest.mark.parametrize("option", ["creds_file", "nkey_seed_file", "token_file", "password_file", "tls_ca_file"])
async def test_a_missing_file_is_a_configuration_error(
    serve: Serve, connect: Connect, tmp_path: Path, option: str
) -> None:
    """The message names the file."""
    user = {"user": "u"} if option == "password_file" else {}
    conn = connect(serve(), **{option: str(tmp_path / "gone")}, **user)
    error = await raised(conn.start(SOON))
    assert type(error) is ConfigError
    assert str(tmp_path / "gone") in str(error)


@pytest.mark.parametrize("keep", [0, 40, 0.5, 0.8], ids=str)
async def test_half_a_creds_file_does_not_block_and_heals(
    serve: Serve, connect: Connect, tmp_path: Path, keep: float
) -> None:
    """A file caught while it is written: refused for now (nats-py's own reader would block the loop for ever)."""
    operator = Operator()
    server = serve(operator.server_config())
    file, text = tmp_path / "creds", operator.creds()
    file.write_text(text[: int(keep if keep > 1 else keep * len(text))])
    conn = connect(server, creds_file=str(file))
    await conn.start()
    await until(lambda: conn.last_error != "", "the file is refused")
    assert str(file) in conn.last_error
    file.write_text(text)
    await echo(conn)


@pytest.mark.fault("N6")
async def test_rotated_credentials_are_taken_from_disk(serve: Serve, connect: Connect, tmp_path: Path) -> None:
    """The server reloads with a new password and throws us out; once the file has it we are back."""
    server = serve('authorization { user: "u", password: "old" }')
    file = tmp_path / "pw"
    file.write_text("old")
    conn = connect(server, user="u", password_file=str(file))
    with capture_logs() as logs:
        await conn.start(SOON)
        server.config.write_text(server.config.read_text().replace('"old"', '"new"'))
        server.signal(signal.SIGHUP)
        await until(lambda: conn.state == "disconnected", "thrown out")
        await until(lambda: "refused our credentials" in conn.last_error, "refused")
        assert type(await raised(conn.client(0.05))) is NotPermitted
        file.write_text("new")
        assert await conn.wait_epoch(1, SOON) == 2
        await echo(conn)
    assert events(logs) == ["nats_connected", "nats_disconnected", "nats_refused", "nats_connected"]


@pytest.mark.fault("N6")
async def test_an_expired_jwt_is_healed_by_a_new_creds_file(serve: Serve, connect: Connect, tmp_path: Path) -> None:
    """The JWT runs out while connected, which ends a nats-py client for good; a new one takes its place."""
    operator = Operator()
    server = serve(operator.server_config())
    file = tmp_path / "creds"
    file.write_text(operator.creds(valid_seconds=3))
    conn = connect(server, creds_file=str(file))
    await conn.start(SOON)
    first = await conn.client()
    await until(lambda: conn.state == "disconnected", "the JWT expires")
    await until(lambda: "refused our credentials" in conn.last_error, "refused")
    seen = conn.epoch
    file.write_text(operator.creds())
    assert await conn.wait_epoch(seen, SOON) == seen + 1
    assert await conn.client() is not first
    await echo(conn)


# --- TLS ---


def tls_config(cert: tuple[Path, Path], more: str = "") -> str:
    return f'tls {{ cert_file: "{cert[0]}", key_file: "{cert[1]}", timeout: 5 {more} }}'


@pytest.mark.parametrize("scheme", ["nats", "tls"])
async def test_tls_with_our_own_ca(serve: Serve, connect: Connect, tmp_path: Path, scheme: str) -> None:
    """The server's certificate is checked against the CA of the options."""
    ca = Authority(tmp_path / "pki")
    server = serve(tls_config(ca.issue("server")))
    conn = connect(server.url.replace("nats:", f"{scheme}:"), tls_ca_file=str(ca.file))
    await conn.start(SOON)
    await echo(conn)


async def test_tls_before_the_first_word(serve: Serve, connect: Connect, tmp_path: Path) -> None:
    """``handshake_first`` on both sides."""
    ca = Authority(tmp_path / "pki")
    server = serve(started=False)
    server.extra = tls_config(ca.issue("server"), ", handshake_first: true")
    starting = asyncio.create_task(asyncio.to_thread(start_without_info, server))
    conn = connect(server, tls_ca_file=str(ca.file), tls_handshake_first=True)
    await conn.start(SOON)
    await starting
    await echo(conn)


def start_without_info(server: NatsServer) -> None:
    """Start a server that stays silent until TLS (NatsServer.start waits for INFO)."""
    import subprocess  # noqa: PLC0415

    from tests.support.server import nats_server_binary  # noqa: PLC0415

    server.config.write_text(f'listen: "127.0.0.1:{server.port}"\n{server.extra}\n')
    with server.log.open("ab") as log:
        server.process = subprocess.Popen([nats_server_binary(), "-c", str(server.config)], stdout=log, stderr=log)


async def test_mutual_tls(serve: Serve, connect: Connect, tmp_path: Path) -> None:
    """The server wants a certificate of ours; without one it refuses us, and we say so."""
    ca = Authority(tmp_path / "pki")
    server = serve(tls_config(ca.issue("server"), f', ca_file: "{ca.file}", verify: true'))
    cert, key = ca.issue("client")
    conn = connect(server, tls_ca_file=str(ca.file), tls_cert_file=str(cert), tls_key_file=str(key))
    await conn.start(SOON)
    await echo(conn)
    stranger = Authority(tmp_path / "other", "other").issue("stranger")
    for cert, key in (("", ""), stranger):
        refused = connect(server, tls_ca_file=str(ca.file), tls_cert_file=str(cert), tls_key_file=str(key))
        error = await raised(refused.start(3))
        assert type(error) is NotPermitted
        assert "refused our TLS certificate" in str(error)


@pytest.mark.fault("N6")
async def test_a_certificate_of_ours_is_refused_without_a_word(connect: Connect) -> None:
    """A fake server whose INFO tells of tls_verify hangs up on our PING, as one does whose TLS alert got lost.

    NotPermitted, with the words that it refused our TLS certificate.
    """

    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'INFO {"version":"2.12.0","max_payload":1048576,"tls_verify":true}\r\n')
        await reader.readuntil(b"PING\r\n")
        writer.close()

    fake = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    error = await raised(connect(f"nats://127.0.0.1:{fake.sockets[0].getsockname()[1]}").start(SOON))
    fake.close()
    await fake.wait_closed()
    assert type(error) is NotPermitted
    assert "refused our TLS certificate" in str(error)


@pytest.mark.fault("N6")
@pytest.mark.parametrize(
    ("case", "words"),
    [("wrong ca", "signed by an unknown CA"), ("expired", "has expired"), ("name", "hostname mismatch")],
)
async def test_a_certificate_we_do_not_accept_is_named(
    serve: Serve, connect: Connect, tmp_path: Path, case: str, words: str
) -> None:
    """A real server has a certificate of an unknown CA, an expired one, or one for another host.

    Unavailable within 3 s, with the reason in words.
    """
    ca = Authority(tmp_path / "pki")
    hosts = ("other.example",) if case == "name" else ("127.0.0.1",)
    server = serve(tls_config(ca.issue("server", hosts=hosts, expired=case == "expired")))
    trusted = Authority(tmp_path / "other", "other").file if case == "wrong ca" else ca.file
    began = time.monotonic()
    error = await raised(connect(server, tls_ca_file=str(trusted)).start(SOON))
    assert isinstance(error, Unavailable)
    assert words in str(error)
    assert time.monotonic() - began < 3


async def test_the_expected_name_can_be_given(serve: Serve, connect: Connect, tmp_path: Path) -> None:
    """``server_name`` for a certificate that does not have the address's host."""
    ca = Authority(tmp_path / "pki")
    server = serve(tls_config(ca.issue("server", hosts=("other.example",))))
    conn = connect(server, tls_ca_file=str(ca.file), tls_server_name="other.example")
    await conn.start(SOON)
    await echo(conn)


@pytest.mark.fault("N6")
async def test_a_server_certificate_is_replaced_while_running(serve: Serve, connect: Connect, tmp_path: Path) -> None:
    """A server is restarted with a certificate of another CA; later our CA file is overwritten with that one.

    First it is refused as of an unknown CA, then the connection heals without a restart of ours.
    """
    old, new = Authority(tmp_path / "old"), Authority(tmp_path / "new")
    trusted = tmp_path / "trusted.pem"
    trusted.write_bytes(old.file.read_bytes())
    server = serve(tls_config(old.issue("server")))
    conn = connect(server, tls_ca_file=str(trusted))
    await conn.start(SOON)
    server.extra = tls_config(new.issue("server"))
    await server.arestart()
    await until(lambda: "unknown CA" in conn.last_error, "the new certificate is refused")
    trusted.write_bytes(new.file.read_bytes())
    await conn.wait_epoch(1, SOON)
    await echo(conn)


@pytest.mark.fault("K14")
async def test_a_server_without_tls_gets_no_password_if_tls_is_asked_for(connect: Connect) -> None:
    """Somebody on the way strips TLS from INFO: nothing is sent (nats-py would send the password in the clear)."""
    received = bytearray()

    async def strip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'INFO {"version":"2.12.0","max_payload":1048576,"auth_required":true}\r\n')
        received.extend(await reader.read(4096))
        writer.close()

    fake = await asyncio.start_server(strip, "127.0.0.1", 0)
    port = fake.sockets[0].getsockname()[1]
    conn = connect(f"tls://127.0.0.1:{port}", user="u", password=SECRET)
    error = await raised(conn.start(SOON))
    fake.close()
    await fake.wait_closed()
    assert isinstance(error, Unavailable)
    assert "offers no TLS" in str(error)
    assert bytes(received) == b""


# --- servers that come and go ---


async def test_a_server_that_is_not_there_is_named_in_time(connect: Connect) -> None:
    """``start`` with a limit gives up after it, says why, and leaves nothing."""
    port = free_port()
    conn = connect(f"nats://127.0.0.1:{port}")
    began = time.monotonic()
    error = await raised(conn.start(0.7))
    assert 0.6 < time.monotonic() - began < 2
    assert type(error) is Unavailable
    assert f"127.0.0.1:{port}" in str(error)
    assert "refused" in str(error).lower()
    assert type(await raised(conn.client(0.1))) is Unavailable


@pytest.mark.fault("N1")
async def test_a_server_that_comes_later_is_found(serve: Serve, connect: Connect) -> None:
    """A connection is started, without a limit, before its server is, and a request is made meanwhile.

    The request is Unavailable within its time; once the server is started, the next one is answered.
    """
    server = serve(started=False)
    conn = connect(server)
    with capture_logs() as logs:
        await conn.start()
        assert conn.state == "connecting"
        assert type(await raised(conn.request("x", max_seconds=0.3))) is Unavailable
        assert conn.epoch == 0
        await server.astart()
        await echo(conn)
    assert (conn.state, conn.epoch) == ("connected", 1)
    assert events(logs) == ["nats_refused", "nats_connected"]


@pytest.mark.parametrize("behaviour", ["silent", "garbage", "closes", "endless line", "closes after PING"])
async def test_something_that_is_no_nats_server_is_given_up(connect: Connect, behaviour: str) -> None:
    """It never answers, talks something else, or hangs up: Unavailable, bounded, nothing left open."""
    gone = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if behaviour == "garbage":
            writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        elif behaviour == "endless line":
            writer.write(b"x" * 200_000)
        elif behaviour == "closes after PING":
            writer.write(b'INFO {"version":"2.12.0","max_payload":1048576}\r\n')
            await reader.readuntil(b"PING\r\n")
        if "closes" not in behaviour:
            await reader.read()
            gone.set()
        writer.close()

    fake = await asyncio.start_server(talk, "127.0.0.1", 0)
    port = fake.sockets[0].getsockname()[1]
    conn = connect(f"nats://127.0.0.1:{port}", connect_seconds=0.3)
    error = await raised(conn.start(0.6))
    assert type(error) is Unavailable
    assert f"127.0.0.1:{port}" in str(error)
    if "closes" not in behaviour:
        await asyncio.wait_for(gone.wait(), 2)  # our socket is closed
    fake.close()
    await fake.wait_closed()


async def test_a_dead_server_of_the_list_is_passed_over(serve: Serve, connect: Connect) -> None:
    """Two addresses, one alive."""
    server = serve()
    options = ConnectionOptions(servers=(f"127.0.0.1:{free_port()}", f"127.0.0.1:{server.port}"), name="two")
    conn = Connection(options)
    await conn.start(SOON)
    await echo(conn)
    await conn.close()


@pytest.mark.fault("N1")
async def test_a_killed_server_fails_requests_at_once_and_is_found_again(serve: Serve, connect: Connect) -> None:
    """kill -9: the waiting request fails without waiting for its time; a new epoch begins after the restart."""
    server = serve()
    conn = connect(server)
    with capture_logs() as logs:
        await conn.start(SOON)
        client = await conn.client()
        await client.subscribe("silent")
        waiting = asyncio.create_task(raised(conn.request("silent", max_seconds=60)))
        await client.flush()
        await server.astop(kill=True)
        assert type(await asyncio.wait_for(waiting, 2)) is Unavailable
        assert conn.state == "disconnected"
        assert type(await raised(conn.client(0.1))) is Unavailable
        assert await conn.wait_epoch(1, 0.1) == 1
        await server.astart()
        assert await conn.wait_epoch(1, SOON) == 2
        await echo(conn)
        assert client.is_closed
    assert events(logs).count("nats_disconnected") == 1
    assert events(logs)[-1] == "nats_connected"
    assert len(logs) <= 4


@pytest.mark.fault("N1 N4")
@pytest.mark.parametrize("megabytes", [0, 40])
async def test_a_frozen_server_is_noticed_even_with_full_buffers(
    serve: Serve, connect: Connect, megabytes: int
) -> None:
    """SIGSTOP: given up after three pings, also while megabytes wait for its socket; back when it thaws."""
    server = serve()
    conn = connect(server, ping_seconds=0.2, connect_seconds=1)
    await conn.start(SOON)
    client = await conn.client()
    await freeze(server)
    sender = asyncio.create_task(pour(client, megabytes))
    began = time.monotonic()
    await until(lambda: conn.state == "disconnected", "the frozen server is given up", 3)
    assert time.monotonic() - began < 3
    await until(lambda: "fell silent" in conn.last_error or "not answer" in conn.last_error, "it is said")
    server.thaw()
    assert await conn.wait_epoch(1, SOON) >= 2
    await echo(conn)
    sender.cancel()
    await asyncio.wait({sender})


async def freeze(server: NatsServer) -> None:
    """SIGSTOP, and wait until all threads have stopped."""
    assert server.process is not None
    process = psutil.Process(server.process.pid)
    server.freeze()
    await until(lambda: process.status() == psutil.STATUS_STOPPED, "stopped")


async def pour(client: Client, megabytes: int) -> None:
    for _ in range(2 * megabytes):
        try:
            await client.publish("pour", b"x" * 500_000)
        except nats.errors.Error:
            return


@pytest.mark.fault("N4")
async def test_a_late_answer_to_a_given_up_flush_does_no_harm(serve: Serve, connect: Connect) -> None:
    """The server is stopped (SIGSTOP) until a flush has timed out, and thawed: the answer to its PING comes late.

    nats-py's reader would die of it; here the next request is answered on the same connection.
    """
    server = serve()
    conn = connect(server)
    await conn.start(SOON)
    client = await conn.client()
    await freeze(server)
    with pytest.raises(nats.errors.TimeoutError):
        await client.flush(timeout=0.2)  # type: ignore[arg-type]
    server.thaw()
    await echo(conn)
    assert conn.epoch == 1


@pytest.mark.fault("N1")
async def test_a_client_that_the_server_closed_is_replaced(serve: Serve, connect: Connect) -> None:
    """A message is published on a subject of 5,000 bytes: the server closes the connection over 4,096.

    That ends a nats-py client for good; it is replaced, and the next request is answered.
    """
    conn = connect(serve())
    await conn.start(SOON)
    client = await conn.client()
    await client.publish("a" * 5000, b"")
    assert await conn.wait_epoch(1, SOON) == 2
    assert client.is_closed
    assert "control line" in conn.last_error
    await echo(conn)


async def test_a_request_that_would_close_the_connection_is_refused(serve: Serve, connect: Connect) -> None:
    """Too long a subject, or headers that push a message over the limit: an error, and the connection stays."""
    conn = connect(serve())
    await conn.start(SOON)
    limit = (await conn.client()).max_payload
    assert type(await raised(conn.request("a" * 4090))) is StoreRejected
    assert type(await raised(conn.request("x", b"x" * (limit + 1)))) is StoreRejected
    assert type(await raised(conn.request("x", b"x" * limit, headers={"a": "b"}))) is StoreRejected
    assert type(await raised(conn.request("with blank", b""))) is StoreRejected
    await echo(conn)
    assert conn.epoch == 1


async def test_a_reader_that_dies_of_nonsense_is_replaced_at_once(connect: Connect) -> None:
    """nats-py's read loop ends silently on what it does not expect; its pings would find out much later."""
    greeted = 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal greeted
        writer.write(b'INFO {"version":"2.12.0","max_payload":1048576}\r\n')
        while line := await reader.readline():
            if line == b"PING\r\n":
                greeted += 1
                writer.write(b"PONG\r\n")
                writer.write(b"-ERR \r\n" if greeted == 1 else b"")
        writer.close()

    fake = await asyncio.start_server(talk, "127.0.0.1", 0)
    conn = connect(f"nats://127.0.0.1:{fake.sockets[0].getsockname()[1]}", ping_seconds=60)
    await conn.start(SOON)
    assert await conn.wait_epoch(1, 3) == 2
    await conn.close()
    fake.close()
    await fake.wait_closed()


@pytest.mark.fault("N1")
async def test_another_server_of_the_cluster_takes_over(serve: Serve, connect: Connect) -> None:
    """The one configured server of a cluster of two is killed (SIGKILL).

    The other one, learned from the cluster, is connected to with the same login.
    """
    ports = free_port(), free_port()

    def member(mine: int, other: int) -> str:
        return f'cluster {{ name: c, listen: "127.0.0.1:{mine}", routes: ["nats://127.0.0.1:{other}"] }}'

    login = f'authorization {{ user: "u", password: "{SECRET}" }}\n'
    one, two = serve(login + member(*ports)), serve(login + member(*reversed(ports)))
    conn = connect(one.url.replace("//", f"//u:{SECRET}@"))
    await conn.start(SOON)
    client = await conn.client()
    await until(lambda: len(client.discovered_servers) > 0, "the other is told")
    await one.astop(kill=True)
    assert await conn.wait_epoch(1, SOON) == 2
    assert conn.host == f"127.0.0.1:{two.port}"
    await echo(conn)


@pytest.mark.fault("N3")
async def test_many_clients_do_not_come_back_in_one_moment(serve: Serve, connect: Connect) -> None:
    """A server dies under forty clients; a listener in its place hangs up on every attempt and notes when it came.

    The last forty attempts are spread over more than 0.3 s, and no 50 ms see more than 20.
    """
    server = serve()
    clients = [connect(server) for _ in range(40)]
    await asyncio.gather(*(conn.start(SOON) for conn in clients))
    await server.astop(kill=True)
    times: list[float] = []

    async def refuse(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        times.append(time.monotonic())
        writer.close()

    fake = await asyncio.start_server(refuse, "127.0.0.1", server.port)
    await until(lambda: len(times) >= 160, "four attempts of each", 30)
    fake.close()
    await fake.wait_closed()
    last = times[-40:]
    assert max(last) - min(last) > 0.3
    slots = [sum(1 for t in last if start <= t < start + 0.05) for start in last]
    assert max(slots) <= 20


# --- requests ---


async def test_a_request_that_nobody_answers(serve: Serve, connect: Connect) -> None:
    """No listener: at once. A listener that stays silent: after the time."""
    conn = connect(serve())
    await conn.start(SOON)
    began = time.monotonic()
    assert type(await raised(conn.request("nobody", max_seconds=30))) is NoResponders
    assert time.monotonic() - began < 2
    await (await conn.client()).subscribe("silent")
    error = await raised(conn.request("silent", max_seconds=0.2))
    assert str(error) == "no answer on silent within 0.2 s"
    assert type(error) is StoreTimeout


async def test_cancelling_a_request_passes_through(serve: Serve, connect: Connect) -> None:
    """And the connection goes on working."""
    conn = connect(serve())
    await conn.start(SOON)
    await (await conn.client()).subscribe("silent")
    task = asyncio.create_task(conn.request("silent", max_seconds=60))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task}, timeout=2)
    assert task.cancelled()
    await echo(conn)


@pytest.mark.fault("N4")
async def test_full_buffers_hold_up_neither_a_deadline_nor_a_cancellation(serve: Serve, connect: Connect) -> None:
    """The server is stopped (SIGSTOP), and megabytes are published until its socket and nats-py's buffer are full.

    A request ends at its deadline, and so does a publish that waits for room; one that is cancelled ends at once.
    """
    server = serve()
    conn = connect(server)
    await conn.start(SOON)
    client = await conn.client()
    await raised(conn.request("nobody"))
    await freeze(server)
    fillers = [asyncio.create_task(pour(client, 40))]
    await until(lambda: client.stats["out_bytes"] > store_client.PENDING_BYTES, "the first waits for the socket")
    await asyncio.sleep(0)  # nats-py's flusher takes all of it
    fillers.append(asyncio.create_task(pour(client, 40)))
    await until(lambda: client.pending_data_size > store_client.PENDING_BYTES, "the buffer is full")
    began = time.monotonic()
    assert type(await raised(conn.request("x", max_seconds=0.3))) is StoreTimeout
    assert time.monotonic() - began < 1
    deadline = asyncio.get_running_loop().time() + 0.3
    with pytest.raises(TimeoutError):
        await store_client.send(client, "x", b"", deadline=deadline)
    deadline += 60
    task = asyncio.create_task(store_client.send(client, "x", b"", deadline=deadline))
    await asyncio.sleep(0.05)
    task.cancel()
    await asyncio.wait({task}, timeout=1)
    assert task.cancelled()
    server.thaw()
    await asyncio.wait(fillers, timeout=30)


async def test_cancelling_a_start_leaves_nothing(connect: Connect) -> None:
    """Cancelled in the middle of a handshake with a silent server."""
    arrived = asyncio.Event()
    gone = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        arrived.set()
        await reader.read()
        gone.set()
        writer.close()

    fake = await asyncio.start_server(silent, "127.0.0.1", 0)
    conn = connect(f"nats://127.0.0.1:{fake.sockets[0].getsockname()[1]}")
    task = asyncio.create_task(conn.start(60))
    await asyncio.wait_for(arrived.wait(), 5)
    task.cancel()
    await asyncio.wait({task}, timeout=5)
    assert task.cancelled()
    assert conn.state == "closed"
    await asyncio.wait_for(gone.wait(), 2)
    fake.close()
    await fake.wait_closed()


async def test_closing_sends_what_was_published(serve: Serve, connect: Connect) -> None:
    """A message published just before close arrives."""
    server = serve()
    one, two = connect(server), connect(server)
    await one.start(SOON)
    await two.start(SOON)
    subscription = await (await two.client()).subscribe("last.words")
    await (await two.client()).flush()
    client = await one.client()
    for _ in range(20):
        await client.publish("last.words", b"x" * 500_000)
    await one.close()
    for _ in range(20):
        assert len((await subscription.next_msg(5)).data) == 500_000


async def test_closing_waits_for_a_callback_that_tidies_up(serve: Serve, connect: Connect) -> None:
    """A subscription's callback is cancelled, and has ended when close returns."""
    conn = connect(serve())
    await conn.start(SOON)
    client = await conn.client()
    entered, tidied = asyncio.Event(), asyncio.Event()

    async def slow(_message: Msg) -> None:
        entered.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.5)
            tidied.set()

    await client.subscribe("slow", cb=slow)
    await client.publish("slow", b"")
    await asyncio.wait_for(entered.wait(), SOON)
    await conn.close()
    assert tidied.is_set()


# --- permissions ---


def restricted(publish: str, subscribe: str) -> str:
    return (
        'authorization { users: [ { user: "u", password: "p", permissions: '
        f"{{ publish: {{ allow: [{publish}] }}, subscribe: {{ allow: [{subscribe}] }} }} }} ] }}"
    )


@pytest.mark.fault("N6")
async def test_a_request_without_the_right_fails_at_once_with_its_subject(serve: Serve, connect: Connect) -> None:
    """A user who may publish on `allowed.>` only makes requests on two other subjects, one of 3,000 bytes.

    NotPermitted with the subject, letter for letter, instead of a time-out; the connection stays.
    """
    conn = connect(serve(restricted('"allowed.>"', '"_INBOX.>"')), user="u", password="p")
    await conn.start(SOON)
    subject = "$O.B.M." + "aMOpIGxsby94" * 250
    with capture_logs() as logs:
        began = time.monotonic()
        for name in ("Secret.Subject", subject, "Secret.Subject"):
            error = await raised(conn.request(name, max_seconds=30))
            assert type(error) is NotPermitted
            assert f'publish to "{name}"' in str(error)
        assert time.monotonic() - began < 2
    assert events(logs) == ["nats_permission_denied"] * 2
    assert type(await raised(conn.request("allowed.x"))) is NoResponders
    assert conn.epoch == 1


async def test_a_denial_leaves_other_requests_alone(serve: Serve, connect: Connect) -> None:
    """Only the requests to the denied subject fail."""
    conn = connect(serve(restricted('"allowed.>"', '"_INBOX.>", "allowed.>"')), user="u", password="p")
    await conn.start(SOON)
    await (await conn.client()).subscribe("allowed.silent")
    other = asyncio.create_task(raised(conn.request("allowed.silent", max_seconds=0.5)))
    assert type(await raised(conn.request("denied"))) is NotPermitted
    assert type(await other) is StoreTimeout


@pytest.mark.fault("N6")
async def test_an_inbox_without_the_right_is_told_at_once_and_heals(serve: Serve, connect: Connect) -> None:
    """The server's permissions do not cover the inbox of our requests; later it is reloaded with some that do.

    Each request is NotPermitted at once, as its answer could never arrive; after the reload they get through.
    """
    server = serve(restricted('">"', '"mine.>"'))
    conn = connect(server, user="u", password="p", inbox_prefix="_INBOX_test")
    await conn.start(SOON)
    for _ in range(5):
        error = await raised(conn.request("x", max_seconds=30))
        assert type(error) is NotPermitted
        assert 'subscribe to "_inbox_test.' in str(error).lower()
    assert len((await conn.client())._subs) <= 2  # dead subscriptions do not pile up
    server.config.write_text(server.config.read_text().replace('"mine.>"', '"_INBOX_test.>"'))
    server.signal(signal.SIGHUP)
    deadline = time.monotonic() + SOON
    while type(error) is not NoResponders:
        error = await raised(conn.request("x"))
        assert time.monotonic() < deadline


async def test_denials_reach_those_who_asked_for_them(serve: Serve, connect: Connect) -> None:
    """Publishers and subscribers register by subject or by prefix; a callback that fails harms nobody."""
    conn = connect(serve(restricted('"_INBOX.>"', '"_INBOX.>"')), user="u", password="p")
    await conn.start(SOON)
    client = await conn.client()
    heard: list[tuple[str, str]] = []

    def broken(_error: NotPermitted) -> None:
        raise ValueError("a bug")

    conn.on_denied("$O.B.C.", broken)
    conn.on_denied("$O.B.C.", lambda e: heard.append(("prefix", e.message)))
    conn.on_denied("syncd.B.meta.>", lambda e: heard.append(("wildcard", e.message)))
    conn.on_denied("$O.B.M.x", lambda e: heard.append(("exact", e.message)))
    conn.on_denied("$O.B.M.x", lambda e: heard.append(("gone", e.message)))()
    with capture_logs() as logs:
        await client.publish("$O.B.C.Nuid", b"")
        await client.publish("$O.B.M.X", b"")
        await client.publish("$O.B.M.xy", b"")
        await client.subscribe("syncd.B.meta.>")
        await until(lambda: len(heard) == 3, "three denials")
        await client.flush()
    assert [who for who, _ in heard] == ["prefix", "exact", "wildcard"]
    assert 'publish to "$O.B.M.x"' in heard[1][1]
    assert 'subscribe to "syncd.B.meta.>"' in heard[2][1]
    assert events(logs).count("nats_callback_failed") == 1
    assert conn.epoch == 1


# --- JetStream ---


async def test_jetstream_is_there(serve: Serve, connect: Connect) -> None:
    """No complaint."""
    conn = connect(serve(jetstream=True))
    await conn.start(SOON)
    await require_jetstream(conn)


async def test_jetstream_is_switched_off(serve: Serve, connect: Connect) -> None:
    """Said at once, with the host."""
    server = serve()
    conn = connect(server)
    await conn.start(SOON)
    error = await raised(require_jetstream(conn))
    assert type(error) is Unavailable
    assert error.message == f"JetStream is not enabled on nats server at 127.0.0.1:{server.port}"


async def test_an_account_without_jetstream_is_told(serve: Serve, connect: Connect) -> None:
    """The server has JetStream, our account has not."""
    accounts = """accounts {
        A { jetstream: enabled, users: [ { user: a, password: a } ] }
        B { users: [ { user: b, password: b } ] }
    }"""
    server = serve(accounts, jetstream=True)
    with_it, without = connect(server, user="a", password="a"), connect(server, user="b", password="b")
    await with_it.start(SOON)
    await without.start(SOON)
    await require_jetstream(with_it)
    error = await raised(require_jetstream(without))
    assert type(error) is Unavailable
    assert "JetStream is not enabled for our account" in error.message


async def test_too_old_a_server_is_refused(serve: Serve, connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    """The version comes from the connected server."""
    conn = connect(serve(jetstream=True))
    await conn.start(SOON)
    monkeypatch.setattr(reasons, "MIN_SERVER", (99, 1, 0))
    error = await raised(require_jetstream(conn))
    assert "is too old: syncd needs 99.1 or newer" in str(error)


async def test_a_swallowed_cancellation_does_not_keep_close_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """nats-py's connect() can take the cancellation for a failure to connect: then the next try is cancelled, too."""
    trying = asyncio.Event()

    async def connect(self: Connection, server: object) -> None:
        trying.set()
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            raise Unavailable("cannot reach it") from None

    monkeypatch.setattr(Connection, "_connect", connect)
    connection = Connection(ConnectionOptions(servers=("nats://127.0.0.1:1",), name="test"))
    await connection.start()
    await trying.wait()
    async with asyncio.timeout(1):
        await connection.close()
