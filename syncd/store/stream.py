"""One bucket's stream as messages: the newest of subjects, many published at once, what became of them.

Shared by both layouts (:mod:`syncd.store.bucket`, :mod:`syncd.store.blobs`). Rules kept here:
 * reading is batched direct gets alone, so it works on replicas and mirrors, and from an account without JetStream;
 * every page is bounded in bytes, every stream of pages in silence;
 * only :class:`SyncdError` leaves this module.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

import structlog

from syncd.errors import BucketNotFound, SyncdError, Unavailable
from syncd.store import wire
from syncd.store.api import TTL_DISABLED, Api, ApiError, header_int, read_state
from syncd.store.reasons import NoResponders
from syncd.store.transport import META_SILENCE_SECONDS, End, Transport

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence

    from nats.aio.msg import Msg

    from syncd.store.base import BucketState
    from syncd.store.lanes import Outgoing

    Message = tuple[str, bytes, Mapping[str, str]]

log = structlog.get_logger()

PAGE_BYTES: Final = 4 * 1024 * 1024
MANY_SUBJECTS: Final = 1000
"""The server answers 413 to more than 1024 subjects."""
STALE_SECONDS: Final = 2.0
"""How long a replica may be behind what another one announced."""
STALE_STEP: Final = 0.2
PURGES_AT_ONCE: Final = 16

ROLLUP: Final = {"Nats-Rollup": "sub"}
EXPECTED: Final = "Nats-Expected-Last-Subject-Sequence"


def as_batch(
    batch: str, messages: Iterable[tuple[str, bytes, Mapping[str, str]]]
) -> list[tuple[str, bytes, dict[str, str]]]:
    """Lay out messages as one atomic batch (ADR-50); the last one commits it."""
    numbered = [
        (subject, payload, {**headers, "Nats-Batch-Id": batch, "Nats-Batch-Sequence": str(place)})
        for place, (subject, payload, headers) in enumerate(messages, 1)
    ]
    numbered[-1][2]["Nats-Batch-Commit"] = "1"
    return numbered


class Stream:
    """The stream of one bucket; bound to a name, not to a connection.

    :ivar lane: the stream's name, and its lane of the transport.
    :ivar atomic, ttl: whether it takes atomic batches, and messages with a TTL; ``None``: not asked yet.
    """

    def __init__(self, bucket: str, transport: Transport, api: Api) -> None:
        self.bucket = bucket
        self.lane = wire.stream_of(bucket)
        self.transport = transport
        self.api = api
        self.atomic: bool | None = None
        self.ttl: bool | None = None

    async def state(self) -> BucketState:
        """Ask the server for the bucket's state.

        :raises BucketNotFound: no such bucket.
        """
        state = read_state(self.bucket, await self.api.stream_info(self.bucket))
        self.atomic, self.ttl = state.atomic, state.ttl_messages
        return state

    async def flags(self) -> tuple[bool, bool]:
        """Tell whether the stream takes atomic batches, and messages with a TTL."""
        if self.atomic is None or self.ttl is None:
            state = await self.state()
            return state.atomic, state.ttl_messages
        return self.atomic, self.ttl

    async def change(self, **changes: Any) -> None:
        """Change the stream's configuration, and nothing else of it."""
        info = await self.api.stream_info(self.bucket)
        await self.api.call(f"STREAM.UPDATE.{self.lane}", {**info["config"], **changes})

    # -- reading ----------------------------------------------------------------------------------------------------

    async def collect(self, request: Mapping[str, Any], silence: float) -> tuple[list[Msg], End]:
        """Ask for one page; see :meth:`Transport.collect`."""
        subject = f"{self.api.conn.api}.DIRECT.GET.{self.lane}"
        try:
            return await self.transport.collect(subject, request, silence)
        except NoResponders as error:
            raise await self.explain(error) from error

    async def explain(self, error: SyncdError) -> SyncdError:
        """Find out why nobody answers."""
        if not isinstance(error, NoResponders):
            return error
        try:
            config = (await self.api.stream_info(self.bucket))["config"]
        except BucketNotFound as missing:
            return missing
        except SyncdError:
            return error
        if config.get("allow_direct") or config.get("mirror_direct"):
            return error
        return Unavailable(
            f"bucket {self.bucket!r} does not allow direct gets",
            hint=f"nats stream edit {self.lane} --allow-direct",
        )

    async def last(self, subject: str) -> Msg | None:
        """Return the newest message of a subject, ``None`` where there is none."""
        messages = [message async for page in self.newest([subject], META_SILENCE_SECONDS) for message in page]
        return messages[-1] if messages else None

    async def newest(self, subjects: Sequence[str], silence: float) -> AsyncGenerator[list[Msg]]:
        """Yield the newest message of each subject that has one, in pages.

        While a page is used, the next one is on its way.

        :param subjects: at most :data:`MANY_SUBJECTS`.
        """
        request: dict[str, Any] = {"multi_last": subjects, "batch": MANY_SUBJECTS}
        coming = self._ask_on(request, silence)
        try:
            while True:
                messages, end = await coming
                if not end.pending or not messages:
                    yield messages
                    return
                request |= {"seq": end.last_seq + 1, "up_to_seq": end.up_to_seq}
                coming = self._ask_on(request, silence)
                yield messages
        finally:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)

    def _ask_on(self, request: Mapping[str, Any], silence: float) -> asyncio.Task[tuple[list[Msg], End]]:
        size = min(PAGE_BYTES, self.transport.page_bytes())
        return asyncio.create_task(self.collect({**request, "max_bytes": size}, silence))

    async def read_back(self, written: Iterable[tuple[str, bytes]]) -> dict[str, int] | None:
        """Return subject -> sequence of those messages that are stored exactly so, as the newest of their subject.

        ``None``: that cannot be found out now.
        """
        if self.api.conn.state != "connected":  # whoever sent it has waited for long enough
            return None
        wanted = dict(written)
        found: dict[str, int] = {}
        subjects = list(wanted)
        try:
            for start in range(0, len(subjects), MANY_SUBJECTS):
                async for page in self.newest(subjects[start : start + MANY_SUBJECTS], META_SILENCE_SECONDS):
                    for message in page:
                        headers = message.headers or {}
                        subject = headers.get("Nats-Subject", "")
                        if wanted.get(subject) == message.data:
                            found[subject] = header_int(headers, "Nats-Sequence")
        except SyncdError as error:
            log.debug("read_back_failed", bucket=self.bucket, reason=error.message)
            return None
        return found

    # -- writing ----------------------------------------------------------------------------------------------------

    async def publish_all(self, messages: Iterable[Message]) -> list[int | SyncdError]:
        """Publish in a pipeline; one acknowledgement or error per message."""
        outs: list[Outgoing] = []
        acks: list[int | SyncdError] = []
        unsent: SyncdError | None = None
        missing = 0
        try:
            for subject, payload, headers in messages:
                if unsent is not None:
                    missing += 1
                    continue
                try:
                    outs.append(await self.transport.publish(subject, payload, headers, lane=self.lane))
                except SyncdError as error:
                    unsent = error
                    missing += 1
            for out in outs:
                try:
                    acks.append(await out.acked)
                except SyncdError as error:
                    acks.append(error)
        finally:
            for out in outs:
                self.transport.forget(out)
        if unsent is not None:
            acks.extend([unsent] * missing)
        return acks

    async def free(self, subjects: Sequence[str]) -> None:
        """Free what is stored under some subjects: rollups with a TTL of a second where allowed, else purges.

        :param subjects: at most some thousand; all are under way at once.
        """
        _, ttl = await self.flags()
        left = list(subjects)
        if ttl:
            headers = {**ROLLUP, "Nats-TTL": "1"}
            acks = await self.publish_all((subject, b"", headers) for subject in left)
            left = []
            for subject, ack in zip(subjects, acks, strict=True):
                if isinstance(ack, ApiError) and ack.code == TTL_DISABLED:
                    self.ttl = False
                    left.append(subject)
                elif isinstance(ack, SyncdError):
                    raise await self.explain(ack) from ack
        for start in range(0, len(left), PURGES_AT_ONCE):
            some = left[start : start + PURGES_AT_ONCE]
            for outcome in await asyncio.gather(*map(self._purge, some), return_exceptions=True):
                if outcome is not None:
                    raise outcome

    async def _purge(self, subject: str) -> None:
        await self.api.call(f"STREAM.PURGE.{self.lane}", {"filter": subject})
