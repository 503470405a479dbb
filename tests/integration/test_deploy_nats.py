"""deploy/nats/nats-server.conf on a real server: what each user may do, and what a host cannot do by any trick."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nats
import pytest
import yaml

from syncd.errors import NotPermitted
from syncd.settings import load
from syncd.store.address import ConnectionOptions
from syncd.store.base import BucketSpec, ObjectInfo, ObjectMeta, SmallPut
from syncd.store.bucket import NatsStore
from syncd.store.connection import Connection, require_jetstream
from syncd.store.probe import missing_permissions
from tests.support.server import NatsServer, free_port, nats_server_binary

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from nats.aio.client import Client
    from nats.aio.msg import Msg

DEPLOY = Path(__file__).parents[2] / "deploy"
CONFIG = (DEPLOY / "nats" / "nats-server.conf").read_text()
PASSWORDS = {"SYS": "sys pw", "ADMIN": "admin pw", "PUBLISHER": "publisher pw", "HOST_1": "host pw"}
STREAM = "OBJ_app"
META = "$O.app.M." + base64.urlsafe_b64encode(b"etc/app.conf").decode()
CHUNK = "$O.app.C.syncd-nuid"
PREFIX = "syncd.js"
SECONDS = 30.0
"""For an answer that must come."""
SILENCE = 0.3
"""For what must not happen. Where it can happen, in the account of the streams, it takes milliseconds."""


def write_passwords(directory: Path) -> None:
    (directory / "passwords.conf").write_text(
        "".join(f'{name}_PASSWORD: "{password}"\n' for name, password in PASSWORDS.items())
    )


def for_test(directory: Path, text: str = CONFIG) -> str:
    """The shipped text with the three values that belong to a machine taken out or replaced."""
    for pattern, new in (
        (r'^listen: "0\.0\.0\.0:4222"$', ""),  # the helper sets its own
        (r'^http: "127\.0\.0\.1:8222"$', ""),
        (r'store_dir: "/var/lib/nats"', f'store_dir: "{directory / "jetstream"}"'),
    ):
        text, count = re.subn(pattern, new, text, flags=re.MULTILINE)
        assert count == 1, pattern
    return text


def check(config: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [nats_server_binary(), "-t", "-c", str(config)], capture_output=True, text=True, timeout=30, check=False
    )


@pytest.fixture
def server(tmp_path: Path) -> Iterator[NatsServer]:
    write_passwords(tmp_path)
    started = NatsServer(tmp_path, for_test(tmp_path), jetstream=False).start()
    try:
        yield started
    finally:
        started.stop()


@contextlib.asynccontextmanager
async def connected(server: NatsServer, user: str, password: str) -> AsyncIterator[tuple[Client, asyncio.Queue[str]]]:
    """A connection with the inbox that the file gives to the user, and the errors the server tells it."""
    errors: asyncio.Queue[str] = asyncio.Queue()

    async def on_error(exc: Exception) -> None:
        errors.put_nowait(str(exc).lower())

    client = await nats.connect(
        server.url,
        user=user,
        password=password,
        inbox_prefix=f"_INBOX_{user}",
        error_cb=on_error,
        allow_reconnect=False,
        connect_timeout=SECONDS,
    )
    try:
        yield client, errors
    finally:
        await client.close()


async def heard(client: Client) -> None:
    """Wait until the server has all subscriptions: nats-py 2.16 writes a PING past what it has buffered before it."""
    for _ in range(2):
        await client.flush(5)


async def ask(client: Client, subject: str, payload: object = b"") -> dict[str, Any]:
    data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    answer: dict[str, Any] = json.loads((await client.request(subject, data, timeout=SECONDS)).data)
    assert "error" not in answer, answer
    return answer


async def read_subject(client: Client, api: str, subject: str) -> list[bytes]:
    """A batched direct get, as syncd reads: many answers to one request, and an end marker."""
    inbox = client.new_inbox()
    answers = await client.subscribe(inbox)
    request = {"batch": 1000, "seq": 1, "next_by_subj": subject, "max_bytes": 1 << 20}
    await client.publish(f"{api}.DIRECT.GET.{STREAM}", json.dumps(request).encode(), reply=inbox)
    found = []
    while True:
        message = await answers.next_msg(SECONDS)
        if message.headers and message.headers.get("Status"):
            assert message.headers["Status"] == "204", message.headers
            await answers.unsubscribe()
            return found
        found.append(message.data)


async def fill(publisher: Client) -> None:
    """Create the bucket as the publisher may, and store one object of three chunks."""
    await ask(
        publisher,
        f"$JS.API.STREAM.CREATE.{STREAM}",
        {
            "name": STREAM,
            "subjects": ["$O.app.C.>", "$O.app.M.>"],
            "retention": "limits",
            "storage": "file",
            "discard": "new",
            "allow_direct": True,
            "allow_rollup_hdrs": True,
            "allow_msg_ttl": True,
            "allow_atomic": True,
            "republish": {"src": "$O.app.M.>", "dest": "syncd.app.meta.>"},
        },
    )
    for number in range(3):
        await ask(publisher, CHUNK, f"chunk {number}".encode())
    await announce(publisher)


async def announce(publisher: Client) -> None:
    answer = await publisher.request(META, b'{"name":"etc/app.conf"}', timeout=SECONDS, headers={"Nats-Rollup": "sub"})
    assert "error" not in json.loads(answer.data)


async def contents(server: NatsServer) -> tuple[dict[str, Any], list[str]]:
    """(messages per subject of the bucket, all streams), as the admin sees them."""
    async with connected(server, "admin", PASSWORDS["ADMIN"]) as (admin, _):
        names = (await ask(admin, "$JS.API.STREAM.NAMES"))["streams"]
        info = await ask(admin, f"$JS.API.STREAM.INFO.{STREAM}", {"subjects_filter": ">"})
        return info["state"].get("subjects", {}), names


def test_the_configuration_is_valid(tmp_path: Path) -> None:
    """nats-server's own check of the shipped file, once the passwords are there."""
    (tmp_path / "nats-server.conf").write_text(CONFIG)
    write_passwords(tmp_path)
    result = check(tmp_path / "nats-server.conf")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("passwords", [None, (DEPLOY / "nats" / "passwords.conf.example").read_text()])
