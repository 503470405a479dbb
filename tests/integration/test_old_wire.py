"""Buckets that older versions wrote, message by message, under today's subscriber and today's publisher.

tests/vectors/old_generations.json and old_objects.json hold what the first versions with either layout stored: two
states of a small tree with something of everything, and the newer of the two as it was on disk. They are never made
anew. ``data`` is base64 of zlib of a message. That old readers understand what is written today is the part of
tests/integration/test_reader.py, whose reader is written from docs/format.md alone.
"""

from __future__ import annotations

import base64
import json
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from blake3 import blake3

from syncd.store.bucket import NatsStore
from tests.support.pair import publisher_of, subscriber_of
from tests.support.store import connected, live_kit
from tests.support.trees import snapshot

if TYPE_CHECKING:
    from tests.support.server import NatsServer

VECTORS = Path(__file__).parents[1] / "vectors"


async def replay(url: str, layout: str) -> dict[str, Any]:
    """Make an old bucket on a server; return what is in the file."""
    found: dict[str, Any] = json.loads((VECTORS / f"old_{layout}.json").read_text())
    async with live_kit(url) as kit:
        await kit.api("STREAM.CREATE.OBJ_old", found["config"])
        for message in found["messages"]:
            data = zlib.decompress(base64.b64decode(message["data"]))
            await kit.publish(message["subject"], data, message["headers"] or None)
    return found


def as_recorded(root: Path) -> dict[str, list[Any]]:
    """What is on disk, in the words of the files."""
    found: dict[str, list[Any]] = {}
    for path, (kind, mode, mtime, what) in snapshot(root).items():
        found[path] = [kind, mode, mtime, blake3((root / path).read_bytes()).hexdigest() if kind == "file" else what]
    return found


@pytest.mark.fault("U3")
@pytest.mark.parametrize("layout", ["generations", "objects"])
async def test_what_the_first_versions_wrote_is_read_and_gone_on_with(
    layout: str, tmp_path: Path, nats_server: NatsServer
) -> None:
    """The messages that the first versions of both layouts stored are replayed, one by one, into a bucket.

    Everything arrives with its times and modes; a publisher of today sends nothing of it again, and adds to it.
    """
    old = await replay(nats_server.url, layout)
    mirror = tmp_path / "mirror"
    async with connected(nats_server.url) as connection:
        store = NatsStore(connection)
        pulled = await subscriber_of(store, mirror, "old").pull()
        assert pulled.problems == []
        assert as_recorded(mirror) == old["tree"]
        # What is here now is the source of one who goes on.
        publisher = publisher_of(store, mirror, "old", tmp_path / "index.db", layout=layout)
        pushed = await publisher.push(take_over=True)
        assert (pushed.puts, pushed.deletes, pushed.uploaded_bytes, pushed.committed) == (0, 0, 0, False)
        (mirror / "new").write_text("by today's version")
        (mirror / "same").unlink()
        publisher = publisher_of(store, mirror, "old", tmp_path / "index.db", layout=layout)
        assert (await publisher.push()).generation == (3 if layout == "generations" else 0)
        await subscriber_of(store, tmp_path / "other", "old").pull()
        assert as_recorded(tmp_path / "other") == as_recorded(mirror)
