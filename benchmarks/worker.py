"""One measured piece of work in a fresh process; writes ``{"seconds", "cpu", "peak"}`` to RESULT.

    python -m benchmarks.worker syncd RESULT push|pull ...      the command line of syncd, as python -m syncd runs it
    python -m benchmarks.worker put   RESULT URL SOURCE         nats-py: for every file: await store.put(name, bytes)
    python -m benchmarks.worker get   RESULT URL TARGET         nats-py: for every name: (await store.get(name)).data
    python -m benchmarks.worker put-file RESULT URL SOURCE      nats-py: store.put(name, file object)
    python -m benchmarks.worker get-into RESULT URL TARGET      nats-py: store.get(name, writeinto=file object)

``seconds`` runs from before the connection is made until after it is closed, for both alike. The nats-py loops write
what they get to files, without any sync; syncd verifies, stages and syncs them.
"""

from __future__ import annotations

import asyncio
import functools
import json
import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nats

from benchmarks.world import BUCKET, list_files, peak_bytes

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from nats.js.object_store import ObjectStore

MAX_CONSUMERS = 1_000_000


class Timer:
    """Sums the seconds of the coroutines that it wraps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def wrap(self, function: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        @functools.wraps(function)
        async def timed(*args: Any, **named: Any) -> Any:
            begin = time.perf_counter()
            try:
                return await function(*args, **named)
            finally:
                self.seconds += time.perf_counter() - begin

        return timed


def run_syncd(timer: Timer, arguments: list[str]) -> int:
    from syncd import cli, oneshot  # noqa: PLC0415 - the other kinds must not pay for it in memory

    oneshot.push = timer.wrap(oneshot.push)  # type: ignore[assignment]
    oneshot.pull = timer.wrap(oneshot.pull)  # type: ignore[assignment]
    return cli.run(arguments)


async def create_store(url: str) -> tuple[Any, ObjectStore]:
    """Make the bucket, and allow it more consumers than a server of 2.15 does by itself (1000).

    Each get() of nats-py 2.16 leaves a consumer behind for five seconds: a loop over more objects would fail.
    """
    client = await nats.connect(url)
    js = client.jetstream()
    store = await js.create_object_store(BUCKET)
    config = (await js.stream_info(f"OBJ_{BUCKET}")).config
    await js.update_stream(config.evolve(max_consumers=MAX_CONSUMERS))
    return client, store


async def put_all(url: str, source: Path) -> None:
    client, store = await create_store(url)
    for name in list_files(source):
        await store.put(name, (source / name).read_bytes())
    await client.close()


async def put_file(url: str, source: Path) -> None:
    client, store = await create_store(url)
    for name in list_files(source):
        with (source / name).open("rb") as file:
            await store.put(name, file)
    await client.close()


async def open_store(url: str) -> tuple[Any, ObjectStore, list[str]]:
    client = await nats.connect(url)
    store = await client.jetstream().object_store(BUCKET)
    return client, store, [info.name for info in await store.list()]


async def get_all(url: str, target: Path) -> None:
    client, store, names = await open_store(url)
    for name in names:
        data = (await store.get(name)).data
        file = target / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data or b"")
    await client.close()


async def get_into(url: str, target: Path) -> None:
    client, store, names = await open_store(url)
    for name in names:
        file = target / name
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("wb") as sink:
            await store.get(name, writeinto=sink)
    await client.close()


LOOPS = {"put": put_all, "put-file": put_file, "get": get_all, "get-into": get_into}


def main() -> int:
    kind, result, *arguments = sys.argv[1:]
    timer = Timer()
    code = 0
    if kind == "syncd":
        code = run_syncd(timer, arguments)
    else:
        url, directory = arguments
        asyncio.run(timer.wrap(LOOPS[kind])(url, Path(directory)))  # type: ignore[arg-type]
    usage = resource.getrusage(resource.RUSAGE_SELF)
    cpu = usage.ru_utime + usage.ru_stime
    Path(result).write_text(json.dumps({"seconds": timer.seconds, "cpu": cpu, "peak": peak_bytes("self")}))
    return code


if __name__ == "__main__":
    sys.exit(main())
