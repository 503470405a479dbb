"""Faults, each provoked for real against running daemons: they heal, or they say clearly why not."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import nats
import psutil
import pytest

from syncd.index import Index
from syncd.paths import subject_token
from syncd.rules import Rules
from syncd.store.memory import MemoryBucket
from syncd.subscriber import SubscribeOptions, Subscriber
from tests.e2e.conftest import (
    EAGER_PUBLISH,
    Daemons,
    bucket_exists,
    delete_bucket,
    healed,
    no_orphans,
    publish,
    subscribe,
)
from tests.support.mirror import litter
from tests.support.store import raw_meta
from tests.support.trees import difference, equal_trees, eventually, snapshot
from tests.unit.test_services import World, keeper

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.support.daemon import Daemon
    from tests.support.server import NatsServer


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A small source with something of everything."""
    root = tmp_path / "source"
    (root / "d/deep").mkdir(parents=True)
    (root / "keep").write_text("k")
    (root / "d/f").write_text("in d")
    (root / "d/deep/large").write_bytes(os.urandom(300_000))
    (root / "link").symlink_to("d/f")
    return root


def status(daemon: Daemon, key: str) -> dict[str, Any]:
    return daemon.status().get(key, {})


def problems(daemon: Daemon, key: str = "subscribe-app") -> dict[str, str]:
    """Path -> code of what a folder reports."""
    return {one["path"]: one["code"] for one in status(daemon, key).get("problems", [])}


async def in_state(daemon: Daemon, key: str, state: str, seconds: float = 60) -> dict[str, Any]:
    def reached() -> dict[str, Any]:
        now = status(daemon, key)
        return now if now.get("state") == state else {}

    found: dict[str, Any] = await eventually(reached, seconds)
    return found


async def complains(daemon: Daemon, key: str, text: str, seconds: float = 20) -> dict[str, Any]:
    """Wait until a folder waits with an error of these words."""

    def told() -> dict[str, Any]:
        now = status(daemon, key)
        return now if now.get("state") == "waiting" and text in now.get("error", "") else {}

    found: dict[str, Any] = await eventually(told, seconds)
    return found


async def rounds_later(daemon: Daemon, key: str, rounds: int = 2) -> None:
    """Wait until a folder has looked at everything again, so that what has not happened by now does not happen."""
    for _ in range(rounds):
        before = status(daemon, key).get("last_sync")
        await eventually(lambda before=before: status(daemon, key).get("last_sync") != before)


# -- the server ------------------------------------------------------------------------------------------------------


@pytest.mark.fault("N1")
@pytest.mark.parametrize("how", ["gone", "frozen"])
async def test_a_server_that_is_away_is_waited_for(
    how: str, tmp_path: Path, daemons: Daemons, nats_server: NatsServer, source: Path
) -> None:
    """Changes made while the server is killed, or stopped in its tracks, arrive when it is back; no restart of ours."""
    mirror = tmp_path / "mirror"
    publisher = daemons.start("p", publish(source))
    subscriber = daemons.start("s", subscribe(mirror))
    await equal_trees(source, mirror)
    if how == "gone":
        await nats_server.astop(kill=True)
    else:
        nats_server.freeze()
    (source / "while-away").write_bytes(os.urandom(400_000))
    (source / "d/f").unlink()
    (source / "keep").rename(source / "kept")
    if how == "gone":
        await in_state(publisher, "publish-app", "syncing")
        # What was on its way when the server went may wait for a minute before the round gives up.
        assert (await in_state(publisher, "publish-app", "waiting", seconds=120))["error"]
        await in_state(subscriber, "subscribe-app", "waiting")
        await nats_server.astart()
    else:
        await asyncio.sleep(4)  # the fault itself, not a wait for something
        nats_server.thaw()
    await healed(nats_server, source, mirror)
    for daemon in (publisher, subscriber):
        assert daemon.process is not None
        assert daemon.process.poll() is None


@pytest.mark.fault("N3")
@pytest.mark.timeout(240)
async def test_twenty_subscribers_come_back_after_a_restart_of_the_server(
    tmp_path: Path, daemons: Daemons, nats_server: NatsServer, source: Path
) -> None:
    """nats-server is killed under a publisher and twenty subscribers; the source changes before it is started again.

    All twenty mirrors become equal over one connection each, and no consumer is left in the stream.
    """
    mirrors = [tmp_path / f"mirror{number}" for number in range(20)]
    daemons.start("p", publish(source))

    def connections() -> list[int]:
        """How many each process has to the server."""
        pids = [daemon.process.pid for daemon in daemons if daemon.process is not None]
        all_of = [psutil.Process(pid).net_connections("tcp") for pid in pids]
        return [sum(bool(one.raddr) and one.raddr.port == nats_server.port for one in each) for each in all_of]

    for number, mirror in enumerate(mirrors):
        daemons.start(f"s{number}", subscribe(mirror))
    for mirror in mirrors:
        await equal_trees(source, mirror, 60)
    await nats_server.astop(kill=True)
    (source / "new").write_bytes(os.urandom(300_000))
    (source / "d/f").write_text("changed")
    await nats_server.astart()
    for mirror in mirrors:
        await equal_trees(source, mirror, 60)
    await eventually(lambda: connections() == [1] * 21)
    client = await nats.connect(nats_server.url)
    try:
        assert (await client.jetstream().stream_info("OBJ_app")).state.consumer_count == 0
    finally:
        await client.close()
    await healed(nats_server, source, *mirrors)


