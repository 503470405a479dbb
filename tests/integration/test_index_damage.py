"""A state database that is damaged under a service that runs on it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from syncd.errors import DiskProblem
from syncd.index import database
from tests.support.pair import SECONDS, pair, publisher_of, subscriber_of

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.server import NatsServer

FILES = 400
EAGER = {"rescan_seconds": 0.5}


def spoil(index: Path) -> None:
    """Write over all but the headers of an index and its log, in place."""
    for file, head in ((index, 100), (index.with_name(f"{index.name}-wal"), 32)):
        with file.open("r+b") as opened:
            size = opened.seek(0, 2)
            opened.seek(head)
            opened.write(b"\xff" * max(0, size - head))


@pytest.mark.fault("C6")
@pytest.mark.parametrize("layout", ["generations", "objects"])
@pytest.mark.parametrize("role", ["publisher", "subscriber"])
async def test_an_index_that_is_damaged_under_a_service_is_set_aside_and_built_anew(
    tmp_path: Path, nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch, role: str, layout: str
) -> None:
    """The index of a running publisher or subscriber is written over with 0xff, log and all.

    The service ends once with a DiskProblem, instead of trying again for ever on what is damaged; begun anew it builds
    another index by looking, downloads nothing that is there, and follows the next change.
    """
    monkeypatch.setattr(database, "_CACHE_KIB", 1)
    for number in range(FILES):
        file = tmp_path / f"source/d{number % 7}/f{number:04}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"content {number}")
    async with pair(tmp_path, nats_server.url, layout) as two:
        await two.equal()
        side = getattr(two, role)
        index = tmp_path / ("publish.db" if role == "publisher" else "subscribe.db")
        before = {path: path.stat().st_ino for path in two.mirror.rglob("f*")}
        spoil(index)
        (two.source / "d1/f0001").write_text("changed")
        done, _ = await asyncio.wait([side.task], timeout=SECONDS)
        assert done, side.status.now
        error = side.task.exception()
        assert isinstance(error, DiskProblem), error
        assert index.with_name(f"{index.name}.broken-1").exists()
        if role == "publisher":  # the daemon, too, makes another service
            side.service = publisher_of(
                side.store, two.source, "app", index, side.status, layout=layout, **(EAGER | {"settle_seconds": 0.01})
            )
        else:
            side.service = subscriber_of(side.store, two.mirror, "app", index, side.status, **EAGER)
        side.task = asyncio.create_task(side.service.run())
        await two.equal()
        after = {path: path.stat().st_ino for path in two.mirror.rglob("f*")}
        assert {path for path in before if before[path] != after[path]} == {two.mirror / "d1/f0001"}
        (two.source / "d2/new").write_text("new")
        await two.equal()
        assert len(two.events("index_set_aside")) == 1
