"""Replaced content of the objects layout is freed once, however often somebody looks."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import TYPE_CHECKING

from syncd.outlet import PublishOptions
from syncd.publisher import Publisher
from syncd.rules import Rules
from syncd.status import FolderStatus, StatusKeeper
from syncd.store.base import BucketSpec
from tests.support.store import live_kit

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.server import NatsServer

FILES = 20


async def test_one_push_after_the_other_frees_what_was_replaced_once(tmp_path: Path, nats_server: NatsServer) -> None:
    """Each looks at the whole bucket, and sees for a second or two what the one before has freed."""
    source = tmp_path / "source"
    source.mkdir()
    spec = BucketSpec(layout="objects")
    options = PublishOptions("app", source, Rules(), "here:/source", layout="objects", bucket=spec, grace_seconds=0.0)
    async with live_kit(nats_server.url) as kit:

        async def push(number: int) -> int:
            for name in range(FILES):
                (source / str(name)).write_text(f"{name} {number}")
            status = StatusKeeper(FolderStatus("publish", "app", "/"), clock=time.time, report=lambda _: None)
            await Publisher(options, kit.store, tmp_path / "index.db", status=status).push()
            return (await kit.store.bucket("app").state()).last_seq

        seqs = [await push(number) for number in range(10)]
    # Of each file: a chunk, its metadata, and what removes the chunk before.
    assert max(after - before for before, after in pairwise(seqs)) <= 3 * FILES + 2
