"""The server, its network and its rights go wrong under a running publisher and a running subscriber: they converge.

Both are services of this process (:mod:`tests.support.pair`), with connections of their own, so that deadlines can be
made short where a fault would last a minute otherwise. Nothing is restarted but the server.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import time
from typing import TYPE_CHECKING, Any

import pytest
from nats.protocol.parser import AWAITING_MSG_PAYLOAD

from syncd.nodes import BLOB_MAX
from syncd.status import FolderState
from syncd.store import api as api_module
from syncd.store import blobs as blobs_module
from syncd.store import connection as connection_module
from syncd.store import hints as hints_module
from syncd.store import lanes as lanes_module
from syncd.store import transport as transport_module
from syncd.store.address import ConnectionOptions
from syncd.store.base import BucketSpec
from syncd.store.bucket import NatsStore
from syncd.store.client import OneClient
from syncd.store.connection import Connection
from tests.support.backup import DiskBackup, StreamBackup, last_seq
from tests.support.lines import Line
from tests.support.pair import pair, publisher_of, subscriber_of
from tests.support.pki import Authority
from tests.support.server import NatsServer
from tests.support.store import connected, live_kit, put, raw_client
from tests.support.trees import difference, eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from nats.aio.msg import Msg

    from syncd.progress import Progress
    from syncd.store.base import Hints
    from tests.support.pair import Pair, Side

both_layouts = pytest.mark.parametrize("layout", ["generations", "objects"])
RANDOM = random.Random(41)
REQUEST = "REQUEST_SECONDS"
FROZEN_SECONDS = float(os.environ.get("SYNCD_TEST_FROZEN_SECONDS", "0"))
"""By hand: how long a server is frozen, with all deadlines as they are; 0: until deadlines that are short are over."""


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[str], NatsServer]]:
    """Start servers with configurations of their own."""
    running: list[NatsServer] = []

    def started(config: str) -> NatsServer:
        running.append(NatsServer(tmp_path / f"nats{len(running)}", config).start())
        return running[-1]

    yield started
    for server in running:
        server.stop()


def fill(source: Path, files: int = 3, size: int = 70_000) -> None:
    source.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        (source / f"f{number}").write_bytes(RANDOM.randbytes(size))
    (source / "small").write_text("s")


def in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Make the deadlines of requests a tenth, or less, of what they are; return the connection's part of it."""
    for module, name in ((transport_module, "OFFLINE_SECONDS"), (transport_module, REQUEST), (api_module, REQUEST)):
        monkeypatch.setattr(module, name, 0.25)
    monkeypatch.setattr(Connection.client, "__defaults__", (0.25,))
    return {"request_seconds": 0.25}


# -- N5: the bucket ----------------------------------------------------------------------------------------------------


@pytest.mark.fault("N5")
@both_layouts
@pytest.mark.parametrize("how", ["disk", "stream"])
async def test_what_an_old_backup_lacks_is_sent_again(
    how: str, layout: str, tmp_path: Path, nats_server: NatsServer
) -> None:
    """A running pair's bucket is put back from a backup six versions old: of the stream, or of the server's disk.

    The publisher notices; source, bucket and mirror become equal and whole, and go on.
    """
    async with pair(tmp_path, nats_server.url, layout) as two:
        fill(two.source)
        (two.source / "gone").write_text("deleted after the backup")
        await two.equal()
        backup: StreamBackup | DiskBackup
        if how == "stream":
            backup = StreamBackup(nats_server.url, "OBJ_app")
        else:
            backup = DiskBackup(nats_server, tmp_path / "copy")
        await backup.take()
        (two.source / "gone").unlink()
        for number in range(6):
            (two.source / "small").write_text(f"version {number}")
            (two.source / f"after{number % 3}").write_bytes(RANDOM.randbytes(70_000))
            await two.equal()
        before = await last_seq(nats_server.url, "OBJ_app")
        await backup.put_back()
        await two.logged("bucket_replaced", "publish")
        await two.whole()
        assert await last_seq(nats_server.url, "OBJ_app") < before  # else nothing could tell
        (two.source / "later").write_text("and on it goes")
        (two.source / "small").write_text("changed after the restoration")
        await two.equal()
        await two.whole()


async def seal(url: str, bucket: str) -> None:
    async with raw_client(url) as client:
        config = (await client.jetstream().stream_info(f"OBJ_{bucket}")).config
        config.sealed = True
        await client.jetstream().update_stream(config)


