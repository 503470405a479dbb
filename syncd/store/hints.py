"""Wake-up calls from a live server: "something may have changed".

Rules kept here:
 * a hint is never believed, only followed: it may be lost, doubled, reordered or forged without harm;
 * one core subscription on the republished metadata serves every bucket that syncd made, whether it exists yet or
   not; a bucket of somebody else's gets an ephemeral push consumer beside it; where that is not permitted either, the
   caller's timer and reconnects are all there is;
 * a consumer that died silently (server restart, stream re-created) is noticed by its missing heartbeats; the core
   subscription has none: it is renewed whenever the caller's time passed without a hint (a right that was taken and
   given back, an import of the account that was removed: the server forgets it for good);
 * state is bounded: one event, one number. One task, and it ends with the context.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import nats.errors
import structlog

from syncd.errors import BucketNotFound, NotPermitted, SyncdError
from syncd.store import wire
from syncd.store.api import header_int, read_json

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from nats.aio.client import Client
    from nats.aio.msg import Msg
    from nats.aio.subscription import Subscription

    from syncd.store.base import BucketState, Hints
    from syncd.store.connection import Connection

log = structlog.get_logger()

TICK_SECONDS: Final = 1.0
HEARTBEAT_SECONDS: Final = 5
LOST_SECONDS: Final = 12.0
INACTIVE_SECONDS: Final = 30
RETRY_SECONDS: Final = 5.0
_ACK_TOKENS: Final = (9, 11)
"""Tokens of a consumer message's reply subject, without and with JetStream domain (ADR-15)."""


@asynccontextmanager
async def open_hints(
    conn: Connection, bucket: str, state: Callable[[], Awaitable[BucketState]]
) -> AsyncIterator[Hints]:
    """Listen for changes of a bucket; see :class:`syncd.store.base.Hints`.

    :param state: asks the server for the bucket's state, to know whether it republishes.
    """
    hints = NatsHints(conn, bucket, state)
    task = asyncio.create_task(hints.keep(), name=f"hints-{bucket}")
    try:
        yield hints
    finally:
        task.cancel()
        (ended,) = await asyncio.gather(task, return_exceptions=True)
        if isinstance(ended, Exception):  # a bug: hints were silent since
            log.error("hints_failed", bucket=bucket, error=repr(ended), exc_info=ended)