def test_the_server_does_not_start_without_passwords_of_ones_own(passwords: str | None, tmp_path: Path) -> None:
    """nats-server is to check the shipped configuration without a file of passwords, or with the example as it is.

    It refuses both: there is no default password to forget.
    """
    (tmp_path / "nats-server.conf").write_text(CONFIG)
    if passwords is not None:
        (tmp_path / "passwords.conf").write_text(passwords)
    assert check(tmp_path / "nats-server.conf").returncode != 0


def test_the_example_names_every_password(tmp_path: Path) -> None:
    """Uncommented, the example is a complete passwords.conf."""
    example = (DEPLOY / "nats" / "passwords.conf.example").read_text()
    (tmp_path / "passwords.conf").write_text(re.sub(r"^#(\w+: )", r"\1", example, flags=re.MULTILINE))
    (tmp_path / "nats-server.conf").write_text(CONFIG)
    assert check(tmp_path / "nats-server.conf").returncode == 0


async def test_the_server_of_compose_takes_its_arguments(tmp_path: Path) -> None:
    """The command line in compose.yaml starts a server with JetStream whose health check answers."""
    service = yaml.safe_load((DEPLOY / "docker" / "compose.yaml").read_text())["services"]["nats"]
    monitor = free_port()
    words = [
        str(tmp_path) if word == "/data" else str(monitor) if word == "8222" else word for word in service["command"]
    ]
    port = free_port()
    process = subprocess.Popen(
        [nats_server_binary(), "--addr", "127.0.0.1", "--port", str(port), *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = service["healthcheck"]["test"][-1].replace("8222", str(monitor)).removeprefix("http://127.0.0.1")
    try:
        async with asyncio.timeout(20):
            client = await nats.connect(f"nats://127.0.0.1:{port}", max_reconnect_attempts=-1, reconnect_time_wait=0.05)
            assert (await ask(client, "$JS.API.INFO"))["streams"] == 0
            await client.close()
            reader, writer = await asyncio.open_connection("127.0.0.1", monitor)
            path = "/" + url.split("/", 1)[1]
            writer.write(f"GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
            assert b" 200 " in await reader.readline()
            writer.close()
            await writer.wait_closed()
    finally:
        process.kill()
        process.wait(20)


async def test_the_publisher_creates_writes_and_reads_its_bucket(server: NatsServer) -> None:
    """All that publishing needs is permitted, and notifications reach the publisher too."""
    async with connected(server, "publisher", PASSWORDS["PUBLISHER"]) as (publisher, errors):
        hints = await publisher.subscribe("syncd.app.meta.>")
        await heard(publisher)
        await fill(publisher)
        assert (await hints.next_msg(SECONDS)).subject == META.replace("$O.app.M", "syncd.app.meta")
        assert await read_subject(publisher, "$JS.API", CHUNK) == [b"chunk 0", b"chunk 1", b"chunk 2"]
        assert (await ask(publisher, "$JS.API.INFO"))["streams"] == 1
        freed = {"Nats-Rollup": "sub", "Nats-TTL": "1"}  # how old chunks are replaced
        assert b"error" not in (await publisher.request(CHUNK, b"", timeout=SECONDS, headers=freed)).data
        assert errors.empty()


async def test_a_host_reads_through_its_own_account(server: NatsServer) -> None:
    """State, listing, chunks, one object by name and notifications: everything a subscriber needs, with the prefix."""
    async with (
        connected(server, "publisher", PASSWORDS["PUBLISHER"]) as (publisher, _),
        connected(server, "host-1", PASSWORDS["HOST_1"]) as (host, errors),
    ):
        await fill(publisher)
        assert (await ask(host, f"{PREFIX}.STREAM.INFO.{STREAM}"))["state"]["messages"] == 4
        assert await read_subject(host, PREFIX, "$O.app.M.>") == [b'{"name":"etc/app.conf"}']
        assert await read_subject(host, PREFIX, CHUNK) == [b"chunk 0", b"chunk 1", b"chunk 2"]
        one = await host.request(f"{PREFIX}.DIRECT.GET.{STREAM}.{META}", b"", timeout=SECONDS)
        assert one.data == b'{"name":"etc/app.conf"}'
        hints = await host.subscribe("syncd.app.meta.>")
        await heard(host)
        await announce(publisher)
        assert (await hints.next_msg(SECONDS)).headers["Nats-Sequence"] == "5"
        assert errors.empty()


FORBIDDEN = {
    "write metadata": (META, b"{}"),
    "write chunks": ("$O.app.C.evil", b"evil"),
    "purge": (f"$JS.API.STREAM.PURGE.{STREAM}", b""),
    "delete the bucket": (f"$JS.API.STREAM.DELETE.{STREAM}", b""),
    "delete a message": (f"$JS.API.STREAM.MSG.DELETE.{STREAM}", b'{"seq":1}'),
    "purge through the prefix": (f"{PREFIX}.STREAM.PURGE.{STREAM}", b""),
    "delete through the prefix": (f"{PREFIX}.STREAM.DELETE.{STREAM}", b""),
    "update the bucket": (f"$JS.API.STREAM.UPDATE.{STREAM}", b"{}"),
    "create a consumer": (f"$JS.API.CONSUMER.CREATE.{STREAM}", b"{}"),
    "list the buckets": ("$JS.API.STREAM.NAMES", b""),
    "read another bucket": (f"{PREFIX}.DIRECT.GET.OBJ_other", b'{"seq":1}'),
    "ask the server": ("$SYS.REQ.SERVER.PING", b""),
    "forge a notification": ("syncd.app.meta.evil", b"{}"),
}


@pytest.mark.fault("K12", "K13")
async def test_a_host_cannot_write_delete_or_look_elsewhere(server: NatsServer) -> None:
    """With a host's login 13 publishes are tried (write, purge, delete, forge, read elsewhere) and 6 subscriptions.

    Each attempt is refused by name, and the bucket is as it was.
    """
    async with (
        connected(server, "publisher", PASSWORDS["PUBLISHER"]) as (publisher, _),
        connected(server, "host-1", PASSWORDS["HOST_1"]) as (host, errors),
    ):
        await fill(publisher)
        before = await contents(server)
        for what, (subject, payload) in FORBIDDEN.items():
            await host.publish(subject, payload, reply=host.new_inbox())
            async with asyncio.timeout(SECONDS):
                refusal = await errors.get()
            assert f'permissions violation for publish to "{subject.lower()}"' in refusal, what
        for subject in (">", "$O.>", "_INBOX_publisher.>", "_INBOX_host-2.>", "$JS.API.>", "syncd.>"):
            await host.subscribe(subject)
            async with asyncio.timeout(SECONDS):
                assert "permissions violation for subscription" in await errors.get(), subject
        assert await contents(server) == before


ATTACKS = {
    "delete the bucket": (f"$JS.API.STREAM.DELETE.{STREAM}", {"seq": 999}),
    "purge it": (f"$JS.API.STREAM.PURGE.{STREAM}", {"seq": 999}),
    "write metadata": ("$O.app.M.evil", {"seq": 1}),
    "delete another stream": ("$JS.API.STREAM.DELETE.OBJ_other", {"seq": 999}),
}
"""What is put as the reply subject of a permitted request: the server answers there, with its own rights."""


async def attack(client: Client, api: str, target: str, request: dict[str, int]) -> None:
    """Ask for a message and let the answer go to ``target``; return once the server has dealt with it."""
    await client.publish(f"{api}.DIRECT.GET.{STREAM}", json.dumps(request).encode(), reply=target)
    await heard(client)


@pytest.mark.fault("K12", "K13")
@pytest.mark.parametrize("what", ATTACKS)
async def test_a_host_cannot_reach_the_api_through_a_reply_subject(what: str, server: NatsServer) -> None:
    """A host's permitted read has the subject of a delete, purge or write as its reply: the server answers there.

    The answers arrive in the hosts' account, where nothing listens: nothing changes.
    """
    target, request = ATTACKS[what]
    async with (
        connected(server, "publisher", PASSWORDS["PUBLISHER"]) as (publisher, _),
        connected(server, "host-1", PASSWORDS["HOST_1"]) as (host, _),
        connected(server, "admin", PASSWORDS["ADMIN"]) as (admin, _),
    ):
        await fill(publisher)
        await ask(admin, "$JS.API.STREAM.CREATE.OBJ_other", {"name": "OBJ_other", "subjects": ["$O.other.C.>"]})
        before = await contents(server)
        effects: asyncio.Queue[str] = asyncio.Queue()

        async def note(message: Msg) -> None:
            effects.put_nowait(message.subject)

        for subject in ("$JS.EVENT.ADVISORY.STREAM.>", "$O.>"):
            await admin.subscribe(subject, cb=note)
        await heard(admin)
        await attack(host, PREFIX, target, request)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(SILENCE):
                assert await effects.get() == ""
        assert await contents(server) == before


@pytest.mark.fault("K12")
async def test_the_same_reader_in_the_account_of_the_streams_would_destroy_the_bucket(tmp_path: Path) -> None:
    """A user with the right to read alone, but in the streams' account, reads with the API's delete as the reply.

    The bucket is gone: why there are two accounts.
    """
    reader = """
      {
        user: "reader", password: "reader pw"
        permissions: { publish: ["$JS.API.DIRECT.GET.OBJ_app"], subscribe: ["_INBOX_reader.>"] }
      }"""
    text, count = re.subn(r'(\{ user: "admin", password: \$ADMIN_PASSWORD \})', rf"\1{reader}", CONFIG)
    assert count == 1
    write_passwords(tmp_path)
    server = NatsServer(tmp_path, for_test(tmp_path, text), jetstream=False)
    await server.astart()
    try:
        async with (
            connected(server, "publisher", PASSWORDS["PUBLISHER"]) as (publisher, _),
            connected(server, "admin", PASSWORDS["ADMIN"]) as (admin, _),
            connected(server, "reader", "reader pw") as (client, _),
        ):
            await fill(publisher)
            deleted = await admin.subscribe(f"$JS.EVENT.ADVISORY.STREAM.DELETED.{STREAM}")
            await heard(admin)
            await attack(client, "$JS.API", *ATTACKS["delete the bucket"])
            await deleted.next_msg(SECONDS)
            assert (await ask(admin, "$JS.API.STREAM.NAMES"))["streams"] is None
    finally:
        await server.astop()


@pytest.mark.fault("K12")
@pytest.mark.parametrize(
    ("user", "password", "answer"),
    [
        ("host-1", "host pw", b"PONG"),
        ("host-1", "", b"-ERR 'Authorization Violation'"),
        ("host-1", "wrong", b"-ERR 'Authorization Violation'"),
        ("host-2", "host pw", b"-ERR 'Authorization Violation'"),
        (None, None, b"-ERR 'Authorization Violation'"),
    ],
)
async def test_nobody_comes_in_without_the_password(
    user: str | None, password: str | None, answer: bytes, server: NatsServer
) -> None:
    """A raw CONNECT is sent without a user, with an empty or a wrong password, and with another host's name.

    The server answers with an authorization violation; only name and password together get in.
    """
    login = {"verbose": False, "user": user, "pass": password} if user else {"verbose": False}
    async with asyncio.timeout(SECONDS):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        assert (await reader.readline()).startswith(b"INFO")
        writer.write(b"CONNECT " + json.dumps(login).encode() + b"\r\nPING\r\n")
        assert (await reader.readline()).strip() == answer
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def connection_of(block: int, server: NatsServer, directory: Path) -> Connection:
    """The connection that one of the README's examples makes, but for the address and the password's file."""
    text = re.findall(r"^```toml\n(.*?)^```$", (DEPLOY / "README.md").read_text(), re.MULTILINE | re.DOTALL)[block]
    config = directory / f"fleet-{block}.toml"
    config.write_text(text)
    options = load(config, {"HOME": "/nonexistent", "SYNCD_NATS__SERVERS": json.dumps([server.url])}).nats
    secret = directory / f"password-{block}"
    secret.write_text(PASSWORDS[options.user.upper().replace("-", "_")] + "\n")
    return Connection(
        ConnectionOptions(
            servers=options.servers,
            name=options.user,
            user=options.user,
            password_file=str(secret),
            api_prefix=options.prefix,
            inbox_prefix=options.inbox_prefix,
        )
    )


@pytest.mark.fault("K12")
async def test_syncd_works_with_these_rights(server: NatsServer, tmp_path: Path) -> None:
    """With the README's two logins syncd fills a bucket as publisher; as host it reads it and tries to delete.

    Bucket, contents and hints work; the host's delete is NotPermitted.
    """
    publisher, host = connection_of(0, server, tmp_path), connection_of(1, server, tmp_path)
    try:
        await publisher.start(SECONDS)
        await host.start(SECONDS)
        await require_jetstream(publisher)
        assert await missing_permissions(publisher, "app", publish=True) == []
        source, mirror = NatsStore(publisher).bucket("app"), NatsStore(host).bucket("app")
        state = await NatsStore(publisher).create_bucket("app", BucketSpec())
        assert state.republished
        assert await missing_permissions(host, "app", publish=False) == []
        assert (await mirror.state()).created == state.created
        async with asyncio.timeout(20), mirror.hints() as hints:
            puts = [SmallPut(ObjectMeta(name), name.encode(), None, 0) for name in ("a", "b/c")]
            results = await source.put_many(puts)
            assert [result.error for result in results] == [None, None]
            while await hints.wait(SECONDS) < results[-1].seq:
                pass
            infos = [item async for page in mirror.changes(0) for item in page.items if isinstance(item, ObjectInfo)]
            contents = {info.name: data async for info, data in mirror.download_many(infos)}
            assert contents == {"a": b"a", "b/c": b"b/c"}
            await source.remove_chunks(infos[0].nuid)
            with pytest.raises(NotPermitted):
                await mirror.delete("a", expected_seq=None, metadata={})
    finally:
        await host.close()
        await publisher.close()