@both_layouts
@pytest.mark.fault("N5")
async def test_a_bucket_that_is_sealed_under_its_publisher_is_named_and_others_go_on(
    layout: str, tmp_path: Path, nats_server: NatsServer
) -> None:
    """A folder's stream is sealed through the JetStream API under its running publisher.

    The publisher says so, its mirror keeps what it has, and another folder on the server notices nothing.
    """
    async with (
        pair(tmp_path / "sealed", nats_server.url, layout, folder="sealed") as sealed,
        pair(tmp_path / "open", nats_server.url, layout, folder="open", logs=sealed.logs) as other,
    ):
        for each in (sealed, other):
            fill(each.source)
            await each.equal()
        await seal(nats_server.url, "sealed")
        for each in (sealed, other):
            (each.source / "new").write_text("too late for one")
        assert (await sealed.publisher.complains("is sealed")).state is FolderState.FAILED
        await other.equal()
        await sealed.subscriber.looks_again()
        (sealed.source / "new").unlink()
        assert difference(sealed.source, sealed.mirror).keys() <= {""}
        assert sealed.subscriber.status.now.state is FolderState.IN_SYNC


# -- N1: the server ----------------------------------------------------------------------------------------------------


@pytest.mark.fault("N1")
async def test_a_server_in_lame_duck_mode_is_left_and_found_again(
    tmp_path: Path, serve: Callable[[str], NatsServer]
) -> None:
    """The server gets SIGUSR2: it closes one connection after the other and ends; then it is started anew.

    Both sides connect again, and what changed meanwhile arrives.
    """
    server = serve('lame_duck_duration: "30s"\nlame_duck_grace_period: "10ms"\n')
    async with pair(tmp_path, server.url) as two:
        fill(two.source)
        await two.equal()
        server.signal(signal.SIGUSR2)
        (two.source / "meanwhile").write_text("m")
        assert server.process is not None
        await asyncio.to_thread(server.process.wait, 40)
        await server.astart()
        await two.equal()
        assert two.publisher.connection.epoch > 1
        assert two.subscriber.connection.epoch > 1


@pytest.mark.fault("N1 N4")
async def test_a_subscriber_that_is_cut_off_as_a_slow_consumer_goes_on(
    tmp_path: Path, serve: Callable[[str], NatsServer]
) -> None:
    """A proxy stops reading in the middle of a download until the server's write deadline is over and it hangs up.

    The subscriber connects again and completes it; the publisher notices nothing.
    """
    server = serve('write_deadline: "300ms"\n')
    line = Line(server.port, window=16 * 1024)
    try:
        async with pair(tmp_path, server.url, subscriber={"url": line.url}) as two:
            fill(two.source)
            await two.equal()
            line.stall_after(8_000_000)
            fill(two.source, files=2, size=12_000_000)
            assert await asyncio.to_thread(line.stalled.wait, 30)
            await eventually(lambda: "Slow Consumer" in server.log.read_text(), 30)
            line.resume()
            await two.equal()
            assert two.subscriber.connection.epoch > 1
            assert two.publisher.connection.epoch == 1
    finally:
        line.close()


