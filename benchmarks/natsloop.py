"""The plain nats-py loop, in a process of its own: what one writes without syncd.

    python -m benchmarks.natsloop put URL SOURCE      for every file: await store.put(name, content)
    python -m benchmarks.natsloop get URL TARGET      for every name: await store.get(name)

Files from 1 MiB on go through a file object (``put(name, file)``, ``get(name, writeinto=file)``), because nats-py's
plain ``get()`` is quadratic in the size. Nothing is synced to disk.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nats

from benchmarks.trees import MIB, list_files

if TYPE_CHECKING:
    from nats.js.object_store import ObjectStore

BUCKET = "app"
MAX_CONSUMERS = 1_000_000


async def create_store(client: Any) -> ObjectStore:
    """Make the bucket, and allow it more consumers than a server of 2.15 does by itself (1000).

    Each get() of nats-py 2.16 leaves a consumer behind for five seconds: a loop over more objects would fail.
    """
    js = client.jetstream()
    store = await js.create_object_store(BUCKET)
    config = (await js.stream_info(f"OBJ_{BUCKET}")).config
    await js.update_stream(config.evolve(max_consumers=MAX_CONSUMERS))
    return store


async def put(client: Any, source: Path) -> None:
    store = await create_store(client)
    for name in list_files(source):
        file = source / name
        if file.stat().st_size < MIB:
            await store.put(name, file.read_bytes())
            continue
        with file.open("rb") as content:
            await store.put(name, content)


async def get(client: Any, target: Path) -> None:
    store = await client.jetstream().object_store(BUCKET)
    for info in await store.list():
        file = target / info.name
        file.parent.mkdir(parents=True, exist_ok=True)
        if info.size < MIB:
            file.write_bytes((await store.get(info.name)).data or b"")
            continue
        with file.open("wb") as sink:
            await store.get(info.name, writeinto=sink)


async def main() -> None:
    way, url, directory = sys.argv[1:]
    client = await nats.connect(url)
    await {"put": put, "get": get}[way](client, Path(directory))
    await client.close()


if __name__ == "__main__":
    asyncio.run(main())