# -- the watcher -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.fault("W1 W2 S4")
async def test_bursts_that_overrun_the_watcher_arrive_whole(
    tmp_path: Path, daemons: Daemons, nats_server: NatsServer, source: Path
) -> None:
    """20,000 files, and 200 nested directories, made as fast as the disk allows; the timer is an hour away."""
    mirror = tmp_path / "mirror"
    slow = "rescan_seconds = 3600\n"
    daemons.start("p", publish(source, extra=slow))
    daemons.start("s", subscribe(mirror, extra=slow))
    await equal_trees(source, mirror)
    for chain in range(2):
        deep = source / f"chain{chain}"
        for number in range(100):
            deep = deep / f"{number}"
            deep.mkdir(parents=True)
            (deep / "leaf").write_text(str(number))
    await equal_trees(source, mirror)
    for directory in range(30):
        (source / f"burst{directory}").mkdir()
    for number in range(20_000):  # some 60,000 events; the kernel holds 16,384
        (source / f"burst{number % 30}/{number}").write_text(str(number))
    await eventually(lambda: sum(1 for _ in mirror.glob("burst*/*")) == 20_000, 150)
    await equal_trees(source, mirror, 60)


@pytest.mark.fault("S1 S2")
async def test_a_constant_writer_starves_only_itself(
    tmp_path: Path, daemons: Daemons, nats_server: NatsServer, source: Path
) -> None:
    """A file of 1 MiB is rewritten in place without a pause while five others are made beside it, then with short ones.

    Each of those is mirrored within 10 s; every version of the file that its mirror ever has is of one write.
    """
    mirror = tmp_path / "mirror"
    daemons.start("p", publish(source))
    daemons.start("s", subscribe(mirror))
    await equal_trees(source, mirror)
    size, pause = 1024 * 1024, 0.0
    seen: dict[int, tuple[int, set[int]]] = {}
    with (source / "busy").open("wb") as busy:
        stop = asyncio.Event()

        def write() -> None:
            busy.seek(0)
            busy.write(os.urandom(1) * size)
            busy.flush()
            time.sleep(pause)

        def look() -> None:
            with suppress(FileNotFoundError), (mirror / "busy").open("rb") as file:
                data = file.read()
                seen[os.fstat(file.fileno()).st_mtime_ns] = (len(data), set(data))

        async def keep(doing: Callable[[], None]) -> None:
            while not stop.is_set():
                await asyncio.to_thread(doing)

        both = asyncio.gather(keep(write), keep(look))
        try:
            for number in range(5):
                (source / f"other{number}").write_text(str(number))
                await eventually(lambda number=number: (mirror / f"other{number}").exists(), 10)
            pause = 0.2
            await eventually(lambda: len(seen) > 2)
        finally:
            stop.set()
            await both
    await healed(nats_server, source, mirror)
    look()
    assert all((length, len(kinds)) in {(0, 0), (size, 1)} for length, kinds in seen.values())


@pytest.mark.fault("W5 L10")
async def test_a_source_that_is_unmounted_or_missing_is_not_an_empty_one(
    tmp_path: Path, daemons: Daemons, nats_server: NatsServer, source: Path
) -> None:
    """Under a running publisher the source is moved away, replaced by an empty directory, and moved back.

    It waits, then halts, and the mirror stays whole; moved back it is in sync and watched again.
    """
    mirror = tmp_path / "mirror"
    daemon = daemons.start("d", publish(source) + subscribe(mirror))
    await equal_trees(source, mirror)
    whole = snapshot(source)
    source.rename(tmp_path / "away")
    assert "source" in (await in_state(daemon, "publish-app", "waiting"))["error"]
    source.mkdir()
    await in_state(daemon, "publish-app", "halted")
    await rounds_later(daemon, "subscribe-app")
    assert snapshot(mirror) == whole
    source.rmdir()
    (tmp_path / "away").rename(source)
    await in_state(daemon, "publish-app", "in_sync")
    (source / "after").write_text("watched again")
    await healed(nats_server, source, mirror)


@contextmanager
def mounted(target: Path, *arguments: str) -> Iterator[Callable[[], None]]:
    """Mount something on ``target`` for a while; yields a way to unmount it early."""
    target.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *arguments, str(target)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"needs the right to mount: {done.stderr.strip()}")
    there = [True]

    def unmount() -> None:
        if there:
            subprocess.run(["umount", "--lazy", str(target)], check=True)
            there.clear()

    try:
        yield unmount
    finally:
        unmount()


