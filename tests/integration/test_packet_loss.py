"""Packets that are really lost: the kernel drops them between ours and the server, in a network of their own."""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from tests.support.netns import Network, in_network
from tests.support.pair import Pair, pair
from tests.support.server import NatsServer
from tests.support.trees import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

RANDOM = random.Random(47)
FILES = 300
SECONDS = 60.0
PORT = 4222
FAILURES = {"round_failed", "nats_disconnected", "nats_reconnected"}
OURS = Path("/proc/thread-self/ns/net")
ROOM = 150 << 20
"""More memory than this is a leak, not a buffer."""


@asynccontextmanager
async def started(directory: Path, **connection: Any) -> AsyncIterator[Pair]:
    """A server, a publisher and a subscriber in the network of this thread; deadlines as they are but those given."""
    server = NatsServer(directory / "nats", port=PORT)
    try:
        await server.astart()
        async with pair(directory, server.url, rescan=60, **connection) as two:
            yield two
    finally:
        await server.astop()


def failures(two: Pair) -> list[Any]:
    """What either of the two has given up that it tried: connections, requests, rounds."""
    epochs = (two.publisher.connection.epoch, two.subscriber.connection.epoch)
    return [one for one in two.logs if one["event"] in FAILURES] + [one for one in epochs if one != 1]


LOSSES: dict[str, tuple[Callable[[Network], None], int]] = {
    "one in twenty": (lambda network: network.lose(50), 4 << 20),
    "one in a hundred, and others late": (lambda network: network.lose_and_reorder(10, 20), 8 << 20),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.fault("N4")
def test_lost_packets_are_slow_and_nothing_else(loss: str, tmp_path: Path) -> None:
    """netfilter drops packets at random in both directions, all the time: a tree, a large file and edits arrive."""

    async def run(network: Network) -> None:
        lose, large = LOSSES[loss]
        async with started(tmp_path) as two:
            (two.source / "first").write_text("before any loss")
            await two.equal()
            await asyncio.to_thread(lose, network)
            two.logs.clear()
            loop = asyncio.get_running_loop()
            tasks, memory = len(asyncio.all_tasks(loop)), psutil.Process().memory_info().rss
            for number in range(FILES):
                path = two.source / f"d{number % 10}/f{number}"
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(RANDOM.randbytes(number * 20))
            (two.source / "large").write_bytes(RANDOM.randbytes(large))
            await two.equal(SECONDS)
            for number in range(3):
                (two.source / "d0/f0").write_text(f"edit {number}")
                (two.source / f"d1/f{10 * number + 1}").unlink()
                await two.equal()
            assert failures(two) == []
            assert await asyncio.to_thread(network.lost) > 50
            assert network.tcp("TCPOFOQueue") > 50  # packets came after others that were sent later
            await asyncio.to_thread(network.heal)
            await two.whole()
            await eventually(lambda: len(asyncio.all_tasks(loop)) <= tasks, SECONDS)
            assert psutil.Process().memory_info().rss - memory < ROOM

    in_network(run)


WAYS = {"both ways": "", "to the server": f"tcp dport {PORT}", "from the server": f"tcp sport {PORT}"}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.fault("N4")
def test_a_network_that_swallows_everything_is_noticed_and_outlived(way: str, tmp_path: Path) -> None:
    """netfilter drops every packet, without a word to anybody, until both have noticed and tried again; then none."""

    async def run(network: Network) -> None:
        async with started(tmp_path, ping_seconds=0.3, request_seconds=1, connect_seconds=0.5) as two:
            for name in ("gone", "stays", "stays too"):
                (two.source / name).write_text(name)
            await two.equal()
            await asyncio.to_thread(network.lose, 1000, WAYS[way])
            (two.source / "meanwhile").write_bytes(RANDOM.randbytes(300_000))
            (two.source / "gone").unlink()
            await two.logged("nats_disconnected", count=2)
            await asyncio.sleep(0.7)  # the fault itself: who tries to connect again comes to no end either
            assert not (two.mirror / "meanwhile").exists()
            await asyncio.to_thread(network.heal)
            await two.equal()
            await two.whole()
            assert {"fell silent" in one["error"] for one in two.events("nats_disconnected")} == {True}
            assert two.publisher.connection.epoch > 1
            assert two.subscriber.connection.epoch > 1

    in_network(run)


@pytest.mark.fault("N4")
def test_a_real_trickle_is_slow_and_nothing_else(tmp_path: Path) -> None:
    """The kernel lets 10 kB/s through, of all that is said in either direction: an edit takes seconds, and arrives."""

    async def run(network: Network) -> None:
        async with started(tmp_path) as two:
            (two.source / "f").write_text("before")
            await two.equal()
            await asyncio.to_thread(network.trickle, 10_000)
            two.logs.clear()
            began = time.monotonic()
            (two.source / "f").write_bytes(RANDOM.randbytes(9_000))
            await two.equal()
            took = time.monotonic() - began
            await asyncio.to_thread(network.heal)
            assert failures(two) == []
            assert 1.8 < took < 15

    in_network(run)


def test_a_network_of_its_own_leaves_no_trace() -> None:
    """What it does to packets is done to nobody else, and ends with it, also where the test fails."""
    before = OURS.readlink()

    async def run(network: Network) -> None:
        network.lose(1000)
        inside.append(OURS.readlink())
        inside.append(await asyncio.to_thread(OURS.readlink))
        raise ZeroDivisionError

    inside: list[Path] = []
    with pytest.raises(ZeroDivisionError):
        in_network(run)
    assert inside[0] == inside[1] != before
    assert OURS.readlink() == before
