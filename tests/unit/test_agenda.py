"""When a service looks at what, on a clock that the test turns."""

from __future__ import annotations

import asyncio

import pytest

from syncd.agenda import Agenda


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def agenda(clock: Clock) -> Agenda:
    agenda = Agenda(settle=0.05, rescan=60.0, now=clock)
    assert await due(agenda) is None
    agenda.done(0.1)
    return agenda


async def due(agenda: Agenda) -> object:
    """What is due at this moment; "nothing" if waiting would be needed."""
    task = asyncio.ensure_future(agenda.due())
    for _ in range(5):
        await asyncio.sleep(0)
    if not task.done():
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return "nothing"
    return task.result()


async def test_a_hinted_path_is_due_when_it_has_settled(agenda: Agenda, clock: Clock) -> None:
    """Not before its settle time, counted from the last hint."""
    agenda.hint(["a"])
    assert await due(agenda) == "nothing"
    clock.now += 0.04
    agenda.hint(["a"])
    clock.now += 0.04
    assert await due(agenda) == "nothing"
    clock.now += 0.02
    assert await due(agenda) == frozenset({"a"})


@pytest.mark.fault("S2")
async def test_a_path_that_never_settles_is_due_all_the_same(agenda: Agenda, clock: Clock) -> None:
    """One path is hinted at every 20 ms on a clock that the test turns, so that it never settles.

    It is due all the same after twenty settle times of 50 ms, and not before.
    """
    for _ in range(49):
        agenda.hint(["a"])
        clock.now += 0.02
        assert await due(agenda) == "nothing"
    agenda.hint(["a"])
    clock.now += 0.019
    assert await due(agenda) == "nothing"
    agenda.hint(["a"])
    clock.now += 0.002
    assert await due(agenda) == frozenset({"a"})


async def test_everything_is_due_when_hints_have_been_quiet(agenda: Agenda, clock: Clock) -> None:
    """One path is hinted at and taken by a partial round of 0.2 s; then no hint comes.

    A full round is due four seconds later, and not before.
    """
    agenda.hint(["a"])
    clock.now += 0.06
    assert await due(agenda) == frozenset({"a"})
    agenda.done(0.2)
    clock.now += 3.9
    assert await due(agenda) == "nothing"
    clock.now += 0.2
    assert await due(agenda) is None


async def test_a_tree_that_is_never_quiet_still_gets_its_full_rounds(agenda: Agenda, clock: Clock) -> None:
    """Another path is hinted at every second for ten minutes, on a clock that the test turns.

    Eight to twelve full rounds are due all the same: they count from the last full round, not from the last hint.
    """
    full = 0
    for second in range(600):
        agenda.hint([f"f{second}"])
        clock.now += 1.0
        while (what := await due(agenda)) != "nothing":
            full += what is None
            agenda.done(0.2)
    assert 8 <= full <= 12


async def test_after_a_failure_nothing_is_due_before_its_wait_and_then_everything(agenda: Agenda, clock: Clock) -> None:
    """Hints meanwhile do not shorten the wait; a new connection does."""
    agenda.failed(10.0)
    agenda.hint(["a"])
    clock.now += 9.0
    assert await due(agenda) == "nothing"
    clock.now += 1.1
    assert await due(agenda) is None
    agenda.failed(10.0)
    agenda.wake()
    clock.now += 0.1
    assert await due(agenda) is None


async def test_while_halted_any_hint_means_everything(agenda: Agenda, clock: Clock) -> None:
    """A partial round would not see what holds the plan."""
    agenda.halted()
    agenda.hint(["a"])
    clock.now += 0.1
    assert await due(agenda) is None


async def test_a_persons_word_ends_a_halt_at_once(clock: Clock) -> None:
    """Without any hint or timer."""
    word: list[bool] = []
    agenda = Agenda(settle=0.05, rescan=60.0, allowed=lambda: bool(word), now=clock)
    assert await due(agenda) is None
    agenda.halted()
    assert await due(agenda) == "nothing"
    word.append(True)
    assert await due(agenda) is None


async def test_paths_that_were_not_quiet_come_again_later_and_later(agenda: Agenda, clock: Clock) -> None:
    """Each failure doubles the wait, up to five seconds."""
    waits = []
    for _ in range(8):
        agenda.again(["a"])
        started = clock.now
        while await due(agenda) != frozenset({"a"}):
            clock.now += 0.05
        waits.append(round(clock.now - started, 2))
    assert waits == sorted(waits)
    assert 4.9 <= waits[-1] <= 5.1


# -- bursts ------------------------------------------------------------------------------------------------------------


@pytest.mark.fault("S4")
async def test_a_checkout_is_due_once_and_whole(agenda: Agenda, clock: Clock) -> None:
    """200 new paths are hinted at, one every 10 ms, with a settle time of 50 ms.

    Nothing is due before the tree has been quiet for half a second; then all are due at once.
    """
    for number in range(200):
        agenda.hint([f"f{number}"])
        clock.now += 0.01
        assert await due(agenda) == "nothing"
    clock.now += 0.45
    assert await due(agenda) == "nothing"
    clock.now += 0.05
    assert await due(agenda) == frozenset(f"f{number}" for number in range(200))


async def test_changes_that_wait_for_each_other_are_no_burst(agenda: Agenda, clock: Clock) -> None:
    """Each is due after the settle time, however many there were."""
    for number in range(200):
        agenda.hint([f"f{number}"])
        clock.now += 0.049
        assert await due(agenda) == "nothing"
        clock.now += 0.002
        assert await due(agenda) == frozenset({f"f{number}"})


async def test_a_burst_that_never_ends_is_due_all_the_same(agenda: Agenda, clock: Clock) -> None:
    """After twenty of the longest settle times, and again after as many."""
    taken = []
    for number in range(4500):
        agenda.hint([f"f{number}"])
        clock.now += 0.01
        if await due(agenda) != "nothing":
            taken.append(number // 100)
    assert taken == [20, 40]


@pytest.mark.fault("S2")
async def test_a_constant_writer_makes_no_burst(agenda: Agenda, clock: Clock) -> None:
    """One path is hinted at every 10 ms without end, and once in between another one.

    The other is due after its settle time of 50 ms.
    """
    for number in range(500):
        agenda.hint(["log"])
        if number == 300:
            agenda.hint(["edited"])
        clock.now += 0.01
        found = await due(agenda)
        if isinstance(found, frozenset) and "edited" in found:
            assert number in (304, 305, 306)
            return
    pytest.fail("the edited path was never due")