@pytest.mark.fault("W5 L10")
async def test_a_source_whose_filesystem_is_unmounted_halts_and_comes_back(
    tmp_path: Path, daemons: Daemons, nats_server: NatsServer, source: Path
) -> None:
    """A source that is a bind mount is unmounted under its publisher, changed behind it, and mounted again.

    Over the bare mount point the publisher halts and the mirror stays whole; after it the change arrives.
    """
    mirror, mount = tmp_path / "mirror", tmp_path / "mount"
    with mounted(mount, "--bind", str(source)) as unmount:
        daemon = daemons.start("d", publish(mount) + subscribe(mirror))
        await equal_trees(source, mirror)
        whole = snapshot(source)
        unmount()
        await in_state(daemon, "publish-app", "halted")
        await rounds_later(daemon, "subscribe-app")
        assert snapshot(mirror) == whole
    with mounted(mount, "--bind", str(source)):
        (source / "meanwhile").write_text("changed on the filesystem itself")
        await healed(nats_server, source, mirror)
        await in_state(daemon, "publish-app", "in_sync")
        daemon.kill()


# -- the bucket ------------------------------------------------------------------------------------------------------


async def raise_limit(url: str, max_bytes: int) -> None:
    client = await nats.connect(url)
    try:
        js = client.jetstream()
        config = (await js.stream_info("OBJ_app")).config
        config.max_bytes = max_bytes
        await js.update_stream(config)
    finally:
        await client.close()


@pytest.mark.layout("objects")
@pytest.mark.fault("N5")
@pytest.mark.parametrize("remedy", ["file removed", "limit raised"])
async def test_a_full_bucket_is_named_and_everything_that_fits_goes_on(
    remedy: str, tmp_path: Path, daemons: Daemons, nats_server: NatsServer, source: Path
) -> None:
    """A file of 1.5 MB outgrows its bucket's max_bytes of 2 MB; then another is removed, or the limit raised.

    The publisher names it and waits; small files that sort before and after it arrive, and either remedy heals.
    """
    mirror = tmp_path / "mirror"
    publisher = daemons.start("p", publish(source, extra=EAGER_PUBLISH + "[publish.bucket]\nmax_bytes = 2_000_000\n"))
    daemons.start("s", subscribe(mirror))
    await equal_trees(source, mirror)
    (source / "half").write_bytes(os.urandom(900_000))
    await equal_trees(source, mirror)
    (source / "enormous").write_bytes(os.urandom(1_500_000))
    waiting = await complains(publisher, "publish-app", "no room for enormous")
    assert "max_bytes" in waiting["hint"]
    (source / "a").write_text("small, sorts before it")
    (source / "z").write_text("small, sorts after it")
    await eventually(lambda: (mirror / "a").exists() and (mirror / "z").exists(), 40)
    assert not (mirror / "enormous").exists()
    if remedy == "file removed":
        (source / "half").unlink()
    else:
        await raise_limit(nats_server.url, 20_000_000)
    await healed(nats_server, source, mirror, seconds=60)


@pytest.mark.layout("objects")
@pytest.mark.fault("N5")
async def test_a_bucket_filled_by_small_files_keeps_room_for_their_deletion(
    tmp_path: Path, daemons: Daemons, nats_server: NatsServer, source: Path
) -> None:
    """600 small files fill a bucket limited to 700 kB until it is full; then four fifths of them are removed.

    A tombstone needs room before it makes room: 40 kB of it are left, so the removal heals.
    """
    mirror = tmp_path / "mirror"
    publisher = daemons.start("p", publish(source, extra=EAGER_PUBLISH + "[publish.bucket]\nmax_bytes = 700_000\n"))
    daemons.start("s", subscribe(mirror))
    await equal_trees(source, mirror)
    for number in range(600):
        (source / f"n{number}").write_bytes(os.urandom(number % 97 + 1))
    await complains(publisher, "publish-app", "no room for")
    client = await nats.connect(nats_server.url)
    try:
        info = await client.jetstream().stream_info("OBJ_app")
        assert info.config.max_bytes is not None
        assert info.config.max_bytes - info.state.bytes > 40_000
    finally:
        await client.close()
    for number in range(600):
        if number % 5:
            (source / f"n{number}").unlink()
    await healed(nats_server, source, mirror, seconds=60)


