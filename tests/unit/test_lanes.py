"""Which messages are sent again, and when: decisions only, the time is an argument."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from syncd.errors import StoreTimeout, Unavailable
from syncd.store.lanes import (
    OVERTAKEN_SECONDS,
    PROBE_SECONDS,
    REFUSED_SECONDS,
    RESEND_SECONDS,
    SILENCE_SECONDS,
    SLOW_RESEND_SECONDS,
    Lane,
    Outgoing,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from syncd.store.lanes import Due

GONE = Unavailable("nobody answers")


class Bench:
    """A lane, a clock, and the wire as the transport would use them."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.lane = Lane()
        self.now = 1000.0
        self.sent: list[int] = []

    def new(self, order: int, *, again: bool = True) -> Outgoing:
        out = Outgoing(order, "s", b"", {}, "L", self.loop.create_future(), again, (), 10)
        out.first_sent = self.now
        if self.lane.add(out):
            self.send(out)
        return out

    def send(self, out: Outgoing) -> None:
        out.sends += 1
        out.last_sent = self.now
        self.sent.append(out.order)

    def step(self, seconds: float, *, drained: bool = True, quick: bool = True) -> Due:
        self.now += seconds
        due = self.lane.due(self.now, drained=drained, quick=quick)
        for out, _ in due.fail:
            self.lane.remove(out)
        for out in due.send:
            self.send(out)
        return due

    def orders(self, due: Due) -> list[int]:
        return [out.order for out in due.send]


@pytest.fixture
def bench() -> Iterator[Bench]:
    loop = asyncio.new_event_loop()
    yield Bench(loop)
    loop.close()


def test_what_is_acknowledged_in_time_is_sent_once(bench: Bench) -> None:
    """The usual case: nothing to do."""
    for order in range(1, 4):
        out = bench.new(order)
        assert bench.step(0.1).send == []
        bench.lane.acknowledge(out, bench.now)
    assert (bench.sent, bench.lane.out) == ([1, 2, 3], {})


def test_silence_is_probed_with_the_oldest_message_alone(bench: Bench) -> None:
    """Whether the stream has a leader is learnt with one message; the order of the others is kept for later."""
    first, *_ = [bench.new(order) for order in (1, 2, 3)]
    assert bench.orders(bench.step(RESEND_SECONDS + 0.1)) == [1]
    assert bench.orders(bench.step(RESEND_SECONDS / 2)) == []
    assert bench.orders(bench.step(RESEND_SECONDS)) == [1]
    bench.lane.acknowledge(first, bench.now)
    assert bench.orders(bench.step(OVERTAKEN_SECONDS + 0.1)) == [2, 3]


@pytest.mark.fault("N4")
def test_a_slow_link_is_given_time(bench: Bench) -> None:
    """A message stays unacknowledged on a slow link, on a clock that the test turns.

    It is sent again only after the long wait, and only once the send buffer has drained.
    """
    bench.new(1)
    assert bench.step(SLOW_RESEND_SECONDS - 0.1, quick=False).send == []
    assert bench.step(0.2, quick=False, drained=False).send == []
    assert bench.orders(bench.step(0.1, quick=False)) == [1]


def test_what_was_overtaken_is_sent_again_soon(bench: Bench) -> None:
    """A later acknowledgement proves that the message, or its own acknowledgement, is lost."""
    bench.new(1)
    bench.now += 0.01
    second = bench.new(2)
    bench.lane.acknowledge(second, bench.now)
    assert bench.step(OVERTAKEN_SECONDS / 2).send == []
    assert bench.orders(bench.step(OVERTAKEN_SECONDS)) == [1]


def test_silence_ends_everything_in_bounded_time(bench: Bench) -> None:
    """A server that swallows everything is given up, and so are batches."""
    bench.new(1)
    bench.new(2, again=False)
    failed: list[int] = []
    while bench.lane.out and bench.now < 1000 + 2 * SILENCE_SECONDS:
        due = bench.step(1)
        failed += [out.order for out, error in due.fail if isinstance(error, StoreTimeout)]
    assert failed == [1, 2]
    assert 2 not in bench.sent[2:]


@pytest.mark.fault("N4")
def test_a_draining_buffer_is_a_sign_of_life(bench: Bench) -> None:
    """For 100 s a message stays unacknowledged while its lane is heard of and the buffer still drains.

    It is not given up.
    """
    out = bench.new(1)
    for _ in range(100):
        bench.lane.heard(bench.now)
        assert bench.step(1, drained=False).fail == []
    bench.lane.acknowledge(out, bench.now)


def test_a_refused_message_holds_back_all_that_follow(bench: Bench) -> None:
    """While a leader is elected one message at a time knocks; then all go, in order."""
    outs = [bench.new(order) for order in (1, 2, 3)]
    for out in reversed(outs):
        bench.lane.refuse(out, GONE, bench.now)
    bench.new(4)
    assert bench.sent == [1, 2, 3]
    due = bench.step(PROBE_SECONDS + 0.1)
    assert (bench.orders(due), due.ask) == ([1], True)
    assert bench.step(0.5).send == []
    bench.lane.refuse(outs[0], GONE, bench.now)
    assert bench.orders(bench.step(5)) == [1]
    bench.lane.acknowledge(outs[0], bench.now)
    assert bench.orders(bench.step(0.1)) == [2, 3, 4]
    assert bench.sent == [1, 2, 3, 1, 1, 2, 3, 4]
    bench.new(5)
    assert bench.sent[-1] == 5


def test_refusals_end_in_bounded_time_with_their_reason(bench: Bench) -> None:
    """No leader for longer than an election takes: it is what it looks like."""
    out = bench.new(1)
    bench.lane.refuse(out, GONE, bench.now)
    errors: list[Exception] = []
    while bench.lane.out and bench.now < 1000 + 2 * REFUSED_SECONDS:
        due = bench.step(0.5)
        errors += [error for _, error in due.fail]
        for sent in due.send:
            bench.lane.refuse(sent, GONE, bench.now)
    assert errors == [GONE]
    assert bench.now - 1000 <= REFUSED_SECONDS + 2
    bench.new(2)
    assert bench.sent[-1] == 2


def test_in_flight_messages_are_awaited_before_a_probe(bench: Bench) -> None:
    """What is not answered yet may still be stored: nothing is sent past it."""
    first, second = bench.new(1), bench.new(2)
    bench.lane.refuse(second, GONE, bench.now)
    assert bench.step(PROBE_SECONDS * 2).send == []
    bench.lane.refuse(first, GONE, bench.now)
    assert bench.orders(bench.step(PROBE_SECONDS * 2)) == [1]