class NatsHints:
    """The subscription, renewed for as long as :meth:`keep` runs."""

    def __init__(self, conn: Connection, bucket: str, state: Callable[[], Awaitable[BucketState]]) -> None:
        self._conn = conn
        self._bucket = bucket
        self._state = state
        self._woken = asyncio.Event()
        self._seq = 0
        self._examine = True
        self._silent = False
        self._created = ""
        self._core: Subscription | None = None
        self._push: Subscription | None = None
        self._heard = 0.0
        self._mode = ""

    async def wait(self, max_seconds: float) -> int:
        """See :class:`syncd.store.base.Hints`."""
        try:
            async with asyncio.timeout(max_seconds):
                await self._woken.wait()
        except TimeoutError:
            self._examine = self._silent = True
            return 0
        self._woken.clear()
        seq, self._seq = self._seq, 0
        return seq

    def _wake(self, seq: int) -> None:
        self._seq = max(self._seq, seq)
        self._woken.set()

    async def keep(self) -> None:
        """Subscribe, notice what ended, subscribe again; until cancelled."""
        loop = asyncio.get_running_loop()
        attached = -1
        retry_at = 0.0
        try:
            while True:
                seen = self._conn.epoch
                try:
                    client = await self._conn.client(max_seconds=RETRY_SECONDS)
                    seen = self._conn.epoch
                    if seen != attached:
                        await self._subscribe(client)
                        attached, self._examine, retry_at = seen, True, 0.0
                        self._wake(0)  # whatever happened before we listened
                    if self._push is not None and loop.time() - self._heard > LOST_SECONDS:
                        log.info("hints_consumer_lost", bucket=self._bucket)
                        await self._drop_push()
                        self._examine = True
                        self._wake(0)
                    if self._examine and loop.time() >= retry_at:
                        self._examine = False
                        retry_at = loop.time() + RETRY_SECONDS
                        if self._silent:
                            await self._renew(client)
                        await self._look(client)
                except SyncdError as error:
                    self._note_mode(f"waiting: {error.message}")
                    self._examine = True
                await self._conn.wait_epoch(seen, TICK_SECONDS)
        finally:
            await self._drop_push()
            await _unsubscribe(self._core)

    async def _subscribe(self, client: Client) -> None:
        """Listen for republished metadata on a new connection (subscriptions end with theirs)."""
        self._core = self._push = None
        await self._listen(client)

    async def _renew(self, client: Client) -> None:
        """Listen anew: silence does not tell whether the server still knows of us. The old one ends after that."""
        self._silent = False
        before, self._core = self._core, None
        await self._listen(client)
        await _unsubscribe(before)

    async def _listen(self, client: Client) -> None:
        async def on_republished(message: Msg) -> None:
            self._wake(header_int(message.headers or {}, "Nats-Sequence"))

        try:
            self._core = await client.subscribe(f"syncd.{self._bucket}.meta.>", cb=on_republished)
        except nats.errors.Error as exc:
            log.debug("hints_not_subscribed", bucket=self._bucket, reason=str(exc))

    async def _look(self, client: Client) -> None:
        """See what the bucket is now, and make the consumer that it needs."""
        try:
            state = await self._state()
        except BucketNotFound:
            await self._drop_push()
            self._created = ""
            self._note_mode("no bucket")
            return
        if state.created != self._created:
            if self._created:
                self._wake(0)
            self._created = state.created
            await self._drop_push()
        if state.republished:
            self._note_mode("republish")
        elif self._push is None:
            try:
                await self._make_consumer(client)
            except NotPermitted as error:
                self._note_mode(f"timer only: {error.message}")
            else:
                self._note_mode("consumer")
                self._wake(0)

    async def _make_consumer(self, client: Client) -> None:
        inbox = client.new_inbox()
        loop = asyncio.get_running_loop()

        async def on_push(message: Msg) -> None:
            self._heard = loop.time()
            if message.headers and "Status" in message.headers and "Nats-Msg-Size" not in message.headers:
                return  # a heartbeat
            self._wake(consumer_seq(message.reply))

        try:
            self._push = await client.subscribe(inbox, cb=on_push)
        except nats.errors.Error as exc:
            log.debug("hints_not_subscribed", bucket=self._bucket, reason=str(exc))
            return
        stream = wire.stream_of(self._bucket)
        config = {
            "deliver_subject": inbox,
            "deliver_policy": "new",
            "ack_policy": "none",
            "replay_policy": "instant",
            "filter_subject": wire.meta_filter(self._bucket),
            "headers_only": True,
            "mem_storage": True,
            "num_replicas": 1,
            "inactive_threshold": INACTIVE_SECONDS * 1_000_000_000,
            "idle_heartbeat": HEARTBEAT_SECONDS * 1_000_000_000,
        }
        subject = f"{self._conn.api}.CONSUMER.CREATE.{stream}"
        payload = json.dumps({"stream_name": stream, "config": config}).encode()
        try:
            read_json((await self._conn.request(subject, payload, max_seconds=5)).data, subject)
        except BaseException:
            await self._drop_push()
            raise
        self._heard = loop.time()

    async def _drop_push(self) -> None:
        """The server deletes the consumer itself once nobody listens."""
        push, self._push = self._push, None
        await _unsubscribe(push)

    def _note_mode(self, mode: str) -> None:
        if mode != self._mode:
            self._mode = mode
            log.debug("hints_mode", bucket=self._bucket, mode=mode)


async def _unsubscribe(subscription: Subscription | None) -> None:
    if subscription is None:
        return
    try:
        await subscription.unsubscribe()
    except (nats.errors.Error, OSError) as exc:
        log.debug("hints_unsubscribe_failed", reason=str(exc))  # its connection is gone, and it with it


def consumer_seq(reply: str) -> int:
    """Read the stream sequence of a consumer's message from its reply subject; 0 where there is none."""
    tokens = reply.split(".")
    if len(tokens) == _ACK_TOKENS[0]:
        text = tokens[5]
    elif len(tokens) >= _ACK_TOKENS[1]:
        text = tokens[7]
    else:
        return 0
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else 0  # noqa: PLR2004 - an uint64