@pytest.mark.layout("generations")
@pytest.mark.fault("N5")
@pytest.mark.parametrize("remedy", ["file removed", "limit raised"])
async def test_a_full_bucket_refuses_the_generation_and_keeps_the_one_before(
    remedy: str, tmp_path: Path, daemons: Daemons, nats_server: NatsServer, source: Path
) -> None:
    """A file of 2.4 MB is put into the source of a bucket limited to 2 MB; then it is removed, or the limit raised.

    The publisher names the limit and nothing of the generation is mirrored; either remedy heals, without orphans.
    """
    mirror = tmp_path / "mirror"
    publisher = daemons.start("p", publish(source, extra=EAGER_PUBLISH + "[publish.bucket]\nmax_bytes = 2_000_000\n"))
    daemons.start("s", subscribe(mirror))
    await equal_trees(source, mirror)
    before = snapshot(mirror)
    (source / "enormous").write_bytes(os.urandom(2_400_000))
    waiting = await complains(publisher, "publish-app", "no room for this generation")
    assert "max_bytes" in waiting["hint"]
    (source / "small").write_text("waits with the rest")
    assert snapshot(mirror) == before
    if remedy == "file removed":
        (source / "enormous").unlink()
    else:
        await raise_limit(nats_server.url, 20_000_000)
    await healed(nats_server, source, mirror, seconds=60)


@pytest.mark.layout("generations")
@pytest.mark.fault("O1")
@pytest.mark.parametrize("which", ["largest", "smallest"])
async def test_blobs_that_vanished_are_found_by_the_publisher_and_sent_again(
    which: str, tmp_path: Path, daemons: Daemons, nats_server: NatsServer, source: Path
) -> None:
    """The largest or the smallest blob of a folder in sync is purged from its stream, and a new subscriber started.

    It applies nothing and says which blob it misses; after a restart of the publisher it has everything.
    """
    publisher = daemons.start("p", publish(source))
    await in_state(publisher, "publish-app", "in_sync")
    client = await nats.connect(nats_server.url)
    try:
        js = client.jetstream()
        info = await js.stream_info("OBJ_app", subjects_filter="$O.app.C.>")
        sizes = {}
        for subject in info.state.subjects or {}:
            if len(subject) == len("$O.app.C.") + 64:
                sizes[subject] = len((await js.get_last_msg("OBJ_app", subject)).data or b"")
        choose = max if which == "largest" else min
        lost = choose(sizes, key=lambda subject: sizes[subject])
        await js.purge_stream("OBJ_app", subject=lost)
    finally:
        await client.close()
    mirror = tmp_path / "mirror"
    subscriber = daemons.start("s", subscribe(mirror))
    await complains(subscriber, "subscribe-app", f"blob {lost.removeprefix('$O.app.C.')[:12]} is gone")
    assert status(subscriber, "subscribe-app")["problem_count"]
    assert [path for path in mirror.iterdir() if path.name != ".syncd"] == []
    assert publisher.stop() == 0
    publisher.start()
    await healed(nats_server, source, mirror)


@pytest.mark.fault("N5")
@pytest.mark.timeout(180)
async def test_a_deleted_bucket_is_made_again_and_no_mirror_is_emptied(
    tmp_path: Path, daemons: Daemons, nats_server: NatsServer, source: Path
) -> None:
    """The bucket of 1,000 mirrored files is deleted while its publisher is down, and later while it runs.

    While there is none, and while it is filled again, the mirror keeps what it has; then it follows the new one.
    """
    mirror = tmp_path / "mirror"
    for number in range(1000):
        (source / f"n{number}").write_bytes(os.urandom(3000))
    publisher = daemons.start("p", publish(source))
    subscriber = daemons.start("s", subscribe(mirror))
    await equal_trees(source, mirror)
    whole = snapshot(mirror)
    await asyncio.to_thread(publisher.stop)
    await delete_bucket(nats_server.url)
    await in_state(subscriber, "subscribe-app", "waiting")
    assert snapshot(mirror) == whole
    publisher.start()
    deadline = time.monotonic() + 30
    while not (await bucket_exists(nats_server.url) and publisher.events("published")[1:]):
        assert snapshot(mirror) == whole
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)
    await in_state(subscriber, "subscribe-app", "in_sync")
    assert snapshot(mirror) == whole
    (source / "later").write_text("the mirror follows the new bucket")
    await eventually((mirror / "later").exists)
    await delete_bucket(nats_server.url)
    await eventually(lambda: len(publisher.events("bucket_created")) == 3)
    await healed(nats_server, source, mirror, seconds=60)


# -- the mirror's disk -----------------------------------------------------------------------------------------------


@pytest.mark.fault("X1")
async def test_a_full_disk_leaves_the_mirror_as_it_was_and_heals_with_room(
    tmp_path: Path, daemons: Daemons, nats_server: NatsServer, source: Path
) -> None:
    """The mirror's tmpfs of 2 MB is half filled by another file; then a file of 1.2 MB is published.

    The subscriber says that there is no space, and nothing of the file shows; with room again all is mirrored.
    """
    disk = tmp_path / "disk"
    with mounted(disk, "-t", "tmpfs", "-o", "size=2m", "tmpfs"):
        mirror = disk / "mirror"
        daemons.start("p", publish(source))
        subscriber = daemons.start("s", subscribe(mirror))
        await equal_trees(source, mirror)
        (disk / "obstacle").write_bytes(bytes(1_000_000))
        whole = snapshot(mirror)
        (source / "keep").write_text("changed in the same batch")
        (source / "too-large").write_bytes(os.urandom(1_200_000))
        await complains(subscriber, "subscribe-app", "space")
        now = snapshot(mirror)
        assert "too-large" not in now
        assert {path: entry for path, entry in now.items() if path != "keep"} == {
            path: entry for path, entry in whole.items() if path != "keep"
        }
        (disk / "obstacle").unlink()
        await healed(nats_server, source, mirror, seconds=60)
        subscriber.kill()


