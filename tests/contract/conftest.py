"""The same suite over the twin in memory and a live server."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest

from syncd.store.base import BucketSpec
from tests.support.store import MemoryKit, live_kit

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from syncd.store.base import Bucket
    from tests.support.server import NatsServer
    from tests.support.store import Kit

_NUMBERS = itertools.count(1)


@pytest.fixture(params=["memory", "live"])
async def kit(request: pytest.FixtureRequest) -> AsyncIterator[Kit]:
    if request.param == "memory":
        yield MemoryKit()
        return
    server: NatsServer = request.getfixturevalue("shared_server")
    async with live_kit(server.url) as live:
        yield live


@pytest.fixture
async def bucket(kit: Kit) -> Bucket:
    name = f"contract{next(_NUMBERS)}"
    await kit.store.create_bucket(name, BucketSpec(description="contract"))
    return kit.store.bucket(name)