@pytest.mark.fault("N1 N4")
async def test_a_server_that_is_frozen_beyond_every_deadline_is_waited_for(
    tmp_path: Path, nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server gets SIGSTOP until both sides, their deadlines made short, have given up and say so; then SIGCONT.

    What changed meanwhile arrives.
    """
    short = {} if FROZEN_SECONDS else {**in_a_hurry(monkeypatch), "ping_seconds": 0.2, "connect_seconds": 0.25}
    async with pair(tmp_path, nats_server.url, **short) as two:
        fill(two.source)
        await two.equal()
        nats_server.freeze()
        (two.source / "meanwhile").write_bytes(RANDOM.randbytes(300_000))
        (two.source / "small").unlink()
        await asyncio.sleep(FROZEN_SECONDS)  # the fault itself
        if not FROZEN_SECONDS:
            for side in (two.publisher, two.subscriber):
                assert (await side.is_(lambda now: now.state is FolderState.WAITING)).error
        nats_server.thaw()
        await two.equal(60)


# -- N4: the network ---------------------------------------------------------------------------------------------------


@pytest.mark.fault("N4")
async def test_long_round_trips_that_stall_now_and_then_are_no_failure(tmp_path: Path, nats_server: NatsServer) -> None:
    """A proxy makes round trips of 300 ms and lets nothing through for 0.8 s, as lost packets do; in both layouts.

    No connection is given up, no round fails, and all arrives.
    """
    line = Line(nats_server.port)
    try:
        async with (
            pair(tmp_path / "g", line.url, "generations", folder="g", rescan=60) as one,
            pair(tmp_path / "o", line.url, "objects", folder="o", rescan=60, logs=one.logs) as other,
        ):
            for each in (one, other):
                fill(each.source)
            for each in (one, other):
                await each.equal()
            line.delay = 0.15
            one.logs.clear()
            for each in (one, other):
                (each.source / "f1").unlink()
                (each.source / "more").write_bytes(RANDOM.randbytes(150_000))
            await asyncio.sleep(0.4)
            line.stall()
            await asyncio.sleep(0.8)  # the fault itself
            line.resume()
            for each in (one, other):
                await each.equal()
                assert (each.publisher.connection.epoch, each.subscriber.connection.epoch) == (1, 1)
            told = {one["event"] for one in one.logs}
            assert told.isdisjoint({"round_failed", "nats_disconnected"})
    finally:
        line.close()


@pytest.mark.fault("N4")
async def test_half_open_connections_are_noticed_and_replaced(tmp_path: Path, nats_server: NatsServer) -> None:
    """A proxy goes on holding both sides' connections and swallows every byte, in either direction.

    Pings find out, both connect anew, and what changed meanwhile arrives.
    """
    line = Line(nats_server.port)
    try:
        async with pair(tmp_path, line.url, ping_seconds=0.3, request_seconds=1) as two:
            fill(two.source)
            await two.equal()
            line.swallow()
            (two.source / "meanwhile").write_bytes(RANDOM.randbytes(300_000))
            (two.source / "f0").unlink()
            await two.equal()
            assert two.publisher.connection.epoch > 1
            assert two.subscriber.connection.epoch > 1
            assert {"fell silent" in one["error"] for one in two.events("nats_disconnected")} == {True}
    finally:
        line.close()


@pytest.mark.fault("N4")
async def test_a_trickle_is_slow_and_nothing_else(tmp_path: Path, nats_server: NatsServer) -> None:
    """A proxy carries 10 kB/s in each direction for one push and one pull of 27 kB.

    Both succeed on their first connection and show how far they are.
    """
    up, down, fast = tmp_path / "up", tmp_path / "down", tmp_path / "fast"
    for source in (up, down):
        source.mkdir()
        for number in range(3):  # each of them a blob of its own size, none in a pack with others
            (source / f"f{number}").write_bytes(RANDOM.randbytes(9_000))
    steps: dict[str, list[Progress]] = {"up": [], "down": []}
    lines = [Line(nats_server.port, rate=10_000) for _ in range(2)]
    try:
        async with (
            connected(nats_server.url) as direct,
            connected(lines[0].url) as slow_up,
            connected(lines[1].url) as slow_down,
        ):
            stores = [NatsStore(connection) for connection in (direct, slow_up, slow_down)]
            await publisher_of(stores[0], down, "down", layout="objects").push()
            began = time.monotonic()
            await asyncio.gather(
                publisher_of(stores[1], up, "up", layout="objects").push(progress=steps["up"].append),
                subscriber_of(stores[2], tmp_path / "mirror", "down").pull(progress=steps["down"].append),
            )
            took = time.monotonic() - began
            assert (slow_up.epoch, slow_down.epoch) == (1, 1)
            await subscriber_of(stores[0], fast, "up").pull()
        assert difference(down, tmp_path / "mirror") == {}
        assert difference(up, fast) == {}
        assert took > 2.7
        for shown in steps.values():
            assert len({one.bytes for one in shown}) >= 3
            assert shown[-1].bytes == shown[-1].total_bytes == 27_000
    finally:
        for line in lines:
            line.close()


@pytest.mark.fault("N4")
async def test_a_message_that_takes_longer_than_any_silence_is_waited_for(
    tmp_path: Path, nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy carries a blob of 512 KiB as if at 10 kB/s: all times are divided by fifteen.

    Push and pull succeed on their first connection, and nothing is sent twice.
    """
    monkeypatch.setattr(blobs_module, "CHUNK_SILENCE_SECONDS", 1.3)
    monkeypatch.setattr(lanes_module, "SILENCE_SECONDS", 2.0)
    monkeypatch.setattr(lanes_module, "SLOW_RESEND_SECONDS", 1.2)
    up, down = tmp_path / "up", tmp_path / "down"
    for source in (up, down):
        source.mkdir()
        (source / "f").write_bytes(RANDOM.randbytes(BLOB_MAX))
    lines = [Line(nats_server.port, rate=150_000, window=16 * 1024) for _ in range(2)]
    try:
        async with (
            connected(nats_server.url) as direct,
            connected(lines[0].url, ping_seconds=0.66) as slow_up,
            connected(lines[1].url, ping_seconds=0.66) as slow_down,
        ):
            stores = [NatsStore(connection) for connection in (direct, slow_up, slow_down)]
            await publisher_of(stores[0], down, "down").push()
            await asyncio.gather(
                publisher_of(stores[1], up, "up").push(),
                subscriber_of(stores[2], tmp_path / "mirror", "down").pull(),
            )
            assert (slow_up.epoch, slow_down.epoch) == (1, 1)
            await subscriber_of(stores[0], tmp_path / "fast", "up").pull()
        assert difference(down, tmp_path / "mirror") == {}
        assert difference(up, tmp_path / "fast") == {}
        assert lines[0].carried["up"] < 1.2 * BLOB_MAX
        assert lines[1].carried["down"] < 1.2 * BLOB_MAX
    finally:
        for line in lines:
            line.close()


# -- N2, N8: notifications ---------------------------------------------------------------------------------------------


async def hinted(hints: Hints, seq: int, seconds: float = 20) -> None:
    async with asyncio.timeout(seconds):
        while await hints.wait(60) < seq:
            pass


@pytest.mark.fault("N2")
@pytest.mark.parametrize("how", ["forgotten by the server", "a right taken and given back"])
async def test_a_core_subscription_that_died_silently_is_renewed(
    how: str, tmp_path: Path, serve: Callable[[str], NatsServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server is made to forget a subscription: by UNSUB behind our back, or by taking a right and giving it back.

    A change goes unheard; after a wait without hint we listen anew, and hear the next one.
    """
    monkeypatch.setattr(hints_module, "RETRY_SECONDS", 0.1)
    monkeypatch.setattr(hints_module, "TICK_SECONDS", 0.05)
    server = serve(users())
    as_role = {"user": "subscribe", "password": "pw"}
    async with live_kit(server.url.replace("//", "//publish:pw@")) as other, connected(server.url, **as_role) as conn:
        await other.store.create_bucket("B", BucketSpec())
        theirs = other.store.bucket("B")
        async with NatsStore(conn).bucket("B").hints() as hints:
            seq, _ = await put(theirs, "before", b"x")
            await hinted(hints, seq)
            dead: Any = hints._core  # type: ignore[attr-defined]
            if how.startswith("forgotten"):
                client = await conn.client()
                await client._send_unsubscribe(dead._id)
                await client.flush()
            else:
                reload(server, users(subscribe={"subscribe": ["syncd.B.meta.>"]}))
                reload(server, users())
            await put(theirs, "unheard", b"x")
            assert await hints.wait(0.3) == 0  # the caller looks at everything now
            await eventually(lambda: hints._core is not dead and hints._core is not None)  # type: ignore[attr-defined]
            seq, _ = await put(theirs, "after", b"x")
            await hinted(hints, seq)


@pytest.mark.fault("N2")
async def test_changes_that_nobody_tells_are_found_by_the_timer(
    tmp_path: Path, serve: Callable[[str], NatsServer]
) -> None:
    """The server's permissions deny a subscriber all notifications, from the start.

    What changes in the source reaches the mirror by the subscriber's own timer.
    """
    server = serve(users(subscribe={"subscribe": ["syncd.app.meta.>"]}))
    async with pair(tmp_path, server.url, publisher=user("publish"), subscriber=user("subscribe")) as two:
        fill(two.source)
        await two.equal()
        (two.source / "small").write_text("changed")
        await two.equal()


@both_layouts
@pytest.mark.fault("N8")
async def test_notifications_doubled_out_of_order_late_and_from_a_bucket_before_do_no_harm(
    layout: str, tmp_path: Path, nats_server: NatsServer
) -> None:
    """Real notifications are recorded and published again: shuffled, reversed, doubled, and after the bucket is lost.

    Nothing is fetched, published or undone for it, and the next change is followed.
    """
    async with (
        raw_client(nats_server.url) as client,
        pair(tmp_path, nats_server.url, layout, rescan=60) as two,
    ):
        recorded: list[Msg] = []

        async def record(message: Msg) -> None:
            recorded.append(message)

        subscription = await client.subscribe("syncd.app.meta.>", cb=record)
        await client.flush()
        fill(two.source)
        for number in range(5):
            (two.source / "small").write_text(f"version {number}")
            await two.equal()
        await subscription.unsubscribe()
        assert len(recorded) >= 6
        assert all(int((one.headers or {})["Nats-Sequence"]) for one in recorded)
        RANDOM.shuffle(recorded)
        await settled(two)
        done = outcome(two)
        for message in [*recorded, *reversed(recorded), *recorded[:3]]:
            await client.publish(message.subject, message.data, headers=message.headers)
        await client.flush()
        await settled(two)
        assert outcome(two) == done
        (two.source / "small").write_text("followed")
        await two.equal(10)
        # The bucket is lost and made again: its sequences are lower than those of the notifications of before.
        await client.jetstream().delete_stream("OBJ_app")
        for message in recorded:
            await client.publish(message.subject, message.data, headers=message.headers)
        await client.flush()
        (two.source / "meanwhile").write_text("m")  # with nothing to do, its publisher would see at the next timer
        await two.logged("bucket_created", count=2)
        await two.whole()
        (two.source / "small").write_text("followed in the new one")
        await two.equal(10)


def outcome(two: Pair) -> list[Any]:
    """What has come of everything so far."""
    told = [one for one in two.logs if one["event"] in {"published", "committed", "mirrored", "round_failed"}]
    return [*told, two.publisher.status.now.generation, two.subscriber.status.now.generation]


async def settled(two: Pair) -> None:
    """Wait until nothing is done any more."""
    before = None
    while before != (before := outcome(two)):
        await asyncio.sleep(0.3)


# -- N6: rights --------------------------------------------------------------------------------------------------------


def users(**denied: dict[str, list[str]]) -> str:
    """Two users that may do everything but what is denied: role -> publish or subscribe -> subjects."""
    lines = []
    for role in ("publish", "subscribe"):
        rights = {what: {"allow": ">", "deny": subjects} for what, subjects in denied.get(role, {}).items()}
        lines.append(json.dumps({"user": role, "password": "pw", "permissions": rights}))
    return f"authorization: {{ users: [ {', '.join(lines)} ] }}\n"


def user(name: str) -> dict[str, str]:
    return {"user": name, "password": "pw"}


def reload(server: NatsServer, config: str) -> None:
    """Let a running server take another configuration."""
    count = server.log.read_text().count("Reloaded server configuration")
    server.config.write_text(server.config.read_text().replace(server.extra, config))
    server.extra = config
    server.signal(signal.SIGHUP)
    deadline = time.monotonic() + 20
    while server.log.read_text().count("Reloaded server configuration") == count:
        assert time.monotonic() < deadline, server.log.read_text()[-2000:]
        time.sleep(0.01)


@both_layouts
@pytest.mark.fault("N6")
@pytest.mark.parametrize(
    ("role", "what", "subject"),
    [
        ("publish", "publish", "$O.app.>"),
        ("publish", "subscribe", "_INBOX.>"),
        ("subscribe", "publish", "$JS.API.DIRECT.GET.>"),
        ("subscribe", "subscribe", "_INBOX.>"),
    ],
)
async def test_a_right_that_is_taken_away_is_named_and_its_return_heals(
    role: str, what: str, subject: str, layout: str, tmp_path: Path, serve: Callable[[str], NatsServer]
) -> None:
    """The server reloads its configuration (SIGHUP) with a right less for one side: to write, to read, or for replies.

    That side names the subject; with the right given back it goes on, and all is equal.
    """
    server = serve(users())
    async with pair(tmp_path, server.url, layout, publisher=user("publish"), subscriber=user("subscribe")) as two:
        fill(two.source)
        await two.equal()
        side: Side = two.publisher if role == "publish" else two.subscriber
        await asyncio.to_thread(reload, server, users(**{role: {what: [subject]}}))
        (two.source / "small").write_text("not yet")
        now = await side.complains("permit")
        assert subject.rstrip(">").lower() in f"{now.error} {now.hint}".lower()
        await asyncio.to_thread(reload, server, users())
        await two.equal()
        assert side.connection.state == "connected"


def one_user(password: str) -> str:
    return f'authorization {{ user: "u", password: "{password}" }}\n'


@both_layouts
@pytest.mark.fault("N6 K14")
async def test_credentials_that_are_rotated_on_disk_are_taken_up_by_both_sides(
    layout: str, tmp_path: Path, serve: Callable[[str], NatsServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server reloads (SIGHUP) with another password and throws both sides out; later their password file has it.

    Both say that they are refused, then go on by themselves; no password is logged.
    """
    server = serve(one_user("old-one"))
    file = tmp_path / "password"
    file.write_text("old-one")
    short = in_a_hurry(monkeypatch)
    async with pair(tmp_path, server.url, layout, user="u", password_file=str(file), **short) as two:
        fill(two.source)
        await two.equal()
        await asyncio.to_thread(reload, server, one_user("new-one"))
        (two.source / "small").write_text("not yet")
        for side in (two.publisher, two.subscriber):
            assert (await side.complains("refused our credentials")).state is FolderState.WAITING
        file.write_text("new-one")
        await two.equal()
        assert {side.connection.state for side in (two.publisher, two.subscriber)} == {"connected"}
        assert "-one" not in repr([two.logs, two.publisher.history, two.subscriber.history])


@both_layouts
@pytest.mark.fault("N6")
@pytest.mark.parametrize(("case", "words"), [("expired", "has expired"), ("another name", "hostname mismatch")])
async def test_a_server_that_comes_back_with_a_bad_certificate_is_named_and_a_good_one_heals(
    layout: str,
    case: str,
    words: str,
    tmp_path: Path,
    serve: Callable[[str], NatsServer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is restarted with a certificate that has expired or is for another host, and again with one that is good."""
    ca = Authority(tmp_path / "pki")

    def tls(name: str, **how: Any) -> str:
        cert, key = ca.issue(name, **how)
        return f'tls {{ cert_file: "{cert}", key_file: "{key}", timeout: 5 }}\n'

    server = serve(tls("good"))
    async with pair(tmp_path, server.url, layout, tls_ca_file=str(ca.file), **in_a_hurry(monkeypatch)) as two:
        fill(two.source)
        await two.equal()
        server.extra = tls("bad", expired=True) if case == "expired" else tls("bad", hosts=("other.example",))
        await server.arestart()
        (two.source / "small").write_text("not yet")
        for side in (two.publisher, two.subscriber):
            assert (await side.complains(words)).state is FolderState.WAITING
        assert (two.mirror / "small").read_text() == "s"
        server.extra = tls("better")
        await server.arestart()
        await two.equal()


def test_nats_py_still_has_the_inner_names_that_tell_how_far_it_is() -> None:
    """A newer one that renames them must be noticed here."""
    client = OneClient(must_tls=False)
    assert [name for name in ("_pings_outstanding", "_ps", "_transport") if not hasattr(client, name)] == []
    assert (client._ps.state, bytes(client._ps.buf)) != (AWAITING_MSG_PAYLOAD, b"")
    assert (client.unsent, client.arriving) == (0, 0)


# -- the end of a connection -------------------------------------------------------------------------------------------


@pytest.mark.fault("U5")
async def test_closing_cancels_again_what_swallowed_the_first_cancellation(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection is closed whose attempt (replaced) swallows the first two cancellations, as parts of nats-py do.

    It is cancelled a third time, and close ends within seconds.
    """
    trying, swallowed, enough = asyncio.Event(), 0, False

    async def connect(self: Connection, server: object) -> None:
        nonlocal swallowed
        while True:
            trying.set()
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                swallowed += 1
                if enough or swallowed > 2:
                    raise

    monkeypatch.setattr(Connection, "_connect", connect)
    monkeypatch.setattr(connection_module, "CANCEL_SECONDS", 0.05)
    connection = Connection(ConnectionOptions(servers=("nats://127.0.0.1:1",), name="test"))
    await connection.start()
    await trying.wait()
    closing = asyncio.create_task(connection.close())
    await asyncio.wait({closing}, timeout=5)
    ended, enough = closing.done() and swallowed == 3, True
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()
    assert ended


@pytest.mark.fault("U5")
async def test_closing_gives_the_end_of_a_connection_its_time(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real connection is closed whose tidying up is made to take 0.6 s more.

    It is not cancelled in the middle of it.
    """
    ended = []
    dispose = OneClient.dispose

    async def slowly(self: OneClient) -> None:
        await asyncio.sleep(0.6)
        await dispose(self)
        ended.append(self)

    async with connected(nats_server.url):
        monkeypatch.setattr(OneClient, "dispose", slowly)
    assert len(ended) == 1