@pytest.mark.fault("L10")
async def test_a_mirror_whose_filesystem_is_unmounted_is_not_written_to_until_it_is_back(
    tmp_path: Path, daemons: Daemons, nats_server: NatsServer, source: Path
) -> None:
    """The bind mount that holds the mirror is unmounted under its subscriber, the source edited, and mounted again.

    The subscriber says so and writes nothing into the bare mount point; then the mirror is brought up to date.
    """
    backing, disk = tmp_path / "backing", tmp_path / "disk"
    backing.mkdir()
    with mounted(disk, "--bind", str(backing)) as unmount:
        daemons.start("p", publish(source))
        subscriber = daemons.start("s", subscribe(disk))
        await equal_trees(source, disk)
        unmount()
        (source / "keep").write_text("changed")
        await complains(subscriber, "subscribe-app", "replaced")
        assert list(disk.iterdir()) == []
        with mounted(disk, "--bind", str(backing)):
            await healed(nats_server, source, disk, seconds=60)
            subscriber.kill()


@pytest.mark.fault("L10")
async def test_a_mirror_on_a_new_empty_filesystem_is_filled_after_a_restart(
    tmp_path: Path, daemons: Daemons, nats_server: NatsServer, source: Path
) -> None:
    """The mirror's tmpfs is unmounted and an empty one mounted in its place, under a running subscriber.

    It says that the root was replaced and writes nothing; a restart says that this is meant, and it is filled.
    """
    disk = tmp_path / "disk"
    arguments = ("-t", "tmpfs", "-o", "size=20m", "tmpfs")
    with mounted(disk, *arguments) as unmount:
        daemons.start("p", publish(source))
        subscriber = daemons.start("s", subscribe(disk))
        await equal_trees(source, disk)
        unmount()
        with mounted(disk, *arguments):
            (source / "keep").write_text("changed")
            await complains(subscriber, "subscribe-app", "replaced")
            assert list(disk.iterdir()) == []
            assert subscriber.stop() == 0
            subscriber.start()
            await healed(nats_server, source, disk)
            subscriber.kill()


# -- what is in the bucket -------------------------------------------------------------------------------------------


async def inject(url: str, name: str, payload: bytes, chunks: tuple[bytes, ...] = (), nuid: str = "") -> None:
    """Write to the bucket as a client that is not syncd."""
    client = await nats.connect(url)
    try:
        js = client.jetstream()
        for chunk in chunks:
            await js.publish(f"$O.app.C.{nuid}", chunk)
        await js.publish(f"$O.app.M.{subject_token(name)}", payload, headers={"Nats-Rollup": "sub"})
    finally:
        await client.close()


BROKEN: dict[str, tuple[dict[str, Any], tuple[bytes, ...]]] = {
    "flipped": ({}, (b"CONTENT",)),
    "missing": ({}, ()),
    "truncated": ({}, (b"conten",)),
    "extra": ({}, (b"content", b"more")),
    "reordered": ({"chunks": 2}, (b"ent", b"cont")),
    "size-lies": ({"size": 8}, (b"content",)),
    "size-endless": ({"size": 1 << 60}, (b"content",)),
    "chunks-lie": ({"chunks": 3}, (b"content",)),
    "no-digest": ({"digest": ""}, (b"content",)),
    "other-digest": ({"digest": "MD5=abcd"}, (b"content",)),
}


