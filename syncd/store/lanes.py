"""Which of one stream's messages to send, to send again, and to give up. Pure: the time is an argument.

Rules kept here:
 * messages of a stream are sent in their order, also again: readers take chunks in the order they were stored in;
 * whatever is uncertain is probed with the oldest message alone. Sending everything at once while a cluster elects a
   leader could store a later message and lose an earlier one;
 * acknowledgements of one stream come in the order of sending: a message that a later one overtook is lost, or its
   acknowledgement is, and is sent again soon;
 * silence is bounded, duration is not.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from syncd.errors import StoreTimeout, SyncdError, Unavailable
from syncd.retry import backoff

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterator, Mapping, Sequence

    Message = tuple[str, bytes, Mapping[str, str]]

OVERTAKEN_SECONDS: Final = 1.0
RESEND_SECONDS: Final = 2.0
"""Of silence, on a link that was quick so far, beside four times an acknowledgement's usual time."""
SLOW_RESEND_SECONDS: Final = 18.0
"""Of silence, on any other link: a chunk of 128 KiB takes 13 s at 10 kB/s, and sending it twice makes it worse."""
SILENCE_SECONDS: Final = 30.0
REFUSED_SECONDS: Final = 40.0
"""A cluster elects a leader in some 5 s; meanwhile nobody answers on the stream's subjects."""
PROBE_SECONDS: Final = 0.25


@dataclass(slots=True, eq=False)
class Outgoing:
    """One message on its way; :attr:`acked` becomes the stream sequence, or the error.

    :ivar order: messages are sent, and sent again, in this order.
    :ivar again: it may be sent a second time without knowing what became of the first: the server drops the double
        by its ``Nats-Msg-Id``, or refuses it by the sequence it expects. A batch may not.
    :ivar head: messages without an answer of their own, sent directly before it (a batch).
    :ivar sends: how often it was sent; above 1 a double may have been stored in spite of all.
    """

    order: int
    subject: str
    payload: bytes
    headers: Mapping[str, str]
    lane: str
    acked: asyncio.Future[int]
    again: bool
    head: Sequence[Message]
    size: int
    sends: int = 0
    first_sent: float = 0.0
    last_sent: float = 0.0


@dataclass(slots=True)
class Due:
    """What to do now: first fail, then send, in order.

    :ivar ask: nobody answers on the stream's subjects: ask whether there is such a stream before sending.
    """

    send: list[Outgoing] = field(default_factory=list)
    fail: list[tuple[Outgoing, SyncdError]] = field(default_factory=list)
    ask: bool = False


class Lane:
    """One stream's messages on their way."""

    def __init__(self) -> None:
        self.out: dict[int, Outgoing] = {}
        self.held: dict[int, Outgoing] = {}
        self._reason: SyncdError = Unavailable("refused")
        self._blocked_since: float | None = None
        self._open = False
        self._next_probe = 0.0
        self._waits: Iterator[float] = backoff(PROBE_SECONDS, 2.0)
        self._heard = 0.0
        self._acked_sent = 0.0
        self._resent = 0.0
        self._ack_seconds = 0.0

    def add(self, out: Outgoing) -> bool:
        """Take a new message; tells whether to send it now (otherwise it waits behind others)."""
        self.out[out.order] = out
        if self._blocked_since is not None and out.again:
            self.held[out.order] = out
            return False
        return True

    def remove(self, out: Outgoing) -> None:
        """Forget a message, however it ended."""
        self.out.pop(out.order, None)
        self.held.pop(out.order, None)
        if not self.out:
            self._unblock()

    def acknowledge(self, out: Outgoing, now: float) -> None:
        """Take an acknowledgement."""
        self._heard = now
        self._acked_sent = max(self._acked_sent, out.last_sent)
        self._ack_seconds += (now - out.last_sent - self._ack_seconds) / 8
        self._open = self._blocked_since is not None
        self.remove(out)

    def refuse(self, out: Outgoing, reason: SyncdError, now: float) -> None:
        """Take a refusal that may pass: no leader, or busy."""
        self._heard = now
        self._reason = reason
        self._open = False
        self.held[out.order] = out
        if self._blocked_since is None:
            self._blocked_since = now
            self._next_probe = now + PROBE_SECONDS
            self._waits = backoff(PROBE_SECONDS, 2.0)

    def heard(self, now: float) -> None:
        """Take a sign of life: our buffer drains, or the connection is new."""
        self._heard = self._resent = now

    def patience(self, *, quick: bool) -> float:
        """Seconds of silence after which the oldest message is sent again."""
        return min(SLOW_RESEND_SECONDS, RESEND_SECONDS + 4 * self._ack_seconds) if quick else SLOW_RESEND_SECONDS

    def due(self, now: float, *, drained: bool, quick: bool) -> Due:
        """Decide.

        :param drained: all that was sent has left our own buffer.
        :param quick: the link carried much in little time so far.
        """
        flying = [out for order, out in self.out.items() if order not in self.held]
        due = Due()
        if self._blocked_since is not None:
            self._due_held(due, now, idle=not flying)
        if flying:
            self._due_flying(due, flying, now, patience=self.patience(quick=quick) if drained else SILENCE_SECONDS)
        due.send.sort(key=lambda out: out.order)
        return due

    def _due_held(self, due: Due, now: float, *, idle: bool) -> None:
        assert self._blocked_since is not None
        if self._open:
            due.send.extend(self.held.values())
            self._unblock()
        elif now - self._blocked_since > REFUSED_SECONDS:
            due.fail.extend((out, self._reason) for out in self.held.values())
        elif idle and self.held and now >= self._next_probe:
            self._next_probe = now + next(self._waits)
            due.send.append(self.held.pop(min(self.held)))
            due.ask = True

    def _due_flying(self, due: Due, flying: list[Outgoing], now: float, *, patience: float) -> None:
        quiet = now - max(self._heard, min(out.first_sent for out in flying))
        if quiet > SILENCE_SECONDS:
            silent = StoreTimeout(f"the server acknowledged nothing for {SILENCE_SECONDS:g} s")
            due.fail.extend((out, silent) for out in flying)
            return
        for out in flying:
            overtaken = out.last_sent < self._acked_sent and now - out.last_sent > OVERTAKEN_SECONDS
            if overtaken and out.again:
                due.send.append(out)
            elif overtaken and now - out.last_sent > SILENCE_SECONDS:
                due.fail.append((out, StoreTimeout("the acknowledgement was lost")))
        if due.send or quiet <= patience or now - self._resent <= patience:
            return
        self._resent = now
        oldest = min((out for out in flying if out.again), key=lambda out: out.order, default=None)
        if oldest is not None:
            due.send.append(oldest)

    def _unblock(self) -> None:
        self.held.clear()
        self._blocked_since = None
        self._open = False
