"""What the two services share: a thread of their own, and the loop of rounds with its failures."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

from syncd.errors import FolderTaken, SafetyHalt, SyncdError
from syncd.retry import backoff, is_transient
from syncd.status import FolderState

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from syncd.agenda import Agenda
    from syncd.status import Allowance, StatusKeeper

SHOWN_SECONDS = 1.0
"""A round for hints is over before anybody could look; one that takes longer, because the server is away, is shown."""

LASTING = {FolderState.HALTED, FolderState.FAILED}
"""What a person has to look at is shown until a round has come to another end."""

T = TypeVar("T")
R = TypeVar("R")


class FolderThread:
    """One thread for all blocking work of one folder: its index and its disk are confined to it."""

    def __init__(self, name: str) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=name)

    async def run(self, function: Callable[[], T]) -> T:
        """Run blocking work. A cancelled wait leaves the work running; :meth:`close` waits for it."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, function)

    def call(self, function: Callable[[], T]) -> T:
        """Run blocking work from another thread (not the event loop's) and wait for it there."""
        return self._executor.submit(function).result()

    async def close(self, last: Callable[[], None]) -> None:
        """Run the last piece of work and end the thread, also when this task is being cancelled."""
        self._executor.submit(last)
        await asyncio.shield(asyncio.to_thread(self._executor.shutdown, wait=True))


async def keep_rounds(
    agenda: Agenda,
    round_: Callable[[frozenset[str] | None, bool], Awaitable[R]],
    finish: Callable[[R], Awaitable[None]],
    *,
    status: StatusKeeper,
    allowance: Allowance,
    broken: Callable[[], bool],
    rescan: float,
    log: Any,
) -> None:
    """Do rounds for ever: what is due, its outcome into status and log, and how long to wait after a failure.

    A failure is logged once, and its end; not what lies between.

    :param round_: gets the due paths (``None``: everything) and whether a person allowed a held plan.
    :param finish: gets the result of a round that went through.
    :param broken: tells whether the index was found damaged: then the service must be begun anew.
    :param rescan: seconds to wait after a failure that trying again does not mend.
    :raises FolderTaken: somebody else publishes this folder.
    :raises DiskProblem: the index is damaged and set aside.
    """
    waits = backoff()
    failing = ""
    while True:
        paths = await agenda.due()
        allowed = status.now.state is FolderState.HALTED and allowance.given()
        lasts = status.now.state in LASTING and not allowed
        if not lasts and (paths is None or status.now.state is not FolderState.IN_SYNC):
            status.set(state=FolderState.SYNCING)
        try:
            with nullcontext() if lasts else _shown_when_long(status):
                result = await round_(paths, allowed)
        except SafetyHalt as halt:
            if status.now.error != halt.message:
                log.error("safety_halt", reason=halt.message)
            status.set(state=FolderState.HALTED, error=halt.message, hint=halt.hint)
            agenda.halted()
        except FolderTaken:
            raise
        except SyncdError as error:
            if broken():
                raise
            waiting = is_transient(error)
            state = FolderState.WAITING if waiting else FolderState.FAILED
            status.set(state=state, error=error.message, hint=error.hint)
            if failing != error.message:
                log.warning("round_failed", error=error.message, hint=error.hint)
            failing = error.message
            agenda.failed(next(waits) if waiting else rescan)
        else:
            if failing:
                log.info("round_recovered", after=failing)
            failing, waits = "", backoff()
            # A word that was given while nothing was held must not count for a later plan.
            await asyncio.to_thread(allowance.clear)
            await finish(result)


@contextmanager
def _shown_when_long(status: StatusKeeper) -> Iterator[None]:
    show = asyncio.get_running_loop().call_later(SHOWN_SECONDS, lambda: status.set(state=FolderState.SYNCING))
    try:
        yield
    finally:
        show.cancel()