@pytest.mark.layout("objects")
@pytest.mark.fault("O1 O5")
async def test_broken_objects_are_reported_and_nothing_of_them_is_written(
    tmp_path: Path, daemons: Daemons, nats_server: NatsServer, source: Path
) -> None:
    """A client that is not syncd writes ten objects whose bytes, size, chunks or digest lie, and 40 without chunks.

    Each is a problem of its name and nothing of it is written; what was there stays, and good objects go on.
    """
    mirror = tmp_path / "mirror"
    daemons.start("p", publish(source))
    subscriber = daemons.start("s", subscribe(mirror))
    await equal_trees(source, mirror)
    await inject(nats_server.url, "flipped", raw_meta("flipped", b"good", "v1", bucket="app"), (b"good",), "v1")
    await eventually((mirror / "flipped").exists)
    for name, (changes, chunks) in BROKEN.items():
        meta = raw_meta(name, b"content", f"n-{name}", bucket="app", **changes)
        await inject(nats_server.url, name, meta, chunks, f"n-{name}")
    many = {f"missing{number}" for number in range(40)}
    for name in many:
        await inject(nats_server.url, name, raw_meta(name, b"content", f"n-{name}", bucket="app"))
    await inject(nats_server.url, "good", raw_meta("good", b"fine", "v2", bucket="app"), (b"fine",), "v2")
    await eventually((mirror / "good").exists)
    await eventually(lambda: problems(subscriber).keys() >= BROKEN.keys() | many)
    await rounds_later(subscriber, "subscribe-app")
    assert problems(subscriber).keys() >= BROKEN.keys() | many  # told for as long as it is so, tried again or not
    (source / "later").write_text("goes on")
    await eventually((mirror / "later").exists)
    assert (mirror / "flipped").read_bytes() == b"good"
    there = {path.name for path in mirror.iterdir()}
    assert there & BROKEN.keys() == {"flipped"}
    await eventually(lambda: litter(mirror) == [])
    meta = raw_meta("flipped", b"mended", "v3", bucket="app")
    await inject(nats_server.url, "flipped", meta, (b"mended",), "v3")
    await eventually(lambda: (mirror / "flipped").read_bytes() == b"mended")
    await eventually(lambda: "flipped" not in problems(subscriber))


@pytest.mark.layout("objects")
@pytest.mark.fault("O1")
async def test_chunks_that_vanished_are_found_by_the_publisher_and_sent_again(
    tmp_path: Path, daemons: Daemons, nats_server: NatsServer, source: Path
) -> None:
    """All chunks of the largest file but the last are purged from the stream, and a new subscriber is started.

    It reports the file and takes the rest; after a restart of the publisher it has everything.
    """
    publisher = daemons.start("p", publish(source))
    await in_state(publisher, "publish-app", "in_sync")
    client = await nats.connect(nats_server.url)
    try:
        js = client.jetstream()
        info = await js.stream_info("OBJ_app", subjects_filter="$O.app.C.>")
        assert info.state.subjects
        subject = max(info.state.subjects, key=lambda name: info.state.subjects[name])
        await js.purge_stream("OBJ_app", subject=subject, keep=1)
    finally:
        await client.close()
    mirror = tmp_path / "mirror"
    subscriber = daemons.start("s", subscribe(mirror))
    await eventually(lambda: problems(subscriber).get("d/deep/large") == "not_fetched")
    assert (mirror / "d/f").read_text() == "in d"
    assert not (mirror / "d/deep/large").exists()
    assert publisher.stop() == 0
    publisher.start()
    await healed(nats_server, source, mirror)


HOSTILE = [
    "../escape", "a/../../escape", "/etc/escape", "a//b", "./a", "..", ".", "a/", "n\0ul", "x" * 300,
    "/".join(["y" * 200] * 14), ".syncd/journal", ".syncd/stage/x", ".syncd",
]  # fmt: skip


@pytest.mark.layout("objects")
@pytest.mark.fault("P1 P2 P3 P6")
async def test_hostile_names_are_reported_and_nothing_is_written(
    tmp_path: Path, daemons: Daemons, nats_server: NatsServer, source: Path
) -> None:
    """A client that is not syncd writes 14 objects whose names climb out, are absolute, no paths, too long or .syncd's.

    Each is a problem, and nothing is written outside the mirror or into .syncd; eight merely strange names are files.
    """
    mirror = tmp_path / "nest/mirror"
    mirror.parent.mkdir()
    daemons.start("p", publish(source))
    subscriber = daemons.start("s", subscribe(mirror))
    await equal_trees(source, mirror)
    for number, name in enumerate(HOSTILE):
        meta = raw_meta(name, b"evil", f"h{number}", bucket="app")
        await inject(nats_server.url, name, meta, (b"evil",), f"h{number}")
    strange = ["-rf", "a\\b", "new\nline", "\x1b[31mred", "$(reboot)", " ", "<b>", "\u202egnp.exe"]
    for number, name in enumerate(strange):
        meta = raw_meta(name, b"fine", f"s{number}", bucket="app")
        await inject(nats_server.url, name, meta, (b"fine",), f"s{number}")
    await eventually(lambda: all((mirror / name).exists() for name in strange))
    assert {(mirror / name).read_bytes() for name in strange} == {b"fine"}
    await eventually(lambda: status(subscriber, "subscribe-app").get("problem_count") == len(HOSTILE))
    assert [path.name for path in mirror.parent.iterdir()] == ["mirror"]
    assert not list(tmp_path.rglob("*escape*"))
    wanted = {"keep", "d", "link", ".syncd", *strange}
    assert {path.name for path in mirror.iterdir()} == wanted
    assert litter(mirror) == []


# -- links -----------------------------------------------------------------------------------------------------------


