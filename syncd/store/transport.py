"""Many messages at once over one connection: acknowledged publishing in a window, and batched direct gets.

nats-py awaits one answer per request and one task switch per message; here one wildcard subscription per connection
takes all answers in a callback (docs/performance.md). Rules kept here:
 * a message is kept until the server has acknowledged it. After a reconnect or a silence it is sent again, in the
   old order; :class:`Outgoing` says how a doubled one is recognised (``Nats-Msg-Id``);
 * the window is bounded in bytes and adapts to the link: acknowledgements that come late make it smaller, so that a
   slow link is neither flooded (its PONGs would drown) nor declared dead;
 * silence is bounded, durations are not: while acknowledgements or pages arrive, or any part of one (a blob of 512 KiB
   takes 52 s at 10 kB/s), or our own buffers drain, nobody gives up, and nothing is sent twice;
 * one minder task lives exactly as long as something waits; nothing else runs in the background;
 * only :class:`SyncdError` leaves this module.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import nats.errors

from syncd.errors import BadName, BucketNotFound, NotPermitted, StoreRejected, StoreTimeout, SyncdError, Unavailable
from syncd.retry import backoff
from syncd.store.api import REQUEST_SECONDS, Busy, header_int, read_json
from syncd.store.client import MAX_CONTROL_LINE, send
from syncd.store.lanes import Due, Lane, Outgoing
from syncd.store.reasons import NoResponders, as_syncd_error, check_version

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from nats.aio.client import Client
    from nats.aio.msg import Msg

    from syncd.store.client import OneClient
    from syncd.store.connection import Connection

MIN_WINDOW: Final = 160 * 1024
START_WINDOW: Final = MIN_WINDOW
MAX_WINDOW: Final = 16 * 1024 * 1024
QUICK_WINDOW: Final = 1024 * 1024
"""A window of that size was earned: the link carries at least a megabyte a second."""
MIN_PAGE: Final = 96 * 1024
"""Less than a chunk: the server ends a page with the message that reaches its size (nats-server 2.15)."""
MAX_PAGE: Final = 8 * 1024 * 1024
MAX_IN_FLIGHT: Final = 4096
"""Messages without acknowledgement, whatever their size."""

QUICK_SECONDS: Final = 0.75
SLOW_SECONDS: Final = 3.0
"""An acknowledgement (or a page) that takes less makes the window grow, one that takes more makes it shrink."""

TICK_SECONDS: Final = 0.25
OFFLINE_SECONDS: Final = 60.0
META_SILENCE_SECONDS: Final = 5.0
CHUNK_SILENCE_SECONDS: Final = 20.0
PAGE_TRIES: Final = 6
PAGE_SHARE: Final = 4
"""A page is given up at so many times the size that was asked for."""
MESSAGE_BYTES: Final = 64
"""What a message counts beside its data."""
NO_RESPONDERS_TRIES: Final = 3

_CONTROL_LINE_REST: Final = 64  # verb, blanks and lengths beside subject and reply
_HEADER_REST: Final = 256
_ACK = re.compile(rb'\{"stream":"[^"]*", ?"seq":(\d+)[,}]')
_NO_RESPONDERS = "503"


class Window:
    """A bound on bytes under way that adapts to what the link carries. First come, first served."""

    def __init__(self) -> None:
        self.limit = START_WINDOW
        self._used = 0
        self._count = 0
        self._turn = asyncio.Lock()
        self._freed = asyncio.Event()
        self._shrunk = 0.0

    async def take(self, size: int) -> None:
        """Wait for room; a single message passes whatever its size."""
        async with self._turn:
            while self._used and (self._used + size > self.limit or self._count >= MAX_IN_FLIGHT):
                self._freed.clear()
                await self._freed.wait()
            self._used += size
            self._count += 1

    def give(self, size: int) -> None:
        """Free what :meth:`take` took."""
        self._used -= size
        self._count -= 1
        self._freed.set()

    def learn(self, size: int, seconds: float, now: float) -> None:
        """Grow by what came back quickly; halve, at most once in a while, when things come late."""
        if seconds < QUICK_SECONDS:
            self.limit = min(MAX_WINDOW, self.limit + size)
        elif seconds > SLOW_SECONDS and now - self._shrunk > SLOW_SECONDS:
            self._shrunk = now
            self.shrink()

    def shrink(self) -> None:
        """Halve."""
        self.limit = max(MIN_WINDOW, self.limit // 2)


@dataclass(frozen=True, slots=True)
class End:
    """How a page of a batched direct get ended.

    :ivar found: ``False``: no message matched (404).
    :ivar pending: matching messages after :attr:`last_seq`.
    """

    found: bool = True
    pending: int = 0
    last_seq: int = 0
    up_to_seq: int = 0


@dataclass(slots=True, eq=False)
class _PageWait:
    take: Callable[[Msg], None]
    done: asyncio.Future[End]
    subject: str
    silence: float
    heard: float


class Transport:
    """Pipelines over one :class:`Connection`, shared by all buckets of a store."""

    def __init__(self, conn: Connection) -> None:
        self.conn = conn
        self.writing = Window()
        self.reading = Window()
        self._epoch = 0
        self._client: OneClient | None = None
        self._inbox = ""
        self._orders = itertools.count(1)
        self._ordered = asyncio.Lock()  # held while something is sent again: nothing may overtake it
        self._minder: asyncio.Task[None] | None = None
        self._out: dict[int, Outgoing] = {}
        self._lanes: dict[str, Lane] = {}
        self._undrained = self._arriving = 0
        self._pages: dict[int, _PageWait] = {}
        self._watches: dict[str, Callable[[], None]] = {}

    # -- the connection's inbox ---------------------------------------------------------------------------------

    async def _attach(self, max_seconds: float) -> OneClient:
        """Return the connected client, with our inbox subscribed and all that is unacknowledged sent again.

        :raises SyncdError: not connected within ``max_seconds``, or to a server that is too old.
        """
        client = self._client
        if client is not None and self._is_current(client) and not self._ordered.locked():
            return client
        await self.conn.client(max_seconds)  # waiting for a connection must not block those who hold one
        async with self._ordered:
            client = await self.conn.client(max_seconds)
            if client is self._client:
                return client
            check_version(await self.conn.server_version(), self.conn.host)  # an older one would misread us silently
            epoch = self.conn.epoch
            inbox = client.new_inbox()
            cut = len(inbox) + 1

            async def on_answer(message: Msg) -> None:
                self._on_answer(int(message.subject[cut:], 16), message)

            self._watch_inbox(inbox)
            try:
                await client.subscribe(f"{inbox}.*", cb=on_answer, pending_msgs_limit=0, pending_bytes_limit=0)
            except nats.errors.Error as exc:
                raise as_syncd_error(exc, "subscribe to our inbox") from exc
            self._fail_pages(_ended())
            if self._client is not None and self._out:
                self.writing.shrink()
            self._client, self._epoch, self._inbox = client, epoch, inbox
            for lane in self._lanes.values():
                lane.heard(asyncio.get_running_loop().time())
            await self._send_again(client, list(self._out.values()))
            return client

    def _is_current(self, client: OneClient) -> bool:
        return self._epoch == self.conn.epoch and client.is_connected

    def _watch_inbox(self, inbox: str) -> None:
        """Hear at once that our inbox is not permitted; otherwise it looks like silence."""
        previous = self._watches.pop("", None)
        if previous is not None:
            previous()
        self._watches[""] = self.conn.on_denied(f"{inbox}.>", self._on_inbox_denied)

    def _on_inbox_denied(self, error: SyncdError) -> None:
        self._client = None  # subscribe anew next time: the right may have been granted meanwhile
        self._fail_pages(error)
        for out in list(self._out.values()):
            self._fail(out, error)

    def _watch_subject(self, subject: str) -> None:
        """Hear at once that a subject, or all that begin with it up to the dot, is not permitted."""
        if subject not in self._watches:

            def denied(error: SyncdError) -> None:
                if subject.endswith("."):  # the server tells the one subject, in lower case
                    error = _denied(f"{subject}*")
                self._fail_pages(error, subject)
                for out in list(self._out.values()):
                    if out.subject.startswith(subject):
                        self._fail(out, error)

            self._watches[subject] = self.conn.on_denied(subject, denied)

    def _on_answer(self, token: int, message: Msg) -> None:
        out = self._out.get(token)
        if out is not None:
            self._on_ack(out, message)
            return
        page = self._pages.get(token)
        if page is not None and not page.done.done():
            self._on_page(page, message)

    # -- the minder ---------------------------------------------------------------------------------------------

    def _mind(self) -> None:
        if self._minder is None or self._minder.done():
            self._undrained = self._arriving = 0
            self._minder = asyncio.get_running_loop().create_task(self._mind_all(), name="store-transport")

    async def _mind_all(self) -> None:
        """Notice reconnects, silence and refusals, as long as anything waits."""
        loop = asyncio.get_running_loop()
        while self._out or self._pages:
            await self.conn.wait_epoch(self._epoch, TICK_SECONDS)
            client = self._client
            if client is None or not self._is_current(client):
                self._fail_pages(_ended())
                if self._out:
                    await self._come_back()
                else:  # wait_epoch() does not wait for an epoch that is there: let the pages' owners run
                    await asyncio.sleep(TICK_SECONDS)
                continue
            now = loop.time()
            waiting, arriving = client.unsent, client.arriving
            moves = waiting < self._undrained or arriving > self._arriving
            if moves:
                client.note_life()
            for page in list(self._pages.values()):
                if moves:
                    page.heard = now
                if now - page.heard > page.silence and not page.done.done():
                    page.done.set_exception(StoreTimeout(f"{page.subject}: silent for {page.silence:g} s"))
            for name, lane in list(self._lanes.items()):
                if moves:
                    lane.heard(now)
                await self._mind_lane(
                    client, name, lane.due(now, drained=not waiting, quick=self.writing.limit >= QUICK_WINDOW)
                )
            self._undrained, self._arriving = waiting, arriving

    async def _come_back(self) -> None:
        try:
            await self._attach(OFFLINE_SECONDS)
        except SyncdError as error:
            for out in list(self._out.values()):
                self._fail(out, error)

    async def _mind_lane(self, client: OneClient, name: str, due: Due) -> None:
        for out, error in due.fail:
            self._fail(out, error)
        if due.ask and await self._is_gone(name):
            for out in list(self._lanes[name].out.values()):
                self._fail(out, BucketNotFound(f"bucket {name.removeprefix('OBJ_')!r} does not exist"))
            return
        if due.send:
            async with self._ordered:
                if client is self._client:
                    await self._send_again(client, due.send)

    async def _is_gone(self, stream: str) -> bool:
        """Tell whether the server says that there is no such stream; where we may not ask, it does not."""
        try:
            answer = await self.conn.request(f"{self.conn.api}.STREAM.INFO.{stream}", max_seconds=2)
            read_json(answer.data, "stream info")
        except BucketNotFound:
            return True
        except SyncdError:
            return False
        return False

    async def _send_again(self, client: Client, outs: Sequence[Outgoing]) -> None:
        for out in outs:
            if self._out.get(out.order) is not out or out.order in self._lanes[out.lane].held:
                continue
            if out.again:
                await self._send(client, out)
            else:
                self._fail(out, StoreTimeout("the acknowledgement was lost"))

    # -- publishing ---------------------------------------------------------------------------------------------

    async def publish(
        self,
        subject: str,
        payload: bytes,
        headers: Mapping[str, str],
        *,
        lane: str,
        head: Sequence[tuple[str, bytes, Mapping[str, str]]] = (),
        again: bool = True,
    ) -> Outgoing:
        """Send a message as soon as the window has room; ``acked`` of what this returns is the answer.

        The caller awaits ``acked``, or calls :meth:`forget`.

        :param lane, head, again: see :class:`Outgoing`.
        :raises SyncdError: not connected for a minute, or refused before it was sent.
        """
        loop = asyncio.get_running_loop()
        size = len(payload) + len(subject) + _HEADER_REST
        size += sum(len(data) + len(at) + _HEADER_REST for at, data, _ in head)
        await self.writing.take(size)
        try:
            client = await self._attach(OFFLINE_SECONDS)
            for at, data, headed in (*head, (subject, payload, headers)):
                _check_size(client, at, len(self._inbox) + 18, data, headed)
        except BaseException:
            self.writing.give(size)
            raise
        for at in {*(at for at, _, _ in head), subject}:
            self._watch_subject(at[: at.rindex(".") + 1])
        out = Outgoing(next(self._orders), subject, payload, headers, lane, loop.create_future(), again, head, size)
        out.first_sent = loop.time()
        self._out[out.order] = out
        self._mind()
        if not self._lanes.setdefault(lane, Lane()).add(out):
            return out
        try:
            await self._send(client, out)
        except BaseException:
            self.forget(out)
            raise
        return out

    async def send_and_wait(self, subject: str, payload: bytes, headers: Mapping[str, str], *, lane: str) -> int:
        """Publish one message and wait for its acknowledgement: the stream sequence."""
        out = await self.publish(subject, payload, headers, lane=lane)
        try:
            return await out.acked
        finally:
            self.forget(out)

    def forget(self, out: Outgoing) -> None:
        """Stop waiting for a message; it may still be stored."""
        if self._out.pop(out.order, None) is not None:
            self._lanes[out.lane].remove(out)
            self.writing.give(out.size)
            out.acked.cancel()

    async def _send(self, client: Client, out: Outgoing) -> None:
        """Hand a message to nats-py; where the connection ends under it, the minder takes it up again."""
        now = asyncio.get_running_loop().time()
        out.sends += 1
        out.last_sent = now
        reply = f"{self._inbox}.{out.order:x}"
        deadline = now + OFFLINE_SECONDS
        try:
            for at, data, headers in out.head:
                await send(client, at, data, headers=headers, deadline=deadline)
            await send(client, out.subject, out.payload, reply=reply, headers=out.headers, deadline=deadline)
        except (nats.errors.Error, OSError) as exc:  # OSError: TimeoutError, the buffer stayed full
            if not out.again:
                self._fail(out, as_syncd_error(exc, "publish"))

    def _on_ack(self, out: Outgoing, message: Msg) -> None:
        found = _ACK.match(message.data)
        if found is not None:
            self._succeed(out, int(found[1]))
            return
        doing = "publish"
        if message.headers and message.headers.get("Status") == _NO_RESPONDERS:
            error: SyncdError = NoResponders(f"{doing}: nobody answers on {out.subject[:80]}")
        else:
            error = Unavailable(f"{doing}: the acknowledgement is not readable")
            try:
                seq = read_json(message.data, doing).get("seq")
            except SyncdError as refusal:
                error = refusal
            else:
                if type(seq) is int:
                    self._succeed(out, seq)
                    return
        if out.again and isinstance(error, NoResponders | Busy):
            self._lanes[out.lane].refuse(out, error, asyncio.get_running_loop().time())
        else:
            self._fail(out, error)

    def _succeed(self, out: Outgoing, seq: int) -> None:
        now = asyncio.get_running_loop().time()
        del self._out[out.order]
        self._lanes[out.lane].acknowledge(out, now)
        self.writing.give(out.size)
        self.writing.learn(out.size, now - out.last_sent, now)
        if not out.acked.done():
            out.acked.set_result(seq)

    def _fail(self, out: Outgoing, error: SyncdError) -> None:
        if self._out.pop(out.order, None) is None:
            return
        self._lanes[out.lane].remove(out)
        self.writing.give(out.size)
        if not out.acked.done():
            out.acked.set_exception(error)
            out.acked.exception()  # counts as seen: its caller may have been cancelled

    # -- batched direct gets --------------------------------------------------------------------------------------

    async def page(self, subject: str, request: Mapping[str, Any], take: Callable[[Msg], None], silence: float) -> End:
        """Ask for one page; ``take`` is called in the event loop with every message, and must not wait.

        :param silence: seconds without any message after which it counts as lost.
        :raises NoResponders: no such stream, or direct get is not allowed.
        :raises Unavailable, StoreTimeout, NotPermitted: no connection, silence, no right.
        :raises StoreRejected: the request is not one the server understands.
        """
        client = await self._attach(REQUEST_SECONDS)
        loop = asyncio.get_running_loop()
        payload = json.dumps(request, separators=(",", ":")).encode()
        token = next(self._orders)
        reply = f"{self._inbox}.{token:x}"
        self._watch_subject(subject)
        wait = _PageWait(take, loop.create_future(), subject, silence, loop.time())
        self._pages[token] = wait
        self._mind()
        try:
            _check_size(client, subject, len(reply), payload, {})
            await send(client, subject, payload, reply=reply, deadline=loop.time() + silence)
            return await wait.done
        except (nats.errors.Error, OSError) as exc:
            raise as_syncd_error(exc, subject) from exc
        finally:
            del self._pages[token]
            if wait.done.done() and not wait.done.cancelled():
                wait.done.exception()

    def _on_page(self, page: _PageWait, message: Msg) -> None:
        page.heard = asyncio.get_running_loop().time()
        headers = message.headers
        # A stored message may carry a header "Status" of its own; the server's verdicts name no stream.
        status = headers.get("Status") if headers and "Nats-Stream" not in headers else None
        if status is None:
            try:
                page.take(message)
            except SyncdError as error:
                page.done.set_exception(error)
            return
        assert headers is not None
        if status == "204":
            page.done.set_result(
                End(
                    pending=header_int(headers, "Nats-Num-Pending"),
                    last_seq=header_int(headers, "Nats-Last-Sequence"),
                    up_to_seq=header_int(headers, "Nats-UpTo-Sequence"),
                )
            )
        elif status == "404":
            page.done.set_result(End(found=False))
        elif status == _NO_RESPONDERS:
            page.done.set_exception(NoResponders(f"nobody answers on {page.subject}"))
        else:
            text = f"{page.subject}: {status} {headers.get('Description', '')}"
            page.done.set_exception(StoreRejected(text.strip()))

    def _fail_pages(self, error: SyncdError, subject: str = "") -> None:
        for page in list(self._pages.values()):
            if not page.done.done() and subject in {"", page.subject}:
                page.done.set_exception(error)

    def page_bytes(self) -> int:
        """How much to ask for in one page, as far as the link is known."""
        return max(MIN_PAGE, min(MAX_PAGE, self.reading.limit // 2))

    async def collect(self, subject: str, request: Mapping[str, Any], silence: float) -> tuple[list[Msg], End]:
        """Ask for one page until it is complete, a bounded number of times, and return its messages in order.

        :raises SyncdError: as :meth:`page`.
        """
        loop = asyncio.get_running_loop()
        waits = backoff(0.1, 2.0)
        refusals = 0
        size = int(request.get("max_bytes", MIN_PAGE))
        for attempt in itertools.count(1):
            messages: list[Msg] = []
            take = _Taking(messages, PAGE_SHARE * size)
            await self.reading.take(size)
            began = loop.time()
            try:
                end = await self.page(subject, request, take, silence)
            except NoResponders:
                refusals += 1
                if refusals >= NO_RESPONDERS_TRIES:
                    raise
            except (Unavailable, StoreTimeout):
                self.reading.shrink()
                if attempt >= PAGE_TRIES:
                    raise
            else:
                now = loop.time()
                self.reading.learn(size, now - began, now)
                return messages, end
            finally:
                self.reading.give(size)
            await asyncio.sleep(next(waits))
        raise AssertionError("unreachable")


class _Taking:
    """Takes a page's messages until they are too many.

    :param room: bytes; a server that keeps to what it was asked for stops with the message that goes beyond.
    """

    def __init__(self, messages: list[Msg], room: int) -> None:
        self._messages = messages
        self._room = room

    def __call__(self, message: Msg) -> None:
        """Take one.

        :raises StoreRejected: it is too much.
        """
        if self._room < 0:
            self._messages.clear()
            raise StoreRejected("the nats server sends more than it was asked for")
        self._room -= len(message.data) + MESSAGE_BYTES
        self._messages.append(message)


def _denied(subjects: str) -> NotPermitted:
    return NotPermitted(
        f'the nats server does not permit us to publish to "{subjects}"',
        hint=f"grant the user publish on {subjects}",
    )


def _ended() -> Unavailable:
    return Unavailable("the connection ended before the answer came")


def _check_size(client: Client, subject: str, reply_size: int, payload: bytes, headers: Mapping[str, str]) -> None:
    """Refuse what would make the server close the connection under everybody.

    :raises BadName: the subject is too long for the server's control line.
    :raises StoreRejected: the message is too large.
    """
    if len(subject) + reply_size + _CONTROL_LINE_REST > MAX_CONTROL_LINE:
        raise BadName(f"a subject of {len(subject)} bytes is too long for the server")
    size = len(payload) + sum(len(key) + 4 + len(value) * 4 for key, value in headers.items()) + 16
    if size > client.max_payload:
        raise StoreRejected(
            f"a message of {size} bytes is more than the server takes ({client.max_payload})",
            hint="raise max_payload in the server's configuration",
        )
