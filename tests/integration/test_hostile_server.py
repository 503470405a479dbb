"""A server that sends what nobody asked for."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from syncd.errors import StoreRejected
from syncd.store import transport
from tests.support.store import live_kit

if TYPE_CHECKING:
    from nats.aio.msg import Msg

    from tests.support.server import NatsServer


@pytest.mark.fault("O5")
@pytest.mark.parametrize("size", [0, 10_000])
async def test_a_page_that_does_not_end_is_given_up(nats_server: NatsServer, size: int) -> None:
    """Another client answers a read in JetStream's place, with messages of 0 or 10,000 bytes without end.

    The page is given up as more than was asked for, long before it is a burden.
    """
    async with live_kit(nats_server.url) as kit:
        sent = 0
        ended = asyncio.Event()

        async def answer(request: Msg) -> None:
            nonlocal sent
            while not ended.is_set():
                for number in range(100):
                    headers = {"Nats-Stream": "OBJ_app", "Nats-Subject": f"$O.app.M.{number}", "Nats-Sequence": "1"}
                    await kit.other.publish(request.reply, b"x" * size, headers=headers)
                    sent += size + transport.MESSAGE_BYTES
                await kit.other.flush()

        await kit.other.subscribe("nowhere.DIRECT.GET.OBJ_app", cb=answer)
        reader = transport.Transport(kit.conn)
        with pytest.raises(StoreRejected, match="more than it was asked for"):
            await reader.collect("nowhere.DIRECT.GET.OBJ_app", {"batch": 1, "max_bytes": transport.MIN_PAGE}, 5)
        ended.set()
        assert sent < 100 * transport.PAGE_SHARE * transport.MIN_PAGE