@pytest.mark.fault("L1 L4 D5")
async def test_a_parent_replaced_by_a_symlink_is_not_followed(
    tmp_path: Path, daemons: Daemons, nats_server: NatsServer, source: Path
) -> None:
    """While the subscriber is stopped (SIGSTOP), a mirrored directory is moved outside and replaced by a symlink to it.

    Edits, new files, deletes and modes from upstream are problems and touch nothing outside; without the link it heals.
    """
    mirror, outside = tmp_path / "mirror", tmp_path / "outside"
    daemons.start("p", publish(source))
    subscriber = daemons.start("s", subscribe(mirror))
    await equal_trees(source, mirror)
    subscriber.signal(signal.SIGSTOP)  # else it may mend what is missing between the two steps
    shutil.move(mirror / "d", outside)
    (mirror / "d").symlink_to(outside)
    subscriber.signal(signal.SIGCONT)
    before = snapshot(outside)
    (source / "d/f").write_text("edited")
    (source / "d/new").write_text("new")
    (source / "d/deep/large").unlink()
    (source / "d/deep").chmod(0o700)
    await eventually(lambda: "parent_is_symlink" in problems(subscriber).values())
    (source / "beside").write_text("goes on")
    await eventually((mirror / "beside").exists)
    await rounds_later(subscriber, "subscribe-app")
    assert snapshot(outside) == before
    (mirror / "d").unlink()
    assert subscriber.stop() == 0  # by itself it would try again half a minute after it failed
    subscriber.start()
    await healed(nats_server, source, mirror)
    assert snapshot(outside) == before


@pytest.mark.fault("L8")
async def test_a_source_directory_replaced_by_a_symlink_and_back_deletes_nothing_elsewhere(
    tmp_path: Path, daemons: Daemons, nats_server: NatsServer, source: Path
) -> None:
    """Thirty times a source directory is swapped for a symlink to a directory outside, and back after 20 ms.

    The link's target is neither published nor touched, and in the end the mirror is equal.
    """
    mirror, outside = tmp_path / "mirror", tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("not of this folder")
    daemons.start("d", publish(source) + subscribe(mirror))
    await equal_trees(source, mirror)
    for _ in range(30):
        (source / "d").rename(tmp_path / "parked")
        (source / "d").symlink_to(outside)
        await asyncio.sleep(0.02)  # long enough to be seen now and then
        (source / "d").unlink()
        (tmp_path / "parked").rename(source / "d")
    await healed(nats_server, source, mirror)
    assert (outside / "secret").read_text() == "not of this folder"
    assert not list(mirror.rglob("secret"))


@pytest.mark.fault("D4 P7")
async def test_a_full_directory_and_a_file_replace_one_another_at_once(
    tmp_path: Path, daemons: Daemons, nats_server: NatsServer, source: Path
) -> None:
    """Five times a source directory of 20 files is replaced by a file of its name, and that by such a directory.

    The file, announced before the deletions that make room for it, waits for them only: each state within 25 s.
    """
    mirror = tmp_path / "mirror"
    daemons.start("p", publish(source))
    daemons.start("s", subscribe(mirror))
    for number in range(5):
        (source / "d/turns").mkdir()
        for inside in range(20):
            (source / f"d/turns/{inside}").write_bytes(os.urandom(1000))
        await equal_trees(source, mirror, 25)
        shutil.rmtree(source / "d/turns")
        (source / "d/turns").write_text(f"a file {number}")
        await equal_trees(source, mirror, 25)
        (source / "d/turns").unlink()
    await healed(nats_server, source, mirror)


@pytest.mark.layout("objects")
@pytest.mark.fault("D4 P7")
async def test_a_file_with_a_directory_in_its_way_arrives_as_soon_as_that_is_emptied(tmp_path: Path) -> None:
    """A file is announced under the name of a mirrored directory, whose own file is deleted only afterwards.

    First it is a problem; the deletion of what was in its way is enough to try it again.
    """
    world = World(tmp_path, "objects")
    (world.source / "turns").mkdir()
    (world.source / "turns/inside").write_text("i")
    (world.source / "keep").write_text("k")
    await world.push()
    options = SubscribeOptions("app", world.mirror, Rules())
    subscriber = Subscriber(options, world.store, None, status=keeper("subscribe"))
    await subscriber._open()
    try:
        await subscriber._round(full=True, allow_delete=False)
        await world.foreign_put("turns", b"a file")
        await subscriber._round(full=False, allow_delete=False)
        assert [problem.code for problem in subscriber._problems()] == ["directory_in_the_way"]
        await world.store.bucket("app").delete("turns/inside", expected_seq=None, metadata={})
        await subscriber._round(full=False, allow_delete=False)
        assert (world.mirror / "turns").read_bytes() == b"a file"
        assert subscriber._problems() == []
    finally:
        await subscriber._close()


@pytest.mark.layout("objects")
@pytest.mark.fault("S1")
async def test_a_file_truncated_between_hashing_and_upload_leaves_nothing_that_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of 300 kB is truncated to nothing right before its upload begins, and removed after it.

    No chunk was stored and no garbage is due, now or later; the mirror equals the source.
    """
    world = World(tmp_path, "objects")
    file = world.source / "f"
    file.write_bytes(os.urandom(300_000))
    upload = MemoryBucket.upload

    async def truncate_first(bucket: MemoryBucket, content: Any, **arguments: Any) -> Any:
        monkeypatch.undo()
        file.write_bytes(b"")
        stored = await upload(bucket, content, **arguments)
        assert stored.chunks == 0
        file.unlink()
        return stored

    monkeypatch.setattr(MemoryBucket, "upload", truncate_first)
    assert (await world.push()).again == set()
    index = Index(tmp_path / "publish.db")
    assert index.due_garbage(time.time() + 1) == []
    index.close()
    await world.pull()
    assert difference(world.source, world.mirror) == {}


# -- two of a kind, long absence, lost state -------------------------------------------------------------------------


@pytest.mark.fault("C5 O4")
async def test_of_two_publishers_on_one_folder_one_stops_and_says_why(
    tmp_path: Path, daemons: Daemons, nats_server: NatsServer, source: Path
) -> None:
    """A second daemon is started that publishes another directory to the folder of a running publisher.

    It fails and names the first one's source; nothing of its files is mixed in, and no chunk is left over.
    """
    mirror, other = tmp_path / "mirror", tmp_path / "other"
    other.mkdir()
    (other / "keep").write_text("another one's")
    (other / "foreign").write_bytes(os.urandom(200_000))
    first = daemons.start("one", publish(source))
    daemons.start("s", subscribe(mirror))
    await equal_trees(source, mirror)
    second = daemons.start("two", publish(other))
    failed = await in_state(second, "publish-app", "failed")
    assert str(source) in failed["error"]
    assert failed["hint"]
    (source / "d/f").write_text("the first one goes on")
    await healed(nats_server, source, mirror)
    assert status(first, "publish-app")["state"] == "in_sync"


@pytest.mark.fault("D2")
async def test_a_subscriber_that_was_away_still_deletes_and_never_resurrects(
    tmp_path: Path, daemons: Daemons, nats_server: NatsServer, source: Path
) -> None:
    """While a subscriber is stopped 100 files are removed, 50 of them made again, 50 others edited, one removed again.

    At its next start the mirror becomes equal, what was removed stays removed, and a stray file beside it stays.
    """
    mirror = tmp_path / "mirror"
    for number in range(150):
        (source / f"d/n{number}").write_text(str(number))
    publisher = daemons.start("p", publish(source))
    subscriber = daemons.start("s", subscribe(mirror))
    await equal_trees(source, mirror)
    assert subscriber.stop() == 0
    for number in range(100):
        (source / f"d/n{number}").unlink()
    await eventually(lambda: sum(event["deletes"] for event in publisher.events("published")) >= 100)
    for number in range(50):
        (source / f"d/n{number}").write_text(f"again {number}")
        (source / f"d/n{number + 100}").write_text(f"changed {number}")
    (source / "d/n0").unlink()
    await no_orphans(nats_server.url)
    (mirror / "d/stray").write_text("nobody's")

    def caught_up() -> bool:
        with suppress(FileNotFoundError):  # removed between listing and look
            return difference(source, mirror).keys() <= {"d", "d/stray"}
        return False

    subscriber.start()
    await eventually(caught_up)
    assert (mirror / "d/stray").read_text() == "nobody's"
    assert not (source / "d/n0").exists()
    (mirror / "d/stray").unlink()
    await healed(nats_server, source, mirror)


@pytest.mark.fault("C6")
@pytest.mark.parametrize("how", ["deleted", "corrupted"])
async def test_lost_state_costs_a_scan_and_no_transfer(
    how: str, layout: str, tmp_path: Path, daemons: Daemons, nats_server: NatsServer, source: Path
) -> None:
    """Between stop and start both daemons' state directories are deleted, or their databases made random bytes.

    Both start again without their memory: no content is sent or fetched but that of one new file.
    """
    mirror = tmp_path / "mirror"
    for number in range(50):
        (source / f"d/n{number}").write_bytes(os.urandom(1000))
    publisher = daemons.start("p", publish(source))
    subscriber = daemons.start("s", subscribe(mirror))
    await equal_trees(source, mirror)
    for daemon in (publisher, subscriber):
        assert daemon.stop() == 0
        state = daemon.directory / "state"
        if how == "deleted":
            shutil.rmtree(state)
        else:
            for file in state.rglob("*.db*"):
                file.write_bytes(os.urandom(5000))
        daemon.log.unlink()
        daemon.start()
    (source / "new").write_bytes(b"7 bytes")
    await healed(nats_server, source, mirror)
    nodes = 4000 if layout == "generations" else 0  # the nodes on the way to the new file, and for a new index all
    assert 7 <= sum(event["uploaded_bytes"] for event in publisher.events("published")) <= 7 + nodes
    assert 7 <= sum(event["downloaded_bytes"] for event in subscriber.events("mirrored")) <= 7 + nodes
    assert difference(source, mirror) == {}
